"""Sampling with plain `transformers`: batched `generate`, no server and no extra dependency.

`generate` draws a batch from one random stream, so a completion would depend on its neighbours. Here each row's tokens
are drawn from its own uniform numbers by inverting the cumulative distribution, so that a seed means the same
completion in whatever batch it lands (exact up to the rounding of the model's forward). Continuous batching
(`generate_batch`) has no per-request seeds and is slower than `generate` on CPU, by a factor of ten for a small model;
the ratios are printed by `benchmarks/sampling_transformers.py`.
"""

import contextlib
import copy
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..data.turns import stop_token_ids, turn_text
from .loading import load_model, load_processing_class, warn_of_slow_bfloat16
from .log_probs import target_log_probs
from .provenance import adapted_revision, hub_commit, local_directory, weights_digest
from .sampler import (
    LONGEST_BLOCK,
    Completion,
    Request,
    Sampler,
    SamplingParams,
    check_positive,
    drawn_completion,
    holds,
    needs,
    prompt_ids,
)


def hinted_scores(hinted: torch.Tensor, unhinted: torch.Tensor, beta: float) -> torch.Tensor:
    """
    log(p^(1−λ)·q^λ) up to a constant of each row, with λ = clip(β·H(p)/ln V, 0, 1): where the model that sees the hint
    is sure of the next token it decides, and where it is not, the model without the hint does (arXiv 2602.12222).

    Args:
        hinted, unhinted (`torch.Tensor`): Logits of p and of q, float, of shape (rows, vocabulary).
        beta (`float`): β, at least 0; with 0 the result is `hinted`.

    Returns:
        `torch.Tensor`: Of the same shape.
    """
    log_p, log_q = (scores.log_softmax(-1).clamp(min=-1e9) for scores in (hinted, unhinted))  # -inf would give 0·inf
    entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)  # (rows, 1), nats
    weight = (beta * entropy / math.log(hinted.shape[-1])).clamp(0.0, 1.0)
    return hinted + weight * (log_q - log_p)


class _SeededDraw(LogitsProcessor):
    """
    Chooses the next token of each row from the row's own random stream, and notes the log-prob of it; with a `beta`
    the second half of the batch are the same rows after the prompts without a hint.
    """

    def __init__(
        self,
        seeds: list[int],
        params: SamplingParams,
        prompts: list[list[int]],
        device,
        stop: list[int],
        room: list[int],
        beta: float | None = None,
    ):
        # (steps, rows): the numbers of a row depend on its seed and on nothing else
        streams = [
            torch.rand(params.max_completion_length, generator=torch.Generator().manual_seed(s), dtype=torch.float64)
            for s in seeds
        ]
        self.uniform = torch.stack(streams, dim=1).to(device)
        self.params, self.prompt_length = params, _longest(prompts)
        self.log_probs: list[torch.Tensor] = []  # one (rows,) tensor a step
        self.beta, self.unhinted_log_probs = beta, list[torch.Tensor]()
        # Which rows are not finished yet: only their tokens count as drawn.
        self.stop, self.room = torch.tensor(stop, device=device), torch.tensor(room, device=device)
        self.live, self.drawn = self.room > 0, 0
        self.warpers = LogitsProcessorList()
        if params.temperature not in (0.0, 1.0):
            self.warpers.append(TemperatureLogitsWarper(params.temperature))
        if params.top_k > 0:
            self.warpers.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(params.top_p))
        if params.min_p > 0:
            self.warpers.append(MinPLogitsWarper(params.min_p))
        self.penalty = None
        if params.repetition_penalty != 1.0:
            self.penalty = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
            # Padding would be penalised, and differs from batch to batch: a prompt is padded with its own first token.
            padded = [ids[:1] * (self.prompt_length - len(ids)) + ids for ids in prompts]
            self.prompts = torch.tensor(padded, device=device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.float()  # (rows, vocabulary)
        all_scores = scores
        if self.beta is not None:
            hinted, unhinted = scores.chunk(2)
            scores = hinted_scores(hinted, unhinted, self.beta)
        step = input_ids.shape[1] - self.prompt_length
        likely = scores
        if self.penalty is not None:
            likely = self.penalty(torch.cat([self.prompts, input_ids[:, self.prompt_length :]], 1), scores)
        if self.params.temperature == 0.0:
            token = likely.argmax(-1, keepdim=True)
        else:
            cumulative = self.warpers(input_ids, likely).softmax(-1).double().cumsum(-1)
            token = torch.searchsorted(cumulative, self.uniform[step][:, None] * cumulative[:, -1:], right=True)
            token = token.clamp(max=scores.shape[-1] - 1)  # (rows, 1)
        self.log_probs.append(_log_prob(scores, token))
        self.drawn += int(self.live.sum())
        self.live &= ~torch.isin(token[:, 0], self.stop) & (self.room > step + 1)
        if self.beta is not None:
            self.unhinted_log_probs.append(_log_prob(unhinted, token))
            token = token.repeat(2, 1)
        return torch.full_like(all_scores, -torch.inf).scatter(-1, token, 0.0)


def _log_prob(scores: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Of the (rows, 1) tokens under (rows, vocabulary) scores: (rows,)."""
    return (scores.gather(-1, token) - scores.logsumexp(-1, keepdim=True))[:, 0]


class _StopTexts(StoppingCriteria):
    """Ends a row when its completion holds one of the stop texts; the prompt's end is not looked at."""

    def __init__(self, processing_class, draw: _SeededDraw):
        self.processing_class, self.draw = processing_class, draw
        self.window = max(len(text.encode()) for text in draw.params.stop) + 1  # tokens: one holds at least a byte

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        start = max(self.draw.prompt_length, input_ids.shape[1] - self.window)
        tails = (turn_text(self.processing_class, ids) for ids in input_ids[:, start:].tolist())
        ended = torch.tensor([holds(tail, self.draw.params.stop) for tail in tails], device=input_ids.device)
        self.draw.live &= ~ended[: len(self.draw.live)]
        return ended


class _Repeats(StoppingCriteria):
    """Cuts a row that ends with the same block of tokens `max_repeats` times in a row; the prompt is not looked at."""

    def __init__(self, draw: _SeededDraw):
        self.draw = draw
        # (rows, block length): how many of the last tokens are what stands a block's length before them
        self.alike = torch.zeros((len(draw.live), LONGEST_BLOCK), dtype=torch.long, device=draw.live.device)
        lengths = torch.arange(1, LONGEST_BLOCK + 1, device=draw.live.device)
        self.enough = lengths * (draw.params.max_repeats - 1)

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        drawn = input_ids[: len(self.alike), self.draw.prompt_length :]
        before = drawn[:, :-1].flip(-1)[:, :LONGEST_BLOCK]  # the nearest first
        same = before == drawn[:, -1:]
        known = same.shape[-1]
        self.alike[:, :known] = (self.alike[:, :known] + 1) * same
        ended = self.draw.live & (self.alike >= self.enough).any(-1)
        self.draw.live &= ~ended
        self.draw.room[ended] = drawn.shape[-1]
        return ended.repeat(len(input_ids) // len(ended))


class _Over(StoppingCriteria):
    """Ends a batch on the way when the sampler is `over`."""

    def __init__(self, over: Callable[[], bool]):
        self.over = over

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.over(), device=input_ids.device)


class TransformersSampler(Sampler):
    """
    A [`Sampler`] on a `transformers` causal language model.

    Args:
        model (`str` or `PreTrainedModel`): Hub id, local directory, or a loaded model (left as it was found).
        processing_class (`PreTrainedTokenizerBase`, *optional*): Tokenizer with a chat template; by default the
            model's.
        batch_size (`int`, *optional*, defaults to `64`): Completions drawn at a time.
        batch_tokens (`int`, *optional*): Prompt tokens of one batch, padding included; long prompts make it smaller.
            By default 256 times `batch_size`.
        model_init_kwargs (`dict`, *optional*): Passed to `from_pretrained`, for example `{"dtype": "bfloat16"}`.
    """

    draws_hinted = True

    def __init__(
        self,
        model,
        processing_class=None,
        batch_size: int = 64,
        batch_tokens: int | None = None,
        model_init_kwargs: dict | None = None,
    ):
        batch_tokens = 256 * batch_size if batch_tokens is None else batch_tokens
        check_positive(batch_size=batch_size, batch_tokens=batch_tokens)
        init = model_init_kwargs or {}
        self.name = model if isinstance(model, str) else model.config._name_or_path or type(model).__name__
        shared = {k: v for k, v in init.items() if k in ("revision", "trust_remote_code")}
        self.processing_class = load_processing_class(self.name, processing_class, **shared)
        self.model = model if isinstance(model, PreTrainedModel) else load_model(model, **init)
        if self.model.device.type == "cpu":
            warn_of_slow_bfloat16(self.model.dtype)
        commit = hub_commit(model, init.get("revision")) if isinstance(model, str) else None
        self.revision = commit or weights_digest(self.model.named_parameters())
        self._drawn = 0  # tokens of finished batches
        self._draw: _SeededDraw | None = None  # the batch under way
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        # A batch runs until its longest completion ends, so requests of similar length are batched together; many must
        # wait to choose from.
        self.slots, self.capacity = batch_size, 32 * batch_size
        self.context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        # A finished row goes on being computed with its batch, and may run past the last position that the model has
        # an embedding for.
        self._learned_positions = not any("rotary" in name for name, _ in self.model.named_modules())
        self.stop_token_ids = stop_token_ids(self.processing_class, self.model.generation_config.eos_token_id)
        # With the ids of its prompt, and of its `unhinted_prompt` if it has one.
        self._pending: list[tuple[Request, list[list[int]]]] = []
        self._failed: list[Completion] = []
        # Entered while this sampler draws: it switches off the adapter that another sampler on the same model uses.
        self._without_adapter = contextlib.nullcontext

    def with_adapter(self, adapter: str) -> "TransformersSampler":
        """
        A sampler on the same model that draws with a LoRA `adapter` (Hub id or local directory), which is off while
        this one draws. A model that you passed keeps the adapter's layers, switched on.

        Raises:
            ValueError: The adapter is no LoRA, or this sampler's model has one already.
        """
        needs("peft", "peft", f"The LoRA adapter {adapter!r}")
        from peft import PeftConfig, PeftModel, PeftType

        if self._without_adapter is not contextlib.nullcontext:
            raise ValueError(f"You passed adapter={adapter!r}, but the model of {self.name} has an adapter already.")
        directory = local_directory(adapter)
        kind = PeftConfig.from_pretrained(directory).peft_type
        if kind != PeftType.LORA:
            raise ValueError(
                f"You passed adapter={adapter!r}, which is {kind.value}; only LoRA can be switched on and off."
            )
        other = copy.copy(self)
        other._pending, other._failed, other._drawn = [], [], 0
        other.name, other.revision = adapter, adapted_revision(self.revision, adapter)
        # Layers of `self.model` are wrapped in place, so both samplers go on with it.
        self._without_adapter = PeftModel.from_pretrained(self.model, directory).disable_adapter
        return other

    def submit(self, request: Request) -> None:
        asked = [request]
        if request.unhinted_prompt is not None:
            asked.append(replace(request, prompt=request.unhinted_prompt))
        prompts = []
        for each in asked:
            ids = prompt_ids(self.processing_class, each, self.context)
            if isinstance(ids, Completion):
                self._failed.append(ids)
                return
            prompts.append(ids)
        self._pending.append((request, prompts))

    def poll(self) -> list[Completion]:
        failed, self._failed = self._failed, []
        if not self._pending or self.over():
            return failed
        # The oldest request always goes, with the waiting requests nearest to it in length (and of the same
        # parameters).
        oldest, oldest_prompts = self._pending[0]
        alike = [p for p in self._pending if _drawn_as(p[0]) == _drawn_as(oldest)]
        if self._learned_positions:
            room = self._room(oldest, oldest_prompts)
            alike = [p for p in alike if self._room(*p) == room]
        batch, width = [], 0
        length = _longest(oldest_prompts)
        for request, prompts in sorted(alike, key=lambda p: abs(_longest(p[1]) - length))[: self.batch_size]:
            width = max(width, _longest(prompts))
            if batch and width * len(prompts) * (len(batch) + 1) > self.batch_tokens:
                break
            batch.append((request, prompts))
        taken = {request.id for request, _ in batch}
        self._pending = [p for p in self._pending if p[0].id not in taken]
        return failed + self._generate(batch, oldest)

    def _room(self, request: Request, prompts: list[list[int]]) -> int:
        """
        How long a completion may get: that depends on its own prompts alone, so neighbours in a batch cannot change it.
        """
        return min(request.params.max_completion_length, self.context - _longest(prompts))

    @property
    def drawn_tokens(self) -> int:
        """Tokens drawn so far, those of the batch under way included."""
        return self._drawn + (self._draw.drawn if self._draw else 0)

    def abort(self, request_id: str) -> int:
        self._failed = [c for c in self._failed if c.id != request_id]
        self._pending = [p for p in self._pending if p[0].id != request_id]
        return 0  # a batch is drawn within one `poll`, so a request that can still be aborted has drawn nothing

    def token_log_probs(self, pairs: list[tuple[list[int], list[int]]]) -> list[list[float] | None]:
        fits = [i for i, (prompt, target) in enumerate(pairs) if len(prompt) + len(target) <= self.context]
        with self._without_adapter():
            scored = target_log_probs(self.model, [pairs[i] for i in fits], self.batch_tokens, progress=False)
        found = dict(zip(fits, scored, strict=True))
        return [found[i].tolist() if i in found else None for i in range(len(pairs))]

    def close(self) -> None:
        self._pending = []
        del self.model

    @torch.no_grad()
    def _generate(self, batch: list[tuple[Request, list[list[int]]]], like: Request) -> list[Completion]:
        params, beta = like.params, None if like.unhinted_prompt is None else like.hint_beta
        # All prompts with a hint, then all without, where there are any.
        prompts = [ids for of_kind in zip(*(ids for _, ids in batch), strict=True) for ids in of_kind]
        width = _longest(prompts)
        pad = self.processing_class.pad_token_id
        pad = (self.stop_token_ids or [0])[0] if pad is None else pad
        device = self.model.device
        input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=device)
        attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        room = [self._room(*pair) for pair in batch]
        seeds = [request.seed for request, _ in batch]
        self._draw = draw = _SeededDraw(seeds, params, prompts, device, self.stop_token_ids, room, beta)
        stopping = StoppingCriteriaList([_StopTexts(self.processing_class, draw)] if params.stop else [])
        stopping.extend([_Repeats(draw)] if params.max_repeats else [])
        stopping.append(_Over(self.over))
        own_config, was_training = self.model.generation_config, self.model.training
        # The model's generation config may set a repetition penalty or top_k, with which tokens would not be drawn
        # from the policy itself.
        self.model.generation_config = GenerationConfig(eos_token_id=self.stop_token_ids or None, pad_token_id=pad)
        self.model.eval()
        try:
            with self._without_adapter():
                output = self.model.generate(
                    input_ids=input_ids, attention_mask=attention_mask, do_sample=False, max_new_tokens=max(room),
                    logits_processor=LogitsProcessorList([draw]), stopping_criteria=stopping,
                )  # fmt: skip
        finally:
            self._draw, self._drawn = None, self._drawn + draw.drawn
            self.model.generation_config = own_config
            self.model.train(was_training)
        drawn, live = output[: len(batch), width:].tolist(), draw.live.tolist()
        log_probs = torch.stack(draw.log_probs, dim=1).tolist()
        unhinted = None if beta is None else torch.stack(draw.unhinted_log_probs, dim=1).tolist()
        self._pending += [pair for pair, unfinished in zip(batch, live, strict=True) if unfinished]  # it was over
        completions = []
        for i, ((request, _), n) in enumerate(zip(batch, draw.room.tolist(), strict=True)):
            if live[i]:
                continue
            ids, of_ids = drawn[i][:n], log_probs[i][:n]
            completion = drawn_completion(
                request.id, ids, of_ids, "length", self.processing_class, self.stop_token_ids, params.stop
            )
            if unhinted is not None:
                completion = replace(completion, unhinted_log_probs=unhinted[i][: len(completion.completion_ids)])
            completions.append(completion)
        return completions


def _longest(prompts: list[list[int]]) -> int:
    return max(map(len, prompts))


def _drawn_as(request: Request) -> tuple:
    """What the requests of a batch have in common."""
    return request.params, request.unhinted_prompt is None, request.hint_beta
