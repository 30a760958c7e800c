"""Rounds of rewriting and training, and the divergence that they measure, with the embedded policy and the real commands."""

import fcntl
import hashlib
import json
import mmap
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import POLICY
from datasets import load_dataset
from quickstart_task import GUIDED_PROMPT, demonstrations, problems
from safetensors.torch import load_file
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN
from wandb_file import wandb_records

from trl_offpolicy import DataRewriter, RewriteConfig
from trl_offpolicy.cli import main
from trl_offpolicy.cli.arguments import last_checkpoint
from trl_offpolicy.cli.loop import _numbers, _sentence
from trl_offpolicy.cli.sft import sft_parser
from trl_offpolicy.data.rows import Verdict
from trl_offpolicy.data.tokenization import encode_prompt
from trl_offpolicy.evaluation.forgetting import measure_forgetting
from trl_offpolicy.loop import rounds
from trl_offpolicy.loop.loop_config import LoopConfig
from trl_offpolicy.loop.rounds import Loop, _measured_on, _mentions
from trl_offpolicy.runs import interrupts
from trl_offpolicy.runs.checkpoints import whole_checkpoints
from trl_offpolicy.runs.journal import Journal
from trl_offpolicy.runs.run_directory import RunDirectory
from trl_offpolicy.runs.run_memory import RunMemory
from trl_offpolicy.sampling.loading import load_model
from trl_offpolicy.sampling.log_probs import target_log_probs


TRAINING = "objective: iw\nlearning_rate: 1.0e-3\nmax_steps: 2\nper_device_train_batch_size: 4\nuse_cpu: true\nbf16: false\ndtype: float32\nreport_to: none\ndisable_tqdm: true\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with demonstrations, one of which is there twice, and the options of a training and of the loop."""
    monkeypatch.chdir(tmp_path)
    rows = demonstrations(problems(7, 9, (2, 3)))
    rows = [*rows, rows[0]]
    Path("demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("train.yaml").write_text(TRAINING)
    Path("loop.yaml").write_text(
        f"guided_prompt: {json.dumps(GUIDED_PROMPT)}\nnum_generations: 2\nmax_completion_length: 60\ntrain_config: train.yaml\nverifier: numeric\n"
        f"model_name_or_path: {POLICY}\ndataset_name: demos.jsonl\n"
    )
    return tmp_path


@pytest.fixture
def steps(monkeypatch):
    """Runs the steps in this process, and lists the command and round of each."""
    run = []

    def in_this_process(command, env, **_):
        run.append(command[3])
        return SimpleNamespace(wait=lambda: main(command[3:]))

    monkeypatch.setattr(rounds, "subprocess", SimpleNamespace(Popen=in_this_process))
    return run


@pytest.fixture
def untrained(monkeypatch, steps):
    """Those steps, but a training leaves the policy as it was, and nothing is measured."""

    def in_this_process(command, env, **_):
        def wait():
            if command[3] == "rewrite":
                return main(command[3:])
            if command[3] == "sft":
                shutil.copytree(POLICY, command[command.index("--output_dir") + 1])
            return 0

        steps.append(command[3])
        return SimpleNamespace(wait=wait)

    monkeypatch.setattr(rounds, "subprocess", SimpleNamespace(Popen=in_this_process))
    return steps


def loop(*options):
    return main(["loop", "--config", "loop.yaml", *map(str, options)])


def rows_of(directory):
    return load_dataset("parquet", data_files=f"{directory}/*.parquet", split="train")


def weights(directory):
    return load_file(Path(directory) / "model.safetensors")


def test_each_round_is_drawn_by_the_policy_that_the_last_one_trained(here, steps, capsys):
    assert loop("--output_dir", "run", "--rounds", 2) == 0
    assert steps == ["rewrite", "sft", "gap"] * 2
    first, second = (rows_of(f"run/round-{r}/rewrite/dataset") for r in (0, 1))
    assert first["id"] == second["id"] and len(set(second["id"])) == 8
    # The first round is what `rewrite` and `sft` do by themselves.
    assert main(["rewrite", *options("run/round-0/rewrite.yaml"), "--output_dir", "alone"]) == 0
    alone = rows_of("alone/dataset")
    assert alone.to_list() == first.to_list()
    train = ["sft", "--config", "train.yaml", "--model_name_or_path", POLICY, "--dataset_name", "alone/dataset"]
    assert main([*train, "--output_dir", "alone-sft"]) == 0
    trained = weights("run/round-0/train")
    assert all(torch.equal(tensor, trained[name]) for name, tensor in weights("alone-sft").items())
    # The second is drawn by what the first has trained: a forward of that gives its log-probs, one of the initial policy does not.
    own = [row for row in second if row["source"] == "self"]
    assert own and not {row["model_revision"] for row in own} & {row["model_revision"] for row in first}
    drawn = torch.tensor([x for row in own for x in row["behavior_log_probs"]])
    for directory, same in (("run/round-0/train", True), (POLICY, False)):
        model = load_model(directory, dtype=torch.float32)
        pairs = [(prompt_of(row), row["completion_ids"]) for row in own]
        again = torch.cat(target_log_probs(model, pairs, progress=False))
        assert torch.allclose(again, drawn, atol=1e-4) is same
    # Each round trains the initial policy; it is measured; what is done is not done again, and another setting is refused.
    found = json.loads(Path("run/rounds.json").read_text())["rounds"]
    assert [sum(each["sources"].values()) for each in found] == [8, 8] and found[1]["forgetting"]["kl"] != 0
    assert main(["report", "run", "--output_dir", "page"]) == 0
    page = Path("page/report.md").read_text()
    shown = [line.split(" | ")[0] for line in page.split("## Yield")[0].splitlines() if line.startswith("| ")]
    assert shown == ["| round", "| ---", "| 0", "| 1"] and f"{found[1]['forgetting']['kl_per_token']:.4f} [" in page
    names = {"rounds-0.svg", *(f"rounds-0-{name}.svg" for name in ("KL", "entropy", "length"))}
    assert names <= {file.name for file in Path("page/figures").iterdir()} and "| mentions |" in page
    capsys.readouterr()
    assert loop("--output_dir", "run", "--rounds", 2) == 0 and len(steps) == 6
    assert loop("--output_dir", "run", "--rounds", 2, "--refresh", "unsolved") == 2
    assert "`refresh` was 'all' there and is 'unsolved' now" in capsys.readouterr().err
    assert loop("--output_dir", "run", "--rounds", 2, "--temperature", 0.5) == 2
    assert "`temperature` was None there and is 0.5 now" in capsys.readouterr().err
    Path("train.yaml").write_text(TRAINING.replace("iw", "dft"))
    assert loop("--output_dir", "run") == 2 and "`train_config` was" in capsys.readouterr().err


def options(file):
    return ["--config", file]


def prompt_of(row):
    from transformers import AutoTokenizer

    return encode_prompt(AutoTokenizer.from_pretrained(POLICY), row["prompt"])


def test_unsolved_rows_are_asked_again_and_the_others_carried_over(here, steps):
    """The second copy of a problem keeps its id, whichever of the two is asked again."""
    config = Path("loop.yaml").read_text().replace("num_generations: 2", "num_generations: 1")
    general = [
        {"prompt": [{"role": "user", "content": f"A box holds {n} pens. B adds 2. How many?"}]} for n in range(9)
    ]
    Path("general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in general))
    Path("loop.yaml").write_text(config + "replay_dataset: general.jsonl\nreplay_share: 0.2\n")
    assert (
        loop("--output_dir", "run", "--rounds", 2, "--refresh", "unsolved", "--train_from", "last", "--seed", 5) == 0
    )
    before, after = rows_of("run/round-0/rewrite/dataset").to_list(), rows_of("run/round-1/dataset").to_list()
    assert [row["id"] for row in before] == [row["id"] for row in after]
    solved = [row["source"] == "self" for row in before]
    assert any(solved) and not all(solved)
    assert [new == old for new, old in zip(after, before, strict=True) if old["source"] == "self"] == [True] * sum(
        solved
    )
    asked = [json.loads(line) for line in Path("demos.jsonl").read_text().splitlines()]
    again = load_dataset("parquet", data_files="run/round-1/unsolved.parquet", split="train")
    assert again.to_list() == [row for row, own in zip(asked, solved, strict=True) if not own]
    new = [row for row, own in zip(after, solved, strict=True) if not own]
    drawn_before = {row["model_revision"] for row in before if row["source"] == "self"}
    assert not drawn_before & {row["model_revision"] for row in new if row["source"] == "self"}
    found = json.loads(Path("run/rounds.json").read_text())["rounds"][1]
    rank = {"expert": 0, "guided": 1, "self": 2}
    better = sum(rank[n["source"]] > rank[o["source"]] for n, o in zip(after, before, strict=True))
    assert found["improved"] == better and found["sources"] == dict(
        Counter({"self": 0, "guided": 0, "expert": 0}) | Counter(row["source"] for row in after)
    ) | {source: 0 for source in rank if source not in {row["source"] for row in after}}
    # both rounds are trained on the initial policy's answers to general prompts too
    replay = rows_of("run/round-0/rewrite/replay").to_list()
    assert len(replay) == 2 and {row["source"] for row in replay} == {"replay"}
    assert {row["model_revision"] for row in replay} == {row["model_revision"] for row in before}
    for directory, rows in (("run/round-0/rewrite", before), ("run/round-1", after)):
        assert rows_of(f"{directory}/with_replay").to_list() == replay + rows
        trained = json.loads(Path(f"{directory.removesuffix('/rewrite')}/train/trainer_state.json").read_text())
        assert any("nll/replay" in entry for entry in trained["log_history"])
    # training goes on from the round before
    assert any(
        not torch.equal(a, b)
        for a, b in zip(weights("run/round-0/train").values(), weights("run/round-1/train").values(), strict=True)
    )
    assert "run/round-0/train" in json.loads(Path("run/loop.jsonl").read_text().splitlines()[5])["command"]


def test_problems_without_demonstrations_are_asked_again_by_their_ids(here, untrained, capsys):
    """Those that are not solved have no row: they are counted, asked again, and newly solved ones are rows that improved."""
    rows = [{k: v for k, v in row.items() if k != "completion"} for row in demonstrations(problems(10, 9, (2, 4)))]
    rows.append(rows[0])
    Path("demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--rounds", 2, "--stages", "self", "--num_generations", 1, "--seed", 5)
    assert loop("--output_dir", "run", *given, "--refresh", "unsolved") == 0
    before, after = rows_of("run/round-0/rewrite/dataset").to_list(), rows_of("run/round-1/dataset").to_list()
    solved = {row["id"] for row in before}
    asked = [
        row
        for row, id in zip(rows, RunMemory.load(Path("run/round-0/rewrite/rows.npz")).ids(), strict=True)
        if id not in solved
    ]
    again = load_dataset("parquet", data_files="run/round-1/unsolved.parquet", split="train")
    assert again.to_list() == asked and 0 < len(asked) < len(rows)
    assert [row for row in after if row["id"] in solved] == before and len({row["id"] for row in after}) == len(after)
    first, second = json.loads(Path("run/rounds.json").read_text())["rounds"]
    assert first["sources"]["unsolved"] == len(asked) and first["sources"]["self"] == len(before)
    assert second["improved"] == len(after) - len(before) > 0
    assert second["sources"].get("unsolved", 0) == len(rows) - len(after)
    assert f"unsolved {len(asked) / len(rows):.1%}" in capsys.readouterr().out


def test_it_ends_when_every_problem_is_solved_and_when_none_is(here, untrained, capsys):
    easy = demonstrations(problems(4, 9, (1,)))
    Path("demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in easy))
    given = ("--refresh", "unsolved", "--verifier_kwargs", '{"rel_tol": 1e9}')
    for _ in range(2):  # and so when it is asked again
        assert loop("--output_dir", "run", *given) == 0 and untrained == ["rewrite", "sft", "gap"]
        assert "stopped after round 0: every problem is solved by the policy itself." in capsys.readouterr().out
    bare = [{k: v for k, v in row.items() if k != "completion"} for row in easy]
    Path("demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    assert loop("--output_dir", "none", "--stages", "self", "--max_completion_length", 3) == 0
    out = capsys.readouterr().out
    assert "unsolved 100.0%" in out and untrained == ["rewrite", "sft", "gap", "rewrite"]
    assert "stopped before the training of round 0: no problem is solved, so there is no row to train on." in out


def test_a_round_of_the_hard_problems_is_compared_with_what_they_were_in_round_0(here, untrained, capsys):
    """The policy is the same, and what was cut is cut again: no collapse, though of all problems few were cut in round 0."""
    rows = demonstrations([*problems(5, 9, (1,)), *problems(1, 9, (5,))])
    Path("demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--stages", "self", "--num_generations", 1, "--max_completion_length", 45, "--min_entropy", 0)
    assert loop("--output_dir", "run", "--rounds", 2, "--refresh", "unsolved", *given) == 0
    first, second = json.loads(Path("run/rounds.json").read_text())["rounds"]
    assert first["cut"] < 0.5 < second["cut"] and second["same_problems_in_round_0"]["cut"] > 0.5
    assert "stopped" not in capsys.readouterr().out and untrained == ["rewrite", "sft", "gap"] * 2
    # Without demonstrations the second round comes to no new row.
    bare = [{k: v for k, v in row.items() if k != "completion"} for row in rows]
    Path("demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    assert loop("--output_dir", "bare", "--rounds", 2, "--refresh", "unsolved", *given) == 0
    first, second = json.loads(Path("bare/rounds.json").read_text())["rounds"]
    assert second["improved"] == 0 and second["sources"] == first["sources"] and second["sources"]["unsolved"] == 1
    assert rows_of("bare/round-1/dataset").to_list() == rows_of("bare/round-0/rewrite/dataset").to_list()


def test_each_round_trains_an_adapter_on_the_same_policy(here, steps):
    Path("train.yaml").write_text(
        TRAINING.replace("1.0e-3", "1.0e-2") + "use_peft: true\nlora_target_modules: all-linear\n"
    )
    before = file_digest(POLICY)
    assert loop("--output_dir", "run", "--rounds", 2, "--num_generations", 1) == 0
    first, second = (rows_of(f"run/round-{r}/rewrite/dataset") for r in (0, 1))
    drew = [{row["model_revision"] for row in rows if row["source"] == "self"} for rows in (first, second)]
    assert drew[0] and drew[1] and not drew[0] & drew[1] and file_digest(POLICY) == before
    for r in (0, 1):
        adapter = json.loads(Path(f"run/round-{r}/train/adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == POLICY
        assert not Path(f"run/round-{r}/train/model.safetensors").exists()


def file_digest(directory):
    return hashlib.sha256((Path(directory) / "model.safetensors").read_bytes()).hexdigest()


def test_reasons_to_stop(tmp_path):
    first = {"round": 0, "cut": 0.1, "mentions": None, "entropy": 1.0, "forgetting": {"kl_per_token": 0.01}}
    first |= {"sources": {"self": 3, "expert": 1}}

    def collapse(config=None, **changed):
        return Loop(tmp_path, config or LoopConfig(), {}, {}, None).collapse([first, {**first, **changed}])

    def reason(config=None, **changed):
        return Loop(tmp_path, config or LoopConfig(), {}, {}, None).reason_to_stop({**first, "improved": 3, **changed})

    assert collapse() is reason() is None
    assert "60% of the attempts were cut at the limit, in round 0 10%" in collapse(cut=0.6)
    assert "75% of the correct guided attempts mention the reference, in round 0 0%" in collapse(mentions=0.75)
    assert collapse(LoopConfig(max_mentions=0.75), mentions=0.75) is None
    assert "fell from 1.000 to 0.200 nats" in collapse(entropy=0.2)
    assert collapse(LoopConfig(min_entropy=0.1), entropy=0.2) is None
    # Of the problems that are asked again, round 0's draws were those that failed: it must be worse than all of round 0 too.
    same = {"cut": 0.7, "mentions": None, "entropy": 0.5}
    assert collapse(cut=0.6, same_problems_in_round_0=same) is None
    assert "in round 0 40%" in collapse(cut=0.6, same_problems_in_round_0={**same, "cut": 0.4})
    assert collapse(entropy=0.2, same_problems_in_round_0=same) is None
    assert "fell from 1.000" in collapse(entropy=0.2, same_problems_in_round_0={**same, "entropy": 2.0})
    assert "75%" in collapse(mentions=0.75, same_problems_in_round_0=same)
    assert collapse(mentions=0.75, same_problems_in_round_0={**same, "mentions": 0.6}) is None
    assert "no problem is solved" in collapse(sources={"self": 0, "unsolved": 4})
    assert "no row came from a better source" in reason(improved=0)
    above = reason(LoopConfig(max_kl=0.05), forgetting={"kl_per_token": 0.06})
    assert "0.060 nats per token, above max_kl=0.05" in above
    assert reason(LoopConfig(max_kl=0.05), forgetting={"kl_per_token": 0.04}) is None


def test_a_policy_that_collapses_is_not_trained_on(here, steps, capsys):
    """Its training in round 0 makes it write without an end: every attempt of round 1 is cut, and all rows are demonstrations."""
    Path("train.yaml").write_text(TRAINING.replace("1.0e-3", "1.0"))
    assert loop("--output_dir", "run", "--rounds", 2, "--refresh", "unsolved") == 0
    out = capsys.readouterr().out
    assert "stopped before the training of round 1: 100% of the attempts were cut at the limit, in round 0 " in out
    assert (
        steps == ["rewrite", "sft", "gap", "rewrite"]
        and len(json.loads(Path("run/rounds.json").read_text())["rounds"]) == 2
    )
    assert loop("--output_dir", "run", "--rounds", 2, "--refresh", "unsolved") == 0 and len(steps) == 4


def test_retellings_that_mention_the_reference_are_counted_whether_or_not_they_are_rejected(tmp_path):
    """A guided row that speaks of a teacher is a mention, and so is here every attempt, all of which are right."""

    def run(name, **options):
        options |= {"stages": ["guided"], "num_generations": 1, "guided_prompt": GUIDED_PROMPT}
        args = RewriteConfig(str(tmp_path / name), max_completion_length=30, **options)
        right = lambda completions, answers: [Verdict.CORRECT] * len(completions)  # noqa: E731
        DataRewriter(POLICY, args, verifier=right).rewrite(demonstrations(problems(4, 9, (2,))))
        return RunDirectory(tmp_path / name)

    rejected = run("rejected", mention_phrases=["(?s).{12,}"])
    counts, first = rejected.metrics["rejected"], rejected.rows().to_table()["id"][0].as_py()
    assert counts["mention"] == 4 and _mentions(rejected, counts) == 1
    assert [_measured_on(ids, rejected.path)["mentions"] for ids in ({first}, set())] == [1, None]
    kept = run("kept", reject_mentions=False)
    (file,) = kept.row_files
    rows = load_dataset("parquet", data_files=str(file), split="train")
    counts = kept.metrics["rejected"]
    assert kept.sources["guided"] == 4 and _mentions(kept, counts) == 0
    told = [{"role": "assistant", "content": "As the teacher's solution says, 7."}]
    rows.map(lambda row, i: {"completion": told if i == 0 else row["completion"]}, with_indices=True).to_parquet(file)
    assert _mentions(kept, counts) == 1 / 4
    assert [_measured_on({id}, kept.path)["mentions"] for id in rows["id"]] == [1, 0, 0, 0]


@pytest.mark.slow
def test_the_rounds_and_their_steps_are_one_group_on_wandb(here, monkeypatch, process):
    """Real W&B files, written offline: one run of the loop, and one of each step, in the same project."""
    import wandb

    def of_its_own(command, env, **_):
        child = process(run_step, here, command[3:], env)
        child.join()
        return SimpleNamespace(wait=lambda: child.exitcode)

    monkeypatch.setattr(rounds, "subprocess", SimpleNamespace(Popen=of_its_own))
    monkeypatch.setenv("WANDB_DIR", str(here))
    wandb.teardown()  # it reads its environment once
    Path("train.yaml").write_text(TRAINING.replace("report_to: none\n", ""))
    assert loop("--output_dir", "run", "--stages", "guided", "--rounds", 1, "--report_to", "wandb") == 0
    wandb.teardown()
    runs = {}
    for file in here.glob("wandb/offline-run-*/*.wandb"):
        records = list(wandb_records(file))
        (run,) = (record.run for record in records if record.HasField("run"))
        logged = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for r in records for i in r.history.item}
        runs[run.display_name] = run, logged
    group = Path("run/wandb_group").read_text()
    assert {(run.run_group, run.project) for run, _ in runs.values()} == {(group, "huggingface")}
    assert set(runs) == {f"{group}-loop", "round-0-rewrite", "round-0-train"}
    (found,) = json.loads(Path("run/rounds.json").read_text())["rounds"]
    logged = runs[f"{group}-loop"][1]
    assert logged["share/guided"] == found["sources"]["guided"] / 8 and logged["sampled"] == found["sampled"]
    assert "train/nll" in runs["round-0-train"][1] and "rows" in runs["round-0-rewrite"][1]


def test_what_a_round_came_to_as_numbers():
    forgetting = {"kl": 0.5, "kl_per_token": 0.1, "kl_ci95": [0.4, 0.6]}
    accuracy = {"dev": {"avg@2": 0.5, "avg@2_ci95": [0.4, 0.6], "greedy": 0.25}}
    sources = {"self": 6, "guided": 1, "expert": 1}
    summary = {
        "round": 1,
        "sources": sources,
        "cut": None,
        "improved": 3,
        "forgetting": forgetting,
        "accuracy": accuracy,
    }
    assert _numbers(summary) == {
        "share/self": 0.75, "share/guided": 0.125, "share/expert": 0.125, "round": 1, "improved": 3, "forgetting/kl": 0.5,
        "forgetting/kl_per_token": 0.1, "dev/avg@2": 0.5, "dev/greedy": 0.25,
    }  # fmt: skip
    assert _sentence(summary).endswith("KL(π_0‖π) 0.1000 nats per token · dev avg@2 50.0%")
    nothing_judged = {**summary, "accuracy": {"dev": {"avg@2": None, "avg@2_ci95": None}}}
    assert _sentence(nothing_judged).endswith("dev avg@2 not told")


def test_a_loop_stops_where_it_should(here, steps, capsys):
    Path("train.yaml").write_text(TRAINING.replace("1.0e-3", "2.0e-2"))
    assert loop("--output_dir", "run", "--rounds", 3, "--max_kl", 1e-9) == 0
    assert "stopped after round 0: KL(π_0‖π)" in capsys.readouterr().out and len(steps) == 3
    assert loop("--output_dir", "run", "--rounds", 1, "--max_kl", 1e-9) == 0  # all that was asked for


@pytest.mark.parametrize("given", [["--strategy", "star"], ["--stop", "END"], ["--stages", "guided"]])
def test_forgetting_is_no_step_where_it_cannot_be_measured(here, capsys, given):
    assert loop("--output_dir", "run", "--dry_run") == 0 and "gap --forgetting" in capsys.readouterr().out
    assert loop("--output_dir", "run", "--dry_run", *given) == 0
    told = capsys.readouterr().out
    assert "round 0, train" in told and "gap --forgetting" not in told


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--sampler", "openai"], "goes on serving the initial policy"),
        (["--train_config", "none.yaml"], "there is no such file"),
        (["--shard", "0/2"], "'shard': '0/2'"),
        (["--push_to_hub", "--hub_dataset_id", "me/x"], "push a round with `trl-offpolicy push run/round-0/rewrite`"),
        (["--rounds", "0"], "You passed rounds=0"),
        (["--rounds", "3", "--train_config", "train.yaml", "train.yaml"], "2 files as train_config for 3 rounds"),
        (["--refresh", "some"], "invalid choice: 'some'"),
        (["--max_kl", "-1"], "max_kl=-1.0; it must be above 0"),
        (["--max_kl", "0.1", "--temperature", "0.7"], "max_kl=0.1, but KL(π_0‖π) is measured on attempts"),
        (["--min_entropy", "2"], "min_entropy=2.0; it is a share"),
        (["--train_command", "acelerate launch t.py"], "but there is no program 'acelerate' here"),
        (
            ["--train_config", "typo.yaml"],
            "typo.yaml, line 1: there is no option 'objectiv' (did you mean objective?)",
        ),
        (["--benchmarks", "none.jsonl"], "benchmarks='none.jsonl', but there is no such file"),
        (["--eval_config", "typo.yaml"], "typo.yaml, line 1: there is no option 'objectiv'"),
        (
            ["--train_config", "lora.yaml", "--train_from", "last"],
            "lora.yaml has use_peft: a round's model is an adapter",
        ),
        (["--sampler", "vllm", "--adapter", "me/lora"], "adapter='me/lora': round 0 would be drawn with it"),
        (["--train_config", "recompute.yaml"], "recompute.yaml has precompute_behavior_log_probs"),
        (
            ["--train_config", "recompute.yaml", "--train_from", "last", "--refresh", "unsolved"],
            "recompute.yaml has precompute_behavior_log_probs",
        ),
        (
            [
                "--train_config",
                "recompute.yaml",
                "--train_from",
                "last",
                "--replay_dataset",
                "g.jsonl",
                "--replay_share",
                ".1",
            ],
            "recompute.yaml has precompute_behavior_log_probs",
        ),
        (["--train_config", "other.yaml", "--model_revision", "v1"], "other.yaml has model_revision='v2'"),
    ],
)
def test_options_that_cannot_work(here, command, given, message):
    Path("typo.yaml").write_text("objectiv: iw\n")
    Path("lora.yaml").write_text("use_peft: true\n")
    Path("recompute.yaml").write_text("precompute_behavior_log_probs: true\n")
    Path("other.yaml").write_text("model_revision: v2\n")
    result = command("loop", "--config", "loop.yaml", "--output_dir", "run", *given)
    assert result.returncode == 2 and message in result.stderr and not Path("run").exists()


def test_a_round_is_trained_and_measured_with_the_model_and_template_that_draw_it(here):
    rewriting = {"model_revision": "v1", "trust_remote_code": True, "chat_template_path": "t.jinja"}
    rewriting |= {"model_name_or_path": POLICY, "dataset_name": "demos.jsonl"}

    def commands(round, **config):
        steps = Loop(Path("run"), LoopConfig(train_config=["train.yaml"], **config), rewriting, rewriting, None).steps(
            round
        )
        return {step.name: step.command for step in steps}

    for of_round in (commands(0), commands(1)):
        _, args, model = sft_parser().parse_args_and_config(of_round["train"][4:])
        assert (model.model_name_or_path, model.model_revision) == (POLICY, "v1")
        assert args.chat_template_path == "t.jinja" and args.trust_remote_code
        assert {"--model_revision", "--chat_template_path"} < set(of_round["gap"])
    # What a round has trained is a directory, without revisions; another program is told the same.
    later = commands(1, train_from="last", train_command=f"{sys.executable} train.py")["train"]
    assert "--model_revision" not in later and later[later.index("--chat_template_path") + 1] == "t.jinja"
    Path("train.yaml").write_text(TRAINING + "chat_template_path: marked.jinja\n")  # what training alone needs of it
    assert "--chat_template_path" not in commands(0)["train"]


def test_log_probs_may_be_taken_anew_where_each_round_trains_the_policy_that_drew_it(here, capsys):
    Path("train.yaml").write_text(TRAINING + "precompute_behavior_log_probs: true\n")
    assert loop("--output_dir", "run", "--train_from", "last", "--dry_run") == 0 and capsys.readouterr()


@pytest.mark.parametrize(
    ("left", "whole"),
    [
        ([OPTIMIZER_NAME], True),
        ([OPTIMIZER_NAME_BIN], True),  # FSDP, the whole state
        (["optimizer_0/__0_0.distcp"], True),  # FSDP, sharded
        (["global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt", "latest"], True),  # DeepSpeed
        (["model.safetensors", "training_args.bin"], False),  # `save_only_model`
    ],
)
def test_a_training_goes_on_from_a_checkpoint_that_is_whole(tmp_path, left, whole):
    for step in (3, 20, 100):
        for name in left:
            file = tmp_path / f"checkpoint-{step}" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    for step, state in ((3, "{}"), (20, "{}"), (100, '{"epoch": 1.')):  # the last one was killed as it wrote it
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-20"] * whole
    if whole:
        assert last_checkpoint("last", str(tmp_path)) == str(tmp_path / "checkpoint-20")
    else:
        with pytest.raises(ValueError, match="no checkpoint in .* has the optimizer's state"):
            last_checkpoint("last", str(tmp_path))


def test_a_training_whose_checkpoints_lack_the_optimizer_is_begun_anew(here):
    for only_model, goes_on in (("true", False), ("false", True)):
        Path("train.yaml").write_text(
            TRAINING + f"save_strategy: steps\nsave_steps: 1\nsave_only_model: {only_model}\n"
        )
        run = Path(f"run-{only_model}")
        train = [
            "sft",
            "--config",
            "train.yaml",
            "--model_name_or_path",
            POLICY,
            "--dataset_name",
            "demos.jsonl",
            "--objective",
            "nll",
        ]
        assert main([*train, "--max_steps", "1", "--output_dir", str(run / "round-0/train")]) == 0
        assert (run / "round-0/train/checkpoint-1/trainer_state.json").exists()
        again = Loop(run, LoopConfig(), {"model_name_or_path": POLICY}, {}, None).steps(0)[1].command
        assert ("--resume_from_checkpoint" in again) is goes_on


def test_a_step_that_a_killed_loop_has_left_behind_keeps_others_out(here, monkeypatch, capsys):
    """It has the lock for as long as it lives."""
    left = []

    def killed(command, pass_fds, **_):
        left.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=pass_fds))
        raise KeyboardInterrupt  # after it nothing of the loop is left

    monkeypatch.setattr(rounds, "subprocess", SimpleNamespace(Popen=killed))
    assert loop("--output_dir", "run") == 3
    assert loop("--output_dir", "run") == 2 and len(left) == 1
    assert "Another `trl-offpolicy loop` works in run, or a step that a killed one" in capsys.readouterr().err
    left[0].communicate()
    with Loop(Path("run"), LoopConfig(), {}, {}, None).alone():
        pass


def test_what_made_a_step_fail_can_be_mended(here, command, steps):
    """A setting is settled by what was done with it: the rewriting's by a finished step, a training's by what it has left."""

    def run(*given):
        return command("loop", "--config", "loop.yaml", "--output_dir", "run", "--rounds", 1, *given)

    def done():
        return [json.loads(line).get("step") for line in Path("run/loop.jsonl").read_text().splitlines()]

    Path("empty.jsonl").touch()
    result = run("--dataset_name", "empty.jsonl")
    assert result.returncode == 2 and "but that file is empty" in result.stderr and done() == [None]
    Path("train.yaml").write_text(TRAINING + "eval_strategy: steps\n")
    result = run()
    assert (
        result.returncode == 2 and "round 0: `train` ended with exit code 2; its last words are above" in result.stderr
    )
    assert done() == [None, "rewrite"]
    assert "`seed` was None there and is 7 now" in run("--seed", 7).stderr
    Path("train.yaml").write_text(TRAINING)
    result = run("--dry_run")
    assert "round 0, rewrite (done)" in result.stdout and "round 0, train: " in result.stdout
    assert run().returncode == 0 and done() == [None, "rewrite", "train", "gap"]
    assert steps == ["rewrite", "rewrite", "sft", "sft", "gap"]
    Path("second.yaml").write_text(TRAINING.replace("1.0e-3", "1.0e-4"))
    assert "`train_config` was" in run("--train_config", "second.yaml").stderr
    assert run("--train_config", "train.yaml", "second.yaml").returncode == 0  # of a round that has not begun


def test_ctrl_c_lets_the_step_end(here, command, monkeypatch):
    """It reaches the step too, which writes what it has and ends."""
    waits = iter([KeyboardInterrupt(), 3])

    def wait():
        if isinstance(outcome := next(waits), BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(rounds, "subprocess", SimpleNamespace(Popen=lambda *_, **__: SimpleNamespace(wait=wait)))
    result = command("loop", "--config", "loop.yaml", "--output_dir", "run")
    assert result.returncode == 3 and "run the same command again to go on" in result.stdout
    assert next(waits, None) is None


def test_sigterm_reaches_the_step_as_ctrl_c(tmp_path):
    """Of a loop that a scheduler ends, no step goes on by itself."""
    script = (
        "import os, signal, sys, time\n"
        "try:\n    os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    open('stopped', 'w').close(); sys.exit(3)\n"
    )
    with pytest.raises(KeyboardInterrupt), interrupts.terminable():
        rounds._ended(
            subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, preexec_fn=interrupts.heed_interrupts)
        )
    assert (tmp_path / "stopped").exists()


def run_step(directory, argv, env=None):
    """A step of a loop, in a process of its own."""
    os.chdir(directory)
    os.environ.update(env or {})
    sys.exit(main(argv))


def live(directory, argv, events):
    """
    A loop and its steps, each a process, until `events` attempts were written, optimizer steps made and steps ended:
    then kill -9 to all of them. Notes how many there were in all.
    """
    os.chdir(directory)
    os.setsid()
    seen = mmap.mmap(-1, 8)  # shared with the steps

    def count():
        number = int.from_bytes(seen[:], "little") + 1
        seen[:] = number.to_bytes(8, "little")
        if number == events:
            os.killpg(0, signal.SIGKILL)

    def counted(function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            count()
            return result

        return call

    def forked(command, env, **_):
        sys.stdout.flush()
        if not (child := os.fork()):
            os._exit(main(command[3:]))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return SimpleNamespace(wait=lambda: code)

    Journal.append, Trainer.training_step = counted(Journal.append), counted(Trainer.training_step)
    rounds.subprocess = SimpleNamespace(Popen=counted(forked))
    code = main(argv)
    Path(f"{argv[-1]}.events").write_text(str(int.from_bytes(seen[:], "little")))
    sys.exit(code)


@pytest.mark.slow
def test_killed_five_times_it_comes_to_the_same(here, process):
    """kill -9 to the loop and its step at random moments; rows and weights are those of a run that nobody disturbed."""
    Path("train.yaml").write_text(TRAINING + "save_strategy: steps\nsave_steps: 1\n")
    argv = ["loop", "--config", "loop.yaml", "--rounds", "2", "--output_dir"]

    def life(name, events=None):
        child = process(live, here, [*argv, name], events)
        child.join()
        with open(Path(name, "loop.lock")) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until its step has ended too, which was killed with it
        return child.exitcode

    assert life("calm") == 0
    total = int(Path("calm.events").read_text())
    moments = sorted(random.Random(0).sample(range(1, total), 5))
    lives = [
        life("killed", moment - before) for before, moment in zip([0, *moments], moments, strict=False)
    ]  # what a life does again, such as the forward of a gap, makes its moment come earlier
    assert lives == [-signal.SIGKILL] * 5
    assert life("killed") == 0
    again = int(Path("killed.events").read_text())
    assert 0 < again < total
    for r in (0, 1):
        calm, killed = (rows_of(f"{run}/round-{r}/rewrite/dataset").to_list() for run in ("calm", "killed"))
        for row in [*calm, *killed]:
            row["model"] = row["model"].removeprefix("calm/").removeprefix("killed/")
        # An attempt after a resume may be drawn in a batch of another size, which can round the sixth decimal of its log-probs.
        drawn = [torch.tensor([x for row in rows for x in row.pop("behavior_log_probs")]) for rows in (calm, killed)]
        assert calm == killed and torch.allclose(*drawn, atol=2e-6, rtol=0)
        ours, theirs = (weights(f"{run}/round-{r}/train") for run in ("calm", "killed"))
        assert all(torch.allclose(tensor, theirs[name], atol=1e-6, rtol=0) for name, tensor in ours.items())


# ---- the divergence from the initial policy ----


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A run whose attempts the embedded policy drew, and its rows."""
    directory = tmp_path_factory.mktemp("drawn") / "run"
    args = RewriteConfig(str(directory), num_generations=2, max_completion_length=60, guided_prompt=GUIDED_PROMPT)
    return directory, DataRewriter(POLICY, args).rewrite(demonstrations(problems(12, 3, (2, 3, 4))))


def test_forgetting_is_nothing_for_the_policy_itself_and_grows_with_the_distance(drawn, tmp_path, command):
    directory, rows = drawn
    model = load_model(POLICY, dtype=torch.float32)
    own = measure_forgetting(model, str(directory))
    assert own["problems"] == 12 and own["kl"] == pytest.approx(0, abs=1e-4)
    # a naive loop over the journal, for a model that is another one
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.02)
    first = {}
    for line in (directory / "journal.jsonl").open():
        entry = json.loads(line)
        if entry.get("stage") == "self" and entry["attempt"] == 0:
            first[entry["id"]] = entry
    assert any(entry["verdict"] != "correct" for entry in first.values())
    differences, tokens = [], 0
    for row in rows:
        entry, prompt = first[row["id"]], prompt_of(row)
        ids = torch.tensor([prompt + entry["completion_ids"]])
        log_probs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        now = log_probs.gather(1, ids[0, len(prompt) :, None]).sum().item()
        differences.append(sum(entry["behavior_log_probs"]) - now)
        tokens += len(entry["completion_ids"])
    found = measure_forgetting(model, str(directory), output_dir=str(tmp_path))
    assert found["kl"] == pytest.approx(sum(differences) / 12, abs=1e-4) and found["kl"] > 10 * abs(own["kl"])
    assert found["kl_per_token"] == pytest.approx(sum(differences) / tokens, abs=1e-5)
    assert found["kl_ci95"][0] < found["kl"] < found["kl_ci95"][1]
    assert json.loads((tmp_path / "forgetting.json").read_text())["kl"] == found["kl"]
    result = command(
        "gap", "--forgetting", "--model_name_or_path", POLICY, "--dataset_name", directory, "--output_dir", tmp_path
    )
    assert result.returncode == 0 and "on 12 problems" in result.stdout


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"keep_rejected": False}, "rejected attempts were not kept"),
        ({"temperature": 0.7}, r"sampled with \{'temperature': 0.7\}"),
        ({"stages": ["guided"]}, r"sampled with \['guided'\]"),
    ],
)
def test_runs_from_which_it_cannot_be_told(tmp_path, changed, message):
    args = RewriteConfig(str(tmp_path / "run"), num_generations=1, max_completion_length=20, **changed)
    DataRewriter(POLICY, args).rewrite(demonstrations(problems(3, 3, (5,))))
    with pytest.raises(ValueError, match=message):
        measure_forgetting(POLICY, str(tmp_path / "run"))
    with pytest.raises(ValueError, match="no finished `trl-offpolicy rewrite`"):
        measure_forgetting(POLICY, str(tmp_path))


def test_problems_without_demonstrations_count_too(tmp_path):
    """Those that were not solved have no row, but a prompt; a run from before these were kept is refused."""
    rows = [{k: v for k, v in row.items() if k != "completion"} for row in demonstrations(problems(6, 3, (2, 5)))]
    args = RewriteConfig(str(tmp_path), num_generations=1, max_completion_length=60, stages=["self"])

    def half(completions, answers):
        return ["correct" if int(answer) % 2 else "wrong" for answer in answers]

    assert 0 < len(DataRewriter(POLICY, args, verifier=half).rewrite(rows)) < 6
    assert measure_forgetting(POLICY, str(tmp_path), model_init_kwargs={"dtype": torch.float32})["problems"] == 6
    file = tmp_path / "unsolved.jsonl"
    old = ({**json.loads(line), "prompt": None} for line in file.open())
    file.write_text("".join(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n" for row in old))
    with pytest.raises(ValueError, match="unsolved problems have no prompt.* Run the same .* again"):
        measure_forgetting(POLICY, str(tmp_path))


def test_an_adapter_is_measured_on_the_model_it_was_trained_on(drawn, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load_model(POLICY, dtype=torch.float32), LoraConfig(target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(POLICY).save_pretrained(tmp_path)
    directory, _ = drawn
    found = measure_forgetting(str(tmp_path), str(directory), model_init_kwargs={"dtype": torch.float32})
    merged = measure_forgetting(model.merge_and_unload(), str(directory))
    assert found["kl"] == pytest.approx(merged["kl"], abs=1e-3) and found["kl"] > 0.01


def test_documented_loop_commands_parse():
    from trl_offpolicy.cli.arguments import parser_for
    from trl_offpolicy.cli.loop import LOOP_EXAMPLES, LoopArguments

    for line in LOOP_EXAMPLES.replace("\\\n", " ").splitlines():
        if "--model_name_or_path" in line:
            parser_for((LoopArguments, RewriteConfig), "loop", "", "").parse_args_and_config(
                shlex.split(line, comments=True)[2:]
            )
