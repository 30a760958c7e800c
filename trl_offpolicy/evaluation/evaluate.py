"""
Accuracy on problems with a final answer: sample k times, verify, report avg@k, pass@k and maj@k with intervals over
problems.

    evaluate("Qwen/Qwen2.5-Math-1.5B", ["math500", "aime24"], output_dir="runs/eval-base", **PRESETS["paper"])

Each sample is a line of a journal, so an interrupted evaluation resumes, and the results are computed from journals
alone: the last of several shards to finish finds all the others' there.
"""

import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from tqdm.auto import tqdm

from ..answers.extraction import stated_text
from ..answers.normalization import canonical
from ..cards import versions
from ..data import prompts
from ..data.loading import batched
from ..data.rows import Verdict, stored
from ..data.tokenization import template_kwargs
from ..data.whole_file import partial_file, write_whole
from ..reporting import tables
from ..runs.journal import Journal, differences, read_entries
from ..runs.run_log import check_wandb, wandb_run
from ..runs.shards import Shard, check_siblings
from ..sampling.provenance import template_digest
from ..sampling.sampler import (
    FAILED,
    LATER,
    Request,
    Sampler,
    as_sampler,
    attempt_seed,
)
from ..verification.drawing import Asked, Drawing
from ..verification.math_verifier import MathVerifier
from ..verification.verdict_queue import Judged
from ..verification.verifier import Verifier, as_verifier, describe
from .benchmarks import Question, check_format, load_benchmarks, read_questions, without_control_tokens
from .estimators import accuracies, compare, mean_interval
from .evaluation_config import EvaluationConfig


NOT_JUDGED = (Verdict.TIMEOUT, Verdict.ERROR)


class Key(NamedTuple):
    """What identifies a sample: `stage` is "eval", or "greedy" for the one at temperature 0."""

    benchmark: str
    id: str
    stage: str
    attempt: int


def evaluate(
    model,
    benchmarks,
    args: EvaluationConfig | None = None,
    *,
    sampler: Sampler | None = None,
    verifier=None,
    processing_class=None,
    train_dataset=None,
    **settings,
) -> dict[str, dict]:
    """
    avg@k, pass@k and maj@k of `model` on each benchmark.

    Args:
        model (`str` or `PreTrainedModel`): What is evaluated (ignored when a `sampler` is passed).
        benchmarks (`list[str]` or `dict[str, Iterable[dict]]`): Names, files or Hub ids
            ([`~evaluation.benchmarks.load_benchmark`]); or rows by name, each with `answer` and a prompt as a rewrite
            takes it: `messages`, a conversational `prompt`, a plain text `prompt`, which is asked without a chat
            template; or with `problem` or `question`, which `solve_prompt` turns into messages.
        args ([`EvaluationConfig`], *optional*): The settings.
        sampler, verifier, processing_class (*optional*): As for [`DataRewriter`].
        train_dataset (*optional*): The rows that it was trained on; another prompt is refused
            ([`~evaluation.benchmarks.check_training_format`]).
        settings: Fields of [`EvaluationConfig`] by name, in place of `args`: `evaluate(model, ["math500"],
            num_generations=4)`.

    Returns:
        `dict`: For each benchmark (of this shard's problems only, as long as other shards are missing):

            - `avg@k`, `pass@j` for powers of two j and j = k, `maj@k`, `greedy` (if asked for): shares, each with
              `…_ci95`, a bootstrap interval over problems; `avg@k_se`, the standard error over problems; `vs_baseline`
              ([`~evaluation.estimators.compare`]), if there is one;
            - `num_problems`, and `problem_ids`, `num_correct`, `num_judged`: lists in row order; `mean_length` of
              what was drawn in tokens, `None` where a server gives no token ids;
            - `truncated`, `unparsable`, `not_told`: shares of the samples that were cut, stated no answer, could not
              be judged or drawn (time-outs, errors, a gold answer that the verifier cannot compare with). The first
              two count as wrong, the last are left out, and a problem with fewer than j left is left out of `pass@j`.
              `gold_unparsable`: problems with such a gold answer;
            - `entropy`: nats per token, the mean of -log π over the sampled tokens; `None` without log-probs or plain
              sampling.

    Raises:
        ValueError: A benchmark is empty or unknown, a row has no problem or no answer, the prompts' format is wrong,
            or `output_dir` holds an evaluation with other settings, or `baseline` one with no problem in common or
            another k, sampling, token limit, verifier or `chat_template_kwargs`.
        TypeError: `args` is no [`EvaluationConfig`], or there are `settings` beside it.
    """
    args = _config(args, settings)
    check_wandb(args.report_to)
    params = args.sampling_params()
    rows = benchmarks if isinstance(benchmarks, dict) else load_benchmarks(benchmarks)
    questions = {
        name: read_questions(name, each, args.solve_prompt, args.system_prompt) for name, each in rows.items()
    }
    measured = {
        "num_generations": args.num_generations,
        **asdict(params),
        "chat_template_kwargs": args.chat_template_kwargs,
        "verifier": describe(MathVerifier() if verifier is None else verifier),
    }
    earlier = _read_baseline(Path(os.path.expanduser(args.baseline)), questions, measured) if args.baseline else {}
    sampler = sampler or _default_sampler(model, processing_class)
    processing_class = getattr(sampler, "processing_class", processing_class)
    sampler = as_sampler(sampler)
    if processing_class is not None:
        variables = template_kwargs(args.chat_template_kwargs)
        check_format(processing_class, questions, args.train_tokenizer, train_dataset, variables)
        questions = without_control_tokens(processing_class, questions, args.control_tokens)
    asked = {name: getattr(args, name) for name in ("seed", "solve_prompt", "system_prompt")}
    asked |= {"control_tokens": "escape"} if args.control_tokens == "escape" else {}
    asked |= {"chat_template_kwargs": args.chat_template_kwargs} if args.chat_template_kwargs else {}
    with MathVerifier() if verifier is None else nullcontext(as_verifier(verifier)) as verifier:
        config = {**params.settings(), **asked, **_engine(sampler, verifier, processing_class)}
        golds = {name: verifier.check_answers([q.answer for q in each]) for name, each in questions.items()}
        run = _Run(questions, golds, args)
        run.sample(sampler, verifier, config)
    results = {name: run.summarize(name) for name in questions if run.has(name)}
    _compare(results, earlier, str(args.baseline))
    if args.output_dir is not None and run.complete:
        made_with = {**config, "num_generations": args.num_generations}
        write_results(Path(args.output_dir), made_with, results, args.report_to)
    return results


def _config(args: EvaluationConfig | None, settings: dict) -> EvaluationConfig:
    if args is None:
        return EvaluationConfig(**settings)
    if not isinstance(args, EvaluationConfig) or settings:
        raise TypeError(
            f"You passed args={args!r:.200} and {sorted(settings)}; pass an EvaluationConfig, or its fields by name, such as num_generations=4."
        )
    return args


def _default_sampler(model, processing_class) -> Sampler:
    from ..sampling.transformers_sampler import TransformersSampler

    return TransformersSampler(model, processing_class)


def _read_baseline(directory: Path, questions: dict[str, list[Question]], settings: dict) -> dict[str, dict]:
    """
    The benchmarks of an earlier evaluation; `ValueError` before anything is sampled where nothing could be compared
    with it, or it was measured with other `settings`: a difference of theirs would be taken for one of the models.
    """
    path = directory / "results.json"
    if not path.exists():
        raise ValueError(
            f"You passed baseline={str(directory)!r}, where there is no results.json; pass the output_dir of an evaluation that has finished."
        )
    try:
        found = json.loads(path.read_text())
        earlier = {name: each for name, each in found["benchmarks"].items() if _judged(each)}
        config = found.get("config", {})
        unnamed = {**settings, **LATER, "chat_template_kwargs": None}  # what results hold that do not name a setting
        known = {name: config.get(name, unnamed[name]) for name in settings}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"You passed baseline={str(directory)!r}, but {path} is no result of an evaluation."
        ) from error
    if differing := differences(known, settings, free=()):
        raise ValueError(
            f"You passed baseline={str(directory)!r}, which was measured otherwise, so a difference would not be the model's: {differing}. "
            "Evaluate both with the same settings, or leave `baseline` out."
        )
    if not earlier.keys() & questions.keys():
        raise ValueError(
            f"You passed baseline={str(directory)!r}, which has judged {list(earlier)}, and benchmarks {list(questions)}: there is nothing to "
            "compare. Name at least one benchmark as it is named there (a file is named by its stem), or leave `baseline` out."
        )
    for name in earlier.keys() & questions.keys():
        if not _judged(earlier[name]) & {question.id for question in questions[name]}:
            raise ValueError(
                f"You passed baseline={str(directory)!r}, but its {name!r} has no problem in common with this one. The id of a problem depends on "
                "its prompt and its gold answer: ask both the same benchmark in the same words (solve_prompt, system_prompt)."
            )
    return earlier


def _compare(results: dict[str, dict], earlier: dict[str, dict], baseline: str) -> None:
    """Adds `vs_baseline` where both have judged a problem; one shard of several may have none of the baseline's."""
    for name in results.keys() & earlier.keys():
        if _judged(results[name]) & _judged(earlier[name]):
            results[name]["vs_baseline"] = {"baseline": baseline, **compare(results[name], earlier[name])}


def _judged(result: dict) -> set[str]:
    """The ids of the problems of which at least one sample was judged."""
    return {i for i, judged in zip(result["problem_ids"], result["num_judged"], strict=True) if judged}


def _engine(sampler: Sampler, verifier, processing_class) -> dict:
    """What a sample and its verdict depend on beside the settings."""
    return {
        "model": sampler.name,
        "model_revision": sampler.revision,
        "chat_template": template_digest(processing_class),
        "verifier": describe(verifier),
    }


@dataclass
class _Run:
    """The samples of one evaluation: which are due, which are known, what they say."""

    questions: dict[str, list[Question]]
    # Which gold answers can be compared with, as far as no completion is needed to tell.
    golds: dict[str, list[Verdict]]
    args: EvaluationConfig
    samples: dict[Key, dict] = field(default_factory=dict)
    complete: bool = False  # then all shards' problems are summarised, else this shard's

    @property
    def shard(self) -> Shard:
        return Shard.parse(self.args.shard)

    def keys(self, name: str, shard: Shard) -> Iterator[tuple[Key, Question]]:
        """Every sample of a benchmark's problems in `shard`."""
        for row in shard.rows(len(self.questions[name])):
            question = self.questions[name][row]
            for attempt in range(self.args.num_generations):
                yield Key(name, question.id, "eval", attempt), question
            if self.args.greedy:
                yield Key(name, question.id, "greedy", 0), question

    def has(self, name: str) -> bool:
        """Whether there is anything to summarise: a shard may have none of a benchmark's few problems."""
        return self.complete or len(self.shard.rows(len(self.questions[name]))) > 0

    def sample(self, sampler: Sampler, verifier, config: dict) -> None:
        """Draws what is not known yet, and looks whether the other shards are complete."""
        if self.args.output_dir is None:
            self._draw(sampler, verifier, None, {})
            return
        path, overwrite = Path(self.args.output_dir), self.args.overwrite
        path.mkdir(parents=True, exist_ok=True)
        check_siblings(path, self.shard, config, overwrite)
        journal = Journal(self.shard.file(path, "journal.jsonl"), config, overwrite)
        try:
            (path / "results.json").unlink(missing_ok=True)  # so that it never says what the journals no longer do
            offsets = self._know(journal.path, failed=False)  # those are drawn again
            self._draw(sampler, verifier, journal, offsets)
            self._write_samples(self.shard.file(path, "samples.parquet"), journal, offsets)
        finally:
            journal.close()
        for file in (s.file(path, "journal.jsonl") for s in self.shard.siblings() if s != self.shard):
            if file.exists():
                self._know(file)
        every = (key for s in self.shard.siblings() for name in self.questions for key, _ in self.keys(name, s))
        self.complete = all(key in self.samples for key in every)

    def _know(self, journal: Path, failed: bool = True) -> dict[Key, int]:
        """
        Reads a journal, up to the texts; where each sample is in it, those that could not be drawn only if `failed`.
        """
        offsets = {}
        for offset, entry in read_entries(journal, texts=False):
            if entry["finish_reason"] in FAILED and not failed:
                continue
            key = Key(*(entry[field] for field in Key._fields))
            self.samples[key], offsets[key] = entry, offset
        return offsets

    def _draw(self, sampler: Sampler, verifier: Verifier, journal: Journal | None, offsets: dict[Key, int]) -> None:
        """Streams what is due through sampling and verification, which overlap, into the journal."""
        due = [item for name in self.questions for item in self.keys(name, self.shard) if item[0] not in self.samples]
        requests = (Asked(key, self._request(key, q), sampler, q.answer, q.row) for key, q in due)

        def record(batch: list[Judged]) -> list[Judged]:
            for judged in batch:
                self.samples[judged.item] = entry = _entry(judged, verifier.stated)
                if journal is not None:
                    offsets[judged.item] = journal.append(entry)
            return batch

        with (
            Drawing(verifier, sampler) as drawing,
            tqdm(total=len(due), desc=", ".join(self.questions), unit="sample", leave=False) as bar,
        ):
            while drawing.submit(requests):
                for _ in drawing.judged(record):
                    bar.update()

    def _request(self, key: Key, question: Question) -> Request:
        params = self.args.sampling_params()
        if key.stage == "greedy":
            params = replace(params, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)
        seed = attempt_seed(self.args.seed, question.id, key.stage, key.attempt)
        return Request("/".join(map(str, key)), question.prompt, seed, params, self.args.chat_template_kwargs)  # type: ignore[arg-type]

    def unread(self, name: str, shard: Shard) -> set[str]:
        """
        The ids of a benchmark's problems in `shard` whose gold answer cannot be compared with: the verifier said so at
        once, or of every completion that was not cut.
        """
        every = shard.rows(len(self.questions[name]))
        found = {self.questions[name][i].id for i in every if self.golds[name][i] != Verdict.CORRECT}
        at_fault: dict[str, list[bool]] = {}
        for key, _ in self.keys(name, shard):
            if key.stage == "eval" and self.samples[key]["finish_reason"] == "stop":
                at_fault.setdefault(key.id, []).append(self.samples[key].get("gold_at_fault", False))
        return found | {row_id for row_id, of_samples in at_fault.items() if all(of_samples)}

    def summarize(self, name: str) -> dict:
        """What [`evaluate`] returns of one benchmark."""
        shard = Shard() if self.complete else self.shard
        unread = self.unread(name, shard)
        drawn: dict[str, list[dict]] = {}
        greedy: list[dict] = []
        for key, question in self.keys(name, shard):
            if key.stage == "greedy":
                greedy.append(self.samples[key])
            else:
                drawn.setdefault(question.id, []).append(self.samples[key])
        every = [sample for samples in drawn.values() for sample in samples]
        judged = [[s for s in samples if _told(s, unread)] for samples in drawn.values()]
        correct = [[s["verdict"] == Verdict.CORRECT for s in samples] for samples in judged]
        result = accuracies([[_vote(s) for s in samples] for samples in judged], correct, self.args.num_generations)
        if greedy:
            right = [float(s["verdict"] == Verdict.CORRECT) for s in greedy if _told(s, unread)]
            result |= {"greedy": fmean(right) if right else None, "greedy_ci95": mean_interval(right, 0.0)}
        lengths = [s["num_tokens"] for s in every if s["finish_reason"] not in FAILED]
        tokens = sum(lengths)
        known = (
            not self.args.sampling_params().reshaping
            and tokens
            and all(s["log_prob"] is not None for s in every if s["num_tokens"])
        )
        cut = [s["finish_reason"] == "length" for s in every]
        told = [_told(s, unread) for s in every]
        unparsable = [
            s["verdict"] == Verdict.UNPARSABLE and s["finish_reason"] == "stop" and was_told
            for s, was_told in zip(every, told, strict=True)
        ]
        return result | {
            "num_problems": len(drawn),
            "truncated": fmean(cut),
            "unparsable": fmean(unparsable),
            "not_told": fmean(not was_told for was_told in told),
            "gold_unparsable": len(unread),
            "mean_length": fmean(lengths) if tokens else None,
            "entropy": -sum(s["log_prob"] or 0.0 for s in every) / tokens if known else None,
            "problem_ids": list(drawn),
            "num_correct": [sum(c) for c in correct],
            "num_judged": [len(c) for c in correct],
        }

    def _write_samples(self, file: Path, journal: Journal, offsets: dict[Key, int]) -> None:
        """Every sample of this shard, with its text and whether it counts in the accuracies (`judged`), as Parquet."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        texts = ("benchmark", "id", "stage", "verdict", "finish_reason", "answer", "reason", "text", "gold", "prompt")
        numbers = {"attempt": pa.int32(), "num_tokens": pa.int32(), "log_prob": pa.float64(), "judged": pa.bool_()}
        unread = {name: self.unread(name, self.shard) for name in self.questions}
        schema = pa.schema([*((name, pa.string()) for name in texts), *numbers.items()])
        with partial_file(file) as partial:
            with pq.ParquetWriter(partial, schema) as writer:
                for chunk in batched((item for name in self.questions for item in self.keys(name, self.shard)), 1000):
                    rows = []
                    for key, question in chunk:
                        entry = journal.read(offsets[key], key._asdict(), ["text"])
                        asked = {"gold": question.answer, "prompt": prompts.contents(question.prompt)[-1]}
                        rows.append({**stored(entry), **asked, "judged": _told(entry, unread[key.benchmark])})
                    writer.write_table(pa.Table.from_pylist(rows, schema))
            partial.replace(file)


def _told(sample: dict, unread: set[str]) -> bool:
    """Whether a sample was judged, by a gold answer that can be compared with; else it counts nowhere."""
    return sample["verdict"] not in NOT_JUDGED and sample["id"] not in unread and not sample.get("gold_at_fault")


def _vote(sample: dict) -> str | None:
    """What a sample votes for in maj@k; a wrong answer must not lose its votes to how it is written."""
    return None if sample["answer"] is None else canonical(sample["answer"])


def _entry(judged: Judged, stated: bool) -> dict:
    key, completion, verdict, reason, gold_at_fault = judged
    answer = None
    if completion.finish_reason == "stop" and verdict in (Verdict.CORRECT, Verdict.WRONG):
        # the answer that the verifier read; where it reads something else, the text itself
        answer = (stated and stated_text(completion.text)) or completion.text.strip()[-200:]
    return {
        **key._asdict(),
        "verdict": verdict,
        "finish_reason": completion.finish_reason,
        "num_tokens": len(completion.completion_ids),
        "log_prob": round(sum(completion.log_probs), 6) if completion.log_probs else None,
        "answer": answer,
        **({"gold_at_fault": True} if gold_at_fault else {}),
        "reason": reason,  # a resume reads a line up to here
        "text": completion.text,
    }


def write_results(output_dir: Path, config: dict, results: dict[str, dict], report_to: str = "none") -> None:
    """`results.md` and `results.json`, whole or not at all, and their numbers to W&B if asked."""
    packages = versions("trl-offpolicy", "math-verify", "transformers", "torch", "vllm")
    text = f"# {tables.plain(config['model'])}\n\n{tables.markdown(tables.accuracy(results))}"
    if any("vs_baseline" in r for r in results.values()):
        text += "\n" + tables.markdown(tables.comparison(results))
    found = {"config": config, "versions": packages, "benchmarks": results}
    for name, content in (("results.md", text), ("results.json", json.dumps(found, indent=1) + "\n")):
        write_whole(output_dir / name, content)  # two shards may finish at the same moment
    with wandb_run(report_to, output_dir, "eval", config) as run:
        if run is not None:
            run.log(_numbers(results))


def _numbers(results: dict[str, dict]) -> dict[str, float]:
    """The results as W&B shows them: one number a name."""
    compared = {f"{n}/vs_baseline": each["vs_baseline"] for n, each in results.items() if "vs_baseline" in each}
    numbers = {f"{n}/{k}": x for n, each in {**results, **compared}.items() for k, x in each.items()}
    return {name: x for name, x in numbers.items() if isinstance(x, int | float)}
