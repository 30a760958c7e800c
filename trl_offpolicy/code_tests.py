"""The end of the line that has the tests: it holds a [`Remote`] for every function and class of the solution, and compares what comes back.

Nothing of the solution's making runs here: no `__eq__`, no patched builtin, no early exit of it can make a test pass. Runs in a
sandbox, from its text; it imports the standard library and `code_wire.py`, which comes with it.
"""

import builtins
import importlib
import json
import os
import sys
import types
from collections import deque

from trl_offpolicy.code_wire import Ended, Peer, decode, encode, raised, run_coroutine


class CannotSend(BaseException):
    """The tests pass something to the solution that is no plain data."""


class Remote:
    """
    An object of the solution, as the tests see it: what is done with it is done over there, and comes back as data.

    Its operators are not trusted with the tests' own values, for which `abs(f(2) - 4) < 1e-6` would let any object pass: they are asked for only
    where the tests made the object themselves, by calling a name in capitals, as one of a class; and nothing of it equals plain data.
    """

    def __init__(self, number, name="", made=False):
        vars(self).update(_number=number, _name=name, _made=made)

    def __call__(self, *args, **kwargs):
        tests.calls += 1
        value = tests.do("call", self, *args, **kwargs)
        if isinstance(value, Remote) and self._name[:1].isupper():
            vars(value)["_made"] = True
        return value

    def __getattr__(self, name):
        return tests.do("getattr", self, name)

    def __setattr__(self, name, value):
        tests.do("setattr", self, name, value)

    def __eq__(self, other):
        return isinstance(other, Remote) and bool(tests.do("eq", self, other))

    def __ne__(self, other):
        return not isinstance(other, Remote) or bool(tests.do("ne", self, other))

    def __hash__(self):
        return tests.do("hash", self)

    def __bool__(self):
        return bool(tests.do("truth", self))

    def __contains__(self, item):
        return bool(self._operate("contains", self, item))

    def __instancecheck__(self, instance):
        return isinstance(instance, Remote) and bool(tests.do("isinstance", instance, self))

    def __exit__(self, kind, error, trace):
        return tests.do("call", self.__getattr__("__exit__"), None, None, None)

    def _operate(self, name, left, right):
        for side in (left, right):
            if isinstance(side, Remote) and not side._made:
                raise TypeError(
                    f"the solution returned an object of its own where the tests compute with data ({name})"
                )
        value = tests.do(name, left, right)
        if isinstance(value, Remote):
            vars(value)["_made"] = True
        return value


def _operators():
    def unary(name):
        return lambda self, *args: tests.do(name, self, *args)

    def binary(name):
        return lambda self, other: self._operate(name, self, other)

    def reflected(name):
        return lambda self, other: self._operate(name, other, self)

    for name in (
        "len",
        "iter",
        "next",
        "reversed",
        "repr",
        "str",
        "int",
        "float",
        "complex",
        "round",
        "abs",
        "neg",
        "pos",
        "invert",
        "index",
    ):
        setattr(Remote, f"__{name}__", unary(name))
    for name in ("getitem", "setitem", "delitem"):
        setattr(Remote, f"__{name}__", unary(name))
    Remote.__enter__ = lambda self: tests.do("call", self.__getattr__("__enter__"))
    for name in ("lt", "le", "gt", "ge"):
        setattr(Remote, f"__{name}__", binary(name))
    for name in (
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "matmul",
        "and_",
        "or_",
        "xor",
        "lshift",
        "rshift",
    ):
        word = name.strip("_")
        setattr(Remote, f"__{word}__", binary(name))
        setattr(Remote, f"__r{word}__", reflected(name))


_operators()


class Tests(Peer):
    """The tests' end: asks the solution, and runs the tests."""

    def __init__(self, *pipes):
        super().__init__(*pipes)
        self.callbacks, self.errors = [], {}
        self.calls, self.checks = 0, 0
        self.trouble = None  # [kind, reason]: what makes a failure of the tests no fault of the solution

    def keep(self, value):
        if isinstance(value, Remote):
            return {"object": value._number}
        for kind in self.errors.values():
            if value is kind[0]:
                return {"object": kind[1]}
        if not callable(value) or isinstance(value, type):
            self.trouble = [
                "unparsable",
                f"the tests pass a {type(value).__name__} to the solution, and only plain data can be passed",
            ]
            raise CannotSend
        self.callbacks.append(value)
        return {"callback": len(self.callbacks) - 1}

    def meet(self, key, content):
        number, coroutine, bases = content
        if bases:
            return self.error(bases, number)
        remote = Remote(number)
        if not coroutine:
            return remote

        async def awaited():
            return self.do("await", remote)

        return awaited()

    def error(self, names, number=None):
        """A class of our own for an exception of the solution's, below the builtin one that it is derived from."""
        known = next(base for base in (getattr(builtins, name, None) for name in names) if isinstance(base, type))
        if not issubclass(known, Exception):  # SystemExit and the like end nothing here
            known = RuntimeError
        elif known.__name__ == names[0]:
            return known
        if names[0] not in self.errors:
            self.errors[names[0]] = [type(names[0], (known,), {"__module__": "solution"}), number]
        return self.errors[names[0]][0]

    def do(self, name, *args, **kwargs):
        reply = self.ask([name, encode(list(args), self.keep), encode(kwargs, self.keep)])
        return self.told(reply, args[1:] if name == "call" else ())

    def told(self, reply, args=()):
        if printed := reply.get("printed"):
            sys.stdout.write(printed)
        if "raised" in reply:
            names, values, text = reply["raised"]
            if names[0] == "MemoryError":
                self.trouble = ["memory", ""]
            kind = self.error(names)
            try:
                error = kind(*decode(values, self.meet))
            except Exception:
                error = RuntimeError(text)
            error._of_solution = True
            raise error
        value = decode(reply["value"], self.meet)
        if value is not None:  # then it did not work in place, and has no business with the tests' own objects
            return value
        for mine, after in zip(args, decode(reply.get("after", []), self.meet), strict=False):
            if type(mine) is type(after) and isinstance(mine, (list, set, dict, bytearray, deque)) and mine != after:
                mine.clear()
                (mine.update if isinstance(mine, (set, dict)) else mine.extend)(after)
        return None

    def answer(self, question):
        number, args, kwargs = question
        try:
            value = self.callbacks[number](*decode(args, self.meet), **decode(kwargs, self.meet))
            return {"value": encode(value, self.keep)}
        except Exception as error:
            return {"raised": raised(error, self.keep)}

    def read(self):
        try:
            return super().read()
        except Ended:
            self.trouble = ["ended", ""]
            raise


def counting(source):
    """The tests, compiled so that every check counts itself as it is made: `assert`, calls of `assert…`, `with …raises…`, an `if` that raises."""
    import ast

    class Counting(ast.NodeTransformer):
        def visit(self, node):
            self.generic_visit(node)
            if not (
                isinstance(node, ast.Assert)
                or isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Call)
                and "assert" in ast.unparse(node.value.func).lower()
                or isinstance(node, ast.With)
                and any("raises" in ast.unparse(item).lower() for item in node.items)
                or isinstance(node, ast.If)
                and any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            ):
                return node
            (count,) = ast.parse("__tests__.checks += 1").body
            return [ast.copy_location(count, node), node]

    return compile(ast.fix_missing_locations(Counting().visit(ast.parse(source))), "tests", "exec")


def run_tests(task, peer):
    """[verdict, reason]: `passed`, `failed` or `unparsable`; `ended` and `memory` where the solution had no chance to answer."""
    global tests
    tests = builtins.__tests__ = peer
    try:
        problem = provide(task, peer.told(peer.read())) or (run_with_pytest if task["pytest"] else run_plainly)(task)
    except BaseException as error:
        problem = explained(error, task)
        if isinstance(error, MemoryError):
            peer.trouble = ["memory", ""]
        elif isinstance(error, ImportError) and not hasattr(error, "_of_solution"):
            peer.trouble = peer.trouble or ["unparsable", f"the tests need what is not installed: {error}"]
    if peer.trouble:
        return peer.trouble
    if problem:
        return ["failed", problem]
    if not peer.calls or not peer.checks:
        return ["unparsable", f"no test ran ({peer.checks} checks, {peer.calls} calls of the solution)"]
    return ["passed", ""]


def provide(task, given):
    """Puts what the solution defines where the tests look for it; what is missing, as a text."""
    if missing := [name for name in task["names"] if name not in given]:
        return f"its code does not define {', '.join(missing)}"
    tests.calls += sum(
        not isinstance(value, Remote) for value in given.values()
    )  # a constant has been asked for by now
    for name, value in given.items():
        if isinstance(value, Remote):
            vars(value)["_name"] = name
        setattr(builtins, name, value)  # names that the tests leave free are looked for there, by whatever runs them
    for name in task["modules"]:
        module = sys.modules[name] = types.ModuleType(name)
        vars(module).update(given)
    for name, module in task["imports"]:
        setattr(builtins, name, importlib.import_module(module))
    return ""


def run_plainly(task):
    """Module level, then `check(candidate)`, unittest's cases, functions and classes by pytest's names; the first problem as a text."""
    if "unittest" in task["tests"]:
        import unittest

        unittest.main = lambda *args, **kwargs: None  # we run them, and count
    names = {"__name__": "__main__"}
    exec(counting(task["tests"]), names)
    if task["candidate"]:
        names["check"](getattr(builtins, task["candidate"]))
    own = {name: value for name, value in names.items() if getattr(value, "__module__", None) == "__main__"}
    for name, value in own.items():
        if isinstance(value, type) and "unittest" in sys.modules and issubclass(value, unittest.TestCase):
            result = unittest.TestResult()
            unittest.defaultTestLoader.loadTestsFromTestCase(value).run(result)
            tests.checks += result.testsRun - len(result.skipped)
            for case, trace in [
                *result.failures,
                *result.errors,
                *((c, "unexpected success") for c in result.unexpectedSuccesses),
            ]:
                return f"{case.id().rpartition('.')[2]}: {trace.strip().splitlines()[-1]}"
        elif isinstance(value, type) and name.startswith("Test"):
            for method in [m for m in dir(value) if m.startswith("test")]:
                case = value()
                getattr(case, "setup_method", lambda: None)()
                run_function(getattr(case, method))
                getattr(case, "teardown_method", lambda: None)()
        elif isinstance(value, types.FunctionType) and name.startswith("test"):
            run_function(value)
    return ""


def run_function(function):
    value = function()
    if isinstance(value, types.CoroutineType):
        run_coroutine(value)
    tests.checks += 1


def run_with_pytest(task):
    try:
        import pytest
    except ImportError:
        tests.trouble = ["unparsable", "the tests need pytest, which is not installed: pip install pytest"]
        return ""
    problems = []

    class Collected:
        def pytest_collectreport(self, report):
            if report.failed:
                text = str(report.longrepr)
                if "ModuleNotFoundError" in text:
                    tests.trouble = tests.trouble or [
                        "unparsable",
                        f"the tests need what is not installed: {text.strip().splitlines()[-1]}",
                    ]
                problems.append(text.strip().splitlines()[-1])

        def pytest_runtest_logreport(self, report):
            tests.checks += report.when == "call" and report.passed
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                problems.append(f"{report.nodeid.rpartition('::')[2]}: {crash.message if crash else report.longrepr}")

    with open("test_solution.py", "w") as file:
        file.write(task["tests"])
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    main, pytest.main = pytest.main, lambda *args, **kwargs: 0
    main(["-q", "-x", "-p", "no:cacheprovider", "--rootdir", ".", "test_solution.py"], plugins=[Collected()])
    return problems[0] if problems else ""


def explained(error, task):
    """What went wrong, and in which line of the tests."""
    lines, trace = [], error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "tests":
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    where = "in its code" if hasattr(error, "_of_solution") else "in its tests"
    line = task["tests"].splitlines()[lines[-1] - 1].strip() if lines else ""
    return f"{type(error).__name__} {where}: " + " ".join(filter(None, [str(error), f"({line})" if line else ""]))


def main(task, source):
    """Takes standard output and error for the line to the other end and the verdict, and leaves neither to the tests."""
    target, report, nothing = os.dup(1), os.dup(2), os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    verdict, reason = run_tests(task, Tests(source, target))
    os.write(report, json.dumps([verdict, reason[:1000]]).encode() + b"\n")
    os._exit(0)
