"""What reads completions and users' texts in this process takes time in proportion to them, whatever they are: only workers can be killed."""

import random
import signal
from contextlib import contextmanager, suppress

import pytest
from scripted import ScriptedSampler

from trl_offpolicy import RewriteConfig, evaluate
from trl_offpolicy.answers.extraction import Unparsable, final_answer, stated_answer
from trl_offpolicy.answers.normalization import MAX_VOTE, canonical
from trl_offpolicy.cards import fence
from trl_offpolicy.data.demonstrations import in_asked_form
from trl_offpolicy.data.formats import read_row
from trl_offpolicy.data.rows import Verdict
from trl_offpolicy.data.text_statistics import copy_ratio, distinct_n, leaks_hint, self_bleu
from trl_offpolicy.rewriting.guided_filters import false_step, reject_guided
from trl_offpolicy.sampling.sampler import Completion
from trl_offpolicy.verification.verifiers import (
    ExactMatchVerifier,
    JsonSchemaVerifier,
    MultipleChoiceVerifier,
    NumericVerifier,
)


LENGTH = 30_000  # characters: twenty milliseconds' reading, or many seconds' where the work grows with their square
SECONDS = 4  # of this process's own time, so that a busy machine changes nothing
PIECES = (
    "\n", " ", "\t", "$", "\\$", "\\boxed{", "\\boxed", "\\fbox ", "{", "}", "A", "B. ", "(", ")", "\\text{", "\\text ", "\\frac", "^", "_", "1", "1,", ".",
    "=", "x=", "\\(", "\\[", "\\]", "```\n", "```json\n", "[", "{\"a\":", "**", "####", ",", " and ", " is ", "the ", "answer is ", "Final Answer\n",
    "<think>", "</think>", "<answer>", "\\\\", "\\ ", "-", "the reference ", "10^", "%", "|", "~", "é", "½", "\ud83d", "not ", "1/", "\\begin{pmatrix}", "\\left",
)  # fmt: skip


@contextmanager
def bounded():
    def over(*_):
        raise AssertionError(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def hostile(count, seed=0):
    """Pieces repeated, with another in front, between and behind: what nested repetitions and overlapping alternatives run aground on."""
    rng = random.Random(seed)
    yield "\\boxed{A" + "\n" * 4500 + "B}"
    yield "\\boxed{A" + " " * LENGTH + "B}"
    for unit in ("<<1=", "1+1=", "1 x ", "the solution "):
        yield unit * (LENGTH // len(unit))
    for _ in range(count):
        head, tail = rng.choice(("", *PIECES)), rng.choice(("", *PIECES))
        unit = "".join(rng.choices(PIECES, k=rng.randint(1, 3)))
        yield head + unit * (LENGTH // len(unit)) + tail


READERS = {
    "stated_answer": lambda text: _stated(text),
    "final_answer": final_answer,
    "canonical": lambda text: [canonical(text), canonical(text[:MAX_VOTE]), canonical("1" + text[-MAX_VOTE:])],
    "read_row": lambda text: read_row({"problem": text or "?", "solution": text + "."}, 0, "answer", "{problem}"),
    "copy_ratio": lambda text: copy_ratio(text, text[:5000]),
    "leaks_hint": leaks_hint,
    "false_step": false_step,
    "in_asked_form": lambda text: in_asked_form(text, "1"),
    "reject_guided": lambda text: reject_guided(text, KEEPS_ALL, CHECKS_ALL),
    "distinct_n": lambda text: distinct_n([text]),
    "self_bleu": lambda text: self_bleu([text, text[:100]]),
    "fence": fence,
    "choice": lambda text: MultipleChoiceVerifier().judge(text, "A"),
    "exact": lambda text: ExactMatchVerifier().judge(text, "A"),
    "numeric": lambda text: NUMERIC.judge(text, "3 km"),
    "json": lambda text: JsonSchemaVerifier().explain([text], ["[]"]),
}


def _stated(text):
    with suppress(Unparsable):
        return stated_answer(text)


NUMERIC = NumericVerifier()
KEEPS_ALL = read_row({"problem": "?", "solution": "1"}, 0, "answer", "{problem}")
CHECKS_ALL = RewriteConfig("unused", max_guided_copy=1.0, check_arithmetic=True)


@pytest.mark.parametrize("reader", READERS)
def test_reading_takes_time_in_proportion(reader):
    for text in hostile(12):
        with bounded():
            READERS[reader](text)


def test_an_evaluation_sums_up_whatever_was_said(tmp_path):
    """Votes are counted in this process, at every resume anew."""
    texts = list(hostile(6, seed=1))

    class Hostile(ScriptedSampler):
        def completion(self, request):
            return Completion(request.id, texts[self.order.randrange(len(texts))], [1], [-0.5], "stop")

    problems = [{"problem": f"{i}?", "answer": "3"} for i in range(4)]
    for _ in range(2):  # a run, and its resume
        with bounded():
            result = evaluate(
                None, {"b": problems}, num_generations=4, sampler=Hostile(), output_dir=str(tmp_path),
                verifier=lambda completions, answers: [Verdict.WRONG] * len(answers),
            )  # fmt: skip
        assert result["b"]["maj@4"] == 0
