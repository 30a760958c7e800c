"""The policy before training, however it is reached: scored before, adapter off, frozen copy, start of an outer batch."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from datasets import Dataset
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from training import QUESTIONS, config, demonstrations, rewritten, train
from trl import SFTConfig, SFTTrainer

from trl_offpolicy import ImportanceWeightedSFTConfig, ImportanceWeightedSFTTrainer
from trl_offpolicy.sampling.log_probs import has_known_head, head_logits, lm_head, target_log_probs
from trl_offpolicy.trainer.initial_policy import adapter_is_neutral, trains_beside_adapter


FAMILIES = {
    "Qwen2": {"tie_word_embeddings": True},
    "Llama": {},
    "Gemma2": {"head_dim": 16, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 4.0},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 16},  # its own forward does not call what it names its base model
}


def tiny(family, **kwargs):
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
    }
    special = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.3}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=100, **{**sizes, **special, **kwargs})
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_scales_and_caps_like_the_model(family):
    model, ids = tiny(family, **FAMILIES[family]), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        ours = head_logits(lm_head(model), model.base_model(ids).last_hidden_state[0])
        torch.testing.assert_close(ours, model(ids).logits[0], atol=1e-5, rtol=1e-5)
    assert has_known_head(model, [5, 6, 7, 8])


def naive_log_probs(model, prompt, target, temperature=1.0):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + target])).logits[0].double() / temperature
    return [logits[len(prompt) + t - 1].log_softmax(-1)[y].item() for t, y in enumerate(target)]


def test_target_log_probs_equal_a_forward_of_each_row():
    model = tiny("Llama")
    pairs = [([1, 2, 3], [4, 5]), ([9], [8, 7, 6, 5, 4]), ([3] * 40, [2] * 30), ([1, 2], [])]
    temperatures = [1.0, 0.7, 1.3, 1.0]
    for batch_tokens in (1, 10_000):
        scored = target_log_probs(model, pairs, batch_tokens, temperatures, progress=False)
        for x, (prompt, target), t in zip(scored, pairs, temperatures, strict=True):
            assert x.tolist() == pytest.approx(naive_log_probs(model, prompt, target, t), abs=1e-5)
    (unprompted,) = target_log_probs(model, [([], [4, 5])], progress=False)
    assert math.isnan(unprompted[0]) and unprompted[1].item() == pytest.approx(
        naive_log_probs(model, [4], [5])[0], abs=1e-5
    )


def test_log_probs_that_are_no_numbers_are_refused():
    model = tiny("Llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = math.nan
    pairs = [([1, 2], [3, 4]), ([1], [2, 7, 7, 5])]
    with pytest.raises(ValueError, match="of 6 tokens a log-prob that is no number"):
        target_log_probs(model, pairs, progress=False)
    assert target_log_probs(model, pairs[:1], progress=False)[0].isfinite().all()


HEADS = {
    "lora on the head": {"r": 4, "target_modules": ["lm_head", "q_proj"]},
    "some tokens": {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [5, 6, 8]},
    "a head of its own": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def disturbed(model):
    """With what an adapter trains moved from where it began."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@pytest.mark.parametrize("head", HEADS)
def test_log_probs_of_a_head_with_an_adapter_on_it_are_the_models(head):
    """The weight that peft shows of such a head is the base's."""
    tied = head == "some tokens"
    model = disturbed(get_peft_model(tiny("Qwen2", tie_word_embeddings=tied), LoraConfig(**HEADS[head])))
    with model.disable_adapter():
        off = naive_log_probs(model, [1, 2, 3], [4, 5, 6])
        (ours,) = target_log_probs(model, [([1, 2, 3], [4, 5, 6])], progress=False)
        assert ours.tolist() == pytest.approx(off, abs=1e-4)
    (ours,) = target_log_probs(model, [([1, 2, 3], [4, 5, 6])], progress=False)
    assert ours.tolist() == pytest.approx(naive_log_probs(model, [1, 2, 3], [4, 5, 6]), abs=1e-4)
    assert ours.tolist() != pytest.approx(off, abs=0.1)


def with_another_cap(vocab_size=100):
    """A model that caps its logits by a setting that neither TRL's fused head nor ours looks at."""
    torch.manual_seed(0)
    config = transformers.RecurrentGemmaConfig(
        vocab_size=vocab_size, num_hidden_layers=3, hidden_size=32, intermediate_size=48, num_attention_heads=2, lru_width=32,
        attention_window_size=16, head_dim=16, logits_soft_cap=5.0, w_init_variance_scale=0.5, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.RecurrentGemmaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def test_log_probs_of_a_head_that_is_not_known_are_the_models_own():
    model, pairs = with_another_cap(), [([], []), ([1, 2, 3], [4, 5]), ([9], [8, 7, 6, 5, 4])]
    states = {}
    scored = target_log_probs(model, pairs, progress=False, observe=lambda row, hidden: states.update({row: hidden}))
    for x, (prompt, target) in zip(scored[1:], pairs[1:], strict=True):
        assert x.tolist() == pytest.approx(naive_log_probs(model, prompt, target), abs=1e-4)
    assert [len(states[i]) for i in range(3)] == [0, 5, 6]


def test_objectives_refuse_a_model_whose_head_trl_does_not_know(tmp_path, tokenizer):
    model = with_another_cap(len(tokenizer))
    kwargs = {"train_dataset": demonstrations(), "processing_class": tokenizer}
    args = config(ImportanceWeightedSFTConfig, tmp_path, objective="dft")
    with pytest.raises(ValueError, match="RecurrentGemmaForCausalLM does something to its logits"):
        ImportanceWeightedSFTTrainer(model, args, **kwargs)
    ImportanceWeightedSFTTrainer(model, config(ImportanceWeightedSFTConfig, tmp_path, objective="nll"), **kwargs)


def sampled_elsewhere(tokenizer):
    """Guided rows were drawn under another prompt than they train on, each row at its own temperature; the stored log-probs are wrong."""
    data = rewritten(tokenizer).to_list()
    for i, row in enumerate(data):
        guided = row["source"] == "guided"
        asked = [{"role": "user", "content": f"Reference {i}. {row['prompt'][0]['content']}"}]
        row |= {"behavior_prompt": asked if guided else [], "temperature": 0.5 + 0.25 * i}
    return Dataset.from_list(data)


@pytest.mark.parametrize("adapter", [None, "lora", "lora_not_neutral", "prompt_tuning"])
def test_behavior_log_probs_computed_again(tmp_path, tiny_model, tokenizer, adapter):
    """Under the prompt and the temperature that were really used, by the model as it is before training."""
    base, data = copy.deepcopy(tiny_model), sampled_elsewhere(tokenizer)
    peft_config = {
        None: None,
        "lora": LoraConfig(r=4, target_modules="all-linear"),
        "lora_not_neutral": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
        "prompt_tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }[adapter]
    args = config(
        ImportanceWeightedSFTConfig,
        tmp_path,
        precompute_behavior_log_probs=True,
        expert_weighting="base",
        max_steps=1,
    )
    trainer = ImportanceWeightedSFTTrainer(
        tiny_model,
        args,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    if adapter == "lora_not_neutral":
        base = copy.deepcopy(trainer.model).merge_and_unload().eval()
    for row in trainer.train_dataset:
        target = [t for t in row["labels"] if t != -100]
        behavior, reference = ([x for x in row[c] if x == x] for c in ("behavior_log_probs", "reference_log_probs"))
        prompts = [
            tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
            for p in (row["behavior_prompt"] or row["prompt"], row["prompt"])
        ]
        if row["source"] == "expert":
            assert not behavior
        else:
            expected = naive_log_probs(base, prompts[0], target, row["temperature"])
            assert behavior == pytest.approx(expected, abs=1e-5)
        assert reference == pytest.approx(naive_log_probs(base, prompts[1], target), abs=1e-5)
    again = trainer.evaluate(data)["eval_loss"]
    assert again == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-6)
    train(trainer)
    if adapter in (None, "lora_not_neutral"):
        with pytest.raises(ValueError, match="after training had begun"):
            trainer.evaluate(data)
    else:  # switched off, the adapter leaves the initial policy as it was
        assert trainer.evaluate(data)["eval_loss"] != pytest.approx(again, abs=1e-6)


def with_adapter(model, start):
    """The model with an adapter that is not neutral, and what else to pass to a trainer."""
    kwargs = {"r": 4, "target_modules": "all-linear"}
    if start != "loaded":
        return model, {"peft_config": LoraConfig(**kwargs, init_lora_weights=start)}
    return get_peft_model(model, LoraConfig(**kwargs, init_lora_weights=False)), {}


@pytest.mark.parametrize("start", ["pissa", "olora", "loaded"])
def test_the_initial_policy_has_an_adapter_that_is_not_neutral(tmp_path, tiny_model, tokenizer, start):
    """Before the first update π is π_0: all ratios are 1. `asft` would have to ask it later, with the adapter off."""
    for settings in ({"expert_weighting": "base"}, {"objective": "psft", "steps_per_outer_batch": 0}):
        model, extra = with_adapter(copy.deepcopy(tiny_model), start)
        args = config(ImportanceWeightedSFTConfig, tmp_path, max_steps=1, learning_rate=0.0, clip_max=None, **settings)
        trainer = ImportanceWeightedSFTTrainer(
            model, args, train_dataset=demonstrations(), processing_class=tokenizer, **extra
        )
        _, (first,) = train(trainer)
        assert (first["weight_min"], first["weight_max"]) == pytest.approx((1, 1), abs=1e-4), settings
    model, extra = with_adapter(copy.deepcopy(tiny_model), start)
    with pytest.raises(ValueError, match="merge_and_unload"):
        args = config(ImportanceWeightedSFTConfig, tmp_path, objective="asft")
        ImportanceWeightedSFTTrainer(model, args, train_dataset=demonstrations(), processing_class=tokenizer, **extra)


ADAPTERS = {
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(r=2, target_modules=["q_proj"]),
    "lokr": LoKrConfig(r=2, target_modules=["q_proj"]),
    "vera": VeraConfig(r=2, target_modules=["q_proj"]),
    "layer norm": LNTuningConfig(target_modules=["input_layernorm"]),
    "oft": OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
    "dora": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
    "some tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[97, 98]),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_neutral_until_it_is_trained(kind):
    model = get_peft_model(tiny("Llama"), ADAPTERS[kind])
    assert adapter_is_neutral(model) and not trains_beside_adapter(model)
    assert not adapter_is_neutral(disturbed(model))
    if kind == "some tokens":  # the embeddings alone
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.zero_()
        assert not adapter_is_neutral(model)


def test_weights_that_are_trained_beside_an_adapter_stay_changed_without_it(tmp_path, tokenizer):
    """π_0 is scored before training, and a resumed run knows it again; `asft` would ask it when it is gone."""
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48,
    ))  # fmt: skip
    adapter = LoraConfig(r=4, target_modules=["q_proj"], bias="all")
    kwargs = {"train_dataset": demonstrations(), "eval_dataset": demonstrations(), "processing_class": tokenizer}
    args = config(ImportanceWeightedSFTConfig, tmp_path, objective="asft")
    with pytest.raises(ValueError, match="bias='none'"):
        ImportanceWeightedSFTTrainer(copy.deepcopy(model), args, **kwargs, peft_config=adapter)
    digests = []
    for _ in range(2):  # with another A
        args = config(ImportanceWeightedSFTConfig, tmp_path, expert_weighting="base", max_steps=1, clip_max=None)
        trainer = ImportanceWeightedSFTTrainer(copy.deepcopy(model), args, **kwargs, peft_config=adapter)
        digests.append(trainer.initial_policy.digest)
    assert digests[0] == digests[1]
    _, (first,) = train(trainer)
    assert (first["weight_min"], first["weight_max"]) == pytest.approx((1, 1), abs=1e-4)
    with pytest.raises(ValueError, match="after training had begun"):
        trainer.evaluate(demonstrations())


CUTS = {
    "whole": {"max_length": None},
    "keep_start": {"max_length": 30},
    "keep_end": {"max_length": 30, "truncation_mode": "keep_end"},
    "bfd": {"packing": True, "max_length": 30},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 30, "shuffle_dataset": True},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 30},
    "eval_packed": {"eval_packing": True, "max_length": 120},
}


def long_rows():
    turns = [(QUESTIONS[i % 5], f"step {'so ' * 20}it is {i} and {'then ' * i} done") for i in range(8)]
    return Dataset.from_list([{"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]} for q, a in turns])  # fmt: skip


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("settings", [{"expert_weighting": "base"}, {"objective": "psft", "steps_per_outer_batch": 0}])
def test_the_initial_policy_sees_what_is_trained_on(tmp_path, tiny_model, tokenizer, cut, settings):
    """Rows are scored as they were cut and packed: before the first update every ratio is 1."""
    args = config(
        ImportanceWeightedSFTConfig, tmp_path, max_steps=1, learning_rate=0.0, clip_max=None, per_device_train_batch_size=8,
        **settings, **CUTS[cut],
    )  # fmt: skip
    trainer = ImportanceWeightedSFTTrainer(
        tiny_model, args, train_dataset=long_rows(), eval_dataset=long_rows(), processing_class=tokenizer
    )
    _, (first,) = train(trainer)
    evaluated = trainer.evaluate()
    for name, value in (("weight_min", 1), ("weight_max", 1)):
        assert first[name] == pytest.approx(value, abs=1e-4) == evaluated[f"eval_{name}"]
    for row in trainer.train_dataset:  # a ratio without reference would be 1 too
        lengths = row.get("seq_lengths") or [len(row["input_ids"])]
        starts = {sum(lengths[:i]) for i in range(len(lengths))}
        trained_on = [t for t, label in enumerate(row["labels"]) if label != -100 and t not in starts]
        assert not any(math.isnan(row["reference_log_probs"][t]) for t in trained_on)


def test_rows_longer_than_the_positions_are_cut_before_they_are_scored(tmp_path, tokenizer):
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=32,
            n_layer=1,
            n_head=2,
            n_positions=64,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    )
    data = Dataset.from_list([{"prompt": "2+2?", "completion": "so it is " * 60}] * 4)
    args = config(ImportanceWeightedSFTConfig, tmp_path, max_length=64, expert_weighting="base", max_steps=1)
    trainer = ImportanceWeightedSFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    assert train(trainer)[1][0]["weight"] == pytest.approx(1, abs=1e-4)


def test_data_that_is_packed_or_tokenized_already_is_only_scored(tmp_path, tiny_model, tokenizer):
    """TRL's packed rows, ours, and with skip_prepare_dataset: the same rows, with a column more, and ratios of 1."""

    def trainer(cls, conf, data, **kwargs):
        args = config(conf, tmp_path, max_steps=1, learning_rate=0.0, **kwargs)
        return cls(copy.deepcopy(tiny_model), args, train_dataset=data, processing_class=tokenizer)

    packing = {"packing": True, "max_length": 64}
    packed = [
        trainer(SFTTrainer, SFTConfig, demonstrations(), **packing).train_dataset,
        trainer(ImportanceWeightedSFTTrainer, ImportanceWeightedSFTConfig, rewritten(tokenizer), **packing).train_dataset,
    ]  # fmt: skip
    tokenized = trainer(SFTTrainer, SFTConfig, demonstrations()).train_dataset.select_columns(["input_ids", "labels"])
    skip = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    psft = {"objective": "psft", "steps_per_outer_batch": 0}
    for data, layout in ((packed[0], packing), (packed[1], packing), (tokenized, skip), (packed[0], skip | packing)):
        ours = trainer(ImportanceWeightedSFTTrainer, ImportanceWeightedSFTConfig, data, **psft, **layout)
        for column in ("input_ids", "labels", *({"seq_lengths"} & set(data.column_names))):
            assert ours.train_dataset[column][:] == data[column][:]
        (first,) = train(ours)[1]
        assert (first["weight_min"], first["weight_max"]) == pytest.approx((1, 1), abs=1e-4)
        with pytest.raises(ValueError, match="precompute_behavior_log_probs=True, but the train dataset is tokenized"):
            trainer(ImportanceWeightedSFTTrainer, ImportanceWeightedSFTConfig, data, precompute_behavior_log_probs=True, **layout)  # fmt: skip
    with pytest.raises(ValueError, match="it has no `input_ids`"):
        trainer(ImportanceWeightedSFTTrainer, ImportanceWeightedSFTConfig, demonstrations(), **psft, **skip)
    with pytest.raises(ValueError, match="The batch has no reference_log_probs"):
        ours.evaluate(data)  # with skip_prepare_dataset nothing computes it


def test_scores_are_cached(tmp_path, tiny_model, tokenizer, monkeypatch):
    rewritten(tokenizer).save_to_disk(tmp_path / "data")
    data = Dataset.load_from_disk(tmp_path / "data")
    args = config(ImportanceWeightedSFTConfig, tmp_path, objective="psft", steps_per_outer_batch=0)
    columns = []
    for attempt in range(3):
        if attempt == 1:  # the second time nothing is scored
            monkeypatch.setattr("trl_offpolicy.trainer.initial_policy.target_log_probs", None)
        if attempt == 2:
            with torch.no_grad():
                tiny_model.model.norm.weight.mul_(1.5)
            with pytest.raises(TypeError):  # other weights: it has to be
                ImportanceWeightedSFTTrainer(tiny_model, args, train_dataset=data, processing_class=tokenizer)
            break
        trainer = ImportanceWeightedSFTTrainer(
            copy.deepcopy(tiny_model), args, train_dataset=data, processing_class=tokenizer
        )
        columns.append(trainer.train_dataset["reference_log_probs"][0])
    assert torch.equal(*(torch.tensor(c).nan_to_num(-1e9) for c in columns))


@pytest.mark.parametrize("layout", [{}, {"packing": True, "max_length": 64}])
def test_asft_with_an_adapter_and_a_saved_head(tmp_path, tiny_model, tokenizer, layout):
    """KL to the model without adapter, whose original head comes back, against full logits."""
    tiny_model.config.tie_word_embeddings = False
    tiny_model.lm_head.weight = torch.nn.Parameter(tiny_model.lm_head.weight.detach().clone())
    base = copy.deepcopy(tiny_model)
    args = config(
        ImportanceWeightedSFTConfig, tmp_path, objective="asft", beta=0.5, per_device_train_batch_size=10, **layout
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    trainer = ImportanceWeightedSFTTrainer(
        tiny_model, args, train_dataset=demonstrations(), processing_class=tokenizer, peft_config=lora
    )
    torch.manual_seed(1)
    head = trainer.model.get_output_embeddings()
    with torch.no_grad():  # some training steps later
        head.weight.add_(0.05 * torch.randn_like(head.weight))
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    batches = list(trainer.get_train_dataloader())
    loss = sum(trainer.compute_loss(trainer.model, dict(b), num_items_in_batch=torch.tensor(40.0)) for b in batches)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.model.zero_grad()

    total = 0.0
    for row in demonstrations():
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=True, return_dict=True)[
            "input_ids"
        ]
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        places, targets = slice(len(prompt) - 1, len(ids) - 1), ids[len(prompt) :]
        log_p = trainer.model(torch.tensor([ids])).logits[0, places].log_softmax(-1)
        with torch.no_grad():
            log_p0 = base(torch.tensor([ids])).logits[0, places].log_softmax(-1)
        log_pi = log_p[range(len(targets)), targets]
        total = total - (log_pi.detach().exp() * log_pi).sum() / 40
        total = total + 0.5 * (log_p0.exp() * (log_p0 - log_p)).sum() / 40
    total.backward()
    torch.testing.assert_close(loss, total, atol=1e-5, rtol=1e-5)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)
    assert trainer._metrics["train"]["reference_kl"][0] > 0


def naive_psft(model, batches, outer, learning_rate, epsilon_high):
    """The paper's loop with SGD: π_old at the start of each outer batch, -min(r, clip(r)) averaged over the tokens of a step."""

    def log_probs(m, row):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        log_pi = m(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        return log_pi[labels[1:] != -100]

    for step, rows in enumerate(batches):
        if step % outer == 0:
            old = copy.deepcopy(model)
        losses = []
        for row in rows:
            ratio = (log_probs(model, row) - log_probs(old, row).detach()).exp()
            losses.append(-torch.minimum(ratio, ratio.clamp(0.8, 1 + epsilon_high)))
        model.zero_grad()
        torch.cat(losses).mean().backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(learning_rate * p.grad)
    return model


def test_psft_takes_the_policy_at_the_start_of_each_outer_batch(tmp_path, tiny_model, tokenizer):
    """Two epochs of five steps in outer batches of two (the last of an epoch is cut short), against the paper's loop."""
    expected = copy.deepcopy(tiny_model)
    args = config(
        ImportanceWeightedSFTConfig, tmp_path, objective="psft", steps_per_outer_batch=2, epsilon_high=0.02, max_steps=10, optim="sgd",
        learning_rate=0.3, lr_scheduler_type="constant", max_grad_norm=0.0, per_device_train_batch_size=1, gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = ImportanceWeightedSFTTrainer(
        tiny_model, args, train_dataset=demonstrations(), processing_class=tokenizer
    )
    _, history = train(trainer)
    rows = list(trainer.train_dataset)
    batches = [rows[i : i + 2] for i in range(0, 10, 2)]
    for epoch in range(2):  # global steps 0-4 and 5-9: outer batches start at 0, 2, 4 | 5, 6, 8
        if epoch == 0:
            expected = naive_psft(expected, batches, 2, 0.3, 0.02)
        else:
            expected = naive_psft(expected, batches[:1], 1, 0.3, 0.02)
            expected = naive_psft(expected, batches[1:], 2, 0.3, 0.02)
    for p, q in zip(trainer.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=5e-5, rtol=1e-4)  # ten steps of rounding
    assert [e["clip_fraction"] > 0 for e in history] == [
        False,
        True,
        False,
        True,
        False,
        False,
        False,
        True,
        False,
        True,
    ]


def test_psft_resumes_at_the_start_of_an_outer_batch(tmp_path, tiny_model, tokenizer):
    def trainer(model, name):
        args = config(
            ImportanceWeightedSFTConfig, tmp_path / name, objective="psft", steps_per_outer_batch=2, max_steps=6, save_strategy="steps",
            save_steps=2, per_device_train_batch_size=2,
        )  # fmt: skip
        return ImportanceWeightedSFTTrainer(model, args, train_dataset=demonstrations(), processing_class=tokenizer)

    whole, resumed = (trainer(copy.deepcopy(tiny_model), name) for name in ("whole", "resumed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


@pytest.mark.parametrize(
    "settings",
    [{"objective": "asft"}, {"objective": "psft", "steps_per_outer_batch": 0}],
    ids=str,
)
def test_a_checkpoint_is_not_taken_for_the_initial_policy(tmp_path, tiny_model, tokenizer, settings):
    """Resumed with the checkpoint as the model, KL and ratios would be to the checkpoint."""

    def trainer(model, **kwargs):
        args = config(ImportanceWeightedSFTConfig, tmp_path / "run", save_strategy="steps", save_steps=1, **settings, **kwargs)  # fmt: skip
        return ImportanceWeightedSFTTrainer(model, args, train_dataset=demonstrations(4), processing_class=tokenizer)

    tiny_model.save_pretrained(tmp_path / "base")
    trainer(str(tmp_path / "base"), max_steps=1).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    for resume in (True, checkpoint):
        with pytest.raises(
            ValueError, match=r"checkpoint-1 began with the model '.*base', .* you passed '.*checkpoint-1'"
        ):
            trainer(checkpoint, max_steps=2).train(resume_from_checkpoint=resume)
    resumed = trainer(str(tmp_path / "base"), max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2


def test_what_cannot_be_weighted_is_refused(tmp_path, tiny_model, tokenizer):
    def trainer(data, **kwargs):
        args = config(ImportanceWeightedSFTConfig, tmp_path, **kwargs)
        return ImportanceWeightedSFTTrainer(tiny_model, args, train_dataset=data, processing_class=tokenizer)

    with pytest.raises(ValueError, match="reference_log_probs must be computed before training, which a streaming"):
        trainer(rewritten(tokenizer).to_iterable_dataset(), expert_weighting="base")
    reshaped = rewritten(tokenizer).map(lambda _: {"top_p": 0.9})
    with pytest.raises(ValueError, match="sampled at top_p=0.9"):
        trainer(reshaped, precompute_behavior_log_probs=True)
    greedy = sampled_elsewhere(tokenizer).map(lambda _: {"temperature": 0.0})
    with pytest.raises(ValueError, match=r"sampled at temperature=0\.0"):
        trainer(greedy, precompute_behavior_log_probs=True)
    # as rounds have them that carry rows over, or rows of several runs
    two = rewritten(tokenizer).map(lambda _, i: {"model_revision": "abc"[i % 2]}, with_indices=True)
    with pytest.raises(ValueError, match=r"sampled from 2 models \(`model_revision` a, b\)"):
        trainer(two, precompute_behavior_log_probs=True)
    drawn = rewritten(tokenizer).map(lambda row: {"model_revision": "a" if row["completion_ids"] else "b"})
    assert "behavior_log_probs" in trainer(drawn, precompute_behavior_log_probs=True).train_dataset.column_names

    # What needs hardware or a vision model to reach, by the flag that it sets.
    built = trainer(rewritten(tokenizer), objective="asft")
    built._is_vision_dataset = True
    with pytest.raises(ValueError, match=r"drop the columns \['behavior_log_probs', 'completion_ids'\]"):
        built._refuse_what_has_no_weights()
    own = trainer(demonstrations().map(lambda _: {"source": "web"}), objective="dft")
    own._is_vision_dataset = True
    own._refuse_what_has_no_weights()  # a `source` of the user's own is not ours to align
    built._is_vision_dataset = False
    for state, message in (
        ({"parallelism_config": SimpleNamespace(cp_enabled=True, sp_enabled=False)}, "cp_size=1"),
        ({"state": SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))}, "ZeRO stage 2 or FSDP2"),
    ):
        built.accelerator = SimpleNamespace(**{"state": SimpleNamespace(deepspeed_plugin=None), **state})
        with pytest.raises(ValueError, match=message):
            built._refuse_what_has_no_weights()
