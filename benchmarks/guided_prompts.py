"""Wordings of the guided prompt on the same rows with the same seeds: what a model makes of each.

    python benchmarks/guided_prompts.py --model_name_or_path M --dataset_name rows.jsonl --output_dir runs/prompts [--num_generations 1]

The arguments are those of `trl-offpolicy rewrite`; a wording is a run in a directory of its own, which goes on when the same command is
given again. Only the stage `guided` is run, on every row, and all K attempts are drawn, so that each wording is asked the same.
Intervals are 95 % bootstrap intervals over rows. Differences to the first wording are paired by row; those of what only kept attempts
have (4-grams, log π_0 under the prompt that is trained on) are of the rows that both wordings keep.
"""

import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from trl_offpolicy import DataRewriter
from trl_offpolicy.cli.arguments import load_demonstrations, make_verifier
from trl_offpolicy.cli.rewrite import rewrite_parser
from trl_offpolicy.data.demonstrations import clean_reference
from trl_offpolicy.data.formats import read_rows
from trl_offpolicy.data.prompts import GUIDED_PROMPT
from trl_offpolicy.data.rows import Problem, Verdict
from trl_offpolicy.data.text_statistics import copy_ratio, leaks_hint
from trl_offpolicy.evaluation.estimators import bootstrap, mean_interval
from trl_offpolicy.runs.journal import Attempt, read_attempts
from trl_offpolicy.sampling.engine import make_sampler


WORDINGS = {
    "default": GUIDED_PROMPT,
    # What self-distillation asks (SDFT, arXiv 2402.13669, in our words): two sentences and no rules.
    "guide": """\
Below are a problem and a reference answer. Using the reference answer as a guide, write your own answer, with the final \
result within \\boxed{}.

Problem:
{problem}

Reference answer:
{solution}

Your own answer:""",
    # Figure 2 of Mind the Gap, in our words: rules, problem, reference.
    "rules": """\
You are given a problem and a teacher's solution to it. Read the solution until you understand why it works, then solve \
the problem again in your own way.

1. Work out what the problem asks.
2. Use the teacher's solution only as guidance, for the parts you could not have done yourself.
3. Write your own solution step by step and in your own words. Do not mention the teacher or the reference.
4. Put your final answer within \\boxed{}.

Problem:
{problem}

Teacher's solution (for reference):
{solution}

Now solve the problem in your own way:""",
    # Another reader: whoever explains to somebody who has not seen the reference cannot point at it.
    "student": """\
{problem}

One way to solve it:
{solution}

Explain to a student, who has seen neither, how to solve this problem. Write out every step and every calculation in your \
own words, so that they need nothing but your text. Begin with the first step, mention neither the solution above nor the \
student, and put the final answer within \\boxed{}.""",
}


def measures(attempts: list[Attempt], problem: Problem) -> dict[str, float]:
    """Means over a row's attempts, shares in percent; what only kept attempts have, a row without any lacks."""
    known, reference = f"{problem.problem}\n{problem.demonstration}", clean_reference(problem.demonstration)
    kept = [a for a in attempts if a.verdict == Verdict.CORRECT and not a.rejected]
    values = {
        "kept, %": [100 * (a in kept) for a in attempts],
        "correct, %": [100 * (a.verdict == Verdict.CORRECT) for a in attempts],
        "mentions, %": [100 * leaks_hint(a.text, known) for a in attempts],
        "cut, %": [100 * (a.finish_reason == "length") for a in attempts],
        "unparsable, %": [100 * (a.verdict == Verdict.UNPARSABLE) for a in attempts],
        "tokens": [a.num_tokens for a in attempts],
        "copied 4-grams of kept, %": [100 * (copy_ratio(a.text, reference) or 0) for a in kept],
        "log π_0 a token of kept": [a.initial_log_prob / a.initial_tokens for a in kept],
    }
    return {name: fmean(of_each) for name, of_each in values.items() if of_each}


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Each measure of the wordings, and of its differences to the first; `found` is by wording and by the id of a row."""
    (first, before), *others = found.items()
    lines = ["| | " + " | ".join([*found, *(f"{name} − {first}" for name, _ in others)]) + " |"]
    lines.append("| --- |" + " --: |" * (2 * len(found) - 1))
    for measure in dict.fromkeys(m for rows in found.values() for row in rows.values() for m in row):
        cells = [cell([row[measure] for row in rows.values() if measure in row], measure) for rows in found.values()]
        for _, rows in others:
            both = [i for i, row in rows.items() if measure in row and measure in before[i]]
            cells.append(cell([rows[i][measure] - before[i][measure] for i in both]))
        lines.append(f"| {measure} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(values: list[float], measure: str = "") -> str:
    """The mean of a `measure`, or of a difference where none is named, with its interval; nothing for fewer than two rows."""
    if len(values) < 2:
        return ""
    share = "%" in measure
    interval = [100 * end for end in mean_interval([v / 100 for v in values], 0.0)] if share else bootstrap(values)[0]
    shown = f"{'' if measure else '+'}.{1 if share or max(map(abs, values)) > 10 else 2}f"
    return f"{fmean(values):{shown}} [{interval[0]:{shown}}, {interval[1]:{shown}}]"


def main():
    arguments, config = rewrite_parser().parse_args_and_config(sys.argv[1:])
    dataset, sampler = load_demonstrations(arguments, config.answer_column), make_sampler(arguments)
    problems = {p.id: p for p in read_rows(dataset, config.answer_column, config.solve_prompt)}
    found = {}
    for name, wording in WORDINGS.items():
        directory = Path(config.output_dir) / name
        run = replace(
            config, output_dir=str(directory), guided_prompt=wording, stages=["guided"], selection="max_log_prob"
        )
        DataRewriter(arguments.model_name_or_path, run, sampler, make_verifier(arguments)).rewrite(dataset)
        attempts = defaultdict(list)
        for attempt in read_attempts(directory / "journal.jsonl", problems):
            attempts[attempt.id].append(attempt)
        found[name] = {i: measures(of, problems[i]) for i, of in attempts.items()}
        print(table(found), flush=True)
    sampler.close()


if __name__ == "__main__":
    main()
