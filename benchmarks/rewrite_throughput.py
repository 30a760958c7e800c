"""The whole rewriter (verification, journal and all) against the same engine handed the same requests at once.

    python benchmarks/rewrite_throughput.py [--engines vllm transformers] [--num_problems 1000] [--rounds 3]

The rewriter runs once to learn which attempts it draws; then rounds are interleaved and their order alternates. Both sides
draw the same tokens from the same seeds (checked), so the ratio of their times is the ratio of their throughputs: 1.00 would
mean that rewriting costs what sampling costs. The raw side is `LLM.generate` for vLLM, and for transformers the same sampler
without a rewriter. Without a GPU, start it with VLLM_CPU_OMP_THREADS_BIND=nobind TORCHDYNAMO_DISABLE=1 OMP_NUM_THREADS=1.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from quickstart_task import GUIDED_PROMPT, demonstrations, problems  # noqa: E402

from trl_offpolicy import DataRewriter, RewriteConfig, TransformersSampler, VLLMSampler  # noqa: E402


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
    on_cpu = {} if torch.cuda.is_available() else {"enforce_eager": True, "kv_cache_memory_bytes": 256 << 20}
    return VLLMSampler(args.model, dtype=args.dtype, max_num_seqs=args.batch_size, **on_cpu)


def rewrite(sampler, rows, args):
    """Seconds of a whole run into an empty directory, and what it drew."""
    recorder = Recorder(sampler)
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stderr(open(os.devnull, "w")):
        config = RewriteConfig(
            directory, num_generations=args.num_generations, max_completion_length=args.max_completion_length, guided_prompt=GUIDED_PROMPT,
        )  # fmt: skip
        began = time.perf_counter()
        DataRewriter(args.model, config, sampler=recorder).rewrite(rows)
        return time.perf_counter() - began, recorder


def raw(sampler, requests):
    """Seconds of the engine alone, and the token ids it drew."""
    began, drawn = time.perf_counter(), {}
    if isinstance(sampler, VLLMSampler):
        prompts, params = zip(*(sampler.vllm_request(request) for request in requests), strict=True)
        outputs = sampler.llm.generate(list(prompts), list(params), use_tqdm=False)
        drawn = {r.id: list(o.outputs[0].token_ids) for r, o in zip(requests, outputs, strict=True)}
    else:
        for request in requests:
            sampler.submit(request)
        while finished := sampler.poll():
            drawn |= {c.id: c.completion_ids for c in finished}
    return time.perf_counter() - began, drawn


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["vllm", "transformers"], choices=["vllm", "transformers"])
    parser.add_argument("--model", default=str(ROOT / "examples" / "quickstart_policy"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num_problems", type=int, default=1000)
    parser.add_argument("--num_generations", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_completion_length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows = demonstrations(problems(args.num_problems, 0))
    for engine in args.engines:
        sampler = make_sampler(engine, args)
        _, recorder = rewrite(sampler, rows, args)
        requests = [recorder.requests[i] for i in recorder.answered]
        tokens = sum(map(len, recorder.answered.values()))
        seconds = {"rewriter": [], "raw": []}
        for round_number in range(args.rounds):
            for side in ("rewriter", "raw")[:: 1 if round_number % 2 == 0 else -1]:
                took, drawn = rewrite(sampler, rows, args) if side == "rewriter" else raw(sampler, requests)
                seconds[side].append(took)
                drawn = drawn.answered if side == "rewriter" else drawn
                assert drawn == recorder.answered, "the two sides did not draw the same tokens"
        ratios = [a / b for a, b in zip(seconds["raw"], seconds["rewriter"], strict=True)]
        print(
            f"{engine:13s}{len(requests):6,} requests {tokens:9,} tokens   "
            + "   ".join(f"{side} {tokens / statistics.median(s):7.0f} tokens/s" for side, s in seconds.items())
            + f"   ratio {statistics.median(ratios):.2f} (rounds {' '.join(f'{r:.2f}' for r in ratios)})",
            flush=True,
        )
        sampler.close()


if __name__ == "__main__":
    main()
