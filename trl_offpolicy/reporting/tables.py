"""
Results as tables for people: (header, rows of strings), which the command line, `results.md` and the report all show.
"""

import re


Table = tuple[list[str], list[list[str]]]


def plain(text: str) -> str:
    """
    `text` on one line as Markdown that shows just that: no HTML, link, emphasis, formula or table comes of what is in
    it.
    """
    # An underscore within a word, as in eval_loss, means nothing; at the beginning `#`, `-` or `1.` would.
    text = re.sub(
        r"([\\`*|~$]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|\](?=[(\[:])|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split())
    )
    return re.sub(r"^(\d*)([-#+=>.)]+)(?=\s|$)", r"\1\\\2", text)


def markdown(table: Table) -> str:
    """A Markdown table; its first column is aligned left, the others right."""
    header, rows = table
    lines = [map(plain, header), ["---"] + ["--:"] * (len(header) - 1), *(map(plain, row) for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def number(value: float | None, form: str = ".2f", interval: list[float] | None = None) -> str:
    """`12.3% [11.0%, 13.6%]` for `form=".1%"`; empty for `None`. What rounds to zero has no minus."""
    if value is None:
        return ""
    sign, digits = ("+", form[1:]) if form.startswith("+") else ("", form)
    shown, *ends = (f"{x:{sign}z{digits}}" for x in (value, *(interval or ())))
    return f"{shown} [{', '.join(ends)}]" if ends else shown


def arrow(before: float | None, after: float | None, form: str = ".2f") -> str:
    """`-5.16 → -4.20`; one number where nothing has changed."""
    return number(after, form) if before == after else f"{number(before, form)} → {number(after, form)}"


def metrics(results: dict[str, dict]) -> list[str]:
    """The accuracies that a table has room for: avg@k, pass@k and maj@k of the largest k, greedy."""
    names = {name for r in results.values() for name in r if f"{name}_ci95" in r}
    k = max(int(name[4:]) for name in names if name.startswith("avg@"))
    shown = [f"avg@{k}", f"pass@{k}", f"maj@{k}"] if k > 1 else ["avg@1"]
    return [name for name in [*shown, "greedy"] if name in names]


def accuracy(results: dict[str, dict]) -> Table:
    """What [`evaluate`] returned; the last row is the mean over benchmarks, each counting alike, as in the papers."""
    names, rows = metrics(results), []
    for benchmark, r in results.items():
        shown = [number(r.get(m), ".1%", r.get(f"{m}_ci95")) for m in names]
        rates = [number(r[m], ".1%") for m in ("truncated", "unparsable", "not_told")]
        line = [number(r["mean_length"], ".0f"), *rates, number(r["entropy"])]
        rows.append([benchmark, str(r["num_problems"]), *shown, *line])
    if len(results) > 1:
        columns = [[r.get(m) for r in results.values()] for m in names]
        means = [number(None if None in c else sum(c) / len(c), ".1%") for c in columns]
        rows.append(["mean", "", *means, *[""] * 5])
    return ["benchmark", "problems", *names, "tokens", "cut", "unparsable", "not told", "nats/token"], rows


def comparison(results: dict[str, dict]) -> Table:
    """Paired differences of each benchmark to the baseline, in points."""
    rows = []
    for benchmark, r in results.items():
        if versus := r.get("vs_baseline"):
            difference = number(versus["difference"], "+.1%", versus["difference_ci95"])
            line = [difference, f"{versus['p_value']:.4f}", str(versus["num_problems"]), versus["baseline"]]
            rows.append([benchmark, *line])
    return ["benchmark", "difference", "p (paired sign-flip test)", "problems", "baseline"], rows


def retention(changes: list[dict], results: dict[str, dict] | None = None) -> Table:
    """
    What [`measure_retention`] returned, below the gain on the target: an evaluation's `results` that were compared
    with a baseline.
    """
    rows = []
    for benchmark, r in (results or {}).items():
        if versus := r.get("vs_baseline"):
            metric, *_ = metrics({benchmark: r})
            change = number(versus["difference"], "+.1%", versus["difference_ci95"])
            rows.append([f"{benchmark} (target)", metric, "", number(r[metric], ".1%"), change])
    for row in changes:
        form = ".1%" if is_share(row) else ".3g"
        change = number(row["change"], f"+{form}", row["change_ci95"])
        metric = row["metric"] if row["higher_is_better"] else f"{row['metric']} (lower is better)"
        rows.append([row["task"], metric, number(row["base"], form), number(row["tuned"], form), change])
    return ["task", "metric", "base", "tuned", "change"], rows


def policy_gap(gap: dict[str, dict]) -> Table:
    """What [`measure_policy_gap`] returned: log-probs in nats."""
    rows = []
    for source, r in gap.items():
        before, after, difference, behavior = r["before"], r["after"], r["difference"], r["behavior"] or {}

        def moved(name: str, form: str = ".2f", before=before, after=after) -> str:
            return arrow(before[name], after[name], form)

        same = before["sequence_log_prob"] == after["sequence_log_prob"]  # such as rows that were not rewritten
        matched = "" if same else number(difference["length_matched"], "+.3f", difference["length_matched_ci95"])
        line = [moved("token_log_prob", ".3f"), moved("perplexity"), moved("num_tokens", ".0f"), matched]
        line += [number(behavior.get("kl"), ".4f"), number(behavior.get("ess"), ".3f")]
        rows.append([source, str(r["rows"]), moved("sequence_log_prob"), *line])
    header = [
        "source",
        "rows",
        "log-prob of the target",
        "per token",
        "perplexity",
        "tokens",
        "per token at equal length",
    ]
    return [*header, "KL(μ‖π) per token", "ESS"], rows


def texts(gap: dict[str, dict]) -> Table:
    """What rewriting did to the texts, from the same result."""
    rows = []
    for source, r in gap.items():
        before, after = r["before"], r["after"]
        both = [
            arrow(before[m], after[m], form)
            for m, form in (("hint_leakage", ".1%"), ("distinct_2", ".3f"), ("self_bleu", ".3f"))
        ]
        rows.append([source, number(after["copy_ratio"], ".1%"), *both])
    return ["source", "copied 4-grams", "speak of a reference", "distinct-2", "self-BLEU"], rows


def is_share(row: dict) -> bool:
    """Whether a metric of lm-eval is a share such as an accuracy, and no perplexity, BLEU or number of bits per byte."""
    return row["higher_is_better"] and 0 <= row["base"] <= 1 and 0 <= row["tuned"] <= 1


def rounds(rounds: list[dict]) -> Table:
    """What each round of `trl-offpolicy loop` came to."""
    benchmarks = list(dict.fromkeys(name for each in rounds for name in each.get("accuracy", {})))
    sources = list(dict.fromkeys(name for each in rounds for name in each["sources"]))
    rows = []
    for each in rounds:
        total = sum(each["sources"].values())
        shares = [f"{each['sources'].get(name, 0) / total:.1%}" for name in sources]
        kl, improved = each.get("forgetting", {}), each.get("improved")
        line = [str(each["round"]), *shares, "" if improved is None else f"{improved:,}", f"{each['sampled']:,}"]
        line += [number(each["cut"], ".1%"), number(each.get("mentions"), ".1%")]
        line += [number(each["entropy"], ".3f"), number(each["length"], ".0f")]
        line.append(number(kl.get("kl_per_token"), ".4f", kl.get("kl_per_token_ci95")))
        for name in benchmarks:
            scores = each.get("accuracy", {}).get(name, {})
            metric = next((m for m in scores if m.startswith("avg@") and "_" not in m), "")
            line.append(number(scores.get(metric), ".1%", scores.get(f"{metric}_ci95")))
        rows.append(line)
    header = [
        "round",
        *sources,
        "rows improved",
        "attempts",
        "cut",
        "mentions",
        "-log π",
        "tokens",
        "KL(π_0‖π)",
    ]
    return [*header, *benchmarks], rows


def rewriting(metrics: dict) -> Table:
    """The yield funnel of a rewrite's `metrics.json`."""
    counts, left, rows = metrics["yield"], metrics["yield"]["total"], []

    def share(number: int) -> str:
        return f"{number / max(1, counts['total']):.1%}"

    for stage, of in metrics["stages"].items():
        accepted = number(of["correct"] / of["sampled"] if of["sampled"] else None, ".1%")
        kept = of["rows"] if "rows" in of else counts[stage]
        copied = number(of["copied"] / of["ngrams"] if of.get("ngrams") else None, ".1%")
        rows.append([stage, f"{left:,}", f"{of['sampled']:,}", accepted, f"{kept:,}", share(kept), copied])
        left -= kept
    if "unsolved" in metrics:  # no demonstrations to fall back to
        rows.append(["unsolved", f"{left:,}", "", "", "", share(left), ""])
    else:
        rows.append(["expert", f"{left:,}", "", "", f"{counts['expert']:,}", share(counts["expert"]), ""])
    header = ["stage", "rows that reach it", "attempts", "correct attempts", "rows kept", "share of all rows"]
    return [*header, "copied 4-grams"], rows
