"""`trl-offpolicy rows`: the rows so far of an unfinished run, or all judged attempts of a finished one."""

import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace

from ..rewriting.rewrite_config import RewriteConfig
from ..runs.run_directory import RunDirectory
from ..runs.shards import Shard
from ..sampling.engine import read_template
from .arguments import DemonstrationArguments, load_demonstrations, parser_for, say_next


ROWS_EXAMPLES = """\
examples:
  trl-offpolicy rows runs/demos --so_far        # while the run goes on, or after it was stopped; nothing is sampled
  trl-offpolicy rows runs/demos --keep all --max_per_problem 8 --positive_share 0.2 --output_dir runs/demos/signed
  trl-offpolicy sft --model_name_or_path M --dataset_name runs/demos/signed --objective topr --output_dir runs/demos-topr

A row is settled when an attempt at it is right, or when all are drawn. Those of which nothing was drawn yet come when the run goes on.

--keep all writes the attempts of the stage self with a reward: 1 if correct, -1 if wrong. Attempts that were unparsable, cut, or could not be
judged are left out and counted, as are retellings. A run that stops at the first correct attempt (--selection first) has fewer wrong ones of
easy problems than of hard ones; --selection random draws all of each problem, which is the unbiased case. num_sampled says how many there were.
"""


@dataclass
class RowsArguments:
    """Of which run."""

    run_dir: str = field(metadata={"help": "Output directory of a rewrite; also the first word after `rows`."})
    so_far: bool = field(
        default=False,
        metadata={"help": "Write the rows that are settled already to rows_so_far/ in the run's directory."},
    )
    keep: str | None = field(
        default=None,
        metadata={
            "help": "all: write the correct and wrong attempts of stage self of a finished run, with a reward of 1 or -1.",
            "choices": ("all",),
        },
    )
    output_dir: str | None = field(default=None, metadata={"help": "With --keep all: where the Parquet file goes."})
    max_per_problem: int | None = field(
        default=None, metadata={"help": "With --keep all: at most so many attempts at a problem, drawn at random."}
    )
    positive_share: float | None = field(
        default=None,
        metadata={
            "help": "With --keep all: share of rows with the reward 1; what is too many of either is left out at random."
        },
    )
    seed: int = field(default=42, metadata={"help": "With --keep all: of both draws."})


def rows(argv: list[str]) -> int:
    from ..rewriting.rewriter import DataRewriter

    description = (
        "The rows of an unfinished run that are settled already, as Parquet files (the run may be under way); or all correct and wrong attempts of "
        "a finished one."
    )
    parser = parser_for(RowsArguments, "rows", description, ROWS_EXAMPLES)
    named = ["--run_dir"] if argv and not argv[0].startswith("-") else []
    (given,) = parser.parse_args_and_config([*named, *argv])
    run = RunDirectory(Path(given.run_dir).expanduser())
    print(f"run_dir: {run.path}", flush=True)
    if given.keep is not None:
        return _signed_rows(given)
    only = {
        "output_dir": given.output_dir,
        "max_per_problem": given.max_per_problem,
        "positive_share": given.positive_share,
    }
    if passed := [name for name, value in only.items() if value is not None]:
        raise ValueError(f"You passed {', '.join(passed)} without --keep all, for which they are.")
    if run.row_files:
        print(f"The run is finished; its rows are in {run.path / 'dataset'}.")
        return 0
    if not run.journals or not (run.path / "run_config.yaml").exists():
        raise ValueError(
            f"There is no run of `trl-offpolicy rewrite` in {run.path}: it has no journal and no run_config.yaml."
        )
    if not given.so_far:
        raise ValueError(f"The run in {run.path} is not finished; add --so_far for the rows that are settled already.")
    settings = run.settings
    if "dataset_name" not in settings:
        raise ValueError(
            f"The run in {run.path} was started in Python on rows that it cannot name; use `DataRewriter.rows_so_far(dataset, file)` there."
        )
    own = {f.name for f in fields(DemonstrationArguments)}
    arguments = DemonstrationArguments(**{name: value for name, value in settings.items() if name in own})
    dataset = load_demonstrations(arguments, settings["answer_column"])
    own = {f.name for f in fields(RewriteConfig)}
    options = {name: value for name, value in settings.items() if name in own} | {"output_dir": str(run.path)}
    output = run.path / "rows_so_far"
    output.mkdir(exist_ok=True)
    drawn_by, agent = _drawn_by(run)
    teachers: dict = {
        name: SimpleNamespace(name=of["model"], revision=of["revision"])
        for name, of in run.config.get("teachers", {}).items()
    }
    for shard in map(Shard.of_file, run.journals):
        config = RewriteConfig(**options | {"shard": str(shard), "push_to_hub": False})
        rewriter = DataRewriter(drawn_by.name, config, sampler=drawn_by, guided_sampler=agent, teachers=teachers)
        count = rewriter.rows_so_far(dataset, output / shard.parquet)
        print(f"{count:,} of {len(shard.rows(len(dataset))):,} rows are settled: {output / shard.parquet}")
    return 0


def _signed_rows(given: RowsArguments) -> int:
    from ..rewriting.signed_rows import in_words, write_signed_rows

    if given.so_far or given.output_dir is None:
        raise ValueError(
            "--keep all is for a finished run, without --so_far, and needs --output_dir: where its rows go."
        )
    counts = write_signed_rows(
        given.run_dir, given.output_dir, given.max_per_problem, given.positive_share, given.seed
    )
    rows = counts["positive"] + counts["negative"]
    print(
        f"{rows:,} rows: {counts['positive']:,} with reward 1, {counts['negative']:,} with reward -1: {given.output_dir}"
    )
    print(f"attempts left out: {in_words(counts)}")
    command = ["trl-offpolicy", "sft", "--model_name_or_path", RunDirectory(given.run_dir).config["model"]]
    # The paper's rate; what is pushed down forgives a high one less than what is learned.
    command += ["--dataset_name", given.output_dir, "--objective", "topr", "--learning_rate", "5e-7"]
    command += ["--lr_scheduler_type", "constant"]
    say_next(shlex.join([*command, "--output_dir", f"{given.run_dir.rstrip('/')}-topr"]))
    return 0


def _drawn_by(run: RunDirectory):
    """What stands for the samplers that drew the attempts of a run: their names, and the tokenizer of the prompts."""
    from ..data.turns import stop_token_ids
    from ..sampling.loading import load_processing_class

    header, settings = run.config, run.settings
    revision = settings.get("model_revision")
    kwargs = {"revision": revision, "trust_remote_code": settings.get("trust_remote_code", False)}
    shared = {}
    if header["chat_template"] is not None:  # None: a server rendered the prompts
        template = read_template(settings.get("chat_template_path"))
        tokenizer = load_processing_class(header["model"], chat_template=template, **kwargs)
        shared = {"processing_class": tokenizer, "stop_token_ids": stop_token_ids(tokenizer)}
    sampler = SimpleNamespace(name=header["model"], revision=header["model_revision"], **shared)
    if "rewriter_adapter" not in header:
        return sampler, None
    return sampler, SimpleNamespace(name=header["rewriter_adapter"], revision=header["rewriter_revision"], **shared)
