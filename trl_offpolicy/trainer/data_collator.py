"""
Per-token columns (log μ, source, weight, reward): aligned with a row's `input_ids`, and kept so by
`RewriteDataCollator`.
"""

import math
import warnings
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

import torch
from transformers import ProcessorMixin
from trl.data_utils import common_prefix_length, prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad

from ..data.prompts import contents
from ..data.rows import Source
from ..data.tokenization import encode_prompt, says_otherwise
from ..sampling.sampler import PLAIN
from ..sampling.server_answers import NO_LOG_PROB


# column → (padding value, dtype): one value per token of `input_ids`
TOKEN_COLUMNS = {
    "behavior_log_probs": (float("nan"), torch.float32),
    "reference_log_probs": (float("nan"), torch.float32),
    "old_log_probs": (float("nan"), torch.float32),
    "source_ids": (-1, torch.int8),
    "weight": (1.0, torch.float32),
    "reward": (float("nan"), torch.float32),
}
SOURCE_IDS = {str(source): i for i, source in enumerate(Source)}
# A dataset with one of these columns was made by this package and must be aligned; other columns may belong to the
# user.
ROW_COLUMNS = {"completion_ids", "behavior_log_probs"}


@dataclass
class RewriteDataCollator(DataCollatorForLanguageModeling):
    """
    TRL's language-modelling batch plus, where the examples have them, `behavior_log_probs` (B, T) float32, NaN where μ
    is unknown, `reference_log_probs` (B, T) float32 likewise, `source_ids` (B, T) int8, -1 on padding, and `weight`
    and `reward` (B, T) float32, the example's own, NaN where it has no reward; aligned with `input_ids` padded,
    padding-free and packed. All of them count beside `behavior_log_probs` only: examples without it have columns of
    the user's own.

    Args:
        vocab_size (`int`, *optional*): Number of the model's token embeddings; the trainer sets it.
        scored_columns (`list[str]`, *optional*): Columns that count in any example, for the trainer, which sets this,
            has computed them.
        takes_reward (`bool`, *optional*, defaults to `True`): Whether the objective does; the trainer sets it.

    Raises:
        ValueError: A column does not have one value per token, a token id is none of the model's, or a reward is below
            0 that the objective would not look at.
    """

    vocab_size: int | None = None
    scored_columns: list[str] = field(default_factory=list)
    takes_reward: bool = True

    @classmethod
    def like(cls, collator: DataCollatorForLanguageModeling) -> "RewriteDataCollator":
        """One with the settings of the collator that TRL built."""
        return cls(**{f.name: getattr(collator, f.name) for f in fields(DataCollatorForLanguageModeling)})

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        output = super().torch_call(examples)
        if self.vocab_size is not None and int(output["input_ids"].max()) >= self.vocab_size:
            row = next(example["input_ids"] for example in examples if max(example["input_ids"]) >= self.vocab_size)
            raise ValueError(
                f"A row holds the token id {max(row)}, but the model has {self.vocab_size} token embeddings: it was tokenized for another "
                f"model. Its ids start with {row[:20]}."
            )
        aligned = "behavior_log_probs" in examples[0]
        for name, (padding, dtype) in TOKEN_COLUMNS.items():
            if name not in examples[0] or not (aligned or name in self.scored_columns):
                continue
            columns = [torch.tensor(example[name], dtype=dtype) for example in examples]
            for column, example in zip(columns, examples, strict=True):
                if len(column) != len(example["input_ids"]):
                    raise ValueError(
                        f"`{name}` has {len(column)} values for {len(example['input_ids'])} tokens; it needs one per token of "
                        "`input_ids`. Did something truncate or re-tokenise the text after it was written?"
                    )
            if name == "reward" and not self.takes_reward and any((column < 0).any() for column in columns):
                raise ValueError(
                    "The dataset was prepared for an objective that takes rewards, and some are below 0: this objective would train the model "
                    "to write these rows. Use objective='topr', or leave them out."
                )
            if self.padding_free:
                columns = [torch.cat(columns)]
            output[name] = pad(
                columns, padding_value=padding, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of
            )
        return output


def encode_prompt_of(row: dict, prompt: list | str, processing_class, chat_template: str | None = None) -> list[int]:
    """
    Token ids of a `prompt` of this row, as TRL would have them of a text-only row: a processor's template, contents in
    parts.
    """
    if isinstance(processing_class, ProcessorMixin):
        chat_template = chat_template or processing_class.chat_template
        prompt = prompt if isinstance(prompt, str) else prepare_multimodal_messages(prompt)
        processing_class = processing_class.tokenizer  # the processor itself makes a batch of one text
    return encode_prompt(processing_class, prompt, chat_template, row.get("tools"), row.get("chat_template_kwargs"))


def align_row(
    example: dict,
    index: int,
    processing_class,
    chat_template: str | None,
    completion_only: bool,
    recompute: bool = False,
    source_column: str | None = None,
    weight_column: str | None = None,
    objective_of: dict[str | None, str | None] | None = None,
    streaming: bool = False,
) -> dict:
    """
    `input_ids`, `labels`, `behavior_log_probs`, `source_ids`, `weight` and `reward` of row `index`, all of the same
    length.

    A row with `completion_ids` becomes prompt + those ids; any other keeps what TRL made of it, with μ unknown. With
    `recompute` the row's own log-probs are left out, and it is only checked that they can be computed. `objective_of`
    is the objective's name by source (`None`: of all others; no name: a function of the user's own), where the column
    `reward` is one of ours.
    """
    completion_ids = example.get("completion_ids") or []
    text = next((example[name] for name in ("prompt", "messages", "text") if name in example), "")  # for errors
    log_probs = [] if recompute else example.get("behavior_log_probs") or []
    _check_numbers(index, completion_ids, log_probs, text)
    input_ids, labels = example["input_ids"], example["labels"]
    if completion_ids:
        if "prompt" not in example:
            raise ValueError(
                f"Row {index} has `completion_ids` but no `prompt` that they continue. Give it its own column, as DataRewriter does: {text!r:.200}"
            )
        prompt_ids = encode_prompt_of(example, example["prompt"], processing_class, chat_template)
        input_ids = prompt_ids + completion_ids
        # Of the prompt's tokens those are trained on that are in TRL's labels: all, or with assistant_only_loss earlier
        # answers.
        same = 0 if completion_only else common_prefix_length(prompt_ids, example["input_ids"])
        labels = labels[:same] + [-100] * (len(prompt_ids) - same) + completion_ids
        if log_probs and len(log_probs) != len(completion_ids):
            raise ValueError(
                f"Row {index} has {len(completion_ids)} `completion_ids` but {len(log_probs)} `behavior_log_probs`: {text!r:.200}"
            )
    elif log_probs:
        raise ValueError(
            f"Row {index} has `behavior_log_probs` but no `completion_ids`: a text tokenised again need not give the sampled tokens, so "
            f"the log-probs cannot be matched. Store the sampled ids in `completion_ids`, or drop the log-probs: {text!r:.200}"
        )
    if not completion_ids:
        _warn_of_lost_thinking(example, input_ids, processing_class)
    _check_sampling(example, index, bool(log_probs), recompute and bool(completion_ids))
    if (decoded := says_otherwise(getattr(processing_class, "tokenizer", processing_class), example)) is not None:
        raise ValueError(
            f"Row {index}: its `completion_ids` are {decoded!r:.200} to this model's tokenizer, but its completion is {example['completion']!r:.300}: they "
            f"are another model's ids (it was sampled from {example.get('model')!r}). Train that model, or drop them with "
            "`dataset.remove_columns(['completion_ids', 'behavior_log_probs'])`: the texts are then tokenized anew, and μ is not known."
        )
    unknown = [float("nan")] * (len(input_ids) - len(log_probs))
    source, weight = example.get(source_column), example.get(weight_column)
    if streaming:  # for datasets that are not streamed the whole column was checked already
        warn_of_unknown_sources([source])
    if weight is not None and not (isinstance(weight, Real) and 0 <= float(weight) < math.inf):
        raise ValueError(
            f"Row {index} has {weight_column}={weight!r:.100}, and a weight must be a finite number of at least 0 (a missing one is 1). If the column is "
            f"none of weights, rename it; weight_column says which one is: {text!r:.200}"
        )
    reward = math.nan
    if objective_of is not None:
        objective = objective_of.get(source if isinstance(source, str) else None, objective_of[None])
        reward = _checked_reward(example.get("reward"), index, objective, bool(log_probs) or recompute, text)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "behavior_log_probs": unknown + log_probs,
        "source_ids": [SOURCE_IDS.get(source, -1) if isinstance(source, str) else -1] * len(input_ids),
        "weight": [1.0 if weight is None else float(weight)] * len(input_ids),
        "reward": [reward] * len(input_ids),
    }


def _checked_reward(reward, index: int, objective: str | None, has_log_probs: bool, text) -> float:
    """
    A row's reward, NaN for none; `ValueError` if it is no number, its objective would learn what it forbids, or needs
    another one.
    """
    if reward is not None and (not isinstance(reward, Real) or math.isinf(reward)):
        raise ValueError(
            f"Row {index} has reward={reward!r:.100}, which is no finite number. Rename the column if it means something else: {text!r:.200}"
        )
    reward = math.nan if reward is None else float(reward)
    if objective == "topr" and not abs(reward) > 0:
        raise ValueError(
            f"Row {index} has {'no reward' if math.isnan(reward) else 'the reward 0'}, and objective='topr' needs one above 0 (to be learned) or below (to be unlearned). Train on what "
            "`trl-offpolicy rows RUN --keep all` writes, or choose topr for the sources that have rewards only: objective={'self': 'topr', 'expert': "
            f"'nll'}}: {text!r:.200}"
        )
    if objective == "topr" and reward < 0 and not has_log_probs:
        raise ValueError(
            f"Row {index} has the reward {reward} but no `behavior_log_probs`: what is pushed down is weighted by π/μ, without which it would be "
            f"pushed for ever. Leave the row out, or train on rows that carry log μ: {text!r:.200}"
        )
    if objective not in (None, "topr") and reward < 0:
        raise ValueError(
            f"Row {index} has the reward {reward}, and objective={objective!r} does not look at rewards: it would train the model to write this row, "
            f"which was judged wrong. Use objective='topr', leave out the rows with a reward below 0, or rename a column that means something else: {text!r:.200}"
        )
    return reward


def _warn_of_lost_thinking(example: dict, input_ids: list[int], processing_class) -> None:
    """
    Says when the chat template has left out what comes before `</think>`, as DeepSeek-R1's does. A row with
    `completion_ids` is trained on these, thinking and all.
    """
    turns = contents(example.get("completion") or example.get("messages") or "")
    text = turns[-1] if turns else ""
    if not isinstance(text, str) or "</think>" not in text:
        return
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    kept, thinking = tokenizer.decode(input_ids), text.partition("</think>")[0].removeprefix("<think>")
    if "".join(thinking.split()) not in "".join(kept.split()):
        warnings.warn(
            "The chat template leaves the thinking (all before </think>) out of completions that have no `completion_ids`: the model is trained on "
            "their answers alone. Set `processing_class.chat_template = trl.chat_template_utils.get_training_chat_template(processing_class)`, or pass "
            "a template that keeps it as chat_template_path.",
            stacklevel=2,
        )


def warn_of_unknown_sources(sources) -> None:
    """Says, once, which values of a column `source` are none of ours."""
    unknown = sorted({str(source) for source in sources if source is not None} - SOURCE_IDS.keys())
    if unknown:
        warnings.warn(
            f"The column `source` holds {', '.join(map(repr, unknown[:5]))}{' and others' if unknown[5:] else ''}, which is none of "
            f"{', '.join(SOURCE_IDS)}: such rows belong to no source, and an objective chosen by source is `nll` for them.",
            stacklevel=2,
        )


def _check_numbers(index: int, completion_ids: list, log_probs: list, text) -> None:
    """
    Ids are token ids, and log-probs are finite: an infinite or missing one would make the weights, and then the model,
    NaN.
    """
    for token in completion_ids:
        if not isinstance(token, int) or not 0 <= token < 2**31:
            raise ValueError(
                f"Row {index} has {token!r} among its `completion_ids`, which is no token id: {text!r:.200}"
            )
    for log_prob in log_probs:
        if not (
            isinstance(log_prob, Real) and NO_LOG_PROB < float(log_prob) <= 1e-3
        ):  # an engine's rounding may go above 0
            raise ValueError(
                f"Row {index} has {log_prob!r} among its `behavior_log_probs`; the log-prob of a sampled token is at most 0 and above {NO_LOG_PROB:g}, "
                "which engines write for minus infinity. Leave "
                f"the row's list empty if they are not known, or set precompute_behavior_log_probs=True: {text!r:.200}"
            )


def _sampling_number(example: dict, index: int, name: str) -> float | None:
    """A row's `temperature` or another of [`PLAIN`], which a CSV file may hold as a text."""
    value = example.get(name)
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Row {index} has {name}={value!r:.100}, which is no number.") from error


def _check_sampling(example: dict, index: int, stored: bool, recompute: bool) -> None:
    """A log-prob of the model is log μ only for plain sampling; computed again, it can follow a temperature too."""
    if not (stored or recompute):
        return
    for name, plain in PLAIN.items():
        value = _sampling_number(example, index, name)
        if value in (None, plain) or (recompute and name == "temperature" and value > 0):
            continue
        if name == "top_k" and value == -1:  # vLLM writes -1 for the whole vocabulary
            continue
        raise ValueError(
            f"Row {index} was sampled at {name}={example[name]}, so the model's log-probs (temperature 1, whole vocabulary) are not those of the "
            f"distribution it was drawn from. Sample with {name}={plain}, or drop the column `behavior_log_probs`"
            + (" or set precompute_behavior_log_probs=True." if stored and name == "temperature" else ".")
        )
