"""The miniature study: ten methods on three base policies, with intervals that take in problems, fine-tuning seeds and bases.

    python examples/miniature/study.py                          # all of it; run the same command again after an interruption
    python examples/miniature/study.py --dry_run                # what would be run, and how much of it is there already
    python examples/miniature/study.py --bases 0 --seeds 0 1    # the shipped policy only, two fine-tuning seeds
    python examples/miniature/study.py --processes 8            # as many jobs at a time, one thread each
    trl-offpolicy report runs/miniature/base-0/seed-0 runs/miniature/base-0/rewrite --output_dir runs/miniature/report

A base is a quickstart policy pre-trained with its own seed (0 is the one that is shipped, the others are trained here: half an
hour of one core each), and has training, development and test problems of its own. First each base is checked against what a fair
miniature needs (`CONDITIONS`); the study goes on whatever comes out, and `results.json` says which were met. Then the learning
rate of every method is chosen on the base's development problems, and each method is tested with it:

    SFT, DFT, IW       on the demonstrations; IW is π/π_0 there, limited to 3, since nobody knows μ (iw-SFT, arXiv 2507.12856)
    DR+SFT, +DFT, +IW  on the rewritten data; IW is π/μ on what was sampled, π/π_0 on the demonstrations that were kept
    self only          self-alignment, else the demonstration (what is lost without the guided stage)
    guided only        guided alignment for every problem, else the demonstration: generate, verify, fall back
    no fallback        rewritten data without its demonstrations
    RFT                every distinct correct one of K unguided draws a problem, no demonstrations (rejection sampling, arXiv 2308.01825)

The last four are trained as SFT, so that against DR+SFT only the data differ. All train for one epoch. A job's result is a file
in `output_dir` (`base-N/conditions.json`, `base-N/dev/*.json`, `base-N/seed-N/*/results.json`); what is there is not done again.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

from quickstart import GUIDED_PROMPT, POLICY, data, quiet, train  # noqa: E402
from results import STUDENT_T, accuracy_table, conditions_table, draw, estimate, shares  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402


# name → (label, rows, objective)
METHODS = {
    "sft": ("SFT", "demonstrations", "nll"),
    "dft": ("DFT", "demonstrations", "dft"),
    "iw": ("IW", "demonstrations", "iw"),
    "dr_sft": ("DR+SFT", "rewrite", "nll"),
    "dr_dft": ("DR+DFT", "rewrite", "dft"),
    "dr_iw": ("DR+IW", "rewrite", "iw"),
    "self_only": ("self only", "rewrite-self", "nll"),
    "guided_only": ("guided only", "rewrite-guided", "nll"),
    "no_fallback": ("no fallback", "no_fallback", "nll"),
    "rft": ("RFT", "rft", "nll"),
}
LABELS = {"base": "Base", **{name: label for name, (label, _, _) in METHODS.items()}}
# Lowest and highest value of what a fair miniature needs; measured on each base before any method is run.
CONDITIONS = {
    "self_share": (0.5, 0.7, "problems that self-alignment solves"),
    "guided_share_of_the_rest": (1 / 3, 1.0, "of the rest, what guided alignment recovers"),
    "control_share_of_the_rest": (None, None, "of the rest, what 2K further unguided draws recover"),
    "guided_minus_control_low": (0.0, 1.0, "difference of the two, lower end of its 95 % interval"),
    "fallback_share": (0.1, 0.25, "problems that keep the demonstration"),
    "expert_to_own_style": (0.5, None, "accuracy when made to begin in the expert's style, over the accuracy unprompted"),
    "second_family": (0.8, 1.0, "accuracy on the second family"),
}  # fmt: skip
K = 4  # attempts a problem and stage in rewriting, and samples a problem in evaluation
TUNING_SEED = 0  # learning rates are chosen with this fine-tuning seed
MAX_LENGTH = 192  # tokens of a completion
METRICS = {  # name → (benchmark, stage of its samples, what is averaged over problems)
    f"avg@{K}": ("target", "eval", "mean"),
    "greedy": ("target", "greedy", "mean"),
    f"pass@{K}": ("target", "eval", "max"),
    f"second family, avg@{K}": ("other", "eval", "mean"),
}
SIZES = ("num_train", "num_dev", "num_test", "num_other", "data_seed", "base_steps")


# ---- jobs: each leaves its result in a file, and runs in a worker process ----


def run(job: partial) -> None:
    """One job, in a worker: what it prints goes to a log, since the parent has the progress bar."""
    quiet()
    args = job.args[0]
    with open(args.output_dir / "jobs.log", "a") as log:
        sys.stdout = sys.stderr = log
        print(describe(job), flush=True)
        job()


def describe(job: partial) -> str:
    return " ".join([job.func.__name__, f"base-{job.args[1]}", *map(str, job.args[2:])])


def base_dir(args, base: int) -> Path:
    return args.output_dir / f"base-{base}"


def run_dir(args, base: int, method: str, rate: float | None, seed: int) -> Path:
    return base_dir(args, base) / f"seed-{seed}" / (method if rate is None else f"{method}-{rate:g}")


def result_of(job: partial) -> Path:
    """The file that a finished job has left."""
    args, base, *rest = job.args
    if job.func is pretrain:
        return Path(policy(args, base))
    if job.func is prepare:
        return base_dir(args, base) / "conditions.json"
    if job.func is tune:
        return base_dir(args, base) / "dev" / "{}-{:g}.json".format(*rest)
    return run_dir(args, base, *rest) / "results.json"


def write(path: Path, content: dict) -> None:
    """Whole or not at all: what is there counts as done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def splits(args, base: int) -> dict:
    return data(args.data_seed + base, args.num_train, args.num_dev, args.num_test, args.num_other)


def policy(args, base: int) -> str:
    return POLICY if base == 0 else str(base_dir(args, base) / "policy")


def pretrain(args, base: int) -> None:
    """A base policy, if it is missing."""
    import train_quickstart_policy

    name = policy(args, base)
    if not Path(name).exists():
        unfinished = Path(f"{name}.unfinished")
        train_quickstart_policy.main(
            ["--seed", str(base), "--steps", str(args.base_steps), "--output_dir", str(unfinished)]
        )
        unfinished.rename(name)


def draw_rows(
    model: str, directory: Path, rows: list[dict], seed: int, num_generations: int = K, teachers=None, **options
):
    """The rewritten rows that a model draws."""
    from trl_offpolicy import DataRewriter, MathVerifier, RewriteConfig

    config = RewriteConfig(
        str(directory), num_generations=num_generations, max_completion_length=MAX_LENGTH, guided_prompt=GUIDED_PROMPT, seed=seed, **options
    )  # fmt: skip
    with MathVerifier(num_workers=1) as verifier:
        return DataRewriter(model, config, verifier=verifier, teachers=teachers).rewrite(rows)


def prepare(args, base: int) -> None:
    """A base policy: pre-trained if it is missing, its rewrites, its own accuracy, and whether the conditions are met."""
    from trl_offpolicy import measure_policy_gap

    pretrain(args, base)
    directory, name, rows = base_dir(args, base), policy(args, base), splits(args, base)

    def rewrite(run: str, rows: list[dict], num_generations: int = K, seed: int = args.data_seed, **options):
        return draw_rows(name, directory / run, rows, seed, num_generations, **options)

    rewritten = rewrite("rewrite", rows["train"])
    rewrite("rewrite-self", rows["train"], stages=["self"], selection="random")
    rewrite("rewrite-guided", rows["train"], stages=["guided"])
    measure_policy_gap(name, rewritten, output_dir=str(directory / "gap"))
    pairs = zip(rows["train"], rewritten["source"], strict=True)
    left = [(row, source == "guided") for row, source in pairs if source != "self"]
    control = []
    if left:
        again = [row for row, _ in left]
        control = rewrite("control", again, 2 * K, args.data_seed + 1, stages=["self"])["source"]
    test(args, base, "base", None, TUNING_SEED)
    write(
        directory / "conditions.json",
        conditions(args, base, rewritten["source"], left, control, rows),
    )


def conditions(args, base: int, sources: list[str], left: list, control: list[str], rows: dict) -> dict:
    """Name → value, whether it is within its bounds, and what it is."""
    import torch
    from train_quickstart_policy import accuracy
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_offpolicy.evaluation.estimators import bootstrap

    guided = [recovered for _, recovered in left]
    gain = [g - (c == "self") for g, c in zip(guided, control, strict=True)]
    name = policy(args, base)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    prompts = [row["prompt"][0]["content"] for row in rows["dev"]]
    torch.manual_seed(args.data_seed + base)
    own, expert = (
        accuracy(model, tokenizer, rows["dev"], prompts, prefix, 2, max_new_tokens=MAX_LENGTH).double().mean().item()
        for prefix in ("", "We begin")
    )
    first = read(run_dir(args, base, "base", None, TUNING_SEED) / "results.json")
    values = {
        "self_share": sources.count("self") / len(sources),
        "guided_share_of_the_rest": sum(guided) / len(guided) if guided else None,
        "control_share_of_the_rest": control.count("self") / len(control) if control else None,
        "guided_minus_control_low": bootstrap(gain)[0][0].item() if len(gain) > 1 else None,
        "fallback_share": sources.count("expert") / len(sources),
        "expert_to_own_style": expert / own if own else None,
        "second_family": first["benchmarks"]["other"][f"avg@{K}"],
    }
    found = {}
    for name, value in values.items():
        low, high, meaning = CONDITIONS[name]
        met = value is not None and (low is None or low < value) and (high is None or value <= high)
        found[name] = {"value": value, "low": low, "high": high, "met": met, "meaning": meaning}
    return found


def training_rows(args, base: int, which: str):
    """The rows that a method trains on."""
    from datasets import Dataset, load_dataset

    from trl_offpolicy.runs.journal import read_entries

    if which == "demonstrations":
        return Dataset.from_list(splits(args, base)["train"])
    run = {"no_fallback": "rewrite", "rft": "rewrite-self"}.get(which, which)
    rows = load_dataset(str(base_dir(args, base) / run / "dataset"), split="train")
    if which == "no_fallback":
        return rows.filter(lambda source: source != "expert", input_columns="source")
    if which != "rft":
        return rows
    correct = {}
    for _, entry in read_entries(base_dir(args, base) / run / "journal.jsonl"):
        if entry["verdict"] == "correct":  # equal texts can be different tokens: the earliest attempt's are taken
            kept = correct.setdefault((entry["id"], entry["text"]), entry)
            correct[entry["id"], entry["text"]] = min(kept, entry, key=lambda e: e["attempt"])
    prompts = dict(zip(rows["id"], rows["prompt"], strict=True))
    return Dataset.from_list([
        {"prompt": prompts[i], "completion": [{"role": "assistant", "content": text}], "completion_ids": entry["completion_ids"]}
        for (i, text), entry in sorted(correct.items())
    ])  # fmt: skip


def fit(args, base: int, method: str, rate: float, seed: int) -> Path:
    """The model that a method makes of a base, trained if it is missing."""
    directory = run_dir(args, base, method, rate, seed)
    if not (directory / "trainer_state.json").exists():
        _, which, objective = METHODS[method]
        rows = training_rows(args, base, which)
        write(directory / "rows.json", {"rows": len(rows)})
        train(rows, objective, rate, seed, directory, policy(args, base), expert_weighting="base")
    return directory


def tune(args, base: int, method: str, rate: float, fit: Callable[..., Path] = fit) -> None:
    """avg@K on the development problems, for fine-tuning seed 0."""
    from trl_offpolicy import MathVerifier, evaluate

    model, dev = fit(args, base, method, rate, TUNING_SEED), splits(args, base)["dev"]
    with MathVerifier(num_workers=1) as verifier:
        result = evaluate(
            str(model),
            {"dev": dev},
            num_generations=K,
            max_completion_length=MAX_LENGTH,
            verifier=verifier,
            seed=args.data_seed,
        )
    write(result_of(partial(tune, args, base, method, rate)), {f"avg@{K}": result["dev"][f"avg@{K}"]})


def test(args, base: int, method: str, rate: float | None, seed: int) -> None:
    """Measures what a method makes of a base, or the base itself."""
    model = policy(args, base) if method == "base" else str(fit(args, base, method, rate, seed))
    measure(args, base, method, rate, seed, model)


def measure(args, base: int, method: str, rate: float | None, seed: int, model: str) -> None:
    """avg@K, pass@K and greedy on the test problems and on the second family."""
    from trl_offpolicy import MathVerifier, evaluate

    rows, baseline = splits(args, base), run_dir(args, base, "base", None, seed)
    with MathVerifier(num_workers=1) as verifier:
        evaluate(
            model, {name: rows[name] for name in ("target", "other")}, num_generations=K, max_completion_length=MAX_LENGTH, verifier=verifier, greedy=True,
            seed=args.data_seed + seed, output_dir=str(run_dir(args, base, method, rate, seed)), baseline=None if method == "base" else str(baseline),
        )  # fmt: skip


# ---- the study ----


@contextmanager
def workers(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that run jobs; they end at once when the parent is interrupted."""
    os.environ["TQDM_DISABLE"] = "1"  # in the workers; here tqdm has read its environment already
    ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the parent's
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("forkserver"), initializer=ignore)
    try:
        yield pool
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def finish(pool: ProcessPoolExecutor, jobs: list[partial], bar: tqdm) -> None:
    """Runs the jobs whose results are missing."""
    due = [job for job in jobs if not result_of(job).exists()]
    bar.update(len(jobs) - len(due))
    for future in as_completed(futures := {pool.submit(run, job): job for job in due}):
        try:
            future.result()
        except Exception as error:
            raise RuntimeError(f"The job {describe(futures[future])!r} failed; see jobs.log.") from error
        bar.update()
        bar.set_postfix_str(describe(futures[future]))


def tuning_jobs(args) -> list[partial]:
    return [partial(tune, args, b, m, rate) for b in args.bases for m in args.methods for rate in args.learning_rates]


def chosen_rates(args) -> dict[str, dict[int, float]]:
    """Method → base → the learning rate that is best on the base's development problems; the smaller one of equals."""
    accuracy = {job.args[1:]: read(result_of(job))[f"avg@{K}"] for job in tuning_jobs(args)}
    return {
        m: {b: max(sorted(args.learning_rates), key=lambda rate: accuracy[b, m, rate]) for b in args.bases}
        for m in args.methods
    }


def study(args) -> dict:
    """All jobs in three rounds: bases, learning rates, tests. Returns what `results.json` holds."""
    total = len(args.bases) * (1 + len(args.seeds) + len(args.methods) * (len(args.learning_rates) + len(args.seeds)))
    with workers(args.processes) as pool, tqdm(total=total, desc="study", unit="job", smoothing=0.05) as bar:
        finish(pool, [partial(prepare, args, base) for base in args.bases], bar)
        bar.write(conditions_table(all_conditions(args)))
        of_bases = [partial(test, args, b, "base", None, s) for b in args.bases for s in args.seeds]
        finish(pool, of_bases + tuning_jobs(args), bar)
        rates = chosen_rates(args)
        for b in args.bases:
            for m in args.methods:
                for rate in set(args.learning_rates) - {rates[m][b]}:  # only its accuracy is needed
                    shutil.rmtree(run_dir(args, b, m, rate, TUNING_SEED), ignore_errors=True)
        tests = [
            partial(test, args, b, m, rates[m][b], s) for s in args.seeds for b in args.bases for m in args.methods
        ]
        finish(pool, tests, bar)
    return summarize(args, rates)


def over(args, directory_of: Callable[[int, int], Path], file: str, value: Callable[[dict], float]) -> dict:
    """The mean of a number in a file that each base and seed has, with the interval of seeds and bases."""
    import numpy as np

    found = [[value(read(directory_of(base, seed) / file)) for seed in args.seeds] for base in args.bases]
    return estimate([np.array([of_seeds], float) for of_seeds in found])


def compare(args, known: dict, method: str, metric: str, minus: str | None = None) -> dict:
    """
    A metric of a method, or its paired difference to another, from the `shares` of each (method, base, seed). A problem
    that is missing for one seed, since it could not be judged, is left out for all.
    """
    import pandas as pd

    bases = []
    for b in args.bases:
        seeds = {s: known[method, b, s][metric] - (known[minus, b, s][metric] if minus else 0) for s in args.seeds}
        bases.append(pd.DataFrame(seeds).dropna().to_numpy())
    return estimate(bases)


def summarize(args, rates: dict) -> dict:
    """Every metric of every method, and its paired differences to SFT on the demonstrations and to the base policy."""
    rates = {"base": dict.fromkeys(args.bases), **rates}
    known = {
        (m, b, s): shares(run_dir(args, b, m, rates[m][b], s) / "samples.parquet", METRICS)
        for m in rates
        for b in args.bases
        for s in args.seeds
    }

    def every(method: str, metric: str) -> dict:
        others = [None, *(reference for reference in ("sft", "base") if reference in rates and reference != method)]
        return {f"minus_{o}" if o else "value": compare(args, known, method, metric, o) for o in others}

    settings = {name: getattr(args, name) for name in (*SIZES, "bases", "seeds", "learning_rates")}
    fine_tuned = [(m, b, run_dir(args, b, m, rates[m][b], args.seeds[0])) for m in args.methods for b in args.bases]
    return {
        "settings": {**settings, "num_generations": K, "max_completion_length": MAX_LENGTH},
        "conditions": all_conditions(args),
        "learning_rate": {m: rates[m] for m in args.methods},
        "dev_accuracy": {f"base-{j.args[1]}/{result_of(j).stem}": read(result_of(j)) for j in tuning_jobs(args)},
        "rows": {f"base-{b}/{m}": read(directory / "rows.json")["rows"] for m, b, directory in fine_tuned},
        "accuracy": {m: {metric: every(m, metric) for metric in METRICS} for m in rates},
    }


def all_conditions(args) -> dict[int, dict]:
    return {base: read(base_dir(args, base) / "conditions.json") for base in args.bases}


def show(args, results: dict) -> str:
    """Writes the tables as Markdown and the picture; returns the Markdown."""
    text = (
        f"## The bases, before any method\n\n{conditions_table(results['conditions'])}\n"
        f"## The methods\n\n{accuracy_table(results, LABELS, {'sft': 'SFT', 'base': 'base'})}\n"
        "± is half of a 95 % interval that takes in problems, fine-tuning seeds and bases; differences are paired by problem.\n"
    )
    (args.output_dir / "results.md").write_text(text)
    draw(results, LABELS, args.output_dir / "results.png")
    return text


# ---- the command ----


def check_settings(args) -> None:
    """Refuses an output directory whose jobs were run at other sizes."""
    settings, file = {name: getattr(args, name) for name in SIZES}, args.output_dir / "settings.json"
    if file.exists() and (found := read(file)) != settings:
        differing = "; ".join(f"--{n} was {found[n]} and is {settings[n]}" for n in SIZES if found[n] != settings[n])
        raise ValueError(
            f"{args.output_dir} holds a study with other settings: {differing}. Pass another --output_dir."
        )
    write(file, settings)


def dry_run(args) -> None:
    bases = [partial(prepare, args, base) for base in args.bases]
    for name, jobs in (("bases", bases), ("learning rates", tuning_jobs(args))):
        print(f"{name}: {sum(result_of(job).exists() for job in jobs)} of {len(jobs)} jobs are done")
    print(f"tests: {len(args.bases) * len(args.methods) * len(args.seeds)} jobs, once the learning rates are chosen")
    for base in args.bases:
        if not Path(policy(args, base)).exists():
            print(f"base {base} has to be pre-trained first, or put into {policy(args, base)}")


def parser(description: str) -> argparse.ArgumentParser:
    """Its options are those of every study on these bases."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/miniature"))
    parser.add_argument("--bases", type=int, nargs="+", default=[0, 1, 2], help="pre-training seeds of the bases")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="fine-tuning seeds on each base")
    parser.add_argument("--num_train", type=int, default=400, help="demonstrations of each base")
    parser.add_argument("--num_dev", type=int, default=100, help="problems that learning rates are chosen on")
    parser.add_argument("--num_test", type=int, default=300, help="test problems of each base")
    parser.add_argument("--num_other", type=int, default=150, help="problems of the second family")
    parser.add_argument("--data_seed", type=int, default=100, help="base N has the problems of seed data_seed + N")
    parser.add_argument("--base_steps", type=int, default=7500, help="pre-training steps of a base that is missing")
    parser.add_argument("--processes", type=int, default=1, help="jobs at a time, one thread each")
    parser.add_argument("--dry_run", action="store_true", help="say what there is to do, and do nothing")
    return parser


def parsed(parser: argparse.ArgumentParser, argv: list[str] | None):
    args = parser.parse_args(argv)
    for name, values in vars(args).items():
        if isinstance(values, list) and len(set(values)) < len(values):
            parser.error(f"--{name} names one twice: {values}")
    if len(args.bases) > len(STUDENT_T) + 1:
        parser.error(f"at most {len(STUDENT_T) + 1} bases")
    return args


def parse(argv: list[str] | None):
    mine = parser(__doc__)
    mine.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))  # fmt: skip
    mine.add_argument("--learning_rates", type=float, nargs="+", default=[3e-5, 1e-4, 3e-4], help="the grid")
    return parsed(mine, argv)


def outcome(study: Callable, args) -> tuple[dict | None, int]:
    """What a study found, and the exit code of its command: 2 for settings that do not fit, 3 after ctrl-C or SIGTERM."""
    from trl_offpolicy.runs.interrupts import terminable

    args.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        check_settings(args)
        with terminable():  # so that its workers end with it
            return study(args), 0
    except ValueError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return None, 2
    except KeyboardInterrupt:
        print("\nstopped; every finished job is kept. Run the same command again to go on.", file=sys.stderr)
        return None, 3


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    print(args.output_dir, flush=True)
    if args.dry_run:
        dry_run(args)
        return 0
    results, code = outcome(study, args)
    if results is None:
        return code
    write(args.output_dir / "results.json", results)
    print(show(args, results))
    first = base_dir(args, args.bases[0])
    print(
        f"{args.output_dir}/results.json, .md and .png hold the same numbers.\n"
        f"trl-offpolicy report {first}/seed-{args.seeds[0]} {first}/rewrite {first}/gap --output_dir {args.output_dir}/report"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
