"""What is seen of a run under way: the status line, `metrics.jsonl`, W&B, and a push every so many rows."""

import json
import math
import os
import re
import secrets
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm

from ..data.redaction import redacted
from ..data.rows import Rejection, Source


def status(
    counts: Counter,
    total: int,
    seconds: float,
    sampling: int = 0,
    verifying: int = 0,
    drawn: int = 0,
    rate: float | None = None,
    left: float | None = None,
) -> dict:
    """
    One line of `metrics.jsonl`.

    Args:
        counts (`Counter`): What [`~rewriting.scheduler.Scheduler`] and [`DataRewriter`] have counted so far.
        total (`int`): Rows of the run.
        seconds (`float`): Since this process began to sample.
        sampling (`int`, *optional*, defaults to `0`): Attempts with the engine.
        verifying (`int`, *optional*, defaults to `0`): Attempts waiting for their verdict.
        drawn (`int`, *optional*, defaults to `0`): Tokens that this process has drawn, those of attempts under way included.
        rate (`float`, *optional*): Tokens drawn per second of late; by default since the beginning.
        left (`float`, *optional*): Attempts that are still to be drawn, those under way included ([`~rewriting.scheduler.Scheduler.attempts_left`]).

    Returns:
        `dict`: `rows` and their number by source; `drawn` tokens of this process; `sampled`, `tokens`, `acceptance/<stage>` and `truncated/<stage>` over the attempts that
            settled something (they do not depend on the window), `rejected/<why>` how many correct guided ones were not kept; `unused` and `unused_tokens` of those drawn beyond them, `aborted` ones
            that were stopped on the way, with the `aborted_tokens` drawn of them by then; `tokens_per_second` and `eta_seconds` (`None`
            until it can be told) of this process alone, without what a journal knew; `tokens_saved` of what K attempts for each problem
            and stage would have cost at the same mean length, after all tokens that were drawn in vain.
    """
    by_source = {str(source): counts[source] for source in Source}
    rows = sum(by_source.values())
    spent = counts["tokens"] + counts["unused_tokens"] + counts["aborted_tokens"]
    fixed_k_tokens = counts["fixed_k"] * counts["tokens"] / max(1, counts["sampled"])
    stages = [name.removesuffix("_sampled") for name in list(counts) if name.endswith("_sampled")]
    rate = drawn / max(seconds, 1e-9) if rate is None else rate
    return {
        "seconds": round(seconds, 2),
        "rows": rows,
        "total": total,
        **by_source,
        "sampled": counts["sampled"],
        "tokens": counts["tokens"],
        "drawn": drawn,
        "tokens_per_second": round(rate, 1),
        **{f"acceptance/{s}": round(counts[f"{s}_correct"] / max(1, counts[f"{s}_sampled"]), 4) for s in stages},
        **{f"rejected/{why}": counts[f"rejected_{why}"] for why in Rejection if counts[f"rejected_{why}"]},
        "truncated": counts["truncated"],
        **{f"truncated/{s}": round(counts[f"{s}_truncated"] / max(1, counts[f"{s}_sampled"]), 4) for s in stages},
        "timeouts": counts["verdict_timeout"],
        "errors": counts["verdict_error"],
        "sampling": sampling,
        "verifying": verifying,
        "eta_seconds": 0.0
        if rows == total
        else _seconds_left(counts, total - rows, seconds, sampling, drawn, rate, left),
        **{name: counts[name] for name in ("aborted", "aborted_tokens", "unused", "unused_tokens")},
        "tokens_saved": round(fixed_k_tokens - spent),
        "tokens_saved_share": round(1 - spent / fixed_k_tokens, 4) if fixed_k_tokens else 0.0,
    }


def _seconds_left(
    counts: Counter, rows_left: int, seconds: float, sampling: int, drawn: int, rate: float, left: float | None
) -> float | None:
    """The tokens that attempts to come will have, less those that are drawn of the ones under way, at the rate of late."""
    if not counts["finished_tokens"]:  # nothing is finished, or the server says no tokens: then by rows
        fresh = sum(counts[source] for source in Source) - counts["undrawn_rows"]
        return round(rows_left * seconds / fresh, 1) if fresh else None
    if left is None or not rate:
        return None
    under_way = max(0, drawn - counts["finished_tokens"] - counts["aborted_tokens"] + counts["earlier_aborted_tokens"])
    # The first to finish are the short ones: none that are under way will be shorter than they are on average by now.
    length = max(counts["finished_tokens"] / counts["finished"], under_way / max(1, sampling))
    return round(max(0.0, left * length - under_way) / rate, 1)


# Above this share of attempts that were cut, a run says so in a sentence; not before so many attempts are settled.
MOST_CUT, ENOUGH_ATTEMPTS = 0.25, 32


def cut_advice(counts: Mapping[str, int], limit: int, begun: bool = True) -> str | None:
    """
    What to raise, and to what, where more than a quarter of the attempts were cut; `None` where they were not.

    Beyond half the limit, attempts ended at some rate a token: `late_ends` of them in `late_tokens`. If that rate goes on beyond the
    limit, of those that were cut so many are still running after so many more tokens, and one in twenty of all would be cut at the
    limit that is named (the maximum-likelihood estimate for an exponential tail with censoring). Where none ended so late, it is four
    times the limit.

    Args:
        counts (`Mapping`): `sampled`, `truncated`, `late_ends` and `late_tokens` of a run.
        limit (`int`): Its `max_completion_length`.
        begun (`bool`, *optional*, defaults to `True`): Whether its `output_dir` has attempts, which another limit would not go on from.
    """
    sampled, cut = counts["sampled"], counts["truncated"]
    if cut <= MOST_CUT * sampled:
        return None
    told = f"{cut:,} of {sampled:,} attempts ({cut / sampled:.0%}) were cut at max_completion_length = {limit:,}, and what is cut is never kept"
    if counts["late_ends"]:
        enough = limit + math.log(cut / sampled / 0.05) * counts["late_tokens"] / counts["late_ends"]
        enough = 64 * math.ceil(enough / 64)
        told += f". Judging by the lengths of the others, about 5% would be cut at {enough:,}"
    else:
        enough = 4 * limit
        told += ". None of the others came near it, so how long these would have become cannot be told"
    elsewhere = " and another --output_dir (or --overwrite True, which deletes these attempts)" if begun else ""
    return f"{told}: run again with --max_completion_length {enough}{elsewhere}, if the model's context is that long."


class RunLog:
    """
    Writes [`status`] where someone looks.

    A thread of its own shows it again every second, so that it moves while an engine draws and nothing is finished.

    Args:
        path (`Path`, *optional*): `metrics.jsonl`; lines are appended.
        total (`int`): Rows of the run.
        resumed (`int`): Attempts that the journal holds already.
        limit (`int`): `max_completion_length`, for [`cut_advice`].
        counts (`Counter`): What is counted, elsewhere.
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
        limit: int,
        counts: Counter,
        drawn: Callable[[], int],
        wandb_run=None,
        every: float = 5.0,
    ):
        self.path, self.total, self.limit, self.every, self.wandb_run = path, total, limit, every, wandb_run
        self.counts, self.drawn = counts, drawn
        self.advised = False
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
            self.table.add_data(*(entry.get(name) for name in self.COLUMNS))

    def update(self, sampling: int, verifying: int, left: Callable[[], float]) -> None:
        """Shows what is counted, unless that was done a moment ago; `left` as in [`status`]."""
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
            counts = Counter(self.counts)  # as it is now: the main thread goes on counting
            sampling, verifying, left = self.under_way
            line = status(counts, self.total, now - self.began, sampling, verifying, drawn, rate, left)
            self.bar.n = line["rows"]
            self.bar.set_postfix_str(shown(line), refresh=False)
            self.bar.refresh()
            enough = counts["sampled"] >= ENOUGH_ATTEMPTS
            if not self.advised and enough and (advice := cut_advice(counts, self.limit)):
                self.advised = True
                self.bar.write(advice, file=sys.stderr)
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


def shown(line: dict) -> str:
    """What the status line says of a line of `metrics.jsonl`, the most important first: a narrow terminal cuts its end."""
    left = line["eta_seconds"]
    parts = [] if left is None else [f"{tqdm.format_interval(left)} left"]
    parts += [f"{line['drawn']:,} tokens", f"{line['tokens_per_second']:,.0f} tok/s"]
    parts += [f"{source} {line[source] / max(1, line['rows']):.1%}" for source in map(str, Source)]
    for stage in (name.removeprefix("acceptance/") for name in line if name.startswith("acceptance/")):
        cut = f", {line[f'truncated/{stage}']:.0%} cut" if line[f"truncated/{stage}"] else ""
        parts.append(f"{stage} accepts {line[f'acceptance/{stage}']:.0%}{cut}")
    rejected = [f"{line[f'rejected/{why}']:,} {why}" for why in Rejection if f"rejected/{why}" in line]
    parts += ["rejected: " + ", ".join(rejected)] if rejected else []
    parts += [f"{line['sampling']}+{line['verifying']} in flight", f"{line['sampled']:,} attempts"]
    parts += [f"saved {line['tokens_saved_share']:.0%} of fixed K"] if line["sampled"] else []
    parts += [f"{line[name]:,} {name}" for name in ("timeouts", "errors") if line[name]]
    return " · ".join(parts)


def aborted_before(path: Path) -> Counter:
    """What earlier processes of a run have drawn in vain of attempts that are in no journal, as `metrics.jsonl` says."""
    earlier: Counter = Counter()
    for line in path.read_text().splitlines()[-2:] if path.exists() else ():
        try:
            told = json.loads(line)
            earlier = Counter({name: int(told[name]) for name in ("aborted", "aborted_tokens")})
        except (ValueError, KeyError):  # torn by a kill, or written before these were counted
            continue
    earlier["earlier_aborted_tokens"] = earlier["aborted_tokens"]
    return earlier


@contextmanager
def wandb_run(report_to: str, directory: Path, job_type: str, config: dict, part: str = "") -> Iterator:
    """
    The W&B run in which a command that writes into `directory` logs; `None` unless `report_to` is `"wandb"`.

    A run that is open already is logged to and left open. One of our own goes on when the command is run again. It is in the group
    `WANDB_RUN_GROUP`, which ties rewrite, training and evaluation together, or by default in one named after `directory`.
    """
    if report_to != "wandb":
        yield None
        return
    import wandb

    if wandb.run is not None:
        yield wandb.run
        return
    group = wandb_group(directory)
    run_id = os.environ.get("WANDB_RUN_ID") or f"{_own_name(directory)}-{job_type}{part}"
    with wandb.init(id=run_id, name=run_id, group=group, job_type=job_type, config=config, resume="allow") as run:
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
        except OSError:  # a file system without links
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
    Pushes a run under way every so many rows, in a thread of its own and one at a time; a push that fails is said and tried again.

    Args:
        push (`Callable[[], object]`): Makes one push.
        every (`int`): Rows from one push to the next; 0 for none.
        token (`str`, *optional*): What is not to be seen in what is said.
    """

    def __init__(self, push: Callable[[], object], every: int, token: str | None = None):
        self.push, self.every, self.due, self.token = push, every, every, token
        self.pool, self.under_way = ThreadPoolExecutor(1, "push"), None

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
            told = redacted(f"{type(error).__name__}: {error}", self.token)
            warnings.warn(
                f"A push of the attempts so far failed ({told}); sampling goes on.",
                stacklevel=3,
            )
