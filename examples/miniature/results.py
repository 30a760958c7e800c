"""What the miniature study says: intervals over bases, seeds and problems; the tables and the picture of its `results.json`."""

from pathlib import Path

import numpy as np


# 97.5 % quantiles of Student's t with 1, 2, … degrees of freedom
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def estimate(bases: list[np.ndarray]) -> dict:
    """
    Mean and 95 % interval of what is known for each problem and fine-tuning seed of each base: arrays (problems, seeds).

    `half` is Student's t over the bases' means: each base has problems, rewrites and seeds of its own, so all of their scatter is
    in that of the means, whatever its parts are. With three bases that can be small by luck, so it is never less than
    `half_these_bases`: problems and seeds drawn anew, the bases as they are. One base has the latter only.
    """
    means, variance = np.array([values.mean() for values in bases]), 0.0
    for values in bases:
        for axis in (0, 1):  # means of the seeds, of the problems
            of_each = values.mean(axis)
            variance += of_each.var(ddof=1) / len(of_each) if len(of_each) > 1 else 0.0
    half = here = 1.96 * variance**0.5 / len(bases)
    if len(bases) > 1:
        half = max(here, STUDENT_T[len(bases) - 2] * means.std(ddof=1) / len(bases) ** 0.5)
    return {"mean": means.mean(), "half": half, "half_these_bases": here, "by_base": means.tolist()}


def shares(file: Path, metrics: dict[str, tuple[str, str, str]]) -> dict:
    """
    Metric → the value of each problem, by its id, from an evaluation's `samples.parquet`; `metrics`: name → (benchmark, stage of
    its samples, "mean" or "max" over them), which is empty where none was judged. What could not be judged is left out, not called
    wrong.
    """
    import pandas as pd
    import pyarrow.parquet as pq

    columns = {"benchmark", "stage", "id", "verdict", "judged"} & set(pq.read_schema(file).names)
    samples = pd.read_parquet(file, columns=sorted(columns))
    if "judged" not in columns:  # written before `eval` said so of each sample
        samples["judged"] = ~samples.verdict.isin(["timeout", "error"])
    samples = samples[samples.judged]
    of_problem = (samples.verdict == "correct").groupby([samples.benchmark, samples.stage, samples.id])
    table = of_problem.agg(["mean", "max"]).astype(float)
    none = pd.Series(dtype=float)
    return {name: table[column].get((benchmark, stage), none) for name, (benchmark, stage, column) in metrics.items()}


def conditions_table(conditions: dict) -> str:
    """Base → condition → value, bounds and meaning, as Markdown."""
    from trl_offpolicy.reporting.tables import markdown, number

    first, rows = next(iter(conditions.values())), []
    for name, asked in first.items():
        low, high = asked["low"], asked["high"]
        needed = "" if low is None else f"{low:.2f} to {high:.2f}" if high else f"above {low:.2f}"
        cells = [number(of[name]["value"]) + ("" if of[name]["met"] else " (not met)") for of in conditions.values()]
        rows.append([asked["meaning"], needed, *cells])
    return markdown((["condition", "needed", *(f"base {base}" for base in conditions)], rows))


def cell(found: dict | None, sign: str = "") -> str:
    """An estimate in percent; one without an interval (a share of one base and seed, problems all alike) has no ±."""
    if not found:
        return ""
    half = f" ± {100 * found['half']:.1f}" if found["half"] else ""
    return f"{100 * found['mean']:{sign}.1f}{half}"


def accuracy_table(
    results: dict, labels: dict[str, str], references: dict[str, str], more: dict[str, dict[str, str]] | None = None
) -> str:
    """
    Every metric of every method, and the paired differences of the first one to `references` (method → its name in the header),
    as Markdown. `more`: header → method → the cell of a further column.
    """
    from trl_offpolicy.reporting.tables import markdown

    accuracy, rows, more = results["accuracy"], [], more or {}
    main, *others = next(iter(accuracy.values()))
    for method, of in accuracy.items():
        rates = dict.fromkeys(f"{rate:g}" for rate in results["learning_rate"].get(method, {}).values())
        differences = [cell(of[main].get(f"minus_{reference}"), "+") for reference in references]
        line = [cell(of[main]["value"]), *differences, *(cell(of[metric]["value"]) for metric in others)]
        rows.append([labels[method], ", ".join(rates), *line, *(column.get(method, "") for column in more.values())])
    differing = [f"− {name}" for name in references.values()]
    return markdown((["%", "learning rate", main, *differing, *others, *more], rows))


def draw(results: dict, labels: dict[str, str], path: Path, reference: str = "base", name: str = "the base") -> None:
    """Accuracy, its difference to a reference, and the second family: Okabe and Ito's colours, and markers that differ."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    accuracy = results["accuracy"]
    main, greedy, _, other = next(iter(accuracy.values()))
    figure, axes = plt.subplots(1, 3, figsize=(13, 1.2 + 0.38 * len(accuracy)), sharey=True, layout="constrained")

    def dots(axis, metric: str, what: str, colour: str, marker: str, offset: float, label: str | None = None) -> None:
        found = {y + offset: of[metric][what] for y, of in enumerate(accuracy.values()) if what in of[metric]}
        means, halves = ([100 * each[name] for each in found.values()] for name in ("mean", "half"))
        look = {"color": colour, "fmt": marker, "markersize": 7, "capsize": 3, "label": label}
        axis.errorbar(means, list(found), xerr=halves, **look)
        for y, each in found.items():
            axis.plot([100 * x for x in each["by_base"]], [y] * len(each["by_base"]), "|", color=colour, markersize=9)

    dots(axes[0], main, "value", "#0072B2", "o", -0.15, f"{main} at T = 1")
    dots(axes[0], greedy, "value", "#E69F00", "s", 0.15, "greedy")
    dots(axes[1], main, f"minus_{reference}", "#0072B2", "o", 0)
    dots(axes[2], other, "value", "#009E73", "D", 0)
    axes[2].set_xlim(min(90, axes[2].get_xlim()[0]))  # a tenth of a point is not to look like a fall
    axes[1].axvline(0, color="#333333", linewidth=1)
    axes[0].set_yticks(range(len(accuracy)), [labels[method] for method in accuracy])
    axes[0].invert_yaxis()
    titles = ("fine-tuned family", f"{main}: paired difference to {name}", "second family (forgetting)")
    for axis, title, unit in zip(axes, titles, ("% correct", "points", "% correct"), strict=True):
        axis.set(title=title, xlabel=unit)
        axis.grid(axis="x", color="#e5e5e5", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, ncols=2, loc="outside lower left")
    figure.text(0.99, 0.01, "bars: 95 % intervals; ticks: each base", ha="right", va="bottom", fontsize=9)  # fmt: skip
    figure.savefig(path, dpi=150)
