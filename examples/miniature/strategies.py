"""Data strategies against each other, in miniature: the same problems, policy and objective, other rows.

    python examples/miniature/strategies.py --bases 0 1 2     # all of it; run it again after an interruption
    python examples/miniature/strategies.py --dry_run         # what would be run, and how much of it is there already

It has the bases, problems and measures of `study.py` and shares its directory: a base policy that is there is not
trained again. Each strategy rewrites the same 400 demonstrations, with K = 4 unless it says "one", and each policy is
trained for one epoch:

    SFT, DFT        on the demonstrations
    DR              own solution, else retelling, else demonstration (`--strategy mind_the_gap`)
    GRAPE           of what the policy and another base's write, and the demonstration, what the policy finds likeliest
    RFT             every correct solution with other equations, and the demonstrations
    ReST-EM         the same solutions without demonstrations
    STaR            one greedy attempt; what fails, once more with the answer as a hint; what fails twice is left out
    SDFT            one retelling, else the demonstration
    S3FT            one own answer, else one retelling, else the demonstration
    hinted          DR whose retellings go on in the policy's own voice (guided_decoding "hinted", β = 10)
    DR, 5 % replay  DR's rows, and the policy's own answers to problems of the second family that are in no test
    DR, threshold   DR's rows; tokens less likely than 0.1 weigh nothing
    TOPR            two of the four own attempts at each problem, right ones and wrong ones

What iterates in its paper (ReST-EM, STaR) has one round. All but SFT, threshold and TOPR are trained as DFT, so that
rows and rates differ. The learning rate of each is chosen on each base's development problems, as in the study.
"""

import json
import random
import shutil
import sys
from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from results import accuracy_table, draw, shares
from study import (
    GUIDED_PROMPT,
    METRICS,
    TUNING_SEED,
    K,
    chosen_rates,
    compare,
    describe,
    draw_rows,
    finish,
    measure,
    outcome,
    over,
    parsed,
    parser,
    policy,
    pretrain,
    read,
    result_of,
    run_dir,
    splits,
    test,
    train,
    training_rows,
    tuning_jobs,
    workers,
    write,
)  # fmt: skip
from tqdm.auto import tqdm


class Draw(NamedTuple):
    """How rows are drawn: a preset of the package, and what is set beside it."""

    strategy: str
    settings: dict[str, Any] = {}
    begins_as: str | None = None  # the draw with the same attempts, whose journal it goes on from
    signed: bool = False  # whether its right and wrong attempts are rows as well


class Method(NamedTuple):
    """What is trained on, and how."""

    label: str
    draw: str | None  # the demonstrations
    objective: str = "dft"
    rows: str = "dataset"  # which of a draw's rows
    unsolved: bool = True  # whether the demonstrations of problems that were not solved are among them


REPLAY_SHARE, NUM_GENERAL = 0.05, 100
DRAWS = {
    "dr": Draw("mind_the_gap"),
    "grape": Draw("grape"),
    "rft": Draw("rft", {"selection": "random"}, signed=True),  # K either way; so ReST-EM's are the same
    "rest_em": Draw("rest_em", begins_as="rft"),
    "star": Draw("star", {"hint_prompt": GUIDED_PROMPT.replace("{solution}", "{hint}")}),
    "sdft": Draw("sdft"),
    "s3ft": Draw("s3ft"),
    "hinted": Draw("mind_the_gap", {"guided_decoding": "hinted", "hint_beta": 10.0}),
    "replay": Draw("mind_the_gap", {"replay_share": REPLAY_SHARE}, begins_as="dr"),
}  # fmt: skip
METHODS = {
    "sft": Method("SFT", None, "nll"),
    "dft": Method("DFT", None),
    "dr": Method("DR", "dr"),
    "grape": Method("GRAPE", "grape"),
    "rft": Method("RFT", "rft"),
    "rest_em": Method("ReST-EM", "rest_em", unsolved=False),
    "star": Method("STaR", "star", unsolved=False),
    "sdft": Method("SDFT", "sdft"),
    "s3ft": Method("S3FT", "s3ft"),
    "hinted": Method("hinted", "hinted"),
    "replay": Method("DR, 5 % replay", "replay", rows="with_replay"),
    "threshold": Method("DR, threshold", "dr", "threshold"),
    "topr": Method("TOPR", "rft", "topr", rows="signed"),
}
LABELS = {"base": "Base", **{name: method.label for name, method in METHODS.items()}}
MAX_SIGNED = 2  # signed rows of a problem, so that TOPR's training is no longer than RFT's


def name_of(method: str) -> str:
    """Where a method is, within what a base and a seed have."""
    return method if method == "base" else f"strategies/{method}"


def draw_of(args, base: int, seed: int, name: str) -> Path:
    return run_dir(args, base, f"strategies/draw-{name}", None, seed)


def teacher_of(base: int) -> int:
    """The base whose policy is another's teacher."""
    return (base + 1) % 3


def rows_of(args, base: int, seed: int, name: str):
    """The rows that a method trains on."""
    from datasets import load_dataset

    method = METHODS[name]
    if method.draw is None:
        return training_rows(args, base, "demonstrations")
    rows = load_dataset(str(draw_of(args, base, seed, method.draw) / method.rows), split="train")
    return rows if method.unsolved else rows.filter(lambda source: source != "expert", input_columns="source")


def general_prompts(args, base: int, file: Path) -> str:
    """Writes problems of the second family that no test has; returns the file's name."""
    from quickstart_task import second_family

    tested = {row["prompt"][0]["content"] for row in splits(args, base)["other"]}
    rng, prompts = random.Random(f"general {args.data_seed + base}"), {}  # as a set that is in order
    while len(prompts) < NUM_GENERAL:
        problem = second_family(rng)["problem"]
        if problem not in tested:
            prompts[problem] = json.dumps({"prompt": [{"role": "user", "content": problem}]})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(prompts.values()) + "\n")
    return str(file)


def settings_of(draw: Draw) -> dict:
    """The settings of a rewrite: those of its preset, and what is set beside it."""
    from trl_offpolicy.rewriting.strategies import rewrite_settings

    return {"strategy": draw.strategy, **rewrite_settings(draw.strategy), **draw.settings}


# ---- jobs, as in study.py ----


def redraw(args, base: int, where: str, rate: None, seed: int) -> None:
    """One rewrite of the training problems, with a seed for each fine-tuning seed."""
    from trl_offpolicy.rewriting.signed_rows import write_signed_rows
    from trl_offpolicy.sampling.transformers_sampler import TransformersSampler

    name, directory = where.rpartition("draw-")[2], run_dir(args, base, where, rate, seed)
    drawn, options, teachers = DRAWS[name], settings_of(DRAWS[name]), {}
    if name == "grape":
        teachers = {"other": TransformersSampler(policy(args, teacher_of(base)))}
    if name == "replay":
        options["replay_dataset"] = general_prompts(args, base, directory / "general.jsonl")
    if drawn.begins_as and not (directory / "journal.jsonl").exists():
        directory.mkdir(parents=True, exist_ok=True)
        unfinished = directory / "journal.jsonl.unfinished"
        shutil.copyfile(draw_of(args, base, seed, drawn.begins_as) / "journal.jsonl", unfinished)
        unfinished.replace(directory / "journal.jsonl")
    own_seed = args.data_seed + 10 * seed
    draw_rows(policy(args, base), directory, splits(args, base)["train"], own_seed, teachers=teachers, **options)
    if drawn.signed:
        write_signed_rows(directory, directory / "signed", max_per_problem=MAX_SIGNED, seed=own_seed)
    tokens = read(directory / "metrics.json")["sampling"]["tokens"]
    if name == "replay":
        _, *answers = map(json.loads, (directory / "replay.jsonl").read_text().splitlines())
        tokens += sum(answer["num_tokens"] for answer in answers)
    write(directory / "results.json", {"tokens": tokens})


def fit(args, base: int, where: str, rate: float, seed: int) -> Path:
    """The model that a method makes of a base, trained if it is missing."""
    name, directory = where.rpartition("/")[2], run_dir(args, base, where, rate, seed)
    if not (directory / "trainer_state.json").exists():
        rows = rows_of(args, base, seed, name)
        sources = Counter(rows["source"] if "source" in rows.column_names else ["expert"] * len(rows))
        write(directory / "rows.json", {"rows": len(rows), "sources": sources})
        train(rows, METHODS[name].objective, rate, seed, directory, policy(args, base))
    return directory


def make(args, base: int, where: str, rate: float, seed: int) -> None:
    """One model, trained and measured; `kl.json` says how far it is from the base."""
    from trl_offpolicy.evaluation.forgetting import measure_forgetting

    model = str(fit(args, base, where, rate, seed))
    write(Path(model) / "kl.json", measure_forgetting(model, str(draw_of(args, base, seed, "dr"))))
    measure(args, base, where, rate, seed, model)


def named(args, **changed) -> Namespace:
    """The settings as the study's functions understand them, which take a method for where it is."""
    return Namespace(**{**vars(args), "methods": [name_of(m) for m in args.methods], **changed})


def rates_of(args, bases: list[int]) -> dict[str, dict[int, float]]:
    """Method → base → learning rate."""
    chosen = chosen_rates(named(args, bases=bases))
    return {m: chosen[name_of(m)] for m in args.methods}


def draws(args, base: int, seed: int) -> tuple[list[partial], list[partial]]:
    """Those of the methods, and those that go on from one of them."""
    wanted = dict.fromkeys(METHODS[m].draw for m in args.methods)
    wanted |= dict.fromkeys(DRAWS[name].begins_as for name in list(wanted) if name)
    jobs = {
        name: partial(redraw, args, base, f"strategies/draw-{name}", None, seed) for name in DRAWS if name in wanted
    }
    later = [job for name, job in jobs.items() if DRAWS[name].begins_as]
    return [job for job in jobs.values() if job not in later], later


def first_phases(args, base: int, seed: int) -> list[list[partial]]:
    """The jobs before the methods' own, in lists whose jobs need nothing of each other."""
    first, later = draws(args, base, seed)
    phases = [[partial(test, args, base, "base", None, seed), *first], later]
    if seed == TUNING_SEED:
        phases.append([partial(job.func, *job.args, fit=fit) for job in tuning_jobs(named(args, bases=[base]))])
    return phases


def makes(args, base: int, seed: int) -> list[partial]:
    """The methods' own jobs, once the learning rates are chosen."""
    rates = rates_of(args, [base])
    return [partial(make, args, base, name_of(m), rates[m][base], seed) for m in args.methods]


def pretrainings(args) -> list[partial]:
    teachers = map(teacher_of, args.bases) if "grape" in args.methods else ()
    return [partial(pretrain, args, base) for base in dict.fromkeys([*args.bases, *teachers])]


def turns(args) -> list[tuple[int, int]]:
    """Bases and seeds in the order in which they are run."""
    return [(base, seed) for seed in sorted(args.seeds) for base in args.bases]


def study(args) -> dict:
    """All jobs, one base after another; returns what `strategies.json` holds."""
    total = len(pretrainings(args)) + len(turns(args)) * len(args.methods)
    total += sum(len(jobs) for turn in turns(args) for jobs in first_phases(args, *turn))
    with workers(args.processes) as pool, tqdm(total=total, desc="strategies", unit="job", smoothing=0.05) as bar:
        finish(pool, pretrainings(args), bar)
        for turn in turns(args):
            for jobs in first_phases(args, *turn):
                finish(pool, jobs, bar)
            finish(pool, makes(args, *turn), bar)
    return summarize(args)


# ---- what they come to ----


def summarize(args) -> dict:
    """Of each method every metric with its paired differences to the base and to DR, its rows, and what it took."""
    rates = {"base": dict.fromkeys(args.bases), **rates_of(args, args.bases)}

    def directory_of(base: int, seed: int, method: str) -> Path:
        return run_dir(args, base, name_of(method), rates[method][base], seed)

    known = {
        (m, b, s): shares(directory_of(b, s, m) / "samples.parquet", METRICS)
        for m in rates
        for b in args.bases
        for s in args.seeds
    }

    def every(method: str, metric: str) -> dict:
        others = [None, *(reference for reference in ("dr", "base") if reference != method)]
        return {f"minus_{o}" if o else "value": compare(args, known, method, metric, o) for o in others}

    rows, kl, tokens = {}, {}, {}
    for m in args.methods:
        where, draw = partial(directory_of, method=m), METHODS[m].draw
        kl[m] = over(args, where, "kl.json", lambda kl: kl["kl_per_token"])
        rows[m] = {"all": over(args, where, "rows.json", lambda rows: rows["rows"])}
        found = {s for b in args.bases for seed in args.seeds for s in read(where(b, seed) / "rows.json")["sources"]}
        for s in sorted(found):
            rows[m][s] = over(args, where, "rows.json", lambda rows, s=s: rows["sources"].get(s, 0))
        if draw:
            tokens[m] = over(args, partial(draw_of, args, name=draw), "results.json", lambda of: of["tokens"])
    settings = {name: getattr(args, name) for name in ("bases", "seeds", "learning_rates", "num_train", "num_test", "data_seed")}  # fmt: skip
    dev = [job for b in args.bases for job in first_phases(args, b, TUNING_SEED)[-1]]
    return {
        "settings": {**settings, "num_generations": K, "replay_share": REPLAY_SHARE, "max_signed": MAX_SIGNED},
        "learning_rate": {m: rates[m] for m in args.methods},
        "dev_accuracy": {f"base-{j.args[1]}/{result_of(j).stem}": read(result_of(j)) for j in dev},
        "accuracy": {m: {metric: every(m, metric) for metric in METRICS} for m in rates},
        "rows": rows,
        "tokens": tokens,
        "kl_per_token": kl,
    }


def table(results: dict) -> str:
    rows = {m: " + ".join(f"{of['mean']:.0f} {s}" for s, of in each.items() if s != "all") for m, each in results["rows"].items()}  # fmt: skip
    kl = {m: f"{of['mean']:.3f}" for m, of in results["kl_per_token"].items()}
    tokens = {m: f"{of['mean'] / 1000:.0f}" for m, of in results["tokens"].items()}
    more = {"KL(π_0‖π) a token": kl, "thousand tokens drawn": tokens, "rows": rows}
    return accuracy_table(results, LABELS, {"dr": "DR", "base": "base"}, more)


# ---- the command ----


def dry_run(args) -> None:
    jobs = [pretrainings(args)]
    for base, seed in turns(args):
        jobs += first_phases(args, base, seed)
        if all(result_of(job).exists() for job in tuning_jobs(named(args, bases=[base]))):
            jobs.append(makes(args, base, seed))
        else:
            print(
                f"due  {len(args.methods)} models of base-{base} for seed {seed}, once the learning rates are chosen"
            )
    for job in (job for phase in jobs for job in phase):
        print(f"{'done' if result_of(job).exists() else 'due '} {describe(job)}")


def parse(argv: list[str] | None):
    mine = parser(__doc__)
    mine.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=f"some of {', '.join(METHODS)}; DR is always among them")  # fmt: skip
    mine.add_argument("--learning_rates", type=float, nargs="+", default=[3e-5, 1e-4, 3e-4], help="the grid")
    args = parsed(mine, argv)
    args.methods = [name for name in METHODS if name in {"dr", *args.methods}]
    if TUNING_SEED not in args.seeds:
        mine.error(f"learning rates are chosen with fine-tuning seed {TUNING_SEED}; name it in --seeds too")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    print(args.output_dir, flush=True)
    if args.dry_run:
        dry_run(args)
        return 0
    results, code = outcome(study, args)
    if results is None:
        return code
    file = args.output_dir / "strategies.json"
    write(file, results)
    draw(results, LABELS, file.with_suffix(".png"), "dr", "DR")
    print(table(results) + str(file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
