"""What others find on the Hub: the rows and attempts of a run, and their card.

A push is one commit: the Parquet files as the run wrote them, the attempts from its journal, `run_config.yaml`,
`metrics.json` and the card. So a repository is as it was before or as it is after, whenever the line is cut, and what
is not ours in it stays.
"""

import random
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import yaml

from ..data.redaction import redacted
from ..data.rows import attempt_features, stored
from ..runs.run_directory import RunDirectory
from .dataset_card import FOLDERS, edited_card
from .rewrite_config import HubOptions


# Somebody else's commit came first (409, 412), too many requests, or a server that is down for the moment.
RETRIED = (409, 412, 429, 500, 502, 503, 504)
LONGEST_WAIT = 300  # seconds, whatever the Hub asks for


def push_run(output_dir: str | Path, options: HubOptions, commit_message: str | None = None, finished: bool = True):
    """
    Pushes what `DataRewriter` wrote, in one commit: config `default` (the rows, and the replay rows if there are
    any), config `attempts` and the card.

    Args:
        output_dir (`str` or `Path`): The run directory.
        options (`HubOptions`): Where to, and what of the run; a [`RewriteConfig`] is one. Without `hub_token` the token
            is the one of the environment (`HF_TOKEN`) or of `hf auth login`.
        commit_message (`str`, *optional*): Of the one commit.
        finished (`bool`, *optional*, defaults to `True`): `False` pushes the attempts of a run under way, and leaves
            the rows alone.

    Returns:
        `huggingface_hub.CommitInfo`.

    Raises:
        ValueError: No repository is named, the run has no rows yet, or some that may have fallen back because the
            engine failed (and not `accept_failed`), or a private repository was asked for and it is public.
        HfHubHTTPError, httpx.TransportError, ConnectionError: The Hub refused, cannot be reached, or sent something
            unreadable, also after some tries. A note on the exception says whether anything has changed there.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    run = RunDirectory(output_dir, finished)
    run.check()  # before the Hub is asked
    if finished and not run.row_files:
        raise ValueError(
            f"You passed output_dir={str(output_dir)!r}, which has no `dataset`: its rewrite is not finished, or a shard is missing. Run "
            "the rewrite again to finish it, then push."
        )
    if missing := [file for file in run.replay_files if not file.exists()]:
        raise ValueError(
            f"You passed output_dir={str(output_dir)!r}, which has replay_share={run.settings['replay_share']} and no {missing[0]}: its replay rows are "
            "not drawn. Run the rewrite again to finish it, then push."
        )
    if finished and not options.accept_failed and (undrawn := run.metrics.get("undrawn", 0)):
        raise ValueError(
            f"The engine failed at {undrawn:,} attempts of {str(output_dir)!r}, so rows may have fallen back to their demonstration that need "
            "not have, or replay rows are missing. Run the rewrite again, which tries them again, or push the rows as they are with --accept_failed True."
        )
    api, repo_id = open_repo(options)
    revision = options.hub_revision
    source = _source_card(api, run.settings["dataset_name"] if run.source_on_hub else None)
    with tempfile.TemporaryDirectory() as folder:
        rows = [*run.replay_files, *run.row_files]  # all that is trained on, in the order of with_replay/
        content = {"default": rows, "attempts": _attempt_files(run, folder) if options.push_attempts else []}
        parts = {
            name: _named(FOLDERS[name], paths) for name, paths in content.items() if finished or name == "attempts"
        }
        data: list[tuple] = [item for part in parts.values() for item in part.items()]
        data += [(name, text.encode()) for name, text in run.files().items()]
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
                # New ones at each try: only those are compared with what is there, and a commit whose answer was lost
                # is there.
                [*(CommitOperationAdd(*item) for item in [*data, ("README.md", str(card).encode())]), *stale],
                commit_message=commit_message or ("Push rows" if finished else "Push attempts of a run under way"),
                repo_type="dataset",
                revision=revision,
                parent_commit=info.sha,
            )

        try:
            return _tried_again(commit, options.hub_token)
        except BaseException as error:  # ctrl-C too
            error.add_note(_what_has_changed(api, repo_id, revision, before))
            raise


def _what_has_changed(api, repo_id: str, revision: str | None, before: str | None) -> str:
    """
    What there is to know of a push that failed; `before` was the last commit when it began, `None` if it did not come
    to that.
    """
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


def open_repo(options: HubOptions):
    """
    Makes the repository and the branch if there are none; raises what a push would raise. Returns the `HfApi` to go on
    with, and the repository's full name: one that is named without an owner is one of the token's user.
    """
    from huggingface_hub import HfApi, get_token

    repo_id, token, private = options.hub_dataset_id, options.hub_token, options.hub_private_repo
    if repo_id is None:
        raise ValueError("A push needs a repository: pass repo_id='me/name', or set `hub_dataset_id`.")
    if not (token or get_token()):
        raise ValueError(f"There is no Hub token to push to {repo_id} with: set HF_TOKEN, or run `hf auth login`.")
    api = HfApi(token=token, library_name="trl-offpolicy")
    made = _tried_again(lambda: api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True), token)
    repo_id = made.repo_id
    if private and not api.dataset_info(repo_id).private:
        raise ValueError(
            f"You asked for a private repository, but {repo_id} exists and is public. Make it private in its settings, or push to another."
        )
    if (branch := options.hub_revision) is not None:
        _tried_again(lambda: api.create_branch(repo_id, branch=branch, repo_type="dataset", exist_ok=True), token)
    return api, repo_id


def refusals() -> tuple[type[Exception], ...]:
    """What says that the Hub refused, cannot be reached, or sent something unreadable."""
    from huggingface_hub.errors import HfHubHTTPError

    # The first is of the HTTP library that huggingface_hub uses: a line that was cut is one of those, too.
    return HfHubHTTPError.__bases__[0], ConnectionError


def _tried_again(request: Callable, token: str | None = None):
    """
    `request()`, made again after a while where the Hub's answer, or the lack of one, says that this may help; each
    wait is said.
    """
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
    """
    YAML as its version 1.2 and the Hub read it: `no` (Norwegian), `12:30` and `1.10` are texts, and so written back,
    quoted.
    """


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


def _attempt_files(run: RunDirectory, folder: str) -> list[Path]:
    """A Parquet file in `folder` for each journal of a run that has attempts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths, schema = [], attempt_features().arrow_schema
    for journal in run.journals:
        entries = (stored(attempt.entry()) for attempt in run.attempts(journal))
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
