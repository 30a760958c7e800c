"""
`DataRewriter`: for each problem the model's own correct solution, else its retelling of the reference, else the
demonstration.

    rewriter = DataRewriter("Qwen/Qwen2.5-Math-1.5B", RewriteConfig(output_dir="runs/rewrite", num_generations=8))
    dataset = rewriter.rewrite(load_dataset("openai/gsm8k", "main", split="train"))
    trainer = ImportanceWeightedSFTTrainer("Qwen/Qwen2.5-Math-1.5B", train_dataset=dataset)

("Mind the Gap", arXiv 2509.15157, section 3.2.) The way of a row: `problems.py` reads it, `scheduler.py` says
which attempt is drawn when, here they are drawn, verified and journaled, and `output_rows.py` writes what comes out. A
run holds the attempts in flight and some 30 bytes a row, not the texts.
"""

import copy
import hashlib
import json
import re
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..cards import versions
from ..data.control_tokens import ControlTokens
from ..data.formats import PLAIN_PROMPTS
from ..data.loading import hub_origin
from ..data.rows import Source, source_of, sources_of
from ..data.tokenization import template_kwargs
from ..data.whole_file import partial_file, write_whole
from ..runs.journal import Attempt, Journal, JournalReader, differences, read_attempts, read_header
from ..runs.run_counts import RunCounts, summed
from ..runs.run_log import PeriodicPush, RunLog, check_wandb, log_artifact, wandb_run
from ..runs.shards import Shard, check_siblings, publish, publish_lock, withdraw
from ..sampling.loading import load_processing_class
from ..sampling.sampler import (
    PLAIN,
    Sampler,
    as_sampler,
    cannot_draw_hinted,
)
from ..verification.drawing import Drawing
from ..verification.verifier import as_verifier
from .attempts import Attempts, journal_config
from .candidate_scores import check_can_score, score_known
from .dry_run import probe_report, shown_prompt, shown_strategy
from .output_rows import Written, load_rows, write_rows
from .problems import Problems
from .push import open_repo, push_run
from .rejudge import rejudge
from .replay import ReplayPrompt, draw_replay, num_replay_rows, put_together, replay_prompts, write_replay
from .rewrite_config import RewriteConfig
from .scheduler import Outcome, Scheduler
from .teachers import check_teacher


class DataRewriter:
    """
    Rewrites demonstrations into what `model` could have written itself.

    Args:
        model (`str` or `PreTrainedModel`): The model that will be trained; it is also the one that is sampled.
        args ([`RewriteConfig`]): How.
        sampler ([`~trl_offpolicy.sampling.Sampler`], *optional*): Engine; by default a [`TransformersSampler`] of
            `model`.
        verifier (*optional*): Something with `verify(completions, answers) -> list[Verdict]`, or a function of that
            form; by default a [`MathVerifier`].
        processing_class (`PreTrainedTokenizerBase`, *optional*): Tokenizer of the default sampler.
        guided_sampler ([`~trl_offpolicy.sampling.Sampler`], *optional*): Who draws in the guided stage, such as a
            trained rewriting agent, `sampler.with_adapter("me/agent")`; by default `sampler`.
        teachers (`dict[str, Sampler]`, *optional*): Other models by a name for each, which draw in the stage `teacher`:
            up to K attempts of each, one teacher after another.
    """

    def __init__(
        self,
        model,
        args: RewriteConfig,
        sampler: Sampler | None = None,
        verifier=None,
        processing_class=None,
        guided_sampler: Sampler | None = None,
        teachers: dict[str, Sampler] | None = None,
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
        self.teachers = {name: as_sampler(teacher) for name, teacher in (teachers or {}).items()}
        self.stages = args.drawn_stages(self.teachers)
        self._check_decoding()
        self.verifier = verifier if verifier is None else as_verifier(verifier)
        self.output_dir, self.shard = Path(args.output_dir), Shard.parse(args.shard)
        self.metrics: dict = {}
        self.advice: str | None = None  # what a run has said of cut attempts on the way
        # After `rewrite`: the shards without which there is no `output_dir/dataset` yet.
        self.missing_shards: list[Shard] = []

    def __repr__(self) -> str:
        model = self.model if isinstance(self.model, str) else type(self.model).__name__
        args = self.args
        return f"DataRewriter({model!r}, output_dir={args.output_dir!r}, stages={args.stages}, num_generations={args.num_generations})"

    # ---- the public calls ----

    def rewrite(self, dataset, run_config: dict | None = None):
        """
        Rewrites every row of `dataset` and returns the result, which is also in `output_dir/dataset` as Parquet. Of
        problems without demonstrations (`stages=["self"]` only), those without a correct attempt are listed in
        `output_dir/unsolved.jsonl` instead.

        Args:
            dataset (`datasets.Dataset`): Rows in any of the formats of `rows.FORMATS`; each comes out exactly once.
            run_config (`dict`, *optional*): Further arguments of `trl-offpolicy rewrite` for `run_config.yaml`, such
                as `dataset_name`, which with commit and config is found out for a dataset from the Hub.

        Returns:
            `datasets.Dataset`: The rewritten rows, of this shard if it is one of several; `None` after a dry run.

        Raises:
            ValueError: The dataset is empty or lacks a column, a row has no problem or no demonstration (named by
                number), or `output_dir` holds the attempts of another configuration.
        """
        problems = self._problems(dataset)
        general = self._replay_prompts(problems) if self.args.replay_share else []
        if problems.plain:
            warnings.warn(PLAIN_PROMPTS, stacklevel=2)
        if self.args.dry_run:
            self._dry_run(problems)
            if self.args.probe and len(problems):
                self._probe(problems)
            return None
        if reshaping := self.args.sampling_params().reshaping:
            warnings.warn(
                f"{', '.join(f'{name}={value}' for name, value in reshaping.items())}: rows will carry no `behavior_log_probs`, so importance "
                f"weights are not available on them. Sample with {', '.join(f'{name}={PLAIN[name]}' for name in reshaping)} if you want them.",
                stacklevel=2,
            )
        began = time.monotonic()
        check_wandb(self.args.report_to)
        self._load_engines()
        origin = hub_origin(problems.stored)
        origin |= {} if problems.stored.split is None else {"dataset_split": str(problems.stored.split)}
        journal, config = self._open_journal(problems)
        made = problems.memory.digest + json.dumps(config)
        made += self.args.expert_format if self.args.expert_format != "keep" else ""
        made += json.dumps(kept) if (kept := self.args.kept()) else ""
        run = hashlib.blake2b(made.encode(), digest_size=16).hexdigest()
        part = "" if self.shard.count == 1 else f"-{self.shard.index}"
        try:
            if journal.overwritten:
                withdraw(self.output_dir, self.shard)
            self._write_run_config({**(run_config or {}), **origin})
            with (
                wandb_run(self.args.report_to, self.output_dir, "rewrite", config, part) as logged,
                problems.memory.frozen_heap(),
            ):
                if self.args.push_to_hub:  # so that a push that cannot work is refused before anything is sampled
                    open_repo(self.args)
                log = self.shard.file(self.output_dir, "metrics.jsonl")
                scheduler = self._run(problems, journal, logged, self.args, log)
                with partial_file(self.output_dir / self.shard.parquet) as file:
                    written = write_rows(file, problems, scheduler.outcome, journal, self._sampler_of, run)
                    self._note(written)
                    self._list_unsolved(problems, written.unsolved)
                    if general:
                        self._draw_replay(general, sum(written.rows.values()), file)
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
        Writes the rows of this shard that are settled by what its journal holds, as [`rewrite`] would, to a Parquet
        `file`. Nothing is sampled, and a run may be under way. Rows of which nothing was drawn yet are left out.

        Returns:
            `int`: How many rows were written.

        Raises:
            FileNotFoundError: There is no journal in `output_dir`.
        """
        problems = self._problems(dataset)
        journal = JournalReader(self.shard.file(self.output_dir, "journal.jsonl"))
        problems.memory.recall(journal.entries(texts=False), self.stages)
        counts, still_open = self._counts(), set()
        scheduler = Scheduler(problems.known(), len(problems), self.args, counts)
        while draw := scheduler.next(speculate=False):
            still_open.add(draw.state.row)

        def outcome_of(row: int) -> Outcome | None:
            return None if row in still_open else scheduler.outcome(row)

        try:
            with partial_file(Path(file)) as partial:
                written = write_rows(partial, problems, outcome_of, journal, self._sampler_of)
                partial.replace(file)
        finally:
            journal.close()
        return counts.rows.total() - len(written.unsolved)

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
        Pushes the rows in `output_dir`, the attempts and their card to the Hub; see [`~rewriting.push.push_run`].
        Arguments left out are those of `args`.

        Raises:
            ValueError: No repository is named, the run is not finished, the engine failed at some of its attempts and
                `accept_failed` is not set, or a private one was asked for and it is public.
            HfHubHTTPError, httpx.TransportError, ConnectionError: The Hub refused or cannot be reached; a note on the
                exception says whether anything has changed there. Call it again.
        """
        given = {
            "hub_dataset_id": repo_id,
            "hub_private_repo": private,
            "hub_token": token,
            "hub_revision": revision,
            "push_attempts": push_attempts,
        }
        options = copy.copy(self.args)
        for name, value in given.items():
            if value is not None:
                setattr(options, name, value)
        return push_run(self.output_dir, options, commit_message)

    # ---- the run ----

    def _problems(self, dataset) -> Problems:
        """Those of this shard, with the ids that they have among all."""
        rows_file = self.shard.file(self.output_dir, "rows.npz")
        columns = () if self.verifier is None else self.verifier.columns
        problems = Problems(dataset, self.args, self._tokenizer(), rows_file, columns)
        return problems.select(self.shard.rows(len(problems)))

    def _run(self, problems: Problems, journal: Journal, logged, args: RewriteConfig, path: Path | None) -> Scheduler:
        """
        Streams all problems through sampling and verification until each has its outcome; `path` is that of
        `metrics.jsonl`, if it is wanted.
        """
        memory, counts = problems.memory, self._counts()
        memory.recall(journal.entries(texts=False), self.stages)
        if args.ranks and memory.num_known and (memory.unscored or args.competes):
            score_known(journal, problems, self.sampler)
            memory.recall(journal.entries(texts=False), self.stages)
        if path is not None and memory.num_known:
            counts.recall_aborted(path)
        scheduler = Scheduler(problems.checked(self.verifier, counts), len(problems), args, counts)
        others = [*([] if self.guided_sampler is None else [self.guided_sampler]), *self.teachers.values()]
        drawing = Drawing(self.verifier, self.sampler, *others, counts=counts.engine)
        log = RunLog(path, len(problems), memory.num_known, counts, drawing.drawn_tokens, logged)
        push = PeriodicPush(lambda: push_run(self.output_dir, args, finished=False), args.push_every, args.hub_token)

        def update(under_way: int) -> None:
            log.update(under_way, drawing.verifying, scheduler.attempts_left)
            push.update(counts.rows.total())

        try:
            Attempts(args, self._sampler_of).draw(problems, scheduler, drawing, journal, log.attempt, update)
        finally:
            # What an exception has stopped on the way is drawn again at a resume, and was paid for all the same.
            drawn, engine = drawing.drawn_tokens(), counts.engine
            engine["aborted_tokens"] = engine["earlier_aborted_tokens"] + drawn - engine["finished_tokens"]
            log.close()
            push.close()
        self.metrics, self.advice = counts.metrics(), log.advice
        return scheduler

    def _note(self, written: Written) -> None:
        """What the rows tell, for `metrics.json`."""
        self.metrics["expert_format"] = written.expert_format
        for stage in self.stages:
            if source_of(stage) == Source.GUIDED:
                counted = written.copied.get(stage, {})
                self.metrics["stages"][stage] |= {name: counted.get(name, 0) for name in ("copied", "ngrams")}
        if self.args.keep == "all":
            self.metrics["rows"] = {str(source): written.rows.get(source, 0) for source in sources_of(self.stages)}

    def _list_unsolved(self, problems: Problems, unsolved: list[dict]) -> None:
        path = self.shard.file(self.output_dir, "unsolved.jsonl")
        path.unlink(missing_ok=True)  # of other rows
        if not problems.have_demonstrations:
            self.metrics["yield"][str(Source.EXPERT)] = 0
            self.metrics["unsolved"] = len(unsolved)
            write_whole(path, "".join(json.dumps(row) + "\n" for row in unsolved))

    def _replay_prompts(self, problems: Problems) -> list[ReplayPrompt]:
        control = ControlTokens(self._tokenizer(), self.args.control_tokens)
        return replay_prompts(self.args.replay_dataset, problems.plain, control)

    def _draw_replay(self, prompts: list[ReplayPrompt], num_rows: int, rows_file: Path) -> None:
        """Replay rows for this shard's so many rows, which are in a file that is not yet in its place."""
        own = prompts[self.shard.index :: self.shard.count]
        wanted = num_replay_rows(self.args.replay_share, num_rows)
        journal = self.shard.file(self.output_dir, "replay.jsonl")
        rows, counts = draw_replay(own, wanted, self.sampler, self.args, journal)
        write_replay(rows, rows_file, self.output_dir / "replay" / self.shard.parquet)
        self.metrics["replay"] = {name: counts[name] for name in ("rows", "cut", "empty", "refused", "failed")}
        self.metrics["undrawn"] += counts["failed"]
        if len(rows) + counts["failed"] < wanted:
            warnings.warn(
                f"There are {len(rows):,} replay rows and not {wanted:,}: {self.args.replay_dataset} has too few prompts ({len(own):,}), of which the "
                f"answers to {counts['cut']:,} were cut at max_completion_length and to {counts['empty']:,} empty.",
                stacklevel=3,
            )

    def _publish(self, file: Path, run: str, logged) -> None:
        """Moves the rows to their place; the last shard sums up, and logs the artifact if asked to."""
        self.missing_shards = publish(file, self.output_dir, self.shard, run)
        if logged is not None:
            logged.summary.update(self.metrics)
        if self.missing_shards:
            return
        if self.args.replay_share:
            siblings = {shard.parquet for shard in self.shard.siblings()}
            with publish_lock(self.output_dir):
                # Those of a run with another number of shards, whose journals were deleted.
                for file in (self.output_dir / "replay").glob("*.parquet"):
                    if file.name not in siblings:
                        file.unlink()
                put_together(*(self.output_dir / name for name in ("dataset", "replay", "with_replay")))
        if self.shard.count > 1:
            files = [shard.file(self.output_dir, "metrics.json") for shard in self.shard.siblings()]
            if all(file.exists() for file in files):
                total = summed([json.loads(file.read_text()) for file in files])
                write_whole(self.output_dir / "metrics.json", json.dumps(total, indent=1) + "\n")
        if logged is not None and self.args.wandb_log_artifacts:
            trained_on = "with_replay" if self.args.replay_share else "dataset"
            paths = [self.output_dir / name for name in (trained_on, "run_config.yaml", "metrics.json")]
            log_artifact(logged, "dataset", [path for path in paths if path.exists()])

    def _load(self):
        """This shard's rows, wherever its file is by now."""
        with publish_lock(self.output_dir):
            partial = self.output_dir / "dataset.partial"
            if self.missing_shards and not (partial / self.shard.parquet).exists():
                self.missing_shards = []  # the last of them has just moved it
            return load_rows((partial if self.missing_shards else self.output_dir / "dataset") / self.shard.parquet)

    # ---- set-up ----

    def _check_decoding(self) -> None:
        """`ValueError` if these engines cannot draw guided attempts as `guided_decoding` says."""
        if not self.args.hinted:
            return
        if self.guided_sampler is not None:
            raise ValueError(
                f"You passed guided_decoding='hinted' with the rewriting agent {self.guided_sampler.name}, but both prompts are to be read by the model "
                "that is trained. Leave out one of them."
            )
        if self.sampler is not None and not self.sampler.draws_hinted:
            raise cannot_draw_hinted(repr(self.sampler))

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

    def _load_engines(self) -> None:
        """The default sampler and verifier; not in `__init__`, since a dry run needs neither."""
        if self.sampler is None:
            from ..sampling.transformers_sampler import TransformersSampler

            self.sampler = TransformersSampler(self.model, self.processing_class)
        if self.verifier is None:
            from ..verification.math_verifier import MathVerifier

            self.verifier = MathVerifier()
        if self.args.ranks and (set(self.stages) - {Source.SELF} or self.args.competes):
            check_can_score(self.sampler)
        for name, teacher in self.teachers.items():
            check_teacher(name, teacher, self.sampler, self.args.teacher_log_probs)

    def _sampler_of(self, stage: str) -> Sampler:
        if (source := source_of(stage)) == Source.TEACHER:
            return self.teachers[stage.partition(":")[2]]
        return self.guided_sampler if source == Source.GUIDED and self.guided_sampler is not None else self.sampler

    def _counts(self) -> RunCounts:
        return RunCounts(self.stages, self.args.max_completion_length)

    def _identity(self, problems: Problems) -> dict:
        """On what an attempt and its verdict depend: a journal's first line."""
        engines = self.sampler, self.guided_sampler, self.teachers
        return journal_config(self.args, problems.plain, self.verifier, *engines)

    def _open_journal(self, problems: Problems) -> tuple[Journal, dict]:
        config = self._identity(problems)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        free = {"num_generations", "verifier"} if self.args.rejudge else {"num_generations"}
        check_siblings(self.output_dir, self.shard, config, self.args.overwrite, free)
        path, probe = (self.shard.file(self.output_dir, name) for name in ("journal.jsonl", "probe.jsonl"))
        if not path.exists() and probe.exists() and not differences(read_header(probe), config):
            probe.replace(path)
        elif path.exists() and not self.args.overwrite:
            self._look_at_verifier(path, config, problems)
        return Journal(path, config, overwrite=self.args.overwrite), config

    def _look_at_verifier(self, path: Path, config: dict, problems: Problems) -> None:
        """
        Has the journal's texts judged anew if that is wanted; `ValueError` if the verifier, and nothing else, is
        another one and it is not.
        """
        found = read_header(path)
        if found is None or differences(found, config, free=("num_generations", "verifier")):
            return
        if self.args.rejudge:
            lost = rejudge(path, config, problems, self.verifier, Attempts(self.args, self._sampler_of).attempt)
            withdraw(self.output_dir, self.shard)
            if lost:
                warnings.warn(
                    f"{lost:,} attempts have no text (keep_rejected=False), so they cannot be judged anew and are drawn again where they matter.",
                    stacklevel=4,
                )
        elif differing := differences(found, config):
            raise ValueError(
                f"{path} holds the verdicts of another verifier: {differing}. Pass rejudge=True (--rejudge) to have its texts judged anew by this one, "
                "or choose another `output_dir`."
            )

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

    # ---- without a run ----

    def _dry_run(self, problems: Problems) -> None:
        total = len(problems)
        if not total:
            print(f"shard {self.shard} has no rows")  # noqa: T201
            return
        if self.args.strategy is not None:
            print(shown_strategy(self.args))  # noqa: T201
        first, tokenizer = next(problems.read()), self._tokenizer()
        for stage in self.stages:
            prompt, given = problems.prompt(first, stage), template_kwargs(self.args.chat_template_kwargs)
            print(shown_prompt(f"first prompt of stage {stage}", prompt, tokenizer, given, self.verifier))  # noqa: T201
        most = total * len(self.stages) * self.args.num_generations
        print(  # noqa: T201
            f"---- estimate ----\n{total:,} rows; at most {most:,} attempts ({len(self.stages)} stages x K = {self.args.num_generations}), "
            f"{most * self.args.max_completion_length:,} tokens if each ran to max_completion_length = {self.args.max_completion_length}.\n"
            f"gold answer of the first row: {first.answer!r}"
        )
        if without := sum(not problem.answer for problem in problems.read()):
            print(  # noqa: T201
                f"---- careful ----\n{without:,} of {total:,} rows have no gold answer, neither in `{self.args.answer_column}` nor as the last box of their "
                "demonstration: no attempt at them can be verified, so they keep their demonstration. --answer_column says where the answers are."
            )

    def _probe(self, problems: Problems) -> None:
        """
        Draws the first attempt of each stage for some rows, evenly spread, and prints what they tell of the whole run.
        They go into a journal of their own, which a run with the same settings begins with.
        """
        self._load_engines()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        total = len(problems)
        chosen = problems.select(np.linspace(0, total, min(self.args.probe, total), endpoint=False, dtype=int))
        journal = Journal(self.shard.file(self.output_dir, "probe.jsonl"), self._identity(problems), overwrite=True)
        ids = set(chosen.memory.ids())

        def drawn() -> list[Attempt]:
            return list(read_attempts(journal.path, ids, texts=False))

        earlier, began = sum(attempt.num_tokens for attempt in drawn()), time.monotonic()
        try:
            once = replace(self.args, num_generations=1, push_every=0)
            counts = self._run(chosen, journal, None, once, None).counts
            seconds, attempts = time.monotonic() - began, drawn()
        finally:
            journal.close()
            self.verifier.close()
        rates = self._counts()
        rates.stages = counts.stages
        expected = Scheduler((), total, self.args, rates).attempts_left()
        print(probe_report(attempts, counts, len(chosen), total, expected, earlier, seconds, self.args))  # noqa: T201
