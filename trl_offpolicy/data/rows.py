"""The row: what goes into a rewrite, what comes out, and how each input format is read.

An output row, ready for `SFTTrainer` (`completion_ids` and `behavior_log_probs` are empty for `expert` rows):

    {"prompt": [{"role": "user", "content": "2+2?"}], "completion": [{"role": "assistant", "content": "\\boxed{4}"}],
     "id": "9f86d081884c7d65", "source": "self", "answer": "4", "num_sampled": 2, "num_correct": 1,
     "self_sampled": 2, "self_correct": 1, "completion_ids": [76, 123, 19, 125, 2], "behavior_log_probs": [-0.1, -0.0,
     -0.3, -0.0, -0.0], "model": "me/policy", "model_revision": "a1b2c3", "temperature": 1.0, "top_p": 1.0, "top_k": 0,
     "behavior_prompt": []}

Rows whose `prompt` was a plain text have plain texts in `prompt`, `completion` and `behavior_prompt`, so that sampling
and training see the same text without a chat template. `behavior_prompt` is what the sampler was asked where that is
not `prompt`: in guided rows, with the reference in it. `num_sampled` and `num_correct` are of the stage that gave the
row (0 in `expert` rows), `self_sampled` and `self_correct` of the stage `self` in every row.
"""

import hashlib
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from json.encoder import encode_basestring_ascii as _quote
from typing import Any


class Source(StrEnum):
    """Where a row's completion comes from ("Mind the Gap", section 3.2, and other models)."""

    SELF = "self"
    GUIDED = "guided"
    EXPERT = "expert"
    TEACHER = "teacher"
    REPLAY = "replay"  # the policy's answer to a general prompt, beside a run's rows


def source_of(stage: str) -> Source:
    """The source of the rows that a stage gives: of `guided:answer`, which shows a hint, and `teacher:big` the first word."""
    return Source(stage.partition(":")[0])


def sources_of(stages: Iterable[str]) -> list[Source]:
    """The sources that the rows of a run with these stages may have; teachers only where there are some."""
    used = {Source.SELF, Source.GUIDED, Source.EXPERT, *map(source_of, stages)}
    return [source for source in Source if source in used]


class Verdict(StrEnum):
    """What a verifier says of one completion; only `wrong` says that the model was wrong."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSABLE = "unparsable"
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Problem:
    """One input row, whatever format it came in."""

    id: str
    prompt: list[dict[str, str]] | str  # a plain text stays one, and no chat template renders it
    problem: str
    demonstration: str | None  # `None` where the dataset has none at all
    answer: str | None
    row: dict[str, Any]  # its columns that were read, by their own names; under `answer` the gold answer as it came


def content_id(prompt: list[dict[str, str]], answer: str | None) -> str:
    """16 hex digits that depend on the problem and its gold answer only, never on a row's position."""
    # The text that json.dumps([[[role, content], ...], answer]) would write, built by hand because that is several
    # times faster.
    turns = ", ".join(f"[{_quote(m['role'])}, {_quote(m['content'])}]" for m in prompt)
    content = f"[[{turns}], {_quote(answer or '')}]"
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def numbered(indices: Sequence[int], total: int) -> str:
    """`3 of 40 rows (5, 7, 12; counted from 0) have`: how many rows something is said of, and which."""
    shown = ", ".join(map(str, indices[:10])) + (f" and {len(indices) - 10:,} more" if len(indices) > 10 else "")
    return f"{len(indices):,} of {total:,} rows ({shown}; counted from 0) have"


def reference_digest(demonstration: str | None) -> int:
    """By which an attempt in the journal is known to have had this demonstration in its prompt; above 0."""
    return zlib.crc32((demonstration or "").encode(errors="surrogatepass")) or 1


def copy_id(content: int, copy: int) -> str:
    """The `id` of the `copy`-th row with this content id (as a number)."""
    return f"{content:016x}" if copy == 1 else f"{content:016x}-{copy}"


def split_id(row_id: str) -> tuple[int, int]:
    """What [`copy_id`] made it of."""
    digest, _, copy = row_id.partition("-")
    return int(digest, 16), int(copy or 1)


def number_copies(ids):
    """
    For each content id (as a number), the how-manieth row with it this is: 1, and 2 for the second row with the same
    problem and answer, whose id becomes `<id>-2`. An array of uint32, 4 bytes a row."""
    import numpy as np

    ids = np.asarray(ids, dtype=np.uint64)
    order = ids.argsort(kind="stable")
    ids = ids[order]
    copies = np.ones(len(ids), dtype=np.uint32)
    for i in np.flatnonzero(ids[1:] == ids[:-1]):
        copies[order[i + 1]] = copies[order[i]] + 1
    return copies


def attempt_features():
    """
    `datasets.Features` of the attempts, as the journal has them but for `reference`, which is for a resume; `text` and
    what follows is null where it was not kept."""
    from datasets import Features, List, Value

    return Features(
        {
            "id": Value("string"),
            "stage": Value("string"),
            "attempt": Value("int32"),
            "verdict": Value("string"),
            "finish_reason": Value("string"),
            "num_tokens": Value("int32"),
            "log_prob": Value("float32"),
            "rejected": Value("string"),
            "reason": Value("string"),
            "text": Value("string"),
            "completion_ids": List(Value("int32")),
            "behavior_log_probs": List(Value("float32")),
        }
    )


def storable(text: str) -> str:
    """
    The text with `?` for each half of a surrogate pair, which has no UTF-8: no Parquet file and no page could hold it.
    """
    return text.encode(errors="replace").decode()


def stored(entry: dict) -> dict:
    """A journal's entry with [`storable`] texts, whenever it was written."""
    return {name: storable(value) if isinstance(value, str) else value for name, value in entry.items()}


class Rejection(StrEnum):
    """Why a guided attempt that was verified as correct is not kept."""

    MENTION = "mention"
    CALCULATOR = "calculator"
    STUB = "stub"
    FORM = "form"
    COPY = "copy"
    ARITHMETIC = "arithmetic"


# How the status line, the summary and the card name each of them.
REJECTIONS = {
    Rejection.MENTION: "mention the reference",
    Rejection.CALCULATOR: "copy calculator marks",
    Rejection.STUB: "are stubs",
    Rejection.FORM: "answer in another form than asked",
    Rejection.COPY: "copy the reference",
    Rejection.ARITHMETIC: "have false arithmetic",
}
