"""`trl-offpolicy verify`."""

import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from ..rewriter import batched
from ..rows import Source, Verdict, find_format, read_row
from .arguments import DatasetArguments, VerifierArguments, load_dataset, make_verifier, parser_for


VERIFY_EXAMPLES = """\
examples:
  trl-offpolicy verify --dataset_name runs/gsm8k/dataset                                    # what a rewrite wrote
  trl-offpolicy verify --dataset_name demos.jsonl --answer_column final --output_file odd.jsonl   # demonstrations
  trl-offpolicy verify --dataset_name outputs.jsonl --completion_column prediction --answer_column gold
  trl-offpolicy verify --dataset_name physics.jsonl --verifier numeric --verifier_kwargs '{"rel_tol": 0.05}'
  trl-offpolicy verify --dataset_name code.jsonl --completion_column completion --answer_column tests --verifier code

Columns are those of `rewrite` (the demonstration is what is checked), or the two that you name. Exit code 0 says that all
rows were checked, not that they are correct.
"""


@dataclass(kw_only=True)
class VerifyArguments(DatasetArguments, VerifierArguments):
    """What is verified by what."""

    completion_column: str | None = field(
        default=None,
        metadata={"help": "Text or messages to check; by default what `rewrite` takes for the demonstration."},
    )
    answer_column: str = field(
        default="answer",
        metadata={"help": "Gold answers (for code: the tests); where a row has none, its demonstration's box."},
    )
    output_file: str = field(
        default="not_correct.jsonl",
        metadata={"help": "Where the rows that are not correct go, with verdict and reason."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace output_file if there is one."})


def verify(argv: list[str]) -> int:
    description = "Verify the answers of a dataset, print the verdicts, and write the rows that are not correct."
    (arguments,) = parser_for(VerifyArguments, "verify", description, VERIFY_EXAMPLES).parse_args_and_config(argv)
    print(arguments.output_file, flush=True)
    output = Path(arguments.output_file)
    if output.exists() and not arguments.overwrite:
        raise ValueError(f"{output} exists; pass --overwrite to replace it, or another --output_file.")
    dataset = load_dataset(arguments)
    rows = _to_verify(dataset, arguments)
    counts: Counter = Counter()
    with make_verifier(arguments) as verifier, tqdm(total=len(dataset), unit="row") as bar:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("w") as file:
            try:
                for chunk in batched(rows, 1024):
                    told = verifier.explain([c for _, _, c, _ in chunk], [a for _, _, _, a in chunk])
                    for (index, row, _, answer), (verdict, reason) in zip(chunk, told, strict=True):
                        source = row.get("source")
                        counts[source if source in set(Source) else "", verdict] += 1
                        if verdict is not Verdict.CORRECT:
                            odd = {"index": index, "verdict": verdict, "reason": reason, "gold": answer}
                            file.write(json.dumps({**row, **odd}, default=str) + "\n")
                    bar.update(len(chunk))
            except KeyboardInterrupt:
                print(f"\nstopped; {output} has what was found so far.", file=sys.stderr)
                return 3
    _print_verdicts(counts)
    bad = sum(n for (_, verdict), n in counts.items() if verdict is not Verdict.CORRECT)
    print(f"{bad:,} rows that are not correct: {output}" if bad else "every row is correct")
    return 0


def _to_verify(dataset, arguments: VerifyArguments):
    """(index, row, completion, gold answer) of each row; `ValueError` at once if a column is missing."""
    named = [arguments.completion_column, arguments.answer_column] if arguments.completion_column else []
    # without it every demonstration would be compared with its own box, and be right
    asked = named or [name for name in [arguments.answer_column] if name != VerifyArguments.answer_column]
    if missing := [column for column in asked if column not in dataset.column_names]:
        raise ValueError(f"The dataset has the columns {dataset.column_names}, but no {' and no '.join(missing)}.")
    if not named:
        find_format(dataset.column_names)

    def read(index: int, row: dict):
        answer = row.get(arguments.answer_column)
        if named:
            value = row[arguments.completion_column] or ""
            return index, row, value if isinstance(value, str) else value[-1]["content"], answer
        problem = read_row(row, index, arguments.answer_column, "{problem}")
        return index, row, problem.demonstration, answer if isinstance(answer, (list, dict)) else problem.answer

    return (read(index, row) for index, row in enumerate(dataset))


def _print_verdicts(counts: Counter) -> None:
    sources = sorted({source for source, _ in counts})
    print(f"{'':12}" + "".join(f"{source or 'rows':>18}" for source in sources))
    for verdict in Verdict:
        line = ""
        for source in sources:
            total = sum(n for (s, _), n in counts.items() if s == source)
            line += f"{counts[source, verdict]:>11,}{counts[source, verdict] / total:>7.1%}"
        print(f"{verdict:<12}{line}")
