"""`RewriteDataCollator`: TRL's collator plus per-token columns that stay aligned with `input_ids`."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad


# column → (padding value, dtype): one value per token of `input_ids`
TOKEN_COLUMNS = {
    "behavior_log_probs": (float("nan"), torch.float32),
    "source_ids": (-1, torch.int8),
    "weight": (1.0, torch.float32),
}


@dataclass
class RewriteDataCollator(DataCollatorForLanguageModeling):
    """
    TRL's language-modelling batch plus, where the examples have them, `behavior_log_probs` (B, T) float32, NaN where μ is
    unknown, `source_ids` (B, T) int8, -1 on padding, and `weight` (B, T) float32, the example's own weight;
    aligned with `input_ids` padded, padding-free and packed.

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
