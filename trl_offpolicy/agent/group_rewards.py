"""The terms of the rewriting agent's reward over the candidates of one prompt (arXiv 2602.11220): numpy in, numpy out.

    r = r_task · (1 + λ_dist · r_dist + λ_div · r_div)

A candidate is feasible where r_task is 1. The other two terms compare it with the feasible candidates of its group:
how likely it is under the base, and how different from the others.
"""

import numpy as np


EPSILON = 1e-6  # nats per token; NLLs that are all the same have no spread to be divided by


def task_gate(right, reasoned) -> np.ndarray:
    """
    r_task = v_ans · v_rea: (N,) of 1, 0, and NaN where it could not be told. `reasoned` counts only where `right` is
    1.
    """
    right = np.asarray(right, float)
    return np.where(right == 1, np.asarray(reasoned, float), right)


def alignment_reward(nll, feasible) -> np.ndarray:
    """
    r_dist = 1 / (1 + exp(z)), where z is the NLL standardised over the feasible candidates of one group.

    Args:
        nll (array of shape (N,)): Negative log-likelihoods under the base, nats per token; looked at where feasible
            only.
        feasible (bool array of shape (N,)): Which candidates passed the gate.

    Returns:
        `np.ndarray`: (N,) float64; 0.5 where one is feasible or all are equal, 0 where not feasible.

    Raises:
        ValueError: The NLL of a feasible candidate is not finite.
    """
    feasible = np.asarray(feasible, bool)
    reward, own = np.zeros(len(feasible)), np.asarray(nll, float)[feasible]
    if not np.isfinite(own).all():
        raise ValueError(
            f"A feasible candidate has no finite NLL: {own}. Take it out of `feasible`, it cannot be ranked."
        )
    if len(own):
        reward[feasible] = 1 / (1 + np.exp((own - own.mean()) / (own.std() + EPSILON)))
    return reward


def diversity_reward(embeddings, feasible) -> np.ndarray:
    """
    r_div = max(0, D(S) - D(S without the candidate)), where D is the mean of (1 - cosine) / 2 over the pairs of a set.

    Args:
        embeddings (array of shape (N, H), or a list of N such rows): Looked at where feasible only.
        feasible (bool array of shape (N,)): S, the candidates of one group that passed the gate.

    Returns:
        `np.ndarray`: (N,) float64 from 0 to 1; 0 where not feasible, and where only one is.
    """
    feasible = np.asarray(feasible, bool)
    reward, places = np.zeros(len(feasible)), np.flatnonzero(feasible)
    n = len(places)
    if n < 2:
        return reward
    unit = np.stack([np.asarray(embeddings[i], float) for i in places])
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    distance = (1 - unit @ unit.T) / 2
    np.fill_diagonal(distance, 0)
    total, own = distance.sum() / 2, distance.sum(1)
    without = (
        (total - own) / ((n - 1) * (n - 2) / 2) if n > 2 else 0.0
    )  # with one other left there is no pair to compare
    reward[places] = np.maximum(0, total / (n * (n - 1) / 2) - without)
    return reward


def total_reward(gate, dist, div, lambda_dist: float = 0.35, lambda_div: float = 0.5) -> np.ndarray:
    """r = r_task · (1 + λ_dist · r_dist + λ_div · r_div): (N,) float64, NaN where the gate could not be told."""
    return np.asarray(gate, float) * (1 + lambda_dist * np.asarray(dist) + lambda_div * np.asarray(div))
