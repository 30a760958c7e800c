"""An append-only record of attempts, one JSON line each: what a crash cannot lose and a resume starts from.

[`Attempt`] is a line of a rewrite's journal; an evaluation's has other fields, and both have their texts behind
`reason`.

The first line is the configuration that made the attempts. A line is written whole, in one `write` to a file opened
for appending, so a killed process leaves at most a torn last line, which the next opening cuts off (its attempt is
simply drawn again, from the same seed). Lines are never changed; a later one for the same key wins.

A line's last field is the CRC-32 of all that is before it,
`{"id":"9f86d081884c7d65","stage":"self",…,"crc32":"1b2e9d33"}`, so that what a disk or an editor has made of a line is
never taken for an attempt. Journals written before there were checksums are read and continued: from its first line
with a checksum on, every line of a file has one.
"""

import errno
import fcntl
import json
import os
import re
import shlex
import warnings
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm.auto import tqdm

from ..data.rows import Source, Verdict
from ..sampling.sampler import FAILED


_CHECKSUM = b',"crc32":"%08x"}\n'
_LENGTH = len(_CHECKSUM % 0)
_TEXTS = b',"reason":'  # where a line's texts and token ids begin, nine tenths of it and more


class Result(NamedTuple):
    """
    How an attempt ended; `offset` is its place in the journal, `initial_mean` as of its [`Attempt`] (NaN: not known),
    `rejected` the [`~data.rows.Rejection`] for which it is not kept though it is correct, `reference` as of its attempt
    where that is not the digest of its row's demonstration.
    """

    offset: int
    verdict: str
    finish_reason: str
    num_tokens: int
    initial_mean: float
    rejected: str = ""
    reference: int = 0

    @property
    def accepted(self) -> bool:
        """Whether it is a correct attempt, of which one is kept."""
        return self.verdict == Verdict.CORRECT and not self.rejected


@dataclass(slots=True)
class Attempt:
    """
    One line of a rewrite's journal. Fields that have their default value are not written, and those from `reason` on
    have it as well in an attempt that was read without its texts.
    """

    id: str  # the problem's
    stage: str
    attempt: int  # its number among the problem's in this stage
    verdict: str
    finish_reason: str
    num_tokens: int
    log_prob: float | None  # mean over its tokens, under the prompt that was really used
    # Digest of the reference that its prompt showed, above 0 in the stage `guided`; of a teacher's attempt that may be
    # the reference, of its own text.
    reference: int = 0
    rejected: str = ""  # the `Rejection` for which it is not kept though it is correct
    # log π_0 of its text under the prompt that is trained on, and of how many tokens that is the sum: where candidates
    # are ranked by it, in stages other than `self`, whose `log_prob` is its mean; always with
    # `guided_decoding="hinted"`, whose `log_prob` is that of the mixture.
    initial_log_prob: float | None = None
    initial_tokens: int = 0
    version: int = 0  # optimizer steps that the policy had been trained for when it drew this, in online training
    reason: str | None = None  # of the verdict, or of `rejected`, in words
    text: str | None = None  # this and what follows: not there if it was not to be kept
    completion_ids: list[int] | None = None
    behavior_log_probs: list[float] | None = None

    @classmethod
    def of(cls, entry: dict) -> "Attempt":
        """What a line says, whenever it was written."""
        return cls(**{name: entry[name] for name in cls.__slots__ if name in entry})

    def entry(self) -> dict:
        """The line."""
        return {name: value for name, default in _DEFAULTS if (value := getattr(self, name)) != default}

    def result(self, offset: int) -> Result:
        """What is remembered of it while the run goes on; `offset` is its line's."""
        mean = initial_mean(self.stage, self.log_prob, self.initial_log_prob, self.initial_tokens)
        return Result(offset, self.verdict, self.finish_reason, self.num_tokens, mean, self.rejected, self.reference)


def initial_mean(stage: str, log_prob: float | None, initial_log_prob: float | None, initial_tokens: int) -> float:
    """
    The mean log π_0 per token of an attempt under the prompt that is trained on, from these fields of it; NaN where it
    is not known.
    """
    if stage == Source.SELF:
        return float("nan") if log_prob is None else log_prob
    return float("nan") if initial_log_prob is None or not initial_tokens else initial_log_prob / initial_tokens


_DEFAULTS = [(field.name, field.default) for field in fields(Attempt)]


class JournalReader:
    """The journal at `path`, only read; a run may be writing to it."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._reader: BinaryIO | None = None

    def entries(self, texts: bool = True) -> Iterator[tuple[int, dict]]:
        """What [`read_entries`] finds in the file."""
        return read_entries(self.path, texts)

    def read(self, offset: int, expected: dict | None = None, fields: Iterable[str] = ()) -> dict:
        """
        The entry that `append` or `entries` gave this offset for.

        Raises:
            ValueError: It is damaged, is another one than `expected` (values by field), or lacks one of the `fields`;
                names file and line.
        """
        if self._reader is None:
            self._reader = self.path.open("rb")
        self._reader.seek(offset)
        try:
            line = self._reader.readline()
            entry = json.loads(_content(line, _has_checksum(line)))
            _require(entry, expected or {}, fields)
        except ValueError as error:
            with self.path.open("rb") as file:
                number = 1 + file.read(offset).count(b"\n")
            raise _damaged(self.path, number, error) from error
        return entry

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


class Journal(JournalReader):
    """
    The journal at `path`, created if it is missing.

    Args:
        path (`Path`): The JSONL file.
        config (`dict`): What the attempts depend on; compared with the file's first line.
        overwrite (`bool`, *optional*, defaults to `False`): Empty the file if it holds the attempts of another
            configuration. The same configuration is resumed all the same, so a command with this flag can be
            interrupted and run again.
        free (`Collection[str]`, *optional*): Fields of `config` that may differ; by default how many attempts a
            problem may have ([`differences`]).

    Raises:
        ValueError: The file holds the attempts of another configuration (names each field that differs), its first
            line is damaged and it is not to be overwritten, or another process is writing to it.
    """

    def __init__(
        self, path: Path, config: dict, overwrite: bool = False, free: Collection[str] = ("num_generations",)
    ):
        super().__init__(path)
        if not overwrite and path.exists() and not path.stat().st_size and (path.parent / "metrics.json").exists():
            warnings.warn(
                f"{path} is empty, though a run has finished in {path.parent}: its attempts are lost, and are drawn anew.",
                stacklevel=4,
            )
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            self._lock()
            self._cut_torn_line()
            self._check(config, overwrite, free)
        except BaseException:
            os.close(self._file)  # otherwise the lock would be held after the error
            raise
        if not self.path.stat().st_size:
            self.append({"config": config})

    def append(self, entry: dict) -> int:
        """Writes one entry and returns the byte offset at which it can be read back."""
        content = json.dumps(entry, separators=(",", ":")).encode()[:-1]
        line = content + _CHECKSUM % zlib.crc32(content)
        written = os.write(self._file, line)
        if written != len(line):
            raise OSError(
                errno.ENOSPC,
                f"Only {written} of {len(line)} bytes went in. Is the disk full? Make room and run again to resume",
                str(self.path),
            )
        return os.lseek(self._file, 0, os.SEEK_CUR) - len(line)

    def sync(self) -> None:
        """Asks the disk to keep what was written, power cut or not (a killed process loses nothing without it)."""
        os.fsync(self._file)

    def close(self) -> None:
        self.sync()
        os.close(self._file)
        super().close()

    def _check(self, config: dict, overwrite: bool, free: Collection[str]) -> None:
        try:
            differing = differences(read_header(self.path), config, free)
        except ValueError:
            if not overwrite:
                raise
            differing = "it cannot be read"
        self.overwritten = bool(differing and overwrite)  # whether the attempts of another configuration were here
        if self.overwritten:
            os.ftruncate(self._file, 0)
        elif differing:
            raise ValueError(
                f"{self.path} holds the attempts of another configuration: {differing}. Either choose another `output_dir`, or pass "
                "`overwrite=True` (`--overwrite`) to delete that journal and start again."
            )

    def _lock(self) -> None:
        try:
            lock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"Another process is writing to {self.path}. Wait for it, stop it, or choose another `output_dir`."
            ) from error

    def _cut_torn_line(self) -> None:
        with self.path.open("r+b") as file:
            end = file.seek(0, os.SEEK_END)
            start = end
            while start > 0:  # backwards to the last line end
                step = min(1 << 16, start)
                file.seek(start - step)
                newline = file.read(step).rfind(b"\n")
                if newline >= 0:
                    start = start - step + newline + 1
                    break
                start -= step
            if start < end:
                file.truncate(start)


def read_attempts(path: Path, ids: Collection[str] | None = None, texts: bool = True) -> Iterator[Attempt]:
    """What [`read_entries`] finds in a rewrite's journal of the problems with these `ids`, by default of all."""
    return (Attempt.of(entry) for _, entry in read_entries(path, texts) if ids is None or entry["id"] in ids)


def read_entries(path: Path, texts: bool = True) -> Iterator[tuple[int, dict]]:
    """
    (offset, entry) of every whole line after the first, in the order written; also of a journal that is being written
    to.

    Without `texts`, only an entry's fields before `reason`: what follows is not parsed, so texts and token ids cost
    next to nothing. Their checksum is compared all the same.

    Raises:
        ValueError: A line is damaged; names file and line.
    """
    config = read_header(path)
    if config is None:
        return
    size, number = path.stat().st_size, 1
    with (
        path.open("rb") as file,
        tqdm(total=size, unit="B", unit_scale=True, desc="reading the journal", disable=size < 1 << 24) as bar,
    ):
        header = file.readline()
        offset, checked = len(header), _has_checksum(header)
        torn = False  # by a crash, or just being written: the last line
        while not torn and (lines := file.readlines(1 << 16)):
            if torn := not lines[-1].endswith(b"\n"):
                lines.pop()
            heads, offsets, unchecked = [], [], 0  # how many have no checksum: the first ones
            for line in lines:
                number += 1
                try:
                    checked = _has_checksum(line, checked)
                except ValueError as error:
                    raise _damaged(path, number, error) from error
                # Without a checksum, a line whose end is missing is parsed in full, to say what is wrong.
                end = line.find(_TEXTS) if not texts and (checked or line.endswith(b"}\n")) else -1
                heads.append(line[:end] + b"}" if end >= 0 else _content(line, checked))
                offsets.append(offset)
                offset += len(line)
                unchecked += not checked
            yield from zip(offsets, _parse(path, heads, number, unchecked, config), strict=True)
            bar.update(offset - bar.n)


def read_header(path: Path) -> dict | None:
    """
    The configuration in the first line of the journal at `path`; `None` if it has no whole line yet.

    Raises:
        ValueError: The line is damaged, or holds no configuration.
    """
    with Path(path).open("rb") as file:
        first = file.readline()
    if not first.endswith(b"\n"):
        return None
    try:
        header = json.loads(_content(first, _has_checksum(first)))
        _require(header, {}, ["config"])
        _require(header["config"], {}, [])
    except ValueError as error:
        raise _damaged(path, 1, error) from error
    return header["config"]


def differences(found: dict | None, config: dict, free: Collection[str] = ("num_generations",)) -> str:
    """
    Each field but the `free` ones in which two configurations differ, in words; empty if none does, or there is
    nothing to compare with. Of journals, how many attempts a problem may have is free: each has a seed of its own,
    whatever that number is.
    """
    found, config = json.loads(json.dumps([found, config]))
    fields = [k for k in {**(found or {}), **config} if k not in free]
    differing = [k for k in fields if found.get(k) != config.get(k)] if found is not None else []
    return "; ".join(f"`{k}` was {found.get(k)!r:.300} there and is {config.get(k)!r:.300} now" for k in differing)


def lock(handle: int, how: int) -> None:
    """
    `flock`, which the kernel lets go of when the process ends, however it ends; nothing on file systems without locks.
    """
    try:
        fcntl.flock(handle, how)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


@contextmanager
def alone(file: Path, who: str) -> Iterator[int]:
    """
    Locks a file for the run that works in its directory. Yields its descriptor, which the run's steps are to inherit:
    they keep the lock for as long as they live, so that none is begun a second time beside one that a killed run
    (`kill -9`) has left behind.

    Args:
        file (`Path`): The lock, in the run's directory.
        who (`str`): What is run, for the message.

    Raises:
        ValueError: Another run works there, or a step of one.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    held = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            lock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"Another {who} works in {file.parent}, or a step that a killed one has left behind: "
                f"`pgrep -af {shlex.quote(str(file.parent))}` lists them. Wait for it or end it, then run the same command again."
            ) from error
        yield held
    finally:
        os.close(held)


def _has_checksum(line: bytes, required: bool = False) -> bool:
    """
    Whether a line ends with its checksum; `ValueError` if that is another line's, or there is none though it is
    `required`.
    """
    if not required and b'"crc32":"' not in line[-_LENGTH:]:
        return False
    checksum = _CHECKSUM % zlib.crc32(line[:-_LENGTH])
    if line.endswith(checksum):
        return True
    raise ValueError(f"its checksum is {checksum[10:18].decode()}, but it ends with {line[-_LENGTH:]!r}")


def _content(line: bytes, checked: bool) -> bytes:
    """The JSON of a line, without its checksum if it has one."""
    return line[:-_LENGTH] + b"}" if checked else line


def _parse(path: Path, lines: list[bytes], number: int, unchecked: int, config: dict) -> list[dict]:
    """
    The entries in these lines, of which the last is the `number`-th of the file, and the first `unchecked` have no
    checksum.
    """
    stages = stages if isinstance(stages := config.get("stages"), list) else None
    try:
        # All at once takes two thirds of the time. No text reaches over a line's end: JSON allows none there.
        entries = json.loads(b"[" + b",\n".join(lines) + b"]")
        whole = len(entries) == len(lines) and all(type(entry) is dict and "id" in entry for entry in entries)
        if whole and all(_ATTEMPT.keys() <= e.keys() and not _wrong_fields(e, stages) for e in entries[:unchecked]):
            return entries
    except ValueError:
        pass  # the loop below finds which line is damaged
    entries = []
    for n, line in enumerate(lines, number - len(lines) + 1):
        try:
            entries.append(json.loads(line))
            _require(entries[-1], {}, ["id"] if len(entries) > unchecked else _ATTEMPT)
            if len(entries) <= unchecked and (wrong := _wrong_fields(entries[-1], stages)):
                raise ValueError(", ".join(f"`{name}` is {entries[-1][name]!r:.100}" for name in wrong))
        except ValueError as error:
            raise _damaged(path, n, error) from error
    return entries


def _require(entry, expected: dict, fields: Iterable[str]) -> None:
    """`ValueError` unless an entry has these values and fields."""
    if not isinstance(entry, dict):
        raise ValueError(f"it is {entry!r:.100}")
    if missing := [name for name in (*expected, *fields) if name not in entry]:
        raise ValueError(f"it has no {' and no '.join(missing)}")
    if wrong := [f"`{k}` is {entry[k]!r:.100}, not {v!r:.100}" for k, v in expected.items() if entry[k] != v]:
        raise ValueError(", ".join(wrong))


_ID = re.compile(r"[0-9a-f]{16}(-\d+)?").fullmatch
# What the fields of an attempt may be, by which a line without a checksum is known to be one.
_VERDICTS, _FINISH_REASONS = {str(verdict) for verdict in Verdict}, {"stop", "length", *FAILED}
_ATTEMPT = {
    "id": lambda x: isinstance(x, str) and _ID(x),
    "stage": lambda x: isinstance(x, str),
    "attempt": lambda x: isinstance(x, int) and 0 <= x < 1 << 16,
    "verdict": lambda x: isinstance(x, str) and x in _VERDICTS,
    "finish_reason": lambda x: isinstance(x, str) and x in _FINISH_REASONS,
    "num_tokens": lambda x: isinstance(x, int) and 0 <= x < 1 << 32,
    "log_prob": lambda x: x is None or isinstance(x, float | int),
}


def _wrong_fields(entry: dict, stages: list[str] | None) -> list[str]:
    """
    Fields of an entry that cannot be those of an attempt, made by a run with these `stages` where they are known.
    """
    wrong = [name for name, is_right in _ATTEMPT.items() if not is_right(entry[name])]
    return wrong if stages is None or entry["stage"] in stages else [*wrong, "stage"]


def _damaged(path: Path, number: int, why: object) -> ValueError:
    if number == 1:
        remedy = (
            "It is the configuration of all attempts: put a copy of the file back, or pass `overwrite=True` (`--overwrite`) to delete "
            "this journal and start again."
        )
    else:
        remedy = f"Remove it to have its attempt drawn again, nothing else depends on it: sed -i {number}d {shlex.quote(str(path))}"
    return ValueError(f"Line {number} of {path} was changed or damaged after it was written ({why}). {remedy}")
