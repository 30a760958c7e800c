"""Token ids of prompts, and whether token ids say what their text says."""

import json
from typing import Any

from .formats import as_completion
from .prompts import contents


def encode_prompt(
    processing_class,
    prompt: list[dict[str, str]] | str,
    chat_template: str | None = None,
    tools: list | str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """
    Token ids of a prompt as sampling, training and measuring all see it: rendered by the chat template, up to the
    answer. A row's `tools` (JSON, if a text) and `chat_template_kwargs` go to the template, as in TRL.
    """
    if isinstance(prompt, str):
        return processing_class(prompt)["input_ids"]
    options = {
        "chat_template": chat_template,
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(chat_template_kwargs or {}),
    }
    return processing_class.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **options
    )["input_ids"]


def encode_target(
    processing_class,
    prompt: list[dict[str, str]] | str,
    text: str,
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> tuple[list[int], list[int]]:
    """
    Token ids of a prompt, and of the answer `text` to it as it is trained on: with the end of the turn, and beginning
    where TRL says that the completion begins.
    """
    from trl.data_utils import common_prefix_length

    kwargs = chat_template_kwargs or {}
    ids = encode_prompt(processing_class, prompt, chat_template, chat_template_kwargs=kwargs)
    if isinstance(prompt, str):  # TRL adds the end token to a plain text
        whole = processing_class(prompt + text + processing_class.eos_token)["input_ids"]
    else:
        whole = processing_class.apply_chat_template(
            [*prompt, *as_completion(prompt, text)],
            chat_template=chat_template,
            tokenize=True,
            return_dict=True,
            **kwargs,
        )["input_ids"]
    return ids, whole[common_prefix_length(ids, whole) :]


def says_otherwise(processing_class, row: dict) -> str | None:
    """
    What a row's `completion_ids` decode to, where that is not its `completion`: they are ids of another vocabulary.
    `None` if all is well.

    Letters and digits are compared, at either end: a text may lack its reasoning or a stop string, white space, or
    what has no UTF-8.
    """
    if not row.get("completion_ids") or not row.get("completion"):
        return None
    turns = contents(row["completion"])
    if not all(isinstance(turn, str) for turn in turns):
        return None  # contents in parts (text and images), which no sampler of this package writes
    wanted = "".join(filter(str.isalnum, "".join(turns)))
    for skip in (True, False):  # a text may hold special tokens, such as those around reasoning
        decoded = processing_class.decode(row["completion_ids"], skip_special_tokens=skip)
        letters = "".join(filter(str.isalnum, decoded))
        if letters.startswith(wanted) or letters.endswith(wanted):
            return None
    return decoded


def json_mapping(name: str, value: dict | str, example: str) -> dict:
    """
    The mapping that the setting `name` holds: from Python or a config file a mapping, from the command line JSON; else
    `ValueError`.
    """
    try:
        return dict(json.loads(value) if isinstance(value, str) else value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"You passed {name}={value!r}; write a JSON object such as '{example}'.") from error


def template_kwargs(value: dict | str | None) -> dict | None:
    """`chat_template_kwargs` as a dict, `None` for none; `ValueError` if it is no JSON object."""
    return json_mapping("chat_template_kwargs", value or {}, '{"enable_thinking": false}') or None
