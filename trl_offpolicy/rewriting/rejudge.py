"""A journal's texts judged anew by another verifier."""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

from tqdm.auto import tqdm

from ..data.rows import Problem, Source
from ..data.whole_file import link_or_copy, partial_file
from ..runs.journal import Attempt, Journal, read_header
from ..sampling.sampler import Completion
from ..verification.verdict_queue import judge
from ..verification.verifier import Verifier
from .problems import CHUNK, Problems, refused


def rejudge(
    path: Path, config: dict, problems: Problems, verifier: Verifier, as_attempt: Callable[..., Attempt]
) -> int:
    """
    Puts a journal with this verifier's verdicts on the same texts in the place of the one at `path`, which stays
    beside it under a number.

    Left out are attempts at problems whose gold answer this verifier cannot compare with, at rows that are not in the
    dataset, and at references that have changed; and those whose texts were not kept, which are drawn again where they
    matter.

    Args:
        path (`Path`): The journal.
        config (`dict`): The first line of the new one.
        problems ([`Problems`]): The rows that it is about.
        verifier ([`~verification.verifier.Verifier`]): Who judges now.
        as_attempt (`Callable`): From problem, stage, number, completion, verdict and reason to an attempt.

    Returns:
        `int`: How many attempts were left out because they have no text.
    """
    old, lost = Journal(path, read_header(path)), 0  # nobody else writes to it meanwhile
    problems.memory.recall(old.entries(texts=False), config["stages"])
    try:
        with partial_file(path) as partial:
            new = Journal(partial, config)
            for start in tqdm(range(0, len(problems), CHUNK), desc="judging anew", unit=f"{CHUNK} rows"):
                chunk = list(problems.read(start, CHUNK))
                odd = refused(verifier, chunk)
                attempts = [
                    (problem, Attempt.of(old.read(result.offset)))
                    for problem, stages in zip(chunk, problems.memory.known(start, CHUNK), strict=True)
                    for result in chain.from_iterable(results.values() for results in stages.values())
                    if problem.id not in odd and not result.reference
                ]
                lost += _append_judged(new, attempts, verifier, as_attempt)
            new.close()
            number = next(n for n in count(1) if not path.with_name(f"{path.name}.{n}").exists())
            link_or_copy(path, path.with_name(f"{path.name}.{number}"))  # so that there is one at `path` all the time
            partial.replace(path)
    finally:
        old.close()
    return lost


def _append_judged(
    journal: Journal,
    attempts: list[tuple[Problem, Attempt]],
    verifier: Verifier,
    as_attempt: Callable[..., Attempt],
) -> int:
    """Appends attempts of another journal with verdicts of this verifier; returns how many have no text."""
    # What was cut, and the scores of demonstrations, no verifier is shown.
    cut = [attempt for _, attempt in attempts if attempt.finish_reason == "length" or attempt.stage == Source.EXPERT]
    whole = [(p, a) for p, a in attempts if a.finish_reason == "stop" and a.text is not None]
    for attempt in cut:
        journal.append(attempt.entry())
    completions = [Completion(a.id, a.text, a.completion_ids, a.behavior_log_probs, "stop") for _, a in whole]
    judgements = judge(verifier, completions, [p.answer for p, _ in whole], [p.row for p, _ in whole])
    for (problem, old), completion, verdict in zip(whole, completions, judgements, strict=True):
        new = as_attempt(problem, old.stage, old.attempt, completion, *verdict)
        # Its log-probs are rounded, and their mean was taken before that.
        names = ("log_prob", "num_tokens", "initial_log_prob", "initial_tokens")
        scores = {name: getattr(old, name) for name in names}
        journal.append(replace(new, **scores).entry())
    return len(attempts) - len(cut) - len(whole)
