"""TransformersSampler against the model's own forward, against `generate`, and against itself in other batches."""

import pytest
import torch
from conftest import POLICY

from trl_offpolicy import TransformersSampler
from trl_offpolicy.rows import encode_prompt
from trl_offpolicy.sampling import Request, SamplingParams, attempt_seed


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


@pytest.fixture(scope="module")
def sampler():
    return TransformersSampler(POLICY, batch_size=4)


def test_log_probs_equal_the_models_own_forward(sampler):
    wanted = requests(10)
    for request in wanted:
        completion = drain(sampler, [request])[request.id]
        prompt = encode_prompt(sampler.processing_class, request.prompt)
        ids = torch.tensor([prompt + completion.completion_ids])
        with torch.no_grad():
            log_pi = sampler.model(ids).logits[0, :-1].float().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.log_probs), log_pi[len(prompt) - 1 :], atol=1e-4, rtol=1e-4)


def test_a_seed_gives_the_same_completion_in_any_batch(sampler):
    wanted = requests(12)
    together = drain(sampler, wanted)
    for batch_size in (1, 3, 12):
        other = TransformersSampler(sampler.model, sampler.processing_class, batch_size=batch_size)
        alone = drain(other, wanted[::-1])
        assert {k: c.completion_ids for k, c in alone.items()} == {k: c.completion_ids for k, c in together.items()}
    assert (
        len(
            {tuple(c.completion_ids) for c in drain(sampler, requests(12, seed=2)).values()}
            & {tuple(c.completion_ids) for c in together.values()}
        )
        < 12
    )


def test_stop_length_and_text(sampler):
    for completion in drain(sampler, requests(12, SamplingParams(max_completion_length=9))).values():
        assert (completion.completion_ids[-1] == sampler.processing_class.eos_token_id) == (
            completion.finish_reason == "stop"
        )
        assert completion.finish_reason == "stop" or len(completion.completion_ids) == 9
        assert sampler.processing_class.eos_token_id not in completion.completion_ids[:-1]
        assert completion.text == sampler.processing_class.decode(completion.completion_ids, skip_special_tokens=True)


def test_greedy_equals_generate(sampler):
    (completion,) = drain(sampler, requests(1, SamplingParams(temperature=0.0, max_completion_length=16))).values()
    ids = torch.tensor([encode_prompt(sampler.processing_class, requests(1)[0].prompt)])
    expected = sampler.model.generate(ids, do_sample=False, max_new_tokens=16)[0, ids.shape[1] :].tolist()
    assert completion.completion_ids == expected


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_completion_length=1),
        SamplingParams(max_completion_length=1, temperature=1.7),
        SamplingParams(max_completion_length=1, top_k=3),
        SamplingParams(max_completion_length=1, top_p=0.8),
    ],
)
def test_first_token_has_the_right_distribution(tiny_model, tokenizer, params):
    """4,000 draws against the softmax written out; a deviation of 5 standard errors anywhere fails (p < 1e-3 over 500 tokens)."""
    prompt = [{"role": "user", "content": "2+2?"}]
    sampler = TransformersSampler(tiny_model, tokenizer, batch_size=1000)
    n = 4000
    drawn = drain(sampler, [Request(f"{i}", prompt, attempt_seed(0, "p", "self", i), params) for i in range(n)])
    counts = torch.bincount(
        torch.tensor([c.completion_ids[0] for c in drawn.values()]), minlength=len(tokenizer)
    ).double()
    with torch.no_grad():
        logits = (
            tiny_model(torch.tensor([encode_prompt(tokenizer, prompt)])).logits[0, -1].double() / params.temperature
        )
    if params.top_k:
        logits[logits < logits.topk(params.top_k).values[-1]] = -torch.inf
    if params.top_p < 1:
        order = logits.argsort(descending=True)
        before = logits.softmax(-1)[order].cumsum(-1) - logits.softmax(-1)[order]
        logits[order[before >= params.top_p]] = -torch.inf
    p = logits.softmax(-1)
    assert ((counts / n - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1.5 / n).all()


def test_the_models_own_generation_config_is_neither_used_nor_changed(tiny_model, tokenizer):
    plain = drain(TransformersSampler(tiny_model, tokenizer), requests(4))
    tiny_model.generation_config.repetition_penalty = 5.0
    tiny_model.generation_config.top_k = 1
    tiny_model.train()
    again = drain(TransformersSampler(tiny_model, tokenizer), requests(4))
    assert {k: c.completion_ids for k, c in again.items()} == {k: c.completion_ids for k, c in plain.items()}
    assert tiny_model.generation_config.repetition_penalty == 5.0 and tiny_model.training


def test_prompt_beyond_the_context_is_said_not_raised(tiny_model, tokenizer):
    sampler = TransformersSampler(tiny_model, tokenizer)  # context 512
    params = SamplingParams(max_completion_length=600)
    long, short = [{"role": "user", "content": "1 " * 400}], [{"role": "user", "content": "1 " * 200}]
    completions = drain(sampler, [Request("long", long, 1, params), Request("short", short, 1, params)])
    assert completions["long"].finish_reason == "error" and "context is 512" in completions["long"].error
    room = 512 - len(encode_prompt(tokenizer, short))
    assert len(completions["short"].completion_ids) <= room


def test_abort_and_revision(sampler, tiny_model, tokenizer):
    wanted = requests(3)
    for request in wanted:
        sampler.submit(request)
    sampler.abort("r1")
    sampler.abort("never there")
    assert set(drain(sampler, [])) == {"r0", "r2"}
    before = TransformersSampler(tiny_model, tokenizer).revision
    with torch.no_grad():
        tiny_model.model.layers[1].mlp.up_proj.weight.add_(1e-3)
    assert TransformersSampler(tiny_model, tokenizer).revision != before


def test_missing_template_or_directory_says_what_to_do(tiny_model, tokenizer, tmp_path):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        TransformersSampler(tiny_model, bare)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        TransformersSampler(str(tmp_path / "nothing"))
