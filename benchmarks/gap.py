"""Measuring the policy gap against the bare forward passes that it cannot do without, interleaved, as a ratio.

    python benchmarks/gap.py [--rows 2000] [--vocab_size 8000] [--rounds 5]

Both score the demonstration and the rewritten target of the same rows, with the same model, longest first in the same batches. The
peer is given token ids and only calls `model(input_ids, attention_mask)`: no tokenising, no log-probs, no statistics. Ours does
everything `trl-offpolicy gap` does. Time is processor time on a CPU (others may be using the machine), wall time on a GPU.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path


ROOT = Path(__file__).parents[1]
POLICY = str(ROOT / "examples" / "quickstart_policy")
sys.path.insert(0, str(ROOT / "examples"))


def make_rows(num_rows: int, tokenizer) -> list[dict]:
    """Rows as `DataRewriter` writes them: the demonstration in one style, the completion in the policy's own."""
    from quickstart_task import problems

    rng, rows = random.Random(0), []
    for i, row in enumerate(problems(num_rows, 1, (3, 4, 5, 6, 7), p_hard=1.0)):
        source = rng.choice(["self", "guided", "expert"])
        text = row["expert"] if source == "expert" else row["own"]
        ids = [] if source == "expert" else tokenizer(text + "<|im_end|>")["input_ids"]
        rows.append(
            {
                "prompt": [{"role": "user", "content": row["problem"]}], "completion": [{"role": "assistant", "content": text}],
                "input_completion": [{"role": "assistant", "content": row["expert"]}], "source": source, "id": str(i),
                "completion_ids": ids, "behavior_log_probs": [-0.5] * len(ids),
            }
        )  # fmt: skip
    return rows


def bare_forward(model, sequences: list[list[int]], batch_tokens: int) -> None:
    import torch

    sequences, start = sorted(sequences, key=len, reverse=True), 0
    with torch.no_grad():
        while start < len(sequences):
            width = len(sequences[start])
            batch = sequences[start : start + max(1, batch_tokens // width)]
            start += len(batch)
            ids = torch.tensor([row + [0] * (width - len(row)) for row in batch], device=model.device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=model.device)
            model(input_ids=ids, attention_mask=mask, use_cache=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--vocab_size", type=int, default=8000)
    parser.add_argument("--batch_tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from trl_offpolicy import measure_policy_gap
    from trl_offpolicy.evaluation.policy_gap import targets

    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock = time.perf_counter if device == "cuda" else time.process_time
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=args.vocab_size, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=384, tie_word_embeddings=True, bos_token_id=None,
        )
    ).to(device).eval()  # fmt: skip
    rows = make_rows(args.rows, tokenizer)
    pairs, _, _ = targets(rows, tokenizer)
    sequences = [prompt + target for prompt, target in pairs]
    measure_policy_gap(model, rows[:50], tokenizer)  # imports and the template's compilation are nobody's time
    ratios = []
    for i in range(args.rounds):
        seconds = {}
        for name in ("ours", "bare") if i % 2 else ("bare", "ours"):
            began = clock()
            if name == "ours":
                measure_policy_gap(model, rows, tokenizer, batch_tokens=args.batch_tokens)
            else:
                bare_forward(model, sequences, args.batch_tokens)
                if device == "cuda":
                    torch.cuda.synchronize()
            seconds[name] = clock() - began
        ratios.append(seconds["bare"] / seconds["ours"])
        print(f"round {i + 1}: ours {seconds['ours']:.1f} s, bare forward {seconds['bare']:.1f} s", flush=True)
    print(
        f"{args.rows} rows, {len(sequences)} targets, {sum(map(len, sequences)):,} tokens, vocabulary {args.vocab_size:,}, {device}: throughput "
        f"{statistics.median(ratios):.2f} x a bare forward ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
