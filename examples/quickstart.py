"""The main job from end to end on a laptop CPU: rewrite demonstrations, train on them, see what it changes.

    python examples/quickstart.py                    # about five minutes on two quiet cores; writes runs/quickstart

A 0.9 M-parameter policy that is shipped beside this file (`train_quickstart_policy.py` made it) meets demonstrations in a
style that is not its own. `DataRewriter` makes an on-policy dataset of them; SFT and DFT are run on the raw and on the
rewritten data; what comes out is printed as the tables of "Mind the Gap" (arXiv 2509.15157) in miniature. The learning
rate of every method is the better of a small grid on a development split, and nothing else is tuned.
"""

import argparse
import contextlib
import io
import json
import logging
import random
import shutil
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from quickstart_task import GUIDED_PROMPT, demonstrations, problems, second_family
from tqdm.auto import tqdm


POLICY = str(Path(__file__).parent / "quickstart_policy")
METHODS = {
    "sft": ("raw", "nll"),
    "dft": ("raw", "dft"),
    "dr_sft": ("rewritten", "nll"),
    "dr_dft": ("rewritten", "dft"),
}
NAMES = {"base": "Base", "sft": "SFT", "dft": "DFT", "dr_sft": "DR+SFT", "dr_dft": "DR+DFT"}
# Chosen on the base policy alone, before any method was run: self-alignment solves some 60 % with K = 4, guided alignment
# recovers far more of the rest than as many further unguided samples do, and seven operations are beyond the policy.
NUM_OPS, P_HARD = (4, 5, 5, 6, 6, 7), 1.0
K = 4  # attempts a problem and stage in rewriting
K_EVAL = 2  # samples a problem in evaluation, for each fine-tuning seed


def data(seed: int, num_train: int = 400, num_dev: int = 100, num_test: int = 300, num_other: int = 150) -> dict:
    """Disjoint training, development and test problems, and the second family."""
    rows = problems(num_train + num_dev + num_test, seed, NUM_OPS, p_hard=P_HARD)
    rng = random.Random(seed)
    other = [second_family(rng) for _ in range(num_other)]
    return {
        "train": demonstrations(rows[:num_train]),
        "dev": demonstrations(rows[num_train : num_train + num_dev]),
        "target": demonstrations(rows[num_train + num_dev :]),
        "other": [{"prompt": [{"role": "user", "content": row["problem"]}], "answer": row["answer"]} for row in other],
    }


def train(
    rows, objective: str, learning_rate: float, seed: int, output_dir: Path, policy: str = POLICY, **options
) -> None:
    """Fine-tunes a fresh copy of the policy and saves it in `output_dir`, `trainer_state.json` last."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_offpolicy import ImportanceWeightedSFTConfig, ImportanceWeightedSFTTrainer

    args = ImportanceWeightedSFTConfig(
        str(output_dir), objective=objective, learning_rate=learning_rate, num_train_epochs=1, per_device_train_batch_size=16,
        lr_scheduler_type="cosine", warmup_steps=0.1, seed=seed, save_strategy="no", logging_steps=5, use_cpu=True, bf16=False,
        disable_tqdm=True, report_to="none", **options,
    )  # fmt: skip
    output_dir.mkdir(parents=True, exist_ok=True)
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    with open(output_dir / "training.log", "w") as log, contextlib.redirect_stdout(log):
        trainer = ImportanceWeightedSFTTrainer(
            AutoModelForCausalLM.from_pretrained(policy),
            args,
            train_dataset=dataset,
            processing_class=AutoTokenizer.from_pretrained(policy),
        )
        trainer.train()
        trainer.save_model(str(output_dir))
        trainer.save_state()


def run(job: dict) -> dict:
    """One job of a worker process: train where there is something to train, then avg@K_EVAL with standard errors on some splits."""
    quiet()
    from datasets import load_dataset

    from trl_offpolicy import MathVerifier, evaluate

    splits = data(job["seed"])
    if "objective" in job:
        rows = splits["train"] if job["data"] == "raw" else load_dataset(job["rewritten"], split="train")
        train(rows, job["objective"], job["learning_rate"], job["fine_tuning_seed"], Path(job["model"]))
    with (
        MathVerifier(num_workers=1) as verifier,
        contextlib.redirect_stderr(io.StringIO()),
    ):  # the parent has the progress bar
        result = evaluate(
            job["model"], {name: splits[name] for name in job["splits"]}, num_generations=K_EVAL, max_completion_length=192, verifier=verifier,
            seed=job.get("fine_tuning_seed", job["seed"]),
        )  # fmt: skip
    return {name: {"mean": r[f"avg@{K_EVAL}"], "se": r[f"avg@{K_EVAL}_se"]} for name, r in result.items()}


def compare(rewritten: Path, args, output_dir: Path) -> dict:
    """For each method: the learning rate that is best on the development split, then test accuracy over the seeds."""
    tasks = {}
    for method, (which, objective) in METHODS.items():
        for rate in args.learning_rates:
            for seed in range(args.seed, args.seed + args.seeds):
                tasks[method, rate, seed] = {
                    "data": which, "objective": objective, "learning_rate": rate, "fine_tuning_seed": seed, "seed": args.seed,
                    "rewritten": str(rewritten), "model": str(output_dir / f"{method}-{rate:g}-{seed}"),
                }  # fmt: skip
    test = ["target", "other"]
    total = 1 + len(METHODS) * (len(args.learning_rates) + args.seeds)
    with (
        ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool,
        tqdm(total=total, desc="train and evaluate", unit="run") as bar,
    ):

        def start(job):
            future = pool.submit(run, job)
            future.add_done_callback(lambda _: bar.update())
            return future

        base = start({"model": POLICY, "seed": args.seed, "splits": test})
        dev = {key: start({**task, "splits": ["dev"]}) for key, task in tasks.items() if key[2] == args.seed}
        outcome = {"base": {"runs": [base.result()], "learning_rate": None}}
        chosen = {}
        for method in METHODS:
            accuracy = {rate: dev[method, rate, args.seed].result()["dev"]["mean"] for rate in args.learning_rates}
            rate = max(accuracy, key=accuracy.get)
            keys = [(method, rate, seed) for seed in range(args.seed, args.seed + args.seeds)]
            # The first seed's model is there already; the others are trained first.
            done = {"model": tasks[keys[0]]["model"], "seed": args.seed, "fine_tuning_seed": args.seed, "splits": test}
            chosen[method] = (
                rate,
                accuracy,
                [start(done), *(start({**tasks[key], "splits": test}) for key in keys[1:])],
            )
        for method, (rate, accuracy, runs) in chosen.items():
            dev_accuracy = {f"{r:g}": round(a, 4) for r, a in accuracy.items()}
            outcome[method] = {"runs": [r.result() for r in runs], "learning_rate": rate, "dev": dev_accuracy}
    return outcome


def quiet() -> None:
    """Our own progress bars are enough; the numbers of each training are in its training.log."""
    import datasets
    import torch
    import transformers

    torch.set_num_threads(1)  # two threads on a busy two-core machine wait for each other
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)


def summarize(outcome: dict, key: str) -> tuple[float, float]:
    """Mean over seeds, and half of a 95 % interval: the problems' sampling error and the seeds' spread, added in quadrature."""
    runs = [run[key] for run in outcome["runs"]]
    mean = sum(r["mean"] for r in runs) / len(runs)
    between = sum((r["mean"] - mean) ** 2 for r in runs) / max(1, len(runs) - 1) / len(runs)
    return mean, 1.96 * (sum(r["se"] ** 2 for r in runs) / len(runs) + between) ** 0.5


def print_tables(results: dict) -> None:
    counts = results["yield"]
    print("\nYield by source (Table 1)")
    for source in ("self", "guided", "expert"):
        print(f"  {source:8s}{counts[source]:5d}  {counts[source] / counts['total']:6.1%}")
    sampling = results["sampling"]
    print(f"  {sampling['sampled']} attempts drawn; a fixed K would have drawn {sampling['fixed_k_equivalent']}")
    print("\nMean log-probability of the targets under the base (Table 3): per sequence, and per token")
    for source, gap in results["policy_gap"].items():
        before, after = results["policy_gap_per_token"][source].values()
        print(f"  {source:8s}{gap['before']:8.2f} -> {gap['after']:7.2f}      {before:7.3f} -> {after:7.3f}")
    print(
        f"\nAccuracy, avg@{K_EVAL} at T = 1, with 95 % intervals (Table 2): fine-tuned family, family never fine-tuned on"
    )
    for method, name in NAMES.items():
        accuracy, half = results["accuracy"][method], results["accuracy_ci95"][method]
        rate = results["learning_rate"][method]
        print(
            f"  {name:8s}{accuracy['target']:7.1%} ± {half['target']:5.1%}    {accuracy['other']:7.1%} ± {half['other']:5.1%}"
            + (f"    learning rate {rate:g}" if rate else "")
        )


def draw(results: dict, path: Path) -> None:
    """The three tables as one picture; colours of Okabe and Ito, readable without colour by position and label."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    blue, orange, grey = "#0072B2", "#E69F00", "#999999"
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13, 4), width_ratios=(1, 1.2, 1.8), layout="constrained"
    )
    sources = ["self", "guided", "expert"]
    total = results["yield"]["total"]
    bars = left.bar(sources, [results["yield"][s] / total for s in sources], color=[blue, orange, grey])
    left.bar_label(bars, [f"{results['yield'][s]}" for s in sources])
    left.set(title=f"Source of the {total} rows", ylabel="share of rows")
    present = [s for s in sources if s in results["policy_gap_per_token"]]
    for offset, moment, colour in ((-0.2, "before", grey), (0.2, "after", blue)):
        heights = [results["policy_gap_per_token"][s][moment] for s in present]
        bars = middle.bar(
            [i + offset for i in range(len(present))], heights, 0.38, color=colour, label=f"{moment} rewriting"
        )
        middle.bar_label(bars, [f"{h:.2f}" for h in heights], fontsize=8)
    middle.set_xticks(range(len(present)), present)
    middle.margins(y=0.15)
    middle.legend(frameon=False, loc="lower left")
    middle.set(title="Policy gap: target log-prob under the base", ylabel="nats per token (higher: more on-policy)")
    for offset, key, colour, label in (
        (-0.2, "target", blue, "fine-tuned family"),
        (0.2, "other", orange, "other family (forgetting)"),
    ):
        heights = [results["accuracy"][m][key] for m in NAMES]
        errors = [results["accuracy_ci95"][m][key] for m in NAMES]
        places = [i + offset for i in range(len(NAMES))]
        right.bar(
            places, heights, 0.38, yerr=errors, capsize=3, color=colour, label=label, error_kw={"ecolor": "#333333"}
        )
        for x, h, e in zip(places, heights, errors, strict=True):
            right.text(x, h + e + 0.01, f"{h:.0%}", ha="center", fontsize=8)
    right.set_xticks(range(len(NAMES)), NAMES.values())
    right.set(title=f"Accuracy, avg@{K_EVAL} at T = 1 (bars: 95 % intervals)", ylabel="share correct", ylim=(0, 1.15))
    right.legend(frameon=False, ncols=2, loc="upper center")
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


NEXT = """\
Next, with a GPU:
  trl-offpolicy rewrite --model_name_or_path Qwen/Qwen2.5-Math-1.5B --dataset_name openai/gsm8k --dataset_config main \\
      --output_dir runs/gsm8k --num_generations 8 --dtype bfloat16
  accelerate launch -m trl_offpolicy.cli sft --model_name_or_path Qwen/Qwen2.5-Math-1.5B --dataset_name runs/gsm8k/dataset \\
      --objective dft --learning_rate 5e-6 --max_length 4096 --output_dir runs/gsm8k-dft"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument(
        "--learning_rates",
        type=float,
        nargs="+",
        default=[1e-4, 3e-4, 1e-3],
        help="grid, chosen from on the dev split",
    )
    parser.add_argument("--seeds", type=int, default=3, help="fine-tuning seeds at the chosen learning rate")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--control", action="store_true", help="also draw 2K further unguided attempts where self-alignment failed"
    )
    parser.add_argument(
        "--processes", type=int, default=2, help="trainings and evaluations at a time, one thread each"
    )
    args = parser.parse_args()
    quiet()
    from trl_offpolicy import DataRewriter, RewriteConfig, measure_policy_gap

    output_dir = args.output_dir
    print(output_dir, flush=True)
    work = output_dir / "training"
    shutil.rmtree(work, ignore_errors=True)
    config = RewriteConfig(
        str(output_dir / "rewrite"),
        num_generations=K,
        max_completion_length=192,
        guided_prompt=GUIDED_PROMPT,
        seed=args.seed,
    )
    rewriter = DataRewriter(POLICY, config)
    rewritten = rewriter.rewrite(data(args.seed)["train"])
    gap = measure_policy_gap(POLICY, rewritten)
    outcome = compare(output_dir / "rewrite" / "dataset", args, work)
    if args.control:
        # The first K attempts are the same as above (an attempt's seed does not depend on K), so this only adds 2K to each failure.
        control = RewriteConfig(
            str(output_dir / "control"),
            num_generations=3 * K,
            max_completion_length=192,
            stages=["self"],
            seed=args.seed,
        )
        control_rewriter = DataRewriter(POLICY, control)
        control_rewriter.rewrite(data(args.seed)["train"])
        solved = rewriter.metrics["yield"]["self"]
        print(
            f"\nOf the {rewriter.metrics['yield']['total'] - solved} problems that self-alignment left, guided alignment recovers "
            f"{rewriter.metrics['yield']['guided']} with {K} attempts, and {2 * K} further unguided attempts "
            f"{control_rewriter.metrics['yield']['self'] - solved}."
        )
    summary = {method: {key: summarize(o, key) for key in ("target", "other")} for method, o in outcome.items()}
    results = {
        "yield": rewriter.metrics["yield"],
        "accuracy": {m: {key: round(s[key][0], 4) for key in s} for m, s in summary.items()},
        "accuracy_ci95": {m: {key: round(s[key][1], 4) for key in s} for m, s in summary.items()},
        "policy_gap": {
            s: {m: round(g[m]["sequence_log_prob"], 4) for m in ("before", "after")} for s, g in gap.items()
        },
        "policy_gap_per_token": {
            s: {m: round(g[m]["token_log_prob"], 4) for m in ("before", "after")} for s, g in gap.items()
        },
        "sampling": {key: rewriter.metrics["sampling"][key] for key in ("sampled", "fixed_k_equivalent")},
        "learning_rate": {method: o["learning_rate"] for method, o in outcome.items()},
        "dev_accuracy": {method: o["dev"] for method, o in outcome.items() if "dev" in o},
        "seeds": args.seeds,
    }
    (output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, output_dir / "results.png")
    print_tables(results)
    print(f"\n{output_dir / 'results.json'} and {output_dir / 'results.png'} hold the same numbers.\n\n{NEXT}")


if __name__ == "__main__":
    main()
