"""Configuration of the rounds."""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class LoopConfig:
    """
    How many rounds, how each is trained and measured, and when they end.

    Args:
        rounds (`int`, *optional*, defaults to `3`): Rounds of rewrite and train. A later run may ask for more.
        train_from (`str`, *optional*, defaults to `"base"`): `base` trains the initial policy on each round's rows (as
            STaR and ReST-EM do), `last` the model of the round before (as Iterative-SFT and RAFT do).
        refresh (`str`, *optional*, defaults to `"all"`): `all` rewrites every row with the newest policy; `unsolved`
            only those that were guided or expert, and carries the self rows over: their `model_revision` still says
            who drew them.
        train_command (`str`, *optional*): What trains, such as `accelerate launch examples/train.py`; by default
            `trl-offpolicy sft` in one process. It is given `--model_name_or_path`, `--dataset_name`, `--output_dir`
            and, to go on, `--resume_from_checkpoint`; and the loop's `--model_revision`, `--trust_remote_code` and
            `--chat_template_path`, where it has them and `train_config` has no other.
        train_config (`list[str]`): YAML file with its other options: one for every round, or one for each.
        benchmarks (`list[str]`, *optional*): Evaluate each round's model on these, as `trl-offpolicy eval` takes them.
        eval_config (`str`, *optional*): YAML file with further options of `trl-offpolicy eval`.
        max_kl (`float`, *optional*): Stop when KL(π_0‖π) on the task's prompts is above this, in nats per token
            ([`~evaluation.forgetting.measure_forgetting`]).
        min_entropy (`float`, *optional*, defaults to `0.3`): Stop when the mean -log π of the drawn tokens is below
            this share of round 0's.
        max_cut (`float`, *optional*, defaults to `0.5`): Stop when a larger share of a round's attempts is cut at the
            limit, and it was less in round 0.
        max_mentions (`float`, *optional*, defaults to `0.5`): The same for the correct guided attempts of a round that
            mention the reference: those that were rejected for it and, with `reject_mentions=False`, rows that do.

    Raises:
        ValueError: A value out of its range.
    """

    rounds: int = field(default=3, metadata={"help": "Rounds of rewrite and train; a later run may ask for more."})
    train_from: str = field(
        default="base",
        metadata={
            "help": "base: train the initial policy on each round's rows. last: train the model of the round before.",
            "choices": ("base", "last"),
        },
    )
    refresh: str = field(
        default="all",
        metadata={
            "help": "all: rewrite every row with the newest policy. unsolved: only guided and expert rows; self rows are carried over.",
            "choices": ("all", "unsolved"),
        },
    )
    train_command: str | None = field(
        default=None,
        metadata={
            "help": "What trains, such as 'accelerate launch examples/train.py'; by default `trl-offpolicy sft`."
        },
    )
    train_config: list[str] = field(
        default_factory=list, metadata={"help": "YAML with its options: one file for every round, or one for each."}
    )
    benchmarks: list[str] | None = field(
        default=None, metadata={"help": "Evaluate each round's model on these, as `trl-offpolicy eval` takes them."}
    )
    eval_config: str | None = field(
        default=None, metadata={"help": "YAML with further options of `trl-offpolicy eval`."}
    )
    max_kl: float | None = field(
        default=None, metadata={"help": "Stop above this KL(π_0‖π) on the task's prompts, in nats per token."}
    )
    min_entropy: float = field(
        default=0.3, metadata={"help": "Stop when the draws' -log π per token is below this share of round 0's."}
    )
    max_cut: float = field(
        default=0.5, metadata={"help": "Stop when a larger share of the attempts is cut, which it was not in round 0."}
    )
    max_mentions: float = field(
        default=0.5,
        metadata={"help": "The same for the share of the correct guided attempts that mention the reference."},
    )

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"You passed rounds={self.rounds}; it must be at least 1.")
        for name, values in (("train_from", ("base", "last")), ("refresh", ("all", "unsolved"))):
            if getattr(self, name) not in values:
                raise ValueError(f"You passed {name}={getattr(self, name)!r}; use one of {list(values)}.")
        if len(self.train_config) not in (0, 1) and len(self.train_config) < self.rounds:
            raise ValueError(
                f"You passed {len(self.train_config)} files as train_config for {self.rounds} rounds; pass one, or one for each round."
            )
        for name in ("min_entropy", "max_cut", "max_mentions"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"You passed {name}={getattr(self, name)}; it is a share, from 0 to 1.")
        if self.max_kl is not None and not self.max_kl > 0:
            raise ValueError(f"You passed max_kl={self.max_kl}; it must be above 0.")
