"""How far a dataset is from a policy: the log-probability of its targets, by source, before and after rewriting.

"Mind the Gap", Table 3, reports the mean over rows of Σ_t log π(y_t|x, y_<t): that is `sequence_log_prob` here. It
favours short targets, so the mean per token, the length and a difference at equal length stand beside it, and the
prompt is rendered as in training. The paper's own script scores the bare concatenation of question and answer instead:
`concatenate=True`.
"""

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from trl.data_utils import common_prefix_length

from ..data import prompts
from ..data.control_tokens import ControlTokens, check_mode
from ..data.formats import as_completion, demonstration, known_format, read_rows
from ..data.loading import plain_rows
from ..data.rows import Source
from ..data.text_statistics import copy_ratio, distinct_n, leaks_hint, self_bleu
from ..data.tokenization import encode_target, says_otherwise, template_kwargs
from ..data.whole_file import write_whole
from ..sampling.loading import model_and_tokenizer
from ..sampling.log_probs import target_log_probs
from .estimators import bootstrap


# Quantities computed for each row; every reported number is a function of their means.
COLUMNS = (
    "before_log_prob", "before_tokens", "after_log_prob", "after_tokens", "matched_difference", "matched_tokens", "k3", "ratio", "ratio_sq",
    "behavior_tokens",
)  # fmt: skip
MAX_TEXTS = 200  # of a source, for the diversity of its texts
NUM_RESAMPLES = 2000


def measure_policy_gap(
    model,
    dataset,
    processing_class=None,
    batch_tokens: int = 8192,
    concatenate: bool = False,
    chat_template: str | None = None,
    output_dir: str | None = None,
    model_init_kwargs: dict | None = None,
    control_tokens: str = "warn",
    chat_template_kwargs: dict | str | None = None,
    solve_prompt: str = prompts.SOLVE_PROMPT,
    answer_column: str = "answer",
    system_prompt: str | None = None,
) -> dict:
    """
    The policy gap of a rewritten dataset under `model`.

    Args:
        model (`str` or `PreTrainedModel`): Usually the model that will be trained, before training.
        dataset (`datasets.Dataset` or `list[dict]`): Rows written by `DataRewriter`; or demonstrations in any format
            that it takes, of which nothing was rewritten yet: then all are `expert`, and before equals after. Replay
            rows are left out.
        processing_class (`PreTrainedTokenizerBase`, *optional*): By default the model's.
        batch_tokens (`int`, *optional*, defaults to `8192`): Tokens of one forward, padding included.
        concatenate (`bool`, *optional*, defaults to `False`): Score the text of the problem followed directly by the
            text of the target, without template, separator or end of turn, as the script behind the paper's Table 3
            does (in float16, which is `model_init_kwargs={"dtype": "float16"}`).
        chat_template (`str`, *optional*): Jinja template used in training, where that is not the tokenizer's.
        output_dir (`str`, *optional*): Also writes `policy_gap.json`, and the sums of each row as
            `policy_gap.parquet`, there.
        model_init_kwargs (`dict`, *optional*): Passed to `from_pretrained`.
        control_tokens, chat_template_kwargs, solve_prompt, system_prompt, answer_column (*optional*): As in
            [`RewriteConfig`]; a rewrite with `escape` has escaped its control tokens already, and a row's own column
            `chat_template_kwargs` wins.

    Returns:
        `dict`: For each source there is and for `"total"`:

            - `rows`: their number;
            - `before` (the demonstrations) and `after` (the rows' completions): `sequence_log_prob` (mean over rows of
              the sum, nats) with standard error `sequence_log_prob_se`, `token_log_prob` (mean over all tokens),
              `perplexity` (exp of minus that), `num_tokens` (mean length), and of the texts `hint_leakage` (share that
              speak of a reference), `distinct_2` and `self_bleu` (of at most 200 texts); `after` also `copy_ratio`
              (share of 4-grams that the demonstration has too);
            - `difference`: after minus before of `sequence_log_prob` and `token_log_prob`, and `length_matched`: per
              token, over the first min(length before, length after) tokens of either target of a row;
            - `behavior`, where μ is known: `rows`, `kl` (k3 estimate of KL(μ‖π), nats per token) and `ess`
              ((Σw)²/(n·Σw²) of the tokens' unlimited w = π/μ). π is asked without the reference, μ was as the row was
              sampled.

            `…_ci95` are bootstrap intervals over rows, `None` for a single row. `copy_ratio` of `self` rows, whose
            sampler never saw the demonstration, is what two solutions of a problem share by chance; likewise their
            `hint_leakage`.

    Raises:
        ValueError: The dataset is empty, is no rewrite, or its demonstrations were not carried through; or the model
            cannot be loaded.
    """
    check_mode(control_tokens)
    rows = _demonstrations_as_rows(list(plain_rows(dataset)), answer_column, solve_prompt, system_prompt)
    _check_rows(rows, concatenate)
    rows = [{"chat_template_kwargs": template_kwargs(chat_template_kwargs), **row} for row in rows]
    model, processing_class = model_and_tokenizer(model, processing_class, model_init_kwargs)
    if not concatenate:
        control = ControlTokens(processing_class, control_tokens)
        control.check(
            (set().union(*map(control.within, prompts.contents(row["prompt"]))) for row in rows), "their prompts"
        )
        rows = [{**row, "prompt": control.prompt(row["prompt"])} for row in rows]
        rows = _with_own_ids(rows, processing_class)
    pairs, before, after = targets(rows, processing_class, concatenate, chat_template)
    log_probs = [x.double() for x in target_log_probs(model, pairs, batch_tokens)]
    sums = np.array(
        [
            _sums(log_probs[b], log_probs[a], [] if concatenate else row.get("behavior_log_probs") or [])
            for b, a, row in zip(before, after, rows, strict=True)
        ]
    )
    groups = {str(source): [i for i, row in enumerate(rows) if row["source"] == source] for source in Source}
    groups["total"] = list(range(len(rows)))
    texts = [_text_columns(row) for row in rows]
    result = {
        name: {"rows": len(members), **_summary(sums[members], [texts[i] for i in members])}
        for name, members in groups.items()
        if members
    }
    if output_dir is not None:
        _write(Path(output_dir).expanduser(), result, rows, sums, texts)
    return result


def _without_replay(rows: list[dict]) -> list[dict]:
    """The rows but those of replay: the policy's own answers to general prompts, which replace no demonstration."""
    kept = [row for row in rows if row.get("source") != Source.REPLAY]
    if rows and not kept:
        raise ValueError(
            f"All {len(rows):,} rows are replay rows, which replace no demonstration: there is no gap to measure. Pass the rewrite's `dataset`."
        )
    if len(kept) < len(rows):
        warnings.warn(
            f"{len(rows) - len(kept):,} of {len(rows):,} rows are replay rows, which replace no demonstration: they are left out.",
            stacklevel=4,
        )
    return kept


def _demonstrations_as_rows(
    rows: list[dict], answer_column: str, solve_prompt: str, system_prompt: str | None
) -> list[dict]:
    """
    Demonstrations that were not rewritten as the rows that they would be if none were; of anything else what is no
    replay row.
    """
    rows = _without_replay(rows)
    if not rows or {"source", "completion_ids"} & rows[0].keys() or known_format(rows[0]) is None:
        return rows  # `_check_rows` says what is missing, if anything is
    return [
        {
            "id": problem.id,
            "prompt": problem.prompt,
            "completion": as_completion(problem.prompt, problem.demonstration),
            "input_completion": problem.demonstration,
            "source": str(Source.EXPERT),
            "completion_ids": [],
        }
        for problem in read_rows(rows, answer_column, solve_prompt, system_prompt=system_prompt)
    ]


def _check_rows(rows: list[dict], concatenate: bool) -> None:
    """Before a model is loaded for them."""
    if not rows:
        raise ValueError("The dataset has no rows: there is no gap to measure.")
    needed = ("completion", "source") if concatenate else ("prompt", "completion", "source", "completion_ids")
    if missing := [name for name in needed if name not in rows[0]]:
        raise ValueError(
            f"The rows have no column {' and no '.join(missing)}, so they are no rewrite: pass what DataRewriter wrote (`dataset` in its "
            f"output_dir). Their columns: {list(rows[0])}"
        )


def _with_own_ids(rows: list[dict], processing_class) -> list[dict]:
    """
    The rows without `completion_ids`, and with them μ, where those are another model's: their texts are then tokenized
    anew.
    """
    others = {i for i, row in enumerate(rows) if says_otherwise(processing_class, row) is not None}
    if others:
        warnings.warn(
            f"{len(others):,} of {len(rows):,} rows have `completion_ids` that say something else than their texts to this model's tokenizer: they are "
            f"another model's ids (the first such row was sampled from {rows[min(others)].get('model')!r}). Their texts are tokenized anew, and the "
            "distance to the policy that sampled them (`behavior`) is not told.",
            stacklevel=3,
        )
    return [{**r, "completion_ids": [], "behavior_log_probs": []} if i in others else r for i, r in enumerate(rows)]


def targets(
    rows: list[dict], processing_class, concatenate: bool = False, chat_template: str | None = None
) -> tuple[list[tuple[list[int], list[int]]], list[int], list[int]]:
    """
    (prompt ids, target ids) of everything there is to score, and for each row the places of its demonstration and of
    its completion.
    """
    encode: Callable = _concatenated if concatenate else _templated
    pairs, before, after = [], [], []
    for row in rows:
        expert = demonstration(row)
        if expert is None:
            raise ValueError(
                f"Row {row.get('id')} does not carry its demonstration; pass the dataset as DataRewriter wrote it. Its columns: {list(row)}"
            )
        demonstrated, rewritten = encode(processing_class, row, expert, chat_template)
        pairs.append(demonstrated)
        before.append(len(pairs) - 1)
        if row["source"] != Source.EXPERT or prompts.contents(row["completion"])[-1] != expert:
            pairs.append(rewritten)
        after.append(len(pairs) - 1)  # an expert's row that is its demonstration is scored once
    return pairs, before, after


def _templated(processing_class, row: dict, expert: str, chat_template: str | None):
    """(prompt ids, target ids) of the demonstration and of the row's completion, as both are trained on."""

    def encode(text: str) -> tuple[list[int], list[int]]:
        return encode_target(processing_class, row["prompt"], text, chat_template, row.get("chat_template_kwargs"))

    (prompt, demonstrated), completion = encode(expert), prompts.contents(row["completion"])[-1]
    own = row["completion_ids"] or (demonstrated if completion == expert else encode(completion)[1])
    return (prompt, demonstrated), (prompt, own)


def _concatenated(processing_class, row: dict, expert: str, chat_template: None):
    """
    The same from one string without template; the question's tokens are those that it has in common with the question
    alone.
    """
    question = row.get("problem") or row.get("question") or prompts.contents(row["prompt"])[-1]
    alone = processing_class(question)["input_ids"]

    def pair(text: str) -> tuple[list[int], list[int]]:
        whole = processing_class(question + text)["input_ids"]
        start = common_prefix_length(alone, whole)
        return whole[:start], whole[start:]

    return pair(expert), pair(prompts.contents(row["completion"])[-1])


def _sums(before: torch.Tensor, after: torch.Tensor, behavior: list[float]) -> list[float]:
    """`COLUMNS` of one row."""
    matched = min(len(before), len(after))
    ratio = k3 = torch.zeros(0)
    if len(behavior):
        log_ratio = after - torch.tensor(behavior, dtype=torch.float64)
        ratio = log_ratio.exp()
        k3 = ratio - 1 - log_ratio
    return [
        before.sum().item(), len(before), after.sum().item(), len(after), (after[:matched].sum() - before[:matched].sum()).item(), matched,
        k3.sum().item(), ratio.sum().item(), (ratio**2).sum().item(), len(behavior),
    ]  # fmt: skip


def _text_columns(row: dict) -> dict:
    """What is said of the demonstration and the completion of one row."""
    before, after = demonstration(row), prompts.contents(row["completion"])[-1]
    asked = (
        prompts.contents(row["prompt"])[-1] if row.get("prompt") else ""
    )  # words that the prompt itself uses are not counted as leaks
    leaks = {"before_leaks_hint": leaks_hint(before, asked), "after_leaks_hint": leaks_hint(after, asked)}
    return {"before": before, "after": after, "copy_ratio": copy_ratio(after, before), **leaks}


def _summary(sums: np.ndarray, texts: list[dict]) -> dict:
    summary: dict = {"before": {}, "after": {}, "difference": {}}
    for name, value in _with_intervals(sums, _gap).items():
        part, _, rest = name.partition(".")
        summary[part][rest] = value
    sample = texts if len(texts) <= MAX_TEXTS else random.Random(0).sample(texts, MAX_TEXTS)
    for i, part in enumerate(("before", "after")):
        column = sums[:, 2 * i]
        summary[part] |= {
            "sequence_log_prob_se": (column.std(ddof=1) / len(column) ** 0.5).item() if len(column) > 1 else 0.0,
            "perplexity": float(np.exp(-summary[part]["token_log_prob"])),
            "num_tokens": sums[:, 2 * i + 1].mean().item(),
            "hint_leakage": fmean(row[f"{part}_leaks_hint"] for row in texts),
            "distinct_2": distinct_n([row[part] for row in sample]),
            "self_bleu": self_bleu([row[part] for row in sample]),
        }
    ratios = [row["copy_ratio"] for row in texts if row["copy_ratio"] is not None]
    summary["after"]["copy_ratio"] = fmean(ratios) if ratios else None
    known = sums[sums[:, -1] > 0]
    summary["behavior"] = {"rows": len(known), **_with_intervals(known, _behavior)} if len(known) else None
    return summary


def _with_intervals(sums: np.ndarray, statistics: Callable[[dict], dict]) -> dict:
    """Each statistic of the rows, and its interval under the name `…_ci95`."""

    def of_means(means: np.ndarray) -> dict[str, np.ndarray]:
        return statistics(dict(zip(COLUMNS, means.T, strict=True)))

    intervals = bootstrap(sums, lambda means: np.stack(list(of_means(means).values()), -1), NUM_RESAMPLES)
    values: dict = {}
    for (name, value), interval in zip(of_means(sums.mean(0, keepdims=True)).items(), intervals, strict=True):
        values[name] = value[0].item()
        values[f"{name}_ci95"] = interval.tolist() if len(sums) > 1 else None
    return values


def _gap(of: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    before, after = of["before_log_prob"] / of["before_tokens"], of["after_log_prob"] / of["after_tokens"]
    return {
        "before.sequence_log_prob": of["before_log_prob"],
        "before.token_log_prob": before,
        "after.sequence_log_prob": of["after_log_prob"],
        "after.token_log_prob": after,
        "difference.sequence_log_prob": of["after_log_prob"] - of["before_log_prob"],
        "difference.token_log_prob": after - before,
        "difference.length_matched": of["matched_difference"] / of["matched_tokens"],
    }


def _behavior(of: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    tokens = of["behavior_tokens"]
    return {"kl": of["k3"] / tokens, "ess": of["ratio"] ** 2 / (tokens * of["ratio_sq"])}


def _write(output_dir: Path, result: dict, rows: list[dict], sums: np.ndarray, texts: list[dict]) -> None:
    from datasets import Dataset

    output_dir.mkdir(parents=True, exist_ok=True)
    write_whole(output_dir / "policy_gap.json", json.dumps(result, indent=1) + "\n")
    columns = {"id": [row["id"] for row in rows], "source": [row["source"] for row in rows]}
    columns |= dict(zip(COLUMNS, sums.T.tolist(), strict=True))
    for name in ("copy_ratio", "before_leaks_hint", "after_leaks_hint"):
        columns[name] = [row[name] for row in texts]
    Dataset.from_dict(columns).to_parquet(output_dir / "policy_gap.parquet")
