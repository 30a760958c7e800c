"""What is seen of a run under way: the status line, `metrics.jsonl`, W&B, and a push every so many rows."""

import json
import math
import os
import re
import secrets
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm

from .redaction import redacted
from .rows import Source


def status(counts: Counter, total: int, seconds: float, sampling: int = 0, verifying: int = 0) -> dict:
    """
    One line of `metrics.jsonl`.

    Args:
        counts (`Counter`): What [`~scheduling.Scheduler`] and [`DataRewriter`] have counted so far.
        total (`int`): Rows of the run.
        seconds (`float`): Since this process began to sample.
        sampling (`int`, *optional*, defaults to `0`): Attempts with the engine.
        verifying (`int`, *optional*, defaults to `0`): Attempts waiting for their verdict.

    Returns:
        `dict`: `rows` and their number by source; `sampled`, `tokens`, `acceptance/<stage>` and `truncated/<stage>` over the attempts that
            settled something (they do not depend on the window); `unused` and `unused_tokens` of those drawn beyond them, `aborted` ones that were
            stopped in time; `tokens_per_second` and `eta_seconds` (`None` until it can be told) of this process alone, without what a
            journal knew; `tokens_saved` of what K attempts for each problem and stage would have cost at the same mean length.
    """
    by_source = {str(source): counts[source] for source in Source}
    rows = sum(by_source.values())
    fresh = rows - counts["undrawn_rows"]
    spent = counts["tokens"] + counts["unused_tokens"]
    fixed_k_tokens = counts["fixed_k"] * counts["tokens"] / max(1, counts["sampled"])
    stages = [name.removesuffix("_sampled") for name in counts if name.endswith("_sampled")]
    return {
        "seconds": round(seconds, 2),
        "rows": rows,
        "total": total,
        **by_source,
        "sampled": counts["sampled"],
        "tokens": counts["tokens"],
        "tokens_per_second": round(counts["drawn_tokens"] / max(seconds, 1e-9), 1),
        **{f"acceptance/{s}": round(counts[f"{s}_correct"] / max(1, counts[f"{s}_sampled"]), 4) for s in stages},
        "truncated": counts["truncated"],
        **{f"truncated/{s}": round(counts[f"{s}_truncated"] / max(1, counts[f"{s}_sampled"]), 4) for s in stages},
        "timeouts": counts["verdict_timeout"],
        "errors": counts["verdict_error"],
        "sampling": sampling,
        "verifying": verifying,
        "eta_seconds": round((total - rows) * seconds / fresh, 1) if fresh else 0.0 if rows == total else None,
        "aborted": counts["aborted"],
        "unused": counts["unused"],
        "unused_tokens": counts["unused_tokens"],
        "tokens_saved": round(fixed_k_tokens - spent),
        "tokens_saved_share": round(1 - spent / fixed_k_tokens, 4) if fixed_k_tokens else 0.0,
    }


# Above this share of attempts that were cut, a run says so in a sentence; not before so many attempts are settled.
MOST_CUT, ENOUGH_ATTEMPTS = 0.25, 32


def cut_advice(counts: Mapping[str, int], limit: int) -> str | None:
    """
    What to raise, and to what, where more than a quarter of the attempts were cut; `None` where they were not.

    Beyond half the limit, attempts ended at some rate a token: `late_ends` of them in `late_tokens`. If that rate goes on beyond the
    limit, of those that were cut so many are still running after so many more tokens, and one in twenty of all would be cut at the
    limit that is named (the maximum-likelihood estimate for an exponential tail with censoring). Where none ended so late, it is four
    times the limit.

    Args:
        counts (`Mapping`): `sampled`, `truncated`, `late_ends` and `late_tokens` of a run.
        limit (`int`): Its `max_completion_length`.
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
    return (
        f"{told}: run again with --max_completion_length {enough} and another --output_dir (or --overwrite True, which deletes these "
        "attempts), if the model's context is that long."
    )


class RunLog:
    """
    Writes [`status`] where someone looks.

    Args:
        path (`Path`): `metrics.jsonl`; lines are appended.
        total (`int`): Rows of the run.
        resumed (`int`): Attempts that the journal holds already.
        limit (`int`): `max_completion_length`, for [`cut_advice`].
        wandb_run (`wandb.Run`, *optional*): Gets the same lines, and the attempts as the table `attempts`.
        every (`float`, *optional*, defaults to `5.0`): Seconds between two lines of the file.
    """

    COLUMNS = ("id", "stage", "attempt", "verdict", "finish_reason", "num_tokens", "log_prob", "reason", "text")
    # A W&B table shows no more rows than this; the journal has them all.
    MAX_ATTEMPTS = 10_000

    def __init__(self, path: Path, total: int, resumed: int, limit: int, wandb_run=None, every: float = 5.0):
        self.path, self.total, self.limit, self.every, self.wandb_run = path, total, limit, every, wandb_run
        self.advised = False
        self.began = self.written = time.monotonic()
        self.shown = 0.0
        self.bar = tqdm(total=total, desc="rewriting", unit="row")
        if resumed:
            self.bar.write(f"resuming: {resumed:,} attempts are in the journal already", file=sys.stderr)
        if wandb_run is not None:
            import wandb

            self.table, self.logged = wandb.Table(list(self.COLUMNS), log_mode="INCREMENTAL"), 0

    def attempt(self, entry: dict) -> None:
        """Notes one line of the journal for the table."""
        if self.wandb_run is not None and len(self.table.data) < self.MAX_ATTEMPTS:
            self.table.add_data(*(entry.get(name) for name in self.COLUMNS))

    def update(self, counts: Counter, sampling: int = 0, verifying: int = 0, last: bool = False) -> None:
        now = time.monotonic()
        if now - self.shown < 0.1 and not last:
            return
        self.shown = now
        line = status(counts, self.total, now - self.began, sampling, verifying)
        rows = line["rows"]
        parts = [f"{source} {line[source] / max(1, rows):.1%}" for source in map(str, Source)]
        parts += [f"{line['tokens_per_second']:,.0f} tok/s", f"{line['sampled']:,} attempts"]
        for stage in (name.removeprefix("acceptance/") for name in line if name.startswith("acceptance/")):
            cut = f", {line[f'truncated/{stage}']:.0%} cut" if line[f"truncated/{stage}"] else ""
            parts.append(f"{stage} accepts {line[f'acceptance/{stage}']:.0%}{cut}")
        parts += [f"{sampling}+{verifying} in flight", f"saved {line['tokens_saved_share']:.0%} of fixed K"]
        parts += [f"{line[name]:,} {name}" for name in ("timeouts", "errors") if line[name]]
        self.bar.set_postfix_str(" · ".join(parts), refresh=False)
        self.bar.update(rows - self.bar.n)
        if not self.advised and counts["sampled"] >= ENOUGH_ATTEMPTS and (advice := cut_advice(counts, self.limit)):
            self.advised = True
            self.bar.write(advice, file=sys.stderr)
        if now - self.written < self.every and not last:
            return
        self.written = now
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.wandb_run is not None:
            # Each increment is a file of its own, so one is worth as many attempts as all before it.
            if len(self.table.data) > (self.logged if last else 2 * self.logged):
                self.wandb_run.log({"attempts": self.table}, commit=False)
                self.logged = len(self.table.data)
            self.wandb_run.log(line)
        if last:
            self.bar.close()


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
