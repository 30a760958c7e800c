"""`DataRewriter`: for each problem the model's own correct solution, else its retelling of the reference, else the demonstration.

    rewriter = DataRewriter("Qwen/Qwen2.5-Math-1.5B", RewriteConfig(output_dir="runs/rewrite", num_generations=8))
    dataset = rewriter.rewrite(load_dataset("openai/gsm8k", "main", split="train"))
    trainer = ImportanceWeightedSFTTrainer("Qwen/Qwen2.5-Math-1.5B", train_dataset=dataset)

("Mind the Gap", arXiv 2509.15157, section 3.2.) Which attempt is drawn when is `scheduling.py`'s; here they are drawn,
verified and journaled, and the rows are written. A run holds the attempts in flight and some 30 bytes a row, not the texts.
"""

import glob
import hashlib
import json
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..cards import public_name, versions
from ..data.control_tokens import ControlTokens
from ..data.demonstrations import CALCULATOR_MARK, asks_for_box, has_box, in_asked_form
from ..data.formats import (
    ASKED,
    FORMATS,
    PLAIN_PROMPTS,
    as_completion,
    carried_columns,
    find_format,
    guided_prompt,
    has_plain_prompts,
    output_features,
    read_rows,
    tell_missing_answers,
    text_columns,
)
from ..data.loading import as_dataset, batched, hub_origin, iterate, media_columns
from ..data.prompts import contents
from ..data.rows import Problem, Source, Verdict, reference_digest, storable
from ..data.whole_file import partial_file, write_whole
from ..runs.journal import Attempt, Journal, JournalReader, Result, differences, read_attempts, read_header
from ..runs.run_counts import RunCounts, summed
from ..runs.run_log import PeriodicPush, RunLog, check_wandb, log_artifact, wandb_run
from ..runs.run_memory import RunMemory
from ..runs.shards import RUN_KEY, Shard, check_siblings, publish, published, withdraw
from ..sampling.loading import load_processing_class
from ..sampling.provenance import template_digest
from ..sampling.sampler import (
    FAILED,
    PLAIN,
    Completion,
    Request,
    Sampler,
    SamplerError,
    SamplingParams,
    as_sampler,
    attempt_seed,
)
from ..verification.drawing import Asked, Drawing
from ..verification.verdict_queue import Judged, judge
from ..verification.verifier import as_verifier, describe
from .dry_run import probe_report, shown_prompt
from .guided_filters import reject_guided
from .push import open_repo, push_run
from .rewrite_config import RewriteConfig
from .scheduler import Draw, Outcome, Scheduler, Speculation


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
        guided_sampler ([`~trl_offpolicy.sampling.Sampler`], *optional*): Who draws in the guided stage, such as a trained rewriting agent,
            `sampler.with_adapter("me/agent")`; by default `sampler`.
    """

    def __init__(
        self,
        model,
        args: RewriteConfig,
        sampler: Sampler | None = None,
        verifier=None,
        processing_class=None,
        guided_sampler: Sampler | None = None,
    ):
        if not isinstance(args, RewriteConfig):
            raise ValueError(
                f"You passed args={args!r:.200}; it must be a config: write args=RewriteConfig(output_dir='runs/mine', ...)."
            )
        if sampler is None and not (isinstance(model, str) or hasattr(model, "generate")):
            raise ValueError(
                f"You passed model={model!r:.200}; it must be a Hub id, a local directory or a loaded model, unless you pass a `sampler`."
            )
        self.model, self.args, self.processing_class = model, args, processing_class
        self.sampler, self.guided_sampler = (s if s is None else as_sampler(s) for s in (sampler, guided_sampler))
        self.verifier = verifier if verifier is None else as_verifier(verifier)
        self.output_dir, self.shard = Path(args.output_dir), Shard.parse(args.shard)
        self._rows_file = self.shard.file(self.output_dir, "rows.npz")
        self.metrics: dict = {}
        # After `rewrite`: the shards without which there is no `output_dir/dataset` yet.
        self.missing_shards: list[Shard] = []

    def __repr__(self) -> str:
        model = self.model if isinstance(self.model, str) else type(self.model).__name__
        args = self.args
        return f"DataRewriter({model!r}, output_dir={args.output_dir!r}, stages={args.stages}, num_generations={args.num_generations})"

    # ---- the public calls ----

    def rewrite(self, dataset, run_config: dict | None = None):
        """
        Rewrites every row of `dataset` and returns the result, which is also in `output_dir/dataset` as Parquet. Of problems without
        demonstrations (`stages=["self"]` only), those without a correct attempt are listed in `output_dir/unsolved.jsonl` instead.

        Args:
            dataset (`datasets.Dataset`): Rows in any of the formats of `rows.FORMATS`; each comes out exactly once.
            run_config (`dict`, *optional*): Further arguments of `trl-offpolicy rewrite` for `run_config.yaml`, such as `dataset_name`, which
                with commit and config is found out for a dataset from the Hub.

        Returns:
            `datasets.Dataset`: The rewritten rows, of this shard if it is one of several; `None` after a dry run.

        Raises:
            ValueError: The dataset is empty or lacks a column, a row has no problem or no demonstration (named by number), or
                `output_dir` holds the attempts of another configuration.
        """
        whole = as_dataset(dataset)
        check_stages(whole.column_names, self.args)
        dataset = text_columns(whole, self.args.answer_column)
        self._control = ControlTokens(self._tokenizer(), self.args.control_tokens)
        memory = self._check_rows(dataset)
        self._plain = has_plain_prompts(dataset.features, dataset.column_names, self.args.answer_column)
        if self._plain:
            warnings.warn(PLAIN_PROMPTS, stacklevel=2)
        own = self.shard.rows(len(memory))
        whole, dataset, memory = whole.select(own), dataset.select(own), memory.select(slice(own.start, own.stop))
        if self.args.dry_run:
            self._dry_run(dataset, memory)
            if self.args.probe and len(memory):
                self._probe(dataset, memory)
            return None
        if reshaping := self._params.reshaping:
            warnings.warn(
                f"{', '.join(f'{name}={value}' for name, value in reshaping.items())}: rows will carry no `behavior_log_probs`, so importance "
                f"weights are not available on them. Sample with {', '.join(f'{name}={PLAIN[name]}' for name in reshaping)} if you want them.",
                stacklevel=2,
            )
        began = time.monotonic()
        check_wandb(self.args.report_to)
        self._load_engines()
        origin = hub_origin(dataset) | ({} if dataset.split is None else {"dataset_split": str(dataset.split)})
        journal, config = self._open_journal(dataset, memory)
        made = (
            memory.digest + json.dumps(config) + (self.args.expert_format if self.args.expert_format != "keep" else "")
        )
        run = hashlib.blake2b(made.encode(), digest_size=16).hexdigest()
        part = "" if self.shard.count == 1 else f"-{self.shard.index}"
        try:
            if journal.overwritten:
                withdraw(self.output_dir, self.shard)
            self._write_run_config({**(run_config or {}), **origin})
            with (
                wandb_run(self.args.report_to, self.output_dir, "rewrite", config, part) as logged,
                memory.frozen_heap(),
            ):
                if self.args.push_to_hub:  # what would fail at the end is better known now
                    args = self.args
                    open_repo(args.hub_dataset_id, args.hub_private_repo or None, args.hub_token, args.hub_revision)
                log = self.shard.file(self.output_dir, "metrics.jsonl")
                scheduler = self._run(dataset, memory, journal, logged, self.args, log)
                with partial_file(self.output_dir / self.shard.parquet) as file:
                    unsolved = self._write(file, whole, dataset, memory, scheduler.outcome, journal, run)
                    self._list_unsolved(whole.column_names, unsolved)
                    self.metrics["seconds"] = round(time.monotonic() - began, 2)
                    metrics = self.shard.file(self.output_dir, "metrics.json")
                    write_whole(metrics, json.dumps(self.metrics, indent=1) + "\n")
                    self._publish(file, run, logged)
        finally:
            journal.close()
            self.verifier.close()  # a MathVerifier starts its workers again when it is used again
        return self._load()

    def rows_so_far(self, dataset, file: str | Path) -> int:
        """
        Writes the rows of this shard that are settled by what its journal holds, as [`rewrite`] would, to a Parquet `file`. Nothing is
        sampled, and a run may be under way. Rows of which nothing was drawn yet are left out.

        Returns:
            `int`: How many rows were written.

        Raises:
            FileNotFoundError: There is no journal in `output_dir`.
        """
        whole = as_dataset(dataset)
        dataset = text_columns(whole, self.args.answer_column)
        self._control = ControlTokens(self._tokenizer(), self.args.control_tokens)
        memory = self._check_rows(dataset)
        own = self.shard.rows(len(memory))
        whole, dataset, memory = whole.select(own), dataset.select(own), memory.select(slice(own.start, own.stop))
        journal = JournalReader(self.shard.file(self.output_dir, "journal.jsonl"))
        memory.recall(journal, self.args.stages)
        problems = (
            (row_id, None, True, found)
            for start in range(0, len(memory), 256)
            for row_id, found in zip(memory.ids(start, 256), memory.known(start, 256), strict=True)
        )
        counts, still_open = self._counts(), set()
        scheduler = Scheduler(problems, len(memory), self.args, counts)
        while draw := scheduler.next(speculate=False):
            still_open.add(draw.state.row)
        try:
            with partial_file(Path(file)) as partial:
                unsolved = self._write(
                    partial,
                    whole,
                    dataset,
                    memory,
                    lambda i: None if i in still_open else scheduler.outcome(i),
                    journal,
                )
                partial.replace(file)
        finally:
            journal.close()
        return counts.rows.total() - len(unsolved)

    def push_to_hub(
        self,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        push_attempts: bool | None = None,
        commit_message: str | None = None,
    ):
        """
        Pushes the rows in `output_dir`, the attempts and their card to the Hub; see [`~rewriting.push.push_run`]. Arguments left out are those of `args`.

        Raises:
            ValueError: No repository is named, the run is not finished, the engine failed at some of its attempts and `accept_failed` is
                not set, or a private one was asked for and it is public.
            HfHubHTTPError, httpx.TransportError, ConnectionError: The Hub refused or cannot be reached; a note on the exception says whether
                anything has changed there. Call it again.
        """
        return self._push(repo_id, private, token, revision, push_attempts, commit_message)

    def _push(
        self, repo_id=None, private=None, token=None, revision=None, push_attempts=None, message=None, finished=True
    ):
        args = self.args
        repo_id = repo_id or args.hub_dataset_id
        if repo_id is None:
            raise ValueError("`push_to_hub` needs a repository: pass repo_id='me/name', or set `hub_dataset_id`.")
        return push_run(
            self.output_dir,
            repo_id,
            private=args.hub_private_repo or None if private is None else private,
            token=token or args.hub_token,
            revision=revision or args.hub_revision,
            push_attempts=args.push_attempts if push_attempts is None else push_attempts,
            commit_message=message,
            finished=finished,
            accept_failed=args.accept_failed,
        )

    # ---- set-up ----

    def _load_engines(self) -> None:
        """The default sampler and verifier; not in `__init__`, since a dry run needs neither."""
        if self.sampler is None:
            from ..sampling.transformers_sampler import TransformersSampler

            self.sampler = TransformersSampler(self.model, self.processing_class)
        if self.verifier is None:
            from ..verification.math_verifier import MathVerifier

            self.verifier = MathVerifier()

    def _tokenizer(self):
        """That of the prompts, which does not need the model; `None` where an engine does not say which."""
        if self.sampler is not None:
            return self.sampler.processing_class
        if self.args.dry_run:  # which touches no model: what it was given
            return self.processing_class
        if self.processing_class is None:
            name = self.model if isinstance(self.model, str) else self.model.config._name_or_path
            self.processing_class = load_processing_class(name)
        return self.processing_class

    def _check_rows(self, dataset) -> RunMemory:
        """
        Reads every row once, so that a bad one is reported before anything is sampled; not again when a run is resumed. Copies are counted over
        the whole dataset, so that an id does not depend on the shards.
        """
        what = "problem or reference" if Source.GUIDED in self.args.stages else "problem"
        made_from = f"4 {dataset._fingerprint} {self.args.answer_column} {what} {self._control.tokens}"
        memory = known = RunMemory.load(self._rows_file, made_from)
        if memory is None:
            rows = iterate(dataset, range(len(dataset)))
            if find_format(dataset.column_names, self.args.answer_column)[1] not in (self.args.answer_column, None):
                rows = tell_missing_answers(rows, self.args.answer_column, "what their demonstrations box")
            problems = read_rows(rows, self.args.answer_column, self.args.solve_prompt)
            memory = RunMemory.of((problem, self._control_tokens_in(problem)) for problem in problems)
        if not len(memory):
            raise ValueError("The dataset has no rows: there is nothing to rewrite. Check its split and filters.")
        self._control.tell(memory.marked, len(memory), memory.tokens, what)
        if known is None and not self.args.dry_run:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            memory.save(self._rows_file, made_from)
        return memory

    def _control_tokens_in(self, problem: Problem) -> set[str]:
        """The control tokens in what the model is shown of a problem; `ValueError` if it cannot be shown all that it comes with."""
        if given := [name for name in ("tools", "chat_template_kwargs") if problem.extra.get(name)]:
            raise ValueError(
                f"The row with the problem {problem.problem!r:.100} has {' and '.join(given)}, with which its prompt would be rendered in "
                "training but not in sampling. Write what the model needs to know into a system turn, and use `dataset.remove_columns`."
            )
        texts = contents(problem.prompt) + [problem.demonstration] * (Source.GUIDED in self.args.stages)
        return set().union(*map(self._control.within, texts))

    def _problems(self, dataset, memory: RunMemory, first: int = 0, count: int | None = None) -> Iterator[Problem]:
        copies = memory.copies(first, count)
        rows = iterate(dataset, range(first, first + len(copies)))
        return read_rows(rows, self.args.answer_column, self.args.solve_prompt, copies, self.args.system_prompt)

    def _counts(self) -> RunCounts:
        return RunCounts(self.args.stages, self.args.max_completion_length)

    def _identity(self) -> dict:
        """On what an attempt and its verdict depend: a journal's first line."""
        identity, revision = self.args.identity(), self.sampler.revision
        config = {"journal_format": 2, "model": self.sampler.name, "model_revision": revision, **identity}
        if self.guided_sampler is not None:
            config |= {"rewriter_adapter": self.guided_sampler.name, "rewriter_revision": self.guided_sampler.revision}
        config["chat_template"] = template_digest(self.sampler.processing_class)
        config["verifier"] = describe(self.verifier)
        if self._plain:  # which journals from before December 2026 asked as messages
            config["plain_prompts"] = "asked as they are"
        return config

    def _open_journal(self, dataset, memory: RunMemory) -> tuple[Journal, dict]:
        config = self._identity()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        free = {"num_generations", "verifier"} if self.args.rejudge else {"num_generations"}
        check_siblings(self.output_dir, self.shard, config, self.args.overwrite, free)
        path, probe = (self.shard.file(self.output_dir, name) for name in ("journal.jsonl", "probe.jsonl"))
        if not path.exists() and probe.exists() and not differences(read_header(probe), config):
            probe.replace(path)
        elif path.exists() and not self.args.overwrite:
            self._look_at_verifier(path, config, dataset, memory)
        return Journal(path, config, overwrite=self.args.overwrite), config

    def _write_run_config(self, run_config: dict) -> None:
        """The settings of the run, and whatever else `run_config` says, as keys of a `--config` file."""
        import yaml

        if self.guided_sampler is not None:
            run_config = {"rewriter_adapter": self.guided_sampler.name, **run_config}
        run_config = {"model_name_or_path": self.sampler.name, **run_config, **self.args.settings()}
        # A commit; else it is a digest of the weights, by which they cannot be loaded.
        if re.fullmatch("[0-9a-f]{40}", revision := self.sampler.revision or ""):
            run_config["model_revision"] = revision
        write_whole(
            self.output_dir / "run_config.yaml",
            f"# Made with {versions('trl-offpolicy', 'trl', 'transformers', 'torch', 'vllm', 'math-verify', 'datasets')}.\n"
            + yaml.safe_dump(run_config, sort_keys=False, allow_unicode=True),
        )

    def _look_at_verifier(self, path: Path, config: dict, dataset, memory: RunMemory) -> None:
        """Has the journal's texts judged anew if that is wanted; `ValueError` if the verifier, and nothing else, is another one and it is not."""
        found = read_header(path)
        if found is None or differences(found, config, free=("num_generations", "verifier")):
            return
        if self.args.rejudge:
            self._rejudge(path, config, dataset, memory)
        elif differing := differences(found, config):
            raise ValueError(
                f"{path} holds the verdicts of another verifier: {differing}. Pass rejudge=True (--rejudge) to have its texts judged anew by this one, "
                "or choose another `output_dir`."
            )

    def _rejudge(self, path: Path, config: dict, dataset, memory: RunMemory) -> None:
        """
        Puts a journal with this verifier's verdicts on the same texts in the place of the one at `path`, which stays beside it under a number.

        Left out are attempts at problems whose gold answer this verifier cannot compare with, at rows that are not in the dataset, and at references
        that have changed; and those whose texts were not kept, which are drawn again where they matter.
        """
        old, lost = Journal(path, read_header(path)), 0  # nobody else writes to it meanwhile
        memory.recall(old, self.args.stages)
        try:
            with partial_file(path) as partial:
                new = Journal(partial, config)
                for start in tqdm(range(0, len(memory), 256), desc="judging anew", unit="256 rows"):
                    problems = list(self._problems(dataset, memory, start, 256))
                    refused = self._refused(problems)
                    attempts = [
                        (problem, Attempt.of(old.read(result.offset)))
                        for problem, stages in zip(problems, memory.known(start, 256), strict=True)
                        for result in chain.from_iterable(results.values() for results in stages.values())
                        if problem.id not in refused
                    ]
                    lost += self._append_judged(new, attempts)
                new.close()
                number = next(n for n in count(1) if not path.with_name(f"{path.name}.{n}").exists())
                path.rename(path.with_name(f"{path.name}.{number}"))
                partial.replace(path)
        finally:
            old.close()
        withdraw(self.output_dir, self.shard)
        if lost:
            warnings.warn(
                f"{lost:,} attempts have no text (keep_rejected=False), so they cannot be judged anew and are drawn again where they matter.",
                stacklevel=4,
            )

    def _append_judged(self, journal: Journal, attempts: list[tuple[Problem, Attempt]]) -> int:
        """Appends attempts of another journal with verdicts of this verifier; returns how many have no text."""
        cut = [attempt for _, attempt in attempts if attempt.finish_reason == "length"]  # which no verifier is shown
        whole = [(p, a) for p, a in attempts if a.finish_reason == "stop" and a.text is not None]
        for attempt in cut:
            journal.append(attempt.entry())
        completions = [Completion(a.id, a.text, a.completion_ids, a.behavior_log_probs, "stop") for _, a in whole]
        told = judge(self.verifier, completions, [p.answer for p, _ in whole], [p.extra for p, _ in whole])
        for (problem, old), completion, verdict in zip(whole, completions, told, strict=True):
            new = self._attempt(problem, old.stage, old.attempt, completion, *verdict)
            # Its log-probs are rounded, and their mean was taken before that.
            journal.append(replace(new, log_prob=old.log_prob).entry())
        return len(attempts) - len(cut) - len(whole)

    def _probe(self, dataset, memory: RunMemory) -> None:
        """
        Draws the first attempt of each stage for some rows, evenly spread, and prints what they tell of the whole run. They go into a journal
        of their own, which a run with the same settings begins with.
        """
        self._load_engines()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        chosen = np.linspace(0, len(memory), min(self.args.probe, len(memory)), endpoint=False, dtype=int)
        journal = Journal(self.shard.file(self.output_dir, "probe.jsonl"), self._identity(), overwrite=True)
        asked = memory.select(chosen)
        ids = set(asked.ids())

        def drawn() -> list[Attempt]:
            return list(read_attempts(journal.path, ids, texts=False))

        earlier, began = sum(attempt.num_tokens for attempt in drawn()), time.monotonic()
        try:
            once = replace(self.args, num_generations=1, push_every=0)
            counts = self._run(dataset.select(chosen), asked, journal, None, once, None).counts
            seconds, attempts = time.monotonic() - began, drawn()
        finally:
            journal.close()
            self.verifier.close()
        rates = self._counts()
        rates.stages = counts.stages
        expected = Scheduler((), len(memory), self.args, rates).attempts_left()
        print(probe_report(attempts, counts, len(chosen), len(memory), expected, earlier, seconds, self.args))  # noqa: T201

    def _dry_run(self, dataset, memory: RunMemory) -> None:
        total = len(memory)
        if not total:
            print(f"shard {self.shard} has no rows")  # noqa: T201
            return
        first, tokenizer = next(self._problems(dataset, memory)), self._tokenizer()
        for stage in self.args.stages:
            prompt, given = self._prompt(first, stage), self.args.chat_template_kwargs
            print(shown_prompt(f"first prompt of stage {stage}", prompt, tokenizer, given, self.verifier))  # noqa: T201
        most = total * len(self.args.stages) * self.args.num_generations
        print(  # noqa: T201
            f"---- estimate ----\n{total:,} rows; at most {most:,} attempts ({len(self.args.stages)} stages x K = {self.args.num_generations}), "
            f"{most * self.args.max_completion_length:,} tokens if each ran to max_completion_length = {self.args.max_completion_length}.\n"
            f"gold answer of the first row: {first.answer!r}"
        )
        if without := sum(not problem.answer for problem in self._problems(dataset, memory)):
            print(  # noqa: T201
                f"---- careful ----\n{without:,} of {total:,} rows have no gold answer, neither in `{self.args.answer_column}` nor as the last box of their "
                "demonstration: no attempt at them can be verified, so they keep their demonstration. --answer_column says where the answers are."
            )

    # ---- the run ----

    def _run(
        self, dataset, memory: RunMemory, journal: Journal, logged, args: RewriteConfig, path: Path | None
    ) -> Scheduler:
        """Streams all problems through sampling and verification until each has its outcome; `path` is that of `metrics.jsonl`, if it is wanted."""
        memory.recall(journal, args.stages)
        counts = self._counts()
        if path is not None and memory.num_known:
            counts.recall_aborted(path)
        scheduler = Scheduler(self._gated(dataset, memory, counts), len(memory), args, counts)
        others = () if self.guided_sampler is None else (self.guided_sampler,)
        drawing = Drawing(self.verifier, self.sampler, *others, counts=counts.engine)
        log = RunLog(path, len(memory), memory.num_known, counts, drawing.drawn_tokens, logged)
        push = PeriodicPush(lambda: self._push(finished=False), args.push_every, args.hub_token)
        # A server tells of tokens when an attempt is finished: it takes several of each slot to know its rate.
        speculation = Speculation(self.sampler.slots, 1024 if self.sampler.drawn_tokens is None else 32)

        def ask() -> Asked | None:
            most = speculation.most(min(drawing.sampling, scheduler.open_rows))
            draw = scheduler.next(speculate=drawing.sampling < most)
            if draw is not None and draw.state.problem is None:  # begun before a resume
                (draw.state.problem,) = self._problems(dataset, memory, draw.state.row, 1)
            return draw and self._asked(draw)

        try:
            with drawing:
                while drawing.submit(iter(ask, None)):
                    under_way = drawing.sampling
                    log.update(under_way, drawing.verifying, scheduler.attempts_left)
                    for judged, result in drawing.judged(lambda judged: self._record(judged, journal, log)):
                        counts.failed += result.finish_reason in FAILED
                        counts.drawn += result.finish_reason not in FAILED
                        for request_id in scheduler.record(judged.item, result):
                            drawing.abort(request_id)
                    speculation.note(under_way, drawing.drawn_tokens(), time.monotonic())
                    push.update(counts.rows.total())
            if counts.failed and not counts.drawn and not memory.num_known:  # no reason to keep all demonstrations
                raise SamplerError(
                    f"not one of {counts.failed:,} attempts could be drawn; the last one: {judged.reason}"
                )
        finally:
            # What an exception has stopped on the way is drawn again at a resume, and was paid for all the same.
            drawn, engine = drawing.drawn_tokens(), counts.engine
            engine["aborted_tokens"] = engine["earlier_aborted_tokens"] + drawn - engine["finished_tokens"]
            log.close()
            push.close()
        self.metrics = counts.metrics()
        return scheduler

    def _sampler_of(self, stage: str) -> Sampler:
        return self.guided_sampler if stage == Source.GUIDED and self.guided_sampler is not None else self.sampler

    def _gated(
        self, dataset, memory: RunMemory, counts: RunCounts
    ) -> Iterator[tuple[str, Problem | None, bool, dict]]:
        """
        What the scheduler takes; a problem whose gold answer cannot be compared with goes straight to its demonstration.

        One with attempts in the journal has passed that check, and is not read: most of them are settled.
        """
        pool = ThreadPoolExecutor(1, "gold answers")

        def look_up(start: int) -> tuple[list[dict], list[Problem | None], Future | None]:
            attempts = memory.known(start, 256)
            if all(attempts):
                return attempts, [None] * len(attempts), None
            problems = self._problems(dataset, memory, start, 256)
            chunk = [None if found else problem for problem, found in zip(problems, attempts, strict=True)]
            return attempts, chunk, pool.submit(self._refused, [p for p in chunk if p is not None])

        chunks = map(look_up, range(0, len(memory), 256))
        try:
            following = next(chunks, None)
            for start in range(0, len(memory), 256):
                # The next ones are checked while these are sampled.
                (attempts, chunk, check), following = following, next(chunks, None)
                refused = check.result() if check else {}
                counts.golds.update(refused.values())
                for row_id, problem, found in zip(memory.ids(start, 256), chunk, attempts, strict=True):
                    yield row_id, problem, row_id not in refused, found
        finally:
            # A ctrl-C does not wait for a check: closing the verifier ends it.
            pool.shutdown(wait=False, cancel_futures=True)

    def _refused(self, problems: list[Problem]) -> dict[str, Verdict]:
        """Problems whose gold answer cannot be compared with, and why."""
        verdicts = self.verifier.check_answers([problem.answer for problem in problems])
        return {p.id: v for p, v in zip(problems, verdicts, strict=True) if v is not Verdict.CORRECT}

    def _prompt(self, problem: Problem, stage: str) -> list[dict[str, str]] | str:
        prompt = (
            problem.prompt
            if stage == Source.SELF
            else guided_prompt(problem, self.args.guided_prompt, self.args.clean_reference)
        )
        return self._control.prompt(prompt)

    def _asked(self, draw: Draw) -> Asked:
        args, problem = self.args, draw.state.problem
        seed = attempt_seed(args.seed, problem.id, draw.stage, draw.attempt)
        prompt = self._prompt(problem, draw.stage)
        request = Request(draw.id, prompt, seed, self._params, args.chat_template_kwargs)
        return Asked(draw, request, self._sampler_of(draw.stage), problem.answer, problem.extra)

    def _record(self, judged: Judged, journal: Journal, log: RunLog) -> Result:
        draw, completion, *verdict = judged
        attempt = self._attempt(draw.state.problem, draw.stage, draw.attempt, completion, *verdict)
        entry = attempt.entry()
        log.attempt(entry)
        return attempt.result(journal.append(entry))

    def _attempt(
        self, problem: Problem, stage: str, attempt: int, completion: Completion, verdict: Verdict, reason: str
    ) -> Attempt:
        """An attempt with its verdict, and why a guided one is not kept though it is correct."""
        judged_on = verdict == Verdict.CORRECT and stage == Source.GUIDED
        found = reject_guided(completion.text, problem, self.args) if judged_on else None
        rejected, reason = found or ("", reason)
        log_probs, ids = completion.log_probs, completion.completion_ids
        if not log_probs and verdict == Verdict.CORRECT and self.args.selection == "max_log_prob":
            raise ValueError(
                f"You passed selection='max_log_prob', but {self._sampler_of(stage).name} returned no log-probs for {completion.id}. Use another engine, "
                "or selection='random'."
            )
        log_prob = round(sum(log_probs) / len(log_probs), 6) if log_probs else None
        reference = reference_digest(problem.demonstration) if stage == Source.GUIDED else 0
        ended = verdict, completion.finish_reason, len(ids), log_prob, reference, rejected, reason
        if (verdict == Verdict.CORRECT and not rejected) or self.args.keep_rejected:
            return Attempt(problem.id, stage, attempt, *ended, completion.text, ids, [round(x, 6) for x in log_probs])
        return Attempt(problem.id, stage, attempt, *ended)

    # ---- rows out ----

    def _write(
        self,
        file: Path,
        whole,
        dataset,
        memory: RunMemory,
        outcome_of: Callable[[int], Outcome | None],
        journal: JournalReader,
        run: str = "",
    ) -> list[dict]:
        """
        Writes the rows that have an outcome, in the order they came in, to a file that is not yet in its place; carried columns as they are
        stored in `whole`. Returns the problems that have no row, for they were not solved and have no demonstration.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq
        from datasets import Dataset, Features
        from datasets.table import embed_table_storage

        unsolved = []
        carried = carried_columns(whole.column_names, self.args.answer_column)
        given = self.args.chat_template_kwargs
        features = output_features(whole.features, whole.column_names, self.args.answer_column, given)
        ours = Features({name: features[name] for name in features if name not in carried.values()})
        schema = features.arrow_schema
        schema = schema.with_metadata({**schema.metadata, RUN_KEY: run.encode()})
        stored = whole.select_columns(list(carried)).with_format("arrow")
        media = media_columns(whole)
        names = {source: public_name(self._sampler_of(source).name) for source in Source}
        experts: Counter = Counter()
        with pq.ParquetWriter(file, schema) as writer:
            for chunk in batched(enumerate(self._problems(dataset, memory)), 100 if media else 1000):
                solved, rows = [], []
                for i, problem in chunk:
                    outcome = outcome_of(i)
                    if outcome is None:
                        continue
                    if problem.demonstration is None and outcome.source == Source.EXPERT:
                        unsolved.append({"id": problem.id, "problem": problem.problem, "answer": problem.answer})
                    else:
                        solved.append(i)
                        rows.append(self._row(problem, outcome, journal, names))
                if not rows:
                    continue
                experts.update(how for row in rows if row["source"] == Source.EXPERT for how in self._put(row))
                table = Dataset.from_list(rows, features=ours).data.table
                there = stored[chunk[0][0] : chunk[-1][0] + 1].take([i - chunk[0][0] for i in solved])
                for name, column in zip(carried.values(), there.columns, strict=True):
                    table = table.append_column(name, column)
                table = pa.Table.from_arrays(table.columns, schema=schema)
                writer.write_table(embed_table_storage(table) if media else table)
        self.metrics["expert_format"] = {how: experts[how] for how in ("boxed", "marks_removed", "not_as_asked")}
        return unsolved

    def _list_unsolved(self, columns: list[str], unsolved: list[dict]) -> None:
        path = self.shard.file(self.output_dir, "unsolved.jsonl")
        path.unlink(missing_ok=True)  # of other rows
        if find_format(columns, self.args.answer_column)[1] is None:
            self.metrics["yield"][str(Source.EXPERT)] = 0
            self.metrics["unsolved"] = len(unsolved)
            write_whole(path, "".join(json.dumps(row) + "\n" for row in unsolved))

    def _put(self, row: dict) -> list[str]:
        """Puts the demonstration in an `expert` row into the form that its prompt asks for, if that is wanted; returns what is to be said of it."""
        if not asks_for_box(row["prompt"]):
            return []
        (given,) = contents(row["completion"])
        put = in_asked_form(given, row["answer"]) if self.args.expert_format == "boxed" else given
        row["completion"] = as_completion(row["prompt"], put)
        told = {
            "boxed": has_box(put) and not has_box(given),
            "marks_removed": CALCULATOR_MARK.search(given) and not CALCULATOR_MARK.search(put),
            "not_as_asked": not has_box(put),
        }
        return [how for how, so in told.items() if so]

    def _publish(self, file: Path, run: str, logged) -> None:
        """Moves the rows to their place; the last shard sums up, and logs the artifact if asked to."""
        self.missing_shards = publish(file, self.output_dir, self.shard, run)
        if logged is not None:
            logged.summary.update(self.metrics)
        if self.missing_shards:
            return
        if self.shard.count > 1:
            files = [shard.file(self.output_dir, "metrics.json") for shard in self.shard.siblings()]
            if all(file.exists() for file in files):
                total = summed([json.loads(file.read_text()) for file in files])
                write_whole(self.output_dir / "metrics.json", json.dumps(total, indent=1) + "\n")
        if logged is not None and self.args.wandb_log_artifacts:
            paths = [self.output_dir / name for name in ("dataset", "run_config.yaml", "metrics.json")]
            log_artifact(logged, "dataset", [path for path in paths if path.exists()])

    def _load(self):
        """This shard's rows, wherever its file is by now."""
        with published(self.output_dir):
            partial = self.output_dir / "dataset.partial"
            if self.missing_shards and not (partial / self.shard.parquet).exists():
                self.missing_shards = []  # the last of them has just moved it
            return self._load_from(partial if self.missing_shards else self.output_dir / "dataset")

    def _load_from(self, directory: Path):
        import pyarrow.parquet as pq
        from datasets import Dataset, load_dataset
        from pyarrow.dataset import ParquetFragmentScanOptions

        file = directory / self.shard.parquet
        if pq.read_metadata(file).num_rows == 0:  # more shards than rows; `load_dataset` refuses a file without any
            return Dataset(pq.read_table(file))
        # Reading ahead is no faster here and takes twice the memory.
        scan = ParquetFragmentScanOptions(pre_buffer=False)
        return load_dataset("parquet", data_files=glob.escape(str(file)), split="train", fragment_scan_options=scan)

    @property
    def _params(self) -> SamplingParams:
        return self.args.sampling_params()

    def _row(self, problem: Problem, outcome: Outcome, journal: Journal, names: dict[Source, str]) -> dict:
        kept = {"text": problem.demonstration, "completion_ids": [], "behavior_log_probs": []}
        if outcome.offset >= 0:
            attempt = {
                "id": problem.id,
                "stage": outcome.source,
                "attempt": outcome.attempt,
                "verdict": Verdict.CORRECT,
            }
            kept = journal.read(outcome.offset, attempt, kept)
        ids, sampler = kept["completion_ids"], self._sampler_of(outcome.source)
        if self.args.stop and ids and ids[-1] not in sampler.stop_token_ids:
            # It ended with a stop text, which is no end of turn: trained on as text, to which the chat template adds one.
            kept = {**kept, "completion_ids": [], "behavior_log_probs": []}
        prompt = self._prompt(problem, Source.SELF)
        row = {
            "prompt": prompt,
            "completion": as_completion(prompt, storable(kept["text"])),  # an old journal's
            "id": problem.id,
            "source": str(outcome.source),
            "answer": problem.answer,
            "num_sampled": outcome.num_sampled,
            "num_correct": outcome.num_correct,
            "self_sampled": outcome.self_sampled,
            "self_correct": outcome.self_correct,
            "completion_ids": kept["completion_ids"],
            # Drawn from a reshaped distribution, a token's log μ is not the model's log-prob: better none than a wrong one.
            "behavior_log_probs": [] if self._params.reshaping else kept["behavior_log_probs"],
            "model": names[outcome.source],
            "model_revision": self._sampler_of(outcome.source).revision,
            "temperature": self.args.temperature,
            "top_p": self.args.top_p,
            "top_k": self.args.top_k,
            "behavior_prompt": self._prompt(problem, outcome.source)
            if outcome.source == Source.GUIDED
            else prompt[:0],
        }
        given = self.args.chat_template_kwargs
        return row | {"chat_template_kwargs": given} if given else row


def check_stages(columns: list[str], args: RewriteConfig) -> None:
    """`ValueError` if a dataset with these `columns` cannot be rewritten as `args` say, whatever its rows are."""
    carried_columns(columns, args.answer_column)
    if args.chat_template_kwargs and "chat_template_kwargs" in columns:
        raise ValueError(
            f"You passed chat_template_kwargs={args.chat_template_kwargs}, but the dataset has a column of that name: leave out one of them."
        )
    if args.system_prompt is not None and find_format(columns, args.answer_column)[0] not in ASKED:
        raise ValueError(
            f"You passed system_prompt={args.system_prompt!r:.100}, which stands before `solve_prompt`; but the dataset has the columns {columns}, "
            "so its rows have prompts of their own. Write the system turn into them."
        )
    if find_format(columns, args.answer_column)[1] is None and Source.GUIDED in args.stages:
        raise ValueError(
            f"You passed stages={args.stages}, but the dataset has the columns {columns} and no demonstrations, which the stage `guided` "
            "retells. Write stages=['self'] (--stages self), and what the model does not solve is listed in unsolved.jsonl; or name the "
            f"demonstrations' column as one of {', '.join(dict.fromkeys(pair[1] for pair in FORMATS))}."
        )
