"""How solution and tests talk: lines of JSON in which plain data, and nothing else, comes across.

Runs in the sandboxes (`code_solution.py` and `code_tests.py` have the two ends), so it imports the standard library
only.
"""

import importlib
import json
import os
from collections import deque


MESSAGE = 32 << 20  # bytes of a line
OUTPUT = 4 << 20  # characters of what a solution prints that are looked at
# Plain data beside None, bool, int, float, str and list: (type, to a list of plain data, from it), the subclasses
# before their bases.
KINDS = {
    "tuple": (tuple, list, tuple),
    "frozenset": (frozenset, list, frozenset),
    "set": (set, list, set),
    "dict": (dict, lambda d: list(d.items()), dict),
    "bytes": (bytes, list, bytes),
    "bytearray": (bytearray, list, bytearray),
    "complex": (complex, lambda c: [c.real, c.imag], lambda c: complex(*c)),
    "deque": (deque, list, deque),
    "range": (range, lambda r: [r.start, r.stop, r.step], lambda r: range(*r)),
}
TEXTS = {
    ("fractions", "Fraction"): "__call__",
    ("decimal", "Decimal"): "__call__",
    ("datetime", "date"): "fromisoformat",
    ("datetime", "datetime"): "fromisoformat",
    ("datetime", "time"): "fromisoformat",
}


class Ended(BaseException):
    """The other side is gone."""


def encode(value, keep):
    """JSON of plain data; what is something else becomes what `keep(value)` returns, an object of one key."""
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, int):
        return value if -(1 << 53) < value < 1 << 53 else {"int": hex(value)}
    if isinstance(value, list):
        return [encode(v, keep) for v in value]
    for name, (kind, take, _) in KINDS.items():
        if isinstance(value, kind):
            return {name: [encode(v, keep) for v in take(value)]}
    module, name = type(value).__module__, type(value).__name__
    if (module, name) in TEXTS:
        return {"text": [module, name, str(value)]}
    if module == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist(), keep)
    return keep(value)


def decode(data, meet):
    """The reverse; `meet(key, content)` is what stands for an object that is no plain data."""
    if isinstance(data, list):
        return [decode(d, meet) for d in data]
    if not isinstance(data, dict):
        return data
    ((key, content),) = data.items()
    if key == "int":
        return int(content, 16)
    if key == "text":
        module, name, text = content
        constructor = TEXTS[
            module, name
        ]  # before anything is imported: what is asked for here is the other end's choice
        kind = getattr(importlib.import_module(module), name)
        return kind(text) if constructor == "__call__" else getattr(kind, constructor)(text)
    if key in KINDS:
        return KINDS[key][2]([decode(d, meet) for d in content])
    return meet(key, content)


class Peer:
    """One end of the line: asks, and while it waits answers what the other end asks back."""

    def __init__(self, source, target):
        self.source, self.target = source, target

    def read(self):
        line = self.source.readline(MESSAGE)
        if not line.endswith(b"\n"):
            raise Ended
        return json.loads(line)

    def write(self, message):
        data = json.dumps(message).encode() + b"\n"
        if len(data) > MESSAGE:
            raise ValueError(f"{len(data):,} bytes are more than a message may have")
        try:
            while data:
                data = data[os.write(self.target, data) :]
        except BrokenPipeError:
            raise Ended from None

    def ask(self, question):
        self.write({"question": question})
        while "question" in (message := self.read()):
            self.reply(message["question"])
        return message

    def reply(self, question):
        try:
            self.write(self.answer(question))
        except (ValueError, MemoryError, RecursionError) as error:  # too large to be sent
            self.write({"raised": raised(error, self.keep), "memory": isinstance(error, MemoryError)})

    def answer(self, question):
        raise NotImplementedError

    def keep(self, value):
        raise NotImplementedError


def raised(error, keep):
    """An exception as data: the names of its class and of those above, its arguments, its text."""
    names = [base.__name__ for base in type(error).__mro__]
    try:
        return [names, encode(list(error.args), keep), str(error)[:1000]]
    except BaseException:
        return [names, [], "an error that cannot be told"]


def run_coroutine(coroutine):
    import asyncio  # whose import takes longer than most tests

    return asyncio.run(coroutine)
