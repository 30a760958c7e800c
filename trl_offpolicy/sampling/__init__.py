"""What every engine has in common: a request, a completion, and the four calls of a `Sampler`."""

import hashlib
import os
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a completion is drawn; the names are TRL's. `top_k=0` keeps the whole vocabulary."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_completion_length: int = 2048


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to draw for the conversation `prompt`; the same `seed` draws the same completion again."""

    id: str
    prompt: list[dict[str, str]]
    seed: int
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Completion:
    """What came back for the request of that `id`.

    `completion_ids` end with the end-of-turn token when `finish_reason` is `"stop"`, and `log_probs` holds the model's
    own log-probability (temperature 1, whole vocabulary) of each of them; `text` is their decoding without special tokens.
    `finish_reason` is `"length"` when the limit cut the completion, and `"error"` when it could not be drawn: `error` says why.
    """

    id: str
    text: str
    completion_ids: list[int]
    log_probs: list[float]
    finish_reason: str
    error: str | None = None


class Sampler(Protocol):
    """An engine that takes requests at any time and hands completions back in any order.

    `name` and `revision` are written beside each row; `capacity` is how many requests keep the engine busy.
    """

    name: str
    revision: str
    capacity: int

    def submit(self, request: Request) -> None:
        """Queues one request."""

    def poll(self) -> list[Completion]:
        """Waits until at least one request is finished and returns what is; an empty list if none is under way."""

    def abort(self, request_id: str) -> None:
        """Forgets a request; one that is finished or unknown is no error."""

    def close(self) -> None:
        """Frees the engine."""


def attempt_seed(seed: int, problem_id: str, stage: str, attempt: int) -> int:
    """The 63-bit seed of one attempt: unrelated between attempts, and the same on every machine and in every order.

    Hashed, because neighbouring seeds share samples in some engines (vLLM expands `n=4, seed=s` to seeds s … s+3).
    """
    key = f"{seed}|{problem_id}|{stage}|{attempt}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def hub_commit(model: str, revision: str | None = None) -> str | None:
    """The commit from which a Hub model was just loaded, as the cache has it (a config no longer says so in transformers 5); `None`
    for a local directory."""
    from huggingface_hub import HfApi

    if os.path.isdir(model):
        return None
    return HfApi().resolve_revision(model, revision=revision, local_files_only=True).resolved
