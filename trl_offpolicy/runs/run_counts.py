"""
What is counted of a run, in one place: for `metrics.json`, `metrics.jsonl`, the status line, the summary at its end
and the card.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from ..data.rows import REJECTIONS, Rejection, Source, Verdict, source_of, sources_of
from ..sampling.sampler import FAILED
from .journal import Attempt, Result


@dataclass(slots=True)
class StageCounts:
    """The attempts of one stage."""

    sampled: int = 0  # less those that the engine failed at
    correct: int = 0  # less those that were rejected all the same
    truncated: int = 0
    tokens: int = 0
    verdicts: Counter = field(default_factory=Counter)
    rejected: Counter = field(default_factory=Counter)
    problems: set[str] = field(default_factory=set)  # their ids, where someone wants to know


class RunCounts:
    """
    The counts of a run. Attempts up to the one that settled a problem's stage ([`add`]) do not depend on the order of
    things; what was drawn beyond them depends on the engine's speed, and is counted apart (`unused`, `aborted`).

    Args:
        stages (`Iterable[str]`): Names of the stages.
        limit (`int`): `max_completion_length`.
    """

    def __init__(self, stages: Iterable[str], limit: int):
        self.limit = limit
        self.stages = {stage: StageCounts() for stage in stages}
        self.fixed_k = 0  # what the usual script draws: K for every problem that reaches a stage
        self.late_ends = self.late_tokens = 0  # see `cut_advice`
        self.undrawn = 0  # attempts that a row lacks, and that the same run again may draw
        self.rows: Counter = Counter()  # that are settled, by the stage that gave them, or `expert`
        self.undrawn_rows = 0  # of these, those for which this process drew nothing
        self.golds: Counter = Counter()  # gold answers that cannot be compared with, by verdict
        self.drawn = self.failed = 0  # attempts that this process has journaled
        # Attempts that are `finished`, `unused` and `aborted`, and their tokens, as [`~verification.drawing.Drawing`]
        # counts them; `earlier_aborted_tokens` are those of processes before this one.
        self.engine: Counter = Counter()

    # ---- counting ----

    def add(self, stage: str, attempt: Result | Attempt) -> None:
        """Counts an attempt that a stage of its problem needed."""
        counts, tokens, finish_reason = self.stages[stage], attempt.num_tokens, attempt.finish_reason
        counts.verdicts[attempt.verdict] += 1
        counts.tokens += tokens
        if finish_reason not in FAILED:
            counts.sampled += 1
        elif finish_reason == "error":
            self.undrawn += 1
        if finish_reason == "length":
            counts.truncated += 1
        if attempt.rejected:
            counts.rejected[attempt.rejected] += 1
        elif attempt.verdict == Verdict.CORRECT:
            counts.correct += 1
        if (late := tokens - self.limit // 2) > 0:
            self.late_tokens += late
            self.late_ends += finish_reason == "stop"

    def add_unused(self, tokens: int) -> None:
        """Counts an attempt that was drawn though none needed it any more."""
        self.engine["unused"] += 1
        self.engine["unused_tokens"] += tokens

    def recall_aborted(self, path: Path) -> None:
        """
        Adds what earlier processes of the run have drawn of attempts that are in no journal, as its `metrics.jsonl`
        says.
        """
        for line in path.read_text().splitlines()[-2:] if path.exists() else ():
            try:
                entry = json.loads(line)
                self.engine["aborted"], self.engine["aborted_tokens"] = (
                    int(entry["aborted"]),
                    int(entry["aborted_tokens"]),
                )
            except (ValueError, KeyError):  # torn by a kill, or written before these were counted
                continue
        self.engine["earlier_aborted_tokens"] = self.engine["aborted_tokens"]

    # ---- what they come to ----

    def total(self, name: str) -> int:
        """A field of [`StageCounts`], of all stages."""
        return sum(getattr(counts, name) for counts in self.stages.values())

    def by(self, name: str, key: str) -> int:
        """How many attempts have this key in `verdicts` or `rejected`, of all stages."""
        return sum(getattr(counts, name)[key] for counts in self.stages.values())

    @property
    def by_source(self) -> dict[str, int]:
        rows = {str(source): 0 for source in sources_of(self.stages)}
        for stage, number in self.rows.items():
            rows[source_of(stage)] += number
        return rows

    @property
    def sampling(self) -> dict[str, int]:
        return {
            "sampled": self.total("sampled"),
            "fixed_k_equivalent": self.fixed_k,
            "tokens": self.total("tokens"),
            "truncated": self.total("truncated"),
            "late_ends": self.late_ends,
            "late_tokens": self.late_tokens,
        }

    def metrics(self) -> dict:
        """What a finished run says of them in `metrics.json`."""
        return {
            "yield": {**self.by_source, "total": self.rows.total()},
            "gold_unparsable": self.golds[Verdict.UNPARSABLE],
            "gold_not_told": self.golds[Verdict.TIMEOUT] + self.golds[Verdict.ERROR],
            "failed": self.failed,
            "undrawn": self.undrawn,
            "sampling": self.sampling,
            "stages": {
                stage: {
                    **{name: getattr(counts, name) for name in ("sampled", "correct", "truncated")},
                    "rows": self.rows[stage],
                }
                for stage, counts in self.stages.items()
            },
            # Beyond the attempts that settled something; this depends on the engine's speed, the numbers above do not.
            "speculation": {
                name: self.engine[name] for name in ("unused", "unused_tokens", "aborted", "aborted_tokens")
            },
            "verdicts": {str(verdict): self.by("verdicts", verdict) for verdict in Verdict},
            # Of the correct ones; `stages` does not count them as correct.
            "rejected": {str(why): self.by("rejected", why) for why in Rejection},
        }

    def status(
        self,
        total: int,
        seconds: float,
        sampling: int = 0,
        verifying: int = 0,
        drawn: int = 0,
        rate: float | None = None,
        left: float | None = None,
    ) -> dict:
        """
        One line of `metrics.jsonl`: `rows` and their number by source; `sampled`, `tokens`, `acceptance/<stage>` and
        `truncated/<stage>` over the attempts that settled something, `rejected/<why>` how many correct guided ones
        were not kept; `unused` and `unused_tokens` of those drawn beyond them, `aborted` ones that were stopped on the
        way, with the `aborted_tokens` drawn of them by then; `drawn` tokens, `tokens_per_second` and `eta_seconds`
        (`None` until it can be told) of this process alone, without what a journal knew; `tokens_saved` of what K
        attempts for each problem and stage would have cost at the same mean length, after all tokens that were drawn
        in vain.

        Args:
            total (`int`): Rows of the run.
            seconds (`float`): Since this process began to sample.
            sampling, verifying (`int`, *optional*): Attempts with the engine, and those that wait for their verdict.
            drawn (`int`, *optional*): Tokens that this process has drawn, those of attempts under way included.
            rate (`float`, *optional*): Tokens drawn per second of late; by default since the beginning.
            left (`float`, *optional*): Attempts still to be drawn, those under way included
                ([`~rewriting.scheduler.Scheduler.attempts_left`]).
        """
        by_source, sampled, tokens = self.by_source, self.total("sampled"), self.total("tokens")
        rows = sum(by_source.values())
        spent = tokens + self.engine["unused_tokens"] + self.engine["aborted_tokens"]
        fixed_k_tokens = self.fixed_k * tokens / max(1, sampled)
        reached = {stage: counts for stage, counts in self.stages.items() if counts.verdicts}
        rejected = {f"rejected/{why}": self.by("rejected", why) for why in Rejection}
        rate = drawn / max(seconds, 1e-9) if rate is None else rate
        return {
            "seconds": round(seconds, 2),
            "rows": rows,
            "total": total,
            **by_source,
            "sampled": sampled,
            "tokens": tokens,
            "drawn": drawn,
            "tokens_per_second": round(rate, 1),
            **{f"acceptance/{stage}": round(of.correct / max(1, of.sampled), 4) for stage, of in reached.items()},
            **{name: number for name, number in rejected.items() if number},
            "truncated": self.total("truncated"),
            **{f"truncated/{stage}": round(of.truncated / max(1, of.sampled), 4) for stage, of in reached.items()},
            "timeouts": self.by("verdicts", Verdict.TIMEOUT),
            "errors": self.by("verdicts", Verdict.ERROR),
            "sampling": sampling,
            "verifying": verifying,
            "eta_seconds": 0.0 if rows == total else self._eta(rows, total, seconds, sampling, drawn, rate, left),
            **{name: self.engine[name] for name in ("aborted", "aborted_tokens", "unused", "unused_tokens")},
            "tokens_saved": round(fixed_k_tokens - spent),
            "tokens_saved_share": round(1 - spent / fixed_k_tokens, 4) if fixed_k_tokens else 0.0,
        }

    def _eta(
        self, rows: int, total: int, seconds: float, sampling: int, drawn: int, rate: float, left: float | None
    ) -> float | None:
        """
        The tokens that attempts to come will have, less those that are drawn of the ones under way, at the rate of
        late.
        """
        finished = self.engine["finished_tokens"]
        if not finished:  # nothing is finished, or the server reports no tokens: estimated by rows
            fresh = rows - self.undrawn_rows
            return round((total - rows) * seconds / fresh, 1) if fresh else None
        if left is None or not rate:
            return None
        aborted = self.engine["aborted_tokens"] - self.engine["earlier_aborted_tokens"]
        under_way = max(0, drawn - finished - aborted)
        # The first to finish are the short ones: none that are under way will be shorter than they are on average by
        # now.
        length = max(finished / self.engine["finished"], under_way / max(1, sampling))
        return round(max(0.0, left * length - under_way) / rate, 1)


def summed(metrics: list[dict]) -> dict:
    """The `metrics.json` of a run from those of its shards: the sum of nested counts."""
    return {
        k: summed([m.get(k, {}) for m in metrics])
        if isinstance(v, dict)
        else round(sum(m.get(k, 0) for m in metrics), 2)
        for k, v in metrics[0].items()
    }


# ---- in words ----


def shown(line: dict) -> str:
    """
    What the status line says of a line of `metrics.jsonl`, the most important first: a narrow terminal cuts its end.
    """
    left = line["eta_seconds"]
    parts = [] if left is None else [f"{tqdm.format_interval(left)} left"]
    parts += [f"{line['drawn']:,} tokens", f"{line['tokens_per_second']:,.0f} tok/s"]
    parts += [f"{source} {line[source] / max(1, line['rows']):.1%}" for source in map(str, Source) if source in line]
    for stage in (name.removeprefix("acceptance/") for name in line if name.startswith("acceptance/")):
        cut = f", {line[f'truncated/{stage}']:.0%} cut" if line[f"truncated/{stage}"] else ""
        parts.append(f"{stage} accepts {line[f'acceptance/{stage}']:.0%}{cut}")
    rejected = [f"{line[f'rejected/{why}']:,} {why}" for why in Rejection if f"rejected/{why}" in line]
    parts += ["rejected: " + ", ".join(rejected)] if rejected else []
    parts += [f"{line['sampling']}+{line['verifying']} in flight", f"{line['sampled']:,} attempts"]
    parts += [f"saved {line['tokens_saved_share']:.0%} of fixed K"] if line["sampled"] else []
    parts += [f"{line[name]:,} {name}" for name in ("timeouts", "errors") if line[name]]
    return " · ".join(parts)


# Above this share of attempts that were cut, a run says so in a sentence; not before so many attempts are settled.
MOST_CUT, ENOUGH_ATTEMPTS = 0.25, 32


def cut_advice(sampling: Mapping[str, int], limit: int, begun: bool = True) -> str | None:
    """
    What to raise, and to what, where more than a quarter of the attempts were cut; `None` where they were not.

    Beyond half the limit, attempts ended at some rate a token: `late_ends` of them in `late_tokens`. If that rate goes
    on beyond the limit, of those that were cut so many are still running after so many more tokens, and one in twenty
    of all would be cut at the limit that is named (the maximum-likelihood estimate for an exponential tail with
    censoring). Where none ended so late, it is four times the limit.

    Args:
        sampling (`Mapping`): `sampled`, `truncated`, `late_ends` and `late_tokens` of a run ([`RunCounts.sampling`]).
        limit (`int`): Its `max_completion_length`.
        begun (`bool`, *optional*, defaults to `True`): Whether its `output_dir` has attempts, which another limit
            would not go on from.
    """
    sampled, cut = sampling["sampled"], sampling["truncated"]
    if cut <= MOST_CUT * sampled:
        return None
    sentence = f"{cut:,} of {sampled:,} attempts ({cut / sampled:.0%}) were cut at max_completion_length = {limit:,}, and what is cut is never kept"
    if sampling["late_ends"]:
        enough = limit + math.log(cut / sampled / 0.05) * sampling["late_tokens"] / sampling["late_ends"]
        enough = 64 * math.ceil(enough / 64)
        sentence += f". Judging by the lengths of the others, about 5% would be cut at {enough:,}"
    else:
        enough = 4 * limit
        sentence += ". None of the others came near it, so how long these would have become cannot be told"
    elsewhere = " and another --output_dir (or --overwrite True, which deletes these attempts)" if begun else ""
    return (
        f"{sentence}: run again with --max_completion_length {enough}{elsewhere}, if the model's context is that long."
    )


def summary(metrics: dict, limit: int, advice: str | None = None) -> Iterator[str]:
    """
    The lines that a finished run ends with: its `metrics.json`, `limit` being its `max_completion_length`, in words.
    The `advice` that it has just given on cut attempts is not given again; other figures are, of a run that went on.
    """
    counts = dict(metrics["yield"])
    total = counts.pop("total")
    what = f"{total:,} rows: "
    if several := metrics.get("rows"):
        counts, what = several, f"{sum(several.values()):,} rows of {total:,} problems: "
        total = sum(several.values())
    yield what + ", ".join(f"{n:,} {source} ({n / max(1, total):.1%})" for source, n in counts.items())
    if unsolved := metrics.get("unsolved"):
        yield f"{unsolved:,} problems have no correct attempt and no demonstration, so no row: unsolved.jsonl lists them"
    sampling, unused = metrics["sampling"], metrics["speculation"]
    in_vain, tokens_in_vain = unused["unused"] + unused["aborted"], unused["unused_tokens"] + unused["aborted_tokens"]
    yield (
        f"{sampling['sampled']:,} attempts, {sampling['tokens']:,} tokens; fixed K would have drawn {sampling['fixed_k_equivalent']:,} attempts"
        + (f"; in vain {in_vain:,} more, {tokens_in_vain:,} tokens" if in_vain or tokens_in_vain else "")
    )
    for stage, of_stage in metrics["stages"].items():
        drawn = max(1, of_stage["sampled"])
        shares = f"{of_stage['correct'] / drawn:.1%} accepted, {of_stage['truncated'] / drawn:.1%} cut"
        if of_stage.get("ngrams"):
            shares += f"; {of_stage['copied'] / of_stage['ngrams']:.1%} of its rows' 4-grams are the reference's"
        yield f"  {stage}: {of_stage['sampled']:,} attempts, {shares}"
    if (final := cut_advice(sampling, limit)) and final != advice:
        yield final
    if rejected := {REJECTIONS[why]: n for why, n in metrics["rejected"].items() if n}:
        named = ", ".join(f"{n:,} {what}" for what, n in rejected.items())
        yield f"correct guided attempts that were not kept: {named} (which, in the journal)"
    experts = metrics["expert_format"]
    if experts["boxed"] or experts["marks_removed"]:
        yield (
            f"expert rows, as their prompts ask: {experts['boxed']:,} final answers put into \\boxed{{}}, calculator marks taken out of "
            f"{experts['marks_removed']:,} (--expert_format keep leaves demonstrations as they are)"
        )
    if experts["not_as_asked"]:
        yield f"{experts['not_as_asked']:,} expert rows have no \\boxed{{}}, though their prompts ask for it"
    for name, what in (
        ("gold_unparsable", "rows have no gold answer that can be compared with: kept as expert, not sampled"),
        ("gold_not_told", "gold answers could not be checked (time-outs, errors): kept as expert, not sampled"),
        ("failed", "attempts could not be drawn (reasons in the journal)"),
    ):
        if metrics[name]:
            yield f"{metrics[name]:,} {what}"
    if replay := metrics.get("replay"):
        why = ", ".join(f"{number:,} {name}" for name, number in replay.items() if number and name != "rows")
        yield f"{replay['rows']:,} replay rows: replay/, and together with the rows with_replay/" + (
            f" (left out: {why})" if why else ""
        )
    trouble = [f"{metrics['verdicts'][name]:,} {name}" for name in ("timeout", "error") if metrics["verdicts"][name]]
    if trouble:
        yield f"attempts that could not be judged: {', '.join(trouble)} (reasons in the journal)"
