"""
Secrets are taken out of what is printed, journaled or pushed: an error may quote the request it belongs to, a
traceback a variable.
"""

import os
import re


# Names of environment variables that hold a secret, as HF_TOKEN, OPENAI_API_KEY, AWS_SECRET_ACCESS_KEY do.
_SECRET_NAME = re.compile(r"(?:^|_)(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)$", re.IGNORECASE)
REASON = 400  # characters of a reason that are kept
_SHORTEST = 8  # a value of fewer characters could be any word
# Secrets that are recognised by their form: tokens of Hugging Face, OpenAI, GitHub, GitLab, Slack, AWS and others;
# then HTTP headers.
_SECRET_FORM = re.compile(
    r"\b(?:(?:hf|api_org)_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|(?:gh[oprsu]|github_pat)_\w{8,}|glpat-[\w-]{8,}|xox[a-z]-[\w-]{8,}|(?:AKIA|ASIA)[A-Z0-9]{12,})"
    r"|(?<=\bBearer )[^\s\"',;]{4,}"
)
_URL_PASSWORD = re.compile(r"(?<=://)[^/\s@]*@(?:[^/\s@]*@)*")


def redacted(text: str, *secrets: str | None) -> str:
    """
    `text` with `***` in place of every secret in it.

    Args:
        text (`str`): What is about to be shown.
        secrets (`str`): Secrets that the caller knows of; those of the environment (`HF_TOKEN`, `*_API_KEY`, …), user
            and password in a URL, and tokens that can be told by their form (`hf_…`, `sk-…`, …) are found without
            being named.
    """
    known = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= _SHORTEST}
    for secret in sorted(
        known.union(filter(None, secrets)), key=len, reverse=True
    ):  # longest first, since one may be the beginning of another
        text = text.replace(secret, "***")
    return _SECRET_FORM.sub("***", _URL_PASSWORD.sub("***@", text))


def brief(reason: str) -> str:
    """
    What is said of a verdict (it may quote the output of a model's code, or a server), fit to be journaled and pushed:
    no secrets, and short.
    """
    return redacted(reason)[:REASON] if reason else reason
