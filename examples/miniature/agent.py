"""Does a trained rewriting agent beat its prompt? The quickstart's policy learns to rewrite, rewrites, and is fine-tuned on what came out.

    python examples/miniature/agent.py               # some 30 minutes of one core; writes runs/miniature_agent, and resumes there

Three times over (GRPO seed and fresh prompts, sampling seed, fine-tuning seed): the agent's reward on held-out problems before and after
GRPO; all 400 demonstrations of the quickstart rewritten with its guided prompt alone and by the agent, the same K attempts each; SFT
on the demonstrations and on both rewrites, at two learning rates. All settings were fixed before any result was seen; the
reasoning judge is off, since a model of 0.9 M parameters cannot judge. An interval adds the problems' sampling error and the
seeds' spread.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np


sys.path.insert(0, str(Path(__file__).parents[1]))

from quickstart import K_EVAL, NUM_OPS, P_HARD, POLICY, K, data, quiet, run, summarize  # noqa: E402
from quickstart_task import GUIDED_PROMPT, demonstrations, problems  # noqa: E402


DATA_SEED = 42  # the quickstart's problems
HELD_OUT = 48  # problems on which the reward is measured, with GROUP candidates each
GROUP = 8
PROMPTS = 8  # of a GRPO step
LEARNING_RATES = (3e-4, 3e-3)  # the second so high that something can be forgotten
REWRITERS = ("prompt", "agent")
TERMS = ("total", "gate", "dist", "div", "nll")


def once(path: Path, make: Callable[[], dict]) -> dict:
    """`make()`, or what it returned when it was called for `path` before."""
    if not path.exists():
        result = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".partial").write_text(json.dumps(result) + "\n")
        path.with_suffix(".partial").rename(path)
        print(f"done: {path}", flush=True)
    return json.loads(path.read_text())


def fresh_problems(num_rows: int, seed: int) -> list[dict]:
    """Demonstrations of problems that neither the quickstart's splits nor another seed here have."""
    splits = data(DATA_SEED)
    used = {row["prompt"][0]["content"] for name in ("train", "dev", "target") for row in splits[name]}
    rows = [row for row in problems(num_rows + 50, 1000 + seed, NUM_OPS, p_hard=P_HARD) if row["problem"] not in used]
    return demonstrations(rows[:num_rows])


def train_agent(seed: int, steps: int, directory: Path) -> dict:
    """GRPO from the base; the terms of every held-out problem before and after, means over its candidates (NLL: feasible ones)."""
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import GRPOConfig

    from trl_offpolicy import MathVerifier
    from trl_offpolicy.agent.rewriting_agent_trainer import GroupReward, RewritingAgentTrainer, agent_dataset

    seen: list[dict] = []

    class Kept(GroupReward):
        def __call__(self, prompts, log_extra=None, **columns):
            terms: dict = {"prompt": [json.dumps(prompt) for prompt in prompts]}
            rewards = super().__call__(prompts, log_extra=terms.__setitem__, **columns)
            seen.append(terms | {"total": rewards})
            return rewards

    with MathVerifier(num_workers=1) as verifier:
        rows = fresh_problems(HELD_OUT + PROMPTS * steps, seed)
        held_out, train = (
            agent_dataset(part, verifier, guided_template=GUIDED_PROMPT) for part in (rows[:HELD_OUT], rows[HELD_OUT:])
        )
        args = GRPOConfig(
            str(directory), seed=seed, max_steps=steps, per_device_train_batch_size=32, per_device_eval_batch_size=32, num_generations=GROUP,
            gradient_accumulation_steps=PROMPTS * GROUP // 32, max_completion_length=192, learning_rate=1e-3, beta=0.001, logging_steps=1, save_strategy="no",
            use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, report_to="none",
        )  # fmt: skip
        trainer = RewritingAgentTrainer(
            POLICY, Kept(verifier), args, train, held_out, processing_class=AutoTokenizer.from_pretrained(POLICY),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"), guided_template=GUIDED_PROMPT,
        )  # fmt: skip
        result = {}
        for moment, make in (("before", lambda: None), ("after", trainer.train)):
            make()
            seen.clear()
            trainer.evaluate()
            result[moment] = by_problem(seen)
    trainer.save_model(str(directory))
    result["log"] = trainer.state.log_history
    return result


def by_problem(batches: list[dict]) -> dict[str, list[float]]:
    """Each term's mean over the candidates of a problem, problems in a fixed order; `nan` where nothing is feasible."""
    whole = {name: [value for batch in batches for value in batch[name]] for name in batches[0]}
    prompts, means = np.array(whole["prompt"]), {}
    feasible = np.array(whole["gate"]) == 1
    for name in TERMS:
        counted = feasible if name in ("dist", "div", "nll") else np.ones(len(prompts), bool)
        values = np.array([np.nan if value is None else value for value in whole[name]], float)
        groups = [values[(prompts == prompt) & counted] for prompt in sorted(set(prompts))]
        means[name] = [float(group.mean()) if len(group) else float("nan") for group in groups]
    return means


def rewrite(rewriter: str, seed: int, agent: Path, directory: Path) -> dict:
    """All training problems, K attempts each: share accepted, and the log-probs of the targets under the base, problem by problem."""
    import pyarrow.parquet as pq

    from trl_offpolicy import DataRewriter, MathVerifier, RewriteConfig, TransformersSampler, measure_policy_gap

    sampler = TransformersSampler(POLICY)
    args = RewriteConfig(
        str(directory), num_generations=K, stages=["guided"], selection="random", max_completion_length=192, guided_prompt=GUIDED_PROMPT, seed=seed,
    )  # fmt: skip
    guided = sampler.with_adapter(str(agent)) if rewriter == "agent" else None
    with MathVerifier(num_workers=1) as verifier:
        rows = DataRewriter(POLICY, args, sampler, verifier, guided_sampler=guided).rewrite(data(DATA_SEED)["train"])
    measure_policy_gap(POLICY, rows, output_dir=str(directory))
    gap = pq.read_table(directory / "policy_gap.parquet").to_pydict()
    return {
        "acceptance": [row["num_correct"] / K for row in rows],
        "rewritten": [float(row["source"] == "guided") for row in rows],
        "token_log_prob": [p / n for p, n in zip(gap["after_log_prob"], gap["after_tokens"], strict=True)],
        "num_tokens": gap["after_tokens"],
    }


def fine_tune(which: str, rate: float, seed: int, rows: Path | None, directory: Path) -> dict:
    job = {
        "seed": DATA_SEED,
        "fine_tuning_seed": DATA_SEED + seed,
        "model": str(directory),
        "splits": ["target", "other"],
    }
    if which == "base":
        return run(job | {"model": POLICY})
    job |= {
        "data": "raw" if rows is None else which,
        "rewritten": str(rows),
        "objective": "nll",
        "learning_rate": rate,
    }
    return run(job)


def estimate(values_of_seeds: list[list[float]]) -> list[float]:
    """Mean and half of a 95 % interval; of each seed one value a problem, `nan` where it has none."""
    runs = []
    for values in values_of_seeds:
        known = np.array(values)[~np.isnan(values)]
        runs.append({"x": {"mean": known.mean(), "se": known.std(ddof=1) / len(known) ** 0.5}})
    return [round(float(x), 4) for x in summarize({"runs": runs}, "x")]


def comparison(before: list[list[float]], after: list[list[float]]) -> dict[str, list[float]]:
    """Both, and the mean of the problems' own differences."""
    difference = [(np.array(b) - np.array(a)).tolist() for a, b in zip(before, after, strict=True)]
    return {"from": estimate(before), "to": estimate(after), "difference": estimate(difference)}


def summary(agents: list[dict], rewrites: dict, tunings: dict) -> dict:
    prompt, agent = ([rewrites[name, seed] for seed in range(len(agents))] for name in REWRITERS)
    both = [np.array(a["rewritten"]) * np.array(b["rewritten"]) for a, b in zip(prompt, agent, strict=True)]

    def gap(runs):  # where both have a rewrite: a demonstration that was kept says nothing of the rewriter
        return [np.where(m == 1, r["token_log_prob"], np.nan).tolist() for m, r in zip(both, runs, strict=True)]

    return {
        "reward": {name: comparison([a["before"][name] for a in agents], [a["after"][name] for a in agents]) for name in TERMS},
        "rewriting": {
            **{name: comparison(*([r[name] for r in runs] for runs in (prompt, agent))) for name in ("acceptance", "rewritten", "token_log_prob")},
            "token_log_prob_where_both_rewrote": comparison(gap(prompt), gap(agent)),
        },
        "accuracy": {name: {key: [round(x, 4) for x in summarize({"runs": runs}, key)] for key in ("target", "other")} for name, runs in tunings.items()},
    }  # fmt: skip


def print_tables(results: dict) -> None:
    def row(name, cells, percent=False):
        scale, unit = (100, " %") if percent else (1, "")
        shown = [
            f"{scale * mean:8.{1 if percent else 4}f} ± {scale * half:.{1 if percent else 4}f}{unit}"
            for mean, half in cells
        ]
        print(f"  {name:36s}" + "   ".join(shown))

    print("\nReward on held-out problems: before GRPO, after, difference")
    for name, cells in results["reward"].items():
        row(name, cells.values())
    print("\nRewriting all demonstrations, guided stage only: prompt, agent, difference")
    for name, cells in results["rewriting"].items():
        row(name, cells.values(), name in ("acceptance", "rewritten"))
    print(f"\nSFT, avg@{K_EVAL} at T = 1: fine-tuned family, family never fine-tuned on (forgetting)")
    for name, cells in results["accuracy"].items():
        row(name, cells.values(), True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/miniature_agent"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="of GRPO")
    args = parser.parse_args()
    print(args.output_dir, flush=True)
    quiet()
    out, agents, rewrites, tunings = args.output_dir, [], {}, {}
    for seed in range(args.seeds):
        agent = out / f"agent-{seed}"
        agents.append(once(out / f"agent-{seed}.json", lambda s=seed, a=agent: train_agent(s, args.steps, a)))
        for name in REWRITERS:
            directory = out / f"{name}-{seed}-rewrite"
            rewrites[name, seed] = once(
                out / f"{name}-{seed}-rewrite.json", lambda n=name, s=seed, a=agent, d=directory: rewrite(n, s, a, d)
            )
        for rate in LEARNING_RATES:
            for which in ("base", "demonstrations", *REWRITERS):
                rows = out / f"{which}-{seed}-rewrite" / "dataset" if which in REWRITERS else None
                name = which if which == "base" else f"{which}, learning rate {rate:g}"
                file = out / f"sft-{name.replace(', learning rate ', '-')}-{seed}.json"
                result = once(
                    file, lambda w=which, r=rate, s=seed, f=file, p=rows: fine_tune(w, r, s, p, f.with_suffix(""))
                )
                if which != "base" or rate == LEARNING_RATES[0]:
                    tunings.setdefault(name, []).append(result)
    results = summary(agents, rewrites, tunings) | {"seeds": args.seeds, "steps": args.steps}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print_tables(results)


if __name__ == "__main__":
    main()
