"""One training step of ours against `SFTTrainer`, interleaved: time and memory as ratios, diagnostics on.

    python benchmarks/train_step.py [--vocab_sizes 32000 152000] [--rounds 7]

Every line is a process of its own: both trainers step on the same rows in turn, order alternating, and the median of the
rounds' ratios is printed. Time is the processor time of the one thread on a CPU (others may be using the machine), wall time
on a GPU. Memory is how far the peak of the resident set rises above what is held before the first step, measured with one
trainer in the process (CPU; on a GPU it is `torch.cuda.max_memory_allocated`).
"""

import argparse
import contextlib
import gc
import io
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path


POLICY = str(Path(__file__).parents[1] / "examples" / "quickstart_policy")
LAYOUTS = {"padded": {}, "packed": {"packing": True, "max_length": 256}}
PAIRS = {"nll": "nll", "dft": "dft", "iw": "nll"}  # ours → TRL's loss_type


def make_trainer(ours: bool, objective: str, vocab_size: int, layout: str):
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    from trl import SFTConfig, SFTTrainer

    from trl_offpolicy import ImportanceWeightedSFTConfig, ImportanceWeightedSFTTrainer
    from trl_offpolicy.data.tokenization import encode_prompt

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocab_size, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=384, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []  # both trainers get the same tokens: ours as DataRewriter writes them, TRL's as a tokenised dataset
    for i in range(64):
        prompt, completion = (
            [{"role": "user", "content": "a question of a few words"}],
            list(range(40, 100 + 5 * (i % 8))),
        )
        ids = encode_prompt(tokenizer, prompt)
        rows.append(
            {"prompt": prompt, "completion": [{"role": "assistant", "content": ""}], "completion_ids": completion, "source": "self",
             "behavior_log_probs": [-1.0] * len(completion)}
            if ours
            else {"input_ids": ids + completion, "labels": [-100] * len(ids) + completion}
        )  # fmt: skip
    data = Dataset.from_list(rows)
    common = {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": 4 if layout == "padded" else 2, "use_cpu": device == "cpu",
        "bf16": device == "cuda", "report_to": "none", "disable_tqdm": True, **LAYOUTS[layout],
    }  # fmt: skip
    if ours:
        args = ImportanceWeightedSFTConfig(objective=objective, **common)
        trainer = ImportanceWeightedSFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    else:
        trainer = SFTTrainer(
            model, SFTConfig(loss_type=PAIRS[objective], **common), train_dataset=data, processing_class=tokenizer
        )
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    items = (batch["labels"][:, 1:] != -100).sum()
    trainer.current_gradient_accumulation_steps = 1

    def step():
        loss = trainer.training_step(trainer.model, dict(batch), num_items_in_batch=items)
        trainer.model.zero_grad(set_to_none=False)
        return loss

    return trainer, step


def peak_bytes() -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(job: dict) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import datasets
    import torch

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    kind = (job["objective"], job["vocab_size"], job["layout"])
    with contextlib.redirect_stdout(io.StringIO()):
        if job["what"] == "memory":
            _, step = make_trainer(job["ours"], *kind)
            gc.collect()
            before = peak_bytes()
            for _ in range(2):
                step()
            result = peak_bytes() - before
        else:
            clock = time.perf_counter if torch.cuda.is_available() else time.process_time
            steps = {ours: make_trainer(ours, *kind)[1] for ours in (True, False)}
            times = {True: [], False: []}
            for round_number in range(job["rounds"] + 1):
                for ours in sorted(steps, reverse=bool(round_number % 2)):
                    began = clock()
                    steps[ours]()
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    times[ours].append(clock() - began)
            mine, trl = times[True][1:], times[False][1:]
            ratios = [a / b for a, b in zip(mine, trl, strict=True)]
            result = [statistics.median(x) for x in (mine, trl, ratios)]
    print(json.dumps(result))


def measure(**job):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(job)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab_sizes", type=int, nargs="+", default=[32_000, 152_000])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(json.loads(args.child))
    print(
        f"{'vocabulary':>10s}  {'layout':8s}{'ours':5s}{'TRL':5s}{'ms/step':>9s}{'TRL':>9s}{'time':>8s}{'memory':>9s}"
    )
    for vocab_size in args.vocab_sizes:
        for layout in LAYOUTS:
            for objective, theirs in PAIRS.items():
                kind = {"objective": objective, "vocab_size": vocab_size, "layout": layout}
                mine, trl, ratio_of_times = measure(what="time", rounds=args.rounds, **kind)
                memory = [measure(what="memory", ours=ours, **kind) for ours in (True, False)]
                ratio = memory[0] / memory[1] if memory[1] else float("nan")
                print(
                    f"{vocab_size:10d}  {layout:8s}{objective:5s}{theirs:5s}{1000 * mine:9.1f}{1000 * trl:9.1f}{ratio_of_times:7.3f}x{ratio:8.3f}x",
                    flush=True,
                )


if __name__ == "__main__":
    main()
