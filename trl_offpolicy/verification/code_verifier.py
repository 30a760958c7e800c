"""
Code against tests that it never sees: the solution runs in one sandbox, its tests in another or, as input and output,
out here.
"""

import ast
import builtins
import json
import math
import os
import re
import signal
import site
import symtable
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from subprocess import PIPE
from typing import NamedTuple

from ..answers.extraction import NO_ANSWER, Unparsable, without_thinking
from ..data.rows import Verdict
from ..sandbox import sandbox_entry
from ..sandbox.sandbox import Sandbox, complaint, read_line, write
from ..sandbox.sandbox_entry import OUT_OF_MEMORY, REFUSED
from .verifier import GoldAtFault, Judgement, Verifier, default_workers


REPORT = 16384  # bytes
MESSAGE = 32 << 20  # bytes of what a script has printed, as JSON
OUTPUT = 4 << 20  # characters of expected output
_FENCE = re.compile(
    r"^[ \t]*(?P<fence>`{3,}|~{3,})[ \t]*\{?[ \t.]*(?P<language>[^\s`{},:=]*)[^\n`]*\n(?P<code>.*?)^[ \t]*(?P=fence)[`~]*[ \t]*$",
    re.S | re.M,
)
_PYTHON = re.compile(r"(?:py|python|ipython)?[\d.]*", re.I)


class CodeVerifier(Verifier):
    """
    Python code (a fenced block of a completion) that must pass the answer, which is its tests.

    Tests are one of

    * Python source, or a list of it: assertions, HumanEval's `check(candidate)` (called with the row's `entry_point`,
      or with the only function that no other one uses), unittest cases, functions and classes by pytest's names (with
      pytest itself where they import it or take fixtures, if it is installed). Names that they use and do not define
      are the solution's, and so are the modules that they import and that are not installed (`from solution import
      f`).
    * pairs of input and output, for a solution that is a script: `{"inputs": [...], "outputs": [...]}` or `[{"input":
      ..., "output": ...}, ...]`, also as JSON. Outputs are compared line by line without the spaces at their ends.

    Judged is the last complete block that defines what the tests ask for (with pairs: the last one that reads input).
    Where no test ran, the verdict is `unparsable`. A test has run when a check that may depend on the solution (an
    assertion, an expected error, an `if` that raises) has passed: assertions whose failure is caught, those of
    constants, and test functions that only return a bool are none.

    *What cannot be faked*: solution and tests run in two sandboxes and exchange plain data (numbers, text, lists,
    dicts, numpy's arrays, …, values of exactly those types), and nothing of the solution's making runs where data are compared:
    leaving early, patching builtins, unittest or pytest, reading the tests, objects that equal everything, ending an
    iteration by an error, none of these is `correct`. An object of the solution's own is not believed about itself
    (its truth, length, items, order, arithmetic, or methods that are given the tests' data) unless the tests made it
    by calling a name that they treat as a class: `isinstance(x, Point)`, or a name in capitals of which they use an
    attribute that no plain data has (`Stack().push(1)`). It is the tests that say so, because any solution could write
    `class f`. Tests that need more trust than that are `unparsable`. *What can*: tests of such a class ask that class,
    also with expected values as arguments (`1 in stack`), and compare its objects by its `==`; a test with few
    possible answers, or of an iterator or array that may be empty (`all(... zip(f(1), [1, 2]))`), can be guessed, also by an
    attribute of a returned object; and names that the tests forget to define (`isclose`) are the solution's to define.
    *What differs from running both in one process*: arguments are copies, and lists, sets, dicts and arrays among them
    are written back only after a call that returned `None` (as one in place does); objects that the tests define
    cannot be passed in, functions can; a tuple with names comes back as a tuple. Of numpy, arrays of numbers, bools or
    texts and single numbers come across as what they are, and other arrays as lists. An object of another library (a
    DataFrame) does not come across: where the solution made one and a test fails, the verdict is `unparsable`. So it
    is where the solution fails for want of a module that is not installed: a package that is missing here cannot be
    told from one that does not exist, and a verdict without a reward would be a way out of `wrong` for any code.

    Args:
        timeout (`float`, *optional*, defaults to `5.0`): CPU seconds; three times as many on the wall clock, for all
            tests together.
        memory_mb (`int`, *optional*, defaults to `512`): MiB, for all processes of the solution together.
        num_workers (`int`, *optional*): How many completions are judged at a time; by default one for each core.
        allow_network (`bool`, *optional*, defaults to `False`): Whether solution and tests may use the network.
        sandbox (`str` or `Callable`, *optional*): See [`Sandbox`], also for what it guarantees: `"bubblewrap"`,
            `"unshare"` (by default whichever works), `"docker"`, or a function from a command to the command that runs
            it in a container of yours.
        allow_unsandboxed (`bool`, *optional*, defaults to `False`): Where no sandbox can be made, run code **as you**,
            with your files and the tokens in your environment in its reach.

    Raises:
        ValueError: Where neither bubblewrap nor namespaces work, unless `sandbox` or `allow_unsandboxed` says what to
            do then.
    """

    stated = False
    columns = ("entry_point",)

    def __init__(
        self,
        timeout: float = 5.0,
        memory_mb: int = 512,
        num_workers: int | None = None,
        allow_network: bool = False,
        sandbox: str | Callable[[list[str]], list[str]] | None = None,
        allow_unsandboxed: bool = False,
    ):
        if timeout <= 0 or memory_mb < 64:
            raise ValueError(
                f"You passed timeout={timeout}, memory_mb={memory_mb}; it needs time, and 64 MiB to start in."
            )
        self.timeout, self._memory_mb = timeout, memory_mb
        self.num_workers = num_workers or default_workers()
        self._sandbox = Sandbox(sandbox, memory_mb, math.ceil(timeout), 3 * timeout, allow_network, allow_unsandboxed)

    def _explain(
        self, completions: list[str], answers: list, entry_point: list[str | None] | None = None, **_
    ) -> list[Judgement]:
        with ThreadPoolExecutor(self.num_workers) as pool:
            return list(pool.map(self._judge, completions, answers, entry_point or [None] * len(answers)))

    def _judge(self, completion: str, answer, entry_point: str | None) -> Judgement:
        try:
            blocks = code_blocks(completion)
            pairs = read_pairs(answer)
            tests = None if pairs else read_tests(answer, entry_point)
        except Unparsable as error:
            return Judgement(Verdict.UNPARSABLE, str(error))
        except (SyntaxError, ValueError) as error:
            return GoldAtFault(Verdict.UNPARSABLE, f"the tests cannot be run: {error}")
        if not blocks:
            return Judgement(Verdict.UNPARSABLE, f"{NO_ANSWER}: no complete block of Python code")
        if pairs:
            reading = [code for code in blocks if re.search(r"\binput\s*\(|\bstdin\b|\bopen\(\s*0", code)]
            return self._run_script((reading or blocks)[-1], pairs)
        for code in reversed(blocks):
            if (task := tests.task_for(code)) is not None:
                return self._run_tests(code, task)
        lacking = ", ".join(sorted(tests.asked)) or "a single function that `check` could be given"
        if tests.foreign - _STAND_INS:
            return Judgement(
                Verdict.UNPARSABLE,
                f"{', '.join(tests.foreign)} is not installed, and no block of code defines {lacking}",
            )
        return Judgement(Verdict.WRONG, f"no block of code defines {lacking}")

    def _run_tests(self, code: str, task: dict) -> Judgement:
        deadline = time.monotonic() + 3 * self.timeout
        read_by_tests, to_tests, read_by_solution, to_solution = pipes = [*os.pipe(), *os.pipe()]
        with (
            self._sandbox.running(read_by_tests, to_solution) as tests,
            self._sandbox.running(read_by_solution, to_tests) as solution,
        ):
            try:
                write(to_tests, self._sandbox.order(_program("code_tests"), **task), deadline)
                order = self._sandbox.order(_program("code_solution"), script=False, code=code, names=task["names"])
                write(to_solution, order, deadline)
            except TimeoutError:
                return self._timeout()
            finally:
                for pipe in pipes:
                    os.close(pipe)
            try:
                said = read_line(tests.stderr.fileno(), REPORT, deadline)
            except TimeoutError:
                return self._timeout()
            if not (said.startswith(b"[") and said.endswith(b"]\n")):
                return self._ended(
                    tests, said, GoldAtFault(Verdict.UNPARSABLE, "the tests ended before all of them had run")
                )
            kind, reason = json.loads(
                said
            )  # written by the process of the tests, in which no code of the solution runs
            if kind == "ended":
                return self._ended(solution, b"", Judgement(Verdict.WRONG, "the solution ended before its tests did"))
        if kind == "memory":
            return Judgement(Verdict.ERROR, f"out of memory ({self._memory_mb} MiB)")
        if kind == "missing":
            return _imports(reason)
        if kind == "unrunnable":
            return GoldAtFault(Verdict.UNPARSABLE, reason)
        kinds = {"passed": Verdict.CORRECT, "failed": Verdict.WRONG, "unparsable": Verdict.UNPARSABLE}
        return Judgement(kinds[kind], reason)

    def _run_script(self, code: str, pairs: list[tuple[str, str]]) -> Judgement:
        deadline = time.monotonic() + 3 * self.timeout
        with self._sandbox.running(PIPE, PIPE) as process, process.stdin, process.stdout:
            try:
                given, printed = process.stdin.fileno(), process.stdout.fileno()
                write(given, self._sandbox.order(_program("code_solution"), script=True, code=code), deadline)
                for number, (text, expected) in enumerate(pairs):
                    write(given, json.dumps({"input": text}).encode() + b"\n", deadline)
                    reply = read_line(printed, MESSAGE, deadline)
                    if not reply.endswith(b"\n"):
                        return self._ended(process, b"", Judgement(Verdict.WRONG, "the solution ended its sandbox"))
                    if (judgement := self._judge_output(reply, number, expected)).verdict is not Verdict.CORRECT:
                        return judgement
            except TimeoutError:
                return self._timeout()
        return Judgement(Verdict.CORRECT)

    def _judge_output(self, reply: bytes, number: int, expected: str) -> Judgement:
        try:  # the solution may have written this reply itself, so it may be anything
            report = json.loads(reply)
            output, code, error = str(report["output"]), report["code"], str(report["error"])
        except (ValueError, TypeError, LookupError, RecursionError):
            return Judgement(Verdict.WRONG, "the solution broke into the line that its output comes by")
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            return self._timeout()
        if code and report.get("memory"):
            return Judgement(Verdict.ERROR, f"out of memory ({self._memory_mb} MiB)")
        if code and report.get("missing"):
            return _imports(str(report["missing"]))
        if code:
            return Judgement(Verdict.WRONG, f"exit code {code} on input {number}: {error}")
        if lines_of(output) != lines_of(expected):
            return Judgement(Verdict.WRONG, f"on input {number} not {expected[:100]!r}, but {output[:1000]!r}")
        return Judgement(Verdict.CORRECT)

    def _timeout(self) -> Judgement:
        return Judgement(
            Verdict.TIMEOUT, f"stopped after {self.timeout:g} CPU seconds, or {3 * self.timeout:g} in all"
        )

    def _ended(self, process, said: bytes, otherwise: Judgement) -> Judgement:
        """
        What it means that a process ended without a word: by its limits, for want of a sandbox, or else `otherwise`.
        """
        words = said.decode(errors="replace").strip() or complaint(process)
        code = process.poll()
        code = 128 - code if code is not None and code < 0 else code
        if code == OUT_OF_MEMORY:
            return Judgement(Verdict.ERROR, f"out of memory ({self._memory_mb} MiB)")
        if code in (128 + signal.SIGXCPU, 128 + signal.SIGKILL):
            return self._timeout()
        if code == REFUSED or words:
            return Judgement(Verdict.ERROR, f"the sandbox could not be made: {words}")
        return otherwise._replace(reason=f"{otherwise.reason} (exit code {code})")


def _imports(module: str) -> Judgement:
    """Of a solution that has failed for want of a module."""
    verdict = Verdict.WRONG if module in _STAND_INS else Verdict.UNPARSABLE
    return Judgement(verdict, f"the solution imports {module:.100}, which is not installed")


@cache
def _program(end: str) -> dict[str, str]:
    sandbox = Path(sandbox_entry.__file__).parent
    return {name: (sandbox / f"{name}.py").read_text() for name in ("code_wire", end)}


def code_blocks(completion: str) -> list[str]:
    """
    The complete fenced blocks of Python that compile, in order, behind any thinking; `Unparsable` where that never
    ends.
    """
    text = without_thinking(completion).replace("\r\n", "\n")
    codes = [textwrap.dedent(m["code"]) for m in _FENCE.finditer(text) if _PYTHON.fullmatch(m["language"])]
    return [code for code in codes if code.strip() and _compiles(code)]


def _compiles(code: str) -> bool:
    try:
        compile(code, "solution.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _whole(side) -> str:
    """An input or output as one text: a list holds its lines."""
    return "\n".join(map(str, side)) if isinstance(side, list) else str(side)


def read_pairs(answer) -> list[tuple[str, str]] | None:
    """Inputs and outputs, if that is what the answer is; `ValueError` if they cannot be compared."""
    if isinstance(answer, str) and answer.lstrip()[:1] in ("{", "["):
        try:
            answer = json.loads(answer)
        except ValueError:
            return None
    if isinstance(answer, dict) and {"inputs", "outputs"} <= set(answer):
        if answer.get("fn_name"):
            raise ValueError(f"they call {answer['fn_name']} with arguments; write them as assertions")
        if len(answer["inputs"]) != len(answer["outputs"]):
            raise ValueError(f"there are {len(answer['inputs'])} inputs and {len(answer['outputs'])} outputs")
        pairs = list(zip(answer["inputs"], answer["outputs"], strict=True))
    elif (
        isinstance(answer, list)
        and answer
        and all(isinstance(a, dict) and {"input", "output"} <= set(a) for a in answer)
    ):
        pairs = [(a["input"], a["output"]) for a in answer]
    else:
        return None
    pairs = [(_whole(given), _whole(expected)) for given, expected in pairs]
    if not pairs:
        raise ValueError("there are no inputs")
    if any(len(output) > OUTPUT for _, output in pairs):
        raise ValueError(f"an output has more than {OUTPUT:,} characters")
    return pairs


def lines_of(output: str) -> list[str]:
    return [line.rstrip() for line in output.rstrip().splitlines()]


class Tests(NamedTuple):
    """Tests as source, and what they ask for."""

    source: str
    asked: set[str]  # names that the solution has to define
    foreign: set[str]  # modules that are not installed, for which the solution stands in
    check: bool  # `check(candidate)` is defined and never called
    pytest: bool

    def task_for(self, code: str) -> dict | None:
        """What is sent with the tests when `code` is the solution; `None` if it does not define what they ask for."""
        tree, defined = ast.parse(code), bound_names(code)
        imports = {name: name for name in self.asked - defined if name in sys.stdlib_module_names}
        for node in tree.body:  # `np.allclose` is numpy's, not the solution's: the tests import it themselves
            for alias in node.names if isinstance(node, ast.Import) else ():
                module = alias.name if alias.asname else alias.name.partition(".")[0]
                if (alias.asname or module) in self.asked and is_installed(module):
                    imports[alias.asname or module] = module
        names = self.asked - set(imports)
        candidate = only_root(tree) if self.check else None
        if not names <= defined or (self.check and not candidate) or not names and not candidate:
            return None
        return {
            "tests": self.source,
            "names": sorted({*names, candidate} - {None}),
            "modules": sorted(self.foreign),
            "imports": sorted(imports.items()),
            "candidate": candidate,
            "pytest": self.pytest,
        }


def read_tests(answer, entry_point: str | None = None) -> Tests:
    """Raises `SyntaxError` or `ValueError` with what is wrong with them."""
    source = "\n".join(map(str, answer)) if isinstance(answer, list) else str(answer or "")
    tree = ast.parse(source)
    if not tree.body:
        raise ValueError("there are none")
    nodes = list(ast.walk(tree))
    asked = free_names(symtable.symtable(source, "tests", "exec")) - set(dir(builtins)) - {"__file__"}
    foreign = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and not node.level and not is_installed(node.module):
            foreign.add(node.module)
            asked |= {alias.name for alias in node.names} - {"*"}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if not is_installed(alias.name):
                    foreign.add(alias.name)
                    own = alias.asname or alias.name
                    asked |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n.value) == own}
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    check = any(f in tree.body and f.name == "check" and f.args.args for f in functions) and "check" not in called
    if check and entry_point:
        return read_tests(f"{source}\ncheck({entry_point})")
    tested = [f for f in functions if f.name.startswith("test")]
    imported = {a.name for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names} | {
        n.module for n in nodes if isinstance(n, ast.ImportFrom)
    }
    fixtures = any({a.arg for a in f.args.args} - {"self"} for f in tested) and "unittest" not in imported
    pytest = bool(tested) and ("pytest" in imported or fixtures)
    if not asked and not check:
        raise ValueError("they ask for nothing that a solution would define")
    return Tests(source, asked, foreign, check, pytest)


_STAND_INS = {"solution", "main", "candidate", "submission", "answer", "your_module", "your_solution"}


def free_names(table: symtable.SymbolTable) -> set[str]:
    """Global names that are used somewhere in a module and bound nowhere in it."""
    tables = [table]
    for inner in tables:
        tables += inner.get_children()
    used = {
        s.get_name() for t in tables for s in t.get_symbols() if s.is_referenced() and (s.is_global() or t is table)
    }
    bound = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    bound |= {s.get_name() for t in tables for s in t.get_symbols() if s.is_declared_global() and s.is_assigned()}
    return used - bound


def bound_names(code: str) -> set[str]:
    table = symtable.symtable(code, "solution.py", "exec")
    return {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}


def only_root(tree: ast.Module) -> str | None:
    """The function that no other function or class of the module uses, if there is one such."""
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    used = {
        n.id
        for outer in tree.body
        if isinstance(outer, ast.FunctionDef | ast.ClassDef)
        for n in ast.walk(outer)
        if isinstance(n, ast.Name) and n.id != outer.name
    }
    roots = [f.name for f in functions if f.name not in used]
    return roots[0] if len(roots) == 1 else None


@cache
def is_installed(module: str) -> bool:
    """Whether the sandbox has it: the standard library, and what is in this interpreter's site-packages."""
    root = module.partition(".")[0]
    return root in sys.stdlib_module_names or PathFinder.find_spec(root, site.getsitepackages()) is not None
