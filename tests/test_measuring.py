"""Policy gap and evaluation against naive formulas."""

import math

import pytest
import torch
from datasets import Dataset
from scripted import ScriptedSampler, rows, verify

from trl_offpolicy import evaluate, measure_policy_gap
from trl_offpolicy.sampling import Request, SamplingParams, attempt_seed


def rewritten_rows(tokenizer):
    rows = []
    for i, source in enumerate(["self", "self", "guided", "expert"] * 3):
        ids = [] if source == "expert" else tokenizer(f"{i} it is")["input_ids"] + [tokenizer.eos_token_id]
        expert = "the expert says " + "so " * i
        rows.append(
            {
                "prompt": [{"role": "user", "content": "what is it " * (i + 1)}],
                "completion": [{"role": "assistant", "content": f"{i} it is" if ids else expert}],
                "input_completion": [{"role": "assistant", "content": expert}],
                "source": source, "completion_ids": ids, "id": str(i),
            }
        )  # fmt: skip
    return rows


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_policy_gap_equals_a_forward_of_each_row(tiny_model, tokenizer, batch_tokens):
    data = rewritten_rows(tokenizer)
    result = measure_policy_gap(tiny_model, Dataset.from_list(data), tokenizer, batch_tokens=batch_tokens)

    def sum_log_prob(prompt, answer):
        start = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        prompt_ids = tokenizer(start)["input_ids"]
        ids = torch.tensor([prompt_ids + tokenizer(answer + "<|im_end|>")["input_ids"]])
        with torch.no_grad():
            log_pi = tiny_model(ids).logits[0].double().log_softmax(-1)
        targets = range(len(prompt_ids), ids.shape[1])
        return sum(log_pi[t - 1, ids[0, t]].item() for t in targets), len(targets)

    for source in ("self", "guided", "expert", "total"):
        members = [r for r in data if source in (r["source"], "total")]
        assert result[source]["rows"] == len(members)
        for moment in ("before", "after"):
            column = "completion" if moment == "after" and source != "expert" else "input_completion"
            pairs = [
                sum_log_prob(
                    r["prompt"][0]["content"],
                    r["input_completion" if r["source"] == "expert" else column][0]["content"],
                )
                for r in members
            ]
            sums = [s for s, _ in pairs]
            assert result[source][moment]["sequence_log_prob"] == pytest.approx(sum(sums) / len(sums), abs=1e-4)
            assert result[source][moment]["token_log_prob"] == pytest.approx(
                sum(sums) / sum(n for _, n in pairs), abs=1e-5
            )
            assert result[source][moment]["num_tokens"] == pytest.approx(sum(n for _, n in pairs) / len(pairs))
    assert result["expert"]["before"] == result["expert"]["after"]


def test_policy_gap_refuses_what_it_cannot_measure(tiny_model, tokenizer):
    with pytest.raises(ValueError, match="no rows"):
        measure_policy_gap(tiny_model, [], tokenizer)
    row = {k: v for k, v in rewritten_rows(tokenizer)[0].items() if k != "input_completion"}
    with pytest.raises(ValueError, match="does not carry its demonstration"):
        measure_policy_gap(tiny_model, [row], tokenizer)


def test_evaluation_counts_every_sample_once():
    from trl_offpolicy.rows import content_id

    benchmark = [{"problem": r["problem"], "answer": i % 50} for i, r in enumerate(rows(40))]
    k, seed = 6, 11
    result = evaluate(
        None, {"a": benchmark}, num_generations=k, seed=seed, sampler=ScriptedSampler(), verifier=verify
    )["a"]
    expected = []
    for row in benchmark:
        prompt = [
            {
                "role": "user",
                "content": row["problem"]
                + "\nPlease reason step by step, and put your final answer within \\boxed{}.",
            }
        ]
        seeds = [attempt_seed(seed, content_id(prompt, str(row["answer"])), "eval", i) for i in range(k)]
        drawn = [ScriptedSampler().completion(Request("", prompt, s, SamplingParams())) for s in seeds]
        expected.append(
            sum(c.finish_reason == "stop" and c.text.endswith(f"\\boxed{{{row['answer']}}}") for c in drawn)
        )
    assert result["num_correct"] == expected
    shares = [c / k for c in expected]
    mean = sum(shares) / 40
    assert result["avg@6"] == pytest.approx(mean) and result["pass@6"] == sum(c > 0 for c in expected) / 40
    assert result["avg@6_se"] == pytest.approx(math.sqrt(sum((s - mean) ** 2 for s in shares) / 39 / 40))
    assert 0 < result["truncated"] < 0.2 and result["not_told"] == 0


def test_evaluation_names_bad_rows():
    for bad, message in [
        ([], "no rows"),
        ([{"problem": "p"}], "Row 0 of benchmark 'b' has no `answer`"),
        ([{"answer": "1"}], "has no `prompt`"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate(None, {"b": bad}, sampler=ScriptedSampler(), verifier=verify)
