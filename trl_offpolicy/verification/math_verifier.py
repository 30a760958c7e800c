r"""(completion, gold answer) → `Verdict`, by math-verify in worker processes that can be killed.

    with MathVerifier() as verifier:
        verifier.verify(["... so \\boxed{0.5}", "\\boxed{\\frac{1}{3}}"], ["\\frac{1}{2}", "\\frac{1}{2}"])
        # [Verdict.CORRECT, Verdict.WRONG]

math-verify's own time-out is a wall-clock alarm that only works in a main thread and answers "wrong" when it fires.
Here each worker is a process of its own (forked from a fresh interpreter that has imported sympy, once for all
verifiers of a process: nothing is forked from a trainer that holds CUDA, and a user's script needs no `__main__`
guard) with a CPU-time budget inside, so that a busy machine changes no verdict, and SIGKILL from outside for code in C
that no signal interrupts; a verification that is overdue only because other processes have the processor is given more
time. Workers belong to the process that started them: a forked or unpickled copy of a verifier starts workers of its
own, and they end with the process that started them, however it ends.
"""

import os
import re
import selectors
import threading
import time
import weakref
from collections import deque

from ..data.rows import Verdict
from .verifier import Judgement, Verifier, default_workers
from .worker import SOURCE, Worker, WorkerSource


BATCH, BATCH_CHARACTERS = 32, 1 << 20  # of the tasks that one line hands to a worker


_PLAIN_NUMBER = re.compile(r"-?\d{1,15}(?:\.\d{1,15})?")


class MathVerifier(Verifier):
    """
    Verifies final answers of mathematical problems; also a reward function for `GRPOTrainer`.

    Args:
        timeout (`float`, *optional*, defaults to `4.0`): CPU seconds one verification may take. Code that cannot be
            interrupted is killed 1.6 times as many seconds later at the earliest; either is `Verdict.TIMEOUT`, never
            `WRONG`.
        num_workers (`int`, *optional*): Worker processes; by default one for each core that this process may use,
            shared among the ranks of a node (`LOCAL_WORLD_SIZE`), and a single one in a child of `multiprocessing`
            (`num_proc`, a `DataLoader`).
        float_rounding (`int`, *optional*, defaults to `6`): Decimal places to which a decimal may stand for another
            number (`0.333333` for 1/3); it must keep five significant digits of it, too.
        numeric_precision (`int`, *optional*, defaults to `50`): Digits of math-verify's numeric comparisons.
        strict (`bool`, *optional*, defaults to `True`): Names of variables count (math-verify's `strict`).
        allow_set_relation_comp (`bool`, *optional*, defaults to `True`): `1 < x < 2` answers `(1, 2)`, as the other
            way round.
    """

    asked_form = "\\boxed"

    def __init__(
        self,
        timeout: float = 4.0,
        num_workers: int | None = None,
        float_rounding: int = 6,
        numeric_precision: int = 50,
        strict: bool = True,
        allow_set_relation_comp: bool = True,
    ):
        if timeout <= 0:
            raise ValueError(f"You passed timeout={timeout}; a verification needs a positive number of CPU seconds.")
        self.timeout = timeout
        self._num_workers = num_workers
        self.options = {
            "float_rounding": float_rounding,
            "numeric_precision": numeric_precision,
            "strict": strict,
            "allow_set_relation_comp": allow_set_relation_comp,
        }
        self._begin()
        _VERIFIERS.add(self)

    def _begin(self) -> None:
        """No workers yet, and locks that nobody holds: in a new verifier, and in a copy of one in another process."""
        self._workers: list[Worker] = []
        self._lock = threading.Lock()  # one batch at a time
        self._gate = threading.Lock()  # held by `close`, so that a new batch waits for it
        self._closing = False

    def _forked(self) -> None:
        """In a forked child: lets go of the workers, whose pipes it shares with its parent, without ending them."""
        for worker in getattr(self, "_workers", []):
            worker.forget()
        self._begin()

    def __getstate__(self) -> dict:
        return {"timeout": self.timeout, "options": self.options, "_num_workers": self._num_workers}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._begin()
        _VERIFIERS.add(self)

    @property
    def num_workers(self) -> int:
        """Worker processes, at most."""
        return self._num_workers or default_workers()

    def _explain(self, completions: list[str], answers: list[str], **_) -> list[Judgement]:
        return self._run(
            [
                [completion, "" if answer is None else str(answer)]
                for completion, answer in zip(completions, answers, strict=True)
            ]
        )

    def check_answers(self, answers: list[str]) -> list[Verdict]:
        """
        `CORRECT` for each gold answer that can be compared with at all, else `UNPARSABLE` (or why it could not be
        told).
        """
        # A plain number needs no worker, so a rewrite does not wait for one to start before it samples.
        odd = [answer or "" for answer in answers if not _PLAIN_NUMBER.fullmatch(answer or "")]
        judgements = iter(self._run([[None, answer] for answer in odd]))
        return [Verdict.CORRECT if _PLAIN_NUMBER.fullmatch(a or "") else next(judgements)[0] for a in answers]

    def close(self) -> None:
        """Ends the worker processes, whatever they are at; a later call starts new ones."""
        with self._gate:
            # Another thread may be in `_run`: its worker's end wakes it, and it gives up the lock.
            self._closing = True
            for worker in self._workers:
                worker.signal_all()
            with self._lock:
                self._drop_workers()
                self._closing = False

    def __del__(self):
        if hasattr(self, "_gate"):  # not when `__init__` refused its arguments
            self.close()

    def _run(self, tasks: list[list]) -> list[Judgement]:
        if not tasks:
            return []  # without waiting for a batch of another thread
        with self._gate:
            pass
        with self._lock:
            try:
                return self._dispatch(tasks)
            except BaseException:
                self._drop_workers()  # otherwise their late answers would be taken for answers to the next batch
                raise

    def _drop_workers(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _dispatch(self, tasks: list[list]) -> list[Judgement]:
        results: list[Judgement | None] = [None] * len(tasks)
        waiting = deque(range(len(tasks)))
        busy: set[Worker] = set()
        while len(self._workers) < min(self.num_workers, len(tasks)):
            self._workers.append(Worker())
        with selectors.DefaultSelector() as selector:
            while waiting or busy:
                for worker in self._workers:
                    if waiting and worker not in busy:
                        batch = self._batch(waiting, tasks)
                        worker.start(batch, [tasks[i] for i in batch], self.timeout, self.options)
                        selector.register(worker.stdout, selectors.EVENT_READ, worker)
                        busy.add(worker)
                wait = min(worker.deadline for worker in busy) - time.monotonic()
                if not all(
                    worker.started for worker in busy
                ):  # `close` has no process yet whose end would be noticed here
                    wait = min(wait, 0.1)
                ready = {key.data for key, _ in selector.select(max(0.0, wait))}
                if self._closing:
                    raise RuntimeError("The verifier was closed while it was verifying.")
                for worker in list(busy):
                    for index, result in worker.results(worker in ready):
                        results[index] = result
                    if worker.lost or not worker.tasks:
                        selector.unregister(worker.registered)
                        busy.discard(worker)
                        waiting.extendleft(reversed(worker.tasks))  # tasks that the lost worker had not begun
                        worker.tasks.clear()
        return results

    def _batch(self, waiting: deque[int], tasks: list[list]) -> list[int]:
        """The next tasks for one worker: many at a time, but so that all workers stay busy to the end."""
        size, characters, batch = max(1, min(BATCH, len(waiting) // (2 * self.num_workers))), 0, []
        while waiting and len(batch) < size and characters < BATCH_CHARACTERS:
            batch.append(waiting.popleft())
            characters += len(tasks[batch[-1]][0] or "")
        return batch


_VERIFIERS: weakref.WeakSet[MathVerifier] = weakref.WeakSet()


def _forget_workers() -> None:
    global SOURCE
    for verifier in list(_VERIFIERS):
        verifier._forked()
    SOURCE.forget()
    SOURCE = WorkerSource()


os.register_at_fork(after_in_child=_forget_workers)
