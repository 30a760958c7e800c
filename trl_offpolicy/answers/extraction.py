r"""
What a completion states as its answer: the first half of a verdict. `docs/how_an_answer_is_read.md` has the rules with
examples.

    stated_answer("We add.\n\n**Answer:** $x = 5$ cm").text   # "x = 5\\text{ cm}"

1. [`visible`] takes away the thinking, the tokens of the chat template and blocks of program code.
2. [`segments`] finds the mathematics of every delimiter, as whole spans, and the Markdown around the words.
3. [`statements`] lists whatever states an answer, and [`stated_answer`] chooses among them by `ORDER`.

A statement is read whole: nothing here picks a number out of a formula, and what cannot be read as one answer raises
[`Unparsable`] with the reason. All of it takes time in proportion to the text: no pattern has a repetition within a
repetition over the same characters.
"""

import itertools
import re
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, replace

from .qualifiers import CONTRAST, CORRECTION, DOUBTS, MINUS, RETRACTS, SETTLES, stands


NO_ANSWER = "the completion states no answer that can be parsed"
MAX_ANSWER = 5000  # characters; what is longer is no final answer
MAX_SENTENCE = 1000  # characters in which the end of a value is looked for
MAX_STATEMENTS = 100  # of one completion: what says more often what its answer is states none

# The kinds of statements; an earlier one outranks a later one.
ORDER = (
    "tag",  # <answer>10</answer>
    "box",  # \boxed{10}
    "mark",  # a line `#### 10`
    "final",  # The final answer is 10.
    "answer",  # Answer: 10
    "result",  # The result is 10.
    "sentence",  # Therefore, there are 10 pairs.
)


class Unparsable(Exception):
    """An answer that cannot be read, so that nothing can be said about it; its text says why."""


@dataclass(frozen=True, slots=True)
class Statement:
    """An answer that a completion states."""

    text: str  # what it states: LaTeX with words in \text{} where it has mathematics in it, else as it was written
    kind: str  # one of ORDER
    start: int  # where its value is in the visible text, and where that ends
    end: int
    # What equal statements say elsewhere in other letters: a contradiction, unless they mean the same.
    others: tuple[str, ...] = ()


# ---- 1. what is visible ----

_THOUGHT = "(?:think|thinking|thoughts?|reasoning|reflection|scratchpad|seed:think)>"
_THINKING = re.compile(
    rf"(?P<open><{_THOUGHT}|\[THINK\]|<\|begin_of_thought\|>"
    r"|<\|START_THINKING\|>|◁think▷|<\|channel\|>(?:analysis|commentary)<\|message\|>)"
    rf"|</{_THOUGHT}|\[/THINK\]|<\|end_of_thought\|>"
    r"|<\|END_THINKING\|>|◁/think▷|(?:<\|channel\|>|assistant)final(?:<\|message\|>)?|<\|begin_of_solution\|>",
    re.I,
)
_SPECIAL = re.compile(
    r"<[|/A-Za-z｜]|INST\]|THINK\]|◁|assistantfinal"
)  # what all of these begin with, or have in them
_TOKEN = re.compile(
    r"<\|[\w/ ]{1,40}\|>|<｜[^｜<>\n]{1,40}｜>|</?s>|<(?:bos|eos|pad|end_of_turn|start_of_turn)>|\[/?INST\]"
)
_PROGRAM = re.compile(
    r"^[ \t]*```[ \t]*(?:python|py|tool_code|output|bash|sh|c|cpp|c\+\+|java|javascript|js|sql|r|rust|go|sympy|matlab|julia)\b[^\n]*\n.*?(?:^[ \t]*```|\Z)",
    re.S | re.M | re.I,
)


def without_thinking(completion: str) -> str:
    """What comes behind the last thinking; `Unparsable` where it never ends."""
    if not _SPECIAL.search(completion):
        return completion  # many times as fast
    thinking = next(iter(deque(_THINKING.finditer(completion), maxlen=1)), None)
    if thinking and thinking["open"]:
        raise Unparsable(f"{NO_ANSWER}: it ends while it thinks")
    return completion[thinking.end() :] if thinking else completion


def visible(completion: str) -> str:
    """What a reader of the answer sees: no thinking, one turn, no special tokens, no program code."""
    text = without_thinking(completion)
    for turn in _TOKEN.split(text) if _SPECIAL.search(text) else [text]:
        turn = re.sub(r"\A\s*(?:assistant|model)\s*\n", "", turn)
        if turn.strip():
            return _PROGRAM.sub("\n", turn) if "```" in turn else turn
    raise Unparsable(NO_ANSWER if text == completion else f"{NO_ANSWER}: nothing follows its thinking")


# ---- 2. segments ----

_FORMULAS = r"(?:equation|align|gather|multline|displaymath|math)\*?"
_ARRAYS = r"(?:[pbvBV]?matrix|smallmatrix|cases|array|aligned)"
_ENVIRONMENT = f"{_FORMULAS}|{_ARRAYS}"
_DELIMITER = re.compile(
    rf"\\\\|\\\$|(?P<open>\$\$|\$|\\\[|\\\(|\\begin\{{(?P<begin>{_ENVIRONMENT})\}})|(?P<close>\\\]|\\\)|\\end\{{(?:{_ENVIRONMENT})\}})"
)
_CLOSES = {"$$": "$$", "$": "$", "\\[": "\\]", "\\(": "\\)"}
_MATH, _MARK = "\ue000", "\ue001"  # what stands for a character of mathematics, and of Markdown
_LINE_MARKUP = re.compile(r"\n([ \t]*(?:```[^\n]*|>[> \t]*))")
_MARKUP = re.compile(
    r"`|</?(?:b|strong|i|em|u|p|br|div|span|center|h[1-6])\b[^<>\n]{0,80}>|[✓✔✅☑🎉🎯📝🔹🔷🟢👉➡️]",
    re.I,
)
_EMPHASIS = {
    "*": re.compile(r"(?<![A-Za-z0-9*)}\]])(\*{1,3})(?=[^\s*])([^\n*]*)(\*{1,3})(?![A-Za-z0-9*(])"),
    "_": re.compile(r"(?<![\w\\])(__?)(?=[^\s_])([^\n_]*)(__?)(?!\w)"),
}


@dataclass(frozen=True, slots=True)
class Segments:
    """
    A text, the same text with mathematics and Markdown covered, and where the mathematics is: (start, end, content).
    """

    text: str
    covered: str
    spans: list[tuple[int, int, str]]


def segments(text: str) -> Segments:
    """
    Mathematics as whole spans (`$…$` within a line, `$$…$$`, `\\(…\\)`, `\\[…\\]`, environments), emphasis, code
    marks, quotes.
    """
    text = text.replace(_MATH, " ").replace(_MARK, " ")
    found = [m for m in _DELIMITER.finditer(text) if m.lastgroup] if "$" in text or "\\" in text else []
    places: dict[str, list[int]] = {}
    for index, match in enumerate(found):
        places.setdefault(match[0], []).append(index)
    spans, end = [], 0
    for index, match in enumerate(found):
        if not match["open"] or match.start() < end:
            continue
        closes = _CLOSES.get(match[0], f"\\end{{{match['begin']}}}")
        later = places.get(closes, [])
        if (at := bisect_left(later, index + 1)) == len(later):
            continue
        close = found[later[at]]
        if match[0] == "$" and not _inline(text, match.end(), close.start()):
            continue
        array = match["begin"] and re.fullmatch(_ARRAYS, match["begin"])  # which is a part of its own content
        content = text[match.start() : close.end()] if array else text[match.end() : close.start()]
        spans.append((match.start(), close.end(), content.strip()))
        end = close.end()
    return Segments(text, _cover(text, spans), spans)


def _inline(text: str, start: int, end: int) -> bool:
    """
    Whether what is between two dollar signs is mathematics: all in one line, and not `$5 and each child $`, `$5 or
    $6`.
    """
    if text.find("\n", start, end) >= 0:
        return False
    content = text[start:end]
    money = re.match(r"\d[\d,.]*(?: [A-Za-z]{2,}){2}|\d.*\s\Z", content)
    return bool(content.strip()) and not money and not text[end + 1 : end + 2].isdigit()


def _cover(text: str, spans: list[tuple[int, int, str]]) -> str:
    pieces, at = [], 0
    for start, end, _ in spans:
        pieces += [text[at:start], _MATH * (end - start)]
        at = end
    covered = "".join(["\n", *pieces, text[at:]])
    covered = _LINE_MARKUP.sub(lambda m: "\n" + _MARK * len(m[1]), covered)[1:]
    covered = _MARKUP.sub(lambda m: _MARK * len(m[0]), covered)
    for sign, pattern in _EMPHASIS.items():
        if sign in covered:
            covered = pattern.sub(lambda m: _MARK * len(m[1]) + m[2] + _MARK * len(m[3]), covered)
    return covered


# ---- 3. statements ----


def _called(latin: str, other: str) -> str:
    """Any of these words; what has no spaces between words needs no end of a word."""
    return rf"(?:\b(?:{latin.replace(' ', '|').replace('_', ' ')})\b|(?=[^\x00-\u0dff])(?:{other.replace(' ', '|')}))"


# What is called an answer, and what a result, in the languages that models answer in; words that say "final", and
# "is".
_ANSWER = _called(
    "answers? ans réponses? antwort(?:en)? respuestas? risposta resposta antwoord odpowiedź odpověď svar(?:et)? vastaus válasz răspuns(?:ul)?"
    " cevap yanıt đáp_án đáp_số câu_trả_lời jawaban(?:nya)? ответ відповідь отговор απάντηση الجواب الإجابة پاسخ جواب תשובה उत्तर উত্তর",
    "答案 答え 解答 正解 答 정답 답 คำตอบ",
)
_RESULT = _called(
    "solutions? results? option choice résultat ergebnis lösung(?:en)? resultado solución risultato soluzione solução wynik sonuç kết_quả hasil результат",
    "结果 結果 결과 选 選",
)
_FINAL = r"(?:\b(?:final|finale|endgültige|окончательный|итоговый|ostateczna|nihai|slutligt?)\b|最终|最終|最后|최종)"
_AFTER_IT = r"(?:finale?|cuối cùng|akhir|النهائية|نهائي)"
_SAYS_FINAL = re.compile(f"{_FINAL}|{_AFTER_IT}", re.I)
_IS = (
    r"\b(?:is|are|was|(?:would|will|must|should) be|equals|becomes|comes (?:out )?to|(?:n['’])?(?:est|sont)|lautet|lauten|ist|sind|(?:no |non |não )?(?:es|son|è|é|são)|luidt|wynosi|to|là|adalah|är|er"
    r"|on|je|este|равен|равна|равно|не)\b|不?是|为|為|等于|は|은|는|هو|هي|है"
)
_SPACE = rf"[ \t{_MARK}]"


_HEADING = re.compile(  # announces an answer
    rf"^[ \t\\#*{_MARK}]*(?:\\(?:sub)*section\*?\{{)?(?:(?:step )?\d+[.):] *)?(?:the )?(?:(?P<final>{_FINAL}{_SPACE}*(?:{_ANSWER}|{_RESULT})|{_ANSWER} {_AFTER_IT})"
    rf"|(?P<answer>{_ANSWER})|conclusion|结论|結論|결론)[ \t:：}}*{_MARK}]*(?:$|(?={_MATH}))",
    re.I | re.M,
)
_PHRASE = re.compile(  # states one
    rf"(?:(?P<answer>{_ANSWER})|{_RESULT}|^A(?=:))(?P<final>{_SPACE}{_AFTER_IT})?"
    rf"(?:{_SPACE}*\([^()\n]{{0,40}}\)| (?:to|for|of|in|from|we)\b[^.!?:;,\n{_MATH}]{{0,60}}?)?\}}?"
    rf"{_SPACE}*(?:[:：=＝→⇒—–]+|=>|->|-(?= )|{_IS}){_SPACE}*\}}?",
    re.I | re.M,
)
_CALLED_FINAL = re.compile(rf"{_FINAL}{_SPACE}*(?:correct{_SPACE})?\Z", re.I)
_LINE_MARK = re.compile(r"^[ \t]*####[ \t]*(?P<value>\S[^\n]*)$", re.M)

# What may stand between "is" and the value, and says nothing.
_FILLER = re.compile(
    rf"(?:[\s{_MARK}:：=≈\"“”'>，,]|\*(?!\d)|(?:(?:therefore|thus|hence|so|then|finally|simply|just|exactly|precisely|only|definitely|clearly|indeed|still|also|now|currently|already|equal to|given by"
    r"|found to be|for sure|certainly|surely|obviously|that|as follows|in conclusion|we (?:get|find|have|see|conclude|obtain)|it follows|us|a total of|the (?:number|value|integer|fraction|point|interval|set"
    r"|expression|choice|option|letter|answer)(?=\s*[\d\\$({\[\ue000])|option|choice|approximately|about|roughly|around|nearly)(?![A-Za-z])|因此|所以|故|综上(?:所述)?))*",
    re.I,
)
_APPROXIMATE = re.compile(r"\b(?:approximately|about|roughly|around|nearly)\b|≈", re.I)
# What no answer begins with: "the answer is correct", "is rounded to …".
_NO_VALUE = re.compile(
    r"(?:not|n't|correct|right|incorrect|wrong|valid|consistent|unique|reasonable|verified|confirmed|shown|given|found|obtained|rounded|expressed|written|based|provided"
    r"|in the|in terms|what|clear|obvious|unknown|as|expected|too|also|always|never|usually|positive and|left|to|how|why|here|below|above)\b",
    re.I,
)
_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMBER_WORDS = {word: value for value, word in enumerate(_ONES.split())} | {
    f"{ten}-{one}".removesuffix("-zero"): 10 * tens + ones
    for tens, ten in enumerate(_TENS.split(), 2)
    for ones, one in enumerate(_ONES.split()[:10])
}
NUMBER_WORD = "|".join(sorted(NUMBER_WORDS, key=len, reverse=True))
_STARTS = re.compile(
    rf"(?:{MINUS}\s+(?=[\d{_MATH}]))?(?:\([-−]\))?[-+−–±~<>≤≥(\[{{|√∛π∞$€£¥½¼¾⅓⅔]*\s*(?:\.?\d|{_MATH}|\\[A-Za-z{{|$]|[√∛π∞])|(?:{NUMBER_WORD})\b|\(?[A-Za-z]'?\)?\s*(?=$|[=<>≤≥+*/^_,;.)(\[\\{_MARK}−-]|and\b|or\b)"
    rf"|(?:yes|no|true|false)(?=\s*(?:$|[.,;!\n{_MARK}]))"
    r"|(?:arc)?(?:sin|cos|tan|cot|sec|csc|ln|log|exp|sqrt|pi|abs|gcd|lcm|floor|theta|phi|alpha|infinity)(?![a-z])|[-+−(\[{|]+[A-Za-z]{1,2}\s*[-+*/^=<>≤≥|,)(\]}]",
    re.I,
)
_VERB = re.compile(
    r"\b(?:is|are|was|were|be|equals?|gives?|gets?|got|has|have|had|takes?|costs?|obtains?|obtained|yields?|needs?|makes?|earns?|contains?|remains?|becomes?)\b|:(?= )(?<![\d\ue000]:)(?<![\d\ue000] :)|是|为|有",
    re.I,
)
_QUALIFIED = re.compile(
    r"\b(?:least|most|than|not|between|up to|over|under|except|base|mod|modulo|more|fewer|each|per|times|half|twice|double|either|or|answer|solution|result)\b"
    r"|[^A-Za-z\s,'’\"()-]|(?<![A-Za-z])[B-HJ-Zb-hj-z](?![A-Za-z])",
    re.I,
)
# Where a sentence ends; what gives the reason of a value, or restricts it; and what follows a value and changes
# nothing about it.
_END = re.compile(
    rf"\n|[。！？．।]|です|となります|になります|である|입니다|이다|[.?](?=[\s{_MARK})\"”]|$)(?<!\bSt\.)(?<!\bsq\.)(?<![ap]\.m\.)(?<!i\.e\.)(?<!e\.g\.)|\bI hope\b|(?<!\s)!(?=[{_MARK})\"”]|\s*$|\s*\n|\s+(?-i:[A-Z]))",
    re.I,
)
_REASON = re.compile(
    r"[,;]\s+(?:not|nicht|niet|inte)\b|(?:[,;]|(?<!\s))\s+(?:because|since|as|instead|rather|where|so|when|whereas|if)\b|[,;]\s+(?:but|with|while|after|hence|therefore|thus|given|assuming|for)\b"
    r"|;\s+(?!and\b|or\b)[A-Za-z]{3}|(?<!\s)\s+\((?:since|because|as|see|note|rounded|which|where|not|the|after|from|to|using|we|by|that|this|assuming|hence|so|approx|about)\b"
    r"|，(?=[因其即])|（(?=[注因其即舍])",
    re.I,
)
_TAIL = re.compile(
    r"(?:[,;.]|(?<!\s))\s+\(?(?:i\.\s?e\.|e\.g\.)|[,;]\s+(?:that|meaning|the|this|it|we|there|all|rounded|found|obtained|giving|making|namely)\b|(?:,|(?<!\s))\s+(?:which|not)\b|(?<!\s)\s+of (?:them|these|those)\b|,?\s+and (?:we|that['’]s|that is|this|so|thus|hence|it)\b"
    r"|\s[—–]\s+(?=[A-Za-z]{2})|，(?=[\u4e00-\u9fff])|(?<!\s)\s+(?:to|in(?! base)|for|from|on|at|that|who|left|remaining|total|altogether|such that)\s+(?=[A-Za-z]{2})",
    re.I,
)
# Behind a value of a sentence: that it is only a part of what is stated, "$18 from eggs, for a total of $22".
_RESULTS_IN = re.compile(
    r"\b(?:total(?:l?ing)?|sum|giving|making|leaving|yielding)\b(?: only)?(?: (?:of|is|us|a|the|it|total))*[\s$€£\ue001]*[\d\ue000]",
    re.I,
)
_OPTION = re.compile(
    rf"[A-J]\.{_SPACE}+[^.!?\n=:]{{1,60}}(?=[.!]?{_SPACE}*(?:\n|\Z))"
)  # a letter with what it stands for
_LEADING = re.compile(r"(?:since|because|as|if|when|given|with|by|for|after)\b[^,\n]*,", re.I)
_SO = re.compile(r"\b(?:so|therefore|thus|hence)\b", re.I)
_PROSE_NUMBER = re.compile(
    rf"(?<![\w.,\\/^_-])[$€£]?\d[\d,]*(?:\.\d+)?(?:\s?%|\s[A-Za-z]+)?(?![\w-])|\b(?!zero\b|one\b)(?:{NUMBER_WORD})\b",
    re.I,
)
_MATH_LINE = re.compile(rf"([\s{_MARK},;.]*\n[\s{_MARK}]*){_MATH}+[ \t{_MARK},;.]*(?:\n|\Z)")
_ITEM = re.compile(rf"[ \t{_MARK}]*(?:[-*+•]|\d+[.)])[ \t]+(?=\S)")


_AROUND = ". \t\n,;:。．，、\"“”'*"


def _compose(found: Segments, start: int, end: int) -> str:
    """What is written from `start` to `end`; if it has mathematics in it, as LaTeX with its words in \\text{}."""
    spans = [span for span in found.spans[bisect_left(found.spans, (start,)) :] if span[0] < end]
    pieces = []
    for at, stop, content in zip(
        [start, *(s[1] for s in spans)], [*(s[0] for s in spans), end], [*spans, None], strict=True
    ):
        words = "".join(
            c for c, cover in zip(found.text[at:stop], found.covered[at:stop], strict=True) if cover != _MARK
        )
        if spans and not re.search(r"[\\{}$]", words):
            words = re.sub(r"[^\W\d_][^\d,;:()\[\]=<>+*/^%°|]*", lambda m: f"\\text{{ {m[0].strip()}}}", words)
        pieces += [words, content[2] if content else ""]
    text = "".join(pieces).lstrip(_AROUND[1:]).rstrip()
    if re.search(r"\d(?:\.\.+|['\"*]+)\Z", text) and found.text[max(0, start - 1) : start] not in tuple("'\"*"):
        return text.replace("..", "\\ldots")  # `12...`, `12'` and `12*` are not 12
    return text.rstrip(_AROUND).strip(_AROUND[1:])  # .5 is a number


def _first(pattern: re.Pattern, found: Segments, start: int, end: int | None = None) -> int:
    """Where the pattern begins behind `start`, or where the text ends in which it is looked for."""
    end = min(len(found.text), start + MAX_SENTENCE) if end is None else end
    match = pattern.search(found.covered, start, end)
    return match.start() if match else end


def _end(found: Segments, start: int) -> int:
    """
    Where the sentence at `start` ends. Its exclamation mark is a factorial where no word but only "Answer:" stands
    before the number.
    """
    end, covered = _first(_END, found, start), found.covered
    factorial = covered[end : end + 1] == "!" and covered[end - 1].isalnum()
    return end + (factorial and not re.search(r"[^\W\d_]{2}[^:：=\n]*\Z", covered[max(0, start - 30) : end]))


def _sentence(found: Segments, start: int, last: bool) -> tuple[int, int] | None:
    """
    The value in the sentence at `start`, as (start, end): what it begins with, or what stands behind a verb, the last
    one if `last`.
    """
    end, covered = _end(found, start), found.covered
    if (option := _OPTION.match(covered, start)) and not _VERB.search(covered, start, option.end()):
        return option.span()
    if last:
        if leading := _LEADING.match(covered, start, end):
            start = leading.end()
        start = max((m.end() for m in _SO.finditer(covered, start, end)), default=start)
    elif not _STARTS.match(covered, start, end):  # "Answer: there are 10 digits, so 45"
        behind = (_FILLER.match(covered, m.end(), end).end() for m in _SO.finditer(covered, start, end))
        start = next((at for at in behind if _STARTS.match(covered, at, end)), start)
    clause = _first(_REASON, found, start, end)
    pieces, at = [], start
    for verb in [*_VERB.finditer(covered, start, clause), None]:
        stop = verb.start() if verb else clause
        pieces.append((_FILLER.match(covered, at, stop).end(), stop))
        at = verb.end() if verb else clause
    values = [p for p in pieces if p[0] < p[1] and _STARTS.match(covered, *p)]
    if values:
        begin, stop = values[0] if not last and pieces[0] == values[0] else values[-1]  # what is stated comes first
        value = begin, _first(_TAIL, found, begin + 1, stop)
        return None if last and _RESULTS_IN.search(covered, value[1], end) else value
    words, (begin, stop) = covered[start:clause], pieces[-1]
    numbers = list(_PROSE_NUMBER.finditer(words))
    spans = (
        [s[:2] for s in found.spans[bisect_left(found.spans, (start,)) :] if s[1] <= clause] if _MATH in words else []
    )
    if spans or numbers:  # a sentence without a verb that we know: "Jane started 3 hours ago"
        if len(spans) + len(numbers) + len(pieces) != 2:
            return None
        at, stop = spans[0] if spans else (start + numbers[0].start(), start + numbers[0].end())
        around = (covered[start:at] + covered[stop:clause]).replace(_MARK, "")
        return None if _QUALIFIED.search(around) else (at, stop)
    return None if begin >= stop or _NO_VALUE.match(covered, begin) else (begin, stop)


def _items(found: Segments, line: int) -> list[tuple[int, int]]:
    """The items of a list that begins with this line."""
    items = []
    while (item := _ITEM.match(found.covered, line)) and len(items) < 50:
        items.append((item.end(), _end(found, item.end())))
        line = found.covered.find("\n", items[-1][1]) + 1 or len(found.text)
    return items


_SPOKEN_MINUS = re.compile(rf"^(?:\\text\{{\s*{MINUS}\s*\}}|{MINUS}\b|\([-−]\))\s*(?=[\d.\\])", re.I)
_SENTENCE_START = re.compile(rf".*(?:[.!?](?=\s)|\n(?![a-z\d{_MATH}]))", re.S)


def _stands(found: Segments, start: int, end: int, kind: str) -> bool:
    """
    Whether what stands around the value from `start` to `end` leaves it as it is: in its sentence, and behind it.
    """
    before = found.covered[max(0, start - 200) : start]
    sentence = _SENTENCE_START.match(before)
    return stands(
        before[sentence.end() if sentence else 0 :], found.covered[start:end], found.covered[end : end + 200], kind
    )


def _value(found: Segments, start: int, kind: str, last: bool = False) -> Statement | None:
    """What is stated from `start` on, if anything: list items, lines of mathematics, or what a sentence says."""
    begin = _FILLER.match(found.covered, start).end()
    if contrast := CONTRAST.match(found.covered, begin):
        begin = _FILLER.match(found.covered, contrast.end()).end()
    if begin >= len(found.text) or (kind != "sentence" and _NO_VALUE.match(found.covered, begin)):
        return None
    line = found.covered.rfind("\n", 0, begin) + 1
    ranges = _items(found, line) if line >= start else []
    if not ranges:
        value = _sentence(found, begin, last)
        if value is None or (kind == "result" and not _STARTS.match(found.covered, value[0])):
            return None
        ranges = [value]
        while line > start and len(ranges) < 20 and (more := _MATH_LINE.match(found.covered, ranges[-1][1])):
            ranges.append((more.end(1), _end(found, more.end(1))))
    if not _stands(found, ranges[0][0], ranges[-1][1], kind):
        return None
    text = _SPOKEN_MINUS.sub("-", ", ".join(filter(None, (_compose(found, *r) for r in ranges))))
    if _PLACEHOLDER.fullmatch(text):
        return None
    return Statement(text, kind, ranges[0][0], ranges[-1][1])


# ---- boxes ----

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\s*(-?\d+(?:\.\d+)?|[A-Za-z](?![A-Za-z])|\\[a-z]+(?![a-z{]))")
# An echo of the instruction, no answer: `\boxed{}`, `\boxed{...}`, `\boxed{\text{your answer}}`.
_PLACEHOLDER = re.compile(
    r"(?:\\(?:text\s*\{|boxed|fbox|[,;:! ])|[\s.…_?${}\[\]<>~*]|\\(?:l?dots|cdots|cdot|square|quad|Box)|(?:your|the|final|answer|here|value|number|result|letter|choice|option|solution)\b)*",
    re.I,
)
# What may stand between two boxes of one answer: `$\boxed{2}$ and $\boxed{3}$`, `x = \boxed{2}, y = \boxed{3}`.
_BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;]|\\[()\[\],;! ]|\\q?quad|\\text\s*\{[^{}]{0,40}\b(?:and|or)\b[^{}]{0,40}\}|\b(?:and|or)\b|\b[A-Za-z](?:_\{?\w\}?)?\s*=)*"
)
_NAME = re.compile(r"(?<![A-Za-z\\])([A-Za-z](?:_\{?\w{1,5}\}?)?)\s*=\s*$")


def _box(text: str, start: int, end: int) -> tuple[str | None, int]:
    r"""The content of the `\boxed` at `start` and where it ends; `None` if it is not closed before `end`."""
    opening = _BOX.match(text, start).end()
    brace = re.compile(r"\s*\{").match(text, opening)
    if not brace:  # `\boxed 9`
        bare = _BARE_BOX.match(text, opening)
        return (bare[1], bare.end()) if bare else ("", opening)
    depth = 0
    for match in _BRACE.finditer(text, brace.end() - 1, end):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[brace.end() : match.start()].strip(), match.end()
    return None, end


def boxes(text: str) -> list[tuple[str | None, int, int]]:
    r"""
    The boxes of one answer, as (content, start, end): the last one, and those before it that only "and", "or", a comma
    or `y =` separate.

    An echo of the instruction is no box. The content of a last one that is not closed is `None`.
    """
    found, at = [], len(text)
    for _ in range(40):
        start = at = max(text.rfind("\\boxed", 0, at), text.rfind("\\fbox", 0, at))
        if start < 0:
            break
        if not _BOX.match(text, start):
            continue
        content, end = _box(text, start, min(len(text), start + MAX_ANSWER))
        if found and not (end <= found[0][1] <= end + 100 and _BETWEEN_BOXES.fullmatch(text, end, found[0][1])):
            break
        if content is None or not _PLACEHOLDER.fullmatch(content):
            found.insert(0, (content, start, end))
            if content is None:
                break
    return found


# What separates one statement of a formula from the next, and what says nothing about the value beside it.
_CUT = re.compile(
    r"\\\\|(?<![<>:\\])=(?![<>])|(?<!\\)[&,;:]|[≤≥]|\bis\b(?: one of)?|\\(?:[;,: ]|q?quad|frac(?=\s*\{\s*\\(?:text|math))|implies|iff|to|in|equiv|approx|[lg]eq?(?:slant)?|therefore|because|so|hence|[Ll]ong[Rr]ightarrow|[Rr]ightarrow|[Ll]eftrightarrow)(?![A-Za-z])"
    r"|\\(?:text|mbox|textbf|textrm|intertext|tag)\s*\{[^{}]*\}|\\(?:begin|end)\{(?:align|aligned|array|split|gather|gathered|equation|multline)\*?\}(?:\{[^{}]*\})?"
)
_IDLE = re.compile(
    r"(?:[\s{}().\[\]~]|\\[!,;: ]|\\[$%#]|%|\$|\^\s*\{?\s*\\circ\s*\}?|_\s*(?:\{\s*\w+\s*\}|\w)|\\(?:circ|degree|displaystyle|textstyle|left|right|[bB]igg?[lr]?|bf|bm|math(?:bf|rm|it|sf)|text(?:bf|it|rm)?|underline|boldsymbol|large|Large|LARGE|huge|Huge|qedsymbol|square|blacksquare"
    r"|color\s*\{\w+\}|textcolor\s*\{\w+\}|p?mod\s*(?:\{[^{}]*\}|\w+)|renewcommand\s*\{[^{}]*\}\s*\{[^{}]*\}|hline|multicolumn\s*\{\w*\}\s*\{[^{}]*\}|(?:text|math)(?:rm|bf)?\s*\{[^{}]*\}?)(?![A-Za-z]))*"
)
_UNEQUAL = re.compile(r"\\neq?(?![A-Za-z])|\\not(?![A-Za-z])|≠")
_MAGNITUDE = re.compile(
    r"[\s$~\\,)\]]*(?:\\text\s*\{\s*)?(?:and a half|hundreds?|thousands?|millions?|billions?|trillions?|dozens?)\b"
)
# Where no delimiter says what belongs to the formula: what stands directly at the box.
_BARE_LEFT = re.compile(
    r"(?:(?:\d|\b[A-Za-z]|[)}\]])\s*[-+−*/^×·]\s*|=\s*[-−]\s*|[-−]|[<>≠≤≥√±]\s*|\\(?:sqrt|frac|times|cdot|pm|neq?|leq?|geq?|lt|gt)\s*\{?|(?<![\w.)])\d+)\Z"
)
_BARE_RIGHT = re.compile(
    r"\^(?!\s*\{?\\circ)|\.?\d|!(?=\s*[-+*/=])|[π²³]|\\(?:pi|sqrt)\b|[A-Za-z](?![A-Za-z])|\s*(?:[-+*/×·]\s*[\d\\]|\\(?:times|cdot|pm|le|ge|lt|gt)\b)|\}\{"
)


def _in_formula(found: Segments, content: str, start: int, end: int) -> str:
    """
    The content of a box, or the formula that it is a part of with the content in its place: `-(5)` for `$x =
    -\\boxed{5}$`.
    """
    at = bisect_left(found.spans, (start + 1,)) - 1
    text = found.text
    if at < 0 or found.spans[at][1] < end:
        if _BARE_LEFT.search(text[max(0, start - 20) : start]) or _BARE_RIGHT.match(text, end):
            raise Unparsable(f"{NO_ANSWER}: its box is a part of a formula without delimiters")
        return content + _magnitude(text, end)
    low, high, inside = found.spans[at]
    low = text.index(inside, low)
    high = low + len(inside)
    left = text[max((m.end() for m in _CUT.finditer(text, low, start)), default=low) : start]
    right = text[end : next((m.start() for m in _CUT.finditer(text, end, high)), high)]
    choice = re.fullmatch(r"\\text\w*\s*\{[^{}]*\}", content)
    if _IDLE.fullmatch(left) and (choice or _IDLE.fullmatch(right)):
        return content + _magnitude(text, end)
    if _UNEQUAL.search(left + right):
        raise Unparsable(f"{NO_ANSWER}: its box is what something does not equal")
    right = right.rstrip(" .\n")
    times = "\\cdot" if left[-1:].isdigit() else ""
    return f"{left}{times}({content}){right}".strip()


def _magnitude(text: str, end: int) -> str:
    scaled = _MAGNITUDE.match(text, end)
    return f"\\text{{ {scaled[0].strip(' $~,)]}').split('{')[-1].strip(chr(92)).strip()}}}" if scaled else ""


def final_answer(text: str) -> str | None:
    r"""
    What a demonstration gives as its answer: its last boxes, else GSM8K's `#### 42`; `None` if neither is there.
    """
    found = boxes(text)
    if found:
        contents = [content for content, _, _ in found]
        return None if contents[-1] is None else ", ".join(dict.fromkeys(contents))
    marks = [m["value"].strip() for m in _LINE_MARK.finditer(text) if _is_mark(text, m)]
    if not marks:
        return None
    return marks[-1].replace(",", "") if re.fullmatch(r"[-+$]*\d[\d,]*(?:\.\d+)?", marks[-1]) else marks[-1]


def _is_mark(text: str, match: re.Match) -> bool:
    """
    Whether a line that begins with `####` is GSM8K's mark: a value with at most two words (its unit), or a last word;
    no heading.
    """
    rest = match["value"].strip(f" {_MARK}")
    words = re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+(?:\s*\{[A-Za-z ]*\})?", "", rest))
    valued = _STARTS.match(rest) and not re.match(r"\d+[.):]\s+[A-Za-z]", rest) and len(words) < 3
    return bool(valued or (re.fullmatch(r"[A-Za-z]+", rest) and not text[match.end() :].strip()))


# ---- 4. the choice ----

# What is said before a statement that takes the place of an earlier one.
_CORRECTS = re.compile(
    r"\b(?:wait|hold on|actually|oops|sorry|correct(?:ion|ing|ed)|the correct|let me (?:re-?do|recalculate|correct|re-?compute)|(?:is|was) an? (?:mistake|error)|['’]s (?:wrong|incorrect))\b"
    rf"|{RETRACTS.pattern}",
    re.I | re.M,
)
_REMARKS = re.compile(
    rf"(?:^|[.!?:]\s)[\s\\#>*\d.)(✓{_MARK}-]*(?:(?:a |an |the |let(?:'s| me| us) |we (?:can )?|to |as a |for |quick |double[- ]|another |final )*(?:verif\w+|check\w*|sanity|alternative\w*|another"
    r"|examples?|instance|e\.g\.|notes?|remarks?|explanations?|justification|reason(?:ing)?|if|suppose|had|similarly|generally?|more generally|generali[sz]ation|extensions?"
    r"|proof|other(?:wise)?|compare|common mistakes?|question|problem)\b|(?:验证|检验|注|说明|例如|解释|另))",
    re.I | re.M,
)
_PARAGRAPH = re.compile(r"\s*(?:\S[^\n]{0,999}\n){1,9}[ \t]*\n\s*(?=[^\s#])")
_CLOSING = re.compile(
    r"(?:^|(?<=[.!?\s]))(?:let me know|i hope|hope (?:this|it)|if you (?:have|need)|feel free|is there anything|would you like)\b[^\n]*\s*\Z",
    re.I,
)
_CONCLUDES = re.compile(
    rf"[\s>*{_MARK}]*(?:therefore|thus|hence|so|in conclusion|finally|we conclude|consequently|因此|所以|故|综上)",
    re.I,
)


def _marks(found: Segments) -> list[tuple[int, Statement]]:
    """What the lines `#### 10` state, as [`statements`]."""
    marks = _matches(_LINE_MARK, found) if "####" in found.covered else []
    stated = [(m.start(), _value(found, m.start("value"), "mark")) for m in marks if _is_mark(found.covered, m)]
    return [(at, statement) for at, statement in stated if statement]


def _matches(pattern: re.Pattern, found: Segments) -> list[re.Match]:
    matches = list(itertools.islice(pattern.finditer(found.covered), MAX_STATEMENTS + 1))
    if len(matches) > MAX_STATEMENTS:
        raise Unparsable(f"{NO_ANSWER}: it says more than {MAX_STATEMENTS} times what its answer is")
    return matches


def statements(found: Segments) -> list[tuple[int, Statement]]:
    """Whatever states an answer in words, in order, with where its phrase begins."""
    stated: dict[int, tuple[int, Statement]] = {}
    for pattern in (_HEADING, _PHRASE):
        for match in _matches(pattern, found):
            at, end = match.span()
            kind = "answer" if match["answer"] else "result"
            if match["final"] or _CALLED_FINAL.search(found.covered, max(0, at - 30), at):
                kind = "final"
            statement = _value(found, end, kind)
            for _ in range(3 * (pattern is _HEADING)):  # the value may be in a later paragraph
                if not statement and (paragraph := _PARAGRAPH.match(found.covered, end)):
                    end = paragraph.end()
                    statement = _value(found, end, kind)
            if statement:
                stated.setdefault(statement.start, (at, statement))
    return [stated[at] for at in sorted(stated)]


_QUESTION = re.compile(rf"^[\s#*{_MARK}]*(?:question|problem|q)\b[^\n:]{{0,10}}:", re.I | re.M)


def _choose(found: Segments, stated: list[tuple[int, Statement]]) -> Statement | None:
    """
    The first statement of the highest kind; a later one takes its place where the text says so, and contradicts it
    otherwise.
    """
    best = min((ORDER.index(s.kind) for _, s in stated), default=None)
    chosen, others = None, []
    for at, statement in stated:
        if ORDER.index(statement.kind) != best:
            continue
        between = found.covered[chosen.end : at] if chosen else ""
        if chosen is None or _CORRECTS.search(between):
            chosen, others = statement, []
        elif _QUESTION.search(between):
            others += [statement.text]  # several questions, each with its answer: no one can tell which was asked
        elif not _REMARKS.search(between):
            others += [statement.text]
    kept = tuple(dict.fromkeys(text for text in others if text != chosen.text))
    return replace(chosen, others=kept) if kept else chosen


_TAG = re.compile(r"<(/?)(?:final[_ ]?)?answer>", re.I)


def _tagged(text: str) -> tuple[int, int] | None:
    """Where the content of the last `<answer>` is that has any."""
    end = len(text)
    for match in reversed(list(_TAG.finditer(text))[-20:]):
        if not match[1] and not _PLACEHOLDER.fullmatch(text[match.end() : end][:200]):
            return match.end(), end
        end = match.start()
    return None


def stated_answer(completion: str) -> Statement:
    """The answer that a completion states, by the rules at the top of `ORDER`.

    Raises:
        Unparsable: It states none, its last box is not closed, or it ends while it thinks; the text of the error says
            which.
    """
    text = visible(completion)
    if tagged := _tagged(text):
        return replace(_moved(_stated(text[slice(*tagged)], whole=True), tagged[0]), kind="tag")
    return _stated(text, whole=False)


def _moved(statement: Statement, by: int) -> Statement:
    return replace(statement, start=statement.start + by, end=statement.end + by)


def stated_text(completion: str) -> str | None:
    """The text of [`stated_answer`]; `None` where there is none, or where statements differ."""
    try:
        statement = stated_answer(completion)
    except Unparsable:
        return None
    return None if statement.others else statement.text


def _stated(text: str, whole: bool) -> Statement:
    if boxed := boxes(text):
        begin = text.rfind("\n\n", 0, boxed[0][1]) + 1  # what stands before this paragraph says nothing about the box
        return _moved(_boxed(segments(text[begin:]), [(c, at - begin, end - begin) for c, at, end in boxed]), begin)
    found = segments(text)
    chosen = _choose(found, _marks(found) or statements(found)) or _concluded(found, whole)
    if chosen is None:
        raise Unparsable(NO_ANSWER)
    return _corrected(found, chosen) or chosen


def _boxed(found: Segments, boxed: list[tuple[str | None, int, int]]) -> Statement:
    """What the boxes state, or what a later sentence puts in their place."""
    contents = [content for content, _, _ in boxed]
    if None in contents:
        raise Unparsable(f"{NO_ANSWER}: its last box is not closed")
    text, start, end = found.text, boxed[0][1], boxed[-1][2]
    names = [_NAME.search(text, max(0, at - 20), at) for _, at, _ in boxed]
    contents = [_in_formula(found, *box) for box in boxed]
    if len(boxed) > 1 and all(names):
        contents = [f"{name[1]} = {content}" for name, content in zip(names, contents, strict=True)]
    chosen = Statement(", ".join(dict.fromkeys(contents)), "box", start, end)
    if _SAYS_FINAL.search(text, end):
        behind = segments(text[end:])
        for at, statement in statements(behind):
            exact = not _APPROXIMATE.search(behind.covered, at, statement.start)
            if statement.kind == "final" and exact and _STARTS.match(behind.covered, statement.start):
                chosen = _moved(statement, end)
    if chosen.kind != "box":
        return chosen
    if corrected := _corrected(found, chosen):
        return corrected
    at = bisect_left(found.spans, (end,)) - 1
    stop = max(end, found.spans[at][1]) if at >= 0 else end
    if not _stands(found, start, stop, "box"):
        raise Unparsable(f"{NO_ANSWER}: its box is denied, asked or supposed")
    return chosen


def _corrected(found: Segments, chosen: Statement) -> Statement | None:
    """
    What takes the place of a statement that the text behind it takes back; `Unparsable` where it is not clear what.
    """
    covered = found.covered
    retracted = RETRACTS.search(covered, chosen.end)
    if not retracted or _REMARKS.search(covered, chosen.end, retracted.start()):
        if _left_in_doubt(found, chosen):
            raise Unparsable(f"{NO_ANSWER}: it doubts what it stated, and does not come back to it")
        return None
    for match in itertools.islice(CORRECTION.finditer(covered, retracted.start()), 20):
        begin = _FILLER.match(covered, match.end()).end()
        value = _value(found, match.end(), "answer") if _STARTS.match(covered, begin) else None
        if value:
            return replace(value, kind=chosen.kind)
    raise Unparsable(f"{NO_ANSWER}: it takes back what it stated")


def _left_in_doubt(found: Segments, chosen: Statement) -> bool:
    """Whether "Wait, …" is the last word on a statement: nothing behind it says that it is right, or states it again."""
    doubt = DOUBTS.search(found.covered, chosen.end)
    if not doubt or _REMARKS.search(found.covered, chosen.end, doubt.start()):
        return False
    again = rf"(?<![\w.]){re.escape(chosen.text)}(?![\w.]?\d|\s*[-+*/×])"
    return not (SETTLES.search(found.covered, doubt.end()) or re.search(again, found.text[doubt.end() :]))


def _concluded(found: Segments, whole: bool) -> Statement | None:
    """What the last sentence says, if it is all there is or begins with "therefore"."""
    end = len(_CLOSING.sub("", found.covered).rstrip(f" \t\n{_MARK}"))
    first = len(found.covered) - len(found.covered.lstrip(f" \t\n{_MARK}"))
    line = found.covered.rfind("\n", 0, end) + 1
    single = line <= first or (whole and "\n\n" not in found.covered[first:end])
    if not single and not _CONCLUDES.match(found.covered, line):
        return None
    start = first if single else line
    for match in _SENTENCE.finditer(found.covered, start, end):
        if match.end() < end:
            start = match.end()
    return _value(found, start, "sentence", last=True)


_SENTENCE = re.compile(r"(?<=[A-Za-z\d\ue000)])[.!?]\s+(?=[A-Z\ue000])|[。！？]\s*")
