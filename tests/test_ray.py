"""The Ray example with two real workers, one of them killed in the middle of a shard: the rows of one undisturbed process."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import POLICY, ROOT
from datasets import Dataset, load_dataset
from quickstart_task import demonstrations, problems

from trl_offpolicy import DataRewriter, RewriteConfig


def holder(file: Path) -> int | None:
    """The process that has `file` open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == str(file):
                return int(link.parts[2])
        except OSError:  # it ended, or closed that file, between the two calls
            continue
    return None


def ended(process: subprocess.Popen, seconds: float) -> int | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)


@pytest.mark.slow
def test_two_workers_one_killed(tmp_path):
    data, run = tmp_path / "demos.jsonl", tmp_path / "run"
    Dataset.from_list(demonstrations(problems(48, 3, (4, 5, 6)))).to_json(data)
    command = [
        sys.executable,
        "examples/rewrite_ray.py",
        "--model_name_or_path",
        POLICY,
        "--dataset_name",
        data,
        "--output_dir",
        run,
    ]
    command += ["--num_shards", "3", "--num_workers", "2", "--num_generations", "3", "--max_completion_length", "100"]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    with (tmp_path / "ray.log").open("w") as log:
        driver = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, cwd=ROOT, env=environment)
    journal, killed, deadline = run / "journal-00001-of-00003.jsonl", None, time.monotonic() + 240
    try:
        while killed is None and ended(driver, 0.1) is None and time.monotonic() < deadline:
            if journal.exists() and journal.read_bytes().count(b"\n") > 1 and (killed := holder(journal)):
                os.kill(killed, signal.SIGKILL)
        drawn = journal.read_bytes()
        assert driver.wait(timeout=240) == 0 and killed, (tmp_path / "ray.log").read_text()[-5000:]
    finally:
        driver.kill()
    assert journal.read_bytes().startswith(drawn[: drawn.rfind(b"\n") + 1])  # resumed, not started again
    assert killed != driver.pid and not (run / "dataset.partial").exists()
    args = RewriteConfig(str(tmp_path / "alone"), num_generations=3, max_completion_length=100)
    alone = DataRewriter(POLICY, args).rewrite(Dataset.from_json(str(data)))
    columns = ["id", "source", "completion", "completion_ids", "num_sampled", "num_correct"]
    together = load_dataset(str(run / "dataset"), split="train")
    assert together.select_columns(columns).to_list() == alone.select_columns(columns).to_list()
