"""What others find on the Hub: the rows and attempts of a run, and their card.

A push is one commit: the Parquet files as the run wrote them, the attempts from its journal, `run_config.yaml`, `metrics.json`
and the card. So a repository is as it was before or as it is after, whenever the line is cut, and what is not ours in it stays.
"""

import json
import random
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from itertools import islice
from pathlib import Path

import yaml

from .guided_filters import REJECTIONS
from .journal import read_entries, read_header
from .redaction import redacted
from .rows import Source, Verdict, attempt_features, copy_id, stored
from .shards import Shard, journals_in


CITATIONS = {
    "2509.15157": ("zhao2025mind", "Mind the Gap: Data Rewriting for Stable Off-Policy Supervised Fine-Tuning", "Zhao, Shiwan and Zhao, Xuyang and Zhou, Jiaming and Kong, Aobo and Li, Qicheng and Qin, Yong"),
    "2602.11220": ("wang2026patch", "Patch the Distribution Mismatch: RL Rewriting Agent for Stable Off-Policy SFT", "Wang, Jiacheng and Jian, Ping and Yang, Zhen and Chen, Zirong and Liao, Keren and Guo, Zhongbin"),
    "2508.05629": ("wu2025generalization", "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification", "Wu, Yongliang and Zhou, Yizhou and Zhou, Ziheng and Peng, Yingzhe and Ye, Xinyu and Hu, Xinting and Zhu, Wenbo and Qi, Lu and Yang, Ming-Hsuan and Yang, Xu"),
    "2510.00526": ("li2025beyond", "Beyond Log Likelihood: Probability-Based Objectives for Supervised Fine-Tuning across the Model Capability Continuum", "Li, Gaotang and Qiu, Ruizhong and Chen, Xiusi and Ji, Heng and Tong, Hanghang"),
    "2507.12856": ("qin2025supervised", "Supervised Fine Tuning on Curated Data is Reinforcement Learning (and can be improved)", "Qin, Chongli and Springenberg, Jost Tobias"),
    "2508.17784": ("zhu2025proximal", "Proximal Supervised Fine-Tuning", "Zhu, Wenhong and Xie, Ruobing and Wang, Rui and Sun, Xingwu and Wang, Di and Liu, Pengfei"),
    "2509.23753": ("zhu2025anchored", "Anchored Supervised Fine-Tuning", "Zhu, He and Su, Junyou and Lai, Peng and Ma, Ren and Zhang, Wenjia and Yang, Linyi and Chen, Guanhua"),
    "2601.02151": ("diao2026entropy", "Entropy-Adaptive Fine-Tuning: Resolving Confident Conflicts to Mitigate Forgetting", "Diao, Muxi and Yang, Lele and Gong, Wuxuan and Zhang, Yutong and Yan, Zhonghao and Han, Yufei and Liang, Kongming and Xu, Weiran and Ma, Zhanyu"),
}  # fmt: skip


def bibtex(arxiv_id: str) -> str:
    """The BibTeX entry of one of the papers in `CITATIONS`."""
    name, title, authors = CITATIONS[arxiv_id]
    return (
        f"@misc{{{name},\n  title         = {{{{{title}}}}},\n  author        = {{{authors}}},\n  year          = {{20{arxiv_id[:2]}}},\n"
        f"  eprint        = {{{arxiv_id}}},\n  archivePrefix = {{arXiv}},\n  url           = {{https://arxiv.org/abs/{arxiv_id}}}\n}}"
    )


def versions(*packages: str) -> str:
    """`name version` of each package that is installed, with the commit where it was installed from git."""
    found = []
    for name in packages:
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        commit = json.loads(installed.read_text("direct_url.json") or "{}").get("vcs_info", {}).get("commit_id")
        found.append(f"{name} {installed.version}" + (f" ({commit[:12]})" if commit else ""))
    return ", ".join(found)


def public_name(name: str) -> str:
    """A Hub id as it is; of a local path only its last part, as the rest is nobody's business."""
    return name if is_hub_id(name) else name.rstrip("/").split("/")[-1]


def link(name: str | None, kind: str, on_hub: bool | None = None) -> str | None:
    """Markdown for a Hub id, or for a local path, which is shown as [`public_name`] gives it."""
    if not name:
        return None
    if is_hub_id(name) if on_hub is None else on_hub:
        return f"[{name}](https://huggingface.co/{kind}{name})"
    return f"`{name.rstrip('/').split('/')[-1]}` (local)"


def is_hub_id(name: str | None) -> bool:
    """Whether `name` can be a Hub id (`owner/name` or `name`) and is no local path."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


# ---- push ----

# Where each config's Parquet files are.
FOLDERS = {"default": "data", "attempts": "attempts"}
BEGIN = "<!-- trl-offpolicy: from here to the end mark the next push writes anew -->"
END = "<!-- trl-offpolicy: end -->"
# Somebody else's commit came first (409, 412), too many requests, or a server that is down for the moment.
RETRIED = (409, 412, 429, 500, 502, 503, 504)
LONGEST_WAIT = 300  # seconds, whatever the Hub asks for


def push_run(
    output_dir: str | Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    push_attempts: bool = True,
    commit_message: str | None = None,
    finished: bool = True,
    accept_failed: bool = False,
):
    """
    Pushes what `DataRewriter` wrote into `output_dir`: config `default` (the rows), config `attempts` and the card, in one commit.

    Args:
        output_dir (`str` or `Path`): The run directory.
        repo_id (`str`): Dataset repository, `owner/name`; made if there is none.
        private (`bool`, *optional*): Whether a new repository is private.
        token (`str`, *optional*): By default the one of the environment (`HF_TOKEN`) or of `hf auth login`.
        revision (`str`, *optional*): Branch, made if there is none; by default `main`.
        push_attempts (`bool`, *optional*, defaults to `True`): Whether every attempt goes along, rejected ones too.
        finished (`bool`, *optional*, defaults to `True`): `False` pushes the attempts of a run under way, and leaves the rows alone.
        accept_failed (`bool`, *optional*, defaults to `False`): Whether rows go along though the engine failed at some attempts, for which
            some of them may have fallen back.

    Returns:
        `huggingface_hub.CommitInfo`.

    Raises:
        ValueError: The run has no rows yet, or some that may have fallen back because the engine failed, or `private` was asked of a
            repository that is public.
        HfHubHTTPError, httpx.TransportError, ConnectionError: The Hub refused, cannot be reached, or sent something unreadable, also after
            some tries. A note on the exception says whether anything has changed there; the same call can be made again.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    run = read_run(Path(output_dir), finished)
    if finished and not run["rows"]:
        raise ValueError(
            f"You passed output_dir={str(output_dir)!r}, which has no `dataset`: its rewrite is not finished, or a shard is missing. Run "
            "the rewrite again to finish it, then push."
        )
    if finished and not accept_failed and (undrawn := _undrawn(Path(output_dir))):
        raise ValueError(
            f"The engine failed at {undrawn:,} attempts of {str(output_dir)!r}, so rows may have fallen back to their demonstration that need "
            "not have. Run the rewrite again, which tries them again, or push the rows as they are with --accept_failed True."
        )
    api, repo_id = open_repo(repo_id, private, token, revision)
    source = _source_card(api, run["source_id"])
    with tempfile.TemporaryDirectory() as folder:
        content = {
            "default": run["rows"],
            "attempts": _attempt_files(run["ids"], folder) if push_attempts else [],
        }
        parts = {
            name: _named(FOLDERS[name], paths) for name, paths in content.items() if finished or name == "attempts"
        }
        data = [item for part in parts.values() for item in part.items()]
        data += [(name, text.encode()) for name, text in run["files"].items()]
        before = None

        def commit():
            nonlocal before
            info = api.dataset_info(repo_id, revision=revision)
            before = before or info.sha
            there = [sibling.rfilename for sibling in info.siblings or ()]
            card = edited_card(
                _card(api, repo_id, info.sha) if "README.md" in there else None, run, repo_id, parts, source
            )
            stale = [
                CommitOperationDelete(path)
                for name, part in parts.items()
                for path in there
                if re.fullmatch(rf"{FOLDERS[name]}/train-.*\.parquet", path) and path not in part
            ]
            return api.create_commit(
                repo_id,
                # New ones at each try: only those are compared with what is there, and a commit whose answer was lost is there.
                [*(CommitOperationAdd(*item) for item in [*data, ("README.md", str(card).encode())]), *stale],
                commit_message=commit_message or ("Push rows" if finished else "Push attempts of a run under way"),
                repo_type="dataset",
                revision=revision,
                parent_commit=info.sha,
            )

        try:
            return _tried_again(commit, token)
        except BaseException as error:  # ctrl-C too
            error.add_note(_what_has_changed(api, repo_id, revision, before))
            raise


def _what_has_changed(api, repo_id: str, revision: str | None, before: str | None) -> str:
    """What there is to know of a push that failed; `before` was the last commit when it began, `None` if it did not come to that."""
    try:
        now = before and api.dataset_info(repo_id, revision=revision).sha
    except Exception as error:  # whatever a network can do
        return (
            f"Whether the commit went through is not known, since the Hub does not answer now ({type(error).__name__}). Push again: what is there "
            "already is not pushed twice."
        )
    if now == before:
        return "Nothing has changed on the Hub."
    return f"The Hub has a new commit, {now}, ours or somebody else's. Push again: what is there already is not pushed twice."


def _undrawn(output_dir: Path) -> int:
    """How many attempts its rows lack because the engine failed."""
    metrics = output_dir / "metrics.json"
    return json.loads(metrics.read_text()).get("undrawn", 0) if metrics.exists() else 0


def open_repo(repo_id: str, private: bool | None = None, token: str | None = None, revision: str | None = None):
    """
    Makes the repository and the branch if there are none; raises what a push would raise. Returns the `HfApi` to go on with, and the
    repository's full name: a `repo_id` without an owner is one of the token's user.
    """
    from huggingface_hub import HfApi, get_token

    if not (token or get_token()):
        raise ValueError(f"There is no Hub token to push to {repo_id} with: set HF_TOKEN, or run `hf auth login`.")
    api = HfApi(token=token, library_name="trl-offpolicy")
    made = _tried_again(lambda: api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True), token)
    repo_id = made.repo_id
    if private and not api.dataset_info(repo_id).private:
        raise ValueError(
            f"You asked for a private repository, but {repo_id} exists and is public. Make it private in its settings, or push to another."
        )
    if revision is not None:
        _tried_again(lambda: api.create_branch(repo_id, branch=revision, repo_type="dataset", exist_ok=True), token)
    return api, repo_id


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
        for _, entry in _attempts_of(journal, ids[journal], until="reason"):
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


def _attempts_of(journal: Path, ids: set[str] | None, until: str | None = None) -> Iterator[tuple[int, dict]]:
    """What [`read_entries`] finds of the rows with these ids: a journal keeps the attempts of rows that have left the dataset since."""
    return ((offset, entry) for offset, entry in read_entries(journal, until) if ids is None or entry["id"] in ids)


def edited_card(card, run: dict, repo_id: str, parts: dict[str, dict], source: dict):
    """
    The repository's `card` (or a new one) with our part of it as `run` is; everything that others wrote stays.

    Args:
        parts (`dict[str, dict[str, Path]]`): Files by config; a config without files is taken out of the metadata.
        source (`dict`): Metadata of the source dataset's card: `license` and `language` are inherited where the card has none.

    Returns:
        `huggingface_hub.DatasetCard`.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    name = repo_id.split("/")[-1]
    ours = DatasetCard.from_template(
        DatasetCardData(),
        template_path=str(files(__package__) / "templates" / "dataset_card.md"),
        **run,
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
    if run["num_rows"]:
        data["size_categories"] = [_size_category(run["num_rows"])]
    for key, values in {
        "tags": ["trl", "sft", "off-policy", "trl-offpolicy", "synthetic"],
        "task_categories": ["text-generation"],
        "annotations_creators": ["machine-generated"],
        "source_datasets": [run["source_id"]] if run["source_id"] else [],
    }.items():
        old = data.get(key) or []
        if merged := list(dict.fromkeys([*([old] if isinstance(old, str) else old), *values])):
            data[key] = merged
    # What the files of a config are is in the files; a `dataset_info` of older ones makes `load_dataset` fail (datasets #8608).
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


def refusals() -> tuple[type[Exception], ...]:
    """What says that the Hub refused, cannot be reached, or sent something unreadable."""
    from huggingface_hub.errors import HfHubHTTPError

    # The first is of the HTTP library that huggingface_hub uses: a line that was cut is one of those, too.
    return HfHubHTTPError.__bases__[0], ConnectionError


def _tried_again(request: Callable, token: str | None = None):
    """`request()`, made again after a while where the Hub's answer, or the lack of one, says that this may help; each wait is said."""
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    for wait in (1, 2, 4, 8, 16, None):
        asked = ""
        try:
            return request()
        except (HFValidationError, OfflineModeIsEnabled):
            raise
        except refusals() as error:
            response = getattr(error, "response", None)
            if wait is None or (response is not None and response.status_code not in RETRIED):
                raise
            why = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
            asked = response.headers.get("Retry-After", "") if response is not None else ""
        except ValueError as error:
            why = f"What came from the Hub cannot be read ({error}): is there a proxy or a login page in between"
            if wait is None:
                raise ConnectionError(f"{why}?") from error
        seconds = wait * (1 + random.random())
        if asked.isdigit():
            seconds = min(int(asked), LONGEST_WAIT)
            why += f". The Hub asks to wait for {int(asked):,} s"
        warnings.warn(f"{redacted(why, token)}. Trying again in {seconds:.0f} s.", stacklevel=3)
        time.sleep(seconds)


def _card(api, repo_id: str, revision: str | None = None):
    return read_card(
        Path(api.hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=revision)).read_bytes().decode()
    )


class _AsWritten(yaml.SafeLoader):
    """YAML as its version 1.2 and the Hub read it: `no` (Norwegian), `12:30` and `1.10` are texts, and so written back, quoted."""


_AsWritten.yaml_implicit_resolvers = {}
for _kind, _pattern, _first in (
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", "0|-?[1-9][0-9]*", list("-0123456789")),
    ("float", "-?(?:0|[1-9][0-9]*)\\.(?:0|[0-9]*[1-9])", list("-0123456789")),
    ("merge", "<<", ["<"]),
):
    _AsWritten.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), _first)


def read_card(content: str):
    """A dataset's card, in which the metadata that others wrote is what they wrote."""
    from huggingface_hub import DatasetCard, DatasetCardData
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    card = DatasetCard(content)
    if block := REGEX_YAML_BLOCK.search(content):
        card.data = DatasetCardData(**(yaml.load(block[2], _AsWritten) or {}))
    return card


def _source_card(api, name: str | None) -> dict:
    """Metadata of the source dataset's card; empty if it is not on the Hub (any more) or has no card."""
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    if name is None:
        return {}
    try:
        return _tried_again(lambda: _card(api, name)).data.to_dict()
    except (EntryNotFoundError, RepositoryNotFoundError):
        return {}


def _attempt_files(ids: dict[Path, set[str] | None], folder: str) -> list[Path]:
    """A Parquet file in `folder` for each journal that has attempts of the rows with these ids."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths, schema = [], attempt_features().arrow_schema
    for journal, own in ids.items():
        entries = (stored(entry) for _, entry in _attempts_of(journal, own))
        if not (chunk := list(islice(entries, 1000))):
            continue
        paths.append(Path(folder) / f"{journal.stem}.parquet")
        # Cut by content, so that what did not change since the last push is not uploaded again (where Xet is).
        with pq.ParquetWriter(paths[-1], schema, use_content_defined_chunking=True) as writer:
            while chunk:
                writer.write_table(pa.Table.from_pylist(chunk, schema))
                chunk = list(islice(entries, 1000))
    return paths


def _named(folder: str, paths: list[Path]) -> dict[str, Path]:
    return {f"{folder}/train-{i:05d}-of-{len(paths):05d}.parquet": path for i, path in enumerate(paths)}


def _size_category(rows: int) -> str:
    limits = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}
    return next((name for limit, name in limits.items() if rows < limit), "10M<n<100M")


def fence(text: str) -> str:
    """`text` as a Markdown code block, whatever backticks are in it."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}text\n{text}\n{ticks}"
