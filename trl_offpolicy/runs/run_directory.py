"""A finished or unfinished run on disk: which files it has, and what they say."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path

import yaml

from ..cards import is_hub_id
from ..data.rows import Source, sources_of
from ..sampling.sampler import FAILED, reshaped
from .journal import Attempt, read_attempts, read_header
from .run_counts import RunCounts
from .run_memory import RunMemory
from .shards import Shard, journals_in


class RunDirectory:
    """
    What is in the directory of a run of `trl-offpolicy rewrite`; a file is read when it is asked for.

    Args:
        path (`str` or `Path`): The run's `output_dir`.
        finished (`bool`, *optional*, defaults to `True`): `False` for a run under way, of which there are no rows and
            no `metrics` yet.
    """

    def __init__(self, path: str | Path, finished: bool = True):
        self.path, self.finished = Path(path), finished
        self.journals = journals_in(self.path)  # one for each shard
        # Parquet files in the order of the rows.
        self.row_files = sorted((self.path / "dataset").glob("*.parquet")) if finished else []

    def check(self) -> None:
        """
        Reads the attempts and the settings; `FileNotFoundError` or `ValueError` if there are none, or they are
        damaged.
        """
        for name in ("counts", "settings"):
            getattr(self, name)

    # ---- how it was made ----

    @cached_property
    def config(self) -> dict:
        """On what its attempts and their verdicts depend: a journal's first line."""
        return read_header(self.journals[0])

    @cached_property
    def _run_config(self) -> str:
        return (self.path / "run_config.yaml").read_text()

    @cached_property
    def settings(self) -> dict:
        """All that was set, as in `run_config.yaml`."""
        return yaml.safe_load(self._run_config)

    @property
    def made_with(self) -> str:
        """Names and versions of the packages."""
        return " ".join(line[2:] for line in self._run_config.splitlines() if line.startswith("# "))

    @property
    def source_on_hub(self) -> bool:
        """Whether the dataset that was rewritten is on the Hub."""
        return "dataset_revision" in self.settings

    @property
    def model_on_hub(self) -> bool | None:
        """`False` where a digest of its weights stands for a commit: then it was local. Else it is not known."""
        return False if re.fullmatch("[0-9a-f]{12}", self.config["model_revision"]) else None

    # ---- attempts ----

    @cached_property
    def ids(self) -> dict[Path, set[str] | None]:
        """
        Of each journal the problems of its shard (`None`: not known); it may have attempts at others that have left
        the dataset since.

        Raises:
            FileNotFoundError: It is no run.
            ValueError: There are rows of more shards than journals.
        """
        import pyarrow.parquet as pq

        if not self.journals:
            raise FileNotFoundError(
                f"You passed output_dir={str(self.path)!r}, which has no journal: it is no run of `trl-offpolicy rewrite`."
            )
        if not self.row_files:
            return {journal: self._asked(Shard.of_file(journal)) for journal in self.journals}
        if len(self.row_files) != len(self.journals):
            raise ValueError(
                f"{self.path} has the rows of {len(self.row_files)} shard(s), but {len(self.journals)} journal(s): {', '.join(path.name for path in self.journals)}. "
                "Bring those of all shards together, or push from where they are; the card and the attempts are made from them."
            )
        ids = {}
        for journal, path in zip(self.journals, self.row_files, strict=True):
            with_row = pq.read_table(path, columns=["id"])["id"].to_pylist()
            ids[journal] = {*with_row, *(row["id"] for row in self.unsolved(journal))}
        return ids

    def unsolved(self, *journals: Path) -> Iterator[dict]:
        """What is known of the problems without a row of these journals, by default of all."""
        for path in map(self._unsolved, journals or self.journals):
            if path.exists():
                yield from map(json.loads, path.read_text().splitlines())

    def _unsolved(self, journal: Path) -> Path:
        """Lists problems without a demonstration that got no row, but attempts; missing where there are none."""
        return Shard.of_file(journal).file(self.path, "unsolved.jsonl")

    def _asked(self, shard: Shard) -> set[str] | None:
        """The ids of the rows that a shard is to rewrite; `None` where its `rows.npz` is elsewhere."""
        memory = RunMemory.load(shard.file(self.path, "rows.npz"))
        own = shard.rows(len(memory or ()))
        return None if memory is None else set(memory.ids(own.start, len(own)))

    def attempts(self, journal: Path, texts: bool = True) -> Iterator[Attempt]:
        """Those in one of its journals, at problems in `ids`."""
        attempts = read_attempts(journal, self.ids[journal], texts)
        return (attempt for attempt in attempts if attempt.stage != Source.EXPERT)  # the score of a demonstration

    def first_attempts(self, texts: bool = True) -> Iterator[Attempt]:
        """
        The first attempt of stage `self` that was drawn at each problem: a sample of the policy, whatever became of
        it.
        """
        return filter(is_first, chain.from_iterable(self.attempts(journal, texts) for journal in self.ids))

    def check_self_attempts(self) -> str:
        """
        Returns how an error about this run begins.

        Raises:
            ValueError: The run is not finished, or its attempts of stage `self` are not drawn from the policy alone.
        """
        passed = f"You passed the run {str(self.path)!r}"
        if not self.journals or not self.row_files:
            raise ValueError(
                f"{passed}, which is no finished `trl-offpolicy rewrite`: it has no journal, or no dataset/. Pass "
                "a rewrite's output_dir."
            )
        if (settings := reshaped(self.config)) or Source.SELF not in self.config["stages"]:
            raise ValueError(
                f"{passed}, sampled with {settings or self.config['stages']}: its attempts are not drawn from the policy alone. Rewrite with stage "
                "`self` at temperature 1 with top_p 1 and top_k 0."
            )
        return passed

    @cached_property
    def counts(self) -> RunCounts:
        """Of all attempts that were drawn, also of those beyond the ones that settled a problem's stage."""
        journals = list(self.ids)
        counts = RunCounts(self.config["stages"], self.config["max_completion_length"])
        for attempt in chain.from_iterable(self.attempts(journal, texts=False) for journal in journals):
            counts.add(attempt.stage, attempt)
            counts.stages[attempt.stage].problems.add(attempt.id)
        return counts

    # ---- rows ----

    @property
    def replay_files(self) -> list[Path]:
        """
        Parquet files of the replay rows that are trained on beside the rows, one for each of theirs; empty where there
        are none.
        """
        if not self.settings.get("replay_share"):  # what is there is of another time
            return []
        return [self.path / "replay" / file.name for file in self.row_files]

    def rows(self):
        """The rows, as a `pyarrow.dataset.Dataset`; `None` as long as the run is not finished."""
        import pyarrow.dataset as ds

        return ds.dataset(self.row_files, format="parquet") if self.row_files else None

    @cached_property
    def sources(self) -> dict[str, int]:
        """How many rows come from where, replay rows included."""
        import pyarrow.parquet as pq

        found = Counter(self.rows().to_table(columns=["source"])["source"].to_pylist() if self.row_files else ())
        counts = {str(source): found[source] for source in sources_of(self.config["stages"])}
        if files := self.replay_files:
            counts[str(Source.REPLAY)] = sum(pq.read_metadata(file).num_rows for file in files)
        return counts

    @property
    def num_problems(self) -> int:
        """How many problems have a row; `keep="all"` gives some of them several."""
        return len(set(self.rows().to_table(columns=["id"])["id"].to_pylist())) if self.row_files else 0

    def rows_of(self, stage: str) -> int:
        """How many rows a stage gave; of several that show hints, or several teachers, each by itself."""
        of = self.metrics.get("stages", {}).get(stage, {})
        return of["rows"] if "rows" in of else self.sources[stage]

    @property
    def num_untried(self) -> int:
        """Rows for which nothing was drawn."""
        tried = (of.problems for of in self.counts.stages.values())
        return len(set().union(*self.ids.values()).difference(*tried)) if self.row_files else 0

    @property
    def metrics(self) -> dict:
        """`metrics.json`; empty as long as the run is not finished."""
        return self._json("metrics.json") if self.finished else {}

    @property
    def gap(self) -> dict:
        """What `trl-offpolicy gap` has measured here; empty if it has not."""
        return self._json("policy_gap.json")

    def _json(self, name: str) -> dict:
        return json.loads((self.path / name).read_text()) if (self.path / name).exists() else {}

    # ---- what others get ----

    def files(self) -> dict[str, str]:
        """What goes along with rows and attempts, by name."""
        files = [*map(self._unsolved, self.journals), self.path / "metrics.json"] if self.row_files else []
        return {file.name: file.read_text() for file in files if file.exists()} | {"run_config.yaml": self._public[0]}

    @property
    def left_out(self) -> list[str]:
        """The settings that others do not get: they are local paths, or hold some."""
        return self._public[1]

    @cached_property
    def _public(self) -> tuple[str, list[str]]:
        on_hub: dict[str, bool | None] = dict.fromkeys(("dataset_name", "data_files"), self.source_on_hub)
        on_hub |= {"model_name_or_path": self.model_on_hub, "chat_template_path": False}
        return _without_paths(self._run_config, on_hub)


def is_first(attempt: Attempt) -> bool:
    """Whether it is the first attempt of stage `self` at its problem, and was drawn."""
    return attempt.stage == Source.SELF and attempt.attempt == 0 and attempt.finish_reason not in FAILED


# Settings that name a place: a Hub id, or something on a disk.
PLACES = (
    "model_name_or_path",
    "dataset_name",
    "rewriter_adapter",
    "adapter",
    "data_files",
    "chat_template_path",
    "replay_dataset",
)


def _without_paths(text: str, on_hub: dict[str, bool | None]) -> tuple[str, list[str]]:
    """
    `run_config.yaml` as others get it, and the names of the settings that are left out: they hold local paths, which
    are nobody's business and lead nowhere elsewhere.

    Args:
        text (`str`): As it is in the run's directory.
        on_hub (`dict[str, bool | None]`): Which of the `PLACES` are on the Hub, where that is known.
    """
    settings, left_out = yaml.safe_load(text), []
    for name, value in settings.items():
        if name in PLACES and value is not None:
            known = on_hub.get(name)
            is_local = not (is_hub_id(value) if known is None else known)
        elif name == "teacher":  # NAME=MODEL, or the name of one that was served
            is_local = not all(is_hub_id(teacher.partition("=")[2] or "served") for teacher in value)
        else:  # such as {"download_dir": "/data/models"}
            holds_path = re.search(r"""(?:^|["':=\s])(?:~|\.{0,2})/\w""", str(value))
            is_local = name.endswith("_kwargs") and holds_path is not None
        if is_local:
            left_out.append(name)
    head = [line for line in text.splitlines() if line.startswith("#")]
    head += [f"# {name} was a local path, or held one: pass your own." for name in left_out]
    kept = {name: value for name, value in settings.items() if name not in left_out}
    return "\n".join(head) + "\n" + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True), left_out
