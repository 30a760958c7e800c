"""The policy before training, π_0: what it says of a dataset's tokens, and its hidden states while another one is trained.

With a peft adapter it is the model with the adapter off, at any time. Without one it is the model itself until training
begins; `asft`, which asks it at every step, keeps a frozen copy.
"""

import contextlib
import copy
import hashlib
import math
from collections.abc import Callable

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets.fingerprint import Hasher
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer import add_fused_lm_head

from .scoring import causal_lm, target_log_probs


@contextlib.contextmanager
def without_training(model):
    """No gradient and no dropout."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


class InitialPolicy:
    """π_0 of the `model` that `accelerator` trains."""

    def __init__(self, model, accelerator):
        self.model, self.accelerator = model, accelerator
        self.has_adapter = is_peft_model(model)
        self.frozen = None

    def freeze(self) -> None:
        """Keeps a copy of the model as it is, unless there is an adapter to switch off."""
        if self.has_adapter:
            return
        frozen = copy.deepcopy(self.model)
        del frozen.forward  # its fused head is bound to the model that is trained
        add_fused_lm_head(frozen)
        frozen.requires_grad_(False).eval()
        state = self.accelerator.state
        if state.deepspeed_plugin is not None:
            self.frozen = prepare_deepspeed(frozen, self.accelerator)
        elif getattr(state, "fsdp_plugin", None) is not None:
            self.frozen = prepare_fsdp(frozen, self.accelerator)
        else:
            self.frozen = self.accelerator.prepare_model(frozen, evaluation_mode=True)

    @contextlib.contextmanager
    def asked(self, model=None):
        """The model to call for π_0, without gradient or dropout; `model` is `self.model` as accelerate wrapped it."""
        if self.frozen is not None:
            with torch.no_grad():
                yield self.frozen
            return
        off = self.model.disable_adapter() if self.has_adapter else contextlib.nullcontext()
        with without_training(self.model), off:
            yield self.model if model is None else model

    def score(self, dataset, columns: list[str], pairs_of: Callable, settings, description: str):
        """
        A map-style dataset with log-probs under π_0 as new columns, cached like any `datasets` map.

        Args:
            columns (`list[str]`): Columns to write: a value per token of `input_ids`, NaN where there is none.
            pairs_of (`Callable`): row → `{column: (prompt ids, target ids, temperature)}`, where the targets are the last of the
                row's `input_ids`.
            settings: What else the result depends on, for the cache.
        """

        def score(batch: dict[str, list]) -> dict[str, list]:
            rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            wanted = [(i, column, pair) for i, row in enumerate(rows) for column, pair in pairs_of(row).items()]
            # Each process scores a share of each batch, and all write all.
            share = wanted[self.accelerator.process_index :: self.accelerator.num_processes]
            with self.asked() as model, self.accelerator.autocast():
                scored = target_log_probs(
                    model,
                    [pair[:2] for *_, pair in share],
                    temperatures=[pair[2] for *_, pair in share],
                    progress=False,
                )
            values = [(i, column, x.tolist()) for (i, column, _), x in zip(share, scored, strict=True)]
            filled = {column: [[math.nan] * len(row["input_ids"]) for row in rows] for column in columns}
            for i, column, log_probs in gather_object(values) if self.accelerator.num_processes > 1 else values:
                of_row = filled[column][i]
                of_row[len(of_row) - len(log_probs) :] = log_probs
            return filled

        if "behavior_log_probs" in columns and "model_revision" in dataset.column_names:
            adapted = next(
                (i for i, revision in enumerate(dataset["model_revision"]) if "+" in (revision or "")), None
            )
            if adapted is not None:
                raise ValueError(
                    f"Row {adapted} was sampled with the adapter {dataset[adapted]['model']!r}, so its behaviour log-probs cannot be computed with the "
                    "model that is trained. Set precompute_behavior_log_probs=False to use the stored ones."
                )
        fingerprint = Hasher.hash((dataset._fingerprint, settings, self._digest()))
        alone = self.accelerator.num_processes == 1
        place = self.model.device
        elsewhere = place.type != self.accelerator.device.type  # under FSDP, before training
        if elsewhere:
            self.model.to(self.accelerator.device)
        try:
            return dataset.map(
                score,
                batched=True,
                new_fingerprint=fingerprint if alone else f"{fingerprint}-{self.accelerator.process_index}",
                load_from_cache_file=alone,  # they exchange shares: all or none may find the result in the cache
                desc=description,
            )
        finally:
            if elsewhere:
                self.model.to(place)

    def _digest(self) -> str:
        """Of the weights without the adapter's, and of the arithmetic they are used with."""
        digest = hashlib.blake2b(self.accelerator.mixed_precision.encode())
        for name, tensor in sorted(causal_lm(self.model).state_dict().items()):
            if ".default" not in name:  # peft's name for the adapter that is trained
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()
