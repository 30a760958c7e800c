"""
The rows that go into a run, as problems: which ids they have, what the model is asked for them, which can be verified.
"""

import copy
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ..data.control_tokens import ControlTokens
from ..data.demonstrations import asks_for_box, in_asked_form
from ..data.formats import (
    ASKED,
    FORMATS,
    carried_columns,
    find_format,
    guided_prompt,
    has_plain_prompts,
    read_rows,
    tell_missing_answers,
    text_columns,
)
from ..data.loading import as_dataset, iterate
from ..data.prompts import contents
from ..data.rows import Problem, Source, Verdict, source_of
from ..runs.run_counts import RunCounts
from ..runs.run_memory import RunMemory
from ..verification.verifier import Verifier
from .hints import hint
from .rewrite_config import RewriteConfig


CHUNK = 256  # rows that are looked up, and whose gold answers are checked, at a time


class Problems:
    """
    The rows of a run as problems.

    A row is read three times, since a million of them cannot be kept: all at first, because an id counts the rows
    before it that are alike, and a bad row is to be reported before anything is drawn (a resume finds what that found
    in `rows_file`); then those without attempts, when their turn comes; and all in order when they are written, for
    which the last attempt at the first of them may have been waited for.

    Args:
        dataset (`datasets.Dataset`): Rows in any of the formats of `data.formats.FORMATS`.
        args ([`RewriteConfig`]): What they are asked with.
        processing_class: Tokenizer of the prompts, if it is known.
        rows_file (`Path`): Where what was found is kept.
        columns (`Iterable[str]`): Further ones that a problem's `row` is to have: those that its verifier names.

    Raises:
        ValueError: The dataset is empty or cannot be rewritten as `args` say, or a row has no problem or no
            demonstration (named by number).
    """

    def __init__(self, dataset, args: RewriteConfig, processing_class, rows_file: Path, columns: Iterable[str] = ()):
        self.args, self.stored = (
            args,
            as_dataset(dataset),
        )  # with all columns as they are stored, which are carried over
        check_stages(self.stored.column_names, args)
        self._rows = text_columns(self.stored, args.answer_column, columns)
        self.have_demonstrations = find_format(self.stored.column_names, args.answer_column)[1] is not None
        self.plain = has_plain_prompts(self._rows.features, self._rows.column_names, args.answer_column)
        self._control = ControlTokens(processing_class, args.control_tokens)
        self.memory = self._check(rows_file)

    def __len__(self) -> int:
        return len(self.memory)

    def select(self, rows) -> "Problems":
        """Some of them, with the ids that they have among all."""
        few = copy.copy(self)
        few.stored, few._rows = self.stored.select(rows), self._rows.select(rows)
        few.memory = self.memory.select(slice(rows.start, rows.stop) if isinstance(rows, range) else rows)
        return few

    def _check(self, rows_file: Path) -> RunMemory:
        what = "problem or reference" if Source.GUIDED in self.args.stages else "problem"
        made_from = f"4 {self._rows._fingerprint} {self.args.answer_column} {what} {self._control.tokens}"
        memory = known = RunMemory.load(rows_file, made_from)
        if memory is None:
            rows = iterate(self._rows, range(len(self._rows)))
            if find_format(self._rows.column_names, self.args.answer_column)[1] not in (self.args.answer_column, None):
                rows = tell_missing_answers(rows, self.args.answer_column, "what their demonstrations box")
            problems = read_rows(rows, self.args.answer_column, self.args.solve_prompt)
            memory = RunMemory.of((problem, self._control_tokens_in(problem)) for problem in problems)
        if not len(memory):
            raise ValueError("The dataset has no rows: there is nothing to rewrite. Check its split and filters.")
        self._control.tell(memory.marked, len(memory), memory.tokens, what)
        if known is None and not self.args.dry_run:
            rows_file.parent.mkdir(parents=True, exist_ok=True)
            memory.save(rows_file, made_from)
        return memory

    def _control_tokens_in(self, problem: Problem) -> set[str]:
        """
        The control tokens in what the model is shown of a problem; `ValueError` if it cannot be shown all that it
        comes with.
        """
        if given := [name for name in ("tools", "chat_template_kwargs") if problem.row.get(name)]:
            raise ValueError(
                f"The row with the problem {problem.problem!r:.100} has {' and '.join(given)}, with which its prompt would be rendered in "
                "training but not in sampling. Write what the model needs to know into a system turn, and use `dataset.remove_columns`."
            )
        texts = contents(problem.prompt) + [problem.demonstration or ""] * (Source.GUIDED in self.args.stages)
        return set().union(*map(self._control.within, texts))

    def read(self, first: int = 0, count: int | None = None) -> Iterator[Problem]:
        """So many of them, from the row `first` on."""
        copies, args = self.memory.copies(first, count), self.args
        rows = iterate(self._rows, range(first, first + len(copies)))
        return read_rows(rows, args.answer_column, args.solve_prompt, copies, args.system_prompt)

    def prompt(self, problem: Problem, stage: str) -> list[dict[str, str]] | str:
        """What the model is asked for a problem in this stage."""
        args, kind = self.args, stage.partition(":")[2]
        if source_of(stage) != Source.GUIDED:
            return self._control.prompt(problem.prompt)
        shown = guided_prompt(problem, args.hint_prompt, hint=hint(problem, kind)) if kind else None
        return self._control.prompt(shown or guided_prompt(problem, args.guided_prompt, args.clean_reference))

    def expert_text(self, problem: Problem) -> str | None:
        """The demonstration as an `expert` row has it."""
        if problem.demonstration is None or self.args.expert_format == "keep" or not asks_for_box(problem.prompt):
            return problem.demonstration
        return in_asked_form(problem.demonstration, problem.answer)

    def known(self) -> Iterator[tuple[str, Problem | None, bool, dict]]:
        """
        What the scheduler takes, when the known attempts are all that there will be: no row is read, no gold answer
        checked.
        """
        for start in range(0, len(self), CHUNK):
            for row_id, found in zip(self.memory.ids(start, CHUNK), self.memory.known(start, CHUNK), strict=True):
                yield row_id, None, True, found

    def checked(self, verifier: Verifier, counts: RunCounts) -> Iterator[tuple[str, Problem | None, bool, dict]]:
        """
        What the scheduler takes: id, problem, whether its gold answer can be compared with (else it goes straight to
        its demonstration), and the known attempts. One with attempts in the journal has passed that check, and is not
        read: most of them are settled.
        """
        pool, memory = ThreadPoolExecutor(1, "gold answers"), self.memory

        def look_up(start: int) -> tuple[list[dict], list[Problem | None], Future | None]:
            attempts = memory.known(start, CHUNK)
            if all(attempts):
                return attempts, [None] * len(attempts), None
            problems = self.read(start, CHUNK)
            chunk = [None if found else problem for problem, found in zip(problems, attempts, strict=True)]
            return attempts, chunk, pool.submit(refused, verifier, [p for p in chunk if p is not None])

        chunks = map(look_up, range(0, len(memory), CHUNK))
        try:
            following = next(chunks, None)
            for start in range(0, len(memory), CHUNK):
                # The next ones are checked while these are sampled.
                (attempts, chunk, check), following = following, next(chunks, None)
                odd = check.result() if check else {}
                counts.golds.update(odd.values())
                for row_id, problem, found in zip(memory.ids(start, CHUNK), chunk, attempts, strict=True):
                    yield row_id, problem, row_id not in odd, found
        finally:
            # A ctrl-C does not wait for a check: closing the verifier ends it.
            pool.shutdown(wait=False, cancel_futures=True)


def refused(verifier: Verifier, problems: list[Problem]) -> dict[str, Verdict]:
    """The ids of the problems whose gold answer cannot be compared with, and why."""
    verdicts = verifier.check_answers([problem.answer for problem in problems])
    return {p.id: v for p, v in zip(problems, verdicts, strict=True) if v is not Verdict.CORRECT}


def check_stages(columns: list[str], args: RewriteConfig) -> None:
    """`ValueError` if a dataset with these `columns` cannot be rewritten as `args` say, whatever its rows are."""
    carried_columns(columns, args.answer_column)
    if args.chat_template_kwargs and "chat_template_kwargs" in columns:
        raise ValueError(
            f"You passed chat_template_kwargs={args.chat_template_kwargs}, but the dataset has a column of that name: leave out one of them."
        )
    if args.system_prompt is not None and find_format(columns, args.answer_column)[0] not in ASKED:
        raise ValueError(
            f"You passed system_prompt={args.system_prompt!r:.100}, which stands before `solve_prompt`; but the dataset has the columns {columns}, "
            "so its rows have prompts of their own. Write the system turn into them."
        )
    if find_format(columns, args.answer_column)[1] is not None:
        return
    there = f"but the dataset has the columns {columns} and no demonstrations"
    of_strategy = f"strategy={args.strategy!r}, that is " if args.strategy else ""
    named = f"name the demonstrations' column as one of {', '.join(dict.fromkeys(pair[1] for pair in FORMATS))}"
    if Source.GUIDED in args.stages and args.hint_kind != ["answer"]:
        raise ValueError(
            f"You passed {of_strategy}stages={args.stages}, {there}, which the stage `guided` retells. Write stages=['self'] (--stages self), and "
            f"what the model does not solve is listed in unsolved.jsonl; or {named}."
        )
    if args.keep_demonstration:
        raise ValueError(
            f"You passed {of_strategy}keep_demonstration=True, {there}. Write keep_demonstration=False (--keep_demonstration False), or {named}."
        )
