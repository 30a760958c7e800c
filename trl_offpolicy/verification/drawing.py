"""
The loop that a rewrite, an evaluation and a judge share: requests go to engines, completions to a verifier, and come
back judged.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from ..sampling.sampler import FAILED, Completion, Request, Sampler, SamplerError
from .verdict_queue import Judged, VerdictQueue
from .verifier import Verifier


class Asked(NamedTuple):
    """A request, whose it is (`item`), the engine that draws it, and what its completion is compared with."""

    item: Any
    request: Request
    sampler: Sampler
    answer: Any = None
    row: dict | None = None


class Drawing:
    """
    Requests under way, and their completions on the way to a verdict.

        with Drawing(verifier, sampler) as drawing:
            while drawing.submit(requests):
                for judged, entry in drawing.judged(write_down): ...

    An exception that leaves the `with` block aborts what is under way: the next run on the same engine must not be
    given it.

    Args:
        verifier ([`~verification.verifier.Verifier`]): `None` if the completions are wanted without verdicts.
        sampler ([`~sampling.sampler.Sampler`]): The engine that is kept busy, to its capacity.
        *others ([`~sampling.sampler.Sampler`]): Further ones that draw some of the requests.
        counts (`Counter`, *optional*): Takes `finished`, `aborted` and `unused` completions and their tokens.
        over (`Callable[[], bool]`, *optional*): Becomes true when no more is to be drawn; the engines ask it too.
    """

    def __init__(
        self,
        verifier: Verifier | None,
        sampler: Sampler,
        *others: Sampler,
        counts: Counter | None = None,
        over: Callable[[], bool] = lambda: False,
    ):
        self.samplers, self.capacity, self.over = (sampler, *others), sampler.capacity, over
        for engine in self.samplers:
            engine.over = over
        self.counts = Counter() if counts is None else counts
        self._verdicts = VerdictQueue(verifier, min(sampler.capacity, 2 * sampler.slots))
        self._sampling: dict[str, Asked] = {}
        self._aborted: dict[str, int] = {}  # request id → tokens that the engine counted when it was aborted
        self._drawn_before = self._total_tokens()

    def __enter__(self):
        self._verdicts.__enter__()
        return self

    def __exit__(self, kind, error, traceback):
        try:
            for asked in self._sampling.values() if error is not None else ():
                asked.sampler.abort(asked.request.id)
        except Exception as another:  # for example because the engine is dead
            raise error from another
        finally:
            self._verdicts.__exit__(kind, error, traceback)

    @property
    def sampling(self) -> int:
        """How many requests are at the engines."""
        return len(self._sampling)

    @property
    def verifying(self) -> int:
        """How many completions have no verdict yet."""
        return len(self._verdicts)

    def submit(self, requests: Iterator[Asked]) -> bool:
        """Submits as many of the `requests` as there is room for; whether anything is under way then."""
        # One that waits for its verdict leaves its place to another one. How many there are may depend on those that
        # were submitted.
        for asked in islice(requests, self.capacity - self.sampling):
            self._sampling[asked.request.id] = asked
            asked.sampler.submit(asked.request)
        return bool(self._sampling or self._verdicts)

    def judged(self, record: Callable[[list[Judged]], Iterable] = lambda batch: batch) -> Iterator[tuple[Judged, Any]]:
        """
        Waits until something is finished; what has its verdict then, and what `record` makes of each of them. When an
        engine fails, all that was drawn before still gets its verdict and is recorded.

        Raises:
            SamplerError: An engine cannot go on.
            RuntimeError: An engine returned nothing, or what it was not asked for.
        """
        hurry = self.sampling < self.capacity
        try:
            for asked, completion in [] if self._verdicts.full else self._finished():
                self._verdicts.put(asked.item, completion, asked.answer, asked.row)
        except SamplerError:
            record(list(self._verdicts.drain()))
            raise
        batch = self._verdicts.take(hurry, wait=self._verdicts.full or not self._sampling)
        yield from zip(batch, record(batch), strict=True)

    def abort(self, request_id: str) -> None:
        """Forgets a request, unless it is finished: then it is paid for and being verified."""
        if asked := self._sampling.pop(request_id, None):
            self._aborted[request_id] = tokens = asked.sampler.abort(request_id) or 0
            self.counts.update({"aborted": 1, "aborted_tokens": tokens})

    def give_up(self) -> Iterator[Judged]:
        """Forgets the requests that are at the engines, and waits for the verdicts on what these have finished."""
        for request_id in list(self._sampling):
            self.abort(request_id)
        return self._verdicts.drain()

    def drawn_tokens(self) -> int:
        """
        Tokens that the engines have drawn since this was made. Where one does not see them as they are drawn, those of
        finished requests, and what it says of aborted ones.
        """
        return self._total_tokens() - self._drawn_before

    def _total_tokens(self) -> int:
        seen = [sampler.drawn_tokens for sampler in self.samplers]
        return self.counts["finished_tokens"] + self.counts["aborted_tokens"] if None in seen else sum(seen)

    def _finished(self) -> Iterator[tuple[Asked, Completion]]:
        """
        What each engine with requests under way has finished; an aborted one that it returns all the same is only
        counted.
        """
        for sampler in self.samplers:
            # With one engine the first request settles it: this runs at each of its steps.
            if not any(asked.sampler is sampler for asked in self._sampling.values()):
                continue
            completions = sampler.poll()
            if not completions and not self.over():
                raise RuntimeError(f"{sampler.name}: the sampler has requests under way but returned none of them.")
            for completion in completions:
                tokens = len(completion.completion_ids)
                self.counts.update({"finished": completion.finish_reason not in FAILED, "finished_tokens": tokens})
                if completion.id in self._sampling:
                    yield self._sampling.pop(completion.id), completion
                elif completion.id in self._aborted:
                    counted = self._aborted.pop(completion.id)
                    self.counts.update(
                        {"aborted": -1, "aborted_tokens": -counted, "unused": 1, "unused_tokens": tokens}
                    )
                else:
                    raise RuntimeError(
                        f"{sampler.name}: the sampler returned {completion.id!r}, which it was not asked for, or twice."
                    )
