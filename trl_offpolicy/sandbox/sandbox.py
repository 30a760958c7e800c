"""Where code that nobody has read runs: in namespaces of its own, or in a container of yours."""

import json
import os
import select
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from .sandbox_entry import FILE_BYTES, PROCESSES


# What a sandbox sees of the system, read-only, beside the interpreter's own folders. Of /etc what the loader of
# libraries needs.
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime")  # fmt: skip
FINAL_WAIT = 5.0  # seconds for a killed process to be gone
_ENTRY = Path(__file__).with_name("sandbox_entry.py")


class Sandbox:
    """
    Runs Python programs away from everything else; [`running`] starts one, connected by its standard input and output.

    With `"bubblewrap"` and `"unshare"` (user, mount, pid, network, IPC, UTS and cgroup namespaces) a program

    * sees /usr, the libraries, this interpreter and its installed packages, read-only; no home, no other file, no
      environment variable, no process but its own; it can write to an empty /tmp of 64 MiB, which goes with it;
    * has no network (unless `allow_network`), no capabilities, nobody's user id, and cannot become anyone;
    * has `cpu_seconds` for each process, `memory_mb` for all of its processes and files together, and 64 processes;
    * ends with everything it has started when it is killed, when it ends, or when this process does.

    What is *not* guaranteed: a fault in the kernel is a way out; what one program learns by timing or leaves in a
    cache of the processor is not hidden from another.

    Args:
        sandbox (`str` or `Callable`, *optional*): `"bubblewrap"`, `"unshare"`; by default the first of the two that
            works here. `"docker"`: `docker run` of `python:3.X-slim` without network, rights and writable files. A
            function, for every other kind of container: it gets the command (a list of strings, `["python3", "-I",
            "-c", ...]`) and returns the command that runs it isolated, with standard input and output connected. The
            command starts with this process's environment, which it must not hand on, and limits beyond CPU time and
            memory of one process are its own affair.
        memory_mb (`int`): MiB.
        cpu_seconds (`int`): Whole seconds for each process.
        wall_seconds (`float`): When a container, which a killed client may leave behind, ends by itself.
        allow_network (`bool`): Whether there is a network.
        allow_unsandboxed (`bool`): Where neither of the two works, run all the same, as *you*: a program can read your
            files and the environment of your processes (tokens are in there), write where you can, kill what you run,
            reach the process that has its tests, and outlive this one. Only limits on CPU time, memory of one process,
            size of a file, and the network remain. Meant for a machine that holds nothing of worth, such as a
            container of its own.

    Raises:
        ValueError: If what was asked for does not work here, with the reason.
    """

    def __init__(
        self,
        sandbox: str | Callable[[list[str]], list[str]] | None,
        memory_mb: int,
        cpu_seconds: int,
        wall_seconds: float,
        allow_network: bool,
        allow_unsandboxed: bool,
    ):
        self.limits: dict[str, Any] = {
            "memory_bytes": memory_mb << 20,
            "cpu_seconds": cpu_seconds,
            "wall_seconds": wall_seconds,
            "allow_network": allow_network,
        }
        if callable(sandbox) or sandbox == "docker":
            self.kind = sandbox
        elif sandbox in (None, "bubblewrap", "unshare"):
            self.kind = _first_that_works(sandbox, allow_unsandboxed)
        else:
            raise ValueError(
                f"You passed sandbox={sandbox!r}; use 'bubblewrap', 'unshare', 'docker', or a function from a command to the command that runs it isolated."
            )

    @contextmanager
    def running(self, stdin: int, stdout: int) -> Iterator[subprocess.Popen]:
        """
        A process that waits for [`order`] on its standard input; it and all it started are killed at the end of the
        `with` block.
        """
        outside = self.kind == "none"
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
            environment = {"PATH": os.defpath, "HOME": directory if outside else "/tmp", "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(
                self._command(), stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, start_new_session=True, cwd=directory,
                env=environment if isinstance(self.kind, str) and self.kind != "docker" else None,
            )  # fmt: skip
            try:
                yield process
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.stderr.close()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(FINAL_WAIT)

    def order(self, program: dict[str, str], **task) -> bytes:
        """
        The line that a process of [`running`] waits for: modules by name, the last of which has the `main(task,
        source)` that it runs.
        """
        own = isinstance(self.kind, str) and self.kind != "docker"
        return _line(
            {
                **task,
                **self.limits,
                "kind": self.kind if own else "container",
                "program": program,
                "path": _packages() if own else [],
                "visible": _visible(),
                "temporary_bytes": FILE_BYTES,
            }
        )

    def _command(self) -> list[str]:
        entry = ["-c", _ENTRY.read_text()]
        if callable(self.kind):
            return self.kind(["python3", "-I", *entry])
        if self.kind == "docker":
            memory = f"{self.limits['memory_bytes']}b"
            return [
                "docker", "run", "--rm", "-i", "--network", "bridge" if self.limits["allow_network"] else "none",
                "--read-only", "--tmpfs", f"/tmp:size={FILE_BYTES},mode=1777", "--workdir", "/tmp", "--env", "HOME=/tmp",
                "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--user", "65534:65534",
                "--pids-limit", str(PROCESSES), "--memory", memory, "--memory-swap", memory,
                f"python:{sys.version_info.major}.{sys.version_info.minor}-slim",
                "timeout", "-s", "KILL", f"{self.limits['wall_seconds']:g}", "python", "-I", *entry,
            ]  # fmt: skip
        python = [sys.executable, "-I", "-S", *entry]  # -S: what .pth files of the site start would run first
        return [*_bubblewrap(self.limits["allow_network"]), *python] if self.kind == "bubblewrap" else python


@cache
def _first_that_works(sandbox: str | None, allow_unsandboxed: bool) -> str:
    refused = []
    for kind in ("bubblewrap", "unshare") if sandbox is None else (sandbox,):
        if sys.platform != "linux":
            refused.append(f"{kind}: this is {sys.platform}, not Linux")
        elif kind == "bubblewrap" and not shutil.which("bwrap"):
            refused.append("bubblewrap: not installed")
        elif why := _try(kind):
            refused.append(f"{kind}: {why}")
        else:
            return kind
    if allow_unsandboxed and sandbox is None:
        return "none"
    raise ValueError(
        f"Code cannot be run in a sandbox here ({'; '.join(refused)}). Install bubblewrap (apt install bubblewrap), allow unprivileged user namespaces, "
        "or pass sandbox='docker' or a function that runs a command in a container of yours. allow_unsandboxed=True runs it as you, with your "
        "files and tokens in its reach: only on a machine that holds nothing of worth."
    )


def _try(kind: str) -> str:
    """Why `kind` does not work here; empty if it does."""
    trial = object.__new__(Sandbox)
    trial.kind = kind
    trial.limits = {"memory_bytes": 512 << 20, "cpu_seconds": 10, "wall_seconds": 30.0, "allow_network": False}
    read, written = os.pipe()
    deadline = time.monotonic() + 30
    with trial.running(subprocess.PIPE, written) as process, open(read, "rb"), process.stdin:
        os.close(written)
        write(process.stdin.fileno(), trial.order({"trial": "def main(task, source): print('in')"}), deadline)
        try:
            said = read_line(read, 100, deadline)
        except TimeoutError:
            return "it did not start within 30 s"
        return "" if said == b"in\n" else complaint(process) or "it did not start"


@cache
def _packages() -> list[str]:
    return [path for path in site.getsitepackages() if os.path.isdir(path)]


@cache
def _visible() -> list[str]:
    own = [
        os.path.join(p, name) for p in (sys.prefix, sys.base_prefix) for name in ("bin", "lib", "lib64", "pyvenv.cfg")
    ]
    return [path for path in dict.fromkeys([*SYSTEM, *own, *_packages()]) if os.path.exists(path)]


def _bubblewrap(allow_network: bool) -> list[str]:
    command = [
        shutil.which("bwrap"),
        "--unshare-user",
        "--unshare-all",
        "--die-with-parent",
        "--new-session",
        "--as-pid-1",
        "--cap-drop",
        "ALL",
    ]
    command += ["--uid", "65534", "--gid", "65534", *(["--share-net"] if allow_network else [])]
    command += ["--tmpfs", "/tmp"]  # before what is visible, some of which may lie in it
    for path in _visible():
        if os.path.islink(path) and os.path.dirname(path) == "/":
            command += ["--symlink", os.readlink(path), path]
        else:
            command += ["--ro-bind", os.path.realpath(path), path]
    # bubblewrap started by root is root outside: without capabilities, but /proc/sys asks for no more than the user's
    # id
    system = ["--proc", "/proc", "--remount-ro", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    return [*command, *system, "--remount-ro", "/", "--chdir", "/tmp", "--"]


def _line(message) -> bytes:
    return json.dumps(message).encode() + b"\n"


def write(pipe: int, data: bytes, deadline: float) -> None:
    """
    Hands over `data`, or gives up when the other side is gone; `TimeoutError` at `deadline` (of `time.monotonic`).
    """
    poll = select.poll()
    poll.register(pipe, select.POLLOUT)
    with suppress(BrokenPipeError):
        while data:
            _wait(poll, deadline)
            data = data[os.write(pipe, data[: select.PIPE_BUF]) :]  # so much is taken without waiting


def read_line(pipe: int, limit: int, deadline: float) -> bytes:
    """
    A line of at most `limit` bytes, or what there was of one at the end; `TimeoutError` at `deadline` (of
    `time.monotonic`).
    """
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    data = bytearray()
    while len(data) < limit and not data.endswith(b"\n"):
        _wait(poll, deadline)
        if not (more := os.read(pipe, min(1 << 16, limit - len(data)))):
            break
        data += more
    return bytes(data)


def _wait(poll, deadline: float) -> None:
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def complaint(process: subprocess.Popen) -> str:
    """What a process that ended (or is about to) has said of why its sandbox could not be made; empty if it could."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(1.0)
    with suppress(TimeoutError):
        said = read_line(process.stderr.fileno(), 4096, time.monotonic()).decode(errors="replace").strip()
        return said.splitlines()[-1] if said else ""
    return ""
