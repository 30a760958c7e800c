"""
Rewriting in parts without a coordinator: which rows a shard does, which files are its own, when the parts make a
whole.

Shard `i/n` does the i-th of n blocks of consecutive rows, so the union in the order of the files is the unsharded
dataset. It has a journal, metrics and a Parquet file of its own, and shares nothing that another shard writes at the
same time. Finished files wait in `dataset.partial`; whichever shard finds all n of the same run there makes `dataset`
of them, so a part of the whole can never be loaded as the whole.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Collection, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .journal import differences, lock, read_header


RUN_KEY = (
    b"trl_offpolicy.run"  # key in a Parquet file's metadata; its value must be the same in the files of all shards
)


@dataclass(frozen=True)
class Shard:
    """Shard `index` of `count`; `0/1` is everything."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        shard = cls(int(match[1]), int(match[2])) if match else None
        if shard is None or not shard.index < shard.count <= 99999:
            raise ValueError(
                f"You passed shard={text!r}; use i/n with i from 0 to n - 1, such as 0/4, 1/4, 2/4 and 3/4 for four machines."
            )
        return shard

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def rows(self, total: int) -> range:
        """The positions of this shard's rows in a dataset of `total`; every position is in exactly one shard."""
        return range(self.index * total // self.count, (self.index + 1) * total // self.count)

    def file(self, output_dir: Path, name: str) -> Path:
        """This shard's own file: `journal.jsonl` of shard 1/4 is `journal-00001-of-00004.jsonl`."""
        stem, suffix = name.split(".")
        return output_dir / (name if self.count == 1 else f"{stem}-{self.index:05d}-of-{self.count:05d}.{suffix}")

    @classmethod
    def of_file(cls, path: Path) -> "Shard":
        """Whose a file is that [`file`] has named."""
        match = re.search(r"-(\d{5})-of-(\d{5})\.", path.name)
        return cls(int(match[1]), int(match[2])) if match else cls()

    @property
    def parquet(self) -> str:
        return f"train-{self.index:05d}-of-{self.count:05d}.parquet"

    def siblings(self) -> Iterable["Shard"]:
        return (Shard(i, self.count) for i in range(self.count))


def journals_in(output_dir: Path) -> list[Path]:
    """The journals of a run, and no copies of them."""
    names = re.compile(r"journal(-\d{5}-of-\d{5})?\.jsonl")
    return sorted(path for path in output_dir.glob("journal*.jsonl") if names.fullmatch(path.name))


def withdraw(output_dir: Path, shard: Shard) -> None:
    """
    Removes the rows that were made from a journal that has been overwritten: they must not be taken for those of the
    next one.
    """
    with publish_lock(output_dir):
        (output_dir / "dataset.partial" / shard.parquet).unlink(missing_ok=True)
        (output_dir / "replay" / shard.parquet).unlink(missing_ok=True)
        for name in ("dataset", "with_replay"):
            shutil.rmtree(output_dir / name, ignore_errors=True)
        (output_dir / "metrics.json").unlink(missing_ok=True)


def check_siblings(
    output_dir: Path, shard: Shard, config: dict, overwrite: bool, free: Collection[str] = ("num_generations",)
) -> None:
    """
    Refuses to join a run whose other shards are of another number or, unless they are to be overwritten too, of
    another configuration (in a field that is not `free`).

    Raises:
        ValueError: Names the file, and each field that differs.
    """
    ours = {s.file(output_dir, "journal.jsonl") for s in shard.siblings()}
    for path in journals_in(output_dir):
        if path not in ours:
            raise ValueError(
                f"{output_dir} holds {path.name}, but you passed shard={str(shard)!r}: the number of shards of a run cannot change. "
                "Choose another `output_dir`, or delete the journals of the other number."
            )
        if overwrite or path == shard.file(output_dir, "journal.jsonl"):
            continue
        if differing := differences(read_header(path), config, free):
            raise ValueError(
                f"{path} is another shard of this run, but of another configuration: {differing}. Give every shard the same one."
            )


def publish(file: Path, output_dir: Path, shard: Shard, run: str) -> list[Shard]:
    """
    Moves a shard's finished Parquet `file` to its place, and all of them to `output_dir/dataset` if it is the last
    one.

    Args:
        file (`Path`): Parquet file whose metadata holds `run` under `RUN_KEY`; it is moved.
        output_dir (`Path`): Run directory.
        shard ([`Shard`]): Whose file it is.
        run (`str`): Digest of configuration and input rows; files of another run are never joined with this one's.

    Returns:
        `list[Shard]`: The shards that are still missing.
    """
    final, partial = output_dir / "dataset", output_dir / "dataset.partial"
    with publish_lock(output_dir):
        if shard.count > 1 and not _missing(final, shard, run):  # a shard that was run once more
            file.replace(final / shard.parquet)
            return []
        partial.mkdir(exist_ok=True)
        file.replace(partial / shard.parquet)
        missing = _missing(partial, shard, run)
        if not missing:
            for stray in set(partial.iterdir()) - {partial / s.parquet for s in shard.siblings()}:
                stray.unlink()  # of a run with another number of shards, whose journals were deleted
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        return missing


def _missing(directory: Path, shard: Shard, run: str) -> list[Shard]:
    import pyarrow.parquet as pq

    def is_there(path: Path) -> bool:
        return path.exists() and (pq.read_schema(path).metadata or {}).get(RUN_KEY) == run.encode()

    return [s for s in shard.siblings() if not is_there(directory / s.parquet)]


@contextmanager
def publish_lock(output_dir: Path):
    """
    Nobody else moves a shard's file meanwhile: those that finish at the same moment take turns, and a killed one lets
    go.
    """
    handle = os.open(output_dir / "dataset.lock", os.O_RDWR | os.O_CREAT, 0o644)  # a file that is never replaced
    try:
        lock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
