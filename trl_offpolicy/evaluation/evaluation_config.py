"""Configuration of `evaluate`."""

from dataclasses import dataclass, field

from ..runs.run_config import RunConfig


@dataclass
class EvaluationConfig(RunConfig):
    """
    How a model is evaluated. Generation parameters have TRL's names (`GRPOConfig`).

    Args:
        output_dir (`str`, *optional*): Run directory: journal, `samples.parquet`, `results.json`, `results.md`. An
            interrupted run resumes from it.
        num_generations (`int`, *optional*, defaults to `16`): k; the papers' avg@16.
        temperature, top_p, top_k, min_p, repetition_penalty, stop, max_repeats, seed (*optional*): As in [`RewriteConfig`].
        chat_template_kwargs, control_tokens (*optional*): As in [`RewriteConfig`].
        max_completion_length (`int`, *optional*, defaults to `4096`): Tokens of one sample.
        greedy (`bool`, *optional*, defaults to `False`): Also draw one completion of each problem at temperature 0.
        solve_prompt (`str`, *optional*): What a problem without a prompt of its own is asked.
        system_prompt (`str`, *optional*): A system turn before problems that have no prompt of their own.
        shard (`str`, *optional*, defaults to `"0/1"`): `i/n`, the i-th of n blocks of problems; `output_dir` has the
            results with the last.
        report_to (`str`, *optional*, defaults to `"none"`): `"wandb"` logs the numbers of `results.json`; needs
            `output_dir`.
        baseline (`str`, *optional*): Run directory of another model: paired comparison with it on the same problems.
        train_tokenizer (`str` or tokenizer, *optional*): With what it was trained; another chat template is refused
            ([`~evaluation.benchmarks.check_training_format`]).
        dry_run (`bool`, *optional*, defaults to `False`): For the command line, which then prints the first prompts.
        overwrite (`bool`, *optional*, defaults to `False`): Delete the journal of other settings in `output_dir`.

    Raises:
        ValueError: A value out of its range, or settings that cannot go together.
    """

    output_dir: str | None = field(
        default=None,
        metadata={"help": "Run directory: journal, samples and results. An interrupted run resumes from it."},
    )
    num_generations: int = field(default=16, metadata={"help": "Samples of each problem: k."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; 0 with one sample is greedy."})
    max_completion_length: int = field(default=4096, metadata={"help": "Tokens of one sample."})
    greedy: bool = field(
        kw_only=True, default=False, metadata={"help": "One more completion of each problem, at temperature 0."}
    )
    baseline: str | None = field(
        kw_only=True, default=None, metadata={"help": "Run directory of another model to compare with."}
    )
    train_tokenizer: str | None = field(
        kw_only=True,
        default=None,
        metadata={"help": "Tokenizer in training; another chat template is refused."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.temperature == 0 and self.num_generations > 1:
            raise ValueError(
                f"You passed temperature=0 with num_generations={self.num_generations}: all would be the same. Pass num_generations=1."
            )
        if self.shard != "0/1" and self.output_dir is None:
            raise ValueError(
                f"You passed shard={self.shard!r} without output_dir, where the shards would find each other."
            )
