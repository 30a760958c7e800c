"""
Control tokens in what others wrote: a problem that holds `<|im_end|>` ends its own turn, since a tokenizer makes the
real token of it.
"""

import re
import warnings
from collections.abc import Iterable

from jinja2 import TemplateError

from .rows import numbered


MODES = ("warn", "refuse", "escape", "allow")
HELP = "Problems that hold the model's control tokens as text: warn, refuse, escape (write a zero-width space into them) or allow."
_PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"You passed control_tokens={mode!r}; use one of {list(MODES)}.")


class ControlTokens:
    """
    The control tokens of a tokenizer, and what is done with texts that hold them.

    They are its special tokens, and whatever else of its added tokens the chat template writes between turns.
    `<think>` and its like, where they are ordinary tokens, are none.

    Args:
        processing_class: Tokenizer or processor; without one (`None`) nothing is known, and nothing done.
        mode (`str`, *optional*, defaults to `"warn"`): `warn` says how many rows, and which; `refuse` raises; `escape`
            writes a zero-width space behind the first character of each, so that every tokenizer takes it for ordinary
            text, in sampling and in training on the rows alike; `allow` leaves them what they are.
    """

    def __init__(self, processing_class, mode: str = "warn"):
        check_mode(mode)
        self.mode = mode
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        added = getattr(tokenizer, "added_tokens_decoder", {}).values() if mode != "allow" else ()
        turns = _rendered(processing_class, _PROBE) if added else ""
        found = {
            t.content for t in added if len(t.content) > 1 and (t.special or t.content.strip() and t.content in turns)
        }
        # The longest first, where one begins with another.
        self.tokens = sorted(found, key=lambda token: (-len(token), token))
        self._pattern = re.compile("|".join(map(re.escape, self.tokens))) if found else None
        self._starts = {token[:2] for token in found}

    def within(self, text: str) -> set[str]:
        """Which of them a text holds."""
        if not any(
            start in text for start in self._starts
        ):  # a quick test that spares the regular expression for nearly all texts
            return set()
        return set(self._pattern.findall(text))

    def check(self, found: Iterable[set[str]], what: str) -> None:
        """Warns or raises for rows (numbered from 0) in whose `what` [`within`] has found some."""
        total, rows, tokens = 0, [], set()
        for total, each in enumerate(found, 1):
            if each:
                rows.append(total - 1)
                tokens |= each
        self.tell(rows, total, sorted(tokens), what)

    def tell(self, rows: list[int], total: int, tokens: list[str], what: str) -> None:
        """The same for rows that are known already."""
        if not rows or self.mode not in ("warn", "refuse"):
            return
        message = f"{numbered(rows, total)} control tokens of the model in {what}: {', '.join(map(repr, tokens))}. The tokenizer takes them for real ones"
        if self.mode == "refuse":
            raise ValueError(
                f"{message}, and you passed control_tokens='refuse'. Remove them, or pass control_tokens='escape' to have them read as text."
            )
        warnings.warn(
            f"{message}: such a text can end its own turn and begin another. Pass control_tokens='escape' to have them read as text, 'refuse' to "
            "stop at them, 'allow' to hear nothing of it.",
            stacklevel=3,
        )

    def prompt(self, prompt: list[dict[str, str]] | str) -> list[dict[str, str]] | str:
        """Messages or a plain text as the model is to see them: escaped, if that was asked for."""
        if self.mode != "escape" or self._pattern is None:
            return prompt
        if isinstance(prompt, str):
            return self._escaped(prompt)
        return [{**turn, "content": self._escaped(turn["content"])} for turn in prompt]

    def _escaped(self, text: str) -> str:
        while self.within(text):
            text = self._pattern.sub(lambda match: f"{match[0][0]}\u200b{match[0][1:]}", text)
        return text


def _rendered(processing_class, turns: list[dict[str, str]]) -> str:
    try:
        return processing_class.apply_chat_template(turns, tokenize=False)
    except (
        TemplateError,
        ValueError,
        TypeError,
        AttributeError,
    ):  # no chat template, or one that expects contents in parts
        return ""


def rendered_before(processing_class, prompt: str) -> str | None:
    """
    The token with which both a text and what the chat template makes of a problem begin: it was rendered already.
    """
    control = ControlTokens(processing_class)
    if control.tokens:
        starts = re.compile(rf"\s*({control._pattern.pattern})")
        given, own = (starts.match(text) for text in (prompt, _rendered(processing_class, _PROBE[:1])))
        if given and own and given[1] == own[1]:
            return given[1]
    return None
