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
  push       push a finished rewrite to the Hub: rows, attempts and card

  trl-offpolicy rewrite --model_name_or_path Qwen/Qwen2.5-Math-1.5B --dataset_name openai/gsm8k --dataset_config main \\
      --output_dir runs/gsm8k --num_generations 8 --dry_run          # first prompts and the estimate, nothing is sampled
  trl-offpolicy rewrite --config rewrite.yaml                        # the same keys in a file; run again to resume
  trl-offpolicy push runs/gsm8k --hub_dataset_id me/gsm8k-on-policy   # or --push_to_hub --hub_dataset_id … when rewriting
  trl-offpolicy COMMAND --help                                       # every option
"""

REWRITE_EXAMPLES = """\
examples:
  trl-offpolicy rewrite --model_name_or_path M --dataset_name demos.jsonl --output_dir runs/demos
  trl-offpolicy rewrite --model_name_or_path M --dataset_name demos.parquet --output_dir runs/ablation --stages self
  trl-offpolicy rewrite --config rewrite.yaml --max_rows 100
  trl-offpolicy rewrite --config rewrite.yaml --push_to_hub --hub_dataset_id me/demos-on-policy --private --push_every 1000
  trl-offpolicy rewrite --config rewrite.yaml --shard 0/4     # on the first of four machines, 1/4 on the second, …

An interrupted run resumes: run the same command again.
"""

PUSH_EXAMPLES = """\
examples:
  trl-offpolicy push runs/demos --hub_dataset_id me/demos-on-policy --private
  trl-offpolicy push runs/demos --hub_dataset_id me/demos-on-policy --push_attempts False --hub_revision v2

The token is HF_TOKEN's, or that of `hf auth login`. A push is one commit: one that failed has changed nothing, run it again.
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
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."})
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
    dataset = load_rows(
        arguments.dataset_name, arguments.dataset_config, arguments.dataset_split, arguments.dataset_revision
    )
    if arguments.max_rows is not None:
        if arguments.max_rows < 1:
            raise ValueError(f"You passed max_rows={arguments.max_rows}; it must be at least 1.")
        dataset = dataset.select(range(min(arguments.max_rows, len(dataset))))
    sampler = None if config.dry_run else _sampler(arguments)
    rewriter = DataRewriter(arguments.model_name_or_path, config, sampler=sampler)
    try:
        # Where a model is served is nobody else's address.
        given = {k: v for k, v in vars(arguments).items() if v is not None and k != "base_url"}
        rewritten = rewriter.rewrite(dataset, given)
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
    trained_on = f"{config.output_dir}/dataset"
    if config.push_to_hub:
        if not _pushed(rewriter.push_to_hub, config.output_dir, config.hub_dataset_id):
            return 3
        trained_on = config.hub_dataset_id
    print(
        _wandb_environment(config)
        + f"accelerate launch examples/train.py --model_name_or_path {arguments.model_name_or_path} "
        f"--dataset_name {trained_on} --objective iw --output_dir {config.output_dir}-sft"
        + " --report_to wandb"
        * (config.report_to == "wandb")
    )
    return 0


@dataclass
class PushArguments:
    """Which run goes where."""

    run_dir: str = field(
        metadata={"help": "Output directory of a finished rewrite; also the first word after `push`."}
    )
    hub_dataset_id: str = field(metadata={"help": "Dataset repository: owner/name."})
    hub_private_repo: bool = field(
        default=False, metadata={"help": "Whether a new repository is private.", "aliases": ["--private"]}
    )
    hub_token: str | None = field(
        default=None, repr=False, metadata={"help": "Hub token; better in HF_TOKEN, where no process list shows it."}
    )
    hub_revision: str | None = field(default=None, metadata={"help": "Branch to push to, made if there is none."})
    push_attempts: bool = field(default=True, metadata={"help": "Push every attempt too, as config `attempts`."})


def push(argv: list[str]) -> int:
    import argparse

    from trl import TrlParser

    from .hub import push_run

    parser = TrlParser(
        PushArguments,
        prog="trl-offpolicy push",
        description="Push a finished rewrite to the Hub: its rows, its attempts and a card made from its journal.",
        epilog=PUSH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    named = ["--run_dir"] if argv and not argv[0].startswith("-") else []
    (given,) = parser.parse_args_and_config([*named, *argv])
    print(given.run_dir, flush=True)

    def commit():
        return push_run(
            given.run_dir,
            given.hub_dataset_id,
            given.hub_private_repo or None,
            given.hub_token,
            given.hub_revision,
            given.push_attempts,
        )

    if not _pushed(commit, given.run_dir, given.hub_dataset_id):
        return 3
    print(
        f"""python -c "from datasets import load_dataset; print(load_dataset('{given.hub_dataset_id}', split='train'))\""""
    )
    return 0


def _pushed(push, run_dir: str, repo_id: str) -> bool:
    """Whether a push went through; if not, says why and how to go on."""
    try:
        print(f"pushed: {push().commit_url}")
    except ValueError:
        raise
    except (Exception, KeyboardInterrupt) as error:  # whatever a network can do to it: the rows are on the disk
        print(f"the push failed, and nothing has changed on the Hub: {type(error).__name__}: {error}", file=sys.stderr)
        print(f"trl-offpolicy push {run_dir} --hub_dataset_id {repo_id}")
        return False
    return True


def _wandb_environment(config) -> str:
    """What ties the training to this run on W&B."""
    if config.report_to != "wandb":
        return ""
    from pathlib import Path

    from .run_log import wandb_group

    log_model = "WANDB_LOG_MODEL=end " if config.wandb_log_artifacts else ""
    return f"WANDB_RUN_GROUP={wandb_group(Path(config.output_dir))} {log_model}"


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


def _hide_token(argv: list[str]) -> list[str]:
    """The arguments without `--hub_token X`, which moves to the environment: W&B logs a command line, and we print the next one."""
    import os

    parts = iter(argv)
    kept = []
    for part in parts:
        name, equals, value = part.partition("=")
        if name in ("--hub_token", "--hub-token"):
            os.environ["HF_TOKEN"] = value if equals else next(parts, "")
        else:
            kept.append(part)
    return kept


def main(argv: list[str] | None = None) -> int:
    if argv is None:
        sys.argv[1:] = _hide_token(sys.argv[1:])
    argv = sys.argv[1:] if argv is None else _hide_token(argv)
    commands = {"rewrite": rewrite, "push": push}
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
