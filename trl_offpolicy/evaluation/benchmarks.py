"""
The problems a model is evaluated on: benchmarks by name, file or Hub id, and the exact prompts they are asked with.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..answers.extraction import final_answer
from ..data import prompts
from ..data.control_tokens import ControlTokens, rendered_before
from ..data.formats import (
    ASKED,
    PLAIN_PROMPTS,
    as_completion,
    demonstration,
    is_missing,
    own_prompt,
    tell_missing_answers,
)
from ..data.loading import load_rows, plain_rows
from ..data.rows import Source, content_id
from ..data.tokenization import encode_prompt


# Name → Hub id, configuration, split. Files of your own take any of these rows' columns: problem or question; answer
# or final_answer.
BENCHMARKS = {
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "minerva_math": ("math-ai/minervamath", None, "test"),
    "olympiadbench": ("math-ai/olympiadbench", None, "test"),  # 674 problems; the paper's copy has 675
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "amc23": ("math-ai/amc23", None, "test"),
    "aime25": ("math-ai/aime25", None, "test"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
}

_PAPER = {
    "num_generations": 16,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "max_completion_length": 4096,
    "seed": 0,
}
PRESETS = {
    # "Mind the Gap" (arXiv 2509.15157), as its code evaluates Qwen2.5-Math. It differs from these settings in what we
    # do not copy: its grader takes numbers within 1e-4 and 100 times too large or small; its accuracy is the mean of
    # 16 per-run accuracies, each rounded to 0.1 points; the answer's instruction stood in the system turn in training.
    "paper": {
        **_PAPER, "system_prompt": "You are a helpful assistant.", "solve_prompt": prompts.SOLVE_PROMPT,
    },
    # The same for Llama-3.1-8B-Instruct. Its hard-coded header begins with <|begin_of_text|>, and the engine adds
    # another; ours does not.
    "paper_llama": {
        **_PAPER, "system_prompt": None,
        "solve_prompt": "{problem}\nLet's think step by step and output the final answer within \\boxed{}.",
    },
}  # fmt: skip


# Where a row's prompt or problem is looked for, in the order in which a rewrite takes them.
PROMPT_COLUMNS = ("messages", "prompt", "problem", "question", "conversations", "instruction")


@dataclass(frozen=True, slots=True)
class Question:
    """One problem of a benchmark."""

    id: str
    prompt: list[dict[str, str]] | str
    problem: str | None  # what `solve_prompt` was filled with; `None` where the row brought a prompt of its own
    answer: str
    row: dict  # as the benchmark has it: its other columns are for verifiers that ask for them


def load_benchmark(name: str):
    """
    (short name, rows) of a benchmark.

    Args:
        name (`str`): One of `BENCHMARKS`; a JSONL, JSON, CSV or Parquet file or a directory; or a Hub dataset as `ID`,
            `ID:SPLIT` or `ID:CONFIG:SPLIT` (split `test` by default).

    Raises:
        ValueError: It is none of these.
        FileNotFoundError: It is a path at which there is nothing.
    """
    if name in BENCHMARKS:
        return name, load_rows(*BENCHMARKS[name])
    if (
        Path(name).exists()
        or name.startswith((".", "/", "~"))
        or Path(name).suffix in (".jsonl", ".json", ".csv", ".parquet")
    ):
        return Path(name).stem, load_rows(name, named="benchmarks")
    hub_id, *where = name.split(":")
    if "/" not in hub_id or len(where) > 2:
        raise ValueError(
            f"You passed the benchmark {name!r}; use one of {', '.join(BENCHMARKS)}, a file or directory, or a Hub dataset such as "
            "openai/gsm8k:main:test (id:config:split)."
        )
    return hub_id.split("/")[-1], load_rows(
        hub_id, where[0] if len(where) == 2 else None, where[-1] if where else "test"
    )


def load_benchmarks(names: Iterable[str]) -> dict:
    """`{short name: rows}`; two of the same short name are an error."""
    found: dict = {}
    for name in names:
        short, rows = load_benchmark(name)
        if short in found:
            raise ValueError(f"You passed two benchmarks called {short!r}; rename one of the files.")
        found[short] = rows
    return found


def read_questions(name: str, rows: Iterable[dict], solve_prompt: str, system_prompt: str | None) -> list[Question]:
    """
    Every row as a `Question`, asked as a rewrite asks it; a second row with the same prompt and answer has the id
    `<id>-2`, so its samples are its own.
    """
    questions, seen, plain = [], {}, 0
    rows = tell_missing_answers(plain_rows(rows), "answer", "another column's answer, or what the solution boxes,")
    for index, row in enumerate(rows):
        where = f"Row {index} of benchmark {name!r}"
        answer = _answer(row)
        if not answer:
            raise ValueError(f"{where} has no `answer`; its columns are {list(row)}.")
        column = next((name for name in PROMPT_COLUMNS if row.get(name)), None)
        if column is None:
            raise ValueError(
                f"{where} has no `prompt`, `problem` or `question`, and no messages or instruction; its columns are {list(row)}."
            )
        prompt, problem = own_prompt(row, column, where), None
        if column in ASKED:
            problem = prompts.contents(prompt)[-1]
            prompt = [{"role": "system", "content": system_prompt}] if system_prompt else []
            prompt.append({"role": "user", "content": prompts.fill(solve_prompt, problem=problem)})
        plain += isinstance(prompt, str)
        # The same words as a plain text and as a message are two questions: only the message is rendered by the
        # template.
        key = content_id([{"role": "", "content": prompt}] if isinstance(prompt, str) else prompt, answer)
        seen[key] = copy = seen.get(key, 0) + 1
        questions.append(Question(key if copy == 1 else f"{key}-{copy}", prompt, problem, answer, row))
    if not questions:
        raise ValueError(f"Benchmark {name!r} has no rows.")
    if plain:
        warnings.warn(f"Benchmark {name!r}: {PLAIN_PROMPTS}", stacklevel=2)
    return questions


def _answer(row: dict) -> str | None:
    """
    The gold answer: a column of that name (GSM8K's holds the whole solution), else the last box of solution or
    demonstration.
    """
    for column in ("answer", "final_answer"):
        value = row.get(column)
        value = ", ".join(map(str, value)) if isinstance(value, list) else value
        if not is_missing(value):
            return final_answer(str(value)) or str(value)
    # Renamed as a rewrite would rename them.
    carried = {f"input_{name}": row.get(name) for name in ("messages", "completion", "conversations")}
    texts = row.get("solution"), demonstration(carried | {"output": row.get("output")})
    return next((found for text in texts if (found := final_answer(text or ""))), None)


def without_control_tokens(
    processing_class, questions: dict[str, list[Question]], mode: str = "warn"
) -> dict[str, list[Question]]:
    """
    The questions as they are asked: with `escape`, the control tokens in them are text; see
    [`~data.control_tokens.ControlTokens`].
    """
    control = ControlTokens(processing_class, mode)
    for name, each in questions.items():
        texts = ("\0".join(prompts.contents(question.prompt)) for question in each)
        control.check(map(control.within, texts), f"the prompts of {name}")
    return {name: [replace(q, prompt=control.prompt(q.prompt)) for q in each] for name, each in questions.items()}


def check_format(
    processing_class,
    questions: dict[str, list[Question]],
    train_tokenizer=None,
    train_dataset=None,
    chat_template_kwargs: dict | None = None,
) -> None:
    """[`check_prompts`] and [`check_training_format`] of all benchmarks."""
    for name, each in questions.items():
        check_prompts(processing_class, name, each)
        check_training_format(processing_class, each, train_tokenizer, train_dataset)
    # Rows without a column of them may have been trained on with `trl-offpolicy sft --chat_template_kwargs`.
    if train_dataset is not None and (trained := _row_of(train_dataset).get("chat_template_kwargs")):
        _same(chat_template_kwargs, trained, "The `chat_template_kwargs` are others than in training")


def check_prompts(processing_class, name: str, questions: list[Question]) -> None:
    """
    Refuses prompts that the chat template would spoil.

    Raises:
        ValueError: A prompt begins as the chat template does (it was rendered before), or with two BOS tokens.
    """
    for index, question in enumerate(questions):
        if question.problem is not None or isinstance(question.prompt, str):
            continue
        if found := rendered_before(processing_class, question.prompt[-1]["content"]):
            raise ValueError(
                f"Row {index} of benchmark {name!r} begins with the special token {found!r}: its prompt was rendered by a chat template already, and "
                "would be once more. Pass the problem's text, or `prompt` as a plain text, which is asked as it is."
            )
    bos = processing_class.bos_token_id
    if bos is not None and encode_prompt(processing_class, questions[0].prompt)[:2] == [bos, bos]:
        raise ValueError(
            f"The chat template writes {processing_class.bos_token!r} and the tokenizer adds another: the model would see two, as it never "
            "did in training. Remove one of them (`tokenizer.add_bos_token = False`, or the template's)."
        )


def check_training_format(processing_class, questions: list[Question], tokenizer=None, dataset=None) -> None:
    """
    Refuses to ask the model in another format than it was trained with.

    Args:
        tokenizer (`str` or `PreTrainedTokenizerBase`, *optional*): With which it was trained: both must render a
            conversation alike.
        dataset (`datasets.Dataset` or `list[dict]`, *optional*): On which it was trained: the turns before the problem
            of the first row that is no replay must be the same, and so must the words around the problem, where the
            row says what its problem is.

    Raises:
        ValueError: They differ; both are shown.
    """
    asked: Any = questions[0].prompt
    if tokenizer is not None:
        from transformers import AutoTokenizer

        other = AutoTokenizer.from_pretrained(tokenizer) if isinstance(tokenizer, str) else tokenizer
        turns = asked + as_completion(asked, "4")
        if not isinstance(turns, str):  # else no template renders it
            ours, theirs = (c.apply_chat_template(turns, tokenize=False) for c in (processing_class, other))
            _same(ours, theirs, "The chat template is another one than in training")
    if dataset is not None:
        row = _row_of(dataset)
        trained = row["prompt"]
        if isinstance(trained, str) != isinstance(asked, str):
            _same(asked, trained, "Prompts are plain texts in one of the two and messages in the other")
        if isinstance(trained, str):
            return
        before_ours, before_theirs = ([[t["role"], t["content"]] for t in turns[:-1]] for turns in (asked, trained))
        _same(before_ours, before_theirs, "The turns before the problem are others than in training")
        problem, asked_problem = row.get("problem") or row.get("question"), questions[0].problem
        if problem and asked_problem:
            expected = trained[-1]["content"].replace(problem, asked_problem, 1)
            wanted = trained[-1]["content"].replace(problem, "{problem}", 1)
            what = f"The words around the problem are others than in training (solve_prompt={wanted!r:.300})"
            _same(asked[-1]["content"], expected, what)


def _row_of(dataset) -> dict:
    """The first row that was trained on to solve problems; replay rows answer other prompts, asked in other words."""
    return next((row for row in dataset if row.get("source") != Source.REPLAY), {}) or next(iter(dataset))


def _same(ours, theirs, what: str) -> None:
    if ours != theirs:
        raise ValueError(f"{what}. In this evaluation:\n{ours!r:.600}\nin training:\n{theirs!r:.600}")
