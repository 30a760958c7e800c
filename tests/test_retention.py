"""lm-eval's result files of a model before and after training, against numbers worked out by hand."""

import json
import math

import pytest

from trl_offpolicy.evaluation.retention import mean_drop, measure_retention


def result_file(path, mmlu, perplexity, **changes):
    """As lm-eval 0.4.13 writes it: a group with its subtasks, a task with two filters, and one whose error is not known."""
    content = {
        "results": {
            "mmlu": {"acc,none": mmlu, "acc_stderr,none": 0.003, "alias": "mmlu"},
            "mmlu_anatomy": {"alias": " - anatomy", "acc,none": 0.5, "acc_stderr,none": 0.04},
            "gsm8k": {
                "alias": "gsm8k", "sample_len": 1319, "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.014,
                "exact_match,flexible-extract": mmlu, "exact_match_stderr,flexible-extract": 0.013,
            },
            "wikitext": {"alias": "wikitext", "word_perplexity,none": perplexity, "word_perplexity_stderr,none": "N/A"},
        },
        "group_subtasks": {"mmlu": ["mmlu_anatomy"], "gsm8k": [], "wikitext": []},
        "higher_is_better": {"mmlu": {"acc": True}, "gsm8k": {"exact_match": True}, "wikitext": {"word_perplexity": False}},
        "n-shot": {"mmlu_anatomy": 0, "gsm8k": 5, "wikitext": 0},
        "versions": {"mmlu": 2, "gsm8k": 3.0, "wikitext": 2.0},
        "n-samples": {"gsm8k": {"original": 1319, "effective": 1319}},
        "chat_template": None,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | changes))
    return path


@pytest.fixture
def files(tmp_path):
    base = result_file(tmp_path / "base" / "me__model" / "results_2026-11-02T10-00-00.json", 0.60, 9.0)
    tuned = result_file(tmp_path / "tuned.json", 0.56, 11.5)
    return base, tuned


def test_changes_are_those_that_a_hand_computes(files, tmp_path):
    result_file(files[0].with_name("results_2026-11-01T10-00-00.json"), 0.1, 1.0)  # an older one
    changes = measure_retention(tmp_path / "base", files[1], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "retention.json").read_text())["changes"] == changes
    assert [(row["task"], row["metric"]) for row in changes] == [
        ("mmlu", "acc"), ("gsm8k", "exact_match,strict-match"), ("gsm8k", "exact_match,flexible-extract"), ("wikitext", "word_perplexity"),
    ]  # fmt: skip
    mmlu, strict, flexible, perplexity = changes
    half = 1.96 * math.sqrt(2) * 0.003
    assert mmlu["change"] == pytest.approx(-0.04) and mmlu["change_ci95"] == pytest.approx(
        [-0.04 - half, -0.04 + half]
    )
    assert strict["change"] == 0 and flexible["change"] == pytest.approx(-0.04)
    assert perplexity["change"] == 2.5 and perplexity["change_ci95"] is None and not perplexity["higher_is_better"]
    drop, interval = mean_drop(changes)  # over mmlu and gsm8k, the first metric of each
    half = 1.96 * math.sqrt(2 * 0.003**2 + 2 * 0.014**2) / 2
    assert drop == pytest.approx(0.02) and interval == pytest.approx([0.02 - half, 0.02 + half])
    assert mean_drop([perplexity]) is None
    bits = {
        **perplexity,
        "metric": "bits_per_byte",
        "base": 0.66,
        "tuned": 0.86,
        "change": 0.2,
    }  # in [0, 1], but no share
    assert mean_drop([bits]) is None and mean_drop([*changes, perplexity, bits]) == (drop, interval)


def test_of_a_group_without_a_metric_of_its_own_the_tasks_in_it_are_compared(files):
    """As of `leaderboard`, which lm-eval writes as a blank line above its tasks; a group in it that has one stands for its own tasks."""
    for file in files:
        content = json.loads(file.read_text())
        content["results"] = {"leaderboard": {" ": " ", "alias": "leaderboard"}, **content["results"]}
        content["group_subtasks"] = {"leaderboard": ["mmlu", "gsm8k"], "mmlu": ["mmlu_anatomy"], "wikitext": []}
        file.write_text(json.dumps(content))
    assert [row["task"] for row in measure_retention(*files)] == ["mmlu", "gsm8k", "gsm8k", "wikitext"]


def test_the_command_shows_drop_and_gain(files, tmp_path, command):
    gain = {
        "difference": 0.12,
        "difference_ci95": [0.08, 0.16],
        "p_value": 0.001,
        "num_problems": 500,
        "baseline": "b",
    }
    results = {"math500": {"avg@4": 0.52, "avg@4_ci95": [0.5, 0.54], "vs_baseline": gain}}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "results.json").write_text(json.dumps({"benchmarks": results}))
    done = command("eval", "--retention", *files, "--output_dir", tmp_path / "eval")
    assert done.returncode == 0
    for line in (
        "| math500 (target) | avg@4 |  | 52.0% | +12.0% [+8.0%, +16.0%] |",
        "| mmlu | acc | 60.0% | 56.0% | -4.0% [-4.8%, -3.2%] |",
        "| wikitext | word_perplexity (lower is better) | 9 | 11.5 | +2.5 |",
        "mean drop over the tasks: +2.0% [+0.0%, +4.0%]; mean gain on the target +12.0%",
    ):
        assert line in done.stdout.splitlines(), done.stdout
    (tmp_path / "eval" / "results.json").write_text('{"settings": {}, "benchmarks": ["a"]}')  # what reproduce.py found
    other = command("eval", "--retention", *files, "--output_dir", tmp_path / "eval")
    assert other.returncode == 0 and "no evaluation with --baseline" in other.stdout
    alone = command("eval", "--retention", *files)
    assert alone.returncode == 0 and "target" not in alone.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"n-shot": {"mmlu_anatomy": 0, "gsm8k": 0}},
            "'gsm8k' has `n-shot` 5 in .* and 0 in .*: the two cannot be compared",
        ),
        ({"n-samples": {"gsm8k": {"original": 1319, "effective": 100}}}, "`n-samples`"),
        ({"n-shot": {"mmlu_anatomy": 5, "gsm8k": 5, "wikitext": 0}}, "'mmlu_anatomy' has `n-shot` 0 in .* and 5 in"),
        ({"results": {"ifeval": {"acc,none": 0.5}}}, "there is no metric in common"),
        ({"results": {}}, "is no result file of lm-eval"),
    ],
)
def test_results_that_cannot_be_compared_are_refused(files, changes, message):
    result_file(files[1], 0.5, 9.0, **changes)
    with pytest.raises(ValueError, match=message):
        measure_retention(*files)


def test_what_is_none_of_lm_evals_is_named(files, tmp_path, command):
    (tmp_path / "text.json").write_text("no json")
    (tmp_path / "empty").mkdir()
    for wrong, message in (
        ("text.json", "is no JSON file"),
        ("empty", "there is no results_*.json"),
        ("none", "No such"),
    ):
        refused = command("eval", "--retention", files[0], tmp_path / wrong)
        assert refused.returncode == 2 and message in refused.stderr
    assert "it takes two" in command("eval", "--retention", files[0]).stderr
    result_file(files[1], 0.5, 9.0, chat_template="{{ messages }}")
    with pytest.warns(UserWarning, match="different chat templates"):
        measure_retention(*files)
