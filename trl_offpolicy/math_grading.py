r"""One completion against one gold answer: what it states, what that means, whether the two are the same.

math-verify (on latex2sympy2_extended) reads and compares the mathematics. Around it, because each was measured to go wrong
there: our own extraction (last boxes, braces balanced; a phrase, never any number), text that is taken apart before it is
parsed (lists, tuples, matrices, units, percent, bases), LaTeX parsed whole or not at all (its fall back to the first number it
finds reads the gold `2007+\frac\pi 2` as 2), and numbers compared by relative size (an absolute 1e-15 makes 10^-20 = 10^-21).

These functions may run for ever or exhaust memory on hostile input: `verification.py` runs them in processes it can kill.
"""

import functools
import re
import unicodedata
from fractions import Fraction

from .rows import Verdict, final_answer, last_boxed


MAX_ANSWER = 5000  # characters; what is longer is no final answer, and some of what follows is quadratic
NO_ANSWER = "the completion states no answer that can be parsed"


class Unparsable(Exception):
    """One side cannot be read as mathematics, so that nothing can be said."""


class UnparsableGold(Unparsable):
    pass


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
        stated, surely = stated_answer(completion)
        prediction = normalize(stated) if stated else ""
        if not prediction:
            return Verdict.UNPARSABLE, NO_ANSWER
        if compare.same(prediction, gold):
            return Verdict.CORRECT, ""
        # A sentence without a box that is not the gold word need not be an answer at all.
        return (Verdict.WRONG, "") if surely or not words(prediction) else (Verdict.UNPARSABLE, NO_ANSWER)
    except UnparsableGold:
        return Verdict.UNPARSABLE, "the gold answer cannot be parsed"
    except Unparsable:
        return Verdict.UNPARSABLE, NO_ANSWER
    except RecursionError:
        return Verdict.UNPARSABLE, "an answer is nested too deeply"


# ---- what a completion states ----

_END = re.compile(r"<\|(?:im_end|im_start|endoftext|eot_id|end_of_text)\|>|</s>")
_PHRASE = re.compile(
    r"\b(final )?(?:answer|solution|result)\W{0,4}?(?:\s(?:is|are)\b|[:=])[\s*:=]*|^A:\s*", re.M | re.I
)
_MATH = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<![\\$])\$([^$\n]+?)(?<!\\)\$(?!\d)", re.S)
_ASIDE = re.compile(
    r"[,;.]? (?:not|which|because|since|as|instead|rather|where|so|when) |(?<=[^\s\d])\. |(?<=\d)\. |\n"
)
_LEADS = re.compile(r"\W{0,3}(?:\$|\\[\[(]|[-+−(\[{]*[\d.]|[A-Za-z] ?=|[√π])")


def stated_answer(completion: str) -> tuple[str | None, bool]:
    """The text of the final answer, and whether it surely was meant as one.

    In this order: what follows "final answer is" behind the last box; the last box (with those that only "and", "or" or a
    comma separate from it), which must be closed; GSM8K's `####`; what follows "answer is", "answer:" or "A:"; a completion
    that is a single line. Never the last number of whatever came out: a rambling sample would be right by chance, and be trained on.
    """
    text = completion.rpartition("</think>")[2] if completion.rpartition("</think>")[2].strip() else completion
    text = _END.split(text, maxsplit=1)[0] or text
    phrases = list(_PHRASE.finditer(text))[-1:]
    box = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if box >= 0:
        last = phrases[0] if phrases and phrases[0][1] and phrases[0].start() > box else None
        told = last and _from_sentence(text[last.end() : last.end() + 1000], first=True)
        if told and re.search(r"\d", told):
            return told, True
        return final_answer(text) if last_boxed(text) else None, True
    if answer := final_answer(text):
        return answer, True
    if phrases and (told := _from_sentence(text[phrases[0].end() : phrases[0].end() + 1000], first=True)):
        return told, True
    line = text.strip()
    return (_from_sentence(line, first=False), False) if "\n" not in line or _MATH.fullmatch(line) else (None, False)


def _from_sentence(text: str, first: bool) -> str | None:
    """The answer in a sentence: what it begins with (if `first`), else what stands behind its last "is"."""
    text = text.partition("I hope it is correct")[0].strip()
    if (whole := _MATH.match(text)) and whole[0][:2] in ("$$", "\\["):
        return whole[0]
    if first and _LEADS.match(text):
        text = _ASIDE.split(text, maxsplit=1)[0]
        if not (groups := _math_groups(text)):
            return text
        return groups[0] if text.startswith(("$", "\\")) else text if len(groups) == 1 else groups[-1]
    pieces = re.split(r"\b(?:is|are|equals|be)\b", _ASIDE.split(text, maxsplit=1)[0] if first else text)
    said = [p for p in pieces if re.search(r"\d|[√π]", p) or any(len(g) > 1 for g in _math_groups(p))]
    if not said:
        spelt = re.findall(rf"\b(?:{'|'.join(list(_NUMBER_WORDS)[2:])})\b", text.casefold())
        return spelt[0] if len(spelt) == 1 else pieces[-1].strip() or None
    if groups := _math_groups(said[-1]):
        return groups[-1]
    piece = said[-1].strip()
    if _LEADS.match(piece):
        return _ASIDE.split(piece, maxsplit=1)[0]
    numbers = re.findall(r"(?<![\w.])-?\$?[\d,]*\.?\d+(?:/\d+)?(?:\s?\\?%)?", piece)
    return (numbers[0] if len(numbers) == 1 else None) if numbers else piece


def _math_groups(text: str) -> list[str]:
    """Formulas of a text, those joined where only a comma, "and" or "or" is between: `$1$ and $2$` is one answer."""
    groups, end = [], None
    for match in _MATH.finditer(text):
        content = next(g for g in match.groups() if g is not None).strip()
        if end is not None and re.fullmatch(r"[\s,;]*(?:and|or)?\s*", text[end : match.start()]):
            groups[-1] += ", " + content
        else:
            groups.append(content)
        end = match.end()
        if percent := re.match(r"\s*\\?(?:%|percent|pct)", text[end:]):
            groups[-1] += percent[0]
    return groups


# ---- text, without what never changes its value ----

_GREEK = (
    "hbar|alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|varphi|chi|psi|omega"
    "|Gamma|Delta|Theta|Lambda|Xi|Sigma|Phi|Psi|Omega|ell"
)
_UNICODE = {
    "−": "-", "–": "-", "—": "-", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "/", "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge ",
    "≠": "\\neq ", "°": "^\\circ ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "±": "\\pm ", "∅": "\\emptyset ", "ℝ": "\\mathbb{R}",
    "ℤ": "\\mathbb{Z}", "≈": "\\approx ", "√": "\\sqrt", "∛": "\\sqrt[3]", "…": "\\ldots", "∖": "\\setminus ", "€": "", "£": "", "⟨": "\\langle ", "⟩": "\\rangle ",
}  # fmt: skip
_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp|sqrt|pi"
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|displaystyle|textstyle|limits|bigl?|bigr|Bigl?|Bigr|mathopen|mathclose)(?![A-Za-z])", ""),
        (r"(?<=\d)(?:\\!)?(?:\\,|\{,\}|,\\!|\\ |,\\ (?=\d{3})|~)(?=\d{3}(?!\d))", ","),
        (r"\\(?:qquad|quad|hspace\{[^{}]*\}|[hv]?phantom\s*(?:\{[^{}]*\}|.)|[,;: !>])|~", " "),
        (r"\\(?:textbf|textit|textrm|textnormal|textup|mbox|hbox|mathrm|mathbf|mathit|mathsf|boldsymbol|operatorname\*?|rm|bf)(?=\s*\{)", r"\\text"),
        (r"\{\\(?:rm|bf|it)\s+([^{}]*)\}", r"\\text{\1}"),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\(?:lt|gt)(?![A-Za-z])", lambda m: "<" if m[0] == "\\lt" else ">"),
        (r"\\(?:leqslant|leq)(?![A-Za-z])|<=|=<", r"\\le "),
        (r"\\(?:geqslant|geq)(?![A-Za-z])|>=|=>", r"\\ge "),
        (r"\\ne(?![A-Za-z])|!=", r"\\neq "),
        (r"\*\*(?=[\w({-])", "^"),
        (r"\*\*|__", ""),
        (r"\\?\b(?:infinity|infty|inf)\b", r"\\infty "),
        (r"\\(?:degree|deg)(?![A-Za-z])|\^\{?\\circ\}?|\\text\{\s*degrees?\}|(?<=[\d}]) ?degrees?\b", r"^\\circ "),
        (r"\\text\s*\{\s*(?:percent|pct|percentage)\s*\}|\s(?:percent(?:age)?|pct)\b|\\%", "%"),
        (r"\\(?:lbrace|rbrace)(?![A-Za-z])", lambda m: "\\{" if "l" in m[0][:3] else "\\}"),
        (r"\\(?:backslash|smallsetminus)(?![A-Za-z])", r"\\setminus "),
        (r"\\(?:lvert|rvert|vert|mid)(?![A-Za-z])", "|"),
        (r"\\begin\{(?:[bB]matrix|matrix|smallmatrix|array)\}(?:\{[clr|]+\})?", r"\\begin{pmatrix}"),
        (r"\\end\{(?:[bB]matrix|matrix|smallmatrix|array)\}", r"\\end{pmatrix}"),
        (r"[\[(]\s*(\\begin\{pmatrix\}[^()\[\]]*\\end\{pmatrix\})\s*[\])]", r"\1"),
        (r"\\(?:cr|hline)\s*(?=\\end|\\hline)|\\hline", ""),
        (rf"(?<![\\A-Za-z])(?:np\.|numpy\.|math\.)?({_FUNCTIONS})(?=[\s(^_\d{{]|$)", r"\\\1 "),
        (r"\\langle|\\lparen", "("),
        (r"\\rangle|\\rparen", ")"),
        (r"\\begin\{cases\}([^&]*)\\end\{cases\}", lambda m: m[1].replace("\\cr", ",")),
        (r"\\\{\s*\\\}|\\emptyset|\\varnothing|\\text\{ *(?i:the )?(?i:empty set|no (?:real )?solutions?) *\}", r"\\emptyset "),
        (r"(?<![\w.])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d+)(?!\w)", r"\1\\times 10^{\2}"),
        (r"(?<=\d)\s*(?:\\cdot|\*)\s*10\s*\^", r"\\times 10^"),
        (rf"((?<![\\A-Za-z])[A-Za-z]|\\(?:{_GREEK}))\s*_\s*(\{{[^{{}}]*\}}|\{{\\text\s*\{{[^{{}}]*\}}\s*\}}|\\[A-Za-z]+|\w)", lambda m: f"{m[1]}_{{{_plain(m[2])}}}"),
        (r"\s+", " "),
    )
]  # fmt: skip


def _plain(subscript: str) -> str:
    return re.sub(r"\\text|[\\{}\s]", "", subscript)


@functools.lru_cache(4096)
def normalize(answer: str) -> str:
    r"""An answer in one spelling: no `$`, `\left` or thin spaces, ASCII and LaTeX for unicode, `\frac{1}{2}` for `\frac12`."""
    if len(answer) > MAX_ANSWER:
        raise Unparsable
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ]+", lambda m: f"^{{{unicodedata.normalize('NFKC', m[0])}}}", answer)
    text = re.sub(r"[₀-₉]+", lambda m: f"_{{{unicodedata.normalize('NFKC', m[0])}}}", text)
    text = "".join(_ascii(c) if ord(c) > 127 else c for c in text)
    text = re.sub(r"\\\$ ?(\d[\d,.]*\d|\d)(?![\d.,{\\]| ?[a-z])", r"\1\\text{ dollars}", text)
    text = text.replace("\\$", "").replace("$", "").strip()
    text = re.sub(r"\\\\(?:\[[^\]]*\])?", r"\\cr ", text)  # or the second backslash would begin a command
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _brace_arguments(text)
    text = re.sub(r" ?([-+*/^_=<>(),;|{}\[\]&]) ?", r"\1", text)
    text = re.sub(r"(\\[A-Za-z]+) (?![A-Za-z])", r"\1", text).strip()
    text = re.sub(r"^(?:[=:]|\\approx)\s*|[.,;:\\\s]+$", "", text)
    # `\text{204 minutes}`, `\text{(B)}`: text around a value, not words
    if wrapped := re.fullmatch(r"\\text\{([^{}]*)\}", text):
        text = (
            wrapped[1].strip()
            if re.search(r"[^A-Za-z ]", wrapped[1]) or wrapped[1].casefold() in _NUMBER_WORDS
            else text
        )
    return text


def _ascii(char: str) -> str:
    if char in _UNICODE:
        return _UNICODE[char]
    name = unicodedata.name(char, "")
    if greek := re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER (\w+)", name):
        return (
            "\\"
            + (greek[2].lower() if greek[1] == "SMALL" else greek[2].capitalize()).replace("lamda", "lambda")
            + " "
        )
    if name.startswith("VULGAR FRACTION"):
        numerator, _, denominator = unicodedata.normalize("NFKC", char).partition("⁄")
        return f"\\frac{{{numerator}}}{{{denominator}}}"
    return "" if unicodedata.category(char) in ("Cf", "Mn") else unicodedata.normalize("NFKC", char)


def _brace_arguments(text: str) -> str:
    r"""`\frac12`, `\frac\pi 2`, `\sqrt2`, `\sqrt(x+1)` and `2^(x+1)` with braces around each argument."""
    out, position = [], 0
    for match in re.finditer(r"\\(frac|sqrt|binom)(\[[^\]]*\])?\s*|\^\s*(?=\()", text):
        if match.start() < position:
            continue  # inside an argument that was copied as a whole: it is done by the call below
        out.append(text[position : match.start()] + match[0].rstrip())
        position = match.end()
        for _ in range(2 if match[1] in ("frac", "binom") else 1):
            end = _argument_end(text, position)
            argument = text[position:end].strip()
            if argument[:1] == "{" or (argument[:1] == "(" and match[1] not in ("frac", "binom")):
                argument = argument[1:-1]
            out.append(f"{{{_brace_arguments(argument)}}}")
            position = end
    return "".join(out) + text[position:]


def _argument_end(text: str, start: int) -> int:
    """Where one LaTeX argument ends: a group in balanced brackets, a command or a single character."""
    if match := re.compile(r"\s*(\\[A-Za-z]+|\d(?=\d?(?!\d))|[^\s{(\\])").match(text, start):
        return match.end()
    depth = 0
    for match in re.compile(r"\\.|[{}()]", re.S).finditer(text, start):
        depth += {"{": 1, "(": 1, "}": -1, ")": -1}.get(match[0], 0)
        if depth <= 0:
            return match.end()
    raise Unparsable


# ---- numbers, words, units ----

_INTEGER = r"\d{1,3}(?:,\d{3})+|\d+"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\(?(?:(?:(?P<whole>{_INTEGER}) ?)?(?:\\frac\{{(?P<top>-?(?:{_INTEGER}))\}}\{{(?P<bottom>-?(?:{_INTEGER}))\}}|(?<![\d,])(?P<up>{_INTEGER})\.?/(?P<down>{_INTEGER}))"
    rf"|(?P<int>{_INTEGER})?(?P<dec>\.\d*)?(?:\\overline\{{(?P<rep>\d+)\}})?(?:\\times ?10\^(?:\{{(?P<exp>[+-]?\d{{1,3}})\}}|(?P<exp1>\d)))?"
    r"|10\^(?:\{(?P<power>[+-]?\d{1,3})\}|(?P<power1>\d)))\)?"
)
_WORDS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
_NUMBER_WORDS = {word: value for value, word in enumerate(_WORDS.split())}


def number(text: str) -> tuple[Fraction, bool] | None:
    r"""The exact value of `-3`, `1,234.5`, `\frac{1}{2}`, `3/4`, `3\frac{1}{7}`, `0.\overline{3}`, `4.5\times 10^{33}` or `ten`, and
    whether it was written as a decimal (and may be rounded); `None` for anything else."""
    if text.casefold() in _NUMBER_WORDS:
        return Fraction(_NUMBER_WORDS[text.casefold()]), False
    if (
        len(text) > 400
        or not (match := _NUMBER.fullmatch(text))
        or not re.search(r"\d", text)
        or text.count("(") != text.count(")")
    ):
        return None
    part = match.groupdict()
    top, bottom = part["top"] or part["up"], part["bottom"] or part["down"]
    if bottom:
        top, bottom = int(top.replace(",", "")), int(bottom.replace(",", ""))
        if bottom == 0:
            return None
        value = Fraction(top, bottom) + int((part["whole"] or "0").replace(",", ""))
    elif part["power"] or part["power1"]:
        value = Fraction(10) ** int(part["power"] or part["power1"])
    else:
        if part["int"] is None and part["dec"] in (None, "."):
            return None
        digits = (part["dec"] or ".")[1:]
        value = Fraction((part["int"] or "0").replace(",", "") + "." + (digits or "0"))
        if part["rep"]:
            if part["dec"] is None:
                return None
            value += Fraction(int(part["rep"]), 10 ** len(digits) * (10 ** len(part["rep"]) - 1))
        value *= Fraction(10) ** int(part["exp"] or part["exp1"] or 0)
    return (-value if part["sign"] == "-" else value), bool(part["dec"]) and not part["rep"]


def words(text: str) -> str | None:
    """The words of a text answer, for comparison; `None` for mathematics. Up to three bare letters are a product."""
    bare = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    if not re.fullmatch(r"[A-Za-z][A-Za-z'’.,!?\- ]*(?: ?\d{1,4}(?:st|nd|rd|th)?)?", bare.strip()):
        return None
    if bare == text and not re.search(r"[A-Za-z]{4}|[A-Za-z] [A-Za-z]+ |^(?i:yes|no|odd|two)$", text):
        return None
    return re.sub(r"^(?:the|an?)\b|[^a-z0-9]|s\b", "", bare.casefold().strip()) or None


# What is converted: (dimension, factor). Any other unit is a word that says what was counted, and is dropped.
_UNITS = {
    name: (dimension, Fraction(factor))
    for dimension, units in {
        "length": "mm .001 millimeter .001 cm .01 centimeter .01 m 1 meter 1 metre 1 km 1000 kilometer 1000 in .0254 inch .0254 inche .0254 "
        "ft .3048 foot .3048 feet .3048 yd .9144 yard .9144 mi 1609.344 mile 1609.344",
        "time": "s 1 sec 1 second 1 min 60 minute 60 h 3600 hr 3600 hour 3600 day 86400 week 604800",
        "mass": "mg .000001 g .001 gm .001 gram .001 kg 1 kilogram 1",
        "volume": "ml .001 milliliter .001 l 1 liter 1 litre 1",
        "money": "cent .01 dollar 1 usd 1",
    }.items()
    for name, factor in zip(units.split()[::2], units.split()[1::2], strict=True)
}  # fmt: skip
_UNIT = re.compile(
    r"(?P<value>.*?[\d)}a-z%])\s*(?:\\text\s*\{\s*(?P<text>[A-Za-z][^{}]*)\}|(?<=[\d})])\s*(?P<bare>[A-Za-z]{2,}(?:[ -][A-Za-z]+)*|(?<=\d )[A-Za-z]+(?: [A-Za-z]+)+))"
    r"(?:\^\{?(?P<power>-?\d)\}?)?\.?(?:/\\text\s*\{[^{}]*\})?"
)


def _split_unit(text: str) -> tuple[str, tuple[str, Fraction] | None]:
    """A value without its unit, and the unit's (dimension, factor) if it is one that can be converted."""
    if not re.search(r"[A-Za-z]{2}|\\text", text) or not (match := _UNIT.fullmatch(text)):
        return text, None
    name = (match["text"] or match["bare"]).strip().casefold().rstrip(".")
    if re.search(r"\b(?:or|and|base|if|for|when)\b", name) or (match["bare"] and not number(match["value"].strip())):
        return text, None
    power = int(match["power"] or 1)
    for word, value in (("square", 2), ("sq", 2), ("cubic", 3), ("cu", 3)):
        if found := re.fullmatch(rf"{word}\.? (.*)", name):
            name, power = found[1], value
    known = _UNITS.get(name) or _UNITS.get(name.removesuffix("s"))
    return match["value"].strip(), known and (f"{known[0]}^{power}", known[1] ** power)


# ---- structure: taken apart in the text, compared piece by piece ----

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


def _items(text: str) -> list[str]:
    r"""The elements of `1,2`, `1 and 2`, `x=1 or x=2`, `\{1,2\}` and `1\pm 2`; a single answer is a list of one."""
    text = re.sub(r"^[A-Za-z]\\in ?(?=[\[(\\])", "", text)
    if text.startswith("\\{") and text.endswith("\\}") and len(_split(text, r"(?!)")) == 1:
        text = text[2:-2]
    elif re.fullmatch(r"\{[^{}]+,[^{}]+\}", text):
        text = text[1:-1]
    if number(text):
        return [text]
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
                value = _split_unit(piece)[0].removesuffix("%").replace("^\\circ", "")
                if not (number(value) or words(value) or _choice(piece) or _time(piece) or _base(value)):
                    parse_latex(value, gold=True)

    def same(self, prediction: str, gold: str) -> bool:
        if prediction == gold:
            return True
        told, wanted = number(prediction), number(gold)
        if told and wanted:
            return self._close(told, wanted)
        golds, predictions = _items(gold), _items(prediction)
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
        named = [None not in n and len(set(n)) == len(n) > 1 for n in names]
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
        if len(golds) == 1 and (pair := _tuple(golds[0])) and len(pair[1]) == len(predictions):
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
        if wanted and not re.search(r"[=<>]|\\(?:le|ge|neq)\b", prediction):
            return self.same(prediction, wanted[2])
        sides = _split(prediction, "=")
        if (
            len(sides) > 1
            and not re.search(r"[<>]|\\(?:le|ge|neq)\b", gold + prediction)
            and len(_split(gold, "=")) == 1
        ):
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
        (told, told_unit), (wanted, wanted_unit) = _split_unit(prediction), _split_unit(gold)
        if told_unit and wanted_unit and told_unit != wanted_unit:
            if told_unit[0] != wanted_unit[0]:
                return False
            factor = told_unit[1] / wanted_unit[1]
            return self._same_value(f"\\frac{{{factor.numerator}}}{{{factor.denominator}}}({told})", wanted)
        if (told, wanted) != (prediction, gold):
            return self.same(told, wanted)
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
    bare = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).replace(" ", "")
    if match := re.fullmatch(r"(\d[\dA-F]*|[A-F][\dA-F]*\d[\dA-F]*|[A-F]{2,})(?:_\{?(?:base)?(\w+)\}?)?", bare):
        base = match[2] and (_NUMBER_WORDS.get(match[2]) or (int(match[2]) if match[2].isdecimal() else None))
        if base or match[2] is None:
            return match[1].lstrip("0"), base
    return None


# ---- mathematics ----


@functools.lru_cache(4096)
def _sympy(text: str):
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from math_verify.grader import should_treat_as_complex

    config = NormalizationConfig(basic_latex=True, units=False, malformed_operators=False, nits=False, boxed="none")
    text = re.sub(r"(?<![\\A-Za-z])E_", r"\\mathcal{E}_", text)  # not the base of the natural logarithm
    text = normalize_latex(re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).replace("\\cr", "\\\\"), config)
    try:
        return latex2sympy(
            text,
            is_real=not should_treat_as_complex(text),
            convert_degrees=False,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except Exception:  # ANTLR's and sympy's own, of many types: all say that this is no formula they know
        return None


def parse_latex(text: str, gold: bool = False):
    """A sympy object for all of `text`, never for a part of it; cached, since many samples share a gold answer."""
    parsed = _sympy(text)
    if parsed is None or (hasattr(parsed, "has") and parsed.has(*_undefined())):
        raise UnparsableGold if gold else Unparsable
    return parsed


def _undefined() -> tuple:
    import sympy

    return sympy.nan, sympy.zoo


def _same_expression(told, wanted, options: dict) -> bool:
    import sympy
    from math_verify import verify

    if told == wanted:
        return True
    if isinstance(told, sympy.Expr) and isinstance(wanted, sympy.Expr):
        same = _same_at_points(told, wanted, options["float_rounding"])
        if same is not None:
            return same
    relations = (sympy.Eq, sympy.Ne, sympy.Gt, sympy.Ge, sympy.Lt, sympy.Le)
    if isinstance(told, relations) and isinstance(wanted, relations) and _proportional(told, wanted):
        return True
    if verify(wanted, told, timeout_seconds=None, raise_on_error=True, **options):
        # two equations without solutions are the same to math-verify
        return not (isinstance(told, sympy.Eq) and isinstance(wanted, sympy.Eq)) or bool(
            sympy.solve(wanted, wanted.free_symbols)
        )
    inequalities = (sympy.Gt, sympy.Ge, sympy.Lt, sympy.Le, sympy.And, sympy.Or)
    if (
        isinstance(told, inequalities)
        and isinstance(wanted, inequalities)
        and told.free_symbols == wanted.free_symbols
        and len(told.free_symbols) == 1
    ):
        return told.as_set() == wanted.as_set()
    return False


def _points(*expressions):
    """Five substitutions for all symbols: some negative, whole numbers where `n` in `\\lfloor n/2\\rfloor` or `(-1)^n` must be whole."""
    import random

    import sympy

    symbols = sorted(set().union(*(e.free_symbols for e in expressions)), key=str)
    whole = any(
        e.has(sympy.floor, sympy.ceiling, sympy.Mod, sympy.factorial, sympy.binomial)
        or any(p.base.is_negative for p in e.atoms(sympy.Pow))
        for e in expressions
    )
    rng = random.Random(0)
    for low, start in ((0.3, 2), (1.1, 3), (0.1, 7), (-3.1, 10), (-1.7, 13)):
        yield {
            s: sympy.I
            if s.name == "i"
            else sympy.Integer(start + i)
            if whole
            else sympy.Float(low + 2 * rng.random(), 50)
            for i, s in enumerate(symbols)
        }


def _value(expression, values: dict):
    """A number of 40 digits, or `None` where there is none."""
    import sympy

    try:
        value = expression.xreplace(values).evalf(40, maxn=200)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError, NotImplementedError):
        return None
    return (
        value
        if value.is_number
        and value.is_finite
        and (value.is_Float or value.is_Rational or value.is_Add or value.is_Mul or value == sympy.I)
        else None
    )


def _same_at_points(told, wanted, places: int) -> bool | None:
    """Whether two expressions agree in value, at every point where both are real if they have symbols; `None`: cannot be told."""
    import sympy
    from math_verify.grader import unwrap_fcs

    told, wanted = unwrap_fcs(told), unwrap_fcs(wanted)
    unsure = any(
        e.has(sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative) for e in (told, wanted)
    )
    rounded = told.has(sympy.Float) or wanted.has(sympy.Float)
    symbols = told.free_symbols | wanted.free_symbols
    imaginary = any(s.name == "i" for s in symbols) or told.has(sympy.I) or wanted.has(sympy.I)
    agreed = 0
    for values in _points(told, wanted) if symbols else [{}]:
        a, b = _value(told, values), _value(wanted, values)
        if a is None or b is None or (symbols and not imaginary and not (a.is_real and b.is_real)):
            continue
        difference, size = (
            abs((a - b).evalf(40)),
            max(abs(a), abs(b)).evalf(40) if a.is_real and b.is_real else (abs(a) + abs(b)).evalf(40),
        )
        if rounded:
            near = difference * 2 * 10**places <= 1 and difference * 10 ** (places - 1) <= size
        else:
            near = difference <= size * sympy.Float("1e-25") or (symbols and difference <= sympy.Float("1e-30"))
        if not near:
            return None if unsure else False
        agreed += 1
    if not agreed or (symbols and agreed < 3):
        return None
    if not symbols and not rounded:
        told, wanted = told.doit(), wanted.doit()
        if told.is_Rational and wanted.is_Rational:
            return told == wanted  # 100! and 100!+1 agree in 40 digits
    return True


def _proportional(told, wanted) -> bool:
    """Whether one relation is a constant multiple of the other: then both say the same."""
    import sympy

    flip = {sympy.Gt: sympy.Lt, sympy.Ge: sympy.Le}
    sides = []
    for relation in (told, wanted):
        kind, difference = type(relation), relation.lhs - relation.rhs
        if kind in flip:
            kind, difference = flip[kind], -difference
        sides.append((kind, difference))
    (kind, a), (other, b) = sides
    if kind is not other or not all(isinstance(e, sympy.Expr) for e in (a, b)):
        return False
    ratios = []
    for values in _points(a, b):
        x, y = _value(a, values), _value(b, values)
        if x is None or y is None or not (x.is_real and y.is_real) or abs(y) < 1e-30 or abs(x) < 1e-30:
            continue
        ratios.append(x / y)
    if len(ratios) < 3 or any(abs(r - ratios[0]) > abs(ratios[0]) * sympy.Float("1e-20") for r in ratios):
        return False
    return kind in (sympy.Eq, sympy.Ne) or ratios[0] > 0
