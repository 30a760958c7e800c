"""Per-token columns (log μ, source, weight): aligned with a row's `input_ids`, and kept so by `RewriteDataCollator`."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad

from .rows import Source, encode_prompt, says_otherwise


# column → (padding value, dtype): one value per token of `input_ids`
TOKEN_COLUMNS = {
    "behavior_log_probs": (float("nan"), torch.float32),
    "reference_log_probs": (float("nan"), torch.float32),
    "old_log_probs": (float("nan"), torch.float32),
    "source_ids": (-1, torch.int8),
    "weight": (1.0, torch.float32),
}
SOURCE_IDS = {str(source): i for i, source in enumerate(Source)}
# Any of them makes a dataset one that we have to align.
ROW_COLUMNS = {"completion_ids", "behavior_log_probs", "source", "weight"}


@dataclass
class RewriteDataCollator(DataCollatorForLanguageModeling):
    """
    TRL's language-modelling batch plus, where the examples have them, `behavior_log_probs` (B, T) float32, NaN where μ is
    unknown, `reference_log_probs` (B, T) float32 likewise, `source_ids` (B, T) int8, -1 on padding, and `weight` (B, T) float32,
    the example's own weight; aligned with `input_ids` padded, padding-free and packed.

    Raises `ValueError` when a column does not have one value per token.
    """

    @classmethod
    def like(cls, collator: DataCollatorForLanguageModeling) -> "RewriteDataCollator":
        """One with the settings of the collator that TRL built."""
        return cls(**{f.name: getattr(collator, f.name) for f in fields(DataCollatorForLanguageModeling)})

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        output = super().torch_call(examples)
        for name, (padding, dtype) in TOKEN_COLUMNS.items():
            if name not in examples[0]:
                continue
            columns = [torch.tensor(example[name], dtype=dtype) for example in examples]
            for column, example in zip(columns, examples, strict=True):
                if len(column) != len(example["input_ids"]):
                    raise ValueError(
                        f"`{name}` has {len(column)} values for {len(example['input_ids'])} tokens; it needs one per token of "
                        "`input_ids`. Did something truncate or re-tokenise the text after it was written?"
                    )
            if self.padding_free:
                columns = [torch.cat(columns)]
            output[name] = pad(
                columns, padding_value=padding, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of
            )
        return output


def encode_prompt_of(row: dict, prompt: list | str, processing_class, chat_template: str | None = None) -> list[int]:
    """Token ids of a `prompt` of this row, as TRL would have them of a text-only row: a processor's template, contents in parts."""
    if isinstance(processing_class, ProcessorMixin):
        chat_template = chat_template or processing_class.chat_template
        prompt = prompt if isinstance(prompt, str) else prepare_multimodal_messages(prompt)
        processing_class = processing_class.tokenizer  # the processor itself makes a batch of one text
    return encode_prompt(processing_class, prompt, chat_template, row.get("tools"), row.get("chat_template_kwargs"))


def align_row(
    example: dict, processing_class, chat_template: str | None, completion_only: bool, recompute: bool = False
) -> dict:
    """
    `input_ids`, `labels`, `behavior_log_probs`, `source_ids` and `weight` of one row, all of the same length.

    A row with `completion_ids` becomes prompt + those ids; any other keeps what TRL made of it, with μ unknown. With
    `recompute` the row's own log-probs are left out, and it is only checked that they can be computed.
    """
    completion_ids = example.get("completion_ids") or []
    text = next((example[name] for name in ("prompt", "messages", "text") if name in example), "")  # for errors
    log_probs = [] if recompute else example.get("behavior_log_probs") or []
    input_ids, labels = example["input_ids"], example["labels"]
    if completion_ids:
        if "prompt" not in example:
            raise ValueError(
                f"A row has `completion_ids` but no `prompt` that they continue. Give it its own column, as DataRewriter does: {text!r:.200}"
            )
        prompt_ids = encode_prompt_of(example, example["prompt"], processing_class, chat_template)
        input_ids = prompt_ids + completion_ids
        labels = [-100] * len(prompt_ids) + completion_ids if completion_only else input_ids
        if log_probs and len(log_probs) != len(completion_ids):
            raise ValueError(
                f"A row has {len(completion_ids)} `completion_ids` but {len(log_probs)} `behavior_log_probs`: {text!r:.200}"
            )
    elif log_probs:
        raise ValueError(
            "A row has `behavior_log_probs` but no `completion_ids`: a text tokenised again need not give the sampled tokens, so "
            f"the log-probs cannot be matched. Store the sampled ids in `completion_ids`, or drop the log-probs: {text!r:.200}"
        )
    _check_sampling(example, bool(log_probs), recompute and bool(completion_ids))
    if (decoded := says_otherwise(getattr(processing_class, "tokenizer", processing_class), example)) is not None:
        raise ValueError(
            f"A row's `completion_ids` are {decoded!r:.200} to this model's tokenizer, but its completion is {example['completion']!r:.300}: they "
            f"are another model's ids (it was sampled from {example.get('model')!r}). Train that model, or drop them with "
            "`dataset.remove_columns(['completion_ids', 'behavior_log_probs'])`: the texts are then tokenized anew, and μ is not known."
        )
    unknown = [float("nan")] * (len(input_ids) - len(log_probs))
    source, weight = example.get("source"), example.get("weight")
    source_id = SOURCE_IDS.get(source, -1) if isinstance(source, str) else -1  # a user's own column may hold anything
    return {
        "input_ids": input_ids,
        "labels": labels,
        "behavior_log_probs": unknown + log_probs,
        "source_ids": [source_id] * len(input_ids),
        "weight": [1.0 if weight is None else float(weight)] * len(input_ids),
    }


def _check_sampling(example: dict, stored: bool, recompute: bool) -> None:
    """A log-prob of the model is log μ only for plain sampling; computed again, it can follow a temperature too."""
    for name, plain in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0)):
        value = example.get(name)
        if value in (None, plain) or (recompute and name == "temperature" and value > 0):
            continue
        if stored or recompute:
            raise ValueError(
                f"A row was sampled at {name}={value}, so the model's log-probs (temperature 1, whole vocabulary) are not those of the "
                f"distribution it was drawn from. Sample with {name}={plain}, or drop the column `behavior_log_probs`"
                + (" or set precompute_behavior_log_probs=True." if stored and name == "temperature" else ".")
            )
