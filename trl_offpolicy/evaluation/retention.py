"""What a model has kept of its other abilities: lm-eval's results of it and of the model it began with, side by side.

lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) writes `results_*.json`: `results` → task →
`"metric,filter"` and `"metric_stderr,filter"`, with `higher_is_better`, `n-shot`, `versions` and `n-samples` by task.
"""

import json
import math
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from ..data.whole_file import write_whole
from ..reporting.tables import is_share


def measure_retention(base: str | Path, tuned: str | Path, output_dir: str | Path | None = None) -> list[dict]:
    """
    The change of each metric of each task that both have results of; of a group of tasks (MMLU's subjects) the
    group's, where it has one.

    Args:
        base, tuned (`str` or `Path`): lm-eval's result file of each model, or the directory (`--output_path`) whose
            newest one it is.
        output_dir (`str` or `Path`, *optional*): Also writes `retention.json` there.

    Returns:
        `list[dict]`: `task`, `metric`, `base`, `tuned`, `change` (tuned - base) and its normal interval `change_ci95`,
            `None` where lm-eval gives no standard error; `higher_is_better`. The interval takes the two runs as
            independent, though they answer the same questions: it is wider than a paired one.

    Raises:
        ValueError: A file is none of lm-eval's, the two have no task in common, or ran one with other settings.
    """
    files = [_result_file(path) for path in (base, tuned)]
    results = [_read(file) for file in files]
    tasks = [name for name in results[0]["results"] if name in results[1]["results"]]
    changes = {task: list(_changes(task, *results)) for task in tasks}
    groups: dict[str, list[str]] = {**results[1].get("group_subtasks", {}), **results[0].get("group_subtasks", {})}
    in_groups = set(chain.from_iterable(_below(task, groups) for task in tasks if changes[task]))
    rows = [row for task in tasks if task not in in_groups for row in changes[task]]
    if not rows:
        raise ValueError(
            f"{files[0]} has results of {list(results[0]['results'])}, {files[1]} of {list(results[1]['results'])}: there is no metric in common (as "
            "`metric,filter`, since lm-eval 0.4). Run lm-eval with the same --tasks on both models."
        )
    _compare_settings(tasks, files, results)
    if output_dir is not None:
        directory = Path(output_dir).expanduser()
        directory.mkdir(parents=True, exist_ok=True)
        content = {"base": str(base), "tuned": str(tuned), "changes": rows}
        write_whole(directory / "retention.json", json.dumps(content, indent=1) + "\n")
    return rows


def mean_drop(changes: list[dict]) -> tuple[float, list[float] | None] | None:
    """
    The mean over tasks of how much worse the first metric of each has become, and its interval, the tasks taken as
    independent; of those that are shares of what is right. `None` if there are none.
    """
    first = [row for row in {row["task"]: row for row in reversed(changes)}.values() if is_share(row)]
    if not first:
        return None
    drop = -sum(row["change"] for row in first) / len(first)
    if any(row["change_ci95"] is None for row in first):
        return drop, None
    half = math.sqrt(sum(((row["change_ci95"][1] - row["change_ci95"][0]) / 2) ** 2 for row in first)) / len(first)
    return drop, [drop - half, drop + half]


def _result_file(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.is_dir():
        return path
    files = sorted(path.rglob("results_*.json"), key=lambda file: file.name)  # the name ends in the time
    if not files:
        raise ValueError(
            f"You passed the directory {str(path)!r}, in which there is no results_*.json of lm-eval: pass what you gave it as --output_path."
        )
    return files[-1]


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON file: {error}") from error
    results = found.get("results") if isinstance(found, dict) else None
    if not (isinstance(results, dict) and results and all(isinstance(of, dict) for of in results.values())):
        raise ValueError(
            f"{file} is no result file of lm-eval, which has `results` by task. Pass the results_*.json under its --output_path, once for the model "
            "before training and once for the one after."
        )
    return found


def _below(group: str, groups: dict[str, list[str]]) -> Iterator[str]:
    """The tasks and groups in a group, and in those."""
    for task in groups.get(group, []):
        yield task
        yield from _below(task, groups)


def _number(value) -> float | None:
    """lm-eval writes "N/A" for a standard error that it has not computed."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _changes(task: str, base: dict, tuned: dict) -> Iterator[dict]:
    before, after = base["results"][task], tuned["results"][task]
    for key in before:
        metric, comma, kind = key.partition(",")
        values = [_number(of.get(key)) for of in (before, after)]
        if not comma or metric.endswith("_stderr") or None in values:
            continue
        errors = [_number(of.get(f"{metric}_stderr,{kind}")) for of in (before, after)]
        change = values[1] - values[0]
        half = None if None in errors else 1.96 * math.hypot(*errors)
        yield {
            "task": task,
            "metric": metric if kind == "none" else key,
            "base": values[0],
            "tuned": values[1],
            "change": change,
            "change_ci95": None if half is None else [change - half, change + half],
            "higher_is_better": base.get("higher_is_better", {}).get(task, {}).get(metric, True) is not False,
        }


def _compare_settings(tasks: list[str], files: list[Path], results: list[dict]) -> None:
    for task in tasks:  # a group's are said of the tasks in it
        for name in ("n-shot", "versions", "n-samples"):
            base, tuned = (of.get(name, {}).get(task) for of in results)
            if base != tuned:
                raise ValueError(
                    f"The task {task!r} has `{name}` {base!r} in {files[0]} and {tuned!r} in {files[1]}: the two cannot be compared. Run lm-eval with "
                    "the same version, --num_fewshot and --limit on both models."
                )
    templates = [of.get("chat_template") for of in results]
    if templates[0] != templates[1]:
        warnings.warn(
            f"The two models were asked with different chat templates ({files[0]}, {files[1]}): what has changed may be that. Give lm-eval "
            "--apply_chat_template for both, or for none.",
            stacklevel=3,
        )
