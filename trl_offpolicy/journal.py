"""An append-only record of attempts, one JSON line each: what a crash cannot lose and a resume starts from.

The first line is the configuration that made the attempts. A line is written whole, in one `write` to a file opened for
appending, so a killed process leaves at most a torn last line, which the next opening cuts off (its attempt is simply
drawn again, from the same seed). Lines are never changed; a later one for the same key wins.
"""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from tqdm.auto import tqdm


class Journal:
    """
    The journal at `path`, created if it is missing.

    Args:
        path (`Path`): The JSONL file.
        config (`dict`): What the attempts depend on; compared with the file's first line.
        overwrite (`bool`, *optional*, defaults to `False`): Empty the file if it holds the attempts of another configuration. The same
            configuration is resumed all the same, so a command with this flag can be interrupted and run again.

    Raises:
        ValueError: The file holds the attempts of another configuration (names each field that differs), a line in its middle is
            damaged, or another process is writing to it.
    """

    def __init__(self, path: Path, config: dict, overwrite: bool = False):
        self.path, self._reader = Path(path), None
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            self._lock()
            self._cut_torn_line()
            self._check(config, overwrite)
        except BaseException:
            os.close(self._file)  # or its lock would outlive the error
            raise
        if not self.path.stat().st_size:
            self.append({"config": config})

    def append(self, entry: dict) -> int:
        """Writes one entry and returns the byte offset at which it can be read back."""
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        written = os.write(self._file, line)
        if written != len(line):
            raise OSError(
                f"Only {written} of {len(line)} bytes went into {self.path}. Is the disk full? Make room and run again to resume."
            )
        return os.lseek(self._file, 0, os.SEEK_CUR) - len(line)

    def entries(self, until: str | None = None) -> Iterator[tuple[int, dict]]:
        """What [`read_entries`] finds in the file."""
        return read_entries(self.path, until)

    def read(self, offset: int) -> dict:
        """The entry that `append` or `entries` gave this offset for."""
        if self._reader is None:
            self._reader = self.path.open("rb")
        self._reader.seek(offset)
        return json.loads(self._reader.readline())

    def sync(self) -> None:
        """Asks the disk to keep what was written, power cut or not (a killed process loses nothing without it)."""
        os.fsync(self._file)

    def close(self) -> None:
        self.sync()
        os.close(self._file)
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _check(self, config: dict, overwrite: bool) -> None:
        differing = differences(read_header(self.path), config)
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


def read_entries(path: Path, until: str | None = None) -> Iterator[tuple[int, dict]]:
    """
    (offset, entry) of every whole line after the first, in the order written; also of a journal that is being written to.

    With `until`, only an entry's fields before that one, which must not be its first: what follows is not parsed, so texts and
    token ids, nine tenths of a line and more, cost next to nothing.
    """
    mark = None if until is None else f',"{until}":'.encode()
    size, number = path.stat().st_size, 1
    lines: list[bytes] = []  # not parsed yet
    offsets: list[int] = []
    with (
        path.open("rb") as file,
        tqdm(total=size, unit="B", unit_scale=True, desc="reading the journal", disable=size < 1 << 24) as bar,
    ):
        offset = len(file.readline())
        for line in file:
            if not line.endswith(b"\n"):
                break  # torn by a crash, or just being written
            number += 1
            end = -1 if mark is None else line.find(mark)
            whole = end < 0 or not line.endswith(b"}\n")  # a damaged line is parsed in full, to say what is wrong
            lines.append(line if whole else line[:end] + b"}")
            offsets.append(offset)
            offset += len(line)
            if len(lines) == 256:
                yield from zip(offsets, _parse(path, lines, number), strict=True)
                lines, offsets = [], []
                bar.update(offset - bar.n)
        yield from zip(offsets, _parse(path, lines, number), strict=True)


def read_header(path: Path) -> dict | None:
    """The configuration in the first line of the journal at `path`; `None` if it has no whole line yet."""
    with Path(path).open("rb") as file:
        first = file.readline()
    return _parse(path, [first], 1)[0].get("config", {}) if first.endswith(b"\n") else None


def differences(found: dict | None, config: dict) -> str:
    """Each field in which two configurations differ, in words; empty if none does, or there is nothing to compare with."""
    config = json.loads(json.dumps(config))
    differing = [k for k in {**found, **config} if found.get(k) != config.get(k)] if found is not None else []
    return "; ".join(f"`{k}` was {found.get(k)!r:.300} there and is {config.get(k)!r:.300} now" for k in differing)


def lock(handle: int, how: int) -> None:
    """`flock`, which the kernel lets go of when the process ends, however it ends; nothing on file systems without locks."""
    try:
        fcntl.flock(handle, how)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def _parse(path: Path, lines: list[bytes], number: int) -> list[dict]:
    """The entries in these lines, of which the last is the `number`-th of the file."""
    with contextlib.suppress(ValueError):
        # All at once takes two thirds of the time; a damaged line is found by itself, below.
        entries = json.loads(b"[" + b",".join(lines) + b"]")
        if len(entries) == len(lines):
            return entries
    entries = []
    for n, line in enumerate(lines, number - len(lines) + 1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"Line {n} of {path} is not JSON ({error}): the file was changed or damaged. Remove that line to draw its "
                "attempt again; nothing else depends on it."
            ) from error
    return entries
