"""`ImportanceWeightedSFTTrainer`: `SFTTrainer` whose per-token loss is weighted by how on-policy each token is.

Two things are added to TRL's trainer, and nothing is copied from it. Per-token columns (`behavior_log_probs`, source)
travel from the dataset through tokenisation, truncation, packing and collation to the loss. And the model that
`SFTTrainer.compute_loss` calls hands back log-probs already multiplied by a detached weight, so that TRL's own
normalisation, gradient accumulation, MoE loss and metrics stay what they are (the canary tests hold it to that).
"""

import copy

import torch
from accelerate import PartialState
from transformers import TrainingArguments
from trl import SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .data_collator import TOKEN_COLUMNS, RewriteDataCollator
from .importance_weighted_sft_config import ImportanceWeightedSFTConfig
from .losses import TOKEN_WEIGHTS, diagnostic_means, weight_diagnostics
from .rows import Source, encode_prompt


SOURCE_IDS = {str(source): i for i, source in enumerate(Source)}
# Any of them makes a dataset one that we have to align.
ROW_COLUMNS = {"completion_ids", "behavior_log_probs", "source", "weight"}


class ImportanceWeightedSFTTrainer(SFTTrainer):
    """
    Drop-in replacement for [`~trl.SFTTrainer`]: same arguments, and with `objective="nll"` the same updates.

    Rows that carry `completion_ids` (what `DataRewriter` writes) are trained on exactly those ids, after their `prompt`
    rendered with the training chat template, and `behavior_log_probs` are aligned with them. Other rows go through
    TRL's own preparation. Beside TRL's metrics it logs `nll` (what SFT would report), `weight` (mean), `ess` (effective
    sample size as a share of the tokens) and, where μ is known, `log_ratio` and `kl` to it: over all tokens, and for each
    source there is (`nll/self`).

    A column `weight` multiplies an example's weights (its tokens still count as before in the denominator).

    Args:
        args ([`ImportanceWeightedSFTConfig`], *optional*): An `SFTConfig` or `TrainingArguments` is accepted too.

    Raises:
        ValueError: The combination has no defined importance weight (`compute_loss_func`, context or sequence
            parallelism), or a row's columns contradict each other (named).
    """

    _tag_names = ["trl", "sft", "importance-weighted-sft"]
    _name = "Importance-weighted SFT"
    _paper = {
        "title": "Mind the Gap: Data Rewriting for Stable Off-Policy Supervised Fine-Tuning",
        "id": "2509.15157",
    }
    _config_class = ImportanceWeightedSFTConfig

    def __init__(self, model, args: TrainingArguments | None = None, data_collator=None, *other_args, **kwargs):
        if args is None:
            name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
            args = self._config_class(f"{name.split('/')[-1]}-{self._tag_names[-1]}")
        elif not isinstance(args, ImportanceWeightedSFTConfig):
            args = self._config_class.of(args)
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "You passed `compute_loss_func`; here the `objective` of the config is the loss. Use `SFTTrainer` for your own."
            )
        self._sums: dict[str, torch.Tensor] = {}  # train and eval: diagnostics since the last log
        self.objective = args.objective
        if callable(self.objective):  # what is saved with a checkpoint must be plain data
            args = copy.copy(args)
            args.objective = getattr(self.objective, "__name__", type(self.objective).__name__)
        super().__init__(model, args, data_collator, *other_args, **kwargs)
        if type(self.data_collator) is DataCollatorForLanguageModeling:
            self.data_collator = RewriteDataCollator.like(self.data_collator)
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError(
                "Context and sequence parallelism shard the tokens but not our per-token columns, so weights would be misaligned. "
                "Set cp_size=1 and sp_size=1 in the accelerate config (FSDP2 and ZeRO are fine)."
            )

    # ---- columns ----

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        columns = set(dataset.column_names or next(iter(dataset)))
        if "seq_lengths" in columns:
            return dataset  # packed already: TRL would pack it a second time and merge its documents
        if not columns & ROW_COLUMNS:
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False  # cut, packed and shuffled below, with all columns
        dataset = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
        map_kwargs = {"num_proc": args.dataset_num_proc} if hasattr(dataset, "num_rows") else {}
        token_columns = ["input_ids", "labels", *TOKEN_COLUMNS]
        with PartialState().local_main_process_first():
            dataset = dataset.map(
                align_row,
                fn_kwargs={
                    "processing_class": processing_class,
                    "chat_template": self.chat_template,
                    "completion_only": self.completion_only_loss or args.assistant_only_loss,
                },
                **map_kwargs,
                **({"desc": f"Aligning {dataset_name} dataset"} if map_kwargs else {}),
            )
            if args.max_length is not None and not packing:
                cut = (
                    slice(None, args.max_length)
                    if args.truncation_mode == "keep_start"
                    else slice(-args.max_length, None)
                )
                dataset = dataset.map(_cut, fn_kwargs={"columns": token_columns, "cut": cut}, **map_kwargs)
                dataset = dataset.filter(_has_target, **map_kwargs)
            if packing:
                dataset = dataset.select_columns(token_columns)
                if args.shuffle_dataset:
                    dataset = dataset.shuffle(seed=args.seed)
                dataset = pack_dataset(dataset, args.max_length, args.packing_strategy, map_kwargs)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *TOKEN_COLUMNS]))

    # ---- loss ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        columns = {
            name: inputs.pop(name)[:, 1:] for name in TOKEN_COLUMNS if name in inputs
        }  # (B, T-1): of the targets
        if "seq_idx" in inputs:  # padding-free: one row holds several examples
            columns["segment_ids"] = inputs["seq_idx"][:, 1:]

        def weighted(**model_inputs):
            outputs = model(**model_inputs)
            if model_inputs.get("fused_lm_head"):
                outputs.log_probs = outputs.log_probs * self._weights(outputs, columns)  # (B, T-1)
            return outputs

        return super().compute_loss(weighted, inputs, return_outputs, num_items_in_batch)

    def _weights(self, outputs, columns: dict[str, torch.Tensor]) -> torch.Tensor:
        log_probs, mask = outputs.log_probs.detach(), outputs.label_mask.bool()
        rows = torch.arange(len(log_probs), device=log_probs.device)[:, None].expand_as(log_probs)

        def column(name, missing):
            if name not in columns:
                return torch.full_like(log_probs, missing, dtype=torch.float32)
            # Prompt-learning PEFT puts virtual tokens in front of the sequence.
            return torch.nn.functional.pad(
                columns[name], (log_probs.shape[1] - columns[name].shape[1], 0), value=missing
            )

        behavior, source = column("behavior_log_probs", torch.nan), column("source_ids", -1)
        known = {
            "log_probs": log_probs,
            "behavior_log_probs": behavior,
            "mask": mask,
            "entropy": outputs.entropy.detach(),
            "segment_ids": column("segment_ids", 0) if "segment_ids" in columns else rows,
        }
        weights = self._token_weights(known, source) * column("weight", 1.0)
        groups = [mask, *(mask & (source == i) for i in SOURCE_IDS.values())]  # all tokens, then each source's
        sums = torch.stack(
            [weight_diagnostics(weights, log_probs, behavior, group) for group in groups]
        )  # (groups, 5, 2)
        mode = "train" if self.model.training else "eval"
        self._sums[mode] = sums + self._sums.get(mode, 0.0)  # stays on the device until the next log
        return weights

    def _token_weights(self, known: dict[str, torch.Tensor], source: torch.Tensor) -> torch.Tensor:
        settings = {
            name: getattr(self.args, name)
            for name in ("clip_min", "clip_max", "clip_mode", "expert_weighting", "alpha")
        }

        def weights_of(objective):
            return objective(**known) if callable(objective) else TOKEN_WEIGHTS[objective](**known, **settings)

        if not isinstance(self.objective, dict):
            return weights_of(self.objective)
        weights = weights_of("nll")
        for name, objective in self.objective.items():
            weights = torch.where(source == SOURCE_IDS[name], weights_of(objective), weights)
        return weights

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        metrics = {key: sum(values) / len(values) for key, values in self._metrics[mode].items()}
        if mode in self._sums:
            sums = self.accelerator.reduce(self._sums.pop(mode), "sum")
            for suffix, group in zip(["", *(f"/{name}" for name in SOURCE_IDS)], sums, strict=False):
                metrics |= {name + suffix: value for name, value in diagnostic_means(group).items()}
        # Each eval set under its own prefix: TRL writes `eval_entropy` for all of them, and the last one wins.
        timed = next((key for key in logs if mode == "eval" and key.endswith("_runtime")), "")
        self._metrics[mode].clear()
        logs.update({timed.removesuffix("runtime") + key: value for key, value in metrics.items()})
        super().log(logs, start_time)


def align_row(example: dict, processing_class, chat_template: str | None, completion_only: bool) -> dict:
    """
    `input_ids`, `labels`, `behavior_log_probs`, `source_ids` and `weight` of one row, all of the same length.

    A row with `completion_ids` becomes prompt + those ids; any other keeps what TRL made of it, with μ unknown.
    """
    completion_ids = example.get("completion_ids") or []
    log_probs = example.get("behavior_log_probs") or []
    input_ids, labels = example["input_ids"], example["labels"]
    if completion_ids:
        prompt_ids = encode_prompt(processing_class, example["prompt"], chat_template)
        input_ids = prompt_ids + completion_ids
        labels = [-100] * len(prompt_ids) + completion_ids if completion_only else input_ids
        if log_probs and len(log_probs) != len(completion_ids):
            raise ValueError(
                f"A row has {len(completion_ids)} `completion_ids` but {len(log_probs)} `behavior_log_probs`: {example['prompt']!r:.200}"
            )
    elif log_probs:
        raise ValueError(
            "A row has `behavior_log_probs` but no `completion_ids`: a text tokenised again need not give the sampled tokens, so "
            f"the log-probs cannot be matched. Store the sampled ids in `completion_ids`, or drop the log-probs: {example['prompt']!r:.200}"
        )
    if log_probs and example.get("temperature", 1.0) != 1.0:
        raise ValueError(
            f"A row was sampled at temperature={example['temperature']}, so its `behavior_log_probs` (temperature 1) are not what it was drawn "
            "from. Sample with temperature=1.0, or drop the column `behavior_log_probs`."
        )
    unknown = [float("nan")] * (len(input_ids) - len(log_probs))
    source, weight = SOURCE_IDS.get(example.get("source"), -1), example.get("weight")
    return {
        "input_ids": input_ids,
        "labels": labels,
        "behavior_log_probs": unknown + log_probs,
        "source_ids": [source] * len(input_ids),
        "weight": [1.0 if weight is None else float(weight)] * len(input_ids),
    }


def _cut(example: dict, columns: list[str], cut: slice) -> dict:
    return {name: example[name][cut] for name in columns}


def _has_target(example: dict) -> bool:
    return any(label != -100 for label in example["labels"])
