"""
Which verified retellings are not kept: a right answer says nothing of the text before it, and the reference was in the
prompt.

Pure functions. An attempt is judged by its own text, its problem and the settings alone, never by other attempts, so
rows do not depend on the order of things.
"""

import re
from fractions import Fraction

from ..data.demonstrations import CALCULATOR_MARK, asks_for_box, clean_reference, has_box, without_boxes
from ..data.rows import Problem, Rejection
from ..data.text_statistics import copy_ratio, find_leak, num_words
from .rewrite_config import RewriteConfig


def reject_guided(text: str, problem: Problem, args: RewriteConfig) -> tuple[Rejection, str] | None:
    """
    The first reason not to keep a guided attempt that was verified as correct, and what is wrong in words; `None` if
    it is kept.
    """
    reference = clean_reference(problem.demonstration or "")  # there is none where only the answer was a hint
    if args.reject_mentions:
        # Words that the problem or the reference itself uses, such as a teacher with 30 pencils, are no mention.
        known = f"{problem.problem}\n{problem.demonstration or ''}"
        if leak := find_leak(text, known, args.mention_phrases):
            return Rejection.MENTION, f"mentions what it was shown: {leak!r:.100}"
    if args.reject_calculator_marks and (mark := CALCULATOR_MARK.search(text)):
        return Rejection.CALCULATOR, f"has the calculator mark {mark[0]!r:.100}"
    own, shown = (num_words(without_boxes(t)) for t in (text, reference))
    if own < args.min_guided_length * shown:
        return Rejection.STUB, f"has {own} words and signs beside its box, the reference {shown}"
    if args.min_guided_length and not _intermediate(text, problem) and _intermediate(reference, problem):
        return Rejection.STUB, "has no number but its answer, and the reference has some"
    if args.reject_other_form and asks_for_box(problem.prompt) and not has_box(text):
        return Rejection.FORM, "its prompt asks for \\boxed{}, and it has none"
    copied = copy_ratio(text, reference)
    if copied is not None and copied > args.max_guided_copy:
        return Rejection.COPY, f"shares {copied:.0%} of its 4-grams with the reference"
    if args.check_arithmetic and (step := false_step(text)):
        return Rejection.ARITHMETIC, f"says {step!r:.100}"
    return None


def _intermediate(text: str, problem: Problem) -> set[str]:
    """The numbers of a text beside those of the gold answer: what a solution computes with."""
    return set(re.findall(r"\d+", text)) - set(re.findall(r"\d+", problem.answer or ""))


# ---- arithmetic ----

_SIGNS = {"×": "*", "·": "*", "⋅": "*", "÷": "/", "−": "-", "\\times": "*", "\\cdot": "*", "\\div": "/", "x": "*"}
_SPELT = re.compile(r"\\(?:times|cdot|div)(?![A-Za-z])|[×·⋅÷−]|(?<=\d )x(?= \d)")
_IGNORED = re.compile(r"\\?[$€£]|(?<!\w)\*\*|\*\*(?=\s|\Z)")  # currency, the delimiters of formulas, bold type
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?"
_SIDE = re.compile(rf"-?{_NUMBER}(?:\s*[-+*/]\s*{_NUMBER})*")
_RUN = re.compile(r"[-+*/=\d., \t]+")  # what equations of plain numbers are made of
_ATTACHED = re.compile(r"[^\s.,;?\"'*]")  # a variable, a bracket, a percent sign
_CONTINUED = re.compile(r"[(\[{\\^%!:/|°]|[A-Za-z]\b")  # also behind a space: `8 (mod 5)`, `8 x`


def false_step(text: str) -> str | None:
    """
    The first equation of plain numbers in a text that is false, such as `32 + 16 = 49`; `None` if there is none.

    Read are runs of numbers and `+ - * /` between equals signs, by exact fractions and with the usual precedence.
    Where there are decimals, or one side is a division, a difference of less than one unit of the last decimal is
    rounding. What a run touches (variables, powers, percent, parentheses) takes its outer side out of the comparison:
    an equation that is not understood is not called false.
    """
    text = _SPELT.sub(lambda match: _SIGNS[match[0]], _IGNORED.sub("", text))
    for run in _RUN.finditer(text):
        if "=" not in run[0]:
            continue
        sides = [side.strip().rstrip(".,").rstrip() for side in run[0].split("=")]
        before, after = text[max(0, run.start() - 1) : run.start()], text[run.end() : run.end() + 2]
        if not run[0][0].isspace() and _ATTACHED.match(before):
            sides[0] = ""
        if _CONTINUED.match(after) or (not run[0][-1].isspace() and _ATTACHED.match(after)):
            sides[-1] = ""
        # Of a first side that begins with an operator, or is one number (`Week 1 + Week 2 = 35 + 35`), the beginning
        # was not read.
        if not re.match(r"\d[\d.,]*\s*[-+*/]", sides[0]):
            sides[0] = ""
        for left, right in zip(sides, sides[1:], strict=False):
            if _SIDE.fullmatch(left) and _SIDE.fullmatch(right) and not _equal(left, right):
                return f"{left} = {right}"
    return None


def _equal(left: str, right: str) -> bool:
    """
    Whether two sums of products of plain numbers are equal, up to rounding; what has two readings, or no operation, is
    not judged.
    """
    values = _value(left), _value(right)
    if None in values or not re.search(r"\d\s*[-+*/]", f"{left};{right}"):
        return True
    if re.search(r"/\s*[\d.,]+\s*/", f"{left};{right}"):  # `25 / 1/3`
        return True
    if re.fullmatch(r"\d+\s*/\s*\d+", left) and values[0] <= 1 < values[1]:  # `2/3 = 40`: of what was said before
        return True
    divided = ("/" in left) != ("/" in right)
    decimals = max((len(digits) for digits in re.findall(r"\.(\d+)\Z", right)), default=0)
    unit = Fraction(1, 10**decimals) if divided or "." in left + right else 0
    difference = abs(values[0] - values[1])
    return difference == 0 or difference < unit


def _value(side: str) -> Fraction | None:
    total, product, sign = Fraction(0), None, "+"
    for operator, digits in re.findall(rf"([-+*/]?)\s*({_NUMBER})", side):
        number = Fraction(digits.replace(",", ""))
        if operator in ("*", "/"):
            if operator == "/" and not number:
                return None
            product = product * number if operator == "*" else product / number
            continue
        if product is not None:
            total += product if sign == "+" else -product
        product, sign = number, operator or "+"
    return total + (product if sign == "+" else -product)
