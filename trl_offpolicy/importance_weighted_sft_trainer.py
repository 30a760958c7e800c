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
from .losses import dft_weights, diagnostic_means, importance_weights, nll_weights, weight_diagnostics
from .rows import Source, encode_prompt


SOURCE_IDS = {str(source): i for i, source in enumerate(Source)}
ROW_COLUMNS = {"completion_ids", "behavior_log_probs"}  # either makes a dataset one that we have to align


class ImportanceWeightedSFTTrainer(SFTTrainer):
    """
    Drop-in replacement for [`~trl.SFTTrainer`]: same arguments, and with `objective="nll"` the same updates.

    Rows that carry `completion_ids` (what `DataRewriter` writes) are trained on exactly those ids, after their `prompt`
    rendered with the training chat template, and `behavior_log_probs` are aligned with them. Other rows go through
    TRL's own preparation. Beside TRL's metrics it logs `nll` (what SFT would report), `weight` (mean), `ess` (effective
    sample size as a share of the tokens) and, where μ is known, `log_ratio` and `kl` to it: over all tokens, and for each
    source there is (`nll/self`).

    Args:
        args ([`ImportanceWeightedSFTConfig`], *optional*): An `SFTConfig` or `TrainingArguments` is accepted too.

    Raises:
        ValueError: The combination has no defined importance weight (`compute_loss_func`, context or sequence parallelism, a
            vision dataset with behaviour log-probs), or a row's columns contradict each other (named).
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

        def weighted(**model_inputs):
            outputs = model(**model_inputs)
            if model_inputs.get("fused_lm_head"):
                outputs.log_probs = outputs.log_probs * self._weights(outputs, columns)  # (B, T-1)
            return outputs

        return super().compute_loss(weighted, inputs, return_outputs, num_items_in_batch)

    def token_weights(self, log_probs: torch.Tensor, behavior_log_probs: torch.Tensor) -> torch.Tensor:
        """
        The weight of each token's negative log-likelihood. Override for an objective of your own.

        Args:
            log_probs (`torch.Tensor` of shape `(B, T)`): log π of the targets, detached; 0 where a token is not trained on.
            behavior_log_probs (`torch.Tensor` of shape `(B, T)`): log μ of the targets, float32, NaN where it is unknown.

        Returns:
            `torch.Tensor` of shape `(B, T)`, float32.
        """
        if self.args.objective == "nll":
            return nll_weights(log_probs)
        if self.args.objective == "dft":
            return dft_weights(log_probs)
        return importance_weights(
            log_probs, behavior_log_probs, self.args.clip_min, self.args.clip_max, self.args.expert_weighting
        )

    def _weights(self, outputs, columns: dict[str, torch.Tensor]) -> torch.Tensor:
        log_probs = outputs.log_probs.detach()
        behavior = columns.get("behavior_log_probs")
        if behavior is None:
            behavior = torch.full_like(log_probs, torch.nan, dtype=torch.float32)
        # Prompt-learning PEFT puts virtual tokens in front of the sequence.
        behavior = torch.nn.functional.pad(behavior, (log_probs.shape[1] - behavior.shape[1], 0), value=torch.nan)
        weights = self.token_weights(log_probs, behavior)
        groups = [outputs.label_mask.bool()]  # all tokens, then each source's
        if "source_ids" in columns:
            source = torch.nn.functional.pad(
                columns["source_ids"], (log_probs.shape[1] - columns["source_ids"].shape[1], 0), value=-1
            )
            groups += [groups[0] & (source == i) for i in SOURCE_IDS.values()]
        sums = torch.stack(
            [weight_diagnostics(weights, log_probs, behavior, mask) for mask in groups]
        )  # (groups, 5, 2)
        mode = "train" if self.model.training else "eval"
        self._sums[mode] = sums + self._sums.get(mode, 0.0)  # stays on the device until the next log
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
    `input_ids`, `labels`, `behavior_log_probs` and `source_ids` of one row, all of the same length.

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
    source = SOURCE_IDS.get(example.get("source"), -1)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "behavior_log_probs": unknown + log_probs,
        "source_ids": [source] * len(input_ids),
    }


def _cut(example: dict, columns: list[str], cut: slice) -> dict:
    return {name: example[name][cut] for name in columns}


def _has_target(example: dict) -> bool:
    return any(label != -100 for label in example["labels"])
