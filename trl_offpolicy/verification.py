r"""(completion, gold answer) → `Verdict`, by math-verify in worker processes that can be killed.

    with MathVerifier() as verifier:
        verifier.verify(["... so \\boxed{0.5}", "\\boxed{\\frac{1}{3}}"], ["\\frac{1}{2}", "\\frac{1}{2}"])
        # [Verdict.CORRECT, Verdict.WRONG]

math-verify's own time-out is a wall-clock alarm that only works in a main thread and answers "wrong" when it fires. Here
each worker is a process of its own (forked from a fresh interpreter that has imported sympy, once for all verifiers of a process:
nothing is forked from a trainer that holds CUDA, and a user's script needs no `__main__` guard) with a CPU-time budget inside, so that a busy machine changes no verdict, and SIGKILL from
outside for code in C that no signal interrupts; a verification that is overdue only because other processes have the
processor is given more time. Workers belong to the process that started them: a forked or unpickled copy of a verifier starts
workers of its own, and they end with the process that started them, however it ends.
"""

import contextlib
import json
import multiprocessing
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from inspect import signature
from pathlib import Path

import psutil

from .extraction import NO_ANSWER
from .redaction import brief
from .rows import Verdict


MEMORY_LIMIT = 2 << 30  # bytes of address space of one worker
WALL = 1.6  # x `timeout`: when a verification is looked at from outside, so that its verdict is there within 2 x
OVER_BUDGET = 1.3  # x `timeout`: CPU seconds with which it is ended then; with less it was only kept from running
ASLEEP = 20  # x `timeout`: when one that does not even wait for a processor is ended, whatever it used
NICE = 10  # a worker gives way to the engine, which it would only keep waiting; a starved engine leaves it time enough
BATCH, BATCH_CHARACTERS = 32, 1 << 20  # of the tasks that one line hands to a worker
TASKS_PER_WORKER = 2000  # then a fresh fork: sympy's caches grow without bound
READ_SECONDS = 10.0  # a worker that has not read its batch by then was killed with half of it read
START_SECONDS = 120.0  # a worker imports sympy before its first task, whose own time begins after that
PARENT_SECONDS = 1.0  # how often a worker looks whether the process that started it is still there


_PLAIN_NUMBER = re.compile(r"-?\d{1,15}(?:\.\d{1,15})?")


def explain_with(
    verifier, completions: list[str], answers: list, rows: list[dict] | None = None
) -> list[tuple[Verdict, str]]:
    """
    (verdict, reason) of each completion by anything that verifies: a [`Verifier`], an object with `verify`, a function. Of the `rows` that the
    completions answer, a verifier is given the columns that it names in `columns`.

    Raises:
        TypeError: A completion is not a text.
        ValueError: What the verifier returned is not a verdict (or a bool) for each completion.
    """
    if not completions:
        return []
    _check_texts(completions)
    columns = {name: [row.get(name) for row in rows] for name in getattr(verifier, "columns", ())} if rows else {}
    if hasattr(verifier, "explain"):
        told = [(verdict, brief(reason)) for verdict, reason in verifier.explain(completions, answers, **columns)]
    else:
        told = [(_verdict(v), "") for v in getattr(verifier, "verify", verifier)(completions, answers, **columns)]
    if len(told) != len(completions):
        raise ValueError(
            f"The verifier returned {len(told)} verdicts for {len(completions)} completions; it must return one for each."
        )
    return told


def _check_texts(completions: list) -> None:
    for index, completion in enumerate(completions):
        if not isinstance(completion, str):
            raise TypeError(f"Completion {index} must be a text, but is {completion!r:.100}.")


def _verdict(told) -> Verdict:
    """A verdict by name, or by a bool (numpy's, too): `True` is correct."""
    if type(told).__name__ in ("bool", "bool_"):
        return Verdict.CORRECT if told else Verdict.WRONG
    try:
        return Verdict(told)
    except ValueError as error:
        raise ValueError(
            f"The verifier returned {told!r:.100}; it must return True, False or one of {', '.join(Verdict)} for each completion."
        ) from error


def describe(verifier) -> str:
    """Name and arguments of whatever verifies, for the record; no limits of time and processes, which a resumed run may change."""
    name = getattr(verifier, "__name__", type(verifier).__name__)
    if not isinstance(verifier, Verifier):
        return name
    now = {**vars(verifier), **vars(verifier).get("options", {})}
    defaults = {p.name: p.default for p in signature(type(verifier)).parameters.values()}
    given = [
        f"{k}={now[k]!r}"
        for k, default in defaults.items()
        if k not in ("timeout", "num_workers", "sampler") and k in now and now[k] != default
    ]
    return name + (f"({', '.join(given)})" if given else "")


def rewards(told: list[tuple[Verdict, str]]) -> list[float | None]:
    """1.0 for `correct`, 0.0 for `wrong` or no answer, `None` where it could not be told: gold answer, time-out, error."""
    values = {Verdict.CORRECT: 1.0, Verdict.WRONG: 0.0}
    return [0.0 if reason.startswith(NO_ANSWER) else values.get(verdict) for verdict, reason in told]


class Verifier:
    """What all verifiers share; a new one needs `_explain`. Usable as a context manager, and as a reward for `GRPOTrainer`."""

    # Whether the answer that a completion states is judged, not all of its text: what maj@k counts votes for.
    stated = True
    # Columns of the dataset, beside the answers, that `explain` and `verify` take as keyword arguments: a list with a value for each completion.
    columns: tuple[str, ...] = ()

    @property
    def __name__(self) -> str:  # what GRPOTrainer calls its reward in the logs
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()

    def __repr__(self) -> str:
        return type(self).__name__ + (describe(self).removeprefix(self.__name__) or "()")

    def _explain(self, completions: list[str], answers: list, **columns: list) -> list[tuple[Verdict, str]]:
        raise NotImplementedError

    def explain(self, completions: list[str], answers: list, **columns: list) -> list[tuple[Verdict, str]]:
        """
        Verdicts with the reason beside each: what could not be parsed, which test failed; empty for `correct`.

        Raises:
            TypeError: A completion is not a text.
            ValueError: There are not as many answers as completions.
        """
        if len(completions) != len(answers):
            raise ValueError(
                f"You passed {len(completions)} completions and {len(answers)} answers; each completion needs its own answer."
            )
        _check_texts(completions)
        return [(verdict, brief(reason)) for verdict, reason in self._explain(completions, answers, **columns)]

    def verify(self, completions: list[str], answers: list, **columns: list) -> list[Verdict]:
        """One verdict for each completion against the gold answer of the same position."""
        return [verdict for verdict, _ in self.explain(completions, answers, **columns)]

    def __call__(self, completions, answer=None, solution=None, **kwargs) -> list[float | None]:
        """TRL's reward signature: 1.0 correct, 0.0 wrong or no answer, `None` where it could not be told."""
        golds = answer if answer is not None else solution
        if golds is None:
            raise ValueError(
                f"The dataset needs a column `answer` (or `solution`) with gold answers; it has {sorted(kwargs)}."
            )
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        columns = {name: kwargs[name] for name in self.columns if name in kwargs}
        return rewards(self.explain(texts, golds, **columns))

    def close(self) -> None:
        """Ends what it holds (processes, engines), if anything."""

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


class MathVerifier(Verifier):
    """
    Verifies final answers of mathematical problems; also a reward function for `GRPOTrainer`.

    Args:
        timeout (`float`, *optional*, defaults to `4.0`): CPU seconds one verification may take. Code that cannot be
            interrupted is killed 1.6 times as many seconds later at the earliest; either is `Verdict.TIMEOUT`, never `WRONG`.
        num_workers (`int`, *optional*): Worker processes; by default one for each core that this process may use, shared among the
            ranks of a node (`LOCAL_WORLD_SIZE`), and a single one in a child of `multiprocessing` (`num_proc`, a `DataLoader`).
        float_rounding (`int`, *optional*, defaults to `6`): Decimal places to which a decimal may stand for another number
            (`0.333333` for 1/3); it must keep five significant digits of it, too.
        numeric_precision (`int`, *optional*, defaults to `50`): Digits of math-verify's numeric comparisons.
        strict (`bool`, *optional*, defaults to `True`): Names of variables count (math-verify's `strict`).
        allow_set_relation_comp (`bool`, *optional*, defaults to `True`): `1 < x < 2` answers `(1, 2)`, as the other way round.
    """

    asked_form = "\\boxed"  # what a prompt should ask for

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
        self._workers: list[_Worker] = []
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

    def _explain(self, completions: list[str], answers: list[str]) -> list[tuple[Verdict, str]]:
        return self._run(
            [
                [completion, "" if answer is None else str(answer)]
                for completion, answer in zip(completions, answers, strict=True)
            ]
        )

    def check_answers(self, answers: list[str]) -> list[Verdict]:
        """`CORRECT` for each gold answer that can be compared with at all, else `UNPARSABLE` (or why it could not be told)."""
        # A plain number needs no worker, so a rewrite does not wait for one to start before it samples.
        odd = [answer or "" for answer in answers if not _PLAIN_NUMBER.fullmatch(answer or "")]
        told = iter(self._run([[None, answer] for answer in odd]))
        return [Verdict.CORRECT if _PLAIN_NUMBER.fullmatch(a or "") else next(told)[0] for a in answers]

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

    def _run(self, tasks: list[list]) -> list[tuple[Verdict, str]]:
        if not tasks:
            return []  # without waiting for another thread's
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
        waiting = deque(range(len(tasks)))
        busy: set[_Worker] = set()
        while len(self._workers) < min(self.num_workers, len(tasks)):
            self._workers.append(_Worker())
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
                        waiting.extendleft(reversed(worker.tasks))  # what the lost one was not at yet
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
    global _SOURCE
    for verifier in list(_VERIFIERS):
        verifier._forked()
    _SOURCE.forget()
    _SOURCE = _Source()


os.register_at_fork(after_in_child=_forget_workers)


def default_workers() -> int:
    """One worker for each core that this process may use, divided among the processes of a node that do the same."""
    if multiprocessing.parent_process() is not None:
        return (
            1  # one of many that a `multiprocessing` pool, `datasets.map(num_proc=...)` or a `DataLoader` has started
        )
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


# What the interpreter from which workers are forked is started with (`-I`: or the `random.py` or `sympy.py` in the folder of a user's script would run in the worker):
# this very package and, behind all that is installed, the other folders that the parent imports from, but for the script's own and the
# working directory: not even a module that sympy would like to have and does not find (gmpy2) is taken from there.
_START = """\
import importlib.util, sys
sys.path += {path!r}
spec = importlib.util.spec_from_file_location("trl_offpolicy", {package!r})
sys.modules["trl_offpolicy"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from trl_offpolicy.verification import _serve
_serve({parent})
"""


def _start_command() -> list[str]:
    script = getattr(sys.modules.get("__main__"), "__file__", None) or "."
    own = {os.path.realpath("."), os.path.dirname(os.path.realpath(script))}
    path = [p for p in map(os.path.realpath, sys.path) if p not in own]
    package = str(Path(__file__).with_name("__init__.py"))
    return [sys.executable, "-I", "-c", _START.format(path=path, package=package, parent=os.getpid())]


class _Source:
    """The process that workers are forked from: it imports sympy once for all verifiers of this process, and ends with this process."""

    def __init__(self):
        self.lock, self.process, self.requests = threading.Lock(), None, None

    def fork(self, stdin: int, stdout: int) -> None:
        """Has a worker forked that reads and writes these descriptors, as soon as all is imported; this does not wait for it."""
        with self.lock:
            for _ in range(2):
                if self.process is None or self.process.poll() is not None:
                    self._start()
                try:
                    socket.send_fds(self.requests, [b"."], [stdin, stdout])
                    return
                except (
                    ConnectionError
                ):  # it has just ended; should the next one do so, too, the worker's closed stdout says it
                    self.process.wait()

    def _start(self) -> None:
        if self.requests is not None:
            self.requests.close()
        self.requests, theirs = socket.socketpair()
        with theirs:
            # Its own group: a ctrl-C meant for the parent does not kill it. Not its own session, to which Linux would give as much of
            # a busy processor as to the engine's.
            self.process = subprocess.Popen(
                _start_command(), stdin=theirs, process_group=0, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )

    def forget(self) -> None:
        """Closes this process's copy of the socket, and has nothing waited for: it is another process's child."""
        if self.process is not None:
            self.requests.close()
            self.process.returncode = 0


_SOURCE = _Source()


class _Worker:
    """
    One process and the tasks it was handed.

    What is forked from `_SOURCE` only forks in its turn: the fork does the work, and another takes its place within milliseconds when
    it had to be killed, died, or has served long enough.
    """

    def __init__(self):
        self.tasks: deque[int] = deque()  # that it has not answered; it is at the first
        self.spawn()

    def spawn(self):
        stdin, write = os.pipe()
        read, stdout = os.pipe()
        self.stdin, self.stdout = os.fdopen(write, "wb"), os.fdopen(read, "rb")
        os.set_blocking(read, False)
        try:
            _SOURCE.fork(stdin, stdout)
        finally:
            os.close(stdin)
            os.close(stdout)
        self.keeper = None  # the process that forks, as soon as it says which it is
        self.pid = None  # its fork, as soon as that is ready
        self.started, self.buffer, self.tasks_left = False, b"", 0

    def signal_all(self):
        if self.keeper is not None:  # else it ends by itself when it finds its stdin closed
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.keeper, signal.SIGKILL)

    def kill(self):
        self.signal_all()
        self.forget()

    def forget(self):
        """Closes this process's copies of the pipes."""
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        self.stdout.close()

    def kill_fork(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.pid = None

    def start(self, indices: list[int], tasks: list[list], timeout: float, options: dict):
        """Hands an idle worker its next tasks."""
        if self.pid is not None and self.tasks_left <= 0:
            self.kill_fork()
        self.tasks.extend(indices)
        self.timeout, self.registered, self.lost = timeout, self.stdout, False
        # ASCII: a lone surrogate travels as \udXXX
        self.batch = json.dumps([tasks, timeout, options]).encode() + b"\n"
        self.reading = False  # the fork's own clock starts when it says that it has read the batch
        self.deadline = time.monotonic() + START_SECONDS
        if self.pid is not None:
            self._send()

    def _send(self):
        """The fork reads all of it before it begins, so that this cannot block."""
        self.deadline = time.monotonic() + max(WALL * self.timeout, READ_SECONDS)
        self.tasks_left -= len(self.tasks)
        with contextlib.suppress(BrokenPipeError):  # it died while idle: its closed stdout says so to `results`
            self.stdin.write(self.batch)
            self.stdin.flush()
        self.batch = None

    def _given_more_time(self) -> bool:
        """Whether it is overdue only because the machine is busy; then it gets what it has not used."""
        if not self.reading:
            return False
        try:
            process = psutil.Process(self.pid)
            asleep = process.status() != psutil.STATUS_RUNNING  # which is also what waits for a processor
            used = sum(process.cpu_times()[:2]) - self.cpu_then
        except psutil.NoSuchProcess:
            return False
        if asleep and time.monotonic() > self.task_began + ASLEEP * self.timeout:
            return False
        self.deadline = time.monotonic() + max(OVER_BUDGET * self.timeout - used, 0.05 * self.timeout)
        return used < OVER_BUDGET * self.timeout

    def results(self, readable: bool) -> list[tuple[int, tuple[Verdict, str]]]:
        """What it has answered; where its fork died or is overdue (`lost`), that is the verdict on the task it was at."""
        chunk = self.stdout.read() if readable else None
        *lines, self.buffer = (self.buffer + (chunk or b"")).split(b"\n")
        told, died = [], None
        for line in lines:
            what, *rest = json.loads(line)
            if what == "keeper":
                (self.keeper,) = rest
            elif what == "ready":
                # the first fork, or one in the place of the last; an unread batch is still in the pipe for it
                if self.reading and self.pid is not None:
                    died = f"died with exit code {rest[1]}"
                self.pid, self.tasks_left, self.started = rest[0], TASKS_PER_WORKER, True
                if self.batch is not None:
                    self._send()
            elif self.pid is not None:  # else from a fork that was killed in the moment of its answer
                *rest, self.cpu_then = rest
                self.task_began = time.monotonic()
                self.deadline = self.task_began + WALL * self.timeout
                if what != "reading":
                    told.append((self.tasks.popleft(), (Verdict(what), rest[0])))
                self.reading = bool(self.tasks)
        overdue = self.tasks and time.monotonic() > self.deadline and not self._given_more_time()
        if overdue and self.pid is None:
            raise RuntimeError(
                f"A verifier worker was not ready after {START_SECONDS:.0f} s. Is the machine out of memory?"
            )
        if chunk == b"":
            died, self.keeper = "was killed", None  # nobody writes there any more
            if not self.started:
                raise RuntimeError(
                    "A verifier worker ended before its first task; its message is above. "
                    f"Try it by hand: {sys.executable} -I -c 'import math_verify'"
                )
        if self.reading and (died is not None or overdue):
            end = Verdict.TIMEOUT, f"killed after {time.monotonic() - self.task_began:.1f} s"
            if died is not None:
                end = Verdict.ERROR, f"the verifier's worker process {died}"
            told.append((self.tasks.popleft(), end))
        self.lost = died is not None or bool(overdue)
        if chunk == b"" or (overdue and not self.reading):  # what it has not read may still be in the pipe
            self.kill()
            self.spawn()
        elif overdue:
            self.kill_fork()
        return told


# ---- what runs inside a worker ----


# What the parser has met before it reads ten times as fast; every fork inherits what was learnt here.
WARM_UP = [
    ("\\frac{\\sqrt{3}}{2}\\pi-x^{2}", "2x_{1}+3y"),
    ("(2a+1)(b-3)^{n}", "e^{-2t}\\sin(\\theta)+\\ln 5"),
    ("x\\le 3", "(-\\infty,3]"),
    ("2x+3y=6", "y=2-\\frac{2}{3}x"),
    ("\\binom{10}{3}\\cdot 5!", "\\log_{2} 8+|x-1|"),
]


class _OverBudget(BaseException):
    """Not an `Exception`: math-verify catches those."""


def _serve(parent: int) -> None:
    """Imports what is slow, then forks a worker for each pair of descriptors that comes in by the socket on stdin, until `parent` ends."""
    import logging
    import resource

    started_by = psutil.Process(parent)

    def end_with_parent(*_) -> None:
        if not started_by.is_running() or started_by.status() == psutil.STATUS_ZOMBIE:
            os.killpg(0, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end_with_parent)  # a killed parent may leave the pipes open in children of its own
    signal.setitimer(signal.ITIMER_REAL, PARENT_SECONDS, PARENT_SECONDS)  # which no fork inherits
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a worker
    requests = socket.socket(fileno=os.dup(0))
    os.dup2(2, 1)  # whatever a library prints must not end up among the answers
    if sys.platform == "linux":  # macOS refuses this limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    sys.set_int_max_str_digits(0)  # bounded by the CPU budget instead of by an exception
    from .math_grading import grade  # the slow import, before the first task's clock starts

    logging.disable(logging.CRITICAL)  # math-verify warns that we took over its time-outs
    for prediction, gold in WARM_UP:
        grade(f"\\boxed{{{prediction}}}", gold)
    os.nice(NICE)
    while descriptors := socket.recv_fds(requests, 1, 2)[1]:
        if os.fork() == 0:  # nothing else runs here: no thread, no CUDA
            requests.close()
            _keep(*descriptors)
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def _keep(stdin: int, stdout: int) -> None:
    """Forks; another fork for each that dies, until one ends by itself: its stdin was closed."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, PARENT_SECONDS, PARENT_SECONDS)
    os.dup2(stdin, 0)
    os.close(stdin)
    answers, status = os.fdopen(stdout, "w"), None
    with contextlib.suppress(BrokenPipeError):  # nobody is there to be answered; nor below
        print(json.dumps(["keeper", os.getpid()]), file=answers, flush=True)
    while status != 0:
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(["ready", os.getpid(), status]), file=answers, flush=True)
                _work(answers)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _work(answers) -> None:
    """Reads one JSON batch of tasks a line from stdin and answers one JSON verdict a line and task, until stdin closes."""
    from .math_grading import grade

    def over_budget(*_):
        raise _OverBudget

    signal.signal(signal.SIGPROF, over_budget)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in sys.stdin:
        tasks, budget, options = json.loads(line)
        print(json.dumps(["reading", time.process_time()]), file=answers, flush=True)
        for completion, answer in tasks:
            try:
                signal.setitimer(signal.ITIMER_PROF, budget, 0.5)  # fires again, should a library swallow the first
                verdict, reason = grade(completion, answer, **options)
                signal.setitimer(signal.ITIMER_PROF, 0)
            except _OverBudget:
                verdict, reason = Verdict.TIMEOUT, f"stopped after {budget:g} CPU seconds"
            except MemoryError:
                verdict, reason = Verdict.ERROR, f"out of memory ({MEMORY_LIMIT >> 20} MiB)"
            except Exception as error:  # not ours to hide: it travels to the caller as a verdict with its reason
                verdict, reason = Verdict.ERROR, f"{type(error).__name__}: {error}"[:500]
            signal.setitimer(signal.ITIMER_PROF, 0)
            print(json.dumps([verdict, reason, time.process_time()]), file=answers, flush=True)
