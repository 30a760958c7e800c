"""A file that is read while it is written, or after its writer was killed, is the old one or the new one."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """
    A name beside `path` that nobody else writes to; whoever has written it moves it to its place, or it is gone with
    the block.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def link_or_copy(file: Path, to: Path) -> None:
    """Puts a file at another place too, without copying it where the file system can do that."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)


def write_whole(path: Path | str, text: str) -> None:
    """
    Writes `text` (UTF-8; what has none becomes `?`) to a file that takes the place of `path` when all of it is there.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with partial_file(Path(path)) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")
        partial.replace(path)
