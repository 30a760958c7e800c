r"""One completion against one gold answer: what it states, what that means, whether the two are the same.

math-verify (on latex2sympy2_extended) reads and compares the mathematics. Around it, because each was measured to go wrong
there: our own extraction (last boxes, braces balanced; a phrase, never any number), text that is taken apart before it is
parsed (lists, tuples, matrices, units, percent, bases), LaTeX parsed whole or not at all (its fall back to the first number it
finds reads the gold `2007+\frac\pi 2` as 2), and numbers compared by relative size (an absolute 1e-15 makes 10^-20 = 10^-21).

These functions may run for ever or exhaust memory on hostile input: `verification.py` runs them in processes it can kill.
"""

import functools
import random
import re
from fractions import Fraction

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import verify
from math_verify.grader import unwrap_fcs
from sympy.logic.boolalg import Boolean

from .answers import NUMBER_WORDS, normalize, number, split_unit, words
from .extraction import NO_ANSWER, Statement, Unparsable, final_answer, stated_answer
from .rows import Verdict


class UnparsableGold(Unparsable):
    """The gold answer is what cannot be read."""


def grade(
    completion: str | None,
    answer: str,
    float_rounding: int = 6,
    numeric_precision: int = 50,
    strict: bool = True,
    allow_set_relation_comp: bool = True,
) -> tuple[Verdict, str]:
    """The verdict on one completion; with `completion=None`, on whether the gold answer can be compared with at all.

    The options are those of `math_verify.verify`, and mean the same.
    """
    compare = _Comparison(float_rounding, numeric_precision, strict, allow_set_relation_comp)
    try:
        try:
            gold = normalize(final_answer(answer) or answer)
        except Unparsable as error:
            raise UnparsableGold from error
        if not gold:
            return Verdict.UNPARSABLE, "the gold answer is empty"
        if completion is None:
            compare.readable(gold)
            return Verdict.CORRECT, ""
        stated = stated_answer(completion)
        prediction = normalize(stated.text)
        if not prediction:
            return Verdict.UNPARSABLE, NO_ANSWER
        same = compare.same(prediction, gold)
        for other in stated.others:
            if not _agree(compare, other, prediction):
                return Verdict.UNPARSABLE, f"{NO_ANSWER}: it states {stated.text:.80} and {other:.80}"
        if same:
            return Verdict.CORRECT, ""
        if words(prediction) and _may_be_prose(stated, gold):
            return Verdict.UNPARSABLE, NO_ANSWER
        return Verdict.WRONG, ""
    except UnparsableGold:
        return Verdict.UNPARSABLE, "the gold answer cannot be parsed"
    except Unparsable as error:
        return Verdict.UNPARSABLE, str(error) or NO_ANSWER
    except RecursionError:
        return Verdict.UNPARSABLE, "an answer is nested too deeply"


def _agree(compare: "_Comparison", other: str, prediction: str) -> bool:
    """Whether two statements of one completion say the same; what cannot be told counts as a contradiction."""
    try:
        return compare.same(normalize(other), prediction)
    except Unparsable:
        return False


def _may_be_prose(stated: Statement, gold: str) -> bool:
    """A sentence that is not the gold word need not be an answer at all."""
    return stated.kind == "sentence" or (stated.kind not in ("box", "tag") and not words(gold))


# ---- structure: taken apart in the text, compared piece by piece ----

_RELATION = re.compile(r"[<>]|\\(?:le|ge|neq)\b")
_MEMBER = re.compile(
    r"^(?:(?:[A-Za-z]|\\[A-Za-z]+)(?:_\{[^{}]*\})?|\([A-Za-z](?:,[A-Za-z])+\))\\in(?![A-Za-z]) ?(?=[\[(\\])"
)
_LETTER_UNIT = re.compile(r"(.*\S) [mshgL](?:\^\{?[23]\}?)?")
_ASSIGNED = re.compile(
    r"((?:\\?[A-Za-z|:\\]+(?:_\{[^{}]*\})?'*|\([A-Za-z,]+\)|\\angle [A-Z ]+)(?:\([^()=]*\))?)=(?!=)(.*)"
)


def _split(text: str, separator: str) -> list[str]:
    """Pieces of `text` between the matches of `separator` that are in no bracket."""
    pieces, depth, start = [], 0, 0
    for match in re.finditer(rf"(?P<cut>{separator})|\\begin|\\end|\\[{{}}]|[()\[\]{{}}]", text):
        token = match[0]
        if match["cut"]:
            if depth == 0:
                pieces.append(text[start : match.start()].strip())
                start = match.end()
        else:
            depth += 1 if token in ("\\begin", "\\{") or token in "([{" else -1
    pieces.append(text[start:].strip())
    return [p for p in pieces if p]


def _without_member(text: str) -> str:
    r"""`(0,1)` of `x\in(0,1)`: which values, without what takes them."""
    return _MEMBER.sub("", text)


def _is_set(text: str) -> bool:
    r"""Whether all of `text` is one `\{…\}`."""
    if not (text.startswith("\\{") and text.endswith("\\}")):
        return False
    depth = 0
    for match in re.finditer(r"\\[{}]", text):
        depth += 1 if match[0] == "\\{" else -1
        if depth == 0 and match.end() < len(text):
            return False
    return depth == 0


def _without_set_name(text: str, other: str) -> str:
    r"""`\{1,2\}` of `S=\{1,2\}`, where the other side gives its set no name that could be another one."""
    named = _ASSIGNED.fullmatch(text)
    return named[2] if named and _is_set(named[2]) and "=" not in other else text


def _items(text: str) -> list[str]:
    r"""The elements of `1,2`, `1 and 2`, `x=1 or x=2`, `\{1,2\}` and `1\pm 2`; a single answer is a list of one."""
    text = _without_member(text)
    if _is_set(text):
        text = text[2:-2]
    elif re.fullmatch(r"\{[^{}]+,[^{}]+\}", text):
        text = text[1:-1]
    if number(split_unit(text)[0]):
        return [text]  # `1,500,000` of whatever is one number
    separator = r";|,?\s*\\text\s*\{[^{}]*\b(?:and|or)\b[^{}]*\}\s*,?|,?\s*(?<![A-Za-z])(?:and|or)(?![A-Za-z])|(?<!\d),|,(?!\d{3}(?!\d))|(?<=\d),(?=\d{3}\D*,)"
    pieces = _split(text, r";") if re.search(r"=.*,.*;", text) else _split(text, separator)
    if len(pieces) == 1 and "," in text and re.fullmatch(r"-?\d+(?:,-?\d+)+", text):
        pieces = text.split(",")
    if len(pieces) == 1 and text.count("\\pm") == 1 and "\\mp" not in text:
        return [text.replace("\\pm", sign).removeprefix("+") for sign in "+-"]
    return pieces


def _tuple(text: str) -> tuple[str, list[str]] | None:
    """(brackets, elements) of a bracketed pair, tuple or interval."""
    if text[:1] not in ("(", "[") or text[-1:] not in (")", "]"):
        return None
    depth = 0
    for match in re.finditer(r"[()\[\]]", text):
        depth += 1 if match[0] in "([" else -1
        if depth == 0 and match.end() < len(text):
            return None
    elements = _split(text[1:-1], r"[,;]")
    return (text[0] + text[-1], elements) if len(elements) > 1 else None


def _matrix(text: str) -> list[list[str]] | None:
    match = re.fullmatch(r"\\begin\{pmatrix\}((?:(?!\\begin).)*?)(?:\\cr ?)?\\end\{pmatrix\}", text, re.S)
    return match and [[cell.strip() for cell in row.split("&")] for row in match[1].split("\\cr")]


def _same_argument(prediction: str, gold: str) -> str:
    """`f(t)=t^2` as `f(x)=x^2`, where that is how the gold answer calls its variable."""
    told, wanted = (re.match(r"([A-Za-z])\(([A-Za-z])\)=", text) for text in (prediction, gold))
    if (
        not told
        or not wanted
        or told[1] != wanted[1]
        or re.search(rf"(?<![\\A-Za-z]){wanted[2]}", prediction[told.end() :])
    ):
        return prediction
    return re.sub(r"\\[A-Za-z]+|[A-Za-z]", lambda m: wanted[2] if m[0] == told[2] else m[0], prediction)


class _Comparison:
    """`same(prediction, gold)` on normalised text; `Unparsable` where nothing can be said."""

    def __init__(self, float_rounding: int, numeric_precision: int, strict: bool, allow_set_relation_comp: bool):
        self.options = {
            "float_rounding": float_rounding,
            "numeric_precision": numeric_precision,
            "strict": strict,
            "allow_set_relation_comp": allow_set_relation_comp,
        }

    def readable(self, gold: str) -> None:
        """Raises `UnparsableGold` unless every piece of the gold answer is a number, words or LaTeX that parses as a whole."""
        for item in _items(gold):
            pair, matrix = _tuple(item), _matrix(item)
            for piece in pair[1] if pair else sum(matrix, []) if matrix else [item]:
                value = split_unit(piece)[0].removesuffix("%").replace("^\\circ", "")
                if not (number(value) or words(value) or _choice(piece) or _time(piece) or _base(value)):
                    parse_latex(value, gold=True)

    def same(self, prediction: str, gold: str) -> bool:
        prediction, gold = _without_member(prediction), _without_member(gold)
        prediction, gold = _without_set_name(prediction, gold), _without_set_name(gold, prediction)
        if prediction == gold:
            return True
        told, wanted = number(prediction), number(gold)
        if told and wanted:
            return self._close(told, wanted)
        golds, predictions = _items(gold), _items(prediction)
        for side, other, items in ((gold, prediction, golds), (prediction, gold, predictions)):
            if side.startswith("\\{") and len(items) > 1 and _tuple(other):
                return False  # a set is no tuple
        if (text := words(gold)) and not wanted and ((said := words(prediction)) == text or len(golds) == 1):
            return said == text
        if len(golds) > 1 or len(predictions) > 1:
            return self._same_items(predictions, golds)
        if not golds or not predictions:
            raise Unparsable if golds else UnparsableGold
        return self._same_item(predictions[0], golds[0])

    def _close(self, told: tuple[Fraction, bool], wanted: tuple[Fraction, bool]) -> bool:
        """Equal; a decimal may also be another number rounded to `float_rounding` places, if that leaves five digits of it."""
        difference = abs(told[0] - wanted[0])
        size = max(abs(told[0]), abs(wanted[0]))
        places = self.options["float_rounding"]
        rounded = difference * 2 * 10**places <= 1 and difference * 10 ** (places - 1) <= size
        return difference == 0 or ((told[1] or wanted[1]) and rounded)

    def _same_items(self, predictions: list[str], golds: list[str]) -> bool:
        names = [
            [m[1] if (m := _ASSIGNED.fullmatch(item)) else None for item in items] for items in (predictions, golds)
        ]
        # `x_1=2,x_2=3` enumerates roots, in any order
        named = [None not in n and len({name.partition("_")[0] for name in n}) == len(n) > 1 for n in names]
        for items, others, is_named, other_named in ((predictions, golds, *named), (golds, predictions, *named[::-1])):
            # `x=1,y=2` gives the positions of `1,2` and of `(1,2)` their names
            if is_named and not other_named:
                bare = others
                if len(others) == 1:
                    value = m[2] if (m := _ASSIGNED.fullmatch(others[0])) else others[0]
                    bare = pair[1] if (pair := _tuple(value)) else others
                values = [_ASSIGNED.fullmatch(item)[2] for item in items]
                told, wanted = (values, bare) if items is predictions else (bare, values)
                return len(told) == len(wanted) and all(map(self.same, told, wanted))
        if len(golds) == 1 and (pair := _tuple(golds[0])) and pair[0] == "()" and len(pair[1]) == len(predictions):
            return all(map(self.same, predictions, pair[1]))
        if len(predictions) == 1 and (pair := _tuple(predictions[0])) and pair[0] == "()":
            predictions = pair[1]
        if len(golds) == 1 and all(self.same(p, golds[0]) for p in predictions):
            return True  # one answer in several forms
        if len(predictions) == 1 or len(golds) == 1:  # `x<1 or x>2` and a union
            predictions, golds = (
                [piece for item in items for piece in _split(item, r"\\cup")] for items in (predictions, golds)
            )
        left = list(dict.fromkeys(predictions))
        for gold in dict.fromkeys(golds):
            match = next((p for p in left if self.same(p, gold)), None)
            if match is None:
                return False
            left.remove(match)
        return not left

    def _same_item(self, prediction: str, gold: str) -> bool:
        told, wanted = _ASSIGNED.fullmatch(_same_argument(prediction, gold)), _ASSIGNED.fullmatch(gold)
        if wanted and told and told[1].replace(" ", "") == wanted[1].replace(" ", ""):
            return self.same(told[2], wanted[2])
        if wanted and "=" not in prediction and not _RELATION.search(prediction):
            return self.same(prediction, wanted[2])
        sides = _split(prediction, "=")
        equation = sides[-1] == "0" and re.search(r"[xyz]", re.sub(r"\\[A-Za-z]+", "", sides[0])) and not told
        if len(sides) > 1 and not equation and len(_split(gold, "=")) == 1 and not _RELATION.search(gold + prediction):
            return self.same(sides[-1], gold)
        if "\\approx" in prediction and "\\approx" not in gold:
            return any(self.same(side, gold) for side in prediction.split("\\approx") if side)
        pairs = _tuple(prediction), _tuple(gold)
        if all(pairs):
            (told_as, told_items), (wanted_as, wanted_items) = pairs
            return (
                told_as == wanted_as
                and len(told_items) == len(wanted_items)
                and all(map(self.same, told_items, wanted_items))
            )
        matrices = _matrix(prediction), _matrix(gold)
        if all(matrices):
            if [len(row) for row in matrices[0]] != [len(row) for row in matrices[1]]:
                return False
            return all(self.same(p, g) for rows in zip(*matrices, strict=True) for p, g in zip(*rows, strict=True))
        if any(matrices) and any(pairs):  # a vector as a column and as a tuple
            matrix, (_, elements) = matrices[0] or matrices[1], pairs[0] or pairs[1]
            cells = [cell for row in matrix for cell in row]
            told_items, wanted_items = (cells, elements) if matrices[0] else (elements, cells)
            return (
                1 in (len(matrix), len(matrix[0]))
                and len(cells) == len(elements)
                and all(map(self.same, told_items, wanted_items))
            )
        unions = _split(prediction, r"\\cup"), _split(gold, r"\\cup")
        if len(unions[0]) == len(unions[1]) > 1 and self._same_items(*unions):
            return True
        return self._same_quantity(prediction, gold)

    def _same_quantity(self, prediction: str, gold: str) -> bool:
        """Choices, times, bases, units, per cent and degrees around a value."""
        choices = _choice(prediction), _choice(gold)
        if len(prediction) == len(gold) == 1 and gold.upper() in "ABCDEFGHIJ" and prediction.upper() == gold.upper():
            return True
        if choices[1]:
            if choices[0] and (choices[0][0] == choices[1][0] or len(gold) <= 3):
                return choices[0][0] == choices[1][0]
            return bool(choices[1][1]) and self.same(prediction, choices[1][1])
        if choices[0] and choices[0][1] and self.same(choices[0][1], gold):
            return True
        for reader in (_time, _base):
            told, wanted = reader(prediction), reader(gold)
            if wanted and told and (told[-1] or wanted[-1] or reader is _time):
                return all(a == b or a is None or b is None for a, b in zip(told, wanted, strict=True))
        (told, told_unit), (wanted, wanted_unit) = split_unit(prediction), split_unit(gold)
        if told_unit and wanted_unit and told_unit != wanted_unit:
            if told_unit[0] != wanted_unit[0]:
                return False
            factor, value = told_unit[1] / wanted_unit[1], number(told)
            told = (
                str(value[0] * factor)
                if value
                else f"\\frac{{{factor.numerator}}}{{{factor.denominator}}}\\cdot({told})"
            )
            return self._same_value(told, wanted)
        if (told, wanted) != (prediction, gold):
            return self.same(told, wanted)
        # `12 m` is twelve metres where a plain number was asked for; as a gold answer it may be a product
        if number(gold) and (metres := _LETTER_UNIT.fullmatch(prediction)) and number(metres[1]):
            return self._same_value(metres[1], gold)
        if "%" in prediction or "%" in gold:
            told, wanted = prediction.removesuffix("%").strip(), gold.removesuffix("%").strip()
            if self.same(told, wanted):
                value = number(wanted)
                return ("%" in prediction) == ("%" in gold) or value is None or abs(value[0]) >= 1
            if ("%" in prediction) == ("%" in gold):
                return False
            told, wanted = (
                (f"\\frac{{{told}}}{{100}}" if "%" in prediction else told),
                (f"\\frac{{{wanted}}}{{100}}" if "%" in gold else wanted),
            )
            return self._same_value(told, wanted)
        if "^\\circ" in prediction + gold:
            as_radians = [
                re.sub(r"(\d+(?:\.\d+)?|\\frac\{\d+\}\{\d+\})\^\\circ", r"(\1\\frac{\\pi}{180})", t)
                for t in (prediction, gold)
            ]
            bare = [t.replace("^\\circ", "") for t in (prediction, gold)]
            in_function = bool(re.search(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)", prediction + gold))
            return (
                (in_function or "\\pi" in prediction + gold)
                and self.same(*as_radians)
                or not in_function
                and self.same(*bare)
            )
        return self._same_value(prediction, gold)

    def _same_value(self, prediction: str, gold: str) -> bool:
        told, wanted = number(prediction), number(gold)
        if told and wanted:
            return self._close(told, wanted)
        return _same_expression(parse_latex(prediction), parse_latex(gold, gold=True), self.options)


def _choice(text: str) -> tuple[str, str] | None:
    """(letter, what stands behind it) of `B`, `(B)`, `\\text{(B) } 12` or `B. 12`."""
    bare = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1 ", text).strip()
    match = re.fullmatch(r"\(([A-J])\)\.?:?\s*(.*)|([A-J])(?:[.):]\s*(.*))?", bare, re.S)
    return match and ((match[1] or match[3]), (match[2] or match[4] or "").strip())


def _time(text: str) -> tuple | None:
    """(hour, minute, second, "a" or "p") of a time of day."""
    bare = re.sub(r"\\text|[{}\s]", "", text).casefold()
    match = re.fullmatch(r"(\d{1,2})(?::([0-5]\d))?(?::([0-5]\d))?(?:([ap])\.?m\.?)?", bare)
    if not match or not (match[2] or match[4]):
        return None
    hour, half = int(match[1]), match[4]
    return (hour - 12, *match.group(2, 3), "p") if hour > 12 and not half else (hour, *match.group(2, 3), half)


def _base(text: str) -> tuple | None:
    """(digits, base) of `204_5`; a number without a base has `None` there."""
    bare = re.sub(r"\\text\s*\{([^{}]*)\}|[ ()]", r"\1", text).replace(" ", "")
    if match := re.fullmatch(
        r"(\d[\dA-F]*|[A-F][\dA-F]*\d[\dA-F]*|[A-F]{2,})(?:(?:_\{?(?:base)?|base)(\w+)\}?)?", bare
    ):
        base = match[2] and (NUMBER_WORDS.get(match[2]) or (int(match[2]) if match[2].isdecimal() else None))
        if base or match[2] is None:
            return match[1].lstrip("0"), base
    return None


# ---- mathematics ----

_LATEX = NormalizationConfig(basic_latex=True, units=False, malformed_operators=False, nits=False, boxed="none")
_INEQUALITIES = (sympy.Gt, sympy.Ge, sympy.Lt, sympy.Le)
_EVALUATED_LATE = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative)
_OF_WHOLE_NUMBERS = (sympy.floor, sympy.ceiling, sympy.Mod, sympy.factorial, sympy.binomial)


@functools.lru_cache(4096)
def _sympy(text: str):
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).replace("\\cr", "\\\\")
    # letters that latex2sympy takes for e, the imaginary unit or the gamma function
    text = re.sub(r"(?<![\\A-Za-z])([EeI](?=_)|I(?![A-Za-z]))", r"\\mathcal{\1}", text)
    text = re.sub(r"\\(?:gamma|Gamma(?! ?\())(?![A-Za-z])", lambda m: f"\\mathcal{{{m[0][1]}}}", text)
    text = normalize_latex(text, _LATEX)
    try:
        return latex2sympy(
            text,
            is_real=True,  # of all symbols, or two sides with other assumptions would have no symbol in common
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except Exception:  # ANTLR's and sympy's own, of many types: all say that this is no formula they know
        return None


def parse_latex(text: str, gold: bool = False):
    """A sympy object for all of `text`, never for a part of it; cached, since many samples share a gold answer."""
    parsed = _sympy(text)
    if parsed is None or (hasattr(parsed, "has") and parsed.has(sympy.nan, sympy.zoo)):
        raise UnparsableGold if gold else Unparsable
    return parsed


def _same_expression(told, wanted, options: dict) -> bool:
    if told == wanted:
        return True
    if isinstance(told, sympy.Expr) and isinstance(wanted, sympy.Expr):
        same = _same_at_points(told, wanted, options["float_rounding"])
        if same is not None:
            return same
    truths = [isinstance(e, Boolean) for e in (told, wanted)]  # relations, and what "and" makes of them
    if all(truths) and _proportional(told, wanted):
        return True
    if any(truths) and not all(truths) and not any(isinstance(e, sympy.Set) for e in (told, wanted)):
        return False  # math-verify reads `x+y=1` as an assignment to x+y
    try:
        if verify(wanted, told, timeout_seconds=None, raise_on_error=True, **options):
            # ... and takes any two equations without solutions for the same
            return not (isinstance(told, sympy.Eq) and isinstance(wanted, sympy.Eq)) or bool(sympy.solve(wanted))
        if (
            all(truths)
            and not told.has(sympy.Eq)
            and told.free_symbols == wanted.free_symbols
            and len(told.free_symbols) == 1
        ):
            return told.as_set() == wanted.as_set()
    except (TypeError, KeyError, NotImplementedError):
        # What the two libraries say of things without a common measure (a set minus a number, ≠ beside <, a periodic solution).
        # Both sides were read, and nothing of ours runs in here: they could not be shown to be the same, as with `False`.
        return False
    return False


def _points(symbols: set, whole: bool):
    """Five values for each symbol, some negative; where numbers must be whole, all but t ... z are."""
    rng = random.Random(0)
    for low, start in ((0.3, 2), (1.1, 3), (0.1, 7), (-3.1, 10), (-1.7, 13)):
        values = {}
        for index, symbol in enumerate(sorted(symbols, key=str)):
            real = sympy.Float(low + 2 * rng.random(), 50)
            values[symbol] = sympy.Integer(start + index) if whole and symbol.name[0] not in "tuvwxyz" else real
            if symbol.name == "i":
                values[symbol] = sympy.I
        yield values


def _value(expression, values: dict):
    """A number of 40 digits, or `None` where there is none."""
    try:
        value = expression.xreplace(values).evalf(40, maxn=200)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError, NotImplementedError):
        return None
    return value if value.is_number and value.is_finite and not value.has(*_EVALUATED_LATE) else None


def _values(told, wanted) -> list[tuple]:
    """Pairs of values at the points where both have one, and (unless `i` occurs) a real one."""
    told, wanted = unwrap_fcs(told), unwrap_fcs(wanted)
    symbols = told.free_symbols | wanted.free_symbols
    if not symbols:
        pairs = [(_value(told, {}), _value(wanted, {}))]
    else:
        powers = told.atoms(sympy.Pow) | wanted.atoms(sympy.Pow)
        whole = (
            told.has(*_OF_WHOLE_NUMBERS) or wanted.has(*_OF_WHOLE_NUMBERS) or any(p.base.is_negative for p in powers)
        )
        pairs = [(_value(told, values), _value(wanted, values)) for values in _points(symbols, whole)]
        if not any(s.name == "i" for s in symbols) and not told.has(sympy.I) and not wanted.has(sympy.I):
            pairs = [(a, b) for a, b in pairs if a is not None and b is not None and a.is_real and b.is_real]
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def _same_at_points(told, wanted, places: int) -> bool | None:
    """Whether two expressions agree in value, at every point if they have symbols; `None`: it cannot be told."""
    pairs = _values(told, wanted)
    symbols = told.free_symbols | wanted.free_symbols
    rounded = told.has(sympy.Float) or wanted.has(sympy.Float)
    for a, b in pairs:
        difference, size = abs(sympy.N(a - b, 40)), sympy.N(abs(a) + abs(b), 40)
        if rounded:
            near = difference * 2 * 10**places <= 1 and difference * 2 * 10 ** (places - 1) <= size
        else:
            near = difference <= size * sympy.Float("1e-25") or (symbols and difference <= sympy.Float("1e-30"))
        if not near:  # numeric integration and summation may also have failed
            return None if told.has(*_EVALUATED_LATE) or wanted.has(*_EVALUATED_LATE) else False
    if len(pairs) < (3 if symbols else 1):
        return None
    if not symbols and not rounded:
        told, wanted = told.doit(), wanted.doit()
        if told.is_Rational and wanted.is_Rational:
            return told == wanted  # 100! and 100!+1 agree in 40 digits
    return True


def _proportional(told, wanted) -> bool:
    """Whether one relation is a constant multiple of the other: then both say the same."""
    flip = {sympy.Gt: sympy.Lt, sympy.Ge: sympy.Le}
    kinds, sides = [], []
    for relation in (told, wanted):
        if not isinstance(relation, sympy.core.relational.Relational):
            return False
        if not isinstance(relation.lhs, sympy.Expr) or not isinstance(relation.rhs, sympy.Expr):
            return False  # `x=[0,1]`: what is no number cannot be subtracted
        kind, difference = type(relation), relation.lhs - relation.rhs
        kinds.append(flip.get(kind, kind))
        sides.append(-difference if kind in flip else difference)
    if kinds[0] is not kinds[1]:
        return False
    ratios = [a / b for a, b in _values(*sides) if abs(b) > 1e-30]
    if len(ratios) < 3 or any(abs(r - ratios[0]) > abs(ratios[0]) * sympy.Float("1e-20") for r in ratios):
        return False
    return ratios[0] > 0 if kinds[0] in _INEQUALITIES else ratios[0] != 0
