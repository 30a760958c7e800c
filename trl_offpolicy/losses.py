"""Token weights and their diagnostics, as pure functions over tensors.

Every objective here is a weighted negative log-likelihood, `-Σ sg(w_t)·log π(y_t) / N`, so an objective is its weights:
a function of `log_probs` (…, T), log π of each target token (no gradient needed), and of `behavior_log_probs` (…, T),
log μ of the same tokens, NaN where μ is unknown. Weights are (…, T) float32 without gradient.
"""

import torch


OBJECTIVES = ("nll", "dft", "iw")
EXPERT_WEIGHTINGS = ("one", "dft")


def nll_weights(log_probs: torch.Tensor) -> torch.Tensor:
    """1 everywhere: plain SFT."""
    return torch.ones_like(log_probs, dtype=torch.float32)


def dft_weights(log_probs: torch.Tensor) -> torch.Tensor:
    """π(y_t): Dynamic Fine-Tuning (arXiv 2508.05629, eq. 9), importance weights with μ ≡ 1."""
    return log_probs.detach().float().exp()


def importance_weights(
    log_probs: torch.Tensor,
    behavior_log_probs: torch.Tensor,
    clip_min: float | None = None,
    clip_max: float | None = None,
    expert_weighting: str = "one",
) -> torch.Tensor:
    """
    π(y_t)/μ(y_t), truncated to [`clip_min`, `clip_max`] ("Mind the Gap", eq. 5, per token and with the real denominator).

    Where μ is unknown (NaN: tokens of an expert's demonstration) there is no ratio, and `expert_weighting` decides: `"one"`
    trains them as SFT does, `"dft"` takes μ ≡ 1 as DFT does.
    """
    log_ratio = log_probs.detach().float() - behavior_log_probs.float()
    weights = log_ratio.exp()
    if clip_min is not None or clip_max is not None:
        weights = weights.clamp(min=clip_min, max=clip_max)
    fallback = nll_weights(log_probs) if expert_weighting == "one" else dft_weights(log_probs)
    return torch.where(torch.isnan(log_ratio), fallback, weights)


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
