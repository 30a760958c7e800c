"""Files read as their authors wrote them: a string is a string, and a cell of a CSV is its text.

`datasets` guesses at more: in JSON, strings that look like dates become timestamps (`2015-03-01` comes out as
`2015-03-01 00:00:00`); in a CSV, one empty cell makes `7` and `007` into `7.0`, and `NA`, `None` or `null` into
nothing. Its builders are used for all but the parsing (finding files, caching as Arrow, splits, streaming), a few
megabytes of a file at a time.
"""

import json
import re
from collections.abc import Iterator
from types import MethodType
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.json
from datasets import Features, Json, load_dataset_builder
from datasets.builder import Key
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json as JsonFiles
from datasets.utils.file_utils import xopen
from datasets.utils.json import find_mixed_struct_types_field_paths


BATCH = 8 << 20  # bytes of lines that are parsed at a time
# An integer from about 2**53 on (or a text with one): read as a float, which a column with one float makes of it, it
# may become another.
_LONG_INTEGER = re.compile(rb"[\s:,\[]-?\d{16,}[\s,\]}]")
# These options also change the cache key of `datasets`, so that our Arrow files are kept apart from those of a plain
# `load_dataset`.
_OPTIONS: dict[type, dict[str, Any]] = {
    JsonFiles: {"chunksize": BATCH, "parse_agent_traces": False},
    Csv: {"keep_default_na": False, "na_values": [""]},
}


def load_text_dataset(path: str, split: str, streaming: bool = False, **where):
    """
    `datasets.load_dataset(path, split=split, …)`, with the texts of JSON and CSV files as they are written there.

    Args:
        where: `name`, `data_files`, `revision`, as for `load_dataset`.

    Raises:
        ValueError: A file cannot be read (names it, and the line), there are no rows, or there is no such split. With
            `streaming`, what is wrong behind the first rows is raised where they are read.
    """
    name = where.get("data_files") or path
    try:
        builder = load_dataset_builder(path, **where)
    except RuntimeError as error:  # a folder or repository that holds a loading script
        raise ValueError(f"{path!r} cannot be loaded: {error}") from error
    for kind, tables in ((JsonFiles, _json_tables), (Csv, _csv_tables)):
        if isinstance(builder, kind):
            builder = load_dataset_builder(path, **where, **_OPTIONS[kind])
            builder._generate_tables = MethodType(tables, builder)
    try:
        if streaming:
            rows = builder.as_streaming_dataset(split=split)
            empty = next(iter(rows), None) is None
        else:
            builder.download_and_prepare()
            empty = not any(info.num_examples for info in builder.info.splits.values())
    except StopIteration:  # the JSON builder looks at the first rows for their columns
        empty = True
    except RecursionError as error:
        raise ValueError(f"{name} cannot be read: a value is nested too deeply ({error})") from error
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None  # for example a full disk, of which the message should not blame the file
        raise ValueError(f"{name} cannot be read: {error.__cause__ or error}") from error
    if empty:
        raise ValueError(f"{name} holds no rows; pass a dataset with at least one.")
    return rows if streaming else builder.as_dataset(split=split)


def _json_tables(builder, files_iterables, allow_full_read: bool = True, **_) -> Iterator[tuple[Key, pa.Table]]:
    for shard, files in enumerate(files_iterables):
        batches = (batch for file in files for batch in _lines(file))
        for index, (file, first, lines) in enumerate(batches):
            table = _json_table(file, first, lines, builder.info.features)
            try:
                yield Key(shard, index), builder._cast_table(table)
            except (pa.ArrowException, TypeError, ValueError) as error:
                raise ValueError(
                    f"{file}: from line {first} on, values have other types than before: {error}"
                ) from error


def _lines(file: str) -> Iterator[tuple[str, int, list[bytes]]]:
    """
    (file, number of the first line, lines) of JSON lines, `BATCH` bytes at a time; a list of rows is brought into that
    form.
    """
    with xopen(file, "rb") as handle:
        first, size, number, lines = 1, 0, 0, []
        for number, line in enumerate(handle, 1):
            if number == 1 and line.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
                rows = _parsed(line + handle.read(), file, None)
                lines = [json.dumps(row if isinstance(row, dict) else {"text": row}).encode() for row in rows]
                break
            lines.append(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            size += len(line)
            if size >= BATCH:
                yield file, first, lines
                first, size, lines = number + 1, 0, []
    if lines:
        yield file, first, lines


def _json_table(file: str, first: int, lines: list[bytes], known: Features | None) -> pa.Table:
    text = b"\n".join(line.strip() for line in lines)
    options = pa.json.ReadOptions(block_size=len(text) + 1)  # one block: types are those of all these lines
    if known is not None and any(isinstance(feature, Json) for feature in known.values()):
        return _mixed_table(file, first, lines, known)
    for number, line in enumerate(lines, first):
        if line.count(b"[") + line.count(b"{") > 500:
            _parsed(line, file, number)  # refuses values nested so deeply that Arrow would crash
    try:
        table = pa.json.read_json(pa.BufferReader(text), options)
        schema = pa.schema([field.with_type(_as_written(field.type)) for field in table.schema])
        if schema != table.schema:
            parse_options = pa.json.ParseOptions(schema, unexpected_field_behavior="error")
            table = pa.json.read_json(pa.BufferReader(text), options, parse_options)
        table.validate(full=True)  # UTF-8 too
    except pa.ArrowException:  # values of several types in one column, or damaged lines
        return _mixed_table(file, first, lines, known)
    rounded = pa.float64() in schema.types and _LONG_INTEGER.search(text)
    nested = known is None and any(map(pa.types.is_nested, schema.types))
    return _mixed_table(file, first, lines, known) if rounded or nested else table


def _as_written(type: pa.DataType) -> pa.DataType:
    """The type with text wherever a text was taken for a date."""
    if pa.types.is_timestamp(type):
        return pa.string()
    if pa.types.is_list(type):
        return pa.list_(_as_written(type.value_type))
    if pa.types.is_struct(type):
        return pa.struct([field.with_type(_as_written(field.type)) for field in type])
    return type


def _mixed_table(file: str, first: int, lines: list[bytes], known: Features | None) -> pa.Table:
    """
    What Arrow cannot hold as it is: numbers and texts in one column become texts, objects with other keys in each row
    JSON.
    """
    rows = []
    for number, line in enumerate(lines, first):
        if line.strip():
            rows.append(_parsed(line, file, number))
            if not isinstance(rows[-1], dict):
                raise ValueError(f"{file}: line {number} is {rows[-1]!r:.100}, but a row is an object with columns.")
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        try:
            others = known is None and find_mixed_struct_types_field_paths(values, allow_root=True)
            if others or isinstance((known or {}).get(name), Json):
                columns[name] = _as_json(values)
            else:
                columns[name] = pa.array(values)
        except (pa.ArrowException, OverflowError) as error:
            if (
                known and getattr(known.get(name), "dtype", None) == "float64"
            ):  # Arrow would convert it to text and back, which gives another number
                raise ValueError(f"{file}: from line {first} on, {name!r} is no longer a float: {error}") from error
            nested = any(isinstance(value, (dict, list)) for value in values)
            columns[name] = _as_json(values) if nested else pa.array(map(_text, values), pa.string())
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{file}: the column {name!r} holds half a surrogate pair, which is no text: {error}"
            ) from error
    return pa.table(columns)


def _as_json(values: list) -> pa.Array:
    stored = pa.array([None if value is None else json.dumps(value) for value in values], pa.string())
    return pa.ExtensionArray.from_storage(pa.json_(), stored)


def _text(value) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _parsed(text: bytes, file: str, number: int | None):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8, or of values nested too deeply
        where = f"{file}: " if number is None else f"{file}: line {number} "
        raise ValueError(f"{where}is not JSON ({error}): {text.strip()!r:.100}") from error


def _csv_tables(builder, files_iterables, **_) -> Iterator[tuple[Key, pa.Table]]:
    for shard, files in enumerate(files_iterables):
        frames = (frame for file in files for frame in _frames(file, builder.config))
        for index, frame in enumerate(frames):
            table = pa.Table.from_pandas(frame)
            table = table.cast(pa.schema({name: pa.string() for name in table.column_names}))
            yield Key(shard, index), builder._cast_table(table)


def _frames(file: str, config) -> Iterator[pd.DataFrame]:
    try:
        with xopen(file, "rb") as handle:
            for frame in pd.read_csv(handle, iterator=True, dtype=str, **config.pd_read_csv_kwargs):
                # Where the first row is longer than the header, pandas takes its first fields for names of rows, and
                # the others move left.
                if config.index_col is None and not isinstance(frame.index, pd.RangeIndex):
                    columns = len(frame.columns)
                    raise ValueError(
                        f"the first row below the header has {columns + frame.index.nlevels} fields, but the header has {columns}. Write a name "
                        "for each column (or no separator at the end of a line), and put a text that holds a separator in double quotes."
                    )
                yield frame
    except ValueError as error:  # of pandas' parser or of UTF-8
        raise ValueError(f"{file}: {error}") from error
