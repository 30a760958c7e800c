"""A million rows through the rewriter: time, memory and journal; then kill -9 after a million attempts, and the resume.

    python benchmarks/scale.py [--rows 1000000] [--output_dir runs/scale]

The tests' scripted sampler stands in for the model, so what is measured is the rewriter alone: reading, scheduling, verdicts,
journal, Parquet. Each phase is a process of its own. Memory is the peak of anonymous resident memory (Linux) beyond what the
process holds before it starts; the input is a memory-mapped Arrow file, whose pages the system takes back when it needs them.
Needs some 3 GB of disk.
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from scripted import ScriptedSampler, rows, verify  # noqa: E402


def anonymous_mib() -> float:
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024


class Stopwatch(ScriptedSampler):
    """Says when the first request came in, and goes no further if that is all that is asked."""

    def __init__(self, stop: bool, **kwargs):
        super().__init__(capacity=64, **kwargs)
        self.stop, self.first = stop, None

    def submit(self, request):
        self.first = self.first or (time.monotonic(), time.process_time())
        if self.stop:
            raise KeyboardInterrupt
        super().submit(request)


def phase(name: str, num_rows: int, output_dir: Path) -> None:
    from datasets import Dataset

    from trl_offpolicy import DataRewriter, RewriteConfig

    dataset = Dataset.from_parquet(str(output_dir / "input.parquet"), cache_dir=str(output_dir / "cache"))
    sampler = Stopwatch(stop=name == "resume", kill_after=num_rows if name == "kill" else None)
    run = output_dir / ("whole" if name == "whole" else "killed")
    rewriter = DataRewriter("scripted", RewriteConfig(str(run), num_generations=4), sampler=sampler, verifier=verify)
    before = peak = anonymous_mib()
    done, lock = threading.Event(), threading.Lock()

    def watch():
        nonlocal peak
        while not done.wait(0.2):
            with lock:
                peak = max(peak, anonymous_mib())

    threading.Thread(target=watch, daemon=True).start()
    began, cpu = time.monotonic(), time.process_time()
    with contextlib.suppress(KeyboardInterrupt):
        rewriter.rewrite(dataset)
    done.set()
    result = {
        "seconds": time.monotonic() - began,
        "first": sampler.first[0] - began,
        "cpu": sampler.first[1] - cpu,
        "peak": peak - before,
        **rewriter.metrics,
    }
    (output_dir / f"{name}.json").write_text(json.dumps(result))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/scale"))
    parser.add_argument("--phase", choices=("whole", "kill", "resume"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        phase(args.phase, args.rows, args.output_dir)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    shutil.rmtree(args.output_dir, ignore_errors=True)
    args.output_dir.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows(args.rows)), args.output_dir / "input.parquet")
    for name in ("whole", "kill", "resume"):
        command = [sys.executable, __file__, "--rows", str(args.rows), "--output_dir", str(args.output_dir)]
        code = subprocess.run([*command, "--phase", name], stderr=subprocess.DEVNULL).returncode
        assert code == (-9 if name == "kill" else 0), f"{name} ended with {code}"
    whole, resume = (json.loads((args.output_dir / f"{name}.json").read_text()) for name in ("whole", "resume"))
    with (args.output_dir / "killed" / "journal.jsonl").open("rb") as file:
        attempts = sum(1 for _ in file) - 1
        size = file.tell()
    print(f"{args.rows:,} rows, {whole['sampling']['sampled']:,} attempts: {whole['seconds']:.0f} s")
    for name, result in (("memory", whole), ("memory of a resume, until it samples", resume)):
        print(f"{name}: {result['peak']:.0f} MiB, {result['peak'] * 2**20 / args.rows:.0f} bytes a row")
    print(
        f"a resume with {attempts:,} attempts in the journal samples after {resume['first']:.1f} s ({resume['cpu']:.1f} s of CPU)"
    )
    print(f"journal: {size / attempts:.0f} bytes an attempt (of some three tokens and thirty characters)")


if __name__ == "__main__":
    main()
