"""Estimators against hand-made counts and simulation; evaluations killed, resumed, sharded, compared; formats refused."""

import itertools
import json
import math
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import POLICY, ROOT
from scripted import ScriptedSampler, rows, verify
from wandb_file import wandb_records

from trl_offpolicy import Verdict, evaluate
from trl_offpolicy.answers.normalization import canonical
from trl_offpolicy.data.formats import read_rows
from trl_offpolicy.data.prompts import SOLVE_PROMPT
from trl_offpolicy.evaluation.benchmarks import PRESETS, load_benchmark, load_benchmarks, read_questions
from trl_offpolicy.evaluation.estimators import (
    accuracies,
    bootstrap,
    compare,
    majority,
    mean_interval,
    paired_test,
    pass_at_k,
)
from trl_offpolicy.evaluation.evaluate import _numbers
from trl_offpolicy.sampling.sampler import Completion
from trl_offpolicy.verification.verifiers import ExactMatchVerifier, NumericVerifier


sys.path.insert(0, str(ROOT / "examples" / "miniature"))

from results import shares  # noqa: E402


def benchmark(num_rows=30):
    return [{"problem": r["problem"], "answer": i % 50} for i, r in enumerate(rows(num_rows))]


def run(benchmarks=None, sampler=None, **kwargs):
    benchmarks = {"a": benchmark(), "b": benchmark(7)} if benchmarks is None else benchmarks
    options = {"num_generations": 4, "verifier": verify, **kwargs}
    return evaluate(None, benchmarks, sampler=sampler or ScriptedSampler(), **options)


# ---- estimators ----


@pytest.mark.parametrize("n, c, k", [(1, 0, 1), (4, 2, 1), (4, 2, 2), (5, 1, 3), (6, 6, 2), (6, 4, 3), (8, 3, 8)])
def test_pass_at_k_is_the_mean_over_all_subsets(n, c, k):
    samples = [True] * c + [False] * (n - c)
    subsets = list(itertools.combinations(samples, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_accuracies_of_hand_made_counts():
    correct = [[True, True, False, False], [False] * 4, [True] * 4, [True, False], []]
    answers = [["1", "1", "2", "3"], ["5", None, "5", "6"], ["7"] * 4, ["1", "2"], []]
    result = accuracies(answers, correct, 4)
    assert result["avg@4"] == result["pass@1"] == (0.5 + 0 + 1 + 0.5) / 4
    assert result["pass@2"] == pytest.approx((5 / 6 + 0 + 1 + 1) / 4)
    assert result["pass@4"] == pytest.approx(2 / 3)  # the problem with two samples says nothing of pass@4
    assert result["maj@4"] == (1 + 0 + 1 + 0.5) / 4
    assert result["avg@4_se"] == pytest.approx(np.std([0.5, 0, 1, 0.5], ddof=1) / 2)


def test_majority():
    assert majority(["1", "1", "2"], [False, False, True]) == 0
    assert majority(["0.5", "1/2", "2"], [True, True, False]) == 1  # one vote however it is written
    assert majority(["1", "2"], [True, False]) == 0.5
    assert majority([None, None], [False, False]) == majority([], []) == 0


def test_coverage_of_the_bootstrap_interval():
    """Of intervals of avg@8 over 30 problems of very different difficulty, 95 % hold the true mean."""
    rng, trials, hits, plain = np.random.default_rng(0), 1000, 0, 0
    for trial in range(trials):
        shares = rng.binomial(8, rng.beta(0.4, 0.8, 30)) / 8
        low, high = bootstrap(shares, num_resamples=1000, seed=trial)[0]
        hits += low <= 1 / 3 <= high
        of_samples = 1.96 * math.sqrt(shares.mean() * (1 - shares.mean()) / 240)  # as if 240 samples were independent
        plain += abs(shares.mean() - 1 / 3) <= of_samples
    assert 0.93 <= hits / trials <= 0.97 and plain / trials < 0.8


def test_shares_that_are_all_alike_are_not_certain():
    low, high = mean_interval([0.0] * 30, 0.0)
    assert low == 0 and (1 - high) ** 30 == pytest.approx(0.025)
    assert mean_interval([1.0] * 30, 0.0) == pytest.approx([1 - high, 1.0]) and mean_interval([0.5], 0.0) is None
    # One of two samples of each of 9 problems is right: so are at least 0.025^(1/9) of all problems, the others may be 0 or 1.
    assert mean_interval([0.5] * 9, 0.0) == pytest.approx([0.5 * 0.6637, 1 - 0.5 * 0.6637], abs=1e-4)


@pytest.mark.parametrize(
    ("own", "others", "interval"), [(4, 0, [0.2619, 1]), (0, 4, [-1, -0.2619]), (4, 4, [-0.3694, 0.3694])]
)
def test_differences_that_are_all_alike_are_not_certain(own, others, interval):
    """Of 8 problems that all differ alike the exact bound of their share is 0.025^(1/8) = 0.6306; the others may be the opposite."""
    a, b = ({"problem_ids": list(range(8)), "num_correct": [n] * 8, "num_judged": [4] * 8} for n in (own, others))
    assert compare(a, b)["difference_ci95"] == pytest.approx(interval, abs=1e-3)


def test_paired_test_is_the_exact_one_and_has_its_size():
    differences = [0.5, 0.25, -0.25, 1.0, 0.0, 0.75, -0.5, 0.25]
    signs = itertools.product([1, -1], repeat=8)
    exact = np.mean([abs(np.dot(s, differences)) >= abs(sum(differences)) - 1e-12 for s in signs])
    assert paired_test(differences) == pytest.approx(exact, abs=0.015)
    rng = np.random.default_rng(0)
    false_alarms = np.mean([paired_test(rng.normal(size=20), 500) < 0.05 for _ in range(400)])
    assert 0.02 < false_alarms < 0.09


def test_compare_pairs_by_problem():
    a = {"problem_ids": ["x", "y", "z", "u"], "num_correct": [4, 2, 0, 0], "num_judged": [4, 4, 4, 0]}
    b = {"problem_ids": ["z", "y", "w", "u"], "num_correct": [1, 1, 4, 1], "num_judged": [4, 2, 4, 4]}
    result = compare(a, b)  # y: 2/4 - 1/2, z: 0 - 1/4; u was never judged in a
    assert result["difference"] == -0.125 and result["num_problems"] == 2
    with pytest.raises(ValueError, match="no problem in common"):
        compare(a, {**b, "problem_ids": ["1", "2", "3", "4"]})


# ---- runs ----


def test_greedy_beside_samples_and_rates():
    class Greedy(ScriptedSampler):
        def completion(self, request):
            if request.params.temperature == 0:
                gold = request.prompt[-1]["content"].split("gold:")[1].split()[0]
                return Completion(request.id, f"\\boxed{{{gold}}}", [1, 2], [-0.1, -0.1], "stop")
            return super().completion(request)

    result = run(sampler=Greedy(), greedy=True)["a"]
    assert result["greedy"] == 1 and result["greedy_ci95"][1] == 1
    assert result["avg@4"] < 0.6 and result["entropy"] == 0.5
    assert run(temperature=0.7)["a"]["entropy"] is None
    with pytest.raises(ValueError, match="all would be the same"):
        run(temperature=0.0)


def test_what_is_not_judged_is_not_wrong():
    def slow(completions, answers):
        return [Verdict.TIMEOUT if i % 2 else Verdict.CORRECT for i, _ in enumerate(completions)]

    result = run(verifier=slow)["a"]
    judged = sum(result["num_judged"])
    assert result["not_told"] == pytest.approx(1 - judged / 120) and 0.3 < result["not_told"] < 0.6
    shares = [c / n for c, n in zip(result["num_correct"], result["num_judged"], strict=True) if n]
    assert result["avg@4"] == pytest.approx(sum(shares) / len(shares))


class Four(ScriptedSampler):
    """On a server without token ids; every second attempt is cut."""

    def completion(self, request):
        cut = request.id.endswith("eval/1")
        return Completion(request.id, "So \\boxed{4}.", [], [], "length" if cut else "stop")


class Readable(ExactMatchVerifier):
    def check_answers(self, answers):
        return [Verdict.UNPARSABLE if answer == "some" else Verdict.CORRECT for answer in answers]


@pytest.mark.parametrize("verifier", [Readable(), NumericVerifier()])  # the second says so of a completion only
def test_problems_whose_gold_answer_cannot_be_read_are_left_out(verifier):
    asked = {"a": [{"problem": f"p{i}", "answer": a} for i, a in enumerate(["4", "some", "5", "some"])]}
    result = run(asked, sampler=Four(), num_generations=2, greedy=True, verifier=verifier)["a"]
    assert (result["avg@2"], result["pass@2"], result["maj@2"], result["greedy"]) == (0.25, 0.5, 0.5, 0.5)
    assert (result["num_correct"], result["num_judged"]) == ([1, 0, 0, 0], [2, 0, 2, 0])
    assert (result["gold_unparsable"], result["not_told"], result["unparsable"]) == (2, 0.5, 0.0)
    assert result["mean_length"] is None


def test_the_file_of_samples_says_which_of_them_count(tmp_path):
    """What the studies make of it is what `evaluate` has made of the same samples: the problems without a gold answer are left out."""
    asked = {"a": [{"problem": f"p{i}", "answer": a} for i, a in enumerate(["4", "some", "5", "some"])]}
    options = {"sampler": Four(), "num_generations": 2, "verifier": Readable(), "output_dir": str(tmp_path)}
    result = run(asked, greedy=True, **options)["a"]
    stages = {"avg@2": ("a", "eval", "mean"), "pass@2": ("a", "eval", "max"), "greedy": ("a", "greedy", "mean")}
    found = shares(tmp_path / "samples.parquet", {**stages, "none": ("b", "eval", "mean")})
    assert not len(found.pop("none"))
    assert {name: of_problem.mean() for name, of_problem in found.items()} == {name: result[name] for name in found}


def test_a_sample_that_could_not_be_drawn_has_no_length():
    class Half(ScriptedSampler):
        def completion(self, request):
            if request.id.endswith("eval/1"):
                return Completion(request.id, "", [], [], "error", "the engine is tired")
            return Completion(request.id, "So \\boxed{4}.", [1, 2, 3], [-0.5] * 3, "stop")

    result = run({"a": benchmark(4)}, sampler=Half(), num_generations=2)["a"]
    assert (result["mean_length"], result["entropy"], result["not_told"]) == (3, 0.5, 0.5)


def test_a_shard_without_problems_and_one_that_counts_its_own(tmp_path, command):
    file = tmp_path / "one.jsonl"
    file.write_text('{"problem": "1+1?", "answer": "2"}\n')
    options = ["--model_name_or_path", POLICY, "--benchmarks", file, "--output_dir", tmp_path / "out"]
    empty = command("eval", *options, "--shard", "0/2")
    assert empty.returncode == 0 and "shard 0/2 is done" in empty.stdout, empty.stderr
    none = command("eval", *options, "--max_problems", 0)
    assert none.returncode == 2 and "max_problems=0; it must be at least 1" in none.stderr
    asked = {"a": [{"problem": f"p{i}", "answer": a} for i, a in enumerate(["4", "some", "5", "some", "some", "6"])]}
    halves = [
        run(asked, sampler=Four(), num_generations=1, verifier=Readable(), output_dir=str(tmp_path), shard=shard)["a"]
        for shard in ("0/2", "1/2")
    ]
    assert [half["gold_unparsable"] for half in halves] == [1, 3]  # the last to finish says it of all


@pytest.mark.parametrize(
    "wrong",
    [
        [f"{how}\nThe answer is 42." for how in ("Adding.", "By symmetry.", "Step by step.", "Let us see.")],
        ["\\boxed{42}", "#### 42.0", "so $x = \\boxed{42}$", "The answer is $\\frac{84}{2}$."],
        ["\\boxed{B}", "The answer is (B).", "\\boxed{\\text{(B) } 12}", "\\boxed{B. A line}"],
    ],
)
def test_wrong_answers_vote_together_however_they_are_written(wrong):
    """Four of six samples say the same wrong thing: the majority is wrong, in each way of writing it."""

    class Says(ScriptedSampler):
        def completion(self, request):
            text = [*wrong, "So.\nThe answer is 7.", "Hence.\nThe answer is 7."][int(request.id.rpartition("/")[2])]
            return Completion(request.id, text, [1], [-0.1], "stop")

    def seven(completions, answers):
        return [Verdict.CORRECT if "7" in c else Verdict.WRONG for c in completions]

    one = {"a": [{"problem": "p", "answer": "7"}]}
    result = run(one, Says(), num_generations=6, verifier=seven)["a"]
    assert result["avg@6"] == pytest.approx(1 / 3) and result["maj@6"] == 0


def test_the_text_of_a_vote_never_raises():
    """Custom verifiers call any text wrong, and what it votes for is looked up in this process."""
    rng = np.random.default_rng(0)
    bits = [
        "\\frac", "{", "}", "(", ")", "[", "1", "2", ",", ".", "=", "\\text{", "cm}", " million", "$", "%", "^", "_", "\\overline{", "10^",
        "1e999", "\u0665", "\u00bd", "\u2153", "\ud800", "\x00", "\\pm", "\u00b2", "B. ", "1/0",
    ]  # fmt: skip
    for length in (1, 3, 8, 2000):
        for _ in range(500 if length < 10 else 5):
            assert isinstance(canonical("".join(rng.choice(bits, length))), str)


def run_killed(directory):
    run(sampler=ScriptedSampler(order_seed=5, kill_after=60), output_dir=directory, greedy=True)


@pytest.mark.slow
def test_a_killed_and_resumed_evaluation_and_one_in_shards_say_the_same(tmp_path, process):
    whole = run(output_dir=str(tmp_path / "whole"), greedy=True)
    killed = process(run_killed, str(tmp_path / "killed"))
    killed.join(60)
    assert killed.exitcode == -9 and not (tmp_path / "killed" / "results.json").exists(), killed.log.read_text()
    sampler = ScriptedSampler(order_seed=1)
    assert run(sampler=sampler, output_dir=str(tmp_path / "killed"), greedy=True) == whole
    assert 0 < sampler.sampled <= 37 * 5 - 10  # the rest was in the journal
    for i in (2, 0, 1):
        assert not (tmp_path / "shards" / "results.json").exists()
        last = run(
            output_dir=str(tmp_path / "shards"), greedy=True, shard=f"{i}/3", sampler=ScriptedSampler(order_seed=i)
        )
    assert last == whole
    written = [
        json.loads((tmp_path / d / "results.json").read_text())["benchmarks"] for d in ("whole", "killed", "shards")
    ]
    assert written[0] == written[1] == written[2] == whole

    def samples(directory):
        tables = [pq.read_table(file).to_pylist() for file in (tmp_path / directory).glob("samples*.parquet")]
        return sorted(itertools.chain(*tables), key=lambda s: (s["benchmark"], s["id"], s["stage"], s["attempt"]))

    assert samples("whole") == samples("killed") == samples("shards") and len(samples("whole")) == 37 * 5
    assert "| a | 30 |" in (tmp_path / "whole" / "results.md").read_text()


def test_another_setting_is_refused_and_more_samples_are_added(tmp_path):
    first = run(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="`seed` was 42 there and is 1 now"):
        run(output_dir=str(tmp_path), seed=1)
    sampler = ScriptedSampler()
    more = run(output_dir=str(tmp_path), num_generations=6, sampler=sampler)
    assert sampler.sampled == 37 * 2 and more["a"]["problem_ids"] == first["a"]["problem_ids"]
    few = run(output_dir=str(tmp_path / "few"), shard="0/9")  # none of the seven problems of b
    assert list(few) == ["a"] and few["a"]["num_problems"] == 3 and not (tmp_path / "few" / "results.json").exists()
    with pytest.raises(ValueError, match="without output_dir"):
        run(shard="0/2")


def test_baseline(tmp_path):
    run(output_dir=str(tmp_path / "base"), sampler=ScriptedSampler(p_self=0.1))
    better = run(
        output_dir=str(tmp_path / "new"), baseline=str(tmp_path / "base"), sampler=ScriptedSampler(p_self=0.8)
    )["a"]
    assert better["vs_baseline"]["p_value"] < 0.01 and better["vs_baseline"]["difference_ci95"][0] > 0
    assert "paired" in (tmp_path / "new" / "results.md").read_text()
    logged = _numbers({"a": better})
    assert logged["a/avg@4"] == better["avg@4"] and logged["a/num_problems"] == 30
    assert logged["a/vs_baseline/difference"] == better["vs_baseline"]["difference"] and "a/problem_ids" not in logged


def test_a_baseline_with_nothing_in_common_is_refused_before_sampling(tmp_path):
    base, new = str(tmp_path / "base"), str(tmp_path / "new")
    few = {"a": benchmark()[:3]}
    run(few, output_dir=base)
    run(output_dir=new)
    written = (tmp_path / "new" / "results.json").read_text()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "results.json").write_text("[1, 2]")
    sampler = ScriptedSampler()
    asked = {"sampler": sampler, "output_dir": new}
    for directory, benchmarks, message in [
        (base, {"c": benchmark()}, "nothing to compare"),
        (base, {"a": benchmark()[10:]}, "'a' has no problem in common"),
        (base + "s", {"a": benchmark()}, "no results.json"),
        (str(tmp_path / "foreign"), {"a": benchmark()}, "no result of an evaluation"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(benchmarks, baseline=directory, **asked)
    with pytest.raises(
        ValueError, match="measured otherwise.* `max_completion_length` was [0-9]+ there and is 64 now"
    ):
        run(few, baseline=base, max_completion_length=64, **asked)
    with pytest.raises(ValueError, match="`num_generations` was [0-9]+ there and is 2 now"):
        run(few, baseline=base, num_generations=2, **asked)
    run(few, output_dir=base, overwrite=True, stop=["?!"])
    with pytest.raises(ValueError, match=r"`stop` was \['\?!'\] there and is \[\] now"):
        run(few, baseline=base, **asked)
    run(few, output_dir=base, overwrite=True)
    with pytest.raises(ValueError, match="`min_p` was 0.0 there and is 0.1 now"):
        run(few, baseline=base, min_p=0.1, **asked)
    with pytest.raises(ValueError, match="`verifier` was 'verify' there and is 'exact_match_verifier' now"):
        run(few, baseline=base, verifier=ExactMatchVerifier(), **asked)
    with pytest.raises(ValueError, match="`chat_template_kwargs` was None there and is {'enable_thinking': True} now"):
        run(few, baseline=base, chat_template_kwargs={"enable_thinking": True}, **asked)
    with pytest.raises(ValueError, match="no problem in common"):
        run(few, baseline=base, solve_prompt="{problem} Be brief.", **asked)
    assert sampler.sampled == 0 and (tmp_path / "new" / "results.json").read_text() == written
    parts = [run(output_dir=str(tmp_path / "s"), baseline=base, shard=f"{i}/2") for i in (1, 0)]
    assert "vs_baseline" not in parts[0]["a"]  # the baseline's three problems are in the other shard
    assert parts[1]["a"]["vs_baseline"]["num_problems"] == 3 and "vs_baseline" not in parts[1]["b"]


def test_the_home_directory_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run(output_dir="~/base")
    assert "vs_baseline" in run(output_dir="~/new", baseline="~/base")["a"]
    assert (tmp_path / "base" / "results.json").exists() and (tmp_path / "new" / "results.json").exists()


# ---- benchmarks and formats ----


def test_rows_as_the_hub_has_them():
    """One row in the columns of each named benchmark's dataset."""
    found = read_questions(
        "b",
        [
            {
                "problem": "1+1?",
                "solution": "so \\boxed{2}",
                "answer": "2",
                "unique_id": "test/1.json",
            },  # MATH-500, AIME
            {"question": "1+1?", "answer": "2"},  # Minerva, AMC23
            {"question": "1+2?", "final_answer": ["$3$", "$4$"], "is_multiple_answer": True},  # OlympiadBench
            {"question": "Tom?", "answer": "He has <<1+1=2>>2\n#### 1,002"},  # GSM8K
            {"problem": "p", "solution": "thus \\boxed{\\frac{1}{2}}"},
        ],
        SOLVE_PROMPT,
        "Be good.",
    )
    assert [q.answer for q in found] == ["2", "2", "$3$, $4$", "1002", "\\frac{1}{2}"]
    assert found[1].id == f"{found[0].id}-2"  # the same problem twice: samples of its own
    system, user = found[0].prompt
    assert system == {"role": "system", "content": "Be good."} and user["content"].startswith("1+1?\nPlease reason")


def test_files_and_names(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"problem": "1+1?", "answer": "2"}\n')
    assert load_benchmark(str(file))[0] == "mine"
    with pytest.raises(ValueError, match="two benchmarks called 'mine'"):
        load_benchmarks([str(file), str(file)])
    with pytest.raises(ValueError, match="use one of math500, minerva_math"):
        load_benchmark("math50")
    with pytest.raises(FileNotFoundError):
        load_benchmark("./nothing.jsonl")


def test_rendered_prompts_double_bos_and_other_training_formats_are_refused(tokenizer):
    from copy import deepcopy

    class Rendering(ScriptedSampler):
        processing_class = deepcopy(tokenizer)

    one = [{"problem": "1 gold:3 ?", "answer": "3"}]
    asked = {"sampler": Rendering(), "num_generations": 1}
    rendered = [{"prompt": [{"role": "user", "content": "<|im_start|>user\n1 gold:3 ?<|im_end|>\n"}], "answer": "3"}]
    with pytest.raises(ValueError, match="special token '<|im_"):
        run({"b": rendered}, **asked)
    twice = Rendering()
    twice.processing_class.bos_token = "<|endoftext|>"
    twice.processing_class.chat_template = "<|endoftext|><|endoftext|>" + tokenizer.chat_template
    with pytest.raises(ValueError, match="would see two"):
        run({"b": one}, sampler=twice, num_generations=1)
    other = deepcopy(tokenizer)
    other.chat_template = other.chat_template.replace("<|im_start|>", "")
    run(
        {"b": one},
        train_tokenizer=POLICY,
        **{**asked, "sampler": type("S", (Rendering,), {"processing_class": tokenizer})()},
    )
    with pytest.raises(ValueError, match="chat template is another one"):
        run(
            {"b": one},
            train_tokenizer=other,
            **{**asked, "sampler": type("S", (Rendering,), {"processing_class": tokenizer})()},
        )
    plain = {"sampler": type("S", (Rendering,), {"processing_class": tokenizer})(), "num_generations": 1}
    trained = {"problem": "2+2?", "prompt": [{"role": "user", "content": SOLVE_PROMPT.replace("{problem}", "2+2?")}]}
    turns = [{"role": "system", "content": "Chat."}, {"role": "user", "content": "Hi"}]
    replay = {"problem": None, "source": "replay", "prompt": turns}  # says nothing of how problems were asked
    run({"b": one}, train_dataset=[replay, trained], **plain)
    with pytest.raises(ValueError, match="words around the problem"):
        bare = {**trained, "prompt": [{"role": "user", "content": "2+2?"}]}
        run({"b": one}, train_dataset=[replay, bare], **plain)
    with pytest.raises(ValueError, match="turns before the problem"):
        run({"b": one}, train_dataset=[trained], system_prompt="Be good.", **plain)
    with pytest.raises(ValueError, match="plain texts in one of the two"):
        run({"b": one}, train_dataset=[{"prompt": "1 gold:3 ?"}], **plain)
    with pytest.raises(ValueError, match="`chat_template_kwargs` are others"):
        run({"b": one}, train_dataset=[{**trained, "chat_template_kwargs": {"thinking": False}}], **plain)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Own words"}, {"role": "assistant", "content": "\\boxed{2}"}], "problem": "1+1?", "solution": "2"},
        {"prompt": "Own words", "completion": "\\boxed{2}", "problem": "1+1?"},
        {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "\\boxed{2}"}]},
        {"instruction": "Add.", "input": "1+1", "output": "\\boxed{2}", "answer": "2"},
        {"question": "1+1?", "answer": "one and one\n#### 2"},
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Benchmark 'b'. The prompts are plain texts")
def test_a_row_is_asked_as_a_rewrite_asks_it(row):
    (problem,) = read_rows([row], solve_prompt=SOLVE_PROMPT)
    (question,) = read_questions("b", [row], SOLVE_PROMPT, None)
    assert (question.prompt, question.answer) == (problem.prompt, problem.answer)


@pytest.mark.slow
def test_command_line_with_preset(tmp_path, monkeypatch, command):
    """The preset's settings arrive, a flag beside it wins, and the files are there; a real model, a real verifier."""
    import wandb
    from quickstart_task import problems

    file = tmp_path / "p.jsonl"
    data = problems(3, 1, (1,), p_hard=0.0)
    file.write_text("".join(json.dumps({"prompt": r["problem"], "answer": r["answer"]}) + "\n" for r in data))
    wandb.teardown()  # it reads its environment once
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    result = command(
        "eval", "--model_name_or_path", POLICY, "--benchmarks", file, "--preset", "paper", "--num_generations", 2,
        "--max_completion_length", 60, "--output_dir", tmp_path / "out", "--report_to", "wandb",
    )  # fmt: skip
    wandb.teardown()
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["config"]["seed"] == PRESETS["paper"]["seed"] == 0 and written["config"]["num_generations"] == 2
    assert written["config"]["system_prompt"] == "You are a helpful assistant."
    assert result.stdout.splitlines()[0] == f"output_dir: {tmp_path}/out" and "avg@2" in result.stdout
    assert written["benchmarks"]["p"]["entropy"] > 0
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    records = list(wandb_records(file))
    logged = {i.key or i.nested_key[0]: json.loads(i.value_json) for r in records for i in r.history.item}
    assert logged["p/avg@2"] == written["benchmarks"]["p"]["avg@2"]
    assert {r.run.run_group for r in records if r.HasField("run")} == {"mine"}
