"""Fills the page of commands with what each command's `--help` prints, so that the two cannot differ."""

import os
import subprocess
import sys

from trl_offpolicy.cli import COMMANDS


def on_page_markdown(markdown: str, page, **_) -> str:
    """MkDocs calls it with each page's text before it is rendered."""
    if page.file.src_uri != "reference/commands.md":
        return markdown
    environment = {**os.environ, "COLUMNS": "120"}
    told = []
    for command in COMMANDS:
        call = [sys.executable, "-m", "trl_offpolicy.cli", command, "--help"]
        help_text = subprocess.run(call, env=environment, capture_output=True, text=True, check=True).stdout
        told.append(f"## {command}\n\n```text\n{help_text.rstrip()}\n```\n")
    return markdown + "\n" + "\n".join(told)
