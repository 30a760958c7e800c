"""
One page of what rewrites, trainings, evaluations and gap measurements have written: `report.html`, self-contained, and
`report.md`.

Nothing is computed anew: a number here is a number in one of the files that it was made from. Figures are SVG, in the
colours of Okabe and Ito and with a line style and a marker of their own, so that they can be told apart in print and
by the colour-blind.
"""

import io
import json
import os
import random
import textwrap
import warnings
from collections import Counter
from itertools import chain
from pathlib import Path

from ..data.formats import demonstration
from ..data.prompts import contents
from ..data.rows import Source, Verdict
from ..runs.journal import read_attempts
from ..runs.run_directory import RunDirectory
from . import tables
from .page import Page


COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")  # Okabe and Ito
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
MARKERS = "osD^vPX*"
HATCHES = ("", "///", "...", "xx", "++")
SAMPLES = 20
TRAINING = {
    "loss": "Loss that was minimised",
    "nll": "Negative log-likelihood without weights, nats per token",
    "mean_token_accuracy": "Share of tokens that are the likeliest",
    "entropy": "Entropy of the next token, nats",
}
WEIGHTS = {
    "weight": "Mean weight of a token",
    "ess": "Effective sample size, share of the tokens",
    "clip_fraction": "Share of tokens whose weight a limit changed",
    "kl": "KL(μ‖π) to the policy that sampled the rows (k3), nats per token",
}


def write_report(run_dirs: list[str], output_dir: str, title: str = "trl_offpolicy report", seed: int = 0) -> Path:
    """
    Writes `report.html`, `report.md` and its `figures/` of everything found in `run_dirs` and below them.

    Args:
        run_dirs (`list[str]`): Output directories of `rewrite`, `eval`, `gap` and trainings, or directories that hold
            several.
        seed (`int`, *optional*, defaults to `0`): Which rows of a rewrite are shown.

    Returns:
        `Path`: Of the HTML page.

    Raises:
        FileNotFoundError: One of them is not there.
        ValueError: Nothing to report was found in them, or a file is torn.
    """
    found = find_runs([Path(d) for d in run_dirs])
    every = [run.resolve() for runs in found.values() for run, _ in runs.values()]
    if empty := [each for each in run_dirs if not any(_holds(Path(each).resolve(), run) for run in every)]:
        message = (
            f"You passed {' and '.join(map(repr, empty))}, where there is nothing to report: no metrics.json of a rewrite, results.json of an evaluation, "
            "policy_gap.json, rounds.json or trainer_state.json, which are written at the end. Pass the directories that those commands wrote to."
        )
        if not every:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
    (Path(output_dir) / "figures").mkdir(parents=True, exist_ok=True)
    page = Page(title, Path(output_dir) / "figures")
    page.heading(title, 1)
    sections = {"rounds": _rounds, "rewrites": _yield, "evaluations": _accuracy, "gaps": _gap, "trainings": _training}
    for kind, section in sections.items():
        if found[kind]:
            section(page, found[kind])
    for label, (path, _) in found["rewrites"].items():
        _rows(page, label, path, seed)
    page.write(Path(output_dir))
    return Path(output_dir) / "report.html"


def _holds(directory: Path, run: Path) -> bool:
    """Whether what was found of a run was found in a directory, which may also be one of its checkpoints."""
    return run.is_relative_to(directory) or directory.parent == run


def find_runs(directories: list[Path]) -> dict[str, dict[str, tuple[Path, dict]]]:
    """Kind → label → (directory, what its file holds); of a training's checkpoints the last one."""
    files = {
        "metrics.json": "rewrites",
        "results.json": "evaluations",
        "policy_gap.json": "gaps",
        "trainer_state.json": "trainings",
        "rounds.json": "rounds",
    }
    keys = {
        "rewrites": {"yield"},
        "evaluations": {"config", "benchmarks"},
        "gaps": {"total"},
        "trainings": {"log_history"},
        "rounds": {"rounds"},
    }
    found: dict[str, dict[Path, dict]] = {kind: {} for kind in keys}
    for directory in directories:
        if not directory.is_dir():
            raise FileNotFoundError(f"There is no directory {directory}.")
        for name, kind in files.items():
            for path in sorted(directory.rglob(name)):
                try:
                    content = json.loads(path.read_text())
                except ValueError as error:
                    raise ValueError(
                        f"{path} is not whole JSON ({error}): delete it, or run the command that writes it again."
                    ) from error
                if not isinstance(content, dict) or not keys[kind] <= content.keys():
                    continue  # another program's file of that name
                run = path.parent.parent if path.parent.name.startswith("checkpoint-") else path.parent
                newer = content.get("global_step", 0) >= found[kind].get(run, {}).get("global_step", 0)
                if newer:
                    found[kind][run] = content
    every = [run.resolve() for runs in found.values() for run in runs]
    top = Path(os.path.commonpath(every)) if len(set(every)) > 1 else every[0].parent if every else Path()
    labels = {run: str(run.relative_to(top)) for run in every}
    if top in labels and top.name not in labels.values():  # else it stays "."
        labels[top] = top.name
    return {kind: {labels[run.resolve()]: (run, of) for run, of in runs.items()} for kind, runs in found.items()}


# ---- sections ----


def _yield(page: Page, runs: dict) -> None:
    page.heading("Yield by source")
    for label, (_, metrics) in runs.items():
        page.heading(label, 3)
        page.table(tables.rewriting(metrics))
        sampling, verdicts = metrics["sampling"], metrics["verdicts"]
        page.paragraph(
            f"{sampling['sampled']:,} attempts, {sampling['tokens']:,} tokens; K attempts for every problem and stage would have been "
            f"{sampling['fixed_k_equivalent']:,}. Verdicts: {', '.join(f'{n:,} {v}' for v, n in verdicts.items())}; {sampling['truncated']:,} cut. "
            f"{metrics['gold_unparsable']:,} rows have a gold answer that cannot be compared with."
        )
    counts = [metrics["yield"] for _, metrics in runs.values()]
    page.figures([("yield", "Where the rows' completions come from", _sources(list(runs), counts))])


def _sources(labels: list[str], counts: list[dict]) -> bytes:
    """
    A bar of each run or round: the shares of its rows by source; with `total`, the number of all rows, if some have
    none.
    """
    named = [textwrap.fill(label, 24) for label in labels]  # a longer line would leave no room for the bars
    figure, axis = _axes(height=1.2 + sum(max(0.45, 0.2 * (1 + name.count("\n"))) for name in named))
    for place, of_sources in enumerate(counts):
        left, total = 0.0, max(1, of_sources.get("total", sum(of_sources.values())))
        for i, source in enumerate(Source):
            share = of_sources.get(source, 0) / total
            kind = {
                "color": COLOURS[i],
                "hatch": HATCHES[i],
                "edgecolor": "white",
                "label": str(source) if not place and any(source in of for of in counts) else None,
            }
            axis.barh(place, share, left=left, **kind)
            if share > 0.06:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
                axis.text(left + share / 2, place, f"{share:.0%}", ha="center", va="center", fontsize=8, bbox=box)
            left += share
    axis.set_yticks(range(len(labels)), named)
    axis.set(xlabel="share of rows", xlim=(0, 1))
    axis.invert_yaxis()
    _legend(axis, 3)
    return _svg(figure)


def _rounds(page: Page, runs: dict) -> None:
    page.heading("Rounds")
    page.paragraph(
        "Each round rewrites with the model that the round before has trained. KL(π_0‖π): from the initial policy to the round's model, on the "
        "task's prompts, with a 95 % bootstrap interval over problems; mentions: correct guided attempts that speak of the reference; -log π: of the first draws of the round's rewrite, nats per token."
    )
    for number, (label, (_, content)) in enumerate(runs.items()):
        rounds = content["rounds"]
        page.heading(label, 3)
        page.table(tables.rounds(rounds))
        labels = [f"round {each['round']}" for each in rounds]
        figures = [
            (f"rounds-{number}", "Where each round's rows come from", _sources(labels, [r["sources"] for r in rounds]))
        ]
        for name, unit, caption, points in _measured(rounds):
            figure, axis = _axes()
            places = [place for place, value in points if value is not None]
            values, errors = _values_and_errors([value for _, value in points if value is not None], "value")
            axis.errorbar(places, values, yerr=errors, fmt="o-", color=COLOURS[0], capsize=3)
            axis.set_xticks(range(len(rounds)))
            axis.set(xlabel="round", ylabel=unit)
            if unit == "nats per token":  # a fall from 0.05 to 0.04 is not to look like one to nothing
                axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
            figures.append((f"rounds-{number}-{_slug(name)}", caption, _svg(figure)))
        page.figures(figures)


def _measured(rounds: list[dict]) -> list[tuple[str, str, str, list]]:
    """(name, unit, caption, (round, value with its interval)) of what was measured of each round."""

    def value(of: dict, name: str) -> dict | None:
        return None if of.get(name) is None else {"value": of[name], "value_ci95": of.get(f"{name}_ci95")}

    forgotten = [(each["round"], value(each.get("forgetting", {}), "kl_per_token")) for each in rounds]
    entropies = [(each["round"], value(each, "entropy")) for each in rounds]
    lengths = [(each["round"], value(each, "length")) for each in rounds]
    drawn = [
        ("KL", "nats per token", "KL(π_0‖π) of the round's model on the task's prompts", forgotten),
        ("entropy", "nats per token", "-log π of the round's first draws", entropies),
        ("length", "tokens", "Length of the round's first draws", lengths),
    ]
    for benchmark in dict.fromkeys(name for each in rounds for name in each.get("accuracy", {})):
        scores = [each.get("accuracy", {}).get(benchmark, {}) for each in rounds]
        metric = next(name for name in max(scores, key=len) if name.startswith("avg@") and "_" not in name)
        points = [(each["round"], value(score, metric)) for each, score in zip(rounds, scores, strict=True)]
        name = f"{benchmark} {metric}"
        drawn.append((name, name, f"Share of {benchmark} that the round's model has right", points))
    return [each for each in drawn if any(found for _, found in each[-1])]


def _accuracy(page: Page, runs: dict) -> None:
    page.heading("Accuracy")
    page.paragraph("Shares of problems with 95 % bootstrap intervals over problems.")
    results = {label: content["benchmarks"] for label, (_, content) in runs.items()}
    for label, (_, content) in runs.items():
        page.heading(label, 3)
        settings = ("model", "temperature", "top_p", "num_generations", "max_completion_length", "seed", "verifier")
        page.paragraph(", ".join(f"{name} {content['config'].get(name)}" for name in settings))
        page.table(tables.accuracy(content["benchmarks"]))
        if any("vs_baseline" in r for r in content["benchmarks"].values()):
            page.table(tables.comparison(content["benchmarks"]))
    names = list(dict.fromkeys(name for benchmarks in results.values() for name in benchmarks))
    figure, axis = _axes()
    for i, (label, benchmarks) in enumerate(results.items()):
        metric = tables.metrics(benchmarks)[0]
        present = [
            (x, benchmarks[n]) for x, n in enumerate(names) if n in benchmarks and benchmarks[n][metric] is not None
        ]
        values, error = _values_and_errors([r for _, r in present], metric)
        places = [x + 0.6 * ((i + 0.5) / len(results) - 0.5) for x, _ in present]
        colour, marker, _ = _look(i)
        look = {"fmt": marker, "color": colour, "capsize": 3, "label": f"{label} ({metric})"}
        axis.errorbar(places, values, yerr=error, **look)
    crowded = len(names) * max(map(len, names)) > 45  # side by side they would run into each other
    slanted = {"rotation": 20, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axis.set_xticks(range(len(names)), names, **slanted)
    axis.set(ylabel="share correct", ylim=(-0.02, 1.02), xlim=(-0.5, len(names) - 0.5))
    _legend(axis, 1)
    page.figures([("accuracy", "Accuracy with 95 % intervals", _svg(figure))])


def _gap(page: Page, runs: dict) -> None:
    page.heading("Policy gap")
    page.paragraph(
        "Log-probabilities in nats of the targets under the model, before → after rewriting. The sum (Table 3 of the paper) favours short "
        "targets; “per token at equal length” compares the first tokens of both, as many as the shorter one has."
    )
    for label, (path, gap) in runs.items():
        page.heading(label, 3)
        page.table(tables.policy_gap(gap))
        page.table(tables.texts(gap))
        figure, axis = _axes()
        for i, moment in enumerate(("before", "after")):
            heights, error = _values_and_errors([r[moment] for r in gap.values()], "token_log_prob")
            look = {"color": COLOURS[i], "hatch": HATCHES[i], "edgecolor": "white", "capsize": 3, "label": moment}
            axis.bar([x + 0.4 * i - 0.2 for x in range(len(gap))], heights, 0.38, yerr=error, **look)
        axis.set_xticks(range(len(gap)), list(gap))
        axis.set(ylabel="nats per token (higher: closer)")
        _legend(axis, 2)
        name = _slug(label)
        drawn = [(f"gap-{name}", "Mean log-probability per token, with 95 % intervals", _svg(figure))]
        if (path / "policy_gap.parquet").exists():
            svg = _distribution(path / "policy_gap.parquet")
            drawn.append((f"gap-rows-{name}", "Distribution of the targets' log-probabilities (sums)", svg))
        page.figures(drawn)


def _distribution(file: Path) -> bytes:
    import numpy as np
    import pyarrow.parquet as pq

    columns = pq.read_table(file, columns=["before_log_prob", "after_log_prob"]).to_pydict()
    figure, axis = _axes()
    bins = np.linspace(min(map(min, columns.values())), 0, 40)
    for i, (name, values) in enumerate(columns.items()):
        look = {"color": COLOURS[i], "linestyle": STYLES[i], "linewidth": 1.8, "label": name.removesuffix("_log_prob")}
        axis.stairs(np.histogram(values, bins)[0] / len(values), bins, **look)
    axis.set(xlabel="log-probability of a row's target (nats)", ylabel="share of rows")
    _legend(axis, 2)
    return _svg(figure)


def _training(page: Page, runs: dict) -> None:
    page.heading("Training")
    last = {
        label: {k: v for entry in content["log_history"] for k, v in entry.items()}
        for label, (_, content) in runs.items()
    }
    names = [n for n in (*TRAINING, *WEIGHTS, "eval_loss") if any(n in values for values in last.values())]
    rows = [
        [label, str(runs[label][1]["global_step"]), *(tables.number(v.get(n), ".4g") for n in names)]
        for label, v in last.items()
    ]
    page.table((["run (last values)", "steps", *names], rows))
    for heading, metrics in (("Curves", TRAINING), ("Weights", WEIGHTS)):
        drawn = [(f"training-{m}", caption, svg) for m, caption in metrics.items() if (svg := _curves(m, runs))]
        if drawn:
            page.heading(heading, 3)
            page.figures(drawn)


def _curves(metric: str, runs: dict) -> bytes | None:
    """One line for each run; with a single run, one for each source as well."""
    names = [metric] if len(runs) > 1 else [metric, *(f"{metric}/{source}" for source in Source)]
    lines = []
    for i, (label, (_, content)) in enumerate(runs.items()):
        for j, name in enumerate(names):
            points = [(e["step"], e[name]) for e in content["log_history"] if name in e]
            if points:  # a run has the same colour in every figure
                lines.append((i + j, label if name == metric else name.split("/")[1], points))
    if not lines:
        return None
    figure, axis = _axes()
    for i, label, points in lines:
        colour, marker, style = _look(i)
        look = {"color": colour, "linestyle": style, "linewidth": 1.6, "label": label}
        axis.plot(*zip(*points, strict=True), marker=marker, markersize=4, markevery=max(1, len(points) // 8), **look)
    axis.set(xlabel="step", ylabel=metric)
    if metric == "clip_fraction":
        axis.set_ylim(0, max(0.05, axis.get_ylim()[1]))
    _legend(axis, 2)
    return _svg(figure)


def _rows(page: Page, label: str, path: Path, seed: int) -> None:
    """Rows of a rewrite, as many of each source as there are, with what the verifier said of their attempts."""
    run = RunDirectory(path)
    if (rows := run.rows()) is None:
        return  # shards are missing
    sources = rows.to_table(columns=["source"])["source"].to_pylist()
    places: dict[str, list[int]] = {str(source): [] for source in Source}
    for i in random.Random(seed).sample(range(len(sources)), len(sources)):
        places[sources[i]].append(i)
    dealt = [i for turn in range(SAMPLES) for of in places.values() for i in of[turn : turn + 1]][:SAMPLES]
    shown = rows.take(sorted(dealt, key=lambda i: (list(places).index(sources[i]), i))).to_pylist()
    ids = {row["id"] for row in shown}
    verdicts: dict[str, Counter] = {}
    for attempt in chain.from_iterable(read_attempts(journal, ids, texts=False) for journal in run.journals):
        verdicts.setdefault(attempt.id, Counter())[attempt.stage, attempt.verdict] += 1
    page.heading(f"Rows of {label}")
    opened: set[str] = set()
    for row in shown:
        attempts = ", ".join(f"{n} {stage} {verdict}" for (stage, verdict), n in verdicts.get(row["id"], {}).items())
        kept = Verdict.CORRECT if row["source"] != Source.EXPERT else "demonstration kept"
        rewrite = contents(row["completion"])[-1] if row["source"] != Source.EXPERT else "(the demonstration)"
        prompt = row["prompt"]
        if not isinstance(prompt, str):
            prompt = "\n\n".join(f"[{turn['role']}] {turn['content']}" for turn in prompt)
        parts = {"prompt": prompt, "demonstration": demonstration(row) or "(not carried)", "rewrite": rewrite}
        title = f"{row['source']} · {kept} · gold {row['answer']} · attempts: {attempts or 'none'}"
        page.texts(title, parts, row["source"] not in opened)
        opened.add(row["source"])


# ---- figures ----


def _values_and_errors(results: list[dict], metric: str) -> tuple[list[float], list[list[float]]]:
    """
    A metric of each result, and how far its interval reaches below and above, as matplotlib wants it: NaN, for which
    nothing is drawn, where none is known.
    """
    values = [r[metric] for r in results]
    ends = [r[f"{metric}_ci95"] or [float("nan")] * 2 for r in results]
    return values, [[abs(v - e[i]) for v, e in zip(values, ends, strict=True)] for i in (0, 1)]


def _look(i: int) -> tuple:
    """
    Colour, marker and line style of the i-th run; beyond eight, colours come again with another marker and style.
    """
    shifted = (i + i // 8) % 8
    return COLOURS[i % 8], MARKERS[shifted], STYLES[shifted]


def _axes(height: float = 3.0):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("The report's figures need matplotlib: pip install 'trl-offpolicy[report]'.") from error
    figure = Figure(figsize=(5, height), layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="both", color="#e5e5e5", linewidth=0.6)
    axis.set_axisbelow(True)
    return figure, axis


def _legend(axis, columns: int) -> None:
    """Above the axes; the figure grows with it, so that it does not take their room."""
    handles, labels = axis.get_legend_handles_labels()
    labels = [textwrap.fill(label, 60 // columns) for label in labels]
    look = {"frameon": False, "fontsize": 8, "ncols": columns}
    axis.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2, **look)
    lines = [1 + label.count("\n") for label in labels]
    of_column = -(-len(lines) // columns)
    tallest = max((sum(lines[i : i + of_column]) for i in range(0, len(lines), of_column or 1)), default=0)
    axis.figure.set_figheight(axis.figure.get_figheight() + 0.17 * (tallest - 1))


def _svg(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in label)
