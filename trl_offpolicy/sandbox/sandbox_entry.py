"""What runs first in a sandbox: it shuts itself in, sets limits, and then runs the program that it was sent.

`sandbox.py` hands this text to `python -c` (in a container there is no file of ours), so it needs nothing but the
standard library. The first line of standard input is a JSON object: `kind`, the limits, `path` and `program` (modules
of this package as name and text, of which the last has a `main(task, source)`); the rest of it, as `source`, belongs
to the program.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
import types


TOO_MANY, REFUSED, OUT_OF_MEMORY = 97, 98, 99  # exit codes; a process that a signal ended has 128 + its number
NOBODY = 65534
FILE_BYTES, FILES, PROCESSES = 64 << 20, 256, 64
MOUNT_READONLY, MOUNT_NOSUID, MOUNT_NODEV, MOUNT_NOEXEC, MOUNT_BIND, MOUNT_REC, MOUNT_PRIVATE = (
    1,
    2,
    4,
    8,
    1 << 12,
    1 << 14,
    1 << 18,
)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
AT_RECURSIVE, UMOUNT_DETACH = 0x8000, 2
# CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID, and the network
NAMESPACES, NETWORK = 0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000, 0x40000000
# System calls by architecture. Denied: memory that is in no process's size (memfd_create, memfd_secret, shmget), and
# keys of the kernel's keyrings (add_key, request_key, keyctl); for the network socket and io_uring_setup.
CALLS = {
    "x86_64": {"audit": 0xC000003E, "pivot_root": 155, "denied": (319, 447, 29, 248, 249, 250), "network": (41, 425)},
    "aarch64": {
        "audit": 0xC00000B7,
        "pivot_root": 41,
        "denied": (279, 447, 194, 217, 218, 219),
        "network": (198, 425),
    },
}.get(os.uname().machine)
MOUNT_SETATTR = 442

libc = ctypes.CDLL(None, use_errno=True)


def call(name, *arguments):
    """A function of the C library; `OSError` says which of them failed."""
    converted = [
        ctypes.c_long(a) if isinstance(a, int) else a.encode() if isinstance(a, str) else a for a in arguments
    ]
    if getattr(libc, name)(*converted) < 0:
        code = ctypes.get_errno()
        raise OSError(f"{' '.join([name, *(a for a in arguments if isinstance(a, str))])}: {os.strerror(code)}")


def exit_code(status):
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def enter_namespaces(task):
    """
    Returns as process 1 of new namespaces, whose end is the end of every other process in them; nobody but nobody's
    user is in there.
    """
    root, user, group, outer = os.geteuid() == 0, os.geteuid(), os.getegid(), os.getpid()
    unshared, tell = os.pipe()
    helper = os.fork()
    if not helper:  # stays outside, because only from there can root map a second user
        os.close(tell)
        if os.read(unshared, 1):
            if not root:
                write(f"/proc/{outer}/setgroups", "deny")
            for name, own in (("uid_map", user), ("gid_map", group)):
                write(f"/proc/{outer}/{name}", f"0 {own} 1\n{NOBODY} {NOBODY} 1" if root else f"{NOBODY} {own} 1")
        os._exit(0)
    call("unshare", NAMESPACES | (0 if task["allow_network"] else NETWORK))
    os.write(tell, b"x")
    os.close(tell)
    os.close(unshared)
    if os.waitpid(helper, 0)[1]:
        raise OSError("the user could not be mapped into the new namespace")
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    first = os.fork()
    if first:
        os._exit(exit_code(os.waitpid(first, 0)[1]))
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    new_root(task["visible"], task["temporary_bytes"])


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def new_root(visible, temporary_bytes):
    """
    A root of its own: what is `visible`, read-only; the harmless devices; this namespace's processes; an empty, small
    /tmp.
    """
    sources = {
        path: os.path.realpath(path) for path in visible
    }  # resolved now, before the new root changes what links point to
    os.umask(0o022)
    call("mount", None, "/", None, MOUNT_REC | MOUNT_PRIVATE, None)
    call("mount", "tmpfs", "/tmp", "tmpfs", MOUNT_NOSUID, "mode=755,size=1m")
    os.mkdir("/tmp/old")
    call("syscall", CALLS["pivot_root"], "/tmp", "/tmp/old")
    os.chdir("/")
    os.mkdir("/tmp")  # before what is visible, some of which may lie in it
    size = f"mode=1777,size={temporary_bytes},nr_inodes=4096"
    call("mount", "tmpfs", "/tmp", "tmpfs", MOUNT_NOSUID | MOUNT_NODEV, size)
    for path in sorted(visible):
        if os.path.lexists(path):
            continue  # in one that is there already
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.islink(f"/old{path}") and os.path.dirname(path) == "/":  # /bin is usr/bin
            os.symlink(os.readlink(f"/old{path}"), path)
        else:
            bind(f"/old{sources[path]}", path)
    os.mkdir("/dev")
    for device in ("null", "zero", "full", "random", "urandom"):
        bind(f"/old/dev/{device}", f"/dev/{device}")
    os.symlink("/proc/self/fd", "/dev/fd")
    os.symlink("/tmp", "/dev/shm")
    os.mkdir("/proc")
    call("mount", "proc", "/proc", "proc", MOUNT_NOSUID | MOUNT_NODEV | MOUNT_NOEXEC, "subset=pid")
    call("umount2", "/old", UMOUNT_DETACH)
    os.rmdir("/old")
    set_attributes("/", AT_RECURSIVE, MOUNT_READONLY | MOUNT_NOSUID, 0)
    set_attributes("/tmp", 0, 0, MOUNT_READONLY)
    os.chdir("/tmp")


def set_attributes(path, flags, added, removed):
    """Of the mount at `path`, and with AT_RECURSIVE of all below it."""
    call("syscall", MOUNT_SETATTR, -1, path, flags, struct.pack("QQQQ", added, removed, 0, 0), 32)


def bind(source, target):
    os.mkdir(target) if os.path.isdir(source) else open(target, "w").close()
    call("mount", source, target, None, MOUNT_BIND | MOUNT_REC, None)


def watch(child, memory):
    """
    As process 1: waits for `child`, and ends it all when there are too many processes, or they and /tmp have more than
    `memory` bytes.
    """
    while True:
        signal.sigtimedwait({signal.SIGCHLD}, 0.02)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == child:
                    os._exit(exit_code(ended[1]))
        disk = os.statvfs("/tmp")
        used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
        processes = [name for name in os.listdir("/proc") if name.isdigit() and name != "1"]
        if len(processes) > PROCESSES:  # of root, whom bubblewrap cannot make anyone else, the kernel counts none
            os._exit(TOO_MANY)
        for process in processes:
            with contextlib.suppress(OSError), open(f"/proc/{process}/status") as file:
                used += sum(int(line.split()[1]) << 10 for line in file if line.startswith(("RssAnon", "RssShmem")))
        if used > memory:
            os._exit(OUT_OF_MEMORY)


def set_limits(task, enclosed):
    memory = task["memory_bytes"]
    limits = {"CPU": task["cpu_seconds"], "AS": memory, "FSIZE": FILE_BYTES, "NOFILE": FILES, "CORE": 0}
    if enclosed:  # without namespaces the limit would count all processes of the user
        limits["NPROC"] = PROCESSES
    for name, limit in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]  # may be lower already, and can then not be raised
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def drop_rights(task, enclosed):
    """
    No capabilities, none to be had from a program either, and a filter for the system calls that the namespaces leave
    open.
    """
    if enclosed and os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if enclosed:
        call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    if CALLS is None:
        if enclosed or task["allow_network"]:
            return
        raise OSError(
            f"the network cannot be closed on {os.uname().machine}; pass allow_network=True where that does not matter"
        )
    denied = CALLS["denied"] + (() if task["allow_network"] else CALLS["network"])
    refuse, allow = (6, 0, 0, 0x50001), (6, 0, 0, 0x7FFF0000)  # fails with EPERM
    # BPF: another architecture's calls are refused (also x86-64's second ABI), then the denied ones; a jump counts
    # what it skips
    program = [
        (0x20, 0, 0, 4),
        (0x15, 1, 0, CALLS["audit"]),
        refuse,
        (0x20, 0, 0, 0),
        (0x35, 0, 1, 0x40000000),
        refuse,
    ]
    program += [(0x15, len(denied) - i, 0, number) for i, number in enumerate(denied)] + [allow, refuse]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    call("prctl", PR_SET_SECCOMP, 2, struct.pack("HL", len(program), ctypes.addressof(code)), 0, 0)


def main():
    source = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    task = json.loads(source.readline())
    enclosed = task["kind"] in ("bubblewrap", "unshare")
    try:
        if task["kind"] == "unshare":
            enter_namespaces(task)
        if enclosed:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
            child = os.fork()
            if child:
                call("prctl", PR_SET_DUMPABLE, 0)
                watch(child, task["memory_bytes"])
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        set_limits(task, enclosed)
        drop_rights(task, enclosed)
    except OSError as error:
        os.write(2, str(error).encode())
        os._exit(REFUSED)
    sys.path += task["path"]
    sys.modules["trl_offpolicy"] = types.ModuleType("trl_offpolicy")
    for name, text in task["program"].items():
        module = sys.modules[f"trl_offpolicy.{name}"] = types.ModuleType(f"trl_offpolicy.{name}")
        exec(compile(text, f"{name}.py", "exec"), vars(module))
    module.main(task, source)


if __name__ == "__main__":
    main()
