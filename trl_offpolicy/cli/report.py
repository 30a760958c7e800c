"""`trl-offpolicy report`: one page of what all runs have written."""

import itertools
import os
from dataclasses import dataclass, field

from .arguments import (
    check_before_loading,
    parser_for,
)


REPORT_EXAMPLES = """\
examples:
  trl-offpolicy report runs --output_dir runs/report                   # everything below runs/
  trl-offpolicy report runs/gsm8k runs/gap runs/gsm8k-dft runs/eval-base runs/eval-dft --output_dir runs/report
"""


@dataclass(kw_only=True)
class ReportArguments:
    """What goes onto the page."""

    run_dirs: list[str] = field(
        metadata={"help": "Output directories of the commands and trainings, or of several of them."}
    )
    output_dir: str = field(metadata={"help": "Where report.html, report.md and figures/ go."})
    title: str = field(default="trl_offpolicy report", metadata={"help": "Title of the page."})
    seed: int = field(default=0, metadata={"help": "Which twenty rows are shown."})


def report(argv: list[str]) -> int:
    from ..reporting.report import write_report

    parser = parser_for(
        ReportArguments,
        "report",
        "trl-offpolicy report RUN_DIR … --output_dir OUT: one page of what rewrites, evaluations, gaps and trainings have written.",
        REPORT_EXAMPLES,
    )
    directories = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    if directories:  # `report RUN_DIR …`; in a config file the key is run_dirs
        argv = ["--run_dirs", *argv]
    (arguments,) = parser.parse_args_and_config(argv)
    arguments.output_dir = os.path.expanduser(arguments.output_dir)
    print(f"output_dir: {arguments.output_dir}", flush=True)
    check_before_loading(arguments.output_dir)
    print(write_report(arguments.run_dirs, arguments.output_dir, arguments.title, arguments.seed))
    return 0
