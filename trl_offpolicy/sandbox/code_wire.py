"""How solution and tests talk: lines of JSON in which plain data, and nothing else, comes across.

Runs in the sandboxes (`code_solution.py` and `code_tests.py` have the two ends), so it imports the standard library
only.
"""

import importlib
import json
import os
import re
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import timedelta


MESSAGE = 32 << 20  # bytes of a line
OUTPUT = 4 << 20  # characters of what a solution prints that are looked at
# Plain data beside None, bool, int, float, str and list: (type, to a list of plain data, from it), the subclasses
# before their bases.
KINDS = {
    "tuple": (tuple, list, tuple),
    "frozenset": (frozenset, list, frozenset),
    "set": (set, list, set),
    "Counter": (Counter, lambda d: list(d.items()), lambda items: Counter(dict(items))),
    "OrderedDict": (OrderedDict, lambda d: list(d.items()), OrderedDict),
    "defaultdict": (defaultdict, lambda d: [d.default_factory, *d.items()], lambda d: defaultdict(d[0], d[1:])),
    "dict": (dict, lambda d: list(d.items()), dict),
    "bytes": (bytes, list, bytes),
    "bytearray": (bytearray, list, bytearray),
    "complex": (complex, lambda c: [c.real, c.imag], lambda c: complex(*c)),
    "deque": (deque, list, deque),
    "range": (range, lambda r: [r.start, r.stop, r.step], lambda r: range(*r)),
    "timedelta": (timedelta, lambda d: [d.days, d.seconds, d.microseconds], lambda d: timedelta(*d)),
}
TEXTS = {
    ("fractions", "Fraction"): "__call__",
    ("decimal", "Decimal"): "__call__",
    ("datetime", "date"): "fromisoformat",
    ("datetime", "datetime"): "fromisoformat",
    ("datetime", "time"): "fromisoformat",
}
# Classes that are data themselves: what a defaultdict makes, what `f(1) is int` asks for.
TYPES = {kind.__name__: kind for kind in (bool, int, float, str, list, *(kind for kind, _, _ in KINDS.values()))}
# What numpy calls the items of arrays that come across as arrays; others do as lists.
ITEMS = re.compile(r"[<>|](?:b1|[iu][1248]|f[248]|c8|c16|[US]\d+)")


class Ended(BaseException):
    """The other side is gone."""


def encode(value, keep):
    """JSON of plain data; what is something else becomes what `keep(value)` returns, an object of one key."""
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return encode_numpy(value, keep)
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
    if isinstance(value, type) and TYPES.get(name := value.__name__) is value:
        return {"type": name}
    return keep(value)


def encode_numpy(value, keep):
    """An array with the type of its items and its shape, which a single number has not (`None`)."""
    array = type(value).__name__ == "ndarray"
    if (array or value.shape == ()) and ITEMS.fullmatch(value.dtype.str):
        return {"ndarray": [value.dtype.str, value.shape if array else None, encode(value.ravel().tolist(), keep)]}
    plain = value.tolist()
    return keep(value) if type(plain) is type(value) else encode(plain, keep)


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
    if key == "type":
        return TYPES[content]
    if key in KINDS:
        return KINDS[key][2]([decode(d, meet) for d in content])
    return meet(key, content)


def decode_numpy(content):
    """The reverse of [`encode_numpy`]."""
    items, shape, flat = content
    if not ITEMS.fullmatch(items):
        raise ValueError(f"{items!r:.100} are no items of an array")
    array = importlib.import_module("numpy").array(decode(flat, None), items).reshape(shape or ())
    return array[()] if shape is None else array


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
