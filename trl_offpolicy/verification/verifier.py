"""What every verifier has in common: a verdict and its reason for each completion; rewards made of them."""

import multiprocessing
import os
import re
import sys
from collections.abc import Sequence
from inspect import signature
from typing import Any, NamedTuple

from ..data.redaction import brief
from ..data.rows import Verdict


class Judgement(NamedTuple):
    """
    A verdict on one completion and the reason for it, which is empty for `correct`; equal to the plain pair of the
    two.
    """

    verdict: Verdict
    reason: str = ""

    @property
    def gold_at_fault(self) -> bool:
        """
        Whether the gold answer is what cannot be read or run, whatever the completion is. Not an item of the pair.
        """
        return False


class GoldAtFault(Judgement):
    """A judgement that says nothing of the completion, since nothing can be compared with the gold answer."""

    __slots__ = ()

    @property
    def gold_at_fault(self) -> bool:
        return True


def explain_with(
    verifier, completions: Sequence[str], answers: Sequence, rows: Sequence[dict] | None = None
) -> list[Judgement]:
    """
    The judgement of each completion by anything that verifies ([`as_verifier`]). Of the `rows` that the completions
    answer, a verifier is given the columns that it names in `columns`.

    Raises:
        TypeError: A completion is not a text.
        ValueError: What the verifier returned is not a verdict (or a bool) for each completion.
    """
    verifier = as_verifier(verifier)
    columns = {name: [row.get(name) for row in rows] for name in verifier.columns} if rows else {}
    return verifier.explain(completions, answers, **columns) if completions else []


def _check_texts(completions: list) -> None:
    for index, completion in enumerate(completions):
        if not isinstance(completion, str):
            raise TypeError(f"Completion {index} must be a text, but is {completion!r:.100}.")


def _judgement(pair: tuple[Verdict, str]) -> Judgement:
    """A verifier's own pair as a judgement, its reason fit to be written down."""
    judgement = pair if isinstance(pair, Judgement) else Judgement(*pair)
    return judgement._replace(reason=brief(judgement.reason))


def _verdict(value) -> Verdict:
    """A verdict by name, or by a bool (numpy's, too): `True` is correct."""
    if type(value).__name__ in ("bool", "bool_"):
        return Verdict.CORRECT if value else Verdict.WRONG
    try:
        return Verdict(value)
    except ValueError as error:
        raise ValueError(
            f"The verifier returned {value!r:.100}; it must return True, False or one of {', '.join(Verdict)} for each completion."
        ) from error


def describe(verifier) -> str:
    """
    Name and arguments of whatever verifies, for the record; no limits of time and processes, which a resumed run may
    change.
    """
    if isinstance(verifier, OwnVerifier):
        verifier = verifier.verifier
    name = getattr(verifier, "__name__", type(verifier).__name__)
    if not isinstance(verifier, Verifier):
        return name
    now = {**vars(verifier), **vars(verifier).get("options", {})}
    if "sampler" in now:  # a judge: its model decides, however that is run
        now["sampler"] = getattr(now["sampler"], "name", type(now["sampler"]).__name__)
    defaults = {p.name: p.default for p in signature(type(verifier)).parameters.values()}
    given = [
        f"{k}={now[k]!r}"
        for k, default in defaults.items()
        if k not in ("timeout", "num_workers") and k in now and now[k] != default
    ]
    return name + (f"({', '.join(given)})" if given else "")


def rewards(judgements: list[Judgement]) -> list[float | None]:
    """
    1.0 for `correct`, 0.0 for `wrong` and `unparsable`, as an evaluation counts them; `None` where nothing is known of
    the completion: the gold answer cannot be compared with, a time-out, an error.
    """
    values = {Verdict.CORRECT: 1.0, Verdict.WRONG: 0.0, Verdict.UNPARSABLE: 0.0}
    return [None if judgement.gold_at_fault else values.get(judgement.verdict) for judgement in judgements]


class Verifier:
    """
    What all verifiers share; a new one needs `_explain`. Usable as a context manager, and as a reward for
    `GRPOTrainer`.
    """

    # Whether the answer that a completion states is judged, not all of its text: what maj@k counts votes for.
    stated = True
    # What a prompt should ask for.
    asked_form = ""
    # How many completions are judged at a time.
    num_workers: Any = 1
    # Columns of the dataset, beside the answers, that `explain` and `verify` take as keyword arguments: a list with a
    # value for each completion.
    columns: tuple[str, ...] = ()

    # mypy takes `type(self).__name__` for this property.
    @property
    def __name__(self) -> str:  # what GRPOTrainer calls its reward in the logs
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()  # type: ignore[call-overload]

    def __repr__(self) -> str:
        return type(self).__name__ + (describe(self).removeprefix(self.__name__) or "()")  # type: ignore[operator]

    def _explain(self, completions: list[str], answers: list, **columns: list) -> list[Judgement]:
        """Of texts and as many answers; `columns` are those that the verifier names."""
        raise NotImplementedError

    def explain(self, completions: list[str], answers: list, **columns: list) -> list[Judgement]:
        """
        Verdicts with the reason beside each: what could not be parsed, which test failed; empty for `correct`.
        `gold_at_fault` says of each whether it is the gold answer that cannot be compared with.

        Raises:
            TypeError: A completion is not a text.
            ValueError: There are not as many answers, or verdicts, as completions.
        """
        if len(completions) != len(answers):
            raise ValueError(
                f"You passed {len(completions)} completions and {len(answers)} answers; each completion needs its own answer."
            )
        _check_texts(completions)
        judgements = list(map(_judgement, self._explain(completions, answers, **columns)))
        if len(judgements) != len(completions):
            raise ValueError(
                f"The verifier returned {len(judgements)} verdicts for {len(completions)} completions; it must return one for each."
            )
        return judgements

    def verify(self, completions: list[str], answers: list, **columns: list) -> list[Verdict]:
        """One verdict for each completion against the gold answer of the same position."""
        return [verdict for verdict, _ in self.explain(completions, answers, **columns)]

    def check_answers(self, answers: list) -> list[Verdict]:
        """
        `CORRECT` for each gold answer that can be compared with, as far as that can be told without a completion.
        """
        return [Verdict.CORRECT if answer else Verdict.UNPARSABLE for answer in answers]

    def __call__(self, completions, answer=None, solution=None, **kwargs) -> list[float | None]:
        """TRL's reward signature: 1.0 correct, 0.0 wrong or no answer, `None` where nothing is known ([`rewards`])."""
        golds = answer if answer is not None else solution
        if golds is None:
            raise ValueError(
                f"The dataset needs a column `answer` (or `solution`) with gold answers; it has {sorted(kwargs)}."
            )
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        columns = {name: kwargs[name] for name in self.columns if name in kwargs}
        return rewards(self.explain(texts, golds, **columns))

    def close(self) -> None:
        """Ends what it holds (processes, engines), if anything."""

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


class OwnVerifier(Verifier):
    """
    A user's function, or object with `verify` or `explain`, as a [`Verifier`]; what else the object has is taken from
    it.
    """

    def __init__(self, verifier):
        self.verifier = verifier
        for name in ("stated", "asked_form", "num_workers", "columns", "check_answers", "close"):
            if hasattr(verifier, name):
                setattr(self, name, getattr(verifier, name))

    @property
    def __name__(self) -> str:
        return getattr(self.verifier, "__name__", type(self.verifier).__name__)

    def __repr__(self) -> str:
        own = repr(self.verifier)
        return describe(self.verifier) if " at 0x" in own else own  # an address is another one in the next process

    def _explain(self, completions: list[str], answers: list, **columns: list) -> list[Judgement]:
        if hasattr(self.verifier, "explain"):
            return self.verifier.explain(completions, answers, **columns)
        verify = getattr(self.verifier, "verify", self.verifier)
        return [Judgement(_verdict(verdict)) for verdict in verify(completions, answers, **columns)]


def as_verifier(verifier) -> Verifier:
    """
    Anything that verifies as a [`Verifier`]: one is returned as it is; an object with `verify` or `explain`, or a
    function, is wrapped.
    """
    return verifier if isinstance(verifier, Verifier) else OwnVerifier(verifier)


def default_workers() -> int:
    """One worker for each core that this process may use, divided among the processes of a node that do the same."""
    if multiprocessing.parent_process() is not None:
        return (
            1  # one of many that a `multiprocessing` pool, `datasets.map(num_proc=...)` or a `DataLoader` has started
        )
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
