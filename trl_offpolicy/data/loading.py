"""Rows from a file, a directory or the Hub, with their texts as they are."""

import glob
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path


def unformatted(dataset):
    """
    A `datasets.Dataset` with rows of Python's types, whatever `with_format("torch")` made of them; `ValueError` if it
    has a transform.
    """
    if dataset.format["type"] == "custom":
        raise ValueError(
            "The dataset has a transform (`with_transform`), which may say something else each time a row is read. Apply it with `dataset.map` instead."
        )
    return (
        dataset if dataset.format["type"] is None else dataset.with_format(None)
    )  # a tensor in the answer column could not be read as an answer


def plain_rows(dataset):
    """
    The same without images, audio and the like, which nobody here looks at and which take long to decode. Anything
    else, such as a list of dicts, is left as it is.
    """
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        return dataset
    media = media_columns(dataset)
    return unformatted(dataset.remove_columns(media) if media else dataset)


def media_columns(dataset) -> list[str]:
    """The columns with images, audio and the like, which are files to `datasets`."""
    from datasets.features.features import require_storage_embed

    return [name for name, feature in dataset.features.items() if require_storage_embed(feature)]


def hub_origin(dataset) -> dict[str, str]:
    """
    `dataset_name`, `dataset_config` and `dataset_revision` (the commit) of a `datasets.Dataset` that was loaded from
    the Hub, however it was filtered or mapped since; empty if that cannot be told. `datasets` keeps them in the paths
    of its cache only.
    """
    from datasets import config

    for file in getattr(dataset, "cache_files", ()):
        path = Path(file["filename"])
        if path.is_relative_to(config.HF_DATASETS_CACHE) and len(path.parts) >= 5:
            name, _, _, commit = path.parts[-5:-1]
            if re.fullmatch(r"[0-9a-f]{40}", commit):
                names = {"dataset_name": name.replace("___", "/"), "dataset_config": dataset.info.config_name}
                return {**names, "dataset_revision": commit}
    return {}


def load_rows(
    dataset_name: str,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    dataset_revision: str | None = None,
    streaming: bool = False,
    data_files: str | list[str] | None = None,
    named: str = "dataset_name",
):
    """
    A `datasets.Dataset` from a JSONL, JSON, CSV or Parquet file, a directory (Parquet or `save_to_disk`) or a Hub id;
    an `IterableDataset` with `streaming`. Texts are what the files hold: no string of a JSON file is taken for a date,
    and every column of a CSV is text, in which an empty cell is a missing value.

    Args:
        data_files (`str` or `list[str]`, *optional*): Files of a directory or repository, or URLs with
            `dataset_name="json"`, as for `datasets.load_dataset`.
        named (`str`, *optional*, defaults to `"dataset_name"`): What the caller calls `dataset_name`, for what is said
            of it.

    Raises:
        ValueError: The file cannot be read, or there is no such split: a file and a single saved dataset are the split
            `train` only.
        FileNotFoundError: It is a path at which there is nothing.
    """
    import pyarrow.parquet as pq
    from datasets import DatasetDict, load_from_disk

    from .text_files import load_text_dataset

    def only_train(what: str) -> None:
        # Giving these rows as the split "test" would let someone train and test on the same rows.
        if re.split(r"[\[+]", dataset_split)[0] != "train":
            raise ValueError(
                f"You asked for the split {dataset_split!r} of {dataset_name!r}, but {what} has no splits. Give it as the split 'train' if "
                "these are the rows you want; for a split of its own, save a DatasetDict, use a Hub dataset, or pass another file."
            )

    path = Path(dataset_name)
    if data_files and (path.is_file() or (path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        raise ValueError(
            f"You passed data_files={data_files} with {named}={dataset_name!r}, which has no files to choose from; they are for a Hub "
            "dataset, a directory of files, or the names json, csv and parquet."
        )
    builders = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
    if path.is_file():
        if path.suffix not in builders:
            raise ValueError(f"You passed {named}={dataset_name!r}; a file must end in {', '.join(builders)}.")
        with path.open("rb") as file:
            head = file.read(1024)
        if not head.strip():
            raise ValueError(f"You passed {named}={dataset_name!r}, but that file is empty.")
        if (
            path.suffix == ".parquet" and not pq.read_metadata(path).num_rows
        ):  # `datasets` raises an unclear error for it
            raise ValueError(f"You passed {named}={dataset_name!r}, but that file has no rows.")
        only_train("a file")
        return load_text_dataset(builders[path.suffix], dataset_split, streaming, data_files=glob.escape(str(path)))
    if path.is_dir() and any((path / f).exists() for f in ("dataset_dict.json", "state.json")):
        loaded = load_from_disk(str(path))
        if not isinstance(loaded, DatasetDict):
            only_train("a single saved dataset")
            loaded = DatasetDict(train=loaded)
        if dataset_split not in loaded:
            raise ValueError(
                f"You asked for dataset_split={dataset_split!r}, but {dataset_name!r} has {list(loaded)}."
            )
        rows = loaded[dataset_split]
        return rows.to_iterable_dataset() if streaming else rows
    if not path.is_dir() and (path.suffix in builders or dataset_name.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"You passed {named}={dataset_name!r}, but there is no such file or directory.")
    if not data_files and (path / "dataset").is_dir() and any(path.glob("journal*.jsonl")):
        dataset_name = str(path / "dataset")  # of a rewrite's directory the rows, not everything that was made of them
    where = {"data_files": data_files} if data_files else {}
    return load_text_dataset(
        dataset_name, dataset_split, streaming, name=dataset_config, revision=dataset_revision, **where
    )


def as_dataset(dataset):
    from datasets import Dataset

    if isinstance(dataset, list):
        return Dataset.from_list(dataset)
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"`rewrite` takes one `datasets.Dataset` (or a list of dicts), not {type(dataset).__name__}. Pass one split, e.g. dataset['train']."
        )
    return unformatted(dataset)


def iterate(dataset, rows: range) -> Iterator[dict]:
    """These rows of a dataset, read a few hundred at a time: row by row takes many times as long."""
    for start in rows[::256]:
        columns = dataset[start : min(start + 256, rows.stop)]
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def batched(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one shorter (`itertools.batched` came with Python 3.12)."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
