"""
The formats of datasets: which columns hold the problem, the demonstration and the answer, and how a row of each is
read.
"""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import repeat
from typing import Any

from ..answers.extraction import final_answer
from .demonstrations import asks_for_box, clean_reference, in_asked_form
from .loading import plain_rows
from .prompts import GUIDED_PROMPT, SOLVE_PROMPT, fill
from .rows import Problem, content_id, copy_id, numbered


# Formats by the columns that make them, in the order they are looked for: (prompt column, demonstration column).
FORMATS = (
    ("messages", "messages"),
    ("prompt", "completion"),
    ("problem", "solution"),
    ("question", "solution"),
    ("question", "answer"),
    ("conversations", "conversations"),  # ShareGPT
    ("instruction", "output"),  # Alpaca, whose `input` stands below the instruction
)
KNOWN_FORMATS = ", ".join(" + ".join(dict.fromkeys(pair)) for pair in FORMATS)  # for error messages
ASKED = (
    "problem",
    "question",
    "instruction",
)  # prompt columns that hold a bare problem, which `solve_prompt` turns into a prompt
PLAIN_PROMPTS = (
    "The prompts are plain texts: the model is asked them as they are, without its chat template, and so does training see them. If they are meant "
    "as messages, write [{'role': 'user', 'content': ...}] for each, or call the column `problem`."
)
# Where there are gold answers alone: the columns that may hold the problem.
PROBLEM_COLUMNS = ("prompt", "problem", "question")
# Names that our output or TRL's data preparation gives a meaning: an input column of that name moves to
# `input_<name>`.
_TAKEN = {
    "prompt", "completion", "id", "source", "answer", "num_sampled", "num_correct", "self_sampled", "self_correct", "completion_ids", "behavior_log_probs",
    "model", "model_revision", "temperature", "top_p", "top_k", "behavior_prompt", "messages", "conversations", "text", "input_ids", "labels", "attention_mask", "seq_lengths",
    "completion_mask", "assistant_masks", "weight", "reward", "initial_log_prob", "candidate", "hint_beta", "min_p", "repetition_penalty",
}  # fmt: skip


def text_columns(dataset, answer_column: str = "answer", others: Iterable[str] = ()):
    """
    The columns of a `datasets.Dataset` that [`read_row`] reads, and the `others` that it has, such as those that a
    verifier names; `ValueError` if there are none to be read.
    """
    carried_columns(dataset.column_names, answer_column)
    read = {*find_format(dataset.column_names, answer_column), "input", answer_column, "tools", "chat_template_kwargs"}
    read |= set(others)
    return dataset.select_columns([name for name in dataset.column_names if name in read])


def known_format(columns: Iterable[str]) -> tuple[str, str] | None:
    """The first of [`FORMATS`] whose columns are all there."""
    columns = set(columns)
    return next((pair for pair in FORMATS if columns.issuperset(pair)), None)


def find_format(columns: Iterable[str], answer_column: str | None = None) -> tuple[str, str | None]:
    """
    (prompt column, demonstration column) of a dataset with these `columns`. With `answer_column`, gold answers in it
    are enough, and the demonstration column is `None`.

    Raises:
        ValueError: There is neither; names what was found.
    """
    columns = list(columns)
    if pair := known_format(columns):
        return pair
    if answer_column in columns:
        for column in PROBLEM_COLUMNS:
            if column in columns:
                return column, None
    raise ValueError(
        f"The dataset has the columns {columns}, but needed is a problem and its demonstration: one of {KNOWN_FORMATS}"
        + (f"; or {' or '.join(PROBLEM_COLUMNS)} with a gold `{answer_column}`" if answer_column else "")
        + ". Rename yours with `dataset.rename_columns`, or on the command line with --column_mapping problem=mine,solution=mine_too."
    )


def carried_columns(columns: Iterable[str], answer_column: str = "answer") -> dict[str, str]:
    """
    Input column → output column, for everything that our own columns do not already say.

    Raises:
        ValueError: There is no `answer_column`, and it is not the default, without which answers are those of the
            demonstrations.
    """
    columns = list(columns)
    prompt_column, demonstration_column = find_format(columns, answer_column)
    if answer_column != "answer" and answer_column not in columns:
        raise ValueError(
            f"You passed answer_column={answer_column!r}, but the dataset has the columns {columns} and no {answer_column}."
        )
    # A prompt comes out as it came in, and so does a gold answer; `answer` may also hold the demonstration (GSM8K), or
    # be none of ours.
    same = {prompt_column} & {"prompt"} | {answer_column} & {"answer"} - {demonstration_column}
    return moved([column for column in columns if column not in same], _TAKEN)


def moved(columns: Iterable[str], taken: Iterable[str]) -> dict[str, str]:
    """Column → its name beside columns of ours that have the names `taken`: `input_<name>` if it is one of them."""
    columns = list(columns)
    names = {column: f"input_{column}" for column in columns if column in taken}
    for name in columns:
        if name not in taken:
            column = name
            # A dataset that was rewritten before has an `input_completion`, and a `completion` that is the
            # demonstration now.
            while name in names.values():
                name = f"input_{name}"
            names[column] = name
    return {column: names[column] for column in columns}


@lru_cache(16)  # all rows of a dataset have the same columns
def _layout(columns: tuple[str, ...], answer_column: str) -> tuple[str, str | None]:
    carried_columns(columns, answer_column)  # raises without that column
    return find_format(columns, answer_column)


_SHAREGPT = {"human": "user", "gpt": "assistant"}
# What a message may say beside its content, which chat templates write into a prompt: a prompt without it is another.
_BESIDE = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def _turn(message) -> dict[str, str] | None:
    """A message with `role` and `content`, or ShareGPT's with `from` and `value`; `None` if it is neither."""
    if not isinstance(message, dict):
        return None
    role = message.get("role") or _SHAREGPT.get(message.get("from"), message.get("from"))
    content = message["value"] if message.get("content") is None and "value" in message else message.get("content")
    return {"role": role, "content": content} if role and isinstance(content, str) else None


def _messages(value, role: str, what: str) -> list[dict[str, str]]:
    if isinstance(value, str):
        return [{"role": role, "content": value}] if value.strip() else []
    if value is None:
        return []
    beside = {k for m in value if isinstance(m, dict) for k in _BESIDE if m.get(k)} if isinstance(value, list) else ()
    if beside:
        raise ValueError(
            f"{what} has messages with {' and '.join(sorted(beside))}, but a turn is its `content` here, and the rest would be lost. Write it into "
            "the content as the model's chat template does (reasoning as <think>…</think>), or leave such rows out with `dataset.filter`."
        )
    if isinstance(value, list) and all(turns := [_turn(message) for message in value]):
        return turns
    raise ValueError(
        f"{what} must be a text or a list of {{'role', 'content'}} with text contents, but is {value!r:.200}."
    )


class IncompleteRow(ValueError):
    """A row of which nothing can be made; says what it `lacks`, and its position, from 0."""

    def __init__(self, index: int, lacks: str):
        super().__init__(f"Row {index} (counted from 0) has {lacks}. {_COMPLETE}")
        self.lacks = lacks


_COMPLETE = "Fill it in, or leave such rows out: --skip_incomplete on the command line, `dataset.filter` in Python."


def read_row(
    row: dict, index: int, answer_column: str, solve_prompt: str, system_prompt: str | None = None
) -> Problem:
    """One row as a `Problem`.

    Raises:
        IncompleteRow: It has no problem, no demonstration though its dataset has a column of them (such a row has no
            fallback), or neither demonstration nor gold answer.
        ValueError: What it has is of another kind; with its position, from 0.
    """
    prompt_column, demonstration_column = _layout(tuple(row), answer_column)
    where = f"Row {index}"
    own = own_prompt(row, prompt_column, where)
    turns = _messages(own, "user", where)
    if prompt_column == demonstration_column:
        *_, last = _messages(row[prompt_column], "user", where) or [{"role": "", "content": ""}]
        demonstration = last["content"] if last["role"] == "assistant" else ""
    else:
        demonstration = _demonstrated(row, index, demonstration_column)
    if demonstration is None and is_missing(row[answer_column]):
        message = f"`{answer_column}` is {row[answer_column]!r}, and no attempt could be kept"
        raise IncompleteRow(index, f"neither a demonstration nor a gold answer: {message}")
    if demonstration is not None and not demonstration.strip():
        message = (
            f"`{demonstration_column}` is {row[demonstration_column]!r:.200}, and there is nothing to fall back to"
        )
        raise IncompleteRow(index, f"no demonstration: {message}")
    user_turns = [m["content"] for m in turns if m["role"] == "user"]
    if not user_turns or not user_turns[-1].strip():
        raise IncompleteRow(index, f"no problem: `{prompt_column}` is {row[prompt_column]!r:.200}")
    answer = None if demonstration_column == answer_column else row.get(answer_column)
    if isinstance(answer, (list, dict)):
        raise ValueError(
            f"Row {index}: `{answer_column}` is {answer!r:.200}; a gold answer is one text. Write it so, name another column, or rename this "
            "one with `dataset.rename_column`, and the last box of each demonstration is its answer."
        )
    answer = final_answer(demonstration or "") if is_missing(answer) else str(answer).strip()
    row_id = content_id(turns, answer)
    prompt = own if isinstance(own, str) else turns
    if prompt_column in ASKED:
        asked = [{"role": "user", "content": fill(solve_prompt, problem=user_turns[-1])}]
        prompt = asked if system_prompt is None else [{"role": "system", "content": system_prompt}, *asked]
    row = row if answer_column == "answer" else {**row, "answer": row[answer_column]}
    return Problem(row_id, prompt, user_turns[-1], demonstration, answer, row)


def own_prompt(row: dict, column: str, where: str) -> list[dict[str, str]] | str:
    """
    What the prompt's column of a row holds: a text (Alpaca's `input` stands below its instruction), or messages,
    without the last one where that is the demonstration.

    Raises:
        ValueError: It is neither; begins with `where`.
    """
    if column == "instruction" and not is_missing(row.get("input")):
        return f"{row[column]}\n\n{row['input']}"
    if isinstance(row[column], str):
        return row[column]
    turns = _messages(row[column], "user", f"{where}: `{column}`")
    demonstrated = column in ("messages", "conversations") and turns and turns[-1]["role"] == "assistant"
    return turns[:-1] if demonstrated else turns


def _demonstrated(row: dict, index: int, column: str | None) -> str | None:
    """The demonstration's text, empty where the row has none; `None` where there is no `column` of them."""
    if column is None:
        return None
    turns = _messages(row[column], "assistant", f"Row {index}: `{column}`")
    if len(turns) > 1:
        raise ValueError(
            f"Row {index}: `{column}` has {len(turns)} messages; a rewrite replaces exactly one assistant turn."
        )
    return turns[0]["content"] if turns else ""


def is_missing(value) -> bool:
    """Whether a cell says nothing: null, NaN (what a table of numbers has for it), or blank."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def tell_missing_answers(rows: Iterable[dict], column: str, instead: str) -> Iterator[dict]:
    """Hands the rows on, and at their end warns of those where `column`, which some row has, says nothing."""
    total, missing = 0, []
    for total, row in enumerate(rows, 1):
        if column in row and is_missing(row[column]):
            missing.append(total - 1)
        yield row
    if missing:
        warnings.warn(
            f"{numbered(missing, total)} no `{column}`: {instead} is taken for the gold answer. Fill it in, or drop them with `dataset.filter`.",
            stacklevel=2,
        )


def guided_prompt(
    problem: Problem, template: str = GUIDED_PROMPT, clean: bool = True, hint: str | None = None
) -> list[dict[str, str]] | str:
    """
    A problem's own prompt with its last user turn, or its text, replaced by `template`, which holds the problem and
    the reference ([`clean_reference`]), or a `hint` in its place.
    """
    if hint is None:
        reference = clean_reference(problem.demonstration) if clean else problem.demonstration
        text = fill(template, problem=problem.problem, solution=reference)
    else:
        text = fill(template, problem=problem.problem, hint=hint)
    if isinstance(problem.prompt, str):
        return text
    last = max(i for i, turn in enumerate(problem.prompt) if turn["role"] == "user")
    return [{**turn, "content": text} if i == last else turn for i, turn in enumerate(problem.prompt)]


def read_rows(
    rows: Iterable[dict],
    answer_column: str = "answer",
    solve_prompt: str = "{problem}",
    copies: Iterable[int] | None = None,
    system_prompt: str | None = None,
) -> Iterator[Problem]:
    """
    Every row as a `Problem`; with the `copies` that [`number_copies`] counts, each has an id of its own.

    Raises `ValueError`, after the last row, if some are incomplete ([`IncompleteRow`]); says how many, and which.
    """
    incomplete, lacks, index = [], "", -1
    for index, (row, copy) in enumerate(zip(rows, repeat(1) if copies is None else copies, strict=copies is not None)):
        try:
            problem = read_row(row, index, answer_column, solve_prompt, system_prompt)
        except IncompleteRow as error:
            lacks = lacks or error.lacks
            incomplete.append(index)
        else:
            yield problem if copy == 1 else replace(problem, id=copy_id(int(problem.id, 16), copy))
    if incomplete:
        first = f" (row {incomplete[0]})" if len(incomplete) > 1 else ""
        raise ValueError(f"{numbered(incomplete, index + 1)} {lacks}{first}. {_COMPLETE}")


def complete_rows(dataset, answer_column: str = "answer"):
    """
    The rows of a `datasets.Dataset` that are not incomplete ([`IncompleteRow`]); says how many others are left out,
    and which.
    """
    incomplete = []
    for index, row in enumerate(text_columns(plain_rows(dataset), answer_column)):
        try:
            read_row(row, index, answer_column, "{problem}")
        except IncompleteRow:
            incomplete.append(index)
    if not incomplete:
        return dataset
    warnings.warn(
        f"{numbered(incomplete, len(dataset))} no problem or nothing to fall back to: left out.", stacklevel=2
    )
    return dataset.select(sorted({*range(len(dataset))}.difference(incomplete)))


def as_completion(prompt: list[dict[str, str]] | str, text: str) -> list[dict[str, str]] | str:
    """A completion of `prompt` in its form: text to a plain text, one message to messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def expert_row(row: dict, index: int, answer_column: str = "answer", solve_prompt: str = SOLVE_PROMPT) -> dict:
    """`prompt` and `completion` of a row as an `expert` row of a rewrite has them; raises as [`read_row`] does."""
    problem = read_row(row, index, answer_column, solve_prompt)
    text = problem.demonstration
    if asks_for_box(problem.prompt):
        text = in_asked_form(text, problem.answer)
    return {"prompt": problem.prompt, "completion": as_completion(problem.prompt, text)}


def has_plain_prompts(features, columns: Iterable[str], answer_column: str = "answer") -> bool:
    """
    Whether the prompts of a dataset with these `datasets.Features` are plain texts, which no chat template renders.
    """
    column = find_format(columns, answer_column)[0]
    return column == "prompt" and getattr(features[column], "dtype", None) in ("string", "large_string")


def demonstration(row: dict) -> str | None:
    """The expert's text of an output row, from the column in which it was carried through; `None` if it was not."""
    for column in ("input_messages", "input_completion", "solution", "input_answer", "input_conversations", "output"):
        value = row.get(column)
        if value:
            return value if isinstance(value, str) else _turn(value[-1])["content"]
    return None


def output_features(
    input_features=None,
    columns: Iterable[str] = (),
    answer_column: str = "answer",
    chat_template_kwargs: dict[str, Any] | None = None,
    ranked: bool = False,
    several: bool = False,
    hinted: bool = False,
    sampling: Iterable[str] = (),
):
    """
    `datasets.Features` of the output: ours (with `initial_log_prob` where candidates are `ranked` by it, `candidate`
    where a problem may have `several` rows, `hint_beta` with `hinted` decoding, and the `sampling` settings of these names),
    then the carried columns with the type they came in.
    """
    from datasets import Dataset, Features, List, Value

    turns = List({"role": Value("string"), "content": Value("string")})
    if input_features and has_plain_prompts(input_features, columns, answer_column):
        turns = Value("string")
    given = {"chat_template_kwargs": chat_template_kwargs} if chat_template_kwargs else None
    ours = {
        "prompt": turns,
        "completion": turns,
        "id": Value("string"),
        "source": Value("string"),
        "answer": Value("string"),
        "num_sampled": Value("int32"),
        "num_correct": Value("int32"),
        "self_sampled": Value("int32"),
        "self_correct": Value("int32"),
        "completion_ids": List(Value("int32")),
        "behavior_log_probs": List(Value("float32")),
        "model": Value("string"),
        "model_revision": Value("string"),
        "temperature": Value("float32"),
        "top_p": Value("float32"),
        "top_k": Value("int32"),
        "behavior_prompt": turns,
        **({"initial_log_prob": Value("float32")} if ranked else {}),
        **({"candidate": Value("int32")} if several else {}),
        **({"hint_beta": Value("float32")} if hinted else {}),
        **{name: Value("float32") for name in sampling},
    }
    carried = (
        {new: input_features[old] for old, new in carried_columns(columns, answer_column).items()}
        if input_features
        else {}
    )
    return Features({**ours, **(Dataset.from_list([given]).features if given else {}), **carried})
