"""Policy gap and evaluation against naive formulas."""

import json
import math
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import POLICY
from datasets import Dataset
from scripted import ScriptedSampler, rows, verify

from trl_offpolicy import evaluate, measure_policy_gap
from trl_offpolicy.cli import main
from trl_offpolicy.data.text_statistics import copy_ratio, distinct_n, leaks_hint, self_bleu
from trl_offpolicy.data.tokenization import encode_prompt
from trl_offpolicy.sampling.sampler import Request, SamplingParams, attempt_seed


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
    assert {**result["expert"]["before"], "copy_ratio": 1.0} == result["expert"]["after"]


def test_policy_gap_refuses_what_it_cannot_measure(tiny_model, tokenizer):
    with pytest.raises(ValueError, match="no rows"):
        measure_policy_gap(tiny_model, [], tokenizer)
    row = {k: v for k, v in rewritten_rows(tokenizer)[0].items() if k != "input_completion"}
    with pytest.raises(ValueError, match="does not carry its demonstration"):
        measure_policy_gap(tiny_model, [row], tokenizer)


def test_replay_rows_have_no_gap_and_are_left_out(tiny_model, tokenizer):
    """Of `with_replay`, in which they come first, with empty columns for what they do not have."""
    data = rewritten_rows(tokenizer)
    other = {"prompt": [{"role": "user", "content": "Tell."}], "source": "replay", "input_completion": None}
    replay = [{**row, **other} for row in data[:2]]
    with pytest.warns(UserWarning, match="2 of 14 rows are replay rows, .*: they are left out"):
        found = measure_policy_gap(tiny_model, Dataset.from_list([*replay, *data]), tokenizer)
    assert found == measure_policy_gap(tiny_model, data, tokenizer)
    with pytest.raises(ValueError, match="All 2 rows are replay rows"):
        measure_policy_gap(tiny_model, replay, tokenizer)


def test_the_gap_command_says_what_is_wrong_before_a_model_is_loaded(tmp_path, monkeypatch, capsys, tokenizer):
    """Exit code 2 and a sentence; ~ is the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    plain, whole = tmp_path / "plain.jsonl", tmp_path / "whole.parquet"
    plain.write_text('{"problem": "1+1?"}\n')
    Dataset.from_list(rewritten_rows(tokenizer)).to_parquet(whole)
    for dataset, model, options, message in [
        (plain, "./nope", [], "no column prompt and no completion and no source and no completion_ids"),
        (whole, "./nope", [], "model='./nope', which cannot be loaded"),
        (whole, POLICY, ["--dtype", "floaty"], "dtype='floaty', which torch does not know"),
        (
            whole,
            POLICY,
            ["--forgetting", "--max_rows", "5", "--concatenate"],
            "--max_rows and --concatenate with --forgetting",
        ),
    ]:
        command = ["gap", "--model_name_or_path", model, "--dataset_name", str(dataset), "--output_dir", "~/gap"]
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err
    assert main([*command[:2], POLICY, *command[3:]]) == 0
    assert {p.name for p in (tmp_path / "gap").iterdir()} == {"policy_gap.json", "policy_gap.parquet"}


def test_gap_of_demonstrations_is_that_of_a_rewrite_that_kept_them_all(tiny_model, tokenizer):
    raw = [{"question": f"{n}+1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(4)]
    kept = [
        {
            "prompt": [{"role": "user", "content": f"Q: {row['question']}"}], "completion": [{"role": "assistant", "content": row["answer"]}],
            "input_answer": row["answer"], "source": "expert", "completion_ids": [], "id": str(n), "chat_template_kwargs": {"hint": "so"},
        }
        for n, row in enumerate(raw)
    ]  # fmt: skip
    given = {"solve_prompt": "Q: {problem}", "chat_template_kwargs": '{"hint": "so"}'}
    found = measure_policy_gap(tiny_model, raw, tokenizer, **given)
    assert found == measure_policy_gap(tiny_model, kept, tokenizer) and list(found) == ["expert", "total"]
    assert found["total"]["before"]["num_tokens"] == found["total"]["after"]["num_tokens"]
    plain = tokenizer.chat_template
    try:  # a variable that the template heeds changes what is scored
        tokenizer.chat_template = plain + "{{ hint }}"
        assert measure_policy_gap(tiny_model, kept, tokenizer) != found
    finally:
        tokenizer.chat_template = plain


def test_gap_of_rows_of_another_model_reads_their_texts(tiny_model, tokenizer):
    """Ids of another vocabulary are no target: the text is, and nothing is said of μ."""
    own = [{**row, "behavior_log_probs": [-1.0] * len(row["completion_ids"])} for row in rewritten_rows(tokenizer)]
    foreign = [
        {**r, "completion_ids": [len(tokenizer) - 1 - t for t in r["completion_ids"]], "model": "a"} for r in own
    ]
    with pytest.warns(UserWarning, match="9 of 12 rows have `completion_ids` that say something else.*from 'a'"):
        told = measure_policy_gap(tiny_model, foreign, tokenizer)
    expected = measure_policy_gap(tiny_model, Dataset.from_list(own).with_format("torch"), tokenizer)
    assert told["total"]["behavior"] is None and expected["total"]["behavior"]["rows"] == 9
    for name in ("sequence_log_prob", "token_log_prob", "num_tokens"):
        assert told["total"]["after"][name] == pytest.approx(expected["total"]["after"][name])


def test_gap_statistics_against_naive_formulas(tiny_model, tokenizer):
    """k3 KL, ESS, the difference at equal length, perplexity and the intervals, from log-probs of one row at a time."""
    data, rng, mu = rewritten_rows(tokenizer), np.random.default_rng(0), {}
    for row in data:
        if row["completion_ids"]:
            mu[row["id"]] = row["behavior_log_probs"] = rng.normal(-6, 0.5, len(row["completion_ids"])).tolist()
    result = measure_policy_gap(tiny_model, data, tokenizer)

    def log_probs(prompt, ids):
        whole = torch.tensor([prompt + ids])
        with torch.no_grad():
            log_pi = tiny_model(whole).logits[0].double().log_softmax(-1)
        return np.array([log_pi[len(prompt) + t - 1, token].item() for t, token in enumerate(ids)])

    ratios, matched, tokens, before, own = [], [], 0, [], []
    for row in data:
        prompt = encode_prompt(tokenizer, row["prompt"])
        expert = log_probs(prompt, tokenizer(row["input_completion"][0]["content"] + "<|im_end|>")["input_ids"])
        after = log_probs(prompt, row["completion_ids"]) if row["completion_ids"] else expert
        m = min(len(expert), len(after))
        matched.append(after[:m].sum() - expert[:m].sum())
        tokens += m
        before.append(expert)
        own.append(after.sum())
        if row["id"] in mu:
            ratios.append(np.exp(after - np.array(mu[row["id"]])))
    ratio = np.concatenate(ratios)
    total = result["total"]
    assert total["behavior"]["rows"] == 9 and result["expert"]["behavior"] is None
    assert total["behavior"]["kl"] == pytest.approx((ratio - 1 - np.log(ratio)).mean(), abs=1e-5)
    assert total["behavior"]["ess"] == pytest.approx(ratio.sum() ** 2 / len(ratio) / (ratio**2).sum(), abs=1e-5)
    assert total["difference"]["length_matched"] == pytest.approx(sum(matched) / tokens, abs=1e-5)
    assert total["before"]["perplexity"] == pytest.approx(np.exp(-np.concatenate(before).mean()), rel=1e-5)
    draws = [np.mean([own[i] for i in rng.integers(12, size=12)]) for _ in range(20_000)]
    low, high = total["after"]["sequence_log_prob_ci95"]
    assert low < np.quantile(draws, 0.025) < np.quantile(draws, 0.975) < high  # wider: a small sample's correction
    assert low > np.quantile(draws, 0.003) and high < np.quantile(draws, 0.997)


def test_gap_of_the_bare_concatenation(tiny_model, tokenizer, tmp_path):
    data = rewritten_rows(tokenizer)
    result = measure_policy_gap(tiny_model, data, tokenizer, concatenate=True, output_dir=str(tmp_path))
    sums = []
    for row in data:
        question, target = row["prompt"][0]["content"], row["completion"][0]["content"]
        ids = tokenizer(question + target)["input_ids"]
        start = next(
            t for t, (a, b) in enumerate(zip([*tokenizer(question)["input_ids"], -1], ids, strict=False)) if a != b
        )
        with torch.no_grad():
            log_pi = tiny_model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        sums.append(sum(log_pi[t - 1, ids[t]].item() for t in range(start, len(ids))))
    assert result["total"]["after"]["sequence_log_prob"] == pytest.approx(np.mean(sums), abs=1e-4)
    assert result["total"]["behavior"] is None
    assert json.loads((tmp_path / "policy_gap.json").read_text()) == result
    written = pq.read_table(tmp_path / "policy_gap.parquet").to_pydict()
    assert written["after_log_prob"] == pytest.approx(sums, abs=1e-4) and written["id"] == [r["id"] for r in data]


def test_copying_and_hints():
    reference = "We add 4 and 5, which gives 9. The answer is 9."
    assert copy_ratio(reference, reference) == 1 and copy_ratio("4 + 5 = 9, so \\boxed{9}", reference) == 0
    assert copy_ratio("We add 4 and then stop.", reference) == 1 / 4  # "We add 4 and" of four 4-grams
    assert copy_ratio("9", reference) is None
    for leak in (
        "As the teacher's solution shows, 9.",
        "The teachers' solution provided a mixed count.",
        "Here's my own solution:",
        "Here is how you can write your own step-by-step solution:",
        "According to the reference, it is 9",
        "The reference says 9.",
    ):
        assert leaks_hint(leak)
    for fine in ("The given triangle has a reference angle of 30.", "We are given a solution of salt.", reference):
        assert not leaks_hint(fine)


def test_self_bleu_equals_bleu_of_each_text_against_the_others():
    def bleu(text, others):
        def counts(words, n):
            return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

        precision = 1.0
        for n in range(1, 5):
            own = counts(text, n)
            clipped = sum(min(c, max(counts(o, n)[g] for o in others)) for g, c in own.items())
            precision *= (clipped / own.total()) ** 0.25 if own else 0
        nearest = min((abs(len(o) - len(text)), len(o)) for o in others)[1]
        return precision * (1 if len(text) > nearest else math.exp(1 - nearest / len(text)))

    rng = np.random.default_rng(0)
    for _ in range(30):
        texts = [list(rng.choice(list("abc"), rng.integers(4, 14))) for _ in range(rng.integers(2, 7))]
        naive = np.mean([bleu(t, texts[:i] + texts[i + 1 :]) for i, t in enumerate(texts)])
        assert self_bleu([" ".join(t) for t in texts]) == pytest.approx(naive)
    assert distinct_n(["a b a b", "a b"], 2) == 2 / 4 and distinct_n(["a"]) is None


def test_evaluation_counts_every_sample_once():
    from trl_offpolicy.data.rows import content_id

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
