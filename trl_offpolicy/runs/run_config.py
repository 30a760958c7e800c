"""
The settings that everything has in common which draws completions into a run directory: rewriting and evaluation.
"""

import os
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from ..data import control_tokens, prompts
from ..data.tokenization import template_kwargs
from ..sampling.sampler import SamplingParams
from .shards import Shard


# An environment variable, set for the steps of a loop or an experiment: these know themselves which command follows.
STEP = "TRL_OFFPOLICY_STEP"


def default_of(setting: Field) -> Any:
    """The value of a dataclass's field that is not given."""
    return setting.default if setting.default_factory is MISSING else setting.default_factory()


@dataclass
class RunConfig:
    """
    How completions are drawn, and where to; the names are TRL's (`GRPOConfig`). [`RewriteConfig`] and
    [`EvaluationConfig`] document them.
    """

    output_dir: str = field(metadata={"help": "Run directory. An interrupted run resumes from it."})
    num_generations: int = field(default=8, metadata={"help": "Completions of each problem."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; importance weights need 1."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus; importance weights need 1."})
    top_k: int = field(
        default=0, metadata={"help": "Highest-probability tokens kept, 0 for all; importance weights need 0."}
    )
    max_completion_length: int = field(default=2048, metadata={"help": "Tokens of one completion."})
    min_p: float = field(
        kw_only=True,
        default=0.0,
        metadata={"help": "Least share of the likeliest token's probability; importance weights need 0."},
    )
    repetition_penalty: float = field(
        kw_only=True,
        default=1.0,
        metadata={"help": "Penalty on tokens that were there before; importance weights need 1."},
    )
    stop: list[str] | None = field(
        kw_only=True, default=None, metadata={"help": "Texts at which a completion ends, and which are cut off it."}
    )
    max_repeats: int = field(
        kw_only=True,
        default=0,
        metadata={
            "help": "Cut a completion that ends with the same block of tokens so many times in a row; 0: let it run to the limit."
        },
    )
    seed: int = field(
        kw_only=True, default=42, metadata={"help": "Seed of the run; each completion derives its own from it."}
    )
    solve_prompt: str = field(
        kw_only=True,
        default=prompts.SOLVE_PROMPT,
        metadata={"help": "What a row without a prompt of its own is asked."},
    )
    system_prompt: str | None = field(
        kw_only=True, default=None, metadata={"help": "System turn before solve_prompt."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        kw_only=True,
        default=None,
        metadata={"help": """Variables of the chat template as JSON, e.g. '{"enable_thinking": false}'."""},
    )
    control_tokens: str = field(
        kw_only=True, default="warn", metadata={"help": control_tokens.HELP, "choices": control_tokens.MODES}
    )
    shard: str = field(
        kw_only=True,
        default="0/1",
        metadata={"help": "i/n: only the i-th of n blocks of rows, i from 0 to n - 1; the last to finish joins them."},
    )
    report_to: str = field(
        kw_only=True, default="none", metadata={"help": "Where it is logged as well.", "choices": ("none", "wandb")}
    )
    dry_run: bool = field(
        kw_only=True, default=False, metadata={"help": "Print what would be asked, and sample nothing."}
    )
    overwrite: bool = field(
        kw_only=True,
        default=False,
        metadata={"help": "Delete the journal of another configuration in output_dir, and what was made from it."},
    )

    def __post_init__(self):
        self.output_dir = self.output_dir and os.path.expanduser(self.output_dir)
        # 1 and 1.0 are the same run.
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            setattr(self, name, float(getattr(self, name)))
        self.chat_template_kwargs = template_kwargs(self.chat_template_kwargs)
        self.check_at_least(num_generations=1, max_completion_length=1, top_k=0, temperature=0)
        self.sampling_params()
        self.stop = self.stop or None
        if self.temperature > 2:  # what vLLM and the servers draw with at most
            raise ValueError(f"You passed temperature={self.temperature}; it must be at most 2.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"You passed top_p={self.top_p}; it must be above 0 and at most 1.")
        if self.report_to not in ("none", "wandb"):
            raise ValueError(f"You passed report_to={self.report_to!r}; use 'none' or 'wandb'.")
        control_tokens.check_mode(self.control_tokens)
        Shard.parse(self.shard)
        prompts.check(self.solve_prompt, "solve_prompt", "problem")

    def check_at_least(self, **lowest: float) -> None:
        """Raises `ValueError` for a field below its lowest value."""
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"You passed {name}={getattr(self, name)}; it must be at least {low}.")

    def sampling_params(self) -> SamplingParams:
        """
        Those of its fields that say how one completion is drawn; raises `ValueError` for values that no engine can
        draw with.
        """
        given = {f.name: getattr(self, f.name) for f in fields(SamplingParams)}
        return SamplingParams(**{**given, "stop": self.stop or ()})
