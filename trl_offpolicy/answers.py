"""The text of an answer in one spelling, and what needs no algebra (numbers, words, units).

Nothing here reads mathematics: `math_grading.py` does, piece by piece.
"""

import functools
import re
import unicodedata
from fractions import Fraction

from .extraction import MAX_ANSWER, Unparsable


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
        (r"(?<=\\text\{)\s*-? ?\d(?: [\d.])+\s*(?=\})", lambda m: m[0].replace(" ", "")),  # bold digits, read by OCR
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
        (r"\b(?:np|numpy|math)\.(log)?", lambda m: "ln" if m[1] else ""),
        (rf"(?<![\\A-Za-z])({_FUNCTIONS})(?=[\s(^_\d{{]|$)", r"\\\1 "),
        (r"\\langle|\\lparen", "("),
        (r"\\rangle|\\rparen", ")"),
        (r"\\begin\{cases\}([^&]*)\\end\{cases\}", lambda m: m[1].replace("\\cr", ",")),
        (r"\\\{\s*\\\}|\\emptyset|\\varnothing|\\text\{ *(?i:the )?(?i:empty set|no (?:real )?solutions?) *\}", r"\\emptyset "),
        (r"(?<![\w.])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d+)(?!\w)", r"\1\\times 10^{\2}"),
        (r"(?<=\d)\s*(?:\\cdot|\*)\s*10\s*\^", r"\\times 10^"),
        (rf"((?<![\\A-Za-z])[A-Za-z]|\\(?:{_GREEK}))\s*_\s*(\{{[^{{}}]*\}}|\{{\\text\s*\{{[^{{}}]*\}}\s*\}}|\\[A-Za-z]+|\w)", lambda m: f"{m[1]}_{{{_plain(m[2])}}}"),
        (r"(?!^),?\s*(?:\\text\{[^{}]*\})?\s*\b[a-z]\s*\\in\s*\\mathbb\{[A-Z]\}$", ""),
        (r"\\\{\s*[a-z](?:\s*\\in\s*\\mathbb\{R\})?\s*[|:]([^{}|]*)\\\}", r"\1"),
        (r"^\\text\s*\{[^{}]*(?:\bis|\bare|:|=)\s*\}\s*(?=\S)|\s*\\text\s*\{\s*(?:for (?:all|every|any)|only)\b.*$", ""),
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
    text = re.sub(rf"\\\$ ?(\d[\d,.]*\d|\d)(?![\d.,{{\\]| ?[a-z]|{_SCALED})", r"\1\\text{ dollars}", text)
    text = text.replace("\\$", "").replace("$", "").strip()
    text = re.sub(r"\\\\(?:\[[^\]]*\])?", r"\\cr ", text)  # or the second backslash would begin a command
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _brace_arguments(text)
    text = re.sub(r" ?([-+*/^_=<>(),;|{}\[\]&]) ?", r"\1", text)
    text = re.sub(r"(\\[A-Za-z]+) (?![A-Za-z])", r"\1", text).replace(" \\", "\\").strip()
    text = re.sub(r"^(?:[=:]|\\approx)\s*|[.,;:\\\s]+$", "", text)
    # `\text{204 minutes}`, `\text{(B)}`: text around a value, not words
    if wrapped := re.fullmatch(r"\\text\{([^{}]*)\}", text):
        inner = wrapped[1].strip()
        return inner if re.search(r"[^A-Za-z ]", inner) or inner.casefold() in NUMBER_WORDS else text
    return text


def _ascii(char: str) -> str:
    if char in _UNICODE:
        return _UNICODE[char]
    name = unicodedata.name(char, "")
    if greek := re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER (\w+)", name):
        letter = greek[2].replace("LAMDA", "LAMBDA")
        return f"\\{letter.lower() if greek[1] == 'SMALL' else letter.capitalize()} "
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
NUMBER_WORDS = {word: value for value, word in enumerate(_WORDS.split())}
MAGNITUDES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALED = rf" ?\\text\s*\{{\s*(?:{'|'.join(MAGNITUDES)})\b"  # `\$5 \text{ million}`: no five dollars


def number(text: str) -> tuple[Fraction, bool] | None:
    r"""The exact value of `-3`, `1,234.5`, `\frac{1}{2}`, `3/4`, `3\frac{1}{7}`, `0.\overline{3}`, `4.5\times 10^{33}` or `ten`, and
    whether it was written as a decimal (and may be rounded); `None` for anything else."""
    if text.casefold() in NUMBER_WORDS:
        return Fraction(NUMBER_WORDS[text.casefold()]), False
    if len(text) > 400 or not (match := _NUMBER.fullmatch(text)) or text.count("(") != text.count(")"):
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


_MARKED = re.compile(r"\s*(?:\\text\w*\s*\{)?\s*\(?([A-J])(?:[.):]+(?=[\s}\\]|$)|\s*\}?\s*$)")


def canonical(answer: str) -> str:
    r"""One spelling of what letter, number, unit or words alone show to be equal: `42` for `42.0`, `x=42` and `$42$`, `B` for `(B) 12`.

    For counting votes, in this process and of any text: it neither parses mathematics nor raises.
    """
    if marked := _MARKED.match(answer):
        return marked[1]
    try:
        text, unit = split_unit(re.sub(r"^[A-Za-z]=(?!=)", "", normalize(answer)))
        value = number(text)
    except (Unparsable, RecursionError):
        return answer
    if value is None:
        return words(text) or text
    return f"{value[0] * unit[1]} {unit[0]}" if unit else str(value[0])


def words(text: str) -> str | None:
    """The words of a text answer, for comparison; `None` for mathematics. Up to three bare letters are a product."""
    bare = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    if not re.fullmatch(r"[A-Za-z][A-Za-z'’.,!?\- ]*(?: ?\d{1,4}(?:st|nd|rd|th)?)?", bare.strip()):
        return None
    if bare == text and not re.search(r"[A-Za-z]{4}|[A-Za-z] [A-Za-z]+ |^[A-Z][a-z]{2,} \d|^(?i:yes|no|odd)$", text):
        return None
    return re.sub(r"^(?:the|an?)\b|[^a-z0-9]|s\b|(?<=\d)(?:st|nd|rd|th)\b", "", bare.casefold().strip()) or None


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
    r"(?P<value>.*?[\d)}a-z%])\s*(?:\\text\s*\{\s*(?P<text>[A-Za-z][^{}]*)\}|(?<=[\d})])\s*(?P<bare>[A-Za-z]+/[A-Za-z]+|[A-Za-z]{2,}(?:[ -][A-Za-z]+)*))"
    r"(?:\^\{?(?P<power>-?\d)\}?)?\.?(?:/\\text\s*\{[^{}]*\})?"
)


def split_unit(text: str) -> tuple[str, tuple[str, Fraction] | None]:
    """A value (times the "million" behind it) without its unit, and the unit's (dimension, factor) if it can be converted."""
    if not re.search(r"[A-Za-z]{2}|\\text|[A-Za-z]/[A-Za-z]", text) or not (match := _UNIT.fullmatch(text)):
        return text, None
    value, name = match["value"].strip(), (match["text"] or match["bare"]).strip().casefold().rstrip(".")
    if scaled := re.fullmatch(rf"({'|'.join(MAGNITUDES)})s?(?: (.*))?", name):
        factor, known = MAGNITUDES[scaled[1]], number(value)
        value = str(known[0] * factor) if known else f"{factor}\\cdot({value})"
        return split_unit(f"{value}\\text{{ {scaled[2]}}}") if scaled[2] else (value, None)
    power = int(match["power"] or 1)
    for word, its_power in (("square", 2), ("sq", 2), ("cubic", 3), ("cu", 3)):
        if found := re.fullmatch(rf"{word}\.? (.*)", name):
            name, power = found[1], its_power
    known = [_UNITS.get(part) or _UNITS.get(part.removesuffix("s")) for part in name.split("/")]
    if re.search(r"\b(?:or|and|base|if|for|when)\b", name) or (
        match["bare"] and not (number(value) and (None not in known or re.search(r"^[^/]*[a-z]{4}[^/]*$|^mph$", name)))
    ):
        return text, None  # `2ab` is no number of `ab`
    if None in known or len(known) > 2:
        return value, None
    if len(known) == 2:  # `m/s^2`: the power is that of what it stands behind
        return value, (f"{known[0][0]}/{known[1][0]}^{power}", known[0][1] / known[1][1] ** power)
    return value, (f"{known[0][0]}^{power}", known[0][1] ** power)
