"""The miniature study at toy size: killed and resumed it gives what it gives undisturbed, and its intervals cover."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT


sys.path.insert(0, str(ROOT / "examples" / "miniature"))

import rounds  # noqa: E402
import strategies  # noqa: E402
import study  # noqa: E402
from results import estimate  # noqa: E402


IDS = [letter * 16 for letter in "abc"]
TOY = [
    "--bases", "0", "--methods", "sft", "rft", "--learning_rates", "1e-3", "--num_train", "12", "--num_dev", "2", "--num_test", "6",
    "--num_other", "2",
]  # fmt: skip


def start(directory, *options):
    command = [sys.executable, "examples/miniature/study.py", *TOY, "--output_dir", str(directory), *options]
    return subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_killed_and_resumed_is_undisturbed(tmp_path, monkeypatch, capsys):
    killed = start(tmp_path / "killed")
    first, deadline = tmp_path / "killed" / "base-0" / "dev" / "sft-0.001.json", time.monotonic() + 300
    while not first.exists():
        assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()[0]
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / "results.json").exists()
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TQDM_DISABLE", "1")  # which it sets as well, and would leave behind
    for name in ("killed", "undisturbed"):
        assert study.main([*TOY, "--output_dir", str(tmp_path / name)]) == 0
    found = [(tmp_path / name / "results.json").read_text() for name in ("killed", "undisturbed")]
    assert found[0] == found[1]
    log = (tmp_path / "killed" / "jobs.log").read_text().splitlines()
    assert log.count("prepare base-0") == log.count("tune base-0 sft 0.001") == 1  # what was done was not done again
    results = json.loads(found[0])
    for method, run in (("base", "base"), ("sft", "sft-0.001"), ("rft", "rft-0.001")):
        file = tmp_path / "killed" / "base-0" / "seed-0" / run / "results.json"
        evaluated = json.loads(file.read_text())["benchmarks"]  # what `evaluate` made of the same samples
        ours = results["accuracy"][method]
        for metric, (benchmark, _, _) in study.METRICS.items():
            assert ours[metric]["value"]["mean"] == pytest.approx(evaluated[benchmark][metric.split()[-1]])
        if method != "base":
            difference = evaluated["target"]["vs_baseline"]["difference"]
            assert ours["avg@4"]["minus_base"]["mean"] == pytest.approx(difference)
            assert f"| {study.LABELS[method]} | 0.001 |" in (tmp_path / "killed" / "results.md").read_text()
    capsys.readouterr()
    assert study.main([*TOY, "--output_dir", str(tmp_path / "killed"), "--num_dev", "3"]) == 2
    assert "--num_dev was 2 and is 3" in "".join(capsys.readouterr())


def test_sigterm_ends_a_study_as_ctrl_c_does(tmp_path, capsys):
    def terminated(args):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    assert study.outcome(terminated, study.parse(["--output_dir", str(tmp_path)])) == (None, 3)
    assert "Run the same command again" in capsys.readouterr().err


def test_rejection_sampling_rows(tmp_path):
    """Each distinct correct text of a problem once, with the tokens of its earliest attempt, in an order that a resume keeps."""
    from datasets import Dataset

    args = study.parse(["--output_dir", str(tmp_path)])
    run = tmp_path / "base-0" / "rewrite-self"
    (run / "dataset").mkdir(parents=True)
    prompt = [{"role": "user", "content": "?"}]
    Dataset.from_list([{"id": i * 16, "prompt": prompt, "source": "self"} for i in "ab"]).to_parquet(
        run / "dataset" / "rows.parquet"
    )
    attempts = [
        ("b", 1, "correct", "x"),
        ("b", 0, "correct", "x"),
        ("a", 0, "wrong", "y"),
        ("a", 2, "correct", "z"),
        ("b", 3, "correct", "w"),
    ]
    drawn = {"stage": "self", "finish_reason": "stop", "num_tokens": 1, "log_prob": -1.0}
    entries = [
        {"id": i * 16, "attempt": n, "verdict": v, **drawn, "text": t, "completion_ids": [n]}
        for i, n, v, t in attempts
    ]
    (run / "journal.jsonl").write_text("".join(json.dumps(e) + "\n" for e in [{"config": {}}, *entries]))
    rows = study.training_rows(args, 0, "rft")
    assert [(row["completion"][0]["content"], row["completion_ids"]) for row in rows] == [
        ("z", [2]),
        ("w", [3]),
        ("x", [0]),
    ]


@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_intervals_cover(spread):
    """Bases that scatter by `spread`, seeds by 0.015, 300 problems by 0.3: the interval holds the truth at least 95 times in 100."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        bases = []
        for _ in range(3):
            of_problem, of_seed = rng.normal(0, 0.3, (300, 1)), rng.normal(0, 0.015, (1, 2))
            bases.append(rng.normal(0, spread) + of_problem + of_seed + rng.normal(0, 0.3, (300, 2)))
        found = estimate(bases)
        assert found["mean"] == pytest.approx(np.mean(bases)) and len(found["by_base"]) == 3
        covered += abs(found["mean"]) <= found["half"]
    assert covered / 400 > 0.93  # two standard errors below 0.95


def test_help_and_dry_run_are_quick(tmp_path, capsys):
    code = "import sys; sys.path.insert(0, 'examples/miniature'); import study, rounds, strategies; [m.main(['--dry_run', '--output_dir', sys.argv[1]]) for m in (study, rounds, strategies)]; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "none")], cwd=ROOT, check=True)
    assert not (tmp_path / "none").exists()
    for module, option in ((study, "--learning_rates"), (rounds, "--objective"), (strategies, "--methods")):
        with pytest.raises(SystemExit) as stopped:
            module.main(["--help"])
        assert stopped.value.code == 0 and option in capsys.readouterr().out


def test_rows_and_cost_of_a_one_shot(tmp_path):
    """All draws or the best row of each problem, of the third draw as many as three rounds have sampled; tokens, and steps from the base."""
    from datasets import Dataset

    args = rounds.parse(["--output_dir", str(tmp_path), "--bases", "0"])
    sources = (["expert", "self", "guided"], ["guided", "self", "expert"], ["self", "guided", "self"])
    drawn = {
        ("base", 0): 30,
        ("base", 1): 30,
        ("base", 2): 30,
        ("round-0", 1): 25,
        ("last-1", 2): 20,
        ("base-1", 2): 33,
    }
    assert set(drawn) == {job for phase in rounds.PHASES for job in phase if isinstance(job, tuple)}
    for job, tokens in drawn.items():
        directory = rounds.directory_of(args, 0, 0, job)
        (directory / "dataset").mkdir(parents=True)
        study.write(directory / "results.json", {"tokens": tokens})
        study.write(directory / "metrics.json", {"sampling": {"tokens": tokens}})
        rows = [{"id": i, "source": source, "draw": str(job)} for i, source in zip(IDS, sources[job[1]], strict=True)]
        Dataset.from_list(rows).to_parquet(directory / "dataset" / "train-00000-of-00001.parquet")
        attempt = {
            "stage": "self",
            "attempt": 0,
            "verdict": "wrong",
            "finish_reason": "stop",
            "num_tokens": tokens // 3,
            "log_prob": -1.0,
        }
        lines = [{"config": {"stages": ["self"], "num_generations": 1}}, *({"id": i, **attempt} for i in IDS)]
        (directory / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("round-0", "last-1", "last-2", "base-1", "base-2", "all", "best"):
        study.write(rounds.directory_of(args, 0, 0, name) / "trainer_state.json", {"global_step": 5})
    # Rounds from last have sampled 30 + 25 + 20, so the third draw is at the first problem; those from base at two of them.
    every, best = (rounds.rows_of(args, 0, 0, rounds.MODELS[name]) for name in ("all", "best"))
    first, second, third = (str(("base", number)) for number in range(3))
    assert every["draw"][:] == [first] * 3 + [second] * 3 + [third] + [first] * 2 and every["id"][:] == IDS * 3
    assert (
        rounds.rows_of(args, 0, 0, rounds.MODELS["round-0"])["draw"][:] == [first] * 3
    )  # nothing follows the last draw
    assert best["draw"][:] == [third, first, first] and best["source"][:] == ["self", "self", "guided"]
    assert rounds._cost(args, "last-2") == {"tokens": 75, "steps": 15} and rounds._cost(args, "all") == {
        "tokens": 70,
        "steps": 5,
    }
    assert rounds._cost(args, "base-2") == {"tokens": 88, "steps": 5} and rounds._cost(args, "best") == {
        "tokens": 80,
        "steps": 5,
    }


# Which rows each method is trained on: the draw and what of it, the sources, and the objective.
TRAINED_ON = {
    "sft": ("demonstrations", None, "nll"),
    "dft": ("demonstrations", None, "dft"),
    "dr": ("dr/dataset", "self guided expert", "dft"),
    "grape": ("grape/dataset", "self guided expert", "dft"),
    "rft": ("rft/dataset", "self guided expert", "dft"),
    "rest_em": ("rest_em/dataset", "self guided", "dft"),
    "star": ("star/dataset", "self guided", "dft"),
    "sdft": ("sdft/dataset", "self guided expert", "dft"),
    "s3ft": ("s3ft/dataset", "self guided expert", "dft"),
    "hinted": ("hinted/dataset", "self guided expert", "dft"),
    "replay": ("replay/with_replay", "self guided expert", "dft"),
    "threshold": ("dr/dataset", "self guided expert", "threshold"),
    "topr": ("rft/signed", "self guided expert", "topr"),
}


def test_rows_of_a_strategy(tmp_path, monkeypatch):
    """What `fit` gives to the training, from draws that say what they are."""
    from datasets import Dataset

    given = {}

    def train(rows, objective, rate, seed, directory, model):
        given[directory.name.rpartition("-")[0]] = rows, objective, rate, seed
        study.write(directory / "trainer_state.json", {})

    monkeypatch.setattr(strategies, "train", train)
    args = strategies.parse(["--output_dir", str(tmp_path), "--bases", "0", "--num_train", "3"])
    for draw in strategies.DRAWS:
        for folder in ("dataset", "with_replay", "signed"):
            directory = strategies.draw_of(args, 0, 7, draw) / folder
            directory.mkdir(parents=True)
            rows = [{"source": source, "of": f"{draw}/{folder}"} for source in ("self", "guided", "expert")]
            Dataset.from_list(rows).to_parquet(directory / "train-00000-of-00001.parquet")
    for method in strategies.METHODS:
        strategies.fit(args, 0, strategies.name_of(method), 1e-3, 7)
    assert given.keys() == TRAINED_ON.keys()
    for method, (of, sources, objective) in TRAINED_ON.items():
        rows, *how = given[method]
        assert how == [objective, 1e-3, 7], method
        if sources is None:
            assert rows["completion"][:] == [row["completion"] for row in study.splits(args, 0)["train"]]
        else:
            assert (set(rows["of"]), rows["source"][:]) == ({of}, sources.split()), method


def test_settings_of_a_draw(tmp_path):
    """Each is its preset, with K = 4 where the paper has no 1; one that goes on from another has the same attempts."""
    from trl_offpolicy import RewriteConfig
    from trl_offpolicy.rewriting.strategies import STRATEGIES

    def config(name):
        options = strategies.settings_of(strategies.DRAWS[name])
        general = {"replay_dataset": "general.jsonl"} if name == "replay" else {}
        return RewriteConfig(str(tmp_path), **{"num_generations": study.K, **options, **general})

    presets = dict.fromkeys(("dr", "hinted", "replay"), "mind_the_gap")
    for name, draw in strategies.DRAWS.items():
        preset, own = STRATEGIES[presets.get(name, name)], config(name)
        assert {s for s, v in preset.items() if getattr(own, s, v) != v} <= draw.settings.keys()
        assert own.num_generations == (1 if name in ("star", "sdft", "s3ft") else 4)
        if draw.begins_as:
            assert own.identity() == config(draw.begins_as).identity()
    assert config("hinted").identity() != config("dr").identity()
    assert config("star").hint_prompt.count("{hint}") == 1


def test_replay_has_no_problem_of_a_test(tmp_path):
    args = strategies.parse(["--output_dir", str(tmp_path)])
    file = strategies.general_prompts(args, 1, tmp_path / "draw" / "general.jsonl")
    with open(file) as lines:
        asked = [json.loads(line)["prompt"][0]["content"] for line in lines]
    tested = {
        row["prompt"][0]["content"] for name in ("other", "target", "dev") for row in study.splits(args, 1)[name]
    }
    assert len(asked) == len(set(asked)) == strategies.NUM_GENERAL and not tested & set(asked)


def test_table_of_strategies(tmp_path, capsys):
    """All jobs are done: the table says what their files do, with differences paired by problem."""
    import pandas as pd

    options = ["--output_dir", str(tmp_path), "--bases", "0", "--methods", "topr", "--learning_rates", "1e-4", "3e-5"]
    args = strategies.parse(options)
    right = {"base": [1, 0, 0, 0], "dr": [1, 1, 0, 0], "topr": [1, 1, 1, 0]}  # of four problems
    dev = {("topr", 1e-4): 0.5, ("topr", 3e-5): 0.25, ("dr", 1e-4): 0.25, ("dr", 3e-5): 0.5}
    for (method, rate), accuracy in dev.items():
        study.write(tmp_path / "base-0" / "dev" / "strategies" / f"{method}-{rate:g}.json", {"avg@4": accuracy})
    for draw, tokens in (("dr", 5000), ("rft", 7000)):
        study.write(strategies.draw_of(args, 0, 0, draw) / "results.json", {"tokens": tokens})
    for method, rate in (("base", None), ("dr", 3e-5), ("topr", 1e-4)):
        directory = study.run_dir(args, 0, strategies.name_of(method), rate, 0)
        study.write(directory / "results.json", {})
        study.write(directory / "rows.json", {"rows": 3, "sources": {"self": 3}})
        study.write(directory / "kl.json", {"kl_per_token": 0.125})
        stages = (("target", "eval", 4), ("target", "greedy", 1), ("other", "eval", 4))
        samples = [
            {"benchmark": benchmark, "stage": stage, "id": i, "verdict": ("wrong", "correct")[verdict]}
            for benchmark, stage, number in stages
            for i, verdict in enumerate(right[method])
            for _ in range(number)
        ]
        pd.DataFrame(samples).to_parquet(directory / "samples.parquet")
    assert strategies.main([*options, "--dry_run"]) == 0 and "due" not in capsys.readouterr().out
    assert strategies.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {
        line.split("|")[1].strip(): [cell.split("±")[0].strip() for cell in line.split("|")[2:-1]]
        for line in lines
        if "|" in line
    }
    assert cells["Base"] == ["", "25.0", "-25.0", "", "25.0", "25.0", "25.0", "", "", ""]
    assert cells["DR"] == ["3e-05", "50.0", "", "+25.0", "50.0", "50.0", "50.0", "0.125", "5", "3 self"]
    assert cells["TOPR"] == ["0.0001", "75.0", "+25.0", "+50.0", "75.0", "75.0", "75.0", "0.125", "7", "3 self"]
    assert (tmp_path / "strategies.png").exists() and not (tmp_path / "jobs.log").exists()
