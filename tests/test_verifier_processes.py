"""A `MathVerifier` in forks, spawned processes, data loaders and pools, beside files that are named like its modules, and a killed parent."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading

import psutil
import pytest
from conftest import ROOT

from trl_offpolicy import MathVerifier
from trl_offpolicy.verification.verifier import default_workers


def pairs(n, wrong_every):
    """`n` completions that all state their number, and gold answers of which every `wrong_every`-th is another one."""
    return [f"\\boxed{{{i}}}" for i in range(n)], [str(i + (i % wrong_every == 0)) for i in range(n)]


def expected(n, wrong_every):
    return ["wrong" if i % wrong_every == 0 else "correct" for i in range(n)]


def verify_in_child(verifier, n, wrong_every, queue):
    queue.put((verifier.num_workers, [str(v) for v in verifier.verify(*pairs(n, wrong_every))]))
    verifier.close()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.slow
def test_child_processes_have_workers_of_their_own(method):
    """The parent verifies beside its children: with shared pipes one would be given the verdicts of another."""
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    with MathVerifier(num_workers=1) as verifier:
        verifier.verify(["1"], ["1"])
        worker = verifier._workers[0].keeper
        children = [
            context.Process(target=verify_in_child, args=(verifier, 300, every, queue))
            for every in ((3, 5) if method == "fork" else (3,))
        ]
        for child in children:
            child.start()
        for _ in range(4):
            assert verifier.verify(*pairs(300, 7)) == expected(300, 7)
        told = [queue.get(timeout=120) for _ in children]
        for child in children:
            child.join(60)
        assert sorted(told) == sorted((1, expected(300, every)) for every in ((3, 5) if method == "fork" else (3,)))
        assert verifier.verify(*pairs(10, 7)) == expected(10, 7)
        assert verifier._workers[0].keeper == worker  # no child has ended it


def test_a_fork_while_another_thread_verifies():
    """The child inherits locks that nobody in it will ever release."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with MathVerifier(num_workers=1, timeout=60) as verifier:
        verifier.verify(["1"], ["1"])
        worker = verifier._workers[0]
        busy = threading.Thread(target=lambda: verifier.verify(["\\boxed{x}"] * 500, ["y"] * 500))
        busy.start()
        while not worker.reading:
            pass
        child = context.Process(target=verify_in_child, args=(verifier, 9, 2, queue))
        child.start()
        assert queue.get(timeout=120) == (1, expected(9, 2))
        child.join(60)
        busy.join()


class Rows:
    """A map-style dataset whose items are verified in the loader's workers."""

    def __init__(self, verifier):
        self.verifier = verifier

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return str(self.verifier.verify([f"\\boxed{{{i}}}"], [str(i + (i % 3 == 0))])[0])


@pytest.mark.slow
def test_data_loader_and_num_proc():
    from datasets import Dataset
    from torch.utils.data import DataLoader

    with MathVerifier() as verifier:
        verifier.verify(["1"], ["1"])
        batches = DataLoader(Rows(verifier), batch_size=8, num_workers=1, collate_fn=list)
        assert [v for batch in batches for v in batch] == expected(40, 3)
        completions, answers = pairs(40, 3)
        rows = Dataset.from_dict({"completion": completions, "answer": answers})
        told = rows.map(
            lambda batch: {"verdict": [str(v) for v in verifier.verify(batch["completion"], batch["answer"])]},
            batched=True,
            num_proc=2,
        )
        assert told["verdict"] == expected(40, 3)


def test_one_set_of_workers_on_a_node(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert default_workers() == MathVerifier().num_workers == 64
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # as torchrun and accelerate set it
    assert default_workers() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
    assert default_workers() == 1 and MathVerifier(num_workers=5).num_workers == 5
    copy = pickle.loads(pickle.dumps(MathVerifier(timeout=3, num_workers=5, float_rounding=2)))
    assert (copy.timeout, copy.num_workers, copy.options["float_rounding"]) == (3, 5, 2)


TWO_RANKS = """
import os
import torch.distributed as dist
from trl_offpolicy import MathVerifier
dist.init_process_group("gloo")
verifier = MathVerifier()
told = verifier.verify(["\\\\boxed{1}", "\\\\boxed{2}"] * 20, ["1", "1"] * 20)
gathered = [None, None]
dist.all_gather_object(gathered, (verifier.num_workers, [str(v) for v in told]))
if dist.get_rank() == 0:
    print("told", all(v == ["correct", "wrong"] * 20 for _, v in gathered), sum(n for n, _ in gathered))
verifier.close()
"""


@pytest.mark.slow
def test_two_ranks(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
    cores = max(2, len(os.sched_getaffinity(0)) // 2 * 2)
    assert f"told True {cores}" in result.stdout, result.stderr[-2000:]


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.slow
def test_files_of_the_user_named_like_modules(tmp_path):
    """A script's folder is the first place its interpreter imports from; nothing in it may run in a worker."""
    for name in ("math_verify", "sympy", "antlr4", "latex2sympy2_extended", "mpmath", "gmpy2", "flint"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\nraise SystemExit")
    script = tmp_path / "script.py"
    script.write_text(
        "from trl_offpolicy import MathVerifier\nprint(MathVerifier(num_workers=1).verify(['\\\\boxed{0.5}'], ['1/2']))"
    )
    result = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment()
    )
    assert "correct" in result.stdout, result.stderr[-2000:]
    assert not (tmp_path / "ran").exists()


HANGING = """
import os, signal
from trl_offpolicy import MathVerifier
verifier = MathVerifier(num_workers=1, timeout=1000)
verifier.verify(["1"], ["1"])
worker = verifier._workers[0]
os.kill(worker.pid, signal.SIGSTOP)  # it will answer nothing and read nothing, not even that its input was closed
if os.fork() == 0:
    signal.pause()  # a child that keeps every pipe open
print(worker.keeper, worker.pid, flush=True)
verifier.verify(["\\\\boxed{1}"], ["1"])
"""


@pytest.mark.slow
def test_workers_die_with_a_killed_parent():
    parent = subprocess.Popen(
        [sys.executable, "-c", HANGING], stdout=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )
    try:
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        parent.kill()
        assert not psutil.wait_procs(workers, timeout=60)[1]
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
