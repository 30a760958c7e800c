"""`OnlineRewriteSFTTrainer`: rows are drawn from the policy as it is now, for the next steps of its training.

Its data loader yields numbers of problems. Every `steps_per_generation` micro-steps the problems of the coming ones
are asked, as `DataRewriter` asks them; the rows are tokenized and aligned as `ImportanceWeightedSFTTrainer` does it
with a dataset, and kept until their step comes. (TRL's online trainers draw in `_prepare_inputs`; here it is done where
`transformers` collects the micro-batches of an optimizer step, because the loss is divided by their tokens.)
"""

import contextlib
import copy
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec
from itertools import chain, islice
from math import ceil
from typing import Any

import datasets
import pyarrow as pa
import torch

from ..data.formats import PLAIN_PROMPTS, as_completion, find_format, read_rows
from ..data.loading import as_dataset, hub_origin, media_columns
from ..data.rows import Source
from ..rewriting.attempts import journal_config
from ..rewriting.problems import check_stages
from ..runs.shards import Shard
from ..sampling.log_probs import causal_lm, target_log_probs
from ..sampling.provenance import weights_digest
from ..trainer.data_collator import ROW_COLUMNS, TOKEN_COLUMNS
from ..trainer.importance_weighted_sft_trainer import ImportanceWeightedSFTTrainer, kept_tokens
from ..trainer.initial_policy import without_training
from ..verification.verifier import as_verifier
from .drawn_rows import Drawn, DrawnRows
from .engines import ColocatedEngine, ServedEngine, TrainedModel
from .online_config import REWRITING, OnlineRewriteSFTConfig


# The settings of a training on which its rows and weights do not depend: where it runs and how fast, which engine draws
# from the policy, what is logged, evaluated and saved. With any other one changed a journal is another training's.
_FREE = {
    "output_dir", "use_vllm", "sampling_batch_size", "use_cpu", "local_rank", "torch_empty_cache_steps", "dataset_num_proc", "disable_tqdm", "report_to",
    "run_name", "project", "debug", "skip_memory_metrics", "prediction_loss_only", "per_device_eval_batch_size", "bf16_full_eval", "fp16_full_eval",
    "batch_eval_metrics", "metric_for_best_model", "greater_is_better", "load_best_model_at_end", "enable_jit_checkpoint", "push_to_hub",
    "resume_from_checkpoint", "restore_callback_states_from_checkpoint",
}  # fmt: skip
_FREE_KINDS = (
    "vllm_", "gradient_checkpointing", "activation_", "dataloader_", "ddp_", "log_", "logging_", "trackio_", "include_", "eval_", "save_", "hub_", "do_",
)  # fmt: skip
# Of an adapter's settings those by which it is not another one.
_OF_NO_ADAPTER = {"peft_version", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"}
_NUMBER = "row"  # the data loader's column
DOUBTFUL = 0.1  # nats per token between an engine's log-probs and the trainer's; two implementations in bfloat16 differ by 0.03


class OnlineRewriteSFTTrainer(ImportanceWeightedSFTTrainer):
    """
    [`ImportanceWeightedSFTTrainer`] whose training rows are drawn while it trains: for each problem the policy's own
    correct solution, else its retelling of the reference, else the demonstration, as `DataRewriter` makes them.

    Beside the other metrics it logs `online/self`, `online/guided`, `online/expert` (shares of the rows trained on),
    `online/acceptance/<stage>` and `online/truncated/<stage>` (of the attempts), `online/late`, `online/dropped`,
    `online/seconds` spent on drawing, `staleness/mean` and `staleness/max` (optimizer steps since a row's policy), and
    `sampling/logp_difference/mean` and `…/max`, between the engine's log-probs and this trainer's by the same policy.

    Args:
        model (`str` or `PreTrainedModel`): What is trained, and asked.
        args ([`OnlineRewriteSFTConfig`], *optional*): Settings of both.
        train_dataset (`datasets.Dataset`): Problems with demonstrations, in any of the formats that
            `trl-offpolicy rewrite` reads.
        eval_dataset (*optional*): Rows as [`ImportanceWeightedSFTTrainer`] takes them: nothing is drawn for them.
        verifier (*optional*): What tells right attempts from wrong ones, as `DataRewriter` takes it; by default a
            [`MathVerifier`].
        data_collator, processing_class, ...: `SFTTrainer`'s, with its meaning and order.

    Raises:
        ValueError: A setting or a dataset that cannot work while rows are drawn (named), or `output_dir/_online` holds
            the attempts of another training.
    """

    _tag_names = ["trl", "sft", "online-rewrite-sft"]
    _name = "Online rewriting"
    _config_class = OnlineRewriteSFTConfig

    def __init__(
        self,
        model,
        args: OnlineRewriteSFTConfig | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *others,
        verifier=None,
        **kwargs,
    ):
        args = self._config_of(model, args)
        self._given_rows = _checked_rows(train_dataset, args, kwargs)
        _refuse_what_cannot_be_drawn_from(model, args, kwargs.get("peft_config"))
        if verifier is None:
            from ..verification.math_verifier import MathVerifier

            verifier = MathVerifier()
        # `SFTTrainer` looks at a row to tell what kind of data it is: at one as it will be.
        first = next(read_rows(self._given_rows.select([0]), args.answer_column, args.solve_prompt))
        shown = {"prompt": first.prompt, "completion": as_completion(first.prompt, first.demonstration)}
        like = datasets.Dataset.from_list([shown])
        super().__init__(model, args, data_collator, like, eval_dataset, processing_class, *others, **kwargs)
        self._rows_are_aligned = True
        shard = Shard(self.args.process_index, self.accelerator.num_processes)
        self.drawn_rows = DrawnRows(self._given_rows, args.rewriting(), self._tokenizer, as_verifier(verifier), shard)
        if self.drawn_rows.problems.plain:
            warnings.warn(PLAIN_PROMPTS, stacklevel=2)
        engines: dict[str, Any] = {"colocate": ColocatedEngine, "server": ServedEngine}
        self.engine = (engines[args.vllm_mode] if args.use_vllm else TrainedModel)(self, model)
        self._initial = self.engine.sampler.name, self.engine.sampler.revision
        self.train_dataset_id = hub_origin(self._given_rows).get("dataset_name")
        # Optimizer steps of micro-batches of examples, each with its source (`None`: the epoch has had it).
        self._buffer: list[list[list[tuple[dict, str | None]]]] = []
        self._buffer_source = None  # the epoch's iterator that they come from
        self._version = 0  # optimizer steps before the policy that has drawn what is in the buffer
        self._refreshes = 0
        steps = args.steps_per_generation // args.gradient_accumulation_steps
        if args.max_staleness is not None and args.max_staleness < steps - 1:
            warnings.warn(
                f"Rows are drawn for {steps} optimizer steps at a time, of which those after the first {args.max_staleness + 1} are older than "
                f"max_staleness={args.max_staleness}: their rows will be dropped. Draw for fewer steps (steps_per_generation).",
                stacklevel=2,
            )

    # ---- what differs from rows that are there before ----

    def _columns_to_score(self, args) -> list[str]:
        return []

    def _describe(self, train_dataset) -> None:
        self.num_train_rows, self.num_unlearned_rows, self.train_sources = 0, 0, Counter()

    def _tell_tokens_without_ratio(self, given) -> None:
        """Of the rows there are none yet; those of the policy have their μ."""

    @property
    def card_facts(self) -> dict[str, str]:
        steps = self.args.steps_per_generation // self.args.gradient_accumulation_steps
        return {
            "rows": f"drawn {self._refreshes} times, for {steps} optimizer steps each, by the model as it was then; up to "
            f"{self.args.num_generations} attempts a stage ({', '.join(self.args.stages)})"
        }

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        if dataset_name == "train":
            numbers = datasets.Dataset.from_dict({_NUMBER: range(len(self._given_rows))})
            return numbers.shuffle(seed=args.seed) if args.shuffle_dataset else numbers
        args = _without_recomputing(args)
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, _NUMBER]))

    def get_train_dataloader(self):
        of_rows, self.data_collator = self.data_collator, _numbers
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = of_rows

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        self._buffer, self._buffer_source = [], None
        if self.state.global_step and not resume_from_checkpoint:  # once more: it begins with what was trained before
            self._initial = self._initial[0], weights_digest(self.model.named_parameters())
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.drawn_rows.close()

    # ---- drawing ----

    def _next_step(self, epoch_iterator, num_batches, device):
        if self._buffer_source is not epoch_iterator or not self._buffer:
            self._buffer_source = epoch_iterator
            self._buffer = self._refresh(epoch_iterator)
        if not self._buffer:
            return [], None
        batches = [self.data_collator(examples) for examples in self._ripe(self._buffer.pop(0))]
        return batches, self._get_num_items_in_batch(batches, device)

    def _ripe(self, step: list[list[tuple[dict, str | None]]]) -> list[list[dict]]:
        """The micro-batches of this optimizer step; their rows without targets if these are older than allowed."""
        staleness, metrics = self.state.global_step - self._version, self._metrics["train"]
        metrics["staleness/mean"].append(staleness)
        metrics["staleness/max"] = [max([staleness, *metrics["staleness/max"]])]
        limit = self.args.max_staleness
        too_old = limit is not None and staleness > limit
        self._count([source for batch in step for _, source in batch if source is not None], too_old)
        return [[_masked(example) if too_old else example for example, _ in batch] for batch in step]

    def _refresh(self, epoch_iterator) -> list[list[list[tuple[dict, str | None]]]]:
        """
        Draws the rows of the coming optimizer steps, or reads them where they were drawn before this process began:
        steps of micro-batches of examples, each with its source.
        """
        args, now = self.args, self.state.global_step
        accumulated, loader = args.gradient_accumulation_steps, self.callback_handler.train_dataloader
        in_epoch = ceil(len(loader) / accumulated)
        done, size = now % in_epoch, args.steps_per_generation // accumulated
        self._version = version = now - done % size
        steps = min(size - done % size, in_epoch - done, self.state.max_steps - now)
        micro = [list(islice(epoch_iterator, accumulated)) for _ in range(steps)]
        batches = [batch[_NUMBER].tolist() for batch in chain(*micro)]
        numbers = list(chain(*batches))
        if not numbers:
            return []
        asked = list(chain(*(self._first_time(done * accumulated + i, batch) for i, batch in enumerate(batches))))
        rows = self._rows(version, numbers, asked, (now - version) * accumulated * self._train_batch_size)
        of_rows = zip(self._examples(rows), rows["source"].to_pylist(), asked, strict=True)
        of_batches = iter([(e, source) if first else (_masked(e), None) for e, source, first in of_rows])
        self._refreshes += 1
        taken = iter([list(islice(of_batches, len(batch))) for batch in batches])
        return [list(islice(taken, len(step))) for step in micro]

    def _first_time(self, micro_step: int, batch: list[int]) -> list[bool]:
        """
        Of each row of a micro-batch, whether the epoch has not had it: with several processes accelerate fills the
        last batches up with rows from the epoch's beginning.
        """
        size, processes = self._train_batch_size, self.accelerator.num_processes
        before = (micro_step * processes + self.args.process_index) * size
        return [before + i < len(self._given_rows) for i in range(len(batch))]

    def _rows(self, version: int, numbers: list[int], asked: list[bool], skipped: int) -> pa.Table:
        args, drawn_rows = self.args, self.drawn_rows
        if drawn_rows.journal is None:
            drawn_rows.open(self._identity(), version)
        self.accelerator.wait_for_everyone()  # nobody draws any more from the policy as it was
        difference: list[float] = []
        drawn = drawn_rows.earlier(version, numbers, skipped)
        if drawn is None and version != self.state.global_step:
            raise ValueError(
                f"The checkpoint is of step {self.state.global_step}, whose rows the policy of step {version} has drawn, and {drawn_rows.file(version)} is "
                "not there. Put it back, or resume from an older checkpoint."
            )
        if any(self._sum([drawn is None])):  # also where another process has its rows already
            self.engine.renew(version)
        if drawn is None:
            with self.engine.drawing() as sampler:
                drawn = drawn_rows.draw(
                    version, numbers, asked, sampler, args.refresh_deadline,
                    lambda rows: self._with_own_log_probs_of(rows, difference),
                )  # fmt: skip
        self._log_drawing(drawn, difference)
        return drawn.rows

    def _with_own_log_probs_of(self, rows: pa.Table, difference: list[float]) -> pa.Table:
        """
        Notes how far this trainer's log-probs of drawn tokens are from the engine's, and puts them in their place if
        that is wanted; else it looks at the first micro-batch only, since it takes a forward pass.
        """
        own = self.args.precompute_behavior_log_probs
        looked_at = (rows if own else rows.slice(0, self._train_batch_size)).to_pylist()
        drawn = [i for i, row in enumerate(looked_at) if row["completion_ids"]]
        pieces = [(self._behavior_prompt_ids(looked_at[i]), looked_at[i]["completion_ids"]) for i in drawn]
        with without_training(self.model), self.accelerator.autocast():
            scored = target_log_probs(self.model, pieces, progress=False)
        log_probs = rows["behavior_log_probs"].to_pylist()
        for i, scores in zip(drawn, scored, strict=True):
            if log_probs[i]:
                difference += (scores - torch.tensor(log_probs[i])).abs().tolist()
            log_probs[i] = scores.tolist()
        if not own:
            return rows
        place = rows.schema.get_field_index("behavior_log_probs")
        return rows.set_column(place, rows.schema.field(place), pa.array(log_probs, rows.schema.field(place).type))

    def _examples(self, rows: pa.Table) -> list[dict]:
        """Tokenized, aligned and cut as a dataset would be; a row of which no target is left stays."""
        args = _without_recomputing(self.args)
        args.dataset_num_proc = None
        with _no_bars():
            aligned = self._align(datasets.Dataset(rows), self.processing_class, args, None, "drawn")
        columns = [name for name in ("input_ids", "labels", *TOKEN_COLUMNS) if name in aligned.column_names]
        cut = slice(None) if args.max_length is None else kept_tokens(args)
        return [{name: row[name][cut] for name in columns} for row in aligned.select_columns(columns)]

    def _identity(self) -> dict:
        """On what the attempts depend: the journal's first line."""
        args, drawn_rows, sampler = self.args, self.drawn_rows, copy.copy(self.engine.sampler)
        sampler.name, sampler.revision = self._initial
        config = journal_config(drawn_rows.args, drawn_rows.problems.plain, drawn_rows.verifier, sampler)
        # The rows that are made of attempts are kept here, and trained on: unlike a run's they are not made anew.
        config |= {**drawn_rows.args.kept(), "expert_format": drawn_rows.args.expert_format}
        config |= {"num_processes": drawn_rows.shard.count, "train_dataset": drawn_rows.problems.memory.digest}
        free = _FREE | {f.name for f in REWRITING}
        names = [f.name for f in fields(args) if f.name not in free and not f.name.startswith(_FREE_KINDS)]
        config |= {name: getattr(args, name) for name in names}
        config["model_init_kwargs"] = {k: v for k, v in (args.model_init_kwargs or {}).items() if k != "token"}
        if (adapter := getattr(self.model, "active_peft_config", None)) is not None:
            found = adapter.to_dict().items()
            config |= {f"peft_config.{name}": value for name, value in found if name not in _OF_NO_ADAPTER}
        return json.loads(json.dumps(config, default=lambda v: sorted(v) if isinstance(v, set) else str(v)))

    # ---- what is told ----

    def _count(self, of_rows: list[str], too_old: bool) -> None:
        """Counts the rows of an optimizer step, of all processes, by source; or as dropped, if they are too old."""
        counted, sources = Counter(of_rows), (*self.args.stages, str(Source.EXPERT))
        metrics, numbers = self._metrics["train"], [*map(round, self._sum([counted[source] for source in sources]))]
        metrics["online/dropped"] = [sum([sum(numbers) * too_old, *metrics["online/dropped"]])]
        if too_old:
            return
        for source, number in zip(sources, numbers, strict=True):
            self.train_sources[source] += number
            metrics[f"online/{source}"].append(number / max(1, sum(numbers)))
        self.num_train_rows = self.train_sources.total()

    def _log_drawing(self, drawn: Drawn, difference: list[float]) -> None:
        """Every process calls this, also one that had its rows already."""
        metrics, stages = self._metrics["train"], drawn.counts.stages
        numbers: list[float] = [n for of in stages.values() for n in (of.sampled, of.correct, of.truncated)]
        late, seconds, total, many, *numbers = self._sum(
            [drawn.late, drawn.seconds, sum(difference), len(difference), *numbers]
        )
        for name, value in {"late": late, "seconds": seconds / self.accelerator.num_processes}.items():
            metrics[f"online/{name}"] = [sum([value, *metrics[f"online/{name}"]])]
        for stage in stages:
            (sampled, correct, truncated), numbers = numbers[:3], numbers[3:]
            if sampled:
                metrics[f"online/acceptance/{stage}"].append(correct / sampled)
                metrics[f"online/truncated/{stage}"].append(truncated / sampled)
        if many and total / many > DOUBTFUL:
            warnings.warn(
                f"The engine's log-probs are {total / many:.2f} from the trainer's on average: it may not draw from the policy that is trained.",
                stacklevel=2,
            )
        if many:
            largest = torch.tensor([max(difference, default=0.0)], device=self.args.device)
            metrics["sampling/logp_difference/mean"].append(total / many)
            metrics["sampling/logp_difference/max"].append(self.accelerator.gather(largest).max().item())

    def _sum(self, numbers: list[float]) -> list[float]:
        """Each of the numbers, over all processes."""
        mine = torch.tensor([numbers], dtype=torch.float32, device=self.args.device)
        return self.accelerator.gather(mine).sum(0).tolist()


def _vllm_takes(adapter) -> bool:
    """Whether vLLM can draw with an adapter of this config."""
    lora = getattr(adapter.peft_type, "value", adapter.peft_type) == "LORA"
    return lora and not (adapter.modules_to_save or adapter.use_dora or adapter.bias != "none")


def _numbers(examples: list[dict]) -> dict:
    return {_NUMBER: torch.tensor([example[_NUMBER] for example in examples])}


def _masked(example: dict) -> dict:
    """An example that is not trained on."""
    return {**example, "labels": [-100] * len(example["labels"])}


def _without_recomputing(args):
    """The settings for rows that have their log μ already."""
    args = copy.copy(args)
    args.precompute_behavior_log_probs = False
    return args


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """`datasets` shows none of its progress bars."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _checked_rows(train_dataset, args, kwargs: dict) -> datasets.Dataset:
    """The training rows; `ValueError` if they are no problems with demonstrations."""
    if train_dataset is None:
        raise ValueError("You passed no train_dataset; it holds the problems and their demonstrations.")
    if hasattr(train_dataset, "column_names") and not hasattr(train_dataset, "num_rows"):
        raise ValueError(
            "You passed a streaming dataset, but a problem's id counts the rows before it that are alike. Load it without streaming=True."
        )
    rows = as_dataset(train_dataset)
    if not len(rows):
        raise ValueError("The train dataset has no rows. Was everything filtered out of it, or is it another split?")
    if found := ROW_COLUMNS.intersection(rows.column_names):
        raise ValueError(
            f"The train dataset has the column {min(found)}: its rows are rewritten already. Train on them with ImportanceWeightedSFTTrainer, or give "
            "this one the demonstrations that they were made from."
        )
    if media := media_columns(rows):
        raise ValueError(f"The train dataset has media in {media}, which no engine is shown. Train on text.")
    check_stages(rows.column_names, args.rewriting())
    if find_format(rows.column_names, args.answer_column)[1] is None:
        raise ValueError(
            f"The train dataset has the columns {rows.column_names} and no demonstrations, which a problem takes that the model does not solve. Add "
            "them, or rewrite first (`trl-offpolicy rewrite --stages self`) and train on what is solved."
        )
    if kwargs.get("formatting_func") is not None:
        raise ValueError("You passed formatting_func, but the rows are drawn and formatted here. Leave it out.")
    accelerator = args.accelerator_config
    if accelerator.split_batches or accelerator.dispatch_batches:
        raise ValueError(
            "You passed split_batches or dispatch_batches in accelerator_config, but each process draws the rows of its own batches. Leave them out."
        )
    return rows


def _refuse_what_cannot_be_drawn_from(model, args, peft_config) -> None:
    for adapter in (peft_config, getattr(model, "active_peft_config", None)):
        if getattr(adapter, "is_prompt_learning", False):
            raise ValueError(
                f"You passed a peft_config of the kind {adapter.peft_type.value}, whose virtual tokens no engine here is given. Use LoRA."
            )
        if args.use_vllm and adapter is not None and not _vllm_takes(adapter):
            raise ValueError(
                "vLLM draws with LoRA adapters alone: without modules_to_save, DoRA, bias or another peft type. Leave these out, or write use_vllm=False."
            )
    colocated, adapted = (
        args.use_vllm and args.vllm_mode == "colocate",
        hasattr(model, "active_peft_config") or peft_config,
    )
    if args.use_vllm and not (colocated or adapted):
        raise ValueError(
            "You passed vllm_mode='server' without an adapter, but a server is given the adapter that is trained, not all weights. Train one "
            "(peft_config=LoraConfig(...)), or write vllm_mode='colocate'."
        )
    if colocated and find_spec("vllm") is None:
        raise ModuleNotFoundError(
            "You passed use_vllm=True, but vLLM is not installed: pip install 'trl-offpolicy[vllm]'."
        )
    if args.use_vllm and not (isinstance(model, str) or causal_lm(model).config._name_or_path):
        raise ValueError(
            "You passed use_vllm=True with a model made in memory, which vLLM cannot load. Save it, and pass the directory."
        )
    plugin = args.deepspeed_plugin
    fsdp = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    if fsdp or (plugin is not None and plugin.zero_stage == 3):
        raise ValueError(
            f"{'FSDP' if fsdp else 'ZeRO stage 3'} shards the weights, and each process draws its own rows from a whole model. Use DDP or ZeRO stage 1 "
            "or 2; or rewrite between trainings, which works with any of them: `trl-offpolicy loop`."
        )
