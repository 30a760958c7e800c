"""Accuracy on problems with a final answer: sample k times, verify, report avg@k and pass@k with intervals over problems."""

import math
from collections.abc import Iterable

from tqdm.auto import tqdm

from . import prompts
from .rows import Verdict, content_id
from .sampling import Request, Sampler, SamplingParams, attempt_seed


def evaluate(
    model,
    benchmarks: dict[str, Iterable[dict]],
    num_generations: int = 16,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_completion_length: int = 4096,
    seed: int = 42,
    solve_prompt: str = prompts.SOLVE_PROMPT,
    sampler: Sampler | None = None,
    verifier=None,
    processing_class=None,
) -> dict[str, dict]:
    """
    avg@k and pass@k of `model` on each benchmark.

    Args:
        model (`str` or `PreTrainedModel`): What is evaluated (ignored when a `sampler` is passed).
        benchmarks (`dict[str, Iterable[dict]]`): Rows by name, each with `answer` and a conversational `prompt`, or with `problem` or
            `question`, which `solve_prompt` turns into one.
        num_generations (`int`, *optional*, defaults to `16`): k; the papers' avg@16. With `temperature=0.0`, 1 is greedy decoding.

    Returns:
        `dict`: For each benchmark `avg@k` and `pass@k` (shares), `avg@k_se` (standard error over problems, so that the k samples of
        one problem count as one observation), `num_problems`, `truncated`, `not_told` (shares of the samples that were cut, or that
        the verifier could not judge), `mean_length` (tokens) and `num_correct` (list, of k, in row order).

    Raises:
        ValueError: A benchmark is empty, or a row has no problem or no answer.
    """
    if sampler is None:
        from .sampling.transformers_sampler import TransformersSampler

        sampler = TransformersSampler(model, processing_class)
    own_verifier = verifier is None
    if own_verifier:
        from .verification import MathVerifier

        verifier = MathVerifier()
    params = SamplingParams(temperature, top_p, top_k, max_completion_length)
    try:
        return {
            name: _evaluate(name, list(rows), num_generations, params, seed, solve_prompt, sampler, verifier)
            for name, rows in benchmarks.items()
        }
    finally:
        if own_verifier:
            verifier.close()


def _evaluate(
    name: str,
    rows: list[dict],
    k: int,
    params: SamplingParams,
    seed: int,
    solve_prompt: str,
    sampler: Sampler,
    verifier,
) -> dict:
    if not rows:
        raise ValueError(f"Benchmark {name!r} has no rows.")
    requests, golds = {}, {}
    for index, row in enumerate(rows):
        prompt = _prompt(name, index, row, solve_prompt)
        problem_id = content_id(prompt, str(row["answer"]))
        for attempt in range(k):
            request_id = f"{index}/{attempt}"
            golds[request_id] = str(row["answer"])
            requests[request_id] = Request(request_id, prompt, attempt_seed(seed, problem_id, "eval", attempt), params)
    waiting, completions = list(requests.values())[::-1], []
    with tqdm(total=len(requests), desc=name, unit="sample", leave=False) as bar:
        while len(completions) < len(requests):
            while waiting and len(requests) - len(waiting) - len(completions) < sampler.capacity:
                sampler.submit(waiting.pop())
            finished = sampler.poll()
            if not finished:
                raise RuntimeError(
                    f"{sampler.name}: the sampler has {len(requests) - len(waiting) - len(completions)} requests but returned none."
                )
            completions += finished
            bar.update(len(finished))
    whole = [c for c in completions if c.finish_reason == "stop"]
    verdicts = getattr(verifier, "verify", verifier)([c.text for c in whole], [golds[c.id] for c in whole])
    correct = [0] * len(rows)
    for completion, verdict in zip(whole, verdicts, strict=True):
        correct[int(completion.id.split("/")[0])] += verdict == Verdict.CORRECT
    n, mean = len(rows), sum(correct) / len(rows) / k
    variance = sum((c / k - mean) ** 2 for c in correct) / max(1, n - 1)
    total = len(completions)
    return {
        f"avg@{k}": mean,
        f"avg@{k}_se": math.sqrt(variance / n),
        f"pass@{k}": sum(c > 0 for c in correct) / n,
        "num_problems": n,
        "truncated": sum(c.finish_reason == "length" for c in completions) / total,
        "not_told": sum(v in (Verdict.TIMEOUT, Verdict.ERROR) for v in verdicts) / total,
        "mean_length": sum(len(c.completion_ids) for c in completions) / total,
        "num_correct": correct,
    }


def _prompt(name: str, index: int, row: dict, solve_prompt: str) -> list[dict[str, str]]:
    if row.get("answer") in (None, ""):
        raise ValueError(f"Row {index} of benchmark {name!r} has no `answer`; its columns are {list(row)}.")
    if isinstance(row.get("prompt"), list):
        return [{"role": m["role"], "content": m["content"]} for m in row["prompt"]]
    text = row.get("prompt") or row.get("problem") or row.get("question")
    if not text:
        raise ValueError(
            f"Row {index} of benchmark {name!r} has no `prompt`, `problem` or `question`; its columns are {list(row)}."
        )
    return [{"role": "user", "content": text if row.get("prompt") else prompts.fill(solve_prompt, problem=text)}]
