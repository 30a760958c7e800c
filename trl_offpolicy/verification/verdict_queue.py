"""
What an engine has drawn and its verdicts, beside the sampling: rewriting and evaluation both wait for no verifier.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..data.redaction import brief
from ..data.rows import Verdict
from ..sampling.sampler import Completion, SamplerError
from .verifier import Judgement, Verifier, explain_with


BATCH = 32  # completions with which a verifier is called at least, as long as the engine has enough to do ...
HOLD = 0.25  # ... and seconds for which the first of them may wait for the others
HOPELESS = 100  # failures in a row after which an engine that has drawn nothing yet is given up


class Judged(NamedTuple):
    """
    A completion with its verdict, the reason for it, and whether that is the gold answer; `item` is what it was put in
    with.
    """

    item: Any
    completion: Completion
    verdict: Verdict | None
    reason: str
    gold_at_fault: bool = False


class VerdictQueue:
    """
    Calls a verifier in a thread of its own: what is [`put`] comes out of [`take`] with its verdict, in the same order.

    Verdicts are asked for many at a time: an engine in this process has to hand over the interpreter at each call.

    Args:
        verifier ([`~verification.verifier.Verifier`]): It is closed if the `with` block is left by an exception, which
            would else have to wait for what is being verified. `None`: completions come out as they are, without a
            verdict.
        limit (`int`): How many completions may be without a verdict.
    """

    def __init__(self, verifier: Verifier | None, limit: int):
        self.verifier, self.limit = verifier, limit
        self.batch = max(BATCH, 4 * verifier.num_workers) if verifier else BATCH
        self._untaken = 0
        self._failed, self._drawn = 0, False
        self._changed = threading.Condition()  # guards what follows
        self._waiting: list[tuple[Any, Completion, str, dict]] = []
        self._judged: list[Judged] = []
        self._hurry, self._closed = False, False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="verify", daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, kind, *_):
        if kind is not None and self.verifier is not None:
            self.verifier.close()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def __len__(self) -> int:
        """Completions that were put in and not yet taken."""
        return self._untaken

    @property
    def full(self) -> bool:
        """
        Whether a slow verifier should hold the engine back: what has no verdict is in no journal, and lost with a
        killed process.
        """
        return self._untaken >= self.limit

    def put(self, item, completion: Completion, answer, row: dict | None = None) -> None:
        """
        Takes a completion with the gold answer and the other columns of its `row`. Raises `SamplerError` when the
        engine has failed at everything so far, or a log-prob is not a number.
        """
        self._drawn |= completion.finish_reason != "error"
        self._failed += completion.finish_reason == "error"
        if self._failed == HOPELESS and not self._drawn:
            raise SamplerError(f"not one of the first {HOPELESS} requests succeeded; the last one: {completion.error}")
        if any(x != x for x in completion.log_probs):
            raise SamplerError(
                f"{completion.id} was drawn from logits that are not numbers (NaN). Has the training that made this model diverged, or do its "
                "activations overflow in float16? Then use --dtype bfloat16 or float32."
            )
        self._untaken += 1
        with self._changed:
            if self.verifier is None:
                self._judged.append(Judged(item, completion, None, ""))
                return
            self._waiting.append((item, completion, answer, row or {}))
            if len(self._waiting) >= self.batch:
                self._changed.notify_all()

    def take(self, hurry: bool = False, wait: bool = False) -> list[Judged]:
        """
        Whatever has its verdict by now.

        Args:
            hurry (`bool`, *optional*, defaults to `False`): Whether the verifier is called at once from now on, and
                not when there is a batch: an engine without enough to do waits for what the verdicts let be drawn.
            wait (`bool`, *optional*, defaults to `False`): Whether to wait for a verdict if there is none and one is
                to come.

        Raises:
            Exception: What the verifier raised.
        """
        with self._changed:
            self._hurry = hurry or wait
            if self._hurry and self._waiting:
                self._changed.notify_all()
            if wait and self._untaken:
                self._changed.wait_for(lambda: self._judged or self._error)
            if self._error and not self._judged:
                raise self._error
            judged, self._judged = self._judged, []
        self._untaken -= len(judged)
        return judged

    def drain(self) -> Iterator[Judged]:
        """
        All that has no verdict yet, as the verdicts come: for an engine that has failed, whose completions are paid
        for.
        """
        while self._untaken:
            yield from self.take(wait=True)

    def _due(self) -> bool:
        return self._closed or len(self._waiting) >= (1 if self._hurry else self.batch)

    def _serve(self) -> None:
        while not self._closed:
            with self._changed:
                self._changed.wait_for(self._due, HOLD)
                if self._closed or not self._waiting:
                    continue
                # Of a slow verifier's backlog no more than is worth a call: a verdict is in no journal before the call
                # is over.
                batch, self._waiting = self._waiting[: self.batch], self._waiting[self.batch :]
            try:
                _, completions, answers, rows = zip(*batch, strict=True)
                judgements = judge(self.verifier, completions, answers, rows)
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._judged += [
                    Judged(item, c, *judgement, judgement.gold_at_fault)
                    for (item, c, *_), judgement in zip(batch, judgements, strict=True)
                ]
                self._changed.notify_all()


def judge(
    verifier, completions: Sequence[Completion], answers: Sequence[str], rows: Sequence[dict] | None = None
) -> list[Judgement]:
    """A verdict and its reason for each completion; one that was cut or never drawn is not shown to the verifier."""
    whole = [i for i, c in enumerate(completions) if c.finish_reason == "stop"]
    texts = [completions[i].text for i in whole]
    judgements = iter(explain_with(verifier, texts, [answers[i] for i in whole], rows and [rows[i] for i in whole]))
    cut = Judgement(Verdict.UNPARSABLE, "cut at max_completion_length")
    return [
        next(judgements)
        if c.finish_reason == "stop"
        else cut
        if c.finish_reason == "length"
        else Judgement(Verdict.ERROR, brief(c.error or c.finish_reason))
        for c in completions
    ]
