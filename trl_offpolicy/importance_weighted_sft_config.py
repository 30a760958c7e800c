"""Configuration of `ImportanceWeightedSFTTrainer`."""

from dataclasses import dataclass, field, fields

from transformers import TrainingArguments
from trl import SFTConfig

from .losses import EXPERT_WEIGHTINGS, OBJECTIVES


@dataclass
class ImportanceWeightedSFTConfig(SFTConfig):
    r"""
    [`~trl.SFTConfig`] with an objective: every other field is TRL's, and means what it means there.

    Args:
        objective (`str`, *optional*, defaults to `"iw"`): Weight of each token's negative log-likelihood, in the place of TRL's
            `loss_type`. `"nll"`: 1 (SFT). `"dft"`: π (arXiv 2508.05629). `"iw"`: π/μ, clipped, with μ from the column
            `behavior_log_probs` (arXiv 2509.15157, eq. 5, per token).
        clip_min (`float`, *optional*): Smallest weight under `"iw"`; named as in `GRPOConfig`.
        clip_max (`float`, *optional*, defaults to `3.0`): Largest weight under `"iw"`; GRPO's name and value. `None` for no limit.
        expert_weighting (`str`, *optional*, defaults to `"one"`): Under `"iw"`, the weight of tokens without a behaviour log-prob
            (demonstrations): `"one"` (as SFT) or `"dft"` (π).
    """

    objective: str = field(
        default="iw",
        metadata={
            "help": "Weight of each token: nll (1), dft (the policy's probability), iw (policy over behaviour, clipped).",
            "choices": OBJECTIVES,
        },
    )
    clip_min: float | None = field(default=None, metadata={"help": "Smallest importance weight under iw."})
    clip_max: float | None = field(default=3.0, metadata={"help": "Largest importance weight under iw."})
    expert_weighting: str = field(
        default="one",
        metadata={
            "help": "Weight of tokens without a behaviour log-prob under iw: one (as SFT) or dft.",
            "choices": EXPERT_WEIGHTINGS,
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.objective not in OBJECTIVES:
            raise ValueError(f"You passed objective={self.objective!r}; use one of {list(OBJECTIVES)}.")
        if self.expert_weighting not in EXPERT_WEIGHTINGS:
            raise ValueError(
                f"You passed expert_weighting={self.expert_weighting!r}; use one of {list(EXPERT_WEIGHTINGS)}."
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
