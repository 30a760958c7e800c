"""What a run keeps in memory of its rows and of the attempts in its journal."""

import gc
import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

import numpy as np

from ..data.rows import (
    Problem,
    Rejection,
    Source,
    Verdict,
    copy_id,
    number_copies,
    reference_digest,
    source_of,
    split_id,
)
from ..data.whole_file import partial_file
from ..sampling.sampler import FAILED
from .journal import Result, initial_mean


class RunMemory:
    """
    The ids of a run's rows, and how the attempts ended that are in its journal already.

    Why it exists: as Python objects, a million rows and their attempts would take gigabytes, and the garbage collector
    would walk over them again and again. Here a row takes 16 bytes and an attempt 50, in arrays that nobody outside
    sees; they are looked up some hundred rows at a time, since one search costs as much as a hundred. What reading all
    rows has told is kept in a file beside the journal, so that a resume does not read them. That is how it has a
    million attempts again after some 12 seconds (`benchmarks/scale.py`).

    Attributes:
        digest (`str`): Of all rows, in their order.
        marked (`list[int]`), tokens (`list[str]`): Numbers of the rows with control tokens in their texts, and which
            tokens these are.
        num_known (`int`): Attempts in the journal, after [`recall`].
    """

    # The content id, the how-manieth row with it this is, and the digest of its demonstration.
    _KEY = [("id", "<u8"), ("copy", "<u4"), ("reference", "<u4")]
    _RECORD = struct.Struct("<QIBHBBIdqIB")
    _TYPES = [("id", "<u8"), ("copy", "<u4"), ("stage", "u1"), ("attempt", "<u2"), ("verdict", "u1"), ("finish_reason", "u1"),
              ("num_tokens", "<u4"), ("initial_mean", "<f8"), ("offset", "<i8"), ("reference", "<u4"), ("rejected", "u1")]  # fmt: skip
    _VERDICTS = list(Verdict)
    _FINISH_REASONS = ["stop", "length"]
    _REJECTIONS = ["", *Rejection]

    def __init__(self, keys: np.ndarray, digest: str, marked: list[int], tokens: list[str]):
        self._keys, self.digest, self.marked, self.tokens = keys, digest, marked, tokens
        self.num_known = 0

    @classmethod
    def of(cls, rows: Iterable[tuple[Problem, set[str]]]) -> "RunMemory":
        """Of each row its problem, and the control tokens in its texts."""
        digest, marked, tokens = hashlib.blake2b(digest_size=16), [], set()

        def key_of(row: tuple[Problem, set[str]]) -> tuple[int, int, int]:
            problem, held = row
            digest.update(f"{problem.id}{problem.demonstration}".encode(errors="surrogatepass"))
            marked.append(bool(held))
            tokens.update(held)
            return int(problem.id, 16), 1, reference_digest(problem.demonstration)

        keys = np.fromiter(map(key_of, rows), dtype=cls._KEY)
        keys["copy"] = number_copies(keys["id"])
        return cls(keys, digest.hexdigest(), np.flatnonzero(marked).tolist(), sorted(tokens))

    @classmethod
    def load(cls, file: Path, made_from: str | None = None) -> "RunMemory | None":
        """
        What [`save`] has kept, if it was `made_from` this (by default from whatever it was); `None` if there is
        nothing such. It is a cache, which is made again if it is damaged, whatever that raises.
        """
        with suppress(Exception), np.load(file) as kept:
            if made_from is None or kept["key"] == made_from:
                return cls(kept["keys"], str(kept["digest"]), kept["marked"].tolist(), kept["tokens"].tolist())
        return None

    def save(self, file: Path, made_from: str) -> None:
        """Keeps what is known of the rows; `made_from` says on what it depends."""
        with partial_file(file) as partial:
            with partial.open("wb") as whole:
                marked, tokens = np.array(self.marked, dtype=int), np.array(self.tokens, dtype=str)
                np.savez_compressed(
                    whole, key=made_from, keys=self._keys, digest=self.digest, marked=marked, tokens=tokens
                )
            partial.replace(file)

    def __len__(self) -> int:
        return len(self._keys)

    def select(self, rows: slice | np.ndarray) -> "RunMemory":
        """That of these rows; of their attempts nothing is known yet."""
        return RunMemory(self._keys[rows], self.digest, self.marked, self.tokens)

    def ids(self, first: int = 0, count: int | None = None) -> list[str]:
        """The ids of so many rows from the `first` one on."""
        return [copy_id(*key) for key in self._keys[["id", "copy"]][first:][:count].tolist()]

    def copies(self, first: int = 0, count: int | None = None) -> Sequence[int]:
        """Of each of these rows, the how-manieth with its content id it is ([`~data.rows.number_copies`])."""
        return self._keys["copy"][first:][:count]  # type: ignore[return-value]  # an array is one

    # ---- attempts ----

    def recall(self, entries: Iterable[tuple[int, dict]], stages: list[str]) -> None:
        """
        Takes the `entries` of the journal of a run with these stages, each with its offset. Not known are attempts
        that failed, and guided ones whose reference was another than the row's demonstration is now: where they matter
        they are drawn again. Where teachers come first, they may have retold a teacher's solution: the scheduler knows.
        Of two lines for the same attempt, the later one wins.
        """
        order = [source_of(stage) for stage in stages]
        self._of_any_reference = (
            Source.GUIDED in order[order.index(Source.TEACHER) :] if Source.TEACHER in order else False
        )
        self._stages, packed = [*stages, str(Source.EXPERT)], bytearray()
        stage, verdict, finish_reason, rejected = (
            {name: i for i, name in enumerate(names)}
            for names in (self._stages, self._VERDICTS, self._FINISH_REASONS, self._REJECTIONS)
        )
        for offset, e in entries:  # as they are: a million `Attempt`s take some seconds to make
            if e["finish_reason"] in FAILED:
                continue
            mean = initial_mean(e["stage"], e["log_prob"], e.get("initial_log_prob"), e.get("initial_tokens", 0))
            packed += self._RECORD.pack(
                *split_id(e["id"]), stage[e["stage"]], e["attempt"], verdict[e["verdict"]], finish_reason[e["finish_reason"]],
                e["num_tokens"], mean, offset, e.get("reference", 0), rejected[e.get("rejected", "")],
            )  # fmt: skip
        table = np.frombuffer(packed, self._TYPES)
        self._attempts = table[np.argsort(table["id"], kind="stable")]
        self._attempt_ids = np.ascontiguousarray(self._attempts["id"])
        self.num_known = len(self._attempt_ids)

    @property
    def unscored(self) -> bool:
        """Whether a known attempt that may be kept has no `initial_mean`, though its stage is not `self`."""
        accepted = (self._attempts["verdict"] == self._VERDICTS.index(Verdict.CORRECT)) & (
            self._attempts["rejected"] == 0
        )
        unknown = np.isnan(self._attempts["initial_mean"]) & accepted
        return any(self._stages[stage] != Source.SELF for stage in np.unique(self._attempts["stage"][unknown]))

    def known(self, first: int, count: int) -> list[dict[str, dict[int, Result]]]:
        """How the known attempts at each of so many rows from the `first` one on ended, by stage and number."""
        keys = self._keys[first:][:count]
        begin, end = (np.searchsorted(self._attempt_ids, keys["id"], side) for side in ("left", "right"))
        sizes = end - begin
        # The places of all of them in the table, one problem's after another's: one `tolist`, which is what takes the
        # time.
        places = np.repeat(end - sizes.cumsum(), sizes) + np.arange(sizes.sum())
        rows = iter(self._attempts[places].tolist())
        numbers = zip(sizes.tolist(), keys["copy"].tolist(), keys["reference"].tolist(), strict=True)
        return [self._known(islice(rows, n), copy, (0, reference)) for n, copy, reference in numbers]

    def _known(self, rows: Iterable[tuple], copy: int, references: tuple[int, int]) -> dict[str, dict[int, Result]]:
        found: dict[str, dict[int, Result]] = {}
        for _, of, stage, attempt, verdict, reason, num_tokens, mean, offset, reference, rejected in rows:
            if of == copy and (reference in references or self._of_any_reference):
                names = self._VERDICTS[verdict], self._FINISH_REASONS[reason]
                other = reference if reference not in references else 0
                result = Result(offset, *names, num_tokens, mean, self._REJECTIONS[rejected], other)
                found.setdefault(self._stages[stage], {})[attempt] = result
        return found

    @staticmethod
    @contextmanager
    def frozen_heap() -> Iterator[None]:
        """
        Else the collector walks over all that torch and the engine hold again and again: a sixth of a resume's time.
        """
        ours = gc.get_freeze_count() == 0  # vLLM freezes the heap too; then it is not ours to unfreeze
        if ours:
            gc.freeze()
        try:
            yield
        finally:
            if ours:
                gc.unfreeze()
