"""The `trl-offpolicy` command. Training stays `accelerate launch examples/train.py`.

Every flag is also a key of `--config file.yaml`. The first line printed is the run directory, the last one the next
command to run. Exit codes: 0 done, 2 bad input, 3 stopped early and resumable.
"""

import sys
from dataclasses import dataclass, field


USAGE = """\
usage: trl-offpolicy COMMAND [options]

commands:
  rewrite    rewrite a dataset of demonstrations into what the model could have written itself

  trl-offpolicy rewrite --model_name_or_path Qwen/Qwen2.5-Math-1.5B --dataset_name openai/gsm8k --dataset_config main \\
      --output_dir runs/gsm8k --num_generations 8 --dry_run          # first prompts and the estimate, nothing is sampled
  trl-offpolicy rewrite --config rewrite.yaml                        # the same keys in a file; run again to resume
  trl-offpolicy COMMAND --help                                       # every option
"""

REWRITE_EXAMPLES = """\
examples:
  trl-offpolicy rewrite --model_name_or_path M --dataset_name demos.jsonl --output_dir runs/demos
  trl-offpolicy rewrite --model_name_or_path M --dataset_name demos.parquet --output_dir runs/ablation --stages self
  trl-offpolicy rewrite --config rewrite.yaml --max_rows 100
  trl-offpolicy rewrite --config rewrite.yaml --shard 0/4     # on the first of four machines, 1/4 on the second, …

An interrupted run resumes: run the same command again.
"""


@dataclass
class RewriteArguments:
    """What is rewritten by what."""

    model_name_or_path: str = field(metadata={"help": "Model that will be trained: Hub id or local directory."})
    dataset_name: str = field(
        metadata={"help": "Demonstrations: Hub id, directory, or JSONL, JSON, CSV or Parquet file."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    dtype: str = field(default="auto", metadata={"help": "Weights' dtype: auto, bfloat16, float16 or float32."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code from the model's repository."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split."})
    max_rows: int | None = field(
        default=None, metadata={"help": "Only the first rows; a later run may take more of them."}
    )
    sampler: str = field(
        default="transformers", metadata={"help": "Engine that samples.", "choices": ["transformers"]}
    )
    batch_size: int = field(default=64, metadata={"help": "Completions drawn at a time."})


def rewrite(argv: list[str]) -> int:
    import argparse

    from trl import TrlParser

    from .rewrite_config import RewriteConfig
    from .rewriter import DataRewriter
    from .rows import load_rows

    parser = TrlParser(
        (RewriteArguments, RewriteConfig),
        prog="trl-offpolicy rewrite",
        description="Rewrite demonstrations: the model's own correct solution, else its retelling of the reference, else the demonstration.",
        epilog=REWRITE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a misspelt flag must not pass for another one
    )
    arguments, config = parser.parse_args_and_config(argv)
    print(config.output_dir, flush=True)
    dataset = load_rows(arguments.dataset_name, arguments.dataset_config, arguments.dataset_split)
    if arguments.max_rows is not None:
        if arguments.max_rows < 1:
            raise ValueError(f"You passed max_rows={arguments.max_rows}; it must be at least 1.")
        dataset = dataset.select(range(min(arguments.max_rows, len(dataset))))
    sampler = None if config.dry_run else _sampler(arguments)
    rewriter = DataRewriter(arguments.model_name_or_path, config, sampler=sampler)
    try:
        rewritten = rewriter.rewrite(dataset)
    except KeyboardInterrupt:
        journal = rewriter.shard.file(rewriter.output_dir, "journal.jsonl")
        print(f"\nstopped; every finished attempt is in {journal}. Run the same command again to resume.")
        return 3
    if rewritten is None:
        print("nothing was sampled; drop --dry_run to start")
        return 0
    _print_summary(rewriter.metrics)
    if missing := rewriter.missing_shards:
        shown = ", ".join(map(str, missing[:10])) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        print(
            f"shard {rewriter.shard} is done; still missing: {shown}. {config.output_dir}/dataset appears with the last of them."
        )
        print(_command_for(argv, missing[0]))
        return 0
    print(
        f"accelerate launch examples/train.py --model_name_or_path {arguments.model_name_or_path} "
        f"--dataset_name {config.output_dir}/dataset --objective iw --output_dir {config.output_dir}-sft"
    )
    return 0


def _sampler(arguments: RewriteArguments):
    from .sampling.transformers_sampler import TransformersSampler

    init = {
        "dtype": arguments.dtype,
        "revision": arguments.model_revision,
        "trust_remote_code": arguments.trust_remote_code,
    }
    try:
        return TransformersSampler(
            arguments.model_name_or_path, batch_size=arguments.batch_size, model_init_kwargs=init
        )
    except OSError as error:  # how transformers says that there is no such model, or none that may be read
        raise ValueError(
            f"You passed model_name_or_path={arguments.model_name_or_path!r}, which cannot be loaded: {error}"
        ) from error


def _command_for(argv: list[str], shard) -> str:
    """The same command for another shard."""
    import re
    import shlex

    same = re.sub(r"--shard(=| )\S+ ?", "", shlex.join(argv)).strip()
    return f"trl-offpolicy rewrite {same} --shard {shard}"


def _print_summary(metrics: dict) -> None:
    counts = dict(metrics["yield"])
    total = counts.pop("total")
    print(f"{total:,} rows: " + ", ".join(f"{n:,} {source} ({n / max(1, total):.1%})" for source, n in counts.items()))
    sampling, unused = metrics["sampling"], metrics["speculation"]
    print(
        f"{sampling['sampled']:,} attempts, {sampling['tokens']:,} tokens; fixed K would have drawn {sampling['fixed_k_equivalent']:,}"
        + (
            f"; {unused['unused']:,} more on speculation, {unused['unused_tokens']:,} tokens"
            if unused["unused"]
            else ""
        )
    )
    if metrics["gold_unparsable"]:
        print(
            f"{metrics['gold_unparsable']:,} rows have no gold answer that can be compared with: kept as expert, not sampled"
        )
    trouble = {name: metrics["verdicts"][name] for name in ("timeout", "error") if metrics["verdicts"][name]}
    if trouble:
        print(
            "attempts that could not be judged: "
            + ", ".join(f"{n:,} {name}" for name, n in trouble.items())
            + " (reasons in the journal)"
        )


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    commands = {"rewrite": rewrite}
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from . import __version__

        print(f"trl-offpolicy {__version__}")
        return 0
    if argv[0] not in commands:
        print(f"trl-offpolicy: there is no command {argv[0]!r}; use one of {', '.join(commands)}.", file=sys.stderr)
        return 2
    try:
        return commands[argv[0]](argv[1:])
    except (ValueError, FileNotFoundError) as error:
        print(f"trl-offpolicy {argv[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped before anything was sampled.", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
