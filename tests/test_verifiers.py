"""Verifiers beyond mathematics: each claim against labels written by hand, real processes, or the judge's own forward."""

import pickle
import sys

import numpy as np
import pytest
from conftest import POLICY
from scripted import ScriptedSampler

from trl_offpolicy import MathVerifier, Verdict, evaluate
from trl_offpolicy.sampling.sampler import Completion
from trl_offpolicy.verification.code_verifier import CodeVerifier
from trl_offpolicy.verification.verifier import GoldAtFault, Judgement, Verifier, explain_with, rewards
from trl_offpolicy.verification.verifiers import (
    ExactMatchVerifier,
    JsonSchemaVerifier,
    JudgeVerifier,
    MultipleChoiceVerifier,
    NumericVerifier,
    all_of,
    any_of,
)


CHOICES = [
    ("The answer is (B).", "B", "correct"),
    ("\\boxed{\\text{(B) } 12}", "B", "correct"),
    ("\\boxed{b}", "(B)", "correct"),
    ("Answer: B. The second one", "B", "correct"),
    ("\\boxed{C}", "B", "wrong"),
    ("\\boxed{B, C}", "B", "wrong"),
    ("\\boxed{\\text{A or B}}", "B", "wrong"),
    ("\\boxed{(B) A good one}", "B", "correct"),
    ("\\boxed{B. A line segment}", "B", "correct"),
    ("\\boxed{D. I and II}", "D", "correct"),
    ("\\boxed{C) A and B}", "C", "correct"),
    ("\\boxed{C) A and B}", "A", "wrong"),
    ("The answer is B: A cat", "B", "correct"),
    ("\\boxed{B}", "B. A line", "correct"),
    ("\\boxed{A. 3, C. 5}", "A", "wrong"),
    ("Answer: A; C", "A", "wrong"),
    ("Answer: A; C", "C", "wrong"),
    ("\\boxed{A; B; and C}", "A", "wrong"),
    ("\\boxed{B; A fails}", "B", "correct"),
    ("\\boxed{B; A is wrong}", "B", "correct"),
    ("Answer: D) 5, A) 4", "D", "wrong"),
    ("\\boxed{(D) 5; (A) 4}", "D", "wrong"),
    ("\\boxed{(D) cats and (A) dogs}", "D", "wrong"),
    ("\\boxed{(B) 3, since (A) fails, (C) is too large and (D) isn't one}", "B", "correct"),
    ("\\boxed{D) 5, A) is too small}", "D", "correct"),
    ("\\boxed{\\text{(A) and (C)}}", "A", "wrong"),
    ("I cannot tell\nwhich one", "B", "unparsable"),
    ("A, B, and C are all wrong; D is right.", "A", "unparsable"),
    ("The answer is [B].", "B", "correct"),
    ("\\boxed{B. It can't be A.}", "A", "wrong"),
    ("\\boxed{B. It can't be A.}", "B", "correct"),
    ("\\boxed{B, because I checked it}", "B", "correct"),
    ("\\boxed{B - Vitamin A}", "B", "correct"),
    ("\\boxed{B - Vitamin A}", "A", "wrong"),
    ("\\boxed{E -- none of these}", "E", "correct"),
    ("\\boxed{\\text{option B: I and II only}}", "B", "correct"),
    ("\\boxed{\\text{option B: I and II only}}", "I", "wrong"),
    ("\\boxed{(C)(D)}", "C", "wrong"),
    ("\\boxed{B / C}", "B", "wrong"),
    ("\\boxed{A, B, and C}", "A", "wrong"),
    ("\\boxed{(B) because (A) fails}", "B", "correct"),
    ("\\boxed{The correct option is (D)}", "D", "correct"),
    ("\\boxed{Vitamin A}", "A", "unparsable"),
    ("\\boxed{A is incorrect}", "A", "unparsable"),
    ("\\boxed{A is wrong, B}", "A", "unparsable"),
    ("\\boxed{(A) isn't right}", "A", "unparsable"),
    ("\\boxed{A - no, B}", "A", "unparsable"),
    ("\\boxed{\\text{everything but (A)}}", "A", "unparsable"),
    ("\\boxed{A. wrong}", "A", "unparsable"),
    ("\\boxed{A line segment}", "A", "unparsable"),
    ("\\boxed{I}", "I", "correct"),
    ("\\boxed{H_2O}", "H", "unparsable"),
    ("\\boxed{E = mc^2}", "E", "unparsable"),
    ("\\boxed{B}", "42", "unparsable"),
]
TEXTS = [
    ("\\boxed{ eiffel  Tower}", "Eiffel tower", "correct"),
    ("The answer is Paris", ["paris", "city of light"], "correct"),
    ("\\boxed{Ｐａｒｉｓ}", "Paris", "correct"),
    ("\\boxed{London}", ["Paris", "Lyon"], "wrong"),
    ("\\boxed{Paris}", "", "unparsable"),
    ("\\boxed{Paris}", None, "unparsable"),
    # no character is removed, since any may be the whole difference
    ("\\boxed{5}", "-5", "wrong"),
    ("\\boxed{35}", "3.5", "wrong"),
    ("\\boxed{12}", "1/2", "wrong"),
    ("\\boxed{C}", "C++", "wrong"),
    ("\\boxed{1}", 1.0, "correct"),
    ("\\boxed{1.0}", 1, "correct"),
    ("\\boxed{10}", 1.0, "wrong"),
    ("\\boxed{0.5}", 0.5, "correct"),
    ("\\boxed{nan}", float("nan"), "unparsable"),
    ("\\boxed{x2}", "x²", "wrong"),
    ("\\boxed{105}", "10⁵", "wrong"),
]
QUANTITIES = [
    ("\\boxed{5.1 km}", "5.1e3 m", "correct"),
    ("\\boxed{5.14\\text{ km}}", "5100 m", "correct"),
    ("\\boxed{5.2 km}", "5100 m", "wrong"),
    ("\\boxed{5.1}", "5.1 km", "correct"),
    ("\\boxed{5.1 kg}", "5.1 km", "wrong"),
    ("\\boxed{36 km/h}", "10 m/s", "correct"),
    ("\\boxed{9.81 \\mathrm{m/s^2}}", "9.8 m/s^2", "correct"),
    ("The answer is $1.2 million.", "1,200,000", "correct"),
    ("The answer is 12%.", "0.12", "correct"),
    ("\\boxed{\\$1.25M}", "1,250,000", "correct"),
    ("\\boxed{\\$1.25M}", "1.25", "wrong"),
    ("\\boxed{2.5bn USD}", "2.5 billion", "correct"),
    ("\\boxed{300K}", "26.85 degC", "correct"),
    ("\\boxed{\\sqrt{5}}", "5", "unparsable"),
    ("\\boxed{.5}", "5", "wrong"),
    ("\\boxed{.5}", "0.5", "correct"),
    ("\\boxed{5 pi}", "5", "unparsable"),
    ("\\boxed{5 e}", "5", "unparsable"),
    ("\\boxed{5 \\$}", "5 €", "wrong"),
    ("\\boxed{\\text{less than } 20}", "20", "unparsable"),
    ("\\boxed{\\$3.50}", "3.5 USD", "correct"),
    ("\\boxed{3.5 EUR}", "3.5 USD", "wrong"),
    ("\\boxed{\\frac{1}{2} h}", "30 min", "correct"),
    ("\\boxed{3 dozen}", "36", "correct"),
    ("\\boxed{3 \\times 10^8 \\text{ m/s}}", "300000 km/s", "correct"),
    ("\\boxed{3 \\times 10^8}", "3 \\times 10^9", "wrong"),
    ("\\boxed{1.6 * 10^-9 C}", "1.6e-9 C", "correct"),
    ("\\boxed{10^{-3} m}", "1 mm", "correct"),
    ("\\boxed{12{,}500 kg}", "12.5e3 kg", "correct"),
    ("\\boxed{1\\,234\\text{ m}}", "1234 m", "correct"),
    ("\\boxed{1 000 000}", "1000000", "correct"),
    ("\\boxed{\\dfrac12}", "0.5", "correct"),
    ("\\boxed{3\\frac12}", "3.5", "correct"),
    ("\\boxed{3 1/2 m}", "3.5 m", "correct"),
    ("\\boxed{1 \\times 10^{400}}", "5", "unparsable"),
    ("\\boxed{2.5\\,\\mu\\mathrm{m}}", "2.5e-6 m", "correct"),
    ("\\boxed{2 k\\Omega}", "2000 ohm", "correct"),
    ("\\boxed{25^\\circ C}", "25 °C", "correct"),
    ("\\boxed{25^{\\circ}\\text{C}}", "77 degF", "correct"),
    ("\\boxed{5 \\, \\mathrm{m\\,s^{-1}}}", "18 km/h", "correct"),
    ("\\boxed{5\\mathrm{~N}\\cdot\\mathrm{m}}", "5 J", "correct"),
    ("\\boxed{9**9**9**9}", "5", "unparsable"),
    ("\\boxed{5 quux}", "5 m", "unparsable"),
    ("\\boxed{about ten}", "10", "unparsable"),
    ("\\boxed{3}", "a lot", "unparsable"),
]


@pytest.mark.parametrize(
    ("make", "cases"), [(MultipleChoiceVerifier, CHOICES), (ExactMatchVerifier, TEXTS), (NumericVerifier, QUANTITIES)]
)
def test_stated_answers(make, cases):
    completions, answers, expected = zip(*cases, strict=True)
    assert make().verify(list(completions), list(answers)) == list(expected)


def test_choices_of_the_row():
    """Its labels are the letters there are, and the text of a choice names it."""
    vitamins, arc = ["Vitamin C", "Vitamin A", "Iron"], {"label": ["1", "2"], "text": ["a cat", "a dog"]}
    cases = [
        ("\\boxed{Vitamin A}", "B", vitamins, "correct"),
        ("\\boxed{vitamin  c}", "B", vitamins, "wrong"),
        ("\\boxed{B. Vitamin A}", "B", vitamins, "correct"),
        ("\\boxed{C}", "Iron", vitamins, "correct"),
        ("\\boxed{B}", 1, vitamins, "correct"),  # as MMLU has it
        ("\\boxed{D}", "B", vitamins, "unparsable"),
        ("\\boxed{2}", "2", arc, "correct"),
        ("\\boxed{a dog}", "1", arc, "wrong"),
        ("\\boxed{B}", "B", {"A": "no", "B": "yes"}, "correct"),
        ("\\boxed{B}", "B", None, "correct"),
        ("\\boxed{A}", "B", ["B", "A"], "unparsable"),
    ]
    completions, answers, choices, expected = map(list, zip(*cases, strict=True))
    verifier = MultipleChoiceVerifier()
    assert verifier.verify(completions, answers, choices=choices) == expected
    with pytest.raises(ValueError, match="2 labels and 1 texts"):
        verifier.verify(["A"], ["A"], choices=[{"label": ["A", "B"], "text": ["x"]}])
    assert verifier(completions=completions, answer=answers, choices=choices)[:2] == [1.0, 0.0]
    both = any_of(ExactMatchVerifier(), verifier)
    assert both.verify(completions[:2], answers[:2], choices=choices[:2]) == ["correct", "wrong"]


def test_exact_match_ignores_more_when_told_to():
    squad = ExactMatchVerifier(ignore_punctuation=True, ignore_articles=True)
    assert squad.verify(["\\boxed{The Eiffel-Tower.}"], ["eiffeltower"]) == ["correct"]
    assert ExactMatchVerifier(ignore_case=False).verify(["\\boxed{paris}", "\\boxed{Paris}"], ["Paris"] * 2) == [
        "wrong",
        "correct",
    ]


def test_numeric_tolerance_and_units_are_options():
    assert NumericVerifier(rel_tol=0).verify(["\\boxed{1.001}"], ["1"]) == ["wrong"]
    assert NumericVerifier(rel_tol=0, abs_tol=0.001).verify(["\\boxed{1.001}", "\\boxed{1.002}"], ["1"] * 2) == [
        "correct",
        "wrong",
    ]
    assert NumericVerifier(require_unit=True).verify(["\\boxed{5}"], ["5 km"]) == ["wrong"]
    with pytest.raises(ValueError, match="rel_tol=-1"):
        NumericVerifier(rel_tol=-1)


def test_json_schema():
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer", "minimum": 1}}}
    verifier = JsonSchemaVerifier(schema)
    completions = ['```json\n{"a": 2}\n```', '{"a": 0}', '{"b": 1}', "{a: 1}", "[" * 100_000, '{"a": 3.5}']
    assert verifier.verify(completions, [None] * 6) == [
        "correct",
        "wrong",
        "wrong",
        "unparsable",
        "unparsable",
        "wrong",
    ]
    thinking = '<think>\n{"a": 0}\n</think>\n{"a": 2}'
    assert verifier.verify([thinking, "<think>" + thinking], [None] * 2) == ["correct", "correct"]
    assert verifier(['<think>{"a": 2}', "none", '{"a": 2}'], answer=[None, None, "{"]) == [0.0, 0.0, None]
    assert verifier.verify(['{"a": 2}'] * 3, ['{"a": 2}', {"a": 3}, "{"]) == ["correct", "wrong", "unparsable"]
    assert verifier.explain(['{"a": 0}'], [None]) == [(Verdict.WRONG, "$.a: 0 is less than the minimum of 1")]
    assert JsonSchemaVerifier().verify(["[1, 2.0]", "true", "{}"], ["[1,2]", "1", None]) == [
        "correct",
        "wrong",
        "unparsable",
    ]
    assert JsonSchemaVerifier().verify(['{"a": 2, "a": 1}'], ['{"a": 1}']) == ["unparsable"]
    assert JsonSchemaVerifier({"type": "number"}).verify(["NaN", "-Infinity", "1"], [None] * 3) == [
        "unparsable",
        "unparsable",
        "correct",
    ]
    fences = ["```json\r\n5\r\n```", "So:\n~~~json\n5\n~~~\nDone.", '```json\n"```x```"\n```']
    assert JsonSchemaVerifier().verify(fences, ["5", "5", '"```x```"']) == ["correct"] * 3


def test_completions_are_texts_and_a_function_may_return_bools():
    for verify in (ExactMatchVerifier().verify, lambda c, a: explain_with(lambda c, a: [True], c, a)):
        with pytest.raises(TypeError, match="Completion 0 must be a text, but is None"):
            verify([None], ["72"])
    told = explain_with(lambda completions, answers: [True, np.bool_(False), "timeout"], ["a"] * 3, ["a"] * 3)
    assert [v for v, _ in told] == ["correct", "wrong", "timeout"]
    with pytest.raises(ValueError, match="returned 0.5; it must return True, False or one of correct"):
        explain_with(lambda completions, answers: [0.5], ["a"], ["a"])


class OneAnswer(ScriptedSampler):
    """Says the same to every request."""

    def completion(self, request):
        return Completion(request.id, self.text, [1], [-0.5], "stop")


class OwnPairs(Verifier):
    def _explain(self, completions, answers):
        return [
            (Verdict.CORRECT, "") if c == a else (Verdict.UNPARSABLE, "I cannot read this")
            for c, a in zip(completions, answers, strict=True)
        ]


@pytest.mark.parametrize(
    "verifier, right, says_nothing, gold, unreadable",
    [
        (MathVerifier(), "\\boxed{2}", "hm", "2", "\\frac{1}{"),
        (MultipleChoiceVerifier(), "\\boxed{B}", "\\boxed{Vitamin A}", "B", "none of them"),
        (ExactMatchVerifier(), "\\boxed{x}", "I do not know\nwhat it is", "x", " "),
        (NumericVerifier(), "\\boxed{5 km}", "\\boxed{far}", "5000 m", "far"),
        (JsonSchemaVerifier(), "{}", "no JSON", "{}", "{"),
        (
            CodeVerifier(allow_unsandboxed=True),
            "```python\ndef f(): return 1\n```",
            "f returns 1",
            "assert f() == 1",
            "assert f( ==",
        ),
        (all_of(JsonSchemaVerifier(), lambda c, a: [True] * len(c)), "{}", "no JSON", "{}", "{"),
        (OwnPairs(), "yes", "no", "yes", None),
        (lambda c, a: ["correct" if x == "yes" else "unparsable" for x in c], "yes", "no", "yes", None),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_a_completion_without_an_answer_has_the_reward_that_an_evaluation_gives_it(
    verifier, right, says_nothing, gold, unreadable
):
    """0.0, so that it is punished; only a gold answer that cannot be read says nothing of the completion."""
    completions, answers = [right, says_nothing], [gold, gold]
    if unreadable is not None:
        completions, answers = [*completions, right], [*answers, unreadable]
    told = explain_with(verifier, completions, answers)
    assert rewards(told) == [1.0, 0.0, None][: len(told)]
    assert rewards(pickle.loads(pickle.dumps(told))) == rewards(told)
    if isinstance(verifier, Verifier):
        assert verifier(completions, answer=answers) == rewards(told)
    for text, reward in zip(completions[:2], rewards(told), strict=False):
        sampler = OneAnswer()
        sampler.text = text
        result = evaluate(
            None, {"a": [{"problem": "?", "answer": gold}]}, num_generations=1, sampler=sampler, verifier=verifier
        )["a"]
        assert (result["avg@1"], result["num_judged"]) == (reward, [1])


def test_a_judgement_is_a_pair():
    verdict, reason = judgement = GoldAtFault(Verdict.UNPARSABLE, "empty")
    assert judgement == (verdict, reason) == Judgement("unparsable", "empty") and judgement.gold_at_fault
    assert rewards([judgement, Judgement("unparsable"), Judgement("timeout"), Judgement("error")]) == [
        None,
        0.0,
        None,
        None,
    ]


def test_verifiers_can_be_pickled():
    """For `datasets.map(num_proc=...)` and spawned processes."""
    cases = [
        (MultipleChoiceVerifier("ABC"), "B", "B"),
        (ExactMatchVerifier(ignore_case=False), "\\boxed{x}", "x"),
        (NumericVerifier(rel_tol=0.1), "\\boxed{1.05 km}", "1000 m"),
        (JsonSchemaVerifier({"type": "object"}), "{}", None),
        (any_of(ExactMatchVerifier(), MultipleChoiceVerifier()), "B", "B"),
    ]
    for verifier, completion, answer in cases:
        assert pickle.loads(pickle.dumps(verifier)).verify([completion], [answer]) == ["correct"], verifier


@pytest.mark.slow
def test_judge_agrees_with_the_whole_distribution(tiny_model, tokenizer):
    """The verdict from drawn tokens against P(YES) / (P(YES) + P(NO)) of a forward over the whole vocabulary."""
    import torch

    from trl_offpolicy.data import prompts
    from trl_offpolicy.data.tokenization import encode_prompt
    from trl_offpolicy.sampling.transformers_sampler import TransformersSampler
    from trl_offpolicy.verification.verifiers import JUDGE_PROMPT

    completions, answers = [f"so it is {i}" for i in range(6)], ["3"] * 6
    words = {}
    for i, text in enumerate(tokenizer.batch_decode([[i] for i in range(len(tokenizer))])):
        words.setdefault(text.strip().strip(".*\"'").upper(), []).append(i)
    table = []
    for completion, answer in zip(completions, answers, strict=True):
        prompt = [{"role": "user", "content": prompts.fill(JUDGE_PROMPT, completion=completion, answer=answer)}]
        ids = torch.tensor([encode_prompt(tokenizer, prompt)])
        with torch.no_grad():
            table.append(tiny_model(ids).logits[0, -1].float().softmax(-1))
    mean = torch.stack(table).mean(0)
    likely = sorted((w for w in words if w.isalnum()), key=lambda w: -mean[words[w]].sum())
    yes, no = likely[:2]  # a random model knows neither word: its two likeliest ones stand for them
    shares = [float(p[words[yes]].sum() / p[words[yes] + words[no]].sum()) for p in table]
    sampler = TransformersSampler(tiny_model, tokenizer, batch_size=8)
    told = set()
    for threshold in (0.02, 0.3, 0.5, 0.7, 0.98):
        judge = JudgeVerifier(sampler, threshold=threshold, num_draws=200, yes=yes, no=no)
        for verdict, share in zip(judge.verify(completions, answers), shares, strict=True):
            assert verdict == "unparsable" or (verdict == "correct") == (share >= threshold)
            told.add(str(verdict))
    assert {"correct", "wrong"} <= told
    assert JudgeVerifier(sampler, num_draws=2).verify(["x"], ["y"]) == ["unparsable"]  # says neither YES nor NO
    with pytest.raises(ValueError, match="no {answer}"):
        JudgeVerifier(sampler, prompt="{completion}?")


def test_composition_and_plain_functions():
    def says(verdict):
        return lambda completions, answers: [verdict] * len(completions)

    rank = {"all": lambda vs: "wrong" if "wrong" in vs else next((v for v in vs if v != "correct"), "correct")}
    rank["any"] = lambda vs: "correct" if "correct" in vs else next((v for v in vs if v != "wrong"), "wrong")
    for first in Verdict:
        for second in Verdict:
            for third in ("correct", "wrong", "error"):
                verdicts = [str(first), str(second), third]
                parts = [says(v) for v in verdicts]
                assert all_of(*parts).verify(["x"], ["y"]) == [rank["all"](verdicts)], verdicts
                assert any_of(*parts).verify(["x"], ["y"]) == [rank["any"](verdicts)], verdicts
    seen = []

    def dear(completions, answers):
        seen.extend(completions)
        return ["correct"] * len(completions)

    with all_of(MathVerifier(num_workers=1), dear) as both:
        assert both.verify(["\\boxed{1}", "\\boxed{2}"], ["1", "1"]) == ["correct", "wrong"]
        assert seen == ["\\boxed{1}"]  # what is wrong already is not shown to it
        assert both.__name__ == "all_of(math_verifier, dear)"
        assert both(completions=["\\boxed{1}", "\\boxed{2}"], answer=["1", "1"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="returned 0 verdicts for 1"):
        all_of(lambda c, a: []).verify(["x"], ["y"])
    with pytest.raises(ValueError, match="at least one"):
        any_of()


def test_missing_extra_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "pint", None)
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    for make, extra in ((NumericVerifier, "units"), (lambda: JsonSchemaVerifier({}), "json")):
        with pytest.raises(ImportError, match=rf"pip install 'trl-offpolicy\[{extra}\]'"):
            make()


def test_a_rewrite_with_another_verifier(tmp_path):
    """A verifier of another domain drives a whole rewrite, in the place of the mathematical one."""
    from scripted import ScriptedSampler, rows

    from trl_offpolicy import DataRewriter, RewriteConfig

    args = RewriteConfig(str(tmp_path), num_generations=4)
    with ExactMatchVerifier() as verifier:
        rewritten = DataRewriter(POLICY, args, sampler=ScriptedSampler(), verifier=verifier).rewrite(rows(20))
    for row in rewritten:
        if row["source"] != "expert":
            assert row["completion"][0]["content"].endswith(f"\\boxed{{{row['answer']}}}")
    assert {"self", "expert"} <= set(rewritten["source"])


class ReadsTheRow:
    """Right where the row says so; notes the rows that it was given."""

    columns = ("level", "source", "answer", "nowhere")

    def __init__(self, right):
        self.right, self.seen = right, []

    def verify(self, completions, answers, **columns):
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        self.seen += rows
        return [row["level"] == self.right for row in rows]


@pytest.mark.parametrize("answer_column", ["answer", "gold"])
def test_a_verifier_is_given_the_columns_that_it_names(tmp_path, answer_column):
    """In a rewrite, when its texts are judged anew, and while a policy is trained; by their names in the input."""
    from datasets import Dataset
    from scripted import rewrite, rows

    from trl_offpolicy import RewriteConfig
    from trl_offpolicy.data.formats import read_rows
    from trl_offpolicy.online.drawn_rows import DrawnRows
    from trl_offpolicy.runs.shards import Shard
    from trl_offpolicy.sampling.sampler import as_sampler
    from trl_offpolicy.verification.verifier import as_verifier

    class Another(ReadsTheRow):
        pass

    data = [{**row, answer_column: i, "level": i % 3, "source": f"web {i}"} for i, row in enumerate(rows(9))]
    asked, first, second, third = {"answer_column": answer_column}, ReadsTheRow(1), Another(2), ReadsTheRow(0)
    given = {(row["level"], row["source"], row[answer_column], None) for row in data}
    made, _ = rewrite(tmp_path, data, verifier=first, **asked)
    anew, _ = rewrite(tmp_path, data, verifier=second, rejudge=True, **asked)
    online = RewriteConfig(str(tmp_path / "online"), num_generations=2, **asked)
    drawn = DrawnRows(Dataset.from_list(data), online, None, as_verifier(third), Shard())
    drawn.open({}, 0)
    found = drawn.draw(0, list(range(9)), [True] * 9, as_sampler(ScriptedSampler())).rows.to_pylist()
    for verifier, written in ((first, made.to_list()), (second, anew.to_list()), (third, found)):
        assert {tuple(row.values()) for row in verifier.seen} == given
        kept = [row["level"] for row in written if row["source"] != "expert"]
        assert kept == [verifier.right] * 3
        # What is written, and the ids by which a journal knows the rows, are what they were.
        assert [row["input_source"] for row in written] == [row["source"] for row in data]
        plain = [{k: v for k, v in row.items() if k not in ("level", "source")} for row in data]
        assert [row["id"] for row in written] == [problem.id for problem in read_rows(plain, answer_column)]


def test_an_index_is_no_text_in_a_rewrite_either(tmp_path):
    """MMLU's answer 1 is the second choice, also where the first one reads 1."""
    from scripted import rewrite

    class Says(ScriptedSampler):
        def completion(self, request):
            return Completion(request.id, "The answer is B.", [1, 2], [-0.1, -0.1], "stop")

    row = {"problem": "2 - 1?", "solution": "The answer is B.", "choices": ["1", "2", "3"]}
    data = [{**row, "answer": answer} for answer in (0, 1, 2)]
    made, _ = rewrite(tmp_path, data, Says(), MultipleChoiceVerifier(), stages=["self"])
    assert made["source"] == ["expert", "self", "expert"]
    texts = [{**row, "choices": ["Rome", "Paris"], "answer": answer} for answer in ("Rome", "Paris")]
    made, _ = rewrite(tmp_path / "texts", texts, Says(), MultipleChoiceVerifier(), stages=["self"])
    assert made["source"] == ["expert", "self"]
