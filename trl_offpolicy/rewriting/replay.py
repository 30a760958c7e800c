"""
Replay: the policy's own answers to general prompts, which are trained on beside a run's rows so that less is
forgotten.

They are not verified, for nobody knows an answer; one is kept if the policy has ended it itself and said something.
They have `source="replay"`, and `behavior_log_probs` like the rows of `self`. A run's rows stay as they are in
`dataset/`: the replay rows are in `replay/`, and both together in `with_replay/`.
"""

import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..data.control_tokens import ControlTokens
from ..data.formats import ASKED, as_completion, own_prompt
from ..data.loading import load_rows, plain_rows
from ..data.prompts import contents
from ..data.rows import Source, content_id, copy_id
from ..data.whole_file import link_or_copy, partial_file
from ..evaluation.benchmarks import PROMPT_COLUMNS
from ..runs.journal import Journal
from ..sampling.provenance import template_digest
from ..sampling.sampler import FAILED, Completion, Request, Sampler, attempt_seed
from ..verification.drawing import Asked, Drawing
from .output_rows import provenance_columns
from .rewrite_config import RewriteConfig


_ENDS = {"stop": "rows", "length": "cut", "refused": "refused", "error": "failed"}


@dataclass(frozen=True, slots=True)
class ReplayPrompt:
    """A general prompt; its id depends on its content only."""

    id: str
    prompt: list[dict[str, str]] | str


def replay_prompts(dataset: str, plain: bool, control: ControlTokens) -> list[ReplayPrompt]:
    """
    The prompts of a file, a directory or a Hub dataset: `messages`, `prompt`, `conversations`, or a text to be asked
    as it is, without the words of `solve_prompt`. A last turn of the assistant is left out.

    Args:
        plain (`bool`): Whether those of the run are plain texts, and not messages.
        control ([`~data.control_tokens.ControlTokens`]): What is done with control tokens in them.

    Raises:
        ValueError: It has no rows, one without a prompt (named), or prompts of the other kind than the run's.
        FileNotFoundError: It is a path at which there is nothing.
    """
    found: list[ReplayPrompt] = []
    seen: dict[str, int] = {}
    for index, row in enumerate(plain_rows(load_rows(dataset, named="replay_dataset"))):
        where = f"Row {index} of replay_dataset={dataset!r}"
        column = next((name for name in PROMPT_COLUMNS if row.get(name)), None)
        prompt: Any = column and own_prompt(row, column, where)
        if not prompt or (isinstance(prompt, list) and prompt[-1]["role"] == "assistant"):
            raise ValueError(
                f"{where} has no prompt; its columns are {list(row)}. Replay needs one of {', '.join(PROMPT_COLUMNS)} in every row."
            )
        if column in ASKED:
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, str) != plain:
            here, there = ("messages", "plain texts") if plain else ("plain texts", "messages")
            raise ValueError(
                f"{where} is {prompt!r:.100}: its prompts are {here}, and those of the dataset are {there}, which no training can have together. Write "
                "them in the same form."
            )
        turns = [{"role": "", "content": prompt}] if isinstance(prompt, str) else prompt
        content = content_id(turns, None)
        seen[content] = seen.get(content, 0) + 1
        found.append(ReplayPrompt(copy_id(int(content, 16), seen[content]), prompt))
    if not found:
        raise ValueError(f"You passed replay_dataset={dataset!r}, which has no rows.")
    texts = ("\0".join(contents(each.prompt)) for each in found)
    control.check(map(control.within, texts), f"the prompts of {dataset}")
    return [replace(each, prompt=control.prompt(each.prompt)) for each in found]


def num_replay_rows(share: float, num_rows: int) -> int:
    """So many replay rows are this share of all, with so many others."""
    return round(share / (1 - share) * num_rows)


def draw_replay(
    prompts: list[ReplayPrompt], count: int, sampler: Sampler, args: RewriteConfig, journal_file: Path
) -> tuple[list[dict], Counter]:
    """
    Draws answers to `count` of the prompts, taken in an order that the seed decides; the next one takes the place of
    one that cannot be asked, or whose answer was cut or empty. The place of one that the engine failed at stays free:
    it is asked again the next time.

    Returns:
        `tuple[list[dict], Counter]`: The rows, fewer than `count` if there are not enough prompts or some have failed,
            with the columns that they share with a run's; and how many there are (`rows`), and prompts that were
            `refused` (longer than the context), or whose answers were `cut`, `empty` or `failed`.

    Raises:
        SamplerError: The engine cannot go on; what is drawn is in the journal.
    """
    config = {
        "replay": True, "model": sampler.name, "model_revision": sampler.revision, "chat_template": template_digest(sampler.processing_class),
        "seed": args.seed, **args.sampling_params().settings(), "chat_template_kwargs": args.chat_template_kwargs,
    }  # fmt: skip
    waiting = sorted(prompts, key=lambda each: attempt_seed(args.seed, each.id, "replay order", 0))
    journal = Journal(journal_file, config, overwrite=args.overwrite)
    try:
        known = {entry["id"]: entry for _, entry in journal.entries() if entry["finish_reason"] not in FAILED}
        rows: list[dict] = []
        counts: Counter = Counter(rows=0)
        while (free := count - len(rows) - counts["failed"]) > 0 and waiting:
            batch, waiting = waiting[:free], waiting[free:]
            _draw([each for each in batch if each.id not in known], sampler, args, journal, known)
            for each in batch:
                entry = known[each.id]
                reason = entry["finish_reason"]
                ended = _ENDS[reason] if reason in FAILED or entry["text"].strip() else "empty"
                counts[ended] += 1
                rows += [_row(each, entry, sampler, args)] if ended == "rows" else []
        return rows, counts
    finally:
        journal.close()


def _draw(
    prompts: list[ReplayPrompt], sampler: Sampler, args: RewriteConfig, journal: Journal, known: dict[str, dict]
) -> None:
    """Draws one answer to each prompt, into the journal and `known`."""
    params = args.sampling_params()
    given: Any = args.chat_template_kwargs  # a mapping, whatever it was written as
    asked = (
        Asked(
            p, Request(f"{p.id}/replay", p.prompt, attempt_seed(args.seed, p.id, "replay", 0), params, given), sampler
        )
        for p in prompts
    )

    def record(batch) -> list[dict]:
        entries = [_entry(judged.item, judged.completion) for judged in batch]
        for entry in entries:
            journal.append(entry)
            known[entry["id"]] = entry
        return entries

    with Drawing(None, sampler) as drawing:
        while drawing.submit(asked):
            for _ in drawing.judged(record):
                pass


def _entry(prompt: ReplayPrompt, completion: Completion) -> dict:
    return {
        "id": prompt.id,
        "finish_reason": completion.finish_reason,
        "num_tokens": len(completion.completion_ids),
        "reason": completion.error or "",  # a line is read up to here where its texts are not wanted
        "text": completion.text,
        "completion_ids": completion.completion_ids,
        "behavior_log_probs": [round(x, 6) for x in completion.log_probs],
    }


def _row(each: ReplayPrompt, entry: dict, sampler: Sampler, args: RewriteConfig) -> dict[str, Any]:
    ids, log_probs = entry["completion_ids"], entry["behavior_log_probs"]
    if args.stop and ids and ids[-1] not in sampler.stop_token_ids:  # ended by a stop text, which is no end of turn
        ids, log_probs = [], []
    if args.sampling_params().reshaping:
        log_probs = []
    numbers = dict.fromkeys(("num_sampled", "num_correct", "self_sampled", "self_correct"), 0)
    return {
        "prompt": each.prompt,
        "completion": as_completion(each.prompt, entry["text"]),
        "id": each.id,
        "source": str(Source.REPLAY),
        **numbers,
        "completion_ids": ids,
        "behavior_log_probs": log_probs,
        **provenance_columns(sampler, args),
        "behavior_prompt": each.prompt[:0],
    }


def write_replay(rows: list[dict], like: Path, file: Path) -> None:
    """Writes replay rows as Parquet with the columns of the run's rows in `like`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pq.read_schema(like)
    file.parent.mkdir(exist_ok=True)
    with partial_file(file) as partial:
        table = pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema)
        pq.write_table(table, partial)
        partial.replace(file)


def put_together(rows: Path, replay: Path, output: Path) -> None:
    """
    Makes `output` of the Parquet files in two directories, without copying them where the file system can do that.
    """
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, directory in (("rows", rows), ("replay", replay)):
        for file in sorted(directory.glob("*.parquet")):
            link_or_copy(file, partial / f"{name}-{file.name}")
    shutil.rmtree(output, ignore_errors=True)
    partial.replace(output)
