"""The rows that come out of a run: for each problem the kept attempt, else its demonstration, as Parquet."""

import glob
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from ..cards import public_name
from ..data.demonstrations import CALCULATOR_MARK, asks_for_box, clean_reference, has_box, in_asked_form
from ..data.formats import as_completion, carried_columns, output_features
from ..data.loading import batched, media_columns
from ..data.prompts import contents
from ..data.rows import Problem, Source, Verdict, storable
from ..data.text_statistics import copied_ngrams, normal_form
from ..runs.journal import JournalReader
from ..runs.shards import RUN_KEY
from ..sampling.sampler import LATER, Sampler
from .problems import Problems
from .rewrite_config import RewriteConfig
from .scheduler import Outcome


class Written(NamedTuple):
    """
    What is to say of rows: the problems that have none, for they were not solved and have no demonstration; how many
    demonstrations were put into the form that is asked for, or are not in it; by guided stage, how many
    4-grams its rows have, and how many of them are the reference's; and the number of rows by source.
    """

    unsolved: list[dict]
    expert_format: dict[str, int]
    copied: dict[str, Counter]
    rows: dict[str, int]


def write_rows(
    file: Path,
    problems: Problems,
    outcome_of: Callable[[int], Outcome | None],
    journal: JournalReader,
    sampler_of: Callable[[str], Sampler],
    run: str = "",
) -> Written:
    """
    Writes the rows that have an outcome, in the order they came in, to a file that is not yet in its place; carried
    columns as they are stored in the dataset. Of a run that keeps all, the rows of a problem stand together.

    Args:
        file (`Path`): Parquet.
        problems ([`Problems`]): What came in.
        outcome_of (`Callable`): From a row's number to what it is to hold; `None` for one that is left out.
        journal ([`JournalReader`]): Where the texts of the attempts are.
        sampler_of (`Callable`): From a stage to who drew its attempts.
        run (`str`, *optional*): By which the parts of one run know each other.

    Returns:
        [`Written`]: What there is to say of them.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset, Features
    from datasets.table import embed_table_storage

    unsolved: list[dict] = []
    written, copied = Counter[str](), defaultdict[str, Counter](Counter)
    args, whole = problems.args, problems.stored
    carried = carried_columns(whole.column_names, args.answer_column)
    given: Any = args.chat_template_kwargs  # a mapping, whatever it was written as
    features = output_features(
        whole.features, whole.column_names, args.answer_column, given, args.ranks, args.keep == "all", args.hinted,
        _rare_sampling(args),
    )  # fmt: skip
    ours = Features({name: features[name] for name in features if name not in carried.values()})
    schema = features.arrow_schema
    schema = schema.with_metadata({**schema.metadata, RUN_KEY: run.encode()})
    stored = whole.select_columns(list(carried)).with_format("arrow")
    media = media_columns(whole)
    reshaped, experts = bool(args.sampling_params().reshaping), Counter[str]()
    ends = cache(lambda stage: sampler_of(stage).stop_token_ids if args.stop else None)
    drawn_by = cache(lambda stage: provenance_columns(sampler_of(stage), args))
    with pq.ParquetWriter(file, schema) as writer:
        for chunk in batched(enumerate(problems.read()), 100 if media else 1000):
            solved, rows = [], []
            for i, problem in chunk:
                outcome = outcome_of(i)
                if outcome is None:
                    continue
                if problem.demonstration is None and outcome.source == Source.EXPERT:
                    unsolved.append(_unsolved(problem, problems))
                    continue
                candidates = _candidates(problem, outcome, args, partial(_kept, problem, journal=journal, ends=ends))
                for number, (candidate, kept) in enumerate(candidates):
                    solved.append(i)
                    # Drawn from a reshaped distribution, a token's log μ is not the model's log-prob: better none than
                    # a wrong one.
                    log_probs = {"behavior_log_probs": []} if reshaped else {}
                    shown = problem
                    if candidate.source == Source.GUIDED and candidate.reference >= 0:
                        shown = replace(problem, demonstration=journal.read(candidate.reference)["text"])
                    row = _row(shown, candidate, problems, kept) | drawn_by(candidate.stage) | log_probs
                    row |= {"initial_log_prob": kept["initial_log_prob"], "candidate": number}
                    rows.append({name: row[name] for name in ours})
                    written[str(candidate.source)] += 1
                    if candidate.source == Source.GUIDED and not number:
                        reference = clean_reference(shown.demonstration or "")
                        shared, own = copied_ngrams(kept["text"], reference)
                        copied[candidate.stage].update(copied=shared, ngrams=own)
            if not rows:
                continue
            experts.update(
                how for row in rows if row["source"] == Source.EXPERT for how in _put(row, args.expert_format)
            )
            table = Dataset.from_list(rows, features=ours).data.table
            there = stored[chunk[0][0] : chunk[-1][0] + 1].take([i - chunk[0][0] for i in solved])
            for name, column in zip(carried.values(), there.columns, strict=True):
                table = table.append_column(name, column)
            table = pa.Table.from_arrays(table.columns, schema=schema)
            writer.write_table(embed_table_storage(table) if media else table)
    return Written(
        unsolved, {how: experts[how] for how in ("boxed", "marks_removed", "not_as_asked")}, copied, written
    )


def _candidates(
    problem: Problem, outcome: Outcome, args: RewriteConfig, kept: Callable[[Outcome], dict]
) -> list[tuple[Outcome, dict]]:
    """What becomes a row each: the outcome; of a run that keeps all, what of its others has another normal form."""
    if args.keep == "one":
        return [(outcome, kept(outcome))]
    outcomes, others = (
        [],
        [o for o in (outcome, *outcome.others) if o.source != Source.EXPERT or problem.demonstration],
    )
    seen: set[tuple] = set()
    for each in others:
        form = normal_form((content := kept(each))["text"])
        if form not in seen and (not args.max_per_problem or len(outcomes) < args.max_per_problem):
            outcomes.append((each, content))
            seen.add(form)
    if args.keep_demonstration and problem.demonstration and all(o.source != Source.EXPERT for o, _ in outcomes):
        expert = Outcome(Source.EXPERT, self_sampled=outcome.self_sampled, self_correct=outcome.self_correct)
        outcomes.append((expert, kept(expert)))
    return outcomes


def _rare_sampling(args: RewriteConfig) -> dict[str, float]:
    """The settings for which a log-prob of the model is not log μ and that have a column only where they are used."""
    return {name: value for name, value in args.sampling_params().reshaping.items() if name in LATER}


def provenance_columns(sampler: Sampler, args: RewriteConfig) -> dict:
    """The columns that say who drew a completion, and how."""
    drawn_by: dict[str, Any] = {"model": public_name(sampler.name), "model_revision": sampler.revision}
    drawn_by |= {name: getattr(args, name) for name in ("temperature", "top_p", "top_k")}
    drawn_by |= _rare_sampling(args)
    return drawn_by | ({"chat_template_kwargs": args.chat_template_kwargs} if args.chat_template_kwargs else {})


def _kept(problem: Problem, outcome: Outcome, journal: JournalReader, ends: Callable[[str], list[int] | None]) -> dict:
    """
    Text, token ids and log-probs of the completion that a row holds, and its `initial_log_prob`: an attempt's, or the
    demonstration, which has none. `ends` gives the ids that end a turn in a stage, where a run has stop texts.
    """
    kept: dict[str, Any] = {"text": problem.demonstration, "completion_ids": [], "behavior_log_probs": []}
    if outcome.source == Source.EXPERT:
        score = journal.read(outcome.offset) if outcome.offset >= 0 else {}
        return {**kept, "initial_log_prob": score.get("initial_log_prob")}
    attempt = {"id": problem.id, "stage": outcome.stage, "attempt": outcome.attempt, "verdict": Verdict.CORRECT}
    kept = journal.read(outcome.offset, attempt, kept)
    own = sum(kept["behavior_log_probs"]) if outcome.source == Source.SELF and kept["behavior_log_probs"] else None
    kept = {"initial_log_prob": own, "completion_ids": [], "behavior_log_probs": [], **kept}
    ending = ends(outcome.stage)
    if ending is not None and kept["completion_ids"] and kept["completion_ids"][-1] not in ending:
        # It ended with a stop text, which is no end of turn: trained on as text, to which the chat template adds one.
        kept = {**kept, "completion_ids": [], "behavior_log_probs": []}
    return kept


def _unsolved(problem: Problem, problems: Problems) -> dict:
    """A line of `unsolved.jsonl`, with all that its attempts were asked with."""
    asked = {"tools": problem.row.get("tools"), "chat_template_kwargs": problem.row.get("chat_template_kwargs")}
    asked["chat_template_kwargs"] = problems.args.chat_template_kwargs or asked["chat_template_kwargs"]
    line = {"id": problem.id, "problem": problem.problem, "answer": problem.answer}
    return line | {"prompt": problems.prompt(problem, Source.SELF)} | {k: v for k, v in asked.items() if v}


def _row(problem: Problem, outcome: Outcome, problems: Problems, kept: dict) -> dict:
    prompt, guided = problems.prompt(problem, Source.SELF), outcome.source == Source.GUIDED
    return {
        "prompt": prompt,
        "completion": as_completion(prompt, storable(kept["text"])),  # an old journal's
        "id": problem.id,
        "source": str(outcome.source),
        "answer": problem.answer,
        **{name: getattr(outcome, name) for name in ("num_sampled", "num_correct", "self_sampled", "self_correct")},
        "completion_ids": kept["completion_ids"],
        "behavior_log_probs": kept["behavior_log_probs"],
        "behavior_prompt": problems.prompt(problem, outcome.stage) if guided else prompt[:0],
        "hint_beta": problems.args.hint_beta if guided and problems.args.hinted else None,
    }


def _put(row: dict, expert_format: str) -> list[str]:
    """
    Puts the demonstration in an `expert` row into the form that its prompt asks for, if that is wanted; returns what
    is to be said of it.
    """
    if not asks_for_box(row["prompt"]):
        return []
    (given,) = contents(row["completion"])
    put = in_asked_form(given, row["answer"]) if expert_format == "boxed" else given
    row["completion"] = as_completion(row["prompt"], put)
    changes = {
        "boxed": has_box(put) and not has_box(given),
        "marks_removed": CALCULATOR_MARK.search(given) and not CALCULATOR_MARK.search(put),
        "not_as_asked": not has_box(put),
    }
    return [how for how, so in changes.items() if so]


def load_rows(file: Path):
    """What was written, as a `datasets.Dataset`."""
    import pyarrow.parquet as pq
    from datasets import Dataset, load_dataset
    from pyarrow.dataset import ParquetFragmentScanOptions

    if pq.read_metadata(file).num_rows == 0:  # more shards than rows; `load_dataset` refuses a file without any
        return Dataset(pq.read_table(file))
    # Reading ahead is no faster here and takes twice the memory.
    scan = ParquetFragmentScanOptions(pre_buffer=False)
    return load_dataset("parquet", data_files=glob.escape(str(file)), split="train", fragment_scan_options=scan)
