"""Tokens sampled for each kept row: first correct in order, against the usual script's K = 10 for every problem it tries.

    python benchmarks/sampling_cost.py [--rows 400] [--skip_policy]

Both sides are `DataRewriter` (`selection="first"` and `"random"`), so an attempt has the same seed on both and the yields are equal
by construction; the script draws K at the first stage, and K more for what that leaves over. Kept rows are those of the model's
own (self, guided). Every token that an engine drew is counted: of speculative attempts, and of aborted ones as far as it got.

1. The quickstart's policy on the quickstart's problems.
2. Simulated yields of "Mind the Gap" (arXiv 2509.15157, Table 1: 59.9/24.2/15.9 and 56.1/34.0/9.8 % self/guided/expert). How solve
   rates are spread over problems is not published, and the saving depends on it: problems that are easy or hopeless save more than
   those that all take some attempts. So it is shown for Beta-distributed rates of several spreads, each fitted to the yields;
   `pass@1` is the first stage's. The last column is the expectation, in attempts, from the formula.
"""

import argparse
import math
import random
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

from scripted import ScriptedSampler, rows, verify  # noqa: E402

from trl_offpolicy import DataRewriter, RewriteConfig, TransformersSampler  # noqa: E402
from trl_offpolicy.sampling.sampler import Completion  # noqa: E402


K = 10
YIELDS = {"59.9/24.2/15.9": (0.599, 0.242, 0.159), "56.1/34.0/9.8": (0.561, 0.340, 0.098)}


def compare(data, sampler, verifier=None, **config) -> dict:
    """Metrics of both sides, and their tokens for each kept row."""
    result = {}
    with tempfile.TemporaryDirectory() as directory:
        for side, selection in (("first", "first"), ("fixed K", "random")):
            args = RewriteConfig(f"{directory}/{selection}", num_generations=K, selection=selection, **config)
            rewriter = DataRewriter(None, args, sampler=sampler, verifier=verifier)
            rewriter.rewrite(data)
            metrics = rewriter.metrics
            in_vain = metrics["speculation"]["unused_tokens"] + metrics["speculation"]["aborted_tokens"]
            tokens = metrics["sampling"]["tokens"] + in_vain
            kept = metrics["yield"]["self"] + metrics["yield"]["guided"]
            result[side] = {**metrics, "tokens_per_row": tokens / kept}
    assert result["first"]["yield"] == result["fixed K"]["yield"]
    return result


def describe(result: dict) -> str:
    counts = result["first"]["yield"]
    yields = "/".join(f"{100 * counts[s] / counts['total']:.1f}" for s in ("self", "guided", "expert"))
    first, fixed = (result[side]["tokens_per_row"] for side in ("first", "fixed K"))
    stage = result["fixed K"]["stages"]["self"]
    return f"{yields:16s} pass@1 {stage['correct'] / stage['sampled']:4.0%} {first:9.1f} {fixed:9.1f} {fixed / first:8.2f} x"


def failing(mean: float, spread: float, k: int) -> float:
    """P(k attempts in a row are wrong) when rates are Beta-distributed: E[(1 - p)^k]."""
    a, b = mean * spread, (1 - mean) * spread
    return math.exp(math.lgamma(b + k) + math.lgamma(a + b) - math.lgamma(b) - math.lgamma(a + b + k))


def fit(solved: float, spread: float) -> float:
    """The mean rate at which K attempts solve that share of the problems."""
    low, high = 1e-6, 1 - 1e-6
    for _ in range(60):
        mean = (low + high) / 2
        low, high = (mean, high) if 1 - failing(mean, spread, K) < solved else (low, mean)
    return mean


class Spread(ScriptedSampler):
    """Each problem has a rate of its own in each stage."""

    def __init__(self, means: dict[bool, float], spread: float):
        super().__init__(capacity=64)
        self.means, self.spread = means, spread

    def completion(self, request):
        guided = "Teacher" in request.prompt[-1]["content"]
        mean = self.means[guided]
        rate = random.Random(request.id.rsplit("/", 1)[0]).betavariate(mean * self.spread, (1 - mean) * self.spread)
        rng = random.Random(request.seed)
        gold = request.prompt[-1]["content"].split("gold:")[1].split()[0] if rng.random() < rate else "x"
        length = rng.randint(20, 180)
        return Completion(request.id, f"\\boxed{{{gold}}}", [0] * length, [0.0] * length, "stop")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400, help="problems of the quickstart")
    parser.add_argument("--simulated_rows", type=int, default=4000)
    parser.add_argument("--skip_policy", action="store_true", help="only the simulation")
    args = parser.parse_args()
    print(f"{'':18s}{'self/guided/expert':30s}tokens per kept row\n{'':48s}first  fixed K    ratio")
    if not args.skip_policy:
        from quickstart import GUIDED_PROMPT, POLICY, data

        result = compare(
            data(42)["train"][: args.rows], TransformersSampler(POLICY), max_completion_length=192, guided_prompt=GUIDED_PROMPT
        )  # fmt: skip
        print(f"{'quickstart':18s}{describe(result)}")
    for name, (self_share, guided_share, expert_share) in YIELDS.items():
        left = guided_share + expert_share
        for spread in (0.25, 0.5, 1.0, 2.0):
            means = {False: fit(self_share, spread), True: fit(guided_share / left, spread)}
            drawn = [sum(failing(means[stage], spread, k) for k in range(K)) for stage in (False, True)]
            expected = K * (1 + left) / (drawn[0] + left * drawn[1])
            # A simulated solution is a box and nothing else: a stub, and a copy of the reference.
            result = compare(
                rows(args.simulated_rows), Spread(means, spread), verify, min_guided_length=0.0, max_guided_copy=1.0
            )
            print(f"{f'{name}':15s}  {describe(result)}   spread {spread:<4} expected {expected:.2f} x", flush=True)


if __name__ == "__main__":
    main()
