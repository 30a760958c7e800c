"""What was judged right and wrong comes out of a run's journal with its reward; what was not judged does not."""

import json

import pytest
from datasets import Dataset, load_dataset
from scripted import ScriptedSampler, rows

from trl_offpolicy import DataRewriter, RewriteConfig
from trl_offpolicy.rewriting.signed_rows import write_signed_rows


def verify(completions, answers):
    """As the scripted problems want it, but for every seventh attempt, which cannot be judged in one way or another."""

    def judged(text, answer):
        marker = int(text.split()[1][2:8] or 0) % 14
        if marker in (0, 5, 9):
            return {0: "timeout", 5: "unparsable", 9: "error"}[marker]
        return "correct" if text.endswith(f"\\boxed{{{answer}}}") else "wrong"

    return list(map(judged, completions, answers))


def run(directory, num_rows=60, data=None, **settings):
    settings = {"num_generations": 6, "max_completion_length": 50, **settings}
    rewriter = DataRewriter("scripted", RewriteConfig(str(directory), **settings), ScriptedSampler(0.3), verify)
    return rewriter.rewrite(rows(num_rows) if data is None else data)


def journal_of(directory):
    lines = (line for path in sorted(directory.glob("journal*.jsonl")) for line in path.open())
    return [entry for entry in map(json.loads, lines) if "config" not in entry]


@pytest.mark.parametrize("selection", ["first", "random"])
def test_every_judged_attempt_comes_out_with_its_reward_and_nothing_else(tmp_path, selection):
    """Against the journal itself, of a run in two shards."""
    for shard in ("0/2", "1/2"):
        run(tmp_path, selection=selection, shard=shard)
    counts = write_signed_rows(tmp_path, tmp_path / "signed")
    written, rewritten = (load_dataset(str(tmp_path / name), split="train") for name in ("signed", "dataset"))
    drawn = {(e["id"], e["attempt"]): e for e in journal_of(tmp_path) if e["stage"] == "self"}
    expected, speculative = [], 0
    for row in rewritten:
        attempts = [drawn[row["id"], k] for k in range(6) if (row["id"], k) in drawn]
        if selection == "first":
            right = [i for i, e in enumerate(attempts) if e["verdict"] == "correct"]
            needed = attempts[: right[0] + 1] if right else attempts
            speculative += len(attempts) - len(needed)
            attempts = needed
        assert len(attempts) == row["self_sampled"]
        for e in attempts:
            if e["finish_reason"] == "stop" and e["verdict"] in ("correct", "wrong"):
                reward = 1.0 if e["verdict"] == "correct" else -1.0
                same = {
                    "prompt": row["prompt"],
                    "answer": row["answer"],
                    "num_sampled": row["self_sampled"],
                    "num_correct": row["self_correct"],
                }
                own = {name: e[name] for name in ("id", "attempt", "completion_ids")}
                said = [{"role": "assistant", "content": e["text"]}]
                expected.append(
                    same | own | {"reward": reward, "completion": said, "source": "self", "behavior_prompt": []}
                )
                assert e["text"] != row["completion"][0]["content"] or reward > 0
    assert [{name: row[name] for name in expected[0]} for row in written] == expected
    for row, e in zip(written, expected, strict=True):
        assert row["behavior_log_probs"] == drawn[e["id"], e["attempt"]]["behavior_log_probs"]
    unjudged = {verdict: sum(e["verdict"] == verdict for e in drawn.values()) for verdict in ("timeout", "error")}
    assert all(unjudged.values()) and counts["positive"] + counts["negative"] == len(written)
    assert counts["speculative"] == speculative and counts["other_stage"] == len(journal_of(tmp_path)) - len(drawn)
    if selection == "random":
        assert {name: counts[name] for name in unjudged} == unjudged and counts["cut"] and counts["unparsable"]
    assert set(written.column_names) == {*rewritten.column_names, "reward", "attempt"}


def test_a_share_of_each_problem_and_of_the_right_ones_is_drawn_by_the_seed(tmp_path):
    run(tmp_path, selection="random")

    def drawn(**options):
        counts = write_signed_rows(tmp_path, tmp_path / "signed", **options)
        found = load_dataset(str(tmp_path / "signed"), split="train")
        rewards = {(row["id"], row["attempt"]): row["reward"] for row in found}
        assert len(rewards) == len(found) and counts["not_chosen"] == len(everything or rewards) - len(found)
        return rewards

    everything = {}
    everything = drawn()
    few = drawn(max_per_problem=2)
    assert few.items() < everything.items() and few == drawn(max_per_problem=2) != drawn(max_per_problem=2, seed=1)
    ids = [row_id for row_id, _ in few]
    assert {ids.count(i) for i in ids} <= {1, 2} and set(ids) == {row_id for row_id, _ in everything}
    for share in (0.2, 0.6):
        shared = drawn(positive_share=share, max_per_problem=5)
        positive = sum(reward > 0 for reward in shared.values())
        assert positive / len(shared) == pytest.approx(share, abs=0.01) and shared.items() < everything.items()


def test_problems_without_a_row_have_their_wrong_attempts_too(tmp_path):
    data = Dataset.from_list(rows(20)).map(lambda row: {"answer": row["solution"].split("{")[1][:-1]})
    run(
        tmp_path,
        data=data.remove_columns("solution"),
        stages=["self"],
        chat_template_kwargs={"thinking": False},
        num_generations=2,
    )
    unsolved = [json.loads(line) for line in (tmp_path / "unsolved.jsonl").open()]
    write_signed_rows(tmp_path, tmp_path / "signed")
    written = load_dataset(str(tmp_path / "signed"), split="train")
    prompts = {row["id"]: row["prompt"] for row in written}
    for row in unsolved:
        if row["id"] in prompts:
            assert prompts[row["id"]] == row["prompt"] and row["problem"] in row["prompt"][0]["content"]
    assert len({row["id"] for row in unsolved} & prompts.keys()) > 3
    assert {row["reward"] for row in written if row["id"] in {u["id"] for u in unsolved}} == {-1.0}
    assert all(row["chat_template_kwargs"] == {"thinking": False} for row in written)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"temperature": 0.7}, {}, "sampled with {'temperature': 0.7}"),
        ({"stages": ["guided"]}, {}, "sampled with \\['guided'\\]"),
        ({"keep_rejected": False}, {}, "has not kept the token ids of attempt .* keep_rejected=False"),
        ({"stop": ["x"]}, {}, "sampled with stop=\\['x'\\]"),
        ({}, {"max_per_problem": 0}, "max_per_problem=0; it must be at least 1"),
        ({}, {"positive_share": 1.0}, "positive_share=1.0; it is a share"),
    ],
)
def test_runs_whose_attempts_cannot_be_used_are_refused(tmp_path, settings, options, message):
    run(tmp_path / "run", 6, **settings)
    with pytest.raises(ValueError, match=message):
        write_signed_rows(tmp_path / "run", tmp_path / "signed", **options)
    assert not list((tmp_path / "signed").glob("*"))


def test_the_command_says_what_it_wrote_and_left_out(tmp_path, command):
    assert "is no finished" in command("rows", tmp_path, "--keep", "all", "--output_dir", tmp_path / "s").stderr
    run(tmp_path / "run", 12)
    done = command("rows", tmp_path / "run", "--keep", "all", "--output_dir", tmp_path / "s", "--positive_share", 0.5)
    assert done.returncode == 0 and "with reward -1: " in done.stdout and "attempts left out: " in done.stdout
    assert f"--dataset_name {tmp_path}/s --objective topr" in done.stdout.splitlines()[-1]
    for options in (["--keep", "all"], ["--positive_share", 0.5]):
        refused = command("rows", tmp_path / "run", *options)
        assert refused.returncode == 2 and "--keep all" in refused.stderr


@pytest.mark.parametrize("name", ["", "dataset", "with_replay"])
def test_the_runs_own_rows_are_not_written_over(tmp_path, name):
    run(tmp_path, 10)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")}
    with pytest.raises(ValueError, match="where the run's own rows are"):
        write_signed_rows(tmp_path, tmp_path / name)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")} == before
