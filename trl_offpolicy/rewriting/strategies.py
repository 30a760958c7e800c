"""
Data strategies of the field by name: each is a set of `RewriteConfig`'s fields, and of the loop's where it has rounds.

A setting stands here only where the paper gives it, or where the algorithm would be another without it. What a paper
leaves open, or sources disagree on, is left at our default, and `docs/strategies.md` says so.
"""

from typing import Any


SELF_ONLY: dict[str, Any] = {"stages": ["self"]}

STRATEGIES: dict[str, dict[str, Any]] = {
    # arXiv 2509.15157: own solution, else retelling, else demonstration.
    "mind_the_gap": {"stages": ["self", "guided"], "selection": "first", "temperature": 1.0},
    # arXiv 2402.13669: one retelling of every demonstration, kept if its answer agrees and it has no banned phrase.
    "sdft": {"stages": ["guided"], "num_generations": 1, "reject_mentions": True},
    # arXiv 2502.08130: one own answer, else one paraphrase, else the demonstration.
    "s3ft": {"stages": ["self", "guided"], "num_generations": 1},
    # arXiv 2308.01825: every correct solution with other equations, beside the demonstrations.
    "rft": {**SELF_ONLY, "keep": "all", "keep_demonstration": True},
    # arXiv 2203.14465: one greedy attempt; what fails is asked again with the answer as a hint; π_0 is trained anew.
    "star": {
        "stages": ["self", "guided"], "num_generations": 1, "temperature": 0.0, "hint_kind": ["answer"],
        "train_from": "base", "refresh": "all",
    },
    # arXiv 2312.06585: samples of the newest policy, of the correct ones at most so many for a problem; π_0 is trained anew.
    "rest_em": {**SELF_ONLY, "keep": "all", "selection": "random", "train_from": "base", "refresh": "all"},
    # arXiv 2502.04194: of the answers of several sources the one that the student finds likeliest.
    "grape": {"stages": ["self", "guided"], "select_across": "max_initial_log_prob"},
    # arXiv 2510.18874: own solutions, drawn anew from the newest policy each round, which is trained on.
    "iter_sft": {**SELF_ONLY, "selection": "first", "train_from": "last", "refresh": "all"},
}  # fmt: skip
LOOP_SETTINGS = ("train_from", "refresh")


def rewrite_settings(name: str) -> dict[str, Any]:
    """
    The settings of a strategy but for the loop's: fields of `RewriteConfig`, by name. `ValueError` if there is none of
    this name.
    """
    if name not in STRATEGIES:
        raise ValueError(f"You passed strategy={name!r}; use one of {list(STRATEGIES)}.")
    return {setting: value for setting, value in STRATEGIES[name].items() if setting not in LOOP_SETTINGS}
