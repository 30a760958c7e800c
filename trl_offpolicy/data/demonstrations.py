r"""
What is made of a demonstration: the reference that the guided stage shows, and the answer of an `expert` row in the
form its prompt asks for.

    clean_reference("48/2 = <<48/2=24>>24 clips.\n#### 24")      # "48/2 = 24 clips."
    in_asked_form("48/2 = <<48/2=24>>24 clips.\n#### 24", "24")  # "48/2 = 24 clips.\nThe final answer is \boxed{24}."

No value is changed. The demonstration as it came is carried through in its own column of every row.
"""

import re

from ..answers.extraction import Unparsable, boxes, stated_answer
from ..answers.normalization import canonical
from .prompts import contents


# GSM8K's calculator annotations, all 23,716 of which are an equation of numbers, `<<48/2=24>>`.
CALCULATOR_MARK = re.compile(r"<<[-+*/^%().,$ \d]*=[-+*/^%().,$ \d=]*>>")


def asks_for_box(prompt: list[dict[str, str]] | str) -> bool:
    r"""Whether a prompt wants the final answer in `\boxed{}`."""
    return any("\\boxed" in text for text in contents(prompt))


def has_box(text: str) -> bool:
    r"""Whether a text ends in a `\boxed{}` that is closed."""
    found = boxes(text)
    return bool(found) and found[-1][0] is not None


def without_boxes(text: str) -> str:
    r"""A text without the `\boxed{}` it ends in."""
    for _, start, end in reversed(boxes(text)):
        text = text[:start] + text[end:]
    return text


def clean_reference(demonstration: str) -> str:
    """
    The demonstration without calculator marks and GSM8K's last line (`#### 72`), which a retelling would copy; never
    empty.
    """
    text = CALCULATOR_MARK.sub("", demonstration)
    body, value = _marked_line(text)
    return body if value and body.strip() else text


def in_asked_form(demonstration: str, answer: str | None) -> str:
    r"""
    The demonstration with its own final answer in `\boxed{}`, for a prompt that asks for one, and without calculator
    marks.

    Known are GSM8K's last line (`#### 72`), the box of MATH and NuminaMath, which is left as it is, and a stated
    answer ("The final answer is 72.", "Answer: 72") that is `answer` too. A demonstration that ends in another way is
    left as it is.
    """
    text = CALCULATOR_MARK.sub("", demonstration)
    if has_box(text):
        return text
    body, value = _marked_line(text)
    if not value:
        body, value = text.rstrip(), _stated(text, answer)
    boxed = f"{body}\nThe final answer is \\boxed{{{value}}}.".lstrip()
    # What a box cannot hold, such as a brace without its other half, is left where it was.
    return boxed if value and [content for content, _, _ in boxes(boxed)] == [value] else text


def _marked_line(text: str) -> tuple[str, str]:
    """
    The text before GSM8K's last line and the value in it; the whole text and nothing if its last line is another.
    """
    body, _, line = text.rstrip().rpartition("\n")
    value = line.strip().removeprefix("####")
    return (body.rstrip(), value.strip()) if value != line.strip() and not value.startswith("#") else (text, "")


def _stated(text: str, answer: str | None) -> str:
    """The answer that a text ends in saying it comes to, where that is `answer`; else nothing."""
    try:
        stated = stated_answer(text[-1000:])
    except Unparsable:
        return ""
    known = stated.kind in ("final", "answer") and not stated.others
    return stated.text if known and answer and canonical(stated.text) == canonical(answer) else ""
