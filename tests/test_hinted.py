"""Guided attempts in the model's own voice: each draw against a loop of two forwards a token, and what a run makes of them."""

import json
import math
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import POLICY
from draws import drain, drawn_ids, forward_log_probs, requests
from scripted import ScriptedSampler
from transformers import AutoModelForCausalLM

from trl_offpolicy import DataRewriter, ImportanceWeightedSFTConfig, ImportanceWeightedSFTTrainer, RewriteConfig
from trl_offpolicy.data.tokenization import encode_prompt
from trl_offpolicy.rewriting.dataset_card import edited_card
from trl_offpolicy.runs.journal import read_header
from trl_offpolicy.runs.run_directory import RunDirectory
from trl_offpolicy.sampling.sampler import SamplingParams
from trl_offpolicy.sampling.transformers_sampler import TransformersSampler


GUIDED_PROMPT = "{problem}\nReference: {solution}\nSolve it again in your own way."
DATA = [
    {
        "problem": f"A jar holds {n} coins. A adds 4. B makes it 3 times as many. How many coins?",
        "solution": f"We begin with {n} coins. Once A adds 4, the jar holds {n + 4}. B makes that {3 * n + 12}. So the answer is \\boxed{{{3 * n + 12}}}.",
    }
    for n in (5, 13, 21, 34)
]  # fmt: skip
KEEP_ALL = {"reject_mentions": False, "min_guided_length": 0.0, "max_guided_copy": 1.0, "reject_other_form": False}


def hinted(wanted, beta):
    """The requests with a hint before each, whose own prompts are of other lengths than those with it."""
    found = []
    for i, request in enumerate(wanted):
        content = request.prompt[0]["content"]
        hint = GUIDED_PROMPT.format(
            problem=content, solution="We begin with 5 coins. So the answer is 9. " * (i % 3 + 1)
        )
        prompt = [{"role": "user", "content": hint}]
        found.append(replace(request, prompt=prompt, unhinted_prompt=request.prompt, hint_beta=beta))
    return found


def naive(model, tokenizer, request, end):
    """One token after another from two forwards each: ids, log m and log q."""
    prompts = [encode_prompt(tokenizer, prompt) for prompt in (request.prompt, request.unhinted_prompt)]
    generator = torch.Generator().manual_seed(request.seed)
    uniform = torch.rand(request.params.max_completion_length, generator=generator, dtype=torch.float64)
    ids, log_m, log_q = [], [], []
    for u in uniform:
        with torch.no_grad():
            p, q = (model(torch.tensor([prompt + ids])).logits[0, -1].double().softmax(-1) for prompt in prompts)
        weight = min(max(request.hint_beta * -(p * p.log()).sum().item() / math.log(len(p)), 0), 1)
        m = p ** (1 - weight) * q**weight
        m = m / m.sum()
        token = int((m.cumsum(-1) <= u).sum())
        ids.append(token)
        log_m.append(m[token].log().item())
        log_q.append(q[token].log().item())
        if token == end:
            break
    return ids, log_m, log_q


@pytest.mark.parametrize(("dtype", "difference"), [("float64", 1e-5), ("float32", 1e-4)])
def test_a_draw_is_that_of_a_loop_with_two_forwards_a_token(policy, dtype, difference):
    """In float32 two forwards of the same tokens in other batches are 1e-5 apart themselves; the largest difference seen is 3e-5."""
    sampler = TransformersSampler(policy, batch_size=3, model_init_kwargs={"dtype": dtype})
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=dtype)
    end = sampler.processing_class.convert_tokens_to_ids("<|im_end|>")
    wanted = hinted(requests(4, SamplingParams(max_completion_length=12)), 2.0)
    wanted += [replace(request, id=f"{request.id} less", hint_beta=0.5) for request in wanted[:2]]
    drawn = drain(sampler, wanted)
    for request in wanted:
        ids, log_m, log_q = naive(model, sampler.processing_class, request, end)
        completion = drawn[request.id]
        assert completion.completion_ids == ids
        assert completion.log_probs == pytest.approx(log_m, abs=difference)
        assert completion.unhinted_log_probs == pytest.approx(log_q, abs=difference)


def test_without_weight_it_is_the_hinted_model_and_with_all_weight_the_unhinted_one(policy):
    sampler = TransformersSampler(policy, batch_size=4, model_init_kwargs={"dtype": "float64"})
    wanted = requests(8)
    for beta, own in ((0.0, False), (1e12, True)):
        mixed = hinted(wanted, beta)
        alone = drain(sampler, wanted if own else [replace(r, unhinted_prompt=None, hint_beta=0.0) for r in mixed])
        drawn = drain(sampler, mixed)
        assert drawn_ids(drawn) == drawn_ids(alone)
        for name, completion in drawn.items():
            assert completion.text == alone[name].text and completion.finish_reason == alone[name].finish_reason
            assert completion.log_probs == pytest.approx(alone[name].log_probs, abs=1e-5)
            assert alone[name].unhinted_log_probs is None
            if own:
                assert completion.unhinted_log_probs == pytest.approx(completion.log_probs, abs=1e-5)


def test_a_seed_gives_the_same_hinted_completion_in_any_company(engine):
    """Also beside plain requests and other betas, and where a stop text ends it."""
    params = SamplingParams(max_completion_length=24, stop=("+",))
    wanted = hinted(requests(6), 1.0) + [
        replace(r, id=f"other {i}") for i, r in enumerate((*hinted(requests(4, params), 3.0), *requests(4)))
    ]
    together = drain(engine("transformers", 16), wanted)
    assert any(c.text and "+" not in c.text for n, c in together.items() if n.startswith("other"))
    for in_flight in (1, 3):
        alone = drain(engine("transformers", in_flight), wanted[::-1])
        assert drawn_ids(alone) == drawn_ids(together)
    for completion in together.values():
        if completion.unhinted_log_probs is not None:
            assert len(completion.unhinted_log_probs) == len(completion.completion_ids)


def every(completions, answers):
    return ["correct"] * len(completions)


def run(output_dir, sampler=None, **kwargs):
    settings = {
        "stages": ["guided"],
        "num_generations": 2,
        "max_completion_length": 120,
        "guided_prompt": GUIDED_PROMPT,
    }
    args = RewriteConfig(str(output_dir), **{**settings, **KEEP_ALL, **kwargs})
    return DataRewriter(str(POLICY), args, sampler=sampler or TransformersSampler(str(POLICY)), verifier=every)


class Unscored(TransformersSampler):
    """Is asked for no score."""

    def token_log_probs(self, pairs):
        assert not pairs
        return []


def test_rows_say_how_they_were_drawn_and_are_ranked_without_a_forward(tmp_path, tokenizer):
    rewriter = run(tmp_path, Unscored(str(POLICY)), guided_decoding="hinted", hint_beta=0.5, selection="max_log_prob")
    rows = rewriter.rewrite(DATA)
    kept = [row for row in rows if row["source"] == "guided"]
    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype="float32")
    for row in kept:
        assert row["hint_beta"] == 0.5 and row["behavior_prompt"] != row["prompt"]
        log_q = forward_log_probs(model, encode_prompt(tokenizer, row["prompt"]), row["completion_ids"])
        log_p = forward_log_probs(model, encode_prompt(tokenizer, row["behavior_prompt"]), row["completion_ids"])
        assert row["initial_log_prob"] == pytest.approx(log_q.sum().item(), abs=1e-4)
        assert (torch.tensor(row["behavior_log_probs"]) - log_p).abs().max() > 1e-6
    assert kept and all(row["hint_beta"] is None for row in rows if row["source"] != "guided")
    header = read_header(tmp_path / "journal.jsonl")
    for settings in (header, yaml.safe_load((tmp_path / "run_config.yaml").read_text())):
        assert (settings["guided_decoding"], settings["hint_beta"]) == ("hinted", 0.5)
    card = str(edited_card(None, RunDirectory(tmp_path), "me/rows", {"default": {}}, {}))
    assert "β = 0.5 (`hint_beta`" in card
    with pytest.raises(ValueError, match="hint_beta"):
        run(tmp_path, guided_decoding="hinted", hint_beta=0.7, selection="max_log_prob").rewrite(DATA)


def test_beta_0_gives_the_rows_of_a_plain_run_which_names_none_of_it(tmp_path):
    plain = run(tmp_path / "plain").rewrite(DATA)
    mixed = run(tmp_path / "mixed", guided_decoding="hinted", hint_beta=0).rewrite(DATA)
    assert "hint_beta" not in plain.column_names and "guided" in plain["source"]
    for ours, theirs in zip(mixed.remove_columns("hint_beta"), plain, strict=True):
        log_probs = [row.pop("behavior_log_probs") for row in (ours, theirs)]
        assert ours == theirs and log_probs[0] == pytest.approx(log_probs[1], abs=1e-5)
    for name in ("journal.jsonl", "run_config.yaml"):
        text = (tmp_path / "plain" / name).read_text()
        assert not any(word in text for word in ("guided_decoding", "hint_beta", "initial_tokens"))


def test_training_takes_the_stored_log_probs_and_does_not_compute_others(tmp_path):
    rows = run(tmp_path / "run", guided_decoding="hinted").rewrite(DATA)
    options = {
        "output_dir": str(tmp_path / "t"),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "objective": "iw",
    }
    with pytest.raises(
        ValueError, match="Row 0 was drawn with guided_decoding='hinted'.*precompute_behavior_log_probs=False"
    ):
        args = ImportanceWeightedSFTConfig(**options, precompute_behavior_log_probs=True)
        ImportanceWeightedSFTTrainer(str(POLICY), args, train_dataset=rows)
    trainer = ImportanceWeightedSFTTrainer(str(POLICY), ImportanceWeightedSFTConfig(**options), train_dataset=rows)
    stored = [x for x in trainer.train_dataset[0]["behavior_log_probs"] if x is not None and not math.isnan(x)]
    assert stored == pytest.approx(rows[0]["behavior_log_probs"], abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"guided_decoding": "greedy"}, "use one of \\['plain', 'hinted'\\]"),
        ({"hint_beta": 2.0}, "guided_decoding='plain', which does not use it"),
        ({"guided_decoding": "hinted", "hint_beta": -1.0}, "hint_beta=-1.0; it must be a number of at least 0"),
        ({"guided_decoding": "hinted", "hint_beta": math.inf}, "hint_beta=inf"),
        ({"guided_decoding": "hinted", "stages": ["self"]}, "add the stage"),
        ({"guided_decoding": "hinted", "temperature": 0.7, "top_k": 5}, "Write temperature=1.0, top_k=0"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, settings, why):
    with pytest.raises(ValueError, match=why):
        RewriteConfig(str(tmp_path), **settings)


def test_what_cannot_draw_so_is_refused_before_anything_is_drawn(tmp_path, command):
    args = RewriteConfig(str(tmp_path / "run"), guided_decoding="hinted")
    with pytest.raises(ValueError, match="scripted.*--sampler transformers"):
        DataRewriter("M", args, sampler=ScriptedSampler())
    with pytest.raises(ValueError, match="rewriting agent"):
        DataRewriter("M", args, guided_sampler=ScriptedSampler())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DATA))
    done = command(
        "rewrite", "--model_name_or_path", str(POLICY), "--dataset_name", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "run"),
        "--sampler", "vllm", "--guided_decoding", "hinted",
    )  # fmt: skip
    assert done.returncode == 2 and "the engine --sampler vllm, which cannot draw a token" in done.stderr
    assert not (tmp_path / "run" / "journal.jsonl").exists()
