r"""One completion against one gold answer: what it states, what that means, whether the two are the same.

math-verify (on latex2sympy2_extended) reads and compares expressions and sets. Around it, because each was measured to
go wrong there: our own extraction (`extraction.py`), answers read whole as one of a few types before anything in them
is parsed (lists, tuples, matrices, units, percent, bases), LaTeX parsed whole or not at all (its fall back to the
first number it finds reads the gold `2007+\frac\pi 2` as 2), and numbers compared by relative size (an absolute 1e-15
makes 10^-20 = 10^-21).

These functions may run for ever or exhaust memory on hostile input: `worker.py` runs them in processes it can
kill.
"""

import contextlib
import functools
import random
import re
import string
from fractions import Fraction
from typing import NamedTuple

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from latex2sympy2_extended.logic import And
from math_verify import verify
from math_verify.grader import unwrap_fcs
from sympy.logic.boolalg import Boolean

from ..answers.extraction import NO_ANSWER, Unparsable, final_answer, stated_answer
from ..answers.normalization import DATE, GREEK, NUMBER_WORDS, normalize, number, split_unit, unit, words
from ..data.rows import Verdict
from .verifier import GoldAtFault, Judgement


class UnparsableGold(Unparsable):
    """The gold answer is what cannot be read."""


def grade(
    completion: str | None,
    answer: str,
    float_rounding: int = 6,
    numeric_precision: int = 50,
    strict: bool = True,
    allow_set_relation_comp: bool = True,
) -> Judgement:
    """The verdict on one completion; with `completion=None`, on whether the gold answer can be compared with at all.

    The options are those of `math_verify.verify`, and mean the same.
    """
    compare = _Comparison(
        float_rounding=float_rounding,
        numeric_precision=numeric_precision,
        strict=strict,
        allow_set_relation_comp=allow_set_relation_comp,
    )
    gold = None
    try:
        gold = normalize(final_answer(answer) or answer)
        if not gold:
            return GoldAtFault(Verdict.UNPARSABLE, "the gold answer is empty")
        if completion is None:
            compare.readable(read(gold))
            return Judgement(Verdict.CORRECT)
        stated = stated_answer(completion)
        prediction = normalize(stated.text)
        same = compare.same(prediction, gold)
        for other in stated.others:
            if not _agree(compare, other, prediction):
                return Judgement(Verdict.UNPARSABLE, f"{NO_ANSWER}: it states {stated.text:.80} and {other:.80}")
        if same:
            return Judgement(Verdict.CORRECT)
        word = words(prediction) and not _choice(prediction) and stated.kind not in ("box", "tag")
        if word and (stated.kind == "sentence" or not words(gold)):  # which need not be an answer at all
            return Judgement(Verdict.UNPARSABLE, NO_ANSWER)
        reason = f"states {stated.text!r:.120}, the gold answer is {final_answer(answer) or answer!r:.120}"
        return Judgement(Verdict.WRONG, reason)
    except Unparsable as error:
        if gold is None or isinstance(error, UnparsableGold):
            return GoldAtFault(Verdict.UNPARSABLE, "the gold answer cannot be parsed")
        return Judgement(Verdict.UNPARSABLE, str(error) or NO_ANSWER)
    except RecursionError:
        return Judgement(Verdict.UNPARSABLE, "an answer is nested too deeply")


def _agree(compare: "_Comparison", other: str, prediction: str) -> bool:
    """Whether two statements of one completion say the same; what cannot be told counts as a contradiction."""
    try:
        return compare.same(normalize(other), prediction)
    except Unparsable:
        return False


# ---- reading: all of an answer as one of a few types ----


class Answer(NamedTuple):
    """An answer read whole: its type, its parts in that type, and its text.

    `parts` by `kind`: tuple, list, set, ratio: `Answer`s (a tuple's `name` holds its brackets, or says that it is a
    row, a column or a matrix, whose parts are its rows); cases: their rows; named: the value's `Answer`, and those of
    further sides (`name` is what it is called); equation: its sides as text; modular: residue and modulus; words,
    value, relation: none.
    """

    kind: str
    text: str
    parts: tuple = ()
    name: str = ""


_MEMBER = re.compile(
    r"^(?:(?:[A-Za-z]|\\[A-Za-z]+)(?:_\{[^{}]*\})?|\([A-Za-z](?:, ?[A-Za-z])+\))\\in(?![A-Za-z]) ?(?=[\[(\\])"
)
_ONE_NAME = (
    r"(?:\\triangle |\\angle ?|\\overline ?|\\text|\\vec ?|\\overrightarrow ?)?(?:[A-Z]{2,}|\\?[A-Za-z]+|\{[A-Za-z ]+\})(?:_\{[^{}]*\})?'*(?:\^\{-1\})?(?:\([^()=]*\))?"
    r"|\\frac\{d(?:\^\{?\d\}?)? ?[a-z]\}\{d ?[a-z](?:\^\{?\d\}?)?\}|\|[A-Z]{2,}\||\([A-Za-z](?:, ?[A-Za-z])+\)|\\(?:sin|cos|tan|cot|sec|csc) ?\\?(?:angle ?)?[A-Za-z]+"
)
_NAME = re.compile(rf"(?:{_ONE_NAME})(?::(?:{_ONE_NAME}))*")
_AND = r",? ?\\text\s*\{\s*,?\s*(?:and|or)\s*,?\s*\},?|,? ?(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|&"
_SIGNS = r"[<>]|\\(?:le|ge|neq)(?![A-Za-z])"
_CONSTANT = re.compile(
    rf"\\(?!text|angle|overline|(?:{GREEK})(?![A-Za-z]))[A-Za-z]+|\\text\s*\{{[^{{}}]*\}}(?=.)|(?<![A-Za-z])[ei](?![A-Za-z])"
)
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_IF = re.compile(
    r"^,?\s*\\text\s*\{\s*,?\s*(?:if|for|when|where)?\s*\}\s*|^(?:if|for)\b\s*|,$"
)  # before the condition of a case


def _cuts(text: str, separator: str) -> list[re.Match]:
    """The matches of `separator` in `text` that are in no bracket."""
    cuts, depth = [], 0
    for match in re.finditer(rf"(?P<cut>{separator})|\\begin|\\end|\\[{{}}]|[()\[\]{{}}]", text):
        if match["cut"] is None:
            depth += 1 if match[0] == "\\begin" or match[0][-1] in "([{" else -1
        elif depth == 0:
            cuts.append(match)
    return cuts


def _split(text: str, separator: str) -> list[str]:
    cuts = _cuts(text, separator)
    ends = [0, *(m.end() for m in cuts)], [*(m.start() for m in cuts), len(text)]
    return [p for start, end in zip(*ends, strict=True) if (p := text[start:end].strip())]


def _brackets(text: str) -> tuple[str, str]:
    r"""
    The brackets around all of a text, and what is in them: `("[)", "0,1")`, `("{}", "1,2")`; empty where there are
    none.
    """
    match = re.fullmatch(r"(\\\{|[(\[{])(.*?)(\\\}|[)\]}])", text, re.S)
    if not match:
        return "", text
    depth = 0
    for bracket in re.finditer(r"\\[{}]|[()\[\]{}]", text):
        depth += 1 if bracket[0][-1] in "([{" else -1
        if depth == 0 and bracket.end() < len(text):
            return "", text
    return match[1][-1] + match[3][-1], match[2].strip()


def _pieces(text: str, bracketed: bool) -> list[str]:
    """
    What a list, tuple or set consists of. A comma with three digits behind it belongs to the number, unless brackets
    say otherwise.
    """
    groups = _split(text, ";" if ";" in text else _AND)
    if len(groups) > 1 and (";" in text and "," in text or all(_split(g, ",")[1:] and "=" in g for g in groups)):
        return groups  # `x=1, y=2; x=3, y=4`
    pieces = _split(text, rf";|, |{_AND}|\\cr ?")
    if len(pieces) == 1 and bracketed:
        return _split(text, ",")
    return [p for piece in pieces for p in ([piece] if _one_number(piece) else _split(piece, ","))]


_THOUSANDS = re.compile(r"^-?[1-9]\d{0,2}(?:,\d{3})+(?!\d)")


def _one_number(text: str) -> bool:
    """A number with or without a name, or times something: no comma in it separates two."""
    name, _, value = text.rpartition("=")
    if (thousands := _THOUSANDS.match(value)) and "," not in value[thousands.end() :]:
        return not name or bool(_NAME.fullmatch(name))
    return number(split_unit(value)[0]) is not None and (not name or bool(_NAME.fullmatch(name)))


def _signed(text: str) -> list[str]:
    r"""`1\pm 2` as the two that it stands for."""
    texts = [text]
    while "\\pm" in texts[0] and len(texts) < 8:
        texts = [t.replace("\\pm", sign, 1) for t in texts for sign in "+-"]
    return [re.sub(r"(^|[(,\[] ?)\+", r"\1", t) for t in texts]


@functools.lru_cache(8192)
def read(text: str) -> Answer:
    """
    All of a normalised text as one of the types; what is none of them is a `value`, which `parse_latex` reads whole or
    not at all.
    """
    text = _MEMBER.sub("", text)
    around, inside = _brackets(text)
    if inside and (
        (around == "{}" and text[0] != "\\") or (around == "()" and not re.search(r"[,;]|^[A-Za-z]$", inside))
    ):
        return read(inside)
    if number(text):
        return Answer("value", text)
    if matrix := re.fullmatch(r"\\begin\{(pmatrix|cases)\}((?:(?!\\begin).)*?)(?:\\cr ?)?\\end\{\1\}", text, re.S):
        cells = [[_IF.sub("", c.strip()) for c in row.split("&") if c.strip()] for row in matrix[2].split("\\cr")]
        rows = [Answer("tuple", "&".join(row), tuple(map(read, row)), "row") for row in cells]
        if matrix[1] == "cases":
            return Answer("cases", text, tuple(rows))
        if all(len(row) == 1 for row in cells):
            return Answer("tuple", text, tuple(row.parts[0] for row in rows), "column")
        return rows[0]._replace(text=text) if len(rows) == 1 else Answer("tuple", text, tuple(rows), "matrix")
    if around == "{}":
        return Answer("set", text, tuple(_read_all(_pieces(inside, True))))
    if around and len(items := _pieces(inside, True)) > 1:
        return Answer("tuple", text, tuple(map(read, items)), around)
    if modular := re.fullmatch(r"(?:(?P<name>[^=]*)(?:\\equiv|=))?(?P<residue>[^=]*)\\pmod\{(?P<modulus>.*)\}", text):
        return Answer("modular", text, (read(modular["residue"]), read(modular["modulus"])), modular["name"] or "")
    pieces = [text] if DATE.fullmatch(_TEXT.sub(r"\1", text)) else _pieces(text, False)
    if len(pieces) > 1:
        return Answer("list", text, tuple(_read_all(pieces)))
    if len(signed := _signed(text)) > 1:
        return Answer("list", text, tuple(map(read, signed)))
    if said := words(text):
        return Answer("words", text, (), said)
    if signs := [m[0] for m in _cuts(text, _SIGNS)]:
        if set(signs) <= {">", "\\ge"}:  # `c>b>a` is `a<b<c`
            flipped = ["<" if sign == ">" else "\\le " for sign in signs[::-1]]
            text = "".join(map("".join, zip(_split(text, _SIGNS)[::-1], [*flipped, ""], strict=False)))
        return Answer("relation", text)
    if len(sides := _split(text, "=")) > 1:
        return _equation(text, sides)
    if len(terms := _split(re.sub(r"\\text\s*\{\s*to\s*\}|(?<=\d) to (?=\d)", ":", text), ":")) > 1:
        return Answer("ratio", text, tuple(map(read, terms)))
    if len(parts := _split(text, r"\\cup(?![A-Za-z])")) > 1:
        return Answer("list", text, tuple(map(read, parts)))
    return Answer("value", text)


def _read_all(pieces: list[str]) -> list[Answer]:
    """Elements, each `±` as two, a name in front of the first for all: `x=2, 3`."""
    answers = [read(signed) for piece in pieces for signed in _signed(piece)]
    if answers[0].kind == "named" and all(a.kind == "value" for a in answers[1:]):
        return [answers[0].parts[0], *answers[1:]]
    return answers


def _equation(text: str, sides: list[str]) -> Answer:
    """
    A name and its value, else an equation; `x=y=3` names 3 twice, `2=x` is `x=2`, and of `3\\cdot 5=15` all sides are
    the value.
    """
    if len(sides) == 2 and _NAME.fullmatch(sides[1]) and not _NAME.fullmatch(sides[0]) and not _closed(sides[1]):
        sides = sides[::-1]
    names = [s for s in sides[:-1] if _NAME.fullmatch(s) and not _closed(s)]
    values = sides[len(names) :]
    if names != sides[: len(names)] or (not names and not all(_closed(split_unit(value)[0]) for value in values)):
        return Answer("equation", text, tuple(sides))
    if names and names[0][0] == "(" and (value := read(values[-1])).kind == "tuple":
        return _in_order(names[0], value)
    if len(names) > 1 and not re.search(r"\(", names[0]):
        return Answer("list", text, tuple(Answer("named", f"{n}={values[-1]}", (read(values[-1]),), n) for n in names))
    return Answer(
        "named", text, (read(values[-1]), *([] if names else map(read, values[:-1]))), names[0] if names else ""
    )


def _in_order(names: str, value: Answer) -> Answer:
    """`(y,x)=(2,1)` as `(x,y)=(1,2)`."""
    letters = names.strip("()").replace(" ", "").split(",")
    if "".join(sorted(letters)) in string.ascii_lowercase and len(letters) == len(value.parts):
        parts = dict(sorted(zip(letters, value.parts, strict=True)))
        names, text = (
            f"({','.join(parts)})",
            f"{value.name[0]}{','.join(part.text for part in parts.values())}{value.name[1]}",
        )
        value = value._replace(text=text, parts=tuple(parts.values()))
    return Answer("named", f"{names}={value.text}", (value,), names)


def _closed(text: str) -> bool:
    """Whether a formula has no letters but those of numbers and functions: it has one value."""
    return not re.search(r"[A-Za-z]", _CONSTANT.sub("", _TEXT.sub("", text) or text))


def _same_name(stated: str, wanted: str) -> bool:
    r"""`a_n` and `a_{n}`, `|AB|` and `AB`; `f(x)` and `y`, which is what the axis is called."""
    stated, wanted = (re.sub(r"\\text|[{}| ]", "", name) for name in (stated, wanted))
    return stated == wanted or any(
        re.fullmatch(r"[A-Za-z]\([A-Za-z]\)", function) and axis in "yY"
        for function, axis in ((stated, wanted), (wanted, stated))
    )


# ---- comparison, by type ----


def _decimal(text: str, other: str, digits: str = r"\d\d?|\d{4,}") -> str:
    """`3,25` as 3.25 beside a decimal or a fraction, unless three digits make it a thousand."""
    broken = "." in other or ((value := number(other)) and value[0].denominator > 1)
    return text.replace(",", ".") if broken and re.fullmatch(rf"-?(?:\d+,(?:{digits})|0,\d+)", text) else text


class _Comparison:
    """`same(prediction, gold)` on normalised text; `Unparsable` where nothing can be said."""

    def __init__(self, **options):
        self.options, self.strict = options, options["strict"]

    def readable(self, gold: Answer) -> None:
        """
        Raises `UnparsableGold` unless every part of the gold answer is a number, words or LaTeX that parses as a
        whole.
        """
        if gold.kind in ("relation", "equation") or (gold.kind == "value" and not _choice(gold.text)):
            value = split_unit(gold.text)[0].removesuffix("%").replace("^\\circ", "")
            if not (number(value) or _time(gold.text) or _base(value)):
                parse_latex(value, gold=True)
        elif gold.kind != "words" and not _choice(gold.text) and not _time(gold.text):
            for part in gold.parts:
                self.readable(part)

    def same(self, prediction: str, gold: str) -> bool:
        if prediction.replace(", ", ",") == gold.replace(", ", ","):
            return True
        if re.fullmatch(r"\d+(?:-\d+)+", gold) and not words(gold):
            return False  # a score, a range or a telephone number: no difference that is to be worked out
        if "\\pmod" in gold:
            prediction = re.sub(r"\\bmod\{?(\w+)\}?$", r"\\pmod{\1}", prediction)
        stated, wanted = number(_decimal(prediction, gold)), number(_decimal(gold, prediction, r"\d\d|\d{4,}"))
        if stated and wanted:
            return self._close(stated, wanted)
        return self.equal(read(prediction), read(gold))

    def _close(self, stated: tuple[Fraction, bool], wanted: tuple[Fraction, bool]) -> bool:
        """
        Equal; a decimal may also be another number rounded to `float_rounding` places, if that leaves five digits of
        it.
        """
        if stated[0] == wanted[0] or not (stated[1] or wanted[1]):
            return stated[0] == wanted[0]
        difference, places = abs(stated[0] - wanted[0]), self.options["float_rounding"]
        size = max(abs(stated[0]), abs(wanted[0]))
        return difference * 2 * 10**places <= 1 and difference * 10 ** (places - 1) <= size

    def equal(self, stated: Answer, wanted: Answer) -> bool:
        """Whether a prediction and a gold answer, both read, say the same."""
        kinds = {stated.kind, wanted.kind}
        # `1 2` is not 12
        bare = [re.sub(r"(?<!\d) | (?![\d.])", "", _TEXT.sub(r"\1", answer.text)) for answer in (stated, wanted)]
        if bare[0] == bare[1]:
            return True
        small = re.fullmatch(r"(?:option )?\([a-j]\)", stated.text)
        choices = _choice(stated.text.upper() if small else stated.text), _choice(wanted.text)
        if any(choices) and (verdict := self._same_choice(stated, wanted, *choices)) is not None:
            return verdict
        times = _time(stated.text), _time(wanted.text)
        if all(times) and any(re.search("[ap]", text, re.I) for text in bare):  # else they are ratios
            return all(a == b or a is None or b is None for a, b in zip(*times, strict=True))
        if wanted.kind == "words" and stated.kind not in ("list", "set", "named"):
            return wanted.name == (stated.name if stated.kind == "words" else words(f"\\text{{{stated.text}}}"))
        if kinds & {"list", "set"}:
            return self._same_list(stated, wanted)
        if "named" in kinds:
            return self._same_named(stated, wanted)
        if "\\approx" in stated.text and "\\approx" not in wanted.text:
            sides = [side for side in stated.text.split("\\approx") if side]
            if not _near(sides):
                raise Unparsable  # it contradicts itself
            return any(self.same(side, wanted.text) for side in sides)
        if "modular" in kinds:
            return self._same_modular(stated, wanted)
        if "\\hat" in stated.text + wanted.text:
            return self._same_value(_unit_vectors(stated), _unit_vectors(wanted))
        if kinds == {"tuple"}:
            # a vector may be a column, a row or a tuple, but a row is no column
            vector = (
                len({stated.name, wanted.name} & {"column", "row"})
                == len({stated.name, wanted.name} & {"()", "[]"})
                == 1
            )
            return (stated.name == wanted.name or vector or not self.strict) and self._all(stated.parts, wanted.parts)
        if kinds == {"cases"}:
            return self._matched(stated.parts, wanted.parts, self.equal)
        if "cases" in kinds or {stated.name, wanted.name} & {
            "row",
            "column",
            "matrix",
        }:  # a number times a matrix is a value
            return "pmatrix" in stated.text and "pmatrix" in wanted.text and self._same_value(stated.text, wanted.text)
        if "ratio" in kinds:
            return self._same_ratio(stated, wanted)
        if "equation" in kinds:
            return self._same_equation(stated, wanted)
        if "words" in kinds:
            return False
        return self._same_quantity(stated.text, wanted.text)

    def _all(self, stated: tuple, wanted: tuple) -> bool:
        return len(stated) == len(wanted) and all(map(self.equal, stated, wanted))

    def _matched(self, stated: tuple, wanted: tuple, same) -> bool:
        """Whether each of `wanted` has its own of `stated`, in any order, and none is left."""
        left = list(stated)
        for one in wanted:
            match = next((at for at, candidate in enumerate(left) if same(candidate, one)), None)
            if match is None:
                return False
            del left[match]
        return not left

    def _same_ratio(self, stated: Answer, wanted: Answer) -> bool:
        """`3:4` and `6:8`; a number is its ratio to 1."""
        parts = [a.parts if a.kind == "ratio" else (a, Answer("value", "1")) for a in (stated, wanted)]
        scaled = [[f"({other[0].text})\\cdot({part.text})" for part in one] for one, other in (parts, parts[::-1])]
        return len(parts[0]) == len(parts[1]) and all(map(self.same, *scaled))

    def _same_choice(self, stated: Answer, wanted: Answer, chosen, right) -> bool | None:
        """A letter, with or without what it stands for. `None`: neither is a choice beside the other."""
        if stated.text.upper() == wanted.text.upper() and wanted.text.upper() in [*"ABCDEFGH"] and wanted.text != "e":
            return True
        if right:
            if chosen:
                return chosen[0] == right[0]
            if right[1]:
                return self.same(stated.text, right[1])
            return None if stated.kind == "value" and wanted.text == right[0] else False
        if chosen[1]:
            return True if self.same(chosen[1], wanted.text) else None
        return None

    def _same_modular(self, stated: Answer, wanted: Answer) -> bool:
        """Residues modulo the same; 3 where the gold answer says modulo what, but "3 (mod 7)" is not the value 3."""
        if stated.kind != wanted.kind:
            return wanted.kind == "modular" and self.equal(stated, wanted.parts[0])
        if not self.equal(stated.parts[1], wanted.parts[1]):
            return False
        values = [number(part.text) for part in (stated.parts[0], *wanted.parts)]
        if all(values) and values[2][0]:
            return (values[0][0] - values[1][0]) % values[2][0] == 0
        return self.equal(stated.parts[0], wanted.parts[0])

    def _same_named(self, stated: Answer, wanted: Answer) -> bool:
        """`x=5` states 5; another name is another statement. All sides of `3\\cdot 5=15` must be the same."""
        if "equation" in (stated.kind, wanted.kind):
            return self._same_equation(stated, wanted)
        if not all(self.equal(side, stated.parts[0]) for side in stated.parts[1:] if stated.kind == "named"):
            raise Unparsable  # it contradicts itself
        values = [a.parts[0] if a.kind == "named" else a for a in (stated, wanted)]
        if stated.kind != wanted.kind or not self.strict:
            return self.equal(*values)
        functions = [re.fullmatch(r"([A-Za-z])\(([A-Za-z])\)", a.name) for a in (stated, wanted)]
        if all(functions) and functions[0][1] == functions[1][1]:  # `f(t)=t^2` is `f(x)=x^2`
            (_, told_as), (_, wanted_as) = (function.groups() for function in functions)
            renamed = re.sub(r"\\[A-Za-z]+|[A-Za-z]", lambda m: wanted_as if m[0] == told_as else m[0], values[0].text)
            return self.same(renamed, values[1].text)
        if _same_name(stated.name, wanted.name):
            return self.equal(*values)
        return not all(_closed(v.text) for v in values) and self._same_equation(stated, wanted)

    def _same_equation(self, stated: Answer, wanted: Answer) -> bool:
        """
        Two equations by what they are; where one is a value, the other states it only if it is no condition on `x`,
        `y` or one unknown.
        """
        if stated.kind in ("equation", "named") and wanted.kind in ("equation", "named"):
            return self._same_value(stated.text, wanted.text)
        equation, value = (stated, wanted) if stated.kind == "equation" else (wanted, stated)
        letters = set(re.findall(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])", re.sub(r"\\[A-Za-z]+", " ", equation.parts[0])))
        if len(letters) == 1 or letters & set("xyz") or not _closed(equation.parts[-1]) or equation.parts[-1] == "0":
            return False
        sides = [equation.parts[-1], value.text]
        return self.same(*(sides if equation is stated else sides[::-1]))

    def _same_list(self, stated: Answer, wanted: Answer) -> bool:
        """
        In any order, but positions where names or brackets give one; relations that all hold, or of which one does,
        are one.
        """
        for one, other in ((stated, wanted), (wanted, stated)):
            again = self.equal if one is stated else lambda a, b: self.equal(b, a)
            items, others = (a.parts if a.kind == "list" else (a,) for a in (one, other))
            one_set = other.kind != "list" or (re.search(r"\band\b", one.text) and "\\cup" in other.text)
            if len(items) > 1 and one_set and {a.kind for a in items} == {"relation"}:
                joined = sympy.Or if re.search(r"\bor\b", one.text) else And
                whole = parse_latex(other.text, gold=other is wanted)
                return _same_expression(joined(*(parse_latex(a.text) for a in one.parts)), whole, self.options)
            if one.kind in ("list", "set") and re.fullmatch(r"-?\d+(?:,-?\d+)+", other.text) and other.kind == "value":
                # 12,345 is two numbers beside a list of two
                return again(one, other._replace(kind="list", parts=tuple(map(read, other.text.split(",")))))
            if one.kind == "named" and one.parts[0].kind in ("list", "set", "tuple"):
                return again(one.parts[0], other)
            if one.kind == "set" and len(one.parts) > 1 and other.kind == "tuple" and self.strict:
                return False
            names = {a.name.partition("_")[0] for a in items if a.kind == "named"}
            if len(names) == len(items) > 1 and not all(a.kind == "named" for a in others):
                # `x=1,y=2` gives the positions of `1,2` and of `(1,2)` their names, `y=2,x=1` too
                if "".join(sorted(names)) in string.ascii_lowercase:
                    items = tuple(sorted(items, key=lambda a: a.name))
                pair = tuple(a.parts[0] for a in items), other.parts if other.kind == "tuple" else others
                return self._all(*(pair if one is stated else pair[::-1]))
            bracketed = one.kind in ("list", "set") and (other.kind, other.name) == ("tuple", "()")
            if bracketed and len(one.parts) == len(other.parts):
                if other is wanted:
                    return self._all(one.parts, other.parts)
                return self._same_list(stated._replace(kind="list"), wanted)
        predictions, golds = (a.parts if a.kind in ("list", "set") else (a,) for a in (stated, wanted))
        labels = [[a.name if a.kind == "named" else "" for a in items] for items in (predictions, golds)]
        if len({name.partition("_")[0] for n in labels for name in n if all(n)}) == 1 and labels[0] != labels[1]:
            # `x_1=2,x_2=3` enumerates roots, in any order
            predictions, golds = (
                tuple(a.parts[0] if a.kind == "named" else a for a in items) for items in (predictions, golds)
            )
        if stated.kind == "set" and wanted.text == "\\emptyset":
            return False  # that has an element
        if len(golds) == 1 and wanted.kind != "set" and all(self.equal(p, golds[0]) for p in predictions):
            return len({p.text for p in predictions}) == len(predictions)  # one answer in several forms
        unique = [tuple({a.text.replace(" ", ""): a for a in items}.values()) for items in (predictions, golds)]
        if len(predictions) == len(golds) and "set" not in (stated.kind, wanted.kind):
            unique = [predictions, golds]
        if self._matched(
            unique[0], unique[1], lambda a, b: (a.kind == "set") == (b.kind == "set") and self.equal(a, b)
        ):
            return True
        return "\\cup" in stated.text + wanted.text and self._same_value(stated.text, wanted.text)

    def _same_quantity(self, prediction: str, gold: str) -> bool:
        """Bases, units, per cent and degrees around a value."""
        bases = _base(prediction), _base(gold)
        if all(bases) and (bases[0][1] or bases[1][1]):
            return bases[0][0] == bases[1][0] and (bases[0][1] == bases[1][1] or None in (bases[0][1], bases[1][1]))
        (stated, told_unit), (wanted, wanted_unit) = split_unit(prediction), split_unit(gold)
        if isinstance(wanted_unit, str) and told_unit is not None:
            counted = [
                set(re.findall(r"\w+?(?=s?\b)", u.casefold())) for u in (told_unit, wanted_unit) if isinstance(u, str)
            ]
            if len(counted) < 2 or not (counted[0] <= counted[1] or counted[1] <= counted[0]):
                raise Unparsable(f"whether {prediction:.60} is {gold:.60} depends on what was counted")
        if isinstance(wanted_unit, tuple) and told_unit is None and (letter := _LETTER_UNIT.fullmatch(prediction)):
            stated, told_unit = letter[1], unit(letter[2])
        if wanted_unit is None and (thousand := re.search(r"\\text\{([KT])\}$", prediction)):
            raise Unparsable(f"{thousand[1]} may be a unit or a number of thousands")
        degrees = "^\\circ" in prediction, "^\\circ" in gold
        if isinstance(told_unit, tuple) and degrees[1] and told_unit[1] == {"radian": 1}:
            return self.same(stated, gold) if "\\pi" in stated else False
        if isinstance(wanted_unit, tuple) and told_unit is not None and not degrees[0]:
            if isinstance(told_unit, str) or told_unit[1] != wanted_unit[1]:
                return False
            if (factor := told_unit[0] / wanted_unit[0]) != 1:
                stated = f"\\frac{{{factor.numerator}}}{{{factor.denominator}}}\\cdot({stated})"
        if (stated, wanted) != (prediction, gold):
            return self.same(stated, wanted)
        # `12 m` is twelve metres where a plain number was asked for; as a gold answer it may be a product
        if number(gold) and (metres := _LETTER_UNIT.fullmatch(prediction)) and number(metres[1]):
            return self.same(metres[1], gold)
        if "%" in prediction + gold:
            stated, wanted = prediction.removesuffix("%"), gold.removesuffix("%")
            if ("%" in prediction) == ("%" in gold):
                return self.same(stated, wanted)
            if self.same(stated, wanted):  # 25 for 25%, but not 0.25 for 0.25%
                return not (value := number(wanted)) or not 0 < abs(value[0]) < 1
            hundredths = [
                f"\\frac{{{text.removesuffix('%')}}}{{100}}" if "%" in text else text for text in (prediction, gold)
            ]
            return self._same_value(*hundredths)
        if any(degrees):
            radians = re.search(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc|pi)", prediction + gold)
            degree = r"(\1\\frac{\\pi}{180})" if radians else r"\1"
            return self.same(*(re.sub(r"([\d.]*)\^\\circ", degree, text) for text in (prediction, gold)))
        return self._same_value(prediction, gold)

    def _same_value(self, prediction: str, gold: str) -> bool:
        stated, wanted = number(prediction), number(gold)
        if stated and wanted:
            return self._close(stated, wanted)
        stated, wanted = parse_latex(prediction), parse_latex(gold, gold=True)
        if not self.strict:
            symbols = [sorted(e.free_symbols, key=str) for e in (stated, wanted)]
            stated = stated.xreplace(dict(zip(*symbols, strict=False)))
        return _same_expression(stated, wanted, self.options)


_LETTER_UNIT = re.compile(r"(.*\S) ([mshgL](?:\^\{?[23]\}?)?)")


def _unit_vectors(vector: Answer) -> str:
    r"""`1\hat{i}+2\hat{j}` for a vector (1, 2)."""
    if vector.kind != "tuple":
        return vector.text
    return "+".join(f"({part.text})\\hat{{{axis}}}" for part, axis in zip(vector.parts, "ijk", strict=False))


def _choice(text: str) -> tuple[str, str] | None:
    """(letter, what stands behind it) of `B`, `(B)`, `\\text{(B) } 12` or `B. 12`."""
    bare = re.sub(r"^(?:answer|option|choice):? ?(?=\(?[A-J]\b)", "", _TEXT.sub(r"\1 ", text).strip(), flags=re.I)
    match = re.fullmatch(r"\(([A-Z]) ?\)\.?:?\s*(.*)|([A-J])(?:[.):]\s*(.*))?", bare, re.S)
    if (
        not match
        or re.search(r"^(?:[,;^!+*/=<>]|\(?[A-Z]\)|(?:and|or)\b)|[,;)\d] *\(?[A-J][.)]", match[2] or match[4] or "")
        or (match[4] and "=" in text)
    ):
        return None  # `(C)(D)` are two
    return (match[1] or match[3]), (match[2] or match[4] or "").strip()


def _time(text: str) -> tuple | None:
    """(hour, minute, second, "a" or "p") of a time of day."""
    bare = re.sub(r"\\text|[{}\s]", "", text).casefold()
    match = re.fullmatch(r"(\d{1,2})(?::([0-5]\d))?(?::([0-5]\d))?(?:([ap])\.?m\.?)?", bare)
    if not match or not (match[2] or match[4]):
        return None
    hour = int(match[1])
    return (hour - 12, *match.group(2, 3), "p") if hour > 12 else (hour, *match.group(2, 3, 4))


def _base(text: str) -> tuple | None:
    """(digits, base) of `204_5`; a number without a base has `None` there."""
    bare = re.sub(r"\\text\s*\{([^{}]*)\}|[ ()]", r"\1", text).replace(" ", "")
    if match := re.fullmatch(
        r"(\d[\dA-F]*|[A-F][\dA-F]*\d[\dA-F]*|[A-F]{2,})(?:(?:_\{?(?:base)?|(?:in)?base)(\w+)\}?)?", bare
    ):
        return match[1].lstrip("0"), match[2] and str(NUMBER_WORDS.get(match[2], match[2]))
    return None


# ---- mathematics ----

_LATEX = NormalizationConfig(basic_latex=True, units=False, malformed_operators=False, nits=False, boxed="none")
_EVALUATED_LATE = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative)
_OF_WHOLE_NUMBERS = (sympy.Sum, sympy.Product, sympy.floor, sympy.ceiling, sympy.Mod, sympy.factorial, sympy.binomial)


@functools.lru_cache(4096)
def _sympy(text: str):
    if re.search(r"\\text\s*\{\s*[A-Za-z]{2}|[^\x00-\x7f]", text):
        return None  # words: letters of theirs are no factors
    text = _TEXT.sub(r"\1", text).replace("\\cr", "\\\\")
    # letters that latex2sympy takes for e, the imaginary unit or the gamma function
    text = re.sub(r"(?<![\\A-Za-z])([EeI](?=_)|I(?![A-Za-z]))", r"\\mathcal{\1}", text)
    text = re.sub(r"\\(?:gamma|Gamma(?! ?\())(?![A-Za-z])", lambda m: f"\\mathcal{{{m[0][1]}}}", text)
    text = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
    text = normalize_latex(text, _LATEX)
    try:
        return latex2sympy(
            text,
            is_real=True,  # of all symbols, or two sides with other assumptions would have no symbol in common
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except MemoryError:  # the worker's limit, which says nothing of the formula
        raise
    except Exception:  # ANTLR's and sympy's own, of many types: all say that this is no formula they know
        return None


def parse_latex(text: str, gold: bool = False):
    """A sympy object for all of `text`, never for a part of it; cached, since many samples share a gold answer."""
    # Not to be dropped: a prime, what is left out, a space between two numbers, a word before a number (`1 hour 30`).
    dropped = r"['\"]|\\prime|\\[lc]?dots|(?<![\w^.])\d+ [\d.]|(?<![\\A-Za-z])[A-Za-z]{3,} \d"
    parsed = None if re.search(dropped, text) else _sympy(text)
    if parsed is None or (hasattr(parsed, "has") and parsed.has(sympy.nan, sympy.zoo)):
        raise UnparsableGold if gold else Unparsable
    if isinstance(parsed, sympy.Basic):  # `dy/dx` of a letter, which is not 0: y is a function of x
        whole = {d: sympy.Symbol(str(d), real=True) for d in parsed.atoms(sympy.Derivative) if d.expr.is_Symbol}
        parsed = parsed.xreplace({d: symbol for d, symbol in whole.items() if d.expr not in d.variables})
    return _with_real_roots(parsed)


def _with_real_roots(parsed):
    r"""`\sqrt[3]{-8}` is -2, not the complex root that sympy takes."""
    if not isinstance(parsed, sympy.Expr) or parsed.has(sympy.I):
        return parsed
    odd = [
        p for p in parsed.atoms(sympy.Pow) if p.exp.is_Rational and p.exp.q > 2 and p.exp.q % 2 and p.base.is_negative
    ]
    return parsed.xreplace({p: (-1) ** p.exp.p * (-p.base) ** p.exp for p in odd})


def _near(sides: list[str]) -> bool:
    """Whether numbers may be roundings of each other, to a twentieth or to a whole number; names may be any."""
    values = []
    for side in filter(_closed, sides):
        with contextlib.suppress(Unparsable):
            values.append(_value(parse_latex(split_unit(side)[0]), {}))
    values = [value for value in values if value is not None and value.is_real]
    return all(abs(a - values[-1]) <= max(abs(a) / 20, float(values[-1]).is_integer() / 2) for a in values)


def _same_expression(stated, wanted, options: dict) -> bool:
    if stated == wanted:
        return True
    if isinstance(stated, sympy.Expr) and isinstance(wanted, sympy.Expr):
        same = _same_at_points(stated, wanted, options["float_rounding"])
        if same is not None:
            return same
    truths = [isinstance(e, Boolean) for e in (stated, wanted)]  # relations, and what "and" makes of them
    # The two libraries raise for things without a common measure (a set minus a number, ≠ beside <, a periodic
    # solution): these could not be shown to be the same.
    with contextlib.suppress(TypeError, KeyError, NotImplementedError):
        if all(truths) and _proportional(stated, wanted):
            return True
        if verify(wanted, stated, timeout_seconds=None, raise_on_error=True, **options):
            # ... and takes any two equations without solutions for the same
            return not (isinstance(stated, sympy.Eq) and isinstance(wanted, sympy.Eq)) or bool(sympy.solve(wanted))
        if all(truths) and not stated.has(sympy.Eq) and stated.free_symbols == wanted.free_symbols:
            return len(stated.free_symbols) == 1 and stated.as_set() == wanted.as_set()
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


def _value(expression, values: dict, digits: int = 40):
    """A number of 40 digits, or `None` where there is none."""
    try:
        value = expression.xreplace(values).evalf(digits, maxn=5 * digits)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError, NotImplementedError):
        return None
    return value if value.is_number and value.is_finite else None


def _values(stated, wanted) -> list[tuple]:
    """Pairs of values at the points where both have one, and (unless `i` occurs) a real one."""
    both = sympy.Tuple(unwrap_fcs(stated), unwrap_fcs(wanted))
    whole = both.has(*_OF_WHOLE_NUMBERS) or any(power.base.is_negative for power in both.atoms(sympy.Pow))
    points = _points(both.free_symbols, whole) if both.free_symbols else [{}]
    pairs = [pair for values in points if None not in (pair := tuple(_value(side, values) for side in both))]
    if not both.free_symbols or both.has(sympy.I, sympy.Symbol("i", real=True)):
        return pairs
    return [(a, b) for a, b in pairs if a.is_real and b.is_real]


def _same_at_points(stated, wanted, places: int) -> bool | None:
    """Whether two expressions agree in value, at every point if they have symbols; `None`: it cannot be told."""
    pairs = _values(stated, wanted)
    symbols = stated.free_symbols | wanted.free_symbols
    rounded = stated.has(sympy.Float) or wanted.has(sympy.Float)
    for a, b in pairs:
        difference, size = abs(sympy.N(a - b, 40)), sympy.N(abs(a) + abs(b), 40)
        if rounded:
            near = difference * 2 * 10**places <= 1 and difference * 2 * 10 ** (places - 1) <= size
        else:
            near = difference <= size * sympy.Float("1e-25")
            if near and difference and not symbols:  # e^{\pi\sqrt{163}} is a whole number in its first 30 digits
                a, b = (_value(unwrap_fcs(e), {}, 400) for e in (stated, wanted))
                near = None not in (a, b) and abs(a - b) <= size * sympy.Float("1e-350", 400)
        if not near:  # numeric integration and summation may also have failed
            return None if stated.has(*_EVALUATED_LATE) or wanted.has(*_EVALUATED_LATE) else False
    if len(pairs) < (3 if symbols else 1):
        return None
    if not symbols and not rounded:
        stated, wanted = stated.doit(), wanted.doit()
        if stated.is_Rational and wanted.is_Rational:
            return stated == wanted  # 100! and 100!+1 agree in 40 digits
    return True


def _proportional(stated, wanted) -> bool:
    """Whether one relation is a constant multiple of the other: then both say the same."""
    stated, wanted = (r.reversed if isinstance(r, (sympy.Gt, sympy.Ge)) else r for r in (stated, wanted))  # a>b is b<a
    if not isinstance(stated, sympy.core.relational.Relational) or type(stated) is not type(wanted):
        return False
    ratios = [a / b for a, b in _values(stated.lhs - stated.rhs, wanted.lhs - wanted.rhs) if abs(b) > 1e-30]
    if len(ratios) < 3 or any(abs(r - ratios[0]) > abs(ratios[0]) * sympy.Float("1e-20") for r in ratios):
        return False
    return ratios[0] > 0 or (isinstance(stated, (sympy.Eq, sympy.Ne)) and ratios[0] != 0)
