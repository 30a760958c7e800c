"""
The policy before training, π_0: what it says of a dataset's tokens, and its hidden states while another one is
trained.

Until training begins it is the model itself. With a peft adapter that changes nothing yet (LoRA's default, prompt
tuning) it is the model with the adapter off too, and that at any time, if nothing is trained beside the adapter.
`asft`, which asks it at every step, keeps a frozen copy of a model without adapter. Adapters that start as something
else (PiSSA, OLoRA, LoftQ, one that was trained before), and those beside which weights of the model are trained
(`bias="all"`), are scored before training only.
"""

import contextlib
import copy
import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets.fingerprint import Hasher
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer import add_fused_lm_head

from ..sampling.log_probs import causal_lm, target_log_probs


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


def _active(model) -> set[str]:
    """The names of a peft model's active adapters, which stand in the names of their weights."""
    return {model.active_adapter} if isinstance(model.active_adapter, str) else set(model.active_adapter)


def _is_of(adapters: set[str], weight: str) -> bool:
    return not adapters.isdisjoint(weight.split("."))


def adapter_is_neutral(model) -> bool:
    """
    Whether a peft model computes the same with its adapter and without. Prompt learning counts as if it did. Of LoRA
    its B must be zero, and copies of modules must be copies; where an adapter has other weights, logits are compared.
    """
    active, other = _active(model), False
    if model.active_peft_config.is_prompt_learning:
        return True
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, own in parameters.items():
        if not _is_of(active, name):
            continue
        part = re.search(
            r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|modules_to_save)\.([^.]+)", name
        )
        if own.is_meta:  # only the main process of FSDP may hold weights yet
            return True
        if part is None:
            other = True
        elif part[1] in ("lora_B", "lora_embedding_B"):
            if own.any():
                return False
        elif part[1] == "modules_to_save":
            original = parameters.get(name.replace(part[0], ".original_module"))
            if original is not None and not torch.equal(own, original.to(own)):  # it may be kept in another precision
                return False
    return not other or _same_without_adapter(model)


def _same_without_adapter(model) -> bool:
    """Of a few tokens, with those among them that have trained embeddings of their own (`trainable_token_indices`)."""
    of_modules = [getattr(module, "token_indices", None) for module in model.modules()]
    trained = {i for of in of_modules if isinstance(of, dict) for indices in of.values() for i in indices}
    size = causal_lm(model).config.get_text_config().vocab_size
    ids = torch.tensor([[*range(min(16, size)), *sorted(trained)]], device=model.device)
    with without_training(model):
        on = model(input_ids=ids, use_cache=False).logits
        with model.disable_adapter():
            return torch.equal(on, model(input_ids=ids, use_cache=False).logits)


def trains_beside_adapter(model) -> bool:
    """Whether weights are trained that stay changed while a peft model's adapter is off, such as biases."""
    active = _active(model)
    return any(weight.requires_grad and not _is_of(active, name) for name, weight in model.named_parameters())


RECORD = "initial_policy.json"  # in a checkpoint: which policy it was


class InitialPolicy:
    """
    π_0 of the `model` that `accelerator` trains; made before training begins, and `needed` if an objective asks it
    anything.
    """

    def __init__(self, model, accelerator, needed: bool = True):
        self.model, self.accelerator = model, accelerator
        self.has_adapter = is_peft_model(model)
        # The adapter changes nothing yet; and it is all that is trained, so that π_0 is there whenever it is off.
        # All processes are asked, since one may hold all weights.
        asked = needed and self.has_adapter
        self.has_neutral_adapter = asked and all(gather_object([adapter_is_neutral(model)]))
        self.has_removable_adapter = self.has_neutral_adapter and not trains_beside_adapter(model)
        self.frozen = None
        self.digest = self._digest() if needed else None

    def record(self, checkpoint: str) -> None:
        """Writes into a checkpoint's directory which policy π_0 is."""
        directory = Path(checkpoint)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / RECORD).write_text(json.dumps({"model": self._name(), "digest": self.digest}) + "\n")

    def check(self, checkpoint: str) -> None:
        """
        Raises:
            ValueError: The run that wrote the checkpoint began with another policy. (Checkpoints written before there
                was a record pass.)
        """
        file = Path(checkpoint) / RECORD
        recorded = json.loads(file.read_text()) if file.exists() else {"digest": self.digest}
        if recorded["digest"] != self.digest:
            raise ValueError(
                f"The run in {checkpoint} began with the model {recorded['model']!r}, which the objective compares with, but you passed "
                f"{self._name()!r}, whose weights are not the same: the comparison would be with them. Pass the model that the run began with, in "
                "the same dtype; train(resume_from_checkpoint=…) then loads the checkpoint's weights into it."
            )

    def _name(self) -> str:
        return causal_lm(self.model).config._name_or_path or "a model made in memory"

    def freeze(self) -> None:
        """Keeps a copy of the model as it is, unless there is an adapter to switch off.

        Raises:
            ValueError: Without its adapter the model would be another one than it is now.
        """
        if self.has_removable_adapter:
            return
        if self.has_neutral_adapter:
            raise ValueError(
                "objective='asft' asks the policy before training at every step, by switching the adapter off, but weights of the model itself are "
                "trained beside the adapter, which stay changed then (bias='all' or 'lora_only' in its config, or weights that were unfrozen). Write "
                "bias='none', and name modules to be trained whole in modules_to_save."
            )
        if self.has_adapter:
            raise ValueError(
                "objective='asft' asks the policy before training at every step, by switching the adapter off, but this adapter changes the "
                "model from the start (it was trained before, or its init_lora_weights is 'pissa', 'olora', 'loftq' or the like). Merge it with "
                "`model.merge_and_unload()` and start a new adapter, or write init_lora_weights=True."
            )
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
        """
        The frozen copy, or the model with its adapter off (π_0 if that is neutral, the base in any case), without
        gradient or dropout; `model` is `self.model` as accelerate wrapped it.
        """
        if self.frozen is not None:
            with torch.no_grad():
                yield self.frozen
            return
        off = self.model.disable_adapter() if self.has_adapter else contextlib.nullcontext()
        with without_training(self.model), off:
            yield self.model if model is None else model

    @contextlib.contextmanager
    def _before_training(self):
        """π_0, before training; where the adapter is neutral and alone trained, at any time."""
        if self.has_removable_adapter:
            with self.asked() as model:
                yield model
        else:
            with without_training(self.model):
                yield self.model

    def score(self, dataset, column: str, pieces_of: Callable, settings, description: str):
        """
        A map-style dataset with log-probs under π_0 as a new column, cached like any `datasets` map.

        Args:
            column (`str`): Column to write: a value per token of `input_ids`, NaN where there is none.
            pieces_of (`Callable`): row → list of `(end, prompt ids, target ids, temperature)`, where the targets stand
                in `input_ids` up to the position `end`.
            settings: What else the result depends on, for the cache.
        """

        def score(batch: dict[str, list]) -> dict[str, list]:
            rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            wanted = [(i, *piece) for i, row in enumerate(rows) for piece in pieces_of(row)]
            # Each process scores a share of each batch, and all write all.
            share = wanted[self.accelerator.process_index :: self.accelerator.num_processes]
            with self._before_training() as model, self.accelerator.autocast():
                scored = target_log_probs(
                    model,
                    [(prompt, target) for *_, prompt, target, _ in share],
                    temperatures=[temperature for *_, temperature in share],
                    progress=False,
                )
            values = [(i, end, x.tolist()) for (i, end, *_), x in zip(share, scored, strict=True)]
            filled = [[math.nan] * len(row["input_ids"]) for row in rows]
            for i, end, log_probs in gather_object(values) if self.accelerator.num_processes > 1 else values:
                filled[i][end - len(log_probs) : end] = log_probs
            return {column: filled}

        if column == "behavior_log_probs":
            _check_behavior(dataset)
        fingerprint = Hasher.hash(
            (dataset._fingerprint, column, settings, self.accelerator.mixed_precision, self.digest)
        )
        alone = self.accelerator.num_processes == 1
        place = self.model.device
        elsewhere = place.type != self.accelerator.device.type  # under FSDP, before training
        if elsewhere:
            self.model.to(self.accelerator.device)
        try:
            return dataset.with_format(None).map(
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
        """Of the weights, without those of an adapter that changes nothing yet."""
        digest = hashlib.blake2b()
        if self.has_adapter and not self.has_neutral_adapter:  # an adapter's scaling is not among the weights
            scaling = [getattr(module, "scaling", None) for module in self.model.modules()]
            digest.update(repr([x for x in scaling if isinstance(x, dict)]).encode())
        left_out = _active(self.model) if self.has_neutral_adapter else set()
        for name, tensor in sorted(causal_lm(self.model).state_dict().items()):
            if tensor.is_meta:  # another process of FSDP holds them
                continue
            if not _is_of(left_out, name):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def _check_behavior(dataset) -> None:
    """Raises `ValueError` for rows that the model that is trained has surely not drawn, or not as it does alone."""
    otherwise = "Set precompute_behavior_log_probs=False to use the stored ones."
    revisions = dataset["model_revision"] if "model_revision" in dataset.column_names else []
    adapted = next((i for i, revision in enumerate(revisions) if "+" in (revision or "")), None)
    if adapted is not None:
        raise ValueError(
            f"Row {adapted} was sampled with the adapter {dataset[adapted]['model']!r}, so its behaviour log-probs cannot be computed with the "
            f"model that is trained. {otherwise}"
        )
    if (
        len(set(revisions)) > 1 and "completion_ids" in dataset.column_names
    ):  # rows without tokens, such as demonstrations, are not scored
        drawn = zip(revisions, dataset["completion_ids"], strict=True)
        if len(policies := sorted({revision for revision, ids in drawn if revision and ids})) > 1:
            raise ValueError(
                f"The rows were sampled from {len(policies)} models (`model_revision` {', '.join(policies[:3])}), so one model, the one that is trained, cannot "
                f"give the behaviour log-probs of all of them. {otherwise}"
            )
    if "hint_beta" in dataset.column_names:
        mixed = next((i for i, beta in enumerate(dataset["hint_beta"]) if beta is not None), None)
        if mixed is not None:
            raise ValueError(
                f"Row {mixed} was drawn with guided_decoding='hinted', from a mixture of what the model says after two prompts, so a forward under one "
                f"of them does not give its behaviour log-probs. {otherwise[:-1]}, which are exact."
            )
