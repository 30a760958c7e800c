"""Rounds against one shot, in miniature: does it help that the rows of a later training are drawn by the newest policy?

    python examples/miniature/rounds.py --seeds 0 1 2       # all of it; run the same command again after an interruption
    python examples/miniature/rounds.py --dry_run           # what would be run, and how much of it is there already

It has the bases, problems and measures of `study.py` and shares its directory: a base policy that is there is not trained
again. On each base and for each seed, every model is trained on rows of the same 400 demonstrations, K = 4, one epoch each:

    round 0          the base, on what the base has drawn
    from last, 1, 2  the model of the round before, on what that has drawn (`trl-offpolicy loop --train_from last`)
    from base, 1, 2  the base, on what the model of the round before has drawn (`--train_from base`)
    one shot, all    the base, on three draws of its own at each demonstration: as many optimizer steps as three rounds from last
    one shot, best   the base, on the best of those three draws: as many steps as the last round from base

The third draw of a one shot is at as many demonstrations as have cost what the three rounds that it is held against have
sampled, in tokens; where it ends, "all" has the rows of the first draw again. So one shots differ from the last rounds only in
who has drawn, and in the schedule, which begins anew in each round. The learning rate is what the study chose for the
objective, and not tuned again.
"""

import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from results import cell, shares
from study import (
    METRICS,
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
    workers,
    write,
)  # fmt: skip
from tqdm.auto import tqdm


RANK = ("self", "guided", "expert")  # the best first


class Model(NamedTuple):
    """How a model is made."""

    label: str
    start: str  # the model that is trained on
    draws: tuple[tuple[str, int], ...]  # who drew its rows, and in which draw
    best: bool = False  # the best row of each problem rather than all of them
    one_shot: str | None = None  # what it is held against
    budget: str | None = None  # which model's tokens its last draw must not exceed


OWN = (("base", 0), ("base", 1), ("base", 2))
MODELS = {
    "base": Model("Base", "", ()),
    "round-0": Model("round 0", "base", OWN[:1]),
    "last-1": Model("from last, 1", "round-0", (("round-0", 1),)),
    "last-2": Model("from last, 2", "last-1", (("last-1", 2),), one_shot="all"),
    "all": Model("one shot, all", "base", OWN, budget="last-2"),
    "base-1": Model("from base, 1", "base", (("round-0", 1),)),
    "base-2": Model("from base, 2", "base", (("base-1", 2),), one_shot="best"),
    "best": Model("one shot, best", "base", OWN, best=True, budget="base-2"),
}
# Jobs that need nothing of each other, in the order in which they are due.
PHASES = ((*OWN, "base"), ("round-0",), (("round-0", 1),), ("last-1", "base-1"), (("last-1", 2), ("base-1", 2)), ("last-2", "base-2"), ("all", "best"))  # fmt: skip


def name_of(args, job: str | tuple[str, int]) -> str:
    """Where a model or a draw is, within what a base and a seed have."""
    if job == "base":  # the study's
        return "base"
    return f"rounds-{args.objective}/{job if isinstance(job, str) else 'draw-{}-by-{}'.format(*reversed(job))}"


def directory_of(args, base: int, seed: int, job: str | tuple[str, int]) -> Path:
    return run_dir(args, base, name_of(args, job), None, seed)


def model_of(args, base: int, seed: int, name: str) -> str:
    return policy(args, base) if name == "base" else str(directory_of(args, base, seed, name))


def tokens_of(args, base: int, seed: int, name: str) -> int:
    """How many tokens were sampled for a model, and for those that drew for it or that it was trained on."""
    model, draws, todo = MODELS[name], set(), [name]
    while todo:
        earlier = MODELS[todo.pop()]
        todo += [*(by for by, _ in earlier.draws), *([earlier.start] if earlier.start else [])]
        draws |= set(earlier.draws)
    if model.budget:
        draws.remove(model.draws[-1])
    tokens = sum(read(directory_of(args, base, seed, draw) / "results.json")["tokens"] for draw in draws)
    return tokens + (last_draw(args, base, seed, model)[1] if model.budget else 0)


def last_draw(args, base: int, seed: int, model: Model) -> tuple[int, int]:
    """At how many demonstrations the last draw of a one shot is, so that it keeps its budget, and their tokens."""
    from trl_offpolicy.runs.run_directory import RunDirectory

    *before, last = (RunDirectory(directory_of(args, base, seed, draw)) for draw in model.draws)
    left = tokens_of(args, base, seed, model.budget) - sum(run.metrics["sampling"]["tokens"] for run in before)
    of_problem = Counter()
    for journal in last.journals:
        for attempt in last.attempts(journal, texts=False):
            of_problem[attempt.id] += attempt.num_tokens
    ids = last.rows().to_table(["id"])["id"].to_pylist()
    spent = np.cumsum([0] + [of_problem[i] for i in ids])
    number = int(np.searchsorted(spent, left, side="right")) - 1
    return number, int(spent[number])


def rows_of(args, base: int, seed: int, model: Model):
    """The rows that a model is trained on."""
    from datasets import concatenate_datasets, load_dataset

    drawn = [
        load_dataset(str(directory_of(args, base, seed, draw) / "dataset"), split="train") for draw in model.draws
    ]
    size = len(drawn[0])
    number = last_draw(args, base, seed, model)[0] if model.budget else size
    if not model.best:
        again = [drawn[0].select(range(number, size))] if number < size else []
        return concatenate_datasets([*drawn[:-1], drawn[-1].select(range(number)), *again])
    ranks = np.array([[RANK.index(source) for source in rows["source"]] for rows in drawn])
    ranks[-1, number:] = len(RANK)
    return concatenate_datasets(drawn).select(ranks.argmin(0) * size + np.arange(size))


# ---- jobs, as in study.py ----


def redraw(args, base: int, where: str, rate: None, seed: int) -> None:
    """One rewrite of the training problems by one model."""
    number, by = where.rpartition("draw-")[2].split("-by-")
    directory = run_dir(args, base, where, rate, seed)
    own_seed = args.data_seed + 10 * seed + int(number)
    draw_rows(model_of(args, base, seed, by), directory, splits(args, base)["train"], own_seed)
    write(directory / "results.json", {"tokens": read(directory / "metrics.json")["sampling"]["tokens"]})


def make(args, base: int, where: str, rate: None, seed: int) -> None:
    """One model: trained if it is missing, and measured; `kl.json` says how far it is from the base."""
    from trl_offpolicy.evaluation.forgetting import measure_forgetting

    model, directory = MODELS[where.rpartition("/")[2]], run_dir(args, base, where, rate, seed)
    if not (directory / "trainer_state.json").exists():
        rows, start = rows_of(args, base, seed, model), model_of(args, base, seed, model.start)
        sources = {source: list(rows["source"]).count(source) / len(rows) for source in RANK}
        write(directory / "rows.json", {"rows": len(rows), "sources": sources})
        train(rows, args.objective, args.learning_rate, seed, directory, start, expert_weighting="base")
    write(directory / "kl.json", measure_forgetting(str(directory), str(directory_of(args, base, seed, OWN[0]))))
    measure(args, base, where, rate, seed, str(directory))


def jobs_of(args, phase) -> list[partial]:
    """Those of all bases and seeds, each base's own measures first where the study has not taken them."""
    kinds = {job: test if job == "base" else make if isinstance(job, str) else redraw for job in phase}
    return [
        partial(kind, args, base, name_of(args, job), None, seed)
        for seed in args.seeds
        for base in args.bases
        for job, kind in kinds.items()
    ]


def study(args) -> dict:
    """All jobs; returns what `rounds-<objective>.json` holds."""
    phases = [[partial(pretrain, args, base) for base in args.bases], *(jobs_of(args, phase) for phase in PHASES)]
    total = sum(map(len, phases))
    with workers(args.processes) as pool, tqdm(total=total, desc="rounds", unit="job", smoothing=0.05) as bar:
        for jobs in phases:
            finish(pool, jobs, bar)
    return summarize(args)


# ---- what they come to ----


def summarize(args) -> dict:
    """Of each model every metric, its paired differences, where its rows come from, and what it took."""
    known = {
        (m, b, s): shares(directory_of(args, b, s, m) / "samples.parquet", METRICS)
        for m in MODELS
        for b in args.bases
        for s in args.seeds
    }

    result = {}
    for name, model in MODELS.items():
        others = {"value": None, "minus_base": "base", "minus_one_shot": model.one_shot}
        found = {
            metric: {
                key: compare(args, known, name, metric, other)
                for key, other in others.items()
                if key == "value" or (other and other != name)
            }
            for metric in METRICS
        }
        result[name] = {"accuracy": found, **_cost(args, name)}
        if model.draws:
            where = partial(directory_of, args, job=name)
            for source in RANK:
                share = over(args, where, "rows.json", lambda rows, source=source: rows["sources"][source])
                result[name][source] = share
            result[name]["kl_per_token"] = over(args, where, "kl.json", lambda kl: kl["kl_per_token"])
    settings = {name: getattr(args, name) for name in ("bases", "seeds", "objective", "learning_rate", "num_train", "data_seed")}  # fmt: skip
    return {"settings": settings, "models": result}


def _cost(args, name: str) -> dict:
    """Tokens that were sampled for a model and those before it (mean), and optimizer steps on the way from the base to it."""
    tokens, steps = [tokens_of(args, base, seed, name) for base in args.bases for seed in args.seeds], 0
    while MODELS[name].start:
        state = directory_of(args, args.bases[0], args.seeds[0], name) / "trainer_state.json"
        steps, name = steps + read(state)["global_step"], MODELS[name].start
    return {"tokens": sum(tokens) / len(tokens), "steps": steps}


def table(results: dict) -> str:
    from trl_offpolicy.reporting.tables import markdown

    rows = []
    for name, of in results["models"].items():
        main, *others = of["accuracy"].values()
        differences = [cell(main.get(f"minus_{other}"), "+") for other in ("base", "one_shot")]
        kl = f"{of['kl_per_token']['mean']:.3f}" if "kl_per_token" in of else ""
        cost = [f"{of['tokens'] / 1000:.0f}", str(of["steps"])] if of["tokens"] else ["", ""]
        rows.append([
            MODELS[name].label, *cost, cell(of.get("expert")), cell(main["value"]), *differences, *(cell(each["value"]) for each in others), kl,
        ])  # fmt: skip
    main, *others = METRICS
    header = ["%", "thousand tokens drawn", "steps", "expert rows", main, "− base", "− one shot", *others, "KL(π_0‖π) a token"]  # fmt: skip
    return markdown((header, rows))


# ---- the command ----


def parse(argv: list[str] | None):
    mine = parser(__doc__)
    mine.add_argument("--objective", choices=["nll", "dft", "iw"], default="dft", help="what all of them train with")
    mine.add_argument("--learning_rate", type=float, default=3e-4, help="the study's choice for DR+DFT on every base")
    return parsed(mine, argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    print(args.output_dir, flush=True)
    if args.dry_run:
        for jobs in ([partial(pretrain, args, base) for base in args.bases], *(jobs_of(args, p) for p in PHASES)):
            for job in jobs:
                print(f"{'done' if result_of(job).exists() else 'due '} {describe(job)}")
        return 0
    results, code = outcome(study, args)
    if results is None:
        return code
    file = args.output_dir / f"rounds-{args.objective}.json"
    write(file, results)
    print(table(results) + str(file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
