"""
Our benchmarks as tasks of inspect-ai (https://inspect.aisi.org.uk), with our prompts, and `MathVerifier` as the
scorer.

    inspect eval trl_offpolicy/math500 --model vllm/runs/gsm8k-dft --epochs 16
    inspect eval trl_offpolicy/benchmark -T name=my_problems.jsonl --model openai/gpt-5 --max-tokens 8192

Its viewer of logs, epochs, retries and API models come with it (`pip install 'trl-offpolicy[inspect]'`). What is asked
and what the verdicts are is as in `evaluate`: a cut sample and one without an answer count as wrong, and one that
could not be judged is not scored. Not as there: chat templates are the provider's, so plain text prompts are refused,
prompts are not held against those of a training, and no seed is sent, since inspect-ai would send the same one in every
epoch, with which a server repeats its sample.
"""

from collections.abc import Iterable

import anyio
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    ModelOutput,
)
from inspect_ai.scorer import Score, Scorer, Target, accuracy, scorer, stderr
from inspect_ai.solver import TaskState, generate

from ..data import prompts
from ..data.rows import Verdict
from ..sampling.sampler import Completion
from ..verification.math_verifier import MathVerifier
from ..verification.verdict_queue import judge
from ..verification.verifier import Verifier
from .benchmarks import BENCHMARKS, Question, load_benchmark, read_questions
from .evaluation_config import EvaluationConfig


# "unknown" is what providers say that do not tell why a sample ended, as that of `transformers` models.
_FINISH_REASONS = {"stop": "stop", "unknown": "stop", "max_tokens": "length", "model_length": "length"}
_ROLES = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}


@task
def benchmark(
    name: str = "math500", solve_prompt: str = prompts.SOLVE_PROMPT, system_prompt: str | None = None
) -> Task:
    """
    A benchmark as `evaluate` asks it: one of ours by name, a file, or a Hub dataset as `id:config:split`.

    Args:
        name (`str`, *optional*, defaults to `"math500"`): See [`~evaluation.benchmarks.load_benchmark`].
        solve_prompt, system_prompt (*optional*): As for [`EvaluationConfig`].

    Raises:
        ValueError: There is no such benchmark, or its prompts are plain texts.
    """
    return _of_name(name, solve_prompt, system_prompt)


def task_of(
    name: str,
    rows: Iterable[dict],
    solve_prompt: str = prompts.SOLVE_PROMPT,
    system_prompt: str | None = None,
    verifier: Verifier | None = None,
) -> Task:
    """
    The task of these `rows`; the other arguments are those of [`benchmark`], and the verifier by default a
    [`MathVerifier`].
    """
    defaults = EvaluationConfig()
    config = GenerateConfig(
        temperature=defaults.temperature,
        top_p=defaults.top_p,
        max_tokens=defaults.max_completion_length,
    )
    columns = () if verifier is None else verifier.columns
    questions = read_questions(name, rows, solve_prompt, system_prompt)
    samples = [_sample(name, question, columns) for question in questions]
    return Task(
        dataset=MemoryDataset(samples, name=name), solver=generate(), scorer=verified(verifier), config=config, name=name
    )  # fmt: skip


@scorer(metrics=[accuracy(), stderr()])
def verified(verifier: Verifier | None = None) -> Scorer:
    """
    The verdict of a verifier, by default a [`MathVerifier`]: 1 if it is `correct`, unscored if it could not be told
    or the gold answer cannot be compared with.
    The columns of the row that it names are taken from the sample's metadata.
    """
    verifier = verifier or MathVerifier()
    golds: dict[str, Verdict] = {}  # whether a gold answer can be compared with is the same in every epoch

    async def score(state: TaskState, target: Target) -> Score:
        completion = _completion(state.output)
        (judgement,) = await anyio.to_thread.run_sync(judge, verifier, [completion], [target.text], [state.metadata])
        if target.text not in golds:
            (golds[target.text],) = await anyio.to_thread.run_sync(verifier.check_answers, [target.text])
        verdict, reason = judgement
        said = {"explanation": reason or str(verdict), "metadata": {"verdict": str(verdict)}}
        if verdict in (Verdict.TIMEOUT, Verdict.ERROR):
            return Score.unscored(reason=str(verdict), **said)
        if golds[target.text] != Verdict.CORRECT or judgement.gold_at_fault:
            return Score.unscored(reason="gold_unparsable", **said)
        return Score(value=float(verdict == Verdict.CORRECT), **said)

    return score


def _sample(name: str, question: Question, columns: Iterable[str]) -> Sample:
    if isinstance(question.prompt, str):
        raise ValueError(
            f"The prompts of benchmark {name!r} are plain texts, which inspect-ai would ask as messages. Measure it with `trl-offpolicy eval`, which "
            "asks them as they are, or call the column `problem`."
        )
    turns: list[ChatMessage] = [_ROLES[turn["role"]](content=turn["content"]) for turn in question.prompt]
    given = {name: question.row[name] for name in columns if name in question.row}
    return Sample(input=turns, target=question.answer, id=question.id, metadata=given)


def _completion(output: ModelOutput) -> Completion:
    reason = _FINISH_REASONS.get(output.stop_reason, "error")
    error = None if reason != "error" else f"the provider ended it: {output.error or output.stop_reason}"
    return Completion("", output.completion, [], [], reason, error)


def _of_name(name: str, solve_prompt: str, system_prompt: str | None) -> Task:
    short, rows = load_benchmark(name)
    return task_of(short, rows, solve_prompt, system_prompt)


def _named(name: str):
    def of_ours(solve_prompt: str = prompts.SOLVE_PROMPT, system_prompt: str | None = None) -> Task:
        return _of_name(name, solve_prompt, system_prompt)

    of_ours.__name__ = name
    return task(of_ours)


TASKS = {name: _named(name) for name in BENCHMARKS}
