"""Configuration of `DataRewriter`."""

import re
import warnings
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any

from ..data import prompts
from ..runs.run_config import RunConfig, default_of
from ..sampling.sampler import LATER, PLAIN
from .strategies import STRATEGIES, rewrite_settings


STAGES = ("self", "guided")
# How much of the reference a guided prompt shows, the weakest hint first.
HINT_KINDS = ("answer", "first_steps", "outline", "full")
REFERENCES = ("demonstration", "teacher")
DECODINGS = ("plain", "hinted")
ACROSS = ("first_stage", "max_initial_log_prob")
KEEPS = ("one", "all")
SELECTIONS = ("first", "random", "max_log_prob")
EXPERT_FORMATS = ("keep", "boxed")
# What decides which guided attempts are kept, and the value with which it does nothing: what rewrites did before there
# was any of it.
GUIDED_FILTERS = {
    "clean_reference": False,
    "reject_mentions": False,
    "mention_phrases": [],
    "reject_calculator_marks": False,
    "min_guided_length": 0.0,
    "reject_other_form": False,
    "max_guided_copy": 1.0,
    "check_arithmetic": False,
}

# Settings of what is drawn beside a run's rows; no attempt at a problem depends on them.
REPLAY = {"replay_share", "replay_dataset"}


@dataclass(kw_only=True)
class HubOptions:
    """
    Where a run is pushed to, and what of it: the only list of these options. [`RewriteConfig`] has them and documents
    them.
    """

    accept_failed: bool = field(
        default=False,
        metadata={"help": "Be done, and push, though the engine failed at some attempts, which are tried again else."},
    )
    hub_dataset_id: str | None = field(default=None, metadata={"help": "Dataset repository to push to: owner/name."})
    hub_private_repo: bool | None = field(
        default=None,
        metadata={
            "help": "Whether a new repository is private; by default the owner's setting decides.",
            "aliases": ["--private"],
            "nargs": "?",
            "const": True,
        },
    )
    hub_token: str | None = field(
        default=None, repr=False, metadata={"help": "Hub token; better in HF_TOKEN, where no process list shows it."}
    )
    hub_revision: str | None = field(default=None, metadata={"help": "Branch to push to, made if there is none."})
    push_attempts: bool = field(
        default=True, metadata={"help": "Push every attempt too, rejected ones included, as config `attempts`."}
    )


@dataclass
class RewriteConfig(HubOptions, RunConfig):
    r"""
    How a dataset is rewritten. Generation parameters have TRL's names (`GRPOConfig`).

    Args:
        output_dir (`str`): Run directory: journal, metrics and the rewritten dataset. An interrupted run resumes from
            it.
        num_generations (`int`, *optional*, defaults to `8`): At most this many attempts for each problem and stage (K;
            the paper's is not published, re-implementations use 4 to 10). A run goes on with another number: what it
            has drawn stays.
        temperature (`float`, *optional*, defaults to `1.0`): Sampling temperature; importance weights need 1.
        top_p (`float`, *optional*, defaults to `1.0`): Nucleus; importance weights need 1.
        top_k (`int`, *optional*, defaults to `0`): Highest-probability tokens kept, 0 for all; importance weights need
            0.
        min_p (`float`, *optional*, defaults to `0.0`): Tokens less likely than this share of the likeliest are never
            drawn; importance weights need 0.
        repetition_penalty (`float`, *optional*, defaults to `1.0`): Above 1, tokens of prompt and completion are drawn
            less (as in `transformers`); importance weights need 1.
        stop (`list[str]`, *optional*): Texts at which an attempt ends, and which are cut off it. Rows that ended so
            are trained on as text, without `completion_ids` and `behavior_log_probs`: the end of turn that they are
            trained to write was not drawn.
        max_repeats (`int`, *optional*, defaults to `0`): Above 0, an attempt that ends with the same block of at most
            64 tokens this many times in a row is cut there, and never kept, rather than drawn to the limit. Without it
            such an attempt is cut at the limit, or leaves the repetition, in which case its row can be another one.
        max_completion_length (`int`, *optional*, defaults to `2048`): Tokens of one attempt. One that is cut here is
            never kept.
        stages (`list[str]`, *optional*, defaults to `["self", "guided"]`): Stages in order; the demonstration is
            always the last resort. `teacher` comes last where there are teachers and it is not named.
        selection (`str`, *optional*, defaults to `"first"`): `first` stops at the first correct attempt; `random`
            draws all K and keeps a random correct one: the same distribution of rows at a higher price, with the pass
            rate `num_correct / num_sampled`. `max_log_prob` draws all K and keeps the correct one with the highest
            length-normalised log-probability, `sum_t log π_0(y_t | x, y_<t) / len(y)` over its tokens including the
            end of turn, at temperature 1 and under the prompt x that is trained on: that of the stage `self`, in every
            stage, so that a retelling is not preferred for copying the reference that it was shown. The criterion is
            GRAPE's (arXiv 2502.04194); kept rows are then likelier than a sample of the model. The sum is the column
            `initial_log_prob` of the rows. In stages other than `self` it takes one forward of each correct attempt.
        select_across (`str`, *optional*, defaults to `"first_stage"`): `first_stage` keeps what the first stage with a
            correct attempt gives. With `max_initial_log_prob` (GRAPE, arXiv 2502.04194) every stage draws K, and all
            correct attempts and the demonstration compete: kept is the one with the highest mean log π_0 per token
            under the prompt that is trained on.
        min_correct (`int`, *optional*, defaults to `1`): A problem has `self` rows only where at least so many of its
            K attempts are correct, so that a lucky solution is not kept. More than 1 needs all K: another `selection`
            than `first`.
        keep (`str`, *optional*, defaults to `"one"`): `all` draws all K and makes a row of every correct attempt of
            the stage that gives the row (of every stage with `select_across`), as rejection sampling fine-tuning
            (arXiv 2308.01825) and ReST-EM (arXiv 2312.06585) do: rows with the same `id`, numbered by `candidate`, in
            the order in which `selection` prefers them. Of those with the same equations
            ([`~data.text_statistics.normal_form`]) the first is kept. Every id still occurs.
        max_per_problem (`int`, *optional*, defaults to `0`): With `keep="all"`, at most so many rows for a problem; 0
            for no limit.
        keep_demonstration (`bool`, *optional*, defaults to `False`): With `keep="all"`, the demonstration is one more
            row of each problem, the last.
        strategy (`str`, *optional*): The name of the preset that other fields were taken from, which is only noted;
            [`RewriteConfig.from_strategy`] sets them.
        max_concurrent_attempts (`int`, *optional*, defaults to `4`): With `first`, at most this many attempts of one
            problem at a time, and more than one only where other problems leave the engine free slots. Rows do not
            depend on it; 1 never draws a token on speculation.
        keep_rejected (`bool`, *optional*, defaults to `True`): Whether the journal keeps text, token ids and log-probs
            of attempts that are not correct. Without them a line is some 250 bytes, and what the model got wrong
            cannot be looked at.
        solve_prompt (`str`, *optional*): What a row without a prompt of its own (`problem`, `question`) is asked.
        system_prompt (`str`, *optional*): A system turn before it. Rows with prompts of their own hold theirs.
        chat_template_kwargs (`dict` or JSON, *optional*): Variables of the chat template, such as `{"enable_thinking":
            False}`. They are a column of the rows, so that training and `gap` render with them too; `eval` takes them
            with its own `--chat_template_kwargs`.
        guided_prompt (`str`, *optional*): The digest-and-retell prompt, with `{problem}` and `{solution}`.
        hint_kind (`list[str]`, *optional*, defaults to `["full"]`): What the guided stage shows of the reference:
            `full`, all of it, in `guided_prompt`; or less of it, in `hint_prompt`: `outline` (each step up to its
                first
            equals sign), `first_steps` (the first third of the steps) or `answer` (the gold answer, as STaR's
            rationalisation, arXiv 2203.14465). Several are tried one after another, the weakest first, with K attempts
            each, and the first that works is kept ([`~rewriting.hints`]).
        reference_from (`str`, *optional*, defaults to `"demonstration"`): With `teacher`, the stage `teacher` comes before
            `guided`, which retells the first teacher's correct solution (or the demonstration, where no teacher has
            one); if no retelling is kept, the teacher's solution is. For demonstrations that are answers without
            reasoning.
        guided_decoding (`str`, *optional*, defaults to `"plain"`): `plain` draws guided attempts from p, what the model
            says with the reference before it. `hinted` (arXiv 2602.12222) draws each token from p^(1−λ)·q^λ, where q is
            what the model says under the prompt that is trained on, and λ = clip(`hint_beta`·H(p)/ln V, 0, 1) for a
            vocabulary of V: where the model is not sure of the retelling, it goes on as it would by itself.
            `behavior_log_probs` are those of the mixture, and a column `hint_beta` says so. It takes the engine
            `transformers` and twice the forwards.
        hint_beta (`float`, *optional*, defaults to `1.0`): β of `guided_decoding="hinted"`; 0 is `plain`.
        hint_prompt (`str`, *optional*): The prompt with `{problem}` and `{hint}` for hints that are not `full`.
        teacher_log_probs (`bool`, *optional*, defaults to `False`): Rows of teachers hold `behavior_log_probs`, the
            teacher's own, which needs the student's tokenizer. Else μ is unknown there, and `expert_weighting`
            applies.
        clean_reference (`bool`, *optional*, defaults to `True`): Show references in the guided prompt without GSM8K's
            calculator marks (`<<32+16=48>>`) and its last line (`#### 48`), which retellings copy.
        reject_mentions (`bool`, *optional*, defaults to `True`): Do not keep a guided attempt that speaks of the
            reference or a teacher, in the languages of `text_statistics.LEAKS`, unless the problem itself does.
        mention_phrases (`list[str]`, *optional*): Further such phrases: regular expressions, in any case.
        reject_calculator_marks (`bool`, *optional*, defaults to `True`): Nor one with calculator marks.
        min_guided_length (`float`, *optional*, defaults to `0.2`): Nor a stub without reasoning: one with fewer words
            and signs (beside its box) than this share of its reference's, or with no number but its answer where the
            reference has others. The reference is the measure, not the model's own solutions, so that it does not
            depend on what was drawn before. 0 for no limit.
        reject_other_form (`bool`, *optional*, defaults to `True`): Nor one without `\boxed{}` where the row's prompt
            asks for it.
        max_guided_copy (`float`, *optional*, defaults to `0.8`): Nor one of whose 4-grams more than this share are the
            reference's. 1 for no limit.
        check_arithmetic (`bool`, *optional*, defaults to `False`): Nor one that says something like `32 + 16 = 49`
            ([`~rewriting.guided_filters.false_step`]).
        expert_format (`str`, *optional*, defaults to `"boxed"`): `boxed` puts the final answer of an `expert` row into
            `\boxed{}` where its prompt asks for that ([`~data.demonstrations.in_asked_form`]), and takes calculator
            marks out; no value is changed, and the demonstration as it came is in its own column. `keep` leaves it as
            it is.
        control_tokens (`str`, *optional*, defaults to `"warn"`): What is done with problems and references that hold
            the model's control tokens as text ([`~data.control_tokens.ControlTokens`]): `warn`, `refuse`, `escape` or
            `allow`.
        answer_column (`str`, *optional*, defaults to `"answer"`): Gold final answers; where it has none, the
            demonstration's last box or GSM8K's `####` is taken.
        replay_share (`float`, *optional*, defaults to `0.0`): Share of replay rows among all rows that are trained on:
            the model's own answers to general prompts, unverified but finished, against forgetting. They are in
            `output_dir/replay`, and together with the rows in `output_dir/with_replay`; `dataset` stays what it is.
        replay_dataset (`str`, *optional*): The general prompts: a file, a directory or a Hub dataset with `messages`,
            `prompt` or the like. Those that are asked, and their draws, depend on `seed`.
        seed (`int`, *optional*, defaults to `42`): Seed of the run; each attempt has a seed of its own derived from
            it.
        shard (`str`, *optional*, defaults to `"0/1"`): `i/n` does the i-th of n blocks of rows (i from 0 to n - 1),
            with files of its own in `output_dir`; `output_dir/dataset` appears with the last of them.
        report_to (`str`, *optional*, defaults to `"none"`): `wandb` logs the lines of `metrics.jsonl` there as well,
            and the attempts as a table. The environment's `WANDB_RUN_GROUP`, set for rewrite, training and evaluation
            alike, ties them together.
        wandb_log_artifacts (`bool`, *optional*, defaults to `False`): Log the rewritten dataset as an artifact too.
        accept_failed (`bool`, *optional*, defaults to `False`): Push a run, and let the command end with 0, though the
            engine failed at some attempts and their rows may have fallen back for it. Else the same command tries them
            again.
        push_to_hub (`bool`, *optional*, defaults to `False`): The command pushes rows, attempts and card when the run
            is done (in Python, call `push_to_hub`). Whether it may is found out before anything is sampled.
        hub_dataset_id (`str`, *optional*): Dataset repository, `owner/name`.
        hub_private_repo (`bool`, *optional*): Make a new repository private (`--private`) or public; by default it is
            what the owner's new repositories are.
        hub_token (`str`, *optional*): By default `HF_TOKEN`, or that of `hf auth login`; a command line can be read by
            others.
        hub_revision (`str`, *optional*): Branch; by default `main`.
        push_attempts (`bool`, *optional*, defaults to `True`): Push every attempt too, as config `attempts`.
        push_every (`int`, *optional*, defaults to `0`): Push the attempts so far every so many rows of a long run, 0
            for never.
        dry_run (`bool`, *optional*, defaults to `False`): Print the first prompt of each stage, on the command line as
            the model reads it too, and the estimate; sample nothing.
        probe (`int`, *optional*, defaults to `0`): With `dry_run`: rows, evenly spread, whose first attempt at each
            stage is drawn, to tell lengths, acceptance and cost. They are kept in `probe.jsonl`, and a run with the
            same settings begins with them.
        rejudge (`bool`, *optional*, defaults to `False`): Judge the texts that `output_dir`'s journal holds anew, as
            another `verifier` needs; they are not drawn again. The journal as it was stays beside it under a number.
        overwrite (`bool`, *optional*, defaults to `False`): Delete the journal of another configuration in
            `output_dir`; one of this configuration is resumed all the same.
    """

    num_generations: int = field(
        default=8, metadata={"help": "At most this many attempts for each problem and stage."}
    )
    max_completion_length: int = field(
        default=2048, metadata={"help": "Tokens of one attempt. One that is cut here is never kept."}
    )
    stages: list[str] = field(
        default_factory=lambda: list(STAGES),
        metadata={"help": "Stages in order: self, guided, teacher, or some of them."},
    )
    selection: str = field(
        default="first",
        metadata={
            "help": "first: stop at the first correct attempt. random: draw all, keep a random correct one. max_log_prob: draw all, keep "
            ""
            "the correct one with the highest mean token log-prob under the prompt that is trained on.",
            "choices": SELECTIONS,
        },
    )
    max_concurrent_attempts: int = field(
        default=4,
        metadata={
            "help": "Attempts of one problem at a time where slots are free; 1: no speculation. Rows do not depend on it."
        },
    )
    keep_rejected: bool = field(
        default=True,
        metadata={"help": "Keep texts, token ids and log-probs of rejected attempts in the journal."},
    )
    guided_prompt: str = field(
        default=prompts.GUIDED_PROMPT, metadata={"help": "Digest-and-retell prompt with {problem} and {solution}."}
    )
    clean_reference: bool = field(
        default=True,
        metadata={"help": "Show references without calculator marks (<<32+16=48>>) and GSM8K's last line (#### 48)."},
    )
    reject_mentions: bool = field(
        default=True,
        metadata={
            "help": "Do not keep guided attempts that mention the reference or a teacher, in several languages."
        },
    )
    mention_phrases: list[str] = field(
        default_factory=list, metadata={"help": "Further phrases that are such a mention: regular expressions."}
    )
    reject_calculator_marks: bool = field(
        default=True, metadata={"help": "Do not keep guided attempts with calculator marks (<<32+16=48>>)."}
    )
    min_guided_length: float = field(
        default=0.2,
        metadata={"help": "Do not keep guided attempts shorter than this share of their reference; 0: keep them."},
    )
    reject_other_form: bool = field(
        default=True,
        metadata={"help": "Do not keep guided attempts without \\boxed{} where the row's prompt asks for it."},
    )
    max_guided_copy: float = field(
        default=0.8,
        metadata={"help": "Do not keep guided attempts of whose 4-grams more than this share are the reference's."},
    )
    check_arithmetic: bool = field(
        default=False, metadata={"help": "Do not keep guided attempts with a false step, such as 32 + 16 = 49."}
    )
    expert_format: str = field(
        default="boxed",
        metadata={
            "help": "boxed: where a prompt asks for \\boxed{}, put the demonstration's final answer into it. keep: leave it as it is.",
            "choices": EXPERT_FORMATS,
        },
    )
    replay_share: float = field(
        kw_only=True,
        default=0.0,
        metadata={"help": "Share of rows that are the model's own answers to the prompts of replay_dataset."},
    )
    replay_dataset: str | None = field(
        kw_only=True,
        default=None,
        metadata={"help": "General prompts, against forgetting: a file, a directory or a Hub dataset."},
    )
    answer_column: str = field(default="answer", metadata={"help": "Column with gold final answers."})
    wandb_log_artifacts: bool = field(
        default=False, metadata={"help": "Log the rewritten dataset to W&B as an artifact."}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Push rows, attempts and card when the run is done."})
    push_every: int = field(
        default=0, metadata={"help": "Push the attempts so far every so many rows of a long run; 0: only at the end."}
    )
    select_across: str = field(
        kw_only=True,
        default="first_stage",
        metadata={
            "help": "first_stage: the first stage with a correct attempt gives the row. max_initial_log_prob: all stages draw K; kept is "
            "what the model finds likeliest under the prompt that is trained on, the demonstration included (GRAPE).",
            "choices": ACROSS,
        },
    )
    min_correct: int = field(
        kw_only=True,
        default=1,
        metadata={
            "help": "self rows only where so many of the K attempts are correct; needs another selection than first."
        },
    )
    keep: str = field(
        kw_only=True,
        default="one",
        metadata={
            "help": "one: a row for each problem. all: a row for each correct attempt with other equations, numbered by `candidate`.",
            "choices": KEEPS,
        },
    )
    max_per_problem: int = field(
        kw_only=True, default=0, metadata={"help": "keep all: at most so many rows for a problem; 0: no limit."}
    )
    keep_demonstration: bool = field(
        kw_only=True, default=False, metadata={"help": "keep all: the demonstration is one more row of each problem."}
    )
    hint_kind: list[str] = field(
        kw_only=True,
        default_factory=lambda: ["full"],
        metadata={
            "help": "What the guided stage shows of the reference: full, outline, first_steps, answer; several: the weakest first.",
            "choices": HINT_KINDS,
        },
    )
    reference_from: str = field(
        kw_only=True,
        default="demonstration",
        metadata={
            "help": "What the guided stage retells: the demonstration, or a teacher's correct solution where there is one.",
            "choices": REFERENCES,
        },
    )
    guided_decoding: str = field(
        kw_only=True,
        default="plain",
        metadata={
            "help": "plain: guided attempts are drawn from the model with the reference before it. hinted: where it is unsure there, as it "
            "would go on under the prompt that is trained on (sampler transformers).",
            "choices": DECODINGS,
        },
    )
    hint_beta: float = field(
        kw_only=True,
        default=1.0,
        metadata={"help": "guided_decoding hinted: the higher, the more in the model's own voice; 0: plain."},
    )
    hint_prompt: str = field(
        kw_only=True,
        default=prompts.HINT_PROMPT,
        metadata={"help": "Prompt with {problem} and {hint}, for hints other than full."},
    )
    teacher_log_probs: bool = field(
        kw_only=True,
        default=False,
        metadata={"help": "Rows of teachers hold the teacher's log-probs; needs the student's tokenizer."},
    )
    strategy: str | None = field(
        kw_only=True,
        default=None,
        metadata={"help": "Preset of settings, each of which may be given beside it.", "choices": tuple(STRATEGIES)},
    )
    probe: int = field(
        kw_only=True,
        default=0,
        metadata={"help": "With dry_run: draw the first attempts at so many rows, which the run begins with."},
    )
    rejudge: bool = field(
        kw_only=True,
        default=False,
        metadata={
            "help": "Judge the texts in output_dir's journal anew, by another verifier; they are not drawn again."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        known = [*STAGES, "teacher"]
        if any(s not in known for s in self.stages) or len(set(self.stages)) != len(self.stages):
            raise ValueError(
                f"You passed stages={self.stages}; use each of {known} at most once (the demonstration is always the last resort)."
            )
        if self.selection not in SELECTIONS:
            raise ValueError(f"You passed selection={self.selection!r}; use one of {list(SELECTIONS)}.")
        self.check_at_least(max_concurrent_attempts=1, push_every=0, probe=0, min_correct=1, max_per_problem=0)
        self._check_candidates()
        for name in ("min_guided_length", "max_guided_copy"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"You passed {name}={getattr(self, name)}; it is a share, from 0 to 1.")
        for phrase in self.mention_phrases:
            try:
                matches_nothing = re.compile(phrase).search("") is None
            except re.error as error:
                raise ValueError(
                    f"You passed the phrase {phrase!r} in mention_phrases, which is no regular expression: {error}. A sign that means something in "
                    "one, such as ( or +, is written with \\ before it."
                ) from error
            if not matches_nothing:
                raise ValueError(
                    f"You passed {phrase!r} in mention_phrases, which is found in every text; leave it out."
                )
        if self.strategy is not None:
            self._check_strategy(rewrite_settings(self.strategy))
        if not 0 <= self.replay_share < 1:
            raise ValueError(f"You passed replay_share={self.replay_share}; it is a share, at least 0 and below 1.")
        if self.replay_dataset is not None and not self.replay_share:
            warnings.warn(
                f"You passed replay_dataset={self.replay_dataset!r} with replay_share=0: nothing is replayed. A share such as 0.05 asks its prompts.",
                stacklevel=3,
            )
        if self.replay_share and self.replay_dataset is None:
            raise ValueError(
                f"You passed replay_share={self.replay_share} without replay_dataset: name a dataset of general prompts that the model is to answer."
            )
        if self.expert_format not in EXPERT_FORMATS:
            raise ValueError(f"You passed expert_format={self.expert_format!r}; use one of {list(EXPERT_FORMATS)}.")
        if self.num_generations > 65535:
            raise ValueError(f"You passed num_generations={self.num_generations}; it must be at most 65535.")
        if self.push_to_hub and self.hub_dataset_id is None:
            raise ValueError("You passed push_to_hub=True without a repository: write hub_dataset_id='me/name'.")
        if self.push_every and not (self.push_to_hub and self.push_attempts):
            raise ValueError(
                f"You passed push_every={self.push_every}, which pushes the attempts of a run under way, with push_to_hub={self.push_to_hub} "
                f"and push_attempts={self.push_attempts}; both must be True."
            )
        if self.probe and not self.dry_run:
            raise ValueError(
                f"You passed probe={self.probe}, which a dry run draws; pass dry_run=True (--dry_run) with it."
            )
        if self.rejudge and self.overwrite:
            raise ValueError(
                "You passed rejudge=True, which keeps the attempts, and overwrite=True, which deletes them; pass one of them."
            )
        prompts.check(self.guided_prompt, "guided_prompt", "problem", "solution")

    def _check_candidates(self) -> None:
        """Raises `ValueError` for settings of what is kept that are none, or do not go together."""
        of = {"select_across": ACROSS, "keep": KEEPS, "reference_from": REFERENCES, "guided_decoding": DECODINGS}
        for name, values in of.items():
            if getattr(self, name) not in values:
                raise ValueError(f"You passed {name}={getattr(self, name)!r}; use one of {list(values)}.")
        if self.min_correct > 1 and self.selection == "first" and self.keep == "one" and not self.competes:
            raise ValueError(
                f"You passed min_correct={self.min_correct} with selection='first', which stops at the first correct attempt and so never knows of "
                "more. Pass selection='random' or 'max_log_prob', which draw all K."
            )
        if self.min_correct > self.num_generations:
            raise ValueError(
                f"You passed min_correct={self.min_correct} with num_generations={self.num_generations}: so many can never be correct."
            )
        if self.temperature == 0 and self.num_generations > 1:
            equal = f"You passed temperature=0 with num_generations={self.num_generations}: all attempts of a stage at a problem are the same"
            several = [f for f in fields(self) if f.name in ("selection", "keep", "min_correct")]
            if useless := [f"{f.name}={v!r}" for f in several if (v := getattr(self, f.name)) != f.default]:
                raise ValueError(
                    f"{equal}, so {' and '.join(useless)}, which needs different ones, does nothing. Pass a temperature above 0, or leave it out and "
                    "pass num_generations=1."
                )
            warnings.warn(f"{equal}, so where the first is not kept none is. Pass num_generations=1.", stacklevel=4)
        if self.keep == "one" and (
            given := {n: v for n in ("max_per_problem", "keep_demonstration") if (v := getattr(self, n))}
        ):
            raise ValueError(f"You passed {given}, which belong to keep='all'; pass that too, or leave them out.")
        wrong = [kind for kind in self.hint_kind if kind not in HINT_KINDS]
        if wrong or not self.hint_kind or len(set(self.hint_kind)) != len(self.hint_kind):
            raise ValueError(f"You passed hint_kind={self.hint_kind}; use each of {list(HINT_KINDS)} at most once.")
        if self.hint_kind != ["full"] and "guided" not in self.stages:
            raise ValueError(
                f"You passed hint_kind={self.hint_kind} with stages={self.stages}: hints are shown in the stage `guided`."
            )
        if self.reference_from == "teacher":
            if "guided" not in self.stages:
                raise ValueError(
                    f"You passed reference_from='teacher' with stages={self.stages}: the stage `guided` retells it."
                )
            if self.competes or self.rejudge:
                other = "select_across" if self.competes else "rejudge"
                raise ValueError(
                    f"You passed reference_from='teacher' with {other}={getattr(self, other)!r}; what is retold would depend on it. Leave out one of them."
                )
        prompts.check(self.hint_prompt, "hint_prompt", "problem", "hint")
        self._check_decoding()

    def _check_decoding(self) -> None:
        """Raises `ValueError` for settings with which guided attempts cannot be drawn as `guided_decoding` says."""
        self.hint_beta = float(self.hint_beta)
        if not 0 <= self.hint_beta < float("inf"):
            raise ValueError(f"You passed hint_beta={self.hint_beta}; it must be a number of at least 0.")
        if self.guided_decoding == "plain":
            if self.hint_beta != 1.0:
                raise ValueError(
                    f"You passed hint_beta={self.hint_beta} with guided_decoding='plain', which does not use it; write guided_decoding='hinted'."
                )
            return
        if "guided" not in self.stages:
            raise ValueError(
                f"You passed guided_decoding='hinted' with stages={self.stages}: it is how the stage `guided` draws. Leave it out, or add the stage."
            )
        if reshaping := self.sampling_params().reshaping:
            raise ValueError(
                f"You passed guided_decoding='hinted' with {', '.join(f'{name}={value}' for name, value in reshaping.items())}; it mixes the model's "
                f"own distributions. Write {', '.join(f'{name}={PLAIN[name]}' for name in reshaping)}, or guided_decoding='plain'."
            )

    @property
    def hinted(self) -> bool:
        """Whether guided attempts are drawn from a mixture of two distributions."""
        return self.guided_decoding == "hinted"

    @property
    def competes(self) -> bool:
        """Whether the candidates of all stages and the demonstration compete."""
        return self.select_across != "first_stage"

    @property
    def ranks(self) -> bool:
        """Whether candidates are ranked by log π_0 under the prompt that is trained on."""
        return self.selection == "max_log_prob" or self.competes

    def drawn_stages(self, teachers: Iterable[str] = ()) -> list[str]:
        """
        The stages by the names that attempts have: with hints, a guided stage of its own for each kind, the weakest
        first (`guided:answer`; `guided` is the one that shows all), and one for each teacher (`teacher:big`).

        Raises:
            ValueError: There is a stage `teacher` and no teacher.
        """
        from_teacher = self.reference_from == "teacher"
        if ("teacher" in self.stages or from_teacher) and not teachers:
            passed = "reference_from='teacher'" if from_teacher else f"stages={self.stages}"
            raise ValueError(
                f"You passed {passed} and no teacher: name one, teachers={{'big': OpenAISampler(...)}} in Python or --teacher big=URL."
            )
        if self.teacher_log_probs and not teachers:
            raise ValueError("You passed teacher_log_probs=True and no teacher whose they could be; leave it out.")
        kinds = [kind for kind in HINT_KINDS if kind in self.hint_kind]
        names = {
            "self": ["self"],
            "guided": ["guided" if kind == "full" else f"guided:{kind}" for kind in kinds],
            "teacher": [f"teacher:{name}" for name in teachers],
        }
        named = self.stages if "teacher" in self.stages else [*self.stages, "teacher"]
        if from_teacher:
            named = [stage for stage in named if stage != "teacher"]
            named.insert(named.index("guided"), "teacher")
        return [name for stage in named for name in names[stage]]

    @classmethod
    def from_strategy(cls, name: str, output_dir: str, **given) -> "RewriteConfig":
        """
        The settings of a strategy by its name ([`~rewriting.strategies`]); what is given beside it wins over them. As
        `--strategy` does, it leaves out what is the loop's.

        Raises:
            ValueError: There is no strategy of this name, or a value cannot be.
        """
        return cls(output_dir, **{**rewrite_settings(name), **given, "strategy": name})

    def _check_strategy(self, settings: dict[str, Any]) -> None:
        """Warns of the name of a strategy beside none of its settings that make it another than the default."""
        default = {f.name: default_of(f) for f in fields(self)}
        own = {name for name, value in settings.items() if value != default[name]}
        if own and all(getattr(self, name) == default[name] for name in own):
            warnings.warn(
                f"You passed strategy={self.strategy!r}, which only names settings, without what makes it one: {', '.join(sorted(own))} of the default. "
                f"RewriteConfig.from_strategy({self.strategy!r}, output_dir, ...) sets them.",
                stacklevel=4,
            )

    def identity(self) -> dict:
        """
        The fields on which an attempt, or whether it is kept, depends; the rest may change between a run and its
        resume.
        """
        unnamed = copy(self)
        unnamed.strategy = None  # whatever its settings are called together
        used = unnamed.settings()
        if not self.competes:  # else the demonstration is scored as it is written
            del used["expert_format"]
        for name in (*REPLAY, *self.kept()):
            used.pop(name, None)
        if self.control_tokens != "escape":  # else the prompts are others
            del used["control_tokens"]
        # Without filters a run is what it was before there were any, and its journal is continued.
        without = [n for n, off in GUIDED_FILTERS.items() if "guided" not in self.stages or used[n] == off]
        return {name: value for name, value in used.items() if name not in without}

    def kept(self) -> dict:
        """
        The settings, as far as they are given, that say which of the attempts become rows; any journal has them all.
        """
        names = ("min_correct", "keep", "max_per_problem", "keep_demonstration")
        return {f.name: v for f in fields(self) if f.name in names and (v := getattr(self, f.name)) != default_of(f)}

    def settings(self) -> dict:
        """The fields on which the rows depend."""
        free = {
            "output_dir", "dry_run", "probe", "overwrite", "rejudge", "shard", "report_to", "max_concurrent_attempts", "keep_rejected",
            "accept_failed",
        }  # fmt: skip
        # Journals from before these were there do not name them.
        later = {
            *LATER, "system_prompt", "chat_template_kwargs", "select_across", "min_correct", "keep", "max_per_problem", "keep_demonstration",
            "hint_kind", "teacher_log_probs", "strategy", "reference_from", "guided_decoding",
        }  # fmt: skip
        free |= {f.name for f in fields(self) if f.name in later and getattr(self, f.name) == default_of(f)}
        free |= {"hint_prompt"} if self.hint_kind == ["full"] else set()
        free |= set() if self.hinted else {"hint_beta"}
        free -= STRATEGIES.get(
            self.strategy or "", {}
        ).keys()  # a preset's own settings are said even if at their default
        free |= set() if self.replay_share else REPLAY
        elsewhere = ("push_", "hub_", "wandb_")  # a token must not get into the journal
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in free and not f.name.startswith(elsewhere)
        }
