"""What a completion states: the rules of docs/how_an_answer_is_read.md, formats of every day, and texts made to take long."""

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from trl_offpolicy.answers.extraction import (
    MAX_STATEMENTS,
    NO_ANSWER,
    Unparsable,
    segments,
    stated_answer,
    stated_text,
)


sys.path.insert(0, str(ROOT / "benchmarks"))
DATA = Path(__file__).parent / "data"

# completion → what it states, and as which kind; `None` where it states nothing that can be read.
STATED = [
    # thinking, tokens of the chat template, program code
    ("<think>\\boxed{3}?</think>\\boxed{4}", "4", "box"),
    ("<think>\\boxed{3}", None, "ends while it thinks"),
    ("<think>\\boxed{3}</think>", None, "nothing follows its thinking"),
    ("\\boxed{3}?\n</think>\nThe answer is 4.", "4", "answer"),
    ("[THINK]3?[/THINK]Answer: 4</s>", "4", "answer"),
    ("<|begin_of_thought|>3<|end_of_thought|><|begin_of_solution|>\\boxed{4}<|end_of_solution|>", "4", "box"),
    ("<|im_start|>assistant\nThe answer is 4.<|im_end|>\n<|im_start|>user\nThe answer is 5.", "4", "answer"),
    ('```python\nprint("The answer is 5")\n```\nThe answer is 4.', "4", "answer"),
    # boxes
    ("\\boxed{1}, no: \\boxed{2}", "2", "box"),
    ("$x = \\boxed{2}$ and $y = \\boxed{3}$", "x = 2, y = 3", "box"),
    ("\\boxed{4}. Remember to write the final answer in \\boxed{}.", "4", "box"),
    ("\\boxed{\\text{your answer}} is asked for. Answer: 4", "4", "answer"),
    ("\\boxed{\\{\\}}", "\\{\\}", "box"),
    ("\\boxed{4}. Again: \\boxed{4", None, "not closed"),
    ("\\boxed{4} (The final answer is rounded to 2 places.)", "4", "box"),
    ("\\boxed{4}. Wait, that should be 5.", "5", "box"),
    ("\\boxed{4}\n\nActually, I forgot the tax.", None, "does not come back to it"),
    ("\\boxed{4}\n\nWait, is that so? 2 + 2 = 4.", "4", "box"),
    ("\\boxed{4} would be the answer if there were no tax.", None, "denied"),
    ("A common mistake is to answer \\boxed{4}.", None, "denied"),
    ("So she makes $4 from eggs and $2 from milk, for a total of $6.", None, ""),
    ("Answer: There are 4 digits, so 12.", "12", "answer"),
    ("Answer: 3 : 2", "3 : 2", "answer"),
    ("\\boxed{4}. Check: for n=2 the result is 7 and the answer is 7.", "4", "box"),
    ("\\boxed{4}, no. The final answer is 5.", "5", "final"),
    ("\\boxed{\\pi}. The final answer is approximately 3.14.", "\\pi", "box"),
    # tags and GSM8K's mark
    ("<answer>5</answer>, as you asked: <answer></answer>", "5", "tag"),
    ("<answer>\nThe number of pairs is 10.\n</answer>", "10", "tag"),
    ("We add.\n#### 1,234", "1,234", "mark"),
    ("#### 10 pairs", "10 pairs", "mark"),
    ("#### Step 1: Count\nfour\n#### Step 2\nSo the answer is 4.", "4", "answer"),
    ("#### 1. Introduction\nwe add", None, ""),
    # phrases: on the next line, under a heading, in bold, in a list, in other languages
    ("**Answer:**\n\\[ x = 4 \\]", "x = 4", "answer"),
    ("### Conclusion\n\nThere are **10** pairs.", "10 pairs", "result"),
    ("The answers are:\n- $x=2$\n- $x=3$", "x=2, x=3", "answer"),
    ("Answer:\n\\[x=2\\]\n\\[y=3\\]", "x=2, y=3", "answer"),
    ("Answer: `4`", "4", "answer"),
    ("故选：B", "B", "result"),
    ("Die endgültige Antwort lautet: $4$.", "4", "final"),
    ("답은 $5$입니다.", "5", "answer"),
    # what follows a value: units are kept, remarks are not
    ("Answer: $5$ km/h, which is slow.", "5 \\text{ km}/\\text{ h}", "answer"),
    ("Answer: $5$ million", "5 \\text{ million}", "answer"),
    ("The answer is 15; the other root 16 is extraneous.", "15", "answer"),
    ("The answer is 43, not 42.", "43", "answer"),
    ("The answer is A, since C is too large.", "A", "answer"),
    ("Answer: 3 (mod 7)", "3 (mod 7)", "answer"),
    # a formula without delimiters is read whole
    ("Answer: \\sqrt{5}", "\\sqrt{5}", "answer"),
    ("The answer is x < 4.", "x < 4", "answer"),
    ("So the final answer is |x| = 3.", "|x| = 3", "final"),
    ("Answer: 2**(1/4)", "2**(1/4)", "answer"),
    ("Answer: .5", ".5", "answer"),
    (".4", ".4", "sentence"),
    # an exclamation mark is the sentence's behind a formula or words, and a factorial behind a bare number
    ("The final answer is 42!", "42", "final"),
    ("The answer is $5$! Well done.", "5", "answer"),
    ("The answer is **42**!", "42", "answer"),
    ("Answer: 5!", "5!", "answer"),
    ("The answer is $5!$.", "5!", "answer"),
    # a choice with what it stands for
    ("**Answer:** B. Paris", "B. Paris", "answer"),
    ("The answer is B. It cannot be A.", "B", "answer"),
    # what states no value, or restricts it
    ("The answer is correct.", None, ""),
    ("The answer is not 42.", None, ""),
    ("Answer: at least 5", None, ""),
    ("The answer is less than $20$.", None, ""),
    # later statements
    ("Answer: 10\n\nVerification: 4+6, the result is 20.", "10", "answer"),
    ("Answer: 10\n\nExample: for n = 1 the answer is 6.", "10", "answer"),
    ("The answer is 10. Wait, I made a mistake. The answer is 16.", "16", "answer"),
    ("One might think the answer is 10. The answer is 16.", "16", "answer"),
    # sentences
    ("So there are 12 ways.", "12 ways", "sentence"),
    ("Since each of the 5 boxes has 2 balls, there are 10 balls.", "10 balls", "sentence"),
    ("We add.\n\nTherefore, the value of $f$ is $4$.\n\nLet me know if you need more.", "4", "sentence"),
    ("12\n7 and\n42", None, ""),
]  # fmt: skip


@pytest.mark.parametrize(("completion", "text", "kind"), STATED)
def test_statements(completion, text, kind):
    if text is None:
        with pytest.raises(Unparsable, match=kind or "no answer") as error:
            stated_answer(completion)
        assert str(error.value).startswith(NO_ANSWER)
    else:
        statement = stated_answer(completion)
        assert (statement.text, statement.kind) == (text, kind)


def test_statements_that_differ_are_told():
    statement = stated_answer("So the answer is 12.\n\nWe conclude that the answer is $13$.")
    assert (statement.text, statement.others) == ("12", ("13",))
    assert stated_text("The answer is 12. So the answer is 13.") is None and stated_text("Answer: 12") == "12"
    assert stated_answer("The answer is 12. So the answer is $12$.").others == ()


def test_spans_are_whole():
    text = (
        "She pays $5 and he pays $7, so $x = 12$ and \\[y\n= 3\\] or $$z$$ \\(w\\) \\begin{align*}a&=1\\end{align*} $"
    )
    found = segments(text)
    assert [content for _, _, content in found.spans] == ["x = 12", "y\n= 3", "z", "w", "a&=1"]
    assert len(found.covered) == len(text)


def test_every_format_states_each_gold_answer():
    from verification import FORMATS

    rows = [json.loads(line)["answer"] for line in (DATA / "math_50.jsonl").open(encoding="utf-8")]
    for name, form in FORMATS.items():
        told = [(answer, stated_text(form.format(g=answer))) for answer in rows]
        assert not [pair for pair in told if pair[0].strip(" .$\n") != (pair[1] or "").strip(" .$\n")], name


REPEATED = [
    "\\boxed{", "\\boxed{}", "$", "$x$\n", "$5 and ", "\\[", "\\begin{align}", "**", "*x", "`", "```python\n", "<think>", "<answer>", "answer to ",
    "the answer is ", "Answer: 5\n", "final ", "#### 5\n", "# Conclusion\n", "- 5\n", " ", "\n", "(", "is ", "so ", "since ", "\\text{", "verify ", "wait ", "I hope ",
]  # fmt: skip


@pytest.mark.parametrize("unit", REPEATED)
def test_reading_is_linear(unit):
    """A pattern that is quadratic in any of these would take minutes."""
    for text in (unit * (50_000 // len(unit)), "Answer: " + unit * (50_000 // len(unit))):
        try:
            stated_answer(text)
        except Unparsable as error:
            assert str(error).startswith(NO_ANSWER)
    with pytest.raises(Unparsable, match=f"more than {MAX_STATEMENTS} times"):
        stated_answer("Answer: 5\n" * (MAX_STATEMENTS + 1))
