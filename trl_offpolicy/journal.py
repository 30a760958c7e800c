"""An append-only record of attempts, one JSON line each: what a crash cannot lose and a resume starts from.

The first line is the configuration that made the attempts. A line is written whole, in one `write` to a file opened for
appending, so a killed process leaves at most a torn last line, which the next opening cuts off (its attempt is simply
drawn again, from the same seed). Lines are never changed; a later one for the same key wins.
"""

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
        self.path = Path(path)
        config = json.loads(json.dumps(config))
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

    def entries(self) -> Iterator[tuple[int, dict]]:
        """(offset, entry) of every line after the first, in the order written."""
        size, number = self.path.stat().st_size, 1
        with (
            self.path.open("rb") as file,
            tqdm(total=size, unit="B", unit_scale=True, desc="reading the journal", disable=size < 1 << 24) as bar,
        ):
            offset = len(file.readline())
            for line in file:
                number += 1
                yield offset, self._parse(line, number)
                offset += len(line)
                bar.update(len(line))

    def read(self, offset: int) -> dict:
        """The entry that `append` or `entries` gave this offset for."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return json.loads(file.readline())

    def sync(self) -> None:
        """Asks the disk to keep what was written, power cut or not (a killed process loses nothing without it)."""
        os.fsync(self._file)

    def close(self) -> None:
        self.sync()
        os.close(self._file)

    def _check(self, config: dict, overwrite: bool) -> None:
        with self.path.open("rb") as file:
            first = file.readline()
        if not first:
            return
        found = self._parse(first, 1).get("config", {})
        differing = [k for k in {**found, **config} if found.get(k) != config.get(k)]
        if differing and overwrite:
            os.ftruncate(self._file, 0)
        elif differing:
            fields = "; ".join(
                f"`{k}` was {found.get(k)!r:.300} there and is {config.get(k)!r:.300} now" for k in differing
            )
            raise ValueError(
                f"{self.path} holds the attempts of another configuration: {fields}. Either choose another `output_dir`, or pass "
                "`overwrite=True` (`--overwrite`) to delete that journal and start again."
            )

    def _lock(self) -> None:
        try:
            fcntl.flock(
                self._file, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # let go by the kernel when the process ends, however it ends
        except BlockingIOError as error:
            raise ValueError(
                f"Another process is writing to {self.path}. Wait for it, stop it, or choose another `output_dir`."
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # file systems without locks
                raise

    def _parse(self, line: bytes, number: int) -> dict:
        try:
            return json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"Line {number} of {self.path} is not JSON ({error}): the file was changed or damaged. Remove that line to draw its "
                "attempt again; nothing else depends on it."
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
