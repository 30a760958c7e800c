"""Rows drawn while the model is trained: by which policy, with which weights, and none lost, whatever comes between."""

import json
import os
import shutil
import signal
import urllib.request
import warnings
from collections import Counter
from itertools import chain, count

import pyarrow.parquet as pq
import pytest
import scripted
import torch
from conftest import POLICY, in_two_processes, needs_vllm, serve_vllm
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from quickstart_task import GUIDED_PROMPT, demonstrations, problems
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trl_offpolicy import (
    DataRewriter,
    ImportanceWeightedSFTConfig,
    ImportanceWeightedSFTTrainer,
    OnlineRewriteSFTConfig,
    OnlineRewriteSFTTrainer,
    RewriteConfig,
)
from trl_offpolicy.data.tokenization import encode_prompt
from trl_offpolicy.online.drawn_rows import DrawnRows
from trl_offpolicy.online.online_config import REWRITING
from trl_offpolicy.runs.journal import differences
from trl_offpolicy.runs.shards import Shard
from trl_offpolicy.sampling.sampler import as_sampler
from trl_offpolicy.verification.verifier import as_verifier


DRAWN = {"num_generations": 2, "max_completion_length": 40, "guided_prompt": GUIDED_PROMPT}
TRAINED = {
    "per_device_train_batch_size": 2, "num_train_epochs": 1, "learning_rate": 0.1, "optim": "sgd", "logging_steps": 1, "save_strategy": "no", "use_cpu": True,
    "bf16": False, "report_to": "none", "disable_tqdm": True, "seed": 3,
}  # fmt: skip


def rows(number=8):
    return demonstrations(problems(number, 9, (2, 4)))


def verify(completions, answers):
    return ["correct" if f"\\boxed{{{a}}}" in c else "wrong" for c, a in zip(completions, answers, strict=True)]


def trainer_of(directory, number=8, model=POLICY, train_dataset=None, **kwargs):
    parts = {name: kwargs.pop(name) for name in ("peft_config", "eval_dataset", "callbacks") if name in kwargs}
    args = OnlineRewriteSFTConfig(str(directory), **{**DRAWN, **TRAINED, **kwargs})
    return OnlineRewriteSFTTrainer(model, args, train_dataset=train_dataset or rows(number), verifier=verify, **parts)


def drawn(directory):
    """The rows of each version, by the optimizer step before which they were drawn."""
    found = {}
    for file in sorted((directory / "_online" / "rows").glob("*.parquet")):
        found.setdefault(int(file.name[:8]), []).extend(pq.read_table(file).to_pylist())
    return found


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


class Weights(TrainerCallback):
    """The weights before each optimizer step."""

    def __init__(self):
        self.before = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before.append({name: p.detach().clone() for name, p in model.state_dict().items()})


def naive_log_probs(model, state, row, prompt):
    model.load_state_dict(state)
    ids = encode_prompt(AutoTokenizer.from_pretrained(POLICY), prompt)
    with torch.no_grad():
        logits = model(torch.tensor([ids + row["completion_ids"]])).logits[0, len(ids) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(row["completion_ids"])[:, None])[:, 0]


def check_ratios(trainer, directory, before):
    """Each step's logged weight and ratio of the self rows against a forward of the policy that drew and the one that is trained."""
    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    of_version = drawn(directory)
    assert list(of_version) == [0, 2]
    for step, entry in enumerate(logged(trainer)):
        version = step - step % 2
        batch = [r for r in of_version[version][2 * (step - version) :][:2] if r["source"] == "self"]
        then, now = (
            torch.cat([naive_log_probs(model, before[i], row, row["prompt"]) for row in batch])
            for i in (version, step)
        )
        assert entry["staleness/max"] == step - version
        assert entry["log_ratio/self"] == pytest.approx((now - then).mean().item(), abs=1e-5)
        assert entry["weight/self"] == pytest.approx((now - then).exp().clamp(max=3).mean().item(), abs=1e-5)
        if step == version:
            assert entry["weight/self"] == pytest.approx(1, abs=1e-5)
            assert entry["weight_min/self"] == pytest.approx(1, abs=1e-4) == entry["weight_max/self"]
        else:
            assert abs(entry["log_ratio/self"]) > 1e-5  # the policy has moved


def test_each_ratio_is_that_of_the_policy_which_drew(tmp_path):
    before = Weights()
    trainer = trainer_of(tmp_path, steps_per_generation=2, callbacks=[before], precompute_behavior_log_probs=False)
    trainer.train()
    check_ratios(trainer, tmp_path, before.before)
    assert max(entry["sampling/logp_difference/max"] for entry in logged(trainer)[::2]) < 1e-4
    assert trainer.model.training
    versions = drawn(tmp_path)
    assert {r["model_revision"] for r in versions[0]}.isdisjoint(r["model_revision"] for r in versions[2])


def test_that_check_fails_where_the_engine_is_not_kept_up(tmp_path):
    before = Weights()
    trainer = trainer_of(tmp_path, steps_per_generation=2, callbacks=[before], precompute_behavior_log_probs=False)
    trainer.engine.sampler.model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    trainer.train()
    with pytest.raises(AssertionError):
        check_ratios(trainer, tmp_path, before.before)
    assert [e["sampling/logp_difference/max"] > 1e-3 for e in logged(trainer)[::2]] == [False, True]


def test_one_refresh_is_the_offline_path(tmp_path):
    rewritten = DataRewriter(POLICY, RewriteConfig(str(tmp_path / "run"), **DRAWN, seed=3), verifier=verify).rewrite(
        rows()
    )
    offline = ImportanceWeightedSFTTrainer(
        POLICY, ImportanceWeightedSFTConfig(str(tmp_path / "offline"), **TRAINED), train_dataset=rewritten
    )
    online = trainer_of(tmp_path / "online", steps_per_generation=100)
    for trainer in (offline, online):
        trainer.train()
    (one,) = drawn(tmp_path / "online").values()
    ours, theirs = ({row["id"]: row for row in data} for data in (one, rewritten))
    assert len({row["source"] for row in one}) >= 2
    assert ours.keys() == theirs.keys()
    for row_id, row in ours.items():
        assert row.pop("behavior_log_probs") == pytest.approx(theirs[row_id].pop("behavior_log_probs"), abs=1e-5)
        assert row == theirs[row_id]
    torch.testing.assert_close(weights(online), weights(offline), atol=1e-6, rtol=0)
    assert not torch.equal(weights(online), weights(trainer_of(tmp_path / "untrained")))


LAYOUTS = {
    "padding_free": {
        "padding_free": True,
        "max_length": None,
        "gradient_checkpointing": False,
        "precompute_behavior_log_probs": False,
    },
    "gradient_accumulation": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
    },
}


@pytest.fixture(scope="module")
def plain_weights(tmp_path_factory):
    """What a training in the plain layout comes to."""
    trainer = trainer_of(tmp_path_factory.mktemp("plain"), steps_per_generation=2)
    trainer.train()
    return weights(trainer)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_come_to_the_same(tmp_path, plain_weights, layout):
    trainer = trainer_of(tmp_path, **{"steps_per_generation": 2, **LAYOUTS[layout]})
    trainer.train()
    torch.testing.assert_close(weights(trainer), plain_weights, atol=1e-6, rtol=0)


def test_an_adapter_draws_as_it_is_trained(tmp_path):
    trainer = trainer_of(
        tmp_path,
        steps_per_generation=2,
        peft_config=LoraConfig(target_modules="all-linear"),
        optim="adamw_torch",
        learning_rate=0.01,
        eval_dataset=Dataset.from_list(rows(4)),
    )
    trainer.train()
    first = logged(trainer)[::2]
    assert [entry["weight/self"] for entry in first] == pytest.approx([1, 1], abs=1e-5)
    assert abs(logged(trainer)[1]["log_ratio/self"]) > 1e-5
    assert trainer.evaluate()["eval_nll"] > 0
    trainer.create_model_card()
    assert "drawn 2 times, for 2 optimizer steps each" in (tmp_path / "README.md").read_text()


# ---- late, stale, twice ----


class Stuck(scripted.ScriptedSampler):
    """Never finishes an attempt at every third problem; the seconds pass when nothing else is left."""

    seconds = 0

    def poll(self):
        never = [r for r in self.pending if int(r.prompt[-1]["content"].split("problem ")[1].split()[0]) % 3 == 0]
        self.pending = [r for r in self.pending if r not in never]
        finished = super().poll() if self.pending else []
        self.pending += never
        self.seconds += not finished
        return finished


def test_an_attempt_that_never_ends_ends_at_the_deadline(tmp_path, monkeypatch):
    """Its problem takes the demonstration; what has an outcome by then is what it is without a deadline."""
    sampler, data = Stuck(), scripted.rows(30)
    monkeypatch.setattr(DrawnRows, "clock", lambda self: sampler.seconds)
    options = {"num_generations": 4, "max_completion_length": 50}
    verifier = as_verifier(scripted.verify)
    online = DrawnRows(Dataset.from_list(data), RewriteConfig(str(tmp_path / "a"), **options), None, verifier, Shard())
    online.open({}, 0)
    found = online.draw(0, list(range(30)), [True] * 30, as_sampler(sampler), seconds=0.5)
    whole, _ = scripted.rewrite(tmp_path / "b", data, **options)
    ours, theirs = found.rows.to_pylist(), whole.to_list()
    assert [row["id"] for row in ours] == [row["id"] for row in theirs] and not sampler.pending
    other = [i for i in range(30) if ours[i] != theirs[i]]
    assert all("demonstration" in ours[i]["completion"][0]["content"] for i in [*other, *range(0, 30, 3)])
    assert 10 <= found.late < 30 and len(other) <= found.late


def test_what_is_not_in_at_the_deadline_takes_its_demonstration(tmp_path, monkeypatch):
    seconds = count()
    monkeypatch.setattr(DrawnRows, "clock", lambda self: next(seconds))  # one passes at each token
    trainer = trainer_of(tmp_path, steps_per_generation=2, num_train_epochs=2, refresh_deadline=30)
    trainer.train()
    entries, by_version = logged(trainer), drawn(tmp_path)
    late = sum(entry.get("online/late", 0) for entry in entries)
    assert 0 < late < 16
    lines = [json.loads(line) for line in (tmp_path / "_online" / "metrics.jsonl").read_text().splitlines()]
    assert [line["version"] for line in lines] == [0, 2, 4, 6] and sum(line["late"] for line in lines) == late
    for epoch in (by_version[0] + by_version[2], by_version[4] + by_version[6]):
        assert len({row["id"] for row in epoch}) == len(epoch) == 8
    experts = [row for version in by_version.values() for row in version if row["source"] == "expert"]
    assert len(experts) >= late and all(row["completion_ids"] == [] for row in experts)
    assert sum(trainer.train_sources.values()) == 16


def test_late_are_those_alone_that_would_have_been_asked(tmp_path, monkeypatch):
    """No rows that the epoch has had, and none whose gold answer cannot be compared with."""
    seconds, data = count(), scripted.rows(12)
    monkeypatch.setattr(DrawnRows, "clock", lambda self: next(seconds))
    for i in (3, 7, 11):
        data[i]["solution"] = "a demonstration without an answer"
    args, sampler = RewriteConfig(str(tmp_path)), scripted.ScriptedSampler()
    online = DrawnRows(Dataset.from_list(data), args, None, as_verifier(scripted.verify), Shard())
    online.open({}, 0)
    found = online.draw(0, list(range(12)), [True] * 10 + [False] * 2, as_sampler(sampler), seconds=0.5)
    assert (found.late, found.counts.rows["expert"], sampler.sampled) == (8, 12, 0)


def test_rows_above_the_bound_are_dropped_and_counted(tmp_path):
    with pytest.warns(UserWarning, match="max_staleness=0: their rows will be dropped"):
        trainer = trainer_of(tmp_path, steps_per_generation=2, max_staleness=0)
    trainer.train()
    assert [entry["online/dropped"] for entry in logged(trainer)] == [0, 2, 0, 2]
    assert [entry["loss"] == 0 for entry in logged(trainer)] == [False, True, False, True]
    sources = [[row["source"] for row in version[:2]] for version in drawn(tmp_path).values()]
    assert trainer.train_sources == Counter(chain(*sources)) and trainer.num_train_rows == 4
    shares = [
        {name: entry.get(f"online/{name}") for name in ("self", "guided", "expert")} for entry in logged(trainer)
    ]
    assert [share["self"] for share in shares[::2]] == [of.count("self") / 2 for of in sources]
    assert {value for share in shares[1::2] for value in share.values()} == {None}


def test_a_changed_setting_is_refused_by_name(tmp_path):
    """Of the rows, which are kept from one start to the next; of the training; and of the adapter."""
    lora = {"peft_config": LoraConfig(target_modules="all-linear", lora_alpha=8), "optim": "adamw_torch"}
    settings = {"steps_per_generation": 4, "selection": "random", **lora}

    def begin(**changes):
        trainer = trainer_of(tmp_path, 4, **{**settings, **changes})
        try:
            trainer.drawn_rows.open(trainer._identity(), 0)
        finally:
            trainer.drawn_rows.close()

    begin()
    with pytest.raises(ValueError, match="holds the attempts of another configuration") as refused:
        adapter = LoraConfig(target_modules="all-linear", lora_alpha=64)
        begin(min_correct=2, expert_format="keep", num_generations=3, neftune_noise_alpha=5.0, peft_config=adapter)
    assert sorted(str(refused.value).split("configuration: ")[1].split(" now. ")[0].split(" now; ")) == [
        "`expert_format` was 'boxed' there and is 'keep'",
        "`min_correct` was None there and is 2",
        "`neftune_noise_alpha` was None there and is 5.0",
        "`num_generations` was 2 there and is 3",
        "`peft_config.lora_alpha` was 8 there and is 64",
    ]
    begin(logging_steps=2, sampling_batch_size=3, run_name="again")


@pytest.mark.parametrize("decides", [True, False])
def test_a_journal_is_of_the_settings_that_rows_and_weights_depend_on(tmp_path, decides):
    """Of nothing else, and it holds no token."""
    trainer = trainer_of(
        tmp_path, 2, model_init_kwargs={"dtype": torch.float32, "token": "hf_secret"}, hub_token="hf_secret"
    )
    before = trainer._identity()
    settings = {
        True: "neftune_noise_alpha label_smoothing_factor optim_target_modules lr_scheduler_kwargs model_init_kwargs max_staleness refresh_deadline "
        "chat_template_path use_liger_kernel epsilon_high loss_type seed deepspeed average_tokens_across_devices",
        False: "output_dir run_name logging_steps save_steps eval_steps hub_token report_to dataloader_num_workers gradient_checkpointing use_vllm "
        "vllm_server_base_url vllm_engine_kwargs sampling_batch_size dataset_num_proc resume_from_checkpoint per_device_eval_batch_size",
    }  # fmt: skip
    for name in settings[decides].split():
        given = getattr(trainer.args, name)
        setattr(trainer.args, name, {"other": 1})
        assert (f"`{name}` was" in differences(before, trainer._identity(), free=())) == decides, name
        setattr(trainer.args, name, given)
    assert trainer._identity() == before and "hf_secret" not in json.dumps(before)


def test_trained_once_more_it_is_another_training(tmp_path):
    trainer = trainer_of(tmp_path, 4)
    trainer.train()
    with pytest.raises(ValueError, match="`model_revision` was"):
        trainer.train()
    (tmp_path / "_online" / "journal-00000-of-00002.jsonl").touch()
    with pytest.raises(ValueError, match="another number of processes; this one has 1"):
        trainer.train()


# ---- processes ----


def of_some_processes(directory):
    trainer = trainer_of(
        directory, 10, steps_per_generation=2, per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", 1))
    )
    trainer.train()
    bounded = trainer_of(
        directory / "bounded", 10, steps_per_generation=3, per_device_train_batch_size=trainer.args.per_device_train_batch_size, max_staleness=0,
        max_completion_length=2,
    )  # fmt: skip
    bounded.train()
    dropped = [entry["online/dropped"] for entry in logged(bounded)], bounded.num_train_rows
    return weights(trainer), logged(trainer), dict(trainer.train_sources), dropped


@pytest.mark.slow
def test_two_processes_come_to_what_one_does(tmp_path):
    """Ten rows: the last batch of the second process is filled up with rows that the epoch has had."""
    (one, history, sources, dropped) = of_some_processes(tmp_path / "one")
    (two, history2, sources2, dropped2), (other, *_) = in_two_processes(of_some_processes, tmp_path / "two")
    assert dropped == dropped2 == ([0, 4, 2], 4)
    torch.testing.assert_close(one, two, atol=1e-6, rtol=0)
    assert torch.equal(two, other) and sources == sources2 and sum(sources.values()) == 10
    for entry, entry2 in zip(history, history2, strict=True):
        for name in ("loss", "weight/self", "online/self", "staleness/max"):
            assert entry2.get(name) == pytest.approx(entry.get(name), abs=1e-5)
    ids = [row["id"] for version in drawn(tmp_path / "one").values() for row in version]
    assert len(set(ids)) == len(ids) == 10
    assert {row["id"] for version in drawn(tmp_path / "two").values() for row in version} == set(ids)
    assert len(list((tmp_path / "two" / "_online").glob("journal-0000?-of-00002.jsonl"))) == 2


class KilledBefore(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def go_on(directory, attempts=None, step=None):
    """Trains from the last checkpoint, until so many more attempts are journaled or before that step, where it is killed."""
    if attempts is not None:
        scripted.kill_after_attempts(attempts)
    trainer = trainer_of(
        directory, steps_per_generation=2, save_strategy="steps", save_steps=1, callbacks=[KilledBefore(step)]
    )
    trainer.train(resume_from_checkpoint=any(directory.glob("checkpoint-*")))
    torch.save(weights(trainer), directory / "weights.pt")


@pytest.mark.slow
def test_killed_and_resumed_it_is_as_if_it_had_not_been(tmp_path, process):
    """Killed while it draws for the first time and for the second, and between two steps that one policy has drawn the rows of."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for directory in (killed, whole):
        directory.mkdir()
    undisturbed = process(go_on, whole)
    for ends in ({"attempts": 3}, {"step": 1}, {"attempts": 5}, {"step": 3}, {}):
        child = process(go_on, killed, **ends)
        child.join()
        assert child.exitcode == (-signal.SIGKILL if ends else 0), child.log.read_text()[-3000:]
    undisturbed.join()
    assert torch.equal(torch.load(killed / "weights.pt"), torch.load(whole / "weights.pt"))
    assert drawn(killed) == drawn(whole)
    attempts = [
        tuple(map(json.loads(line).get, ("version", "id", "stage", "attempt")))
        for line in (killed / "_online" / "journal.jsonl").open()
    ]
    assert len(set(attempts)) == len(attempts)  # nothing was drawn twice
    shutil.rmtree(killed / "checkpoint-4")
    with pytest.raises(ValueError, match="`learning_rate` was 0.1 there and is 0.2 now"):
        trainer_of(killed, steps_per_generation=2, learning_rate=0.2).train(resume_from_checkpoint=True)


def with_vllm(directory):
    """Trains an adapter, then all weights, with engines in this process; what was logged, by kind."""
    kinds = {
        "adapter": {
            "peft_config": LoraConfig(target_modules="all-linear"),
            "optim": "adamw_torch",
            "learning_rate": 0.01,
        },
        "all": {},
    }
    for kind, changes in kinds.items():
        trainer = trainer_of(
            directory / kind, steps_per_generation=2, use_vllm=True, precompute_behavior_log_probs=False, sampling_batch_size=8,
            vllm_engine_kwargs={"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "block_size": 32}, **changes
        )  # fmt: skip
        trainer.train()
        (directory / f"{kind}.json").write_text(json.dumps(logged(trainer)))
        if (
            kind == "adapter"
        ):  # once more, from the weights that it has now: the first version's directory has the name that it had
            trainer.drawn_rows.args.overwrite = True
            trainer.train()
            (directory / "again.json").write_text(json.dumps(logged(trainer)))


@needs_vllm
@pytest.mark.slow
def test_vllm_draws_from_the_weights_as_they_are(tmp_path, process):
    child = process(with_vllm, tmp_path)
    child.join()
    assert child.exitcode == 0, child.log.read_text()[-3000:]
    for kind in ("adapter", "again", "all"):
        first, second, third, fourth = json.loads((tmp_path / f"{kind}.json").read_text())
        for drawn_now in (first, third):
            assert drawn_now["sampling/logp_difference/max"] < 1e-4
            assert drawn_now["weight/self"] == pytest.approx(1, abs=1e-5)
        for trained in (second, fourth):
            assert abs(trained["log_ratio/self"]) > 1e-5
    for kind in ("adapter", "all"):
        versions = drawn(tmp_path / kind)
        assert versions[0][0]["model_revision"] != versions[2][0]["model_revision"]
    assert [path.name for path in (tmp_path / "adapter" / "_online" / "adapter-0").iterdir()] == ["2"]


@needs_vllm
@pytest.mark.slow
def test_a_server_is_given_each_version_of_the_adapter(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    server = serve_vllm(POLICY, tmp_path / "log", "--enable-lora", "--max-lora-rank", "8", "--max-loras", "2")
    try:
        trainer = trainer_of(
            tmp_path, steps_per_generation=2, use_vllm=True, vllm_mode="server", vllm_server_base_url=server["url"], sampling_batch_size=8,
            precompute_behavior_log_probs=False, peft_config=LoraConfig(target_modules="all-linear"), optim="adamw_torch", learning_rate=0.01,
        )  # fmt: skip
        trainer.train()
        first, second, third, fourth = logged(trainer)
        assert [entry["weight/self"] for entry in (first, third)] == pytest.approx([1, 1], abs=1e-5)
        assert max(entry["sampling/logp_difference/max"] for entry in (first, third)) < 1e-4
        assert abs(second["log_ratio/self"]) > 1e-5 < abs(fourth["log_ratio/self"])
        models = json.load(urllib.request.urlopen(f"{server['url']}/models"))["data"]
        assert [m["id"] for m in models] == [POLICY, trainer.engine.loaded]
        # One that was killed behind this is resumed by a process that knows nothing of what the server has loaded.
        trainer.engine.loaded = None
        trainer.engine.renew(4)
        trainer.engine.loaded = None
        trainer.engine.renew(4)
        models = json.load(urllib.request.urlopen(f"{server['url']}/models"))["data"]
        assert trainer.engine.loaded in [m["id"] for m in models]
    finally:
        os.killpg(server["group"], signal.SIGKILL)


# ---- what cannot work ----

REFUSED = {
    "temperature=0.7": ({"temperature": 0.7}, "log μ only with temperature=1"),
    "top_k=20": ({"top_k": 20}, "log μ only with top_k=0"),
    "packed": ({"packing": True}, "padding_free=True works"),
    "odd steps": ({"gradient_accumulation_steps": 2, "steps_per_generation": 3}, "multiple of gradient_accumulation_steps=2"),
    "psft": ({"objective": "psft"}, "Write objective='iw'"),
    "base": ({"expert_weighting": "base"}, "Write expert_weighting='one'"),
    "by length": ({"train_sampling_strategy": "group_by_length"}, "no length before they are drawn"),
    "drop last": ({"dataloader_drop_last": True}, "every problem is asked once"),
    "deadline": ({"refresh_deadline": 0}, "refresh_deadline=0; it must be above 0"),
    "staleness": ({"max_staleness": -1}, "max_staleness=-1"),
    "stages": ({"stages": ["retell"]}, "use each of"),
    "a server that is not asked": ({"vllm_server_base_url": "http://localhost:1"}, "but use_vllm=False"),
    "a server of nothing": ({"use_vllm": True, "vllm_mode": "server"}, "a server has an URL"),
    "a server without an adapter": (
        {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://localhost:1"},
        "not all weights",
    ),
    "a teacher": ({"stages": ["self", "teacher"]}, "Leave out `teacher`"),
    "parallel": ({"vllm_tensor_parallel_size": 2}, "write 1"),
    "fsdp": ({"fsdp": True}, "FSDP shards the weights"),
    "nothing": ({"train_dataset": []}, "has no rows"),
    "rewritten": ({"train_dataset": [{"prompt": "a", "completion": "b", "completion_ids": [1]}]}, "ImportanceWeightedSFTTrainer"),
    "no prompt": ({"train_dataset": [{"text": "2+2=4"}]}, "needed is a problem and its demonstration"),
    "no demonstration": ({"train_dataset": [{"problem": "2+2?", "answer": "4"}], "stages": ["self"]}, "no demonstrations"),
    "an empty prompt": ({"train_dataset": [{"problem": " ", "solution": "4"}]}, "no problem"),
    "stream": ({"train_dataset": Dataset.from_list([{"problem": "a", "solution": "b"}]).to_iterable_dataset()}, "streaming"),
    "modules to save": ({"peft_config": LoraConfig(modules_to_save=["lm_head"]), "use_vllm": True}, "LoRA adapters alone"),
    "prompt tuning": ({"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)}, "virtual tokens"),
}  # fmt: skip


def test_what_a_rewrite_can_do_is_done_or_not_offered():
    """Whoever adds a setting to a rewrite has to say here that online training follows it, or leave it out there."""
    assert {f.name for f in REWRITING} == {
        "num_generations", "max_completion_length", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "max_repeats", "solve_prompt",
        "system_prompt", "chat_template_kwargs", "control_tokens", "overwrite", "stages", "selection", "max_concurrent_attempts", "keep_rejected",
        "guided_prompt", "clean_reference", "reject_mentions", "mention_phrases", "reject_calculator_marks", "min_guided_length",
        "reject_other_form", "max_guided_copy", "check_arithmetic", "expert_format", "answer_column", "min_correct", "hint_kind", "hint_prompt",
    }  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_loaded(tmp_path, case):
    wrong, why = REFUSED[case]
    data = wrong.get("train_dataset")
    with pytest.raises(ValueError, match=why), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = OnlineRewriteSFTConfig(
            str(tmp_path),
            **{**TRAINED, **{k: v for k, v in wrong.items() if k not in ("train_dataset", "peft_config")}},
        )
        OnlineRewriteSFTTrainer(
            "there/is-no-such-model",
            args,
            train_dataset=rows(2) if data is None else data,
            peft_config=wrong.get("peft_config"),
            verifier=verify,
        )
