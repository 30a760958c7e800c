"""Configuration of `ImportanceWeightedSFTTrainer`."""

from dataclasses import dataclass, field, fields
from functools import cache
from typing import ClassVar

from transformers import TrainingArguments
from trl import SFTConfig

from ..data.rows import Source
from ..data.tokenization import json_mapping
from .losses import CLIP_MODES, EXPERT_WEIGHTINGS, OBJECTIVES, THRESHOLD_MODES, THRESHOLD_POLICIES


@dataclass
class ImportanceWeightedSFTConfig(SFTConfig):
    r"""
    [`~trl.SFTConfig`] with an objective: every other field is TRL's, and means what it means there.

    Args:
        objective (`str`, `dict` or `Callable`, *optional*, defaults to `"iw"`): Weight of each token's negative
            log-likelihood, in the place of TRL's `loss_type`, which it follows where only that is given (`"dft"`;
            label smoothing means `"nll"`). `"nll"`: 1 (SFT). `"dft"`: π (arXiv 2508.05629). `"p_alpha"`: π^α (arXiv
            2510.00526). `"iw"`: π/μ, clipped, with μ from the column `behavior_log_probs` (arXiv 2509.15157, eq. 5,
            per token). `"iw_sequence"`: the length-normalised sequence ratio (arXiv 2507.12856). `"psft"`: π/π_old, 0
            above 1 + `epsilon_high` (arXiv 2508.17784). `"asft"`: `dft` plus `beta`·KL(π_0‖π) over the vocabulary
            (arXiv 2509.23753). `"eaft"`: normalised entropy of the 20 likeliest tokens, to the power `alpha` (arXiv
            2601.02151). `"threshold"`: 1 for tokens likelier than `tau`, 0 or less for others (arXiv 2601.09195,
            2501.14315). `"pear"`: the ratio π/μ of what follows a token (arXiv 2602.01058). `"topr"`: by the rows'
            column `reward`, 1 for right ones and -min(π/μ, 1) of the sequence for wrong ones (arXiv 2503.14286). A
            dict chooses by source, `{"self": "iw", "expert": "dft"}`, with `nll` for what it does not name. A function
            of your own gets the arguments that `losses.py` lists and returns weights.
        clip_min (`float`, *optional*): Smallest importance weight; named as in `GRPOConfig`. Under `dft`, `p_alpha`,
            `asft` and `threshold`, the smallest weight of a token: with a base model write 0.1, or an end of turn that
            it gives no probability is never learned. By default 0, as in the papers.
        clip_max (`float`, *optional*, defaults to `3.0`): Largest importance weight; GRPO's name and value. `None` for
            no limit.
        clip_mode (`str`, *optional*, defaults to `"truncate"`): Weights outside the limits become the limit, or 0
            (`"mask"`).
        expert_weighting (`str`, *optional*, defaults to `"one"`): Under `iw`, `iw_sequence` and `pear`, the weight of
            tokens without a behaviour log-prob (demonstrations): `"one"` (as SFT), `"dft"` (π), or `"base"` (π/π_0).
        weight_column (`str`, *optional*): Column whose number multiplies the weights of an example's tokens (they
            still count as before in the denominator). Unset, it is `weight`, but only beside `completion_ids` or
            `behavior_log_probs`: in any other dataset a column of that name is the user's own.
        precompute_behavior_log_probs (`bool`, *optional*, defaults to `False`): Before training, compute the
            `behavior_log_probs` of rows with `completion_ids` with the model as it is then, under the prompt and
            temperature that they were sampled with (`behavior_prompt`, `temperature`), in the place of what the column
            holds. For data whose engine gave no log-probs, or whose rounding is not to be trusted; it is exact only if
            this model is the one that was sampled.
        alpha (`float`, *optional*, defaults to `1.0`): Exponent of `p_alpha` and `eaft`.
        beta (`float`, *optional*, defaults to `0.1`): KL coefficient of `asft` (the paper uses 0.05 to 0.1).
        tau (`float`, *optional*, defaults to `0.1`): Probability of a token below which `threshold` limits its weight.
        threshold_mode (`str`, *optional*, defaults to `"mask"`): What `threshold` does there: weight 0 (`"mask"`) or
            π/`tau` (`"taper"`).
        threshold_policy (`str`, *optional*, defaults to `"current"`): Whose probability it is: of the policy that is
            trained, or of the one before training (`"initial"`).
        gamma (`float`, *optional*, defaults to `0.999`): Discount of `pear`, by which earlier tokens weigh less.
        epsilon_high (`float`, *optional*, defaults to `0.28`): Under `psft`, a ratio above 1 + `epsilon_high` gives no
            gradient.
        steps_per_outer_batch (`int`, *optional*, defaults to `8`): Under `psft`, the optimizer steps of an outer
            batch: π_old is the policy at its start (the paper takes 64 rows in mini-batches of 8). 0: π_old is π_0.

    π_0 is the policy before training. `asft` keeps a frozen copy of the model or, if there is an adapter, switches
    that off (it must change nothing at the start, as LoRA's default does); the others compute log π_0 once, before
    training, and cache it.
    """

    default_objective: ClassVar[str] = "iw"

    objective: dict | str | None = field(
        default=None,
        metadata={
            "help": f"Weight of each token: {', '.join(OBJECTIVES)}, or one for each source as JSON: "
            '{"self": "iw", "expert": "dft"}. Without it: what loss_type says, else the default of the trainer.'
        },
    )
    clip_min: float | None = field(
        default=None,
        metadata={
            "help": "Smallest weight under iw, dft, p_alpha, asft and threshold; 0.1 lets a base model learn to end a turn under dft."
        },
    )
    clip_max: float | None = field(default=3.0, metadata={"help": "Largest importance weight under iw."})
    clip_mode: str = field(
        default="truncate",
        metadata={
            "help": "Importance weights outside the limits become the limit, or 0 (mask).",
            "choices": CLIP_MODES,
        },
    )
    expert_weighting: str = field(
        default="one",
        metadata={
            "help": "Weight of tokens without a behaviour log-prob under iw: one (as SFT), dft, or base (ratio to the initial policy).",
            "choices": EXPERT_WEIGHTINGS,
        },
    )
    weight_column: str | None = field(
        default=None,
        metadata={
            "help": "Column whose number multiplies an example's weights; `weight` where rows carry completion_ids."
        },
    )
    precompute_behavior_log_probs: bool = field(
        default=False,
        metadata={
            "help": "Compute behavior_log_probs with the initial model before training, whatever the column holds."
        },
    )
    alpha: float = field(default=1.0, metadata={"help": "Exponent of p_alpha and eaft."})
    beta: float = field(default=0.1, metadata={"help": "KL coefficient of asft."})
    tau: float = field(
        default=0.1, metadata={"help": "Probability of a token below which threshold limits its weight."}
    )
    threshold_mode: str = field(
        default="mask",
        metadata={"help": "Below tau a token weighs 0 (mask) or π/tau (taper).", "choices": THRESHOLD_MODES},
    )
    threshold_policy: str = field(
        default="current",
        metadata={
            "help": "Whose probability is compared with tau: the policy that is trained, or the initial one.",
            "choices": THRESHOLD_POLICIES,
        },
    )
    gamma: float = field(default=0.999, metadata={"help": "Discount of pear, by which earlier tokens weigh less."})
    epsilon_high: float = field(
        default=0.28, metadata={"help": "Under psft, a ratio above 1 + this gives no gradient."}
    )
    steps_per_outer_batch: int = field(
        default=8,
        metadata={"help": "Optimizer steps of psft's outer batch; 0 takes the initial policy as the reference."},
    )

    chat_template_path: str | None = field(
        default=None,
        metadata={
            "help": "Chat template: a Jinja file (.jinja, .j2), or a tokenizer (directory or Hub id) that has it.",
            "aliases": ["--chat_template"],
        },
    )

    def __post_init__(self):
        chosen_loss = {"dft": "dft", "chunked_nll": "nll"}.get(
            self.loss_type
        )  # "nll" is also the default, so it may not have been chosen
        # TRL switches this on by its old name, of which a transformers that knows the new one warns in every training.
        if getattr(self, "activation_checkpointing", False) is None:
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()
        if isinstance(self.objective, str) and self.objective.lstrip().startswith("{"):
            self.objective = json_mapping("objective", self.objective, '{"self": "iw", "expert": "dft"}')
        # A script written for SFTTrainer chooses its loss by `loss_type`.
        self.objective_was_given = self.objective is not None
        if not self.objective_was_given:
            smoothed = "nll" if self.label_smoothing_factor and self.default_objective == "iw" else None
            self.objective = chosen_loss or smoothed or self.default_objective
        if self.loss_type == self.objective:
            self.loss_type = "nll"  # TRL would apply its own weights in addition to ours
        by_source = self.objective if isinstance(self.objective, dict) else {}
        for objective in self.objectives:
            if not callable(objective) and objective not in list(OBJECTIVES):  # it may be a list, which has no hash
                raise ValueError(
                    f"You passed objective={self.objective!r}; use one of {list(OBJECTIVES)}, a dict of them by source, or a function."
                )
        unknown = set(by_source) - {str(source) for source in Source}
        if unknown:
            raise ValueError(
                f"You passed objective={self.objective!r}; {sorted(unknown)} is no source. Use {[str(s) for s in Source]}."
            )
        for name, values in (
            ("expert_weighting", EXPERT_WEIGHTINGS),
            ("clip_mode", CLIP_MODES),
            ("threshold_mode", THRESHOLD_MODES),
            ("threshold_policy", THRESHOLD_POLICIES),
            ("truncation_mode", ("keep_start", "keep_end")),
        ):
            if getattr(self, name) not in values:
                raise ValueError(f"You passed {name}={getattr(self, name)!r}; use one of {list(values)}.")
        for objective in {"iw_sequence", "pear", "topr"}.intersection(self.objectives):
            self._check_sequences_stay_whole(objective)
        if self.loss_type != "nll":
            raise ValueError(
                f"You passed loss_type={self.loss_type!r} together with objective={self.objective!r}; the objective is what "
                f"weights the loss here. Drop loss_type, or write objective={self.loss_type!r} instead."
            )
        if self.label_smoothing_factor and self.objectives != ["nll"]:
            raise ValueError(
                f"You passed label_smoothing_factor={self.label_smoothing_factor}: smoothing spreads the loss over tokens that "
                "were not sampled, for which no importance weight is defined. Drop it, or write objective='nll'."
            )
        for name in ("beta", "epsilon_high", "steps_per_outer_batch", "alpha"):
            if not getattr(self, name) >= 0:  # nor NaN
                raise ValueError(f"You passed {name}={getattr(self, name)}; it must be at least 0.")
        for name in ("tau", "gamma"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"You passed {name}={getattr(self, name)}; it must be above 0 and at most 1.")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"You passed max_length={self.max_length}; it must be at least 1, or None for no limit.")
        if self.clip_max is not None and not self.clip_max > 0:
            raise ValueError(
                f"You passed clip_max={self.clip_max}; it must be above 0, since a weight below 0 unlearns, or None for no limit."
            )
        if self.clip_min is not None and not self.clip_min >= 0:
            raise ValueError(f"You passed clip_min={self.clip_min}; it must be at least 0, or None for no limit.")
        if self.clip_min is not None and self.clip_max is not None and self.clip_min > self.clip_max:
            raise ValueError(f"You passed clip_min={self.clip_min} above clip_max={self.clip_max}; swap them.")

    def _check_sequences_stay_whole(self, objective: str) -> None:
        if self.packing and self.packing_strategy != "bfd":
            raise ValueError(
                f"objective={objective!r} needs whole examples, but packing_strategy={self.packing_strategy!r} cuts examples in two. "
                "Use packing_strategy='bfd'."
            )
        if self.eval_packing and not self.packing:  # TRL's collator is not padding-free then
            raise ValueError(
                f"objective={objective!r} needs to know where an example ends, but eval_packing=True without packing=True shows a packed row to "
                "the model as one example. Write eval_packing=False."
            )

    @property
    def objectives(self) -> list:
        """The objectives that the run mixes."""
        return list(self.objective.values()) if isinstance(self.objective, dict) else [self.objective]

    @classmethod
    def of(cls, args: TrainingArguments) -> "ImportanceWeightedSFTConfig":
        """
        `args` (an `SFTConfig`, plain `TrainingArguments`, or a subclass of a user's own) with the fields of this class
        added. The result is an instance of both classes, with every attribute that `args` has.

        Field by field: `TrainingArguments.to_dict` masks everything whose name ends in `_token`, `eos_token` included.
        """
        if not isinstance(args, TrainingArguments):
            raise ValueError(
                f"You passed args={args!r:.200}; it must be a config: write args={cls.__name__}(output_dir='out', ...)."
            )
        known = {f.name for f in fields(cls) if f.init}
        values = {f.name: getattr(args, f.name) for f in fields(args) if f.init and f.name in known}
        if not getattr(args, "objective_was_given", True):
            del values["objective"]
        config = cls(**values)
        own = {name: value for name, value in vars(args).items() if name not in known}
        return _restore(cls, type(args), vars(config) | own)


@cache
def _both(cls: type, of_user: type) -> type:
    """A config class that is `cls` and also the class `of_user`, whose fields and methods it has."""
    if issubclass(cls, of_user):
        return cls
    combined = type(of_user.__name__, (cls, of_user), {"__module__": of_user.__module__, "__reduce__": _by_its_parts})
    return dataclass(init=False, repr=False, eq=False)(combined)


def _by_its_parts(config):
    """How a config of a class made by `_both`, which no import finds, is pickled into a checkpoint."""
    return _restore, (*type(config).__bases__, vars(config))


def _restore(cls: type, of_user: type, attributes: dict):
    config = object.__new__(_both(cls, of_user))
    vars(config).update(attributes)
    return config
