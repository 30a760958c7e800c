"""Verdicts, and what happens to a verification that hangs, crashes or eats memory."""

import os
import signal
import threading

import pytest

from trl_offpolicy import MathVerifier, Verdict


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
    victim = verifier._workers[0].process
    threading.Timer(0.1, os.kill, (victim.pid, signal.SIGKILL)).start()
    results = verifier.explain(["\\boxed{9^{9^{9^9}}}"] * 2, ["1"] * 2)
    assert sorted(v for v, _ in results) == ["error", "timeout"]
    assert any("exit code -9" in reason for _, reason in results)
    assert verifier.verify(["\\boxed{1}"], ["1"]) == [Verdict.CORRECT]  # and the pool is whole again


def test_uninterruptible_code_is_killed_from_outside():
    """A worker that ignores its own budget (as C code does) is ended by the wall deadline."""
    with MathVerifier(timeout=0.3, num_workers=1) as verifier:
        verifier.verify(["1"], ["1"])
        os.kill(verifier._workers[0].process.pid, signal.SIGSTOP)
        assert verifier.explain(["\\boxed{1}"], ["1"]) == [(Verdict.TIMEOUT, "killed after 0.54 s")]


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
