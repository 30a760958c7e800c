"""The `trl-offpolicy` command. Training stays `accelerate launch examples/train.py`.

Every flag is also a key of `--config file.yaml`. The first line printed is the run directory, the last one the next
command to run. Exit codes: 0 done, 2 bad input, 3 stopped early and resumable.
"""

import itertools
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from . import prompts


USAGE = """\
usage: trl-offpolicy COMMAND [options]

commands:
  rewrite    rewrite a dataset of demonstrations into what the model could have written itself
  eval       accuracy of a model on benchmarks: avg@k, pass@k, maj@k, greedy, with intervals
  gap        how far a rewritten dataset is from a model, before and after rewriting
  report     one page of what rewrites, trainings, evaluations and gaps have written

  trl-offpolicy rewrite --model_name_or_path Qwen/Qwen2.5-Math-1.5B --dataset_name openai/gsm8k --dataset_config main \\
      --output_dir runs/gsm8k --num_generations 8 --dry_run          # first prompts and the estimate, nothing is sampled
  trl-offpolicy rewrite --config rewrite.yaml                        # the same keys in a file; run again to resume
  trl-offpolicy eval --model_name_or_path M --benchmarks math500 aime24 --preset paper --output_dir runs/eval
  trl-offpolicy gap --model_name_or_path M --dataset_name runs/gsm8k/dataset --output_dir runs/gap
  trl-offpolicy report runs --output_dir runs/report
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


EVAL_EXAMPLES = """\
examples:
  trl-offpolicy eval --model_name_or_path M --benchmarks math500 minerva_math olympiadbench aime24 amc23 --preset paper \\
      --output_dir runs/eval-paper --dtype bfloat16
  trl-offpolicy eval --model_name_or_path M --benchmarks math500 test.jsonl openai/gsm8k:main:test --output_dir runs/eval-base
  trl-offpolicy eval --model_name_or_path runs/sft --benchmarks math500 --output_dir runs/eval-sft --baseline runs/eval-base \\
      --train_dataset runs/gsm8k/dataset                                # paired test; another prompt than in training is refused
  trl-offpolicy eval --model_name_or_path M --benchmarks math500 --num_generations 1 --temperature 0 --output_dir runs/greedy
  trl-offpolicy eval --config eval.yaml --greedy --shard 0/4            # on the first of four machines, 1/4 on the second, …

Benchmarks: a name, a file with problem (or question) and answer, or a Hub dataset as id:config:split. An interrupted
evaluation resumes: run the same command again.

Preset `paper` (arXiv 2509.15157, as its code evaluates Qwen2.5-Math; `paper_llama` for Llama-3.1): T = 1, top_p 1, 16 samples,
4096 tokens, seed 0, its prompt. What is not copied: a grader that lets 900 pass for 9, accuracies rounded to 0.1 for each
run, a second BOS for Llama, and another prompt in training than here.

What was forgotten, by lm-eval (pip install lm-eval); the same template as in training, greedy:
  lm_eval --model hf --model_args pretrained=runs/sft,dtype=bfloat16 --tasks mmlu,ifeval --apply_chat_template --batch_size auto
"""

GAP_EXAMPLES = """\
examples:
  trl-offpolicy gap --model_name_or_path M --dataset_name runs/gsm8k/dataset --output_dir runs/gap
  trl-offpolicy gap --model_name_or_path M --dataset_name runs/gsm8k/dataset --output_dir runs/table3 --concatenate --dtype float16
"""


REPORT_EXAMPLES = """\
examples:
  trl-offpolicy report runs --output_dir runs/report                   # everything below runs/
  trl-offpolicy report runs/gsm8k runs/gap runs/gsm8k-iw runs/eval-base runs/eval-iw --output_dir runs/report
"""


@dataclass(kw_only=True)
class EngineArguments:
    """Which model, and the engine that samples it."""

    model_name_or_path: str = field(metadata={"help": "Model: Hub id or local directory."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    dtype: str = field(default="auto", metadata={"help": "Weights' dtype: auto, bfloat16, float16 or float32."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code from the model's repository."})
    sampler: str = field(
        default="transformers", metadata={"help": "Engine that samples.", "choices": ["transformers"]}
    )
    batch_size: int = field(default=64, metadata={"help": "Completions drawn at a time."})


@dataclass(kw_only=True)
class DatasetArguments:
    """Which rows."""

    dataset_name: str = field(metadata={"help": "Rows: Hub id, directory, or JSONL, JSON, CSV or Parquet file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split."})
    max_rows: int | None = field(
        default=None, metadata={"help": "Only the first rows; a later run may take more of them."}
    )


@dataclass(kw_only=True)
class RewriteArguments(DatasetArguments, EngineArguments):
    """What is rewritten by what."""


@dataclass(kw_only=True)
class EvalArguments(EngineArguments):
    """What is evaluated, on what, and how."""

    benchmarks: list[str] = field(
        metadata={"help": "Names, files, or Hub datasets as id, id:split or id:config:split."}
    )
    output_dir: str = field(
        metadata={"help": "Run directory: journal, samples and results. An interrupted run resumes from it."}
    )
    preset: str | None = field(
        default=None,
        metadata={"help": "Settings of a paper; flags beside it win.", "choices": ["paper", "paper_llama"]},
    )
    num_generations: int = field(default=16, metadata={"help": "Samples of each problem: k."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; 0 with one sample is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus."})
    top_k: int = field(default=0, metadata={"help": "Highest-probability tokens kept, 0 for all."})
    max_completion_length: int = field(default=4096, metadata={"help": "Tokens of one sample."})
    seed: int = field(default=42, metadata={"help": "Seed of the run; each sample derives its own from it."})
    greedy: bool = field(default=False, metadata={"help": "One more completion of each problem, at temperature 0."})
    solve_prompt: str = field(default=prompts.SOLVE_PROMPT, metadata={"help": "What a problem is asked."})
    system_prompt: str | None = field(default=None, metadata={"help": "System turn before it."})
    max_problems: int | None = field(default=None, metadata={"help": "Only the first problems of each benchmark."})
    shard: str = field(default="0/1", metadata={"help": "i/n asks the i-th of n blocks of each benchmark's problems."})
    overwrite: bool = field(default=False, metadata={"help": "Delete the journal of other settings in output_dir."})
    baseline: str | None = field(default=None, metadata={"help": "Run directory of another model to compare with."})
    train_tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer in training; another chat template is refused."}
    )
    train_dataset: str | None = field(default=None, metadata={"help": "Rows in training; another prompt is refused."})


@dataclass(kw_only=True)
class GapArguments(DatasetArguments):
    """How far which rows are from which model."""

    model_name_or_path: str = field(
        metadata={"help": "Usually the model that will be trained: Hub id or local directory."}
    )
    output_dir: str = field(metadata={"help": "Where policy_gap.json, .md and .parquet go."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    dtype: str = field(default="auto", metadata={"help": "Weights' dtype: auto, bfloat16, float16 or float32."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code from the model's repository."})
    batch_tokens: int = field(default=8192, metadata={"help": "Tokens of one forward, padding included."})
    concatenate: bool = field(
        default=False, metadata={"help": "Bare problem + target without template, as the paper's Table 3."}
    )
    chat_template_path: str | None = field(
        default=None, metadata={"help": "Jinja file, where training used another than the tokenizer's."}
    )


@dataclass(kw_only=True)
class ReportArguments:
    """What goes onto the page."""

    run_dirs: list[str] = field(
        metadata={"help": "Output directories of the commands and trainings, or of several of them."}
    )
    output_dir: str = field(metadata={"help": "Where report.html, report.md and figures/ go."})
    title: str = field(default="trl_offpolicy report", metadata={"help": "Title of the page."})
    seed: int = field(default=0, metadata={"help": "Which twenty rows are shown."})


def _parser(types, command: str, description: str, examples: str):
    import argparse

    from trl import TrlParser

    return TrlParser(
        types,
        prog=f"trl-offpolicy {command}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a misspelt flag must not pass for another one
    )


def _load(arguments):
    from .rows import load_rows

    dataset = load_rows(arguments.dataset_name, arguments.dataset_config, arguments.dataset_split)
    if arguments.max_rows is not None:
        if arguments.max_rows < 1:
            raise ValueError(f"You passed max_rows={arguments.max_rows}; it must be at least 1.")
        dataset = dataset.select(range(min(arguments.max_rows, len(dataset))))
    return dataset


def rewrite(argv: list[str]) -> int:
    from .rewrite_config import RewriteConfig
    from .rewriter import DataRewriter

    parser = _parser(
        (RewriteArguments, RewriteConfig),
        "rewrite",
        "Rewrite demonstrations: the model's own correct solution, else its retelling of the reference, else the demonstration.",
        REWRITE_EXAMPLES,
    )
    arguments, config = parser.parse_args_and_config(argv)
    print(config.output_dir, flush=True)
    dataset = _load(arguments)
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


def _sampler(arguments: EngineArguments):
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


def evaluate(argv: list[str]) -> int:
    from . import tables
    from .benchmarks import PRESETS, load_benchmarks
    from .evaluation import evaluate as run
    from .rows import load_rows

    description = "Measure a model: sample k completions of each problem, verify them, report accuracies with intervals over problems."
    parser = _parser(EvalArguments, "eval", description, EVAL_EXAMPLES)
    (arguments,) = parser.parse_args_and_config(argv)
    if arguments.preset:
        parser.set_defaults(**PRESETS[arguments.preset])  # below what a flag or the config file says
        (arguments,) = parser.parse_args_and_config(argv)
    print(arguments.output_dir, flush=True)
    rows = load_benchmarks(arguments.benchmarks)
    if arguments.max_problems is not None:
        rows = {name: each.select(range(min(arguments.max_problems, len(each)))) for name, each in rows.items()}
    options = {f.name: getattr(arguments, f.name) for f in fields(arguments)}
    for name in ("benchmarks", "preset", "max_problems", "sampler", *(f.name for f in fields(EngineArguments))):
        options.pop(name, None)
    if arguments.train_dataset:
        options["train_dataset"] = load_rows(arguments.train_dataset)
    try:
        results = run(arguments.model_name_or_path, rows, sampler=_sampler(arguments), **options)
    except KeyboardInterrupt:
        print(f"\nstopped; every finished sample is in {arguments.output_dir}. Run the same command again to resume.")
        return 3
    print(tables.markdown(tables.accuracy(results)), end="")
    if arguments.baseline:
        print(tables.markdown(tables.comparison(results)), end="")
    if not (Path(arguments.output_dir) / "results.json").exists():
        print(f"shard {arguments.shard} is done; results.json appears with the last of them")
        return 0
    print(f"trl-offpolicy report {arguments.output_dir} --output_dir {arguments.output_dir}/report")
    return 0


def gap(argv: list[str]) -> int:
    from . import tables
    from .policy_gap import measure_policy_gap

    description = "Measure how far a dataset's targets are from a model, by source, before and after rewriting."
    (arguments,) = _parser(GapArguments, "gap", description, GAP_EXAMPLES).parse_args_and_config(argv)
    print(arguments.output_dir, flush=True)
    template = arguments.chat_template_path
    result = measure_policy_gap(
        arguments.model_name_or_path,
        _load(arguments),
        batch_tokens=arguments.batch_tokens,
        concatenate=arguments.concatenate,
        chat_template=Path(template).read_text() if template else None,
        output_dir=arguments.output_dir,
        model_init_kwargs={
            "dtype": arguments.dtype, "revision": arguments.model_revision, "trust_remote_code": arguments.trust_remote_code,
        },
    )  # fmt: skip
    print(tables.markdown(tables.policy_gap(result)) + "\n" + tables.markdown(tables.texts(result)), end="")
    print(f"trl-offpolicy report {arguments.output_dir} --output_dir {arguments.output_dir}/report")
    return 0


def report(argv: list[str]) -> int:
    from .report import write_report

    parser = _parser(
        ReportArguments,
        "report",
        "trl-offpolicy report RUN_DIR … --output_dir OUT: one page of what rewrites, evaluations, gaps and trainings have written.",
        REPORT_EXAMPLES,
    )
    directories = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    if directories:  # `report RUN_DIR …`; in a config file the key is run_dirs
        argv = ["--run_dirs", *argv]
    (arguments,) = parser.parse_args_and_config(argv)
    print(arguments.output_dir, flush=True)
    print(write_report(arguments.run_dirs, arguments.output_dir, arguments.title, arguments.seed))
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    commands = {"rewrite": rewrite, "eval": evaluate, "gap": gap, "report": report}
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
