"""`examples/reproduce.py`: the whole way in this process with the embedded policy, and its plan at the paper's size."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest
import reproduce
import torch
import yaml
from conftest import POLICY
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from quickstart_task import GUIDED_PROMPT, demonstrations, problems
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_offpolicy.cli import main as cli
from trl_offpolicy.data.whole_file import write_whole


REWRITING = {
    "guided_prompt": GUIDED_PROMPT,
    "solve_prompt": "{problem}",
    "num_generations": 2,
    "max_completion_length": 60,
}
TRAINING = {"max_steps": 1, "per_device_train_batch_size": 4, "disable_tqdm": True, "use_peft": False}
EVALUATING = {"num_generations": 2, "max_completion_length": 60, "solve_prompt": "{problem}"}
ENGINE = {"sampler": "transformers", "dtype": "float32"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with problems, one of which is trained and tested on, and the files of options."""
    monkeypatch.chdir(tmp_path)
    rows = demonstrations(problems(12, 9, (2, 6)))
    for name, chosen in (("train", rows[:10]), ("test", rows[9:])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    for name, options in (("rewriting", REWRITING | ENGINE), ("training", TRAINING), ("evaluation", EVALUATING)):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(options))
    return tmp_path


@pytest.fixture
def commands(monkeypatch):
    """Runs the steps in this process, and lists their commands; one named in `failing` is interrupted instead."""
    run, failing = [], []

    def in_this_process(command, check, **process):
        check()
        step = Path(command[-1]).stem
        if step in failing:
            failing.remove(step)
            raise KeyboardInterrupt
        run.append(step)
        assert cli(command[3:]) == 0

    monkeypatch.setattr(reproduce, "run_command", in_this_process)
    return run, failing


def run(*options):
    files = [part for name in ("rewriting", "training", "evaluation") for part in (f"--{name}", f"{name}.yaml")]
    sizes = [
        "--num_train",
        "6",
        "--num_dev",
        "2",
        "--num_test",
        "3",
        "--seeds",
        "1",
        "--learning_rates",
        "1e-4",
        "1e-2",
    ]
    data = ["--dataset_name", "train.jsonl", "--benchmarks", "test.jsonl", "--methods", "sft", "dr_iw"]
    named = ["--preset", "cpu", "--model_name_or_path", POLICY, "--output_dir", "run"]
    return reproduce.main([*named, *data, *files, *sizes, *options])


def texts(file):
    return {json.loads(line)["prompt"][0]["content"] for line in Path(file).read_text().splitlines()}


@pytest.mark.slow
def test_one_command_goes_from_the_demonstrations_to_the_page(here, commands, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "GENERAL", here / "general.jsonl")
    lines = Path(reproduce.__file__).with_name("reproduce_general.jsonl").read_text().splitlines()
    (here / "general.jsonl").write_text("\n".join(lines[:3]))
    done, failing = commands
    failing += ["seed-0-sft-0.01-dev", "gap"]
    assert run() == 3 and "Run the same command again" in capsys.readouterr().err
    # What is finished has its page, and what is not is named there.
    page = Path("run/results.md").read_text()
    assert "| Base |" in page and "seed-0/sft-0.01/dev" in page and "| SFT |" not in page
    before = len(done)
    assert run() == 3
    page = Path("run/results.md").read_text()
    assert "| DR+IW |" in page and "still to do: gap, " in page and "(Table 3)" not in page
    assert run() == 0
    assert "still to do" not in Path("run/results.md").read_text()
    assert len(done) == len(set(done)) and before < len(done)  # nothing is done twice
    # What is tested is neither trained on nor used to choose a learning rate.
    train, dev, test = (texts(f"run/data/{name}.jsonl") for name in ("train", "dev", "test"))
    assert (len(train), len(dev), len(test)) == (6, 2, 3) and not train & dev and not (train | dev) & test
    # The learning rate is the best of the development problems.
    results = json.loads(Path("run/results.json").read_text())
    for method in ("sft", "dr_iw"):
        accuracy = {
            rate: json.loads(Path(f"run/seed-0/{method}-{rate:g}/dev/results.json").read_text())["benchmarks"]["dev"][
                "avg@2"
            ]
            for rate in (1e-4, 1e-2)
        }
        assert accuracy[results["learning_rate"][method]] == max(accuracy.values())
        rate = results["learning_rate"][method]
        samples = pd.read_parquet(f"run/seed-0/{method}-{rate:g}/eval/samples.parquet")
        right = (samples[samples.stage == "eval"].verdict == "correct").mean()
        assert results["accuracy"][method]["test/avg@2"]["value"]["mean"] == pytest.approx(right)
    # Only the models that were tested keep their weights.
    assert len(list(Path("run").glob("seed-0/*/train/model.safetensors"))) == 2
    assert "| DR+IW |" in Path("run/results.md").read_text() and Path("run/results.png").stat().st_size > 10_000
    capsys.readouterr()
    assert run("--num_train", "5") == 2
    assert "num_train" in capsys.readouterr().err
    assert run("--dry_run") == 0 and "0 steps to do" in capsys.readouterr().out


def test_the_papers_plan_can_be_seen_without_a_model(tmp_path, capsys):
    options = [
        "--preset",
        "paper",
        "--model_name_or_path",
        "Qwen/Qwen2.5-Math-7B",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    assert reproduce.main([*options, "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "to do  seed-0/dr_dft-5e-05/eval" in said and "30 steps to do" in said and "device-hours" in said
    assert not (tmp_path / "run").exists()


def test_on_a_cpu_an_adapter_is_tested_merged(here, monkeypatch):
    """What is evaluated computes what the adapter computes on its model, and its weights are gone afterwards."""
    args = reproduce.parse(["--preset", "cpu", "--model_name_or_path", POLICY, "--output_dir", "run"])
    experiment, place = reproduce.Experiment(args), Path("run/seed-0/sft-0.0002")
    base = AutoModelForCausalLM.from_pretrained(POLICY, dtype="float32")
    ids = torch.arange(5, 25)[None]
    unadapted = base(ids).logits
    adapted = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(place / "train")
    AutoTokenizer.from_pretrained(POLICY).save_pretrained(place / "train")
    tested = []

    def command(of, check):
        options = yaml.safe_load(Path(of[-1]).read_text())
        assert "adapter" not in options
        Path("run/eval").mkdir()
        Path("run/eval/results.json").touch()
        tested.append(AutoModelForCausalLM.from_pretrained(options["model_name_or_path"], dtype="float32")(ids).logits)

    monkeypatch.setattr(reproduce, "run_command", command)
    experiment.do(experiment._evaluation("eval", "seed-0/sft-0.0002", "test", 0))
    torch.testing.assert_close(tested[0], adapted(ids).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(tested[0], unadapted, atol=1e-2) and not (place / "merged").exists()


def test_the_self_only_rows_are_those_of_a_rewrite_without_the_guided_stage(here):
    options = [part for name, value in REWRITING.items() for part in (f"--{name}", str(value))]
    options += ["--model_name_or_path", POLICY, "--dataset_name", "train.jsonl"]
    assert cli(["rewrite", *options, "--output_dir", "run/rewrite"]) == 0
    assert cli(["rewrite", *options, "--output_dir", "alone", "--stages", "self"]) == 0
    rows, alone = (
        load_dataset("parquet", data_files=f"{run}/dataset/*.parquet", split="train")
        for run in ("run/rewrite", "alone")
    )
    assert "guided" in rows["source"]
    made = reproduce.self_only(rows, here / "run")
    counted = {"num_sampled", "num_correct"}  # of the stage that a row came from
    for name in set(alone.column_names) - counted:
        assert made[name] == alone[name], name


def test_a_step_over_the_budget_is_interrupted_as_by_ctrl_c(tmp_path):
    script = (
        "import sys, time\n"
        "try:\n    open('began', 'w').close(); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    open('stopped', 'w').close(); sys.exit(3)\n"
    )

    def check():
        if (tmp_path / "began").exists():
            raise reproduce.OutOfBudget("enough")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(reproduce.OutOfBudget):
        patch.chdir(tmp_path)
        reproduce.run_command([sys.executable, "-c", script], check)
    assert (tmp_path / "stopped").exists()


@pytest.fixture
def pretended(monkeypatch):
    """Commands that do nothing but leave what a step leaves; in the order of their begins and ends, with their environments."""
    first = {"rewrite", "general", "base-eval"}  # these need nothing of each other
    together, events, environments = threading.Barrier(len(first)), [], {}

    def command(command, check, held, environment, log):
        options = yaml.safe_load(Path(command[-1]).read_text())
        name, directory = Path(options["output_dir"]).relative_to("run").as_posix(), Path(options["output_dir"])
        events.append((name, "begins"))
        environments[name] = environment["CUDA_VISIBLE_DEVICES"]
        if Path(command[-1]).stem in first:
            together.wait(timeout=60)
        kind = "forgetting" if options.get("forgetting") else command[3]
        result = {
            "rewrite": "metrics.json",
            "sft": "trainer_state.json",
            "eval": "results.json",
            "gap": "policy_gap.json",
        }
        directory.mkdir(parents=True, exist_ok=True)
        # The second rate is the better one.
        accuracy = {"benchmarks": {"dev": {"avg@2": float("0.0003" in name)}}}
        (directory / "model.safetensors").touch()
        write_whole(directory / result.get(kind, "forgetting.json"), json.dumps(accuracy))
        events.append((name, "ends"))

    monkeypatch.setattr(reproduce, "run_command", command)
    monkeypatch.setattr(reproduce, "show_page", lambda experiment: None)
    return events, environments


def test_steps_run_beside_each_other_and_after_what_they_need(here, pretended, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    events, environments = pretended
    assert run("--processes", "3", "--learning_rates", "1e-4", "3e-4", "--seeds", "2") == 0
    assert set(environments.values()) == {"4", "7"}
    when = {event: place for place, event in enumerate(events)}
    assert len(when) == len(events)  # nothing is done twice
    trained = {name for name, _ in events if name.endswith("/train")}
    # Both rates are tried with the first seed, and the better one is trained with the other.
    assert trained == {f"seed-0/{m}-{r}/train" for m in ("sft", "dr_iw") for r in ("0.0001", "0.0003")} | {
        f"seed-1/{m}-0.0003/train" for m in ("sft", "dr_iw")
    }
    needs = {name: {"rewrite"} for name in trained if "dr_iw" in name} | {"gap": {"rewrite"}}
    for name, _ in events:
        place = name.rpartition("/")[0]
        if f"{place}/train" in trained and not name.endswith("/train"):
            needs[name] = {f"{place}/train"} | ({"base/eval"} if name.endswith("/eval") else set())
        if name.endswith(("/kl-rewrite", "/kl-general")):
            needs[name].add(name.rpartition("/kl-")[2])
        if name.endswith("/eval") and place != "base" or place.startswith("seed-1") and name in trained:
            method = place.split("/")[1].split("-")[0]
            needs.setdefault(name, set()).update(f"seed-0/{method}-{rate}/dev" for rate in ("0.0001", "0.0003"))
    assert len(needs) > 20
    for name, before in needs.items():
        assert all(when[other, "ends"] < when[name, "begins"] for other in before), name


def test_a_step_that_fails_stops_those_beside_it_and_says_where_its_output_is(here, monkeypatch, capsys):
    Path("stops.py").write_text("import time\nopen('began', 'w').close()\ntime.sleep(60)")
    Path("fails.py").write_text(
        "import os, time\nwhile not os.path.exists('began'): time.sleep(0.01)\nprint('no memory')\nraise SystemExit(2)"
    )
    script = {"rewrite": "fails.py", "general": "stops.py"}
    monkeypatch.setattr(
        reproduce.Experiment, "command", lambda self, step: [sys.executable, script.get(step.name, "stops.py")]
    )
    (here / "run/steps").mkdir(parents=True)
    assert run("--processes", "2") == 2
    assert "run/steps/rewrite.log" in capsys.readouterr().err
    assert (
        Path("run/steps/rewrite.log").read_text() == "no memory\n"
        and "KeyboardInterrupt" in Path("run/steps/general.log").read_text()
    )


def test_tokens_are_counted_from_the_journals_of_all_steps(here):
    options = [part for name, value in REWRITING.items() for part in (f"--{name}", str(value))]
    assert (
        cli(
            [
                "rewrite",
                *options,
                "--model_name_or_path",
                POLICY,
                "--dataset_name",
                "train.jsonl",
                "--output_dir",
                "run/rewrite",
            ]
        )
        == 0
    )
    counted = reproduce.SampledTokens(Path("run"))
    tokens = json.loads(Path("run/rewrite/metrics.json").read_text())["sampling"]["tokens"]
    assert counted.count() == counted.count() == tokens


def test_a_step_without_its_result_is_not_run_again_and_again(here, monkeypatch, capsys):
    monkeypatch.setattr(reproduce.Experiment, "command", lambda self, step: [sys.executable, "-c", ""])
    (here / "run/steps").mkdir(parents=True)
    assert run() == 2
    assert "rewrite ended without run/rewrite/metrics.json" in capsys.readouterr().err


def test_a_step_begins_when_what_it_needs_has_ended_not_when_its_result_is_there(here, monkeypatch):
    """The training leaves its result, and ends only when the run has looked for steps to begin after another's end."""
    plan = [
        reproduce.Step(name, "gap", {}, "result", needs)
        for name, needs in (("train", ()), ("other", ()), ("eval", ("train",)))
    ]
    monkeypatch.setattr(reproduce.Experiment, "steps", lambda self: iter(plan))
    trained, looked, together = threading.Event(), threading.Event(), []

    def do(self, step, **process):
        assert step.name != "other" or trained.wait(60)
        Path("run", step.name).mkdir()
        Path("run", step.name, "result").touch()
        if step.name == "train":
            trained.set()
            assert looked.wait(60)

    def wait(running, return_when, of=reproduce.wait):
        together.append({step.name for step, _ in running.values()})
        if "other" not in together[-1]:
            looked.set()
        return of(running, return_when=return_when)

    monkeypatch.setattr(reproduce.Experiment, "do", do)
    monkeypatch.setattr(reproduce, "wait", wait)
    monkeypatch.setattr(reproduce, "show_page", lambda experiment: None)
    assert run("--processes", "2") == 0
    assert together == [{"train", "other"}, {"train"}, {"eval"}]


@pytest.fixture
def heeded():
    """A shell that has begun the tests in the background lets them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_impatient_ctrl_c_leaves_no_step_behind(here, heeded, monkeypatch, capsys):
    """The step interrupts the run, and when it is interrupted in turn does so again before it ends."""
    Path("step.py").write_text(
        "import os, signal, time\nparent = os.getppid()\n"
        "try:\n    os.kill(parent, signal.SIGINT); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    os.kill(parent, signal.SIGINT); os.kill(parent, signal.SIGTERM); open('ended', 'w').close()\n"
    )
    monkeypatch.setattr(reproduce.Experiment, "command", lambda self, step: [sys.executable, "step.py"])
    (here / "run/steps").mkdir(parents=True)
    assert run("--processes", "1") == 3
    assert Path("ended").exists() and "stopping rewrite" in capsys.readouterr().err


def test_a_step_that_a_killed_run_has_left_behind_keeps_others_out(here, monkeypatch, capsys):
    args = reproduce.parse(["--preset", "cpu", "--model_name_or_path", POLICY, "--output_dir", "run"])
    experiment = reproduce.Experiment(args)
    with experiment.alone():
        step = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(experiment.held,))
    assert run() == 2
    assert "works in run" in capsys.readouterr().err
    step.communicate()
    with experiment.alone():
        pass


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--num_dev", "0"], "--num_dev"),
        (["--num_train", "0"], "at least 1"),
        (["--benchmarks", "a/test.jsonl", "b/test.jsonl"], "same name"),
        (["--benchmarks", "a/dev.jsonl"], "data/dev.jsonl; rename"),
        (["--processes", "0"], "at least 1"),
        (["--num_test", "0"], "at least 1"),
        (["--sampling_budget", "0"], "at least 1"),
        (["--time_budget", "0"], "above 0"),
        (["--time_budget", "nan"], "above 0"),
        (["--methods", "sft", "sft"], "twice"),
        (["--learning_rates", "1e-4", "0.0001"], "twice"),
        (["--learning_rates", "0"], "above 0"),
        (["--learning_rates", "nan"], "above 0"),
        (["--processes", "2", "--launcher", "accelerate launch"], "pass one of them"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(here, options, said, capsys):
    assert run(*options) == 2
    assert said in capsys.readouterr().err
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("learning_rat: 1", "training.yaml, line 1: there is no option 'learning_rat' (did you mean learning_rate?)"),
        ("- a", "must hold options"),
        ("a: [", "is not YAML"),
        (None, "no such file"),
    ],
)
def test_a_file_of_options_is_read_before_anything_is_done(here, content, said, capsys):
    Path("training.yaml").unlink() if content is None else Path("training.yaml").write_text(content)
    assert run("--dry_run") == 2
    assert said in capsys.readouterr().err


def test_options_that_a_step_refused_can_be_mended(here, commands, capsys, monkeypatch):
    done, failing = commands
    failing.append("rewrite")
    assert run() == 3
    assert "interrupted" in capsys.readouterr().err
    Path("rewriting.yaml").write_text(yaml.safe_dump(REWRITING | ENGINE | {"seed": 5}))
    failing.append("general")
    assert run() == 3 and done == ["rewrite"]
    Path("rewriting.yaml").write_text(yaml.safe_dump(REWRITING | ENGINE | {"seed": 6}))
    capsys.readouterr()
    assert run() == 2
    assert "`rewriting.seed` was 5 there and is 6 now" in capsys.readouterr().err
