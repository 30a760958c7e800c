"""Configuration of `DataRewriter`."""

import os
from dataclasses import dataclass, field, fields

from . import control_tokens, prompts
from .shards import Shard


STAGES = ("self", "guided")
SELECTIONS = ("first", "random", "max_log_prob")


@dataclass
class RewriteConfig:
    r"""
    How a dataset is rewritten. Generation parameters have TRL's names (`GRPOConfig`).

    Args:
        output_dir (`str`): Run directory: journal, metrics and the rewritten dataset. An interrupted run resumes from it.
        num_generations (`int`, *optional*, defaults to `8`): At most this many attempts for each problem and stage (K; the paper's
            is not published, re-implementations use 4 to 10). A run goes on with another number: what it has drawn stays.
        temperature (`float`, *optional*, defaults to `1.0`): Sampling temperature; importance weights need 1.
        top_p (`float`, *optional*, defaults to `1.0`): Nucleus; importance weights need 1.
        top_k (`int`, *optional*, defaults to `0`): Highest-probability tokens kept, 0 for all; importance weights need 0.
        max_completion_length (`int`, *optional*, defaults to `2048`): Tokens of one attempt. One that is cut here is never kept.
        stages (`list[str]`, *optional*, defaults to `["self", "guided"]`): Stages in order; the demonstration is always the last resort.
        selection (`str`, *optional*, defaults to `"first"`): `first` stops at the first correct attempt; `random` draws all K and keeps
            a random correct one: the same distribution of rows at a higher price, with the pass rate `num_correct / num_sampled`.
            `max_log_prob` draws all K and keeps the correct one with the highest length-normalised log-probability, `sum_t log
            μ(y_t | prompt, y_<t) / len(y)` over the sampled tokens including the end of turn, at temperature 1 and under the prompt
            that was really used (in the guided stage, with the reference). The criterion is GRAPE's (arXiv 2502.04194), the
            candidates are the model's own; kept rows are then likelier than a sample of the model.
        max_concurrent_attempts (`int`, *optional*, defaults to `4`): With `first`, at most this many attempts of one problem at a time, and
            more than one only where other problems leave the engine free slots. Rows do not depend on it; 1 never draws a token on
            speculation.
        keep_rejected (`bool`, *optional*, defaults to `True`): Whether the journal keeps text, token ids and log-probs of attempts that are
            not correct. Without them a line is some 150 bytes, and what the model got wrong cannot be looked at.
        solve_prompt (`str`, *optional*): What a row without a prompt of its own (`problem`, `question`) is asked.
        guided_prompt (`str`, *optional*): The digest-and-retell prompt, with `{problem}` and `{solution}`.
        control_tokens (`str`, *optional*, defaults to `"warn"`): What is done with problems and references that hold the model's control tokens as
            text ([`~control_tokens.ControlTokens`]): `warn`, `refuse`, `escape` or `allow`.
        answer_column (`str`, *optional*, defaults to `"answer"`): Gold final answers; where it has none, the demonstration's last box
            or GSM8K's `####` is taken.
        seed (`int`, *optional*, defaults to `42`): Seed of the run; each attempt has a seed of its own derived from it.
        shard (`str`, *optional*, defaults to `"0/1"`): `i/n` does the i-th of n blocks of rows (i from 0 to n - 1), with files of its own in
            `output_dir`; `output_dir/dataset` appears with the last of them.
        report_to (`str`, *optional*, defaults to `"none"`): `wandb` logs the lines of `metrics.jsonl` there as well, and the attempts as a
            table. The environment's `WANDB_RUN_GROUP`, set for rewrite, training and evaluation alike, ties them together.
        wandb_log_artifacts (`bool`, *optional*, defaults to `False`): Log the rewritten dataset as an artifact too.
        accept_failed (`bool`, *optional*, defaults to `False`): Push a run, and let the command end with 0, though the engine failed at some
            attempts and their rows may have fallen back for it. Else the same command tries them again.
        push_to_hub (`bool`, *optional*, defaults to `False`): The command pushes rows, attempts and card when the run is done (in Python, call
            `push_to_hub`). Whether it may is found out before anything is sampled.
        hub_dataset_id (`str`, *optional*): Dataset repository, `owner/name`.
        hub_private_repo (`bool`, *optional*, defaults to `False`): Make a new repository private (`--private`); otherwise it is what the
            owner's new repositories are.
        hub_token (`str`, *optional*): By default `HF_TOKEN`, or that of `hf auth login`; a command line can be read by others.
        hub_revision (`str`, *optional*): Branch; by default `main`.
        push_attempts (`bool`, *optional*, defaults to `True`): Push every attempt too, as config `attempts`.
        push_every (`int`, *optional*, defaults to `0`): Push the attempts so far every so many rows of a long run, 0 for never.
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
            "help": "first: stop at the first correct attempt. random: draw all, keep a random correct one. max_log_prob: draw all, keep "
            "the correct one with the highest mean token log-prob.",
            "choices": SELECTIONS,
        },
    )
    max_concurrent_attempts: int = field(
        default=4,
        metadata={
            "help": "Attempts of one problem at a time where slots are free; 1: no speculation. Rows do not depend on it."
        },
    )
    keep_rejected: bool = field(
        default=True,
        metadata={"help": "Keep texts, token ids and log-probs of rejected attempts in the journal."},
    )
    solve_prompt: str = field(
        default=prompts.SOLVE_PROMPT, metadata={"help": "What a row without a prompt of its own is asked."}
    )
    guided_prompt: str = field(
        default=prompts.GUIDED_PROMPT, metadata={"help": "Digest-and-retell prompt with {problem} and {solution}."}
    )
    control_tokens: str = field(
        default="warn", metadata={"help": control_tokens.HELP, "choices": control_tokens.MODES}
    )
    answer_column: str = field(default="answer", metadata={"help": "Column with gold final answers."})
    seed: int = field(default=42, metadata={"help": "Seed of the run; each attempt derives its own from it."})
    shard: str = field(
        default="0/1",
        metadata={"help": "i/n: only the i-th of n blocks of rows, i from 0 to n - 1; the union is the merge."},
    )
    report_to: str = field(
        default="none", metadata={"help": "Where metrics.jsonl is logged as well.", "choices": ("none", "wandb")}
    )
    wandb_log_artifacts: bool = field(
        default=False, metadata={"help": "Log the rewritten dataset to W&B as an artifact."}
    )
    accept_failed: bool = field(
        default=False,
        metadata={"help": "Be done, and push, though the engine failed at some attempts; else they are tried again."},
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Push rows, attempts and card when the run is done."})
    hub_dataset_id: str | None = field(default=None, metadata={"help": "Dataset repository to push to: owner/name."})
    hub_private_repo: bool = field(
        default=False, metadata={"help": "Whether a new repository is private.", "aliases": ["--private"]}
    )
    hub_token: str | None = field(
        default=None, repr=False, metadata={"help": "Hub token; better in HF_TOKEN, where no process list shows it."}
    )
    hub_revision: str | None = field(default=None, metadata={"help": "Branch to push to, made if there is none."})
    push_attempts: bool = field(
        default=True, metadata={"help": "Push every attempt too, rejected ones included, as config `attempts`."}
    )
    push_every: int = field(
        default=0, metadata={"help": "Push the attempts so far every so many rows of a long run; 0: only at the end."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print the first prompt of each stage and the estimate, sample nothing."}
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Delete the journal of another configuration in output_dir, and the rows made from it."},
    )

    def __post_init__(self):
        self.output_dir = os.path.expanduser(self.output_dir)
        # 1 and 1.0 are the same run.
        self.temperature, self.top_p = float(self.temperature), float(self.top_p)
        unknown = [s for s in self.stages if s not in STAGES]
        if unknown or len(set(self.stages)) != len(self.stages):
            raise ValueError(
                f"You passed stages={self.stages}; use each of {list(STAGES)} at most once (the demonstration is always the last resort)."
            )
        if self.selection not in SELECTIONS:
            raise ValueError(f"You passed selection={self.selection!r}; use one of {list(SELECTIONS)}.")
        for name, low in (
            ("num_generations", 1),
            ("max_concurrent_attempts", 1),
            ("max_completion_length", 1),
            ("top_k", 0),
            ("temperature", 0),
            ("push_every", 0),
        ):
            if getattr(self, name) < low:
                raise ValueError(f"You passed {name}={getattr(self, name)}; it must be at least {low}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"You passed top_p={self.top_p}; it must be above 0 and at most 1.")
        if self.num_generations > 65535:
            raise ValueError(f"You passed num_generations={self.num_generations}; it must be at most 65535.")
        if self.report_to not in ("none", "wandb"):
            raise ValueError(f"You passed report_to={self.report_to!r}; use 'none' or 'wandb'.")
        if self.push_to_hub and self.hub_dataset_id is None:
            raise ValueError("You passed push_to_hub=True without a repository: write hub_dataset_id='me/name'.")
        if self.push_every and not (self.push_to_hub and self.push_attempts):
            raise ValueError(
                f"You passed push_every={self.push_every}, which pushes the attempts of a run under way, with push_to_hub={self.push_to_hub} "
                f"and push_attempts={self.push_attempts}; both must be True."
            )
        control_tokens.check_mode(self.control_tokens)
        Shard.parse(self.shard)
        prompts.check(self.solve_prompt, "solve_prompt", "problem")
        prompts.check(self.guided_prompt, "guided_prompt", "problem", "solution")

    def identity(self) -> dict:
        """The fields on which an attempt depends; the rest may change between a run and its resume."""
        free = {
            "output_dir", "dry_run", "overwrite", "shard", "report_to", "max_concurrent_attempts", "keep_rejected",
            "accept_failed",
        }  # fmt: skip
        if self.control_tokens != "escape":  # else the prompts are others
            free.add("control_tokens")
        elsewhere = ("push_", "hub_", "wandb_")  # a token must not get into the journal
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in free and not f.name.startswith(elsewhere)
        }
