"""Verdicts, and what happens to a verification that hangs, crashes or eats memory."""

import base64
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from datasets import Dataset, Features, Image, Value

from trl_offpolicy import MathVerifier, Verdict
from trl_offpolicy.answers.extraction import final_answer, stated_text
from trl_offpolicy.answers.normalization import unit
from trl_offpolicy.cli import main
from trl_offpolicy.verification import math_grading, worker
from trl_offpolicy.verification.math_grading import grade
from trl_offpolicy.verification.worker import MEMORY_LIMIT


DATA = Path(__file__).parent / "data"


def labelled(name):
    return [json.loads(line) for line in (DATA / name).open()]


@pytest.fixture(scope="module")
def verifier():
    with MathVerifier(timeout=2.0, num_workers=2) as verifier:
        yield verifier


CASES = [
    ("so \\boxed{0.5}", "\\frac{1}{2}", "correct"),
    ("\\boxed{\\frac{1}{3}}", "\\frac{1}{2}", "wrong"),  # a regex without brace balance takes both for \frac{1
    ("\\boxed{1} no, \\boxed{2}", "2", "correct"),
    ("\\boxed{2} no, \\boxed{1}", "2", "wrong"),
    ("#### 1,234", "1234", "correct"),
    ("The answer is 42.", "42", "correct"),
    (".4", "0.4", "correct"),
    ("**Answer:** B. Paris", "Paris", "correct"),
    ("**Answer:** B. Paris", "C", "wrong"),
    ("\\boxed{1{,}000}", "1000", "correct"),
    ("\\boxed{x^2 + 2x + 1}", "(x+1)^2", "correct"),
    ("\\boxed{\\text{Monday}}", "Monday", "correct"),
    ("\\boxed{Sunday}", "Monday", "wrong"),
    ("\\boxed{listen}", "silent", "wrong"),  # letters of a word are not factors
    ("\\boxed{90^\\circ}", "90", "correct"),
    ("\\boxed{\\begin{pmatrix}1\\\\2\\end{pmatrix}}", "\\begin{pmatrix}1\\\\3\\end{pmatrix}", "wrong"),
    ("Therefore the answer is 43, not 42.", "42", "wrong"),
    ("12\n7 and\n42", "42", "unparsable"),  # rambling that ends in the right number states no answer
    ("I do not know", "42", "unparsable"),
    ("", "42", "unparsable"),
    ("\\boxed{3}", "", "unparsable"),
    ("\\boxed{3}", "\\frac{1}{", "unparsable"),
    ("\ud800 NUL \x00 \\boxed{7}", "7", "correct"),
    # what is said of a variable, as it is usually written: with spaces
    ("\\boxed{x \\in (2,\\infty)}", "x>2", "correct"),
    ("\\boxed{a \\in (0,1)}", "0<a<1", "correct"),
    ("\\boxed{x \\in \\{1, 2\\}}", "1,2", "correct"),
    ("\\boxed{x \\in \\{1, 2\\}}", "\\{2,1\\}", "correct"),
    ("\\boxed{x \\in \\{1, 2\\}}", "(1,2)", "wrong"),
    ("\\boxed{(x, y) \\in \\{(1,2), (3,4)\\}}", "(1,2),(3,4)", "correct"),
    ("\\boxed{x \\in \\mathbb{R}}", "(-\\infty,\\infty)", "correct"),
    ("\\boxed{S = \\{1,2\\}}", "\\{1,2\\}", "correct"),
    ("\\boxed{A = \\{1,2\\}}", "B=\\{1,2\\}", "wrong"),
    ("\\boxed{\\{1,2\\}, \\{3,4\\}}", "\\{1,4\\},\\{3,2\\}", "wrong"),
    ("\\boxed{x \\in [-2,8]}", "x \\in [-2,7]", "wrong"),
    ("\\boxed{x \\le 7}", "x \\in [-2,7]", "wrong"),
    # a magnitude is part of the number, not a unit that is dropped
    ("\\boxed{5\\text{ million}}", "5", "wrong"),
    ("\\boxed{5\\text{ million}}", "5\\text{ thousand}", "wrong"),
    ("\\boxed{\\$5 \\text{ million}}", "5000000", "correct"),
    ("\\boxed{3\\text{ thousand dollars}}", "\\$3,000", "correct"),
    ("\\boxed{3\\text{ dozen eggs}}", "36", "correct"),
    ("\\boxed{0.5 billion}", "500 \\text{ million}", "correct"),
    ("The answer is about 5 million.", "5", "wrong"),
    ("\\boxed{1500000}", "\\$1,500,000", "correct"),  # one number, though there is a unit behind it
    ("\\boxed{1,500,000\\text{ people}}", "1500000", "correct"),
    # a bare unit is one where it can be nothing else, and one letter only behind an answer to a plain number
    ("\\boxed{5 km/h}", "5", "correct"),
    ("\\boxed{5 m/s}", "18\\text{ km/h}", "correct"),
    ("\\boxed{1\\text{ km/h}^2}", "3600\\text{ m/h}^2", "wrong"),
    ("\\boxed{1\\text{ km/h}^2}", "1000\\text{ m/h}^2", "correct"),
    ("The answer is 12 m.", "12", "correct"),
    ("The answer is 12 m^2.", "12", "correct"),
    ("\\boxed{12}", "12 m", "wrong"),
    ("\\boxed{12m}", "12", "wrong"),
    ("\\boxed{12 x}", "12", "wrong"),
    ("We solve.\nThe answers are 5 and 6.", "5,6", "correct"),
    ("We solve.\nThe answer is 7.\nBoth solutions are valid.", "7", "correct"),
    ("We solve.\nBoth solutions are valid.", "7", "unparsable"),
    ("We solve.\n\n**Final Answer**\n\n18", "18", "correct"),
    ("We solve.\n## Answer\n$\\frac{1}{2}$", "0.5", "correct"),
    ("We look for the answer\n\n18 is not it, I think", "18", "unparsable"),
    # sympy raises for what it has no way to compare
    ("\\boxed{x < 3}", "x \\neq 3", "wrong"),
    ("\\boxed{x < 1}", "\\sin x = 1", "wrong"),
    ("\\boxed{x > 1}", "x \\notin \\{1\\}", "wrong"),
]


def test_verdicts(verifier):
    completions, answers, expected = zip(*CASES, strict=True)
    assert verifier.verify(list(completions), list(answers)) == list(expected)


def test_check_answers(verifier):
    golds = ["1", "x^2", "Monday", "\\frac{1}{2}", "", None, "\\frac{1}{"]
    assert verifier.check_answers(golds) == ["correct"] * 4 + ["unparsable"] * 3


def test_reward_signature(verifier):
    """As GRPOTrainer calls it: conversational completions, the dataset's columns by name, `None` where nothing can be said."""
    completions = [
        [{"role": "assistant", "content": c}]
        for c in ("\\boxed{2}", "\\boxed{3}", "hm", "\\boxed{1}", "\\boxed{9^{9^{9^9}}}")
    ]
    assert verifier(prompts=[], completions=completions, answer=["2", "2", "2", "", "2"]) == [
        1.0,
        0.0,
        0.0,
        None,
        None,
    ]
    assert verifier(completions=["\\boxed{2}"], solution=["so $\\boxed{2}$"]) == [1.0]
    with pytest.raises(ValueError, match="needs a column `answer`"):
        verifier(completions=["1"], target=["1"])


def test_hang_is_a_timeout_and_order_is_kept(verifier):
    completions = ["\\boxed{9^{9^{9^9}}}" if i == 3 else f"\\boxed{{{i}+0}}" for i in range(12)]
    verdicts = verifier.verify(completions, [str(i) for i in range(12)])
    assert verdicts == ["timeout" if i == 3 else "correct" for i in range(12)]


def test_killed_worker_is_an_error_not_a_wrong_answer(verifier):
    verifier.verify(["1"] * 4, ["1"] * 4)  # both workers are up
    threading.Timer(0.1, os.kill, (verifier._workers[0].pid, signal.SIGKILL)).start()
    results = verifier.explain(["\\boxed{9^{9^{9^9}}}"] * 2, ["1"] * 2)
    assert sorted(v for v, _ in results) == ["error", "timeout"]
    assert any("exit code -9" in reason for _, reason in results)
    assert verifier.verify(["\\boxed{1}"], ["1"]) == [Verdict.CORRECT]  # and the pool is whole again


def test_worker_that_dies_idle_costs_no_verdict(verifier):
    """The one that all workers are forked from, the fork, the process it is forked from, and both."""
    verifier.verify(["1"] * 4, ["1"] * 4)
    for victims in (
        lambda w: [psutil.Process(w.keeper).ppid()],
        lambda w: [w.pid],
        lambda w: [w.keeper],
        lambda w: [w.pid, w.keeper],
    ):
        for pid in victims(verifier._workers[0]):
            with suppress(ProcessLookupError):  # killed in the round before
                os.kill(pid, signal.SIGKILL)
        assert set(verifier.explain(["\\boxed{x+1}"] * 8, ["1+x"] * 8)) == {(Verdict.CORRECT, "")}


def test_all_workers_of_a_process_are_forked_from_one_that_has_imported():
    """Those of another verifier, too: nothing slow happens when a verifier starts. Only its own workers end with it."""
    with MathVerifier(num_workers=2) as one, MathVerifier(num_workers=3) as other:
        for each in (one, other):
            each.verify(["1"] * 6, ["1"] * 6)
        workers = [psutil.Process(w.keeper) for w in (*one._workers, *other._workers)]
        sources = {worker.ppid() for worker in workers}
        other.close()
        assert not psutil.wait_procs(workers[2:], timeout=30)[1] and all(worker.is_running() for worker in workers[:2])
        assert len(workers) == 5 and len(sources) == 1
        assert psutil.Process(sources.pop()).ppid() == os.getpid()


def test_uninterruptible_code_is_killed_from_outside(monkeypatch):
    """The budget inside is far away here (code in C would ignore it), so only the parent can end it."""
    monkeypatch.setattr(worker, "WALL", 0.01)
    monkeypatch.setattr(worker, "OVER_BUDGET", 0.01)
    with MathVerifier(timeout=60, num_workers=1) as verifier:
        ((verdict, reason),) = verifier.explain(["\\boxed{9^{9^{9^9}}}"], ["1"])
        assert verdict == "timeout" and reason.startswith("killed after")
        assert verifier.verify(["\\boxed{1}"], ["1"]) == ["correct"]


def test_a_worker_gives_way_to_the_engine_and_is_out_of_the_way_of_ctrl_c():
    """Niceness counts within a session only (Linux shares a processor out among sessions first), ctrl-C within a process group."""
    with MathVerifier(num_workers=1) as verifier:
        verifier.verify(["1"], ["1"])
        pid = verifier._workers[0].pid
        assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + worker.NICE)
        assert os.getsid(pid) == os.getsid(0) and os.getpgid(pid) != os.getpgid(0)


@pytest.mark.parametrize("wakes, verdict", [(True, "correct"), (False, "timeout")])
def test_a_worker_that_is_kept_from_running_is_waited_for(wakes, verdict):
    """It is past its deadline with no CPU time used: no verdict on the answer, unless it never runs again."""
    with MathVerifier(timeout=0.2, num_workers=1) as verifier:
        verifier.verify(["1"], ["1"])
        worker = verifier._workers[0]

        def stop():
            while not worker.reading:
                pass
            os.kill(worker.pid, signal.SIGSTOP)
            deadline = worker.deadline
            while wakes and worker.deadline == deadline:  # until more time was given
                pass
            os.kill(worker.pid, signal.SIGCONT if wakes else signal.SIGSTOP)

        thread = threading.Thread(target=stop)
        thread.start()
        assert verifier.verify(["\\boxed{\\sqrt{x^2+2x+1}}"], ["\\sqrt{(x+1)^2}"]) == [verdict]
        thread.join()


def test_close_from_another_thread_ends_a_verification():
    verifier = MathVerifier(timeout=60, num_workers=1)
    verifier.verify(["1"], ["1"])
    threading.Timer(0.1, verifier.close).start()
    with pytest.raises(RuntimeError, match="closed while it was verifying"):
        verifier.verify(["\\boxed{9^{9^{9^9}}}"], ["1"])
    assert verifier.verify(["\\boxed{1}"], ["1"]) == [Verdict.CORRECT]
    verifier.close()


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="timeout=0"):
        MathVerifier(timeout=0)
    with pytest.raises(ValueError, match="2 completions and 1 answers"):
        MathVerifier().verify(["1", "2"], ["1"])


@pytest.mark.parametrize(
    ("name", "accuracy"),
    [
        ("verifier_cases_public.jsonl", 0.99),
        ("verifier_cases_own.jsonl", 0.99),
        # what stands around a value: denied, asked, bounded, corrected, in a formula
        ("qualified_answers.jsonl", 1.0),
        ("verifier_cases_attack.jsonl", 0.99),
        ("verifier_cases_2026_11.jsonl", 0.99),
        ("verifier_cases_mended.jsonl", 1.0),  # each, or the one beside it, was once judged wrongly
        ("real_outputs.jsonl", 1.0),
    ],
)
@pytest.mark.slow
def test_labelled_rows(verifier, name, accuracy):
    """No false positive on any; `verifier_cases_public` is where math-verify has 2 and an accuracy of 0.926."""
    rows = labelled(name)
    verdicts = verifier.verify([r["prediction"] for r in rows], [r["gold"] for r in rows])
    told = list(zip(rows, verdicts, strict=True))
    assert not [r for r, v in told if v == "correct" and not r["label"]]
    missed = [(r["gold"], r["prediction"][-100:], str(v)) for r, v in told if r["label"] and v != "correct"]
    assert 1 - len(missed) / len(rows) >= accuracy, missed


# What the page docs/how_an_answer_is_read.md says: texts that stand in it, and what they state; answers that stand in it, and their verdict.
STATED_IN_DOCS = [
    ("<answer>10</answer>", "10"), ("\\boxed{10}", "10"), ("#### 10 apples", "10 apples"), ("#### Step 1: Count", None), ("The final answer is 10.", "10"),
    ("Answer: 10", "10"), ("答案：10", "10"), ("Die Antwort lautet 10", "10"), ("The result is 10.", "10"), ("The correct option is B", "B"), ("A: 10", "10"),
    ("Therefore, there are 10 pairs.", "10 pairs"), ("$x=\\boxed{2}$ and $y=\\boxed{3}$", "x = 2, y = 3"), ("\\boxed{}", None), ("\\boxed{...}", None),
    ("\\boxed{\\text{your answer}}", None), ("Answer: \\sqrt{5}", "\\sqrt{5}"), ("$-\\boxed{5}$", "-(5)"), ("$\\frac{\\boxed{5}}{2}$", "\\frac{(5)}{2}"),
    ("$\\boxed{5}$ million", "5\\text{ million}"), ("$x\\neq\\boxed{5}$", None), ("x = \\boxed{5}", "5"), ("2\\cdot3=\\boxed{6}", "6"), ("2x=\\boxed{5}", "5"),
    ("-\\boxed{5}", None), ("\\boxed{5}\\pi", None), ("$\\boxed{5}\\pi$", "(5)\\pi"),
]  # fmt: skip
JUDGED_IN_DOCS = [
    ("0.5", "\\frac12", True), ("1,234", "1234", True), ("3\\frac{1}{2}", "7/2", True), ("0.333333", "1/3", True), ("0.333", "1/3", False),
    ("10^{-20}", "10^{-21}", False), ("\\sqrt{12}", "2\\sqrt3", True), ("√12", "2\\sqrt3", True), ("2pi/3", "\\frac{2\\pi}{3}", True), ("e^(i*pi)", "-1", True),
    ("abs(x-1)", "|x-1|", True), ("\\sqrt{5}", "5", False), ("90\\text{ minutes}", "1.5\\text{ hours}", True), ("72\\text{ apples}", "72", True), ("7\\text{ tenths}", "7", False),
    ("10\\text{ or more}", "10", False), ("5\\text{x}", "5", False), ("x=2, y=3", "(2,3)", True), ("y=3, x=2", "(2,3)", True), ("(3,2)", "(2,3)", False), ("[2,3]", "(2,3)", False),
    ("2345", "(2,345)", False), ("-1\\le x<3", "[-1,3)", True), ("x\\ge-1\\text{ and }x<3", "[-1,3)", True), ("2 and 1", "\\{1,2\\}", True), ("12, 345", "12345", False),
    ("1, 1, 2", "1, 2, 2", False), ("1, 1, 2", "1, 2", True), ("2\\ln x", "\\ln(x^2)", True), ("x=1\\text{ or }x=2", "\\{1,2\\}", True), ("2=x", "x=2", True), ("x=5", "5", True), ("V_1:V_2=11:21", "11:21", True), ("f(x)=2x", "2x", True),
    ("f(x)=2x", "y=2x", True), ("y=5, x=2", "x=2, y=5", True), ("y=5", "x=5", False), ("4x-2y=6", "2x-y=3", True), ("2x=10", "10", False), ("x>2", "(2,\\infty)", True),
    ("c>b>a", "a<b<c", True), ("x>2", "x\\ge2", False), ("n\\equiv10\\pmod7", "n\\equiv3\\pmod7", True), ("3 (mod 7)", "n\\equiv3\\pmod7", True), ("3 (mod 7)", "3", False),
    ("3 to 4", "3:4", True), ("6:8", "\\frac34", True), ("4:3", "3:4", False), ("3:4:5", "3:4", False), ("(B)", "B", True), ("\\text{(B) }12", "B", True), ("12", "\\text{(B) }12", True),
    ("(B)(C)", "B", False), ("B or C", "B", False), ("may", "\\text{May}", True), ("\\emptyset", "no solution", True), ("\\emptyset", "DNE", False), ("does not exist", "DNE", True),
    ("ACB", "ABC", False), ("(1,2)", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", True), ("\\mathbf{i}+2\\mathbf{j}", "(1,2)", True),
    ("\\begin{pmatrix}1&2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", False), ("14th of March", "March 14", True), ("15:45", "3:45 p.m.", True),
    ("3:45 a.m.", "3:45 p.m.", False), ("1011_{\\text{two}}", "1011_2", True), ("1011", "1011_2", True), ("1011_3", "1011_2", False), ("12,345", "12, 345", True), ("3,5", "3.5", True),
]  # fmt: skip


def test_the_page_on_how_an_answer_is_read_predicts_verdicts(verifier):
    page = (ROOT / "docs" / "how_an_answer_is_read.md").read_text(encoding="utf-8")
    named = [text for text, _ in STATED_IN_DOCS] + [text for told, gold, _ in JUDGED_IN_DOCS for text in (told, gold)]
    assert not [text for text in named if text not in page]
    assert [(text, stated_text(text)) for text, _ in STATED_IN_DOCS] == STATED_IN_DOCS
    verdicts = verifier.verify(
        [f"\\boxed{{{told}}}" for told, _, _ in JUDGED_IN_DOCS], [gold for _, gold, _ in JUDGED_IN_DOCS]
    )
    assert [(t, g, v == "correct") for (t, g, _), v in zip(JUDGED_IN_DOCS, verdicts, strict=True)] == JUDGED_IN_DOCS


# What math-verify reads in golds it cannot parse: the first number, or a rest without its "units".
MISREAD = [
    ("\\begin{pmatrix}-1&0\\\\0&-1\\end{pmatrix}.", "-1"),
    ("2007+\\frac\\pi 2", "2"),
    ("\\hbar\\omega(v+1/2)-\\frac{1}{2}", "2"),
    ("a + b + c", "a+"),
    ("\\sin^2 t", "\\sin^2"),
    ("$221,$8$", "221"),
    ("E_{1}", "E"),
    ("I_{0}", "I"),
    ("\\gamma^2-1", "\\gamma"),
    ("2ab", "2"),
]


# (gold, prediction): alike once something is worked out, reordered or left out that may not be.
UNLIKE = [
    ("2015-03-01", "2015-01-03"), ("2015-03-01", "2011"), ("10/05/2020", "1/1010"), ("555-1234", "-679"), ("AB", "BA"), ("IV", "VI"),
    ("\\text{HT}", "\\text{TH}"), ("12", "1 2"), ("12", "1\\ 2"), ("56", "5\\quad6"), ("1.5", "1 .5"), ("2", "1 2"), ("x'", "x"), ("f'(x)", "f(x)"),
    ("45^\\circ", "45'"), ("5\\text{ ft}", '5"'), ("\\{1,2\\}", "\\{(1,2)\\}"), ("\\{\\{1\\},2\\}", "\\{1,2\\}"), ("\\emptyset", "\\{\\emptyset\\}"),
    ("5\\text{ apples}", "5\\text{ km}"), ("5\\text{ apples}", "5\\text{ oranges}"), ("5", "5\\ldots"),
]  # fmt: skip
ALIKE = [
    ("2015-03-01", "March 1, 2015"), ("March 1, 2015", "2015-03-01"), ("5\\text{ apples}", "5\\text{ red apples}"), ("5\\text{ apples}", "5"),
    ("1\\frac{2}{3}", "1 2/3"), ("1000", "1 000"), ("f'(x)=2x", "2x"), ("\\{1,2\\}", "\\{2,1\\}"), ("\\log_2 3", "\\log_{2}{3}"),
]  # fmt: skip


def test_nothing_is_worked_out_or_left_out_that_may_change_the_answer(verifier):
    for pairs, right in ((UNLIKE, False), (ALIKE, True)):
        golds, predictions = map(list, zip(*pairs, strict=True))
        told = verifier.verify([f"\\boxed{{{p}}}" for p in predictions], golds)
        assert [pair for pair, verdict in zip(pairs, told, strict=True) if (verdict == "correct") != right] == []


def test_a_gold_is_never_read_as_a_part_of_it(verifier):
    golds, parts = zip(*MISREAD, strict=True)
    assert verifier.check_answers(list(golds)) == ["correct"] * len(golds)
    assert "correct" not in verifier.verify([f"\\boxed{{{p}}}" for p in parts], list(golds))
    again = [g.replace("frac", "dfrac").replace("&", " & ") + " " for g in golds]  # not the same text
    assert verifier.verify([f"\\boxed{{{a}}}" for a in again], list(golds)) == ["correct"] * len(golds)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("$\\boxed{2}$ and $\\boxed{3}$", "2, 3"),
        ("$x = \\boxed{2}$, $y = \\boxed{3}$", "2, 3"),
        ("\\boxed{2}\\boxed{2}", "2"),
        ("\\boxed{2}; no, it is \\boxed{3}", "3"),
        ("\\boxed{2} \\text{ for part (a) and } \\boxed{3}", "2, 3"),
        ("\\boxed{\\frac{1}{2}} and \\boxed{3", None),
        ("\\boxed{1} #### 2", "1"),
        ("so 1,000\n#### 1,000\n", "1000"),
    ],
)
def test_boxes_of_one_answer_are_joined(text, answer):
    assert final_answer(text) == answer


def test_settings_of_math_verify():
    third, interval = (["\\boxed{0.33}"], ["\\frac{1}{3}"]), (["\\boxed{0 < x < 1}"], ["(0,1)"])
    with MathVerifier(num_workers=1) as verifier:
        assert verifier.verify(*third) == ["wrong"] and verifier.verify(*interval) == ["correct"]
    with MathVerifier(num_workers=1, float_rounding=1, allow_set_relation_comp=False) as verifier:
        assert verifier.verify(*third) == ["correct"] and verifier.verify(*interval) == ["wrong"]


def test_not_strict_means_other_names_and_brackets():
    pairs = [
        ("y+1", "x+1"),
        ("y=5", "x=5"),
        ("\\{1,2\\}", "(1,2)"),
        ("[1,2]", "(1,2)"),
        ("y+2", "x+1"),
        ("(2,1)", "(1,2)"),
    ]
    predictions, golds = [f"\\boxed{{{p}}}" for p, _ in pairs], [g for _, g in pairs]
    assert {grade(p, g)[0] for p, g in zip(predictions, golds, strict=True)} == {"wrong"}
    loose = [grade(p, g, strict=False)[0] for p, g in zip(predictions, golds, strict=True)]
    assert loose == ["correct"] * 4 + ["wrong"] * 2


UNITS = {
    "km/h": "kilometer/hour", "mph": "mile/hour", "cm^2": "centimeter**2", "square feet": "foot**2", "meters per second squared": "meter/second**2",
    "kg m^2": "kilogram*meter**2", "lbs": "pound", "N": "newton", "kJ": "kilojoule", "eV": "electron_volt", "mL": "milliliter", "kPa": "kilopascal",
    "atm": "standard_atmosphere", "acres": "acre", "J/(mol K)": "joule/(mole*kelvin)", "V": "volt", "cubic inches": "inch**3", "gallons": "gallon",
    "\\mu m": "micrometer", "weeks": "week", "m/s/s": "meter/second**2", "T": "tesla", "ounces": "ounce", "knots": "knot",
}  # fmt: skip


def test_units_are_those_of_pint():
    pint = pytest.importorskip("pint").UnitRegistry()
    base = {"meter": "m", "second": "s", "gram": "g", "kilogram": "g", "ampere": "A", "kelvin": "K", "mole": "mol"}
    for name, theirs in UNITS.items():
        quantity = pint.Quantity(1, theirs).to_base_units()
        dimension = {base[unit]: power for unit, power in quantity.unit_items()}
        factor, ours = unit(name)
        grams = 1000 ** dimension.get("g", 0)
        assert ours == dimension and float(factor) == pytest.approx(quantity.magnitude * grams, rel=1e-4), name
    assert not any(map(unit, ["", "x", "tenths", "squared", "km/x", "apples", "m or s", "meters of"]))


@pytest.mark.slow
def test_hostile_inputs_among_normal_ones():
    """None is lost, none changes a normal verdict, and no worker may take more memory than its limit."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from verification import pathological

    rows = labelled("real_outputs.jsonl")
    normal, bad = [(r["prediction"], r["gold"]) for r in rows], pathological(54, seed=1)
    mixed = [pair for i, pair in enumerate(bad) for pair in (pair, normal[i % len(normal)])]
    with MathVerifier(timeout=0.3, num_workers=2) as verifier:
        results = verifier.explain([p for p, _ in mixed], [g for _, g in mixed])
        limits = {resource.prlimit(w.keeper, resource.RLIMIT_AS)[0] for w in verifier._workers}
    assert len(results) == len(mixed) and all(isinstance(v, Verdict) for v, _ in results)
    assert [v == "correct" for v, _ in results[1::2]] == [rows[i % len(rows)]["label"] for i in range(len(bad))]
    assert "timeout" in [v for v, _ in results[::2]]
    assert not [r for v, r in results if v == "error" and "memory" not in r], results
    assert limits <= {MEMORY_LIMIT} or sys.platform != "linux"


def test_want_of_memory_says_nothing_of_an_answer(monkeypatch):
    """The worker makes an `error` of it; it is not taken for a formula that nobody knows, then or later."""

    def takes_all(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(math_grading, "latex2sympy", takes_all)
        for completion, gold in (("\\boxed{x^{41}+1}", "7"), ("\\boxed{7}", "x^{41}+1"), (None, "x^{41}+1")):
            with pytest.raises(MemoryError):
                grade(completion, gold)
    assert grade("\\boxed{1+x^{41}}", "x^{41}+1").verdict == grade(None, "x^{41}+1").verdict == "correct"


@pytest.mark.slow
def test_a_busy_machine_changes_no_verdict(verifier):
    """The budget is CPU time: six processes that spin beside it take none of it."""
    rows = labelled("verifier_cases_own.jsonl")[::15]
    arguments = [r["prediction"] for r in rows], [r["gold"] for r in rows]
    quiet = verifier.verify(*arguments)
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(6)]
    try:
        assert verifier.verify(*arguments) == quiet
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def test_command(tmp_path, command):
    """Every row that is not correct comes out, with its verdict; columns by name or as `rewrite` reads them."""
    rows, out = labelled("real_outputs.jsonl"), tmp_path / "odd.jsonl"
    named = (
        "--dataset_name",
        DATA / "real_outputs.jsonl",
        "--completion_column",
        "prediction",
        "--answer_column",
        "gold",
    )
    result = command("verify", *named, "--output_file", out)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == f"output_file: {out}"
    odd = [json.loads(line) for line in out.open()]
    assert [o["id"] for o in odd] == [r["id"] for r in rows if not r["label"]] == [rows[o["index"]]["id"] for o in odd]
    assert {o["verdict"] for o in odd} <= {"wrong", "unparsable"}
    assert f"{len(odd)} rows that are not correct" in result.stdout.splitlines()[-1]
    out.write_text("notes\n")
    assert command("verify", *named, "--output_file", out).returncode == 2  # it exists, and is not what `verify` wrote
    result = command(
        "verify", "--dataset_name", DATA / "math_50.jsonl", "--output_file", tmp_path / "x", "--verifier", "exact"
    )
    assert result.returncode == 0 and "correct" in result.stdout, result.stderr
    for wrong, message in [
        (("--dataset_name", DATA / "math_50.jsonl", "--verifier_kwargs", '{"tiemout": 1}'), "tiemout"),
        (("--dataset_name", DATA / "math_50.jsonl", "--completion_column", "nope"), "no nope"),
        (("--dataset_name", DATA / "math_50.jsonl", "--answer_column", "anwser"), "no anwser"),
        (("--dataset_name", tmp_path / "none.jsonl"), "no such file"),
    ]:
        result = command("verify", *wrong, "--output_file", tmp_path / "y")
        assert result.returncode == 2 and message in result.stderr
        assert not (tmp_path / "y").exists()


def test_command_on_numbers_and_on_its_own_output(tmp_path, command):
    """What pandas reads as numbers is text; a failure leaves no file that the next run would stumble over; the input is no output."""
    csv, out = tmp_path / "p.csv", tmp_path / "odd.jsonl"
    csv.write_text("prediction,gold\n7,7\n8,9\n0,0\n")
    named = ("--completion_column", "prediction", "--answer_column", "gold", "--output_file", out)
    lists = tmp_path / "lists.jsonl"
    lists.write_text('{"prediction": ["a", "b"], "gold": "1"}\n')
    result = command("verify", "--dataset_name", lists, *named)
    assert result.returncode == 2 and "Row 0: `prediction` must be a text" in result.stderr, result.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"p.csv", "lists.jsonl"}
    result = command("verify", "--dataset_name", csv, *named, "--verifier", "exact")
    assert result.returncode == 0, result.stderr
    assert [json.loads(line)["index"] for line in out.open()] == [1]  # 0 is an answer, too
    before = out.read_text()
    result = command("verify", "--dataset_name", out, *named, "--overwrite")
    assert result.returncode == 2 and "is the dataset itself" in result.stderr and out.read_text() == before


def test_plain_numbers_are_checked_without_a_worker():
    golds = ["7", "-12", "0.5", "3.14159", "007", "\\frac{1}{", "", None, "1/2", "12 apples"]
    with MathVerifier(num_workers=1) as verifier:
        told = verifier.check_answers(golds)
        assert told == [v for v, _ in verifier._run([[None, g or ""] for g in golds])]  # what the worker says of all
        assert told[:5] == ["correct"] * 5 and "unparsable" in told


def test_the_command_leaves_columns_of_the_user_alone(tmp_path, monkeypatch):
    """Names that it uses itself are written beside, images as they are stored; a date is the gold answer that it is, a missing one is told."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"solution": "\\boxed{2015-03-01}", "answer": "2015-03-01"},
        {"solution": "\\boxed{8}", "answer": "7", "index": "a", "verdict": "b", "reason": "c", "gold": "2015-03-01", "input_gold": 4},
        {"solution": "\\boxed{9}", "answer": " "},
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"problem": "?", **row}) for row in rows))
    with pytest.warns(UserWarning, match=r"1 of 3 rows \(2; counted from 0\) have no `answer`"):
        assert main(["verify", "--dataset_name", "rows.jsonl", "--verifier", "exact"]) == 0
    (odd,) = map(json.loads, (tmp_path / "rows.not_correct.jsonl").read_text().splitlines())
    assert odd == {
        "problem": "?", "solution": "\\boxed{8}", "answer": "7", "index": 1, "verdict": "wrong", "reason": "states '8', the gold answer is '7'", "gold": "7",
        "input_index": "a", "input_verdict": "b", "input_reason": "c", "input_gold": "2015-03-01", "input_input_gold": 4,
    }  # fmt: skip
    features = Features(
        {"problem": Value("string"), "solution": Value("string"), "answer": Value("string"), "image": Image()}
    )
    image = {"bytes": b"no image at all", "path": "a.png"}
    row = {"problem": "?", "solution": "\\boxed{8}", "answer": "7", "image": image}
    Dataset.from_list([row], features=features).to_parquet("images.parquet")
    assert main(["verify", "--dataset_name", "images.parquet", "--verifier", "exact"]) == 0
    (odd,) = map(json.loads, (tmp_path / "images.not_correct.jsonl").read_text().splitlines())
    assert odd["image"] == {"bytes": base64.b64encode(image["bytes"]).decode(), "path": "a.png"}


def test_a_wrong_verdict_says_what_was_read_and_what_is_right():
    """Within 400 characters, whatever was written."""
    with MathVerifier(num_workers=1) as verifier:
        told = verifier.explain(
            ["so \\boxed{\\frac{1}{3}}", f"\\boxed{{{'7' * 400}}}"], ["one half\n#### 1/2", "8" * 400]
        )
    assert told[0] == (Verdict.WRONG, "states '\\\\frac{1}{3}', the gold answer is '1/2'")
    assert (
        told[1][0] == Verdict.WRONG
        and "states '777" in told[1][1]
        and "answer is '888" in told[1][1]
        and len(told[1][1]) < 400
    )
