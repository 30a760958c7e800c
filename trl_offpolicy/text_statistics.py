"""What rewriting did to the texts: copying from the reference, mentions of it, diversity. Pure functions over strings.

Tokens are runs of word characters and single other signs, so the numbers do not depend on a model's tokenizer.
"""

import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from statistics import fmean


_TOKEN = re.compile(r"\w+|[^\w\s]")
# A solution that speaks of the text it was shown. "The given triangle" or "the hint of a pattern" is no leak.
_LEAK = re.compile(
    r"\b(?:teacher|tutor)(?:['’]s)?\b"
    r"|\b(?:the|this|your|provided|given)\s+(?:reference|provided|given|original|sample|model|teacher['’]s)\s+(?:solution|answer|text|explanation|reasoning)\b"
    r"|\b(?:according to|as (?:in|stated in|shown in|mentioned in)|following|based on)\s+the\s+(?:reference|solution|hint)\b"
    r"|\bthe\s+(?:reference|hint)\s+(?:says|states|shows|suggests|gives|uses|tells|mentions)\b",
    re.IGNORECASE,
)


def ngrams(text: str | list[str], n: int) -> Counter:
    """How often each run of `n` tokens occurs in a text, or in its tokens."""
    tokens = _TOKEN.findall(text) if isinstance(text, str) else text
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def copy_ratio(text: str, reference: str, n: int = 4) -> float | None:
    """Share of the text's n-grams that the reference holds too (as often); `None` for a text of fewer than `n` tokens."""
    own = ngrams(text, n)
    return (own & ngrams(reference, n)).total() / own.total() if own else None


def leaks_hint(text: str) -> bool:
    """Whether a solution speaks of the reference it was shown ("the teacher's solution", "according to the reference")."""
    return _LEAK.search(text) is not None


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
