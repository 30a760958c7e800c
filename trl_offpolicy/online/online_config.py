"""Configuration of `OnlineRewriteSFTTrainer`."""

from dataclasses import dataclass, field, fields, make_dataclass

from ..rewriting.rewrite_config import RewriteConfig
from ..sampling.sampler import PLAIN, check_positive, reshaped
from ..trainer.importance_weighted_sft_config import ImportanceWeightedSFTConfig


# What a rewrite has and online training has not: it makes no dataset, a row for each problem, and only the policy draws.
# It computes log μ by a forward under the prompt that was drawn with, which is not that of a mixture of two.
_OF_A_RUN = {
    "shard", "dry_run", "probe", "rejudge", "accept_failed", "hub_dataset_id", "push_attempts", "push_every", "wandb_log_artifacts",
    "keep", "max_per_problem", "keep_demonstration", "strategy", "teacher_log_probs", "select_across", "reference_from", "replay_share",
    "replay_dataset", "guided_decoding", "hint_beta",
}  # fmt: skip
_OF_TRAINING = {f.name for f in fields(ImportanceWeightedSFTConfig)}  # `seed` and the like: one flag for both
REWRITING = [f for f in fields(RewriteConfig) if f.name not in _OF_A_RUN | _OF_TRAINING]
# The fields of `RewriteConfig` that say what is asked, drawn and kept.
RewritingFields = make_dataclass(
    "RewritingFields",
    [
        (f.name, f.type, field(default=f.default, default_factory=f.default_factory, metadata=f.metadata))  # type: ignore[arg-type]
        for f in REWRITING
    ],
    kw_only=True,
)


@dataclass
class OnlineRewriteSFTConfig(RewritingFields, ImportanceWeightedSFTConfig):  # type: ignore[misc, valid-type]
    r"""
    [`ImportanceWeightedSFTConfig`] and what [`RewriteConfig`] says of a rewrite (`stages`, `num_generations`,
    `max_completion_length`, `guided_prompt`, `answer_column`, the filters of guided attempts, …), which means here
    what it means there. What is drawn is journaled in `output_dir/_online` (a push of the model leaves out what begins
    with `_`); `overwrite` is about that journal.

    Args:
        precompute_behavior_log_probs (`bool`, *optional*, defaults to `True`): log μ is computed by the trainer's own
            forward, with the policy that has drawn a row and under the prompt that it was drawn under; else it is what
            the engine said. The trainer's does not depend on which rows an engine drew together, so that a training
            that was killed and resumed comes to the same weights, and leaves no difference between two
            implementations in the ratio, at the price of a forward pass.
        steps_per_generation (`int`, *optional*): Micro-steps whose rows are drawn at a time, on each process, by the
            policy as it is before the first of them; a multiple of `gradient_accumulation_steps`, which is the
            default. GRPO's name.
        max_staleness (`int`, *optional*): Optimizer steps since its policy beyond which a row is not trained on any
            more, which is counted (`online/dropped`). Unset, rows serve all of the steps that they were drawn for.
        refresh_deadline (`float`, *optional*): Seconds for which rows are drawn at a time. A problem without an
            outcome by then takes its demonstration, and is counted (`online/late`). Attempts that are being verified
            then are waited for.
        sampling_batch_size (`int`, *optional*): Completions drawn at a time: 64 with `transformers`, else what vLLM
            chooses.
        use_vllm (`bool`, *optional*, defaults to `False`): Draw with vLLM; else with the model that is trained.
        vllm_mode (`str`, *optional*, defaults to `"colocate"`): `colocate` runs an engine in each process of the
            training; `server` asks the one at `vllm_server_base_url`, which is given the LoRA adapter that is trained
            ([`~online.engines.ServedEngine`]). GRPO's names, as are the next ones.
        vllm_server_base_url (`str`, *optional*): Where that server is, for example `"http://localhost:8000"`.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`): Share of the GPU's memory for vLLM.
        vllm_max_model_length (`int`, *optional*): vLLM's context, if less than the model's.
        vllm_tensor_parallel_size (`int`, *optional*, defaults to `1`): GPUs that share vLLM's model; 1 is what works.
        vllm_engine_kwargs (`dict` or JSON, *optional*): Further arguments of vLLM's engine.
    """

    _VALID_DICT_FIELDS = ImportanceWeightedSFTConfig._VALID_DICT_FIELDS + ["vllm_engine_kwargs"]

    precompute_behavior_log_probs: bool = field(
        default=True,
        metadata={"help": "log μ by the trainer's forward with the policy that drew; else what the engine said."},
    )
    steps_per_generation: int | None = field(
        default=None,
        metadata={"help": "Micro-steps whose rows are drawn at a time; by default gradient_accumulation_steps."},
    )
    max_staleness: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps since its policy beyond which a row is dropped, and counted."},
    )
    refresh_deadline: float | None = field(
        default=None,
        metadata={
            "help": "Seconds after which problems without an outcome take their demonstration, and are counted."
        },
    )
    sampling_batch_size: int | None = field(default=None, metadata={"help": "Completions drawn at a time."})
    use_vllm: bool = field(default=False, metadata={"help": "Draw with vLLM, else with the model that is trained."})
    vllm_mode: str = field(
        default="colocate",
        metadata={
            "help": "colocate: vLLM in the processes of the training. server: a vllm serve that is given the adapter that is trained.",
            "choices": ("colocate", "server"),
        },
    )
    vllm_server_base_url: str | None = field(
        default=None, metadata={"help": "server: where it is, for example http://localhost:8000."}
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of the GPU's memory that vLLM may take."}
    )
    vllm_max_model_length: int | None = field(
        default=None, metadata={"help": "vLLM's context, if less than the model's."}
    )
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that share vLLM's model: 1."})
    vllm_engine_kwargs: dict | str | None = field(
        default=None, metadata={"help": """Further arguments of vLLM's engine as JSON, e.g. '{"max_num_seqs": 64}'."""}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.completion_only_loss is None:
            self.completion_only_loss = True  # as rewritten rows have it, which are prompt and completion
        self.rewriting()
        accumulated = self.gradient_accumulation_steps
        if self.steps_per_generation is None:
            self.steps_per_generation = accumulated
        if self.steps_per_generation < 1 or self.steps_per_generation % accumulated:
            raise ValueError(
                f"You passed steps_per_generation={self.steps_per_generation}, which must be a multiple of gradient_accumulation_steps={accumulated}: "
                "the rows of an optimizer step are drawn by one policy."
            )
        check_positive(refresh_deadline=self.refresh_deadline, sampling_batch_size=self.sampling_batch_size)
        if self.max_staleness is not None and self.max_staleness < 0:
            raise ValueError(f"You passed max_staleness={self.max_staleness}; it must be at least 0.")
        settings = reshaped(vars(self))
        if settings:
            raise ValueError(
                f"You passed {', '.join(f'{name}={value}' for name, value in settings.items())}, but online rows are drawn from the policy itself: "
                f"a token's log-prob is log μ only with {', '.join(f'{name}={PLAIN[name]:g}' for name in settings)}. Leave it out."
            )
        if "teacher" in self.stages:
            raise ValueError(
                f"You passed stages={self.stages}, but online rows are the policy's own. Leave out `teacher`; `trl-offpolicy rewrite` asks teachers."
            )
        self._refuse_what_needs_all_rows_first()
        if self.vllm_mode not in ("colocate", "server"):
            raise ValueError(f"You passed vllm_mode={self.vllm_mode!r}; use 'colocate' or 'server'.")
        if not self.use_vllm and (self.vllm_mode == "server" or self.vllm_server_base_url is not None):
            raise ValueError(
                f"You passed vllm_mode={self.vllm_mode!r} with vllm_server_base_url={self.vllm_server_base_url!r}, but use_vllm=False, with which the "
                "model that is trained draws. Write use_vllm=True, or leave them out."
            )
        if self.use_vllm and (self.vllm_mode == "server") != (self.vllm_server_base_url is not None):
            raise ValueError(
                f"You passed vllm_mode={self.vllm_mode!r} with vllm_server_base_url={self.vllm_server_base_url!r}; a server has an URL, and an engine in "
                "this process has none."
            )
        if self.vllm_tensor_parallel_size != 1:
            raise ValueError(
                f"You passed vllm_tensor_parallel_size={self.vllm_tensor_parallel_size}, but with vllm_mode='colocate' each process draws its own rows, "
                "with a whole model of its own: write 1."
            )

    def rewriting(self) -> RewriteConfig:
        """The settings of what is drawn; `ValueError` for those that make no sense."""
        given = {f.name: getattr(self, f.name) for f in REWRITING}
        return RewriteConfig(f"{self.output_dir}/_online", **given, seed=self.seed)

    def _refuse_what_needs_all_rows_first(self) -> None:
        """Settings that ask something of all rows before training, when there are none yet."""
        reasons = {
            "packing": (self.packing, False, "rows are packed before training, and these are drawn during it; padding_free=True works"),
            "train_sampling_strategy": (
                self.train_sampling_strategy in ("group_by_length", "batch_rebalance"), "random", "the rows have no length before they are drawn"
            ),
            "ignore_data_skip": (self.ignore_data_skip, False, "a resumed run goes on with the rows that follow"),
            "dataloader_drop_last": (self.dataloader_drop_last, False, "every problem is asked once in an epoch"),
            "expert_weighting": (self.expert_weighting == "base", "one", "it compares with log π_0 of all rows, computed before training"),
            "threshold_policy": (self.threshold_policy == "initial", "current", "it compares with π_0 of all rows, computed before training"),
            "objective": (
                bool({"psft", "topr"}.intersection(self.objectives)), "iw",
                "psft's π_old is the policy that has drawn a row here, whose ratio is that of iw; and drawn rows have no reward for topr",
            ),
            "dataset_kwargs": (bool(self.dataset_kwargs), None, "the rows are prepared as they are drawn"),
        }  # fmt: skip
        for name, (wrong, instead, why) in reasons.items():
            if wrong:
                raise ValueError(
                    f"You passed {name}={getattr(self, name)!r}, which does not work while rows are drawn: {why}. Write {name}={instead!r}."
                )
