"""Token weights and their diagnostics, as pure functions over tensors.

Every objective here is a weighted negative log-likelihood, `-Σ sg(w_t)·log π(y_t) / N`, so an objective is its weights: a
function of what is known of each target token. All arguments are (B, T) and passed by name; a function takes those it
needs and `**_` for the rest, and so does one of a user's own:

    log_probs            log π(y_t), detached; 0 where a token is not trained on
    behavior_log_probs   log μ(y_t), float32; NaN where μ is unknown
    mask                 bool, true where a token is trained on
    entropy              entropy of π(·|y_<t) in nats
    segment_ids          int, equal for the tokens of one example (packed examples are told apart)

Weights are (B, T) float32 without gradient.
"""

import torch


EXPERT_WEIGHTINGS = ("one", "dft")
CLIP_MODES = ("truncate", "mask")


def nll_weights(log_probs: torch.Tensor, **_) -> torch.Tensor:
    """1 everywhere: plain SFT."""
    return torch.ones_like(log_probs, dtype=torch.float32)


def dft_weights(log_probs: torch.Tensor, **_) -> torch.Tensor:
    """π(y_t): Dynamic Fine-Tuning (arXiv 2508.05629, eq. 9), importance weights with μ ≡ 1."""
    return log_probs.float().exp()


def p_alpha_weights(log_probs: torch.Tensor, alpha: float = 1.0, **_) -> torch.Tensor:
    """π(y_t)^α: the gradient of (1 - π^α)/α (arXiv 2510.00526). α = 0 is `nll`, α = 1 is `dft`."""
    return (alpha * log_probs.float()).exp()


def importance_weights(
    log_probs: torch.Tensor,
    behavior_log_probs: torch.Tensor,
    clip_min: float | None = None,
    clip_max: float | None = None,
    clip_mode: str = "truncate",
    expert_weighting: str = "one",
    **_,
) -> torch.Tensor:
    """
    π(y_t)/μ(y_t) ("Mind the Gap", eq. 5, per token and with the real denominator).

    Outside [`clip_min`, `clip_max`] it is truncated to the bound, or masked to 0 (`clip_mode`). Where μ is unknown (a
    demonstration's tokens) there is no ratio, and `expert_weighting` decides: `"one"` as SFT does, `"dft"` takes μ ≡ 1.
    """
    log_ratio = log_probs.float() - behavior_log_probs.float()
    return _clipped(log_ratio, log_probs, clip_min, clip_max, clip_mode, expert_weighting)


def sequence_importance_weights(
    log_probs: torch.Tensor,
    behavior_log_probs: torch.Tensor,
    mask: torch.Tensor,
    segment_ids: torch.Tensor,
    clip_min: float | None = None,
    clip_max: float | None = None,
    clip_mode: str = "truncate",
    expert_weighting: str = "one",
    **_,
) -> torch.Tensor:
    """
    exp(mean_t log π/μ) for all tokens of an example: the length-normalised sequence ratio of iw-SFT (arXiv 2507.12856).

    The mean is over the example's trained tokens with known μ; clipping and unknown μ as in `importance_weights`.
    """
    known = mask.bool() & ~torch.isnan(behavior_log_probs)
    log_ratio = torch.where(known, log_probs.float() - behavior_log_probs.float(), 0.0)
    _, index = segment_ids.reshape(-1).unique(return_inverse=True)
    sums = torch.zeros(2, int(index.max()) + 1, device=log_ratio.device)  # log-ratio and tokens of each example
    sums[0].index_add_(0, index, log_ratio.reshape(-1))
    sums[1].index_add_(0, index, known.reshape(-1).float())
    mean = (sums[0] / sums[1])[index].view_as(log_ratio)  # 0/0 = NaN: no token of the example has a known μ
    return _clipped(mean, log_probs, clip_min, clip_max, clip_mode, expert_weighting)


def _clipped(log_ratio, log_probs, clip_min, clip_max, clip_mode, expert_weighting) -> torch.Tensor:
    ratio = log_ratio.exp()
    weights = ratio if clip_min is None and clip_max is None else ratio.clamp(min=clip_min, max=clip_max)
    if clip_mode == "mask":
        weights = torch.where(weights == ratio, ratio, 0.0)
    unknown = nll_weights(log_probs) if expert_weighting == "one" else dft_weights(log_probs)
    return torch.where(torch.isnan(log_ratio), unknown, weights)


TOKEN_WEIGHTS = {
    "nll": nll_weights,
    "dft": dft_weights,
    "p_alpha": p_alpha_weights,
    "iw": importance_weights,
    "iw_sequence": sequence_importance_weights,
}
OBJECTIVES = tuple(TOKEN_WEIGHTS)


DIAGNOSTICS = ("nll", "weight", "weight_sq", "log_ratio", "kl")


def weight_diagnostics(
    weights: torch.Tensor, log_probs: torch.Tensor, behavior_log_probs: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """
    (sum, count) of each of `DIAGNOSTICS` over the tokens where `mask` (…, T) is true: (5, 2) float64.

    Sums, so that micro-batches and processes can be added up and the means stay means over tokens.
    """
    dtype = torch.float32 if weights.device.type == "mps" else torch.float64  # MPS has no float64
    mask = mask.bool()
    log_probs, weights = log_probs.detach().float(), weights.float()
    known = mask & ~torch.isnan(behavior_log_probs)
    log_ratio = torch.where(known, log_probs - behavior_log_probs, 0.0)  # log π/μ
    values = (
        (-log_probs, mask),
        (weights, mask),
        (weights.square(), mask),
        (log_ratio, known),
        (log_ratio.exp() - 1 - log_ratio, known),  # k3 (joschu.net/blog/kl-approx.html)
    )
    return torch.stack(
        [torch.stack([torch.where(where, v, 0.0).sum(dtype=dtype), where.sum()]) for v, where in values]
    )


def diagnostic_means(sums: torch.Tensor) -> dict[str, float]:
    """
    Summed `weight_diagnostics` as what is logged.

    `nll` is what SFT would report and `weight` the mean weight; `ess` is the effective sample size (Σw)²/(n·Σw²), a share of
    the tokens. Only where μ is known: `log_ratio`, the mean of log π/μ, and `kl`, the k3 estimate of KL(μ‖π).
    """
    means = {name: value / count for name, (value, count) in zip(DIAGNOSTICS, sums.tolist(), strict=True) if count}
    if "weight_sq" in means:
        second_moment = means.pop("weight_sq")
        means["ess"] = means["weight"] ** 2 / second_moment if second_moment else 0.0
    return means
