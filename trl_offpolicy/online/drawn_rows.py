"""
The rows that a policy draws for some problems while it is trained: drawn, judged and journaled as a rewrite does it.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.rows import Problem
from ..data.whole_file import partial_file
from ..rewriting.attempts import Attempts
from ..rewriting.output_rows import write_rows
from ..rewriting.problems import Problems
from ..rewriting.rewrite_config import RewriteConfig
from ..rewriting.scheduler import Scheduler
from ..runs.journal import Journal
from ..runs.run_counts import RunCounts
from ..runs.shards import Shard, journals_in
from ..sampling.sampler import Sampler
from ..verification.drawing import Drawing
from ..verification.verifier import Verifier


class Drawn(NamedTuple):
    """What one policy has drawn: its rows; and how many of them are late, and what was counted, in `seconds`."""

    rows: pa.Table
    late: int
    counts: RunCounts
    seconds: float


class DrawnRows:
    """
    What the versions of a policy draw, on one process of a training. In `args.output_dir` it keeps a journal of all
    attempts, a Parquet file for what each version has come to (`rows/`), and a line of what was counted for each in
    `metrics.jsonl`.

    Args:
        dataset (`datasets.Dataset`): All rows of the training.
        args ([`RewriteConfig`]): How they are asked.
        processing_class: The tokenizer of their prompts.
        verifier ([`~verification.verifier.Verifier`]): What tells right attempts from wrong ones.
        shard ([`Shard`]): Which of the processes this is; each has files of its own.
    """

    clock = staticmethod(time.monotonic)

    def __init__(self, dataset, args: RewriteConfig, processing_class, verifier: Verifier, shard: Shard):
        self.args, self.verifier, self.shard, self.directory = args, verifier, shard, Path(args.output_dir)
        rows_file = shard.file(self.directory, "rows.npz")
        self.problems = Problems(dataset, args, processing_class, rows_file, verifier.columns)
        self.journal: Journal | None = None
        self._known: dict[int, list[tuple[int, dict]]] = {}  # the journal's lines by version

    def open(self, config: dict, first: int) -> None:
        """
        Opens the journal of a training with this `config`, which goes on at the version `first`.

        Raises:
            ValueError: The journal is another training's (names each setting that differs), or is being written to, or
                there are those of another number of processes.
        """
        (self.directory / "rows").mkdir(parents=True, exist_ok=True)
        path = self.shard.file(self.directory, "journal.jsonl")
        ours = {shard.file(self.directory, "journal.jsonl") for shard in self.shard.siblings()}
        if others := [path.name for path in journals_in(self.directory) if path not in ours]:
            raise ValueError(
                f"{self.directory} holds {others[0]}, of a training on another number of processes; this one has {self.shard.count}. Use as many as it "
                "had, choose another `output_dir`, or delete that directory."
            )
        self.journal = Journal(path, config, overwrite=self.args.overwrite, free=())
        if self.journal.overwritten:
            for file in (self.directory / "rows").glob(self.file(0).name.replace(f"{0:08d}", "*")):
                file.unlink()
        for offset, entry in self.journal.entries(texts=False):
            if (version := entry.get("version", 0)) >= first:
                self._known.setdefault(version, []).append((offset, entry))

    def close(self) -> None:
        if self.journal is not None:
            self.journal.close()
            self.journal = None
        self._known = {}
        self.verifier.close()

    def file(self, version: int) -> Path:
        """Where the rows of a version are, once they are drawn."""
        return self.shard.file(self.directory / "rows", f"{version:08d}.parquet")

    def earlier(self, version: int, numbers: list[int], skipped: int) -> Drawn | None:
        """
        The rows of these problems that a version has drawn before this process began, behind the first `skipped` of
        them; `None` if it has not finished that.

        Raises:
            ValueError: The file holds other rows.
        """
        if not self.file(version).exists():
            return None
        rows = pq.read_table(self.file(version)).slice(skipped, len(numbers))
        if rows["id"].to_pylist() != [self.problems.memory.ids(number, 1)[0] for number in numbers]:
            raise ValueError(
                f"{self.file(version)} holds the rows of other problems than those whose turn it is. Choose another `output_dir`, or pass overwrite=True "
                "to begin anew."
            )
        return Drawn(rows, 0, self._no_counts(), 0.0)

    def _no_counts(self) -> RunCounts:
        return RunCounts(self.args.drawn_stages(), self.args.max_completion_length)

    def draw(
        self,
        version: int,
        numbers: list[int],
        asked: list[bool],
        sampler: Sampler,
        seconds: float | None = None,
        finish: Callable[[pa.Table], pa.Table] = lambda rows: rows,
    ) -> Drawn:
        """
        Draws rows from the policy `version`.

        Args:
            numbers (`list[int]`): Of the problems, among all.
            asked (`list[bool]`): Whether each is asked at all; else it takes its demonstration.
            sampler ([`~trl_offpolicy.sampling.Sampler`]): An engine with the policy as it is now.
            seconds (`float`, *optional*): After which problems without an outcome take their demonstration.
            finish (`Callable`, *optional*): Called with the rows before they are kept; returns those that are.
        """
        problems, began = self.problems.select(np.array(numbers)), self.clock()
        problems.memory.recall(self._known.pop(version, []), self.args.drawn_stages())
        counts = self._no_counts()
        scheduler = Scheduler(self._asked(problems, asked, counts), len(numbers), self.args, counts)

        def over() -> bool:
            return seconds is not None and self.clock() - began > seconds

        drawing = Drawing(self.verifier, sampler, counts=counts.engine, over=over)
        Attempts(self.args, lambda stage: sampler, version).draw(problems, scheduler, drawing, self.journal)
        late = len(scheduler.give_up())
        with partial_file(self.file(version)) as file:
            write_rows(file, problems, scheduler.outcome, self.journal, lambda source: sampler)
            rows = finish(pq.read_table(file))
            pq.write_table(rows, file)
            file.replace(self.file(version))
        spent = self.clock() - began
        line = counts.status(len(numbers), spent, drawn=drawing.drawn_tokens())
        with self.shard.file(self.directory, "metrics.jsonl").open("a") as log:
            log.write(json.dumps({"version": version, "late": late, **line}) + "\n")
        return Drawn(rows, late, counts, spent)

    def _asked(
        self, problems: Problems, asked: list[bool], counts: RunCounts
    ) -> Iterator[tuple[str, Problem | None, bool, dict]]:
        for is_asked, (row_id, problem, can_be_sampled, known) in zip(
            asked, problems.checked(self.verifier, counts), strict=True
        ):
            yield row_id, problem, is_asked and can_be_sampled, known
