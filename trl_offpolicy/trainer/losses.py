"""Token weights and their diagnostics, as pure functions over tensors.

Every objective here is a weighted negative log-likelihood, `-Σ sg(w_t)·log π(y_t) / N`, so an objective is its
weights: a function of what is known of each target token (`asft` adds a KL to them, which the trainer has from
`log_probs.py`). All arguments are (B, T) and passed by name; a function takes those it needs and `**_` for the rest,
and so does one of a user's own:

    log_probs             log π(y_t), detached; 0 where a token is not trained on
    behavior_log_probs    log μ(y_t), float32; NaN where μ is unknown
    reference_log_probs   log π_0(y_t), float32, under the policy before training; NaN where no objective of the run
                          asked for it
    old_log_probs         log π_old(y_t), float32, under the policy at the start of `psft`'s outer batch; NaN likewise
    mask                  bool, true where a token is trained on
    entropy               entropy of π(·|y_<t) in nats
    top_k_entropy         entropy of π's 20 likeliest tokens, renormalised, over ln 20; None unless `eaft` is in the
                          run
    segment_ids           int, equal for the tokens of one example (packed examples are told apart)
    reward                float32, the example's own at each of its tokens; NaN where it has none
    mean_length           float32 of shape (): trained tokens per example, over all that one optimizer step sees

Weights are (B, T) float32 without gradient.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch


EXPERT_WEIGHTINGS = ("one", "dft", "base")
CLIP_MODES = ("truncate", "mask")
THRESHOLD_MODES = ("mask", "taper")
THRESHOLD_POLICIES = ("current", "initial")


def nll_weights(log_probs: torch.Tensor, **_) -> torch.Tensor:
    """1 everywhere: plain SFT."""
    return torch.ones_like(log_probs, dtype=torch.float32)


def dft_weights(log_probs: torch.Tensor, clip_min: float | None = None, **_) -> torch.Tensor:
    """
    π(y_t), at least `clip_min`: Dynamic Fine-Tuning (arXiv 2508.05629, eq. 9), importance weights with μ ≡ 1.

    Without `clip_min` a token that the model gives no probability is never learned, such as the end of turn in a base
    model.
    """
    return p_alpha_weights(log_probs, clip_min=clip_min)


def p_alpha_weights(log_probs: torch.Tensor, alpha: float = 1.0, clip_min: float | None = None, **_) -> torch.Tensor:
    """
    π(y_t)^α, at least `clip_min`: the gradient of (1 - π^α)/α (arXiv 2510.00526). α = 0 is `nll`, α = 1 is `dft`.
    """
    return (alpha * log_probs.float()).exp().clamp(min=clip_min or 0.0)


def threshold_weights(
    log_probs: torch.Tensor,
    reference_log_probs: torch.Tensor,
    tau: float = 0.1,
    threshold_mode: str = "mask",
    threshold_policy: str = "current",
    clip_min: float | None = None,
    **_,
) -> torch.Tensor:
    """
    1 where a token's probability p is above τ, and below it 0 (`mask`) or p/τ (`taper`), at least `clip_min`.

    p is that under the policy being trained (`current`), which is ProFit (arXiv 2601.09195, τ = 0.1), or that before
    training (`initial`), which is selective token masking (arXiv 2501.14315: τ = 0.4, a perplexity of 2.5); `taper` is
    TrSFT's form (arXiv 2512.17636).
    """
    p = (log_probs if threshold_policy == "current" else reference_log_probs).float().exp()
    below = p / tau if threshold_mode == "taper" else torch.zeros_like(p)
    return torch.where(p > tau, 1.0, below.clamp(min=clip_min or 0.0))


def psft_weights(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, epsilon_high: float = 0.28, **_
) -> torch.Tensor:
    """
    r_t if r_t <= 1 + ε_high else 0, with r_t = π(y_t)/π_old(y_t): the gradient of Proximal SFT's min(r, clip(r, 1-ε,
    1+ε_high)) (arXiv 2508.17784), whose lower bound never binds since every advantage is 1.

    Without π_old (an evaluation has no outer batch) r_t is 1.
    """
    ratio = (log_probs.float() - old_log_probs).exp()
    return torch.where(torch.isnan(ratio), 1.0, torch.where(ratio <= 1 + epsilon_high, ratio, 0.0))


def eaft_weights(log_probs: torch.Tensor, top_k_entropy: torch.Tensor, alpha: float = 1.0, **_) -> torch.Tensor:
    """H̃_t^α, the entropy of the 20 likeliest tokens over ln 20: Entropy-Adaptive Fine-Tuning (arXiv 2601.02151)."""
    return top_k_entropy.float() ** alpha


def importance_weights(
    log_probs: torch.Tensor,
    behavior_log_probs: torch.Tensor,
    clip_min: float | None = None,
    clip_max: float | None = None,
    clip_mode: str = "truncate",
    expert_weighting: str = "one",
    reference_log_probs: torch.Tensor | None = None,
    **_,
) -> torch.Tensor:
    """
    π(y_t)/μ(y_t) ("Mind the Gap", eq. 5, per token and with the real denominator).

    Outside [`clip_min`, `clip_max`] it is truncated to the bound, or masked to 0 (`clip_mode`). Where μ is unknown (a
    demonstration's tokens) `expert_weighting` decides: `"one"` as SFT does, `"dft"` takes μ ≡ 1, `"base"` takes the
    policy before training for μ (`reference_log_probs`), as iw-SFT does for all rows.
    """
    behavior_log_probs = _with_base(behavior_log_probs, reference_log_probs, expert_weighting)
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
    reference_log_probs: torch.Tensor | None = None,
    **_,
) -> torch.Tensor:
    """
    exp(mean_t log π/μ) for all tokens of an example: the length-normalised sequence ratio of iw-SFT (arXiv
    2507.12856).

    The mean is over the example's trained tokens with known μ; clipping and unknown μ as in `importance_weights`.
    """
    behavior_log_probs = _with_base(behavior_log_probs, reference_log_probs, expert_weighting)
    known = mask.bool() & ~torch.isnan(behavior_log_probs)
    log_ratio = torch.where(known, log_probs.float() - behavior_log_probs.float(), 0.0)
    # 0/0 = NaN: no token of the example has a known μ
    mean = _example_sums(log_ratio, segment_ids) / _example_sums(known.float(), segment_ids)
    return _clipped(mean, log_probs, clip_min, clip_max, clip_mode, expert_weighting)


def pear_weights(
    log_probs: torch.Tensor,
    behavior_log_probs: torch.Tensor,
    mask: torch.Tensor,
    segment_ids: torch.Tensor,
    gamma: float = 0.999,
    expert_weighting: str = "one",
    reference_log_probs: torch.Tensor | None = None,
    log_ratio_range: tuple[float, float] = (-0.08, 0.3),
    log_weight_range: tuple[float, float] = (-10.0, 5.0),
    **_,
) -> torch.Tensor:
    """
    γ^(T-t)·exp(Σ_{j>t} δ_j) with δ_j = log π(y_j)/μ(y_j), limited to `log_ratio_range`, and the log of the product to
    `log_weight_range`: PEAR (arXiv 2602.01058). A token weighs as much as the policy would go on as the row does.

    T is the example's last trained token, and the sum runs over those behind t. Unknown μ as in `importance_weights`.
    """
    behavior_log_probs = _with_base(behavior_log_probs, reference_log_probs, expert_weighting)
    log_ratio, mask = log_probs.float() - behavior_log_probs.float(), mask.bool()
    delta = torch.where(mask & ~torch.isnan(log_ratio), log_ratio.clamp(*log_ratio_range), 0.0)
    behind = _example_sums_behind(delta + math.log(gamma) * mask, segment_ids)
    return torch.where(
        torch.isnan(log_ratio), _without_ratio(log_probs, expert_weighting), behind.clamp(*log_weight_range).exp()
    )


def topr_weights(
    log_probs: torch.Tensor,
    behavior_log_probs: torch.Tensor,
    reward: torch.Tensor,
    mask: torch.Tensor,
    segment_ids: torch.Tensor,
    mean_length: torch.Tensor | float,
    ratio_max: float = 1.0,
    **_,
) -> torch.Tensor:
    """
    1 for an example with a reward above 0, and -min(π(y)/μ(y), 1) for one below, with the ratio of the whole sequence:
    Tapered Off-Policy REINFORCE (arXiv 2503.14286). What is pushed down loses its weight as it becomes unlikely, where
    REINFORCE would push for ever.

    The paper divides the loss of an example by its length. TRL divides a step's by all of its tokens, so the weights
    are multiplied by `mean_length` over the example's own length; `mean_length` = that length gives TRL's mean over
    tokens. NaN where an example has no reward, or one below 0 without μ.
    """
    mask = mask.bool()
    log_ratio = _example_sums(torch.where(mask, log_probs.float() - behavior_log_probs.float(), 0.0), segment_ids)
    negative = torch.where(reward < 0, -log_ratio.exp().clamp(max=ratio_max), torch.nan)
    return torch.where(reward > 0, 1.0, negative) * mean_length / _example_sums(mask.float(), segment_ids).clamp(min=1)


def _example_sums(values: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
    """At each token the sum of `values` over its example: (B, T)."""
    _, index = segment_ids.reshape(-1).unique(return_inverse=True)
    sums = torch.zeros(int(index.max()) + 1, dtype=values.dtype, device=values.device)
    return sums.index_add_(0, index, values.reshape(-1))[index].view_as(values)


def _example_sums_behind(values: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
    """At each token the sum of `values` over the tokens of its example that follow it: (B, T), float32."""
    dtype = torch.float32 if values.device.type == "mps" else torch.float64  # MPS has no float64
    # An example's tokens are neighbours, also where examples stand one behind another in a row.
    up_to_here = values.to(dtype).flatten().cumsum(0).view_as(values)
    _, index = segment_ids.reshape(-1).unique(return_inverse=True)
    places = torch.arange(len(index), device=index.device)
    last = torch.zeros(int(index.max()) + 1, dtype=torch.long, device=index.device)
    last = last.scatter_reduce_(0, index, places, "amax")[index]
    return (up_to_here.flatten()[last].view_as(values) - up_to_here).float()


def _with_base(behavior_log_probs, reference_log_probs, expert_weighting) -> torch.Tensor:
    if expert_weighting != "base":
        return behavior_log_probs
    return torch.where(torch.isnan(behavior_log_probs), reference_log_probs, behavior_log_probs)


def _clipped(log_ratio, log_probs, clip_min, clip_max, clip_mode, expert_weighting) -> torch.Tensor:
    ratio = log_ratio.exp()
    weights = ratio if clip_min is None and clip_max is None else ratio.clamp(min=clip_min, max=clip_max)
    if clip_mode == "mask":
        weights = torch.where(weights == ratio, ratio, 0.0)
    return torch.where(torch.isnan(log_ratio), _without_ratio(log_probs, expert_weighting), weights)


def _without_ratio(log_probs, expert_weighting) -> torch.Tensor:
    """What a token weighs whose μ is not known."""
    return dft_weights(log_probs) if expert_weighting == "dft" else nll_weights(log_probs)


class Objective(NamedTuple):
    """The function that weights tokens, what it computes, the paper (arXiv id), and the config fields it takes."""

    weights: Callable[..., torch.Tensor]
    equation: str
    paper: str | None = None
    settings: tuple[str, ...] = ()


_CLIPPING = ("clip_min", "clip_max", "clip_mode", "expert_weighting")
OBJECTIVES = {
    "nll": Objective(nll_weights, "1"),
    "dft": Objective(dft_weights, "π(y_t)", "2508.05629", ("clip_min",)),
    "p_alpha": Objective(p_alpha_weights, "π(y_t)^alpha", "2510.00526", ("alpha", "clip_min")),
    "iw": Objective(importance_weights, "π(y_t)/μ(y_t) within [clip_min, clip_max]", "2509.15157", _CLIPPING),
    "iw_sequence": Objective(
        sequence_importance_weights, "exp(mean_t log π/μ) within [clip_min, clip_max]", "2507.12856", _CLIPPING
    ),
    "pear": Objective(
        pear_weights, "gamma^(T-t)·Π_{j>t} π/μ(y_j), factors and product limited", "2602.01058", ("gamma", "expert_weighting")
    ),
    "psft": Objective(
        psft_weights, "π/π_old(y_t), 0 above 1 + epsilon_high", "2508.17784", ("epsilon_high", "steps_per_outer_batch")
    ),
    "asft": Objective(
        dft_weights, "π(y_t), and beta·KL(π_0‖π) is added to the loss", "2509.23753", ("beta", "clip_min")
    ),
    "eaft": Objective(eaft_weights, "(entropy of the 20 likeliest tokens / ln 20)^alpha", "2601.02151", ("alpha",)),
    "threshold": Objective(
        threshold_weights, "1 where π or π_0 of y_t is above tau; else 0 (mask) or π/tau (taper)", "2601.09195",
        ("tau", "threshold_mode", "threshold_policy", "clip_min"),
    ),
    "topr": Objective(
        topr_weights, "1 where the reward is above 0, -min(π(y)/μ(y), 1) where it is below; times mean length / own length", "2503.14286"
    ),
}  # fmt: skip
# With these no weight is limited.
NO_LIMITS = {
    "clip_min": None,
    "clip_max": None,
    "epsilon_high": float("inf"),
    "ratio_max": float("inf"),
    "log_ratio_range": (-float("inf"), float("inf")),
    "log_weight_range": (-float("inf"), float("inf")),
}


def objectives_with(setting: str) -> set[str]:
    """The objectives that take this setting."""
    return {name for name, objective in OBJECTIVES.items() if setting in objective.settings}


DIAGNOSTICS = (
    "nll", "weight", "weight_sq", "clip_fraction", "entropy", "mean_token_accuracy", "log_ratio", "kl",
)  # fmt: skip


def weight_diagnostics(
    weights: torch.Tensor,
    unlimited: torch.Tensor,
    log_probs: torch.Tensor,
    behavior_log_probs: torch.Tensor,
    entropy: torch.Tensor,
    is_top1: torch.Tensor,
    groups: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What is logged of a batch, for each group of tokens, in a form that micro-batches and processes can add up.

    Args:
        weights, unlimited, log_probs, behavior_log_probs, entropy, is_top1 (`torch.Tensor` of shape (B, T)):
            `unlimited` are the weights that `NO_LIMITS` would give; where they differ from `weights`, a weight was
            clipped. Finite, or 0 outside all groups.
        groups (`torch.Tensor` of shape (G, B, T), bool): The tokens of each group.

    Returns:
        (sum, count) of each of `DIAGNOSTICS`, float64 of shape (G, 8, 2), and (max of -weight, max of weight), of
        shape (G, 2).
    """
    dtype = torch.float32 if weights.device.type == "mps" else torch.float64  # MPS has no float64
    known = groups.any(0) & ~torch.isnan(behavior_log_probs)
    log_probs, weights = log_probs.detach().float(), weights.float()
    log_ratio = torch.where(known, log_probs - behavior_log_probs, 0.0)  # log π/μ
    values = [
        -log_probs,
        weights,
        weights.square(),
        weights != unlimited,
        entropy,
        is_top1,
        log_ratio,
        torch.where(known, log_ratio.exp() - 1 - log_ratio, 0.0),  # k3 (joschu.net/blog/kl-approx.html)
    ]
    members = groups.flatten(1).to(dtype).T  # (B·T, G)
    sums = torch.stack([v.flatten().to(dtype) for v in values]) @ members  # (8, G)
    counts = torch.stack([members.sum(0)] * 6 + [known.flatten().to(dtype) @ members] * 2)
    extremes = torch.stack([-weights, weights], -1)[None].masked_fill(~groups[..., None], -torch.inf)
    return torch.stack([sums, counts], -1).transpose(0, 1), extremes.flatten(1, 2).amax(1)


def diagnostic_means(sums: torch.Tensor, extremes: torch.Tensor) -> dict[str, float]:
    """
    One group's `weight_diagnostics`, added up, as what is logged.

    `nll` is what SFT would report; `weight`, `weight_min`, `weight_max` the mean and extreme weight; `ess` the
    effective sample size (Σw)²/(n·Σw²), a share of the tokens; `clip_fraction` the share whose weight a limit changed;
    `entropy` and `mean_token_accuracy` as TRL's. Only where μ is known: `log_ratio`, the mean of log π/μ, and `kl`,
    the k3 estimate of KL(μ‖π).
    """
    means = {name: value / count for name, (value, count) in zip(DIAGNOSTICS, sums.tolist(), strict=True) if count}
    if "weight_sq" in means:
        second_moment = means.pop("weight_sq")
        means["ess"] = means["weight"] ** 2 / second_moment if second_moment else 0.0
        low, means["weight_max"] = extremes.tolist()
        means["weight_min"] = -low
    return means
