"""How far training has moved a model from the policy that it began with, without sampling anything new.

The first `self` attempt at each problem in a rewrite's journal was drawn from the initial policy π_0, whatever became
of it, and its log π_0 is stored. So the mean of log π_0(y|x) - log π(y|x) over them estimates KL(π_0‖π) on the task's
prompts without bias, for the price of one forward pass of each. That divergence predicts what is forgotten (*RL's
Razor*, arXiv 2509.04259). Later attempts exist only where earlier ones failed, so they are left out.
"""

import json
from itertools import chain
from pathlib import Path

import numpy as np

from ..data.tokenization import encode_prompt
from ..data.whole_file import write_whole
from ..runs.run_directory import RunDirectory
from ..sampling.loading import model_and_tokenizer
from ..sampling.log_probs import target_log_probs
from .estimators import bootstrap


def measure_forgetting(
    model,
    run_dir: str,
    processing_class=None,
    batch_tokens: int = 8192,
    output_dir: str | None = None,
    model_init_kwargs: dict | None = None,
    chat_template: str | None = None,
) -> dict:
    """
    KL(π_0‖π) of `model` π on the prompts of a rewrite, whose self attempts π_0 drew.

    Args:
        model (`str` or `PreTrainedModel`): The trained model π.
        run_dir (`str`): Output directory of a finished rewrite with π_0: stage `self`, plain sampling,
            `keep_rejected`.
        processing_class (`PreTrainedTokenizerBase`, *optional*): By default the model's.
        batch_tokens (`int`, *optional*, defaults to `8192`): Tokens of one forward, padding included.
        output_dir (`str`, *optional*): Also writes `forgetting.json` there.
        model_init_kwargs (`dict`, *optional*): Passed to `from_pretrained`.
        chat_template (`str`, *optional*): Jinja template used in training, where that is not the tokenizer's.

    Returns:
        `dict`: `problems`, `tokens` (their mean), `kl` (nats per completion) and `kl_per_token` (nats), each with
            `…_ci95`, a bootstrap interval over problems. A completion that was cut counts as far as it was drawn.

    Raises:
        ValueError: The run has no such attempts: it is not finished, has no stage `self`, was not sampled from the
            model's own distribution, or kept no rejected attempts.
    """
    prompts, drawn = _first_attempts(Path(run_dir).expanduser())
    model, processing_class = model_and_tokenizer(model, processing_class, model_init_kwargs)
    pairs = [
        (encode_prompt(processing_class, prompt, chat_template, tools, given), drawn[row_id][0])
        for row_id, (prompt, tools, given) in prompts.items()
    ]
    now = [x.double().sum().item() for x in target_log_probs(model, pairs, batch_tokens)]
    before = [sum(drawn[row_id][1]) for row_id in prompts]
    sums = np.array([[b - n, len(ids)] for b, n, (_, ids) in zip(before, now, pairs, strict=True)])
    result = {"problems": len(sums), "tokens": sums[:, 1].mean().item(), **_with_intervals(sums)}
    if output_dir is not None:
        directory = Path(output_dir).expanduser()
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / "forgetting.json", json.dumps({"run_dir": str(run_dir), **result}, indent=1) + "\n")
    return result


def _with_intervals(sums: np.ndarray) -> dict:
    def statistics(means: np.ndarray) -> np.ndarray:
        return np.stack([means[:, 0], means[:, 0] / means[:, 1]], -1)

    values, intervals = statistics(sums.mean(0, keepdims=True))[0], bootstrap(sums, statistics)
    names = ("kl", "kl_per_token")
    return {name: value.item() for name, value in zip(names, values, strict=True)} | {
        f"{name}_ci95": interval.tolist() if len(sums) > 1 else None
        for name, interval in zip(names, intervals, strict=True)
    }


def _first_attempts(run_dir: Path) -> tuple[dict, dict]:
    """
    By id: (prompt, tools, chat_template_kwargs) of each problem, and (token ids, log π_0 of each) of its first `self`
    attempt.
    """
    run = RunDirectory(run_dir)
    passed = run.check_self_attempts()
    drawn = {}
    for attempt in run.first_attempts():
        if not attempt.behavior_log_probs:
            raise ValueError(
                f"{passed}, whose journal has no log-probs of the attempt at {attempt.id}: rejected attempts were not kept, or a stop text ended it. "
                "Rewrite with keep_rejected=True and without `stop`; the accepted attempts alone would be a biased sample."
            )
        drawn[attempt.id] = attempt.completion_ids, attempt.behavior_log_probs
    unsolved = [row for row in run.unsolved() if row["id"] in drawn]
    if any("prompt" not in row for row in unsolved):
        raise ValueError(
            f"{passed}, whose unsolved problems have no prompt, as it was made before those were kept; the solved ones alone would be a biased "
            "sample. Run the same `trl-offpolicy rewrite` again: it samples nothing, and writes them."
        )
    rows = run.rows()
    names = {"id", "prompt", "tools", "chat_template_kwargs"} & set(rows.schema.names)
    prompts = {
        row["id"]: (row["prompt"], row.get("tools"), row.get("chat_template_kwargs"))
        for row in chain(rows.to_table(columns=sorted(names)).to_pylist(), unsolved)
        if row["id"] in drawn
    }
    if not prompts:
        raise ValueError(f"{passed}, in whose journal there is no first attempt of stage `self` at any of its rows.")
    return prompts, drawn
