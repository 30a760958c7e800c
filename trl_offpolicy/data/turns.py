"""
Where an assistant's turn ends, and what it says: told by token ids, since text may hold what only looks like a token.
"""

import re
import warnings
from functools import lru_cache
from typing import NamedTuple

from jinja2 import TemplateError


# Special tokens by their names: those around reasoning (Magistral's [THINK], Command A's <|END_THINKING|>), and those
# that end a turn in one template or another.
_THINK = re.compile(r"think|thought|reason", re.IGNORECASE)
_END = re.compile(r"end|eo[tms]|return|turn\|>|^</s>$", re.IGNORECASE)
_ANSWER = "Zanzibar"  # a word that no chat template says itself


def end_of_turn_id(processing_class) -> int | None:
    """
    The token by which the chat template ends an assistant's turn. It need not be what tokenizer and generation config
    call the end of a sequence: in base checkpoints with a chat template it often is not. `None` if the template ends a
    turn with text, or with nothing.
    """
    if not processing_class.chat_template:
        return None
    added = {*processing_class.get_added_vocab().values(), *processing_class.all_special_ids}

    def behind_the_answer(*following: dict[str, str]) -> list[int]:
        """The added tokens directly behind an answer that these turns follow."""
        turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": _ANSWER}, *following]
        try:
            _, found, text = processing_class.apply_chat_template(turns, tokenize=False).rpartition(_ANSWER)
        except TemplateError:  # the template refuses this conversation
            return []
        ids = processing_class(text.lstrip(), add_special_tokens=False)["input_ids"] if found else []
        return ids[: next((i for i, token in enumerate(ids) if token not in added), len(ids))]

    last, inner = behind_the_answer(), behind_the_answer({"role": "user", "content": "Who?"})
    # A token that is there whether or not another turn follows belongs to this turn; if there are two (Command R), the
    # second ends it.
    shared = [a for i, (a, b) in enumerate(zip(last, inner, strict=False)) if last[:i] == inner[:i] and a == b]
    # If there is none, the last turn may have an end token of its own (gpt-oss), or the first token of the next turn
    # ends this one (GLM).
    return next(iter([*shared[-1:], *last, *inner]), None)


def stop_token_ids(processing_class, declared: int | list[int] | None = None) -> list[int]:
    """
    Every token at which a drawn turn is over, sorted: the chat template's, the tokenizer's, and the generation
    config's (`declared`).
    """
    end = end_of_turn_id(processing_class)
    declared = declared if isinstance(declared, list) else [declared]
    ids = sorted({end, processing_class.eos_token_id, *declared} - {None})
    if end is None:
        warnings.warn(
            f"The chat template ends an assistant's turn with no special token, so completions end at {_names(processing_class, ids)} or at "
            "their limit. If the model does not write that at the end of a turn, use a template that ends turns with a token of their own "
            "(`trl.clone_chat_template` copies another model's).",
            stacklevel=3,
        )
    return ids


def turn_text(processing_class, ids: list[int]) -> str:
    """
    The text of a completion without special tokens, except those around reasoning, which else would run into the
    answer.
    """
    special = special_tokens(processing_class)
    if special.think.isdisjoint(ids):
        return processing_class.decode(ids, skip_special_tokens=True)
    return processing_class.decode([i for i in ids if i in special.think or i not in special.all])


def cut_turn(processing_class, stop_ids: list[int], ids: list[int], at_limit: bool) -> int | None:
    """
    How many of a completion's `ids` there are up to the first of `stop_ids`, that token included; `None` if there is
    none. Then, and if it ran into its limit, this warns of a token in its middle with which other chat templates end a
    turn: the model may do so too.
    """
    if stops := [ids.index(stop) for stop in stop_ids if stop in ids]:
        return min(stops) + 1
    if at_limit and (found := special_tokens(processing_class).ends.intersection(ids[:-1])):
        warnings.warn(
            f"A completion ran to its limit with {_names(processing_class, found)} in its middle, but a turn is over only at "
            f"{_names(processing_class, stop_ids)}. If the model ends its turns there, what follows is junk: give the tokenizer the chat template "
            "that the model was trained with, or make the token its `eos_token`.",
            stacklevel=3,
        )
    return None


def _names(processing_class, ids) -> str:
    return ", ".join(map(repr, processing_class.convert_ids_to_tokens(sorted(ids)))) or "no token at all"


class Special(NamedTuple):
    all: frozenset[int]
    think: frozenset[int]
    ends: frozenset[int]


@lru_cache(16)  # every completion asks for it
def special_tokens(processing_class) -> Special:
    """
    The ids of a tokenizer's special tokens: all, those around reasoning, and those that by their names end a turn.
    """
    names = {i: token.content for i, token in processing_class.added_tokens_decoder.items() if token.special}
    think = frozenset(i for i, name in names.items() if _THINK.search(name))
    return Special(frozenset(names), think, frozenset(i for i, name in names.items() if _END.search(name)) - think)
