"""The whole rewriter (verification, journal and all) against the same engine handed the same requests at once.

    python benchmarks/rewrite_throughput.py [--engines vllm transformers] [--num_problems 1000] [--rounds 3]
    python benchmarks/rewrite_throughput.py --engines vllm --model M --dataset_name rows.jsonl --engine_kwargs '{"max_model_len": 1024}'

The rewriter runs once to learn which attempts it draws; then rounds are interleaved and their order alternates. Both sides draw
from the same seeds, which are the same tokens on a CPU; on a GPU, where an attempt's tokens depend on what is computed beside it,
most of them are not. The share of attempts that were drawn alike is printed. What is compared are the tokens per second of attempts that came back, and 1.00
would mean that rewriting costs what sampling costs. Printed for wall time and for the CPU time of this process and all it started
(the engine, where that has a process of its own, and the verifier), which other users of the machine disturb less. The raw side is `LLM.generate` for vLLM, and for transformers the same sampler without a rewriter.
Without a GPU, start it with VLLM_CPU_OMP_THREADS_BIND=nobind TORCHDYNAMO_DISABLE=1 OMP_NUM_THREADS=1. By default vLLM's engine has a process of its
own, and we work while it does; with VLLM_ENABLE_V1_MULTIPROCESSING=0 everything of ours comes on top.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from quickstart_task import GUIDED_PROMPT, demonstrations, problems  # noqa: E402

from trl_offpolicy import DataRewriter, RewriteConfig, TransformersSampler, VLLMSampler  # noqa: E402
from trl_offpolicy.data.loading import load_rows  # noqa: E402


class Recorder:
    """The sampler itself, and what was asked of it and answered."""

    def __init__(self, sampler):
        self.sampler, self.requests, self.answered = sampler, {}, {}

    def __getattr__(self, name):
        return getattr(self.sampler, name)

    def submit(self, request):
        self.requests[request.id] = request
        self.sampler.submit(request)

    def poll(self):
        completions = self.sampler.poll()
        self.answered |= {c.id: c.completion_ids for c in completions}
        return completions


def make_sampler(engine, args):
    import torch

    if engine == "transformers":
        return TransformersSampler(args.model, batch_size=args.batch_size)
    # `is_available` would start CUDA here, and vLLM could not start it in the process that it forks.
    on_cpu = {} if torch.cuda.device_count() else {"enforce_eager": True, "kv_cache_memory_bytes": 256 << 20}
    return VLLMSampler(args.model, dtype=args.dtype, max_num_seqs=args.batch_size, **{**on_cpu, **args.engine_kwargs})


def rewrite(sampler, rows, args):
    """What a whole run into an empty directory drew."""
    recorder = Recorder(sampler)
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stderr(open(os.devnull, "w")):
        prompt = {} if args.dataset_name else {"guided_prompt": GUIDED_PROMPT}
        config = RewriteConfig(
            directory, num_generations=args.num_generations, max_completion_length=args.max_completion_length, **prompt
        )
        DataRewriter(args.model, config, sampler=recorder).rewrite(rows)
    return recorder


def raw(sampler, requests):
    """The token ids that the engine alone drew."""
    if isinstance(sampler, VLLMSampler):
        prompts, params = zip(*(sampler.vllm_request(request) for request in requests), strict=True)
        outputs = sampler.llm.generate(list(prompts), list(params), use_tqdm=False)
        return {r.id: list(o.outputs[0].token_ids) for r, o in zip(requests, outputs, strict=True)}
    for request in requests:
        sampler.submit(request)
    drawn = {}
    while finished := sampler.poll():
        drawn |= {c.id: c.completion_ids for c in finished}
    return drawn


def cpu_time() -> float:
    """CPU seconds of this process and of all that it and they started, those that have ended included."""
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:4]) for process in (me, *me.children(recursive=True)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["vllm", "transformers"], choices=["vllm", "transformers"])
    parser.add_argument("--model", default=str(ROOT / "examples" / "quickstart_policy"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--dataset_name", help="rows of your own, the first --num_problems of them; else the quickstart's"
    )
    parser.add_argument("--engine_kwargs", type=json.loads, default={}, help="vLLM's engine arguments, as JSON")
    parser.add_argument("--num_problems", type=int, default=1000)
    parser.add_argument("--num_generations", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_completion_length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.dataset_name:
        rows = load_rows(args.dataset_name, dataset_split=f"train[:{args.num_problems}]")
    else:
        rows = demonstrations(problems(args.num_problems, 0))
    for engine in args.engines:
        sampler = make_sampler(engine, args)
        recorder = rewrite(sampler, rows, args)
        requests = [recorder.requests[i] for i in recorder.answered]
        sides = {"rewriter": lambda: rewrite(sampler, rows, args).answered, "raw": lambda: raw(sampler, requests)}  # noqa: B023
        clocks = {"wall": time.perf_counter, "CPU": cpu_time}
        rates = {name: {side: [] for side in sides} for name in clocks}
        alike = []
        for round_number in range(args.rounds):
            for side in list(sides)[:: 1 if round_number % 2 == 0 else -1]:
                began = {name: clock() for name, clock in clocks.items()}
                drawn = sides[side]()
                for name, clock in clocks.items():
                    rates[name][side].append(sum(map(len, drawn.values())) / (clock() - began[name]))
                # What is drawn on speculation can differ from run to run; what is drawn twice cannot.
                alike += [recorder.answered[i] == drawn[i] for i in drawn.keys() & recorder.answered.keys()]
        for name, by_side in rates.items():
            ratios = [a / b for a, b in zip(by_side["rewriter"], by_side["raw"], strict=True)]
            print(
                f"{engine:13s}{len(requests):6,} requests  per second of {name:4s} time: "
                + "  ".join(f"{side} {statistics.median(r):6.0f} tokens" for side, r in by_side.items())
                + f"  ratio {statistics.median(ratios):.2f} (rounds {' '.join(f'{r:.2f}' for r in ratios)})",
                flush=True,
            )
        print(f"{engine:13s}drawn alike: {statistics.mean(alike):.1%} of the attempts")
        sampler.close()


if __name__ == "__main__":
    main()
