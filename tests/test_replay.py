"""The policy's own answers to general prompts, drawn beside a run's rows and apart from them."""

import json
import warnings

import pytest
from datasets import load_dataset
from scripted import ScriptedSampler, rows, verify

from trl_offpolicy import DataRewriter, RewriteConfig
from trl_offpolicy.data.control_tokens import ControlTokens
from trl_offpolicy.data.loading import load_rows
from trl_offpolicy.rewriting.replay import replay_prompts
from trl_offpolicy.sampling.sampler import Completion, Request, SamplingParams, attempt_seed


PROMPTS = [{"messages": [{"role": "user", "content": f"Tell of {n} gold:{n} things."}, {"role": "assistant", "content": "No."}]} for n in range(40)]  # fmt: skip


class Rambling(ScriptedSampler):
    """Says nothing to one prompt in five, and goes on for ever at another."""

    def completion(self, request):
        completion = super().completion(request)
        if "/replay" in request.id and (n := int(request.prompt[-1]["content"].split()[2])) % 5 < 2:
            changed = {"text": "  "} if n % 5 else {"finish_reason": "length"}
            return type(completion)(**{name: getattr(completion, name) for name in ("id", "text", "completion_ids", "log_probs", "finish_reason")} | changed)  # fmt: skip
        return completion


@pytest.fixture
def general(tmp_path):
    file = tmp_path / "general.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return str(file)


def run(directory, num_rows=30, data=None, sampler=None, **settings):
    args = RewriteConfig(str(directory), num_generations=2, max_completion_length=50, **settings)
    rewriter = DataRewriter("scripted", args, sampler or Rambling(), verify)
    rewriter.rewrite(data or rows(num_rows))
    return rewriter


def found(directory, name):
    return load_dataset(str(directory / name), split="train").to_list()


def test_answers_to_general_prompts_stand_beside_the_rows(tmp_path, general):
    """The first that the seed's order gives and that are finished; the others' places are taken by the next ones."""
    rewriter = run(tmp_path / "run", replay_dataset=general, replay_share=0.4)
    replay = found(tmp_path / "run", "replay")
    prompts = sorted(
        replay_prompts(general, False, ControlTokens(None, "warn")),
        key=lambda p: attempt_seed(42, p.id, "replay order", 0),
    )
    drawn = [
        (
            p,
            Rambling().completion(
                Request(f"{p.id}/replay", p.prompt, attempt_seed(42, p.id, "replay", 0), SamplingParams())
            ),
        )
        for p in prompts
    ]
    good = [(p, c) for p, c in drawn if c.finish_reason == "stop" and c.text.strip()][:20]  # 40 % of 50
    assert len(good) == 20
    for row, (prompt, completion) in zip(replay, good, strict=True):
        assert (row["id"], row["prompt"], row["source"]) == (prompt.id, prompt.prompt, "replay")
        assert row["completion"] == [{"role": "assistant", "content": completion.text}]
        assert (row["completion_ids"], row["behavior_log_probs"]) == (completion.completion_ids, completion.log_probs)
        assert row["prompt"][-1]["role"] == "user" and row["behavior_prompt"] == [] and row["answer"] is None
    assert found(tmp_path / "run", "with_replay") == replay + found(tmp_path / "run", "dataset")
    # The run's directory stands for its rows alone, not for everything that was made of them.
    assert load_rows(str(tmp_path / "run")).to_list() == found(tmp_path / "run", "dataset")
    counts = rewriter.metrics["replay"]
    used = drawn[: drawn.index(good[-1]) + 1]
    assert (
        counts["rows"] == 20 and counts["empty"] >= sum(not c.text.strip() for _, c in used) > 0 and counts["cut"] > 0
    )
    again = run(tmp_path / "run", replay_dataset=general, replay_share=0.4)
    assert again.sampler.sampled == 0 and found(tmp_path / "run", "replay") == replay
    more = run(tmp_path / "run", replay_dataset=general, replay_share=0.5)  # another share goes on from there
    assert 0 < more.sampler.sampled <= 30 and found(tmp_path / "run", "replay")[:20] == replay


class Failing(Rambling):
    """An engine that fails at some general prompts, as long as it is ill."""

    ill = True

    def completion(self, request):
        if self.ill and "/replay" in request.id and request.seed % 3 == 0:
            return Completion(request.id, "", [], [], "error", "the server said 500")
        return super().completion(request)


def test_the_place_of_a_failed_answer_stays_free_until_it_is_there(tmp_path, general):
    """Nobody takes it meanwhile, the run is not done, and in the end the rows are those of an engine that did not fail."""
    settings = {"replay_dataset": general, "replay_share": 0.3}
    run(tmp_path / "well", **settings)
    whole, sampler = found(tmp_path / "well", "replay"), Failing()
    with warnings.catch_warnings(action="error"):  # there are prompts enough
        first = run(tmp_path / "run", sampler=sampler, **settings)
    some, counts = found(tmp_path / "run", "replay"), first.metrics["replay"]
    assert 0 < counts["failed"] == first.metrics["undrawn"] == 13 - counts["rows"] and counts["rows"] == len(some)
    assert [row for row in whole if row["id"] in {r["id"] for r in some}] == some
    sampler.ill = False
    again = run(tmp_path / "run", sampler=sampler, **settings)
    assert found(tmp_path / "run", "replay") == whole and len(whole) == 13
    assert not again.metrics["undrawn"] and not again.metrics["replay"]["failed"]


def test_what_replaces_a_run_removes_its_replay_rows(tmp_path, general):
    """Also those of another number of shards, whose journals were deleted."""
    settings, directory = {"replay_dataset": general, "replay_share": 0.2}, tmp_path / "run"
    for shard in ("0/2", "1/2"):
        run(directory, 20, shard=shard, **settings)
    for journal in directory.glob("journal*.jsonl"):
        journal.unlink()
    run(directory, 20, **settings)
    assert len(list((directory / "replay").iterdir())) == 1 and len(found(directory, "with_replay")) == 25
    run(directory, 20, overwrite=True, seed=7)
    assert not (directory / "with_replay").exists() and not list((directory / "replay").iterdir())


def test_a_run_is_the_same_with_and_without(tmp_path, general):
    """Byte for byte at share 0, and its rows at any."""
    in_order = {"max_concurrent_attempts": 1}  # what is drawn on speculation depends on the time that it takes
    run(tmp_path / "plain", **in_order)
    with pytest.warns(UserWarning, match="nothing is replayed"):
        run(tmp_path / "none", replay_dataset=general, **in_order)
    run(tmp_path / "some", replay_dataset=general, replay_share=0.2, **in_order)

    def files(name):
        paths = [p for p in (tmp_path / name).rglob("*") if p.is_file()]
        found = {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in paths}
        # In which order problems get their verdicts depends on time too.
        return found | {"journal.jsonl": sorted(found["journal.jsonl"].splitlines())}

    plain, none, some = map(files, ("plain", "none", "some"))
    measured = {"metrics.json", "metrics.jsonl"}  # how long it took
    assert plain.keys() == none.keys() and {n for n in plain if plain[n] != none[n]} <= measured
    timed = [{k: v for k, v in json.loads(of["metrics.json"]).items() if k != "seconds"} for of in (plain, none)]
    assert timed[0] == timed[1]
    assert some["dataset/train-00000-of-00001.parquet"] == plain["dataset/train-00000-of-00001.parquet"]
    assert some["journal.jsonl"] == plain["journal.jsonl"] and b"replay_share: 0.2" in some["run_config.yaml"]


def test_shards_draw_their_part_and_the_last_one_puts_them_together(tmp_path, general):
    for shard in ("1/2", "0/2"):
        assert not (tmp_path / "run" / "with_replay").exists()
        run(tmp_path / "run", 20, replay_dataset=general, replay_share=0.2, shard=shard)
    replay, both = found(tmp_path / "run", "replay"), found(tmp_path / "run", "with_replay")
    assert len({row["id"] for row in replay}) == 4 and len(both) == 24
    assert [row for row in both if row["source"] != "replay"] == found(tmp_path / "run", "dataset")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["replay"]["rows"] == 4


def test_what_cannot_be_replayed_is_refused(tmp_path, general):
    with pytest.raises(ValueError, match="replay_share=0.1 without replay_dataset"):
        RewriteConfig("O", replay_share=0.1)
    with pytest.raises(ValueError, match="replay_share=1.0; it is a share"):
        RewriteConfig("O", replay_share=1.0, replay_dataset=general)
    file = tmp_path / "other.jsonl"
    for row, message in (
        ({"colour": "red"}, "Row 0 of replay_dataset='.*' has no prompt; its columns are \\['colour'\\]"),
        ({"messages": [{"role": "assistant", "content": "Hi."}]}, "Row 0 of replay_dataset='.*' has no prompt"),
        (
            {"prompt": "a plain text gold:1 "},
            "its prompts are plain texts, and those of the dataset are messages",
        ),
    ):
        file.write_text(json.dumps(row) + "\n")
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "run", replay_dataset=str(file), replay_share=0.1)
    with pytest.raises(FileNotFoundError, match="replay_dataset='nowhere.jsonl', but there is no such file"):
        run(tmp_path / "run", replay_dataset="nowhere.jsonl", replay_share=0.1)
    with pytest.warns(UserWarning, match="There are .* replay rows and not 270: .* has too few prompts"):
        run(tmp_path / "few", replay_dataset=general, replay_share=0.9)
