"""Configuration of `DataRewriter`."""

from dataclasses import dataclass, field, fields

from . import prompts


STAGES = ("self", "guided")
SELECTIONS = ("first", "random")


@dataclass
class RewriteConfig:
    r"""
    How a dataset is rewritten. Generation parameters have TRL's names (`GRPOConfig`).

    Args:
        output_dir (`str`): Run directory: journal, metrics and the rewritten dataset. An interrupted run resumes from it.
        num_generations (`int`, *optional*, defaults to `8`): At most this many attempts for each problem and stage (K; the paper's
            is not published, re-implementations use 4 to 10).
        temperature (`float`, *optional*, defaults to `1.0`): Sampling temperature; importance weights need 1.
        top_p (`float`, *optional*, defaults to `1.0`): Nucleus; importance weights need 1.
        top_k (`int`, *optional*, defaults to `0`): Highest-probability tokens kept, 0 for all; importance weights need 0.
        max_completion_length (`int`, *optional*, defaults to `2048`): Tokens of one attempt. One that is cut here is never kept.
        stages (`list[str]`, *optional*, defaults to `["self", "guided"]`): Stages in order; the demonstration is always the last resort.
        selection (`str`, *optional*, defaults to `"first"`): `first` stops at the first correct attempt; `random` draws all K and keeps
            a random correct one: the same distribution of rows at a higher price, with the pass rate in `num_correct`.
        solve_prompt (`str`, *optional*): What a row without a prompt of its own (`problem`, `question`) is asked.
        guided_prompt (`str`, *optional*): The digest-and-retell prompt, with `{problem}` and `{solution}`.
        answer_column (`str`, *optional*, defaults to `"answer"`): Gold final answers; where it has none, the demonstration's last box
            or GSM8K's `####` is taken.
        seed (`int`, *optional*, defaults to `42`): Seed of the run; each attempt has a seed of its own derived from it.
        dry_run (`bool`, *optional*, defaults to `False`): Print the first prompt of each stage and the estimate, sample nothing.
        overwrite (`bool`, *optional*, defaults to `False`): Delete the journal of another configuration in `output_dir`; one of this
            configuration is resumed all the same.
    """

    output_dir: str = field(
        metadata={
            "help": "Run directory: journal, metrics and the rewritten dataset. An interrupted run resumes from it."
        }
    )
    num_generations: int = field(
        default=8, metadata={"help": "At most this many attempts for each problem and stage."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; importance weights need 1."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus; importance weights need 1."})
    top_k: int = field(
        default=0, metadata={"help": "Highest-probability tokens kept, 0 for all; importance weights need 0."}
    )
    max_completion_length: int = field(
        default=2048, metadata={"help": "Tokens of one attempt. One that is cut here is never kept."}
    )
    stages: list[str] = field(
        default_factory=lambda: list(STAGES), metadata={"help": "Stages in order: self, guided, or one of them."}
    )
    selection: str = field(
        default="first",
        metadata={
            "help": "first: stop at the first correct attempt. random: draw all, keep a random correct one.",
            "choices": SELECTIONS,
        },
    )
    solve_prompt: str = field(
        default=prompts.SOLVE_PROMPT, metadata={"help": "What a row without a prompt of its own is asked."}
    )
    guided_prompt: str = field(
        default=prompts.GUIDED_PROMPT, metadata={"help": "Digest-and-retell prompt with {problem} and {solution}."}
    )
    answer_column: str = field(default="answer", metadata={"help": "Column with gold final answers."})
    seed: int = field(default=42, metadata={"help": "Seed of the run; each attempt derives its own from it."})
    dry_run: bool = field(
        default=False, metadata={"help": "Print the first prompt of each stage and the estimate, sample nothing."}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Delete the journal of another configuration in output_dir."}
    )

    def __post_init__(self):
        unknown = [s for s in self.stages if s not in STAGES]
        if unknown or len(set(self.stages)) != len(self.stages):
            raise ValueError(
                f"You passed stages={self.stages}; use each of {list(STAGES)} at most once (the demonstration is always the last resort)."
            )
        if self.selection not in SELECTIONS:
            raise ValueError(f"You passed selection={self.selection!r}; use one of {list(SELECTIONS)}.")
        for name, low in (("num_generations", 1), ("max_completion_length", 1), ("top_k", 0), ("temperature", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"You passed {name}={getattr(self, name)}; it must be at least {low}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"You passed top_p={self.top_p}; it must be above 0 and at most 1.")
        prompts.check(self.solve_prompt, "solve_prompt", "problem")
        prompts.check(self.guided_prompt, "guided_prompt", "problem", "solution")

    def identity(self) -> dict:
        """The fields on which an attempt depends; the rest may change between a run and its resume."""
        free = {"output_dir", "dry_run", "overwrite"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in free}
