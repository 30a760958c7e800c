"""DataRewriter against a naive sequential loop, under disorder, duplicates, bad golds, kills and ctrl-C."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import POLICY
from datasets import Dataset, load_dataset
from scripted import SHOWN, OtherVerifier, ScriptedSampler, config, naive, rewrite, rewrite_rows, rows, verify

from trl_offpolicy import DataRewriter, RewriteConfig, TransformersSampler
from trl_offpolicy.data import prompts
from trl_offpolicy.data.formats import demonstration
from trl_offpolicy.data.rows import Verdict, stored
from trl_offpolicy.data.whole_file import partial_file, write_whole
from trl_offpolicy.rewriting.push import _attempt_files
from trl_offpolicy.runs.run_directory import RunDirectory
from trl_offpolicy.sampling.sampler import Completion, SamplingParams
from trl_offpolicy.verification.verifiers import NumericVerifier


@pytest.mark.parametrize("stages", [["self", "guided"], ["self"], ["guided"], []])
@pytest.mark.parametrize("selection", ["first", "random"])
def test_equals_the_naive_loop(tmp_path, stages, selection):
    data = rows(120)
    args = config(tmp_path, stages=stages, selection=selection)
    rewritten, metrics = rewrite(tmp_path, data, stages=stages, selection=selection)
    for row, (row_id, source, texts, num_sampled, num_correct) in zip(
        rewritten, naive(data, args, ScriptedSampler()), strict=True
    ):
        assert (row["id"], row["source"], row["num_sampled"], row["num_correct"]) == (
            row_id,
            source,
            num_sampled,
            num_correct,
        )
        text = row["completion"][0]["content"]
        assert text == texts if source == "expert" else text in texts
        assert bool(row["completion_ids"]) == (source != "expert") and len(row["completion_ids"]) == len(
            row["behavior_log_probs"]
        )
    sources = rewritten["source"]
    assert metrics["yield"] == {**{s: sources.count(s) for s in ("self", "guided", "expert")}, "total": 120}
    assert set(sources) == {*stages, "expert"}


def test_rows_do_not_depend_on_order_or_window(tmp_path):
    base, _ = rewrite(tmp_path / "a", rows(80))
    for i, capacity in enumerate((1, 3, 200)):
        other, _ = rewrite(tmp_path / f"b{i}", rows(80), sampler=ScriptedSampler(capacity=capacity, order_seed=7 + i))
        assert other.to_list() == base.to_list()
    shuffled, _ = rewrite(tmp_path / "c", random.Random(1).sample(rows(80), 80))
    assert sorted(shuffled.to_list(), key=lambda r: r["row"]) == base.to_list()


def test_output_schema_and_parquet(tmp_path):
    rewritten, metrics = rewrite(tmp_path, rows(10))
    assert list(rewritten.features)[:17] == [
        "prompt", "completion", "id", "source", "answer", "num_sampled", "num_correct", "self_sampled", "self_correct", "completion_ids",
        "behavior_log_probs", "model", "model_revision", "temperature", "top_p", "top_k", "behavior_prompt",
    ]  # fmt: skip
    assert load_dataset(str(tmp_path / "run" / "dataset"), split="train").to_list() == rewritten.to_list()
    for row, given in zip(rewritten, rows(10), strict=True):
        asked = "".join(turn["content"] for turn in row["behavior_prompt"])
        assert (given["solution"] in asked) == (row["source"] == "guided")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["yield"] == metrics["yield"]
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["rows"] == 10
    assert not (tmp_path / "run" / "dataset.partial").exists()


def test_duplicates_come_out_once_each(tmp_path):
    data = rows(5) + rows(5)
    rewritten, _ = rewrite(tmp_path, data)
    assert len(set(rewritten["id"])) == 10 and rewritten["row"] == [r["row"] for r in data]


def test_unparsable_gold_is_kept_and_counted_apart(tmp_path):
    from trl_offpolicy import MathVerifier

    bad = [
        {"problem": "no gold:1 ?", "solution": "it is what it is", "row": 100},
        {"problem": "broken gold:1 ?", "solution": "\\boxed{\\frac{1}{}", "row": 101},
    ]
    with MathVerifier(num_workers=1) as verifier:
        sampler = ScriptedSampler(p_self=1.0)
        rewritten, metrics = rewrite(tmp_path, rows(6) + bad, sampler=sampler, verifier=verifier)
    assert rewritten["source"][-2:] == ["expert", "expert"] and set(rewritten["source"][:6]) == {"self"}
    assert metrics["gold_unparsable"] == 2 and metrics["verdicts"]["wrong"] == 0
    journaled = {json.loads(line).get("id") for line in (tmp_path / "run" / "journal.jsonl").open()}
    assert not journaled & set(rewritten["id"][-2:])  # never sampled, so never called wrong


def test_reshaped_sampling_stores_no_behavior_log_probs(tmp_path):
    with pytest.warns(UserWarning, match="top_p=0.9"):
        rewritten, _ = rewrite(tmp_path, rows(20), top_p=0.9)
    assert not any(rewritten["behavior_log_probs"]) and any(rewritten["completion_ids"])


def test_a_rewritten_dataset_can_be_rewritten_again(tmp_path):
    """Its completions are the demonstrations now, and those of the first round come along."""
    first, _ = rewrite(tmp_path / "a", rows(20))
    again, _ = rewrite(tmp_path / "b", first, ScriptedSampler(p_self=0.0, p_guided=0.0))
    assert [demonstration(row) for row in again] == [row["completion"][0]["content"] for row in first]
    thrice, _ = rewrite(tmp_path / "c", again, ScriptedSampler(p_self=0.0, p_guided=0.0))
    assert thrice["input_input_completion"] == first["completion"] and thrice["solution"] == first["solution"]


def test_prompts_that_training_would_render_otherwise_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'problem 1 gold:1 .'.* has tools and chat_template_kwargs, with which its"):
        rewrite(
            tmp_path,
            [{**row, "tools": "[]", "chat_template_kwargs": {"enable_thinking": False}} for row in rows(2)][1:],
        )


def test_guided_attempts_are_those_of_the_demonstration(tmp_path):
    """After a correction, and with rows that differ in nothing else in another order, no row has what another reference gave."""

    class Told(ScriptedSampler):
        def completion(self, request):
            c = super().completion(request)
            text = request.prompt[-1]["content"]
            seen = text.split("demonstration ")[1].split(":")[0] if SHOWN in text else ""
            return Completion(c.id, f"<{seen}> {c.text}", c.completion_ids, c.log_probs, c.finish_reason)

    def check(data):
        sampler = Told(p_self=0.2, p_guided=0.9)
        rewritten, _ = rewrite(tmp_path, data, sampler)
        for row, given in zip(rewritten, data, strict=True):
            if row["source"] == "guided":
                seen = given["solution"].split("demonstration ")[1].split(":")[0]
                assert row["completion"][0]["content"].startswith(f"<{seen}>")
                assert given["solution"] in row["behavior_prompt"][-1]["content"]
        return rewritten, sampler.sampled

    data = rows(30)
    same = {**data[0], "solution": data[0]["solution"].replace("demonstration 0", "demonstration other")}
    first, drawn = check([*data, same])
    again, redrawn = check([*data, same])
    assert again.to_list() == first.to_list() and drawn and not redrawn
    corrected = [
        {**row, "solution": row["solution"].replace("demonstration ", "demonstration corrected ")} for row in data
    ]
    _, redrawn = check([*corrected, same])
    assert 0 < redrawn < drawn
    check([same, *data])


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas"])
def test_a_dataset_with_a_format_is_read_without_it(tmp_path, kind):
    data = Dataset.from_list([{**row, "answer": i % 50} for i, row in enumerate(rows(10))])
    plain, _ = rewrite(tmp_path / "plain", data)
    assert rewrite(tmp_path / kind, data.with_format(kind))[0].to_list() == plain.to_list()
    with pytest.raises(ValueError, match="with_transform"):
        rewrite(tmp_path / "transformed", data.with_transform(lambda row: row))


def test_columns_of_others_come_through_as_they_are_stored(tmp_path):
    """Images and audio undecoded (a lossy JPEG would not survive it, no audio library is needed), and types that Python's do not tell apart."""
    import io

    import pyarrow as pa
    from datasets import Audio, Features, Image, List, Value
    from PIL import Image as Pillow

    file = io.BytesIO()
    Pillow.effect_noise((16, 16), 90).convert("RGB").save(file, "JPEG", quality=30)
    (tmp_path / "there.jpg").write_bytes(file.getvalue())
    count, image = 7, {"bytes": file.getvalue(), "path": "a.jpg"}
    table = pa.table(
        {
            **pa.Table.from_pylist(rows(count)).to_pydict(),
            "image": pa.array([image] * count, Image.pa_type),
            "file": pa.array([{"bytes": None, "path": str(tmp_path / "there.jpg")}] * count, Image.pa_type),
            "images": pa.array([[image, image], [], None] + [[image]] * 4, pa.list_(Image.pa_type)),
            "sound": pa.array([{"bytes": b"RIFF", "path": "a.wav"}] * count, Audio().pa_type),
            "when": pa.array(range(count), pa.timestamp("ns", "Europe/Berlin")),
            "exact": pa.array([None, *range(6)], pa.decimal128(20, 3)),
            "id": pa.array(range(count), pa.uint8()),
        }
    )
    features = Features.from_arrow_schema(table.schema)
    features |= {"image": Image(), "file": Image(), "images": List(Image()), "sound": Audio()}
    data = Dataset(pa.Table.from_arrays(table.columns, schema=Features(features).arrow_schema))
    data = data.select([6, 0, 3, 1, 2, 5, 4])  # not as they lie in memory
    rewritten, _ = rewrite(tmp_path / "run", data)
    assert rewritten.features["images"] == List(Image()) and rewritten.features["input_id"] == Value("uint8")
    told, given = rewritten.with_format("arrow")[:], data.with_format("arrow")[:]
    for name in ("row", "image", "images", "sound", "when", "exact"):
        assert told[name].to_pylist() == given[name].to_pylist() and told[name].type == given[name].type, name
    assert told["file"].to_pylist() == [{"bytes": file.getvalue(), "path": "there.jpg"}] * count  # a dataset is whole
    assert told["input_id"].to_pylist() == [6, 0, 3, 1, 2, 5, 4]


def test_missing_gold_answers_are_told(tmp_path):
    data = [{**row, "answer": None if i in (2, 5) else str(i)} for i, row in enumerate(rows(7))]
    with pytest.warns(
        UserWarning, match=r"2 of 7 rows \(2, 5; counted from 0\) have no `answer`: what their demonstrations box is"
    ):
        rewrite(tmp_path, data)
    floats = Dataset.from_dict({**Dataset.from_list(rows(2)).to_dict(), "answer": [float("nan"), 1.0]})
    with pytest.warns(UserWarning, match=r"1 of 2 rows \(0; counted from 0\) have no `answer`"):
        assert rewrite(tmp_path / "floats", floats)[0]["answer"] == ["0", "1.0"]


@pytest.mark.parametrize("output_dir", ["~/run", "run[lr=1]*"])
def test_a_directory_of_any_name(tmp_path, monkeypatch, output_dir):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    args = RewriteConfig(output_dir, num_generations=4)
    rewriter = DataRewriter("scripted", args, sampler=ScriptedSampler(), verifier=verify)
    assert len(rewriter.rewrite(rows(5))) == 5
    assert (tmp_path / output_dir.replace("~", "home") / "dataset" / "train-00000-of-00001.parquet").exists()


def test_a_text_without_utf8_is_written_all_the_same(tmp_path):
    class Broken(ScriptedSampler):
        def completion(self, request):
            c = super().completion(request)
            return Completion(c.id, "\ud800" + c.text, c.completion_ids, c.log_probs, c.finish_reason)

    rewritten, _ = rewrite(tmp_path, rows(5), Broken(p_self=1.0))
    assert all(row["completion"][0]["content"].startswith("?try") for row in rewritten)
    (attempts,) = _attempt_files(RunDirectory(tmp_path / "run"), str(tmp_path))
    texts = Dataset.from_parquet(str(attempts), cache_dir=str(tmp_path / "cache"))["text"]
    assert texts and all(text.startswith("?try") for text in texts)
    old = stored({"text": "\ud83d ok \U0001f600", "reason": "\udc00", "attempt": 1, "log_prob": None})
    assert old == {"text": "? ok \U0001f600", "reason": "?", "attempt": 1, "log_prob": None}


def test_gold_answers_that_could_not_be_checked_are_counted_apart(tmp_path):
    class Slow:
        def check_answers(self, answers):
            return [[Verdict.CORRECT, Verdict.UNPARSABLE, Verdict.TIMEOUT, Verdict.ERROR][int(a) % 4] for a in answers]

        def verify(self, completions, answers):
            return verify(completions, answers)

    _, metrics = rewrite(tmp_path, rows(40), verifier=Slow())
    assert metrics["gold_unparsable"] == 10 and metrics["gold_not_told"] == 20


def test_a_prompt_beyond_the_context_goes_to_the_next_stage(tmp_path):
    class Narrow(ScriptedSampler):
        def completion(self, request):
            if SHOWN in request.prompt[-1]["content"]:
                return super().completion(request)
            return Completion(
                request.id, "", [], [], "refused", "the prompt has 9 tokens, but the model's context is 8"
            )

    rewritten, metrics = rewrite(tmp_path, rows(10), sampler=Narrow(p_guided=1.0))
    assert set(rewritten["source"]) <= {"guided", "expert"} and metrics["verdicts"]["error"] == 10
    assert metrics["sampling"]["sampled"] < 40 + 10


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"stages": ["self", "guide"]}, "stages=\\['self', 'guide'\\]"),
        ({"selection": "best"}, "use one of \\['first', 'random', 'max_log_prob'\\]"),
        ({"num_generations": 0}, "num_generations=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"temperature": 2.5}, "temperature=2.5; it must be at most 2"),
        ({"guided_prompt": "{problem} again"}, "no \\{solution\\}"),
    ],
)
def test_config_errors(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **kwargs)


def test_bad_datasets_are_refused_before_sampling(tmp_path):
    sampler = ScriptedSampler()
    for data, message in [
        (Dataset.from_list([]), "no rows|columns"),
        (Dataset.from_dict({"problem": [], "solution": []}), "has no rows"),
        (Dataset.from_dict({"text": ["a"]}), "columns \\['text'\\]"),
        ({"train": 1}, "one split"),
        (rows(3) + [{"problem": "p", "solution": None, "row": 3}], r"1 of 4 rows .3; counted from 0. have"),
    ]:
        with pytest.raises(ValueError, match=message):
            rewrite(tmp_path, data, sampler=sampler)
    assert sampler.sampled == 0 and not (tmp_path / "run").exists()


def test_a_run_that_cannot_begin_lets_go_of_its_journal(tmp_path):
    """And, where it was to delete what another configuration made, of that before anything can fail."""
    rewrite(tmp_path, rows(3))
    (tmp_path / "run" / "run_config.yaml").unlink()
    (tmp_path / "run" / "run_config.yaml").mkdir()
    with pytest.raises(IsADirectoryError):
        rewrite(tmp_path, rows(3), seed=7, overwrite=True)
    assert not (tmp_path / "run" / "dataset").exists()
    (tmp_path / "run" / "run_config.yaml").rmdir()
    assert len(rewrite(tmp_path, rows(3), seed=7)[0]) == 3


def test_other_configuration_in_the_run_directory(tmp_path):
    templates = [type("Tokenizer", (), {"chat_template": text}) for text in "ab"]
    for i, tokenizer in enumerate(templates):
        sampler = ScriptedSampler()
        sampler.processing_class = tokenizer
        with pytest.raises(ValueError, match="`chat_template` was '") if i else nullcontext():
            rewrite(tmp_path / "template", rows(10), sampler)
    first, _ = rewrite(tmp_path, rows(10))
    with pytest.raises(ValueError, match="`seed` was 42 there and is 7 now.*output_dir.*overwrite"):
        rewrite(tmp_path, rows(10), seed=7)
    again, _ = rewrite(tmp_path, rows(10), seed=7, overwrite=True)
    assert again.to_list() != first.to_list()
    with pytest.raises(
        ValueError, match=r"`verifier` was 'verify' there and is 'numeric_verifier\(rel_tol=0.05\)' now"
    ):
        rewrite(tmp_path, rows(10), seed=7, verifier=NumericVerifier(rel_tol=0.05))


def test_dry_run_prints_prompts_and_touches_nothing(tmp_path, capsys):
    rewriter = DataRewriter("no/such-model", config(tmp_path, dry_run=True))
    assert rewriter.rewrite(rows(10)) is None
    out = capsys.readouterr().out
    assert "first prompt of stage self" in out and "demonstration 0" in out and "at most 80 attempts" in out
    assert not (tmp_path / "run").exists()


def test_verifier_that_loses_a_verdict_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="verdicts for"):
        rewrite(tmp_path, rows(10), verifier=lambda completions, answers: ["correct"])


@pytest.mark.slow
def test_killed_ten_times_gives_the_same_rows(tmp_path, process):
    """kill -9 at ten random points (every other time with a torn last line), each run resuming the one before."""
    undisturbed, metrics = rewrite(tmp_path / "undisturbed", rows(150))
    rng, run = random.Random(5), tmp_path / "killed" / "run"
    for trial in range(10):
        child = process(rewrite_rows, run, 150, {"order_seed": trial, "kill_after": rng.randint(5, 60)})
        child.join(60)
        assert child.exitcode == -signal.SIGKILL, child.log.read_text()
        journal = run / "journal.jsonl"
        if trial % 2:
            size = journal.stat().st_size
            os.truncate(journal, size - rng.randint(1, 40))
    resumed, resumed_metrics = rewrite(tmp_path / "killed", rows(150))
    assert resumed.to_list() == undisturbed.to_list()
    assert resumed_metrics["yield"] == metrics["yield"] and resumed_metrics["sampling"] == metrics["sampling"]


@pytest.mark.parametrize("selection", ["first", "random"])
def test_more_attempts_or_fewer_continue_a_run(tmp_path, selection):
    """K 2 → 4 → 1: the rows of a run that had so many from the beginning, and nothing is drawn twice."""
    for k in (2, 4, 1):
        sampler, fresh = ScriptedSampler(capacity=1), ScriptedSampler(capacity=1)
        grown, metrics = rewrite(tmp_path, rows(60), sampler, num_generations=k, selection=selection)
        whole, _ = rewrite(tmp_path / str(k), rows(60), fresh, num_generations=k, selection=selection)
        assert grown.to_list() == whole.to_list()
        assert k == 2 or sampler.sampled < fresh.sampled
    lines = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").open()]
    attempts = [(e["id"], e["stage"], e["attempt"]) for e in lines if "id" in e]
    assert len(set(attempts)) == len(attempts)


def test_a_damaged_journal_gives_the_same_rows_or_an_error(tmp_path):
    """A hole between two kept attempts made one of them: a row with one's gold answer and the other's completion."""
    whole, _ = rewrite(tmp_path, rows(40))
    path = tmp_path / "run" / "journal.jsonl"
    written = path.read_bytes()
    kept = [
        m.start()
        for m in re.finditer(rb'"text":"', written)
        if b'"verdict":"correct"' in written[: m.start()].rsplit(b"\n", 1)[1]
    ]
    for first, second in ((3, 4), (5, 11)):
        path.write_bytes(written[: kept[first]] + written[kept[second] :])
        number = written[: kept[first]].count(b"\n") + 1
        sampler = ScriptedSampler()
        with pytest.raises(ValueError, match=f"Line {number} of {path} was changed or damaged"):
            rewrite(tmp_path, rows(40), sampler)
        assert not sampler.sampled
        subprocess.run(["sed", "-i", f"{number}d", path], check=True)
        assert rewrite(tmp_path, rows(40))[0].to_list() == whole.to_list()


def test_a_journal_without_checksums_is_resumed(tmp_path):
    whole, metrics = rewrite(tmp_path, rows(40))
    path, sampler = tmp_path / "run" / "journal.jsonl", ScriptedSampler()
    lines = re.sub(rb',"crc32":"[0-9a-f]{8}"}\n', b"}\n", path.read_bytes()).splitlines(True)
    path.write_bytes(b"".join(lines[:60]))
    again, _ = rewrite(tmp_path, rows(40), sampler)
    assert again.to_list() == whole.to_list() and 0 < sampler.sampled < metrics["sampling"]["sampled"]
    # A kept line that no longer holds its attempt's text: found when it is read back.
    number = next(n for n, line in enumerate(lines) if b'"correct"' in line)
    path.write_bytes(b"".join([*lines[:number], lines[number].replace(b'"text"', b'"texd"'), *lines[number + 1 :]]))
    with pytest.raises(ValueError, match=f"Line {number + 1} of {path} .*it has no text"):
        rewrite(tmp_path, rows(40))


def test_a_damaged_cache_of_the_rows_is_made_again(tmp_path):
    data = Dataset.from_list(rows(20))
    first, _ = rewrite(tmp_path, data)
    file, rng = tmp_path / "run" / "rows.npz", random.Random(0)
    whole = file.read_bytes()
    damaged = [b"", b"nonsense", whole[: len(whole) // 2], whole[:-1], whole[:30] + bytes(30) + whole[60:]]
    for _ in range(5):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    for content in damaged:
        file.write_bytes(content)
        assert rewrite(tmp_path, data)[0].to_list() == first.to_list()
        with np.load(file) as again, np.load(io.BytesIO(whole)) as before:
            assert all((again[name] == before[name]).all() for name in before)


def test_no_file_is_half_written(tmp_path, monkeypatch):
    """Every name that a second process would use at the same time is its own, and what is read meanwhile is whole."""
    path = tmp_path / "run_config.yaml"
    write_whole(path, "old")
    with pytest.raises(OSError, match="disk full"), partial_file(path) as one, partial_file(path) as other:
        one.write_text("ne")
        assert one != other and path.read_text() == "old"
        raise OSError("disk full")
    assert [file.name for file in tmp_path.iterdir()] == ["run_config.yaml"]
    written = []
    replace = Path.replace

    def seen(self, target):
        written.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", seen)
    rewrite(tmp_path, rows(5))
    assert {"rows.npz", "run_config.yaml", "metrics.json", "train-00000-of-00001.parquet"} == set(written)
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_journal_knows_where_every_row_came_from(tmp_path):
    rewritten, _ = rewrite(tmp_path, rows(60))
    correct = {}
    for line in (tmp_path / "run" / "journal.jsonl").open():
        entry = json.loads(line)
        if entry.get("verdict") == "correct":
            correct.setdefault((entry["id"], entry["stage"]), {})[entry["attempt"]] = entry
    for row in rewritten:
        if row["source"] == "expert":
            assert not {(row["id"], "self"), (row["id"], "guided")} & correct.keys()
            continue
        entries = correct[row["id"], row["source"]]
        assert min(entries) == row["num_sampled"] - 1
        assert entries[min(entries)]["completion_ids"] == row["completion_ids"]


@pytest.fixture(scope="module")
def demonstrations_file(tmp_path_factory):
    from quickstart_task import demonstrations, problems

    path = tmp_path_factory.mktemp("data") / "demos.jsonl"
    Dataset.from_list(demonstrations(problems(60, 3))).to_json(path)
    return path


def cli(*args):
    command = [sys.executable, "-m", "trl_offpolicy.cli", "rewrite", "--model_name_or_path", POLICY, *map(str, args)]
    # A background job may have been started with ctrl-C ignored, and would hand that on.
    listen = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **listen)


def interrupt(process, journal: Path, lines: int, how: signal.Signals) -> str:
    """Sends the signal once the journal has that many lines, and returns what the process printed."""
    for chunk in iter(lambda: process.stderr.read(1), ""):  # the progress line moves on as attempts are journaled
        if chunk in "\r\n" and journal.exists() and journal.read_bytes().count(b"\n") > lines:
            break
    process.send_signal(how)
    return process.communicate(timeout=60)[0]


def test_sigterm_ends_a_rewrite_as_ctrl_c_does(tmp_path, demonstrations_file, command, monkeypatch):
    """What a scheduler sends: the engine is closed, and the same command resumes."""
    polls, closed = iter(range(9)), []
    poll, close = TransformersSampler.poll, TransformersSampler.close

    def polled(sampler):
        if next(polls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return poll(sampler)

    monkeypatch.setattr(TransformersSampler, "poll", polled)
    monkeypatch.setattr(TransformersSampler, "close", lambda sampler: (closed.append(sampler), close(sampler)))
    sizes = ["--num_generations", 1, "--max_completion_length", 20, "--batch_size", 2, "--max_rows", 4]
    given = ["--dataset_name", demonstrations_file, "--output_dir", tmp_path / "run", "--stages", "self", *sizes]
    before = signal.getsignal(signal.SIGTERM)
    stopped = command("rewrite", "--model_name_or_path", POLICY, *given)
    assert stopped.returncode == 3 and "Run the same command again to resume" in stopped.stdout and len(closed) == 1
    assert signal.getsignal(signal.SIGTERM) is before
    assert command("rewrite", "--model_name_or_path", POLICY, *given).returncode == 0


@pytest.mark.slow
def test_command_line_ctrl_c_kill_and_resume(tmp_path, demonstrations_file, command):
    """The real command on the real policy: ctrl-C (exit code 3), then kill -9, then to the end: the rows of an undisturbed run."""
    config_file = tmp_path / "rewrite.yaml"
    config_file.write_text("num_generations: 2\nmax_completion_length: 80\nstages: [self, guided]\n")
    args = ["--dataset_name", demonstrations_file, "--output_dir", tmp_path / "run", "--config", config_file]
    journal = tmp_path / "run" / "journal.jsonl"
    process = cli(*args, "--batch_size", "2")  # slow enough to be caught in the middle
    out = interrupt(process, journal, 8, signal.SIGINT)
    assert process.returncode == 3 and "Run the same command again to resume" in out
    before = journal.read_bytes()
    process = cli(*args, "--batch_size", "2")
    interrupt(process, journal, before.count(b"\n") + 8, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and journal.read_bytes().startswith(before)
    more = ["--verifier_kwargs", '{"timeout": 10}']  # may change on the way
    done = command("rewrite", "--model_name_or_path", POLICY, *args, *more)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"output_dir: {tmp_path}/run" and lines[-1].startswith("trl-offpolicy sft")
    assert journal.read_bytes().startswith(before) and "resuming" in done.stderr
    resumed = load_dataset(str(tmp_path / "run" / "dataset"), split="train")
    assert len(set(resumed["id"])) == 60 and list(resumed["num_ops"]) == [1, 2, 3, 4, 5, 6] * 10
    undisturbed = DataRewriter(
        POLICY, RewriteConfig(str(tmp_path / "other"), num_generations=2, max_completion_length=80),
        sampler=TransformersSampler(POLICY, batch_size=24),
    ).rewrite(Dataset.from_json(str(demonstrations_file)))  # fmt: skip
    same = ["id", "source", "completion", "completion_ids", "num_sampled"]
    assert resumed.select_columns(same).to_list() == undisturbed.select_columns(same).to_list()


def test_command_line_refuses_with_exit_code_2(tmp_path, demonstrations_file, command):
    config_file = tmp_path / "typo.yaml"
    config_file.write_text("num_generation: 2\n")
    for args, message in [
        (["--dataset_name", tmp_path / "none.jsonl", "--output_dir", tmp_path], "no such file"),
        (
            ["--dataset_name", demonstrations_file, "--output_dir", tmp_path, "--num_generation", "2"],
            "--num_generation",
        ),
        (["--dataset_name", demonstrations_file, "--output_dir", tmp_path, "--config", config_file], "num_generation"),
    ]:
        refused = command("rewrite", "--model_name_or_path", POLICY, *args)
        assert refused.returncode == 2 and message in refused.stderr


def test_problems_without_demonstrations_are_rejection_sampled(tmp_path):
    """The same rows as with demonstrations, without those that fall back; each problem is a row or in the list, none is invented."""
    data = rows(40)
    whole, _ = rewrite(tmp_path / "whole", data, stages=["self"])
    bare = [{"problem": row["problem"], "answer": str(n % 50), "row": n} for n, row in enumerate(data)]
    for shards in (1, 3):
        directory = tmp_path / str(shards)
        for i in range(shards):
            written, metrics = rewrite(directory, bare, stages=["self"], shard=f"{i}/{shards}")
        written = load_dataset("parquet", data_files=str(directory / "run" / "dataset" / "*.parquet"), split="train")
        expected = [row for row in whole if row["source"] == "self"]
        for name in ("id", "prompt", "completion", "completion_ids", "num_sampled", "row", "source"):
            assert list(written[name]) == [row[name] for row in expected]
        unsolved = [json.loads(line) for file in (directory / "run").glob("unsolved*.jsonl") for line in file.open()]
        assert {row["id"] for row in unsolved} == {row["id"] for row in whole if row["source"] == "expert"}
        assert 0 < len(unsolved) < 40 and all(row["problem"] in {row["problem"] for row in data} for row in unsolved)
        total = json.loads((directory / "run" / "metrics.json").read_text())
        assert total["unsolved"] == len(unsolved) and total["yield"]["expert"] == 0 and total["yield"]["total"] == 40


def test_no_problem_is_solved(tmp_path):
    bare = [{"problem": f"problem {i} gold:{i} ?", "answer": "-1"} for i in range(5)]
    written, metrics = rewrite(tmp_path, bare, stages=["self"], sampler=ScriptedSampler(p_self=0))
    assert len(written) == 0 and metrics["unsolved"] == 5
    with pytest.raises(ValueError, match="no demonstrations, which the stage `guided` retells"):
        rewrite(tmp_path, bare)


def test_command_line_dry_run_shows_what_the_model_reads(tmp_path, capsys):
    """The rendered prompt with its special tokens; a model, a dtype or a form of answers that is none is said without a model."""
    from transformers import AutoTokenizer

    from trl_offpolicy.cli import main

    Dataset.from_list(rows(3)).to_json(tmp_path / "rows.jsonl")
    args = [
        "rewrite",
        "--dataset_name",
        str(tmp_path / "rows.jsonl"),
        "--output_dir",
        str(tmp_path / "run"),
        "--dry_run",
    ]
    assert main([*args, "--model_name_or_path", POLICY]) == 0
    shown = capsys.readouterr().out
    turn = [{"role": "user", "content": prompts.fill(prompts.SOLVE_PROMPT, problem=rows(1)[0]["problem"])}]
    rendered = AutoTokenizer.from_pretrained(POLICY).apply_chat_template(
        turn, tokenize=False, add_generation_prompt=True
    )
    assert rendered in shown and "<|im_start|>" in rendered and "careful" not in shown
    assert main([*args, "--model_name_or_path", POLICY, "--solve_prompt", "{problem}"]) == 0
    assert capsys.readouterr().out.count("There is no \\boxed in this prompt") == 1  # the guided one asks for it
    for more, message in [
        (["--model_name_or_path", POLICY, "--dtype", "fp16"], "dtype='fp16', which torch does not know"),
        (["--model_name_or_path", str(tmp_path / "none")], "no such directory"),
    ]:
        assert main([*args, *more]) == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


class Recording(ScriptedSampler):
    """Ends some attempts with an end of turn (token 7), and keeps what it was asked."""

    stop_token_ids = [7]

    def submit(self, request):
        self.asked = request
        super().submit(request)

    def completion(self, request):
        completion = super().completion(request)
        ids = completion.completion_ids + [7] * (request.seed % 2)
        return replace(completion, completion_ids=ids, log_probs=[-0.5] * len(ids))


def test_how_prompts_are_rendered_and_attempts_end_is_in_the_rows_and_the_run(tmp_path):
    given = {"enable_thinking": False, "effort": "low"}
    sampler = Recording()
    options = {"chat_template_kwargs": json.dumps(given), "system_prompt": "Be brief.", "stop": ["\n\nProblem:"]}
    written, _ = rewrite(tmp_path, rows(30), sampler=sampler, **options)
    assert sampler.asked.chat_template_kwargs == given and sampler.asked.params.stop == ("\n\nProblem:",)
    assert all(row["prompt"][0] == {"role": "system", "content": "Be brief."} for row in written)
    assert all(row["chat_template_kwargs"] == given for row in written)
    ended = [row["completion_ids"][-1:] for row in written if row["source"] != "expert"]
    assert (
        [7] in ended and [] in ended and all(ids in ([7], []) for ids in ended)
    )  # a stop text's end is no end of turn
    assert all(len(row["behavior_log_probs"]) == len(row["completion_ids"]) for row in written)
    header = json.loads((tmp_path / "run" / "journal.jsonl").open().readline())
    assert header["config"]["chat_template_kwargs"] == given
    for name in options:
        with pytest.raises(ValueError, match=name):
            rewrite(tmp_path, rows(30), **{**options, name: None})
    with pytest.raises(ValueError, match="chat_template_kwargs.*has a column of that name"):
        rewrite(tmp_path, [row | {"chat_template_kwargs": None} for row in rows(3)], **options)
    with pytest.raises(ValueError, match="system_prompt.*prompts of their own"):
        rewrite(tmp_path, [{"prompt": "1+1?", "completion": "2"}], system_prompt="Be brief.")


def test_a_reshaped_draw_has_no_log_probs_and_the_run_says_what_to_set(tmp_path):
    with pytest.warns(
        UserWarning, match="^min_p=0.1, repetition_penalty=1.1: .* Sample with min_p=0.0, repetition_penalty=1.0 if"
    ):
        written, _ = rewrite(tmp_path, rows(10), min_p=0.1, repetition_penalty=1.1)
    assert not any(written["behavior_log_probs"])
    assert all((row["min_p"], row["repetition_penalty"]) == pytest.approx((0.1, 1.1)) for row in written)


def test_a_journal_of_november_2026_is_resumed(tmp_path):
    """What a run is known by has no more entries than then, as long as nothing new is asked for."""
    known = set(RewriteConfig("run").identity())
    assert not known & {"min_p", "repetition_penalty", "stop", "system_prompt", "chat_template_kwargs"}
    assert set(SamplingParams().settings()) == {"temperature", "top_p", "top_k", "max_completion_length"}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"min_p": 1.5}, "min_p=1.5; it must be at least 0 and at most 1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0.0; it must be above 0"),
        ({"stop": ["a", ""]}, "none of them empty"),
        ({"stop": "a"}, "must be a list of texts"),
        ({"chat_template_kwargs": "[1]"}, "write a JSON object"),
    ],
)
def test_values_that_no_engine_takes(option, message):
    with pytest.raises(ValueError, match=message):
        RewriteConfig("run", **option)


@pytest.mark.filterwarnings("ignore:The prompts are plain texts")
def test_plain_texts_stay_plain_and_are_sampled_as_training_sees_them(tmp_path, tiny_model, tokenizer):
    """Rows, log-probs, both trainers and the gap, against forwards of what SFTTrainer makes of the same texts."""
    from trl import SFTConfig, SFTTrainer

    from trl_offpolicy import ImportanceWeightedSFTConfig, ImportanceWeightedSFTTrainer, measure_policy_gap

    data = [{"prompt": f"{i}+{i}=", "completion": f"{2 * i}: \\boxed{{{2 * i}}}", "n": i} for i in range(16)]
    options = {"max_guided_copy": 1.0, "min_guided_length": 0.0, "temperature": 1.0, "num_generations": 4}
    messages = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in data]
    rewrite(tmp_path, messages, stages=[])
    with pytest.raises(ValueError, match="`plain_prompts` was None there and is 'asked as they are' now"):
        rewrite(tmp_path, data, stages=[])
    sampler = TransformersSampler(tiny_model, tokenizer)
    told = {"sampler": sampler, "verifier": lambda completions, answers: [len(c) % 2 == 0 for c in completions]}
    rewritten, _ = rewrite(tmp_path / "own", data, **told, **options)
    assert [rewritten.features[name].dtype for name in ("prompt", "completion", "behavior_prompt")] == ["string"] * 3
    assert set(rewritten["source"]) == {"self", "guided", "expert"} and rewritten["prompt"][:] == [
        r["prompt"] for r in data
    ]

    def log_probs(prompt, ids):
        with torch.no_grad():
            logits = tiny_model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]

    shared = {"report_to": "none", "use_cpu": True, "bf16": False, "shuffle_dataset": False}
    theirs = SFTTrainer(
        tiny_model, SFTConfig(str(tmp_path / "t"), **shared), train_dataset=rewritten.select_columns(["prompt", "completion"]),
        processing_class=tokenizer,
    )  # fmt: skip
    ours = ImportanceWeightedSFTTrainer(
        tiny_model, ImportanceWeightedSFTConfig(str(tmp_path / "o"), **shared), train_dataset=rewritten, processing_class=tokenizer
    )  # fmt: skip
    experts = []
    for row, own, trl in zip(rewritten, ours.train_dataset, theirs.train_dataset, strict=True):
        if row["source"] == "expert":
            assert row["completion"] == row["input_completion"] and own["input_ids"] == trl["input_ids"]
            start = trl["labels"].count(-100)
            experts.append(log_probs(trl["input_ids"][:start], trl["input_ids"][start:]).sum().item())
            continue
        assert own["input_ids"] == tokenizer(row["prompt"])["input_ids"] + row["completion_ids"]
        shown = row["behavior_prompt"] if row["source"] == "guided" else row["prompt"]
        assert (row["prompt"][:3] in shown) and (row["source"] == "guided") == (row["input_completion"] in shown)
        drawn = log_probs(tokenizer(shown)["input_ids"], row["completion_ids"])
        assert row["behavior_log_probs"] == pytest.approx(drawn.tolist(), abs=1e-4)
    gap = measure_policy_gap(tiny_model, rewritten, tokenizer)
    assert gap["expert"]["after"]["sequence_log_prob"] == pytest.approx(np.mean(experts), rel=1e-5)
    assert gap["self"]["behavior"]["kl"] == pytest.approx(0, abs=1e-6)
    assert measure_policy_gap(tiny_model, data, tokenizer)["expert"]["rows"] == 16  # before a rewrite


class Remembering(ScriptedSampler):
    """Keeps the names of what it was asked for."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.asked = []

    def submit(self, request):
        self.asked.append(request.id)
        super().submit(request)


@pytest.mark.parametrize(
    "options",
    [{}, {"selection": "random"}, {"keep_rejected": False}],
)
@pytest.mark.filterwarnings("ignore:.* attempts have no text")
def test_rows_judged_anew_are_those_of_a_fresh_run_with_the_other_verifier(tmp_path, options):
    fresh, _ = rewrite(tmp_path / "fresh", rows(90), verifier=OtherVerifier(), **options)
    first, _ = rewrite(tmp_path, rows(90), **options)
    assert first.to_list() != fresh.to_list()
    journal = tmp_path / "run" / "journal.jsonl"
    before = journal.read_bytes()
    known = {f"{e['id']}/{e['stage']}/{e['attempt']}" for e in map(json.loads, before.splitlines()[1:]) if "text" in e}
    with pytest.raises(ValueError, match="verdicts of another verifier: `verifier` was 'verify' there .*--rejudge"):
        rewrite(tmp_path, rows(90), verifier=OtherVerifier(), **options)
    with pytest.raises(ValueError, match="another configuration: `seed` was 42 there and is 1 now"):
        rewrite(tmp_path, rows(90), verifier=OtherVerifier(), rejudge=True, seed=1, **options)

    def failing(completions, answers):
        raise RuntimeError("dead")

    with pytest.raises(RuntimeError, match="dead"):
        rewrite(tmp_path, rows(90), verifier=failing, rejudge=True, **options)
    assert journal.read_bytes() == before and (tmp_path / "run" / "dataset").exists()
    assert not list(journal.parent.glob("*.partial"))
    sampler = Remembering()
    again, _ = rewrite(tmp_path, rows(90), verifier=OtherVerifier(), rejudge=True, sampler=sampler, **options)
    assert again.to_list() == fresh.to_list() and sampler.asked and not known & set(sampler.asked)
    assert (tmp_path / "run" / "journal.jsonl.1").read_bytes() == before
    back, _ = rewrite(tmp_path, rows(90), rejudge=True, **options)
    assert back.to_list() == first.to_list() and (tmp_path / "run" / "journal.jsonl.2").exists()


def test_shards_are_judged_anew_one_after_another(tmp_path):
    fresh, _ = rewrite(tmp_path / "fresh", rows(40), verifier=OtherVerifier())
    for shard in ("0/2", "1/2"):
        rewrite(tmp_path, rows(40), shard=shard)
    for shard in ("0/2", "1/2"):
        rewrite(tmp_path, rows(40), shard=shard, verifier=OtherVerifier(), rejudge=True)
    whole = load_dataset(str(tmp_path / "run" / "dataset"), split="train")
    assert whole.to_list() == fresh.to_list()


def test_a_probe_s_attempts_are_the_run_s_first(tmp_path, capsys):
    """Its figures against its journal, and the run that begins with it against one that did not."""
    options = {"selection": "random", "num_generations": 3}
    expected, _ = rewrite(tmp_path / "without", rows(100), **options)
    for temperature in (0.5, 1.0):  # it is tried again with other settings: the last one is that of the run
        assert rewrite(tmp_path, rows(100), dry_run=True, probe=40, temperature=temperature, **options)[0] is None
    told = capsys.readouterr().out
    entries = [json.loads(line) for line in (tmp_path / "run" / "probe.jsonl").open()][1:]
    of = {stage: [e for e in entries if e["stage"] == stage] for stage in ("self", "guided")}
    assert (
        len(of["self"]) == 40
        and {e["attempt"] for e in entries} == {0}
        and not (tmp_path / "run" / "dataset").exists()
    )
    for stage, attempts in of.items():
        right = sum(e["verdict"] == "correct" and "rejected" not in e for e in attempts)
        cut = sum(e["finish_reason"] == "length" for e in attempts)
        lengths = [e["num_tokens"] for e in attempts]
        assert (
            f"{stage}: {len(attempts)} attempts, {right / len(attempts):.1%} accepted, {cut / len(attempts):.1%} cut"
            in told
        )
        half, most = (int(np.quantile(lengths, q, method="inverted_cdf")) for q in (0.5, 0.95))
        assert f"half of them have {half} tokens or fewer, 95% {most} or fewer" in told
    wrong = len(of["guided"]) / 40  # of `random`, every attempt of a stage is drawn: 3, and 3 more where none is right
    attempts = int(re.search(r"about ([\d,]+) attempts", told.rpartition("probe:")[2])[1].replace(",", ""))
    assert attempts == pytest.approx(300 + 300 * wrong**3, rel=0.05)
    assert " tok/s of this probe" in told
    rewrite(tmp_path, rows(100), dry_run=True, probe=40, **options)  # which has nothing to draw any more
    again = capsys.readouterr().out
    assert "so their speed is not known" in again and f"about {attempts} attempts" in again and "tok/s" not in again
    rewrite(tmp_path, rows(100), dry_run=True, probe=7, **options)  # other rows, some of which were never asked
    assert " tok/s of this probe" in capsys.readouterr().out
    sampler = Remembering()
    rewritten, _ = rewrite(tmp_path, rows(100), sampler=sampler, **options)
    assert rewritten.to_list() == expected.to_list()
    assert not set(sampler.asked) & {f"{e['id']}/{e['stage']}/{e['attempt']}" for e in entries}
    assert not (tmp_path / "run" / "probe.jsonl").exists()
