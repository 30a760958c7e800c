"""The card of a rewritten dataset, within whatever else the card says."""

from ..cards import bibtex, fence, link, public_name, template_path
from ..data.rows import REJECTIONS, Source, Verdict
from ..runs.run_directory import RunDirectory
from .strategies import STRATEGIES


# Where each config's Parquet files are.
FOLDERS = {"default": "data", "attempts": "attempts"}
BEGIN = "<!-- trl-offpolicy: from here to the end mark the next push writes anew -->"
END = "<!-- trl-offpolicy: end -->"


def edited_card(card, run: RunDirectory, repo_id: str, parts: dict[str, dict], source: dict):
    """
    The repository's `card` (or a new one) with our part of it as `run` is; everything that others wrote stays.

    Args:
        parts (`dict[str, dict[str, Path]]`): Files by config; a config without files is taken out of the metadata.
        source (`dict`): Metadata of the source dataset's card: `license` and `language` are inherited where the card
            has none.

    Returns:
        `huggingface_hub.DatasetCard`.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    name, num_rows = repo_id.split("/")[-1], sum(run.sources.values())
    num_replay = run.sources.get(Source.REPLAY, 0)
    ours = DatasetCard.from_template(
        DatasetCardData(),
        template_path=template_path("dataset_card"),
        run=run,
        config=run.config,
        settings=run.settings,
        teachers={
            name: (public_name(of["model"]), of["revision"]) for name, of in run.config.get("teachers", {}).items()
        },
        strategy=STRATEGIES.get(run.settings.get("strategy"), {}),
        num_rows=num_rows,
        num_replay=num_replay,
        replay_dataset=link(run.settings.get("replay_dataset"), "datasets/"),
        source=link(run.settings.get("dataset_name"), "datasets/", run.source_on_hub),
        model=link(run.config["model"], "", run.model_on_hub),
        rewriter=link(run.config.get("rewriter_adapter"), ""),
        verdicts=list(Verdict),
        rejected={what: n for why, what in REJECTIONS.items() if (n := run.counts.by("rejected", why))},
        expert_format=run.metrics.get("expert_format", {}),
        repo_id=repo_id,
        name=name,
        fence=fence,
        with_attempts=bool(parts.get("attempts")),
        licensed=bool(source.get("license")),
        citation=bibtex("2509.15157"),
    )
    text = f"{BEGIN}\n{ours.text.strip()}\n{END}"
    if card is None:
        card = ours
        card.text = f"\n{text}\n"
    elif BEGIN in card.text and END in card.text:
        before, rest = card.text.split(BEGIN, 1)
        card.text = before + text + rest.rsplit(END, 1)[1]
    else:
        card.text = f"{card.text.rstrip()}\n\n{text}\n"
    data = card.data
    for key in ("license", "language"):
        if source.get(key) and not data.get(key):
            data[key] = source[key]
    data["pretty_name"] = data.get("pretty_name") or name
    if num_rows:
        data["size_categories"] = [_size_category(num_rows)]
    for key, values in {
        "tags": ["trl", "sft", "off-policy", "trl-offpolicy", "synthetic"],
        "task_categories": ["text-generation"],
        "annotations_creators": ["machine-generated"],
        "source_datasets": [run.settings["dataset_name"]] if run.source_on_hub else [],
    }.items():
        old = data.get(key) or []
        if merged := list(dict.fromkeys([*([old] if isinstance(old, str) else old), *values])):
            data[key] = merged
    # What the files of a config are is in the files; a `dataset_info` of older ones makes `load_dataset` fail
    # (datasets #8608).
    infos = data.get("dataset_info") or []
    infos = [infos] if isinstance(infos, dict) else infos
    data["dataset_info"] = [info for info in infos if info.get("config_name", "default") not in parts] or None
    configs = {entry["config_name"]: entry for entry in data.get("configs") or []}
    for config_name, part in parts.items():
        entry = configs.pop(config_name, {"config_name": config_name})
        found = entry.get("data_files")
        entry["data_files"] = [
            *([{"split": "train", "path": f"{FOLDERS[config_name]}/train-*"}] if part else []),
            *(
                file
                for file in (found if isinstance(found, list) else ())
                if isinstance(file, dict) and file["split"] != "train"
            ),
        ]
        if entry["data_files"]:
            configs[config_name] = entry
    data["configs"] = list(configs.values()) or None
    return card


def _size_category(rows: int) -> str:
    limits = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}
    return next((name for limit, name in limits.items() if rows < limit), "10M<n<100M")
