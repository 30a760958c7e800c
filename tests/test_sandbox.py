"""Code runs where it can do no harm, and cannot pass its tests but by being right: attacks against real processes, verdicts against plain `exec`."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import psutil
import pytest

from trl_offpolicy.sandbox.code_wire import decode, decode_numpy, encode
from trl_offpolicy.sandbox.sandbox import Sandbox, _visible
from trl_offpolicy.verification.code_verifier import CodeVerifier, code_blocks, free_names, lines_of, read_pairs


def python(code: str) -> str:
    return f"Here it is:\n```python\n{textwrap.dedent(code)}\n```"


def made(**kwargs) -> CodeVerifier:
    try:
        return CodeVerifier(**kwargs)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["unshare", "bubblewrap"])
def verifier(request):
    return made(timeout=20.0, num_workers=4, sandbox=request.param)


@pytest.fixture(scope="module")
def any_verifier():
    """In a sandbox where there is one, else without: what is judged does not depend on it."""
    return CodeVerifier(timeout=20.0, num_workers=4, allow_unsandboxed=True)


TWICE = "def double(x):\n    return 2 * x"
SQUARE = "def double(x):\n    return x * x"
UNITTEST = "import unittest\nclass Case(unittest.TestCase):\n    def test_it(self):\n        self.assertEqual(double(2), 4)\n        self.assertEqual(double(3), 6)"
STYLES = {
    "assertions": "assert double(2) == 4\nassert double(3) == 6",
    "list": ["assert double(2) == 4", "assert double(3) == 6"],
    "check": "METADATA = {}\ndef check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 6",
    "check, called": "def check(candidate):\n    assert candidate(3) == 6\ncheck(double)",
    "unittest": UNITTEST,
    "unittest, with main": UNITTEST + "\nif __name__ == '__main__':\n    unittest.main()",
    "unittest, of a module": "from solution import double\n" + UNITTEST,
    "functions": "def test_one():\n    assert double(2) == 4\ndef test_two():\n    assert double(3) == 6",
    "class": "class TestDouble:\n    def test_it(self):\n        assert double(3) == 6",
    "loop": "for x in range(5):\n    if double(x) != 2 * x:\n        raise ValueError(x)",
    "called on the way": "import solution as s\nexpected = [2 * x for x in range(5)]\nassert [s.double(x) for x in range(5)] == expected",
}


def test_every_style_of_tests(any_verifier):
    for code, verdict in ((TWICE, "correct"), (SQUARE, "wrong")):
        any_verifier = pickle.loads(pickle.dumps(any_verifier))  # as `datasets.map(num_proc=...)` does
        told = any_verifier.explain([python(code)] * len(STYLES), list(STYLES.values()))
        assert {name: str(v) for name, (v, _) in zip(STYLES, told, strict=True)} == dict.fromkeys(STYLES, verdict), (
            told
        )


def test_check_is_given_the_entry_point(any_verifier):
    """HumanEval's column says which of several functions is meant; without it there may be no telling."""
    code = python("def double(x):\n    return 2 * x\ndef triple(x):\n    return 3 * x")
    check = "def check(candidate):\n    assert candidate(2) == 6"
    told = any_verifier.verify([code] * 3, [check] * 3, entry_point=["triple", "double", "none"])
    assert told == ["correct", "wrong", "wrong"]
    assert any_verifier.explain([code], [check])[0][1].startswith("no block of code defines a single function")
    assert any_verifier(completions=["no code", code], answer=[check] * 2, entry_point=["triple"] * 2) == [0.0, 1.0]


def test_pytest_files(any_verifier):
    file = """
        import pytest
        from solution import double
        @pytest.mark.parametrize("x", [1, 3])
        def test_it(x, capsys):
            assert double(x) == 2 * x
            with pytest.raises(TypeError):
                double(None)
    """
    file = textwrap.dedent(file)
    told = any_verifier.explain([python(TWICE), python(SQUARE)], [file, file])
    assert [str(v) for v, _ in told] == ["correct", "wrong"], told
    assert "test_it[1" in told[1][1]


UNPARSABLE = {
    "": "there are none",
    "assert (": "cannot be run",
    "assert True": "ask for nothing",
    "def helper():\n    assert double(2) == 4": "no test ran",
    "def check(candidate, other=None):\n    pass": "no test ran",
    "double(2)": "no test ran",
    "try:\n    assert double(1) == 5\nexcept AssertionError: pass": "no test ran",
    "assert True\ndouble(1)": "no test ran",
    "x = 1\ndouble(1)\nassert x == 1": "no test ran",
    "def test_a():\n    return double(1) == 5": "no test ran",
    "import pytest\ndef test_a():\n    double(1)": "no test ran",
    "import unittest\nclass Case(unittest.TestCase):\n    @unittest.skip('later')\n    def test_it(self):\n        self.assertEqual(double(2), 4)": "no test ran",
    "from no_such_library import triple\nassert triple(double(2)) == 12": "no_such_library is not installed",
    "class Node: pass\nassert double(Node()) is None": "pass a Node",
    "import os\nassert double(2) == 4\nos._exit(0)": "ended before all of them",
    '{"inputs": ["1"], "outputs": []}': "1 inputs and 0 outputs",
    '{"inputs": [[1]], "outputs": [2], "fn_name": "double"}': "as assertions",
}


def test_what_tests_nothing_is_unparsable(any_verifier):
    told = any_verifier.explain([python(TWICE)] * len(UNPARSABLE), list(UNPARSABLE))
    for judgement, (tests, words) in zip(told, UNPARSABLE.items(), strict=True):
        assert judgement.verdict == "unparsable" and words in judgement.reason, (tests, judgement)
        # That no test ran, or that a name is missing, may also be brought about by the code: it is no way to a reward of `None`.
        assert judgement.gold_at_fault == (words not in ("no test ran", "no_such_library is not installed")), tests


def test_the_last_complete_block_that_defines_what_is_asked_for(any_verifier):
    example = "\nFor example:\n```python\nprint(double(21))\n```\nprints\n```\n42\n```"
    cases = [
        (python(TWICE) + example, "correct"),
        (python(SQUARE) + "\nBetter:\n" + python(TWICE), "correct"),
        (python(TWICE) + "\nBetter:\n" + python(SQUARE), "wrong"),
        (python(TWICE) + "\nBetter:\n```python\ndef double(x):\n    return x", "correct"),  # cut
        (python(TWICE) + "\nNot:\n" + python("def double(x) return"), "correct"),
        ("<think>" + python(SQUARE) + "</think>" + python(TWICE), "correct"),
        (f"```python3\n{TWICE}\n```", "correct"),
        (f"```Python\n{TWICE}\n```", "correct"),
        (f"```\n{TWICE}\n```", "correct"),
        (f"~~~python\n{TWICE}\n~~~", "correct"),
        (f"````py title='a.py'\n{TWICE}\n````", "correct"),
        (f"```{{.python .numberLines}}\n{TWICE}\n```", "correct"),
        (python(TWICE).replace("\n", "\r\n"), "correct"),
        ("1. So:\n" + textwrap.indent(f"```python\n{TWICE}\n```", "   "), "correct"),
        (python("def dubble(x):\n    return 2 * x"), "wrong"),
        (python(TWICE + "\nif __name__ == '__main__':\n    print(double(int(input())))"), "correct"),
        (TWICE, "unparsable"),
        (f"```bash\n{TWICE}\n```", "unparsable"),
    ]
    told = any_verifier.explain([c for c, _ in cases], [STYLES["assertions"]] * len(cases))
    for (completion, expected), (verdict, reason) in zip(cases, told, strict=True):
        assert verdict == expected, (completion, verdict, reason)
    assert code_blocks("```py\nx = '``` no fence'\n```") == ["x = '``` no fence'\n"]


def test_scripts_with_input_and_output(any_verifier):
    main = "def main():\n    print(2 * int(input()))\nif __name__ == '__main__':\n    main()"
    pairs = {"inputs": ["2\n", "-3\n"], "outputs": ["4\n", "-6"]}
    cases = [
        (main, pairs, "correct"),
        (main, json.dumps(pairs), "correct"),
        (main, [{"input": "2", "output": "4\n\n"}], "correct"),
        ("import sys\nprint(*(2 * int(x) for x in sys.stdin.read().split()), sep=' \\n')", pairs, "correct"),
        ("print(input() * 2)", pairs, "wrong"),
        ("print(2 * int(input()))\nraise SystemExit(3)", pairs, "wrong"),
        ("print(2 * int(input()) if int(input()) else 0)", pairs, "wrong"),
        ("import atexit\natexit.register(print, 4)\nint(input())", {"inputs": ["2"], "outputs": ["4"]}, "correct"),
        ("input()\nraise MemoryError", pairs, "wrong"),
        ("input()\nx = bytearray(1 << 30)", pairs, "error"),
        ("while True: print('x' * 1000000)", pairs, "wrong"),  # more than a file may have
    ]  # fmt: skip
    told = any_verifier.explain([python(code) for code, *_ in cases], [answer for _, answer, _ in cases])
    assert [str(v) for v, _ in told] == [expected for *_, expected in cases], told
    with CodeVerifier(timeout=0.5, allow_unsandboxed=True) as quick:
        assert quick.verify([python("x = input()\nwhile True: pass")], [pairs]) == ["timeout"]
    example = python(main) + "\n" + python("print(double(2))")  # the block that reads is the solution
    assert any_verifier.verify([example], [pairs]) == ["correct"]


# Right and wrong solutions with tests of many kinds; the reference is `exec` of both in one namespace.
SEMANTICS = [
    ("def f(x):\n    x.sort()", "x = [3, 1]\nf(x)\nassert x == [1, 3]"),
    ("def f(x, *rest, key=None):\n    return (x, rest, {'k': key})", "assert f(1, 2, key={3}) == (1, (2,), {'k': {3}})"),
    ("from collections import Counter\ndef f(s):\n    return Counter(s)", "assert f('aab') == {'a': 2, 'b': 1}"),
    ("def f(n):\n    return n ** 5000", "assert f(7) == 7 ** 5000"),
    ("def f():\n    return [float('inf'), -0.0, 1e-300, 2+3j, b'\\xff', None, True, '\\ud800']", "assert f() == [float('inf'), -0.0, 1e-300, 2+3j, b'\\xff', None, True, '\\ud800']"),
    ("def f(n):\n    for i in range(n):\n        yield i", "assert list(f(3)) == [0, 1, 2]\nassert sum(f(4)) == 6"),
    ("def f(g, xs):\n    return [g(x) for x in xs]", "seen = []\nassert f(lambda x: seen.append(x) or x + 1, [1, 2]) == [2, 3]\nassert seen == [1, 2]"),
    ("def f(x):\n    if x < 0: raise ValueError(f'bad {x}')\n    return x", "try:\n    f(-1)\n    assert False\nexcept ValueError as e:\n    assert str(e) == 'bad -1'\nassert f(1) == 1"),
    ("class Broke(ValueError): pass\ndef f():\n    raise Broke('x')", "try:\n    f()\n    assert False\nexcept Broke as e:\n    assert isinstance(e, ValueError)"),
    ("class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n    def pop(self): return self.items.pop()\n    def __len__(self): return len(self.items)\n    def __contains__(self, x): return x in self.items",
     "s = Stack()\ns.push(1)\ns.push([2])\nassert len(s) == 2 and 1 in s and 3 not in s\nassert s.pop() == [2]\nassert s.items == [1]\ns.items = [5]\nassert s.pop() == 5 and not s"),
    ("class Vector:\n    def __init__(self, x): self.x = x\n    def __mul__(self, n): return Vector(self.x * n)\n    def __rmul__(self, n): return self * n\n    def __eq__(self, o): return self.x == o.x\n    def __repr__(self): return f'V{self.x}'\ndef f(v): return v * 3",
     "assert Vector(1) * 2 == Vector(2)\nassert 2 * Vector(2) == Vector(4)\nassert f(Vector(1)) == Vector(3) and f(Vector(1)) != Vector(4)\nassert repr(Vector(5)) == 'V5' and isinstance(f(Vector(1)), Vector)"),
    ("class Solution:\n    def twoSum(self, nums, t):\n        return [0, 1]", "assert Solution().twoSum([2, 7], 9) == [0, 1]"),
    ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n    y: int = 2", "assert P(1) == P(1, 2)\nassert P(1).y == 2\nassert str(P(1)) == 'P(x=1, y=2)'"),
    ("LIMIT = 3\ndef f(x): return min(x, LIMIT)", "assert LIMIT == 3 and f(9) == LIMIT"),
    ("import math\ndef f(r): return math.pi * r", "assert math.isclose(f(2), 2 * math.pi)"),
    ("async def f(x): return x + 1", "import asyncio\nassert asyncio.run(f(1)) == 2"),
    ("from fractions import Fraction\nfrom datetime import date\ndef f(d): return Fraction(d.day, 2)", "from datetime import date\nfrom fractions import Fraction\nassert f(date(2026, 1, 3)) == Fraction(3, 2)"),
    ("def f(n):\n    print('n is', n)", "import io, contextlib\nout = io.StringIO()\nwith contextlib.redirect_stdout(out):\n    f(3)\nassert out.getvalue() == 'n is 3\\n'"),
    ("from contextlib import contextmanager\n@contextmanager\ndef f():\n    yield 7", "with f() as x:\n    assert x == 7"),
]  # fmt: skip
# What is more than a list or a dict has to come across as what it is, both ways.
TYPED = [
    ("import numpy as np\ndef f(n):\n    return np.arange(n)", "import numpy as np\nr = f(3)\nassert r.shape == (3,) and r.dtype == int and (r == np.array([0, 1, 2])).all()"),
    ("def f(x):\n    return x.mean(), x[0].item()", "import numpy as np\nassert f(np.array([1.0, 2.0, 3.0])) == (2.0, 1.0)"),
    ("import numpy as np\ndef f(x):\n    return [np.float64(x), np.zeros(0), np.array(['a'])]", "r = f(1.234)\nassert r[0].round(1) == 1.2 and r[1].shape == (0,) and r[2].tolist() == ['a']"),
    ("def f(x, y=None):\n    x[0, 1] = 5\n    y.sort()", "import numpy as np\nx, y = np.zeros((1, 2)), [2, 1]\nf(x, y=y)\nassert x.tolist() == [[0, 5]] and y == [1, 2]"),
    ("from collections import Counter\ndef f(s):\n    return Counter(s)", "r = f('aab')\nassert r['z'] == 0 and r.most_common(1) == [('a', 2)]"),
    ("def f(d, e):\n    return d['q'], e['q'], list(e)", "from collections import defaultdict\nassert f(defaultdict(int), defaultdict(lambda: 7, a=1)) == (0, 7, ['a', 'q'])"),
    ("from collections import defaultdict\ndef f(n):\n    return defaultdict(lambda: n, a=1), defaultdict(list)", "r = f(3)\nassert r[0]['z'] == 3 and r[0] == {'a': 1, 'z': 3} and r[1]['z'] == []"),
    ("from collections import OrderedDict\ndef f(d):\n    d.move_to_end('a')\n    return d", "from collections import OrderedDict\nassert f(OrderedDict(a=1, b=2)) == OrderedDict(b=2, a=1)"),
    ("from collections import OrderedDict\ndef f(d):\n    return OrderedDict(d)", "from collections import OrderedDict\nassert f({'a': 1, 'b': 2}) == OrderedDict(b=2, a=1)"),
    ("def f(a, b):\n    return a - b", "from datetime import date, timedelta\nassert f(date(2026, 1, 3), date(2026, 1, 1)) == timedelta(2)"),
    ("def f(x, kind):\n    return type(x) is kind and type(x)", "assert f(1, int) is int and f(1, str) is False"),
    ("def f(a, b):\n    a.append(1)\n    b.append(2)", "x = []\nf(x, x)\nassert x == [1, 2]"),
    ("def f(a, b):\n    a.append(1)", "x = []\nf(a=x, b=x)\nassert x == [1]"),
    ("def f(n):\n    return n", "assert f([1.0, {2: (3,)}]) != [1.0, {2: [3]}]"),
]  # fmt: skip


def same_in_one_process(code, tests):
    """`correct` or `wrong` by `exec` of both in one namespace."""
    try:
        names = {}
        exec(code, names)
        exec(tests, names)
    except (AssertionError, AttributeError):
        return "wrong"
    return "correct"


@pytest.mark.slow
def test_the_same_verdict_as_in_one_process(any_verifier):
    """For honest code two processes make no difference; each case also with its assertions turned round, which must fail."""
    cases = []
    for code, tests in SEMANTICS:
        for source in (tests, tests.replace("assert ", "assert not ")):
            cases.append((python(code), source, same_in_one_process(code, source)))
    told = any_verifier.explain([c for c, _, _ in cases], [t for _, t, _ in cases])
    for (completion, source, expected), (verdict, reason) in zip(cases, told, strict=True):
        assert verdict == expected, (completion, source, verdict, reason)
    assert {expected for *_, expected in cases} == {"correct", "wrong"}


def test_typed_data_come_across(any_verifier):
    expected = [same_in_one_process(code, tests) for code, tests in TYPED]
    told = any_verifier.explain([python(code) for code, _ in TYPED], [tests for _, tests in TYPED])
    assert [str(judgement.verdict) for judgement in told] == expected, told
    assert expected.count("wrong") == 1


def test_what_is_not_here_is_no_fault_of_the_solution(any_verifier):
    """A package that is not installed, or an object that cannot come across: not `wrong`, and no way to a reward."""
    absent = "import no_such_package\ndef f(n):\n    return n + 1"
    lazily = "def f(n):\n    from no_such_package.part import g\n    return n + 1"
    stand_in = "from solution import g\nfrom your_module import h\ndef f(n):\n    return n + 1"
    path = "import pathlib\ndef f(n):\n    return pathlib.Path('a')"
    cases = [
        (absent, "assert f(1) == 2", "unparsable", "imports no_such_package, which is not installed"),
        (lazily, "assert f(1) == 2", "unparsable", "imports no_such_package, which is not installed"),
        (f"try:\n    {absent[:22]}\nexcept ImportError: pass\n{absent[23:]}", "assert f(1) == 2", "correct", ""),
        ("import json.no_such_part\ndef f(n):\n    return n + 1", "assert f(1) == 2", "wrong", "json"),
        (stand_in.partition("\n")[2], "assert f(1) == 2", "wrong", "imports your_module"),
        (path, "from pathlib import Path\nassert f(1) == Path('a')", "unparsable", "made a pathlib.PosixPath"),
        (path, "assert f(1).name == 'a'", "correct", ""),
        ("def f(n):\n    return iter([n])", "assert f(1) == [1]", "wrong", ""),
        ("import no_such_package\nprint(input())", {"inputs": ["1"], "outputs": ["1"]}, "unparsable", "no_such_package"),
    ]  # fmt: skip
    told = any_verifier.explain([python(code) for code, *_ in cases], [tests for _, tests, *_ in cases])
    for (code, tests, verdict, said), judgement in zip(cases, told, strict=True):
        assert judgement.verdict == verdict and said in judgement.reason, (code, tests, judgement)
        assert not judgement.gold_at_fault
    equals_all = python("import numpy as np\ndef f(n):\n    return np.zeros((0, 1))")
    ((verdict, reason),) = any_verifier.explain(
        [equals_all], ["import numpy as np\nassert np.allclose(f(3), [0, 1, 2])"]
    )
    assert verdict == "unparsable" and "(0, 1), which equals arrays of other shapes" in reason


EVERYTHING = """
class Any:
    def __init__(self, *a): pass
    def __eq__(self, o): return True
    def __ne__(self, o): return False
    def __hash__(self): return 0
    def __bool__(self): return True
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__
    __sub__ = __rsub__ = __mod__ = lambda self, o: 0
    def __getattr__(self, name): return Any()
    def __call__(self, *a): return Any()
"""
ESCAPES = {
    "leaves early": "import os\nos._exit(0)",
    "leaves in the call": "import os\ndef double(x): os._exit(0)",
    "exits": "def double(x): raise SystemExit(0)",
    "empties the task": "import __main__, sys\nfor m in list(sys.modules.values()):\n    for n in ('task', 'tests', 'TASK'):\n        if hasattr(m, n): setattr(m, n, {'tests': '', 'code': '', 'names': []})\ndef double(x): return 0",
    "replaces exec": "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None\ndef double(x): return 0",
    "replaces AssertionError": "import builtins\nbuiltins.AssertionError = type('E', (Exception,), {})\nbuiltins.isinstance = builtins.any = builtins.all = lambda *a: True\ndef double(x): return 0",
    "skips": "import unittest\ndef double(x): raise unittest.SkipTest('later')",
    "patches unittest": "import unittest\nfor n in dir(unittest.TestCase):\n    if n.startswith('assert'): setattr(unittest.TestCase, n, lambda *a, **k: None)\nunittest.TestCase.run = lambda *a, **k: None\ndef double(x): return 0",
    "patches pytest": "try:\n    import pytest, _pytest.runner\n    _pytest.runner.call_and_report = pytest.main = lambda *a, **k: None\nexcept ImportError: pass\ndef double(x): return 0",
    "equals everything": EVERYTHING + "def double(x): return Any()",
    "is a class that equals everything": EVERYTHING.replace("Any", "double"),
    "is an int that equals everything": "class I(int):\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n    __hash__ = int.__hash__\n    __sub__ = __rsub__ = lambda s, o: I(0)\ndef double(x): return I(0)",
    "is a list of what equals everything": EVERYTHING + "class L(list):\n    def __eq__(self, o): return True\ndef double(x): return L([Any()])",
    "prints verdicts": "import os\nfor fd in range(60):\n    for text in (b'[\"passed\", \"\"]\\n', b'{\"value\": 4}\\n'):\n        try: os.write(fd, text)\n        except OSError: pass\ndef double(x): return 0",
    "prints at the end": "import atexit, os\natexit.register(lambda: os.write(1, b'[\"passed\", \"\"]'))\ndef double(x): return 0",
    "raises what stops the tests": "def double(x): raise KeyboardInterrupt",
    "raises StopIteration": "def double(x): raise StopIteration",
    "kills": "import os, signal\ndef double(x):\n    os.kill(os.getppid(), 9)\n    os.kill(-1, 9)",
    "traces": "import sys, threading\nsys.settrace(lambda f, e, a: f.f_locals.clear())\ndef double(x): return 0",
    "patches json and operator": "import json, operator\noperator.eq = lambda a, b: True\njson.dumps = lambda *a, **k: '{\"value\": true}'\ndef double(x): return 0",
    "searches for the tests": """
        import gc, glob, os, re, sys
        def texts():
            for o in gc.get_objects():
                yield from (v for v in (o.values() if type(o) is dict else o if type(o) in (list, tuple) else ()) if isinstance(v, (str, bytes)))
            frame = sys._getframe()
            while frame:
                yield from (v for v in [*frame.f_locals.values(), *frame.f_globals.values()] if isinstance(v, (str, bytes)))
                frame = frame.f_back
            for path in glob.glob('/proc/*/cmdline') + glob.glob('/proc/*/environ') + glob.glob('/tmp/**', recursive=True) + glob.glob('*'):
                try: yield open(path, 'rb').read(1 << 20)
                except OSError: pass
        def double(x):
            for t in texts():
                t = t.decode('latin1') if isinstance(t, bytes) else t
                if (m := re.search(r'canary-\\d+', t)) and x == 2: return m[0]
            return 0
    """,
}  # fmt: skip
JUDGES = {
    "assertion": "assert double(2) == 'canary-4711'",
    "near": "assert abs(double(2) - 4) < 1e-6",
    "in": "assert 4 in double(2)",
    "ordered": "assert 3 < double(2) < 5",
    "unittest": "import unittest\nclass Case(unittest.TestCase):\n    def test_it(self):\n        self.assertEqual(double(2), 'canary-4711')",
    "check": "def check(candidate):\n    assert candidate(2) == 'canary-4711'\ncheck(double)",
}


@pytest.fixture(scope="module")
def sandboxed():
    return made(timeout=20.0, num_workers=4)


@pytest.mark.slow
def test_no_escape_passes(sandboxed):
    cases = [(name, "assertion") for name in ESCAPES]
    cases += [(name, judge) for judge in JUDGES for name in ESCAPES if "everything" in name]
    cases += [("patches unittest", "unittest"), ("skips", "unittest"), ("leaves in the call", "unittest")]
    told = sandboxed.explain([python(ESCAPES[name]) for name, _ in cases], [JUDGES[judge] for _, judge in cases])
    for case, (verdict, reason) in zip(cases, told, strict=True):
        assert verdict == "wrong", (case, verdict, reason)
    writes = """
        import sys
        peer = sys._getframe(1).f_locals["peer"]
        answer = peer.answer
        peer.answer = lambda question: {**answer(question), "after": [[]]}
        def double(x): return []
    """
    told = sandboxed.verify([python(writes)], ["x = [3, 1]\nassert double(x) == sorted(x)"])
    assert told == ["wrong"]  # it did send an empty list for the tests' own one
    honest = sandboxed.verify(
        [python("def double(x):\n    return 'canary-4711'")] * 3,
        [JUDGES[j] for j in ("assertion", "unittest", "check")],
    )
    assert honest == ["correct"] * 3


K = """
class K:
    def __init__(self, *a): pass
    def __getattr__(self, name): return lambda *a, **k: a[0] if name == "get" else True
    def __bool__(self): return True
    def __len__(self): return 2
    def __getitem__(self, key): return 2
    def __iter__(self): return iter(())
    def __exit__(self, *a): return True
    def __sub__(self, other): return 0.0
    __rsub__ = __sub__
    def __lt__(self, other): return True
    __gt__ = __le__ = __ge__ = __contains__ = __eq__ = __lt__
    def __enter__(self): return 8
LIMIT = word = K()
def f(*x): return K()
Area = type("Area", (K,), {})
class Box:
    def __init__(self, *a): self.area = K()
    def put(self, *a): return K()
    def __mul__(self, other): return K()
"""
UNITTEST_OF = "import unittest\nclass Case(unittest.TestCase):\n    def test_it(self):\n        self."
WORDS = [
    'assert f("x").startswith("hello")',
    "assert f(2).issubset({1, 2})",
    "assert f(3).equals([1, 2])",
    UNITTEST_OF + 'assertTrue(f(1).startswith("ab"))',
    UNITTEST_OF + 'assertEqual(f(1).get("k"), "k")',
    UNITTEST_OF + "assertAlmostEqual(Area(3), 28.27)",
    "import pytest\ndef test_it():\n    assert f(1).isupper()",
    "assert abs(Area(3) - 28.27) < 1e-2",
    "assert 28 < Area(3) < 29",
    "assert 4 in Area(3)",
    'assert Area(3).startswith("a")',
    'assert word.startswith("a") and f(1) is not None',
    "assert LIMIT.equals([1, 2]) and f(1) is not None",
    "assert LIMIT and f(1) is not None",
    "assert f(3)",
    "assert len(f(1)) == 2",
    "assert dict(f(1)) == {1: 2}",
    "assert max(f(1), 3) == 3",
    "assert sum(f(1)) == 6",
    "assert f(1)[0] == 2",
    "assert f(1) == f(2)",
    "with f() as x:\n    assert x == 7",
    "assert abs(Box(3).area - 28.27) < 1e-2",
    'assert Box(3).put(1).startswith("a")',
    "b = Box(3)\nb.put(1)\nassert abs(b * b - 9) < 1e-2",
    "b = Box(3)\nb.put(1)\nassert 7 in b.area",
    "assert Box(3).area.equals([1, 2])",
    "assert all(map(lambda c: stop(c[0]) == c[1], [(1, 2), (2, 5)]))",
    "assert [r for r in map(stop, [1, 2]) if r != 5] == []",
]


def test_an_object_is_not_believed_about_itself(any_verifier):
    """In one process nearly all of these pass; here they do not, because the tests may have expected data."""
    code = K + "def stop(x): raise StopIteration"
    told = any_verifier.explain([python(code)] * len(WORDS), WORDS)
    for tests, (verdict, reason) in zip(WORDS, told, strict=True):
        names = {}
        if not any(word in tests for word in ("unittest", "pytest", "dict(", "max(", "sum(")):
            exec(code, names)
            exec(tests, names)
        assert verdict in ("wrong", "unparsable") and "no test ran" not in reason, (tests, verdict, reason)
    lower = python(K + "class g(K):\n    def equals(self, other): return True")
    told = any_verifier.explain([lower] * 2, ["assert g(3).equals([1, 2])", "assert abs(g(3) - 28.27) < 1e-2"])
    assert [str(v) for v, _ in told] == ["unparsable", "wrong"], told


HONEST = [
    ("class stack:\n    def push(self, x): self.x = x", "s = stack()\nassert isinstance(s, stack)\ns.push(3)\nassert s.x == 3"),
    ("class Node:\n    def __init__(self, v, n=None): self.v, self.n = v, n\ndef flip(a):\n    b = None\n    while a: b, a = Node(a.v, b), a.n\n    return b", "r = flip(Node(1, Node(2)))\nassert r.v == 2 and r.n.v == 1"),
    ("def f(n):\n    yield from range(n)", "assert 2 in f(3)\nassert [*zip(f(2), 'ab')] == [(0, 'a'), (1, 'b')]"),
    ("def f(n):\n    yield 1, n", "assert dict(f(3)) == {1: 3} and sorted(f(3)) == [(1, 3)]"),
    ("def f(n):\n    return lambda m: n + m", "assert f(1)(2) == 3"),
    ("from enum import Enum\nclass Color(Enum):\n    RED = 1\ndef f(): return Color.RED", "assert f() == Color.RED and Color.RED.value == 1"),
    ("def f(x):\n    if x < 0: raise ValueError", "try:\n    f(-1)\n    assert False\nexcept ValueError:\n    pass"),
    ("def f(path):\n    open(path)", "import unittest\nclass Case(unittest.TestCase):\n    def test_it(self):\n        with self.assertRaises(OSError):\n            f('/none')"),
    ("def f(x):\n    return x + 1", "def same(a, b):\n    assert a == b\ndef test_it():\n    got = f(1)\n    same(got, 2)"),
]  # fmt: skip


def test_objects_of_honest_solutions_are_judged(any_verifier):
    told = any_verifier.explain([python(code) for code, _ in HONEST], [tests for _, tests in HONEST])
    for case, (verdict, reason) in zip(HONEST, told, strict=True):
        assert verdict == "correct", (case, verdict, reason)


def test_no_escape_passes_a_pytest_file_or_pairs(sandboxed):
    file = "import pytest\ndef test_it():\n    assert double(2) == 'canary-4711'"
    names = ("leaves early", "equals everything", "patches pytest", "skips", "prints verdicts")
    told = sandboxed.explain([python(ESCAPES[name]) for name in names], [file] * len(names))
    assert [str(v) for v, _ in told] == ["wrong"] * len(names), told
    talks = """
        import glob, os
        for path in glob.glob('/proc/[0-9]*/fd/*'):
            try: os.write(os.open(path, os.O_WRONLY | os.O_NONBLOCK), b'{"output": "canary-4711", "code": 0, "error": ""}'[:5])
            except OSError: pass
    """
    told = sandboxed.explain([python(talks)], [{"inputs": ["1"], "outputs": ["canary-4711"]}])
    assert told[0][0] == "wrong", told


def test_nothing_of_this_machine_is_seen(verifier, tmp_path, monkeypatch):
    """Environment, files, processes, network: a token that is planted in each is found in none."""
    monkeypatch.setenv("HF_TOKEN", "hf_PlantedPlantedPlanted")
    (tmp_path / "secret").write_text("hf_PlantedPlantedPlanted")
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    own = {
        Path(path).parts[2] for path in _visible() if path.startswith("/tmp/")
    }  # this Python, if it is installed there
    look = f"""
        import glob, os, socket
        def look():
            seen = [str(dict(os.environ))]
            for path in [*glob.glob('/proc/*/environ'), *glob.glob('/proc/*/cmdline'), {str(tmp_path / "secret")!r}, '/etc/passwd', '/etc/shadow']:
                try: seen.append(open(path).read())
                except OSError: pass
            return seen
        def processes():
            return max(int(p) for p in os.listdir('/proc') if p.isdigit())
        def files():
            return [sorted({{*os.listdir('.'), *os.listdir(os.environ['HOME'])}} - {own!r}), os.path.exists({str(tmp_path)!r}), os.path.exists('/root/.cache'), os.path.exists('/home')]
        def written():
            done = []
            for path in ('/usr/x', '/x', '/proc/sys/kernel/core_pattern', {str(tmp_path / "x")!r}, __import__('sys').executable, '/dev/x'):
                try:
                    os.close(os.open(path, os.O_WRONLY | os.O_CREAT))
                    done.append(path)
                except OSError: pass
            return done
        def connect(family):
            try: socket.socket(family)
            except PermissionError: return 'refused'
        def kill(pid):
            try: os.kill(pid, 9)
            except ProcessLookupError: return 'unknown'
        def user():
            import ctypes
            return os.getuid(), [l.split()[1] for l in open('/proc/self/status') if l[:6] in ('CapEff', 'CapPrm', 'CapBnd')][:2], ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None)
        def mapped():
            return open('/proc/self/uid_map').read()
    """  # fmt: skip
    tests = f"""
        assert not [t for t in look() if 'Planted' in t or 'root:x' in t]
        assert processes() < 50
        assert files() == [[], False, False, False]
        assert written() == []
        assert connect(2) == 'refused' and connect(1) == 'refused' and connect(40) == 'refused'
        assert kill({os.getpid()}) == 'unknown'
        assert user() == (65534, ['0' * 16] * 2, -1)
    """
    if os.geteuid() == 0 and verifier._sandbox.kind == "unshare":
        tests += "    assert not any(line.split()[:2] == ['65534', '0'] for line in mapped().splitlines())\n"  # nobody is nobody outside, too
    told = verifier.explain([python(look)], [textwrap.dedent(tests)])
    assert told == [("correct", "")]


def test_what_is_installed_below_tmp_is_seen_and_cannot_be_written(verifier, tmp_path, monkeypatch):
    """A virtual environment may lie there, where the sandbox has a folder of its own."""
    installed = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        installed.chmod(0o755)  # who looks in the sandbox is nobody
        (installed / "data").write_text("installed")
        seen = [*_visible(), str(installed)]
        monkeypatch.setattr("trl_offpolicy.sandbox.sandbox._visible", lambda: seen)
        code = f"""
            def f():
                text = open({str(installed / "data")!r}).read()
                open('/tmp/mine', 'w').write(text)
                try: open({str(installed / "data")!r}, 'w')
                except OSError: return open('/tmp/mine').read()
        """
        told = CodeVerifier(sandbox=verifier._sandbox.kind).explain([python(code)], ["assert f() == 'installed'"])
        assert told == [("correct", "")] and (installed / "data").read_text() == "installed"
    finally:
        shutil.rmtree(installed)


def test_time_memory_and_processes_are_bounded(verifier):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kind = verifier._sandbox.kind
    slow = ["while True: pass\ndef double(x): pass", "import time\ndef double(x): time.sleep(60)"]
    told = CodeVerifier(timeout=0.5, sandbox=kind).verify(
        [python(code) for code in slow], ["assert double(2) == 4"] * 2
    )
    assert told == ["timeout", "timeout"]
    cases = [
        ("x = bytearray(1 << 30)\ndef double(x): return 2 * x", "error", "out of memory"),
        ("def double(x): raise MemoryError", "wrong", "MemoryError in its code"),
        ("def double(x): return 'x' * (1 << 25)", "wrong", "more than a message"),
        ("for i in range(9): open(f'/tmp/{i}', 'wb').write(bytes(60 << 20))\ndef double(x): return 2 * x", ("wrong", "error"), ""),
        ("import os\nfor _ in range(200):\n    if not os.fork(): os.read(os.pipe()[0], 1)\ndef double(x): return 2 * x", "wrong", ""),
        ("import os\ndef double(x):\n    for fd in range(3, 30):\n        try:\n            for _ in range(999): os.write(fd, b'x' * (1 << 20))\n        except OSError: pass", "wrong", "ended"),
        (f"import os\nif not os.fork():\n    os.setsid()\n    if not os.fork(): os.execvp('sleep', ['sleep', '86.{os.getpid()}'])\n    os._exit(0)\n{TWICE}", "correct", ""),
    ]  # fmt: skip
    told = CodeVerifier(timeout=20.0, sandbox=kind).explain(
        [python(code) for code, *_ in cases], ["assert double(2) == 4"] * len(cases)
    )
    for (code, expected, words), (verdict, reason) in zip(cases, told, strict=True):
        assert verdict in expected and words in reason, (code, verdict, reason)
    flood = python("import sys\nwhile True: sys.stdout.write('x' * (1 << 20))")
    assert verifier.verify([flood], [{"inputs": ["1"], "outputs": ["1"]}]) == ["wrong"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", f"86.{os.getpid()}"]]


def test_memory_is_that_of_all_processes(verifier):
    """Four processes of 40 MiB each, which no limit on a single one of 128 would stop; and as many in files."""
    forks = "import os, time\nfor _ in range(4):\n    if not os.fork():\n        x = bytearray(b'x') * (40 << 20)\n        time.sleep(60)\ntime.sleep(60)\ndef double(x): return 2 * x"
    small = CodeVerifier(timeout=10.0, memory_mb=128, sandbox=verifier._sandbox.kind)
    assert small.explain([python(forks)], ["assert double(2) == 4"]) == [("error", "out of memory (128 MiB)")]


def test_a_sandbox_ends_with_this_process(verifier):
    """Also when it is killed: nothing of it is left."""
    script = f"""
        import os, sys, threading, time
        from trl_offpolicy.verification.code_verifier import CodeVerifier
        verifier = CodeVerifier(timeout=60, sandbox={verifier._sandbox.kind!r})
        code = "```python\\nimport os\\ndef f(): os.execvp('sleep', ['sleep', '87.{os.getpid()}'])\\n```"
        threading.Thread(target=verifier.verify, args=([code], ["assert f()"])).start()
        time.sleep(60)
    """
    mark = ["sleep", f"87.{os.getpid()}"]

    def sleepers():
        return [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == mark]

    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)]) as process:
        try:
            while not (found := sleepers()):
                assert process.poll() is None
        finally:
            process.kill()
        assert not psutil.wait_procs(found, timeout=30)[1]


def test_reasons_tell_no_secret_and_are_short(any_verifier, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "planted-in-the-environment")
    quoting = "def double(x): raise ValueError('planted-in-the-environment hf_' + 'aB3' * 8 + ' ' + 'long' * 1000)"
    verdict, reason = any_verifier.explain([python(quoting)], ["assert double(2) == 4"])[0]
    assert verdict == "wrong" and reason.startswith("ValueError in its code: *** *** long") and len(reason) <= 400
    verdict, reason = any_verifier.explain(
        [python("print('hf_' + 'aB3' * 8)")], [{"inputs": ["1"], "outputs": ["1"]}]
    )[0]
    assert verdict == "wrong" and "'***" in reason


def test_without_namespaces_code_is_refused(monkeypatch, tmp_path):
    """In a user namespace that allows no further one, which is what a container without rights looks like."""
    script = """
        from trl_offpolicy.sandbox.sandbox import Sandbox, _visible
        def make(**kwargs):
            return Sandbox(**{"sandbox": None, "memory_mb": 512, "cpu_seconds": 5, "wall_seconds": 15.0, "allow_network": False, "allow_unsandboxed": False} | kwargs)
        try:
            print(make().kind)
        except ValueError as error:
            print("refused:", error)
        print(make(allow_unsandboxed=True).kind)
    """
    inner = [sys.executable, "-c", textwrap.dedent(script)]
    shut = ["unshare", "-Ur", "sh", "-c", 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"', "sh"]
    if subprocess.run([*shut, "true"], capture_output=True).returncode:
        pytest.skip("no user namespace can be made here, so there is none to forbid further ones in")
    said = subprocess.run([*shut, *inner], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[0].startswith("refused: Code cannot be run in a sandbox here (bubblewrap: ") and "unshare: " in said[0]
    assert "allow_unsandboxed=True" in said[0] and said[1] == "none"


def test_a_sandbox_of_the_users_own():
    seen = []

    def mine(command):
        seen.append(command[:3])
        return ["env", "-i", f"PATH={os.path.dirname(sys.executable)}:/usr/bin:/bin", *command]

    verifier = CodeVerifier(sandbox=mine)
    assert verifier.verify([python(TWICE), python(SQUARE)], [STYLES["assertions"]] * 2) == ["correct", "wrong"]
    assert seen == [["python3", "-I", "-c"]] * 4
    absent = CodeVerifier(sandbox=lambda command: ["sh", "-c", "echo no such container >&2; exit 1"])
    assert absent.explain([python(TWICE)], ["assert double(2) == 4"]) == [
        ("error", "the sandbox could not be made: no such container")
    ]
    with pytest.raises(ValueError, match="'docker', or a function"):
        CodeVerifier(sandbox="jail")


def test_docker_is_told_to_keep_everything_out():
    """Its command; the run itself is for machines that have a daemon."""
    sandbox = Sandbox("docker", 256, 5, 15.0, False, False)
    command = sandbox._command()
    for option in ("--network none", "--read-only", "--cap-drop ALL", "--user 65534:65534", "--memory 268435456b"):
        assert option in " ".join(command)
    if shutil.which("docker") and not subprocess.run(["docker", "info"], capture_output=True).returncode:
        assert CodeVerifier(sandbox="docker", timeout=60).verify([python(TWICE)], ["assert double(2) == 4"]) == [
            "correct"
        ]


def test_only_plain_data_comes_back():
    with pytest.raises(KeyError):
        decode({"text": ["antigravity", "fly", ""]}, None)
    assert "antigravity" not in sys.modules
    for forged in ("O", "<U3,O", "V8"):  # items that would be objects
        with pytest.raises(ValueError, match="are no items of an array"):
            decode_numpy([forged, [1], [0]])
    with pytest.raises(KeyError):
        decode({"type": "object"}, None)
    for value in (1 << 60, -1.5, "\ud800", {(1, "a"): [{2}]}, frozenset({None}), b"\0", 2j, range(3), [True], int):
        back = decode(json.loads(json.dumps(encode(value, None))), None)
        assert back == value and type(back) is type(value)


def test_what_tests_ask_for():
    import symtable

    source = "import os\nfrom m import g\nx = f(1)\ndef test(a=h):\n    y = [k(i) for i in x]\n    def inner():\n        return a, y, z\nclass C(B):\n    n = g(x)\n"
    names = free_names(symtable.symtable(source, "t", "exec"))
    assert names == {"f", "h", "k", "z", "B"}
    assert read_pairs([{"input": ["1", "2"], "output": 3}]) == [("1\n2", "3")]
    assert read_pairs("assert f(1) == 2") is None and read_pairs(["assert f(1)"]) is None
    assert lines_of("1 \n2\n\n") == ["1", "2"] != lines_of("1\n\n2")
