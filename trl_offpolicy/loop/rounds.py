"""Rewrite with the newest policy, train on the rows, measure, and again: the steps of each round, and when it ends.

    RUN/round-0/{rewrite,train,eval,gap}    ordinary directories of `rewrite`, `sft`, `eval` and `gap`
    RUN/round-1/…
    RUN/loop.jsonl                          the settings, then a line for each finished step
    RUN/rounds.json                         what each finished round came to

Each step is a process of its own, so that the engine's memory is free for training. A step that was killed is run
again and resumes by its own means: a rewrite and an evaluation from their journals, a training from its last
checkpoint, or from its beginning, which with the same seed is the same.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.dataset as ds
import yaml

from ..data.formats import demonstration
from ..data.prompts import contents
from ..data.rows import Rejection, Source, sources_of
from ..data.text_statistics import leaks_hint
from ..data.whole_file import write_whole
from ..rewriting.replay import put_together
from ..rewriting.rewrite_config import REPLAY
from ..runs.checkpoints import whole_checkpoints
from ..runs.interrupts import Terminated, heed_interrupts
from ..runs.journal import Attempt, alone, differences
from ..runs.run_config import STEP
from ..runs.run_directory import RunDirectory, is_first
from ..runs.run_log import wandb_group
from ..runs.run_memory import RunMemory
from ..sampling.sampler import FAILED, reshaped
from .loop_config import LoopConfig


RANK = {Source.EXPERT: 0, Source.TEACHER: 1, Source.GUIDED: 2, Source.SELF: 3}  # an improved row has gone up
SECOND_ADAPTER = (
    "on which train_from='last' would train a second one. Pass train_from='base', with which each round trains an adapter of its own on the "
    "initial policy, or train all weights."
)
# What is drawn with these is trained and measured with them.
SAME_MODEL = ("model_revision", "trust_remote_code", "chat_template_path")
# Settings of the loop that may change when it goes on.
FREE = ("rounds", "max_kl", "min_entropy", "max_cut", "max_mentions", "benchmarks", "eval_config", "report_to")


def measures_forgetting(rewriting: dict[str, Any]) -> bool:
    """
    Whether a rewrite with these options keeps what `gap --forgetting` needs: attempts of stage `self` that were drawn
    from the policy alone, the rejected ones with their log-probs.
    """
    plain = not reshaped(rewriting) and not rewriting.get("stop")
    return plain and rewriting.get("keep_rejected", True) and Source.SELF in rewriting.get("stages", [Source.SELF])


class Step(NamedTuple):
    """One command of a round; `done` is said by a line of `loop.jsonl`."""

    round: int
    name: str  # rewrite, train, gap or eval
    command: list[str]
    done: bool


class StepFailed(RuntimeError):
    """A step ended with an exit code other than 0."""

    def __init__(self, step: Step, code: int):
        super().__init__(f"round {step.round}: `{step.name}` ended with exit code {code}; its last words are above.")
        self.code = code


class Loop:
    """
    The rounds of one run.

    Args:
        output_dir (`Path`): RUN.
        config ([`LoopConfig`]): Rounds, training, measuring.
        rewriting (`dict`): Options of `trl-offpolicy rewrite` by name, without `output_dir`; `model_name_or_path` is
            the initial policy.
        engine (`dict`): Those of them that say with which engine and verifier, which `eval` is given too.
        demonstrations (`Callable`): Loads the input rows, a `datasets.Dataset`, as every rewrite is given them.
    """

    def __init__(self, output_dir: Path, config: LoopConfig, rewriting: dict, engine: dict, demonstrations: Callable):
        self.output_dir, self.config, self.rewriting, self.engine = output_dir, config, rewriting, engine
        self.demonstrations = demonstrations
        self.state = output_dir / "loop.jsonl"
        self.held: int | None = None  # the file that `alone` locks
        settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in FREE}
        self.header = {"config": {**settings, "train_config": _contents(config.train_config), "rewriting": rewriting}}

    def directory(self, round: int, name: str = "") -> Path:
        return self.output_dir / f"round-{round}" / name

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Locks the directory for this loop and its steps, or raises `ValueError` if another one works in it."""
        with alone(self.output_dir / "loop.lock", "`trl-offpolicy loop`") as self.held:
            yield

    def open(self) -> None:
        """Begins `loop.jsonl`, or raises `ValueError` if it was begun with other settings."""
        lines = self._lines()
        if lines[1:]:
            done = {line["round"] for line in lines[1:] if line["step"] == "train"}
            trained = next(r for r in count() if r not in done and not whole_checkpoints(self.directory(r, "train")))
            then, now = (_settled(header["config"], trained) for header in (lines[0], self.header))
            if differing := differences(then, now, free=FREE):
                raise ValueError(
                    f"{self.state} was begun with other settings: {differing}. Give the same ones to go on, or another output_dir."
                )
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self._write([self.header, *lines[1:]])

    def _lines(self) -> list[dict]:
        if not self.state.exists():
            return []
        return [json.loads(line) for line in self.state.read_text().splitlines() if line]

    def _write(self, lines: list[dict]) -> None:
        write_whole(self.state, "".join(json.dumps(line) + "\n" for line in lines))

    def steps(self, round: int) -> list[Step]:
        """The steps of a round, in order. Those of a round after the first need the round before it."""
        done = {(line["round"], line["step"]) for line in self._lines()[1:]}
        cli = [sys.executable, "-m", "trl_offpolicy.cli"]
        steps = {"rewrite": [*cli, "rewrite", "--config", str(self.directory(round, "rewrite.yaml"))]}
        steps["train"] = self._train_command(round)
        if measures_forgetting(self.rewriting):
            steps["gap"] = [
                *cli, "gap", "--forgetting", "--dataset_name", str(self.directory(0, "rewrite")),
                "--model_name_or_path", str(self.directory(round, "train")), "--output_dir", str(self.directory(round, "gap")),
                *_flags({name: self.engine[name] for name in ("dtype", *SAME_MODEL) if name in self.engine}),
            ]  # fmt: skip
        if self.config.benchmarks:
            steps["eval"] = [*cli, "eval", "--config", str(self.directory(round, "eval.yaml"))]
        return [Step(round, name, command, (round, name) in done) for name, command in steps.items()]

    def run(self, step: Step) -> None:
        """Runs a step that is not done, and notes it."""
        if step.name == "rewrite":
            write_whole(self.directory(step.round, "rewrite.yaml"), _yaml(self._rewriting(step.round)))
        if step.name == "eval":
            write_whole(self.directory(step.round, "eval.yaml"), _yaml(self._evaluation(step.round)))
        if step.name == "train" and step.round and self._trained_on(step.round) != self.rows(step.round):
            put_together(self.rows(step.round), self.directory(0, "rewrite") / "replay", self._trained_on(step.round))
        process = subprocess.Popen(
            step.command,
            env=self._environment(step),
            preexec_fn=heed_interrupts,
            pass_fds=() if self.held is None else (self.held,),
        )
        code = _ended(process)
        if code:
            raise StepFailed(step, code)
        if step.name == "rewrite":
            self._make_rows(step.round)
        self._write([*self._lines(), {"round": step.round, "step": step.name, "command": step.command}])

    def _environment(self, step: Step) -> dict[str, str]:
        """
        This process's own; with W&B, also what makes each step a run of its own in the loop's group, the same one when
        it is run again.
        """
        if not self.on_wandb:
            return os.environ | {STEP: "1"}
        group, name = wandb_group(self.output_dir), f"round-{step.round}-{step.name}"
        run = {
            "WANDB_RUN_GROUP": group,
            "WANDB_RUN_ID": f"{group}-{name}",
            "WANDB_NAME": name,
            "WANDB_RESUME": "allow",
        }
        return os.environ | run | {STEP: "1"}

    @property
    def on_wandb(self) -> bool:
        return self.rewriting.get("report_to") == "wandb"

    # ---- rewrite ----

    def _policy(self, round: int) -> dict:
        """
        The options that name the newest policy before a round: the initial one, or what the round before has trained.
        """
        if round == 0:
            return {}
        trained = self.directory(round - 1, "train")
        if (trained / "adapter_config.json").exists() and self.engine.get("sampler") == "vllm":
            return {"adapter": str(trained)}
        return {"model_name_or_path": str(trained)}

    def _rewriting(self, round: int) -> dict:
        seed = self.rewriting.get("seed", 42) + round  # other draws in each round
        options = {
            **self.rewriting,
            **self._policy(round),
            "seed": seed,
            "output_dir": str(self.directory(round, "rewrite")),
        }
        if round:  # replay rows are the initial policy's: those of round 0
            options = {name: value for name, value in options.items() if name not in REPLAY}
        if self._carries(round):
            options = {k: v for k, v in options.items() if k not in LOADING}
            options["dataset_name"] = str(self._write_unsolved(round))
        return options

    def _write_unsolved(self, round: int) -> Path:
        """The input rows that the round before has not solved by itself, as it was given them."""
        path, asked = self.directory(round, "unsolved.parquet"), set(self._asked(round))
        unsolved = self.demonstrations().select([i for i, id in enumerate(self._ids(0)) if id in asked])
        path.parent.mkdir(parents=True, exist_ok=True)
        unsolved.to_parquet(str(path))
        return path

    def _ids(self, round: int) -> list[str]:
        """The ids that the rewrite of a round has given its input, in its order."""
        directory = self.directory(round, "rewrite")
        if (memory := RunMemory.load(directory / "rows.npz")) is None:
            raise ValueError(
                f"{directory}/rows.npz, which says which row is which problem, is missing or damaged. It is made again, and nothing is drawn again, by "
                f"`trl-offpolicy rewrite --config {directory}.yaml`."
            )
        return memory.ids()

    def _asked(self, round: int) -> list[str]:
        """
        The problems that a round asks again which keeps the self rows of the one before, by the ids that they have in
        round 0. (The second of two equal ones has another id where it is asked alone.)
        """
        solved = {row["id"] for row in _rows(self.rows(round - 1), ["id", "source"]) if row["source"] == Source.SELF}
        return [id for id in self._ids(0) if id not in solved]

    # ---- train ----

    def rows(self, round: int) -> Path:
        """The directory of a round's rows: every problem once."""
        return (
            self.directory(round, "dataset") if self._carries(round) else self.directory(round, "rewrite") / "dataset"
        )

    def _trained_on(self, round: int) -> Path:
        """The directory of a round's rows, with the replay rows if there are any."""
        if not self.rewriting.get("replay_share"):
            return self.rows(round)
        return self.directory(round, "with_replay") if round else self.directory(0, "rewrite") / "with_replay"

    def _carries(self, round: int) -> bool:
        """Whether a round keeps the self rows of the one before."""
        return round > 0 and self.config.refresh == "unsolved"

    def _make_rows(self, round: int) -> None:
        """
        With `refresh="unsolved"`, the round's rows: those that were solved before, and the new ones, in the order of
        their problems.
        """
        from datasets import concatenate_datasets, load_dataset

        path = self.rows(round) / "train-00000-of-00001.parquet"
        if not self._carries(round) or path.exists():
            return

        def read(directory: Path):
            return load_dataset("parquet", data_files=str(directory / "*.parquet"), split="train")

        before, drawn = read(self.rows(round - 1)), self.directory(round, "rewrite") / "dataset"
        ids = dict(zip(self._ids(round), self._asked(round), strict=True))
        named, both = [ids[row["id"]] for row in _rows(drawn, ["id"])], [before]
        if named:  # `load_dataset` refuses a file without rows
            new = read(drawn).remove_columns("id").add_column("id", named).select_columns(before.column_names)
            both.append(new.cast(before.features))
        sources = zip(before["id"], before["source"], strict=True)
        places = {id: i for i, (id, source) in enumerate(sources) if source == Source.SELF}
        places |= {id: len(before) + i for i, id in enumerate(named)}
        order = [places[id] for id in self._ids(0) if id in places]  # some have no demonstration and so no row
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        concatenate_datasets(both).select(order).to_parquet(str(partial))
        partial.replace(path)

    def _train_command(self, round: int) -> list[str]:
        command = shlex.split(self.config.train_command or "")
        command, config = command or [sys.executable, "-m", "trl_offpolicy.cli", "sft"], None
        if self.config.train_config:
            config = self.config.train_config[min(round, len(self.config.train_config) - 1)]
            command += ["--config", config]
        trained_with = options_in(config)
        if self.on_wandb and "report_to" not in trained_with:
            command += ["--report_to", "wandb"]
        model = self.rewriting["model_name_or_path"]
        if round and self.config.train_from == "last":
            model = str(self.directory(round - 1, "train"))
            if (self.directory(round - 1, "train") / "adapter_config.json").exists():
                raise ValueError(f"{model} is an adapter, {SECOND_ADAPTER}")
        directory = self.directory(round, "train")
        options = {"model_name_or_path": model, "dataset_name": self._trained_on(round), "output_dir": directory}
        same = [name for name in SAME_MODEL if name in self.rewriting and name not in trained_with]
        if model != self.rewriting["model_name_or_path"]:  # a directory, which has no revisions
            same = [name for name in same if name != "model_revision"]
        options |= {name: self.rewriting[name] for name in same}
        if checkpoints := whole_checkpoints(directory):
            options["resume_from_checkpoint"] = checkpoints[-1]
        return command + _flags(options)

    # ---- measure ----

    def _evaluation(self, round: int) -> dict:
        reported = {"report_to": "wandb"} if self.on_wandb else {}
        options = {**self.engine, **reported, **options_in(self.config.eval_config)}
        options |= {"model_name_or_path": str(self.directory(round, "train"))}
        if "adapter" in self._policy(round + 1):
            options |= {"model_name_or_path": self.rewriting["model_name_or_path"], **self._policy(round + 1)}
        if round:
            options["baseline"] = str(self.directory(0, "eval"))
        return {**options, "benchmarks": self.config.benchmarks, "output_dir": str(self.directory(round, "eval"))}

    def summary(self, round: int) -> dict:
        """What a round's rewrite came to, from its files."""
        run = RunDirectory(self.directory(round, "rewrite"))
        sampled, cut = (
            sum(each[name] for each in run.metrics["stages"].values()) for name in ("sampled", "truncated")
        )
        rows = _problems(self.rows(round))
        found: dict[str, Any] = {
            "round": round,
            "sources": {
                s: sum(row["source"] == s for row in rows) for s in map(str, sources_of(run.config["stages"]))
            },
            "sampled": sampled,
            "cut": cut / sampled if sampled else None,
            "mentions": _mentions(run, run.metrics["rejected"]),
            **_draws(run.first_attempts(texts=False)),
        }
        if unsolved := run.metrics.get("unsolved"):  # without a demonstration, and so without a row
            found["sources"]["unsolved"] = unsolved
        if self._carries(round):
            found["same_problems_in_round_0"] = _measured_on(set(self._asked(round)), self.directory(0, "rewrite"))
        if round:
            earlier = {row["id"]: RANK[Source(row["source"])] for row in _problems(self.rows(round - 1))}
            found["improved"] = sum(RANK[Source(row["source"])] > earlier.get(row["id"], -1) for row in rows)
        return found

    def measured(self, round: int) -> dict:
        """What was measured of the model that a round has trained, from its files."""
        found: dict[str, Any] = {}
        if (file := self.directory(round, "gap") / "forgetting.json").exists():
            found["forgetting"] = json.loads(file.read_text())
        if (file := self.directory(round, "eval") / "results.json").exists():
            results = json.loads(file.read_text())["benchmarks"]
            found["accuracy"] = {
                name: {key: each[key] for key in each if key.startswith(("avg@", "greedy"))}
                for name, each in results.items()
            }
        return found

    def collapse(self, rounds: list[dict]) -> str | None:
        """Why nothing should be trained on the rows of the last of these rounds, in words; `None` if it should."""
        first, last = rounds[0], rounds[-1]
        if not any(map(last["sources"].get, RANK)):
            return "no problem is solved, so there is no row to train on"
        if last is first:
            return None
        # A round that asks only what was unsolved is compared with round 0's draws at the same problems too. Those had
        # failed, and a policy that is as it was does better at them the next time: what is milder counts.
        same = last.get("same_problems_in_round_0", first)
        cut, mentions = (max(first.get(name) or 0, same.get(name) or 0) for name in ("cut", "mentions"))
        entropy = min(filter(None, (first["entropy"], same["entropy"])), default=0)
        if last["cut"] and last["cut"] > self.config.max_cut >= cut:
            return f"{last['cut']:.0%} of the attempts were cut at the limit, in round 0 {cut:.0%}"
        told = last.get("mentions")
        if told and told > self.config.max_mentions >= mentions:
            return f"{told:.0%} of the correct guided attempts mention the reference, in round 0 {mentions:.0%}"
        if last["entropy"] is not None and last["entropy"] < self.config.min_entropy * entropy:
            return f"the draws' -log π per token fell from {entropy:.3f} to {last['entropy']:.3f} nats"
        return None

    def reason_to_stop(self, last: dict) -> str | None:
        """Why no further round should follow this one, in words; `None` if one should."""
        kl = last.get("forgetting", {}).get("kl_per_token")
        if self.config.max_kl is not None and kl is not None and kl > self.config.max_kl:
            return f"KL(π_0‖π) on the task's prompts is {kl:.3f} nats per token, above max_kl={self.config.max_kl:g}"
        if self.config.refresh == "unsolved" and last["sources"][Source.SELF] == sum(last["sources"].values()):
            return "every problem is solved by the policy itself"
        if last.get("improved") == 0:
            return "no row came from a better source than in the round before"
        return None


# Options of `rewrite` that say which rows are read, and how.
LOADING = (
    "dataset_name", "dataset_config", "dataset_split", "dataset_revision", "data_files", "column_mapping", "max_rows", "skip_incomplete",
)  # fmt: skip


def _flags(options: dict) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def _measured_on(ids: Collection[str], rewrite: Path) -> dict:
    """`cut`, `mentions` and `entropy` of a rewrite, of its attempts at some of its problems alone."""
    run = RunDirectory(rewrite)
    attempts = [a for journal in run.ids for a in run.attempts(journal, texts=False) if a.id in ids]
    reasons = [a.finish_reason for a in attempts if a.finish_reason not in FAILED]
    return {
        "cut": reasons.count("length") / len(reasons) if reasons else None,
        "mentions": _mentions(run, Counter(a.rejected for a in attempts if a.rejected), ids),
        "entropy": _draws(filter(is_first, attempts))["entropy"],
    }


def _draws(first: Iterable[Attempt]) -> dict:
    """
    `entropy` (mean -log π of the tokens of the first attempt at each problem, in nats) and their mean `length` in
    tokens.
    """
    drawn = [(a.log_prob, a.num_tokens) for a in first if a.log_prob is not None]
    tokens = sum(length for _, length in drawn)
    return {
        "entropy": -sum(mean * length for mean, length in drawn) / tokens if tokens else None,
        "length": tokens / len(drawn) if drawn else None,
    }


def _mentions(run: RunDirectory, rejected: Mapping[str, int], ids: Collection[str] | None = None) -> float | None:
    """
    The share of the correct guided attempts (at the problems with these ids) that mention the reference: those that
    were `rejected` for it (how many for what), and rows that are kept though they do; `None` where there is no correct
    one.
    """
    guided = run.rows().to_table(filter=ds.field("source") == str(Source.GUIDED)).to_pylist()
    guided = [row for row in guided if ids is None or row["id"] in ids]
    kept = sum(
        leaks_hint(contents(row["completion"])[-1], f"{contents(row['prompt'])[-1]}\n{demonstration(row) or ''}")
        for row in guided
    )
    correct = len(guided) + sum(rejected.values())
    return (kept + rejected[Rejection.MENTION]) / correct if correct else None


def _rows(directory: Path, columns: list[str]) -> list[dict]:
    import pyarrow.parquet as pq

    files = sorted(directory.glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file, columns=columns).to_pylist()]


def options_in(file: str | None) -> dict:
    """What a config file says; `{}` where there is none."""
    return (yaml.safe_load(Path(file).expanduser().read_text()) if file else None) or {}


def _problems(directory: Path) -> list[dict]:
    """Id and source of each problem's row, of several the first."""
    rows = _rows(directory, ["id", "source"])
    return [row for row, before in zip(rows, [{"id": None}, *rows], strict=False) if row["id"] != before["id"]]


def _contents(files: list[str]) -> list[str]:
    return [Path(file).expanduser().read_text() for file in files]


def _yaml(options: dict) -> str:
    return yaml.safe_dump(json.loads(json.dumps(options)), sort_keys=False, allow_unicode=True)


def _settled(config: dict, trained: int) -> dict:
    """
    The settings on which something depends that is there already, by name: those of a training once a round has left a
    checkpoint of one, or its end (`trained` rounds have).
    """
    settings = {**config, **config["rewriting"]}
    files = settings["train_config"]
    settings["train_config"] = [files[min(round, len(files) - 1)] for round in range(trained)] if files else []
    unsettled = ("rewriting",) if trained else ("rewriting", "train_command", "train_from")
    return {name: value for name, value in settings.items() if name not in unsettled}


def _ended(process: subprocess.Popen) -> int:
    """
    The exit code of a step. Ctrl-C reaches it too, SIGTERM is handed on as one; it gets the time to end as it does by
    itself.
    """
    try:
        return process.wait()
    except KeyboardInterrupt as stopped:
        if isinstance(stopped, Terminated):
            process.send_signal(signal.SIGINT)
        process.wait()
        raise
