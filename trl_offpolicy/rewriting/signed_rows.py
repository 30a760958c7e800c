"""
Rows of what a run has got right and wrong: each attempt of the stage `self` that was judged, with a reward of 1 or -1.

The journal has every attempt with its exact log μ and its verdict. `wrong` is the only verdict that says that the
model was wrong, so only such attempts get -1. Left out, and counted, are those that were `unparsable`, ran into a
`timeout` or an `error`, or were cut at the limit: an answer that was not read, or not yet given, may have been right.
Retellings are left out as well, for their log μ is that of another prompt.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..cards import public_name
from ..data.formats import as_completion, moved
from ..data.loading import batched
from ..data.rows import Source, Verdict, storable
from ..data.whole_file import partial_file
from ..runs.journal import JournalReader, read_entries
from ..runs.run_directory import RunDirectory
from ..runs.shards import Shard
from ..sampling.sampler import FAILED, attempt_seed


REWARDS = {Verdict.CORRECT: 1.0, Verdict.WRONG: -1.0}
# Why attempts are left out, in words; a `Verdict` stands for itself.
LEFT_OUT = {
    Verdict.UNPARSABLE: "without an answer that could be read (unparsable)",
    Verdict.TIMEOUT: "whose verification timed out (timeout)",
    Verdict.ERROR: "whose verification failed (error)",
    "cut": "cut at max_completion_length",
    "without_log_probs": "without log-probs of their tokens",
    "speculative": "drawn on speculation, beyond the one that settled the stage",
    "other_stage": "of another stage than self, drawn under another prompt",
    "without_prompt": "at unsolved problems whose prompt the run has not kept",
    "not_chosen": "not chosen (max_per_problem, positive_share)",
}


class Signed(NamedTuple):
    """An attempt that becomes a row: where it is in which journal, and what was counted of its problem."""

    journal: Path
    offset: int
    attempt: int
    reward: float
    num_sampled: int
    num_correct: int


def write_signed_rows(
    run_dir: str | Path,
    output_dir: str | Path,
    max_per_problem: int | None = None,
    positive_share: float | None = None,
    seed: int = 42,
) -> Counter:
    """
    Writes the judged attempts of a finished run as Parquet, ready for `objective="topr"`.

    A row is that of the run's `dataset/`, with an attempt for its completion, and has `reward` (1 or -1), `attempt`
    (its number), `num_sampled` and `num_correct` (of its problem). A run that stops at the first correct attempt has
    fewer wrong ones of easy problems; `selection="random"` draws all of them, which is the unbiased case.

    Args:
        run_dir (`str` or `Path`): Output directory of a finished rewrite, sampled plainly, that kept rejected
            attempts.
        output_dir (`str` or `Path`): Where the Parquet file goes.
        max_per_problem (`int`, *optional*): At most so many attempts at a problem, drawn at random.
        positive_share (`float`, *optional*): Share of the rows that have the reward 1; of the others, or of them, as
            many are left out at random as it takes.
        seed (`int`, *optional*, defaults to `42`): Of both draws.

    Returns:
        `Counter`: Rows that are `positive` and `negative`, and how many attempts were left out, by [`LEFT_OUT`].

    Raises:
        ValueError: The run is not finished, was not sampled from the model's own distribution or with stop texts, or
            kept no rejected attempts; or nothing is left to be written.
    """
    run = RunDirectory(Path(run_dir).expanduser())
    passed = run.check_self_attempts()
    if run.config.get("stop"):
        raise ValueError(
            f"{passed}, sampled with stop={run.config['stop']}: an attempt that a stop text ended has no end of turn of the model's own, so it has "
            "no ids to train on. Rewrite without `stop`."
        )
    if max_per_problem is not None and max_per_problem < 1:
        raise ValueError(f"You passed max_per_problem={max_per_problem}; it must be at least 1.")
    if positive_share is not None and not 0 < positive_share < 1:
        raise ValueError(f"You passed positive_share={positive_share}; it is a share, above 0 and below 1.")
    counts: Counter = Counter()
    judged = _judged(run, counts)
    chosen = _chosen(judged, max_per_problem, positive_share, seed)
    counts["not_chosen"] = sum(map(len, judged.values())) - sum(map(len, chosen.values()))
    directory = Path(output_dir).expanduser()
    if directory.resolve() in {(run.path / name).resolve() for name in ("", "dataset", "replay", "with_replay")}:
        raise ValueError(
            f"You passed output_dir={str(output_dir)!r}, where the run's own rows are; pass another one, such as {run.path / 'signed'}."
        )
    directory.mkdir(parents=True, exist_ok=True)
    with partial_file(directory / Shard().parquet) as file:
        _write(file, run, chosen, counts)
        if not counts["positive"] + counts["negative"]:
            raise ValueError(
                f"{passed}, none of whose attempts could become a row: {in_words(counts)}. Look at them with `trl-offpolicy report`."
            )
        file.replace(directory / Shard().parquet)
    return counts


def in_words(counts: Counter) -> str:
    """What was left out of the rows that [`write_signed_rows`] counted."""
    return ", ".join(f"{counts[why]:,} {what}" for why, what in LEFT_OUT.items() if counts[why]) or "nothing"


def _judged(run: RunDirectory, counts: Counter) -> dict[str, list[Signed]]:
    """By problem, the attempts that were right or wrong; counts those that are left out."""
    settings, most = run.settings, run.settings["num_generations"]
    drew_all = settings.get("keep", "one") == "all" or "select_across" in run.config
    first = settings["selection"] == "first" and not drew_all
    judged = {}
    for journal, ids in run.ids.items():
        attempts: dict[str, dict[int, tuple[int, dict]]] = {}
        for offset, entry in read_entries(journal, texts=False):
            if entry["finish_reason"] in FAILED or (ids is not None and entry["id"] not in ids):
                continue
            if entry["stage"] == Source.SELF:  # of two lines for the same attempt, the later one wins
                attempts.setdefault(entry["id"], {})[entry["attempt"]] = offset, entry
            elif entry["stage"] != Source.EXPERT:  # the score of a demonstration is no attempt
                counts["other_stage"] += 1
        for row_id, drawn in attempts.items():
            right = [k for k in drawn if drawn[k][1]["verdict"] == Verdict.CORRECT]
            # What was drawn beyond these on speculation depends on the engine's speed, and on the attempts' lengths.
            settled_by = min([most - 1, *right]) if first else most - 1
            needed = {k: drawn[k] for k in sorted(drawn) if k <= settled_by}
            counts["speculative"] += len(drawn) - len(needed)
            numbers = len(needed), sum(k in needed for k in right)
            judged[row_id] = [
                Signed(journal, offset, k, REWARDS[entry["verdict"]], *numbers)
                for k, (offset, entry) in needed.items()
                if not _leaves_out(entry, counts)
            ]
    return judged


def _leaves_out(entry: dict, counts: Counter) -> bool:
    """Whether an attempt can be no row, and counts why."""
    cut = entry["finish_reason"] == "length"
    why = "cut" if cut else "without_log_probs" if entry["log_prob"] is None else entry["verdict"]
    counts[why] += why not in REWARDS
    return why not in REWARDS


def _chosen(
    judged: dict[str, list[Signed]], max_per_problem: int | None, positive_share: float | None, seed: int
) -> dict[str, list[Signed]]:
    """Those of each problem that are drawn; they depend on the seed and on what was judged, not on any order."""
    chosen = {
        row_id: sorted(attempts, key=lambda a: attempt_seed(seed, row_id, "max_per_problem", a.attempt))[
            :max_per_problem
        ]
        for row_id, attempts in judged.items()
    }
    if positive_share is not None:
        drawn = sorted(
            (attempt_seed(seed, row_id, "positive_share", a.attempt), row_id, a.attempt, a.reward)
            for row_id, attempts in chosen.items()
            for a in attempts
        )
        signs = {sign: [x[1:3] for x in drawn if x[3] == sign] for sign in (1.0, -1.0)}
        positive, negative = map(len, signs.values())
        most = {
            1.0: round(negative * positive_share / (1 - positive_share)),
            -1.0: round(positive * (1 - positive_share) / positive_share),
        }
        kept = {key for sign, keys in signs.items() for key in keys[: most[sign]]}
        chosen = {row_id: [a for a in of if (row_id, a.attempt) in kept] for row_id, of in chosen.items()}
    return {row_id: sorted(of, key=lambda a: a.attempt) for row_id, of in chosen.items() if of}


def _write(file: Path, run: RunDirectory, chosen: dict[str, list[Signed]], counts: Counter) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, Value

    stored = Features.from_arrow_schema(run.rows().schema)
    names = moved((name for name in stored if name not in OF_ANOTHER_COMPLETION), {"reward", "attempt"})
    features = {new: stored[name] for name, new in names.items()}
    schema = Features({**features, "reward": Value("float32"), "attempt": Value("int32")}).arrow_schema
    ours = {"model": public_name(run.config["model"]), "model_revision": run.config["model_revision"]}
    readers = {journal: JournalReader(journal) for journal in run.journals}
    left = dict(chosen)

    def rows() -> Iterator[dict]:
        for row in _problems(run, left):
            kept = {new: row.get(name) for name, new in names.items()}
            for signed in left.pop(row["id"]):
                counts["positive" if signed.reward > 0 else "negative"] += 1
                yield {**kept, **ours, **_attempt(row, signed, readers[signed.journal])}

    try:
        with pq.ParquetWriter(file, schema) as writer:
            for chunk in batched(rows(), 1000):
                writer.write_table(pa.Table.from_pylist(chunk, schema))
    finally:
        for reader in readers.values():
            reader.close()
    counts["without_prompt"] = sum(map(len, left.values()))


# Columns of a run's rows that say something of the completion that is replaced.
OF_ANOTHER_COMPLETION = ("candidate", "initial_log_prob", "hint_beta")


def _problems(run: RunDirectory, wanted: dict) -> Iterator[dict]:
    """
    The run's row of each problem that is wanted, once, in their order; then the unsolved ones, which have no row.
    """
    for batch in run.rows().to_batches():
        for i, row_id in enumerate(batch["id"].to_pylist()):
            if row_id in wanted:
                yield from batch.slice(i, 1).to_pylist()
    for row in run.unsolved():
        if row["id"] in wanted and "prompt" in row:
            yield row


def _attempt(row: dict, signed: Signed, journal: JournalReader) -> dict:
    """The columns in which an attempt's row differs from that of its problem."""
    expected = {"id": row["id"], "stage": Source.SELF, "attempt": signed.attempt}
    entry, prompt = journal.read(signed.offset, expected), row["prompt"]
    if not entry.get("completion_ids"):
        raise ValueError(
            f"{journal.path} has not kept the token ids of attempt {signed.attempt} at {row['id']}, which was rejected: the run was made with "
            "keep_rejected=False. Rewrite with keep_rejected=True, into another output_dir."
        )
    return {
        "completion": as_completion(prompt, storable(entry["text"])),
        "source": str(Source.SELF),
        **dict.fromkeys(("num_sampled", "self_sampled"), signed.num_sampled),
        **dict.fromkeys(("num_correct", "self_correct"), signed.num_correct),
        "completion_ids": entry["completion_ids"],
        "behavior_log_probs": entry["behavior_log_probs"],
        "behavior_prompt": prompt[:0],
        "reward": signed.reward,
        "attempt": signed.attempt,
    }
