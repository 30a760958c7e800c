"""Candidates from anywhere, ranked by the student under the prompt that it is trained on."""

import json
import random

import pytest
import torch
from conftest import POLICY
from scripted import ScriptedSampler, rows
from test_rewriter import OtherVerifier, config, rewrite
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_offpolicy import DataRewriter, TransformersSampler
from trl_offpolicy.data.tokenization import encode_prompt
from trl_offpolicy.sampling.sampler import Completion, SamplerError


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(POLICY)


class Student(ScriptedSampler):
    """
    A scripted sampler that can be asked for log-probs of texts. A text's score depends on it alone: copies of the
    demonstration, which are likeliest when they are drawn, are the least likely ones.
    """

    def __init__(self, tokenizer, fails=False, **kwargs):
        super().__init__(**kwargs)
        self.processing_class, self.fails, self.asked = tokenizer, fails, []

    def completion(self, request):
        c = super().completion(request)
        text = request.prompt[-1]["content"]
        copies = "Teacher" in text and random.Random(request.seed + 1).random() < 0.5
        if copies:
            text = text.split("Teacher's solution (for reference):\n")[1].split("\n\nNow")[0]
            c = Completion(c.id, text, c.completion_ids, [], "stop")
        ids = self.processing_class(c.text)["input_ids"] + [self.processing_class.eos_token_id]
        return Completion(c.id, c.text, ids, [-0.01 if copies else -0.5] * len(ids), c.finish_reason)

    def token_log_probs(self, pairs):
        self.asked += pairs
        if self.fails and pairs:
            raise SamplerError("gone")
        return [
            [self.score(self.processing_class.decode(ids, skip_special_tokens=True))] * len(ids) for _, ids in pairs
        ]

    @staticmethod
    def score(text):
        return -3.0 if "demonstration" in text else -1.0 - random.Random(text).random()


RANKED = {"selection": "max_log_prob", "max_guided_copy": 1.0, "min_guided_length": 0.0}


@pytest.fixture
def naive_log_probs():
    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)

    @torch.no_grad()
    def of(prompt, target):
        log_probs = model(torch.tensor([prompt + target])).logits[0].float().log_softmax(-1)
        return [log_probs[len(prompt) + t - 1, token].item() for t, token in enumerate(target)]

    return of


def test_a_copy_of_the_reference_has_the_highest_mu_and_loses(tmp_path, tokenizer):
    data, student = rows(40), Student(tokenizer, p_self=0.1, p_guided=0.7)
    rewritten, _ = rewrite(tmp_path, data, student, **RANKED)
    attempts = {}
    for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()[1:]:
        entry = json.loads(line)
        if entry["stage"] == "guided" and entry["verdict"] == "correct":
            attempts.setdefault(entry["id"], []).append(entry)
    lost = 0
    for row in rewritten:
        if row["source"] == "guided":
            best = max(attempts[row["id"]], key=lambda e: student.score(e["text"]))
            assert row["completion"][0]["content"] == best["text"]
            ids = row["completion_ids"]
            assert row["initial_log_prob"] == pytest.approx(student.score(best["text"]) * len(ids), abs=1e-4)
            likeliest = max(attempts[row["id"]], key=lambda e: e["log_prob"])
            lost += "demonstration" in likeliest["text"] and likeliest is not best
            assert row["behavior_log_probs"] == pytest.approx([best["log_prob"]] * len(ids))  # as they were drawn
        elif row["source"] == "self":
            assert row["initial_log_prob"] == pytest.approx(sum(row["behavior_log_probs"]), abs=1e-4)
        else:
            assert row["initial_log_prob"] is None
    assert lost > 5
    # Scored were the guided ones that may be kept, once each, under the prompt without the reference.
    assert len(student.asked) == sum(map(len, attempts.values()))
    prompts = {tuple(encode_prompt(tokenizer, row["prompt"])) for row in rewritten}
    assert all(tuple(prompt) in prompts for prompt, _ in student.asked)


def test_rows_of_other_runs_have_no_such_column_and_their_journal_no_such_field(tmp_path, tokenizer):
    student = Student(tokenizer)
    rewritten, _ = rewrite(tmp_path, rows(10), student)
    assert "initial_log_prob" not in rewritten.features and not student.asked
    assert "initial" not in (tmp_path / "run" / "journal.jsonl").read_text()


def test_scores_are_paid_for_once(tmp_path, tokenizer):
    """A resume asks for none of them; a journal without scores, of before there were any, is scored when it is resumed."""
    whole, _ = rewrite(tmp_path, rows(30), Student(tokenizer), **RANKED)
    resumed = Student(tokenizer)
    again, _ = rewrite(tmp_path, rows(30), resumed, **RANKED)
    assert again.to_list() == whole.to_list() and not resumed.asked and not resumed.sampled
    journal = tmp_path / "run" / "journal.jsonl"
    lines = []
    for line in map(json.loads, journal.read_text().splitlines()):  # without checksums, as they were then
        lines.append(json.dumps({k: v for k, v in line.items() if k[:8] != "initial_" and k != "crc32"}))
    journal.write_text("\n".join(lines) + "\n")
    for asked in (True, False):
        student = Student(tokenizer)
        again, _ = rewrite(tmp_path, rows(30), student, **RANKED)
        assert again.to_list() == whole.to_list() and not student.sampled and bool(student.asked) == asked


def test_rows_judged_anew_are_ranked_as_those_of_a_fresh_run(tmp_path, tokenizer):
    fresh, _ = rewrite(tmp_path / "fresh", rows(30), Student(tokenizer), verifier=OtherVerifier(), **RANKED)
    rewrite(tmp_path, rows(30), Student(tokenizer), **RANKED)
    again, _ = rewrite(tmp_path, rows(30), Student(tokenizer), verifier=OtherVerifier(), rejudge=True, **RANKED)
    assert again.to_list() == fresh.to_list() and again["source"].count("guided") > 3


def test_an_engine_that_fails_at_scores_has_lost_nothing_that_was_drawn(tmp_path, tokenizer):
    whole, _ = rewrite(tmp_path / "whole", rows(30), Student(tokenizer), **RANKED)
    failing = Student(tokenizer, fails=True)
    with pytest.raises(SamplerError, match="gone"):
        rewrite(tmp_path, rows(30), failing, **RANKED)
    lines = (tmp_path / "run" / "journal.jsonl").read_text().splitlines()
    well = Student(tokenizer)
    again, metrics = rewrite(tmp_path, rows(30), well, **RANKED)
    assert again.to_list() == whole.to_list() and well.sampled <= 30 * 8 - (len(lines) - 1)


def test_an_engine_without_scores_is_refused_before_anything_is_drawn(tmp_path, tokenizer):
    for sampler, why in (
        (ScriptedSampler(), "which tokenizer it has"),
        (Tokenized(tokenizer), "cannot tell the log-probabilities of given texts"),
    ):
        with pytest.raises(ValueError, match=f"{why}.*stages=\\['self'\\] alone"):
            rewrite(tmp_path, rows(5), sampler, selection="max_log_prob")
        assert not sampler.sampled
    rewritten, _ = rewrite(tmp_path, rows(5), sampler, selection="max_log_prob", stages=["self"])
    assert "initial_log_prob" in rewritten.features


class Tokenized(ScriptedSampler):
    def __init__(self, tokenizer):
        super().__init__()
        self.processing_class = tokenizer


def test_scores_of_a_real_policy_are_those_of_a_forward_under_the_training_prompt(
    tmp_path, naive_log_probs, tokenizer
):
    data = [
        {"problem": f"A jar holds {n} nuts. B adds 2. How many nuts?", "solution": f"\\boxed{{{n + 2}}}"}
        for n in (4, 5)
    ]
    args = config(tmp_path, stages=["guided"], selection="max_log_prob", num_generations=2, max_completion_length=120, reject_mentions=False,
                  min_guided_length=0.0, max_guided_copy=1.0, reject_other_form=False)  # fmt: skip

    def every(completions, answers):
        return ["correct"] * len(completions)

    rewritten = DataRewriter(str(POLICY), args, sampler=TransformersSampler(str(POLICY)), verifier=every).rewrite(data)
    kept = [row for row in rewritten if row["source"] == "guided"]
    for row in kept:
        expected = sum(naive_log_probs(encode_prompt(tokenizer, row["prompt"]), row["completion_ids"]))
        assert row["initial_log_prob"] == pytest.approx(expected, abs=1e-3)
        assert abs(row["initial_log_prob"] - sum(row["behavior_log_probs"])) > 1e-2
    assert kept
