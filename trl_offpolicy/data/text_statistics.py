"""What rewriting did to the texts: copying from the reference, mentions of it, diversity. Pure functions over strings.

Tokens are runs of word characters and single other signs, so the numbers do not depend on a model's tokenizer.
"""

import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from functools import cache
from statistics import fmean


_TOKEN = re.compile(r"\w+|[^\w\s]")
# A solution that speaks of the text it was shown, in the languages that models answer in. "The given triangle" or "the
# hint of a pattern" is none.
LEAKS = (
    # English
    r"\b(?:the|this|that|your|provided|given|a)\s+(?:reference|provided|given|original|sample|model|(?:teacher|tutor)s?(?:['’]s?)?)\s+(?:solution|answer|text|explanation|reasoning|guidance)s?\b",
    r"\b(?:teacher|tutor)s?['’]s?\s+(?:solution|answer|explanation|reasoning|guidance|approach|method|work)s?\b",
    r"\b(?:according to|as (?:in|stated in|shown in|mentioned in|per)|following|based on|using)\s+the\s+(?:reference|solution|hint)\b",
    r"\bthe\s+(?:reference|hint)\s+(?:says|states|shows|suggests|gives|uses|tells|mentions)\b",
    r"\bthe\s+solution\s+(?:says|states|suggests|tells|mentions|explains|provided|given above)\b",
    r"\b(?:(?:in|using)\s+(?:my|your)\s+own\s+(?:words|way)|(?:my|your)\s+own\s+(?:[\w-]+\s+)?solution)\b",
    r"\b(?:teacher|tutor)s?\b",
    # What an instruction-tuned model says of its prompt (the phrases of arXiv 2402.13669's code)
    r"\breference\s+answers?\b",
    r"\b(?:my|your)\s+(?:own\s+)?response\b",
    r"\bnow\s+it['’]s\s+your\s+turn\b|\A\s*your\s+turn\b",
    # German, French, Spanish, Portuguese, Italian
    r"\b(?:Musterlösung|Referenzlösung|(?:gegebene|vorgegebene|angegebene)n?\s+Lösung|Lösung\s+de[sr]\s+Lehr\w+|laut\s+(?:der\s+)?Lösung)\b",
    r"\b(?:solution\s+(?:du\s+professeur|de\s+l['’]enseignante?|de\s+référence|fournie|proposée)|d['’]après\s+(?:la\s+solution|le\s+corrigé))\b",
    r"\b(?:soluci[oó]n|solu[cç][aã]o)\s+(?:del?|do|da|de\s+la)\s+(?:profesora?|maestr[oa]|professora?|referencia|referência)\b",
    r"\b(?:soluci[oó]n|solução)\s+(?:proporcionada|fornecida)\b|\b(?:según|conforme)\s+(?:la|a)\s+(?:solución|solução)\b",
    r"\bsoluzione\s+(?:dell['’]insegnante|del\s+(?:professore|docente)|di\s+riferimento|fornita)\b|\bsecondo\s+la\s+soluzione\b",
    # Russian
    r"\bрешени\w+\s+(?:учител|преподавател)\w+|\b(?:эталонн|приведённ|приведенн|предоставленн)\w+\s+решени\w+|\bсогласно\s+решению\b",
    # Chinese, Japanese, Korean
    r"(?:老师|教师|老師|教師|参考|參考|标准|標準)的?(?:解答|解法|答案|解析)|(?:根据|按照|根據)(?:给出|提供|所给|給出)?的?(?:解答|解法|答案)",
    r"(?:先生|教師)の(?:解答|解法|解説)|模範解答|参考解答|与えられた(?:解答|解法)",
    r"(?:선생님|교사)의\s*(?:풀이|해설|답)|참고\s*(?:풀이|답안)|주어진\s*풀이",
)


def num_words(text: str) -> int:
    """Words and other signs of a text, as they are counted here."""
    return len(_TOKEN.findall(text))


def ngrams(text: str | list[str], n: int) -> Counter:
    """How often each run of `n` tokens occurs in a text, or in its tokens."""
    tokens = _TOKEN.findall(text) if isinstance(text, str) else text
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def copy_ratio(text: str, reference: str, n: int = 4) -> float | None:
    """
    Share of the text's n-grams that the reference holds too (as often); `None` for a text of fewer than `n` tokens.
    """
    copied, own = copied_ngrams(text, reference, n)
    return copied / own if own else None


def copied_ngrams(text: str, reference: str, n: int = 4) -> tuple[int, int]:
    """How many of the text's n-grams the reference holds too (as often), and how many it has."""
    own = ngrams(text, n)
    return (own & ngrams(reference, n)).total(), own.total()


_EQUATION = re.compile(r"[-+*/().\d]*[-+*/][-+*/().\d]*=[-.\d]*\d")


def normal_form(text: str) -> tuple[str, ...]:
    """
    What two solutions have in common that count as one: the equations of plain numbers that they write down, in order
    (as rejection sampling fine-tuning tells solutions apart, arXiv 2308.01825), or their words where there are none.
    """
    plain = re.sub(r"[\s,$€£\\]", "", text).translate(str.maketrans("×·÷−", "**/-"))
    return tuple(_EQUATION.findall(plain)) or tuple(text.casefold().split())


def find_leak(text: str, known: str = "", phrases: Sequence[str] = ()) -> str | None:
    """
    What a solution says of the reference it was shown ("the teacher's solution"); `None` if it says nothing of it.

    Args:
        text (`str`): The solution.
        known (`str`, *optional*): The problem: what it says too, such as "teacher", belongs to the tale.
        phrases (`Sequence[str]`, *optional*): Regular expressions to look for beside `LEAKS`, in any case.
    """
    known = known.casefold()
    found = (match[0] for pattern in _leaks(tuple(phrases)) for match in pattern.finditer(text))
    return next((leak for leak in found if leak.casefold() not in known), None)


def leaks_hint(text: str, known: str = "") -> bool:
    """Whether a solution speaks of the reference it was shown ([`find_leak`])."""
    return find_leak(text, known) is not None


@cache
def _leaks(phrases: tuple[str, ...]) -> list[re.Pattern]:
    """A phrase is a pattern of its own: its flags and the numbers of its groups are not those of others."""
    own = "|".join(f"(?:{leak})" for leak in LEAKS)
    return [re.compile(pattern, re.IGNORECASE) for pattern in (own, *phrases)]


def distinct_n(texts: Sequence[str], n: int = 2) -> float | None:
    """Different n-grams of all texts as a share of all (arXiv 1510.03055); it falls with the number of texts."""
    counts: Counter = Counter()
    for text in texts:
        counts.update(ngrams(text, n))
    return len(counts) / counts.total() if counts else None


def self_bleu(texts: Sequence[str], max_n: int = 4) -> float | None:
    """
    Mean BLEU of each text against all the others (arXiv 1802.01886): 1 if all are alike, near 0 if they share nothing.

    A text without any common n-gram of some order counts as 0 (no smoothing). `None` for fewer than two texts.
    """
    if len(texts) < 2:
        return None
    tokens = [_TOKEN.findall(text) for text in texts]
    lengths = list(map(len, tokens))
    by_length = sorted(lengths)
    log_precisions = [0.0] * len(texts)
    for n in range(1, max_n + 1):
        counts = [ngrams(each, n) for each in tokens]
        highest: dict[
            tuple, tuple[int, int]
        ] = {}  # an n-gram's two highest counts: what the others have is one of them
        for count in counts:
            for gram, number in count.items():
                first, second = highest.get(gram, (0, 0))
                if number > second:
                    highest[gram] = (number, first) if number > first else (first, number)
        for i, count in enumerate(counts):
            clipped = 0
            for gram, number in count.items():
                first, second = highest[gram]
                clipped += number if number < first else second
            log_precisions[i] += math.log(clipped / count.total()) / max_n if clipped else -math.inf
    return fmean(
        math.exp(log_p + min(0.0, 1 - _closest(by_length, length) / max(1, length)))
        for log_p, length in zip(log_precisions, lengths, strict=True)
    )


def _closest(by_length: list[int], length: int) -> int:
    """The length nearest to `length` among the other texts, the shorter of two equally near."""
    at = bisect_left(by_length, length)
    others = by_length[max(0, at - 1) : at] + by_length[at + 1 : at + 2]
    return min(others, key=lambda other: (abs(other - length), other))
