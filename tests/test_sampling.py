"""Every engine against the model's own forward, against `generate`, and against itself with another number of requests in flight."""

import copy
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import needs_vllm
from draws import drain, drawn_ids, forward_log_probs, requests
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from trl_offpolicy import OpenAISampler, TransformersSampler, VLLMSampler
from trl_offpolicy.data.tokenization import encode_prompt
from trl_offpolicy.sampling.loading import load_model
from trl_offpolicy.sampling.sampler import Request, SamplerError, SamplingParams, attempt_seed
from trl_offpolicy.sampling.vllm_sampler import cpu_memory, lora_engine_kwargs


@pytest.fixture(
    scope="module",
    params=["transformers", *(pytest.param(e, marks=[needs_vllm, pytest.mark.slow]) for e in ("vllm", "openai"))],
)
def sampler(request, engine):
    return engine(request.param, 4)


@pytest.fixture(scope="module")
def model(policy):
    return AutoModelForCausalLM.from_pretrained(policy, dtype="float32")


@pytest.mark.parametrize("params", [{}, {"temperature": 1.7, "top_k": 20, "top_p": 0.9}])
def test_log_probs_equal_the_models_own_forward(sampler, model, params):
    """At temperature 1 whatever the draw was made with; the largest difference seen in float32 is 7e-6."""
    for completion in drain(
        sampler, wanted := requests(10, SamplingParams(max_completion_length=24, **params))
    ).values():
        prompt = encode_prompt(sampler.processing_class, wanted[int(completion.id[1:])].prompt)
        expected = forward_log_probs(model, prompt, completion.completion_ids)
        torch.testing.assert_close(torch.tensor(completion.log_probs), expected, atol=1e-4, rtol=1e-4)


def test_a_seed_gives_the_same_completion_in_any_company(sampler, engine):
    wanted = requests(12)
    together = drain(sampler, wanted)
    name = {TransformersSampler: "transformers", VLLMSampler: "vllm", OpenAISampler: "openai"}[type(sampler)]
    for in_flight in (1, 3, 12):
        alone = drain(engine(name, in_flight), wanted[::-1])
        assert drawn_ids(alone) == drawn_ids(together)
        assert {k: c.text for k, c in alone.items()} == {k: c.text for k, c in together.items()}
    other_seed = {tuple(ids) for ids in drawn_ids(drain(sampler, requests(12, seed=2))).values()}
    assert len(other_seed & {tuple(ids) for ids in drawn_ids(together).values()}) < 12


@needs_vllm
@pytest.mark.slow
def test_a_served_engine_draws_what_the_engine_in_process_draws(engine):
    wanted = requests(30)
    assert drawn_ids(drain(engine("vllm"), wanted)) == drawn_ids(drain(engine("openai", 5), wanted))


def test_stop_length_and_text(sampler):
    """The model ends its turns with <|im_end|>, which neither its tokenizer nor its generation config says."""
    processing_class = sampler.processing_class
    end = processing_class.convert_tokens_to_ids("<|im_end|>")
    assert processing_class.eos_token_id != end
    completions = drain(sampler, requests(12, SamplingParams(max_completion_length=9))).values()
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        assert (completion.completion_ids[-1] == end) == (completion.finish_reason == "stop")
        assert completion.finish_reason == "stop" or len(completion.completion_ids) == 9
        assert end not in completion.completion_ids[:-1]
        assert len(completion.log_probs) == len(completion.completion_ids)
        assert completion.text == processing_class.decode(completion.completion_ids, skip_special_tokens=True)


def test_an_attempt_ends_at_a_stop_text_which_is_cut_off(sampler):
    """Against the same seeds drawn without: the text up to the first stop text, and the ids up to the one that completes it."""
    free = drain(sampler, requests(12, SamplingParams(max_completion_length=24)))
    stopped = drain(sampler, requests(12, SamplingParams(max_completion_length=24, stop=("so ", "+"))))
    decode = sampler.processing_class.decode
    ended = 0
    for name, whole in free.items():
        text = re.split(r"so |\+", whole.text)[0]
        assert stopped[name].text == text
        if text == whole.text:
            assert stopped[name] == whole
            continue
        ended += 1
        ids = stopped[name].completion_ids
        assert ids == whole.completion_ids[: len(ids)] and stopped[name].finish_reason == "stop"
        holds = [any(t in decode(ids[:n]) for t in ("so ", "+")) for n in (len(ids) - 1, len(ids))]
        assert holds == [False, True] and len(stopped[name].log_probs) == len(ids)
    assert ended


def test_an_attempt_that_repeats_itself_is_cut(sampler):
    """Against the same seeds drawn without: cut at the first token that ends a block which stands there twice in a row."""

    def repeats(ids):
        return any(ids[-2 * size :] == 2 * ids[-size:] for size in range(1, len(ids) // 2 + 1))

    free = drain(sampler, requests(36, SamplingParams(2.0, top_k=8, max_completion_length=40)))
    cut = drain(sampler, requests(36, SamplingParams(2.0, top_k=8, max_completion_length=40, max_repeats=2)))
    ends = {n: next((i for i in range(2, len(c.completion_ids)) if repeats(c.completion_ids[:i])), None) for n, c in free.items()}  # fmt: skip
    assert len(set(ends.values())) > 2
    for name, whole in free.items():
        if ends[name] is None:
            assert cut[name] == whole
            continue
        assert cut[name].completion_ids == whole.completion_ids[: ends[name]] and cut[name].finish_reason == "length"
        assert cut[name].log_probs == pytest.approx(whole.log_probs[: ends[name]], abs=1e-5)


def test_a_repetition_penalty_and_the_template_s_variables_are_heeded(sampler, model):
    """Greedy against `generate` with transformers' own penalty, and a prompt that only the template's variable changes."""
    processing_class, template = sampler.processing_class, sampler.processing_class.chat_template
    end = processing_class.convert_tokens_to_ids("<|im_end|>")
    params = SamplingParams(temperature=0.0, max_completion_length=16, repetition_penalty=1.3)
    plain = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "repetition_penalty": 1.3}
    try:
        processing_class.chat_template = template + "{% if hint is defined %}{{ hint }}{% endif %}"
        # A longer one beside it, so that the short prompt is padded in a batch.
        asked = [replace(r, chat_template_kwargs={"hint": "2 + "}) for r in requests(3, params)]
        drawn = drain(sampler, asked)
        for request in asked:
            ids = encode_prompt(processing_class, request.prompt, chat_template_kwargs={"hint": "2 + "})
            ids = torch.tensor([ids])
            expected = model.generate(ids, max_new_tokens=16, eos_token_id=end, **plain)[0, ids.shape[1] :].tolist()
            assert drawn[request.id].completion_ids == expected
    finally:
        processing_class.chat_template = template


def test_greedy_equals_generate(sampler, model):
    (completion,) = drain(sampler, requests(1, SamplingParams(temperature=0.0, max_completion_length=16))).values()
    ids = torch.tensor([encode_prompt(sampler.processing_class, requests(1)[0].prompt)])
    plain = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "repetition_penalty": 1.0}
    end = sampler.processing_class.convert_tokens_to_ids("<|im_end|>")
    expected = model.generate(ids, max_new_tokens=16, eos_token_id=end, **plain)[0, ids.shape[1] :].tolist()
    assert completion.completion_ids == expected


@pytest.fixture(scope="module")
def one_head(tmp_path_factory):
    return tmp_path_factory.mktemp("one_head")


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_completion_length=1),
        SamplingParams(max_completion_length=1, temperature=1.7),
        SamplingParams(max_completion_length=1, top_k=3),
        SamplingParams(max_completion_length=1, top_p=0.8),
        SamplingParams(max_completion_length=1, min_p=0.2),
    ],
)
@pytest.mark.parametrize("name", ["transformers", pytest.param("vllm", marks=[needs_vllm, pytest.mark.slow])])
def test_first_token_has_the_right_distribution(engine, tiny_model, tokenizer, one_head, name, params):
    """4,000 draws against the softmax written out; a deviation of 5 standard errors anywhere fails (p < 1e-3 over 500 tokens)."""
    prompt = [{"role": "user", "content": "2+2?"}]
    # vLLM's CPU attention takes no heads of 16.
    tiny_model = type(tiny_model)(type(tiny_model.config)(**tiny_model.config.to_dict() | {"num_attention_heads": 1}))
    if name == "transformers":
        sampler = TransformersSampler(tiny_model, tokenizer, batch_size=1000)
    else:
        tiny_model.save_pretrained(one_head)
        tokenizer.save_pretrained(one_head)
        sampler = engine("vllm", 256, model=str(one_head))
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
    p = torch.where(p < params.min_p * p.max(), 0.0, p)
    p = p / p.sum()
    assert ((counts / n - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1.5 / n).all()


def test_the_models_own_generation_config_is_neither_used_nor_changed(tiny_model, tokenizer):
    plain = drain(TransformersSampler(tiny_model, tokenizer), requests(4))
    tiny_model.generation_config.repetition_penalty = 5.0
    tiny_model.generation_config.top_k = 1
    tiny_model.train()
    again = drain(TransformersSampler(tiny_model, tokenizer), requests(4))
    assert drawn_ids(again) == drawn_ids(plain)
    assert tiny_model.generation_config.repetition_penalty == 5.0 and tiny_model.training


def test_prompt_beyond_the_context_is_said_not_raised(sampler):
    """The policy's context is 4,096; a prompt just below it gets what room there is."""
    params, processing_class = SamplingParams(max_completion_length=600), sampler.processing_class
    long, short = [{"role": "user", "content": "1 " * 4100}], [{"role": "user", "content": "1 " * 2000}]
    completions = drain(sampler, [Request("long", long, 1, params), Request("short", short, 1, params)])
    assert completions["long"].finish_reason == "refused" and "context is 4096" in completions["long"].error
    num_tokens = len(encode_prompt(processing_class, short))
    assert 4096 - 600 < num_tokens < 4096, "a prompt that leaves room, but not all that is asked for"
    assert 0 < len(completions["short"].completion_ids) <= 4096 - num_tokens


def test_a_prompt_that_the_template_refuses_is_said_not_raised(sampler, monkeypatch):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    monkeypatch.setattr(sampler.processing_class, "chat_template", template + sampler.processing_class.chat_template)
    wanted = requests(3)
    refused = [
        replace(r, id=f"x{r.id}", prompt=[{"role": "system", "content": "Be brief."}, *r.prompt]) for r in wanted
    ]
    completions = drain(sampler, [*refused, *wanted])
    assert drawn_ids({r.id: completions[r.id] for r in wanted}) == drawn_ids(drain(sampler, wanted))
    for request in refused:
        completion = completions[request.id]
        assert completion.finish_reason == "refused" and "no system role" in completion.error


def test_learned_positions_end_where_the_context_does(tokenizer):
    """A prompt with room for little beside one with room for all: neither changes the other, nor goes beyond the positions."""
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=16, n_layer=1, n_head=2, eos_token_id=tokenizer.eos_token_id
    )
    sampler = TransformersSampler(GPT2LMHeadModel(config), tokenizer, batch_size=4)
    params = SamplingParams(max_completion_length=100)
    wanted = [Request(text, [{"role": "user", "content": text}], 1, params) for text in ("1+1", "7 " * 50, "7 " * 51)]
    alone = {request.id: drain(sampler, [request])[request.id] for request in wanted}
    assert drain(sampler, wanted) == alone
    lengths = {len(c.completion_ids) for c in alone.values() if c.finish_reason == "length"}
    assert all(n <= 100 for n in lengths) and min(lengths) < 100


def test_tokens_are_counted_as_they_are_drawn(sampler, monkeypatch):
    """All that completions hold, of each length; a server says them with its answers only."""
    if isinstance(sampler, OpenAISampler):
        assert sampler.drawn_tokens is None
        return
    seen, generate = [], type(sampler.model).forward if hasattr(sampler, "model") else None
    before = sampler.drawn_tokens
    if generate is not None:

        def forward(self, *args, **kwargs):
            seen.append(sampler.drawn_tokens - before)
            return generate(self, *args, **kwargs)

        monkeypatch.setattr(type(sampler.model), "forward", forward)
    completions = drain(sampler, requests(10)).values()
    drawn = [len(c.completion_ids) for c in completions]
    assert len(set(drawn)) > 1 and sampler.drawn_tokens - before == sum(drawn)
    assert seen == sorted(seen) and (generate is None or len(set(seen)) > 20)


def test_abort(sampler):
    wanted = requests(3, SamplingParams(max_completion_length=200))
    for request in wanted:
        sampler.submit(request)
    sampler.abort("r1")
    sampler.abort("never there")
    assert set(drain(sampler, [])) == {"r0", "r2"} and sampler.poll() == []


@needs_vllm
@pytest.mark.slow
def test_vllm_takes_requests_many_at_a_time(engine):
    """Those that wait beside a busy engine are drawn as the others are, or aborted without a trace."""
    sampler = engine("vllm", 4)
    wanted = requests(16)
    expected = drawn_ids(drain(sampler, wanted))
    before = sampler.drawn_tokens
    for request in wanted[:8]:
        sampler.submit(request)
    finished = sampler.poll()
    drawing = set(sampler._owners)
    assert drawing | {c.id for c in finished} == {f"r{i}" for i in range(8)} and len(drawing) > sampler._low
    for request in wanted[8:]:
        sampler.submit(request)
    aborted = {"r9", max(drawing, key=sampler._under_way_tokens().get)}
    under_way = sampler._under_way_tokens()
    told = {request_id: sampler.abort(request_id) for request_id in aborted}
    assert told == {"r9": 0, max(aborted - {"r9"}): under_way[max(aborted - {"r9"})]} and max(told.values()) > 0
    while more := sampler.poll():
        finished += more
    assert sampler.drawn_tokens - before == sum(len(c.completion_ids) for c in finished) + sum(told.values())
    assert drawn_ids({c.id: c for c in finished}) == {i: ids for i, ids in expected.items() if i not in aborted}
    assert len(finished) == 14 and not sampler._owners and not sampler._waiting


def test_vllm_on_a_cpu_takes_what_is_free(monkeypatch, capsys):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    memory = SimpleNamespace(total=20 << 30, available=10 << 30)
    assert cpu_memory({"dtype": "float32"}, memory) == {"gpu_memory_utilization": 0.4}
    assert "may take 8.0 GiB" in capsys.readouterr().err
    with pytest.raises(
        ValueError, match="gpu_memory_utilization=0.92, .* only 10.0 of 20.0 GiB are free. Pass at most 0.4"
    ):
        cpu_memory({"gpu_memory_utilization": 0.92}, memory)
    for chosen in ({"gpu_memory_utilization": 0.3}, {"kv_cache_memory_bytes": 1 << 20}):
        assert cpu_memory(chosen, memory) == {}
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    assert cpu_memory({}, memory) == {} and not capsys.readouterr().err


@pytest.mark.parametrize(
    ("cpu", "dtype", "slow"),
    [
        ({"architecture": "x86_64", "avx512_f": True}, torch.bfloat16, True),
        ({"architecture": "x86_64", "avx512_f": True}, torch.float32, False),
        ({"architecture": "x86_64", "avx512_bf16": True}, torch.bfloat16, False),
        ({"architecture": "x86_64", "amx_bf16": True}, torch.bfloat16, False),
        ({"architecture": "aarch64"}, torch.bfloat16, False),
        ({}, torch.bfloat16, False),
    ],
)
def test_bfloat16_on_a_cpu_that_cannot_is_warned_of_once(
    tiny_model, tokenizer, monkeypatch, recwarn, cpu, dtype, slow
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    TransformersSampler(tiny_model.to(dtype), tokenizer)
    assert [w.filename for w in recwarn if "--dtype float32" in str(w.message)] == [__file__] * slow


def test_the_revision_is_the_weights(tiny_model, tokenizer):
    before = TransformersSampler(tiny_model, tokenizer).revision
    with torch.no_grad():
        tiny_model.model.layers[1].mlp.up_proj.weight.add_(1e-3)
    assert TransformersSampler(tiny_model, tokenizer).revision != before


@needs_vllm
@pytest.mark.slow
def test_vllm_samples_with_an_adapter(engine, policy, model, tokenizer, tmp_path):
    """Log-probs are those of the adapted model, and the row says which adapter it was."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    # A rank that is none of vLLM's, and weights that are not the zeros an adapter starts from.
    config = LoraConfig(r=5, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = {str(tmp_path / name): get_peft_model(copy.deepcopy(model), config).eval() for name in "ab"}
    for directory, each in adapted.items():
        each.save_pretrained(directory)
    plain = engine("vllm", **lora_engine_kwargs(str(tmp_path / "a")), max_loras=3)
    samplers = [plain.with_adapter(directory) for directory in adapted]
    with pytest.raises(ValueError, match="as the 3. one on this engine, whose 3 slots .* Pass max_loras=4"):
        plain.with_adapter(policy)
    with pytest.raises(ValueError, match="that draws with .* already"):
        samplers[0].with_adapter(str(tmp_path / "b"))
    assert plain.revision == TransformersSampler(policy).revision, "the same weights, whichever engine loads them"
    wanted = requests(6)
    for sampler, (directory, each) in zip(samplers, adapted.items(), strict=True):
        assert sampler.name == directory and sampler.revision.startswith(plain.revision + "+")
        completions = drain(sampler, wanted)
        for request in wanted:
            ids = completions[request.id].completion_ids
            prompt = encode_prompt(tokenizer, request.prompt)
            drawn = torch.tensor(completions[request.id].log_probs)
            torch.testing.assert_close(drawn, forward_log_probs(each, prompt, ids), atol=1e-4, rtol=1e-4)
        assert drawn_ids(completions) != drawn_ids(drain(plain, wanted))


@needs_vllm
@pytest.mark.slow
def test_a_dead_vllm_engine_is_a_sampler_error(engine, monkeypatch):
    sampler = engine("vllm", 2)  # one that no other test draws with
    worker = sampler.engine.model_executor.driver_worker.worker
    monkeypatch.setattr(worker.model_runner, "execute_model", lambda *_: 1 / 0)
    sampler.submit(requests(1)[0])
    with pytest.raises(SamplerError, match="ZeroDivisionError"):
        sampler.poll()


def test_missing_template_or_directory_says_what_to_do(tiny_model, tokenizer, tmp_path):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        TransformersSampler(tiny_model, bare)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        TransformersSampler(str(tmp_path / "nothing"))


@needs_vllm
@pytest.mark.slow
def test_an_engine_argument_that_vllm_does_not_have(policy):
    with pytest.raises(ValueError, match="max_num_sequences"):
        VLLMSampler(policy, max_num_sequences=3)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        VLLMSampler("/nothing/here")


def test_missing_engines_are_named_with_the_command(policy, monkeypatch):
    import sys

    monkeypatch.setattr("trl_offpolicy.sampling.vllm_sampler.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'trl-offpolicy\[vllm\]'"):
        VLLMSampler(policy)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'trl-offpolicy\[openai\]'"):
        OpenAISampler(policy, "http://127.0.0.1:1/v1")


def test_a_vision_language_checkpoint_is_loaded_for_text(tokenizer, tmp_path):
    """Qwen2.5-VL is no causal language model to transformers; TRL's trainers take it, so the sampler and `gap` do."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 48, "max_position_embeddings": 512, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision | {"fullatt_block_indexes": [0]})
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    sampler = TransformersSampler(str(tmp_path), model_init_kwargs={"dtype": "float32"})
    prompt = [{"role": "user", "content": "Start with 2."}]
    sampler.submit(Request("0", prompt, 1, SamplingParams(max_completion_length=8)))
    (drawn,) = sampler.poll()
    ids = encode_prompt(tokenizer, prompt)
    logits = sampler.model(input_ids=torch.tensor([ids + drawn.completion_ids])).logits[0, len(ids) - 1 : -1].float()
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(drawn.completion_ids)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(drawn.log_probs), expected, atol=1e-5)
    with pytest.raises(ValueError, match="none', which cannot be loaded"):
        load_model(str(tmp_path / "none"))


def test_log_probs_of_given_texts_equal_the_models_own_forward(sampler, model):
    """With a request under way, which is not lost."""
    texts = [("A jar holds 4 nuts.", "So the answer is 5."), ("How many nuts?", "7"), ("B adds 22.", "26 nuts")]
    pairs = [tuple(sampler.processing_class(text)["input_ids"] for text in pair) for pair in texts]
    (under_way,) = requests(1)
    sampler.submit(under_way)
    context = sampler.context if hasattr(sampler, "context") else min(s.context for s in sampler._servers)
    *told, too_long = sampler.token_log_probs([*pairs, (pairs[0][0], [5] * (context + 1))])
    for found, pair in zip(told, pairs, strict=True):
        assert found == pytest.approx(forward_log_probs(model, *pair).tolist(), abs=1e-4)
    assert too_long is None and sampler.token_log_probs([]) == []
    assert [completion.id for completion in sampler.poll()] == ["r0"]
