r"""(completion, gold answer) → `Verdict`, by math-verify in worker processes that can be killed.

    with MathVerifier() as verifier:
        verifier.verify(["... so \\boxed{0.5}", "\\boxed{\\frac{1}{3}}"], ["\\frac{1}{2}", "\\frac{1}{2}"])
        # [Verdict.CORRECT, Verdict.WRONG]

math-verify's own time-out is a wall-clock alarm that only works in a main thread and answers "wrong" when it fires. Here
each worker is a process of its own (`python -m trl_offpolicy.verification`: nothing is forked from a trainer that holds
CUDA, and a user's script needs no `__main__` guard) with a CPU-time budget inside, so that a busy machine changes no
verdict, and a wall deadline with SIGKILL outside, for code in C that no signal interrupts.
"""

import functools
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from fractions import Fraction

from .rows import Verdict, final_answer, last_boxed


MEMORY_LIMIT = 3 << 30  # bytes of address space of one worker
TASKS_PER_WORKER = 2000  # then a fresh process: sympy's caches grow without bound
START_SECONDS = 120.0  # a worker imports sympy before its first task; that time is nobody's answer's


def explain_with(verifier, completions: list[str], answers: list) -> list[tuple[Verdict, str]]:
    """(verdict, reason) of each completion by anything that verifies: a [`MathVerifier`], an object with `verify`, a function."""
    if not completions:
        return []
    if hasattr(verifier, "explain"):
        told = verifier.explain(completions, answers)
    else:
        told = [(Verdict(v), "") for v in getattr(verifier, "verify", verifier)(completions, answers)]
    if len(told) != len(completions):
        raise ValueError(
            f"The verifier returned {len(told)} verdicts for {len(completions)} completions; it must return one for each."
        )
    return told


class MathVerifier:
    """
    Verifies final answers of mathematical problems; also a reward function for `GRPOTrainer`.

    Args:
        timeout (`float`, *optional*, defaults to `4.0`): CPU seconds one verification may take. Three times as many seconds on
            the wall clock (for code that cannot be interrupted) end it as well; either is `Verdict.TIMEOUT`, never `WRONG`.
        num_workers (`int`, *optional*): Worker processes; by default one for each core, at most 8.
    """

    def __init__(self, timeout: float = 4.0, num_workers: int | None = None):
        if timeout <= 0:
            raise ValueError(f"You passed timeout={timeout}; a verification needs a positive number of CPU seconds.")
        self.timeout = timeout
        self.num_workers = num_workers or min(8, os.cpu_count() or 1)
        self.__name__ = "math_verifier"  # what GRPOTrainer calls its reward in the logs
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()  # one batch at a time
        self._gate = threading.Lock()  # held by `close`, so that a new batch waits for it
        self._closing = False

    def verify(self, completions: list[str], answers: list[str]) -> list[Verdict]:
        """One verdict for each completion against the gold answer of the same position."""
        return [verdict for verdict, _ in self.explain(completions, answers)]

    def explain(self, completions: list[str], answers: list[str]) -> list[tuple[Verdict, str]]:
        """Verdicts with the reason beside each: what could not be parsed, how a worker died; empty for `correct` and `wrong`."""
        if len(completions) != len(answers):
            raise ValueError(
                f"You passed {len(completions)} completions and {len(answers)} answers; each completion needs its own answer."
            )
        return self._run(
            [
                [completion, "" if answer is None else str(answer)]
                for completion, answer in zip(completions, answers, strict=True)
            ]
        )

    def check_answers(self, answers: list[str]) -> list[Verdict]:
        """`CORRECT` for each gold answer that can be compared with at all, else `UNPARSABLE` (or why it could not be told)."""
        return [verdict for verdict, _ in self._run([[None, answer or ""] for answer in answers])]

    def __call__(self, completions, answer=None, solution=None, **kwargs) -> list[float | None]:
        """TRL's reward signature: 1.0 correct, 0.0 wrong or no answer, `None` where it could not be told."""
        golds = answer if answer is not None else solution
        if golds is None:
            raise ValueError(
                f"The dataset needs a column `answer` (or `solution`) with gold answers; it has {sorted(kwargs)}."
            )
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        golds = [final_answer(g) or g for g in golds]
        rewards = {Verdict.CORRECT: 1.0, Verdict.WRONG: 0.0}
        return [0.0 if reason == NO_ANSWER else rewards.get(verdict) for verdict, reason in self.explain(texts, golds)]

    def close(self) -> None:
        """Ends the worker processes, whatever they are at; a later call starts new ones."""
        with self._gate:
            # Another thread may be in `_run`: its worker's end wakes it, and it gives up the lock.
            self._closing = True
            for worker in self._workers:
                if worker.process is not None:
                    worker.process.kill()
            with self._lock:
                self._drop_workers()
                self._closing = False

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __del__(self):
        if hasattr(self, "_gate"):  # not when `__init__` refused its arguments
            self.close()

    def _run(self, tasks: list[list]) -> list[tuple[Verdict, str]]:
        with self._gate:
            pass
        with self._lock:
            try:
                return self._dispatch(tasks)
            except BaseException:
                self._drop_workers()  # what they are at would be taken for the answers to the next batch
                raise

    def _drop_workers(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _dispatch(self, tasks: list[list]) -> list[tuple[Verdict, str]]:
        results: list[tuple[Verdict, str] | None] = [None] * len(tasks)
        waiting = deque(enumerate(tasks))
        busy: set[_Worker] = set()
        while len(self._workers) < min(self.num_workers, len(tasks)):
            self._workers.append(_Worker())
        with selectors.DefaultSelector() as selector:
            while waiting or busy:
                for worker in self._workers:
                    if waiting and worker not in busy:
                        if worker.tasks_left == 0:
                            worker.restart()
                        worker.start_task(*waiting.popleft(), self.timeout)
                        selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
                        busy.add(worker)
                wait = min(worker.deadline for worker in busy) - time.monotonic()
                ready = {key.data for key, _ in selector.select(max(0.0, wait))}
                if self._closing:
                    raise RuntimeError("The verifier was closed while it was verifying.")
                for worker in list(busy):
                    result = worker.result() if worker in ready else None
                    if result is None and time.monotonic() > worker.deadline:
                        result = worker.overdue()
                    if result is not None:
                        selector.unregister(worker.registered)
                        busy.discard(worker)
                        results[worker.task] = result
        return results


class _Worker:
    """One process and the task it is at; restarted when it had to be killed, died, or has served long enough."""

    def __init__(self):
        self.process = None
        self.restart()

    def restart(self):
        self.kill()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "trl_offpolicy.verification"]
        # Its own session: a ctrl-C meant for the parent does not kill it in the middle of a task.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        os.set_blocking(self.process.stdout.fileno(), False)
        self.ready, self.buffer, self.tasks_left = False, b"", TASKS_PER_WORKER

    def kill(self):
        if self.process is not None:
            self.process.kill()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()
            self.process = None

    def start_task(self, index: int, task: list, timeout: float):
        self.task, self.budget, self.registered = index, timeout, self.process.stdout
        self.deadline = time.monotonic() + (3 * timeout if self.ready else START_SECONDS)
        self.tasks_left -= 1
        try:
            self.process.stdin.write(
                json.dumps([*task, timeout]).encode() + b"\n"
            )  # ASCII: a lone surrogate travels as \udXXX
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died while idle: its closed stdout says so to `result`

    def result(self) -> tuple[Verdict, str] | None:
        chunk = self.process.stdout.read()
        if chunk == b"":
            code = self.process.wait()
            if not self.ready:
                raise RuntimeError(
                    f"A verifier worker ended with exit code {code} before its first task; its message is above. "
                    f"Try it by hand: {sys.executable} -m trl_offpolicy.verification < /dev/null"
                )
            self.restart()
            return Verdict.ERROR, f"the verifier's worker process died with exit code {code}"
        self.buffer += chunk or b""
        *lines, self.buffer = self.buffer.split(b"\n")
        for line in lines:
            if not self.ready:  # the first line only says that the imports are done: the task's own clock starts here
                self.ready, self.deadline = True, time.monotonic() + 3 * self.budget
            else:
                verdict, reason = json.loads(line)
                return Verdict(verdict), reason
        return None

    def overdue(self) -> tuple[Verdict, str]:
        if not self.ready:
            self.kill()
            raise RuntimeError(
                f"A verifier worker was not ready after {START_SECONDS:.0f} s. Is the machine out of memory?"
            )
        self.restart()
        return Verdict.TIMEOUT, f"killed after {3 * self.budget:g} s"


# ---- what runs inside a worker ----

NO_ANSWER = "the completion states no answer that can be parsed"


class _OverBudget(BaseException):
    """Not an `Exception`: math-verify catches those."""


def grade(completion: str | None, answer: str) -> tuple[Verdict, str]:
    """The verdict on one completion; with `completion=None`, on whether the gold answer can be compared with at all."""
    gold = normalize(last_boxed(answer) or answer)
    if not gold:
        return Verdict.UNPARSABLE, "the gold answer is empty"
    plain = (
        re.fullmatch(r"[A-Za-z]{2,}(?: [A-Za-z]+)*", gold) is not None
    )  # a word: letters are not factors of a product
    if completion is None:
        parsable = plain or _number(gold) is not None or bool(_parse(gold))
        return (Verdict.CORRECT, "") if parsable else (Verdict.UNPARSABLE, "the gold answer cannot be parsed")
    stated = final_answer(completion)
    prediction = None if stated is None else normalize(stated)
    if prediction is not None and _same(prediction, gold):
        return Verdict.CORRECT, ""
    if plain:
        return (Verdict.UNPARSABLE, NO_ANSWER) if prediction is None else (Verdict.WRONG, "")
    from math_verify import parse, verify

    gold_parsed = _parse(gold)
    if not gold_parsed:
        return Verdict.UNPARSABLE, "the gold answer cannot be parsed"
    if prediction is None and not (prediction := _tail(completion)):
        return Verdict.UNPARSABLE, NO_ANSWER
    predicted = _parse(prediction) if stated else parse(prediction, parsing_timeout=None, fallback_mode="no_fallback")
    if not predicted:
        return Verdict.UNPARSABLE, NO_ANSWER
    same = verify(gold_parsed, predicted, timeout_seconds=None, raise_on_error=True)
    return (Verdict.CORRECT if same else Verdict.WRONG), ""


def _tail(completion: str) -> str:
    """Where a completion without a box states its answer: after the last "answer is" or "A:", or all of a single line.

    Not the last number of whatever came out: a rambling sample would be right by chance, and be trained on.
    """
    text = completion.strip()
    starts = [
        m.start()
        for m in re.finditer(r"\b(?:answer|solution|result)\s*(?:is|are|:|=)|^A:", text, re.MULTILINE | re.IGNORECASE)
    ]
    if starts:
        text = text[starts[-1] :].split("\n")[0]  # with the phrase: math-verify reads on from there
    return "" if "\n" in text else text[:1000]


@functools.lru_cache(4096)
def _parse(answer: str) -> list:
    """The gold as math-verify reads it in a box; cached, since many samples share a gold answer."""
    from math_verify import parse

    return parse(f"$\\boxed{{{answer}}}$", parsing_timeout=None, fallback_mode="no_fallback")


def normalize(answer: str) -> str:
    r"""An answer without what never changes its value: `$`, `\left`, `\!`, `\text{}` around a word, spaces beside symbols."""
    answer = re.sub(r"\\(?:text|mbox|textbf|mathrm)\s*\{([^{}]*)\}", r"\1", answer.strip().strip("$").strip())
    answer = (
        re.sub(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[!,;:]|\\\$", "", answer)
        .replace("\\dfrac", "\\frac")
        .replace("\\tfrac", "\\frac")
    )
    answer = re.sub(r"\s+", " ", answer).strip()
    answer = re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", answer)
    return answer.removesuffix(".") if not answer.endswith("..") else answer


def _number(text: str) -> Fraction | None:
    """The exact value of a plain decimal (thousands separators allowed), else `None`."""
    if len(text) > 200 or not re.fullmatch(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[+-]?\.\d+", text):
        return None
    return Fraction(text.replace(",", ""))


def _same(prediction: str, gold: str) -> bool:
    """Equality that needs no algebra; it can only prove `correct`."""
    if prediction == gold or (prediction.casefold() == gold.casefold() and len(gold) > 1 and gold.isalpha()):
        return True
    number = _number(gold)
    return number is not None and number == _number(prediction)


def _work() -> None:
    """Reads one JSON task a line from stdin and answers one JSON verdict a line, until stdin closes."""
    import logging
    import resource

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not end up among the answers
    if sys.platform == "linux":  # macOS refuses this limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    sys.set_int_max_str_digits(0)  # bounded by the CPU budget instead of by an exception
    import math_verify  # noqa: F401  (the slow import, before the first task's clock starts)

    logging.disable(logging.CRITICAL)  # math-verify warns that we took over its time-outs

    def over_budget(*_):
        raise _OverBudget

    signal.signal(signal.SIGPROF, over_budget)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        completion, answer, budget = json.loads(line)
        try:
            signal.setitimer(signal.ITIMER_PROF, budget, 0.5)  # fires again, should a library swallow the first
            verdict, reason = grade(completion, answer)
            signal.setitimer(signal.ITIMER_PROF, 0)
        except _OverBudget:
            verdict, reason = Verdict.TIMEOUT, f"stopped after {budget:g} CPU seconds"
        except MemoryError:
            verdict, reason = Verdict.ERROR, f"out of memory ({MEMORY_LIMIT >> 20} MiB)"
        except Exception as error:  # not ours to hide: it travels to the caller as a verdict with its reason
            verdict, reason = Verdict.ERROR, f"{type(error).__name__}: {error}"[:500]
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps([verdict, reason]), file=answers, flush=True)


if __name__ == "__main__":
    _work()
