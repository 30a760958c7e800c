"""Our transformers sampler against its named peers on the same requests: plain `generate`, and `generate_batch`.

    python benchmarks/sampling_transformers.py [--model examples/quickstart_policy] [--rounds 3]

Rounds are interleaved and their order alternates; what is printed are completion tokens per second and their ratio to plain
`generate` (do_sample, one random stream, no log-probs), medians over the rounds. Every engine stops at the end-of-turn token.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from quickstart_task import problems  # noqa: E402

from trl_offpolicy import TransformersSampler  # noqa: E402
from trl_offpolicy.data.tokenization import encode_prompt  # noqa: E402
from trl_offpolicy.sampling.sampler import Request, SamplingParams, attempt_seed  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "examples" / "quickstart_policy"))
    parser.add_argument("--num_prompts", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_completion_length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    prompts = [[{"role": "user", "content": row["problem"]}] for row in problems(args.num_prompts, 0)]
    encoded = sorted((encode_prompt(tokenizer, p) for p in prompts), key=len)
    generation = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=args.max_completion_length,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip

    def ours():
        sampler = TransformersSampler(model, tokenizer, batch_size=args.batch_size)
        params = SamplingParams(max_completion_length=args.max_completion_length)
        for i, prompt in enumerate(prompts):
            sampler.submit(Request(str(i), prompt, attempt_seed(0, str(i), "self", 0), params))
        tokens = 0
        while finished := sampler.poll():
            tokens += sum(len(c.completion_ids) for c in finished)
        return tokens

    def generate():
        tokens = 0
        for start in range(0, len(encoded), args.batch_size):
            batch = tokenizer.pad(
                {"input_ids": encoded[start : start + args.batch_size]}, return_tensors="pt", padding_side="left"
            )
            out = model.generate(**batch, generation_config=generation)[:, batch["input_ids"].shape[1] :]
            ended = (out == tokenizer.eos_token_id).cumsum(-1)
            tokens += int((ended - (out == tokenizer.eos_token_id).int() == 0).sum())
        return tokens

    def continuous():
        outputs = model.generate_batch(inputs=encoded, generation_config=generation, progress_bar=False)
        return sum(len(o.generated_tokens) for o in outputs.values())

    engines = {"generate": generate, "ours": ours, "generate_batch": continuous}
    rates = {name: [] for name in engines}
    for round_number in range(args.rounds):
        order = list(engines) if round_number % 2 == 0 else list(engines)[::-1]
        for name in order:
            torch.manual_seed(round_number)
            began = time.perf_counter()
            tokens = engines[name]()
            rates[name].append(tokens / (time.perf_counter() - began))
    reference = statistics.median(rates["generate"])
    for name, values in rates.items():
        middle = statistics.median(values)
        print(
            f"{name:16s}{middle:9.0f} tokens/s   {middle / reference:5.2f} x generate   (min {min(values):.0f}, max {max(values):.0f})"
        )


if __name__ == "__main__":
    main()
