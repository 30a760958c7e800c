"""`DataRewriter`: for each problem the model's own correct solution, else its retelling of the reference, else the demonstration.

    rewriter = DataRewriter("Qwen/Qwen2.5-Math-1.5B", RewriteConfig(output_dir="runs/rewrite", num_generations=8))
    dataset = rewriter.rewrite(load_dataset("openai/gsm8k", "main", split="train"))
    trainer = ImportanceWeightedSFTTrainer("Qwen/Qwen2.5-Math-1.5B", train_dataset=dataset)

("Mind the Gap", arXiv 2509.15157, section 3.2.) A problem's attempts are drawn one after another while other problems keep
the engine full, and the first correct one in attempt order is kept: attempts are independent draws, so it has the same
distribution as a random correct one of K, and what would have been drawn after it is never paid for.
"""

import json
import random
import shutil
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from tqdm.auto import tqdm

from . import prompts
from .journal import Journal
from .rewrite_config import RewriteConfig
from .rows import Problem, Source, Verdict, output_features, read_rows
from .sampling import Completion, Request, Sampler, SamplingParams, attempt_seed
from .verification import explain_with


@dataclass(slots=True)
class _Progress:
    """Where one unfinished problem stands."""

    problem: Problem
    stage: int = 0
    attempt: int = 0
    correct: list[int] = field(default_factory=list)  # journal offsets of this stage's correct attempts


@dataclass(slots=True)
class _Outcome:
    """What a finished problem became; `offset` is the kept attempt's place in the journal."""

    source: str
    offset: int = -1
    num_sampled: int = 0
    num_correct: int = 0


class DataRewriter:
    """
    Rewrites demonstrations into what `model` could have written itself.

    Args:
        model (`str` or `PreTrainedModel`): The model that will be trained; it is also the one that is sampled.
        args ([`RewriteConfig`]): How.
        sampler ([`~trl_offpolicy.sampling.Sampler`], *optional*): Engine; by default a [`TransformersSampler`] of `model`.
        verifier (*optional*): Something with `verify(completions, answers) -> list[Verdict]`, or a function of that form; by
            default a [`MathVerifier`].
        processing_class (`PreTrainedTokenizerBase`, *optional*): Tokenizer of the default sampler.
    """

    def __init__(
        self, model, args: RewriteConfig, sampler: Sampler | None = None, verifier=None, processing_class=None
    ):
        if sampler is None and not (isinstance(model, str) or hasattr(model, "generate")):
            raise ValueError(
                f"You passed model={model!r:.200}; it must be a Hub id, a local directory or a loaded model, unless you pass a `sampler`."
            )
        self.model, self.args, self.processing_class = model, args, processing_class
        self.sampler, self.verifier = sampler, verifier
        self.output_dir = Path(args.output_dir)
        self.metrics: dict = {}

    # ---- the public calls ----

    def rewrite(self, dataset):
        """
        Rewrites every row of `dataset` and returns the result, which is also in `output_dir/dataset` as Parquet.

        Args:
            dataset (`datasets.Dataset`): Rows in any of the formats of `rows.FORMATS`; each comes out exactly once.

        Returns:
            `datasets.Dataset`, or `None` after a dry run.

        Raises:
            ValueError: The dataset is empty or lacks a column, a row has no problem or no demonstration (named by number), or
                `output_dir` holds the attempts of another configuration.
        """
        dataset = _as_dataset(dataset)
        columns = list(dataset.column_names)
        # Reads every row once, so that a bad one is reported before anything is sampled.
        total = sum(1 for _ in self._problems(dataset))
        if total == 0:
            raise ValueError("The dataset has no rows: there is nothing to rewrite. Check its split and filters.")
        if self.args.dry_run:
            self._dry_run(dataset, total)
            return None
        if not self._plain:
            warnings.warn(
                f"temperature={self.args.temperature}, top_p={self.args.top_p}, top_k={self.args.top_k}: rows will carry no `behavior_log_probs`, "
                "so importance weights are not available on them. Sample with 1.0, 1.0 and 0 if you want them.",
                stacklevel=2,
            )
        began = time.monotonic()
        self._load_engines()
        journal = self._open_journal()
        try:
            outcomes = self._run(self._problems(dataset), total, journal)
            rewritten = self._write(dataset, columns, outcomes, journal)
        finally:
            journal.close()
            if hasattr(self.verifier, "close"):
                self.verifier.close()  # a MathVerifier starts its workers again when it is used again
        self.metrics["seconds"] = round(time.monotonic() - began, 2)
        (self.output_dir / "metrics.json").write_text(json.dumps(self.metrics, indent=1) + "\n")
        return rewritten

    # ---- set-up ----

    def _load_engines(self) -> None:
        """The default sampler and verifier; not in `__init__`, since a dry run needs neither."""
        if self.sampler is None:
            from .sampling.transformers_sampler import TransformersSampler

            self.sampler = TransformersSampler(self.model, self.processing_class)
        if self.verifier is None:
            from .verification import MathVerifier

            self.verifier = MathVerifier()

    def _problems(self, dataset) -> Iterator[Problem]:
        return read_rows(dataset, self.args.answer_column, self.args.solve_prompt)

    def _open_journal(self) -> Journal:
        path = self.output_dir / "journal.jsonl"
        config = {"model": self.sampler.name, "model_revision": self.sampler.revision, **self.args.identity()}
        config["verifier"] = getattr(self.verifier, "__name__", type(self.verifier).__name__)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        journal = Journal(path, config, overwrite=self.args.overwrite)
        import yaml

        (self.output_dir / "run_config.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        return journal

    def _dry_run(self, dataset, total: int) -> None:
        first = next(self._problems(dataset))
        for stage in self.args.stages:
            print(f"---- first prompt of stage {stage} ----")  # noqa: T201
            for turn in self._prompt(first, stage):
                print(f"[{turn['role']}]\n{turn['content']}")  # noqa: T201
        most = total * len(self.args.stages) * self.args.num_generations
        print(  # noqa: T201
            f"---- estimate ----\n{total:,} rows; at most {most:,} attempts ({len(self.args.stages)} stages x K = {self.args.num_generations}), "
            f"{most * self.args.max_completion_length:,} tokens if each ran to max_completion_length = {self.args.max_completion_length}.\n"
            f"gold answer of the first row: {first.answer!r}"
        )

    # ---- the run ----

    def _run(self, problems: Iterable[Problem], total: int, journal: Journal) -> dict[str, _Outcome]:
        """Streams all problems through sampling and verification; memory grows with the requests in flight, not with the texts."""
        known = {key(entry): (offset, *_fate(entry)) for offset, entry in journal.entries()}
        outcomes: dict[str, _Outcome] = {}
        counts: Counter = Counter()
        active: dict[str, _Progress] = {}  # by request id: with the sampler, or being verified
        verifying: dict[Future, list[Completion]] = {}
        ready: deque[_Progress] = deque()
        fresh = self._gated(problems, counts)
        log = _Log(self.output_dir / "metrics.jsonl", total, resumed=len(known))
        pool = ThreadPoolExecutor(1, "verify")
        try:
            while True:
                while len(active) < self.sampler.capacity and (
                    progress := ready.popleft() if ready else next(fresh, None)
                ):
                    outcome = self._advance(progress, known, counts)
                    if outcome is None:
                        active[self._submit(progress)] = progress
                    else:
                        outcomes[progress.problem.id] = outcome
                        counts[outcome.source] += 1
                if not active:
                    break
                being_verified = sum(map(len, verifying.values()))
                completions = self.sampler.poll() if len(active) > being_verified else []
                if completions:
                    batch = [(c, active[c.id].problem.answer) for c in completions]
                    verifying[pool.submit(self._verify, batch)] = completions
                elif not verifying:
                    raise RuntimeError(
                        f"{self.sampler.name}: the sampler has {len(active)} requests but returned none of them."
                    )
                finished = [f for f in verifying if f.done()] or (
                    [] if completions else wait(verifying, return_when=FIRST_COMPLETED).done
                )
                for future in finished:
                    for completion, verdict in zip(verifying.pop(future), future.result(), strict=True):
                        progress = active.pop(completion.id)
                        self._record(progress, completion, *verdict, journal, known)
                        ready.append(progress)
                log.update(counts)
        except BaseException:
            if hasattr(self.verifier, "close"):
                self.verifier.close()  # or the pool would wait for what it is verifying
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            log.update(counts, last=True)
        self._summarize(counts)
        return outcomes

    def _gated(self, problems: Iterable[Problem], counts: Counter) -> Iterator[_Progress]:
        """Problems in the order given; one whose gold answer cannot be compared with goes straight to its demonstration."""
        check = getattr(self.verifier, "check_answers", None)
        end = len(self.args.stages)
        for chunk in batched(problems, 256):
            verdicts = (
                check([p.answer for p in chunk])
                if check
                else [Verdict.CORRECT if p.answer else Verdict.UNPARSABLE for p in chunk]
            )
            for problem, verdict in zip(chunk, verdicts, strict=True):
                counts["gold_" + verdict] += verdict is not Verdict.CORRECT
                yield _Progress(problem, stage=0 if verdict is Verdict.CORRECT else end)

    def _advance(self, progress: _Progress, known: dict, counts: Counter) -> _Outcome | None:
        """Follows the journal as far as it knows a problem: its outcome if that settles it, else `None` (an attempt is due)."""
        args = self.args
        while progress.stage < len(args.stages):
            stage = args.stages[progress.stage]
            while progress.attempt < args.num_generations and not (progress.correct and args.selection == "first"):
                attempt = known.pop((progress.problem.id, stage, progress.attempt), None)
                if attempt is None:
                    return None
                offset, verdict, finish_reason, num_tokens = attempt
                counts["verdict_" + verdict] += 1
                counts["sampled"] += finish_reason != "error"
                counts["tokens"] += num_tokens
                counts["truncated"] += finish_reason == "length"
                if verdict == Verdict.CORRECT:
                    progress.correct.append(offset)
                # What the engine cannot take (a prompt beyond the context) it will not take at the next attempt either.
                progress.attempt = args.num_generations if finish_reason == "error" else progress.attempt + 1
            if progress.correct:
                pick = random.Random(attempt_seed(args.seed, progress.problem.id, stage, -1)).randrange(
                    len(progress.correct)
                )
                return _Outcome(stage, progress.correct[pick], progress.attempt, len(progress.correct))
            progress.stage, progress.attempt = progress.stage + 1, 0
        return _Outcome(Source.EXPERT)

    def _prompt(self, problem: Problem, stage: str) -> list[dict[str, str]]:
        if stage == Source.SELF:
            return problem.prompt
        text = prompts.fill(self.args.guided_prompt, problem=problem.problem, solution=problem.demonstration)
        last = max(i for i, turn in enumerate(problem.prompt) if turn["role"] == "user")
        return [{**turn, "content": text} if i == last else turn for i, turn in enumerate(problem.prompt)]

    def _submit(self, progress: _Progress) -> str:
        args, stage = self.args, self.args.stages[progress.stage]
        request_id = f"{progress.problem.id}/{stage}/{progress.attempt}"
        seed = attempt_seed(args.seed, progress.problem.id, stage, progress.attempt)
        params = SamplingParams(args.temperature, args.top_p, args.top_k, args.max_completion_length)
        self.sampler.submit(Request(request_id, self._prompt(progress.problem, stage), seed, params))
        return request_id

    def _verify(self, batch: list[tuple[Completion, str]]) -> list[tuple[Verdict, str]]:
        """A verdict and its reason for each completion; one that was cut or never drawn is not shown to the verifier."""
        whole = [(c.text, answer) for c, answer in batch if c.finish_reason == "stop"]
        texts, answers = [text for text, _ in whole], [answer for _, answer in whole]
        told = iter(explain_with(self.verifier, texts, answers))
        cut = Verdict.UNPARSABLE, "cut at max_completion_length"
        return [
            next(told)
            if c.finish_reason == "stop"
            else cut
            if c.finish_reason == "length"
            else (Verdict.ERROR, c.error or c.finish_reason)
            for c, _ in batch
        ]

    def _record(
        self, progress: _Progress, completion: Completion, verdict: Verdict, reason: str, journal: Journal, known: dict
    ) -> None:
        entry = {
            "id": progress.problem.id,
            "stage": self.args.stages[progress.stage],
            "attempt": progress.attempt,
            "verdict": verdict,
            "reason": reason,
            "finish_reason": completion.finish_reason,
            "text": completion.text,
            "completion_ids": completion.completion_ids,
            "behavior_log_probs": [round(x, 6) for x in completion.log_probs],
        }
        known[key(entry)] = (journal.append(entry), *_fate(entry))

    def _summarize(self, counts: Counter) -> None:
        by_source = {str(source): counts[source] for source in Source}
        unparsable = sum(n for name, n in counts.items() if name.startswith("gold_"))
        # What the usual script draws: K for every problem it tries, and K more for every one that the stages before left over.
        left, fixed_k = sum(by_source.values()) - unparsable, 0
        for stage in self.args.stages:
            fixed_k += left * self.args.num_generations
            left -= by_source[stage]
        self.metrics = {
            "yield": {**by_source, "total": sum(by_source.values())},
            "gold_unparsable": unparsable,
            "sampling": {
                "sampled": counts["sampled"],
                "fixed_k_equivalent": fixed_k,
                "tokens": counts["tokens"],
                "truncated": counts["truncated"],
            },
            "verdicts": {str(v): counts["verdict_" + v] for v in Verdict},
        }

    # ---- rows out ----

    def _write(self, dataset, columns: list[str], outcomes: dict[str, _Outcome], journal: Journal):
        """Writes `output_dir/dataset` (to a temporary name first, so that what is there is whole) and loads it."""
        import pyarrow.parquet as pq
        from datasets import Dataset, load_dataset

        final, partial = self.output_dir / "dataset", self.output_dir / "dataset.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        features = output_features(dataset.features, columns)
        with pq.ParquetWriter(partial / "train-00000-of-00001.parquet", features.arrow_schema) as writer:
            for chunk in batched(self._problems(dataset), 1000):
                rows = [self._row(problem, outcomes[problem.id], journal) for problem in chunk]
                writer.write_table(Dataset.from_list(rows, features=features).data.table)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        return load_dataset(str(final), split="train")

    @property
    def _plain(self) -> bool:
        return (self.args.temperature, self.args.top_p, self.args.top_k) == (1.0, 1.0, 0)

    def _row(self, problem: Problem, outcome: _Outcome, journal: Journal) -> dict:
        kept = (
            journal.read(outcome.offset)
            if outcome.offset >= 0
            else {"text": problem.demonstration, "completion_ids": [], "behavior_log_probs": []}
        )
        return {
            "prompt": problem.prompt,
            "completion": [{"role": "assistant", "content": kept["text"]}],
            "id": problem.id,
            "source": str(outcome.source),
            "answer": problem.answer,
            "num_sampled": outcome.num_sampled,
            "num_correct": outcome.num_correct,
            "completion_ids": kept["completion_ids"],
            # Drawn from a reshaped distribution, a token's log μ is not the model's log-prob: better none than a wrong one.
            "behavior_log_probs": kept["behavior_log_probs"] if self._plain else [],
            "model": self.sampler.name,
            "model_revision": self.sampler.revision,
            "temperature": self.args.temperature,
            **problem.extra,
        }


def _as_dataset(dataset):
    from datasets import Dataset

    if isinstance(dataset, list):
        return Dataset.from_list(dataset)
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"`rewrite` takes one `datasets.Dataset` (or a list of dicts), not {type(dataset).__name__}. Pass one split, e.g. dataset['train']."
        )
    return dataset


def key(entry: dict) -> tuple[str, str, int]:
    """What identifies an attempt in the journal."""
    return entry["id"], entry["stage"], entry["attempt"]


def _fate(entry: dict) -> tuple[str, str, int]:
    return entry["verdict"], entry["finish_reason"], len(entry["completion_ids"])


def batched(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one shorter (`itertools.batched` came with Python 3.12)."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


class _Log:
    """The progress line, and the same numbers as a line of `metrics.jsonl` every few seconds."""

    def __init__(self, path: Path, total: int, resumed: int, every: float = 5.0):
        self.path, self.every, self.began, self.written = path, every, time.monotonic(), time.monotonic()
        self.bar = tqdm(total=total, desc="rewriting", unit="row")
        if resumed:
            self.bar.write(f"resuming: {resumed:,} attempts are in the journal already", file=sys.stderr)

    def update(self, counts: Counter, last: bool = False) -> None:
        now = time.monotonic()
        done = {str(source): counts[source] for source in Source}
        shares = " · ".join(f"{source} {n / max(1, sum(done.values())):.1%}" for source, n in done.items())
        trouble = {
            "timeouts": counts["verdict_timeout"],
            "errors": counts["verdict_error"],
            "truncated": counts["truncated"],
        }
        shown = "".join(f" · {n:,} {name}" for name, n in trouble.items() if n)
        self.bar.set_postfix_str(f"{shares} · {counts['sampled']:,} attempts{shown}", refresh=False)
        self.bar.update(sum(done.values()) - self.bar.n)
        if now - self.written < self.every and not last:
            return
        line = {
            "seconds": round(now - self.began, 2),
            "rows": sum(done.values()),
            **done,
            "sampled": counts["sampled"],
            "tokens": counts["tokens"],
        }
        with self.path.open("a") as file:
            file.write(json.dumps({**line, **trouble}) + "\n")
        self.written = now
        if last:
            self.bar.close()
