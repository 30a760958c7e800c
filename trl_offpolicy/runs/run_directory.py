"""A finished or unfinished run on disk: what its journals, settings and rows say."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import yaml

from ..cards import is_hub_id, link
from ..data.rows import REJECTIONS, Source, Verdict, copy_id
from .journal import read_entries, read_header
from .shards import Shard, journals_in


def read_run(output_dir: Path, finished: bool = True) -> dict:
    """What the card says of a run, from its journals, `run_config.yaml` and, if it is `finished`, its rows."""
    import pyarrow.parquet as pq

    journals = journals_in(output_dir)
    if not journals:
        raise FileNotFoundError(
            f"You passed output_dir={str(output_dir)!r}, which has no journal: it is no run of `trl-offpolicy rewrite`."
        )
    text = (output_dir / "run_config.yaml").read_text()
    rows = sorted((output_dir / "dataset").glob("*.parquet")) if finished else []
    if rows and len(rows) != len(journals):
        raise ValueError(
            f"{output_dir} has the rows of {len(rows)} shard(s), but {len(journals)} journal(s): {', '.join(path.name for path in journals)}. Bring "
            "those of all shards together, or push from where they are; the card and the attempts are made from them."
        )
    sources, ids, files = Counter(), {journal: _asked(journal) for journal in journals}, {}
    for journal, path in zip(journals, rows, strict=False):
        table = pq.read_table(path, columns=["source", "id"])
        sources.update(table["source"].to_pylist())
        ids[journal] = set(table["id"].to_pylist())
        unsolved = Shard.of_file(journal).file(output_dir, "unsolved.jsonl")
        if unsolved.exists():  # problems without a demonstration that got no row, but attempts
            files[unsolved.name] = unsolved.read_text()
            ids[journal].update(json.loads(line)["id"] for line in files[unsolved.name].splitlines())
    counts, tokens, tried, rejected = Counter(), Counter(), {}, Counter()
    for journal in journals:
        for _, entry in attempts_of(journal, ids[journal], until="reason"):
            stage = entry["stage"]
            counts[stage, entry["verdict"]] += 1
            rejected[entry.get("rejected")] += 1
            counts[stage, "truncated"] += entry["finish_reason"] == "length"
            tokens[stage] += entry["num_tokens"]
            tried.setdefault(stage, set()).add(entry["id"])
    settings, config = yaml.safe_load(text), read_header(journals[0])
    source, on_hub = settings.get("dataset_name"), "dataset_revision" in settings
    # A digest of the weights stands where no commit names them: then it was a local model.
    model_on_hub = False if re.fullmatch("[0-9a-f]{12}", config["model_revision"]) else None
    public_text, left_out = _without_paths(
        text,
        {
            "dataset_name": on_hub,
            "data_files": on_hub,
            "model_name_or_path": model_on_hub,
            "chat_template_path": False,
        },
    )
    metrics = next(output_dir.glob("metrics.json"), None) if finished else None
    gap = output_dir / "policy_gap.json"
    return {
        "journals": journals,
        "rows": rows,
        "ids": ids,
        "files": files | {"run_config.yaml": public_text} | ({"metrics.json": metrics.read_text()} if metrics else {}),
        "left_out": left_out,
        "config": config,
        "settings": settings,
        "source_id": source if on_hub else None,
        "source": link(source, "datasets/", on_hub),
        "model": link(config["model"], "", model_on_hub),
        "rewriter": link(config.get("rewriter_adapter"), ""),
        "made_with": " ".join(line[2:] for line in text.splitlines() if line.startswith("# ")),
        "num_rows": sum(sources.values()),
        "num_untried": len(set().union(*ids.values()).difference(*tried.values())) if rows else 0,
        "sources": {str(source): sources[source] for source in Source},
        "verdicts": [str(verdict) for verdict in Verdict],
        "rejected": {what: rejected[why] for why, what in REJECTIONS.items() if rejected[why]},
        "expert_format": json.loads(metrics.read_text()).get("expert_format", {}) if metrics else {},
        "attempts": {
            stage: {
                "problems": len(tried[stage]),
                "sampled": sum(counts[stage, v] for v in Verdict),
                "tokens": tokens[stage],
                **{name: counts[stage, name] for name in (*map(str, Verdict), "truncated")},
            }
            for stage in tried
        },
        "gap": json.loads(gap.read_text()) if gap.exists() else None,
    }


# Settings that name a place: a Hub id, or something on a disk.
PLACES = ("model_name_or_path", "dataset_name", "rewriter_adapter", "adapter", "data_files", "chat_template_path")


def _without_paths(text: str, on_hub: dict[str, bool | None]) -> tuple[str, list[str]]:
    """
    `run_config.yaml` as others get it, and the names of the settings that are left out: they hold local paths, which are nobody's business
    and lead nowhere elsewhere.

    Args:
        text (`str`): As it is in the run's directory.
        on_hub (`dict[str, bool | None]`): Which of the `PLACES` are on the Hub, where that is known.
    """
    settings, left_out = yaml.safe_load(text), []
    for name, value in settings.items():
        if name in PLACES and value is not None:
            known = on_hub.get(name)
            is_local = not (is_hub_id(value) if known is None else known)
        else:  # such as {"download_dir": "/data/models"}
            is_local = name.endswith("_kwargs") and re.search(r"""(?:^|["':=\s])(?:~|\.{0,2})/\w""", str(value))
        if is_local:
            left_out.append(name)
    head = [line for line in text.splitlines() if line.startswith("#")]
    head += [f"# {name} was a local path, or held one: pass your own." for name in left_out]
    kept = {name: value for name, value in settings.items() if name not in left_out}
    return "\n".join(head) + "\n" + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True), left_out


def _asked(journal: Path) -> set[str] | None:
    """The ids of the rows that a shard is to rewrite; `None` where that is not known (its `rows.npz` is elsewhere)."""
    import numpy as np

    file = journal.with_name(journal.name.replace("journal", "rows").replace(".jsonl", ".npz"))
    if not file.exists():
        return None
    with np.load(file) as checked:
        keys = checked["keys"]
    own = Shard.of_file(journal).rows(len(keys))
    return {copy_id(*key) for key in keys[own.start : own.stop][["id", "copy"]].tolist()}


def attempts_of(journal: Path, ids: set[str] | None, until: str | None = None) -> Iterator[tuple[int, dict]]:
    """What [`read_entries`] finds of the rows with these ids: a journal keeps the attempts of rows that have left the dataset since."""
    return ((offset, entry) for offset, entry in read_entries(journal, until) if ids is None or entry["id"] in ids)
