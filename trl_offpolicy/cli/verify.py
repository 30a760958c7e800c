"""`trl-offpolicy verify`."""

import base64
import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from ..data.formats import carried_columns, find_format, moved, read_row, tell_missing_answers
from ..data.loading import batched, media_columns, plain_rows
from ..data.rows import Source, Verdict
from ..data.whole_file import partial_file
from ..verification.verifier import explain_with
from .arguments import DemonstrationArguments, VerifierArguments, load_demonstrations, make_verifier, parser_for


ODD = ("index", "verdict", "reason", "gold")  # what is said of a row that is not correct
VERIFY_EXAMPLES = """\
examples:
  trl-offpolicy verify --dataset_name runs/gsm8k/dataset                                    # what a rewrite wrote
  trl-offpolicy verify --dataset_name demos.jsonl --answer_column final --output_file odd.jsonl   # demonstrations
  trl-offpolicy verify --dataset_name outputs.jsonl --completion_column prediction --answer_column gold
  trl-offpolicy verify --dataset_name physics.jsonl --verifier numeric --verifier_kwargs '{"rel_tol": 0.05}'
  trl-offpolicy verify --dataset_name code.jsonl --completion_column completion --answer_column tests --verifier code

Columns are those of `rewrite` (the demonstration is what is checked), or the two that you name. Exit code 0 says that all
rows were checked, not that they are correct. A column of yours called index, verdict, reason or gold is written as input_<name>.
"""


@dataclass(kw_only=True)
class VerifyArguments(DemonstrationArguments, VerifierArguments):
    """What is verified by what."""

    completion_column: str | None = field(
        default=None,
        metadata={"help": "Text or messages to check; by default what `rewrite` takes for the demonstration."},
    )
    answer_column: str = field(
        default="answer",
        metadata={"help": "Gold answers (for code: the tests); where a row has none, its demonstration's box."},
    )
    output_file: str | None = field(
        default=None,
        metadata={
            "help": "Where the rows that are not correct go, with verdict and reason; by default NAME.not_correct.jsonl, NAME being the dataset's."
        },
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Replace output_file even if it is not of an earlier `verify`."}
    )


def verify(argv: list[str]) -> int:
    description = "Verify the answers of a dataset, print the verdicts, and write the rows that are not correct."
    (arguments,) = parser_for(VerifyArguments, "verify", description, VERIFY_EXAMPLES).parse_args_and_config(argv)
    output = Path(arguments.output_file or _file_for(arguments.dataset_name)).expanduser()
    print(f"output_file: {output}", flush=True)
    if output.exists() and Path(arguments.dataset_name).exists() and output.samefile(arguments.dataset_name):
        raise ValueError(f"{output} is the dataset itself, and would be replaced; pass another --output_file.")
    if output.exists() and not arguments.overwrite and not _is_ours(output):
        raise ValueError(
            f"{output} exists and is not what an earlier `verify` wrote; pass --overwrite to replace it, or another --output_file."
        )
    dataset = load_demonstrations(arguments, arguments.answer_column)
    rows = _to_verify(plain_rows(dataset), arguments)
    media = media_columns(dataset)
    stored = dataset.select_columns(media).with_format("arrow")  # images and the like as they are stored
    names = moved(dataset.column_names, ODD)
    counts: Counter = Counter()
    output.parent.mkdir(parents=True, exist_ok=True)
    stopped = False
    with make_verifier(arguments) as verifier, partial_file(output) as partial:
        try:
            with partial.open("w") as file, tqdm(total=len(dataset), unit="row") as bar:
                for chunk in batched(rows, 1024):
                    _, of_chunk, completions, answers = zip(*chunk, strict=True)
                    judgements = explain_with(verifier, completions, answers, of_chunk)
                    for (index, row, _, answer), (verdict, reason) in zip(chunk, judgements, strict=True):
                        source = row.get("source")
                        counts[source if source in set(Source) else "", verdict] += 1
                        if verdict is not Verdict.CORRECT:
                            odd = dict(zip(ODD, (index, verdict, reason, answer), strict=True))
                            row = row | (stored[index : index + 1].to_pylist()[0] if media else {})
                            row = {new: row[name] for name, new in names.items()}
                            file.write(json.dumps({**row, **odd}, default=_as_text) + "\n")
                    bar.update(len(chunk))
        except KeyboardInterrupt:
            stopped = True
        partial.replace(output)
    if stopped:
        print(f"\nstopped; {output} has what was found so far.", file=sys.stderr)
        return 3
    _print_verdicts(counts)
    bad = sum(n for (_, verdict), n in counts.items() if verdict is not Verdict.CORRECT)
    print(f"{bad:,} rows that are not correct: {output}" if bad else "every row is correct")
    return 0


def _file_for(dataset_name: str) -> str:
    """`gsm8k.not_correct.jsonl` for `openai/gsm8k`, `gsm8k.jsonl` and `runs/gsm8k/dataset`."""
    path = Path(dataset_name)
    if path.name in ("dataset", "rows_so_far"):  # of a run
        path = path.absolute().parent
    name = path.stem if path.suffix in (".jsonl", ".json", ".csv", ".parquet") else path.name
    return f"{name}.not_correct.jsonl"


def _is_ours(output: Path) -> bool:
    """Whether a file is what `verify` writes, which it may write again: empty, or rows with what is said of them."""
    with output.open("rb") as file:
        first = file.readline()
    try:
        return not first or set(ODD) <= set(json.loads(first))
    except (ValueError, TypeError):
        return False


def _as_text(value) -> str:
    """What JSON cannot hold: bytes in base64, dates and the like as they are printed."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _to_verify(dataset, arguments: VerifyArguments):
    """(index, row, completion, gold answer) of each row; `ValueError` at once if a column is missing."""
    named = [arguments.completion_column, arguments.answer_column] if arguments.completion_column else []
    if missing := [column for column in named if column not in dataset.column_names]:
        raise ValueError(f"The dataset has the columns {dataset.column_names}, but no {' and no '.join(missing)}.")
    if not named:
        try:
            find_format(dataset.column_names)
        except ValueError as error:
            raise ValueError(
                f"{error} To check other columns, name them: --completion_column with what is checked, --answer_column with the gold answers."
            ) from error
        carried_columns(dataset.column_names, arguments.answer_column)

    def read(index: int, row: dict):
        answer = row.get(arguments.answer_column)
        if named:
            return index, row, _text(row[arguments.completion_column], index, arguments.completion_column), answer
        several = isinstance(answer, (list, dict))  # some verifiers take such a gold answer, a rewrite does not
        read_as = {**row, arguments.answer_column: None} if several else row
        problem = read_row(read_as, index, arguments.answer_column, "{problem}")
        return index, row, problem.demonstration, answer if several else problem.answer

    rows = dataset
    if not named and find_format(dataset.column_names)[1] != arguments.answer_column:
        rows = tell_missing_answers(rows, arguments.answer_column, "what their demonstrations box")
    return (read(index, row) for index, row in enumerate(rows))


def _text(value, index: int, column: str) -> str:
    """
    What is checked of a completion: a text, the last of its messages, or a number that a file's reader made of `42`.
    """
    if isinstance(value, list) and value:
        value = value[-1].get("content") if isinstance(value[-1], dict) else value
    if isinstance(value, (list, dict)) and value:
        raise ValueError(
            f"Row {index}: `{column}` must be a text or a list of messages with `content`, but is {value!r:.200}."
        )
    return "" if value is None or value == [] else str(value)


def _print_verdicts(counts: Counter) -> None:
    sources = sorted({source for source, _ in counts})
    print(f"{'':12}" + "".join(f"{source or 'rows':>18}" for source in sources))
    for verdict in Verdict:
        line = ""
        for source in sources:
            total = sum(n for (s, _), n in counts.items() if s == source)
            line += f"{counts[source, verdict]:>11,}{counts[source, verdict] / total:>7.1%}"
        print(f"{verdict:<12}{line}")
