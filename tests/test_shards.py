"""Shards against the unsharded run: the union is the merge, in real processes, one killed; a part never passes for the whole."""

import fcntl
import json
import signal
from pathlib import Path

import pytest
from conftest import POLICY
from datasets import Dataset, load_dataset
from scripted import ScriptedSampler, rewrite, rewrite_rows, rows, verify

from trl_offpolicy import DataRewriter, RewriteConfig
from trl_offpolicy.data.whole_file import write_whole
from trl_offpolicy.runs.shards import Shard, publish_lock


def union(run: Path) -> list[dict]:
    return load_dataset(str(run / "dataset"), split="train").to_list()


def sharded(tmp_path, data, count, order=None, **kwargs):
    """All shards, one after another; returns the metrics of each."""
    metrics = []
    for place, i in enumerate(order or range(count)):
        assert not (tmp_path / "run" / "dataset").exists()
        sampler = ScriptedSampler(capacity=1 + 7 * place, order_seed=place)
        rewritten, numbers = rewrite(tmp_path, data, sampler=sampler, shard=f"{i}/{count}", **kwargs)
        assert len(rewritten) == numbers["yield"]["total"] == len(Shard(i, count).rows(len(data)))
        metrics.append(numbers)
    return metrics


@pytest.mark.parametrize("count", [2, 3, 7, 40])
def test_union_is_the_unsharded_dataset(tmp_path, count):
    """Rows that occur several times, in different shards; more shards than rows; shards in any order."""
    data = rows(13) + rows(13) + rows(5)
    whole, metrics = rewrite(tmp_path / "whole", data)
    parts = sharded(tmp_path / "parts", data, count, order=[*range(1, count), 0])
    assert union(tmp_path / "parts" / "run") == whole.to_list()
    assert len(set(whole["id"])) == 31
    total = json.loads((tmp_path / "parts" / "run" / "metrics.json").read_text())
    for name in ("yield", "sampling", "stages", "verdicts", "gold_unparsable"):
        assert total[name] == metrics[name]
    assert sum(p["sampling"]["sampled"] for p in parts) == metrics["sampling"]["sampled"]
    assert not (tmp_path / "parts" / "run" / "dataset.partial").exists()


def test_the_last_shard_may_finish_while_another_reads_its_rows_back(tmp_path):
    """Between the moment when a shard's file is in its place and when it is read, all files move."""

    def shard(i, verifier):
        args = RewriteConfig(str(tmp_path / "run"), num_generations=4, shard=f"{i}/2")
        rewriter = DataRewriter("scripted", args, sampler=ScriptedSampler(), verifier=verifier)
        return rewriter, rewriter.rewrite(rows(20))

    class Verifier:
        others = [1]

        def verify(self, completions, answers):
            return verify(completions, answers)

        def close(self):
            while self.others:
                shard(self.others.pop(), self)

    rewriter, rewritten = shard(0, Verifier())
    assert rewriter.missing_shards == [] and rewritten.to_list() == union(tmp_path / "run")[:10]


def test_shards_take_turns_whatever_file_is_replaced_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_offpolicy.runs.shards.lock", lambda handle, how: fcntl.flock(handle, how | fcntl.LOCK_NB))
    rewrite(tmp_path, rows(3))
    with publish_lock(tmp_path / "run"):
        rewrite_config = tmp_path / "run" / "run_config.yaml"
        write_whole(rewrite_config, rewrite_config.read_text())  # as a shard does that starts
        with pytest.raises(BlockingIOError), publish_lock(tmp_path / "run"):
            pass


def test_every_row_is_in_exactly_one_shard():
    for total in (0, 1, 5, 100, 101):
        for count in (1, 2, 3, 7, 150):
            assert [i for k in range(count) for i in Shard(k, count).rows(total)] == list(range(total))


@pytest.mark.parametrize("text", ["4/4", "-1/4", "1", "1/0", "a/b", "0/100000"])
def test_shard_errors_say_what_to_write(tmp_path, text):
    with pytest.raises(ValueError, match=f"shard='{text}'.*0/4, 1/4"):
        rewrite(tmp_path, rows(3), shard=text)


def test_a_part_cannot_be_loaded_as_the_whole(tmp_path):
    rewrite(tmp_path, rows(10), shard="0/2")
    with pytest.raises(FileNotFoundError):
        union(tmp_path / "run")
    # Nor is a file of another dataset, or of other settings, taken for the missing one.
    with pytest.raises(
        ValueError, match="journal-00000-of-00002.jsonl is another shard.*`seed` was 42 there and is 7 now"
    ):
        rewrite(tmp_path, rows(10), shard="1/2", seed=7)
    rewrite(tmp_path, rows(12), shard="1/2")
    assert not (tmp_path / "run" / "dataset").exists()
    rewrite(tmp_path, rows(12), shard="0/2")
    whole, _ = rewrite(tmp_path / "whole", rows(12))
    assert union(tmp_path / "run") == whole.to_list()
    # A dataset that has grown replaces the old one when all shards have it, and not before.
    rewrite(tmp_path, rows(20), shard="0/2")
    assert union(tmp_path / "run") == whole.to_list()
    rewrite(tmp_path, rows(20), shard="1/2")
    assert [r["row"] for r in union(tmp_path / "run")] == list(range(20))


def test_a_changed_demonstration_is_another_dataset(tmp_path):
    changed = [{**r, "solution": "Another way. " + r["solution"]} for r in rows(10)]
    rewrite(tmp_path, rows(10), shard="0/2")
    rewrite(tmp_path, changed, shard="1/2")
    assert not (tmp_path / "run" / "dataset").exists()


def test_a_finished_shard_may_run_again(tmp_path):
    sharded(tmp_path, rows(10), 2)
    before = union(tmp_path / "run")
    sampler = ScriptedSampler()
    rewrite(tmp_path, rows(10), sampler=sampler, shard="1/2")
    assert sampler.sampled == 0 and union(tmp_path / "run") == before


@pytest.mark.parametrize(("first", "second"), [("0/1", "0/2"), ("0/2", "0/1"), ("0/2", "2/3")])
def test_the_number_of_shards_of_a_run_cannot_change(tmp_path, first, second):
    rewrite(tmp_path, rows(10), shard=first)
    with pytest.raises(ValueError, match=f"you passed shard='{second}': the number of shards of a run cannot change"):
        rewrite(tmp_path, rows(10), shard=second)
    # Those who do delete the journals get the new number's files and no others.
    for journal in (tmp_path / "run").glob("journal*.jsonl"):
        journal.unlink()
    for shard in Shard.parse(second).siblings():
        rewrite(tmp_path, rows(10), shard=str(shard))
    assert [r["row"] for r in union(tmp_path / "run")] == list(range(10))


@pytest.mark.slow
def test_three_processes_at_once_one_killed_and_run_again(tmp_path, process):
    whole, _ = rewrite(tmp_path / "whole", rows(90))
    run = tmp_path / "run"

    def start(shard, kill=None):
        return process(rewrite_rows, run, 90, {"order_seed": shard, "kill_after": kill}, shard=f"{shard}/3")

    processes = [start(0), start(1, kill=40), start(2)]
    for each in processes:
        each.join(60)
    logs = [each.log.read_text() for each in processes]
    assert [each.exitcode for each in processes] == [0, -signal.SIGKILL, 0], logs
    assert not (run / "dataset").exists()
    journal = (run / "journal-00001-of-00003.jsonl").read_bytes()
    again = start(1)
    again.join(60)
    assert again.exitcode == 0, again.log.read_text()
    assert union(run) == whole.to_list()
    assert (run / "journal-00001-of-00003.jsonl").read_bytes().startswith(journal[: journal.rfind(b"\n") + 1])


@pytest.mark.slow
def test_command_line_says_what_is_missing_and_what_comes_next(tmp_path, command):
    from quickstart_task import demonstrations, problems

    Dataset.from_list(demonstrations(problems(9, 3, (1, 2)))).to_json(tmp_path / "demos.jsonl")
    args = ["--dataset_name", tmp_path / "demos.jsonl", "--num_generations", "2", "--max_completion_length", "60"]
    outs = []
    for shard in ("1/2", "0/2"):
        done = command(
            "rewrite", "--model_name_or_path", POLICY, *args, "--output_dir", tmp_path / "run", "--shard", shard
        )
        assert done.returncode == 0, done.stderr
        outs.append(done.stdout.splitlines())
    assert "shard 1/2 is done; still missing: 0/2" in outs[0][-2]
    assert outs[0][-1].startswith("trl-offpolicy rewrite --model_name_or_path") and outs[0][-1].endswith("--shard 0/2")
    assert "--shard 1/2" not in outs[0][-1] and outs[1][-1].startswith("trl-offpolicy sft")
    args = RewriteConfig(str(tmp_path / "whole" / "run"), num_generations=2, max_completion_length=60)
    DataRewriter(POLICY, args).rewrite(Dataset.from_json(str(tmp_path / "demos.jsonl")))
    same = ("id", "source", "completion", "completion_ids", "num_sampled", "num_correct")
    got, expected = ([{k: r[k] for k in same} for r in union(tmp_path / d)] for d in ("run", "whole/run"))
    assert got == expected and len(got) == 9
