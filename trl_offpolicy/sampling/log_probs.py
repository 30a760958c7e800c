"""What a model says of given tokens: log-probs of targets, entropy of the likeliest tokens, KL to another model.

Everything starts from the backbone's hidden states and goes through the LM head a few thousand tokens at a time, so
that no (tokens, vocabulary) tensor of a whole batch ever exists.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import is_peft_model
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled


CHUNK = 2048  # tokens that go through the LM head together
TOP_K = 20  # EAFT's


def causal_lm(model) -> PreTrainedModel:
    """The model under peft's wrapper."""
    return model.get_base_model() if is_peft_model(model) else model


class LMHead(NamedTuple):
    """What turns hidden states into logits: `weight` and `bias`, or the module itself where an adapter sits on it."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    config: Any
    adapted: torch.nn.Module | None = None


def lm_head(model: PreTrainedModel) -> LMHead:
    """The head of `model` as it is now (peft swaps a saved one for the original while the adapter is off)."""
    head = model.get_output_embeddings()
    weight, bias = (
        p.full_tensor() if isinstance(p, DTensor) else p for p in (head.weight, getattr(head, "bias", None))
    )
    # peft's layers, of LoRA and of single trained tokens: their `weight` is the one without the adapter.
    adapted = head if hasattr(head, "base_layer") or hasattr(head, "token_adapter") else None
    return LMHead(weight, bias, model.config.get_text_config(), adapted)


def _gathered(*parameters: torch.Tensor | None):
    """Whole parameters of a head that ZeRO-3 has cut; TRL, whose import takes seconds, is not loaded without it."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    return maybe_gather_lm_head_ctx(*parameters)


def head_logits(head: LMHead, hidden: torch.Tensor) -> torch.Tensor:
    """
    Logits (N, V) in float32 of hidden states (N, H), scaled and capped as the forward of a model does of which
    [`has_known_head`] is true.
    """
    weight, bias, config, adapted = head
    if adapted is not None:
        logits = adapted(hidden).float()
    else:
        with _gathered(weight, bias):
            logits = torch.nn.functional.linear(hidden, weight, bias).float()
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            logits = logits * getattr(config, name)
    if getattr(config, "logits_scaling", None) is not None:
        logits = (
            logits * config.logits_scaling if config.model_type == "hyperclovax" else logits / config.logits_scaling
        )
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@contextmanager
def hidden_states(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Collects the last hidden states (B, T, H) of every forward of `model`'s backbone, whoever calls it."""
    seen: list[torch.Tensor] = []
    handle = model.base_model.register_forward_hook(lambda _, args, output: seen.append(output.last_hidden_state))
    try:
        yield seen
    finally:
        handle.remove()


_KNOWN_HEADS: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def has_known_head(model: PreTrainedModel, ids: list[int]) -> bool:
    """
    Whether [`head_logits`] of the last hidden states of the model's backbone are the logits that its own forward
    gives. Some models do more to them (RecurrentGemma caps them under another name). Tried once a model, on the first
    of these token ids.
    """
    if model not in _KNOWN_HEADS:
        tokens = torch.tensor([ids[:16]], device=model.device)
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
        # Its class's forward: a copy of a model that TRL has trained has one that is bound to the model it was copied
        # from.
        logits = type(model).forward(model, input_ids=tokens, use_cache=False).logits[0]
        own, ours = logits.float(), head_logits(lm_head(model), hidden)
        rounding = max(1e-3, 2 * torch.finfo(logits.dtype).eps, 2 * torch.finfo(hidden.dtype).eps)
        differ = own.shape != ours.shape or (own - ours.to(own.device)).abs().max() > rounding * own.abs().max()
        _KNOWN_HEADS[model] = not differ
    return _KNOWN_HEADS[model]


@torch.no_grad()
def top_k_entropy(head: LMHead, hidden: torch.Tensor, k: int = TOP_K) -> torch.Tensor:
    """
    Entropy of each next-token distribution's `k` likeliest tokens, renormalised, over ln k: (N,) float32 in [0, 1].
    """
    result = []
    for chunk in hidden.split(CHUNK):
        logits = head_logits(head, chunk)
        log_p = logits.topk(min(k, logits.shape[-1])).values.log_softmax(-1)
        result.append(-(log_p.exp() * log_p).sum(-1) / math.log(k))
    return torch.cat(result) if result else hidden.new_zeros(0, dtype=torch.float32)


def kl_divergence(
    head: LMHead, hidden: torch.Tensor, reference: LMHead, reference_hidden: torch.Tensor
) -> torch.Tensor:
    """KL(π_ref‖π) over the whole vocabulary in nats, (N,) float32; differentiable in `hidden` (N, H) and `head`."""

    def of_chunk(h, reference_h):
        with torch.no_grad():
            reference_log_p = head_logits(reference, reference_h).log_softmax(-1)
        return (reference_log_p.exp() * (reference_log_p - head_logits(head, h).log_softmax(-1))).sum(-1)

    # Each chunk's logits are computed again in the backward pass rather than kept.
    pairs = zip(hidden.split(CHUNK), reference_hidden.split(CHUNK), strict=True)
    return torch.cat([checkpoint(of_chunk, h, r, use_reentrant=False) for h, r in pairs])


@torch.no_grad()
def target_log_probs(
    model,
    pairs: list[tuple[list[int], list[int]]],
    batch_tokens: int = 8192,
    temperatures: list[float] | None = None,
    progress: bool = True,
    observe: Callable[[int, torch.Tensor], None] | None = None,
) -> list[torch.Tensor]:
    """
    log π of each target token given its prompt.

    Args:
        pairs (`list`): (prompt ids, target ids) of each row; a first token without a prompt has no log-prob, and gets
            NaN.
        batch_tokens (`int`, *optional*, defaults to `8192`): Tokens of one forward, padding included.
        temperatures (`list[float]`, *optional*): By which each row's logits are divided; 1 by default.
        progress (`bool`, *optional*, defaults to `True`): Show a bar.
        observe (`Callable`, *optional*): Called with each row's number and its last hidden states (prompt and target
            tokens, H).

    Returns:
        `list` of float32 `torch.Tensor`, each of the length of its target.

    Raises:
        ValueError: The model gives a token no number.
    """
    results: list[torch.Tensor | None] = [None] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    base = causal_lm(model)
    head = lm_head(base)
    was_training = model.training
    model.eval()
    longest = sum(pairs[order[0]], []) if order else []
    known_head = not longest or has_known_head(base, longest)
    # Of another head the logits of all tokens are there at a time, so fewer tokens may be.
    batch_tokens = batch_tokens if known_head else min(batch_tokens, CHUNK)
    start = 0
    with tqdm(total=len(pairs), desc="log-probs", unit="row", leave=False, disable=not progress) as bar:
        while start < len(order):
            width = max(1, sum(map(len, pairs[order[start]])))
            batch = order[start : start + max(1, batch_tokens // width)]
            start += len(batch)
            rows = [pairs[i][0] + pairs[i][1] for i in batch]
            # Padded on the right: a causal model does not look ahead, so any token can serve as padding.
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
            with hidden_states(base) as seen:
                forward = base.base_model if known_head else base
                output = forward(input_ids=ids, attention_mask=mask, use_cache=False)
            (hidden,) = seen
            if observe is not None:
                for i, row, states in zip(batch, rows, hidden, strict=True):
                    observe(i, states[: len(row)])
            first = [max(1, len(pairs[i][0])) for i in batch]  # position of the first target that has a log-prob
            places = [(b, t) for b, row in enumerate(rows) for t in range(first[b], len(row))]
            b, t = torch.tensor(places, dtype=torch.long, device=model.device).view(-1, 2).T
            divisors = (
                None if temperatures is None else torch.tensor([temperatures[i] for i in batch]).to(ids.device)[b]
            )
            scored = []
            for part in torch.arange(len(b), device=ids.device).split(CHUNK):
                at = b[part], t[part] - 1
                logits = head_logits(head, hidden[at]) if known_head else output.logits[at].float()
                if divisors is not None:
                    logits = logits / divisors[part, None]
                scored.append(logits.log_softmax(-1).gather(-1, ids[b[part], t[part]][:, None])[:, 0])
            scored = torch.cat(scored).cpu() if scored else torch.zeros(0)
            if missing := int(scored.isnan().sum()):
                raise ValueError(
                    f"The model gives {missing:,} of {len(scored):,} tokens a log-prob that is no number (NaN): its weights are broken, or what it computes in {model.dtype} "
                    "overflows. Look at the loss and the gradient norm of its training; in 16 bits, try dtype='float32' (--dtype float32)."
                )
            for i, row, begin in zip(batch, rows, first, strict=True):
                own, scored = scored[: len(row) - begin], scored[len(row) - begin :]
                results[i] = torch.nn.functional.pad(own, (len(pairs[i][1]) - len(own), 0), value=math.nan)
            bar.update(len(batch))
    model.train(was_training)
    return results
