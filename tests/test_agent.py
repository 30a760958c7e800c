"""The rewriting agent: its reward against loops over full logits, GRPO in one and two processes, and its adapter in a rewrite."""

import copy
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import gather_object
from conftest import POLICY, ROOT, in_two_processes, needs_vllm
from datasets import Dataset, load_dataset
from draws import drain, drawn_ids, forward_log_probs, requests
from peft import LoraConfig, PeftModel, get_peft_model
from quickstart_task import GUIDED_PROMPT, demonstrations, problems
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from trl_offpolicy import (
    DataRewriter,
    ImportanceWeightedSFTConfig,
    ImportanceWeightedSFTTrainer,
    MathVerifier,
    RewriteConfig,
    TransformersSampler,
    cli,
)
from trl_offpolicy.agent.group_rewards import alignment_reward, diversity_reward, task_gate, total_reward
from trl_offpolicy.agent.rewriting_agent_trainer import (
    Candidate,
    GroupReward,
    RewritingAgentTrainer,
    agent_dataset,
)
from trl_offpolicy.data.prompts import PAPER_QA_PROMPT, REASONING_PROMPT


LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


# ---- naive formulas ----


def naive_dist(nll, feasible):
    own = [x for x, f in zip(nll, feasible, strict=True) if f]
    mean = sum(own) / max(1, len(own))
    spread = math.sqrt(sum((x - mean) ** 2 for x in own) / max(1, len(own)))
    return [1 / (1 + math.exp((x - mean) / (spread + 1e-6))) if f else 0.0 for x, f in zip(nll, feasible, strict=True)]


def naive_spread(vectors):
    distances = []
    for i, a in enumerate(vectors):
        for b in vectors[i + 1 :]:
            cosine = sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
            distances.append((1 - cosine) / 2)
    return sum(distances) / len(distances) if distances else 0.0


def naive_div(vectors, feasible):
    rewards = []
    for i, f in enumerate(feasible):
        own = [v for j, v in enumerate(vectors) if feasible[j]]
        others = [v for j, v in enumerate(vectors) if feasible[j] and j != i]
        rewards.append(max(0.0, naive_spread(own) - naive_spread(others)) if f else 0.0)
    return rewards


def naive_base(base, tokenizer, prompt, ids):
    """NLL per token and mean hidden state of `ids` after `prompt`, from the whole model's own forward."""
    prompt_ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]  # fmt: skip
    with torch.no_grad():
        output = base(torch.tensor([prompt_ids + ids]), output_hidden_states=True)
    log_p = output.logits[0].double().log_softmax(-1)
    nll = -sum(log_p[len(prompt_ids) + t - 1, token].item() for t, token in enumerate(ids)) / len(ids)
    return nll, output.hidden_states[-1][0, len(prompt_ids) :].double().mean(0).tolist()


def naive_rewards(base, tokenizer, prompts, ids, gates, qa_prompts):
    """Each candidate's reward, its group found by looking at all the others."""
    rewards = [None] * len(prompts)
    for prompt in {json.dumps(p) for p in prompts}:
        members = [i for i, p in enumerate(prompts) if json.dumps(p) == prompt]
        feasible = [gates[i] == 1 for i in members]
        scores = [
            naive_base(base, tokenizer, qa_prompts[i], ids[i]) if gates[i] == 1 else (math.nan, []) for i in members
        ]
        dist, div = naive_dist([s[0] for s in scores], feasible), naive_div([s[1] for s in scores], feasible)
        for i, d, v in zip(members, dist, div, strict=True):
            rewards[i] = None if gates[i] is None else gates[i] * (1 + 0.35 * d + 0.5 * v)
    return rewards


@pytest.mark.parametrize("seed", range(4))
def test_each_term_equals_a_naive_loop(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 9))
    nll, embeddings, feasible = rng.gamma(2, 1, n), rng.normal(size=(n, 5)), rng.random(n) < 0.7
    dist, div = alignment_reward(nll, feasible), diversity_reward(embeddings, feasible)
    np.testing.assert_allclose(dist, naive_dist(nll, feasible), rtol=1e-12)
    np.testing.assert_allclose(div, naive_div(embeddings.tolist(), feasible), rtol=1e-9, atol=1e-15)
    expected = [f * (1 + 0.35 * d + 0.5 * v) for f, d, v in zip(feasible, dist, div, strict=True)]
    np.testing.assert_allclose(total_reward(feasible, dist, div), expected, rtol=1e-12)
    assert dist.dtype == div.dtype == np.float64


def test_groups_at_the_edge():
    one, none, vectors = [False, True, False], [False] * 3, np.eye(3)
    assert alignment_reward([math.nan, 2.0, math.nan], one).tolist() == [0, 0.5, 0]
    assert diversity_reward([None, vectors[1], None], one).tolist() == [0, 0, 0]
    assert alignment_reward([1.0, 2.0, 3.0], none).tolist() == diversity_reward(vectors, none).tolist() == [0, 0, 0]
    assert alignment_reward([0.1] * 3, [True] * 3) == pytest.approx([0.5] * 3, abs=1e-9), "all equal"
    assert diversity_reward(np.ones((3, 2)), [True] * 3) == pytest.approx([0, 0, 0], abs=1e-12)
    assert diversity_reward(vectors[:2], [True] * 2).tolist() == [0.5, 0.5], (
        "without it one is left, which has no pair"
    )
    with pytest.raises(ValueError, match="no finite NLL"):
        alignment_reward([1.0, math.nan], [True, True])
    gate = task_gate([1, 1, 0, math.nan, 1], [1, 0, 1, 1, math.nan])
    np.testing.assert_array_equal(gate, [1, 0, 0, math.nan, math.nan])
    np.testing.assert_array_equal(np.isnan(total_reward(gate, [0.5] * 5, [0.0] * 5)), np.isnan(gate))
    # Log-probs or an embedding that are not finite: no reward for that one, and the others are ranked without it.
    vector = np.ones(2)
    group = [
        Candidate("g", 1, 1, n, v)
        for n, v in ((1.0, vector), (math.nan, vector), (1.0, vector * math.inf), (3.0, -vector))
    ]
    terms = GroupReward(None).terms(group)
    assert terms["feasible"].tolist() == [True, False, False, True] and np.isnan(terms["total"][1:3]).all()
    np.testing.assert_allclose(terms["dist"][[0, 3]], naive_dist([1.0, 3.0], [True, True]))
    assert terms["div"] == pytest.approx([1, 0, 0, 1])


# ---- the reward on a model ----


def training_rows(num_rows=4, seed=5):
    return demonstrations(problems(num_rows, seed, (1, 2)))


def make_trainer(model, tokenizer, tmp_path, reward, rows=None, other_rewards=(), lora=None, **kwargs):
    defaults = {
        "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 24, "max_steps": 2, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False,
    }  # fmt: skip
    args = GRPOConfig(str(tmp_path), **{**defaults, **kwargs})
    return RewritingAgentTrainer(
        model, [reward, *other_rewards], args, rows or agent_dataset(training_rows(), verify, guided_template=GUIDED_PROMPT),
        processing_class=tokenizer, peft_config=LoraConfig(**LORA, **(lora or {})),
    )  # fmt: skip


def verify(completions, answers):
    """Verdicts by the text's length: a random model writes no right answers."""
    return [("correct", "wrong", "timeout", "correct", "correct")[len(c) % 5] for c in completions]


def candidates_of(tokenizer, num_groups=3, size=4, seed=0):
    """Columns as TRL hands them to a reward: groups that are interleaved, texts of random words, one in ten cut."""
    rng, rows = random.Random(seed), agent_dataset(training_rows(num_groups), verify, guided_template=GUIDED_PROMPT)
    columns = {name: [] for name in ("prompts", "completions", "completion_ids", "answer", "qa_prompt", "problem")}
    for i in range(num_groups * size):
        row = rows[i % num_groups]
        text = "".join(rng.choice("0123456789+-= so") for _ in range(rng.randint(3, 12)))
        ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * (i % 10 != 7)
        for name, value in zip(columns, (row["prompt"], [{"role": "assistant", "content": text}], ids), strict=False):
            columns[name].append(value)
        for name in ("answer", "qa_prompt", "problem"):
            columns[name].append(row[name])
    return columns


def gates_of(columns, tokenizer, eos=()):
    told = {"correct": 1.0, "wrong": 0.0, "timeout": None}
    verdicts = verify([c[0]["content"] for c in columns["completions"]], None)
    whole = [ids[-1] in (tokenizer.eos_token_id, *eos) for ids in columns["completion_ids"]]
    return [told[v] if w else 0.0 for v, w in zip(verdicts, whole, strict=True)]


@pytest.mark.parametrize("qa_prompt", ["own", "paper", "with variables"])
def test_reward_of_a_batch_equals_the_naive_one(tmp_path, tiny_model, tokenizer, qa_prompt):
    """Groups found by prompt, NLL and embeddings of the base although the adapter is far from zero, each term logged."""
    base, columns = copy.deepcopy(tiny_model).eval(), candidates_of(tokenizer)
    if qa_prompt == "paper":
        columns["qa_prompt"] = [PAPER_QA_PROMPT.format(problem=p) for p in columns["problem"]]
    given = {}
    if qa_prompt == "with variables":  # the template writes what the naive one holds
        written, tokenizer = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
        tokenizer.chat_template, given = tokenizer.chat_template + "{{ hint }}", {"hint": "so "}
        written.chat_template += "so "
    reward = GroupReward(verify, batch_tokens=300)
    trainer = make_trainer(
        tiny_model, tokenizer, tmp_path, reward, lora={"init_lora_weights": False}, chat_template_kwargs=given
    )
    tokenizer = written if given else tokenizer
    trainer.model.train()
    metrics, extra = {}, {}
    rewards = reward(**columns, log_metric=metrics.__setitem__, log_extra=extra.__setitem__, trainer_state=None)
    gates = gates_of(columns, tokenizer)
    expected = naive_rewards(
        base, tokenizer, columns["prompts"], columns["completion_ids"], gates, columns["qa_prompt"]
    )
    assert [r is None for r in rewards] == [e is None for e in expected] and {None, 0.0, 1.0} == set(gates)
    assert [r for r in rewards if r is not None] == pytest.approx([e for e in expected if e is not None], rel=1e-5)
    assert trainer.model.training and trainer.model.active_adapters == ["default"]
    feasible = [i for i, g in enumerate(gates) if g == 1]
    nll = [naive_base(base, tokenizer, columns["qa_prompt"][i], columns["completion_ids"][i])[0] for i in feasible]
    known = [g for g in gates if g is not None]
    assert metrics["reward/nll"] == pytest.approx(np.mean(nll), rel=1e-5)
    assert metrics["reward/accuracy"] == metrics["reward/gate"] == pytest.approx(np.mean(known))
    assert metrics["reward/feasible"] == pytest.approx(len(feasible) / len(gates))
    assert metrics["reward/unjudged"] == pytest.approx(gates.count(None) / len(gates))
    for name in ("dist", "div"):
        assert metrics[f"reward/{name}"] == pytest.approx(np.mean([extra[name][i] for i in feasible]))
    # In another order, and with a batch's groups side by side: the same rewards.
    order = sorted(range(len(rewards)), key=lambda i: json.dumps(columns["prompts"][i]))
    again = reward(**{name: [values[i] for i in order] for name, values in columns.items()})
    assert [a and round(a, 5) for a in again] == [rewards[i] and round(rewards[i], 5) for i in order]


def test_the_judge_is_the_base_and_asked_only_where_the_answer_is_right(tmp_path, tiny_model, tokenizer):
    base, columns = copy.deepcopy(tiny_model).eval(), candidates_of(tokenizer, num_groups=4, size=6)
    reward = GroupReward(verify, judge=True)
    make_trainer(tiny_model, tokenizer, tmp_path, reward, lora={"init_lora_weights": False})
    right, extra = gates_of(columns, tokenizer), {}
    reward(**columns, log_extra=extra.__setitem__)
    yes, no = (tokenizer.encode(word)[0] for word in ("YES", "NO"))
    judged = []
    for problem, completion, gate, seen in zip(
        columns["problem"], columns["completions"], right, extra["gate"], strict=True
    ):
        if gate == 1:
            text = REASONING_PROMPT.replace("{problem}", problem).replace("{completion}", completion[0]["content"])
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
            with torch.no_grad():
                logits = base(torch.tensor([ids])).logits[0, -1]
            judged.append(seen)
            assert seen == float(logits[yes] >= logits[no])
        else:
            assert seen == gate or (gate is None and math.isnan(seen))
    assert len(judged) > 5


def test_a_gold_answer_that_cannot_be_compared_with_gives_no_reward(tmp_path, tiny_model, tokenizer):
    """And a half is no third, which the paper's released verifier takes for one another."""
    with MathVerifier(num_workers=1) as verifier:
        reward = GroupReward(verifier)
        make_trainer(tiny_model, tokenizer, tmp_path, reward)
        texts = ["so \\boxed{\\frac{1}{2}}", "so \\boxed{\\frac{1}{3}}", "so it is", "so \\boxed{0.5}"]
        columns = {
            "prompts": [[{"role": "user", "content": "a"}]] * 4 + [[{"role": "user", "content": "b"}]] * 4,
            "completions": [[{"role": "assistant", "content": text}] for text in texts * 2],
            "completion_ids": [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts * 2],
            "answer": ["\\frac{1}{2}"] * 4 + ["\\frac{1}{"] * 4,
            "qa_prompt": [[{"role": "user", "content": "What is half of one?"}]] * 8, "problem": ["What is half of one?"] * 8,
        }  # fmt: skip
        rewards = reward(**columns)
        assert rewards[1] == rewards[2] == 0.0 and min(rewards[0], rewards[3]) >= 1
        assert rewards[4:] == [None] * 4
        demos = [{"problem": "p", "solution": "\\boxed{3}"}]
        with pytest.warns(UserWarning, match="1 of 2 rows are left out .* 1 no gold answer"):
            assert len(agent_dataset([*demos, {"problem": "p", "solution": "because"}], verifier)) == 1
        with pytest.warns(UserWarning, match="1 have prompts of more than 100 tokens"):
            long = [{"problem": "why " * 90, "solution": "\\boxed{3}"}, *demos]
            agent_dataset(long, verifier, guided_template="{problem}{solution}", processing_class=tokenizer, max_prompt_length=100)  # fmt: skip


def test_the_verifier_is_given_the_columns_that_it_names(tmp_path, tiny_model, tokenizer):
    """The agent's rows keep them, also one that is called as a column of ours."""

    class ReadsTheRow:
        columns = ("choices", "problem", "nowhere")

        def verify(self, completions, answers, choices, problem, nowhere):
            assert nowhere == [None] * len(answers)
            return [c[-1] == choice[int(a)] == p[-1] for c, a, choice, p in zip(completions, answers, choices, problem, strict=True)]  # fmt: skip

    demos = [{"problem": f"which {c}", "solution": c, "answer": i, "choices": ["a", "b"]} for i, c in enumerate("ab")]
    for given in (demos, Dataset.from_list(demos)):
        rows = agent_dataset(given, ReadsTheRow())
        assert rows["row"] == [{"choices": ["a", "b"], "problem": f"which {c}"} for c in "ab"]
    assert "row" not in agent_dataset(demos, verify).column_names
    reward = GroupReward(ReadsTheRow())
    make_trainer(tiny_model, tokenizer, tmp_path, reward, rows)
    columns = {name: [row[name] for row in rows for _ in "ab"] for name in ("qa_prompt", "problem", "answer", "row")}
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in ("so a", "so b", "so a", "so b")]
    rewards = reward([row["prompt"] for row in rows for _ in "ab"], ids, **columns)
    assert [reward > 0 for reward in rewards] == [True, False, False, True]


def test_what_could_not_be_judged_has_no_gradient_beside_other_rewards_either(tmp_path, tiny_model, tokenizer):
    """GRPO leaves out what no function rewards; of the others it adds up what there is."""

    class Late(GroupReward):
        def __call__(self, prompts, **_):
            return [None if i % 4 == 0 else float(i % 4) for i in range(len(prompts))]

    def constant(completions, **_):
        return [5.0] * len(completions)

    alone = make_trainer(copy.deepcopy(tiny_model), tokenizer, tmp_path, Late(verify), max_steps=1)
    beside = make_trainer(
        copy.deepcopy(tiny_model), tokenizer, tmp_path, Late(verify), other_rewards=[constant], max_steps=1
    )
    for trainer in (alone, beside):
        trainer.train()
    assert list(beside._logs["advantages"]) == pytest.approx(list(alone._logs["advantages"]), abs=1e-5)
    assert list(beside._logs["advantages"])[::4] == [0.0] and list(beside._logs["advantages"])[1] != 0


def test_what_cannot_work_is_refused(tmp_path, tiny_model, tokenizer):
    with pytest.raises(ValueError, match="no model yet"):
        GroupReward(verify)(**candidates_of(tokenizer))
    with pytest.raises(ValueError, match="lambda_div=-1"):
        GroupReward(verify, lambda_div=-1)
    with pytest.raises(ValueError, match="init_lora_weights='pissa_niter_2', which takes a part out of the frozen"):
        lora = {"init_lora_weights": "pissa_niter_2"}
        make_trainer(copy.deepcopy(tiny_model), tokenizer, tmp_path, GroupReward(verify), lora=lora)
    with pytest.raises(ValueError, match="bias='all': biases that are trained stay changed"):
        make_trainer(copy.deepcopy(tiny_model), tokenizer, tmp_path, GroupReward(verify), lora={"bias": "all"})
    with pytest.raises(ValueError, match="switching the adapter off"):
        RewritingAgentTrainer(
            tiny_model, GroupReward(verify), GRPOConfig(str(tmp_path), use_cpu=True, bf16=False),
            agent_dataset(training_rows(), verify), processing_class=tokenizer,
        )  # fmt: skip


def test_embeddings_of_another_model(tmp_path, tiny_model, tokenizer):
    """`embed` is what a SentenceTransformer's `encode` is; here letters are counted."""
    columns, gates = candidates_of(tokenizer), None

    def embed(texts):
        return np.array([[text.count(letter) + 0.1 for letter in "0123456789"] for text in texts])

    reward = GroupReward(verify, embed=embed)
    make_trainer(tiny_model, tokenizer, tmp_path, reward)
    extra = {}
    reward(**columns, log_extra=extra.__setitem__)
    gates = gates_of(columns, tokenizer)
    for prompt in {json.dumps(p) for p in columns["prompts"]}:
        members = [i for i, p in enumerate(columns["prompts"]) if json.dumps(p) == prompt]
        vectors = embed([columns["completions"][i][0]["content"] for i in members]).tolist()
        expected = naive_div(vectors, [gates[i] == 1 for i in members])
        assert [extra["div"][i] for i in members] == pytest.approx(expected, abs=1e-6)


# ---- GRPO ----


class Recorder:
    """A reward of nothing that keeps what TRL hands to every reward."""

    __name__ = "recorder"

    def __init__(self):
        self.batches = []

    def __call__(self, log_metric, log_extra, trainer_state, **columns):
        self.batches.append(columns)
        return [None] * len(columns["prompts"])


def kept(reward):
    """`reward`, with what it returned in `returned`."""
    call, returned = GroupReward.__call__, []

    class Kept(GroupReward):
        def __call__(self, **columns):
            returned.append(call(self, **columns))
            return returned[-1]

    reward.__class__ = Kept
    return returned


# A random model would not come to an end within 24 tokens.
EOS = list(range(7, 490, 11))


def assert_naive(base, tokenizer, columns, returned):
    gates = gates_of(columns, tokenizer, EOS)
    expected = naive_rewards(
        base, tokenizer, columns["prompts"], columns["completion_ids"], gates, columns["qa_prompt"]
    )
    assert [r is None for r in returned] == [e is None for e in expected]
    known = [(r, e) for r, e in zip(returned, expected, strict=True) if e is not None]
    assert [r for r, _ in known] == pytest.approx([e for _, e in known], rel=1e-4)
    return sum(e > 0 for _, e in known)


def test_grpo_trains_the_adapter_and_resumes(tmp_path, tiny_model, tokenizer):
    """Several prompts a batch, two accumulated batches, one generation for two updates: every group is whole; a resumed run is the same."""
    tiny_model.generation_config.eos_token_id = EOS
    base = copy.deepcopy(tiny_model).eval()
    settings = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_generations": 4, "max_steps": 4,
        "save_strategy": "steps", "save_steps": 2, "beta": 0.01, "reward_weights": [1.0, 0.0],
    }  # fmt: skip
    runs = []
    for name in ("whole", "resumed"):
        reward, recorder = GroupReward(verify), Recorder()
        returned = kept(reward)
        model, rows = copy.deepcopy(tiny_model), agent_dataset(training_rows(8), verify, guided_template=GUIDED_PROMPT)
        trainer = make_trainer(model, tokenizer, tmp_path / name, reward, rows, other_rewards=[recorder], **settings)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2") if name == "resumed" else None)
        runs.append((trainer, recorder, returned))
    (trainer, recorder, returned), (resumed, later, again) = runs
    assert [len(batch["prompts"]) for batch in recorder.batches] == [16, 16], "four prompts at a time"
    feasible = [assert_naive(base, tokenizer, *pair) for pair in zip(recorder.batches, returned, strict=True)]
    assert min(feasible) > 2
    history = [e for e in trainer.state.log_history if "reward" in e]
    assert history[0]["reward"] == pytest.approx(np.mean([r for r in returned[0] if r is not None]), rel=1e-5)
    assert {"reward/accuracy", "reward/gate", "reward/feasible", "reward/unjudged", "reward/dist", "reward/div", "reward/nll"} <= set(history[0])  # fmt: skip
    # The resumed run has the second batch before it, not the first, and the first one's log behind it.
    assert [batch["prompts"] for batch in later.batches] == [recorder.batches[1]["prompts"]]
    assert again == returned[1:]
    for (name, p), q in zip(trainer.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)
    assert resumed.state.global_step == 4 and resumed.state.log_history[:2] == trainer.state.log_history[:2]
    assert min(p.abs().max() for name, p in trainer.model.named_parameters() if "lora_B" in name) > 0
    with trainer.model.disable_adapter():
        ids = torch.tensor([tokenizer("2+2?")["input_ids"]])
        torch.testing.assert_close(trainer.model(ids).logits, base(ids).logits)


def test_a_candidate_ends_where_the_chat_template_ends_a_turn(tmp_path, policy):
    """As in a rewrite with the agent; tokenizer and generation config name another token, which this model never writes."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    end, recorder = tokenizer.convert_tokens_to_ids("<|im_end|>"), Recorder()
    settings = {"max_steps": 1, "max_completion_length": 64, "reward_weights": [1.0, 0.0]}
    reward = GroupReward(verify)
    returned = kept(reward)
    trainer = make_trainer(model, tokenizer, tmp_path, reward, other_rewards=[recorder], **settings)
    trainer.train()
    (batch,), (rewards,) = recorder.batches, returned
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != end
    for ids, (turn,) in zip(batch["completion_ids"], batch["completions"], strict=True):
        assert ids[-1] == end and end not in ids[:-1] and turn["content"] == tokenizer.decode(ids[:-1])
    assert trainer.state.log_history[0]["completions/clipped_ratio"] == 0
    told = verify([turn["content"] for (turn,) in batch["completions"]], None)
    assert [r is None or r > 0 for r in rewards] == [verdict != "wrong" for verdict in told]
    # vLLM is told in its own words, beside what the user told it.
    trainer.use_vllm, trainer.vllm_generation = True, SimpleNamespace(generation_kwargs={"stop_token_ids": [9]})
    trainer._stop_at_the_end_of_a_turn()
    assert trainer.vllm_generation.generation_kwargs == {"stop_token_ids": [tokenizer.eos_token_id, end, 9]}


def one_of_some_processes(model_name, out, processes):
    """Rewards of fixed candidates with their metrics, then what GRPO draws and its rewards, gathered; nothing but in the first process."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_name), AutoTokenizer.from_pretrained(model_name)
    reward, recorder = GroupReward(verify), Recorder()
    # with two of them 6 rows each and 4 to a prompt: a group lies in both
    settings = {"per_device_train_batch_size": 12 // processes, "max_steps": 1, "reward_weights": [1.0, 0.0]}
    trainer = make_trainer(model, tokenizer, out, reward, other_rewards=[recorder], **settings)
    rank, metrics = trainer.accelerator.process_index, {}
    assert trainer.accelerator.num_processes == processes
    columns = candidates_of(tokenizer, num_groups=3, size=4)
    share = slice(rank * 12 // processes, (rank + 1) * 12 // processes)
    fixed = reward(**{name: values[share] for name, values in columns.items()}, log_metric=metrics.__setitem__)
    returned = kept(reward)
    trainer.train()
    (batch,) = recorder.batches
    drawn = gather_object([dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)])
    result = gather_object(fixed), metrics, drawn, gather_object(returned[0])
    return result if rank == 0 else None


@pytest.mark.slow
def test_two_processes_give_the_rewards_of_one(tmp_path, tiny_model, tokenizer):
    """As torchrun starts them, gloo, groups that lie in both: fixed candidates, then what GRPO draws."""
    tiny_model.generation_config.eos_token_id = EOS
    base = copy.deepcopy(tiny_model).eval()
    tiny_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model, out = str(tmp_path / "model"), str(tmp_path / "two")
    (two, metrics2, drawn, returned), _ = in_two_processes(one_of_some_processes, model, out, 2)
    one, metrics, *_ = one_of_some_processes(model, str(tmp_path / "one"), 1)
    assert [r is None for r in one] == [r is None for r in two] and metrics == pytest.approx(metrics2, rel=1e-5)
    assert [r for r in one if r is not None] == pytest.approx([r for r in two if r is not None], rel=1e-5)
    columns = {name: [row[name] for row in drawn] for name in drawn[0]}
    assert len(drawn) == 12 and json.dumps(columns["prompts"][4]) == json.dumps(columns["prompts"][7]), (
        "one group in both"
    )
    assert assert_naive(base, tokenizer, columns, returned) > 0


# ---- the adapter as a sampler ----


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter on the quickstart's policy that is far from nothing, but still writes answers."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(POLICY)
    adapted = get_peft_model(model, LoraConfig(**{**LORA, "r": 5}, init_lora_weights=False))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.mul_(0.1)
    directory = tmp_path_factory.mktemp("adapter") / "agent"
    adapted.save_pretrained(directory)
    return str(directory)


def test_transformers_switches_the_adapter_for_each_batch(adapter, tokenizer, tmp_path):
    """Draws of the base are those without an adapter; the other's log-probs are the adapted model's."""
    sampler, wanted = TransformersSampler(POLICY), requests(6)
    alone = drain(TransformersSampler(POLICY), wanted)
    agent = sampler.with_adapter(adapter)
    for request in wanted:
        sampler.submit(request)
        agent.submit(request)
    ours, theirs = ({c.id: c for c in s.poll()} for s in (sampler, agent))
    assert drawn_ids(ours) == drawn_ids(alone)
    for name, completion in ours.items():
        assert completion.log_probs == pytest.approx(alone[name].log_probs, abs=1e-5)
        assert completion.log_probs[0] != pytest.approx(theirs[name].log_probs[0], abs=1e-5)
    assert agent.name == adapter and agent.revision.startswith(sampler.revision + "+")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(POLICY), adapter).eval()
    for request in wanted:
        prompt = tokenizer.apply_chat_template(request.prompt, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        drawn = torch.tensor(theirs[request.id].log_probs)
        expected = forward_log_probs(adapted, prompt, theirs[request.id].completion_ids)
        torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="has an adapter already"):
        sampler.with_adapter(adapter)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM"}))
    for directory, error in ((tmp_path, "PROMPT_TUNING; only LoRA"), (tmp_path / "none", "no such directory")):
        with pytest.raises((ValueError, FileNotFoundError), match=error):
            TransformersSampler(POLICY).with_adapter(str(directory))


@needs_vllm
@pytest.mark.slow
def test_two_samplers_share_a_vllm_engine(engine, adapter):
    """Requests of both at once: each sampler gets its own back, drawn as if it were alone."""
    plain, alone = engine("vllm"), engine("vllm", adapter=adapter)
    with pytest.raises(ValueError, match="started without LoRA: pass enable_lora=True, max_lora_rank=8"):
        plain.with_adapter(adapter)
    sampler = engine("vllm", enable_lora=True, max_lora_rank=8)
    agent = sampler.with_adapter(adapter)
    assert (agent.name, agent.revision) == (alone.name, alone.revision)
    wanted = requests(4)
    for request in wanted:
        sampler.submit(request)
    others = [type(r)(f"agent-{r.id}", r.prompt, r.seed, r.params) for r in wanted]
    for request in others:
        agent.submit(request)
    sampler.abort("r3")
    theirs, ours = [], []
    while finished := agent.poll():
        theirs += finished
    while finished := sampler.poll():
        ours += finished
    assert {c.id for c in ours} == {"r0", "r1", "r2"} and {c.id for c in theirs} == {r.id for r in others}
    assert {c.id: c.completion_ids for c in ours} == {
        k: v for k, v in drawn_ids(drain(plain, wanted)).items() if k != "r3"
    }
    assert {c.id[6:]: c.completion_ids for c in theirs} == drawn_ids(drain(alone, wanted))
    agent.close()  # the engine is the other's
    assert len(drain(sampler, wanted)) == 4


@needs_vllm
@pytest.mark.slow
def test_an_openai_server_is_asked_for_the_adapter_by_its_name(engine):
    sampler = engine("openai")
    with pytest.raises(ValueError, match="does not serve 'agent'"):
        sampler.with_adapter("agent")
    other = sampler.with_adapter(sampler.name)  # a name that is served
    assert other.revision == "unknown+unknown" or other.revision.startswith("unknown+")
    assert drawn_ids(drain(other, requests(3))) == drawn_ids(drain(sampler, requests(3)))
    other.close()
    assert len(drain(sampler, requests(2))) == 2


def rewriter(output_dir, adapter, batch_size=8, **kwargs):
    sampler = TransformersSampler(POLICY, batch_size=batch_size)
    args = RewriteConfig(str(output_dir), **{"num_generations": 2, "max_completion_length": 96, "guided_prompt": GUIDED_PROMPT, **kwargs})  # fmt: skip
    return DataRewriter(POLICY, args, sampler=sampler, guided_sampler=adapter and sampler.with_adapter(adapter))


def rewrite_slowly(output_dir, adapter):
    rewriter(output_dir, adapter, batch_size=4).rewrite(mixed_rows())


def mixed_rows():
    return demonstrations(problems(16, 9, (3, 5), p_hard=1.0))


@pytest.mark.slow
def test_guided_rows_are_the_agents(tmp_path, adapter, tokenizer, process):
    """Which sampler drew a row is in it; neither the batch size nor a kill changes one; another adapter is refused."""
    out = rewriter(tmp_path / "run", adapter).rewrite(mixed_rows())
    by_source = {
        source: out.filter(lambda row, s=source: row["source"] == s) for source in ("self", "guided", "expert")
    }
    assert min(len(by_source["self"]), len(by_source["guided"])) > 1
    base = TransformersSampler(POLICY)
    names = [{Path(name).name} for name in (base.name, adapter)]  # whose directory it is in is nobody's business
    assert [set(by_source[source]["model"]) for source in ("self", "guided")] == names
    assert set(by_source["self"]["model_revision"]) == {base.revision}
    (revision,) = set(by_source["guided"]["model_revision"])
    assert revision.startswith(base.revision + "+")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(POLICY), adapter).eval()
    for row in by_source["guided"]:
        prompt = tokenizer.apply_chat_template(row["behavior_prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]  # fmt: skip
        drawn = torch.tensor(row["behavior_log_probs"])
        torch.testing.assert_close(forward_log_probs(adapted, prompt, row["completion_ids"]), drawn, atol=1e-4, rtol=1e-4)  # fmt: skip
    child, journal = process(rewrite_slowly, tmp_path / "killed", adapter), tmp_path / "killed" / "journal.jsonl"
    while not (journal.exists() and b'"guided"' in journal.read_bytes().partition(b"\n")[2]):
        assert child.is_alive(), child.log.read_text()
        time.sleep(0.02)
    child.kill()
    child.join()
    again = rewriter(tmp_path / "killed", adapter, batch_size=64).rewrite(mixed_rows())
    for a, b in zip(out, again, strict=True):
        assert a | {"behavior_log_probs": None} == b | {"behavior_log_probs": None}
    for other in (None, adapter + "-2"):
        if other:
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(POLICY), adapter).save_pretrained(other)
        with pytest.raises(ValueError, match="`rewriter_adapter` was"):
            rewriter(tmp_path / "run", other).rewrite(mixed_rows())
    # A trainer with its own adapter off is the base, which has not drawn them.
    config = ImportanceWeightedSFTConfig(
        str(tmp_path / "sft"),
        objective="iw",
        precompute_behavior_log_probs=True,
        use_cpu=True,
        bf16=False,
        max_steps=1,
    )
    with pytest.raises(ValueError, match=r"sampled with the adapter .* Set precompute_behavior_log_probs=False"):
        ImportanceWeightedSFTTrainer(POLICY, config, train_dataset=out, processing_class=tokenizer)


@pytest.mark.slow
def test_command_trains_pushes_and_rewrites(tmp_path, hub, command):
    """From demonstrations to rows by way of the Hub: `agent`, its card, and the command it prints last, with the adapter's Hub id."""
    data = tmp_path / "demos.jsonl"
    Dataset.from_list(mixed_rows()).to_json(data)
    options = [
        "--model_name_or_path", POLICY, "--dataset_name", str(data), "--max_rows", "8", "--guided_prompt", GUIDED_PROMPT,
    ]  # fmt: skip
    argv = [
        *options, "--output_dir", str(tmp_path / "agent"), "--solve_prompt", "{problem}", "--use_cpu", "--bf16", "False", "--max_steps", "2", "--save_steps", "1",
        "--logging_steps", "1", "--num_generations", "4", "--per_device_train_batch_size", "8", "--learning_rate", "3e-3", "--max_completion_length", "96",
        "--lora_r", "4", "--disable_tqdm", "True", "--push_to_hub", "--hub_model_id", "me/agent", "--dtype", "float32",
    ]  # fmt: skip
    done = command("agent", *argv)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"output_dir: {tmp_path}/agent" and "--rewriter_adapter me/agent" in "\n".join(lines[-3:])
    pushed = hub.repos["models", "me/agent"].at("main")[1]
    card = pushed["README.md"].decode()
    assert "--rewriter_adapter me/agent --stages guided" in card and GUIDED_PROMPT in card and "reward/nll" in card
    assert (
        "LORA, r 4" in card and "@misc{wang2026patch," in card and "library_name: peft" in card and "None" not in card
    )
    # The same under `accelerate launch`, from the last checkpoint: one more step.
    argv[argv.index("--max_steps") + 1] = "3"
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "examples/train_agent.py",
    ]
    environment = {
        **os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    resume = [*launch, *argv, "--resume_from_checkpoint", "last"]
    done = subprocess.run(resume, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "agent" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "reward" in entry] == [1, 2, 3]
    rewrite = [
        "rewrite",
        *options,
        "--rewriter_adapter",
        "me/agent",
        "--num_generations",
        "1",
        "--max_completion_length",
        "96",
    ]
    assert cli.main([*rewrite, "--output_dir", str(tmp_path / "run"), "--stages", "guided"]) == 0
    rows = load_dataset(str(tmp_path / "run" / "dataset"), split="train")
    guided = rows.filter(lambda row: row["source"] == "guided")
    sha = hub.repos["models", "me/agent"].heads["main"]
    assert len(rows) == 8 and set(guided["model"]) == {"me/agent"} and guided[0]["model_revision"].endswith("+" + sha)
    assert "rewriter_adapter: me/agent" in (tmp_path / "run" / "run_config.yaml").read_text()
    assert cli.main([*rewrite, "--output_dir", str(tmp_path / "self"), "--stages", "self"]) == 2
    assert cli.main(["push", str(tmp_path / "run"), "--hub_dataset_id", "me/rows"]) == 0
    card = hub.repos["datasets", "me/rows"].at("main")[1]["README.md"].decode()
    assert f"[me/agent](https://huggingface.co/me/agent), revision `{guided[0]['model_revision']}`" in card


def test_preset_is_the_papers(monkeypatch):
    """504 prompts a generation and 252 an update on any number of processes that can share them; flags win."""
    from trl_offpolicy.cli import agent

    seen = []
    monkeypatch.setattr(
        agent, "_train", lambda *parsed: seen.append(parsed) or (_ for _ in ()).throw(KeyboardInterrupt)
    )
    argv = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", "--use_cpu", "--bf16", "False"]
    assert (
        agent.agent([*argv, "--preset", "paper", "--learning_rate", "1e-5", "--judge", "False", "--verifier", "exact"])
        == 3
    )
    own, args, model_args = seen[0]
    assert (args.generation_batch_size, args.per_device_train_batch_size * args.gradient_accumulation_steps) == (
        5040,
        2520,
    )
    assert (args.num_generations, args.beta, args.max_completion_length, args.learning_rate) == (10, 0.001, 4096, 1e-5)
    assert (model_args.lora_r, model_args.lora_alpha, model_args.lora_target_modules) == (64, 32, "all-linear")
    assert (own.judge, own.lambda_dist, own.lambda_div, own.max_prompt_length) == (False, 0.35, 0.5, 2048)
    assert agent.agent([*argv, "--preset", "paper", "--num_generations", "5"]) == 3  # as in the script
    assert (seen[1][1].generation_batch_size, seen[1][1].num_generations) == (2520, 5)
    for processes in (1, 2, 4, 7, 8):
        batches = agent._batches(processes, 10)
        update = batches["per_device_train_batch_size"] * processes * batches["gradient_accumulation_steps"]
        assert update == 2520 and batches["steps_per_generation"] == 2 * batches["gradient_accumulation_steps"]
    model_args.model_revision, model_args.dtype = "v1", "bfloat16"
    own.system_prompt, own.chat_template_path, args.chat_template_kwargs = "Be brief.", "t.jinja", {"thinking": False}
    assert agent._next_command(own, args, model_args, "me/agent") == (
        "trl-offpolicy rewrite --model_name_or_path m --rewriter_adapter me/agent --dataset_name d --system_prompt 'Be brief.' "
        "--chat_template_path t.jinja --verifier exact --model_revision v1 --dtype bfloat16 --max_completion_length 4096 "
        """--chat_template_kwargs '{"thinking": false}' --stages guided --output_dir agent-rewrite"""
    )
    with pytest.raises(ValueError, match="cannot be shared by 11 processes"):
        agent._batches(11, 10)
