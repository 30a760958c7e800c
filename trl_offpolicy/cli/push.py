"""`trl-offpolicy push`: a finished run to the Hub."""

import shlex
import sys
from dataclasses import dataclass, field

from ..data.redaction import redacted
from ..rewriting.rewrite_config import HubOptions
from .arguments import parser_for


PUSH_EXAMPLES = """\
examples:
  trl-offpolicy push runs/demos --hub_dataset_id me/demos-on-policy --private
  trl-offpolicy push runs/demos --hub_dataset_id me/demos-on-policy --push_attempts False --hub_revision v2

The token is HF_TOKEN's, or that of `hf auth login`. A push is one commit: the Hub has all of it or none. If it failed, run it again.
"""


@dataclass(kw_only=True)
class PushArguments(HubOptions):
    """Which run goes where."""

    run_dir: str = field(
        metadata={"help": "Output directory of a finished rewrite; also the first word after `push`."}
    )
    hub_dataset_id: str = field(metadata={"help": "Dataset repository: owner/name."})


def push(argv: list[str]) -> int:
    from ..rewriting.push import push_run

    description = "Push a finished rewrite to the Hub: its rows, its attempts and a card made from its journal."
    parser = parser_for(PushArguments, "push", description, PUSH_EXAMPLES)
    named = ["--run_dir"] if argv and not argv[0].startswith("-") else []
    (given,) = parser.parse_args_and_config([*named, *argv])
    print(f"run_dir: {given.run_dir}", flush=True)

    def commit():
        return push_run(given.run_dir, given)

    repo_id = pushed(commit, given.run_dir, given.hub_dataset_id, given.hub_token)
    if repo_id is None:
        return 3
    where = f"'{repo_id}', split='train'" + (f", revision='{given.hub_revision}'" if given.hub_revision else "")
    print(f"""python -c "from datasets import load_dataset; print(load_dataset({where}))\"""")
    return 0


def pushed(push, run_dir: str, repo_id: str, token: str | None) -> str | None:
    """
    The full name of the repository that was pushed to; `None` if the push failed, after saying why, what has become of
    it, and how to go on.
    """
    try:
        commit = push()
    except (ValueError, FileNotFoundError):  # the arguments are wrong; nothing was sent
        raise
    except (
        Exception,
        KeyboardInterrupt,
    ) as error:  # any failure of the network or the Hub; the rows are safe on the disk
        message = f"the push failed: {type(error).__name__}: {error}".rstrip(": ")
        notes = getattr(error, "__notes__", None) or ["Nothing has changed on the Hub."]
        print(redacted("\n".join([message, *notes, "To push again:"]), token), file=sys.stderr)
        print(shlex.join(["trl-offpolicy", "push", run_dir, "--hub_dataset_id", repo_id]))
        return None
    print(f"pushed: {commit.commit_url}")
    return commit.repo_url.repo_id
