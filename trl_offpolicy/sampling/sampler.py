"""What every engine has in common: a request, a completion, and the four calls of a `Sampler`."""

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

from jinja2 import TemplateError

from ..data.rows import storable
from ..data.tokenization import encode_prompt
from ..data.turns import cut_turn, turn_text


class SamplerError(RuntimeError):
    """
    The engine cannot go on (it died, no server answers). What it finished before is not lost: run again to resume.
    """


# With these a token is drawn from the model's own distribution.
PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
# Settings that older journals and results do not name, and the values that they had then.
LATER = {"min_p": 0.0, "repetition_penalty": 1.0, "stop": (), "max_repeats": 0}
# Tokens of the longest block whose repeats are counted (`max_repeats`).
LONGEST_BLOCK = 64


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """
    How a completion is drawn; the names are TRL's. `top_k=0` keeps the whole vocabulary. With `max_repeats` above 0 a
    completion is cut (`finish_reason="length"`) when it ends with a block of at most [`LONGEST_BLOCK`] tokens that
    stands there so many times in a row.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_completion_length: int = 2048
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    max_repeats: int = 0

    def __post_init__(self):
        check_sampling(self.min_p, self.repetition_penalty, self.stop, self.max_repeats)
        object.__setattr__(self, "stop", tuple(self.stop))

    @property
    def reshaping(self) -> dict[str, float]:
        """
        The settings, by name, for which a token is not drawn from the model's own distribution. Where there are none
        its log-prob is log μ.
        """
        return reshaped({name: getattr(self, name) for name in PLAIN})

    def settings(self) -> dict[str, Any]:
        """
        By name, for a journal; without those of [`LATER`] that are at their default, which older journals do not name.
        """
        return {name: value for name, value in asdict(self).items() if name not in LATER or value != LATER[name]}


def reshaped(settings: Mapping[str, Any]) -> dict[str, float]:
    """
    Those of the settings by name (a run's, a command's; one that is not there is plain) for which a token is not drawn
    from the model's own distribution.
    """
    return {name: settings[name] for name, plain in PLAIN.items() if settings.get(name, plain) != plain}


def check_sampling(min_p: float, repetition_penalty: float, stop: Sequence[str] | None, max_repeats: int = 0) -> None:
    """Raises `ValueError` for values that no engine can draw with."""
    if not 0 <= min_p <= 1:
        raise ValueError(f"You passed min_p={min_p}; it must be at least 0 and at most 1.")
    if not repetition_penalty > 0:
        raise ValueError(f"You passed repetition_penalty={repetition_penalty}; it must be above 0 (1 is none).")
    if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop or ()):
        raise ValueError(f"You passed stop={stop!r}; it must be a list of texts, none of them empty.")
    if max_repeats < 0 or max_repeats == 1:
        raise ValueError(f"You passed max_repeats={max_repeats}; it must be at least 2, or 0 to let repetitions run.")


@dataclass(frozen=True, slots=True)
class Request:
    """
    One completion to draw for the conversation `prompt`, rendered with `chat_template_kwargs`, or for a plain text,
    which is not rendered; the same `seed` draws the same completion again.

    With an `unhinted_prompt`, each token is drawn from p^(1−λ)·q^λ, normalised: p is the model's distribution after
    `prompt`, q that after `unhinted_prompt`, and λ = clip(`hint_beta`·H(p)/ln V, 0, 1) with the entropy H and V tokens
    in the vocabulary (arXiv 2602.12222). Only a sampler that `draws_hinted` takes it.
    """

    id: str
    prompt: list[dict[str, str]] | str
    seed: int
    params: SamplingParams
    chat_template_kwargs: dict[str, Any] | None = None
    unhinted_prompt: list[dict[str, str]] | str | None = None
    hint_beta: float = 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """What came back for the request of that `id`.

    `completion_ids` end with the end-of-turn token when `finish_reason` is `"stop"`, or with the one that completes a
    stop text, and `log_probs` holds the model's own log-probability (temperature 1, whole vocabulary) of each of them;
    `text` is their decoding ([`~data.turns.turn_text`]), up to a stop text (half a surrogate pair, which some servers
    write, is a `?`: nothing could store it). For a request with an `unhinted_prompt`, `log_probs` are of the mixture that
    the tokens were drawn from, and `unhinted_log_probs` of the model after that prompt. `finish_reason` is `"length"` when the limit cut the completion. When
    there is none, `error` says why: `"refused"` if the prompt cannot be asked (longer than the context, say), whatever
    the seed; `"error"` if the engine failed this once.
    """

    id: str
    text: str
    completion_ids: list[int]
    log_probs: list[float]
    finish_reason: str
    error: str | None = None
    unhinted_log_probs: list[float] | None = None

    def __post_init__(self):
        object.__setattr__(self, "text", storable(self.text))


# Finish reasons with which nothing was drawn. They are not attempts of the model, and a resumed run draws them again.
FAILED = ("refused", "error")


class Sampler:
    """An engine that takes requests at any time and hands completions back in any order.

    One of your own has a name, a revision, a capacity and the first four methods, and may have any of the rest; it
    need not inherit from this class ([`as_sampler`]).
    """

    # Both are written beside each row.
    name: str
    revision: str
    # How many requests keep the engine busy.
    capacity: int
    # The tokenizer that renders its prompts, if it is known, and the ids that end a turn.
    processing_class: Any = None
    stop_token_ids: list[int] = []
    # Whether it takes requests with an `unhinted_prompt`.
    draws_hinted: bool = False
    # Asked while it draws: once this is true, `poll` returns though nothing may be finished. An engine that cannot stop
    # on the way need not ask.
    over: Callable[[], bool] = staticmethod(lambda: False)

    @cached_property
    def slots(self) -> int:
        """How many of the requests are drawn at a time: attempts that may be in vain fill these only."""
        return self.capacity

    @property
    def drawn_tokens(self) -> int | None:
        """
        All tokens since it was made, those under way and of aborted requests included; `None` if it sees them only
        when they are finished. Another thread reads this."""
        return None

    def submit(self, request: Request) -> None:
        """Queues one request."""
        raise NotImplementedError

    def poll(self) -> list[Completion]:
        """
        Waits until at least one request is finished and returns what is; an empty list if none is under way, or it is
        `over`.
        """
        raise NotImplementedError

    def abort(self, request_id: str) -> int | None:
        """
        Forgets a request and returns how many tokens it has drawn for it; one that is finished or unknown is no error.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Frees the engine."""

    def token_log_probs(self, pairs: list[tuple[list[int], list[int]]]) -> list[list[float] | None]:
        """
        For each pair of prompt ids and target ids, the model's own log-probability (temperature 1, whole vocabulary) of
        each target token; `None` for a pair that is longer than the context. Requests under way are not lost.

        Raises:
            NotImplementedError: The engine cannot; also of an empty list, so that it can be asked whether it can.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot tell the log-probabilities of given texts.")

    def with_adapter(self, adapter: str) -> "Sampler":
        """A second sampler on the same loaded weights, whose draws come from them with a LoRA adapter on."""
        raise NotImplementedError(f"{type(self).__name__} cannot draw with an adapter.")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, revision={self.revision!r})"


class OwnSampler(Sampler):
    """A user's own engine, with the defaults of [`Sampler`] for what it does not have."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __getattribute__(self, name: str):
        own = object.__getattribute__(self, "__dict__")
        if name in own or name.startswith("__") or not hasattr(own["sampler"], name):
            return object.__getattribute__(self, name)
        return getattr(own["sampler"], name)


def as_sampler(sampler) -> Sampler:
    """Any engine as a [`Sampler`]: one that inherits from it is returned as it is."""
    return sampler if isinstance(sampler, Sampler) else OwnSampler(sampler)


def needs(package: str, extra: str, what: str):
    """The optional `package`; `ModuleNotFoundError` with the command that installs it where it is missing."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{what} needs {package}, which is not installed: pip install 'trl-offpolicy[{extra}]'."
        ) from error


def cannot_draw_hinted(engine: str) -> ValueError:
    """The error of an engine that is not to draw a token from two distributions."""
    return ValueError(
        f"You passed guided_decoding='hinted' with the engine {engine}, which cannot draw a token from what the model says after two prompts. Use "
        "TransformersSampler (--sampler transformers), or guided_decoding='plain'."
    )


def check_positive(**numbers: float | None) -> None:
    """`ValueError` if one of an engine's options is not above 0; `None` is one that was not passed."""
    for name, number in numbers.items():
        if number is not None and not number > 0:
            raise ValueError(f"You passed {name}={number}; it must be above 0.")


def attempt_seed(seed: int, problem_id: str, stage: str, attempt: int, version: int = 0) -> int:
    """
    The 63-bit seed of one attempt: unrelated between attempts and between `version`s of the policy, and the same on
    every machine and in every order.

    Hashed, because neighbouring seeds share samples in some engines (vLLM expands `n=4, seed=s` to seeds s … s+3).
    """
    key = f"{seed}|{problem_id}|{stage}|{attempt}{f'|{version}' if version else ''}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def prompt_ids(processing_class, request: Request, context: int) -> list[int] | Completion:
    """
    The token ids of a request's prompt; or the answer to it if the chat template refuses it, or it leaves no room for
    a completion.
    """
    try:
        ids = encode_prompt(processing_class, request.prompt, chat_template_kwargs=request.chat_template_kwargs)
    except (TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:  # whatever its code raises
        reason = f"the chat template refuses the prompt: {error}"
    else:
        if len(ids) < context:
            return ids
        reason = f"the prompt has {len(ids)} tokens, but the model's context is {context}"
    return Completion(request.id, "", [], [], "refused", reason)


def drawn_completion(
    request_id: str,
    ids: list[int],
    log_probs: list[float],
    finish_reason: str,
    processing_class,
    stop_ids: list[int],
    stop: Sequence[str] = (),
) -> Completion:
    """
    What an engine has drawn as a completion: over at the first of `stop_ids`, or with the token that completes the
    first of the texts `stop`, wherever the engine ended it.
    """
    if length := cut_turn(processing_class, stop_ids, ids, finish_reason == "length"):
        ids, log_probs, finish_reason = ids[:length], log_probs[:length], "stop"
    text = turn_text(processing_class, ids)
    if holds(text, stop):
        # Up to the token that completes the first of them, so that every engine has drawn as much.
        whole = range(1, len(ids) + 1)
        length = whole[bisect_left(whole, True, key=lambda n: holds(turn_text(processing_class, ids[:n]), stop))]
        ids, log_probs, finish_reason = ids[:length], log_probs[:length], "stop"
        text = turn_text(processing_class, ids)
        text = text[: min(text.find(word) for word in stop if word in text)]
    return Completion(request_id, text, ids, log_probs, finish_reason)


def holds(text: str, stop: Sequence[str]) -> bool:
    """Whether one of the texts `stop` is in `text`."""
    return any(word in text for word in stop)
