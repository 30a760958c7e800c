"""
The texts a policy is prompted with. Placeholders: `{problem}`, and `{solution}` (the reference) in the guided prompt.
"""

import re


# What a row without a prompt of its own (`problem`, `question`) is asked, in training as in sampling.
SOLVE_PROMPT = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."

# Digest-and-retell ("Mind the Gap", Figure 2): the reference is there to be understood, not to be copied. It comes
# first, and what the model reads last is what it is asked in training; `docs/results.md` has other wordings beside it.
GUIDED_PROMPT = (
    """\
A problem will be given to you at the end of this message. Here is a worked solution to it, which only you can see:

{solution}

Answer as if you had never seen it: work every step out yourself, and do not speak of it. This is the problem:

"""
    + SOLVE_PROMPT
)

# The same with less than the reference: an outline of it, its first steps, or its answer.
HINT_PROMPT = """\
You are given a problem and a hint at its solution. Solve the problem step by step in your own way, so that every step \
follows from the problem and the steps before it. Do not mention the hint. Put your final answer within \\boxed{}.

Problem:
{problem}

Hint:
{hint}

Now solve the problem:"""

# The rewriting agent's judge (arXiv 2602.11220, in our words); the base model itself is asked, where the answer is
# right.
REASONING_PROMPT = """\
You are a strict verifier. Below are a problem and a solution that reaches the right answer. Check every step: is each one \
valid, does it follow from those before it, and is nothing missing that the answer depends on?

Problem:
{problem}

Solution:
{completion}

Reply with one word, YES or NO."""


# The bare prompt under which arXiv 2602.11220's code takes the base's likelihood of a rewrite.
PAPER_QA_PROMPT = "Problem:\n{problem}\n\nAnswer:\n"


def contents(prompt: list[dict[str, str]] | str) -> list[str]:
    """The texts of a prompt, which is plain text or messages."""
    return [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]


def fill(template: str, **fields: str) -> str:
    """`template` with each `{name}` of `fields` replaced once; every other brace (LaTeX, say) is left alone."""
    if len(fields) == 1:
        ((name, value),) = fields.items()
        return template.replace("{" + name + "}", value)
    return re.sub(r"\{(" + "|".join(fields) + r")\}", lambda match: fields[match[1]], template)


def check(template: str, name: str, *placeholders: str) -> None:
    """Raises `ValueError` when `template` lacks one of the `placeholders` it must have."""
    missing = [p for p in placeholders if "{" + p + "}" not in template]
    if missing:
        shown = {"solution": "reference"}.get(missing[0], missing[0])
        reason = "every problem would get the same prompt" if shown == "problem" else f"the {shown} would not be shown"
        raise ValueError(
            f"You passed {name}={template!r}, which has no {' and no '.join('{' + p + '}' for p in missing)}: {reason}. "
            f"Write the placeholder where the text belongs, for example {name}='{' '.join('{' + p + '}' for p in placeholders)}'."
        )
