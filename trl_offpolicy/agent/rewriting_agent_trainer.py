"""
The rewriting agent: a LoRA policy on the frozen base model that learns to retell references as the base would have put
them.

    verifier = MathVerifier()
    trainer = RewritingAgentTrainer(
        "Qwen/Qwen2.5-Math-1.5B", GroupReward(verifier), GRPOConfig("runs/agent"), agent_dataset(demonstrations,
        verifier), peft_config=LoraConfig(r=64, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.train()

("Patch the Distribution Mismatch", arXiv 2602.11220.) A candidate's reward depends on all candidates of its prompt:

A candidate that is right (and, if the base judges, validly reasoned) is rewarded for being likely under the base and
different from the other right ones: `group_rewards.py`. The likelihood is standardised within a group, so the mean of
`reward/dist` is near 0.5 by construction; what falls as the agent aligns with the base is the negative log-likelihood
itself, `reward/nll`.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset
from trl import GRPOTrainer

from ..data.control_tokens import ControlTokens
from ..data.formats import guided_prompt, read_rows, text_columns
from ..data.loading import unformatted
from ..data.prompts import GUIDED_PROMPT, REASONING_PROMPT, SOLVE_PROMPT, check, contents, fill
from ..data.rows import Verdict
from ..data.tokenization import encode_prompt
from ..data.turns import cut_turn, stop_token_ids, turn_text
from ..data.whole_file import write_whole
from ..sampling.log_probs import causal_lm, head_logits, lm_head, target_log_probs
from ..trainer.initial_policy import InitialPolicy
from ..trainer.model_card import agent_card
from ..verification.verifier import as_verifier, explain_with, rewards
from .group_rewards import alignment_reward, diversity_reward, task_gate, total_reward


# Values of `init_lora_weights` (or how they begin) that change the frozen weights, so that the adapter off is another
# model.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Candidate(NamedTuple):
    """What a process knows of one candidate; every process gets those of all."""

    group: str
    right: float  # 1, 0, or NaN: could not be told
    gate: float
    nll: float  # NaN unless the gate is 1
    embedding: np.ndarray | None


class GroupReward:
    """
    The reward as `GRPOTrainer` calls it, on rows of [`agent_dataset`].

    A group is all candidates of one prompt, wherever they are in the batch and on whichever process; every process
    computes all groups and returns its own part. `None` (no reward, no gradient) is what a candidate gets whose gold
    answer cannot be compared with, whose verification timed out or failed, or whose log-probs are not finite; it
    counts as neither right nor wrong in its group. One that was cut at `max_completion_length` gets 0: a rewrite never
    keeps it.

    Logged beside TRL's metrics, over all processes: `reward/accuracy` (v_ans), `reward/gate` (r_task),
    `reward/feasible` and `reward/unjudged` (shares of all candidates), and of the feasible `reward/dist`, `reward/div`
    and `reward/nll` (nats per token).

    Args:
        verifier: What verifies answers; as for [`DataRewriter`].
        lambda_dist, lambda_div (`float`, *optional*, default to `0.35` and `0.5`): The paper's.
        judge (`bool`, *optional*, defaults to `False`): Ask the base, where an answer is right, whether the reasoning
            is valid, and take P(YES) ≥ P(NO) of its next token for a yes. A model of a few million parameters cannot
            judge.
        reasoning_prompt (`str`, *optional*): What it is asked then, with `{problem}` and `{completion}`.
        embed (`Callable`, *optional*): `list[str]` → (N, H), such as a `SentenceTransformer`'s `encode`; by default
            the base's last hidden states, averaged over the candidate's tokens.
        batch_tokens (`int`, *optional*, defaults to `8192`): Tokens of one forward of the base, padding included.
    """

    __name__ = "group_reward"

    def __init__(
        self,
        verifier,
        lambda_dist: float = 0.35,
        lambda_div: float = 0.5,
        judge: bool = False,
        reasoning_prompt: str = REASONING_PROMPT,
        embed: Callable[[list[str]], np.ndarray] | None = None,
        batch_tokens: int = 8192,
    ):
        if lambda_dist < 0 or lambda_div < 0:
            raise ValueError(
                f"You passed lambda_dist={lambda_dist}, lambda_div={lambda_div}; neither may be negative."
            )
        check(reasoning_prompt, "reasoning_prompt", "problem", "completion")
        self.verifier, self.lambda_dist, self.lambda_div, self.judge = verifier, lambda_dist, lambda_div, judge
        self.reasoning_prompt, self.embed, self.batch_tokens = reasoning_prompt, embed, batch_tokens
        self._base: InitialPolicy | None = None

    def bind(self, trainer: GRPOTrainer) -> None:
        """
        Takes the base, the model of `trainer` with its adapter off; [`RewritingAgentTrainer`] calls it.

        Raises:
            ValueError: The model has no adapter, or one whose `init_lora_weights` or `bias` changes the base; its
                parameters are sharded, or (with a judge) YES and NO begin with the same token.
        """
        if not is_peft_model(trainer.model):
            raise ValueError(
                "The reward asks the frozen base by switching the adapter off, but the model has none. Pass a `peft_config`, such as "
                "LoraConfig(r=64, lora_alpha=32, target_modules='all-linear')."
            )
        for config in trainer.model.peft_config.values():
            if getattr(config, "bias", "none") != "none":
                raise ValueError(
                    f"Your peft_config has bias={config.bias!r}: biases that are trained stay changed with the adapter off, so the reward would be "
                    "asked of a base that drifts. Write bias='none'."
                )
            start = getattr(config, "init_lora_weights", True)
            if isinstance(start, str) and start.lower().startswith(CHANGES_THE_BASE):
                raise ValueError(
                    f"Your peft_config has init_lora_weights={start!r}, which takes a part out of the frozen weights and puts it into the adapter: with "
                    "the adapter off, the model would not be the base that the reward asks. Write init_lora_weights=True."
                )
        deepspeed = trainer.accelerator.state.deepspeed_plugin
        if trainer.is_fsdp_enabled or (deepspeed is not None and deepspeed.zero_stage == 3):
            raise ValueError(
                "The reward asks the base about as many candidates as are feasible on each process, which would wait forever for the "
                "others where parameters are sharded (FSDP, ZeRO-3). Use DDP, ZeRO-1 or ZeRO-2; the base is frozen, only an adapter is trained."
            )
        self._base, self._tokenizer = InitialPolicy(trainer.model, trainer.accelerator), trainer._tokenizer
        self._stop_ids, self._template_kwargs = trainer.eos_token_ids, trainer.chat_template_kwargs
        if self.judge:
            encode = self._tokenizer.encode
            self._yes_no = [encode(word, add_special_tokens=False)[0] for word in ("YES", "NO")]
            if self._yes_no[0] == self._yes_no[1]:
                raise ValueError("YES and NO begin with the same token, so this model cannot judge: pass judge=False.")

    def __call__(
        self, prompts, completion_ids, answer, qa_prompt, problem, row=None, log_metric=None, log_extra=None, **_
    ) -> list[float | None]:
        """TRL's reward signature; `answer`, `qa_prompt`, `problem` and `row` are columns of the dataset."""
        if self._base is None:
            raise ValueError(
                "The reward has no model yet: call `reward.bind(trainer)`, or use `RewritingAgentTrainer`."
            )
        texts = [
            turn_text(self._tokenizer, ids) for ids in completion_ids
        ]  # the texts that a rewrite with the agent would judge
        right = self._right(texts, completion_ids, answer, row)
        with self._base.asked() as model, self._base.accelerator.autocast():
            gate = task_gate(right, self._reasoned(model, np.flatnonzero(right == 1), problem, texts))
            nll, embeddings = self._scored(model, np.flatnonzero(gate == 1), qa_prompt, completion_ids, texts)
        own = [
            Candidate(hashlib.blake2b(json.dumps(prompt).encode(), digest_size=16).hexdigest(), *rest)
            for prompt, *rest in zip(prompts, right, gate, nll, embeddings, strict=True)
        ]
        candidates = gather_object(own)  # in the order of the processes, which have equally many
        terms = self.terms(candidates)
        mine = slice(PartialState().process_index * len(own), (PartialState().process_index + 1) * len(own))
        if log_metric is not None:
            for name, value in _means(candidates, terms).items():
                log_metric(f"reward/{name}", value)
        if log_extra is not None:
            for name in ("gate", "dist", "div", "nll"):
                log_extra(name, terms[name][mine].tolist())
        return [None if np.isnan(r) else float(r) for r in terms["total"][mine]]

    def terms(self, candidates: list[Candidate]) -> dict[str, np.ndarray]:
        """`feasible` (bool), `gate`, `dist`, `div`, `nll` and `total` (float64) of all candidates, (N,) each."""
        gate, nll = (np.array([getattr(c, name) for c in candidates], float) for name in ("gate", "nll"))
        embeddings, groups = [c.embedding for c in candidates], np.array([c.group for c in candidates])
        whole = [e is not None and bool(np.isfinite(e).all()) for e in embeddings]
        feasible = (gate == 1) & np.isfinite(nll) & whole
        dist, div = np.zeros(len(gate)), np.zeros(len(gate))
        for group in np.unique(groups):
            members = np.flatnonzero(groups == group)
            dist[members] = alignment_reward(nll[members], feasible[members])
            div[members] = diversity_reward([embeddings[i] for i in members], feasible[members])
        total = total_reward(gate, dist, div, self.lambda_dist, self.lambda_div)
        total[(gate == 1) & ~feasible] = np.nan
        return {"feasible": feasible, "gate": gate, "dist": dist, "div": div, "nll": nll, "total": total}

    def _right(
        self, texts: list[str], completion_ids: list[list[int]], answers: list, rows: list[dict] | None
    ) -> np.ndarray:
        right = np.zeros(len(texts))
        lengths = [cut_turn(self._tokenizer, self._stop_ids, ids, at_limit=True) for ids in completion_ids]
        whole = [i for i, ids in enumerate(completion_ids) if lengths[i] == len(ids)]
        asked = [texts[i] for i in whole], [answers[i] for i in whole], rows and [rows[i] for i in whole]
        judgements = explain_with(self.verifier, *asked)
        right[whole] = np.array(rewards(judgements), float)  # `None` becomes NaN
        return right

    def _reasoned(self, model, places, problems: list[str], texts: list[str]) -> np.ndarray:
        reasoned = np.ones(len(texts))
        if not self.judge:
            return reasoned
        head, log_probs = lm_head(causal_lm(model)), {}

        def at_the_end(row: int, hidden: torch.Tensor) -> None:
            log_probs[row] = head_logits(head, hidden[-1:])[0, self._yes_no].tolist()

        questions = [fill(self.reasoning_prompt, problem=problems[i], completion=texts[i]) for i in places]
        asked = [(self._encoded([{"role": "user", "content": text}]), []) for text in questions]
        target_log_probs(model, asked, self.batch_tokens, progress=False, observe=at_the_end)
        for row, place in enumerate(places):
            yes, no = log_probs[row]
            reasoned[place] = float(yes >= no) if np.isfinite(yes) and np.isfinite(no) else np.nan
        return reasoned

    def _encoded(self, prompt: list[dict[str, str]] | str) -> list[int]:
        return encode_prompt(self._tokenizer, prompt, chat_template_kwargs=self._template_kwargs)

    def _scored(self, model, places, qa_prompts, completion_ids, texts) -> tuple[np.ndarray, list[np.ndarray | None]]:
        """NLL per token and embedding of the candidates at `places`, from one forward of the base."""
        nll = np.full(len(texts), np.nan)
        embeddings: list[np.ndarray | None] = [None] * len(texts)
        # The same candidate drawn twice is scored once: what rounding makes of its place in a batch would be taken for
        # a difference.
        alike: dict[tuple, list[int]] = {}
        for i in places:
            pair = tuple(self._encoded(qa_prompts[i])), tuple(completion_ids[i])
            alike.setdefault(pair, []).append(i)
        members, pairs = list(alike.values()), [(list(prompt), list(target)) for prompt, target in alike]

        def mean_pooled(row: int, hidden: torch.Tensor) -> None:
            for place in members[row]:
                embeddings[place] = hidden[len(pairs[row][0]) :].float().mean(0).cpu().numpy()

        observe = mean_pooled if self.embed is None else None
        scored = target_log_probs(model, pairs, self.batch_tokens, progress=False, observe=observe)
        for group, log_probs in zip(members, scored, strict=True):
            nll[group] = -log_probs.double().mean().item()
        if self.embed is not None and len(places):
            for place, embedding in zip(places, self.embed([texts[i] for i in places]), strict=True):
                embeddings[place] = np.asarray(embedding, np.float32)
        return nll, embeddings


def _means(candidates: list[Candidate], terms: dict[str, np.ndarray]) -> dict[str, float]:
    feasible, right = terms["feasible"], np.array([c.right for c in candidates])
    means = {"feasible": feasible.mean(), "unjudged": np.isnan(terms["total"]).mean()}
    for name, values in (("accuracy", right), ("gate", terms["gate"])):
        if not np.isnan(values).all():
            means[name] = np.nanmean(values)
    if feasible.any():
        means |= {name: terms[name][feasible].mean() for name in ("dist", "div", "nll")}
    return {name: float(value) for name, value in means.items()}


def agent_dataset(
    dataset,
    verifier,
    answer_column: str = "answer",
    solve_prompt: str = SOLVE_PROMPT,
    guided_template: str = GUIDED_PROMPT,
    qa_template: str | None = None,
    processing_class=None,
    max_prompt_length: int | None = None,
    control_tokens: str = "warn",
    system_prompt: str | None = None,
    chat_template_kwargs: dict | None = None,
) -> Dataset:
    """
    Demonstrations as the agent is trained on them: `prompt` (with the reference), `qa_prompt`, `problem`, `answer`,
    and in `row` the other columns that the verifier names, where the dataset has them.

    Args:
        dataset (`datasets.Dataset` or `list[dict]`): Rows in any of the formats of `rows.FORMATS`.
        verifier: Rows whose gold answer it cannot compare with are left out, and counted in a warning.
        qa_template (`str`, *optional*): Text with `{problem}` under which the base's NLL is taken, without chat
            template (`prompts.PAPER_QA_PROMPT`); by default a row's own prompt, the one that will be trained on,
            through the chat template.
        processing_class, max_prompt_length (*optional*): Rows whose prompt has more tokens are left out, and counted
            likewise.
        control_tokens (`str`, *optional*, defaults to `"warn"`): What is done with problems and references that hold
            control tokens of the `processing_class` as text: `warn`, `refuse`, `escape` or `allow`
            ([`~data.control_tokens.ControlTokens`]).
        system_prompt, chat_template_kwargs (*optional*): As in [`RewriteConfig`]; the latter for `max_prompt_length`.

    Raises:
        ValueError: A row has no problem or no demonstration (named by number), or none is left.
    """
    check(guided_template, "guided_prompt", "problem", "solution")
    verifier = as_verifier(verifier)
    if isinstance(dataset, Dataset):
        dataset = text_columns(unformatted(dataset), answer_column, verifier.columns)
    problems = list(read_rows(dataset, answer_column, solve_prompt, system_prompt=system_prompt))
    if problems and problems[0].demonstration is None:
        raise ValueError("The dataset has problems and gold answers but no demonstrations, which the agent retells.")
    control = ControlTokens(processing_class, control_tokens)
    texts = ("\0".join([*contents(p.prompt), p.demonstration]) for p in problems)
    control.check(map(control.within, texts), "problem or reference")
    golds = [problem.answer for problem in problems]
    rows, too_long = [], 0
    for problem, verdict in zip(problems, verifier.check_answers(golds), strict=True):
        prompt = control.prompt(guided_prompt(problem, guided_template))
        if verdict != Verdict.CORRECT:
            continue
        if max_prompt_length is not None:
            ids = encode_prompt(processing_class, prompt, chat_template_kwargs=chat_template_kwargs)
            if len(ids) > max_prompt_length:
                too_long += 1
                continue
        qa_prompt = (
            control.prompt(problem.prompt) if qa_template is None else fill(qa_template, problem=problem.problem)
        )
        row = {name: problem.row[name] for name in verifier.columns if name in problem.row}
        own = {"prompt": prompt, "qa_prompt": qa_prompt, "problem": problem.problem, "answer": problem.answer}
        rows.append({**own, "row": row} if row else own)
    if len(rows) < len(problems):
        warnings.warn(
            f"{len(problems) - len(rows)} of {len(problems)} rows are left out of the agent's training: {too_long} have prompts of more than "
            f"{max_prompt_length} tokens, {len(problems) - len(rows) - too_long} no gold answer that can be compared with.",
            stacklevel=2,
        )
    if not rows:
        raise ValueError(
            "No row is left for the agent to be trained on. Check `answer_column` and `max_prompt_length`."
        )
    return Dataset.from_list(rows)


class RewritingAgentTrainer(GRPOTrainer):
    """
    `GRPOTrainer` with a [`GroupReward`], alone or among other rewards, and a card that says how the agent is used.

    Args:
        model, reward_funcs, args, train_dataset, ...: `GRPOTrainer`'s; `peft_config` is needed.
        guided_template (`str`, *optional*): The prompt that `train_dataset` was made with, for the card.
        dataset_name (`str`, *optional*): Where its rows come from, likewise.
    """

    _tag_names = ["trl", "grpo", "rewriting-agent"]
    _name = "Rewriting agent (GRPO)"

    def __init__(
        self,
        model,
        reward_funcs,
        *args,
        guided_template: str = GUIDED_PROMPT,
        dataset_name: str | None = None,
        **kwargs,
    ):
        super().__init__(model, reward_funcs, *args, **kwargs)
        self.guided_template, self.dataset_name = guided_template, dataset_name
        self._stop_at_the_end_of_a_turn()
        for reward in self.reward_funcs:
            if isinstance(reward, GroupReward):
                reward.bind(self)

    def _stop_at_the_end_of_a_turn(self) -> None:
        """
        TRL stops where tokenizer and generation config say; a rewrite with the agent also where the chat template ends
        a turn.
        """
        self.eos_token_ids = stop_token_ids(self._tokenizer, self.eos_token_ids)
        if self.use_vllm:
            given = self.vllm_generation.generation_kwargs
            stops = sorted({*self.eos_token_ids, *given.get("stop_token_ids", [])})
            self.vllm_generation.generation_kwargs = {**given, "stop_token_ids": stops}
        else:
            self.generation_kwargs["eos_token_id"] = self.generation_config.eos_token_id = self.eos_token_ids

    def _calculate_rewards(self, *args, **kwargs):
        rewards = super()._calculate_rewards(*args, **kwargs)  # (N, functions), NaN where one said None
        own = [i for i, reward in enumerate(self.reward_funcs) if isinstance(reward, GroupReward)]
        # GRPO sums the rewards that are there, so a completion without this reward would rank lowest in its group
        # beside other rewards.
        rewards[rewards[:, own].isnan().any(1)] = math.nan
        return rewards

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """
        Writes `output_dir/README.md`: base, data, reward, prompt, hyper-parameters, last results, and the command that
        rewrites with it.
        """
        if self.is_world_process_zero():
            write_whole(f"{self.args.output_dir}/README.md", str(agent_card(self, model_name, dataset_name, tags)))
