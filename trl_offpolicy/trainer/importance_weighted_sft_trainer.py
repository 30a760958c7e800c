"""`ImportanceWeightedSFTTrainer`: `SFTTrainer` whose per-token loss is weighted by how on-policy each token is.

Two things are added to TRL's trainer, and nothing is copied from it. Per-token columns (`behavior_log_probs`, source)
travel from the dataset through tokenisation, truncation, packing and collation to the loss. And the model that
`SFTTrainer.compute_loss` calls hands back log-probs already multiplied by a detached weight, so that TRL's own
normalisation, gradient accumulation, MoE loss and metrics stay what they are (the canary tests hold it to that).

Objectives that compare with another policy get its log-probs as one more column: `reference_log_probs`, computed
before training, or `old_log_probs`, computed at the start of each outer batch of `psft`.
"""

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import (
    DataCollator,
    EvalPrediction,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTTrainer, pack_dataset
from trl.data_utils import get_dataset_column_names
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..data.loading import hub_origin
from ..data.turns import end_of_turn_id
from ..data.whole_file import write_whole
from ..sampling.log_probs import causal_lm, has_known_head, hidden_states, kl_divergence, lm_head, top_k_entropy
from .data_collator import (
    ROW_COLUMNS,
    SOURCE_IDS,
    TOKEN_COLUMNS,
    RewriteDataCollator,
    align_row,
    encode_prompt_of,
    warn_of_unknown_sources,
)
from .importance_weighted_sft_config import ImportanceWeightedSFTConfig
from .initial_policy import InitialPolicy, without_training
from .losses import NO_LIMITS, OBJECTIVES, diagnostic_means, objectives_with, weight_diagnostics
from .model_card import trained_model_card


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel


END_OF_TURN = "/end_of_turn"  # behind the names of the metrics of such tokens


class ImportanceWeightedSFTTrainer(SFTTrainer):
    """
    Drop-in replacement for [`~trl.SFTTrainer`]: same arguments, and with `objective="nll"` the same updates.

    Rows that carry `completion_ids` (what `DataRewriter` writes) are trained on exactly those ids, after their
    `prompt` rendered with the training chat template, and `behavior_log_probs` are aligned with them. Other rows go
    through TRL's own preparation. Beside TRL's metrics it logs what `losses.diagnostic_means` lists (`nll`, `weight`,
    `ess`, `kl` to μ, …), over all tokens and for each source there is (`nll/self`), `weight/end_of_turn`, and under
    `asft` its `reference_kl`.

    A column `weight` beside those, or the one that `weight_column` names, multiplies an example's weights.

    Args:
        model (`str` or `PreTrainedModel`): What is trained: Hub id, directory or a loaded model.
        args ([`ImportanceWeightedSFTConfig`], *optional*): Objective and settings; an `SFTConfig` or
            `TrainingArguments` is accepted too.
        train_dataset, eval_dataset, processing_class, peft_config, ...: `SFTTrainer`'s, with its meaning and order.
        data_collator ([`RewriteDataCollator`], *optional*): One of your own should subclass it: it hands on the
            per-token columns.

    Raises:
        ValueError: The combination has no defined importance weight (`compute_loss_func`, context or sequence
            parallelism, an image dataset with our columns, …), or a row's columns contradict each other (named).
    """

    _tag_names = ["trl", "sft", "importance-weighted-sft"]
    _name = "Importance-weighted SFT"
    _paper = {
        "title": "Mind the Gap: Data Rewriting for Stable Off-Policy Supervised Fine-Tuning",
        "id": "2509.15157",
    }
    _config_class = ImportanceWeightedSFTConfig

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: ImportanceWeightedSFTConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        formatting_func: Callable[[dict], str] | None = None,
    ):
        args = self._config_of(model, args)
        if compute_loss_func is not None and args.objective == "iw" and not args.objective_was_given:
            args = copy.copy(args)
            args.objective = "nll"  # the script passes a loss function of its own, as for SFTTrainer
        if compute_loss_func is not None and args.objective != "nll":
            raise ValueError(
                f"You passed `compute_loss_func` together with objective={args.objective!r}: the objective weights the loss here, and "
                "a loss of your own would ignore it. Write objective='nll', or give your weights as a function in `objective`."
            )
        # Train and eval: diagnostics of all processes since the last log.
        self._diagnostics: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.objective = args.objective
        self.objectives = args.objectives
        self._weight_column = args.weight_column
        self._takes_reward = any(o == "topr" or callable(o) for o in self.objectives)
        self._scored_columns = self._columns_to_score(args)
        # Fingerprints of datasets that are tokenized and aligned but not cut or packed yet, and of those that are
        # ready.
        self._whole: set[str] = set()
        self._finished: set[str] = set()
        self._mean_length: torch.Tensor | None = None  # trained tokens per example of the optimizer step, for topr
        self._end_is_learned: bool | None = None  # not known before the first end of turn
        self._outer: list = []  # what is left of psft's outer batch, and the epoch's iterator that it came from
        self._outer_source = None
        if any(map(callable, self.objectives)):  # a function cannot be saved with the arguments in a checkpoint
            args = copy.copy(args)
            args.objective = (
                {source: _name(o) for source, o in self.objective.items()}
                if isinstance(self.objective, dict)
                else _name(self.objective)
            )
        _refuse_empty(train_dataset, "train")
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_loss_func, compute_metrics, callbacks, optimizers,
            optimizer_cls_and_kwargs, preprocess_logits_for_metrics, quantization_config, peft_config, formatting_func,
        )  # fmt: skip
        if type(self.data_collator) is DataCollatorForLanguageModeling:
            self.data_collator = RewriteDataCollator.like(self.data_collator)
        if isinstance(self.data_collator, RewriteDataCollator):
            self.data_collator.vocab_size = self._vocab_size()
            self.data_collator.scored_columns = self._scored_columns
            self.data_collator.takes_reward = self._takes_reward
        self._ends_of_turn = {end_of_turn_id(self._tokenizer), self._tokenizer.eos_token_id} - {None}
        self._rows_are_aligned = "behavior_log_probs" in get_dataset_column_names(self.train_dataset)
        self._describe(train_dataset)
        self._refuse_what_has_no_weights()
        self._refuse_unknown_head()
        self._refuse_rows_without_target(train_dataset)
        for name, data in {"train": train_dataset, **_named(eval_dataset)}.items():
            self._refuse_ids_of_another_model(data, name)
        self._asks_initial_policy = bool(self._scored_columns) or "asft" in self.objectives
        self.initial_policy = InitialPolicy(self.model, self.accelerator, self._asks_initial_policy)
        if "asft" in self.objectives:
            self.initial_policy.freeze()
        if self._scored_columns:  # the model exists only now
            self.train_dataset = self._finish(self.train_dataset, self.args, self.args.packing, "train")
            packing = args.packing if args.eval_packing is None else args.eval_packing
            finished = {
                name: self._finish(data, self.args, packing, name) for name, data in _named(self.eval_dataset).items()
            }
            self.eval_dataset = finished if isinstance(self.eval_dataset, dict) else finished.get("eval")
        self._tell_tokens_without_ratio(train_dataset)

    @classmethod
    def _config_of(cls, model, args):
        """What was passed as `args`, as this trainer's config."""
        if args is None:
            name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
            return cls._config_class(f"{name.split('/')[-1]}-{cls._tag_names[-1]}")
        return args if isinstance(args, cls._config_class) else cls._config_class.of(args)

    def _columns_to_score(self, args: ImportanceWeightedSFTConfig) -> list[str]:
        """Columns that the initial policy computes before training."""
        ratio_to_base = any(callable(o) or o in objectives_with("expert_weighting") for o in self.objectives)
        reference = (
            ("psft" in self.objectives and not args.steps_per_outer_batch)
            or ("threshold" in self.objectives and args.threshold_policy == "initial")
            or (args.expert_weighting == "base" and ratio_to_base)
        )
        columns = {"behavior_log_probs": args.precompute_behavior_log_probs, "reference_log_probs": reference}
        return [name for name, wanted in columns.items() if wanted]

    @property
    def card_facts(self) -> dict[str, str]:
        """What the model card says of this training beside what it says of all."""
        return {}

    def _describe(self, train_dataset) -> None:
        """What the model card says of the training rows, and what the user should know of their columns."""
        columns = get_dataset_column_names(train_dataset)
        source, weight, reward = self._our_columns(columns)
        self.num_train_rows = getattr(train_dataset, "num_rows", 0)
        self.train_dataset_id = hub_origin(train_dataset).get("dataset_name")
        sources = train_dataset.with_format(None)[source] if source and self.num_train_rows else ()
        self.train_sources = Counter(map(str, sources))
        if not SOURCE_IDS.keys() >= self.train_sources.keys():
            self.train_sources = Counter()
        rewards = train_dataset.with_format(None)[reward] if reward and self.num_train_rows else ()
        self.num_unlearned_rows = sum(isinstance(x, int | float) and x < 0 for x in rewards)
        if self.args.weight_column and not (self._rows_are_aligned and (weight or "source_ids" in columns)):
            raise ValueError(
                f"You passed weight_column={self.args.weight_column!r}, but "
                + (
                    "the dataset is not prepared here, so that its weights are not aligned with its tokens."
                    if weight
                    else f"the training rows have the columns {columns}."
                )
            )
        if isinstance(self.objective, dict) and "source" not in columns and "source_ids" not in columns:
            warnings.warn(
                f"objective={self.objective} chooses by source, but the dataset has no column `source`: every token has the weight 1 (`nll`). "
                f"Its columns are {columns}.",
                stacklevel=3,
            )
        if weight and "source_ids" not in columns:
            warnings.warn(f"The column `{weight}` multiplies the weights of each example's tokens.", stacklevel=3)
        elif "weight" in columns and not weight:
            warnings.warn(
                "The column `weight` has no effect: nothing says that it is meant for the loss. If it should multiply each example's weights, "
                "write weight_column='weight'.",
                stacklevel=3,
            )

    def _our_columns(self, columns) -> tuple[str | None, str | None, str | None]:
        """The names of the columns that hold a row's source, weight and reward, among the `columns` of a dataset."""
        rewritten = bool(ROW_COLUMNS.intersection(columns))
        source = "source" if "source" in columns and (rewritten or isinstance(self.objective, dict)) else None
        weight = self._weight_column or ("weight" if rewritten else None)
        reward = "reward" if "reward" in columns and (rewritten or "topr" in self.objectives) else None
        return source, weight if weight in columns else None, reward

    def _refuse_what_has_no_weights(self) -> None:
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError(
                "Context and sequence parallelism shard the tokens but not our per-token columns, so weights would be misaligned. "
                "Set cp_size=1 and sp_size=1 in the accelerate config (FSDP2 and ZeRO are fine)."
            )
        if self._is_vision_dataset:
            datasets = [self.train_dataset, *_named(self.eval_dataset).values()]
            columns = {c for data in datasets for c in get_dataset_column_names(data)} & ROW_COLUMNS
            by_source = isinstance(self.objective, dict)
            if (
                columns
                or by_source
                or self._scored_columns
                or {"asft", "eaft", "psft", "pear", "topr"}.intersection(self.objectives)
            ):
                raise ValueError(
                    "The dataset has images: TRL tokenises those in the collator, where our per-token columns cannot be aligned with "
                    f"them. Train on text, or drop the columns {sorted(columns)} and use the objective nll, dft or p_alpha."
                )
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin is not None and plugin.zero_stage == 3 and (self._scored_columns or "asft" in self.objectives):
            raise ValueError(
                "ZeRO stage 3 shards the weights before the initial policy can be asked. Use ZeRO stage 2 or FSDP2, or an objective "
                "that does not ask it (nll, dft, p_alpha, eaft, iw with the column `behavior_log_probs`)."
            )

    def _refuse_unknown_head(self) -> None:
        """π comes from TRL's fused head; `nll` is left to be what it is in `SFTTrainer`."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # the weights are not all here yet
        if sharded or set(self.objectives) == {"nll"}:
            return
        model = causal_lm(self.model)
        with without_training(self.model), self.compute_loss_context_manager():
            known = has_known_head(model, list(range(min(16, self._vocab_size() or 16))))
        if not known:
            raise ValueError(
                f"{type(model).__name__} does something to its logits that TRL's fused LM head leaves out, such as a cap that its config names "
                f"otherwise, so the weights of objective={self.args.objective!r} would be computed from wrong log-probs of the model. Train another "
                "model, or with objective='nll', which is then as wrong as in SFTTrainer."
            )

    def _refuse_rows_without_target(self, given) -> None:
        rows = self.train_dataset
        if not hasattr(rows, "num_rows") or (rows.num_rows and "labels" not in rows.column_names):
            return
        if not any(map(_has_target, rows)):
            limit = f" within max_length={self.args.max_length}" if self.args.max_length else ""
            raise ValueError(
                f"None of the {given.num_rows} training rows has a token to train on{limit}: what is left of them is prompt, or is masked in their "
                "`labels`. Set a larger max_length, or look at completion_only_loss and assistant_only_loss."
            )

    def _tell_tokens_without_ratio(self, given) -> None:
        """
        Warns of the training tokens that an importance weight is asked of and that have none, as μ is not known;
        refuses if there are no others. Of a stream, which is read while it is trained on, the columns are looked at.
        """
        by_source = self.objective if isinstance(self.objective, dict) else dict.fromkeys(SOURCE_IDS, self.objective)
        with_ratio = objectives_with("expert_weighting")
        weighted = [SOURCE_IDS[source] for source, o in by_source.items() if not callable(o) and o in with_ratio]
        if not weighted or self.args.expert_weighting != "one":
            return
        rows, columns = self.train_dataset, set(get_dataset_column_names(given))
        if hasattr(rows, "num_rows") and "labels" in rows.column_names:
            unknown, total = self._count_tokens_without_ratio(rows, weighted)
            if not unknown:
                return
            which, are_all = f"{unknown:,} of {total:,} training tokens ({unknown / total:.0%}) have", unknown == total
        elif "behavior_log_probs" in columns or (isinstance(self.objective, dict) and "source" not in columns):
            return
        else:
            which, are_all = "The training tokens have", True
        message = f"{which} no μ, as their rows have no `behavior_log_probs`: with objective={self.args.objective!r} their weight is 1, which is plain SFT."
        if are_all and self.args.objective_was_given:
            raise ValueError(
                f"{message} Train on what `trl-offpolicy rewrite` wrote, sampled at temperature 1; set precompute_behavior_log_probs=True if the rows "
                "have `completion_ids` that this model drew without top_p, top_k, min_p and repetition_penalty; or write objective='nll' (SFT), 'dft', or expert_weighting='base' (π/π_0), which need no μ."
            )
        warnings.warn(f"{message} expert_weighting says what else they may weigh.", stacklevel=4)

    def _count_tokens_without_ratio(self, rows, weighted: list[int]) -> tuple[int, int]:
        """Of the tokens of the `weighted` sources: those without μ, and all."""
        # A dataset without our log-probs was not made by this package, so a column with one of our names is the user's
        # own.
        ours = {"source_ids", "behavior_log_probs"} if "behavior_log_probs" in rows.column_names else set()
        total, unknown = 0, 0
        for batch in rows.with_format("arrow").iter(batch_size=1000):
            columns = {
                name: pc.list_flatten(batch[name]).to_numpy()
                for name in batch.column_names
                if name in ours or name == "labels"
            }
            asked = columns["labels"] != -100
            if isinstance(self.objective, dict):
                asked &= np.isin(columns.get("source_ids", -1), weighted)
            total += asked.sum()
            unknown += (asked & np.isnan(columns.get("behavior_log_probs", np.nan))).sum()
        return unknown, total

    def _vocab_size(self) -> int | None:
        """As the config says: ZeRO stage 3 leaves no shape to the embeddings."""
        return getattr(self.model.config.get_text_config(), "vocab_size", None)

    def _refuse_ids_of_another_model(self, dataset, dataset_name: str, column: str = "completion_ids") -> None:
        """Names the row. (Streaming rows are looked at in the collator.)"""
        size = self._vocab_size()
        if size is None or not hasattr(dataset, "num_rows") or column not in dataset.column_names:
            return
        for batch, rows in enumerate(dataset.with_format("arrow").iter(batch_size=1000)):
            largest = pc.max(pc.list_flatten(rows[column])).as_py()
            if largest is not None and largest >= size:
                row = next(i for i, ids in enumerate(rows[column].to_pylist()) if ids and max(ids) >= size)
                raise ValueError(
                    f"Row {1000 * batch + row} of the {dataset_name} dataset has token ids of up to {largest} in `{column}`, but the model has "
                    f"{size} token embeddings: "
                    + (
                        "the row was sampled from another model, or with another tokenizer. Train the model that the rows are "
                        "of, or drop the columns `completion_ids` and `behavior_log_probs`."
                        if column == "completion_ids"
                        else "the tokenizer is another model's, or has tokens that were added to it. Pass the model's own, or give the model "
                        "their embeddings with `model.resize_token_embeddings(len(tokenizer))`."
                    )
                )

    # ---- columns ----

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        _refuse_empty(dataset, dataset_name)
        dataset = _without_foreign_labels(dataset)
        columns = set(get_dataset_column_names(dataset))
        # Packed already (TRL would pack it a second time and merge its documents), or prepared here.
        prepared = "input_ids" in columns and (
            "seq_lengths" in columns or {"behavior_log_probs", "source_ids"} <= columns
        )
        if not prepared:
            _refuse_incomplete_rows(dataset, args, formatting_func, dataset_name)
            ours = any(self._our_columns(columns)) or ROW_COLUMNS & columns or "topr" in self.objectives
            if not ours and not self._scored_columns:
                return super()._prepare_dataset(
                    dataset, processing_class, args, packing, formatting_func, dataset_name
                )
            _refuse_hidden_columns(dataset, dataset_name)
            given, dataset = dataset, self._align(dataset, processing_class, args, formatting_func, dataset_name)
            if hasattr(self, "accelerator"):  # `__init__` does it once there is a model
                self._refuse_ids_of_another_model(given, dataset_name)
            if hasattr(dataset, "num_rows"):
                self._whole.add(dataset._fingerprint)
            elif not self._scored_columns:
                dataset = self._cut_or_pack(dataset, args, packing)
                return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset
        if self._scored_columns and not hasattr(self, "accelerator"):
            return dataset  # `__init__` has it finished once there is a model
        return self._finish(dataset, args, packing, dataset_name)

    def _align(self, dataset, processing_class, args, formatting_func, dataset_name: str):
        """Tokenizes whole rows, and aligns their columns with the tokens."""
        dataset = _unformatted(dataset)
        columns = get_dataset_column_names(dataset)
        # In rows that are not tokenized yet, columns of these names are the user's own.
        dataset = dataset.remove_columns([c for c in ("reference_log_probs", "old_log_probs") if c in columns])
        source, weight, reward = self._our_columns(columns)
        names = {k: o if isinstance(o, str) else None for k, o in self._objective_of().items()}
        map_kwargs = {"num_proc": args.dataset_num_proc} if hasattr(dataset, "num_rows") else {}
        if source and map_kwargs:
            warn_of_unknown_sources(dataset[source])
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False  # cut, packed and shuffled later, with all columns
        dataset = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
        with PartialState().local_main_process_first():
            return dataset.map(
                align_row,
                with_indices=True,
                fn_kwargs={
                    "processing_class": processing_class,
                    "chat_template": self.chat_template,
                    "completion_only": self.completion_only_loss,
                    "recompute": args.precompute_behavior_log_probs,
                    "source_column": source,
                    "weight_column": weight,
                    "objective_of": names if reward or "topr" in self.objectives else None,
                    "streaming": not map_kwargs,
                },
                **map_kwargs,
                **({"desc": f"Aligning {dataset_name} dataset"} if map_kwargs else {}),
            )

    def _finish(self, dataset, args, packing: bool, dataset_name: str):
        """
        Scores the rows if an objective asks for it, and cuts, packs and shuffles them unless that is done.

        μ is scored on whole rows, under the prompt they were sampled with; π_0 on what is left of them, as π will see
        it.
        """
        fingerprint = getattr(dataset, "_fingerprint", None)
        whole = fingerprint in self._whole
        if fingerprint in self._finished or not (whole or self._scored_columns):
            return dataset
        dataset = _unformatted(dataset)
        if self._scored_columns:
            self._check_scorable(dataset, whole, dataset_name)
            self._refuse_ids_of_another_model(dataset, dataset_name, "input_ids")
        if "behavior_log_probs" in self._scored_columns:
            dataset = self._score_behavior(dataset, dataset_name)
        if whole:
            _warn_of_long_rows(dataset, args, packing, dataset_name)
            dataset = self._cut_or_pack(dataset, args, packing)
        if "reference_log_probs" in self._scored_columns:
            dataset = self._score_reference(dataset, dataset_name)
        if whole and args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        self._finished.add(dataset._fingerprint)
        return dataset

    def _cut_or_pack(self, dataset, args, packing: bool):
        map_kwargs = {"num_proc": args.dataset_num_proc} if hasattr(dataset, "num_rows") else {}
        scored_later = {"reference_log_probs", "old_log_probs"}
        columns = ["input_ids", "labels", *(name for name in TOKEN_COLUMNS if name not in scored_later)]
        with PartialState().local_main_process_first():
            if args.max_length is not None and not packing:
                dataset = dataset.map(_cut, fn_kwargs={"columns": columns, "cut": kept_tokens(args)}, **map_kwargs)
                dataset = dataset.filter(_has_target, **map_kwargs)
            if packing:
                if args.max_length is None:
                    raise ValueError(
                        "You passed packing=True with max_length=None, but rows are packed up to a length. Set max_length, or write padding_free=True "
                        "in the place of packing=True."
                    )
                dataset = dataset.select_columns(columns)
                if args.shuffle_dataset:
                    dataset = dataset.shuffle(seed=args.seed)
                dataset = pack_dataset(dataset, args.max_length, args.packing_strategy, map_kwargs)
        return dataset

    def _check_scorable(self, dataset, whole: bool, dataset_name: str) -> None:
        wanted = " and ".join(self._scored_columns)
        if not hasattr(dataset, "num_rows"):
            raise ValueError(
                f"{wanted} must be computed before training, which a streaming dataset does not allow. "
                "Load it without streaming=True, or use an objective that does not ask the initial policy."
            )
        if self.state.global_step and not self.initial_policy.has_removable_adapter:
            raise ValueError(
                f"The {dataset_name} dataset came after training had begun, when the initial policy was gone. Pass it as `eval_dataset` to "
                "the constructor."
            )
        if "input_ids" not in dataset.column_names:
            raise ValueError(
                f"{wanted} must be computed before training, but with skip_prepare_dataset=True the {dataset_name} dataset is taken as it is, "
                f"and it has no `input_ids`: {dataset.column_names}. Tokenize it, or drop skip_prepare_dataset."
            )
        if not whole and "behavior_log_probs" in self._scored_columns:
            raise ValueError(
                f"You passed precompute_behavior_log_probs=True, but the {dataset_name} dataset is tokenized, cut or packed already: which of "
                "its tokens were sampled, and under which prompt, cannot be told any more. Pass the rows as DataRewriter wrote them, or set "
                "precompute_behavior_log_probs=False to use the log-probs that it has."
            )

    def _behavior_prompt_ids(self, row: dict) -> list[int]:
        """Token ids of the prompt that a row's completion was drawn under."""
        prompt = row.get("behavior_prompt") or row["prompt"]
        return encode_prompt_of(row, prompt, self.processing_class, self.chat_template)

    def _score_behavior(self, dataset, dataset_name: str):
        def pieces_of(row: dict) -> list[tuple]:
            if not row.get("completion_ids"):
                return []
            temperature = 1.0 if row.get("temperature") is None else float(row["temperature"])
            return [(len(row["input_ids"]), self._behavior_prompt_ids(row), row["completion_ids"], temperature)]

        return self.initial_policy.score(
            dataset, "behavior_log_probs", pieces_of, self.chat_template, f"Scoring {dataset_name} dataset"
        )

    def _score_reference(self, dataset, dataset_name: str):
        def pieces_of(row: dict) -> list[tuple]:
            # Only a padding-free collator keeps the documents of a packed row apart.
            lengths = self.padding_free and row.get("seq_lengths") or [len(row["input_ids"])]
            pieces, end = [], 0
            for length in lengths:
                start, end = end, end + length
                ids, labels = row["input_ids"][start:end], row.get("labels", row["input_ids"])[start:end]
                first = next((t for t, label in enumerate(labels) if label != -100), length)
                pieces.append((end, ids[:first], ids[first:], 1.0))
            return pieces

        description = f"Scoring {dataset_name} dataset with the initial policy"
        return self.initial_policy.score(dataset, "reference_log_probs", pieces_of, self.padding_free, description)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if isinstance(self.data_collator, RewriteDataCollator) or self._rows_are_aligned:
            self._signature_columns = list(dict.fromkeys([*self._signature_columns, *TOKEN_COLUMNS]))

    def _prepare_inputs(self, inputs):
        # DeepSpeed casts every float input to its dtype; in bfloat16 a log-prob has two digits.
        columns = {name: inputs.pop(name).to(self.args.device) for name in TOKEN_COLUMNS if name in inputs}
        return {**super()._prepare_inputs(inputs), **columns}

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """
        One optimizer step's. For `topr` it is told how long their examples are, which no micro-batch can tell.
        """
        batches, num_items = self._next_step(epoch_iterator, num_batches, device)
        if "topr" in self.objectives and num_items is not None:
            rows = ((b["labels"], b.get("seq_idx", torch.arange(len(b["labels"]))[:, None])) for b in batches)
            examples = sum(_num_examples(labels[:, 1:] != -100, ids) for labels, ids in rows)
            examples = torch.tensor(examples, device=device)
            if self.args.average_tokens_across_devices:
                examples = self.accelerator.gather(examples).sum()
            self._mean_length = torch.as_tensor(num_items, device=device) / examples.clamp(min=1)
        return batches, num_items

    def _next_step(self, epoch_iterator, num_batches, device):
        """
        Under `psft`, an outer batch at a time: its rows are scored by the policy as it is before the first of them
        trains it.
        """
        steps = self.args.steps_per_outer_batch
        if "psft" not in self.objectives or not steps:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self._outer or self._outer_source is not epoch_iterator:
            self._outer, self._outer_source = [], epoch_iterator
            # Outer batches start at multiples of `steps`: a run resumed at one goes on as if it had not stopped.
            for _ in range(steps - self.state.global_step % steps):
                batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
                self._outer.append(([self._with_own_log_probs(batch) for batch in batches], num_items))
                if len(batches) < num_batches:
                    break
        return self._outer.pop(0)

    def _with_own_log_probs(self, batch: dict) -> dict:
        inputs = self._prepare_inputs(dict(batch))
        model_inputs = {name: value for name, value in inputs.items() if name not in TOKEN_COLUMNS}
        with without_training(self.model), self.compute_loss_context_manager():
            outputs = self.model_wrapped(**model_inputs, use_cache=False, fused_lm_head=True)
        log_probs = outputs.log_probs[:, 1 - inputs["input_ids"].shape[1] :].float()  # without virtual tokens
        return {**batch, "old_log_probs": torch.nn.functional.pad(log_probs, (1, 0), value=math.nan)}

    # ---- loss ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        # (B, T-1): of the targets
        columns = {name: inputs.pop(name)[:, 1:] for name in TOKEN_COLUMNS if name in inputs}
        if self.model.training and self._rows_are_aligned and "behavior_log_probs" not in columns:
            raise ValueError(
                f"The training rows have per-token columns (behavior_log_probs, weight, …), but the data collator {type(self.data_collator).__name__} "
                "leaves them out of the batch, so that all weights would be 1. Let it subclass trl_offpolicy.RewriteDataCollator, or drop the "
                f"columns {sorted(ROW_COLUMNS)} from the dataset and pass no weight_column."
            )
        needed = [*self._scored_columns, *["reward"] * ("topr" in self.objectives)]
        missing = [name for name in needed if name not in columns]
        if missing:
            raise ValueError(
                f"The batch has no {' and no '.join(missing)}, which the weights need. Give the dataset to the constructor, or with "
                "skip_prepare_dataset=False to `evaluate`, where it is computed; and let a data collator of your own subclass RewriteDataCollator."
            )
        ends = torch.tensor(sorted(self._ends_of_turn), dtype=torch.long, device=inputs["input_ids"].device)
        columns["is_end_of_turn"] = torch.isin(inputs["input_ids"][:, 1:], ends).float()
        if "seq_idx" in inputs:  # padding-free: one row holds several examples
            columns["segment_ids"] = inputs["seq_idx"][:, 1:]

        def weighted(**model_inputs):
            if not model_inputs.get("fused_lm_head"):
                # TRL asks for logits to compute another loss from, or, the loss being computed, for `compute_metrics`
                # and `predict`.
                other_loss = self.compute_loss_func is not None or self.label_smoother is not None
                if other_loss and "weight" in columns and (columns["weight"] != 1).any():
                    raise ValueError(
                        "A column `weight` has no effect on label smoothing or a loss of your own. Drop one of them."
                    )
                return model(**model_inputs)
            outputs, extra = self._forward(model, model_inputs)
            weights, penalty = self._weights(outputs, columns, extra)
            self._refuse_infinite(weights, outputs, model_inputs["input_ids"])
            outputs.log_probs = outputs.log_probs * weights - penalty  # (B, T-1); the loss is minus their sum
            return outputs

        return super().compute_loss(weighted, inputs, return_outputs, num_items_in_batch)

    def _refuse_infinite(self, weights, outputs, input_ids) -> None:
        """
        A weight that is not finite would make the whole model NaN in one step. (A log-prob that is not does so with
        TRL, too.)
        """
        wrong = outputs.label_mask.bool() & ~weights.isfinite() & outputs.log_probs.isfinite()
        if wrong.any():
            row, position = wrong.nonzero()[0].tolist()
            end = position + 1 + input_ids.shape[1] - wrong.shape[1]  # without virtual tokens
            text = self._tokenizer.decode(input_ids[row, :end][-60:])
            objective = next((_name(o) for o in self.objectives if callable(o)), self.objective)
            raise ValueError(
                f"The weight of a token is {weights[row, position].item()} under objective={objective!r}: a function of your own must return "
                "finite weights, a row's own weight must be finite, a ratio π/μ needs finite `behavior_log_probs` and a clip_max, and topr a reward. The "
                "token is the last of "
                f"{text!r}"
            )

    def _forward(self, model, model_inputs: dict):
        """
        TRL's fused forward, and what `asft` and `eaft` need beside it: the KL to π_0, the entropy of the likeliest
        tokens.
        """
        extra: dict[str, torch.Tensor | None] = {"kl": None, "top_k_entropy": None}
        if not {"asft", "eaft"}.intersection(self.objectives):
            return model(**model_inputs), extra
        if "asft" in self.objectives:
            with self.initial_policy.asked(model) as initial:
                base = causal_lm(self.accelerator.unwrap_model(initial))
                with hidden_states(base) as initial_states:
                    initial(**model_inputs)
                initial_head = lm_head(base)
        policy = causal_lm(self.model)
        with hidden_states(policy) as states:
            outputs = model(**model_inputs)
        mask, hidden, head = outputs.label_mask.bool(), states[-1][:, :-1], lm_head(policy)

        def spread(values, where):
            return torch.zeros(mask.shape, device=values.device).masked_scatter(where, values)

        if "eaft" in self.objectives:
            extra["top_k_entropy"] = spread(top_k_entropy(head, hidden[mask].detach()), mask)
        if "asft" in self.objectives:
            initial_hidden = initial_states[-1][:, :-1]
            virtual = hidden.shape[1] - initial_hidden.shape[1]  # tokens that prompt-learning peft puts in front
            shared = mask & (torch.arange(mask.shape[1], device=mask.device) >= virtual)
            kl = kl_divergence(head, hidden[shared], initial_head, initial_hidden[shared[:, virtual:]])
            extra["kl"] = spread(kl, shared)
        return outputs, extra

    def _weights(
        self, outputs, columns: dict[str, torch.Tensor], extra: dict
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """The weight of each token, and what `asft` subtracts from its weighted log-prob: both (B, T-1)."""
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
            "reference_log_probs": column("reference_log_probs", torch.nan),
            "old_log_probs": column(
                "old_log_probs" if self.args.steps_per_outer_batch else "reference_log_probs", torch.nan
            ),
            "mask": mask,
            "entropy": outputs.entropy.detach(),
            "top_k_entropy": extra["top_k_entropy"],
            "segment_ids": column("segment_ids", 0) if "segment_ids" in columns else rows,
            "reward": column("reward", torch.nan),
        }
        if self._takes_reward:
            mean_length = self._mean_length if self.model.training else None
            if mean_length is None:  # called by itself: this batch is all that it sees
                mean_length = mask.sum() / max(1, _num_examples(mask, known["segment_ids"]))
            known["mean_length"] = mean_length
        own, is_end = column("weight", 1.0), mask & (column("is_end_of_turn", 0.0) == 1)
        # Zero where a token is not trained on: its log-prob is 0, and a ratio to it may be infinite.
        weights = torch.where(mask, self._token_weights(known, source, {}), 0.0)
        if self.model.training and self._end_is_learned is None:
            self._warn_of_unlearned_end(weights[is_end & self._has_objective(objectives_with("clip_min"), source)])
        weights, unlimited = weights * own, weights * own
        if any(isinstance(o, str) and o not in ("nll", "eaft") for o in self.objectives):
            unlimited = torch.where(mask, self._token_weights(known, source, NO_LIMITS) * own, 0.0)
        # All, each source's, and the ends of turns.
        groups = torch.stack([mask, *(mask & (source == i) for i in SOURCE_IDS.values()), is_end])
        sums, extremes = weight_diagnostics(
            weights, unlimited, log_probs, behavior, known["entropy"], outputs.is_top1, groups
        )
        mode = "train" if self.model.training else "eval"
        # Gathered here, where every process is; `log` may be called by a callback in one process only.
        both = self.accelerator.gather(torch.cat([sums.flatten(), extremes.flatten()])[None])  # (processes, …)
        sums = both[:, : sums.numel()].sum(0).view_as(sums)
        extremes = both[:, sums.numel() :].amax(0).view_as(extremes).to(extremes)
        if mode in self._diagnostics:  # stays on the device until the next log
            before = self._diagnostics[mode]
            sums, extremes = before[0] + sums, torch.maximum(before[1], extremes)
        self._diagnostics[mode] = sums, extremes
        if extra["kl"] is None:
            return weights, 0.0
        mask = mask & self._has_objective({"asft"}, source)
        kl = torch.where(mask, extra["kl"], 0.0)
        total = self.accelerator.gather(torch.stack([kl.detach().sum(), mask.sum()])[None]).sum(0)
        self._metrics[mode]["reference_kl"].append((total[0] / total[1].clamp(min=1)).item())
        return weights, self.args.beta * own * kl

    def _has_objective(self, names: set[str], source: torch.Tensor) -> torch.Tensor:
        """Which of the tokens with these sources have one of the named objectives."""
        own = {k for k, o in self._objective_of().items() if isinstance(o, str) and o in names}
        ids = [-1] * (None in own) + [i for name, i in SOURCE_IDS.items() if name in own]
        if None in own:
            ids += [i for name, i in SOURCE_IDS.items() if name not in self._objective_of()]
        return torch.isin(source, torch.tensor(ids, dtype=source.dtype, device=source.device))

    def _objective_of(self) -> dict:
        """The objective by source; `None` stands for whatever is not named."""
        return {**self.objective, None: "nll"} if isinstance(self.objective, dict) else {None: self.objective}

    def _warn_of_unlearned_end(self, weights: torch.Tensor) -> None:
        """Of the first ends of turns that are trained on, under objectives whose weight vanishes with π."""
        if not weights.numel():
            return
        mean = weights.mean().item()
        self._end_is_learned = mean >= 0.01
        if not self._end_is_learned:
            warnings.warn(
                f"The end of a turn has a weight of {mean:.1g} under objective={self.args.objective!r}, since the model gives it hardly any probability: "
                "it will hardly be learned, and a model that never ends its turn repeats itself. Base models are so with the end of a chat turn; write "
                "clip_min=0.1, the smallest weight of a token. `weight/end_of_turn` is logged.",
                stacklevel=2,
            )

    def _token_weights(self, known: dict[str, torch.Tensor], source: torch.Tensor, limits: dict) -> torch.Tensor:
        def weights_of(objective):
            if callable(objective):
                return _checked(objective(**known), known["log_probs"].shape, objective)
            settings = {name: getattr(self.args, name) for name in OBJECTIVES[objective].settings}
            return OBJECTIVES[objective].weights(**known, **{**settings, **limits})

        if not isinstance(self.objective, dict):
            return weights_of(self.objective)
        weights = weights_of("nll")
        for name, objective in self.objective.items():
            weights = torch.where(source == SOURCE_IDS[name], weights_of(objective), weights)
        return weights

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        metrics = {}
        if mode in self._diagnostics:
            suffixes = ["", *(f"/{name}" for name in SOURCE_IDS), END_OF_TURN]
            for suffix, *group in zip(suffixes, *self._diagnostics.pop(mode), strict=True):
                means = diagnostic_means(*group)
                wanted = ("nll", "weight") if suffix == END_OF_TURN else means
                metrics |= {name + suffix: means[name] for name in wanted if name in means}
        metrics |= {key: sum(values) / len(values) for key, values in self._metrics[mode].items()}
        if mode == "eval":
            # Each eval set under its own prefix; TRL adds its own keys as `eval_entropy` for all of them, and the last
            # one stays.
            timed = next((key for key in logs if key.endswith("_runtime")), "eval_runtime")
            metrics = {timed.removesuffix("runtime") + key: value for key, value in metrics.items()}
        logs.update(metrics)
        super().log(logs, start_time)

    def evaluation_loop(self, *args, **kwargs):
        # Removes metrics that `predict` or an interrupted evaluation left behind.
        self._diagnostics.pop("eval", None)
        self._metrics["eval"].clear()
        return super().evaluation_loop(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if resume_from_checkpoint and self._asks_initial_policy and self.is_world_process_zero():
            last = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else None
            self.initial_policy.check(str(last or resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model, trial):
        if self._asks_initial_policy and self.is_world_process_zero():
            self.initial_policy.record(f"{self._get_output_dir(trial)}/checkpoint-{self.state.global_step}")
        super()._save_checkpoint(model, trial)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """
        Writes `output_dir/README.md`: base model, data by source, objective with its equation, hyper-parameters,
        results, versions.
        """
        if self.is_world_process_zero():
            card = trained_model_card(self, model_name, dataset_name, tags)
            write_whole(f"{self.args.output_dir}/README.md", str(card))


def _name(objective) -> str:
    return objective if isinstance(objective, str) else getattr(objective, "__name__", type(objective).__name__)


def _num_examples(mask: torch.Tensor, segment_ids: torch.Tensor) -> int:
    """How many examples have a token in `mask` (B, T)."""
    return segment_ids.to(mask.device)[:, -mask.shape[1] :].expand_as(mask)[mask].unique().numel()


def _checked(weights, shape: torch.Size, objective) -> torch.Tensor:
    """What a function of the user's own returned, if it is one weight for each target token."""
    if not isinstance(weights, torch.Tensor) or weights.shape != shape:
        what = (
            f"a tensor of shape {tuple(weights.shape)}" if isinstance(weights, torch.Tensor) else f"{weights!r:.100}"
        )
        raise ValueError(
            f"The objective {_name(objective)!r} returned {what}, but it must return one weight for each target token: a tensor of the shape "
            f"of its argument `log_probs`, here {tuple(shape)}."
        )
    return weights


def _refuse_empty(dataset, name: str) -> None:
    if dataset is not None and not (len(dataset) if hasattr(dataset, "num_rows") else next(iter(dataset), None)):
        raise ValueError(f"The {name} dataset has no rows. Was everything filtered out of it, or is it another split?")


def _without_foreign_labels(dataset):
    """TRL takes a column `labels` for those of the tokens; where there are none yet it is the user's own."""
    columns = get_dataset_column_names(dataset)
    return dataset.remove_columns("labels") if "labels" in columns and "input_ids" not in columns else dataset


def _refuse_incomplete_rows(dataset, args, formatting_func, name: str) -> None:
    """Columns or values that are missing, at which TRL stops without saying where."""
    columns = get_dataset_column_names(dataset)
    if "input_ids" in columns or (formatting_func is not None and "prompt" not in columns):
        return
    texts = [column for column in ("messages", "conversations", args.dataset_text_field) if column in columns]
    read = texts[:1] if texts and "prompt" not in columns else ["prompt", "completion"]
    if missing := [column for column in read if column not in columns]:
        other = [*texts, *(["what formatting_func returns"] if formatting_func is not None else [])]
        raise ValueError(
            f"The {name} dataset has the columns {columns} and no `{'` and no `'.join(missing)}`. SFT takes `prompt` + `completion`, `messages`, "
            f"`conversations`, `input_ids`, or a column of texts, which dataset_text_field names ({args.dataset_text_field!r}). "
            + (
                f"Beside `prompt`, {other[0]} is not looked at: drop it with `dataset.remove_columns('prompt')`."
                if other
                else "Rename yours with `dataset.rename_columns`."
            )
        )
    if not hasattr(dataset, "num_rows") or dataset.format["type"] == "custom":
        return
    for batch, rows in enumerate(dataset.select_columns(read).with_format("arrow").iter(batch_size=1000)):
        for column in read:
            row = pc.index(rows[column].is_null(), True).as_py()
            if row >= 0:
                raise ValueError(
                    f"Row {1000 * batch + row} of the {name} dataset has no `{column}` (null). Fill it in, or leave such rows out: "
                    f"`dataset.filter(lambda row: row[{column!r}] is not None)`."
                )


def _refuse_hidden_columns(dataset, name: str) -> None:
    """TRL decides by the columns that it sees what is trained on, and would train on the prompts too."""
    if not hasattr(dataset, "num_rows") or dataset.format["output_all_columns"]:
        return
    visible = dataset.format["columns"]
    hidden = [column for column in dataset.column_names if column not in visible]
    if hidden:
        raise ValueError(
            f"The {name} dataset hides its columns {hidden}, as `with_format(…, columns={visible})` does, and they may be needed. Show all with "
            "`with_format(None)`, or drop those that you do not want with `remove_columns`."
        )


def _named(eval_dataset) -> dict:
    """The eval sets by name, of what a trainer is given."""
    if isinstance(eval_dataset, dict):
        return eval_dataset
    return {} if eval_dataset is None else {"eval": eval_dataset}


def _unformatted(dataset):
    """
    With rows of lists, whatever `with_format("torch")` made of them; a transform is left to TRL, which refuses it.
    """
    custom = hasattr(dataset, "num_rows") and dataset.format["type"] == "custom"
    return dataset if custom else dataset.with_format(None)


def kept_tokens(args) -> slice:
    """What `max_length` leaves of an example's tokens."""
    return slice(None, args.max_length) if args.truncation_mode == "keep_start" else slice(-args.max_length, None)


def _warn_of_long_rows(dataset, args, packing: bool, dataset_name: str) -> None:
    """Warns of rows of which `max_length` cuts something, most often the answer and the end of turn."""
    goes_on = packing and args.packing_strategy != "bfd"  # the other strategies go on in another row
    if args.max_length is None or goes_on:
        return
    batches = dataset.with_format("arrow").iter(batch_size=1000)
    lengths = [length for batch in batches for length in pc.list_value_length(batch["input_ids"]).to_pylist()]
    long = sum(length > args.max_length for length in lengths)
    if long:
        end = "beginning" if args.truncation_mode == "keep_end" and not packing else "end"
        warnings.warn(
            f"{long:,} of {len(lengths):,} rows of the {dataset_name} dataset are longer than max_length={args.max_length}, the longest of {max(lengths):,} "
            f"tokens: their {end} is not trained on, and a row of which only prompt is left is left out. Set a larger max_length.",
            stacklevel=2,
        )


def _cut(example: dict, columns: list[str], cut: slice) -> dict:
    return {name: example[name][cut] for name in columns}


def _has_target(example: dict) -> bool:
    return any(label != -100 for label in example["labels"])
