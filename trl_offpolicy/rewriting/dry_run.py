"""What a dry run says: prompts as the model reads them, and what a few first attempts tell of the whole run."""

import math

from tqdm.auto import tqdm

from ..data.prompts import contents
from ..runs.journal import Attempt
from ..runs.run_counts import RunCounts, cut_advice
from ..sampling.sampler import Completion, Request, SamplingParams, prompt_ids
from .rewrite_config import RewriteConfig
from .strategies import LOOP_SETTINGS, STRATEGIES


def shown_prompt(
    title: str, prompt: list[dict[str, str]] | str, processing_class, chat_template_kwargs: dict | None, verifier
) -> str:
    """
    A prompt, the same with all special tokens if there is a tokenizer, and a word if it cannot be asked, or does not
    ask for the form that the verifier reads.
    """
    turns = [{"role": "plain text", "content": prompt}] if isinstance(prompt, str) else prompt
    parts = [f"---- {title} ----", *(f"[{turn['role']}]\n{turn['content']}" for turn in turns)]
    if processing_class is not None:
        request = Request("", prompt, 0, SamplingParams(), chat_template_kwargs)
        ids = prompt_ids(processing_class, request, 1 << 30)  # the model, which has a context, is not loaded
        if isinstance(ids, Completion):
            parts.append(f"---- careful ----\nThis prompt cannot be asked: {ids.error}.")
        else:
            parts += [f"---- the same as the model reads it, {len(ids)} tokens ----", processing_class.decode(ids)]
    wanted = verifier.asked_form if verifier else ""
    if wanted not in "".join(contents(prompt)):
        parts.append(
            f"---- careful ----\nThere is no {wanted} in this prompt, which is the form that {type(verifier).__name__} reads most surely: answers may be "
            "unparsable. Ask for it in the prompt (solve_prompt, guided_prompt), or pass another verifier."
        )
    return "\n".join(parts)


def shown_strategy(args: RewriteConfig, loop=None) -> str:
    """
    All settings of the preset that `args`, and those of a `loop` if there is one, were made from, and which of them
    something else was given for.
    """
    lines = [f"---- strategy {args.strategy} ----"]
    for name, value in STRATEGIES[args.strategy or ""].items():
        of_loop = name in LOOP_SETTINGS
        now = getattr(loop if of_loop else args, name, value)
        lines.append(f"{name}: {now}" + (f" (given; the strategy has {value})" if now != value else ""))
        if of_loop and loop is None:
            lines[-1] += " (heeded by `trl-offpolicy loop`)"
    return "\n".join(lines)


def probe_report(
    drawn: list[Attempt],
    counts: RunCounts,
    probed: int,
    total: int,
    attempts: float,
    earlier: int,
    seconds: float,
    args: RewriteConfig,
) -> str:
    """
    What the first attempts at some rows tell of the whole run.

    Args:
        drawn (`list[Attempt]`): The attempts, without their texts.
        counts ([`RunCounts`]): What was counted of them.
        probed, total (`int`): Rows that were asked, and rows of the run.
        attempts (`float`): How many the run will take ([`~rewriting.scheduler.Scheduler.attempts_left`]).
        earlier (`int`): Tokens of them that an earlier probe had drawn.
        seconds (`float`): How long the others took.
        args ([`RewriteConfig`]): The run's.
    """
    lines = [f"---- probe: the first attempt of each stage at {probed:,} of {total:,} rows ----"]
    for stage, of in counts.stages.items():
        lengths = sorted(attempt.num_tokens for attempt in drawn if attempt.stage == stage)
        if of.sampled:
            sentence = f"{stage}: {of.sampled:,} attempts, {of.correct / of.sampled:.1%} accepted, {of.truncated / of.sampled:.1%} cut"
            middle, most = lengths[len(lengths) // 2], lengths[math.ceil(0.95 * len(lengths)) - 1]
            lines.append(f"{sentence}; half of them have {middle:,} tokens or fewer, 95% {most:,} or fewer")
    tokens, sampled = counts.total("tokens"), counts.total("sampled")
    if sampled and tokens:
        expected = attempts * tokens / sampled
        sentence = f"estimate for {total:,} rows, each stage accepting (accepted + 1) of (attempts + 2): about {attempts:,.0f} attempts, {expected:,.0f} tokens"
        if (new := tokens - earlier) > 0:
            rate = new / max(seconds, 1e-9)
            sentence += f", {tqdm.format_interval(expected / rate)} at the {rate:,.0f} tok/s of this probe, which an engine with more in flight exceeds"
        else:
            sentence += "; an earlier probe had drawn all of these attempts, so their speed is not known"
        lines.append(sentence)
    if advice := cut_advice(counts.sampling, counts.limit, begun=False):
        lines.append(advice)
    lines.append("These attempts are journaled: a run with the same settings begins with them.")
    return "\n".join(lines)
