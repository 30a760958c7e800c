"""What k samples of each problem say of a model: pass@k, majority vote, intervals over problems, a paired test.

Samples of one problem are not independent of each other, so everything here resamples problems, never samples. (For a
real matrix of 100 problems by 8 samples the standard error by samples is 2.5 times too small.)
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import NormalDist, fmean, stdev

import numpy as np


def pass_at_k(num_sampled: int, num_correct: int, k: int) -> float:
    """
    Chance that at least one of `k` draws without replacement is correct: the unbiased estimator of arXiv 2107.03374.
    """
    if not 1 <= k <= num_sampled:
        raise ValueError(f"You asked for pass@{k} of {num_sampled} samples; k must be from 1 to {num_sampled}.")
    return 1 - math.comb(num_sampled - num_correct, k) / math.comb(num_sampled, k)


def majority(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """
    Whether the most frequent answer of one problem's samples is correct; a tie counts as its share of correct winners.

    All correct samples equal the gold answer, so they vote together however they write it; wrong ones vote together
    only where they are the same text ([`evaluate`] passes them in one spelling). `None` (no answer, cut) does not
    vote, and without any vote the result is 0.
    """
    votes = Counter(True if ok else answer for answer, ok in zip(answers, correct, strict=True) if ok or answer)
    most = max(votes.values(), default=0)
    return float(votes[True] == most) / sum(n == most for n in votes.values()) if votes else 0.0


def accuracies(answers: list[list[str | None]], correct: list[list[bool]], k: int) -> dict:
    """
    avg@k, pass@j and maj@k of problems whose samples answered `answers` and were `correct` (a list of both for each
    problem).

    A problem without samples counts nowhere, and one with fewer than j not in `pass@j`.

    Returns:
        `dict`: `avg@k`, `pass@j` for powers of two j and j = k, `maj@k`, each with `…_ci95`; `avg@k_se`, the standard
            error over problems.
    """
    counts = [(len(c), sum(c)) for c in correct if c]
    shares = {f"avg@{k}": [c / n for n, c in counts]}
    for j in sorted({2**i for i in range(k.bit_length())} | {k}):
        shares[f"pass@{j}"] = [pass_at_k(n, c, j) for n, c in counts if n >= j]
    shares[f"maj@{k}"] = [majority(a, c) for a, c in zip(answers, correct, strict=True) if c]
    result: dict = {}
    for name, values in shares.items():
        result[name] = fmean(values) if values else None
        result[f"{name}_ci95"] = mean_interval(values, 0.0)
    of_each = shares[f"avg@{k}"]
    result[f"avg@{k}_se"] = stdev(of_each) / math.sqrt(len(of_each)) if len(of_each) > 1 else 0.0
    return result


def bootstrap(
    values,
    statistic: Callable[[np.ndarray], np.ndarray] = lambda means: means,
    num_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> np.ndarray:
    """
    Bootstrap intervals over rows (problems).

    Args:
        values (array, (n, m) or (n,)): m numbers of each row.
        statistic (`Callable`): Column means (resamples, m) → statistics (resamples, s); by default the means
            themselves.
        level (`float`, *optional*, defaults to `0.95`): Nominal coverage. The percentiles are the expanded ones
            (Hesterberg 2015, arXiv 1411.5279), which correct what the bootstrap lacks with few rows as Student's t
            does the normal.

    Returns:
        `np.ndarray`, (s, 2) float64: lower and upper end of each; NaN for fewer than two rows.
    """
    values = np.asarray(values, dtype=float)
    values = values.reshape(len(values), -1)
    n = len(values)
    if n < 2:
        return np.full((len(np.atleast_1d(statistic(values[:1])[0])), 2), np.nan)
    rng, means, left = np.random.default_rng(seed), [], num_resamples
    while left > 0:
        size = min(left, 1 + (1 << 22) // n)
        drawn = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)  # how often each row was drawn
        means.append(times @ values / n)
        left -= size
    z = NormalDist().inv_cdf((1 + level) / 2)
    df = n - 1
    t = z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)  # quantile of Student's t
    tail = NormalDist().cdf(-t * math.sqrt(n / df))
    return np.quantile(statistic(np.concatenate(means)), [tail, 1 - tail], axis=0).T


def mean_interval(values: Sequence[float], lowest: float, level: float = 0.95) -> list[float] | None:
    """
    Interval of the mean of values in [lowest, 1], one a problem: shares (`lowest` 0) or paired differences of shares
    (-1); `None` for fewer than two problems.

    Where all problems are alike, the bootstrap cannot know how uncertain that is: there, so are at least a share of
    the exact binomial bound, and the others may be anything.
    """
    n = len(values)
    if n < 2:
        return None
    if len(set(values)) == 1:
        alike = ((1 - level) / 2) ** (1 / n)
        return [alike * values[0] + (1 - alike) * end for end in (lowest, 1.0)]
    low, high = bootstrap(values, level=level)[0]
    return [float(max(lowest, low)), float(min(1.0, high))]


def paired_test(differences: Sequence[float] | np.ndarray, num_flips: int = 10_000, seed: int = 0) -> float:
    """
    Two-sided p-value of the mean of paired differences: their signs flipped at random (the null: either model, either
    sign).
    """
    differences = np.asarray(differences, dtype=float)
    rng, observed, reached = np.random.default_rng(seed), abs(np.mean(differences)), 0
    for start in range(0, num_flips, 1000):
        signs = rng.integers(2, size=(min(1000, num_flips - start), len(differences))) * 2 - 1
        reached += int((np.abs((signs * differences).mean(1)) >= observed - 1e-12).sum())
    return (1 + reached) / (1 + num_flips)


def compare(results: dict, baseline: dict) -> dict:
    """
    Paired comparison of two models on the problems that both were asked.

    Args:
        results, baseline (`dict`): What [`evaluate`] returned of one benchmark.

    Returns:
        `dict`: `difference` of the accuracies (share; positive: better than the baseline), its interval
            `difference_ci95` over problems (where all differ alike, from the exact binomial bound), `p_value` of the
            paired sign-flip test, `num_problems` in common.

    Raises:
        ValueError: They have no problem in common (another benchmark, or prompts that differ).
    """
    shares = [
        {i: c / n for i, c, n in zip(r["problem_ids"], r["num_correct"], r["num_judged"], strict=True) if n}
        for r in (results, baseline)
    ]
    common = [i for i in shares[0] if i in shares[1]]
    if not common:
        raise ValueError(
            "The two evaluations have no problem in common: an id depends on the prompt and the gold answer, so both must be asked the "
            "same benchmark in the same words (solve_prompt, system_prompt)."
        )
    differences = [shares[0][i] - shares[1][i] for i in common]
    return {
        "difference": sum(differences) / len(common),
        "difference_ci95": mean_interval(differences, -1.0),
        "p_value": paired_test(differences),
        "num_problems": len(common),
    }
