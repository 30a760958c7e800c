"""
What a run of `reproduce.py` found: `results.json`, `results.md` in the form of the paper's tables, and `results.png`. Of a run
that has stopped early it is what is finished, and says what is not.
"""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).with_name("miniature")))

from results import cell, estimate, shares  # noqa: E402


# *Mind the Gap*, Tables 1 to 4 (arXiv 2509.15157). Table 2 and 4: avg@16 in %, over the benchmarks in the order of the
# preset, and their mean.
PAPER = {
    "paper": {
        "model": "Qwen2.5-Math-7B",
        "yield": {"self": 28_752, "guided": 11_620, "expert": 7_634},
        "accuracy": {
            "base": (39.90, 14.43, 17.16, 7.50, 29.38, 21.67),
            "sft": (52.61, 19.13, 17.32, 2.06, 25.00, 23.23),
            "dft": (68.70, 31.92, 32.31, 6.68, 43.44, 36.61),
            "dr_sft": (59.85, 21.14, 23.54, 8.54, 38.59, 30.33),
            "dr_dft": (70.40, 34.85, 36.12, 14.58, 54.22, 42.03),
            "self_dft": (67.86, 32.35, 32.79, 10.19, 50.94, 38.83),
            "guided_dft": (70.06, 32.57, 32.16, 8.54, 48.44, 38.36),
        },
        "log_prob": {"self": (-184.44, -83.36), "guided": (-280.64, -259.44), "expert": (-296.03, -296.03)},
    },
    "paper_llama": {
        "model": "Llama-3.1-8B-Instruct",
        "yield": {"self": 26_947, "guided": 16_335, "expert": 4_719},
        "accuracy": {
            "base": (36.18, 16.01, 9.52, 0.83, 14.53, 15.41),
            "sft": (28.71, 11.23, 6.26, 0.41, 10.31, 11.39),
            "dft": (46.50, 24.11, 15.65, 3.95, 22.50, 22.54),
            "dr_sft": (44.38, 19.21, 13.07, 1.87, 17.19, 19.14),
            "dr_dft": (47.91, 24.72, 16.52, 4.99, 26.09, 24.05),
        },
        "log_prob": {"self": (-193.01, -127.67), "guided": (-341.57, -303.44), "expert": (-388.17, -388.17)},
    },
}
PROTOCOL = (
    "Differences from the paper's protocol: its number of draws a problem is not published (K here is in the settings); its grader takes numbers "
    "100 times too large or small; its accuracies are rounded to 0.1 before they are averaged; its prompt's instruction stands in the system turn in "
    "training; it trains weights in pure bfloat16 and adds up gradients over micro-batches, so its clipping is stricter."
)


def collect(experiment) -> dict:
    """Everything that the page shows, from the files of the steps that are done."""
    run, settings, rates = experiment.run, experiment.settings, experiment.rates()
    metrics = read(run / "rewrite" / "metrics.json")
    gap = read(run / "gap" / "policy_gap.json") if (run / "gap" / "policy_gap.json").exists() else {}
    places = measured(experiment)
    evaluations = {"base": dict.fromkeys(experiment.seeds, "base/eval")}
    evaluations |= {m: {s: f"{place}/eval" for s, place in of.items()} for m, of in places.items()}
    samples = {m: {s: run / e / "samples.parquet" for s, e in of.items()} for m, of in evaluations.items()}
    first = {m: read(run / next(iter(of.values())) / "results.json")["benchmarks"] for m, of in evaluations.items()}
    benchmarks = list(first["base"])
    k = max(int(name[4:]) for name in first["base"][benchmarks[0]] if name.startswith("avg@") and "_" not in name)
    wanted = {
        f"{name}/{metric}": (name, stage, how)
        for name in benchmarks
        for metric, stage, how in (
            (f"avg@{k}", "eval", "mean"),
            ("greedy", "greedy", "mean"),
            (f"pass@{k}", "eval", "max"),
        )
    }
    of_problem = {m: {s: shares(file, wanted) for s, file in of.items()} for m, of in samples.items()}
    return {
        "preset": experiment.args.preset,
        "model": Path(experiment.model).name if Path(experiment.model).is_dir() else experiment.model,
        "settings": settings,
        "data": read(run / "data" / "data.json"),
        "learning_rate": rates,
        "yield": metrics["yield"],
        "attempts": metrics["stages"],
        "gap": {s: {w: each[w] for w in ("before", "after", "difference")} | {"rows": each["rows"]} for s, each in gap.items()},
        "num_generations": k,
        "benchmarks": benchmarks,
        "accuracy": {m: {name: every(of_problem, m, name) for name in wanted} for m in of_problem},
        "samples": {m: {b: {n: r[b][n] for n in ("mean_length", "truncated", "unparsable")} for b in benchmarks} for m, r in first.items()},
        "kl": {m: kl_of(run / next(iter(of.values()))) for m, of in places.items()},
        "unfinished": [step.name for step in experiment.needed()],
    }  # fmt: skip


def measured(experiment) -> dict[str, dict[int, str]]:
    """The place of each method and seed whose test is done; methods without any are left out."""
    of_method = {
        m: {s: experiment.place(m, rate, s) for s in experiment.seeds}
        for m, rate in experiment.rates().items()
        if rate
    }
    found = {
        m: {s: place for s, place in of.items() if (experiment.run / place / "eval" / "results.json").exists()}
        for m, of in of_method.items()
    }
    return {m: of for m, of in found.items() if of}


def kl_of(place: Path) -> dict[str, dict]:
    """KL(π_0‖π) on the draws of each rewrite, where it is measured."""
    files = {run: place / f"kl-{run}" / "forgetting.json" for run in ("rewrite", "general")}
    return {run: read(file) for run, file in files.items() if file.exists()}


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def every(of_problem: dict, method: str, metric: str) -> dict:
    """
    The value and its paired differences to SFT and to the base: means and 95 % intervals over problems and seeds, `None` where
    nothing was judged.
    """
    import pandas as pd

    def of(minus: str | None) -> dict | None:
        values = {
            s: each[metric] - (of_problem[minus][s][metric] if minus else 0)
            for s, each in of_problem[method].items()
            if not minus or s in of_problem[minus]
        }
        known = pd.DataFrame(values).dropna().to_numpy()
        if not len(known):
            return None
        found = estimate([known])
        return {"mean": found["mean"], "half": found["half"]}

    others = [other for other in ("sft", "base") if other in of_problem and other != method]
    return {"value": of(None), **{f"minus_{other}": of(other) for other in others}}


# ---- tables ----


def mean_of(results: dict, method: str, metric: str, what: str = "value") -> dict | None:
    """Over the benchmarks, each counting alike; their problems are others, so the variances add."""
    found = [results["accuracy"][method][f"{name}/{metric}"].get(what) for name in results["benchmarks"]]
    if None in found:
        return None
    count = len(found)
    return {"mean": sum(f["mean"] for f in found) / count, "half": sum(f["half"] ** 2 for f in found) ** 0.5 / count}


def yield_table(results: dict, paper: dict | None):
    counts = {s: n for s, n in results["yield"].items() if s in ("self", "guided", "expert")}
    total = sum(counts.values())
    rows = [[f"{results['model']}, here", *(f"{n:,} ({n / total:.1%})" for n in counts.values()), f"{total:,}"]]
    if paper:
        total = sum(paper["yield"].values())
        rows.append(
            [f"{paper['model']}, paper", *(f"{n:,} ({n / total:.1%})" for n in paper["yield"].values()), f"{total:,}"]
        )
    return ["model", *counts, "rows"], rows


def accuracy_table(results: dict, labels: dict[str, str], methods: list[str], paper: dict | None):
    k = f"avg@{results['num_generations']}"
    names, rows = results["benchmarks"], []
    for method in methods:
        found, rate = results["accuracy"][method], results["learning_rate"].get(method)
        line = [cell(found[f"{name}/{k}"]["value"]) for name in names]
        line += [cell(mean_of(results, method, k))] if len(names) > 1 else []
        line += [cell(mean_of(results, method, k, f"minus_{other}"), "+") for other in ("sft", "base")]
        line += [cell(mean_of(results, method, metric)) for metric in ("greedy", f"pass@{results['num_generations']}")]
        rows.append([labels[method], f"{rate:g}" if rate else "", *line])
        if paper and method in paper["accuracy"]:
            said = [f"{value:.1f}" for value in paper["accuracy"][method]]
            rows.append([f"… in the paper ({paper['model']})", "", *said, *[""] * 4])
    mean = ["mean"] if len(names) > 1 else []
    header = [
        *(f"{name}, {k}" for name in names),
        *mean,
        "− SFT",
        "− base",
        "greedy",
        f"pass@{results['num_generations']}",
    ]
    return ["%", "learning rate", *header], rows


def gap_table(results: dict, paper: dict | None):
    from trl_offpolicy.reporting.tables import arrow

    rows = []
    for source, each in results["gap"].items():
        before, after = each["before"], each["after"]

        def moved(name: str, form: str, before=before, after=after) -> str:
            return arrow(before[name], after[name], form)

        line = [moved("sequence_log_prob", ".1f"), moved("token_log_prob", ".3f"), moved("num_tokens", ".0f")]
        said = paper["log_prob"].get(source) if paper else None
        line += ["{:.1f} → {:.1f}".format(*said) if said else ""] if paper else []
        rows.append([source, f"{each['rows']:,}", *line])
    return ["source", "rows", "sum", "per token", "tokens", *(["paper, sum"] if paper else [])], rows


def forgetting_table(results: dict, labels: dict[str, str]):
    from trl_offpolicy.reporting.tables import number

    rows = []
    for method, samples in results["samples"].items():
        of = results["kl"].get(method, {})  # the base has none
        line = [
            number(of[run]["kl_per_token"], ".4f", of[run]["kl_per_token_ci95"]) if run in of else ""
            for run in ("rewrite", "general")
        ]
        lengths = [f"{sum(s[n] for s in samples.values()) / len(samples):{form}}" for n, form in (("mean_length", ".0f"), ("truncated", ".1%"), ("unparsable", ".1%"))]  # fmt: skip
        rows.append([labels[method], *line, *lengths])
    return ["", "KL(π_0‖π), the task's prompts", "KL(π_0‖π), general questions", "tokens", "cut", "no answer"], rows


def markdown_page(results: dict, labels: dict[str, str]) -> str:
    from trl_offpolicy.reporting.tables import markdown

    paper, methods = PAPER.get(results["preset"]), list(results["accuracy"])
    data, stages = results["data"], results["attempts"]
    main = [m for m in methods if m not in ("self_dft", "guided_dft", "no_fallback", "rft")]
    ablated = [m for m in ("dft", "self_dft", "guided_dft", "dr_dft") if m in methods]
    attempts = "; ".join(
        f"{s}: {n['sampled']:,} attempts, {n['correct'] / max(1, n['sampled']):.1%} accepted"
        for s, n in stages.items()
    )
    gaps = [
        "## Log-probabilities of the targets under the base, demonstration → rewritten (Table 3)", markdown(gap_table(results, paper)),
        "The sum favours short targets; compare per token.",
    ] if results["gap"] else []  # fmt: skip
    due = results["unfinished"]
    unfinished = ", ".join(due[:3]) + (f" and {len(due) - 3} more" if len(due) > 3 else "")
    parts = [
        f"# {results['model']}, preset `{results['preset']}`",
        f"{data['train']:,} training problems, {data['dev']:,} for choosing learning rates; {results['settings']['seeds']} fine-tuning seed(s). ± is half of a "
        "95 % interval over problems and seeds; differences are paired by problem.",
        f"This run is not finished; it has still to do: {unfinished}." if unfinished else "",
        PROTOCOL if paper else "",
        "## Where the rows come from (Table 1)", markdown(yield_table(results, paper)), attempts,
        "## Accuracy (Table 2)", markdown(accuracy_table(results, labels, main, paper)),
        *gaps,
        *(["## Which stage does it (Table 4)", markdown(accuracy_table(results, labels, ablated, paper))] if len(ablated) > 2 else []),
        *(["## Other data", markdown(accuracy_table(results, labels, [m for m in ("no_fallback", "rft") if m in methods], None))] if {"no_fallback", "rft"} & set(methods) else []),
        "## What else changed", markdown(forgetting_table(results, labels)),
        "KL in nats per token, estimated on first draws of the base (95 % bootstrap interval over problems); tokens, cut and no answer: of the test samples.",
        "![Accuracy, and the training curves.](results.png)",
    ]  # fmt: skip
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def draw(results: dict, curves: dict[str, list], labels: dict[str, str], path: Path) -> None:
    """Accuracy with intervals, and the trainings' -log π and entropy per token (the paper's Figure 4)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from trl_offpolicy.reporting.report import COLOURS, STYLES

    k = f"avg@{results['num_generations']}"
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for i, method in enumerate(results["accuracy"]):
        look = {"color": COLOURS[i % len(COLOURS)]}
        for metric, marker, shift in ((k, "o", -0.12), ("greedy", "s", 0.12)):
            if (found := mean_of(results, method, metric)) is None:
                continue
            axes[0].errorbar(100 * found["mean"], i + shift, xerr=100 * found["half"], fmt=marker, capsize=3, **look)
        for axis, name in zip(axes[1:], ("nll", "entropy"), strict=True):
            points = [(entry["step"], entry[name]) for entry in curves.get(method, []) if name in entry]
            if points:
                axis.plot(*zip(*points, strict=True), linestyle=STYLES[i % len(STYLES)], label=labels[method], **look)
    axes[0].set_yticks(range(len(results["accuracy"])), [labels[m] for m in results["accuracy"]])
    axes[0].invert_yaxis()
    axes[0].set(title=f"{k} at T = 1 (circle), greedy (square)", xlabel="% correct, 95 % intervals")
    axes[1].set(title="−log π of the targets in training", xlabel="step", ylabel="nats per token")
    axes[2].set(title="entropy in training", xlabel="step", ylabel="nats per token")
    if curves:
        axes[2].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e5e5e5", linewidth=0.6)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_page(experiment) -> str:
    """Writes the three files, and what `trl-offpolicy report` makes of all directories; returns the Markdown."""
    from reproduce import METHODS

    from trl_offpolicy.data.whole_file import write_whole
    from trl_offpolicy.reporting.report import write_report

    results = collect(experiment)
    labels = {"base": "Base", **{name: method.label for name, method in METHODS.items()}}
    places = {m: experiment.run / next(iter(of.values())) for m, of in measured(experiment).items()}
    curves = {m: read(place / "train" / "trainer_state.json")["log_history"] for m, place in places.items()}
    text = markdown_page(results, labels)
    write_whole(experiment.run / "results.json", json.dumps(results, indent=1) + "\n")
    write_whole(experiment.run / "results.md", text)
    draw(results, curves, labels, experiment.run / "results.png")
    chosen = [experiment.run / name for name in ("rewrite", "gap", "base") if (experiment.run / name).exists()]
    chosen += places.values()
    write_report(list(map(str, chosen)), str(experiment.run / "report"))
    return f"{text}\n{experiment.run}/results.json, .md and .png hold this; every curve: {experiment.run}/report/report.html"
