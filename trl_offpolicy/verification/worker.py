"""Processes that grade mathematics within a CPU-time budget, and can be killed."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import psutil

from ..data.rows import Verdict
from .verifier import GoldAtFault, Judgement


MEMORY_LIMIT = 2 << 30  # bytes of address space of one worker
WALL = 1.6  # x `timeout`: seconds after which a verification is looked at from outside, so that its verdict comes within 2 x
OVER_BUDGET = (
    1.3  # x `timeout`: it is ended then if it has used as many CPU seconds; with fewer, others kept it from running
)
ASLEEP = (
    20  # x `timeout`: seconds after which it is ended even so, if it is asleep rather than waiting for a processor
)
NICE = 10  # a worker gives way to the engine: it has time enough while the engine waits for it
TASKS_PER_WORKER = 2000  # then a fresh fork: sympy's caches grow without bound
READ_SECONDS = 10.0  # seconds for reading a batch; a worker that takes longer was killed while it read
START_SECONDS = 120.0  # seconds for importing sympy before the first task; the task's own time begins after that
PARENT_SECONDS = 1.0  # how often a worker looks whether the process that started it is still there


# The program of the interpreter from which workers are forked. It is started with `-I`, since otherwise a `random.py`
# or `sympy.py` in the folder of a user's script would run in the worker. It imports this package and, after all that
# is installed, from the folders that the parent imports from, except the script's own folder and the working
# directory: even optional modules of sympy (gmpy2) are not taken from there.
_START = """\
import importlib.util, sys
sys.path += {path!r}
spec = importlib.util.spec_from_file_location("trl_offpolicy", {package!r})
sys.modules["trl_offpolicy"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from trl_offpolicy.verification.worker import serve
serve({parent})
"""


def _start_command() -> list[str]:
    script = getattr(sys.modules.get("__main__"), "__file__", None) or "."
    own = {os.path.realpath("."), os.path.dirname(os.path.realpath(script))}
    path = [p for p in map(os.path.realpath, sys.path) if p not in own]
    package = str(Path(__file__).parents[1] / "__init__.py")
    return [sys.executable, "-I", "-c", _START.format(path=path, package=package, parent=os.getpid())]


class WorkerSource:
    """
    The process that workers are forked from: it imports sympy once for all verifiers of this process, and ends with
    this process.
    """

    def __init__(self):
        self.lock, self.process, self.requests = threading.Lock(), None, None

    def fork(self, stdin: int, stdout: int) -> None:
        """
        Has a worker forked that reads and writes these descriptors, as soon as all is imported; this does not wait for
        it.
        """
        with self.lock:
            for _ in range(2):
                if self.process is None or self.process.poll() is not None:
                    self._start()
                try:
                    socket.send_fds(self.requests, [b"."], [stdin, stdout])
                    return
                except (
                    ConnectionError
                ):  # it has just ended; if the next one ends too, `results` notices that the worker's stdout is closed
                    self.process.wait()

    def _start(self) -> None:
        if self.requests is not None:
            self.requests.close()
        self.requests, theirs = socket.socketpair()
        with theirs:
            # A process group of its own, so that a ctrl-C meant for the parent does not kill it. Not a session of its
            # own, to which Linux would give as much of a busy processor as to the engine's session.
            self.process = subprocess.Popen(
                _start_command(), stdin=theirs.fileno(), process_group=0, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )

    def forget(self) -> None:
        """Closes this process's copy of the socket, and has nothing waited for: it is another process's child."""
        if self.process is not None:
            self.requests.close()
            self.process.returncode = 0


SOURCE = WorkerSource()


class Worker:
    """
    One process and the tasks it was handed.

    What is forked from `SOURCE` only forks in its turn: the fork does the work, and another takes its place within
    milliseconds when it had to be killed, died, or has served long enough.
    """

    def __init__(self):
        self.tasks: deque[int] = deque()  # those that it has not answered yet; it works on the first
        self.spawn()

    def spawn(self):
        stdin, write = os.pipe()
        read, stdout = os.pipe()
        self.stdin, self.stdout = os.fdopen(write, "wb"), os.fdopen(read, "rb")
        os.set_blocking(read, False)
        try:
            SOURCE.fork(stdin, stdout)
        finally:
            os.close(stdin)
            os.close(stdout)
        self.keeper = None  # process id of the process that forks; known as soon as that reports it
        self.pid = None  # process id of the fork that works; known as soon as that is ready
        self.started, self.buffer, self.tasks_left = False, b"", 0

    def signal_all(self):
        if self.keeper is not None:  # otherwise it ends by itself when it finds its stdin closed
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

    def results(self, readable: bool) -> list[tuple[int, Judgement]]:
        """
        What it has answered; where its fork died or is overdue (`lost`), that is the verdict on the task it was at.
        """
        chunk = self.stdout.read() if readable else None
        *lines, self.buffer = (self.buffer + (chunk or b"")).split(b"\n")
        judged, died = [], None
        for line in lines:
            what, *rest = json.loads(line)
            if what == "keeper":
                (self.keeper,) = rest
            elif what == "ready":
                # the first fork, or one that replaces another; a batch that was not read is still in the pipe for it
                if self.reading and self.pid is not None:
                    died = f"died with exit code {rest[1]}"
                self.pid, self.tasks_left, self.started = rest[0], TASKS_PER_WORKER, True
                if self.batch is not None:
                    self._send()
            elif self.pid is not None:  # otherwise the line is from a fork that was killed while it answered
                *rest, self.cpu_then = rest
                self.task_began = time.monotonic()
                self.deadline = self.task_began + WALL * self.timeout
                if what != "reading":
                    reason, gold_at_fault = rest
                    judgement = (GoldAtFault if gold_at_fault else Judgement)(Verdict(what), reason)
                    judged.append((self.tasks.popleft(), judgement))
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
            end = Judgement(Verdict.TIMEOUT, f"killed after {time.monotonic() - self.task_began:.1f} s")
            if died is not None:
                end = Judgement(Verdict.ERROR, f"the verifier's worker process {died}")
            judged.append((self.tasks.popleft(), end))
        self.lost = died is not None or bool(overdue)
        if chunk == b"" or (overdue and not self.reading):  # what it has not read may still be in the pipe
            self.kill()
            self.spawn()
        elif overdue:
            self.kill_fork()
        return judged


# ---- what runs inside a worker ----


# The parser reads constructs that it has parsed before ten times as fast, and every fork inherits its caches.
WARM_UP = [
    ("\\frac{\\sqrt{3}}{2}\\pi-x^{2}", "2x_{1}+3y"),
    ("(2a+1)(b-3)^{n}", "e^{-2t}\\sin(\\theta)+\\ln 5"),
    ("x\\le 3", "(-\\infty,3]"),
    ("2x+3y=6", "y=2-\\frac{2}{3}x"),
    ("\\binom{10}{3}\\cdot 5!", "\\log_{2} 8+|x-1|"),
]


class _OverBudget(BaseException):
    """Not an `Exception`: math-verify catches those."""


def serve(parent: int) -> None:
    """
    Imports what is slow, then forks a worker for each pair of descriptors that comes in by the socket on stdin, until
    `parent` ends.
    """
    import logging
    import resource

    started_by = psutil.Process(parent)

    def end_with_parent(*_) -> None:
        if not started_by.is_running() or started_by.status() == psutil.STATUS_ZOMBIE:
            os.killpg(0, signal.SIGKILL)

    signal.signal(
        signal.SIGALRM, end_with_parent
    )  # needed because children of a killed parent may keep the pipes open
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
    with contextlib.suppress(BrokenPipeError):  # the parent is gone; likewise below
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
    """
    Reads one JSON batch of tasks a line from stdin and answers one JSON verdict a line and task, until stdin closes.
    """
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
                judgement = grade(completion, answer, **options)
                signal.setitimer(signal.ITIMER_PROF, 0)
            except _OverBudget:
                judgement = Judgement(Verdict.TIMEOUT, f"stopped after {budget:g} CPU seconds")
            except MemoryError:
                judgement = Judgement(Verdict.ERROR, f"out of memory ({MEMORY_LIMIT >> 20} MiB)")
            except (
                Exception
            ) as error:  # any error of the grader is reported to the caller as the verdict `error` with its reason
                judgement = Judgement(Verdict.ERROR, f"{type(error).__name__}: {error}"[:500])
            signal.setitimer(signal.ITIMER_PROF, 0)
            answer = [*judgement, judgement.gold_at_fault, time.process_time()]
            print(json.dumps(answer), file=answers, flush=True)
