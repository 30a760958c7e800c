"""
What a server sent, held against what was asked, and what is behind it when it sent nothing: pure functions of
`OpenAISampler`.
"""

import email.utils
import socket
import ssl
import time
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ..data.redaction import redacted
from .sampler import SamplerError


# An engine that computes in 16 bits may report a log-prob slightly above 0.
MOST_LOG_PROB = 0.01
# vLLM writes this for minus infinity, which JSON does not have, and from which nothing can be drawn.
NO_LOG_PROB = -9999.0
# Finish reasons with which a server ends a completion on its own account; `Completion.error` says so.
ENDED_BY_SERVER = ("content_filter", "refusal", "tool_calls", "function_call")
# Fields that a message may have beside `content`. A server's parsers may move parts of the model's text into any other
# field.
HARMLESS = ("role", "content", "name", "id", "type", "object", "annotations", "refusal")


def read_answer(
    response, url: str, token_ids: bool, most: int, vocabulary: int
) -> tuple[str, list[int], list[float], str]:
    """
    Text, token ids, log-probs and finish reason of the one completion in a response of the `openai` SDK, which checks
    nothing.

    Args:
        response: Of `completions.create` or `chat.completions.create`; unless `token_ids`, ids and log-probs are
            empty.
        url (`str`): The server, for a message.
        token_ids (`bool`): Whether token ids and log-probs were asked for.
        most (`int`): How many tokens were asked for at most.
        vocabulary (`int`): How many token ids there are.

    Raises:
        ValueError: It is no answer to what was asked (a proxy's error page, half a JSON, ids that are none): the
            server's fault.
        NotImplementedError: It is one, without the token ids and log-probs that were asked for.
        SamplerError: The server has cut something out of what the model wrote; no row could be made of the rest.
    """
    try:
        (choice,) = response.choices
        reason = choice.finish_reason
        if token_ids:
            text, ids = choice.text, getattr(choice, "token_ids", None)
            log_probs = getattr(choice.logprobs, "token_logprobs", None)
        elif not hasattr(choice, "message"):  # the answer to a plain-text prompt
            text, ids, log_probs = choice.text, [], []
        else:
            message = choice.message.model_dump(warnings=False)
            text, ids, log_probs = choice.message.content, [], []
            if parsed := [name for name, part in message.items() if name not in HARMLESS and _holds_text(part)]:
                raise SamplerError(
                    f"{url} takes a part out of what the model wrote (`{'`, `'.join(parsed)}` beside `content`), so no row would be what "
                    "the model wrote. Start it without what takes it apart: vLLM and SGLang without --reasoning-parser and "
                    "--tool-call-parser, llama.cpp with --reasoning-format none."
                )
            if message.get("refusal"):
                reason = "refusal"
            if text is None and reason != "stop":  # the limit, or the server, ended it before any text
                text = ""
        if reason not in ("stop", "length", *(["repetition"] if token_ids else []), *ENDED_BY_SERVER):
            raise ValueError(f"finish_reason {reason!r:.50}")
        if not isinstance(text, str):
            raise ValueError(f"the text {text!r:.50}")
        if token_ids and reason not in ENDED_BY_SERVER:
            if not ids or log_probs is None:
                raise NotImplementedError("it returns no token ids with log-probs")
            _check_tokens(ids, log_probs, most, vocabulary)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"it sent something that is no completion ({error}): {str(response)[:200]!r}") from error
    return text, ids, [float(log_prob) for log_prob in log_probs or ()], reason


def read_prompt_log_probs(found: list, ids: list[int]) -> list[float]:
    """
    The log-prob of each of a prompt's `ids` but the first, from vLLM's `prompt_logprobs`; `ValueError` if they are
    none.
    """
    try:
        values = [of[str(token)]["logprob"] for of, token in zip(found[1:], ids[1:], strict=True)]
        _check_tokens(ids[1:], values, len(ids), max(ids) + 1)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its `prompt_logprobs` are none of this prompt: {error!r:.100}") from error
    return values


def _holds_text(part) -> bool:
    if isinstance(part, (dict, list)):
        return any(map(_holds_text, part.values() if isinstance(part, dict) else part))
    return isinstance(part, str) and part != ""


def _check_tokens(ids: list[int], log_probs: list[float], most: int, vocabulary: int) -> None:
    if len(ids) != len(log_probs):
        raise ValueError(f"{len(ids)} token ids with {len(log_probs)} log-probs")
    if len(ids) > most:
        raise ValueError(f"{len(ids)} token ids where at most {most} were asked for")
    for token in ids:
        if type(token) is not int or not 0 <= token < vocabulary:
            raise ValueError(f"the token id {token!r:.50}; they are numbers from 0 to {vocabulary - 1}")
    for log_prob in log_probs:
        if type(log_prob) not in (int, float) or not NO_LOG_PROB < log_prob <= MOST_LOG_PROB:
            raise ValueError(f"the log-prob {log_prob!r:.50}")


def ended(reason: str, special: bool, length: int, most: int) -> tuple[str, str | None]:
    """
    How a completion without one of our end-of-turn tokens has ended, and a sentence on a server that ends them in a
    way of its own.

    Args:
        reason (`str`): What the server says, `"stop"`, `"length"`, or vLLM's `"repetition"` (`max_repeats`).
        special (`bool`): Whether the last token is a special one.
        length (`int`): How many tokens it has.
        most (`int`): How many were asked for at most.
    """
    if (length == most and not special) or reason == "repetition":
        return "length", None  # whatever finish reason the server gives
    if reason == "length" and length < most:
        return reason, (
            "has cut a completion before the limit that was asked for; what is cut is never kept. Let it write as much: vLLM with "
            "--generation-config vllm, or with a larger --max-model-len."
        )
    if reason == "stop" and not special:
        return reason, (
            "has ended a completion at no token that ends a turn: at a text, or it keeps the last token to itself. Rows made of such ones "
            "do not teach where a turn ends. Start it without stop texts, and so that it returns every token it draws."
        )
    return reason, None


def retry_after(error: BaseException) -> float | None:
    """
    Seconds for which a server that answered with `error` asks us to wait: `Retry-After` as a number or a date (RFC
    9110, 10.2.3).
    """
    said = error.response.headers.get("Retry-After") if hasattr(error, "response") else None
    if said is None:
        return None
    try:
        seconds = (
            float(said) if said[:1].isdigit() else email.utils.mktime_tz(email.utils.parsedate_tz(said)) - time.time()
        )
    except (ValueError, TypeError, OverflowError):  # neither a number nor a date
        return None
    return seconds if seconds > 0 else None


def cause(error: BaseException) -> str:
    """
    What is behind an error, in one line. Of a connection the SDK only says that there was an error; why is in what it
    came from.
    """
    chain = [error]
    while below := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(below)
    root = chain[-1]
    if isinstance(root, socket.gaierror):
        return f"the name cannot be resolved ({root}); is the host right?"
    if isinstance(root, ConnectionRefusedError):
        return "nothing listens there; is the server up, and the port right?"
    if isinstance(root, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({root}); SSL_CERT_FILE names the authorities that are"
    if isinstance(root, ssl.SSLError):
        return f"it does not answer in TLS ({root}); write http:// for a server without it"
    if "illegal status line" in str(root):
        return f"it does not answer in HTTP ({root}); write https:// for a server with TLS"
    if any(type(each).__name__ == "ConnectTimeout" for each in chain):
        return "no connection in time; is the host right, and can it be reached from here?"
    if str(error) == "Connection error.":
        error = next((e for e in reversed(chain) if str(e)), error)
    return f"{type(error).__name__}: {str(error) or 'no answer in time'}"


def shown(url: str) -> str:
    """A server as it is printed: without user and password, and with the proxy that the environment puts before it."""
    parts, proxies = urlsplit(url), getproxies()
    direct = proxy_bypass(parts.netloc.rpartition("@")[2])
    proxy = None if direct else proxies.get(parts.scheme) or proxies.get("all")
    if proxy:
        url = f"{url} (through the proxy {proxy if '://' in proxy else f'http://{proxy}'})"
    return redacted(url)
