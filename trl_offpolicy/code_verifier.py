"""Code against unit tests, in a process with limits on time, memory, files and network."""

import ast
import contextlib
import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

from .rows import Verdict
from .verification import Verifier


# What runs in the sandboxed process: limits first, then the code, then its tests. The token says that the end was reached.
_SANDBOX = r"""
import ctypes, json, os, platform, resource, struct, sys
task = json.loads(sys.stdin.read())
out, memory = os.dup(1), task["memory_mb"] << 20
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
for what, limit in ((resource.RLIMIT_CPU, task["cpu"]), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 1 << 26), (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(what, (limit, limit))
if not task["allow_network"]:
    # seccomp: socket(2) and io_uring_setup(2) fail with EPERM, here and in every child; x86-64's second ABI is refused too
    arch, socket = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}[platform.machine()]
    program = [(0x20, 0, 0, 4), (0x15, 0, 5, arch), (0x20, 0, 0, 0), (0x35, 3, 0, 0x40000000), (0x15, 2, 0, 425), (0x15, 1, 0, socket), (6, 0, 0, 0x7FFF0000), (6, 0, 0, 0x50001)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *i) for i in program))
    libc, filters = ctypes.CDLL(None), struct.pack("HL", len(program), ctypes.addressof(code))
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.c_char_p(filters), 0, 0):
        os.write(out, b"no seccomp")
        os._exit(1)
name = {"__name__": "__main__"}
try:
    for part in ("code", "tests"):
        exec(compile(task[part], part, "exec"), name)
except BaseException as error:
    os.write(out, json.dumps([type(error).__name__, str(error)[:300], part]).encode())
    os._exit(1)
os.write(out, task["token"].encode())
os._exit(0)
"""


class CodeVerifier(Verifier):
    """
    Python code (the last fenced block of a completion) that must pass the answer: unit tests, as source or a list of asserts.

    Each runs in a process of its own in an empty directory, without the parent's environment variables, with limits on CPU time, wall clock,
    memory and file size, and without network (seccomp; Linux on x86-64 or aarch64). This stops accidents, not attackers: the
    code can read the files you can read and start processes. Run it in a container when you do not trust the model.

    Args:
        timeout (`float`, *optional*, defaults to `5.0`): CPU seconds; three times as many on the wall clock.
        memory_mb (`int`, *optional*, defaults to `512`): Address space in MiB.
        num_workers (`int`, *optional*): How many run at a time; by default one for each core.
        allow_network (`bool`, *optional*, defaults to `False`): Where the network cannot be blocked, nothing runs without this.
    """

    stated = False

    def __init__(
        self, timeout: float = 5.0, memory_mb: int = 512, num_workers: int | None = None, allow_network: bool = False
    ):
        if sys.platform != "linux":
            raise ValueError(
                f"CodeVerifier's limits are those of Linux, and this is {sys.platform}: run it in a container."
            )
        if timeout <= 0 or memory_mb < 64:
            raise ValueError(
                f"You passed timeout={timeout}, memory_mb={memory_mb}; it needs time, and 64 MiB to start in."
            )
        self.limits = {"timeout": timeout, "memory_mb": memory_mb, "allow_network": allow_network}
        self.num_workers = num_workers or len(os.sched_getaffinity(0))

    def _explain(self, completions: list[str], answers: list) -> list[tuple[Verdict, str]]:
        with ThreadPoolExecutor(self.num_workers) as pool:
            return list(pool.map(self._judge, completions, answers))

    def _judge(self, completion: str, answer) -> tuple[Verdict, str]:
        tests = "\n".join(answer) if isinstance(answer, list) else answer or ""
        blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", completion, re.S | re.I)
        try:
            if not ast.parse(tests).body:
                return Verdict.UNPARSABLE, "there are no tests"
        except (SyntaxError, ValueError) as error:
            return Verdict.UNPARSABLE, f"the tests do not compile: {error}"[:300]
        if not blocks:
            return Verdict.UNPARSABLE, "the completion has no fenced code block"
        token = secrets.token_hex(16)
        task = json.dumps(
            {
                **self.limits,
                "cpu": math.ceil(self.limits["timeout"]),
                "code": blocks[-1],
                "tests": tests,
                "token": token,
            }
        ).encode()
        timeout = self.limits["timeout"]
        with tempfile.TemporaryDirectory() as directory:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", _SANDBOX], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                cwd=directory, env={"PATH": os.defpath, "HOME": directory, "OMP_NUM_THREADS": "1"}, start_new_session=True,
            )  # fmt: skip
            try:
                told = process.communicate(task, timeout=3 * timeout)[0].decode(errors="replace")
            except subprocess.TimeoutExpired:
                return Verdict.TIMEOUT, f"killed after {3 * timeout:g} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and whatever it started
                process.communicate()
        if told == token:
            return Verdict.CORRECT, ""
        if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            return Verdict.TIMEOUT, f"stopped after {timeout:g} CPU seconds"
        if told == "no seccomp" or not told and process.returncode == 1:
            return Verdict.ERROR, "the sandbox could not block the network; pass allow_network=True inside a container"
        if not told.startswith("["):
            return Verdict.WRONG, f"ended with exit code {process.returncode} before its tests did"
        kind, message, part = json.loads(told)
        if kind == "MemoryError":
            return Verdict.ERROR, f"out of memory ({self.limits['memory_mb']} MiB)"
        return Verdict.WRONG, f"{kind} in its {part}: {message}"
