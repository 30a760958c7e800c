"""Trains the quickstart's base policy from scratch on CPU and writes it in Hub layout (`make policy`).

    python examples/train_quickstart_policy.py --output_dir examples/quickstart_policy

A Qwen2 of about 1 M parameters learns both task families of `quickstart_task.py`: mostly its own terse style, some of the
expert's prose, and the digest-and-retell format (problem and reference in, own style out). Muon on the hidden matrices,
AdamW on the rest, loss on assistant tokens only; everything is drawn afresh from the seed, no document is seen twice.
"""

import argparse
import copy
import json
import random
import time
from pathlib import Path

import torch
from quickstart_task import GUIDED_PROMPT, problems, running_total, second_family
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ '\\n' if not loop.first }}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)
DIGIT_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# share of documents: own style, expert style, digest-and-retell, second family
MIXTURE = {"own": 0.40, "expert": 0.22, "guided": 0.16, "other": 0.22}


def document(rng: random.Random, mixture: dict = MIXTURE, max_ops: int = 6) -> tuple[str, str]:
    """One (user, assistant) pair of the pre-training mixture."""
    kind = rng.choices(list(mixture), weights=list(mixture.values()))[0]
    if kind == "other":
        row = second_family(rng)
        return row["problem"], row["own"]
    row = running_total(rng, rng.randint(1, max_ops), p_times=rng.choice([0.15, 0.3, 0.45]))
    if kind == "guided":
        return GUIDED_PROMPT.format(problem=row["problem"], solution=row["expert"]), row["own"]
    return row["problem"], row[kind]


def render(user: str, assistant: str) -> tuple[str, str]:
    return f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n", f"{assistant}<|im_end|>"


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(DIGIT_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(("\n".join(("user", "assistant", *document(rng))) for _ in range(4000)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=4096
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def new_model(tokenizer) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=512, hidden_size=128, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, intermediate_size=320,
        max_position_embeddings=4096, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, initializer_range=0.05,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def batches(tokenizer, rng, tokens_per_step: int, steps: int, mixture: dict):
    """(input_ids, labels) for each step; a pool is sorted by length so that little padding is computed.

    Short problems come first (one or two operations for 4 % of the steps, up to four until 15 %): looking up "the operation
    of C" is learned much sooner on them.
    """
    backend, step = tokenizer.backend_tokenizer, 0
    while True:
        max_ops = 2 if step < 0.04 * steps else 4 if step < 0.15 * steps else 6
        pairs = [render(*document(rng, mixture, max_ops)) for _ in range(1024)]
        prompts, answers = (backend.encode_batch([p[i] for p in pairs]) for i in (0, 1))
        docs = sorted(
            ((p.ids, a.ids) for p, a in zip(prompts, answers, strict=True)), key=lambda d: len(d[0]) + len(d[1])
        )
        pool = []
        while docs:
            length = len(docs[-1][0]) + len(docs[-1][1])
            chunk, docs = docs[-(tokens_per_step // length) :], docs[: -(tokens_per_step // length)]
            ids = torch.full((len(chunk), length), tokenizer.pad_token_id)
            labels = torch.full((len(chunk), length), -100)
            for i, (p, a) in enumerate(chunk):
                ids[i, : len(p) + len(a)] = torch.tensor(p + a)
                labels[i, len(p) : len(p) + len(a)] = torch.tensor(a)
            pool.append((ids, labels))
        rng.shuffle(pool)
        yield from pool
        step += len(pool)


def loss_of(model, ids, labels):
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[
        :, :-1
    ]  # causal and right-padded: no mask needed
    target = labels[:, 1:]
    keep = target != -100
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[keep]), target[keep])


@torch.no_grad()
def accuracy(model, tokenizer, rows, prompts, prefix="", num_samples=4, temperature=1.0, max_new_tokens=160):
    """(rows, num_samples) bool: is the last boxed answer the gold one? `prefix` forces the first words of the answer."""
    correct = torch.zeros(len(rows), num_samples, dtype=torch.bool)
    tokenizer.padding_side = "left"
    for start in range(0, len(rows), 64):
        texts = [render(p, "")[0] + prefix for p in prompts[start : start + 64]]
        batch = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
        out = model.generate(
            **batch, do_sample=temperature > 0, temperature=temperature or None, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
            num_return_sequences=num_samples,
        )  # fmt: skip
        for i, text in enumerate(
            tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        ):
            row = start + i // num_samples
            correct[row, i % num_samples] = text.rstrip(".").endswith(f"\\boxed{{{rows[row]['answer']}}}")
    return correct


def report(model, tokenizer, per_length=16, seed=991) -> dict:
    """What a fair base policy must have, measured on fresh problems before any method is run."""
    model.eval()
    tokenizer = copy.deepcopy(tokenizer)  # padding is a state of the fast tokenizer: training must not inherit it
    rows = problems(6 * per_length, seed)
    plain = [r["problem"] for r in rows]
    own = accuracy(model, tokenizer, rows, plain, num_samples=8)
    expert = accuracy(model, tokenizer, rows, plain, prefix="We begin", num_samples=2)
    guided = accuracy(
        model, tokenizer, rows, [GUIDED_PROMPT.format(problem=r["problem"], solution=r["expert"]) for r in rows]
    )
    failed = ~own[:, :4].any(1)
    rng = random.Random(seed)
    other = [second_family(rng) for _ in range(64)]
    other_ok = accuracy(model, tokenizer, other, [r["problem"] for r in other], num_samples=1)[:, 0]
    model.train()
    share = lambda x: round(x.float().mean().item(), 3) if len(x) else None  # noqa: E731
    return {
        "self_at_1": share(own.flatten()),
        "self_at_4": share(own[:, :4].any(1)),
        "self_at_1_by_num_ops": {n: share(own[n - 1 :: 6].flatten()) for n in range(1, 7)},
        "self_at_4_by_num_ops": {n: share(own[n - 1 :: 6, :4].any(1)) for n in range(1, 7)},
        "expert_style_at_1": share(expert.flatten()),
        "guided_at_1": share(guided.flatten()),
        "of_self_failed_guided_at_4": share(guided[failed].any(1)),
        "of_self_failed_control_4_more": share(own[failed, 4:].any(1)),
        "second_family": share(other_ok),
        "second_family_by_kind": {
            k: share(other_ok[[r["kind"] == k for r in other]]) for k in ("units", "weekday", "position", "count")
        },
    }


def save(model, tokenizer, output_dir: Path, recipe: dict):
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    (output_dir / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("examples/quickstart_policy"))
    parser.add_argument("--steps", type=int, default=7500)
    parser.add_argument("--tokens_per_step", type=int, default=1536)
    parser.add_argument("--muon_lr", type=float, default=0.003)
    parser.add_argument("--adamw_lr", type=float, default=1.2e-3)
    parser.add_argument(
        "--decay", type=float, default=0.3, help="share of the steps over which the rate falls linearly to 0"
    )
    parser.add_argument(
        "--guided_share", type=float, default=MIXTURE["guided"], help="share of digest-and-retell documents"
    )
    parser.add_argument("--eval_every", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="the embedded policy was trained on a CPU")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    mixture = {**MIXTURE, "guided": args.guided_share, "own": MIXTURE["own"] + MIXTURE["guided"] - args.guided_share}
    tokenizer = train_tokenizer(args.seed)
    model = new_model(tokenizer).to(args.device)
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    optimizers = [
        torch.optim.Muon(hidden, lr=args.muon_lr, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=args.adamw_lr, weight_decay=0.0),
    ]
    rate = lambda s: min(1.0, (s + 1) / 40, (args.steps - s) / (args.decay * args.steps))  # noqa: E731
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, rate) for o in optimizers]
    stream = batches(tokenizer, random.Random(args.seed + 1), args.tokens_per_step, args.steps, mixture)
    began, history, running = time.process_time(), [], 0.0
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, mixture {mixture}")
    for step in tqdm(range(1, args.steps + 1), mininterval=30):
        loss = loss_of(model, *(each.to(args.device) for each in next(stream)))
        loss.backward()
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        running += (loss.item() - running) / min(step, 50)
        if step % args.eval_every == 0 or step == args.steps:
            entry = {
                "step": step,
                "cpu_seconds": round(time.process_time() - began),
                "loss": round(running, 4),
                **report(model, tokenizer),
            }
            history.append(entry)
            print(json.dumps(entry), flush=True)
            recipe = {
                **{k: v for k, v in vars(args).items() if k != "output_dir"},
                "mixture": mixture,
                "history": history,
            }
            save(model, tokenizer, args.output_dir, recipe)


if __name__ == "__main__":
    main()
