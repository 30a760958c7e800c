"""Requests to an engine, its draws, and what a model itself says of their tokens."""

import torch

from trl_offpolicy.sampling.sampler import Request, SamplingParams, attempt_seed


QUESTIONS = [
    "A jar holds 5 coins. A adds 4. How many coins?",
    "2+2?",
    "A bag holds 9 nuts. A takes 2. B adds 8. C takes 3. How many nuts?",
]


def requests(num, params=None, seed=1):
    params = params or SamplingParams(max_completion_length=24)
    return [
        Request(
            f"r{i}", [{"role": "user", "content": QUESTIONS[i % 3]}], attempt_seed(seed, f"p{i}", "self", 0), params
        )
        for i in range(num)
    ]


def drain(sampler, wanted):
    for request in wanted:
        sampler.submit(request)
    completions = []
    while finished := sampler.poll():
        completions += finished
    return {c.id: c for c in completions}


def drawn_ids(completions):
    return {c.id: c.completion_ids for c in completions.values()}


def forward_log_probs(model, prompt_ids, completion_ids):
    ids = torch.tensor([prompt_ids + completion_ids])
    with torch.no_grad():
        log_pi = model(ids).logits[0, :-1].float().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return log_pi[len(prompt_ids) - 1 :]
