"""Which attempt is drawn next, and when a problem is settled; knows neither engines nor files.

A problem's attempts are drawn in index order while other problems keep the engine full. Only where slots are left, and
the engine draws more tokens per second for it, does a problem get later attempts on speculation; as soon as one of its
attempts is correct, the higher ones are obsolete, the lower ones are waited for, and the lowest correct one is kept.
So the rows are those of drawing one attempt after another, whatever the order in which attempts finish; keeping the
first *finished* one instead would favour short answers.
"""

import math
import random
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np

from ..data.rows import Problem, Source, source_of
from ..runs.journal import Result
from ..runs.run_counts import RunCounts
from ..sampling.sampler import FAILED, attempt_seed
from .rewrite_config import RewriteConfig


class Outcome(NamedTuple):
    """
    What a problem became; `offset` is the place in the journal of the kept `attempt`, or -1; `self_…` are the numbers
    of the stage `self`, `reference` the place of the teacher's attempt that was retold, or -1, `others` the further candidates of a run that keeps all, the best first.
    """

    stage: str
    offset: int = -1
    num_sampled: int = 0
    num_correct: int = 0
    attempt: int = 0
    self_sampled: int = 0
    self_correct: int = 0
    reference: int = -1
    others: tuple["Outcome", ...] = ()

    @property
    def source(self) -> Source:
        return source_of(self.stage)


class Candidate(NamedTuple):
    """A correct attempt, and how many were made and were correct in its stage."""

    stage: str
    attempt: int
    result: Result
    num_sampled: int
    num_correct: int


@dataclass(slots=True, eq=False)
class ProblemState:
    """Where one unfinished problem stands."""

    row: int
    id: str
    problem: Problem | None  # `None` until it is drawn for, where the journal knows it
    known: dict[str, dict[int, Result]]  # by stage and attempt: what the journal holds of stages to come
    stage: int = -1
    results: dict[int, Result] = field(default_factory=dict)  # of this stage's attempts, by index
    in_flight: set[int] = field(default_factory=set)
    queued: bool = False
    sampled: bool = False  # whether this run draws for it, or the journal knows it all
    of_self: tuple[int, int] = (0, 0)  # attempts that the stage `self` took, and how many of them were correct
    candidates: list[Candidate] = field(default_factory=list)  # of all stages so far, where they compete
    reference: Candidate | None = None  # the teacher's solution that the guided stage retells
    shown: Problem | None = None  # the problem with that solution in the place of its demonstration, when it is known
    demonstration: Result | None = None  # the score of the demonstration, where it competes and that is known


@dataclass(frozen=True, slots=True)
class Draw:
    """One attempt to draw."""

    state: ProblemState
    stage: str
    attempt: int

    @property
    def id(self) -> str:
        return f"{self.state.id}/{self.stage}/{self.attempt}"


class Scheduler:
    """
    Hands out attempts ([`next`]) and takes verdicts ([`record`]) until every problem has its outcome.

    Args:
        problems (`Iterable[tuple[str, Problem | None, bool, dict]]`): Ids and problems in order, whether each can be
            sampled at all, and what [`~runs.run_memory.RunMemory`] has of it.
        total (`int`): How many they are.
        args ([`RewriteConfig`]): K, selection, seed and how far to speculate.
        counts ([`RunCounts`]): Where everything is counted; it names the stages.
    """

    def __init__(
        self,
        problems: Iterable[tuple[str, Problem | None, bool, dict]],
        total: int,
        args: RewriteConfig,
        counts: RunCounts,
    ):
        self.args, self.counts = args, counts
        self._fresh = enumerate(problems)
        self._stages = list(counts.stages)
        self._all_needed = args.selection != "first" or args.competes or args.keep == "all"
        self._ready: deque[ProblemState] = deque()
        self._open: OrderedDict[int, ProblemState] = OrderedDict()
        self._sources = [*self._stages, str(Source.EXPERT)]
        self._references: dict[int, int] = {}  # by row: the place of the teacher's attempt that it retells
        self._others: dict[int, array] = {}  # by row, of each further candidate: what an outcome has, five numbers
        numbers = ("num_sampled", "num_correct", "attempt", "self_sampled", "self_correct")
        types = [("stage", "u1"), ("offset", "i8"), *((name, "u2") for name in numbers)]
        self._outcomes = np.zeros(total, types)  # 19 bytes a row

    def outcome(self, row: int) -> Outcome:
        stage, *rest = self._outcomes[row].item()
        outcome = Outcome(self._sources[stage], *rest)._replace(reference=self._references.get(row, -1))
        more = iter(self._others.get(row, ()))
        others = (
            outcome._replace(
                stage=self._sources[stage], offset=offset, attempt=k, num_sampled=sampled, num_correct=correct
            )
            for offset, stage, k, sampled, correct in zip(*[more] * 5, strict=True)
        )
        return outcome._replace(others=tuple(others))

    def next(self, speculate: bool = True) -> Draw | None:
        """
        The next attempt: one that is due, else a fresh problem's first, else a speculative one if allowed; `None` if
        there is none.
        """
        while (state := self._due()) and not self._wanted(state):
            pass  # a refusal has ended its stage while it was queued
        if state is None and speculate:
            narrow = (p for p in self._open.values() if len(p.in_flight) < self.args.max_concurrent_attempts)
            state = next((p for p in narrow if self._wanted(p)), None)
            if state is not None:
                self._open.move_to_end(state.row)  # a second attempt for every problem before a third for any
        if state is None:
            return None
        attempt, *more = self._wanted(state)
        state.in_flight.add(attempt)
        state.sampled = True
        if more and self._all_needed:  # a prompt's attempts one after another: an engine's prefix cache likes that
            state.queued = True
            self._ready.appendleft(state)
        return Draw(state, self._stages[state.stage], attempt)

    @property
    def open_rows(self) -> int:
        """Problems that are begun and not settled: with `first`, how many attempts are needed now."""
        return len(self._open)

    def give_up(self) -> list[int]:
        """
        Settles the problems that have no outcome yet with their demonstrations; the rows of those that would have been
        drawn for.
        """
        late = list(self._open)
        for state in list(self._open.values()):
            self._settle(state, Outcome(Source.EXPERT))
        for row, (row_id, problem, can_be_sampled, known) in self._fresh:
            late += [row] if can_be_sampled else []
            self._open[row] = state = ProblemState(row, row_id, problem, known)
            self._settle(state, Outcome(Source.EXPERT))
        return late

    def attempts_left(self) -> float:
        """
        The attempts that are still to be drawn, those under way included, if each stage goes on accepting as many as
        so far.
        """
        most, counts = self.args.num_generations, self.counts
        rest = [0.0]  # of a problem that is through with all stages but the last 0, 1, …
        rates = []
        for stage in reversed(self._stages):
            rates.insert(0, (counts.stages[stage].correct + 1) / (counts.stages[stage].sampled + 2))
            rest.insert(0, self._expected(most, rates[0], rest[0]))
        left = (len(self._outcomes) - counts.rows.total() - len(self._open)) * rest[0]
        for state in self._open.values():
            if 0 <= state.stage < len(rates):
                tries = most - len(state.results)
                left += self._expected(tries, rates[state.stage], rest[state.stage + 1])
        return left

    def _expected(self, tries: int, rate: float, rest: float) -> float:
        """
        Attempts of a problem with so many tries at a stage, each of which succeeds at `rate`, and `rest` behind it if
        none does.
        """
        in_vain = (1 - rate) ** tries
        needed = tries if self._all_needed else (1 - in_vain) / rate
        return needed + (rest if self.args.competes else in_vain * rest)

    def _due(self) -> ProblemState | None:
        """A problem that waits for its next attempt, else a fresh one; `None` when all are under way or settled."""
        while not self._ready and (item := next(self._fresh, None)):
            row, (row_id, problem, can_be_sampled, known) = item
            state = ProblemState(row, row_id, problem, known)
            for result in known.get(Source.EXPERT, {}).values():
                state.demonstration = None if result.reference else result
            self._open[row] = state
            if can_be_sampled:
                self._enter_next_stage(state)
            else:
                self._settle(state, Outcome(Source.EXPERT))
        if not self._ready:
            return None
        state = self._ready.popleft()
        state.queued = False
        return state

    def record(self, draw: Draw, result: Result) -> list[str]:
        """Takes how an attempt ended and returns the ids of the attempts in flight that no longer matter."""
        state = draw.state
        if self._stage_name(state) != draw.stage or draw.attempt not in state.in_flight:
            self.counts.add_unused(result.num_tokens)  # it was obsolete before its verdict came
            return []
        state.in_flight.remove(draw.attempt)
        state.results[draw.attempt] = result
        horizon = self._horizon(state)
        obsolete = {k for k in state.in_flight if k >= horizon}
        state.in_flight -= obsolete
        self._advance(state)
        return [Draw(state, draw.stage, k).id for k in sorted(obsolete)]

    def _stage_name(self, state: ProblemState) -> str:
        return self._sources[state.stage]

    def _horizon(self, state: ProblemState) -> int:
        """One past the last attempt that can still matter."""
        for k in sorted(k for k in state.results if k < self.args.num_generations):  # a journal may hold more
            result = state.results[k]
            # A prompt that cannot be asked (beyond the context) can be asked no better at the next attempt.
            if result.finish_reason == "refused" or (result.accepted and not self._all_needed):
                return k + 1
        return self.args.num_generations

    def _wanted(self, state: ProblemState) -> list[int]:
        """
        The attempts that can still matter and are neither known nor under way, in the order in which they are due.
        """
        if state.stage == len(self._stages):
            return []
        known = state.results.keys() | state.in_flight
        return [k for k in range(self._horizon(state)) if k not in known]

    def _enter_next_stage(self, state: ProblemState) -> None:
        state.stage += 1
        if state.reference is not None:  # one teacher's solution is enough
            while source_of(self._stage_name(state)) == Source.TEACHER:
                state.stage += 1
        state.in_flight = set()
        known, shown = (
            state.known.pop(self._stage_name(state), {}),
            state.reference.result.reference if state.reference else 0,
        )
        if source_of(self._stage_name(state)) == Source.GUIDED:
            known = {k: result for k, result in known.items() if result.reference == shown}
        state.results = known
        self._advance(state)

    def _advance(self, state: ProblemState) -> None:
        """Settles the stage if all that matters is known; else sees to it that an attempt is drawn or under way."""
        if state.stage == len(self._stages):
            self._settle(state, *self._best(state))
            return
        horizon, stage, results = self._horizon(state), self._stage_name(state), state.results
        if any(k not in results for k in range(horizon)):
            if not state.queued and (self._all_needed or not state.in_flight) and self._wanted(state):
                state.queued = True
                self._ready.append(state)
            return
        counted = [results.pop(k) for k in range(horizon)]
        for result in results.values():
            self.counts.add_unused(result.num_tokens)
        for result in counted:
            self.counts.add(stage, result)
        self.counts.fixed_k += self.args.num_generations
        correct = [k for k, result in enumerate(counted) if result.accepted]
        numbers = sum(result.finish_reason not in FAILED for result in counted), len(correct)
        if stage == Source.SELF:
            state.of_self = numbers
            if len(correct) < self.args.min_correct:
                correct = []
        state.candidates += (Candidate(stage, k, counted[k], *numbers) for k in correct)
        if correct and source_of(stage) == Source.TEACHER and self.args.reference_from == "teacher":
            state.reference = state.candidates[
                ranked([counted[k] for k in correct], self.args.selection, (self.args.seed, state.id, stage, -1))[0]
            ]
            self._enter_next_stage(state)
        elif correct and not self.args.competes:
            self._settle(state, *self._ranked(state))
        else:
            self._enter_next_stage(state)

    def _ranked(self, state: ProblemState) -> list[Outcome]:
        """The candidates of a problem that are kept, the best first."""
        # Where a teacher's solution was retold, the retellings go before it.
        retold = [c for c in state.candidates if c.stage != state.reference.stage] if state.reference else []
        candidates = retold or state.candidates
        stage, results = candidates[0].stage, [candidate.result for candidate in candidates]
        selection = "max_log_prob" if self.args.competes else self.args.selection
        places = ranked(results, selection, (self.args.seed, state.id, stage, -1))
        places = places if self.args.keep == "all" else places[:1]
        found = [candidates[place] for place in places]
        return [Outcome(c.stage, c.result.offset, c.num_sampled, c.num_correct, c.attempt) for c in found]

    def _best(self, state: ProblemState) -> list[Outcome]:
        """What is kept of a problem that is through with all stages."""
        outcomes, expert, mean = self._ranked(state) if state.candidates else [], Outcome(Source.EXPERT), -math.inf
        if state.demonstration is not None:
            expert, mean = expert._replace(offset=state.demonstration.offset), _known(state.demonstration.initial_mean)
        means = {c.result.offset: _known(c.result.initial_mean) for c in state.candidates}
        # A demonstration that is likelier than some candidates stands before them; of equals, it comes last. Where it
        # does not compete, it is the last resort.
        better = [o for o in outcomes if means[o.offset] >= mean]
        experts = [expert] if self.args.competes or not outcomes else []
        return [*better, *experts, *outcomes[len(better) :]] if self.args.keep == "all" else [*better, *experts][:1]

    def _settle(self, state: ProblemState, outcome: Outcome, *others: Outcome) -> None:
        state.stage = len(self._stages)
        outcome = outcome._replace(self_sampled=state.of_self[0], self_correct=state.of_self[1])
        self._outcomes[state.row] = (self._sources.index(outcome.stage), *outcome[1:-2])
        if state.reference is not None and outcome.source == Source.GUIDED:
            self._references[state.row] = state.reference.result.offset
        if others:
            numbers = (
                (o.offset, self._sources.index(o.stage), o.attempt, o.num_sampled, o.num_correct) for o in others
            )
            self._others[state.row] = array("q", chain.from_iterable(numbers))
        self.counts.rows[outcome.stage] += 1
        self.counts.undrawn_rows += not state.sampled
        del self._open[state.row]


class Speculation:
    """
    How many attempts may be in flight, speculative ones included, so that each of them makes the engine draw more.

    Tokens per second are measured at each power of two in flight while the run goes. Beyond the attempts that are
    needed there may be twice as many where that many have not been tried, or where they were drawn at [`GAIN`] times
    the rate; and so on from there. An engine whose cores are full draws hardly more with twice as many, and each
    attempt that is needed would only take longer.

    Args:
        slots (`int`): How many the engine draws at a time.
        enough (`int`, *optional*, defaults to `32`): Tokens for each attempt in flight after which a rate is believed;
            many completions' worth where tokens are counted only when an attempt is finished.
    """

    GAIN = 1.2

    def __init__(self, slots: int, enough: int = 32):
        self.slots, self.enough = slots, enough
        self._last: tuple[int, float] | None = None
        self._measured: dict[int, list[float]] = {}  # tokens and seconds by the power of two

    def note(self, in_flight: int, drawn: int, now: float) -> None:
        """
        Takes how many tokens had been drawn at the time `now`, before which so many attempts were in flight since the
        last call.
        """
        before, self._last = self._last, (drawn, now)
        if before is None or not in_flight:
            return
        level = min(in_flight, self.slots).bit_length()
        measured = self._measured.setdefault(level, [0.0, 0.0])
        measured[0] += drawn - before[0]
        measured[1] += now - before[1]
        if measured[0] > 8 * self.enough * 2**level:  # what was long ago counts half
            measured[:] = (x / 2 for x in measured)

    def most(self, needed: int) -> int:
        """How many may be in flight while so many of them are needed, as far as they are known to be."""
        needed = max(1, needed)  # an engine without anything to do may always be given something
        level = min(needed, self.slots).bit_length()
        while needed < self.slots and (rate := self._rate(level)):
            further = self._rate(level + 1)
            if further is not None and further < self.GAIN * rate:
                break
            needed, level = 2 * needed, level + 1
        return min(needed, self.slots)

    def _rate(self, level: int) -> float | None:
        tokens, seconds = self._measured.get(level, (0.0, 0.0))
        return tokens / seconds if tokens >= self.enough * 2 ** (level - 1) and seconds > 0 else None


def _known(mean: float) -> float:
    """A candidate that could not be scored comes last."""
    return -math.inf if math.isnan(mean) else mean


def ranked(correct: list[Result], selection: str, key: tuple) -> list[int]:
    """
    The places of the `correct` attempts, which are in index order, the one that is to be kept first; `key` is what
    [`attempt_seed`] takes.
    """
    places = list(range(len(correct)))
    if selection == "max_log_prob":  # of equals the lowest index first, and those that could not be scored last
        return sorted(places, key=lambda place: -_known(correct[place].initial_mean))
    if selection == "random":
        rng = random.Random(attempt_seed(*key))
        return [places.pop(rng.randrange(len(places))) for _ in correct]
    return places
