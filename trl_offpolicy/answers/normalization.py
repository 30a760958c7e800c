"""The text of an answer in one spelling, and what needs no algebra (numbers, words, units).

Nothing here reads mathematics: `math_grading.py` does, piece by piece.
"""

import functools
import re
import unicodedata
from fractions import Fraction

from .extraction import MAX_ANSWER, NUMBER_WORD, NUMBER_WORDS, Unparsable
from .qualifiers import changes


# ---- text, without what never changes its value ----

GREEK = (
    "hbar|alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|varphi|chi|psi|omega"
    "|Gamma|Delta|Theta|Lambda|Xi|Sigma|Phi|Psi|Omega|ell"
)
_UNICODE = {
    "−": "-", "–": "-", "—": "-", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "/", "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge ",
    "≠": "\\neq ", "°": "^\\circ ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "±": "\\pm ", "∅": "\\emptyset ", "ℝ": "\\mathbb{R}",
    "ℤ": "\\mathbb{Z}", "≈": "\\approx ", "≡": "\\equiv ", "√": "\\sqrt", "∛": "\\sqrt[3]", "…": "\\ldots", "⁄": "/", "∕": "/", "º": "^\\circ ", "˚": "^\\circ ", "¢": "\\text{ cents}", "∖": "\\setminus ", "⟨": "\\langle ", "⟩": "\\rangle ", "∣": "|",
}  # fmt: skip
_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp|sqrt|gcd|lcm|abs|floor|ceil"
_FONTS = "text|underline|textbf|textit|textrm|textnormal|textup|textsf|texttt|emph|mbox|hbox|mathrm|mathbf|mathit|mathsf|boldsymbol|bm|operatorname|operatorname\\*|rm|bf|it"
_FONT = re.compile(rf"\\(?:(?:{_FONTS})\s*(?=\{{)|(?:textcolor|color)\s*\{{[^{{}}]*\}}\s*)")
# Commands that mean the same as another, or only how it looks.
_SAME = {
    "\\frac": "dfrac tfrac cfrac", "<": "lt", ">": "gt", "\\le ": "leq leqq leqslant", "\\ge ": "geq geqq geqslant", "\\neq ": "ne", "\\{": "lbrace", "\\}": "rbrace",
    "(": "langle lparen", ")": "rangle rparen", "|": "lvert rvert vert mid", ":": "colon", "\\setminus ": "backslash smallsetminus", "\\emptyset ": "varnothing",
    "": "left right middle displaystyle textstyle limits big bigg bigl bigr bigm biggl biggr biggm Big Bigg Bigl Bigr Bigm Biggl Biggr Biggm large Large LARGE huge Huge mathopen mathclose checkmark",
}  # fmt: skip
_COMMANDS = {f"\\{name}": same for same, names in _SAME.items() for name in names.split()}
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[A-Za-z]+", lambda m: _COMMANDS.get(m[0], m[0])),
        (r"(?<=\d)(?:\\!)?(?:\\,|\{,\}|,\\!|\\ |~)(?:\\!)? ?(?=\d{3}(?!\d))", ","),
        (r"(?<=\d)\{([,:])\}(?=\d)", r"\1"),
        (r"^-?[1-9]\d{0,2}(?:\.\d{3}){2,}$", lambda m: m[0].replace(".", ",")),
        (r"^(?=.*(?:[<>]|\\[lg]e )).*\\(?:lor|vee|land|wedge)(?![A-Za-z]).*$", lambda m: _spoken_connectives(m)),
        (r"\^\s*(-\d+)", r"^{\1}"),
        (r"\bsq(?:\. ?| )", "square "),
        (r"\\frac\s*\{\s*\\text\s*\{([^{}]*)\}\s*\}\s*\{\s*\\text\s*\{([^{}]*)\}\s*(\^\s*\{?\d\}?)?\s*\}", r"\\text{ \1/\2}\3"),
        (r"\\(?:qquad|quad|hspace\{[^{}]*\}|[hv]?phantom\s*(?:\{[^{}]*\}|.)|[,;: !>])|~", " "),
        (r"^([+-]?\d{1,3}(?: \d{3})+)(?![\d/])", lambda m: m[1].replace(" ", ",")),
        (r"[<>!]=|\*\*", lambda m: {"<=": "\\le ", ">=": "\\ge ", "!=": "\\neq "}.get(m[0], "^")),
        (r"\\?(?<![A-Za-z])(?:infinity|infty|inf)(?![A-Za-z])", r"\\infty "),
        (r"\\(?:degree|deg)(?![A-Za-z])|\^\{?\\circ\}?|\\text\{\s*degrees?\s*\}|(?<=[\d}]) ?degrees?(?![A-Za-z])", r"^\\circ "),
        (r"\^\\circ\s*(?:\\text\s*\{\s*)?([CF])\b\s*\}?$", lambda m: r"\text{ " + {"C": "celsius", "F": "fahrenheit"}[m[1]] + "}"),
        (r"\\text\s*\{\s*(?:percent|pct|percentage)\s*\}|\s(?:percent(?:age)?|pct)\b|\\%", "%"),
        (r"\\(begin|end)\{(?:[bB]matrix|matrix|smallmatrix|array)\}(?:\{[clr|]+\})?", r"\\\1{pmatrix}"),
        (r"\b(?:np|numpy|math)\.(log)?", lambda m: "ln" if m[1] else ""),
        (rf"(?<![\\A-Za-z])({_FUNCTIONS})(?=[\s(^_\d{{\\]|$)", r"\\\1 "),
        (rf"(?<![\\A-Za-z])(pi|{GREEK})(?![A-Za-z])", r"\\\1 "),
        (r"\\begin\{cases\}([^&]*)\\end\{cases\}", lambda m: m[1].replace("\\cr", ", ")),
        (r"\\\{\s*\\\}|\\emptyset|(?i:\\text\{ *(?:the )?empty set *\}|(?:\\text\{ *|^)(?:there (?:is|are) )?no (?:real )?solutions?(?: exists?)?(?: *\}|$))", r"\\emptyset "),
        (r"^\\text\{ *(?i:all (?:real numbers|reals)) *\}$", r"\\mathbb{R}"),
        (r"(?<![\w.])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d+)(?!\w)", r"\1\\times 10^{\2}"),
        (r"(?<=\d)(?:\s*(?:\\cdot|\*)\s*| x )10\s*\^", r"\\times 10^"),
        (r"\\(?:hat|vec)\s*\{?(?:\\([ij])math|([ijk])(?![A-Za-z]))\}?", lambda m: f"\\hat{{{m[1] or m[2]}}}"),
        (r"\\mathbb\s*([A-Z])", r"\\mathbb{\1}"),
        (r"(\\equiv[^,;]*?)\\bmod(?![A-Za-z])", r"\1\\mod"),
        (r"(?<=\.)(\d*)(?:\((\d+)\)|\\(?:dot|bar)\s*(?:\{(\d+)\}|(\d))(?:(\d*)\\dot\s*\{?(\d)\}?)?)", lambda m: f"{m[1]}\\overline{{{''.join(filter(None, m.groups()[1:]))}}}"),
        (r"(?:\\text\s*\{\s*(?=\(mod [^(){}]*\)\s*\}))?\(\s*(?:\\text\s*\{\s*)?mod\s*\}?\s*([^()]*)\)(?:(?<=\w\))\s*\}$)?|\\pmod\s*(\d+)|(?<!b)(?<![A-Za-z{])\\?mod(?![A-Za-z])\s*\{?(\d+)\}?", lambda m: f"\\pmod{{{m[1] or m[2] or m[3]}}}"),
        (rf"((?<![\\A-Za-z])[A-Za-z]|\\(?:{GREEK}))\s*_\s*(\{{[^{{}}]*\}}|\{{\\text\s*\{{[^{{}}]*\}}\s*\}}|\\[A-Za-z]+|\w)", lambda m: f"{m[1]}_{{{_plain(m[2])}}}"),
        (r"(?!^),?\s*(?:\\text\{[^{}]*\})?\s*(?:\(\s*)?\b[a-z]\s*\\in\s*\\mathbb\{[A-Z]\}(?:\s*\))?$", ""),
        (r"\\\{\s*[a-z](?:\s*\\in\s*\\mathbb\{R\})?\s*[|:]((?:[^{}|]|\{[^{}]*\})*)\\\}", r"\1"),
        (r"^(\\text\s*\{\s*)?(?i:(?:the )?(?:final |correct )?answer(?: is\b|:| ?=) *)(?=[^\s}])", r"\1"),
        (r"^((?:(?!\\[lg]e |\\neq )[^<>=,;])*)(?:, ?|\s*\\text\s*\{[ ,]*(?:for|where|with|if|when)? *\} ?|\s*(?=\())\(?\s*([a-z])\s*\\neq [^,<>=]*$", lambda m: _domain(m)),
        (r"^\\text\s*\{(?! *[A-J]:)[^{}]*(?:\bis|\bare|:|=)\s*\}\s*(?=\S)|\s*\\text\s*\{\s*(?:for (?:all|every|any)|only)\b.*$", ""),
        (r"\s*\\text\s*\{\s*\((?:since|because|as|where|i\.e\.)\b.*\)\s*\}?$", ""),
        (rf"^(\\text\s*\{{ *)?\b((?i:{NUMBER_WORD})) (?=[a-z])", lambda m: f"{m[1] or ''}{NUMBER_WORDS[m[2].casefold()]} "),
        (r"(?<=\d) ?([个個只名位人条件张本元块次种枚円台](?:(?![不没错吗么吧呢万亿])[\u4e00-\u9fff]){0,4}|[개명원])$", r"\\text{ \1}"),
        (r"\s+", " "),
    )
]  # fmt: skip


def _spoken_connectives(match: re.Match) -> str:
    r"""`x<1 \lor x>2` in words; between formulas without a relation the signs are logic, and stay."""
    text = re.sub(r"\\(?:lor|vee)(?![A-Za-z])", r"\\text{ or }", match[0])
    return re.sub(r"\\(?:land|wedge)(?![A-Za-z])", r"\\text{ and }", text)


def _domain(match: re.Match) -> str:
    r"""`\frac{1}{x}, x\neq 0` without what it says of its own variable."""
    return match[1] if re.search(rf"(?<![A-Za-z\\]){match[2]}(?![A-Za-z])", match[1]) else match[0]


def _plain(subscript: str) -> str:
    return re.sub(r"\\text|[\\{}\s]", "", subscript)


@functools.lru_cache(4096)
def normalize(answer: str) -> str:
    r"""
    An answer in one spelling: no `$`, `\left` or thin spaces, ASCII and LaTeX for unicode, `\frac{1}{2}` for
    `\frac12`.

    Of the spaces only those behind a comma are kept: `12, 345` are two numbers, `12,345` may be one.
    """
    if len(answer) > MAX_ANSWER:
        raise Unparsable
    if answer.isascii() and answer.isdecimal():
        return answer
    text = re.sub(
        r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ]+|[₀-₉]+", lambda m: f"{'^_'[m[0] >= '₀']}{{{unicodedata.normalize('NFKC', m[0])}}}", answer
    )
    text = re.sub(r"([√∛])\s*(\d+(?:\.\d+)?)", r"\1{\2}", text)
    text = "".join(_ascii(c) if ord(c) > 127 else c for c in text)
    text = re.sub(r"\\\\(?:\[[^\]]*\])?", r"\\cr ", text)  # or the second backslash would begin a command
    text = _without_fonts(text)
    text = re.sub(r"^(?:\\text\s*\{)?\s*US\}?(?=\\\$)", "", text)
    text = re.sub(r"^(?:\\text\s*\{\s*)?(USD|EUR|GBP)\s*\}?\s*(\d(?:[\d,.]|\{,\}|\\,)*)$", r"\2\\text{ \1}", text)
    for sign, name in (("\\\\\\$", "dollars"), ("€", "EUR"), ("£", "GBP")):
        text = re.sub(rf"{sign} ?(\d[\d,.]*\d|\d)(?![\d.,{{\\]| ?[a-z]|{_SCALED})", rf"\1\\text{{ {name}}}", text)
    text = re.sub(r"(?<=\d) ?€", r"\\text{ EUR}", text)
    text = text.replace("\\$", "").replace("$", "").strip()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _brace_arguments(text)
    text = re.sub(r" ?([-+*/^_=<>():;|{}\[\]&]) ?", r"\1", text)
    text = re.sub(r" ?, ?(?=[,)}\]]|$)| (?=,)", lambda m: m[0].strip(), text)
    text = re.sub(r"(\\[A-Za-z]+) (?![A-Za-z])", r"\1", text).replace(" \\", "\\").replace(",\\", ", \\").strip()
    text = re.sub(r"^(?:[=:]|\\approx)\s*|(?:[.,;:\\\s]|\\cr)+$", "", text)
    # `\text{204 minutes}`, `\text{(B)}`, `\text{B}`: text around a value, not words
    if wrapped := re.fullmatch(r"\\text\{([^{}]*)\}", text):
        inner = wrapped[1].strip().rstrip(".")
        bare = (
            re.search(r"[^A-Za-z ]|^[A-Z](?: and [A-Z])+$", inner)
            or len(inner) == 1
            or inner.casefold() in NUMBER_WORDS
        )
        return inner if bare else f"\\text{{{inner}}}"
    return text


def _without_fonts(text: str) -> str:
    r"""
    `\text{…}` for words in any font; around a formula, `i` and `e` the command goes; unit vectors become `\hat{i}`.
    """
    out, position = [], 0
    while match := _FONT.search(text, position):
        out.append(text[position : match.start()])
        position = match.end()
        end = _argument_end(text, position)
        content, position = text[position + 1 : end - 1], end
        name = match[0].strip("\\ {")
        if re.fullmatch(rf"\s*(?:{_FUNCTIONS})\s*", content):
            out.append(f"\\{content.strip()} ")
        elif re.fullmatch(r"\s*[ie]\s*", content) and name in ("mathrm", "rm", "text"):
            out.append(content)
        elif re.fullmatch(r"\s*[ijk]\s*", content) and name in ("mathbf", "boldsymbol", "bm", "bf"):
            out.append(f"\\hat{{{content.strip()}}}")
        elif not any(map(str.isalpha, content)) or "color" in name or re.search(r"[\\^_{]", content):
            out.append(_without_fonts(content))
        else:
            out.append(f"\\text{{{content}}}")
    return "".join(out) + text[position:]


def _ascii(char: str) -> str:
    if char in _UNICODE:
        return _UNICODE[char]
    name = unicodedata.name(char, "")
    if name.startswith("GREEK "):
        letter = name.split()[-1].replace("LAMDA", "LAMBDA")
        return f"\\{letter.lower() if 'SMALL' in name else letter.capitalize()} "
    if name.startswith("VULGAR FRACTION"):
        numerator, _, denominator = unicodedata.normalize("NFKC", char).partition("⁄")
        return f"\\frac{{{numerator}}}{{{denominator}}}"
    return "" if unicodedata.category(char) in ("Cf", "Mn") else unicodedata.normalize("NFKC", char)


_BARS = {"abs": ("|", "|"), "floor": ("\\lfloor ", "\\rfloor "), "ceil": ("\\lceil ", "\\rceil ")}


def _brace_arguments(text: str) -> str:
    r"""
    `\frac12`, `\frac\pi 2`, `\sqrt2`, `\sqrt(x+1)` and `2^(x+1)` with braces around each argument; `\abs(x)` as `|x|`.
    """
    out, position = [], 0
    for match in re.finditer(r"\\(frac|sqrt|binom|abs|floor|ceil)(?![A-Za-z])(\[[^\]]*\])?\s*|\^\s*(?=\()", text):
        if match.start() < position:
            continue  # inside an argument that was copied as a whole: it is done by the call below
        left, right = _BARS.get(match[1], (match[0].rstrip() + "{", "}"))
        out.append(text[position : match.start()])
        position = match.end()
        for index in range(2 if match[1] in ("frac", "binom") else 1):
            end = _argument_end(text, position)
            argument = text[position:end].strip()
            if argument[:1] == "{" or (argument[:1] == "(" and match[1] not in ("frac", "binom")):
                argument = argument[1:-1]
            out.append(f"{'{' if index else left}{_brace_arguments(argument)}{right}")
            position = end
    return "".join(out) + text[position:]


def _argument_end(text: str, start: int) -> int:
    """Where one LaTeX argument ends: a group in balanced brackets, a command or a single character."""
    if match := re.compile(r"\s*(\\[A-Za-z]+|\d(?=\d?(?!\d))|[^\s{(\\])").match(text, start):
        return match.end()
    depth, opened = 0, text[start:].lstrip()[:1]
    for match in re.compile(r"\\.|[{}]" if opened == "{" else r"\\.|[{}()]", re.S).finditer(text, start):
        depth += {"{": 1, "(": 1, "}": -1, ")": -1}.get(match[0], 0)
        if depth <= 0:
            return match.end()
    raise Unparsable


# ---- numbers, words, units ----

_INTEGER = r"[1-9]\d{0,2}(?:,\d{3})+|\d+"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\(?(?:(?:(?P<whole>{_INTEGER}) ?)?(?:\\frac\{{(?P<top>-?(?:{_INTEGER}))\}}\{{(?P<bottom>-?(?:{_INTEGER}))\}}|(?<![\d,])(?P<up>{_INTEGER})\.?/(?P<down>{_INTEGER}))"
    rf"|(?P<int>{_INTEGER})?(?:(?P<dec>\.\d*)(?:\\overline\{{(?P<rep>\d+)\}})?)?(?:(?(int)\\times ?|(?(dec)\\times ?))10\^(?P<exp>\{{[+-]?\d{{1,3}}\}}|\d))?)\)?"
)
MAGNITUDES = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "lakh": 10**5, "million": 10**6, "crore": 10**7, "billion": 10**9, "trillion": 10**12,
}  # fmt: skip
MAGNITUDE = rf"({'|'.join(MAGNITUDES)})s?\b"
_SCALED = rf" ?\\text\s*\{{\s*(?:{'|'.join(MAGNITUDES)})\b"  # `\$5 \text{ million}`: no five dollars


def number(text: str) -> tuple[Fraction, bool] | None:
    r"""
    The exact value of `-3`, `1,234.5`, `\frac{1}{2}`, `3/4`, `3\frac{1}{7}`, `0.\overline{3}`, `4.5\times 10^{33}` or
    `ten`, and whether it was written as a decimal (and may be rounded); `None` for anything else."""
    if text.isascii() and text.isdecimal() and len(text) <= 400:
        return Fraction(int(text)), False
    if text.casefold() in NUMBER_WORDS:
        return Fraction(NUMBER_WORDS[text.casefold()]), False
    if len(text) > 400 or not (match := _NUMBER.fullmatch(text)) or text.count("(") != text.count(")"):
        return None
    if "(" in text and "," in text:
        return None  # `(2,345)` is a pair
    part = {name: (text or "").replace(",", "") for name, text in match.groupdict().items()}
    if bottom := part["bottom"] or part["down"]:
        if int(bottom) == 0:
            return None
        value = Fraction(int(part["top"] or part["up"]), int(bottom)) + int(part["whole"] or 0)
    else:
        digits = part["dec"][1:]
        if not (part["int"] or digits or part["rep"] or part["exp"]):
            return None
        value = Fraction(f"{part['int']}.{digits}0") if part["int"] or part["dec"] else Fraction(1)
        if part["rep"]:
            value += Fraction(int(part["rep"]), 10 ** len(digits) * (10 ** len(part["rep"]) - 1))
        value *= Fraction(10) ** int(part["exp"].strip("{}") or 0)
    return (-value if part["sign"] == "-" else value), bool(part["dec"]) and not part["rep"]


MAX_VOTE = 300  # characters; what is behind grows with their square, and faster
_MARKED = re.compile(r"\s*(?:\\text\w*\s*\{)?\s*\(?([A-J])(?:[.):]+(?=[\s}\\]|$)|\s*\}?\s*$)")


def canonical(answer: str) -> str:
    r"""
    One spelling of what letter, number, unit or words alone show to be equal: `42` for `42.0`, `x=42` and `$42$`, `B`
    for `(B) 12`.

    For counting votes, in this process and of any text: it neither parses mathematics nor raises, and what is too long
    to be read in no time stays as it is, but for its white space.
    """
    answer = re.sub(r"\s+|~~+", " ", answer).strip()
    if len(answer) > MAX_VOTE:
        return answer
    if marked := _MARKED.match(answer):
        return marked[1]
    try:
        text, unit = split_unit(re.sub(r"^[A-Za-z]=(?!=)", "", normalize(answer)))
        value = number(text)
    except (Unparsable, RecursionError):
        return answer
    if value is None:
        return words(text) or text
    return f"{value[0] * unit[0]} {unit[1]}" if isinstance(unit, tuple) else str(value[0])


DATE = re.compile(
    r"(?:(?P<before>\d{1,2})(?:st|nd|rd|th)? (?:of )?)?(?P<month>Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*\.?"
    r"(?(before)| ?(?P<day>\d{1,2})(?:st|nd|rd|th)?)(?:,? (?P<year>\d{4}))?"
)
# `2015-03-01`, and `3/1/2015`, of which nobody knows whether it is in March.
_DIGIT_DATE = re.compile(r"(?P<year>\d{4})-(?P<month>0?[1-9]|1[0-2])-(?P<day>\d{1,2})|\d{1,2}/\d{1,2}/\d{4}")
_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]


def words(text: str) -> str | None:
    """
    The words of a text answer, for comparison; `None` for mathematics. Up to three bare small letters are a product.
    """
    bare = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).strip()
    if date := _DIGIT_DATE.fullmatch(bare):
        if not date["year"]:
            return "/".join(str(int(part)) for part in bare.split("/"))
        return f"{_MONTHS[int(date['month']) - 1]}{int(date['day'])}{date['year']}"
    if not re.fullmatch(r"[A-Za-z][A-Za-z'’.,!?\- ]*(?: ?\d{1,4}(?:st|nd|rd|th)?)?", bare) and not DATE.fullmatch(
        bare
    ):
        return None
    if (
        bare == text
        and not DATE.fullmatch(bare)
        and not re.search(
            r"[A-Za-z]{4}|[A-Za-z] [A-Za-z]+ |^[A-Z]{2,}$|^[A-Z][a-z]{2,}(?: \d|$)|^(?i:yes|no|odd)$", text
        )
    ):
        return None
    if re.fullmatch(r"(?i:DNE|does ?(?:not|n['’]t) exist)\.?", bare):
        return "doesnotexist"
    if date := DATE.fullmatch(bare):
        return date["month"].casefold() + str(int(date["day"] or date["before"])) + (date["year"] or "")
    reduced = re.sub(r"^(?:the|an?)\b|[^a-z0-9]|(?<=[a-z]{3})s\b|(?<=\d)(?:st|nd|rd|th)\b", "", bare.casefold())
    return reduced or None


# ---- units ----

# Names of a unit and what it is, in units further up; the first line of each dimension has none.
_DEFINITIONS = """
m meter metre; s sec second; g gm gram; A amp ampere; K kelvin; mol mole; dollar usd; eur euro; gbp; celsius; fahrenheit; bit
radian rad; cd candela; in inch inche = .0254 m; ft foot feet = 12 in; yd yard = 3 ft; mi mile = 1609.344 m; min minute = 60 s
h hr hour = 60 min; day = 24 h; week wk = 7 day; year yr = 365.25 day; month mo = 1/12 year; l L liter litre = .001 m^3; cc = .001 l
t tonne = 1000000 g; lb lbs pound = 453.59237 g; oz ounce = 1/16 lb; cent = .01 dollar; Hz hertz = 1 s^-1; N newton = 1000 g m/s^2
J joule = 1 N m; W watt = 1 J/s; Pa pascal = 1 N/m^2; C coulomb = 1 A s; V volt = 1 W/A; ohm Ohm = 1 V/A; F farad = 1 C/V
T tesla = 1 N/A m; H henry = 1 V s/A; eV = .0000000000000000001602176634 J; cal calorie = 4.184 J; bar = 100000 Pa; atm = 101325 Pa
mph = 1 mi/h; kph kmh = 1000 m/h; knot = 1852 m/h; angstrom = .0000000001 m; acre = 4840 yd^2; ha hectare = 10000 m^2
gallon gal = 231 in^3; quart = 1/4 gallon; pint = 1/8 gallon; byte = 8 bit
"""
_LONG = ["kilo", "centi", "milli", "micro", "nano", "pico", "mega", "giga", "deci"]
_PREFIXES = dict(zip([*"kcmunpMGd", *_LONG], (3, -2, -3, -6, -9, -12, 6, 9, -1) * 2, strict=True))
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_FACTOR = re.compile(
    r"\s*(?P<below>/|per )?\s*(?:(?P<before>square|sq|cubic|cu) )?(?P<name>[A-Za-z]+)(?:\^?(?P<power>-?\d+)| (?P<behind>squared|cubed))?"
)
_units: dict[str, tuple[Fraction, dict[str, int]]] = {}


def _unit(name: str) -> tuple[Fraction, dict[str, int]] | None:
    """(factor, exponents of the base units) of one name: as it is, as a plural, in small letters, with a prefix."""
    small = name if len(name) == 1 else name.casefold()  # M is no metre
    for known in dict.fromkeys((name, name.removesuffix("s"), small, small.removesuffix("s"))):
        if known in _units:
            return _units[known]
        for prefix, power in _PREFIXES.items():
            stem = known.removeprefix(prefix)
            if stem != known and stem in _units and stem not in ("min", "in", "day", "ft"):
                factor, dimension = _units[stem]
                return factor * Fraction(10) ** power, dimension
    return None


def unit(text: str) -> tuple[Fraction, dict[str, int]] | None:
    """
    (factor, exponents of the base units) of `km/h`, `kg m^2`, `square feet` or `meters per second squared`; `None` if
    not known.
    """
    text = re.sub(r"\\cdot|[*.(){} ]+|\\times|-(?!\d)", " ", re.sub(r"\\mu ?", "u", text))
    text = text.replace(" ^", "^").replace("^ ", "^").strip()
    factor, total, position, sign = Fraction(1), {}, 0, 1
    while position < len(text):
        match = _FACTOR.match(text, position)
        if not match or not (known := _unit(match["name"])):
            return None
        position, sign = match.end(), -1 if match["below"] else sign
        power = sign * _POWERS.get(match["before"] or match["behind"], int(match["power"] or 1))
        factor *= known[0] ** power
        for base, times in known[1].items():
            total[base] = total.get(base, 0) + times * power
    return (factor, {base: times for base, times in sorted(total.items()) if times}) if total else None


for _definition in re.split(r"[;\n]+", _DEFINITIONS.strip()):
    _names, _, _meaning = _definition.partition(" = ")
    _number, _, _of = _meaning.partition(" ")
    _known = unit(_of) if _of else None
    _first = _names.split()[0]
    for _name in _names.split():
        _units[_name] = (Fraction(_number) * _known[0], _known[1]) if _known else (Fraction(1), {_first: 1})

# Words that make another value of the number before them: fractions, powers, comparisons, conditions, multiples.
_CHANGES = re.compile(
    rf"\b(?:{NUMBER_WORD}|half|halve|halves|thirds?|quarters?|\w{{3,}}ths?|squared|cubed|factorial|or|and|if|for|when|where|unless|not|except|less|more|than|fewer|over|under"
    r"|above|below|at|least|most|to|from|times?|score|plus|minus|divided|multiplied|raised|doubled|tripled|halved|increased|decreased|reduced|base|modulo|mod|log|ln|sin|cos|tan|exp|sqrt|pi|cis|root|fail\w*|invalid|impossible|extraneous|rejected|excluded|wrong|incorrect|hundreds?|tens|is|are|pairwise|each other"
    r"|dozens?|thousands?|millions?|billions?|trillions?)\b|[^\w\u0900-\u0dff '’-]|[\d_]",
    re.I,
)
_SUFFIX = re.compile(r"(?:\\text\s*\{[^{}]*\}|\^\{-?\d\}|\^-?\d|/|\\cdot ?| )+$")
# Nothing is given back once it is matched: else each of many words could be cut in every way.
_BARE = re.compile(r"(.*?(?:[\d)}]|\\pi))( ?)([A-Za-z]++(?:[ /*^-]*+(?:[A-Za-z]++|\^?\{?-?\d\}?))*+)\.?")


def split_unit(text: str) -> tuple[str, tuple[Fraction, dict[str, int]] | str | None]:
    """
    A value (times the "million" behind it) and its unit: (factor, base units), or the word for what was counted, or
    `None`.

    Nothing is dropped that could change the value: `7\\text{ tenths}` and `5\\text{x}` come back as they are.
    """
    if not re.search(r"[A-Za-z]", text):
        return text, None
    found = re.search(r"\\text\s*\{", text)
    if found and (value := text[: found.start()].strip()) and _SUFFIX.match(text, found.start()):
        name = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text[found.start() :]).strip()
    elif (bare := _BARE.fullmatch(text)) and number(bare[1].replace("\\pi", "")):
        value, name = bare[1], bare[3]
        known = unit(name)
        # `12 m` may be a product, `12m` is one: one letter needs a space and a gold answer that says so
        if (
            re.match(r"[CP]\d", name)
            or not re.match(MAGNITUDE, name)
            and (len(name) == 1 or (not known and not re.fullmatch(r"[a-z]{4,}(?:[ -][a-z]+)*", name)))
        ):
            return text, None
    else:
        return text, None
    if scaled := re.fullmatch(rf"{MAGNITUDE}(?:[ ](.*))?", name):
        factor, plain = MAGNITUDES[scaled[1]], number(value)
        value = str(plain[0] * factor) if plain else f"{factor}\\cdot({value})"
        return split_unit(f"{value}\\text{{ {scaled[2]}}}") if scaled[2] else (value, None)
    if known := unit(name):
        return value, known
    noun = re.sub(r"(?<=units) *\^\{?\d\}?$", "", name).strip(" .")
    short = len(noun) < 3 and noun.isascii()  # one letter of another script may count things
    return (text, None) if short or _CHANGES.search(noun) or changes(noun) else (value, noun)
