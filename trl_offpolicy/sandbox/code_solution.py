"""
The end of the line that has the solution: it is asked for functions, given arguments, and never sees a test or an
expected value.

Runs in a sandbox, from its text; it imports the standard library and `code_wire.py`, which comes with it.
"""

import builtins
import contextlib
import io
import operator
import os
import re
import sys
import types
from collections.abc import Iterator
from importlib.machinery import PathFinder
from opcode import opmap

from .code_wire import OUTPUT, Ended, Peer, decode, decode_numpy, encode, raised, run_coroutine


ERRORS = 1 << 16  # bytes at the end of what a script writes to standard error, of which the last line is reported


class Solution(Peer):
    """
    Holds the solution's objects, and does with them what it is asked: `[name of a function of operator or builtins,
    arguments, keywords]`.
    """

    def __init__(self, *pipes):
        super().__init__(*pipes)
        self.objects = []

    def keep(self, value):
        self.objects.append(value)
        error = isinstance(value, type) and issubclass(value, Exception)
        bases = [base.__name__ for base in value.__mro__] if error else []
        return {"object": [len(self.objects) - 1, isinstance(value, types.CoroutineType), bases, of_library(value)]}

    def meet(self, key, content):
        if key == "object":
            return self.objects[content]
        if key == "ndarray":
            return decode_numpy(content)
        return lambda *args, **kwargs: self.call_back(content, args, kwargs)

    def call_back(self, number, args, kwargs):
        reply = self.ask([number, encode(args, self.keep), encode(kwargs, self.keep)])
        if "raised" in reply:
            names, _, text = reply["raised"]
            raise getattr(builtins, names[0], RuntimeError)(text)
        return decode(reply["value"], self.meet)

    def answer(self, question):
        printed = io.StringIO()
        reply = {}
        try:
            name, args, kwargs = question[0], decode(question[1], self.meet), decode(question[2], self.meet)
            given = [*args, *kwargs.values()]
            given = [given[first] for first in question[3]]  # one object that is given twice is one here, too
            args, kwargs = given[: len(args)], dict(zip(kwargs, given[len(args) :], strict=True))
            function = run_coroutine if name == "await" else getattr(operator, name, None) or getattr(builtins, name)
            with contextlib.redirect_stdout(printed):
                value = function(*args, **kwargs)
            reply = {"value": encode(value, self.keep)}
            if value is None and name == "call":  # it may have worked in place
                reply["after"] = encode(given[1:], self.keep)
        except BaseException as error:
            reply = {"raised": raised(error, self.keep), "memory": ran_out(error), "missing": missing(error)}
        return {**reply, "printed": printed.getvalue()[:OUTPUT]}


def ran_out(error):
    """Whether it is the limit that raised a `MemoryError`, and no `raise MemoryError`."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    code = trace.tb_frame.f_code.co_code[trace.tb_lasti : trace.tb_lasti + 2] if trace else b""
    return isinstance(error, MemoryError) and not (code[:1] == bytes([opmap["RAISE_VARARGS"]]) and code[1] > 0)


def of_library(value):
    """What a library's object is called that cannot be sent, though a test may expect just that; else nothing."""
    module = type(value).__module__
    apart = module in ("builtins", "solution") or callable(value) or isinstance(value, Iterator)
    return "" if apart else f"{module}.{type(value).__qualname__}"


def missing(error):
    """The package for want of which something was not imported; nothing if it is another error, or is installed."""
    root = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return "" if not root or root in sys.stdlib_module_names or PathFinder.find_spec(root) else root


def run_solution(task, peer):
    module = types.ModuleType(
        "solution"
    )  # not __main__: an `if __name__ == "__main__"` that reads input is not what is tested
    sys.modules["solution"] = module  # where dataclasses and type hints look for it
    try:
        exec(compile(task["code"], "solution.py", "exec"), module.__dict__)
        found = {name: getattr(module, name) for name in task["names"] if hasattr(module, name)}
        first = {"value": encode(found, peer.keep)}
    except BaseException as error:
        first = {"raised": raised(error, peer.keep), "memory": ran_out(error), "missing": missing(error)}
    peer.write(first)
    while True:
        peer.reply(peer.read()["question"])


def run_script(task, peer):
    """The solution as a script, once for every input it is sent."""
    with open("solution.py", "w") as file:
        file.write(task["code"])
    while True:
        with open("stdin", "w+b") as given, open("stdout", "w+b") as out, open("stderr", "w+b") as errors:
            given.write(peer.read()["input"].encode(errors="surrogatepass"))
            given.seek(0)
            pipes = [(os.POSIX_SPAWN_DUP2, file.fileno(), i) for i, file in enumerate((given, out, errors))]
            command = [sys.executable, "-I", "solution.py"]
            process = os.posix_spawn(
                sys.executable, command, {**os.environ, "PYTHONIOENCODING": "utf-8"}, file_actions=pipes
            )
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            out.seek(0)
            begin = errors.seek(max(0, errors.seek(0, 2) - ERRORS))
            lines = (
                errors.read().decode(errors="replace").rstrip().splitlines()[1 if begin else 0 :]
            )  # whole lines only
            last = lines[-1] if lines else ""
            memory = last.startswith("MemoryError") and not lines[-2:][0].strip().startswith("raise MemoryError")
            reply = {"output": out.read(OUTPUT + 1).decode(errors="replace"), "code": code, "error": last}
            absent = re.match(r"ModuleNotFoundError: No module named '([^']+)'", last)
            lacks = missing(ModuleNotFoundError(name=absent[1])) if absent else ""
            peer.write({**reply, "memory": memory, "missing": lacks})


def main(task, source):
    """
    Takes standard output for the line to the other end, and leaves neither it nor standard error to the solution.
    """
    target, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    with contextlib.suppress(Ended):
        run_script(task, Peer(source, target)) if task["script"] else run_solution(task, Solution(source, target))
    os._exit(0)
