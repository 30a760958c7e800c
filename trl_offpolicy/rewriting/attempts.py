"""
How attempts at problems are asked for, judged and written down until each problem has its outcome: what a rewrite does
with all rows of its run, and online training with those of its next steps.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ..data.rows import Problem, Source, Verdict, reference_digest, source_of
from ..runs.journal import Attempt, Journal, Result
from ..sampling.provenance import template_digest
from ..sampling.sampler import FAILED, Completion, Request, Sampler, SamplerError, attempt_seed
from ..verification.drawing import Asked, Drawing
from ..verification.verdict_queue import Judged
from ..verification.verifier import Verifier, describe
from .candidate_scores import score_demonstrations, scored
from .guided_filters import reject_guided
from .problems import Problems
from .rewrite_config import RewriteConfig
from .scheduler import Draw, Scheduler, Speculation
from .teachers import same_tokens


def journal_config(
    args: RewriteConfig,
    plain: bool,
    verifier: Verifier,
    sampler: Sampler,
    guided_sampler: Sampler | None = None,
    teachers: Mapping[str, Sampler] = MappingProxyType({}),
) -> dict:
    """
    On what an attempt and its verdict depend: a journal's first line. `plain`: whether the prompts are plain texts.
    """
    config = {"journal_format": 2, "model": sampler.name, "model_revision": sampler.revision, **args.identity()}
    if guided_sampler is not None:
        config |= {"rewriter_adapter": guided_sampler.name, "rewriter_revision": guided_sampler.revision}
    config["stages"] = args.drawn_stages(teachers)
    if teachers:
        config["teachers"] = {name: {"model": t.name, "revision": t.revision} for name, t in teachers.items()}
    config |= {"chat_template": template_digest(sampler.processing_class), "verifier": describe(verifier)}
    return config | ({"plain_prompts": "asked as they are"} if plain else {})  # older journals asked these as messages


def shown_problem(draw: Draw, journal: Journal) -> Problem:
    """The problem of a draw; of a guided one that retells a teacher's solution, with that for its demonstration."""
    state: Any = draw.state
    if state.reference is None or source_of(draw.stage) != Source.GUIDED:
        return state.problem
    if state.shown is None:
        state.shown = replace(state.problem, demonstration=journal.read(state.reference.result.offset)["text"])
    return state.shown


class Attempts:
    """
    The attempts at problems, with the settings that they have in common.

    Args:
        args ([`RewriteConfig`]): How they are drawn, and which are kept.
        sampler_of (`Callable[[str], Sampler]`): From a stage to the engine that draws its attempts.
        version (`int`, *optional*, defaults to `0`): Optimizer steps that the policy has been trained for; part of
            each attempt's seed.
    """

    def __init__(self, args: RewriteConfig, sampler_of: Callable[[str], Sampler], version: int = 0):
        self.args, self.sampler_of, self.version = args, sampler_of, version
        self._shared: dict[str, bool] = {}

    def draw(
        self,
        problems: Problems,
        scheduler: Scheduler,
        drawing: Drawing,
        journal: Journal,
        note: Callable[[dict], None] = lambda entry: None,
        update: Callable[[int], None] = lambda under_way: None,
    ) -> None:
        """
        Draws what the scheduler asks for until every problem has its outcome, or until the drawing is over: then what
        the engine has finished still gets its verdict, and the rest is aborted.

        Args:
            note (`Callable`, *optional*): Called with each line of the journal.
            update (`Callable`, *optional*): Called between two looks at the engine, with the number of attempts there.

        Raises:
            SamplerError: The engine cannot go on, or not one attempt of a new journal could be drawn.
            ValueError: Not one could be asked, which another try would not change.
        """
        counts, sampler, student = scheduler.counts, drawing.samplers[0], self.sampler_of(Source.SELF)
        # A server tells of tokens when an attempt is finished: it takes several of each slot to know its rate.
        speculation = Speculation(sampler.slots, 1024 if sampler.drawn_tokens is None else 32)
        reasons: set[str] = set()

        def ask() -> Asked | None:
            most = speculation.most(min(drawing.sampling, scheduler.open_rows))
            draw = scheduler.next(speculate=drawing.sampling < most)
            if draw is not None and draw.state.problem is None:  # begun before a resume
                (draw.state.problem,) = problems.read(draw.state.row, 1)
            return None if draw is None else self._asked(draw, shown_problem(draw, journal), problems)

        def record(batch: list[Judged]) -> list[Result]:
            of = [shown_problem(judged.item, journal) for judged in batch]
            attempts = [
                self.attempt(problem, draw.stage, draw.attempt, completion, verdict, reason)
                for problem, (draw, completion, verdict, reason, _) in zip(of, batch, strict=True)
            ]
            results = []
            try:
                if self.args.ranks:
                    attempts = scored(of, attempts, problems, student)
                    self._score_demonstrations(batch, problems, journal)
            finally:  # they are drawn, whatever became of their scores
                for attempt in attempts:
                    entry = attempt.entry()
                    note(entry)
                    results.append(attempt.result(journal.append(entry)))
            return results

        def take(judged: Judged, result: Result) -> None:
            counts.failed += result.finish_reason in FAILED
            reasons.add(result.finish_reason)
            counts.drawn += result.finish_reason not in FAILED
            for request_id in scheduler.record(judged.item, result):
                drawing.abort(request_id)

        with drawing:
            while not drawing.over() and drawing.submit(iter(ask, None)):
                under_way = drawing.sampling
                update(under_way)
                for judged, result in drawing.judged(record):
                    take(judged, result)
                speculation.note(under_way, drawing.drawn_tokens(), time.monotonic())
            batch = list(drawing.give_up())
            for judged, result in zip(batch, record(batch), strict=True):
                take(judged, result)
        if (
            counts.failed and not counts.drawn and not problems.memory.num_known
        ):  # no reason to keep all demonstrations
            message = f"not one of {counts.failed:,} attempts could be drawn; the last one: {judged.reason}"
            if "error" in reasons:
                raise SamplerError(message)
            raise ValueError(f"{message}. The same prompts would be refused again: change them, or the template.")

    def _score_demonstrations(self, batch: list[Judged], problems: Problems, journal: Journal) -> None:
        """Those of problems whose first attempts these are, where demonstrations compete."""
        if self.args.competes and problems.have_demonstrations:
            states = {judged.item.state.id: judged.item.state for judged in batch}
            states = {name: state for name, state in states.items() if state.demonstration is None}
            of = [state.problem for state in states.values()]
            found = score_demonstrations(of, problems, self.sampler_of(Source.SELF), journal)
            for state, result in zip(states.values(), found, strict=True):
                state.demonstration = result

    def _shares_tokens(self, stage: str) -> bool:
        """Whether what a teacher's stage draws has the student's token ids; comparing vocabularies takes a while."""
        if stage not in self._shared:
            self._shared[stage] = same_tokens(self.sampler_of(stage), self.sampler_of(Source.SELF))
        return self._shared[stage]

    def _asked(self, draw: Draw, problem: Problem, problems: Problems) -> Asked:
        args = self.args
        seed = attempt_seed(args.seed, problem.id, draw.stage, draw.attempt, self.version)
        prompt = problems.prompt(problem, draw.stage)
        # Variables of the student's chat template are none of a teacher's.
        given: Any = args.chat_template_kwargs if source_of(draw.stage) != Source.TEACHER else None
        request = Request(draw.id, prompt, seed, args.sampling_params(), given)
        if args.hinted and source_of(draw.stage) == Source.GUIDED:
            request = replace(request, unhinted_prompt=problems.prompt(problem, Source.SELF), hint_beta=args.hint_beta)
        return Asked(draw, request, self.sampler_of(draw.stage), problem.answer, problem.row)

    def attempt(
        self, problem: Problem, stage: str, attempt: int, completion: Completion, verdict: Verdict, reason: str
    ) -> Attempt:
        """An attempt with its verdict, and why a guided one is not kept though it is correct."""
        guided = source_of(stage) == Source.GUIDED
        judged_on = verdict == Verdict.CORRECT and guided
        found = reject_guided(completion.text, problem, self.args) if judged_on else None
        rejected, reason = found or ("", reason)
        log_probs, ids = completion.log_probs, completion.completion_ids
        if source_of(stage) == Source.TEACHER:
            ids = ids if self._shares_tokens(stage) else []
            log_probs = log_probs if ids and self.args.teacher_log_probs else []
        if not log_probs and verdict == Verdict.CORRECT and stage == Source.SELF and self.args.ranks:
            raise ValueError(
                f"You passed selection='max_log_prob', but {self.sampler_of(stage).name} returned no log-probs for {completion.id}. Use another engine, "
                "or selection='random'."
            )
        log_prob = round(sum(log_probs) / len(log_probs), 6) if log_probs else None
        reference = reference_digest(problem.demonstration) if guided else 0
        if self.args.reference_from == "teacher" and source_of(stage) == Source.TEACHER:
            reference = reference_digest(completion.text)
        own = completion.unhinted_log_probs or []
        attempted = Attempt(
            problem.id, stage, attempt, verdict, completion.finish_reason, len(completion.completion_ids), log_prob, reference, rejected,
            round(sum(own), 6) if own else None, len(own), version=self.version, reason=reason,
        )  # fmt: skip
        if (verdict == Verdict.CORRECT and not rejected) or self.args.keep_rejected:
            log_probs = [round(x, 6) for x in log_probs]
            return replace(attempted, text=completion.text, completion_ids=ids, behavior_log_probs=log_probs)
        return attempted
