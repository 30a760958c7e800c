r"""
Less than the reference for the guided stage: what a model is shown that is to find the rest by itself.

    demonstration = "48/2 = 24 clips in May.\nThat makes 48+24 = 72.\n\\boxed{72}"
    hint(problem, "answer")       # "The final answer is 72."
    hint(problem, "first_steps")  # "It begins so:\n48/2 = 24 clips in May."
    hint(problem, "outline")      # "Its steps, without their results:\n48/2\nThat makes 48+24"

All of it is cut from the text by rule, and no model is asked. What a rule cannot know stays: a step that states its
result in words is in the outline as it is.
"""

import math
import re

from ..data.demonstrations import clean_reference, without_boxes
from ..data.rows import Problem


FIRST_STEPS = 1 / 3  # share of a reference's steps


def hint(problem: Problem, kind: str) -> str:
    """
    What is shown of a problem's reference.

    Args:
        problem ([`~data.rows.Problem`]): With its demonstration and gold answer.
        kind (`str`): `answer`: the gold answer alone. `first_steps`: the first third of the reference's steps, at least
            one; of a reference of one step, the first half of its words. `outline`: each step up to its first equals
            sign, without boxes, and with the gold answer as an ellipsis.
    """
    if kind == "answer":
        return f"The final answer is {problem.answer}."
    found = steps(clean_reference(problem.demonstration or ""))
    if kind == "first_steps":
        if len(found) == 1:
            words = found[0].split()
            return f"It begins so:\n{' '.join(words[: max(1, len(words) // 2)])} …"
        return "It begins so:\n" + "\n".join(found[: max(1, math.floor(FIRST_STEPS * len(found)))])
    answer = re.compile(rf"(?<![\w.]){re.escape(problem.answer)}(?!\w|\.\d)") if problem.answer else None
    cut = [without_boxes(step).partition("=")[0].strip() for step in found]
    cut = [answer.sub("…", step) if answer else step for step in cut]
    shown = [step for step in cut if re.search(r"\w", step)]
    return "Its steps, without their results:\n" + "\n".join(shown or ["…"])


def steps(text: str) -> list[str]:
    """The steps of a solution: its lines, or where it is one line, its sentences."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines if len(lines) > 1 else re.split(r"(?<=[.!?])\s+", text.strip())
