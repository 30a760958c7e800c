"""`trl-offpolicy rows`: the rows so far of an unfinished run."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace

from ..rewriting.rewrite_config import RewriteConfig
from ..runs.run_directory import RunDirectory
from ..runs.shards import Shard
from ..sampling.engine import read_template
from .arguments import DemonstrationArguments, load_demonstrations, parser_for


ROWS_EXAMPLES = """\
examples:
  trl-offpolicy rows runs/demos --so_far        # while the run goes on, or after it was stopped; nothing is sampled

A row is settled when an attempt at it is right, or when all are drawn. Those of which nothing was drawn yet come when the run goes on.
"""


@dataclass
class RowsArguments:
    """Of which run."""

    run_dir: str = field(metadata={"help": "Output directory of a rewrite; also the first word after `rows`."})
    so_far: bool = field(
        default=False,
        metadata={"help": "Write the rows that are settled already to rows_so_far/ in the run's directory."},
    )


def rows(argv: list[str]) -> int:
    from ..rewriting.rewriter import DataRewriter

    description = "The rows of an unfinished run that are settled already, as Parquet files; the run may be under way."
    parser = parser_for(RowsArguments, "rows", description, ROWS_EXAMPLES)
    named = ["--run_dir"] if argv and not argv[0].startswith("-") else []
    (given,) = parser.parse_args_and_config([*named, *argv])
    run = RunDirectory(Path(given.run_dir).expanduser())
    print(f"run_dir: {run.path}", flush=True)
    if run.row_files:
        print(f"The run is finished; its rows are in {run.path / 'dataset'}.")
        return 0
    if not given.so_far:
        raise ValueError(f"The run in {run.path} is not finished; add --so_far for the rows that are settled already.")
    if not run.journals or not (run.path / "run_config.yaml").exists():
        raise ValueError(
            f"There is no run of `trl-offpolicy rewrite` in {run.path}: it has no journal and no run_config.yaml."
        )
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
    for shard in map(Shard.of_file, run.journals):
        config = RewriteConfig(**options | {"shard": str(shard), "push_to_hub": False})
        rewriter = DataRewriter(drawn_by.name, config, sampler=drawn_by, guided_sampler=agent)
        count = rewriter.rows_so_far(dataset, output / shard.parquet)
        print(f"{count:,} of {len(shard.rows(len(dataset))):,} rows are settled: {output / shard.parquet}")
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
