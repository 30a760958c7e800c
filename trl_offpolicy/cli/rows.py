"""`trl-offpolicy rows`: the rows so far of an unfinished run."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace

import yaml

from ..rewriting.rewrite_config import RewriteConfig
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
    from ..runs.shards import Shard, journals_in

    description = "The rows of an unfinished run that are settled already, as Parquet files; the run may be under way."
    parser = parser_for(RowsArguments, "rows", description, ROWS_EXAMPLES)
    named = ["--run_dir"] if argv and not argv[0].startswith("-") else []
    (given,) = parser.parse_args_and_config([*named, *argv])
    run = Path(given.run_dir).expanduser()
    print(f"run_dir: {run}", flush=True)
    if (run / "dataset").is_dir():
        print(f"The run is finished; its rows are in {run / 'dataset'}.")
        return 0
    if not given.so_far:
        raise ValueError(f"The run in {run} is not finished; add --so_far for the rows that are settled already.")
    journals = journals_in(run)
    if not journals or not (run / "run_config.yaml").exists():
        raise ValueError(
            f"There is no run of `trl-offpolicy rewrite` in {run}: it has no journal and no run_config.yaml."
        )
    settings = yaml.safe_load((run / "run_config.yaml").read_text())
    if "dataset_name" not in settings:
        raise ValueError(
            f"The run in {run} was started in Python on rows that it cannot name; use `DataRewriter.rows_so_far(dataset, file)` there."
        )
    own = {f.name for f in fields(DemonstrationArguments)}
    arguments = DemonstrationArguments(**{name: value for name, value in settings.items() if name in own})
    dataset = load_demonstrations(arguments, settings["answer_column"])
    own = {f.name for f in fields(RewriteConfig)}
    options = {name: value for name, value in settings.items() if name in own} | {"output_dir": str(run)}
    output = run / "rows_so_far"
    output.mkdir(exist_ok=True)
    for journal in journals:
        shard = Shard.of_file(journal)
        drawn_by, agent = _drawn_by(journal, settings)
        config = RewriteConfig(**options | {"shard": str(shard), "push_to_hub": False})
        rewriter = DataRewriter(drawn_by.name, config, sampler=drawn_by, guided_sampler=agent)
        count = rewriter.rows_so_far(dataset, output / shard.parquet)
        print(f"{count:,} of {len(shard.rows(len(dataset))):,} rows are settled: {output / shard.parquet}")
    return 0


def _drawn_by(journal: Path, settings: dict):
    """What stands for the samplers that drew the attempts of a journal: their names, and the tokenizer of the prompts."""
    from ..data.turns import stop_token_ids
    from ..runs.journal import read_header
    from ..sampling.loading import load_processing_class

    header = read_header(journal)
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
