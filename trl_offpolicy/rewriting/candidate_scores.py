"""
How likely the student finds a candidate under the prompt that it will be trained on: by this candidates are ranked.

A candidate's own log μ does not tell it where its prompt was another: a copy of the reference is likely under a prompt
that holds the reference. Attempts of the stage `self` were drawn under the very prompt, so their log μ is log π_0; of
all others it takes one forward, of those that may be kept, and the sum is in the journal (`guided_decoding="hinted"`
knows it from the draw).
"""

from collections.abc import Sequence
from dataclasses import replace

from ..data.rows import Problem, Source, Verdict, reference_digest
from ..data.tokenization import encode_prompt, encode_target, template_kwargs
from ..runs.journal import Attempt, Journal, Result
from ..sampling.sampler import Sampler
from .problems import CHUNK, Problems


def check_can_score(student: Sampler) -> None:
    """`ValueError` if this engine cannot tell the log-probs of given texts; says what to do instead."""
    try:
        if student.processing_class is None:
            raise NotImplementedError(f"{student.name} does not say which tokenizer it has (`processing_class`).")
        student.token_log_probs([])
    except NotImplementedError as error:
        raise ValueError(
            "Candidates are ranked by the log-probability that the model gives them under the prompt that is trained on, which "
            f"retellings and other texts have to be scored for. {error} Use an engine that can, or selection='first' or 'random', or "
            "selection='max_log_prob' with stages=['self'] alone, which needs no scores."
        ) from error


def scored(of: Sequence[Problem], attempts: list[Attempt], problems: Problems, student: Sampler) -> list[Attempt]:
    """
    The attempts at these problems, those that may be kept with their `initial_log_prob` and `initial_tokens`; a text
    that is longer than the context has none.

    Raises:
        SamplerError: The engine cannot go on.
    """
    due = [
        i
        for i, attempt in enumerate(attempts)
        if attempt.stage != Source.SELF and attempt.result(0).accepted and not attempt.initial_tokens
    ]
    pairs = [_target(of[i], attempts[i], problems, student) for i in due]
    attempts = list(attempts)
    for i, found in zip(due, student.token_log_probs(pairs) if pairs else (), strict=True):
        if found:
            total = round(sum(found), 6)
            attempts[i] = replace(attempts[i], initial_log_prob=total, initial_tokens=len(found))
    return attempts


def score_demonstrations(
    of: Sequence[Problem], problems: Problems, student: Sampler, journal: Journal
) -> list[Result]:
    """The scores of the demonstrations of these problems, each of which is a line of the journal now."""
    attempts = [
        Attempt(
            problem.id, str(Source.EXPERT), 0, Verdict.CORRECT, "stop", 0, None, reference_digest(problem.demonstration),
            text=problems.expert_text(problem),
        )
        for problem in of
    ]  # fmt: skip
    attempts = scored(of, attempts, problems, student)
    return [a.result(journal.append(replace(a, text=None).entry())) for a in attempts]


def _target(problem: Problem, attempt: Attempt, problems: Problems, student: Sampler) -> tuple[list[int], list[int]]:
    """The ids of the prompt that is trained on, and of what the attempt would be trained on."""
    tokenizer, kwargs = student.processing_class, template_kwargs(problems.args.chat_template_kwargs)
    prompt = problems.prompt(problem, Source.SELF)
    if attempt.completion_ids:
        return encode_prompt(tokenizer, prompt, chat_template_kwargs=kwargs), attempt.completion_ids
    return encode_target(tokenizer, prompt, attempt.text or "", chat_template_kwargs=kwargs)


def score_known(journal: Journal, problems: Problems, student: Sampler) -> None:
    """
    Appends a line with its score for each attempt that may be kept and has none: it was drawn when nothing was ranked,
    or the engine failed before the score was told. Likewise for the demonstrations of problems that were begun, where
    they compete.
    """
    competes = problems.args.competes and problems.have_demonstrations
    for start in range(0, len(problems), CHUNK):
        known = problems.memory.known(start, CHUNK)
        due = [[r for r in _results(of) if r.accepted and r.initial_mean != r.initial_mean] for of in known]
        bare = [competes and bool(of) and Source.EXPERT not in of for of in known]
        if not any(due) and not any(bare):
            continue
        chunk = list(problems.read(start, CHUNK))
        of = [problem for problem, results in zip(chunk, due, strict=True) for _ in results]
        attempts = [Attempt.of(journal.read(result.offset)) for results in due for result in results]
        for attempt in scored(of, attempts, problems, student):
            if attempt.initial_tokens:
                journal.append(attempt.entry())
        score_demonstrations(
            [p for p, is_bare in zip(chunk, bare, strict=True) if is_bare], problems, student, journal
        )


def _results(of_problem: dict[str, dict[int, Result]]) -> list[Result]:
    """What is known of the attempts at a problem; not the score of its demonstration, which may be out of reach."""
    return [r for stage, results in of_problem.items() if stage != Source.EXPERT for r in results.values()]
