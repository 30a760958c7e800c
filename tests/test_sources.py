"""Candidates from anywhere, ranked by the student under the prompt that it is trained on."""

import copy
import json
import random
from collections import Counter, defaultdict

import pytest
import torch
import yaml
from conftest import POLICY
from datasets import Dataset, load_dataset
from scripted import SHOWN, ScriptedSampler, config, rewrite, rows, verify
from training import config as training_config
from training import train
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_offpolicy import (
    DataRewriter,
    DFTConfig,
    DFTTrainer,
    ImportanceWeightedSFTConfig,
    ImportanceWeightedSFTTrainer,
    RewriteConfig,
    TransformersSampler,
    measure_policy_gap,
)
from trl_offpolicy.cli.arguments import parser_for
from trl_offpolicy.cli.loop import LoopArguments
from trl_offpolicy.cli.rewrite import RewriteArguments
from trl_offpolicy.data.formats import read_rows
from trl_offpolicy.data.text_statistics import copy_ratio, ngrams
from trl_offpolicy.data.tokenization import encode_prompt
from trl_offpolicy.reporting import tables
from trl_offpolicy.reporting.report import write_report
from trl_offpolicy.rewriting.dataset_card import edited_card
from trl_offpolicy.rewriting.dry_run import shown_strategy
from trl_offpolicy.rewriting.hints import hint
from trl_offpolicy.rewriting.signed_rows import write_signed_rows
from trl_offpolicy.rewriting.strategies import STRATEGIES, rewrite_settings
from trl_offpolicy.runs.run_directory import RunDirectory
from trl_offpolicy.sampling.engine import make_teachers, read_teachers
from trl_offpolicy.sampling.sampler import Completion, Request, SamplerError, SamplingParams, attempt_seed


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
        copies = SHOWN in text and random.Random(request.seed + 1).random() < 0.5
        if copies:
            text = text.split("only you can see:\n\n")[1].split("\n\nAnswer as if")[0]
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


def lenient(completions, answers):
    """Another verifier, for which answers that end in the same digit are equal."""
    ends = ((c.rstrip("}")[-1:], a[-1:]) for c, a in zip(completions, answers, strict=True))
    return ["correct" if own == gold else "wrong" for own, gold in ends]


def test_rows_judged_anew_are_ranked_as_those_of_a_fresh_run(tmp_path, tokenizer):
    fresh, _ = rewrite(tmp_path / "fresh", rows(30), Student(tokenizer), verifier=lenient, **RANKED)
    rewrite(tmp_path, rows(30), Student(tokenizer), **RANKED)
    again, _ = rewrite(tmp_path, rows(30), Student(tokenizer), verifier=lenient, rejudge=True, **RANKED)
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


# ---- strategies ----


class Sums(Student):
    """Says one of three sums, in ever other words; in a tenth of all cases it speaks of its response."""

    spoils = 0.1

    def completion(self, request):
        rng, prompt = random.Random(request.seed), request.prompt[-1]["content"]
        gold = int(prompt.split("gold:")[1].split()[0])
        answer = (
            gold
            if rng.random() < (self.p_guided if "Hint" in prompt or SHOWN in prompt else self.p_self)
            else gold + 1
        )
        self.sampled += 1
        text = f"{(n := rng.randrange(3))} + {answer - n} = {answer}, says {rng.random()} \\boxed{{{answer}}}"
        text = f"My response: {text}" if rng.random() < self.spoils else text
        ids = [*self.processing_class(text)["input_ids"], self.processing_class.eos_token_id]
        return Completion(request.id, text, ids, [self.score(text)] * len(ids), "stop")

    def asked_for(self, problem, stage, k):
        """The text of an attempt, and whether it is right."""
        words = {"guided": SHOWN}.get(stage, "Hint" if stage.startswith("guided:") else "")
        prompt = [{"role": "user", "content": f"{problem.problem} {words}"}]
        seed = attempt_seed(42, problem.id, stage, k)
        text = self.completion(Request("", prompt, seed, SamplingParams())).text
        spoils = stage.startswith("guided") and text.startswith("My response")
        return text, verify([text], [problem.answer])[0] == "correct" and not spoils


def naive(strategy, problem, student, k, teachers=()):
    """(source, text) of each row that a paper's algorithm makes of a problem, in the order in which we write them."""

    def right(stage, tries=k, by=student):
        return [t for t, correct in (by.asked_for(problem, stage, i) for i in range(tries)) if correct]

    def distinct(texts):
        return list({t[t.index(" + ") - 1 : t.index(", says")]: t for t in reversed(texts)}.values())[::-1]

    def first(*stages, tries=k):
        kept = ((s, t) for s in stages for t in right(s, tries)[:1])
        return [next(((s.partition(":")[0], t) for s, t in kept), expert)]

    expert = ("expert", problem.demonstration)
    if strategy in ("mind_the_gap", "s3ft", "star", "sdft", "iter_sft"):
        stages = {"sdft": ["guided"], "iter_sft": ["self"], "star": ["self", "guided:answer"]}.get(
            strategy, ["self", "guided"]
        )
        return first(*stages, tries=k if strategy in ("mind_the_gap", "iter_sft") else 1)
    if strategy == "rft":
        return [*(("self", t) for t in in_order(distinct(right("self")), right("self"))), expert]
    if strategy == "rest_em":
        correct, rng = right("self"), random.Random(attempt_seed(42, problem.id, "self", -1))
        drawn = [correct.pop(rng.randrange(len(correct))) for _ in list(correct)]
        return [("self", t) for t in in_order(distinct(drawn), drawn)[:2]] or [expert]
    found = [(s.partition(":")[0], t) for s in ("self", "guided") for t in right(s)]
    found += [("teacher", t) for name, by in teachers for t in right(f"teacher:{name}", by=by)]
    return [max([*found, expert], key=lambda each: student.score(each[1]))]


def in_order(some, all_of_them):
    return [text for text in all_of_them if text in some]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_preset_equals_its_paper(tmp_path, tokenizer, strategy):
    data, settings = rows(40), rewrite_settings(strategy)
    student, big = Sums(tokenizer, p_self=0.2, p_guided=0.4), Sums(tokenizer, p_self=0.6)
    teachers = {"big": big} if strategy == "grape" else {}
    given = {"max_per_problem": 2} if strategy == "rest_em" else {}
    args = config(
        tmp_path, **{"num_generations": 5, **settings, "strategy": strategy, "min_guided_length": 0.0, **given}
    )
    rewriter = DataRewriter("scripted", args, sampler=student, verifier=verify, teachers=teachers)
    rewritten = rewriter.rewrite(data)
    k = args.num_generations
    problems = list(read_rows(data, solve_prompt=args.solve_prompt))
    expected = [(p.id, *row) for p in problems for row in naive(strategy, p, student, k, teachers.items())]
    got = [(row["id"], row["source"], row["completion"][0]["content"]) for row in rewritten]
    assert got == expected
    several = settings.get("keep") == "all"
    assert ("candidate" in rewritten.features) == several and len({row[0] for row in got}) == 40
    if several:
        counted = Counter(row["id"] for row in rewritten)
        assert rewritten["candidate"] == [
            i for row_id in dict.fromkeys(rewritten["id"]) for i in range(counted[row_id])
        ]
        assert Counter(rewriter.metrics["rows"]) == Counter(rewritten["source"]) and max(counted.values()) > 1
    for row in rewritten:
        if row["source"] == "guided":
            hinted = f"The final answer is {row['answer']}." in row["behavior_prompt"][0]["content"]
            assert hinted == (strategy == "star") and "Hint" not in row["prompt"][0]["content"]
    told = yaml.safe_load((tmp_path / "run" / "run_config.yaml").read_text())
    assert told["strategy"] == strategy and told | settings == told
    # A resume draws nothing and comes to the same rows.
    idle = Sums(tokenizer)
    again = DataRewriter("scripted", args, sampler=idle, verifier=verify, teachers=teachers).rewrite(data)
    assert again.to_list() == rewritten.to_list() and not idle.sampled and not idle.asked


def test_what_chooses_among_equal_attempts_is_refused(tmp_path):
    """At temperature 0 all K are the same; a run that stops at the first correct one is told so, and goes on."""
    for several in ({"selection": "random"}, {"selection": "max_log_prob"}, {"keep": "all"}, {"min_correct": 2, "selection": "random"}):  # fmt: skip
        with pytest.raises(ValueError, match="num_generations=4: all attempts .* are the same, so .* does nothing"):
            config(tmp_path, temperature=0, **several)
        config(tmp_path, temperature=0, num_generations=1, **several | ({"min_correct": 1} if "min_correct" in several else {}))  # fmt: skip
    with pytest.warns(UserWarning, match="so where the first is not kept none is") as said:
        config(tmp_path, temperature=0).identity()
    assert len(said) == 1 and said[0].filename.endswith("scripted.py")


def test_min_correct_takes_no_lucky_solution(tmp_path, tokenizer):
    student, options = Sums(tokenizer, p_self=0.4), {"selection": "random", "min_guided_length": 0.0}
    rewritten, _ = rewrite(tmp_path, rows(30), student, min_correct=3, **options)
    for row, problem in zip(rewritten, read_rows(rows(30)), strict=True):
        correct = sum(student.asked_for(problem, "self", k)[1] for k in range(4))
        assert (row["source"] == "self") == (correct >= 3) and row["self_correct"] == correct
    for wrong, why in (({}, "stops at the first"), ({"min_correct": 5, "selection": "random"}, "never be correct")):
        with pytest.raises(ValueError, match=why):
            config(tmp_path, **{"min_correct": 2, **wrong})


def test_a_ladder_of_hints_stops_at_the_weakest_that_works(tmp_path, tokenizer):
    kinds = ["full", "answer", "first_steps"]
    student = Sums(tokenizer, p_self=0.1, p_guided=0.3)
    rewritten, metrics = rewrite(
        tmp_path, rows(40), student, hint_kind=kinds, min_guided_length=0.0, num_generations=2
    )
    stages = ["self", "guided:answer", "guided:first_steps", "guided"]
    assert list(metrics["stages"]) == stages
    reached = []
    for row, problem in zip(rewritten, read_rows(rows(40)), strict=True):
        found = (s for s in stages for k in range(2) if student.asked_for(problem, s, k)[1])
        stage = next(found, "expert")
        reached.append(stage)
        assert row["source"] == stage.partition(":")[0]
        if row["source"] == "guided":
            shown = row["behavior_prompt"][0]["content"]
            words = {"guided:answer": "final answer is", "guided:first_steps": "It begins so", "guided": SHOWN}
            assert words[stage] in shown
    counted = Counter(reached)
    assert {s: metrics["stages"][s]["rows"] for s in stages} == {s: counted[s] for s in stages} and min(
        counted.values()
    )
    assert metrics["yield"]["guided"] == sum(counted[s] for s in stages[1:])
    shown = {row[0]: row[-1] for row in tables.rewriting(metrics)[1]}
    assert all(shown[stage].endswith("%") for stage in stages[1:]) and shown["self"] == ""
    for stage in stages[1:]:  # against a count of the rows' own texts
        of = [
            (row, copy_ratio(row["completion"][0]["content"], row["solution"]))
            for row, s in zip(rewritten, reached, strict=True)
            if s == stage
        ]
        sizes = [ngrams(row["completion"][0]["content"], 4).total() for row, _ in of]
        copied = sum(ratio * size for (_, ratio), size in zip(of, sizes, strict=True))
        assert (
            metrics["stages"][stage]["copied"] == round(copied)
            and metrics["stages"][stage]["ngrams"] == sum(sizes) > 0
        )


def test_hints_are_cut_from_the_reference_by_rule():
    solution = "48/2 = <<48/2=24>>24 clips in May.\nThat makes 48+24 = 72 clips.\nSo it is 72.\n#### 72"
    (problem,) = read_rows([{"problem": "How many?", "solution": solution, "answer": "72"}])
    assert hint(problem, "answer") == "The final answer is 72."
    assert hint(problem, "first_steps") == "It begins so:\n48/2 = 24 clips in May."
    assert hint(problem, "outline") == "Its steps, without their results:\n48/2\nThat makes 48+24\nSo it is …."
    (problem,) = read_rows([{"problem": "How many?", "solution": "It is one and one more", "answer": "2"}])
    assert hint(problem, "first_steps") == "It begins so:\nIt is one …"


def test_answers_alone_are_hints_enough(tmp_path, tokenizer):
    """STaR needs no demonstrations; what else has a guided stage is refused by name."""
    data = [{"problem": f"problem {i} gold:{i} ?", "answer": str(i)} for i in range(20)]
    rewritten, metrics = rewrite(tmp_path, data, Sums(tokenizer, p_guided=0.6), **rewrite_settings("star"))
    assert Counter(rewritten["source"])["guided"] > 5 and metrics["unsolved"] == 20 - len(rewritten) > 0
    with pytest.raises(ValueError, match="strategy='grape', that is stages=.* no demonstrations"):
        rewrite(tmp_path / "grape", data, Sums(tokenizer), strategy="grape", **STRATEGIES["grape"])


# ---- teachers ----


class Named(Sums):
    name, revision, spoils = "someone/big", "7", 0.0


def test_teachers_come_last_and_their_rows_say_who_wrote_them(tmp_path, tokenizer):
    """Of two teachers the first one's attempts come first; tokens that the student shares are kept, their log-probs only if asked for."""
    student, options = Sums(tokenizer, p_self=0.1, p_guided=0.1), {"min_guided_length": 0.0, "num_generations": 2}
    for asked in (False, True):
        teachers = {"a": Named(tokenizer, p_self=0.5), "b": Named(tokenizer, p_self=0.9)}
        args = config(tmp_path / str(asked), teacher_log_probs=asked, **options)
        rewriter = DataRewriter("scripted", args, sampler=student, verifier=verify, teachers=teachers)
        rewritten = rewriter.rewrite(rows(40))
        for row, problem in zip(rewritten, read_rows(rows(40)), strict=True):
            stages = {"self": student, "guided": student, "teacher:a": teachers["a"], "teacher:b": teachers["b"]}
            drawn = ((s, *by.asked_for(problem, s, k)) for s, by in stages.items() for k in range(2))
            stage, text = next(((s, t) for s, t, right in drawn if right), ("expert", problem.demonstration))
            assert (row["source"], row["completion"][0]["content"]) == (stage.partition(":")[0], text)
            if row["source"] == "teacher":
                assert (row["model"], row["model_revision"], row["behavior_prompt"]) == ("someone/big", "7", [])
                assert row["completion_ids"] and bool(row["behavior_log_probs"]) == asked
        assert rewriter.metrics["yield"]["teacher"] == rewritten["source"].count("teacher") > 3
    header = RunDirectory(tmp_path / "True" / "run").config
    assert header["teachers"]["a"] == {"model": "someone/big", "revision": "7"}
    assert header["stages"] == ["self", "guided", "teacher:a", "teacher:b"]


def test_of_a_teacher_with_other_tokens_the_text_is_enough(tmp_path, tokenizer):
    big = Named(tokenizer, p_self=0.9)
    big.processing_class = AutoTokenizer.from_pretrained(POLICY)
    big.processing_class.add_tokens(["clever"])
    args = {"num_generations": 2, "stages": ["teacher"]}
    with pytest.raises(ValueError, match="has another tokenizer, so its log-probs are of other tokens"):
        rewriter(tmp_path, tokenizer, {"big": big}, teacher_log_probs=True, **args).rewrite(rows(10))
    with pytest.warns(UserWarning, match="'big' .* text alone, without completion_ids and behavior_log_probs"):
        rewritten = rewriter(tmp_path / "a", tokenizer, {"big": big}, **args).rewrite(rows(10))
    assert rewritten["source"].count("teacher") > 5 and not any(rewritten["completion_ids"])
    with pytest.raises(ValueError, match="stages=.*'teacher'.* and no teacher"):
        rewriter(tmp_path, tokenizer, None, **args)


def rewriter(tmp_path, tokenizer, teachers, sampler=None, **kwargs):
    args = config(tmp_path, **kwargs)
    return DataRewriter("scripted", args, sampler=sampler or Sums(tokenizer), verifier=verify, teachers=teachers)


def test_a_teacher_that_does_not_answer_is_not_wrong(tmp_path, tokenizer):
    """Its attempts are errors, which the run says and the next one tries again."""

    class Silent(Named):
        def completion(self, request):
            return Completion(request.id, "", [], [], "error", "no answer")

    args = {"num_generations": 2, "min_guided_length": 0.0}
    run = rewriter(tmp_path, tokenizer, {"big": Silent(tokenizer)}, **args)
    run.rewrite(rows(15))
    assert run.metrics["undrawn"] == run.metrics["verdicts"]["error"] > 0
    whole = rewriter(tmp_path / "whole", tokenizer, {"big": Named(tokenizer)}, **args).rewrite(rows(15))
    again = rewriter(tmp_path, tokenizer, {"big": Named(tokenizer)}, **args)
    assert again.rewrite(rows(15)).to_list() == whole.to_list() and not again.metrics["undrawn"]


# ---- several rows for a problem ----


def test_several_rows_for_a_problem_and_those_of_teachers_go_wherever_others_go(tmp_path, tiny_model, tokenizer):
    kept = {"num_generations": 4, "keep": "all", "keep_demonstration": True, "select_across": "max_initial_log_prob"}
    run = rewriter(tmp_path, tokenizer, {"big": Named(tokenizer, p_self=0.5)}, **kept)
    rewritten = run.rewrite(rows(6))
    assert {"self", "teacher", "expert"} <= set(rewritten["source"]) and len(rewritten) > 12
    gap = measure_policy_gap(tiny_model, rewritten, tokenizer)
    assert gap["teacher"]["rows"] == rewritten["source"].count("teacher") and gap["total"]["rows"] == len(rewritten)
    page = write_report([str(tmp_path / "run")], str(tmp_path / "report")).read_text()
    assert "teacher:big" in page
    directory = RunDirectory(tmp_path / "run")
    card = str(edited_card(None, directory, "me/rows", {"default": {}}, {}))
    assert "| teacher | " in card and "someone/big" in card and "`teacher`" in card
    assert sum(directory.sources.values()) == len(rewritten) and "expert" not in directory.counts.stages
    again = rewriter(tmp_path, tokenizer, {"big": Named(tokenizer)}, **kept)
    assert again.rows_so_far(rows(6), tmp_path / "r.parquet") == 6
    assert Dataset.from_parquet(str(tmp_path / "r.parquet")).to_list() == rewritten.to_list()


def test_a_step_on_the_rows_of_a_run_is_that_of_a_naive_loss(tmp_path, tiny_model, tokenizer):
    """Of self, guided, teacher and expert, several for a problem; and of what the same run got right and wrong."""
    kept = {"num_generations": 3, "keep": "all", "keep_demonstration": True, "min_guided_length": 0.0}
    teachers, student = {"big": Named(tokenizer, p_self=0.9)}, Sums(tokenizer, p_self=0.2, p_guided=0.3)
    run = rewriter(tmp_path, tokenizer, teachers, student, teacher_log_probs=True, **kept)
    rewritten = run.rewrite(rows(8))
    assert set(rewritten["source"]) == {"self", "guided", "teacher", "expert"} and len(rewritten) > 12
    write_signed_rows(tmp_path / "run", tmp_path / "signed", max_per_problem=2)
    signed = load_dataset(str(tmp_path / "signed"), split="train")
    assert set(signed["reward"]) == {1.0, -1.0}
    by_source = {"self": "iw", "guided": "iw", "teacher": "dft"}  # and nll for the demonstrations
    for trainer, objective, data in (
        (ImportanceWeightedSFTTrainer, None, rewritten),
        (ImportanceWeightedSFTTrainer, by_source, rewritten),
        (DFTTrainer, None, rewritten),
        (ImportanceWeightedSFTTrainer, "topr", signed),
    ):
        whole = {"per_device_train_batch_size": len(data), "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1e9, "max_steps": 1}  # fmt: skip
        config_class = DFTConfig if trainer is DFTTrainer else ImportanceWeightedSFTConfig
        args = training_config(config_class, tmp_path / "trained", objective=objective, max_length=None, **whole)
        model, reference = (copy.deepcopy(tiny_model) for _ in range(2))
        trained = trainer(model, args, train_dataset=data, processing_class=tokenizer)
        (logged,) = [entry["loss"] for entry in train(trained)[1]]
        chosen = objective or ("dft" if trainer is DFTTrainer else "iw")
        loss = naive_loss(reference, tokenizer, data, chosen)
        assert logged == pytest.approx(loss.item(), abs=1e-4) and trained.train_sources == Counter(data["source"])
        loss.backward()
        for p, q in zip(trained.model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p, q - 0.1 * q.grad, atol=1e-6, rtol=1e-4)


def naive_loss(model, tokenizer, data, objective):
    """One example after another, from the row's text and columns; a mean over tokens, or for `topr` over examples."""
    losses, tokens = [], []
    for row in data:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        target = row["completion_ids"] or tokenizer(row["completion"][0]["content"] + "<|im_end|>")["input_ids"]
        log_p = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        log_p = log_p[range(len(target)), target]
        p, mu = log_p.detach().exp(), torch.tensor(row["behavior_log_probs"])
        weight = objective.get(row["source"], "nll") if isinstance(objective, dict) else objective
        if weight == "topr":
            weight = 1.0 if row["reward"] > 0 else -min((log_p.detach() - mu).sum().exp().item(), 1.0)
        elif weight == "iw":
            weight = (p / mu.exp()).clamp(max=3.0) if len(mu) else 1.0
        else:
            weight = p if weight == "dft" else 1.0
        losses.append(-(weight * log_p).sum())
        tokens.append(len(target))
    if objective == "topr":
        return sum(loss / n for loss, n in zip(losses, tokens, strict=True)) / len(losses)
    return sum(losses) / sum(tokens)


# ---- on the command line ----


def settings_of(argv, command="rewrite"):
    """What the command's parser makes of these arguments."""
    types = (LoopArguments if command == "loop" else RewriteArguments, RewriteConfig)
    needed = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]
    return parser_for(types, command, "", "", STRATEGIES).parse_args_and_config([*needed, *argv])


@pytest.mark.parametrize("named", [["--strategy", "rft"], ["--strategy=rft"], None])
def test_what_is_given_beside_a_strategy_wins(tmp_path, named):
    """A flag over the config file, both over the strategy, which wins over our defaults."""
    file = tmp_path / "c.yaml"
    file.write_text("num_generations: 3\nkeep_demonstration: false\n" + ("" if named else "strategy: rft\n"))
    _, config = settings_of([*(named or []), "--config", str(file), "--num_generations", "5"])
    found = config.stages, config.keep, config.keep_demonstration, config.num_generations, config.strategy
    assert found == (["self"], "all", False, 5, "rft")
    assert config.settings()["keep_demonstration"] is False  # said, so that run_config.yaml makes the same run
    assert not {"strategy", "keep", "keep_demonstration"} & config.identity().keys()
    with pytest.raises(ValueError, match="strategy.*invalid choice"):
        settings_of(["--strategy", "rtf"])


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_in_python_is_that_of_the_command_line(name):
    given = {"max_completion_length": 99, "stages": ["guided"], "seed": 3}
    _, typed = settings_of(
        ["--strategy", name, *["--max_completion_length", "99", "--stages", "guided", "--seed", "3"]]
    )
    assert RewriteConfig.from_strategy(name, "o", **given) == typed


def test_the_name_of_a_strategy_alone_sets_nothing_and_is_warned_of(tmp_path):
    with pytest.warns(
        UserWarning, match="without what makes it one: select_across of the default. RewriteConfig.from_strategy"
    ):
        config(tmp_path, strategy="grape")
    with pytest.raises(ValueError, match="strategy='grep'; use one of"):
        RewriteConfig.from_strategy("grep", str(tmp_path))


def test_a_loop_takes_its_settings_of_a_strategy():
    arguments, config = settings_of(["--strategy", "iter_sft", "--rounds", "2"], "loop")
    assert (arguments.train_from, arguments.refresh, config.stages) == ("last", "all", ["self"])
    arguments, _ = settings_of(["--strategy", "iter_sft", "--train_from", "base"], "loop")
    assert arguments.train_from == "base"
    shown = shown_strategy(config, arguments)
    assert "train_from: base (given; the strategy has last)" in shown and "refresh: all" in shown


@pytest.mark.parametrize(
    ("given", "why"),
    [(["big"], "NAME=MODEL"), (["=m"], "NAME=MODEL"), (["a=m", "a=http://h/v1"], "name of its own")],
)  # fmt: skip
def test_teachers_that_cannot_be_read(given, why):
    with pytest.raises(ValueError, match=why):
        read_teachers(given)


def test_a_teacher_that_is_no_server_needs_an_engine_that_can_be_there_twice():
    arguments, _ = settings_of(["--sampler", "vllm", "--teacher", "big=some/model"])
    assert read_teachers(arguments.teacher) == {"big": "some/model"}
    with pytest.raises(ValueError, match="one such engine.*vllm serve some/model --served-model-name big"):
        make_teachers(arguments, read_teachers(arguments.teacher), log_probs=False)


def test_the_guided_stage_retells_a_teacher(tmp_path, tokenizer):
    """Its first correct solution, else the demonstration; what no retelling is kept of, stays the teacher's; also after a resume."""
    options = {"reference_from": "teacher", "num_generations": 2, "min_guided_length": 0.0, "max_guided_copy": 1.0}
    teachers = {"a": Named(tokenizer, p_self=0.3), "b": Named(tokenizer, p_self=0.5)}

    def run(student):
        args = config(tmp_path, **options)
        return DataRewriter("scripted", args, sampler=student, verifier=verify, teachers=teachers)

    student = Sums(tokenizer, p_self=0.1, p_guided=0.4)
    first = run(student)
    rewritten = first.rewrite(rows(40))
    assert list(first.metrics["stages"]) == ["self", "teacher:a", "teacher:b", "guided"]
    kinds = Counter()
    for row, problem in zip(rewritten, read_rows(rows(40)), strict=True):
        own = [t for k in range(2) for t, right in [student.asked_for(problem, "self", k)] if right]
        taught = [
            t
            for n, by in teachers.items()
            for k in range(2)
            for t, ok in [by.asked_for(problem, f"teacher:{n}", k)]
            if ok
        ]
        retold = [t for k in range(2) for t, right in [student.asked_for(problem, "guided", k)] if right]
        expected = next(
            ((s, found[0]) for s, found in (("self", own), ("guided", retold), ("teacher", taught)) if found),
            ("expert", problem.demonstration),
        )
        assert (row["source"], row["completion"][0]["content"]) == expected
        if row["source"] == "guided":
            assert (taught or [problem.demonstration])[0] in row["behavior_prompt"][0]["content"]
        kinds[row["source"], bool(taught)] += 1
    assert min(kinds["guided", True], kinds["guided", False], kinds["teacher", True]) > 0
    idle = Sums(tokenizer)
    assert run(idle).rewrite(rows(40)).to_list() == rewritten.to_list() and not idle.sampled
    # Without the teacher's attempts, which are drawn again, those that retold them still hold; with other ones they would not.
    journal = tmp_path / "run" / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if '"stage":"teacher' not in line))
    idle = Sums(tokenizer)
    assert run(idle).rewrite(rows(40)).to_list() == rewritten.to_list() and not idle.sampled
    journal.write_text("".join(line for line in lines if '"stage":"teacher' not in line))
    others = {name: Named(tokenizer, p_self=0.0) for name in teachers}
    idle = Sums(tokenizer, p_self=0.1, p_guided=0.4)
    run_with_others = DataRewriter(
        "scripted", config(tmp_path, **options), sampler=idle, verifier=verify, teachers=others
    )
    again = run_with_others.rewrite(rows(40))
    assert "teacher" not in again["source"] and idle.sampled
    for row in again:
        if row["source"] == "guided":
            assert row["solution"] in row["behavior_prompt"][0]["content"]


@pytest.mark.parametrize("demonstration", [False, True])
def test_what_no_retelling_is_kept_of_has_the_teachers_rows_and_no_others(tmp_path, tokenizer, demonstration):
    """The demonstration is among them only where it is asked for, or alone where there is nothing else."""
    kept = {"keep": "all", "keep_demonstration": demonstration, "reference_from": "teacher", "num_generations": 3}
    teachers, student = {"a": Named(tokenizer, p_self=0.5)}, Sums(tokenizer, p_self=0.0, p_guided=0.0)
    sources = defaultdict(list)
    for row in rewriter(tmp_path, tokenizer, teachers, student, **kept).rewrite(rows(20)):
        sources[row["id"]].append(row["source"])
    taught = [of for of in sources.values() if of != ["expert"]]
    assert 20 == len(sources) > len(taught) > 10
    assert {*map(tuple, taught)} <= {("teacher",) * n + ("expert",) * demonstration for n in (1, 2, 3)}


@pytest.mark.parametrize(
    ("wrong", "why"),
    [({}, "reference_from='teacher' and no teacher"), ({"stages": ["self"]}, "`guided` retells it"),
     ({"select_across": "max_initial_log_prob"}, "would depend on it"), ({"rejudge": True}, "would depend on it")],
)  # fmt: skip
def test_what_does_not_go_with_a_teacher_as_reference(tmp_path, tokenizer, wrong, why):
    with pytest.raises(ValueError, match=why):
        rewriter(tmp_path, tokenizer, None, reference_from="teacher", **wrong)


def test_what_a_teacher_wrote_can_be_retold(tmp_path, tokenizer):
    """Where demonstrations are answers alone: a first run has teachers write solutions, a second one has them retold."""
    solved = rewriter(tmp_path / "a", tokenizer, {"big": Named(tokenizer, p_self=0.9)}, stages=["teacher"]).rewrite(
        rows(20)
    )
    told, _ = rewrite(tmp_path / "b", solved, Sums(tokenizer, p_self=0.0, p_guided=0.9), max_guided_copy=1.0)
    assert told["input_completion"] == solved["completion"] and told["input_source"] == solved["source"]
    retold = [row for row in told if row["source"] == "guided" and row["input_source"] == "teacher"]
    assert len(retold) > 5
    for row in retold:
        shown = row["input_completion"][0]["content"]
        assert "says" in shown and shown in row["behavior_prompt"][-1]["content"]


def test_shards_have_the_rows_of_the_whole(tmp_path, tokenizer):
    """Candidates of all stages, several rows for a problem, scores and teachers, in one run and in two shards of another."""
    options = {"num_generations": 3, "keep": "all", "max_per_problem": 3, "select_across": "max_initial_log_prob"}
    whole = rewriter(tmp_path / "whole", tokenizer, {"big": Named(tokenizer)}, **options)
    rows_of_whole = whole.rewrite(rows(15)).to_list()
    for shard in ("1/2", "0/2"):
        rewriter(tmp_path, tokenizer, {"big": Named(tokenizer)}, shard=shard, **options).rewrite(rows(15))
    parts = load_dataset(str(tmp_path / "run" / "dataset"), split="train")
    assert parts.to_list() == rows_of_whole and len(parts) > 20
    told = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {k: told[k] for k in ("rows", "yield", "stages")} == {
        k: whole.metrics[k] for k in ("rows", "yield", "stages")
    }
