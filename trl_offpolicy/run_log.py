"""The status line of a rewrite, and the same numbers in `metrics.jsonl` and W&B every few seconds."""

import json
import sys
import time
from collections import Counter
from pathlib import Path

from tqdm.auto import tqdm

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
        `dict`: `rows` and their number by source; `sampled`, `tokens` and `acceptance/<stage>` over the attempts that settled something
            (they do not depend on the window); `unused` and `unused_tokens` of those drawn beyond them, `aborted` ones that were
            stopped in time; `tokens_per_second` and `eta_seconds` (`None` until it can be told) of this process alone, without what a
            journal knew; `tokens_saved` of what K attempts for each problem and stage would have cost at the same mean length.
    """
    by_source = {str(source): counts[source] for source in Source}
    rows = sum(by_source.values())
    fresh = rows - counts["rows_from_journal"]
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


class RunLog:
    """
    Writes [`status`] where someone looks.

    Args:
        path (`Path`): `metrics.jsonl`; lines are appended.
        total (`int`): Rows of the run.
        resumed (`int`): Attempts that the journal holds already.
        report_to (`str`): `"wandb"` or `"none"`.
        config (`dict`): Configuration of the W&B run.
        every (`float`, *optional*, defaults to `5.0`): Seconds between two lines of the file.
    """

    def __init__(self, path: Path, total: int, resumed: int, report_to: str, config: dict, every: float = 5.0):
        self.path, self.total, self.every = path, total, every
        self.began = self.written = time.monotonic()
        self.shown = 0.0
        self.bar = tqdm(total=total, desc="rewriting", unit="row")
        if resumed:
            self.bar.write(f"resuming: {resumed:,} attempts are in the journal already", file=sys.stderr)
        self.wandb = self.own_run = None
        if report_to == "wandb":
            import wandb

            self.wandb = wandb
            if wandb.run is None:  # someone else's run is logged to and left open
                self.own_run = wandb.init(name=str(path.parent), config=config)

    def update(self, counts: Counter, sampling: int = 0, verifying: int = 0, last: bool = False) -> None:
        now = time.monotonic()
        if now - self.shown < 0.1 and not last:
            return
        self.shown = now
        line = status(counts, self.total, now - self.began, sampling, verifying)
        rows = line["rows"]
        parts = [f"{source} {line[source] / max(1, rows):.1%}" for source in map(str, Source)]
        parts += [f"{line['tokens_per_second']:,.0f} tok/s", f"{line['sampled']:,} attempts"]
        parts += [f"{name.removeprefix('acceptance/')} accepts {line[name]:.0%}" for name in line if "/" in name]
        parts += [f"{sampling}+{verifying} in flight", f"saved {line['tokens_saved_share']:.0%} of fixed K"]
        parts += [f"{line[name]:,} {name}" for name in ("truncated", "timeouts", "errors") if line[name]]
        self.bar.set_postfix_str(" · ".join(parts), refresh=False)
        self.bar.update(rows - self.bar.n)
        if now - self.written < self.every and not last:
            return
        self.written = now
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.wandb is not None:
            self.wandb.log(line)
        if last:
            self.bar.close()
            if self.own_run is not None:
                self.own_run.finish()
