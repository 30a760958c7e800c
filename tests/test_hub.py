"""Everything that goes to the Hub, by the real clients over HTTP to a Hub on 127.0.0.1; and the cards, which make nothing up."""

import copy
import itertools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import wait
from pathlib import Path

import jinja2
import pytest
import yaml
from conftest import POLICY, ROOT
from datasets import Dataset, load_dataset
from huggingface_hub import DatasetCard, HfApi, ModelCard, close_session, constants
from huggingface_hub.errors import HfHubHTTPError
from loopback_hub import TOKEN
from peft import LoraConfig
from scripted import ScriptedSampler, rows, verify
from training import config, demonstrations, rewritten
from wandb_file import wandb_records

from trl_offpolicy import (
    DataRewriter,
    DFTConfig,
    DFTTrainer,
    ImportanceWeightedSFTConfig,
    ImportanceWeightedSFTTrainer,
    RewriteConfig,
    cli,
    evaluate,
    measure_policy_gap,
)
from trl_offpolicy.cards import template_path
from trl_offpolicy.cli.rewrite import RewriteArguments
from trl_offpolicy.data.formats import output_features
from trl_offpolicy.rewriting.dataset_card import END
from trl_offpolicy.rewriting.push import open_repo, push_run, read_card
from trl_offpolicy.rewriting.rewrite_config import HubOptions
from trl_offpolicy.runs.run_directory import RunDirectory
from trl_offpolicy.runs.run_log import PeriodicPush, wandb_run
from trl_offpolicy.sampling.sampler import SamplerError


SOURCE_CARD = "---\nlicense: apache-2.0\nlanguage: en\n---\n# Demonstrations\n"


def put_card(card, repo_id):
    """As `card.push_to_hub`, which in huggingface_hub 1.31 asks huggingface.co itself whether a card is valid."""
    HfApi().upload_file(
        path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id=repo_id, repo_type="dataset"
    )


def source_dataset(hub, num_rows=30):
    """A dataset with a licence on the Hub, as a user loads it."""
    Dataset.from_list(rows(num_rows)).push_to_hub("me/source")
    card = DatasetCard.load("me/source")
    card.data.license, card.data.language = "apache-2.0", "en"
    put_card(card, "me/source")
    return load_dataset("me/source", split="train")


def rewriter(tmp_path, name="run", **kwargs):
    args = RewriteConfig(str(tmp_path / name), **{"num_generations": 3, **kwargs})
    return DataRewriter("m", args, sampler=ScriptedSampler(), verifier=verify)


def fresh(repo_id, *args, **kwargs):
    return load_dataset(repo_id, *args, split="train", download_mode="force_redownload", **kwargs)


def same(found, expected):
    return found.features == expected.features and found.to_list() == expected.to_list()


# ---- datasets ----


def test_rows_and_journals_of_different_runs_are_never_read_as_one(tmp_path):
    """After an --overwrite that was interrupted, from shards whose journals are elsewhere, and beside a copy of a journal."""

    class Dies(ScriptedSampler):
        def poll(self):
            raise SamplerError("no server")

    data, run = Dataset.from_list(rows(30)), tmp_path / "run"
    rewriter(tmp_path).rewrite(data)
    (run / "journal-before.jsonl").write_bytes((run / "journal.jsonl").read_bytes())
    sampled = json.loads((run / "metrics.json").read_text())["stages"]["self"]["sampled"]
    found = RunDirectory(run)
    assert found.counts.stages["self"].sampled >= sampled and len(found.journals) == 1
    args = RewriteConfig(str(run), num_generations=5, seed=7, overwrite=True)
    with pytest.raises(SamplerError):
        DataRewriter("m", args, sampler=Dies(), verifier=verify).rewrite(data)
    with pytest.raises(ValueError, match="no `dataset`: its rewrite is not finished"):
        push_run(run, HubOptions(hub_dataset_id="me/out"))
    for i in (0, 1):
        rewriter(tmp_path, f"machine{i}", shard=f"{i}/2").rewrite(data)
    for file in (tmp_path / "machine0" / "dataset.partial").iterdir():
        file.rename(tmp_path / "machine1" / "dataset.partial" / file.name)
    assert rewriter(tmp_path, "machine1", shard="1/2").rewrite(data) is not None
    with pytest.raises(ValueError, match=r"rows of 2 shard\(s\), but 1 journal\(s\): journal-00001-of-00002.jsonl"):
        RunDirectory(tmp_path / "machine1").check()
    (tmp_path / "machine0" / "journal-00000-of-00002.jsonl").rename(
        tmp_path / "machine1" / "journal-00000-of-00002.jsonl"
    )
    RunDirectory(tmp_path / "machine1").check()


def test_pushed_rows_and_attempts_load_back_equal(tmp_path, hub):
    run = rewriter(tmp_path)
    out = run.rewrite(source_dataset(hub).shuffle(seed=1))
    run.push_to_hub("me/out", private=True)
    assert hub.repos["datasets", "me/out"].private
    assert same(fresh("me/out"), out) and out.features == output_features(
        Dataset.from_list(rows(1)).features, ["problem", "solution", "row"]
    )
    journal = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()[1:]]
    attempts = fresh("me/out", "attempts").to_list()
    assert [{k: v for k, v in a.items() if k != "log_prob"} for a in attempts] == [
        {"rejected": None} | {k: v for k, v in e.items() if k not in ("log_prob", "reference", "crc32")}
        for e in journal
    ]
    with pytest.raises(ValueError, match="exists and is public"):
        run.push_to_hub("me/source", private=True)


def test_a_repository_without_an_owner_is_the_users_own(tmp_path, hub, capsys):
    rewriter(tmp_path).rewrite(source_dataset(hub))
    assert cli.main(["push", str(tmp_path / "run"), "--hub_dataset_id", "out"]) == 0
    assert "load_dataset('me/out', split='train')" in capsys.readouterr().out.splitlines()[-1]
    assert fresh("me/out").num_rows == 30
    assert cli.main(["push", str(tmp_path / "run"), "--hub_dataset_id", "out"]) == 0  # when it is there already, too


def test_what_is_missing_here_is_said_before_the_hub_is_asked(tmp_path, hub, capsys, monkeypatch):
    assert cli.main(["push", str(tmp_path / "none"), "--hub_dataset_id", "me/out"]) == 2
    assert "has no journal" in capsys.readouterr().err
    rewriter(tmp_path).rewrite(source_dataset(hub))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert cli.main(["push", str(tmp_path / "run"), "--hub_dataset_id", "me/out"]) == 2
    assert "There is no Hub token to push to me/out with: set HF_TOKEN" in capsys.readouterr().err


def test_shards_are_pushed_as_one(tmp_path, hub):
    """Two shards' files, then the unsharded run in their place."""
    data = source_dataset(hub)
    for shard in ("0/2", "1/2"):
        run = rewriter(tmp_path, "sharded", shard=shard)
        with pytest.raises((FileNotFoundError, ValueError), match="no journal|not finished"):
            run.push_to_hub("me/out")
        run.rewrite(data)
    run.push_to_hub("me/out")
    whole = rewriter(tmp_path)
    out = whole.rewrite(data)
    assert same(fresh("me/out"), out)
    names = {f"{folder}/train-0000{i}-of-00002.parquet" for folder in ("data", "attempts") for i in (0, 1)}
    assert names <= set(hub.files("me/out")) and "metrics.json" in hub.files("me/out")
    assert f"| self | {out['source'][:].count('self')} |" in DatasetCard.load("me/out").text
    whole.push_to_hub("me/out")
    assert same(fresh("me/out"), out) and not names & set(hub.files("me/out"))


def test_what_is_trained_on_is_what_is_pushed(tmp_path, hub):
    """The replay rows too, which stand beside those of the run; of both shards, and counted on the card."""
    general = tmp_path / "general.jsonl"
    general.write_text("".join(json.dumps({"prompt": [{"role": "user", "content": f"Tell of gold:{n} "}]}) + "\n" for n in range(40)))  # fmt: skip
    data, replay = source_dataset(hub), {"replay_dataset": str(general), "replay_share": 0.25}
    for shard in ("0/2", "1/2"):
        run = rewriter(tmp_path, shard=shard, **replay)
        run.rewrite(data)
    run.push_to_hub("me/out")
    trained_on = load_dataset(str(tmp_path / "run" / "with_replay"), split="train")
    assert trained_on.num_rows == 40 and same(fresh("me/out"), trained_on)
    card = DatasetCard.load("me/out").text
    assert "| replay | 10 | 25.0 % |" in card and "30 demonstrations of [me/source]" in card
    assert "10 rows of source `replay`, against forgetting" in card and str(tmp_path) not in card
    assert not any("replay" in path for path in hub.files("me/out"))
    (tmp_path / "run" / "replay" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="replay_share=0.25 and no .*00001-of-00002.parquet: its replay rows are not drawn"):  # fmt: skip
        run.push_to_hub("me/out")


def test_several_rows_for_a_problem_are_pushed_like_others(tmp_path, hub, command):
    options = {"keep": "all", "num_generations": 6, "max_per_problem": 3, "keep_demonstration": True}
    run = rewriter(tmp_path, **options)
    out = run.rewrite(source_dataset(hub))
    run.push_to_hub("me/out")
    assert same(fresh("me/out"), out) and out.num_rows > 60 and set(out["candidate"]) >= {0, 1}
    assert set(fresh("me/out", "attempts")["id"]) == set(out["id"])
    card = DatasetCard.load("me/out").text
    assert f"{out.num_rows} rows for 30 demonstrations of [me/source]" in card
    assert "at most 3 of a problem; the demonstration is one more row of each problem." in card
    for source, count in Counter(out["source"]).items():
        assert f"| {source} | {count} | {100 * count / out.num_rows:.1f} % |" in card
    solved = {row["id"] for row in out if row["source"] == "self"}
    assert f"| self | 30 | {len(solved)} ({100 * len(solved) / 30:.1f} %) |" in card
    # Its signed rows are no run, and are refused as such.
    assert command("rows", tmp_path / "run", "--keep", "all", "--output_dir", tmp_path / "run/signed").returncode == 0
    refused = command("push", tmp_path / "run/signed", "--hub_dataset_id", "me/signed")
    assert refused.returncode == 2 and "signed', which has no journal: it is no run" in refused.stderr


def test_attempts_of_rows_that_have_gone_are_not_counted(tmp_path, hub):
    """A run whose dataset shrank says what a run of the smaller one says, finished or under way."""
    data = Dataset.from_list(rows(40))
    for i in (0, 1):
        rewriter(tmp_path, shard=f"{i}/2", max_concurrent_attempts=1).rewrite(data)
    few = data.select([*range(3, 12), *range(30, 35)])
    for i in (0, 1):
        for name in ("run", "small"):
            rewriter(tmp_path, name, shard=f"{i}/2", max_concurrent_attempts=1).rewrite(few)
    for finished in (True, False):
        run, small = (RunDirectory(tmp_path / name, finished) for name in ("run", "small"))
        assert run.counts.stages == small.counts.stages
        assert all(0 < len(of.problems) <= 14 for of in run.counts.stages.values())
        ids = [set().union(*of.ids.values()) for of in (run, small)]
        assert ids[0] == ids[1] and len(ids[0]) == 14
        assert ids[0] == set().union(*(of.problems for of in run.counts.stages.values()))
    push_run(tmp_path / "run", HubOptions(hub_dataset_id="me/out"))
    assert set(fresh("me/out", "attempts")["id"]) <= ids[0] == set(fresh("me/out")["id"])


def test_local_paths_stay_at_home(tmp_path, hub):
    """The directory of a model, of the demonstrations and of what an engine is told is in no file that is pushed."""
    run = rewriter(tmp_path)
    run.sampler.name, run.sampler.revision = "/home/me/secret models/policy/", "0123456789ab"
    given = {
        "dataset_name": "/home/me/demos.jsonl", "engine_kwargs": '{"download_dir": "/home/me/hf"}', "verifier_kwargs": '{"timeout": 7}',
        "dtype": "bfloat16",
    }  # fmt: skip
    out = run.rewrite(rows(8), given)
    assert set(out["model"]) == {"policy"} and set(out["model_revision"]) == {"0123456789ab"}
    at_home = yaml.safe_load((tmp_path / "run" / "run_config.yaml").read_text())
    assert at_home["model_name_or_path"] == "/home/me/secret models/policy/" and at_home.items() >= given.items()
    run.push_to_hub("me/out")
    pushed = hub.files("me/out")["run_config.yaml"].decode()
    there = yaml.safe_load(pushed)
    assert there == {
        k: v for k, v in at_home.items() if k not in ("model_name_or_path", "dataset_name", "engine_kwargs")
    }
    assert "# model_name_or_path was a local path, or held one: pass your own." in pushed
    card = DatasetCard.load("me/out").text
    assert "run_config.yaml --model_name_or_path … --dataset_name … --engine_kwargs … --output_dir" in card
    assert not any(b"/home/me" in data for data in hub.files("me/out").values())
    assert "/home/me" not in str([fresh("me/out").to_list(), fresh("me/out", "attempts").to_list()])


def test_card_is_what_the_journal_says(tmp_path, hub):
    source = source_dataset(hub)
    commit = hub.repos["datasets", "me/source"].heads["main"]
    run = rewriter(tmp_path, guided_prompt="{problem}\n```\n{solution}\n```\nonly you can see", seed=7)
    out = run.rewrite(source)
    run.push_to_hub("me/out")
    card = DatasetCard.load("me/out")  # parsed and typed by huggingface_hub; the server has checked the YAML
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0" and data["language"] == "en" and data["source_datasets"] == ["me/source"]
    assert (
        data["size_categories"] == ["n<1K"]
        and data["task_categories"] == ["text-generation"]
        and "synthetic" in data["tags"]
    )
    journal = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()[1:]]
    table = {
        cells[0]: cells[1:]
        for line in card.text.splitlines()
        if line.startswith("| ")
        for cells in [[c.strip() for c in line.strip("|").split("|")]]
    }
    for name, count in Counter(out["source"]).items():
        assert any(
            line.startswith(f"| {name} | {count} | {100 * count / 30:.1f} % |") for line in card.text.splitlines()
        )
    for stage in ("self", "guided"):
        mine = [e for e in journal if e["stage"] == stage]
        verdicts = Counter(e["verdict"] for e in mine)
        solved = out["source"][:].count(stage)
        tried = len({e["id"] for e in mine})
        assert table[stage] == [
            str(tried), f"{solved} ({100 * solved / tried:.1f} %)", str(len(mine)), str(sum(e["num_tokens"] for e in mine)),
            *(str(verdicts[v]) for v in ("correct", "wrong", "unparsable", "timeout", "error")),
            str(sum(e["finish_reason"] == "length" for e in mine)),
        ]  # fmt: skip
    assert (
        f"revision `{commit}`" in card.text
        and "````text\n{problem}\n```\n{solution}\n```\nonly you can see\n````" in card.text
    )
    assert card.text.count("{") == card.text.count("}") and "@misc{zhao2025mind" in card.text and "trl 1." in card.text
    # What the card tells a reader to type gives the settings of this run.
    HfApi().hf_hub_download("me/out", "run_config.yaml", repo_type="dataset", local_dir=tmp_path)
    from trl import TrlParser

    parser = TrlParser((RewriteArguments, RewriteConfig))
    given, again = parser.parse_args_and_config(
        ["--config", str(tmp_path / "run_config.yaml"), "--output_dir", "again"]
    )
    assert again.identity() == run.args.identity()
    assert (given.dataset_name, given.dataset_revision, given.dataset_split) == ("me/source", commit, "train")


def test_the_card_asks_a_run_only_for_what_it_has(tmp_path):
    """Jinja writes nothing where there is no such attribute, and a sentence would be gone without a word."""
    rewriter(tmp_path).rewrite(Dataset.from_list(rows(3)))
    run = RunDirectory(tmp_path / "run")
    template = jinja2.Environment().parse(Path(template_path("dataset_card")).read_text())
    asked = {n.attr for n in template.find_all(jinja2.nodes.Getattr) if getattr(n.node, "name", "") == "run"}
    assert "sources" in asked and [name for name in asked if not hasattr(run, name)] == []


def test_metadata_of_others_is_read_as_they_wrote_it():
    """By YAML's version 1.2, as on the Hub: Norwegian is no `false`, a version no number, a time of day no number of minutes."""
    front = {
        "language": "no", "languages": ["en", "no", "on"], "version": "1.10", "at": "12:30", "day": "2024-01-01", "octal": "007",
        "long": "1_000", "n": 3, "x": 0.5, "truth": True, "none": None, "deep": [{"config_name": "y"}],
    }  # fmt: skip
    written = "".join(
        f"{key}: {value}\n" for key, value in front.items() if key not in ("truth", "none", "deep", "languages")
    )
    written += "languages: [en, no, on]\ntruth: true\nnone:\ndeep:\n- config_name: y\n"
    card = read_card(f"---\n{written}---\n# Theirs\n")
    found = card.data.to_dict()
    assert found == {key: value for key, value in front.items() if value is not None} and card.text == "# Theirs\n"
    again = read_card(str(card))
    assert again.data.to_dict() == found and "language: 'no'" in str(card)
    assert read_card("# No metadata\n").data.to_dict() == {} and read_card("---\n\n---\ntext").text == "text"


def test_what_others_wrote_stays(tmp_path, hub):
    """Another's rows, text and metadata; a schema that changes; configs pushed by `datasets` before and after ours."""
    theirs = Dataset.from_list([{"x": i} for i in range(4)])
    theirs.push_to_hub("me/out", "mine")
    # A `default` of another schema, with the `dataset_info` on which `load_dataset` fails after a plain upload (datasets #8608).
    Dataset.from_list([{"old": "row"}]).push_to_hub("me/out")
    card = DatasetCard.load("me/out")
    card.data.license, card.data.tags, card.data.pretty_name = "mit", ["theirs"], "Their name"
    card.data.language = "no"
    card.text = "# By hand\n\nabove\n"
    put_card(card, "me/out")
    run = rewriter(tmp_path)
    out = run.rewrite(source_dataset(hub))
    run.push_to_hub("me/out")
    assert (
        same(fresh("me/out"), out) and same(fresh("me/out", "mine"), theirs) and fresh("me/out", "attempts").num_rows
    )
    card = DatasetCard.load("me/out", repo_type="dataset")
    assert card.data.license == "mit" and card.data.pretty_name == "Their name" and "theirs" in card.data.tags
    assert card.data.language == "no"
    assert "# By hand\n\nabove\n" in card.text and "sft" in card.data.tags
    card.text = card.text.replace(END, f"{END}\n\nbelow")
    put_card(card, "me/out")
    theirs.push_to_hub("me/out", "third")  # datasets edits the card as well
    wider = rewriter(tmp_path, "wider", num_generations=2)
    out = wider.rewrite(source_dataset(hub).add_column("level", list(range(30))))
    wider.push_to_hub("me/out", push_attempts=False)
    assert same(fresh("me/out"), out) and "level" in out.column_names
    assert same(fresh("me/out", "mine"), theirs) and same(fresh("me/out", "third"), theirs)
    text = DatasetCard.load("me/out").text
    assert text.count(END) == 1 and text.index("above") < text.index("# out") < text.index(END) < text.index("below")
    with pytest.raises(ValueError, match="attempts"):
        fresh("me/out", "attempts")
    wider.push_to_hub("me/out", revision="v2")
    assert fresh("me/out", "attempts", revision="v2").num_rows


@pytest.mark.slow
def test_push_interrupted_at_every_request(tmp_path, hub, monkeypatch):
    """The client killed, or its line cut for good, at each request in turn: the old rows or the new ones, and a re-run completes them."""
    first, second = rewriter(tmp_path, "first"), rewriter(tmp_path, "second", seed=5)
    old, new = (run.rewrite(Dataset.from_list(rows(12))) for run in (first, second))
    assert not same(old, new)
    first.push_to_hub("me/out")
    before, uploads = copy.deepcopy(hub.repos), dict(hub.uploads)
    hub.requests.clear()
    second.push_to_hub("me/out")
    total = len(hub.requests)
    assert total == 10
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the clients wait before they try again
    ends = Counter()
    for i, how in itertools.product(range(1, total + 1), ("drop", "lose", "kill")):
        hub.repos, hub.uploads = copy.deepcopy(before), dict(uploads)
        child = queue.SimpleQueue()
        if how == "kill":
            hub.fail(i, lambda child=child: os.kill(child.get(), signal.SIGKILL) or "drop")
        else:
            hub.fail(i, how, times=1 << 30)
        pid = os.fork()
        if pid == 0:
            try:
                close_session()  # connections and a cache of its own
                constants.HF_HUB_CACHE = str(tmp_path / f"{how}-{i}")
                second.push_to_hub("me/out")
            finally:
                os._exit(0)
        child.put(pid)
        os.waitpid(pid, 0)
        hub.faults.clear()
        found = fresh("me/out")
        state = "old" if same(found, old) else "new" if same(found, new) else "broken"
        ends[state] += 1
        journal = (tmp_path / {"old": "first", "new": "second"}[state] / "journal.jsonl").read_text().splitlines()[1:]
        assert fresh("me/out", "attempts")["text"][:] == [json.loads(line)["text"] for line in journal]
        card = DatasetCard.load("me/out").text
        assert all(f"| {name} | {n} |" in card for name, n in Counter(found["source"]).items())
        second.push_to_hub("me/out")
        assert same(fresh("me/out"), new)
    assert ends == {"old": 3 * total - 1, "new": 1}  # new only where the commit went through and its answer was lost


@pytest.mark.parametrize("how", [429, 500, 412])
def test_what_may_pass_is_tried_again(tmp_path, hub, monkeypatch, how):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    run = rewriter(tmp_path)
    out = run.rewrite(source_dataset(hub))
    run.push_to_hub("me/out")

    def someone_else():
        repo = hub.repos["datasets", "me/out"]
        head, files = repo.at("main")
        repo.heads["main"] = repo.commit(
            {**files, "README.md": files["README.md"] + b"\nby someone else"}, head, "theirs"
        )

    (tmp_path / "run" / "metrics.json").write_text("{}")  # so that there is something to commit
    hub.fail("POST .*/commit/", someone_else if how == 412 else how)
    hub.requests.clear()
    run.push_to_hub("me/out")
    assert sum("/commit/" in request for request in hub.requests) == 2 and waits
    assert ("by someone else" in DatasetCard.load("me/out").text) == (how == 412)
    assert hub.files("me/out")["metrics.json"] == b"{}" and same(fresh("me/out"), out)


@pytest.mark.parametrize("how", [401, 403, 404, "drop", b"<html>Sign in</html>"])
def test_what_will_not_pass_is_said_and_changes_nothing(tmp_path, hub, capsys, monkeypatch, how):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    run = rewriter(tmp_path)
    run.rewrite(source_dataset(hub))
    hub.fail("POST .*/commit/", how, times=1 << 30)
    with warnings.catch_warnings(record=True):
        assert cli.main(["push", str(tmp_path / "run"), "--hub_dataset_id", "me/out"]) == 3
    said = capsys.readouterr()
    told = {"drop": "disconnected", b"<html>Sign in</html>": "cannot be read"}.get(how, str(how))
    assert "Nothing has changed on the Hub." in said.err and told in said.err and "Traceback" not in said.err
    assert said.out.splitlines()[-1] == f"trl-offpolicy push {tmp_path}/run --hub_dataset_id me/out"
    assert not hub.files("me/out")
    hub.faults.clear()
    assert cli.main(["push", str(tmp_path / "run"), "--hub_dataset_id", "me/out", "--push_attempts", "False"]) == 0
    assert fresh("me/out").num_rows == 30 and not any("attempts" in path for path in hub.files("me/out"))


def test_a_commit_whose_answer_was_lost_is_found_by_the_next_try(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    run = rewriter(tmp_path)
    out = run.rewrite(source_dataset(hub))
    hub.fail("POST .*/commit/", "lose")
    with pytest.warns(UserWarning, match="Trying again"):
        found = run.push_to_hub("me/out")
    repo = hub.repos["datasets", "me/out"]
    assert found.oid == repo.heads["main"] and len(repo.commits) == 2 and same(fresh("me/out"), out)


@pytest.mark.parametrize(("lost", "told"), [(1 << 30, "is not known"), (5, "has a new commit")])
def test_nothing_is_claimed_of_a_commit_that_could_not_be_seen(tmp_path, hub, monkeypatch, capsys, lost, told):
    """The commit goes through, and its answer and all or some of the requests after it are lost."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    run, push = rewriter(tmp_path), ["push", str(tmp_path / "run"), "--hub_dataset_id", "me/out"]
    run.rewrite(source_dataset(hub))

    def cut():
        hub.fail("", "drop", times=lost)
        return "lose"

    hub.fail("POST .*/commit/", cut)
    with warnings.catch_warnings(record=True):
        assert cli.main(push) == 3
    hub.faults.clear()
    said = capsys.readouterr()
    assert (
        told in said.err
        and "Nothing has changed" not in said.err
        and len(hub.repos["datasets", "me/out"].commits) == 2
    )
    assert said.out.splitlines()[-1] == f"trl-offpolicy push {tmp_path}/run --hub_dataset_id me/out"
    assert cli.main(push) == 0 and len(hub.repos["datasets", "me/out"].commits) == 2


@pytest.mark.parametrize(("asked", "waited"), [("86400", 300), ("7", 7), ("Wed, 21 Oct 2026 07:28:00 GMT", None)])
def test_a_long_wait_is_said_and_cut(tmp_path, hub, monkeypatch, asked, waited):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    hub.fail("POST /api/repos/create", (429, {"Retry-After": asked}))
    with pytest.warns(UserWarning, match="429.* Trying again in [0-9]+ s") as said:
        open_repo(HubOptions(hub_dataset_id="me/out"))
    assert len(waits) == len(said) == 1 and (waits[0] == waited if waited else 1 <= waits[0] <= 2)
    assert ("asks to wait for 86,400 s" in str(said[0].message)) == (asked == "86400")


def test_what_is_said_of_a_failure_holds_no_token(tmp_path, hub, monkeypatch, capsys):
    """The Hub quotes the token that it refuses, in whatever it answers to `push` and to the first request of `rewrite`."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    run, odd = rewriter(tmp_path), "an/odd-token"
    run.rewrite(Dataset.from_list(rows(5)))
    Dataset.from_list(rows(5)).to_json(tmp_path / "demos.jsonl")
    monkeypatch.setenv("HF_TOKEN", odd)
    rewrite = [
        "rewrite", "--model_name_or_path", POLICY, "--dataset_name", str(tmp_path / "demos.jsonl"), "--output_dir", str(tmp_path / "other"),
        "--push_to_hub", "--hub_dataset_id", "me/out",
    ]  # fmt: skip
    for status, command, code in (
        (401, rewrite, 2),
        (503, rewrite, 3),
        (503, ["push", str(tmp_path / "run"), *rewrite[-2:]], 3),
    ):
        hub.fail("POST .*", (status, {"X-Error-Message": f"Invalid token {TOKEN}, {odd}."}), times=6)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            assert cli.main(command) == code
        hub.faults.clear()
        said = capsys.readouterr()
        told = [said.out, said.err, *(str(w.message) for w in warned)]
        assert "Invalid token ***, ***." in said.err and not any(
            secret in text for text in told for secret in (TOKEN, odd)
        )
        assert "again" in said.out + said.err and "Traceback" not in said.err


def test_refused_before_anything_is_sampled(tmp_path, hub, monkeypatch):
    run = rewriter(tmp_path, push_to_hub=True, hub_dataset_id="me/out", hub_token="hf_wrong")
    with pytest.raises(HfHubHTTPError, match="401"):
        run.rewrite(Dataset.from_list(rows(5)))
    assert not run.sampler.sampled
    with pytest.raises(ValueError, match="not finished"):
        push_run(tmp_path / "run", HubOptions(hub_dataset_id="me/out"))
    with pytest.raises(FileNotFoundError, match="no journal"):
        push_run(tmp_path, HubOptions(hub_dataset_id="me/out"))
    for kwargs in (
        {"push_to_hub": True},
        {"push_every": 5},
        {"push_every": 5, "push_to_hub": True, "hub_dataset_id": "a/b", "push_attempts": False},
    ):
        with pytest.raises(ValueError, match="You passed push"):
            RewriteConfig("run", **kwargs)


@pytest.mark.slow
def test_pushed_every_so_many_rows(tmp_path, hub, monkeypatch):
    """A push of a run under way has the attempts so far and no rows; one that fails is said, and sampling goes on."""
    monkeypatch.delenv("HF_TOKEN")
    run = rewriter(tmp_path, push_to_hub=True, hub_dataset_id="me/out", push_every=5, hub_token=TOKEN)

    class Awaited(PeriodicPush):
        def update(self, rows):
            if self.under_way is not None:
                wait([self.under_way])
            super().update(rows)

    monkeypatch.setattr("trl_offpolicy.rewriting.rewriter.PeriodicPush", Awaited)
    hub.fail("POST .*/commit/", 403)
    with pytest.warns(UserWarning, match="403"):
        out = run.rewrite(Dataset.from_list(rows(60)))
    titles = list(hub.repos["datasets", "me/out"].titles.values())
    assert 5 <= titles.count("Push attempts of a run under way") <= 11
    assert (
        "The rows come when the run is finished" in DatasetCard.load("me/out").text
        and fresh("me/out", "attempts").num_rows
    )
    run.push_to_hub()
    assert same(fresh("me/out"), out) and "under way" not in DatasetCard.load("me/out").text
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*.*") if path.is_file()]
    assert len(written) >= 5 and not any(TOKEN.encode() in data for data in (*written, repr(run.args).encode()))


# ---- the whole way, and the cards it leaves ----


def whole_way(tmp_path, hub):
    """Demonstrations and a policy on the Hub; rewritten, measured, pushed; trained on what comes back, pushed with checkpoints."""
    from quickstart_task import GUIDED_PROMPT, problems
    from quickstart_task import demonstrations as as_demonstrations
    from transformers import AutoModelForCausalLM, AutoTokenizer

    api, task = HfApi(), problems(40, 9, (2, 4, 6))
    Dataset.from_list(as_demonstrations(task[:32])).push_to_hub("me/running-totals")
    card = DatasetCard.load("me/running-totals")
    card.data.license, card.data.language = "apache-2.0", "en"
    put_card(card, "me/running-totals")
    api.create_repo("me/policy")
    api.upload_folder(repo_id="me/policy", folder_path=POLICY)
    args = RewriteConfig(
        str(tmp_path / "run"), num_generations=2, max_completion_length=100, guided_prompt=GUIDED_PROMPT
    )
    run = DataRewriter("me/policy", args)
    run.rewrite(load_dataset("me/running-totals", split="train"))
    gap = measure_policy_gap(
        "me/policy", load_dataset("parquet", data_dir=str(tmp_path / "run" / "dataset"), split="train")
    )
    (tmp_path / "run" / "policy_gap.json").write_text(json.dumps(gap))
    run.push_to_hub("me/running-totals-on-policy")
    back = load_dataset("me/running-totals-on-policy", split="train")
    arguments = config(
        ImportanceWeightedSFTConfig, tmp_path / "policy-iw", objective="iw", learning_rate=1e-3, max_steps=4, per_device_train_batch_size=8,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, push_to_hub=True, hub_model_id="me/policy-iw",
        hub_strategy="checkpoint", hub_always_push=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained("me/policy", dtype="float32")
    trainer = ImportanceWeightedSFTTrainer(
        model, arguments, train_dataset=back.select(range(24)), eval_dataset=back.select(range(24, 32)),
        processing_class=AutoTokenizer.from_pretrained("me/policy"),
    )  # fmt: skip
    trainer.train()
    return run, back, trainer, [{"problem": t["problem"], "answer": t["answer"]} for t in task[32:]]


def without_numbers(card: str) -> str:
    """What of a card does not change from one machine, version or random stream to the next."""
    card = re.sub(r"(?m)^(Made with |trl-offpolicy \d).*$", "VERSIONS", card)
    card = re.sub(r"\b[0-9a-f]{40}\b", "COMMIT", card)
    return re.sub(r"-?\d[\d,]*(\.\d+)?(e[+-]?\d+)?", "0", card)


@pytest.mark.slow
def test_round_trip_and_the_cards_in_the_repository(tmp_path, hub):
    """`model_cards/` holds what this test pushed when it was run with UPDATE_CARDS=1."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    run, back, trainer, held_out = whole_way(tmp_path, hub)
    checkpoint = ModelCard.load("me/policy-iw")  # pushed while it trained
    assert checkpoint.data.datasets == ["me/running-totals-on-policy"] and checkpoint.data.base_model == "me/policy"
    trainer.push_to_hub()
    assert {"last-checkpoint/trainer_state.json", "model.safetensors"} <= set(hub.files("me/policy-iw", "models"))
    again = AutoModelForCausalLM.from_pretrained("me/policy-iw", dtype="float32")
    assert all((p == q).all() for p, q in zip(again.parameters(), trainer.model.cpu().parameters(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained("me/policy-iw")
    settings = {"num_generations": 2, "max_completion_length": 64, "solve_prompt": "{problem}"}
    pushed, kept = (
        evaluate(m, {"held out": held_out}, processing_class=tokenizer, **settings) for m in (again, trainer.model)
    )
    assert pushed == kept

    # TRL's own trainer takes the rows as they are; ours trains on the ids that were sampled.
    sft = SFTTrainer(
        again, config(SFTConfig, tmp_path / "sft", max_steps=2), train_dataset=back, processing_class=tokenizer
    )
    assert sft.train().global_step == 2
    dft = DFTTrainer(
        again, config(DFTConfig, tmp_path / "dft", max_steps=2), train_dataset=back, processing_class=tokenizer
    )
    sampled = [row["completion_ids"] for row in back if row["completion_ids"]]
    trained = {tuple(t for t in row["labels"] if t != -100) for row in dft.train_dataset}
    assert sampled and all(tuple(ids) in trained for ids in sampled) and dft.train_sources == Counter(back["source"])
    assert dft.train().global_step == 2

    cards = {"dataset": hub.files("me/running-totals-on-policy"), "model": hub.files("me/policy-iw", "models")}
    for kind, files in cards.items():
        card, path = files["README.md"].decode(), ROOT / "model_cards" / f"{kind}.md"
        if os.environ.get("UPDATE_CARDS"):
            path.write_text(card)
        assert without_numbers(card) == without_numbers(path.read_text())
        assert hub.endpoint not in card and str(tmp_path) not in card
    data = ModelCard(cards["model"]["README.md"].decode()).data
    assert data.eval_results and data.base_model == "me/policy"
    commit = hub.repos["models", "me/policy"].heads["main"]
    assert (
        set(back["model_revision"]) == {commit}
        and f"(https://huggingface.co/me/policy), revision `{commit}`" in cards["dataset"]["README.md"].decode()
    )
    gap = json.loads((tmp_path / "run" / "policy_gap.json").read_text())["total"]
    line = next(line for line in cards["dataset"]["README.md"].decode().splitlines() if line.startswith("| total |"))
    assert line.split("|")[3:5] == [f" {gap[when]['sequence_log_prob']:.2f} " for when in ("before", "after")]


@pytest.mark.slow
def test_no_token_anywhere_and_one_group(tmp_path, hub):
    """The command with a token, W&B and a push, then training and an evaluation in the same group: what they wrote, byte by byte."""
    from quickstart_task import demonstrations as as_demonstrations
    from quickstart_task import problems

    Dataset.from_list(as_demonstrations(problems(12, 9, (1, 2)))).to_json(tmp_path / "demos.jsonl")
    environment = {
        **os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"),
        "WANDB_DIR": str(tmp_path), "WANDB_RUN_GROUP": "study", "WANDB_API_KEY": "f" * 40, "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    del environment["HF_TOKEN"]
    command = [
        "-m", "trl_offpolicy.cli", "rewrite", "--model_name_or_path", POLICY, "--dataset_name", "demos.jsonl", "--output_dir", "run",
        "--num_generations", "2", "--max_completion_length", "64", "--push_to_hub", "--hub_dataset_id", "me/out", "--private",
        "--push_every", "4", "--hub-token", TOKEN, "--report_to", "wandb", "--wandb_log_artifacts",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert (
        last.startswith("WANDB_RUN_GROUP=study WANDB_LOG_MODEL=end trl-offpolicy sft")
        and "--dataset_name me/out" in last
    )
    assert hub.repos["datasets", "me/out"].private and same(
        fresh("me/out"), load_dataset(str(tmp_path / "run" / "dataset"), split="train")
    )

    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    records = list(wandb_records(file))
    (run,) = [record.run for record in records if record.HasField("run")]
    assert (run.run_group, run.job_type) == ("study", "rewrite") and run.run_id == (
        tmp_path / "run" / "wandb_group"
    ).read_text() + "-rewrite"
    history = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.HasField("history")
    ]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    keys = {key for line in lines for key in line}  # the first one is written before anything is drawn
    logged = [{k: v for k, v in entry.items() if k in keys} for entry in history]
    assert [entry for entry in logged if entry] == lines
    journal = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()[1:]]
    tables = [json.loads(path.read_text()) for path in sorted(file.parent.glob("files/media/table/attempts_*.json"))]
    rows_logged = [dict(zip(table["columns"], row, strict=True)) for table in tables for row in table["data"]]
    assert [(r["id"], r["attempt"], r["text"]) for r in rows_logged] == [
        (e["id"], e["attempt"], e["text"]) for e in journal
    ]
    assert sum(entry.get("attempts/_type") == "incremental-table-file" for entry in history) == len(tables) >= 1
    artifact = next(r.artifact for r in records if r.HasField("artifact") and r.artifact.type == "dataset")
    assert {"dataset/train-00000-of-00001.parquet", "run_config.yaml"} <= {e.path for e in artifact.manifest.contents}

    os.environ.update({k: environment[k] for k in ("WANDB_DIR", "WANDB_RUN_GROUP")})
    try:
        with wandb_run("wandb", tmp_path, "eval", {}) as run:
            assert (run.group, run.job_type) == ("study", "eval")
    finally:
        del os.environ["WANDB_DIR"], os.environ["WANDB_RUN_GROUP"]

    said = [done.stdout.encode(), done.stderr.encode()]
    written = [
        path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file() and "home" not in path.relative_to(tmp_path).parts[:1]
    ]
    assert len(written) > 10
    pushed = [data for repo in hub.repos.values() for files in repo.commits.values() for data in files.values()]
    assert not any(secret in data for data in (*said, *written, *pushed) for secret in (TOKEN.encode(), b"f" * 40))


# ---- the model card ----


def cube_root(log_probs, **_):
    """the cube root of π"""
    return (log_probs / 3).exp()


def test_card_says_what_was_trained(tmp_path, tokenizer):
    objective = {"self": "iw", "guided": cube_root, "expert": "asft"}
    args = config(
        ImportanceWeightedSFTConfig, tmp_path / "out", objective=objective, clip_max=2.5, beta=0.07, eval_strategy="steps", eval_steps=3,
        save_strategy="steps", save_steps=3,
    )  # fmt: skip
    evaluation = {"own": rewritten(tokenizer), "expert": demonstrations()}
    trainer = ImportanceWeightedSFTTrainer(
        POLICY, args, train_dataset=rewritten(tokenizer, 9), eval_dataset=evaluation, processing_class=tokenizer, peft_config=LoraConfig(r=4),
    )  # fmt: skip
    trainer.train()
    written = ModelCard.load(tmp_path / "out" / "README.md")  # by the checkpoint
    assert "2509.15157" in written.text
    trainer.create_model_card(model_name="mine", dataset_name="me/rewritten", tags="maths")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    data = card.data.to_dict()
    assert data["datasets"] == ["me/rewritten"] and data["library_name"] == "peft"
    assert {"maths", "trl", "importance-weighted-sft"} <= set(data["tags"])
    assert not {"base_model", "license", "licence"} & set(
        data
    )  # the base is a local directory; nobody told us a licence
    logged = trainer.state.log_history[-1] | trainer.state.log_history[-2] | trainer.state.log_history[-3]
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    for name in evaluation:
        for metric in ("loss", "nll", "mean_token_accuracy"):
            assert abs(results[name, metric] - logged[f"eval_{name}_{metric}"]) < 1e-6
    text = card.text
    assert "None]" not in text and "| self | 3 | 33.3 % |" in text and "quickstart_policy` (local)" in text
    for row in (
        "| self | `iw` | π(y_t)/μ(y_t)",
        "| guided | `cube_root` | the cube root of π |",
        "| expert | `asft` | π(y_t), and beta·KL",
    ):
        assert row in text  # fmt: skip
    assert "`clip_max=2.5`" in text and "`beta=0.07`" in text and "LORA, r 4" in text and "epsilon_high" not in text
    entries = re.findall(r"@\w+\{(\w+),", text)
    assert entries == ["zhao2025mind", "zhu2025anchored", "vonwerra2020trl"] and text.count("{") == text.count("}")
    saved = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert saved["global_step"] == 3


def test_card_of_a_plain_run(tmp_path, tiny_model, tokenizer):
    """No sources, no data set's name, no evaluation, no adapter: the card leaves out what it does not know."""
    data = Dataset.from_list(demonstrations().to_list())
    trainer = DFTTrainer(
        tiny_model, config(DFTConfig, tmp_path / "out"), train_dataset=data, processing_class=tokenizer
    )
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert not {"datasets", "base_model", "model-index"} & set(card.data.to_dict())
    assert "A model made in memory, fine-tuned with" in card.text and "10 rows of unknown source" in card.text
    assert "| every | `dft` | π(y_t) |" in card.text and "## Results" not in card.text and "None" not in card.text
