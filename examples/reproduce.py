r"""
*Mind the Gap* (arXiv 2509.15157) as one command: rewrite the demonstrations, train every method, evaluate each, and write
the page with the paper's tables.

    python examples/reproduce.py --preset paper --model_name_or_path Qwen/Qwen2.5-Math-7B --output_dir runs/paper \
        --launcher 'accelerate launch'                                    # 48k rows, 8 GPUs; also paper_llama
    python examples/reproduce.py --preset gsm8k --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --output_dir runs/gsm8k
    python examples/reproduce.py --preset cpu --model_name_or_path DIR --output_dir runs/cpu       # two cores, a day or more
    python examples/reproduce.py --preset paper --model_name_or_path M --output_dir runs/paper --dry_run    # plan and cost

Every step is a command of `trl-offpolicy` in a process of its own, with its options in RUN/steps/, and leaves an ordinary
directory (`rewrite`, `seed-0/dr_iw-0.0002/train`, …). Run the same command again after an interruption: what is finished
is not done again, and the step that was stopped goes on. Once the base is measured, a stop leaves a page of what is
finished. Where there are several learning rates, each method takes the one that is best on development problems, which
are neither trained nor tested on.

--rewriting, --training and --evaluation are YAML files whose options of `trl-offpolicy rewrite`, `sft` and `eval` win over
the preset's.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import yaml

from trl_offpolicy.runs.interrupts import heed_interrupts, terminable, uninterrupted
from trl_offpolicy.runs.run_config import STEP


class Method(NamedTuple):
    label: str
    rows: str  # what it is trained on: a key of `ROWS`
    objective: str


METHODS = {
    "sft": Method("SFT", "demonstrations", "nll"),
    "dft": Method("DFT", "demonstrations", "dft"),
    "dr_sft": Method("DR+SFT", "rewrite", "nll"),
    "dr_dft": Method("DR+DFT", "rewrite", "dft"),
    "dr_iw": Method("DR+IW", "rewrite", "iw"),
    "self_dft": Method("self only + DFT", "self", "dft"),
    "guided_dft": Method("guided only + DFT", "guided", "dft"),
    "no_fallback": Method("no fallback + SFT", "no_fallback", "nll"),
    "rft": Method("RFT", "rft", "nll"),
}
ROWS = {
    "demonstrations": "the demonstrations, asked with the prompts of the rewrite",
    "rewrite": "the rewritten rows",
    "self": "the same, with the demonstration in the place of guided rows",
    "guided": "a rewrite of its own without self-alignment",
    "no_fallback": "the rewritten rows without the demonstrations that were kept",
    "rft": "every distinct correct one of K draws a problem, no demonstrations",
}
# Runs of `rewrite` beside the main one, and what differs in them.
OWN_RUNS = {"guided": {"stages": ["guided"]}, "rft": {"stages": ["self"], "selection": "random"}}
MAIN = ["sft", "dft", "dr_sft", "dr_dft", "dr_iw"]

_PAPER = {
    "data": {"dataset_name": "AI-MO/NuminaMath-CoT", "dataset_split": "train"},
    "num_train": 50_000, "num_dev": 0, "num_test": None, "max_length": 2048,
    "benchmarks": ["math500", "minerva_math", "olympiadbench", "aime24", "amc23"],
    "methods": [*MAIN[:4], "self_dft", "guided_dft"], "learning_rates": [5e-5], "seeds": 1,
    "rewriting": {"sampler": "vllm", "dtype": "bfloat16", "num_generations": 10, "max_completion_length": 2048},
    "training": {
        "num_train_epochs": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 8, "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1, "adam_beta2": 0.95, "weight_decay": 0.01, "max_length": 2048, "gradient_checkpointing": True,
        "save_steps": 50, "save_total_limit": 1, "logging_steps": 1,
    },
    "evaluation": {"preset": "paper", "greedy": True},
    "expected_length": 600, "device_tflops": 312.0,
}  # fmt: skip
PRESETS = {
    "paper": _PAPER,
    "paper_llama": {
        **_PAPER, "learning_rates": [7e-6], "evaluation": {**_PAPER["evaluation"], "preset": "paper_llama"},
    },
    "gsm8k": {
        "data": {"dataset_name": "openai/gsm8k", "dataset_config": "main", "dataset_split": "train"},
        "num_train": 7000, "num_dev": 300, "num_test": None, "max_length": 1024, "benchmarks": ["gsm8k"],
        "methods": MAIN, "learning_rates": [5e-6, 2e-5], "seeds": 2,
        "rewriting": {"sampler": "vllm", "dtype": "bfloat16", "num_generations": 8, "max_completion_length": 512},
        "training": {
            "num_train_epochs": 2, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 4, "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1, "max_length": 1024, "save_steps": 50, "save_total_limit": 1, "logging_steps": 5,
        },
        "evaluation": {"num_generations": 4, "max_completion_length": 512, "greedy": True},
        "expected_length": 250, "device_tflops": 312.0,
    },
    "cpu": {
        "data": {"dataset_name": "openai/gsm8k", "dataset_config": "main", "dataset_split": "train"},
        "num_train": 100, "num_dev": 0, "num_test": 60, "max_length": 768, "benchmarks": ["gsm8k"],
        "methods": MAIN, "learning_rates": [2e-4], "seeds": 1,
        "rewriting": {
            "sampler": "vllm", "dtype": "float32", "num_generations": 4, "max_completion_length": 384, "max_model_len": 1024,
            "gpu_memory_utilization": 0.2,
            "engine_kwargs": '{"max_num_seqs": 64, "max_num_batched_tokens": 2048, "enforce_eager": true}',
        },
        "training": {
            "num_train_epochs": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1, "max_length": 768, "gradient_checkpointing": False, "use_peft": True, "lora_r": 16, "lora_alpha": 32, "lora_target_modules": ["all-linear"],
            "use_cpu": True, "bf16": False, "dtype": "float32", "save_steps": 5, "save_total_limit": 1, "logging_steps": 1,
        },
        "evaluation": {"num_generations": 2, "max_completion_length": 384, "greedy": True},
        "expected_length": 250, "device_tflops": 0.15,
    },
}  # fmt: skip
# Options of the rewrite that say with which engine; the other commands get them too. The last three are vLLM's.
ENGINE = ("sampler", "dtype", "trust_remote_code", "max_model_len", "gpu_memory_utilization", "engine_kwargs")
SIZES = {"math500": 500, "minerva_math": 272, "olympiadbench": 674, "aime24": 30, "amc23": 40, "gsm8k": 1319}
GENERAL = Path(__file__).with_name("reproduce_general.jsonl")  # questions that have nothing to do with the task
# Settings that may change when a run goes on.
FREE = ("methods", "seeds", "learning_rates", "expected_length", "device_tflops")


class Step(NamedTuple):
    """One command; it is done when the file is there that it writes last."""

    name: str  # the directory under RUN
    kind: str  # the command of trl-offpolicy; `data` is done here
    options: dict
    result: str
    needs: tuple[str, ...] = ()  # names of the steps that it cannot begin before


class OutOfBudget(RuntimeError):
    """`--time_budget` or `--sampling_budget` is used up; `needs` is what else the command must be given to go on."""

    def __init__(self, reason: str, needs: str = ""):
        super().__init__(reason)
        self.needs = needs


class Experiment:
    """The steps of one run, from the settings of a preset and of the command line."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.run = args, Path(args.output_dir)
        self.settings = settings_of(args)
        self.model, self.seeds = args.model_name_or_path, range(self.settings["seeds"])
        self.deadline = time.monotonic() + 3600 * args.time_budget if args.time_budget else None
        self.sampled = SampledTokens(self.run)
        self.one_at_a_time, self.stopped = threading.Lock(), threading.Event()
        self.held: int | None = None  # the file that `alone` locks

    # ---- the plan ----

    def steps(self) -> Iterator[Step]:
        """
        All steps in order: what the paper's Table 2 shows comes before log-probs and forgetting. Those of the tests
        need the learning rates; until they are chosen, the first one stands for them.
        """
        settings, wanted = self.settings, {METHODS[m].rows for m in self.settings["methods"]}
        yield Step("data", "data", settings["data"], "data.json")
        yield self._rewriting("rewrite", {})
        for name in OWN_RUNS.keys() & wanted:
            yield self._rewriting(name, OWN_RUNS[name])
        general = {
            "dataset_name": str(GENERAL), "stages": ["self"], "num_generations": 1, "verifier": "exact", "verifier_kwargs": "{}",
            "solve_prompt": "{problem}",
        }  # fmt: skip
        yield self._rewriting("general", general)
        yield self._evaluation("base/eval", self.model, "test", 0)
        on_dev = {
            method: [f"{self.place(method, rate, 0)}/dev" for rate in settings["learning_rates"] if self.tuned]
            for method in settings["methods"]
        }
        if self.tuned:
            for method in settings["methods"]:
                for rate in settings["learning_rates"]:
                    yield self._training(method, rate, 0)
                    yield self._evaluation(f"{self.place(method, rate, 0)}/dev", self.place(method, rate, 0), "dev", 0)
        rates = {method: rate or settings["learning_rates"][0] for method, rate in self.rates().items()}
        places = [
            (method, seed, self.place(method, rates[method], seed))
            for seed in self.seeds
            for method in settings["methods"]
        ]
        for method, seed, place in places:
            if seed or not self.tuned:
                yield self._training(method, rates[method], seed, on_dev[method])
            yield self._evaluation(f"{place}/eval", place, "test", seed, on_dev[method])
            if self.args.delete_models:  # it need not wait for the others then
                yield from self._forgetting(place)
        yield self._measuring(
            "gap", self.model, "policy_gap.json", "rewrite", dataset_name=self._path("rewrite/dataset")
        )
        if not self.args.delete_models:
            for _, _, place in places:
                yield from self._forgetting(place)

    @property
    def tuned(self) -> bool:
        return len(self.settings["learning_rates"]) > 1

    def rates(self) -> dict[str, float | None]:
        """
        The learning rate of each method: the best on the development problems, the smaller one of equals; `None` where
        they are not all measured yet.
        """
        if not self.tuned:
            return dict.fromkeys(self.settings["methods"], self.settings["learning_rates"][0])
        chosen, rates = {}, sorted(self.settings["learning_rates"])
        for method in self.settings["methods"]:
            files = [self.run / self.place(method, rate, 0) / "dev" / "results.json" for rate in rates]
            accuracy = [dev_accuracy(file) for file in files if file.exists()]
            chosen[method] = rates[accuracy.index(max(accuracy))] if len(accuracy) == len(rates) else None
        return chosen

    def place(self, method: str, rate: float, seed: int) -> str:
        return f"seed-{seed}/{method}-{rate:g}"

    def done(self, step: Step) -> bool:
        return (self.run / step.name / step.result).exists()

    def needed(self) -> list[Step]:
        """
        The steps that are not done. A model is trained again if its weights were deleted and something is still to be
        measured of it.
        """
        steps = list({step.name: step for step in self.steps()}.values())
        due = [step for step in steps if not self.done(step)]
        places = {self._model_of(step) for step in due}
        return [
            s for s in steps if s in due or (s.kind == "sft" and self._model_of(s) in places and not self._weights(s))
        ]

    def _model_of(self, step: Step) -> str:
        return step.name.rpartition("/")[0]

    def _weights(self, step: Step) -> list[Path]:
        return list((self.run / step.name).glob("*.safetensors"))

    def _path(self, name: str) -> str:
        return str(self.run / name)

    def _rewriting(self, name: str, differing: dict) -> Step:
        data = {"dataset_name": self._path("data/train.jsonl")}
        options = {"model_name_or_path": self.model, **data, **self.settings["rewriting"], **differing}
        return Step(name, "rewrite", options, "metrics.json", ("data",))

    def _training(self, method: str, rate: float, seed: int, needs: Sequence[str] = ()) -> Step:
        _, rows, objective = METHODS[method]
        source = "data" if rows == "demonstrations" else rows if rows in OWN_RUNS else "rewrite"
        options = {
            "model_name_or_path": self.model, "dataset_name": str(self.rows(rows)), "objective": objective, "learning_rate": rate, "seed": seed,
            "report_to": "none", **self.settings["training"],
        }  # fmt: skip
        if objective == "iw":
            options.setdefault("expert_weighting", "base")
        return Step(f"{self.place(method, rate, seed)}/train", "sft", options, "trainer_state.json", (source, *needs))

    def _named(self, place: str, engine: dict) -> dict:
        """The options that name the model in a directory of ours, or the base."""
        if place == self.model:
            return {"model_name_or_path": place}
        directory = self._path(f"{place}/train")
        training = self.settings["training"]
        if training.get("use_peft") and engine.get("sampler") == "vllm":
            if training.get("use_cpu"):  # vLLM's CPU build draws several times slower with an adapter
                return {"model_name_or_path": self._path(f"{place}/merged")}
            return {"model_name_or_path": self.model, "adapter": directory}
        return {"model_name_or_path": directory}

    def _evaluation(self, name: str, place: str, split: str, seed: int, needs: Sequence[str] = ()) -> Step:
        engine = {key: value for key, value in self.settings["rewriting"].items() if key in ENGINE}
        options = {**engine, **self.settings["evaluation"]}
        options = {**self._named(place, options), **options, "seed": seed}
        options["benchmarks"] = [self._path(f"data/{split}.jsonl")] if split == "dev" else self.benchmarks()
        if split == "dev":
            options["greedy"] = False
        elif place != self.model:
            options["baseline"] = self._path("base/eval")
            needs = ["base/eval", *needs]
        return Step(name, "eval", options, "results.json", ("data", *self._training_of(place), *needs))

    def benchmarks(self) -> list[str]:
        """As `eval` takes them: by name, or the problems that `data` has chosen of them."""
        names = self.settings["benchmarks"]
        return (
            names if self.settings["num_test"] is None else [self._path(f"data/{short_name(n)}.jsonl") for n in names]
        )

    def _measuring(self, name: str, place: str, result: str, run: str, **options) -> Step:
        engine = {key: self.settings["rewriting"][key] for key in ("dtype",) if key in self.settings["rewriting"]}
        options = {**self._named(place, {}), **engine, **options}
        return Step(name, "gap", options, result, (run, *self._training_of(place)))

    def _training_of(self, place: str) -> list[str]:
        return [] if place == self.model else [f"{place}/train"]

    def _forgetting(self, place: str) -> Iterator[Step]:
        for run in ("rewrite", "general"):
            options = {"dataset_name": self._path(run), "forgetting": True}
            yield self._measuring(f"{place}/kl-{run}", place, "forgetting.json", run, **options)

    # ---- the steps ----

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Locks the directory for this run and its steps, or raises `ValueError` if another run works in it."""
        from trl_offpolicy.runs.journal import alone

        with alone(self.run / "reproduce.lock", "reproduce.py") as self.held:
            yield

    def open(self) -> None:
        """Notes the settings, or raises `ValueError` if the directory was begun with others."""
        from trl_offpolicy.data.whole_file import write_whole
        from trl_offpolicy.runs.journal import differences

        file = self.run / "reproduce.json"
        settings = {"model_name_or_path": self.model, **self.settings}
        # What nothing has come of yet may still be mended.
        begun = {
            "rewriting": "rewrite/journal*.jsonl", "training": "seed-*/*/train/**/trainer_state.json", "evaluation": "*/eval/journal*.jsonl",
        }  # fmt: skip
        free = [name for name, files in begun.items() if not any(self.run.glob(files))]
        if file.exists():
            found, now = (flat(each, free) for each in (json.loads(file.read_text()), settings))
            if differing := differences(found, now, free=()):
                raise ValueError(f"{file} was begun with other settings: {differing}. Pass another --output_dir.")
        write_whole(file, json.dumps(settings, indent=1) + "\n")

    def do(self, step: Step, **process) -> None:
        """
        Args:
            process: Passed to `run_command`.

        Raises:
            subprocess.CalledProcessError: It ended with an exit code other than 0.
            ValueError: It ended well, but did not leave its result.
            OutOfBudget: It was stopped; it goes on when the command is run again.
        """
        if step.kind == "data":
            prepare_data(self)
            return
        if step.kind == "sft":
            which = next(m.rows for m in METHODS.values() if str(self.rows(m.rows)) == step.options["dataset_name"])
            with self.one_at_a_time:
                self._make_rows(which)
        merged = Path(step.options["model_name_or_path"])
        try:
            if merged.name == "merged":
                merge_adapter(merged.with_name("train"), merged, step.options["dtype"])
            run_command(self.command(step), self._check_budget, **process)
        finally:
            if merged.name == "merged":
                shutil.rmtree(merged, ignore_errors=True)
        if not self.done(step):
            raise ValueError(
                f"{step.name} ended without {self.run / step.name / step.result}, so it would be run again and again. "
                f"Its options are in {self._file(step, 'yaml')}: leave out what keeps it from its result, such as dry_run or shard."
            )

    def do_all(self) -> None:
        """The steps that are not done, `--processes` at a time. Raises what `do` raises; the others are stopped then."""
        running, free = {}, list(range(self.args.processes))
        with ThreadPoolExecutor(self.args.processes) as pool:
            try:
                while due := self.needed():  # when the learning rates are chosen, others are due
                    self._check_budget()
                    names, busy = {step.name for step in due}, {step.name for step, _ in running.values()}
                    # A step can still be at work when its result is there.
                    ready = [step for step in due if step.name not in busy and not (names | busy) & {*step.needs}]
                    for step in ready[: len(free)]:
                        where = (
                            f" (output: {self._file(step, 'log')})"
                            if self.args.processes > 1 and step.kind != "data"
                            else ""
                        )
                        print(f"{len(due)} steps to do; {step.name}{where}", flush=True)
                        if step.kind == "data":  # in this thread, which ctrl-C ends
                            self.do(step)
                            break
                        slot = free.pop(0)
                        running[pool.submit(self.do, step, **self._process(step, slot))] = step, slot
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        _, slot = running.pop(future)
                        free.append(slot)
                        future.result()
                    self._clean_all()
            except BaseException:
                self.stopped.set()
                with uninterrupted():  # else an impatient ctrl-C would leave steps behind
                    if names := [step.name for step, _ in running.values()]:
                        print(f"\nstopping {', '.join(names)}: within a minute", file=sys.stderr, flush=True)
                    pool.shutdown()
                raise

    def _process(self, step: Step, slot: int) -> dict:
        """Steps that run beside others have one device each, and write what they print to a file."""
        if self.args.processes == 1:
            return {"held": self.held}
        devices = visible_devices()
        chosen = {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if len(devices) > 1 else {}
        return {"held": self.held, "environment": chosen, "log": self._file(step, "log")}

    def _clean_all(self) -> None:
        in_use = {self._model_of(each) for each in self.needed()}
        for other in [s for s in self.steps() if s.kind == "sft" and self.done(s)]:
            if self._model_of(other) not in in_use:
                self.clean(other)

    def command(self, step: Step) -> list[str]:
        """Writes the step's options to their file."""
        from trl_offpolicy.data.whole_file import write_whole
        from trl_offpolicy.runs.checkpoints import whole_checkpoints

        options = {**step.options, "output_dir": self._path(step.name)}
        if step.kind == "sft" and whole_checkpoints(self.run / step.name):
            options["resume_from_checkpoint"] = "last"
        file = self._file(step, "yaml")
        write_whole(file, yaml.safe_dump(options, sort_keys=False, allow_unicode=True))
        launcher = shlex.split(self.args.launcher) if step.kind == "sft" and self.args.launcher else [sys.executable]
        return [*launcher, "-m", "trl_offpolicy.cli", step.kind, "--config", str(file)]

    def _file(self, step: Step, suffix: str) -> Path:
        return self.run / "steps" / f"{step.name.replace('/', '-')}.{suffix}"

    def _check_budget(self) -> None:
        if self.stopped.is_set():
            raise OutOfBudget("another step has ended the run")
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfBudget(f"--time_budget {self.args.time_budget:g} (hours) is used up")
        with self.one_at_a_time:
            tokens = self.sampled.count() if self.args.sampling_budget else 0
        if self.args.sampling_budget and tokens >= self.args.sampling_budget:
            raise OutOfBudget(
                f"{tokens:,} tokens were sampled; --sampling_budget allows {self.args.sampling_budget:,}",
                needs=" with a larger --sampling_budget",
            )

    def clean(self, step: Step) -> None:
        """Deletes checkpoints, and weights that nothing is measured of any more and nobody asked to keep."""
        for checkpoint in (self.run / step.name).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        rates = self.rates()
        chosen = {f"{self.place(m, rate, seed)}/train" for m, rate in rates.items() if rate for seed in self.seeds}
        if self.args.delete_models or (None not in rates.values() and step.name not in chosen):
            for file in self._weights(step):
                file.unlink()

    def rows(self, which: str) -> Path:
        """What a method is trained on, as `sft` takes it."""
        if which in ("rewrite", "guided"):
            return self.run / which / "dataset"
        return self.run / ("data/train.jsonl" if which == "demonstrations" else f"rows/{which}.parquet")

    def _make_rows(self, which: str) -> None:
        """The rows that are made of the main rewrite, or of the journal of RFT's draws."""
        from datasets import load_dataset

        path = self.rows(which)
        if which not in ("self", "no_fallback", "rft") or path.exists():
            return
        rows = load_dataset("parquet", data_files=str(self.run / ("rft" if which == "rft" else "rewrite") / "dataset" / "*.parquet"), split="train")  # fmt: skip
        made = {"self": self_only, "no_fallback": no_fallback, "rft": every_correct}[which]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        made(rows, self.run).to_parquet(str(partial))
        partial.replace(path)


def dev_accuracy(results: Path) -> float:
    (result,) = json.loads(results.read_text())["benchmarks"].values()
    accuracy = next(value for name, value in result.items() if name.startswith("avg@") and "_" not in name)
    if accuracy is None:
        raise ValueError(f"No sample in {results.parent} could be judged, so no learning rate can be chosen by it.")
    return accuracy


def flat(settings: dict, free: list[str]) -> dict:
    """Settings and the options within them by name, but for those that may change."""
    found = {}
    for name, value in settings.items():
        if name in (*FREE, *free):
            continue
        found |= {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
    return found


# ---- rows ----


def self_only(rows, run: Path):
    """Rows of source `guided` become what a rewrite without the guided stage would have kept: the demonstration."""
    from trl_offpolicy.data.formats import as_completion, demonstration, expert_row

    def kept(row: dict, index: int) -> dict:
        if row["source"] != "guided":
            return row
        written = {**row, "completion": as_completion(row["prompt"], demonstration(row))}
        expert = expert_row({name: written[name] for name in ("prompt", "completion", "answer")}, index)
        undrawn = {"completion_ids": [], "behavior_log_probs": [], "behavior_prompt": row["prompt"][:0]}
        return {**row, **expert, **undrawn, "source": "expert"}

    return rows.map(kept, with_indices=True, features=rows.features)


def no_fallback(rows, run: Path):
    return rows.filter(lambda source: source != "expert", input_columns="source")


def every_correct(rows, run: Path):
    """Every distinct correct text; equal texts can be different tokens: the earliest attempt's are taken."""
    from datasets import Dataset

    from trl_offpolicy.runs.run_directory import RunDirectory

    directory, prompts, correct = RunDirectory(run / "rft"), dict(zip(rows["id"], rows["prompt"], strict=True)), {}
    for journal in directory.ids:
        for attempt in directory.attempts(journal):
            if attempt.verdict == "correct":
                kept = correct.setdefault((attempt.id, attempt.text), attempt)
                correct[attempt.id, attempt.text] = min(kept, attempt, key=lambda each: each.attempt)
    return Dataset.from_list([
        {
            "id": row_id, "prompt": prompts[row_id], "completion": [{"role": "assistant", "content": text}], "source": "self",
            "completion_ids": attempt.completion_ids, "behavior_log_probs": attempt.behavior_log_probs,
        }
        for (row_id, text), attempt in sorted(correct.items(), key=lambda item: item[0])
    ])  # fmt: skip


def prepare_data(experiment: Experiment) -> None:
    """
    `data/train.jsonl` and `data/dev.jsonl`: drawn from the dataset, without rows that are longer than `max_length`, have no
    gold answer, are there twice, or ask a problem that is tested; and with `num_test` the test problems.
    """
    from transformers import AutoTokenizer

    from trl_offpolicy.data.formats import complete_rows, read_rows
    from trl_offpolicy.data.loading import load_rows
    from trl_offpolicy.data.whole_file import write_whole
    from trl_offpolicy.evaluation.benchmarks import load_benchmark

    settings, directory = experiment.settings, experiment.run / "data"
    directory.mkdir(parents=True, exist_ok=True)
    tested: set[str] = set()
    for name in settings["benchmarks"]:
        short, test = load_benchmark(name)
        tested |= {squeezed(problem.problem) for problem in read_rows(test)}
        if settings["num_test"] is not None:
            test = test.shuffle(seed=0).select(range(min(settings["num_test"], len(test))))
            test.to_json(str(directory / f"{short}.jsonl"))
    tokenizer = AutoTokenizer.from_pretrained(experiment.model)
    dataset = complete_rows(load_rows(**settings["data"])).shuffle(seed=0)
    wanted, seen = settings["num_train"] + settings["num_dev"], set()
    kept, left_out = [], dict.fromkeys(("without_answer", "too_long", "twice", "tested"), 0)
    for index, problem in enumerate(read_rows(dataset)):
        text = squeezed(problem.problem)
        length = len(tokenizer(f"{problem.problem} {problem.demonstration}")["input_ids"])
        reasons = (not problem.answer, length > settings["max_length"], text in seen, text in tested)
        seen.add(text)
        if any(reasons):
            left_out[list(left_out)[reasons.index(True)]] += 1
        else:
            kept.append(index)
        if len(kept) == wanted:
            break
    if len(kept) <= settings["num_dev"]:
        raise ValueError(
            f"Of {len(dataset):,} rows {len(kept):,} can be used ({left_out}), no more than the {settings['num_dev']:,} development problems; "
            "pass a smaller --num_dev, or another dataset."
        )
    dev = settings["num_dev"]
    dataset.select(kept[dev:]).to_json(str(directory / "train.jsonl"))
    if dev:
        dataset.select(kept[:dev]).to_json(str(directory / "dev.jsonl"))
    found = {"train": len(kept) - dev, "dev": dev, "left_out": left_out}
    write_whole(directory / "data.json", json.dumps(found, indent=1) + "\n")
    print(f"data: {found}")


def squeezed(problem: str) -> str:
    """A problem without what does not make it another one: spaces, case, signs."""
    return re.sub(r"\W+", "", problem.casefold())


def short_name(benchmark: str) -> str:
    return Path(benchmark).stem if Path(benchmark).suffix else benchmark.split(":")[0].split("/")[-1]


def merge_adapter(adapter: Path, directory: Path, dtype: str) -> None:
    """Writes the model that a LoRA adapter belongs to with the adapter's weights added to its own."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=dtype).merge_and_unload().save_pretrained(directory)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(directory)


# ---- processes and budgets ----


def run_command(
    command: list[str],
    check: Callable[[], None],
    held: int | None = None,
    environment: dict[str, str] | None = None,
    log: Path | None = None,
) -> None:
    """
    Runs a command; `check` is called before and every few seconds and may raise, which interrupts it as ctrl-C does.
    The command keeps the file `held` open. With a `log` what it prints is written to that.
    """
    check()
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    with open(log, "a") if log else contextlib.nullcontext() as output:
        process = subprocess.Popen(
            command, start_new_session=True, env=inherited | {STEP: "1"} | (environment or {}), preexec_fn=heed_interrupts,
            stdout=output, stderr=output and subprocess.STDOUT, pass_fds=() if held is None else (held,),
        )  # fmt: skip
    try:
        while True:
            try:
                code = process.wait(timeout=2)
                break
            except subprocess.TimeoutExpired:
                check()
    except BaseException:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        raise
    if code:
        raise subprocess.CalledProcessError(code, command, output=log and f"what it printed is in {log}")


def visible_devices() -> list[str]:
    """The CUDA devices that a step could be given, as CUDA_VISIBLE_DEVICES has them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return list(map(str, range(torch.cuda.device_count()))) if named is None else named.split(",")


# What `accelerate launch` tells each of its processes; a step starts its own.
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class SampledTokens:
    """Counts the tokens in the journals of a run, each line once."""

    def __init__(self, run: Path):
        self.run, self.read, self.tokens = run, {}, 0

    def count(self) -> int:
        for path in self.run.rglob("journal*.jsonl"):
            with path.open("rb") as file:
                file.seek(self.read.get(path, 0))
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self.read[path] = self.read.get(path, 0) + len(line)
                    found = re.search(rb'"num_tokens":\s*(\d+)', line)
                    self.tokens += int(found[1]) if found else 0
        return self.tokens


# ---- the command ----


def estimate(experiment: Experiment, steps: list[Step]) -> str:
    """Tokens, hours of a device and disk of `steps`, in words."""
    settings, args = experiment.settings, experiment.args
    size, length = num_parameters(experiment.model), settings["expected_length"]
    known = [SIZES.get(short_name(name), 500) for name in settings["benchmarks"]]
    num_test = sum(min(n, settings["num_test"] or n) for n in known)
    epochs, lora = settings["training"].get("num_train_epochs", 3), settings["training"].get("use_peft")
    samples = settings["evaluation"].get("num_generations", 16) + bool(settings["evaluation"].get("greedy"))
    sampled = trained = scored = 0
    for step in steps:
        if step.kind == "rewrite":
            rows = settings["num_train"] if step.name != "general" else 40
            stages = len(step.options.get("stages", ["self", "guided"]))
            drawn = 1 if step.options.get("selection") == "random" else 0.4
            sampled += rows * stages * step.options["num_generations"] * drawn * length
        if step.kind == "eval":
            sampled += (settings["num_dev"] if step.name.endswith("/dev") else num_test) * samples * length
        if step.kind == "sft":
            trained += settings["num_train"] * epochs * (length + 150)
        if step.kind == "gap":
            scored += settings["num_train"] * (length + 150)
    said = f"some {sampled:,.0f} tokens sampled, {trained:,.0f} trained on, {scored:,.0f} scored"
    if settings["rewriting"].get("sampler") == "vllm":
        starts = sum(step.kind in ("rewrite", "eval") for step in steps)
        said += f"; vLLM starts {starts} times, which takes a minute or more each and is not counted"
    if size is None:
        return f"{said}; the model's size is not known here, so neither are hours"
    flops = 2 * size * sampled / 0.15 + (4 if lora else 6) * size * trained / 0.4 + 2 * size * scored / 0.4
    tflops = args.device_tflops or settings["device_tflops"]
    hours = flops / (tflops * 1e12) / 3600
    trainings = {step.name for step in steps if step.kind == "sft"}
    final = len(settings["methods"]) * settings["seeds"]
    kept = 0 if args.delete_models else min(final, len(trainings))
    disk = (kept + 1) * size * 2 * (0.02 if lora else 1) + (0 if lora else 6 * size) + sampled * 25
    return (
        f"{said}; {hours:,.1f} device-hours at {tflops:g} TFLOP/s (15 % of it used in sampling, 40 % in training: assumptions), "
        f"{disk / 1e9:,.0f} GB of disk. Attempts: 40 % of K x stages, as with the paper's yields; {length} tokens each."
    )


def num_parameters(model: str) -> float | None:
    """From the configuration if it is at hand, else from a name such as Qwen2.5-Math-7B."""
    if Path(model).is_dir():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).num_parameters()
    found = re.search(r"(\d+(?:\.\d+)?)\s*([bm])(?![a-z])", model.casefold())
    return found and float(found[1]) * {"b": 1e9, "m": 1e6}[found[2]]


def settings_of(args: argparse.Namespace) -> dict:
    """The preset with what was passed beside it."""
    settings = {**PRESETS[args.preset]}
    for name in ("num_train", "num_dev", "num_test", "benchmarks", "methods", "learning_rates", "seeds"):
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    if args.dataset_name:
        split, config = args.dataset_split or "train", args.dataset_config
        settings["data"] = {"dataset_name": args.dataset_name, "dataset_split": split}
        settings["data"] |= {"dataset_config": config} if config else {}
    for name, options in options_of(args).items():
        preset = settings[name]
        if options.get("sampler", "vllm") != "vllm":
            preset = {key: value for key, value in preset.items() if key not in ENGINE[-3:]}
        settings[name] = preset | options
    if len(settings["learning_rates"]) > 1 and not settings["num_dev"]:
        raise ValueError(
            f"You passed {len(settings['learning_rates'])} learning rates and no development problems to choose one by; pass --num_dev."
        )
    if not all(0 < rate < float("inf") for rate in settings["learning_rates"]):
        raise ValueError(f"You passed --learning_rates {settings['learning_rates']}; each must be a number above 0.")
    for name in ("methods", "learning_rates"):
        if len(set(settings[name])) < len(settings[name]):
            raise ValueError(f"You passed --{name} {settings[name]}, in which one is there twice; leave that out.")
    own = {"train", "dev"} & {short_name(name) for name in settings["benchmarks"]}
    if own and settings["num_test"] is not None:
        raise ValueError(
            f"You passed --benchmarks {settings['benchmarks']} with --num_test, whose problems would be written over the run's data/{min(own)}.jsonl; rename "
            "the file."
        )
    if len({short_name(name) for name in settings["benchmarks"]}) < len(settings["benchmarks"]):
        raise ValueError(
            f"You passed --benchmarks {settings['benchmarks']}, two of which have the same name; rename a file."
        )
    for name, least in (
        ("num_train", 1),
        ("num_dev", 0),
        ("num_test", 1),
        ("seeds", 1),
        ("processes", 1),
        ("sampling_budget", 1),
    ):
        value = settings.get(name, getattr(args, name))
        if value is not None and value < least:
            raise ValueError(f"You passed --{name} {value}; it must be at least {least}.")
    for name in ("time_budget", "device_tflops"):
        if (value := getattr(args, name)) is not None and not value > 0:
            raise ValueError(f"You passed --{name} {value}; it must be above 0.")
    if args.processes > 1 and args.launcher:
        raise ValueError(
            f"You passed --processes {args.processes} and --launcher {args.launcher!r}, which takes all devices for one training; pass one of them."
        )
    return settings


def options_of(args: argparse.Namespace) -> dict[str, dict]:
    """What the files of options hold; `ValueError`, with the line, for what the command does not know."""
    from trl_offpolicy.cli.evaluate import eval_parser
    from trl_offpolicy.cli.rewrite import rewrite_parser
    from trl_offpolicy.cli.sft import sft_parser

    found = {}
    for name, parser in (("rewriting", rewrite_parser), ("training", sft_parser), ("evaluation", eval_parser)):
        if file := getattr(args, name):
            if not Path(file).is_file():
                raise ValueError(f"You passed --{name} {file}, but there is no such file.")
            parser().read_config(Path(file))
            found[name] = yaml.safe_load(Path(file).read_text())
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods = "; ".join(f"{name}: {m.label} on {ROWS[m.rows]}" for name, m in METHODS.items())
    parser.add_argument("--preset", choices=PRESETS, required=True, help="sizes and settings")
    parser.add_argument("--model_name_or_path", required=True, help="Hub id or local directory")
    parser.add_argument("--output_dir", required=True, help="RUN; a run that is there goes on")
    parser.add_argument("--dataset_name", help="instead of the preset's: Hub id or file, as `rewrite` reads it")
    parser.add_argument("--dataset_config")
    parser.add_argument("--dataset_split")
    parser.add_argument("--benchmarks", nargs="+", help="instead of the preset's, as `eval` takes them")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=methods)
    parser.add_argument(
        "--learning_rates", nargs="+", type=float, help="chosen on the development problems if several"
    )
    parser.add_argument("--seeds", type=int, help="fine-tuning seeds")
    parser.add_argument("--num_train", type=int, help="training problems")
    parser.add_argument("--num_dev", type=int, help="development problems")
    parser.add_argument("--num_test", type=int, help="problems of each benchmark, drawn at random; else all")
    for name, command in (("rewriting", "rewrite"), ("training", "sft"), ("evaluation", "eval")):
        parser.add_argument(f"--{name}", metavar="FILE", help=f"YAML with options of `trl-offpolicy {command}`")
    parser.add_argument("--launcher", help="what starts a training, such as 'accelerate launch'; else one process")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N",
        help="steps at a time, each on one of the devices; what they print goes to RUN/steps/*.log",
    )  # fmt: skip
    parser.add_argument("--time_budget", type=float, metavar="HOURS", help="stop then; the same command goes on")
    parser.add_argument("--sampling_budget", type=int, metavar="TOKENS", help="stop when so many were sampled")
    parser.add_argument("--delete_models", action="store_true", help="keep no weights of what was measured")
    parser.add_argument("--device_tflops", type=float, help="of one device, for the estimate; 312: an A100")
    parser.add_argument("--dry_run", action="store_true", help="the steps, what is done, and what they cost")
    return parser.parse_args(argv)


def show_plan(experiment: Experiment) -> None:
    due = experiment.needed()
    if experiment.tuned:
        print(
            "The learning rate of each test is chosen on the development problems; until then the first one stands here."
        )
    for step in dict.fromkeys(step.name for step in experiment.steps()):
        print(f"{'to do' if step in {each.name for each in due} else 'done '}  {step}")
    print(f"\n{len(due)} steps to do: {estimate(experiment, due)}")


def show_page(experiment: Experiment) -> None:
    """Writes the page, from what is finished, once the base is measured."""
    from reproduce_page import write_page

    if not any(step.name == "base/eval" for step in experiment.needed()):
        print(write_page(experiment))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if os.environ.get("RANK", "0") != "0":  # under `accelerate launch` one process leads; its steps start their own
        return 0
    try:
        experiment = Experiment(args)
        print(f"output_dir: {experiment.run}", flush=True)
        if args.dry_run:
            show_plan(experiment)
            return 0
        with experiment.alone(), terminable():  # a scheduler's word is taken as ctrl-C
            experiment.open()
            experiment.do_all()
    except (ValueError, FileNotFoundError) as error:
        print(f"reproduce.py: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        where = f" ({error.output})" if error.output else ""
        print(f"reproduce.py: a step ended with exit code {error.returncode}: {shlex.join(error.cmd)}{where}\nMend that, then run the same command again.", file=sys.stderr)  # fmt: skip
        return 3 if error.returncode == 3 else 2
    except (KeyboardInterrupt, OutOfBudget) as reason:
        needs = getattr(reason, "needs", "")
        print(
            f"\nstopped: {str(reason) or 'interrupted'}. Run the same command again{needs} to go on.", file=sys.stderr
        )
        show_page(experiment)
        return 3
    show_page(experiment)
    return 0


if __name__ == "__main__":
    sys.exit(main())
