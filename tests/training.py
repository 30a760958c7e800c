"""Small data, settings and runs for the trainers."""

import torch
from datasets import Dataset


QUESTIONS = ["2+2?", "What is 3 times 4?", "Name the sum of 11 and 12, please.", "7-5?", "How many are 9 and 9 and 9?"]


def demonstrations(num_rows=10):
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": QUESTIONS[i % 5]}],
                "completion": [{"role": "assistant", "content": f"step {'so ' * (i % 4)}it is \\boxed{{{i}}}"}],
            }
            for i in range(num_rows)
        ]
    )


def rewritten(tokenizer, num_rows=8, seed=0):
    """Rows as DataRewriter writes them: every third one is the expert's; log μ encodes the token id, so alignment can be read off."""
    rows = []
    for i, row in enumerate(demonstrations(num_rows)):
        source = ("self", "guided", "expert")[i % 3]
        ids = (
            []
            if source == "expert"
            else tokenizer(row["completion"][0]["content"])["input_ids"] + [tokenizer.eos_token_id]
        )
        rows.append(
            {
                **row,
                "source": source,
                "completion_ids": ids,
                "behavior_log_probs": [-t / 1000 for t in ids],
                "temperature": 1.0,
            }
        )
    return Dataset.from_list(rows)


def config(cls, tmp_path, **kwargs):
    defaults = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    return cls(
        str(tmp_path),
        **{
            **defaults,
            "use_cpu": True,
            "bf16": False,
            "save_strategy": "no",
            "seed": 3,
            "disable_tqdm": True,
            **kwargs,
        },
    )


def train(trainer, **kwargs):
    trainer.train(**kwargs)
    history = [e for e in trainer.state.log_history if "loss" in e]
    return [(e["loss"], e["grad_norm"], e["entropy"], e["mean_token_accuracy"]) for e in history], history


def first_loss(trainer):
    trainer.model.train()
    return trainer.compute_loss(trainer.model, dict(next(iter(trainer.get_train_dataloader())))).item()


def with_own_log_probs(model, tokenizer, shift=0.0):
    """For `Dataset.map`: log μ is what `model` says of a row's sampled tokens, less and more by `shift` in turn."""

    def own(row):
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        ids = torch.tensor([prompt + row["completion_ids"]])
        with torch.no_grad():
            log_pi = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        sampled = log_pi[len(prompt) - 1 :].tolist()
        return {"behavior_log_probs": [min(0.0, x + (-1) ** t * shift) for t, x in enumerate(sampled)]}

    return own
