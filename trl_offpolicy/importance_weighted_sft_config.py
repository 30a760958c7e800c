"""Configuration of `ImportanceWeightedSFTTrainer`."""

from dataclasses import dataclass, field, fields

from transformers import TrainingArguments
from trl import SFTConfig

from .losses import CLIP_MODES, EXPERT_WEIGHTINGS, OBJECTIVES
from .rows import Source


@dataclass
class ImportanceWeightedSFTConfig(SFTConfig):
    r"""
    [`~trl.SFTConfig`] with an objective: every other field is TRL's, and means what it means there.

    Args:
        objective (`str`, `dict` or `Callable`, *optional*, defaults to `"iw"`): Weight of each token's negative log-likelihood, in the
            place of TRL's `loss_type`. `"nll"`: 1 (SFT). `"dft"`: π (arXiv 2508.05629). `"p_alpha"`: π^α (arXiv 2510.00526). `"iw"`: π/μ,
            clipped, with μ from the column `behavior_log_probs` (arXiv 2509.15157, eq. 5, per token). `"iw_sequence"`: the
            length-normalised sequence ratio (arXiv 2507.12856). A dict chooses by source, `{"self": "iw", "expert": "dft"}`, with
            `nll` for what it does not name. A function of your own gets the arguments that `losses.py` lists and returns weights.
        clip_min (`float`, *optional*): Smallest importance weight; named as in `GRPOConfig`.
        clip_max (`float`, *optional*, defaults to `3.0`): Largest importance weight; GRPO's name and value. `None` for no limit.
        clip_mode (`str`, *optional*, defaults to `"truncate"`): Weights outside the limits become the limit, or 0 (`"mask"`).
        expert_weighting (`str`, *optional*, defaults to `"one"`): Under `iw` and `iw_sequence`, the weight of tokens without a
            behaviour log-prob (demonstrations): `"one"` (as SFT) or `"dft"` (π).
        alpha (`float`, *optional*, defaults to `1.0`): Exponent of `p_alpha`.
    """

    _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS + ["objective"]

    objective: dict | str | None = field(
        default="iw",
        metadata={
            "help": f"Weight of each token: {', '.join(OBJECTIVES)}, or one for each source as JSON: "
            '{"self": "iw", "expert": "dft"}.'
        },
    )
    clip_min: float | None = field(default=None, metadata={"help": "Smallest importance weight under iw."})
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
            "help": "Weight of tokens without a behaviour log-prob under iw: one (as SFT) or dft.",
            "choices": EXPERT_WEIGHTINGS,
        },
    )

    alpha: float = field(default=1.0, metadata={"help": "Exponent of p_alpha."})

    def __post_init__(self):
        super().__post_init__()
        by_source = self.objective if isinstance(self.objective, dict) else {}
        for objective in by_source.values() if by_source else [self.objective]:
            if not callable(objective) and objective not in OBJECTIVES:
                raise ValueError(
                    f"You passed objective={self.objective!r}; use one of {list(OBJECTIVES)}, a dict of them by source, or a function."
                )
        unknown = set(by_source) - {str(source) for source in Source}
        if unknown:
            raise ValueError(
                f"You passed objective={self.objective!r}; {sorted(unknown)} is no source. Use {[str(s) for s in Source]}."
            )
        for name, values in (("expert_weighting", EXPERT_WEIGHTINGS), ("clip_mode", CLIP_MODES)):
            if getattr(self, name) not in values:
                raise ValueError(f"You passed {name}={getattr(self, name)!r}; use one of {list(values)}.")
        if (
            self.packing
            and self.packing_strategy == "wrapped"
            and "iw_sequence" in [self.objective, *by_source.values()]
        ):
            raise ValueError(
                "objective='iw_sequence' needs to know where an example ends, but packing_strategy='wrapped' cuts examples in two. "
                "Use packing_strategy='bfd'."
            )
        if self.loss_type != "nll":
            raise ValueError(
                f"You passed loss_type={self.loss_type!r} together with objective={self.objective!r}; the objective is what "
                f"weights the loss here. Drop loss_type and write objective={self.loss_type!r} instead."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"You passed label_smoothing_factor={self.label_smoothing_factor}: smoothing spreads the loss over tokens that "
                "were not sampled, for which no importance weight is defined. Drop it."
            )
        if self.clip_min is not None and self.clip_max is not None and self.clip_min > self.clip_max:
            raise ValueError(f"You passed clip_min={self.clip_min} above clip_max={self.clip_max}; swap them.")

    @classmethod
    def of(cls, args: TrainingArguments) -> "ImportanceWeightedSFTConfig":
        """`args` (an `SFTConfig` or plain `TrainingArguments`) with the fields of this class added.

        Field by field: `TrainingArguments.to_dict` masks everything whose name ends in `_token`, `eos_token` included.
        """
        known = {f.name for f in fields(cls) if f.init}
        values = {f.name: getattr(args, f.name) for f in fields(args) if f.init and f.name in known}
        if values.get("loss_type") == "dft" and isinstance(args, SFTConfig):
            values |= {"loss_type": "nll", "objective": "dft"}
        return cls(**values)
