"""What is seen of a run under way: the status line, `metrics.jsonl`, W&B, and a push every so many rows."""

import json
import os
import re
import secrets
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm

from ..data.redaction import redacted
from .run_counts import ENOUGH_ATTEMPTS, RunCounts, cut_advice, shown


class RunLog:
    """
    Writes [`RunCounts.status`] where someone looks.

    A thread of its own shows it again every second, so that it moves while an engine draws and nothing is finished.

    Args:
        path (`Path`, *optional*): `metrics.jsonl`; lines are appended.
        total (`int`): Rows of the run.
        resumed (`int`): Attempts that the journal holds already.
        counts ([`RunCounts`]): What is counted, elsewhere.
        drawn (`Callable[[], int]`): Tokens that this process has drawn.
        wandb_run (`wandb.Run`, *optional*): Gets the same lines, and the attempts as the table `attempts`.
        every (`float`, *optional*, defaults to `5.0`): Seconds between two lines of the file.
    """

    COLUMNS = ("id", "stage", "attempt", "verdict", "finish_reason", "num_tokens", "log_prob", "rejected", "reason", "text")  # fmt: skip
    # A W&B table shows no more rows than this; the journal has them all.
    MAX_ATTEMPTS = 10_000
    TICK = 1.0  # seconds from one refreshment to the next where nothing happens
    WINDOW = 60.0  # seconds over which tokens per second are taken

    def __init__(
        self,
        path: Path | None,
        total: int,
        resumed: int,
        counts: RunCounts,
        drawn: Callable[[], int],
        wandb_run=None,
        every: float = 5.0,
    ):
        self.path, self.total, self.every, self.wandb_run = path, total, every, wandb_run
        self.counts, self.drawn = counts, drawn
        self.advice: str | None = None  # what was said of cut attempts
        self.began = self.written = time.monotonic()
        self.shown = 0.0
        self.marks = deque([(self.began, 0)])  # when how many tokens had been drawn
        self.under_way: tuple[int, int, float | None] = 0, 0, None
        self.bar = tqdm(
            total=total,
            desc="rewriting",
            unit="row",
            bar_format="{l_bar}{bar:10}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )
        if resumed:
            self.bar.write(f"resuming: {resumed:,} attempts are in the journal already", file=sys.stderr)
        if wandb_run is not None:
            import wandb

            self.table, self.logged = wandb.Table(list(self.COLUMNS), log_mode="INCREMENTAL"), 0
        self.lock, self.over = threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self._tick, name="status line", daemon=True)
        self.thread.start()

    def attempt(self, entry: dict) -> None:
        """Notes one line of the journal for the table."""
        if self.wandb_run is not None and len(self.table.data) < self.MAX_ATTEMPTS:
            self.table.add_data(*map(entry.get, self.COLUMNS))

    def update(self, sampling: int, verifying: int, left: Callable[[], float]) -> None:
        """Shows what is counted, unless that was done a moment ago; `left` as in [`RunCounts.status`]."""
        if time.monotonic() - self.shown < 0.1:
            self.under_way = sampling, verifying, self.under_way[2]
        else:
            self.under_way = sampling, verifying, left()
            self._show()

    def close(self) -> None:
        """Shows it for the last time."""
        self.over.set()
        self.thread.join()
        self.under_way = 0, 0, None
        self._show(last=True)
        self.bar.close()

    def _tick(self) -> None:
        while not self.over.wait(self.TICK):
            if time.monotonic() - self.shown >= self.TICK:
                self._show()

    def _show(self, last: bool = False) -> None:
        with self.lock:
            self.shown = now = time.monotonic()
            drawn = self.drawn()
            self.marks.append((now, drawn))
            while now - self.marks[0][0] > self.WINDOW and len(self.marks) > 2:
                self.marks.popleft()
            since, before = (self.began, 0) if last else self.marks[0]
            rate = (drawn - before) / max(now - since, 1e-9)
            sampling, verifying, left = self.under_way
            line = self.counts.status(self.total, now - self.began, sampling, verifying, drawn, rate, left)
            self.bar.n = line["rows"]
            self.bar.set_postfix_str(shown(line), refresh=False)
            self.bar.refresh()
            enough = line["sampled"] >= ENOUGH_ATTEMPTS
            if enough and self.advice is None:
                self.advice = cut_advice(self.counts.sampling, self.counts.limit)
                if self.advice is not None:
                    self.bar.write(self.advice, file=sys.stderr)
            if now - self.written >= self.every or last:
                self.written = now
                self._log(line, last)

    def _log(self, line: dict, last: bool) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if self.wandb_run is not None:
            # Each increment is a file of its own, so one is worth as many attempts as all before it.
            if len(self.table.data) > (self.logged if last else 2 * self.logged):
                self.wandb_run.log({"attempts": self.table}, commit=False)
                self.logged = len(self.table.data)
            self.wandb_run.log(line)


@contextmanager
def wandb_run(report_to: str, directory: Path, job_type: str, config: dict, part: str = "") -> Iterator:
    """
    The W&B run in which a command that writes into `directory` logs; `None` unless `report_to` is `"wandb"`.

    A run that is open already is logged to and left open. One of our own goes on when the command is run again. It is
    in the group `WANDB_RUN_GROUP`, which ties rewrite, training and evaluation together, or by default in one named
    after `directory`; and in the project in which `transformers` logs a training, since a group is of one project.
    """
    if report_to != "wandb":
        yield None
        return
    import wandb

    if wandb.run is not None:
        yield wandb.run
        return
    group = wandb_group(directory)
    project = os.environ.get("WANDB_PROJECT", "huggingface")
    run_id = os.environ.get("WANDB_RUN_ID") or f"{_own_name(directory)}-{job_type}{part}"
    name = os.environ.get("WANDB_NAME", run_id)
    with wandb.init(
        id=run_id, name=name, project=project, group=group, job_type=job_type, config=config, resume="allow"
    ) as run:
        yield run


def check_wandb(report_to: str) -> None:
    """
    Asks for W&B's key, before anything is loaded, where there is none and a terminal to type it in.

    Raises:
        ValueError: W&B is not installed, or there is neither a key nor a terminal, or it is no key.
    """
    if report_to != "wandb":
        return
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ValueError(
            "You passed report_to='wandb', but wandb is not installed: pip install 'trl-offpolicy[wandb]'."
        ) from error
    if wandb.run is not None or wandb.setup().settings.mode in ("offline", "disabled", "dryrun"):
        return
    remedy = "Set WANDB_API_KEY, run `wandb login`, or set WANDB_MODE=offline"
    try:
        known = wandb.login(prompt=sys.stdin.isatty(), verify=False)
    except wandb.errors.Error as error:
        raise ValueError(f"You passed report_to='wandb', but W&B says: {error}. {remedy}.") from error
    if not known:
        raise ValueError(
            f"You passed report_to='wandb', but W&B has no API key and there is no terminal to type one in. {remedy}."
        )


def wandb_group(directory: Path) -> str:
    return os.environ.get("WANDB_RUN_GROUP") or _own_name(directory)


def _own_name(directory: Path) -> str:
    """The directory's name and a random tail, the same at every call."""

    file, tail = directory / "wandb_group", secrets.token_hex(4)
    if not file.exists():
        new = directory / f"wandb_group.{tail}"
        new.write_text(f"{re.sub(r'[^A-Za-z0-9_.-]', '-', directory.resolve().name)}-{tail}")
        # Whole or not at all, and of several shards that start together the first one's for all.
        try:
            os.link(new, file)
        except FileExistsError:
            pass
        except OSError:  # the file system has no hard links
            new.replace(file)
        new.unlink(missing_ok=True)
    return file.read_text()


def log_artifact(run, kind: str, paths: list[Path]) -> None:
    """Logs files and directories as an artifact of type `kind`."""
    import wandb

    artifact = wandb.Artifact(f"{run.group or run.id}-{kind}", type=kind)
    for path in paths:
        artifact.add_dir(str(path), name=path.name) if path.is_dir() else artifact.add_file(str(path))
    run.log_artifact(artifact)


class PeriodicPush:
    """
    Pushes a run under way every so many rows, in a thread of its own and one at a time; a push that fails is said and
    tried again.

    Args:
        push (`Callable[[], object]`): Makes one push.
        every (`int`): Rows from one push to the next; 0 for none.
        token (`str`, *optional*): What is not to be seen in what is said.
    """

    def __init__(self, push: Callable[[], object], every: int, token: str | None = None):
        self.push, self.every, self.due, self.token = push, every, every, token
        self.pool = ThreadPoolExecutor(1, "push")
        self.under_way: Future | None = None

    def update(self, rows: int) -> None:
        if self.under_way is not None and self.under_way.done():
            self._report(self.under_way)
            self.under_way = None
        if self.every and rows >= self.due and self.under_way is None:
            self.due = rows + self.every
            self.under_way = self.pool.submit(self.push)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        if self.under_way is not None and not self.under_way.cancelled():
            self._report(self.under_way)

    def _report(self, push: Future) -> None:
        if error := push.exception():
            reason = redacted(f"{type(error).__name__}: {error}", self.token)
            warnings.warn(
                f"A push of the attempts so far failed ({reason}); sampling goes on.",
                stacklevel=3,
            )
