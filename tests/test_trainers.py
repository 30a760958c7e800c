"""The trainers against TRL itself, and the importance weights against a naive full-logits formula."""

import copy
import json
import math
import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import trl
from conftest import in_two_processes
from datasets import Dataset, Features, IterableDataset, List, Value
from peft import LoraConfig, PromptTuningConfig
from training import QUESTIONS, config, demonstrations, first_loss, rewritten, train, with_own_log_probs
from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from wandb_file import wandb_records

from trl_offpolicy import DFTConfig, DFTTrainer, ImportanceWeightedSFTConfig, ImportanceWeightedSFTTrainer
from trl_offpolicy.trainer.data_collator import RewriteDataCollator


LAYOUTS = {
    "padded": {},
    "gradient_accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "truncated": {"max_length": 20},
    "truncated_keep_end": {"max_length": 20, "truncation_mode": "keep_end"},
    "padding_free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 64},
    "packed_wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 48},
    "packed_split_shuffled": {
        "packing": True,
        "packing_strategy": "bfd_split",
        "max_length": 24,
        "shuffle_dataset": True,
    },
    "whole_sequence": {"completion_only_loss": False},
    "pad_to_multiple": {"pad_to_multiple_of": 16},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("objective", ["nll", "dft"])
def test_same_updates_as_trl(tmp_path, tiny_model, tokenizer, layout, objective):
    ours, theirs = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    cls, conf = (
        (DFTTrainer, DFTConfig) if objective == "dft" else (ImportanceWeightedSFTTrainer, ImportanceWeightedSFTConfig)
    )
    data = demonstrations()
    a = cls(
        ours,
        config(conf, tmp_path, objective=objective, **LAYOUTS[layout]),
        train_dataset=data,
        processing_class=tokenizer,
    )
    b = SFTTrainer(
        theirs,
        config(SFTConfig, tmp_path, loss_type=objective, **LAYOUTS[layout]),
        train_dataset=data,
        processing_class=tokenizer,
    )
    (metrics_a, history), (metrics_b, _) = train(a), train(b)
    torch.testing.assert_close(torch.tensor(metrics_a), torch.tensor(metrics_b), atol=1e-6, rtol=1e-6)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6, msg=name)
        assert not torch.equal(p, dict(tiny_model.named_parameters())[name]) or not p.requires_grad, (
            f"{name} did not move"
        )
    assert all(e["nll"] > 0 for e in history)
    if objective == "nll":
        assert [e["nll"] for e in history] == pytest.approx([e["loss"] for e in history], rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_stay_aligned(tmp_path, tiny_model, tokenizer, layout):
    """log μ of every token is -id/1000: whatever was cut, packed or shuffled, the batch must say the same."""
    args = config(ImportanceWeightedSFTConfig, tmp_path, **LAYOUTS[layout])
    trainer = ImportanceWeightedSFTTrainer(
        tiny_model, args, train_dataset=rewritten(tokenizer), processing_class=tokenizer
    )
    seen = 0
    for batch in trainer.get_train_dataloader():
        known = ~torch.isnan(batch["behavior_log_probs"])
        torch.testing.assert_close(batch["behavior_log_probs"][known], -batch["input_ids"][known] / 1000)
        assert batch["behavior_log_probs"].dtype == torch.float32 and batch["source_ids"].dtype == torch.int8
        assert set(batch["source_ids"][known].tolist()) <= {0, 1}  # self and guided; an expert's token has no μ
        seen += int(known.sum())
    if layout in ("padded", "padding_free", "packed", "whole_sequence", "pad_to_multiple"):
        assert seen == sum(len(ids) for ids in rewritten(tokenizer)["completion_ids"])
    assert seen > 0


def test_trains_on_the_sampled_ids(tmp_path, tiny_model, tokenizer):
    """Ids that no tokenisation of the text would give are what the model is trained on."""
    odd = [tokenizer.convert_tokens_to_ids(t) for t in ["3", "4", "5"]] + [tokenizer.eos_token_id]
    row = {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "345"}]}
    data = Dataset.from_list([{**row, "source": "self", "completion_ids": odd, "behavior_log_probs": [-1.0] * 4}] * 2)
    trainer = ImportanceWeightedSFTTrainer(
        tiny_model, config(ImportanceWeightedSFTConfig, tmp_path), train_dataset=data, processing_class=tokenizer
    )
    example = trainer.train_dataset[0]
    assert [t for t in example["labels"] if t != -100] == odd
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]
    assert example["input_ids"] == prompt + odd


@pytest.mark.parametrize("completion_only", [None, True, False])
@pytest.mark.parametrize("assistant_only", [True, False])
def test_sampled_rows_have_trls_labels(tmp_path, tiny_model, tokenizer, completion_only, assistant_only):
    """Also where a prompt holds an earlier answer."""
    earlier = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    data = rewritten(tokenizer).map(lambda row: {"prompt": [*earlier, *row["prompt"]]})
    settings = {"completion_only_loss": completion_only, "assistant_only_loss": assistant_only}
    labels = []
    for cls, conf in ((ImportanceWeightedSFTTrainer, ImportanceWeightedSFTConfig), (SFTTrainer, SFTConfig)):
        args = config(conf, tmp_path, **settings)
        trainer = cls(copy.deepcopy(tiny_model), args, train_dataset=data, processing_class=tokenizer)
        labels.append(
            [tokenizer.decode([t for t in row if t != -100]).strip() for row in trainer.train_dataset["labels"]]
        )
    assert labels[0] == labels[1] and all(row.endswith("<|im_end|>") for row in labels[0])


@pytest.mark.parametrize(("template", "leaves_out"), [("qwen3", False), ("deepseek_r1_distill", True)])
def test_thinking_is_trained_on_or_its_loss_is_said(tmp_path, tiny_model, tokenizer, template, leaves_out):
    """With the templates of Qwen3 and DeepSeek-R1: a demonstration's, and what was sampled."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
    written = "<think>\nfirst 2 then 3\n</think>\n\n5"
    drawn = written.removeprefix("<think>\n") if leaves_out else written  # R1's prompt opens the thinking
    ids = tokenizer(drawn)["input_ids"] + [tokenizer.eos_token_id]
    row = {
        "prompt": [{"role": "user", "content": "2+3?"}],
        "source": "expert",
        "completion_ids": [],
        "behavior_log_probs": [],
    }
    sampled = {"source": "self", "completion_ids": ids, "behavior_log_probs": [-1.0] * len(ids)}
    rows = [
        {**row, "completion": [{"role": "assistant", "content": text}], **more}
        for text, more in ((written, {}), (drawn, sampled))
    ]
    args = config(ImportanceWeightedSFTConfig, tmp_path, expert_weighting="one")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = ImportanceWeightedSFTTrainer(
            tiny_model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
    assert any("leaves the thinking" in str(each.message) for each in said) == leaves_out
    by_text, by_ids = (tokenizer.decode([t for t in each["labels"] if t != -100]) for each in trainer.train_dataset)
    assert ("first 2 then 3" in by_text) != leaves_out and "first 2 then 3" in by_ids
    assert trainer.train_dataset[1]["input_ids"][-len(ids) :] == ids


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("columns", [{}, {"objective": "iw", "expert_weighting": "base"}])
def test_a_dataset_with_a_format_is_the_same_dataset(tmp_path, tiny_model, tokenizer, kind, columns):
    """As TRL takes it; streamed too, where nothing has to be scored before training."""
    data, args = rewritten(tokenizer), config(ImportanceWeightedSFTConfig, tmp_path, **columns)
    sets = [data, data.with_format(kind)] + [data.to_iterable_dataset().with_format(kind)] * (not columns)
    prepared = [
        list(
            ImportanceWeightedSFTTrainer(
                copy.deepcopy(tiny_model), args, train_dataset=each, processing_class=tokenizer
            ).train_dataset
        )
        for each in sets
    ]
    for other in prepared[1:]:
        for row, expected in zip(other, prepared[0], strict=True):
            for name in ("input_ids", "labels", "behavior_log_probs", "source_ids"):
                assert row[name] == pytest.approx(expected[name], nan_ok=True), name


def test_rows_of_another_model_are_refused(tmp_path, tiny_model, tokenizer):
    """Its ids say something else here; a text without reasoning or white space is still the same row."""
    args = config(ImportanceWeightedSFTConfig, tmp_path)

    def train_on(change):
        data = rewritten(tokenizer).map(change)
        ImportanceWeightedSFTTrainer(tiny_model, args, train_dataset=data, processing_class=tokenizer)

    def foreign(row):
        return {"completion_ids": [len(tokenizer) - 1 - t for t in row["completion_ids"]], "model": "other/model"}

    with pytest.raises(ValueError, match=r"they are another model's ids \(it was sampled from 'other/model'\)"):
        train_on(foreign)
    train_on(lambda row: {**foreign(row), "completion_ids": [], "behavior_log_probs": []})
    for said in ("step", "it is\n\n\\boxed{0}", ""):  # prefix, other white space, nothing
        train_on(
            lambda row, said=said: (
                {"completion": [{"role": "assistant", "content": said}]}
                if row["completion"][0]["content"].endswith("{0}")
                else {}
            )
        )


def test_a_processor_encodes_as_for_trl(tmp_path, tiny_model, tokenizer):
    """A processor's chat template, which takes contents in parts only, in the place of its tokenizer's."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    template = "{% for m in messages %}<|im_start|>{{ m.role }}: {% for c in m.content %}{{ c.text }}{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    processor = LlavaProcessor(CLIPImageProcessorPil(), tokenizer, patch_size=14, chat_template=template)
    tiny_model.resize_token_embeddings(len(tokenizer))
    conversations = rewritten(tokenizer).filter(lambda row: row["completion_ids"])
    texts = conversations.map(lambda row: {"prompt": "2+2?", "completion": row["completion"][0]["content"]})
    for data in (conversations, texts):
        theirs = SFTTrainer(
            copy.deepcopy(tiny_model), config(SFTConfig, tmp_path), train_dataset=data, processing_class=processor
        )
        args = config(ImportanceWeightedSFTConfig, tmp_path, max_steps=1, precompute_behavior_log_probs=True)
        ours = ImportanceWeightedSFTTrainer(
            copy.deepcopy(tiny_model), args, train_dataset=data, processing_class=processor
        )
        for row, expected in zip(ours.train_dataset, theirs.train_dataset, strict=True):
            prompt = expected["input_ids"][: next(t for t, x in enumerate(expected["labels"]) if x != -100)]
            assert row["input_ids"] == prompt + row["completion_ids"]
        assert train(ours)[1][0]["log_ratio"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("as_json", [True, False])
def test_tools_and_template_arguments_of_a_row_reach_the_template(tmp_path, tiny_model, tokenizer, as_json):
    """Sampled rows and demonstrations alike: the prompt's ids that TRL has."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% if enable_thinking is false %}/no_think {% endif %}{% if tools %}tools: {{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    columns = {"tools": json.dumps(tools) if as_json else tools, "chat_template_kwargs": {"enable_thinking": False}}
    data = rewritten(tokenizer).map(lambda _: columns)
    args = config(
        ImportanceWeightedSFTConfig, tmp_path, precompute_behavior_log_probs=True, clip_max=None, max_steps=1
    )
    ours = ImportanceWeightedSFTTrainer(tiny_model, args, train_dataset=data, processing_class=tokenizer)
    theirs = SFTTrainer(
        copy.deepcopy(tiny_model), config(SFTConfig, tmp_path), train_dataset=data, processing_class=tokenizer
    )
    for row, expected in zip(ours.train_dataset, theirs.train_dataset, strict=True):
        prompt = expected["input_ids"][: next(t for t, x in enumerate(expected["labels"]) if x != -100)]
        assert tokenizer.decode(prompt).startswith("/no_think tools: [{")
        assert row["input_ids"] == prompt + (row["completion_ids"] or expected["input_ids"][len(prompt) :])
    # μ computed again is under the same prompt: on-policy.
    assert train(ours)[1][0]["log_ratio"] == pytest.approx(0, abs=1e-4)


def power_of_two_thirds(log_probs, **known):
    """An objective of a user's own: what it is handed, it may use."""
    assert {"behavior_log_probs", "mask", "entropy", "segment_ids"} <= set(known)
    return (2 / 3 * log_probs).exp() + 0 * known["entropy"]


REWARDS = {"self": -1.0, "guided": -0.5, "expert": 1.0}


def naive_weights(settings, row, log_pi, log_base, log_p, mean_length):
    """
    The formulas, token by token in Python floats. `row`: source, μ of each target (NaN unknown), the example's own weight; `log_base`:
    log π_0 of each target; `log_p`: the whole distribution at each.
    """
    source, behavior, own = row
    objective = settings["objective"]
    objective = objective.get(source, "nll") if isinstance(objective, dict) else objective
    low, high = settings.get("clip_min") or 0.0, settings.get("clip_max", 3.0)
    if settings.get("expert_weighting") == "base":
        behavior = [base if mu != mu else mu for mu, base in zip(behavior, log_base, strict=True)]
    known = [lp - mu for lp, mu in zip(log_pi, behavior, strict=True) if mu == mu]
    result = []
    for t, (lp, mu) in enumerate(zip(log_pi, behavior, strict=True)):
        if objective == "nll":
            w = 1.0
        elif objective in ("dft", "asft"):
            w = max(math.exp(lp), low)
        elif objective == "threshold":
            p = math.exp(lp if settings["threshold_policy"] == "current" else log_base[t])
            below = p / settings["tau"] if settings["threshold_mode"] == "taper" else 0.0
            w = 1.0 if p > settings["tau"] else max(below, low)
        elif objective == "topr":
            w = 1.0 if REWARDS[source] > 0 else -min(math.exp(sum(log_pi) - sum(behavior)), 1.0)
            w *= mean_length / len(log_pi)
        elif objective == "pear" and mu == mu:
            log_w = (len(log_pi) - 1 - t) * math.log(0.999)
            for j in range(t + 1, len(log_pi)):
                log_w += min(max(log_pi[j] - behavior[j], -0.08), 0.3)
            w = math.exp(min(max(log_w, -10.0), 5.0))
        elif objective == "psft":
            ratio = math.exp(lp - log_base[t])
            w = ratio if ratio <= 1 + settings["epsilon_high"] else 0.0
        elif objective == "eaft":
            top = sorted((math.exp(x) for x in log_p[t]), reverse=True)[:20]
            entropy = -sum(p / sum(top) * math.log(p / sum(top)) for p in top)
            w = (entropy / math.log(20)) ** settings["alpha"]
        elif objective == "p_alpha":
            w = max(math.exp(lp) ** settings["alpha"], low)
        elif objective is power_of_two_thirds:
            w = math.exp(lp) ** (2 / 3)
        elif mu != mu:  # no behaviour policy
            w = math.exp(lp) if settings.get("expert_weighting") == "dft" else 1.0
        else:
            ratio = math.exp(sum(known) / len(known)) if objective == "iw_sequence" else math.exp(lp - mu)
            w = min(max(ratio, low), high)
            w = 0.0 if settings.get("clip_mode") == "mask" and w != ratio else w
        result.append(own * w)
    return result


@pytest.mark.parametrize("layout", ["padded", "packed", "padding_free"])
@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "iw", "clip_min": 0.2, "clip_max": 1.5},
        {"objective": "iw", "clip_min": 0.02, "clip_max": 0.3, "clip_mode": "mask", "expert_weighting": "dft"},
        {"objective": "iw_sequence", "clip_max": 0.02},
        {"objective": "iw_sequence", "clip_min": 0.005, "clip_mode": "mask", "expert_weighting": "dft"},
        {"objective": "p_alpha", "alpha": 0.5},
        {"objective": {"self": "p_alpha", "guided": "dft", "expert": "asft"}, "clip_min": 0.02, "alpha": 0.5, "beta": 0.1},
        {"objective": "threshold", "tau": 0.002, "threshold_mode": "mask", "threshold_policy": "current"},
        {"objective": "threshold", "tau": 0.004, "threshold_mode": "taper", "threshold_policy": "initial", "clip_min": 0.3},
        {"objective": {"guided": "pear", "expert": "pear"}, "expert_weighting": "dft"},
        {"objective": "topr"},
        {"objective": {"self": "iw", "expert": "dft"}},
        {"objective": power_of_two_thirds},
        {"objective": "iw", "expert_weighting": "base", "clip_max": 1.3},
        {"objective": "iw_sequence", "expert_weighting": "base"},
        {"objective": "psft", "steps_per_outer_batch": 0, "epsilon_high": 0.1},
        {"objective": "asft", "beta": 0.7},
        {"objective": "eaft", "alpha": 1.5},
        {"objective": {"self": "asft", "guided": "eaft", "expert": "psft"}, "steps_per_outer_batch": 0, "beta": 0.3, "alpha": 0.5, "epsilon_high": 0.2},
    ],
    ids=lambda options: str({name: getattr(value, "__name__", value) for name, value in options.items()}),
)  # fmt: skip
def test_weights_equal_a_naive_reference(tmp_path, tiny_model, tokenizer, layout, settings):
    """Loss and gradients against full logits in float64, one example at a time, formula written out."""
    base = copy.deepcopy(tiny_model).double()  # before the trainer patches the forward
    data = rewritten(tokenizer).map(lambda _, i: {"weight": 0.5 + i}, with_indices=True)
    named = str(settings["objective"])
    if "topr" in named or "pear" in named:  # ratios within their limits and beyond
        near = with_own_log_probs(tiny_model, tokenizer, shift=0.3)
        data = data.map(lambda row: near(row) if row["completion_ids"] else {})
    if "topr" in named:
        data = data.map(lambda row: {"reward": REWARDS[row["source"]]})
    args = config(ImportanceWeightedSFTConfig, tmp_path, per_device_train_batch_size=8, **settings, **LAYOUTS[layout])
    trainer = ImportanceWeightedSFTTrainer(tiny_model, args, train_dataset=data, processing_class=tokenizer)
    reference = copy.deepcopy(base)
    torch.manual_seed(1)
    with torch.no_grad():  # some training steps later
        for p, q in zip(tiny_model.parameters(), reference.parameters(), strict=True):
            q.copy_(p.add_(0.03 * torch.randn_like(p)))
    batches = list(trainer.get_train_dataloader())
    loss = sum(trainer.compute_loss(trainer.model, dict(b), num_items_in_batch=torch.tensor(40.0)) for b in batches)
    loss.backward()

    total = 0.0
    targets = [
        row["completion_ids"] or tokenizer(row["completion"][0]["content"] + "<|im_end|>")["input_ids"] for row in data
    ]
    mean_length = sum(map(len, targets)) / len(targets)
    for i, (row, target) in enumerate(zip(data, targets, strict=True)):
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        places = range(len(prompt) - 1, len(prompt) + len(target) - 1)
        log_p, log_p0 = (
            m(torch.tensor([prompt + target])).logits[0, places].log_softmax(-1) for m in (reference, base)
        )
        log_pi, log_base = (x[range(len(target)), target] for x in (log_p, log_p0))
        behavior = row["behavior_log_probs"] or [math.nan] * len(target)
        own = row["source"], behavior, 0.5 + i
        weights = naive_weights(settings, own, log_pi.tolist(), log_base.tolist(), log_p.tolist(), mean_length)
        total = total - (torch.tensor(weights, dtype=torch.float64) * log_pi).sum() / 40
        objective = settings["objective"]
        if (objective.get(row["source"]) if isinstance(objective, dict) else objective) == "asft":
            kl = (log_p0.detach().exp() * (log_p0.detach() - log_p)).sum()
            total = total + settings["beta"] * (0.5 + i) * kl / 40
    total.backward()
    torch.testing.assert_close(loss.double(), total, atol=1e-5, rtol=1e-5)
    for p, q in zip(tiny_model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad.double(), q.grad, atol=1e-5, rtol=1e-4)


def test_on_policy_rows_have_weight_one(tmp_path, tiny_model, tokenizer):
    """μ = π: every ratio is 1, so `iw` logs weight 1, full effective sample size and no KL."""
    data = rewritten(tokenizer).filter(lambda r: r["source"] != "expert")

    data = data.map(with_own_log_probs(tiny_model, tokenizer))
    args = config(ImportanceWeightedSFTConfig, tmp_path, max_steps=1, clip_max=None)
    trainer = ImportanceWeightedSFTTrainer(tiny_model, args, train_dataset=data, processing_class=tokenizer)
    _, (first,) = train(trainer)
    assert first["weight"] == pytest.approx(1, abs=1e-4) and first["ess"] == pytest.approx(1, abs=1e-4)
    assert first["kl"] == pytest.approx(0, abs=1e-4) and first["log_ratio"] == pytest.approx(0, abs=1e-4)


def test_evaluate_takes_raw_rows_and_logs_under_eval(tmp_path, tiny_model, tokenizer):
    args = config(ImportanceWeightedSFTConfig, tmp_path, packing=True, max_length=64)
    data = rewritten(tokenizer)
    trainer = ImportanceWeightedSFTTrainer(
        tiny_model, args, train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )
    prepared = trainer.evaluate()
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(prepared["eval_loss"], abs=1e-5)
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == pytest.approx(prepared["eval_loss"], abs=1e-5)
    assert {"eval_nll", "eval_weight", "eval_ess", "eval_kl"} <= set(trainer.state.log_history[-1])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_length": 20},
        {"packing": True, "max_length": 64, "shuffle_dataset": True},
        {"expert_weighting": "base"},
    ],
)
def test_prepared_rows_are_not_prepared_again(tmp_path, tiny_model, tokenizer, settings):
    """As TRL says of its own preparation: what a trainer has prepared may be given to it, or to another one, again."""
    data = rewritten(tokenizer).map(lambda _, i: {"weight": 0.5 + i}, with_indices=True)

    def trainer(data, **kwargs):
        args = config(ImportanceWeightedSFTConfig, tmp_path, **{**settings, **kwargs})
        return ImportanceWeightedSFTTrainer(
            copy.deepcopy(tiny_model), args, train_dataset=data, eval_dataset=data, processing_class=tokenizer
        )

    first = trainer(data)
    expected = first.evaluate()["eval_loss"]
    assert first.evaluate({"a": data})["eval_a_loss"] == pytest.approx(expected, abs=1e-6)
    for prepared in (first.eval_dataset, first.train_dataset):
        assert first.evaluate(prepared)["eval_loss"] == pytest.approx(expected, abs=1e-6)
    second = trainer(first.train_dataset)
    assert second.train_dataset["input_ids"][:] == first.train_dataset["input_ids"][:]
    assert second.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-6)
    assert train(second)[0] == train(first)[0]
    scoring = trainer(trainer(data, expert_weighting="one").train_dataset, expert_weighting="base")
    column = scoring.train_dataset["reference_log_probs"][0]  # scored now, which it was not before
    assert any(x < 0 for x in column) and scoring.evaluate()["eval_weight"] == pytest.approx(
        trainer(data, expert_weighting="base").evaluate()["eval_weight"], abs=1e-6
    )


@pytest.mark.parametrize("own", ["numina", ["web"], {"url": "x"}, 7])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_source_column_of_the_users_own_means_nothing(tmp_path, tiny_model, tokenizer, own, streaming):
    """Rows that name no source of ours are TRL's, whatever the column holds."""
    data = demonstrations().map(lambda _: {"source": own})
    weighted = data.map(lambda _: {"weight": 1.0})  # prepared by us, because of the weight
    losses = []
    for cls, conf, kwargs, rows in (
        (DFTTrainer, DFTConfig, {}, data),
        (DFTTrainer, DFTConfig, {"weight_column": "weight"}, weighted),
        (SFTTrainer, SFTConfig, {"loss_type": "dft"}, data),
    ):
        if streaming:
            rows = rows.to_iterable_dataset()
        trainer = cls(copy.deepcopy(tiny_model), config(conf, tmp_path, **kwargs), train_dataset=rows, processing_class=tokenizer)  # fmt: skip
        losses.append(first_loss(trainer))
    assert losses[0] == pytest.approx(losses[2], abs=1e-6) and losses[1] == pytest.approx(losses[2], abs=1e-6)


@pytest.mark.parametrize("own", ["heavy", [1, 2, 3], 7.5])
@pytest.mark.parametrize("kind", ["rows", "stream", "packed", "tokenized", "skip_prepare_dataset"])
def test_a_weight_column_of_the_users_own_means_nothing(tmp_path, tiny_model, tokenizer, own, kind):
    """Nor do `source`, `source_ids`, `seq_lengths` and log-probs of other policies: a script in which only the import changed trains as before."""
    data = demonstrations().map(lambda _: {"weight": own, "source": "expert", "source_ids": own, "old_log_probs": own, "reference_log_probs": own})  # fmt: skip
    settings = {"packing": True, "max_length": 64} if kind == "packed" else {}
    if kind in ("rows", "stream", "packed"):
        data = data.map(lambda _: {"seq_lengths": 7})
    else:
        trainer = SFTTrainer(copy.deepcopy(tiny_model), config(SFTConfig, tmp_path), train_dataset=data, processing_class=tokenizer)  # fmt: skip
        data = trainer.train_dataset
    if kind == "skip_prepare_dataset":
        settings = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    if kind == "stream":
        data = data.to_iterable_dataset()
    losses = []
    for cls in (ImportanceWeightedSFTTrainer, SFTTrainer):
        trainer = cls(copy.deepcopy(tiny_model), config(SFTConfig, tmp_path, **settings), train_dataset=data, processing_class=tokenizer)  # fmt: skip
        losses.append(first_loss(trainer))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_what_is_done_with_a_weight_or_a_source_is_said(tmp_path, tiny_model, tokenizer):
    data = demonstrations().map(lambda _, i: {"weight": 1.0 + i, "importance": 3.0}, with_indices=True)

    def trainer(data, **kwargs):
        args = config(ImportanceWeightedSFTConfig, tmp_path, **kwargs)
        return ImportanceWeightedSFTTrainer(
            copy.deepcopy(tiny_model), args, train_dataset=data, processing_class=tokenizer
        )

    with pytest.warns(UserWarning, match="`weight` has no effect.* write weight_column='weight'"):
        plain = first_loss(trainer(data))
    with pytest.warns(UserWarning, match="The column `importance` multiplies"):
        assert first_loss(trainer(data, weight_column="importance")) == pytest.approx(3 * plain, rel=1e-5)
    with pytest.warns(UserWarning, match="The column `weight` multiplies"):
        trainer(rewritten(tokenizer).map(lambda _: {"weight": 2.0}))
    with pytest.raises(ValueError, match=r"weight_column='wight', but the training rows have the columns \['prompt'"):
        trainer(data, weight_column="wight")
    unknown = rewritten(tokenizer).map(lambda row: {"source": row["source"].replace("expert", "friend")})
    for rows in (unknown, unknown.to_iterable_dataset()):
        with pytest.warns(
            UserWarning, match="`source` holds 'friend', which is none of self, guided, expert, teacher, replay"
        ) as said:
            first_loss(trainer(rows))
        assert len({str(w.message) for w in said if "friend" in str(w.message)}) == 1
    with pytest.warns(UserWarning, match="chooses by source, but the dataset has no column `source`"):
        trainer(demonstrations(), objective={"self": "iw"})


@pytest.mark.parametrize("packing", [False, True])
def test_tokens_without_behaviour_log_prob_are_told(tmp_path, tiny_model, tokenizer, packing):
    """Under iw they weigh 1, which is plain SFT: never in silence, and not at all where there are no others and iw was asked for."""

    def trainer(rows, **kwargs):
        args = config(ImportanceWeightedSFTConfig, tmp_path, packing=packing, **kwargs)
        return ImportanceWeightedSFTTrainer(tiny_model, args, train_dataset=rows, processing_class=tokenizer)

    def told(rows, **kwargs):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer(rows, **kwargs)
        return [str(w.message) for w in said if "have no μ" in str(w.message)]

    rows = rewritten(tokenizer)
    lengths = dict.fromkeys(("self", "guided", "expert"), 0)
    for row in rows:  # what is trained on: the sampled ids, or the demonstration and its end of turn
        text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
        asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        lengths[row["source"]] += len(row["completion_ids"]) or len(text) - len(asked)
    total = sum(lengths.values())
    (message,) = told(rows, objective="iw")
    assert message.startswith(
        f"{lengths['expert']} of {total} training tokens ({lengths['expert'] / total:.0%}) have no μ"
    )
    (message,) = told(rows, objective={"guided": "iw", "expert": "iw"})
    assert message.startswith(f"{lengths['expert']} of {lengths['guided'] + lengths['expert']} training tokens")
    for quiet in ({"objective": {"self": "iw", "expert": "dft"}}, {"objective": "dft"}, {"expert_weighting": "dft"}):
        assert not told(rows, **quiet)
    (message,) = told(demonstrations())  # nobody asked for iw
    assert "(100%) have no μ" in message
    for without in (demonstrations(), rows.filter(lambda row: row["source"] == "expert")):
        with pytest.raises(ValueError, match="(?s)\\(100%\\) have no μ.*Train on what"):
            trainer(without, objective="iw")


def endless():
    """Rows of a stream; whoever reads it to its end fails."""
    for i in range(5000):
        assert i < 4000, "it was read on and on"
        yield {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}


def test_a_stream_without_behaviour_log_probs_is_told_by_its_columns(tmp_path, tiny_model, tokenizer):
    """Its rows are not counted, which would take until its end."""
    features = Features({name: List(Value("int64")) for name in ("input_ids", "labels")})
    tokens = IterableDataset.from_generator(endless, features=features)

    def trainer(data, **kwargs):
        args = config(ImportanceWeightedSFTConfig, tmp_path, **kwargs)
        return ImportanceWeightedSFTTrainer(tiny_model, args, train_dataset=data, processing_class=tokenizer)

    as_they_are = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    for data, kwargs in ((demonstrations().to_iterable_dataset(), {}), (tokens, {}), (tokens, as_they_are)):
        with pytest.warns(UserWarning, match="The training tokens have no μ, .*plain SFT"):
            trainer(data, **kwargs)
        with pytest.raises(ValueError, match="The training tokens have no μ, .*write objective='nll'"):
            trainer(data, objective="iw", **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer(rewritten(tokenizer).to_iterable_dataset(), objective="iw")


def test_a_weight_that_is_not_finite_never_reaches_the_optimizer(tmp_path, tiny_model, tokenizer):
    def nan_at_one_token(log_probs, mask, **known):
        weights = torch.ones_like(log_probs)
        weights[1, mask[1].nonzero()[0]] = math.nan
        return weights

    impossible = rewritten(tokenizer).map(lambda row: {"behavior_log_probs": [-9e3] * len(row["completion_ids"])})
    for data, kwargs, message in (
        (demonstrations(), {"objective": nan_at_one_token}, "weight of a token is nan under objective='nan_at_one_token'"),
        (impossible, {"clip_max": None}, "weight of a token is inf under objective='iw'.* and a clip_max"),
    ):  # fmt: skip
        args = config(ImportanceWeightedSFTConfig, tmp_path, **kwargs)
        trainer = ImportanceWeightedSFTTrainer(tiny_model, args, train_dataset=data, processing_class=tokenizer)
        with pytest.raises(ValueError, match=message) as raised:
            trainer.train()
        assert "assistant" in str(raised.value)  # the row, up to the token
        assert all(p.isfinite().all() for p in tiny_model.parameters())


def test_a_collator_that_drops_the_columns_is_refused(tmp_path, tiny_model, tokenizer):
    class Own(DataCollatorForLanguageModeling):
        pass

    class OwnWithColumns(RewriteDataCollator):
        pass

    def first_logged_loss(collator, data):
        weight_column = "weight" if "weight" in data.column_names else None
        args = config(ImportanceWeightedSFTConfig, tmp_path, objective="nll", max_steps=1, weight_column=weight_column)
        trainer = ImportanceWeightedSFTTrainer(
            copy.deepcopy(tiny_model), args, collator, data, eval_dataset=demonstrations(), processing_class=tokenizer
        )
        return train(trainer)[1][0]["loss"]

    own, with_columns = (cls(pad_token_id=tokenizer.pad_token_id) for cls in (Own, OwnWithColumns))
    weighted = demonstrations().map(lambda _: {"weight": 5.0})
    with pytest.raises(ValueError, match="Own leaves them out .* subclass trl_offpolicy.RewriteDataCollator"):
        first_logged_loss(own, weighted)
    plain = first_logged_loss(own, demonstrations())
    assert first_logged_loss(with_columns, weighted) == pytest.approx(5 * plain, rel=1e-5)


def test_weights_with_compute_metrics_and_predict(tmp_path, tiny_model, tokenizer):
    """The logits that TRL computes for metrics are no loss; under label smoothing they are, and a weight would be lost."""
    data = demonstrations().map(lambda _, i: {"weight": 0.5 + i}, with_indices=True)

    def trainer(**kwargs):
        args = config(ImportanceWeightedSFTConfig, tmp_path, objective="nll", weight_column="weight", **kwargs)
        return ImportanceWeightedSFTTrainer(
            copy.deepcopy(tiny_model), args, train_dataset=data, eval_dataset=data, processing_class=tokenizer,
            compute_metrics=lambda predictions: {"rows": len(predictions.predictions)},
        )  # fmt: skip

    weighted = trainer()
    metrics = weighted.evaluate()
    assert metrics["eval_rows"] == 10
    weighted.compute_metrics = None
    assert weighted.evaluate()["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-6)
    predicted = weighted.predict(weighted.eval_dataset.select([0, 1])).metrics
    assert predicted["test_loss"] != pytest.approx(metrics["eval_loss"], abs=1e-3)
    again = weighted.evaluate()  # what was predicted is no part of it
    assert again["eval_nll"] == pytest.approx(metrics["eval_nll"], abs=1e-6)
    assert again["eval_mean_token_accuracy"] == pytest.approx(metrics["eval_mean_token_accuracy"], abs=1e-6)
    with pytest.raises(ValueError, match="`weight` has no effect on label smoothing"):
        trainer(label_smoothing_factor=0.1).evaluate()


def test_every_eval_set_logs_under_its_own_name(tmp_path, tiny_model, tokenizer):
    data = rewritten(tokenizer)
    sets = {"a": data, "b": data.filter(lambda r: r["source"] == "expert")}
    args = config(ImportanceWeightedSFTConfig, tmp_path)
    trainer = ImportanceWeightedSFTTrainer(
        tiny_model, args, train_dataset=data, eval_dataset=sets, processing_class=tokenizer
    )
    both = trainer.evaluate()
    for name, alone in sets.items():
        expected = trainer.evaluate(alone)
        for key in ("entropy", "mean_token_accuracy", "nll", "weight", "nll/expert"):
            assert both[f"eval_{name}_{key}"] == pytest.approx(expected[f"eval_{key}"], abs=1e-6)
    assert "eval_a_kl" in both and "eval_b_kl" not in both  # demonstrations have no behaviour policy
    assert both["eval_b_nll"] == pytest.approx(both["eval_a_nll/expert"], abs=1e-6)


def test_metrics_per_source_equal_a_naive_count(tmp_path, tiny_model, tokenizer):
    args = config(ImportanceWeightedSFTConfig, tmp_path, per_device_eval_batch_size=3, clip_max=0.001)
    trainer = ImportanceWeightedSFTTrainer(
        tiny_model,
        args,
        train_dataset=rewritten(tokenizer),
        eval_dataset=rewritten(tokenizer),
        processing_class=tokenizer,
    )
    metrics = trainer.evaluate()
    values = {name: [] for name in ("self", "guided", "expert")}
    for row in trainer.eval_dataset:
        with torch.no_grad():
            log_pi = tiny_model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for t, (label, mu) in enumerate(zip(row["labels"], row["behavior_log_probs"], strict=True)):
            if label != -100:
                lp = log_pi[t - 1, label].item()
                entropy = -(log_pi[t - 1].exp() * log_pi[t - 1]).sum().item()
                right = log_pi[t - 1].argmax().item() == label
                w = 1.0 if mu != mu else min(math.exp(lp - mu), 0.001)
                values[row["source"]].append((-lp, w, lp - mu, entropy, right))
    for name, tokens in values.items():
        nll, w, log_ratio, entropy, right = zip(*tokens, strict=True)
        for key, values_of in (("nll", nll), ("entropy", entropy), ("mean_token_accuracy", right)):
            assert metrics[f"eval_{key}/{name}"] == pytest.approx(sum(values_of) / len(tokens), rel=1e-4), key
        assert metrics[f"eval_weight_min/{name}"] == pytest.approx(min(w), rel=1e-3)
        assert metrics[f"eval_weight_max/{name}"] == pytest.approx(max(w), rel=1e-3)
        clipped = sum(r == r and math.exp(r) > 0.001 for r in log_ratio)
        assert metrics[f"eval_clip_fraction/{name}"] == pytest.approx(clipped / len(tokens), rel=1e-6)
        assert (clipped > 0) == (name != "expert")
        assert metrics[f"eval_weight/{name}"] == pytest.approx(sum(w) / len(w), rel=1e-3)
        assert metrics[f"eval_ess/{name}"] == pytest.approx(sum(w) ** 2 / len(w) / sum(x * x for x in w), rel=1e-3)
        if name != "expert":
            k3 = [math.exp(r) - 1 - r for r in log_ratio]
            assert metrics[f"eval_kl/{name}"] == pytest.approx(sum(k3) / len(k3), rel=1e-3)


@pytest.mark.slow
def test_iw_gradient_is_the_on_policy_gradient_and_nll_is_not(tmp_path, tiny_model, tokenizer):
    """
    Answers of one token y ~ μ with a known reward R(y) as `weight`: over 20,000 draws the mean `iw` gradient is E_π[R ∇log π] within 4
    standard errors in each of 32 coordinates (a false alarm in 0.2 % of seeds, this one is fixed), and the `nll` gradient is not.
    """
    prompt = [{"role": "user", "content": "2+2?"}]
    prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    tiny_model.double()
    norm = tiny_model.model.norm.weight

    def log_pi():
        return tiny_model(torch.tensor([prompt_ids["input_ids"]])).logits[0, -1].log_softmax(-1)

    pi = log_pi().detach().exp()
    generator = torch.Generator().manual_seed(0)
    mu = 0.5 * pi + 0.5 * torch.randn(len(pi), generator=generator, dtype=torch.float64).softmax(-1)
    reward = (torch.arange(len(pi)) % 3 == 0).double()
    (on_policy,) = torch.autograd.grad((pi * reward * log_pi()).sum(), norm)
    draws = torch.multinomial(mu, 20_000, replacement=True, generator=generator)
    counts = torch.bincount(draws, minlength=len(pi)).double()
    data = Dataset.from_list(
        [
            {
                "prompt": prompt,
                "completion": [{"role": "assistant", "content": "-"}],
                "completion_ids": [y],
                "behavior_log_probs": [mu[y].log().item()],
                "weight": reward[y].item(),
            }
            for y in range(len(pi))
        ]
    )
    z = {}
    for objective in ("iw", "nll"):
        args = config(ImportanceWeightedSFTConfig, tmp_path, objective=objective, clip_max=None)
        trainer = ImportanceWeightedSFTTrainer(
            copy.deepcopy(tiny_model), args, train_dataset=data, processing_class=tokenizer
        )
        gradients = []
        for row in trainer.train_dataset:
            loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator([row])))
            gradients.append(torch.autograd.grad(-loss, trainer.model.model.norm.weight)[0].double())
        gradients = torch.stack(gradients)  # of one draw of each token
        mean = (counts[:, None] * gradients).sum(0) / counts.sum()
        variance = (counts[:, None] * (gradients - mean).square()).sum(0) / (counts.sum() - 1)
        z[objective] = ((mean - on_policy) / (variance / counts.sum()).sqrt()).abs().max().item()
    assert z["iw"] < 4 and z["nll"] > 20, z


def text_rows():
    return Dataset.from_list([{"text": f"{q} it is so {i}"} for i, q in enumerate(QUESTIONS * 2)])


def chats():
    """Two assistant turns each: what is trained on is not the end of the row."""
    return Dataset.from_list([{"messages": [*a["prompt"], *a["completion"], *b["prompt"], *b["completion"]]} for a, b in zip(demonstrations(), demonstrations().select(range(9, -1, -1)), strict=True)])  # fmt: skip


LAYERS = {
    "lora": ({}, lambda: {"peft_config": LoraConfig(r=4, target_modules="all-linear")}),
    "lora_saved_head": (
        {},
        lambda: {"peft_config": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])},
    ),
    "prompt_tuning": ({}, lambda: {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}),
    "gradient_checkpointing": ({"gradient_checkpointing": True}, dict),
    "bf16": ({"bf16": True}, dict),
    "two_workers": ({"dataset_num_proc": 2}, dict),
    "text": ({}, lambda: {"train_dataset": text_rows()}),
    "streaming": ({}, lambda: {"train_dataset": demonstrations().to_iterable_dataset()}),
    "assistant_only": ({"assistant_only_loss": True}, lambda: {"train_dataset": chats()}),
    "assistant_only_packed": (
        {"assistant_only_loss": True, "packing": True, "max_length": 96},
        lambda: {"train_dataset": chats()},
    ),
    "Llama": ({}, dict),
    "Gemma2": ({}, dict),
    "Llama_in_4_bit": ({}, lambda: {"peft_config": LoraConfig(r=4, target_modules="all-linear")}),
}


def in_family(family, tiny_model):
    """The tiny model, or one of the same size of another family, or that in bitsandbytes' NF4 (QLoRA)."""
    import transformers

    if family.endswith("_in_4_bit"):
        model = in_family(family.split("_")[0], tiny_model)
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        with tempfile.TemporaryDirectory() as saved:
            model.save_pretrained(saved)
            return type(model).from_pretrained(saved, quantization_config=quantization)
    if family not in ("Llama", "Gemma2"):
        return copy.deepcopy(tiny_model)

    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "eos_token_id", "pad_token_id", "bos_token_id", "initializer_range")  # fmt: skip
    own = {"final_logit_softcapping": 5.0, "head_dim": 16} if family == "Gemma2" else {}
    torch.manual_seed(0)
    sizes = {name: getattr(tiny_model.config, name) for name in names}
    return getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes, **own))


@pytest.mark.parametrize("case", LAYERS)
def test_same_updates_as_trl_with(tmp_path, tiny_model, tokenizer, case):
    kwargs, extra = LAYERS[case]
    trainers = [
        cls(
            in_family(case, tiny_model),
            config(conf, tmp_path, **kwargs, **loss),
            **{"train_dataset": demonstrations(), "processing_class": tokenizer, **extra()},
        )
        for cls, conf, loss in ((DFTTrainer, DFTConfig, {}), (SFTTrainer, SFTConfig, {"loss_type": "dft"}))
    ]
    ours, theirs = (train(t)[0] for t in trainers)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-6, rtol=1e-6)
    for p, q in zip(*(t.model.parameters() for t in trainers), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)


def test_same_evaluation_as_trl(tmp_path, tiny_model, tokenizer):
    """Several eval sets, a metric computed from logits, and rows as they come: the numbers that TRL's trainer gives."""
    sets = {"a": demonstrations(6), "b": text_rows()}

    def compute_metrics(predictions):
        return {"logits": float(predictions.predictions.mean()), "labels": int((predictions.label_ids != -100).sum())}

    results = []
    for cls, conf, kwargs in ((DFTTrainer, DFTConfig, {}), (SFTTrainer, SFTConfig, {"loss_type": "dft"})):
        trainer = cls(
            copy.deepcopy(tiny_model),
            config(conf, tmp_path, per_device_eval_batch_size=3, **kwargs),
            train_dataset=demonstrations(),
            eval_dataset=sets,
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
        )
        metrics = {**trainer.evaluate(), **trainer.evaluate(demonstrations(4), metric_key_prefix="eval_raw")}
        results.append({k: v for k, v in metrics.items() if not k.endswith(("_runtime", "_per_second", "_time"))})
    ours, theirs = results
    assert {
        "eval_a_loss",
        "eval_b_logits",
        "eval_raw_labels",
        "eval_entropy",
        "eval_mean_token_accuracy",
    } <= theirs.keys()
    assert {k: ours[k] for k in theirs} == pytest.approx(theirs, rel=1e-6)


def test_same_updates_as_trl_on_a_mixture_of_experts(tmp_path, tokenizer):
    """The auxiliary loss passes through the weighted forward untouched."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.1,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        )
    )  # fmt: skip
    history = []
    for cls, conf, kwargs in ((DFTTrainer, DFTConfig, {}), (SFTTrainer, SFTConfig, {"loss_type": "dft"})):
        trainer = cls(
            copy.deepcopy(model),
            config(conf, tmp_path, **kwargs),
            train_dataset=demonstrations(),
            processing_class=tokenizer,
        )
        history.append([(e["loss"], e["grad_norm"], e["aux_loss"]) for e in train(trainer)[1]])
    torch.testing.assert_close(torch.tensor(history[0]), torch.tensor(history[1]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("packing", [False, True])
def test_streaming_dataset_keeps_its_columns(tmp_path, tiny_model, tokenizer, packing):
    args = config(ImportanceWeightedSFTConfig, tmp_path, packing=packing, max_length=64)
    data = rewritten(tokenizer)
    trainer = ImportanceWeightedSFTTrainer(
        tiny_model, args, train_dataset=data.to_iterable_dataset(), processing_class=tokenizer
    )
    seen = 0
    for batch in trainer.get_train_dataloader():
        known = ~torch.isnan(batch["behavior_log_probs"])
        torch.testing.assert_close(batch["behavior_log_probs"][known], -batch["input_ids"][known] / 1000)
        seen += int(known.sum())
    assert seen == sum(len(ids) for ids in data["completion_ids"])
    assert train(trainer)[1][-1]["kl"] > 0


def test_resume_from_a_checkpoint_continues_bit_for_bit(tmp_path, tiny_model, tokenizer):
    def trainer(model, name):
        args = config(ImportanceWeightedSFTConfig, tmp_path / name, max_steps=4, save_strategy="steps", save_steps=2)
        return ImportanceWeightedSFTTrainer(
            model, args, train_dataset=rewritten(tokenizer), processing_class=tokenizer
        )

    whole = trainer(copy.deepcopy(tiny_model), "whole")
    _, history = train(whole)
    resumed = trainer(copy.deepcopy(tiny_model), "resumed")
    _, again = train(resumed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for e, f in zip(again, history, strict=True):  # the first two come with the checkpoint
        assert {k: v for k, v in e.items() if k != "num_tokens"} == {
            k: v for k, v in f.items() if k != "num_tokens"
        }  # TRL counts anew
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def train_in_some_processes(model_name, out, batch):
    """Two updates by as many processes as there are: their number, what was logged, and the weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(model_name), AutoModelForCausalLM.from_pretrained(model_name)
    args = config(
        ImportanceWeightedSFTConfig, out, per_device_train_batch_size=batch, gradient_accumulation_steps=2, max_steps=2,
        objective={"self": "topr", "guided": "asft", "expert": "psft"}, steps_per_outer_batch=2, precompute_behavior_log_probs=True,
        optim="sgd", learning_rate=0.1,
    )  # fmt: skip
    judged = {i: 1.0 if i % 2 else -1.0 for i in range(0, 16, 3)}  # the rows of `self`
    data = rewritten(tokenizer, 16).map(lambda _, i: {"reward": judged.get(i)}, with_indices=True)
    trainer = ImportanceWeightedSFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    if trainer.accelerator.num_processes == 2:
        compare_sharded_gradients(tokenizer, model_name, out)
        compare_uneven_rows(tokenizer, model_name, out)
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    return trainer.accelerator.num_processes, trainer.state.log_history, weights


def compare_sharded_gradients(tokenizer, model_name, out):
    """FSDP2's `fully_shard` over the processes: loss and gradients of what the trainer computes, initial policy included, stay the same."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_name)
    objective = {"self": "iw", "guided": "asft", "expert": "eaft"}
    args = config(ImportanceWeightedSFTConfig, out, objective=objective, per_device_train_batch_size=8)
    trainer = ImportanceWeightedSFTTrainer(model, args, train_dataset=rewritten(tokenizer), processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))  # all rows, in every process
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.sin(torch.arange(p.numel()).view(p.shape).float()))

    def gradients():
        model.zero_grad()
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(50.0))
        loss.backward()
        return loss, [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]

    expected = gradients()
    mesh = init_device_mesh("cpu", (2,))
    for whole in (model, trainer.accelerator.unwrap_model(trainer.initial_policy.frozen)):
        for layer in whole.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(whole, mesh=mesh)
    assert isinstance(next(model.parameters()), DTensor)
    torch.testing.assert_close(gradients(), expected, atol=1e-6, rtol=1e-5)


def compare_uneven_rows(tokenizer, model_name, out):
    """
    Seven padded rows in batches of four: TRL's sampler repeats one, and that is all that the loss differs by from the plain sum. And a
    callback that logs in one process only, as many do, does not hang.
    """
    from accelerate.utils import gather_object
    from transformers import AutoModelForCausalLM, TrainerCallback

    def recording(cls):
        class Recording(cls, TrainerCallback):
            def training_step(self, model, inputs, *args, **kwargs):
                step = gather_object([(inputs["input_ids"].tolist(), inputs["labels"].tolist())])
                self.steps = [*getattr(self, "steps", []), step]
                return super().training_step(model, inputs, *args, **kwargs)

        return Recording

    class LogInOneProcess(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                self.trainer.log({"seen": state.global_step})

    model = AutoModelForCausalLM.from_pretrained(model_name)
    results = []
    for cls in (SFTTrainer, ImportanceWeightedSFTTrainer):
        args = config(SFTConfig, out, per_device_train_batch_size=2, max_steps=2, learning_rate=0.0)
        callback = LogInOneProcess()
        trainer = recording(cls)(copy.deepcopy(model), args, train_dataset=demonstrations(7), processing_class=tokenizer, callbacks=[callback])  # fmt: skip
        callback.trainer = trainer
        results.append([e[0] for e in train(trainer)[0]])
        expected, rows = [], []
        for step in trainer.steps:
            total, count = 0.0, 0
            for ids, labels in ((i, lab) for part in step for i, lab in zip(*part, strict=True)):
                kept = [t for t, label in enumerate(labels) if label != -100]
                rows.append(tuple(ids[: kept[-1] + 1]))
                log_p = model(torch.tensor([ids[: kept[-1] + 1]])).logits[0].log_softmax(-1)
                total, count = total - sum(log_p[t - 1, labels[t]].item() for t in kept), count + len(kept)
            expected.append(total / count)
        assert len(rows) == 8 and len(set(rows)) == 7
        assert results[-1] == pytest.approx(expected, rel=1e-3), cls  # logged with four digits
    assert results[0] == pytest.approx(results[1], abs=1e-6)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, tiny_model, tokenizer):
    """Two CPU processes (gloo), as torchrun starts them: the same updates and the same logged diagnostics as one process; FSDP2 on top."""
    tiny_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    one, history, weights = train_in_some_processes(str(tmp_path / "model"), str(tmp_path / "one"), 4)
    model, out = str(tmp_path / "model"), str(tmp_path / "two")
    (two, history2, weights2), _ = in_two_processes(train_in_some_processes, model, out, 2)
    assert (one, two) == (1, 2)
    for e, f in zip(history[:2], history2[:2], strict=True):
        for key in ("loss", "grad_norm", "nll", "weight", "weight_max", "ess", "nll/self", "clip_fraction"):
            assert e[key] == pytest.approx(f[key], rel=1e-4), key
        for key in ("kl", "reference_kl"):  # 0 at the first step
            assert e[key] == pytest.approx(f[key], rel=1e-3, abs=1e-6), key
    assert history[1]["reference_kl"] > 0 and history[1]["clip_fraction/expert"] > 0
    assert weights.keys() == weights2.keys()
    for name, p in weights.items():
        np.testing.assert_allclose(p, weights2[name], atol=1e-6, rtol=1e-5)


@dataclass
class OwnConfig(SFTConfig):
    """A user's own, with a field and a method."""

    curriculum: str = "none"

    def twice(self):
        return 2 * self.max_steps


def test_any_sft_config_is_accepted(tmp_path, tiny_model, tokenizer):
    """TRL's own config, `_token` fields included (TrainingArguments.to_dict masks those), or a user's: nothing of it is lost."""
    args = config(OwnConfig, tmp_path, eos_token="<|im_end|>", loss_type="dft", max_steps=1, curriculum="easy first")
    args.note = {"set": "afterwards"}
    trainer = ImportanceWeightedSFTTrainer(
        tiny_model, args, train_dataset=demonstrations(), processing_class=tokenizer
    )
    assert (trainer.args.eos_token, trainer.args.objective, trainer.args.max_steps) == ("<|im_end|>", "dft", 1)
    trainer.save_model(tmp_path / "saved")
    saved = torch.load(tmp_path / "saved" / "training_args.bin", weights_only=False)
    for ours in (trainer.args, copy.copy(trainer.args), saved):
        assert isinstance(ours, OwnConfig) and isinstance(ours, ImportanceWeightedSFTConfig)
        assert (ours.curriculum, ours.note, ours.twice(), ours.clip_max) == (
            "easy first",
            {"set": "afterwards"},
            2,
            3.0,
        )
        assert (ours.to_dict()["curriculum"], ours.to_dict()["objective"]) == ("easy first", "dft")
    assert type(ImportanceWeightedSFTConfig.of(config(SFTConfig, tmp_path))) is ImportanceWeightedSFTConfig
    plain = DFTConfig.of(config(TrainingArguments, tmp_path, learning_rate=0.5))
    assert (type(plain), plain.learning_rate, plain.objective) == (DFTConfig, 0.5, "dft")


def test_what_trl_switches_on_by_an_old_name_is_not_warned_of_in_every_training(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for given, on in (({}, True), ({"gradient_checkpointing": False}, False)):
            args = config(ImportanceWeightedSFTConfig, tmp_path, **given)
            assert args.gradient_checkpointing is on and getattr(args, "activation_checkpointing", on) is on


def test_the_objective_follows_the_loss_type_unless_it_is_given(tmp_path, tiny_model, tokenizer):
    def objective(cls=ImportanceWeightedSFTConfig, **kwargs):
        made = config(cls, tmp_path, **kwargs)
        assert made.loss_type == "nll"  # TRL's weighting would come on top
        return made.objective

    assert [objective(), objective(loss_type="nll"), objective(DFTConfig)] == ["iw", "iw", "dft"]
    assert [objective(loss_type="dft"), objective(loss_type="dft", objective="dft")] == ["dft", "dft"]
    with pytest.warns(FutureWarning, match="chunked_nll"):
        assert objective(loss_type="chunked_nll") == "nll"
        assert objective(loss_type="chunked_nll", objective="dft") == "dft"
    assert objective(label_smoothing_factor=0.1) == "nll"

    def trained(args, cls=ImportanceWeightedSFTTrainer, **kwargs):
        return cls(tiny_model, args, train_dataset=demonstrations(), processing_class=tokenizer, **kwargs).objective

    assert trained(config(ImportanceWeightedSFTConfig, tmp_path), DFTTrainer) == "dft"
    assert trained(config(ImportanceWeightedSFTConfig, tmp_path, objective="p_alpha"), DFTTrainer) == "p_alpha"
    own_loss = {"compute_loss_func": lambda *_, **__: torch.tensor(0.0)}
    for args in (config(ImportanceWeightedSFTConfig, tmp_path), config(SFTConfig, tmp_path)):
        assert trained(args, **own_loss) == "nll"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completion_ids": [5, 6], "behavior_log_probs": [-1.0]}, "2 `completion_ids` but 1 `behavior_log_probs`"),
        ({"completion_ids": [], "behavior_log_probs": [-1.0]}, "no `completion_ids`"),
        ({"completion_ids": [5], "behavior_log_probs": [-1.0], "temperature": 0.7}, "was sampled at temperature=0.7"),
        ({"completion_ids": [5], "behavior_log_probs": [-math.inf]}, "has -inf among its `behavior_log_probs`"),
        ({"completion_ids": [5], "behavior_log_probs": [math.nan]}, "has nan among its `behavior_log_probs`"),
        ({"completion_ids": [5], "behavior_log_probs": [None]}, "has None among its `behavior_log_probs`"),
        ({"completion_ids": [5], "behavior_log_probs": [2.0]}, "has 2.0 among its `behavior_log_probs`"),
        ({"completion_ids": [-5], "behavior_log_probs": [-1.0]}, "has -5 among its `completion_ids`"),
        ({"completion_ids": [None], "behavior_log_probs": [-1.0]}, "has None among its `completion_ids`"),
        ({"completion_ids": [10**12], "behavior_log_probs": [-1.0]}, "has 1000000000000 among its `completion_ids`"),
        ({"completion_ids": [5], "behavior_log_probs": [-9999.0]}, "has -9999.0 among its `behavior_log_probs`"),
        ({"completion_ids": [5], "behavior_log_probs": [-1e30]}, "has -1e\\+30 among its `behavior_log_probs`"),
        ({"weight": math.nan}, "has weight=nan, and a weight must be a finite number of at least 0"),
        ({"weight": -0.5}, "has weight=-0.5, and a weight must be a finite number of at least 0"),
    ],
    ids=str,
)
def test_contradicting_columns_are_refused(tmp_path, tiny_model, tokenizer, change, message):
    good, changed = rewritten(tokenizer).select([0, 1]).map(lambda _: {"weight": 1.0}).to_list()
    data = Dataset.from_list([good, {**changed, **change}])
    with pytest.raises(ValueError, match=f"Row 1 .*{message}"):
        ImportanceWeightedSFTTrainer(
            tiny_model, config(ImportanceWeightedSFTConfig, tmp_path), train_dataset=data, processing_class=tokenizer
        )


def test_a_text_is_compared_as_the_number_it_holds(tmp_path, tiny_model, tokenizer):
    """As a CSV file gives them; and scored at that temperature."""

    def prepared(value, **kwargs):
        data = rewritten(tokenizer).map(lambda _: {"temperature": value})
        args = config(ImportanceWeightedSFTConfig, tmp_path, **kwargs)
        return ImportanceWeightedSFTTrainer(
            tiny_model, args, train_dataset=data, processing_class=tokenizer
        ).train_dataset

    assert prepared("1.0")["input_ids"][:] == prepared(1.0)["input_ids"][:]
    for text, message in (
        ("0.7", "was sampled at temperature=0.7"),
        ("warm", "temperature='warm', which is no number"),
    ):
        with pytest.raises(ValueError, match=message):
            prepared(text)
    scored = [prepared(value, precompute_behavior_log_probs=True)["behavior_log_probs"][:] for value in ("0.5", 0.5)]
    torch.testing.assert_close(*(torch.tensor(sum(rows, [])) for rows in scored), equal_nan=True)


@pytest.mark.parametrize(
    "setting", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.1}], ids=str
)
def test_log_probs_of_reshaped_draws_are_not_computed_again(tmp_path, tiny_model, tokenizer, setting):
    """The model's log-prob is not log μ of a token that was drawn from what is left of the vocabulary, or penalised."""
    data = rewritten(tokenizer).map(lambda row: {**setting, "behavior_log_probs": []})
    args = config(ImportanceWeightedSFTConfig, tmp_path, objective="iw", precompute_behavior_log_probs=True)
    with pytest.raises(ValueError, match=f"was sampled at {'='.join(map(str, *setting.items()))}, so"):
        ImportanceWeightedSFTTrainer(tiny_model, args, train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize("make", [demonstrations, rewritten])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_without_rows_is_refused(tmp_path, tiny_model, tokenizer, make, streaming):
    rows = make(tokenizer) if make is rewritten else make()
    rows = rows.to_iterable_dataset() if streaming else rows
    empty = rows.filter(lambda _: False)
    args = config(ImportanceWeightedSFTConfig, tmp_path)

    def trainer(train, evaluation):
        return ImportanceWeightedSFTTrainer(
            tiny_model, args, train_dataset=train, eval_dataset=evaluation, processing_class=tokenizer
        )

    with pytest.raises(ValueError, match="The train dataset has no rows"):
        trainer(empty, None)
    with pytest.raises(ValueError, match="The eval dataset has no rows"):
        trainer(rows, empty)
    with pytest.raises(ValueError, match="The test dataset has no rows"):
        trainer(rows, {"dev": rows, "test": empty})
    with pytest.raises(ValueError, match="The eval dataset has no rows"):
        trainer(rows, rows).evaluate(empty)


INCOMPLETE = {
    "no completion": ([{"prompt": "2+2?", "response": "4"}], "'response'] and no `completion`"),
    "nothing known": ([{"q": "2+2?", "a": "4"}], "no `prompt` and no `completion`"),
    "a prompt beside messages": ([{"prompt": "2+2?", "messages": [{"role": "user", "content": "2+2?"}]}], "Beside `prompt`, messages is not looked at: drop it"),
    "an empty completion": ([{"prompt": "a", "completion": "b"}] * 1500 + [{"prompt": "a", "completion": None}], "Row 1500 .* has no `completion`"),
    "an empty text": ([{"text": "a"}, {"text": None}], "Row 1 .* has no `text`"),
    "an empty conversation": ([{"messages": [{"role": "user", "content": "a"}]}, {"messages": None}], "Row 1 .* has no `messages`"),
}  # fmt: skip


@pytest.mark.parametrize("case", INCOMPLETE)
def test_columns_and_values_that_are_missing_are_named(tmp_path, tiny_model, tokenizer, case):
    rows, message = INCOMPLETE[case]
    args = config(ImportanceWeightedSFTConfig, tmp_path, objective="nll")
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
        ImportanceWeightedSFTTrainer(
            tiny_model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )


@pytest.mark.parametrize("make", [demonstrations, rewritten])
def test_labels_of_a_users_own_are_not_those_of_tokens(tmp_path, tiny_model, tokenizer, make):
    rows = make(tokenizer) if make is rewritten else make()
    args = config(ImportanceWeightedSFTConfig, tmp_path, objective="nll")
    for labels in ("algebra", 3, [0, 1]):
        own = rows.map(lambda _, labels=labels: {"labels": labels})
        prepared = [
            ImportanceWeightedSFTTrainer(
                tiny_model, args, train_dataset=data, processing_class=tokenizer
            ).train_dataset
            for data in (rows, own)
        ]
        assert prepared[0]["labels"][:] == prepared[1]["labels"][:]


def test_packed_rows_need_a_length(tmp_path, tiny_model, tokenizer):
    args = config(ImportanceWeightedSFTConfig, tmp_path, packing=True, max_length=None)
    with pytest.raises(ValueError, match="packing=True with max_length=None"):
        ImportanceWeightedSFTTrainer(tiny_model, args, train_dataset=rewritten(tokenizer), processing_class=tokenizer)


def test_hidden_columns_are_refused(tmp_path, tiny_model, tokenizer):
    """TRL would take rows whose prompt it does not see for text without prompts, and train on all of it."""
    rows, args = rewritten(tokenizer), config(ImportanceWeightedSFTConfig, tmp_path)

    def trainer(data, evaluation=None):
        return ImportanceWeightedSFTTrainer(
            copy.deepcopy(tiny_model), args, train_dataset=data, eval_dataset=evaluation, processing_class=tokenizer
        )

    hiding = rows.with_format("torch", columns=["completion_ids"])
    for data in ((hiding,), (rows, hiding)):
        with pytest.raises(ValueError, match=r"hides its columns \['prompt', 'completion', .*`with_format\(None\)`"):
            trainer(*data)
    shown = rows.with_format("torch", columns=["completion_ids"], output_all_columns=True)
    assert trainer(shown).train_dataset["labels"][:] == trainer(rows).train_dataset["labels"][:]


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        (lambda weights: None, "None"),
        (lambda weights: 1.0, "1.0"),
        (lambda weights: weights[:, 0], r"a tensor of shape \(4,\)"),
        (lambda weights: weights[:, :1], r"a tensor of shape \(4, 1\)"),
    ],
)
@pytest.mark.parametrize("by_source", [False, True])
def test_an_objective_that_returns_no_weight_for_each_token_is_refused(
    tmp_path, tiny_model, tokenizer, returned, what, by_source
):
    def own(log_probs, **known):
        return returned(torch.ones_like(log_probs))

    args = config(ImportanceWeightedSFTConfig, tmp_path, objective={"self": own} if by_source else own)
    trainer = ImportanceWeightedSFTTrainer(
        tiny_model, args, train_dataset=rewritten(tokenizer), processing_class=tokenizer
    )
    with pytest.raises(ValueError, match=rf"The objective 'own' returned {what}, .* here \(4, \d+\)"):
        first_loss(trainer)


def test_a_token_without_embedding_is_told_before_the_initial_policy_is_asked(tmp_path, tiny_model, tokenizer):
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["step"])
    args = config(ImportanceWeightedSFTConfig, tmp_path, objective="iw", expert_weighting="base")
    with pytest.raises(ValueError, match="Row 0 of the train dataset .* in `input_ids`, .*resize_token_embeddings"):
        ImportanceWeightedSFTTrainer(tiny_model, args, train_dataset=demonstrations(), processing_class=larger)


def test_ids_outside_the_vocabulary_and_what_a_stream_holds(tmp_path, tiny_model, tokenizer):
    good, other = rewritten(tokenizer).select([0, 1]).to_list()
    beyond = {"completion_ids": [*other["completion_ids"], 10**6], "behavior_log_probs": []}
    missing = {"completion_ids": [5], "behavior_log_probs": [math.nan]}

    def trainer(change, streaming, **kwargs):
        data = Dataset.from_list([good, {**other, **change}])
        data = data.to_iterable_dataset() if streaming else data
        args = config(ImportanceWeightedSFTConfig, tmp_path, **kwargs)
        return ImportanceWeightedSFTTrainer(
            tiny_model, args, train_dataset=data, eval_dataset=data, processing_class=tokenizer
        )

    for scored in (True, False):  # before anything is asked of the model
        with pytest.raises(ValueError, match="Row 1 of the train dataset has token ids of up to 1000000"):
            trainer(beyond, False, precompute_behavior_log_probs=scored)
    with pytest.raises(ValueError, match="Row 1 of the eval dataset has token ids of up to 1000000"):
        trainer({}, False).evaluate(Dataset.from_list([good, {**other, **beyond}]))
    for change, message in ((beyond, "token id 1000000, but the model has"), (missing, "Row 1 has nan among")):
        with pytest.raises(ValueError, match=message):
            next(iter(trainer(change, True).get_train_dataloader()))


@pytest.mark.parametrize("settings", [{}, {"truncation_mode": "keep_end"}, {"packing": True}])
def test_rows_that_max_length_cuts_are_counted(tmp_path, tiny_model, tokenizer, settings, recwarn):
    data = rewritten(tokenizer)

    def told(max_length):
        args = config(ImportanceWeightedSFTConfig, tmp_path, **settings, max_length=max_length)
        rows = ImportanceWeightedSFTTrainer(
            tiny_model, args, train_dataset=data, processing_class=tokenizer
        ).train_dataset
        found = [str(w.message) for w in recwarn.list if "longer than max_length" in str(w.message)]
        recwarn.clear()
        return rows, found

    whole, found = told(4096)
    lengths = [n for each in whole["seq_lengths"] for n in each] if settings.get("packing") else [*map(len, whole["input_ids"])]  # fmt: skip
    assert not found and len(lengths) == len(data)
    limit = sorted(lengths)[2]
    long = sum(n > limit for n in lengths)
    _, (found,) = told(limit)
    assert found.startswith(
        f"{long} of {len(data)} rows of the train dataset are longer than max_length={limit}, the longest of {max(lengths)} tokens"
    )
    assert ("their beginning is" in found) == ("truncation_mode" in settings)


def test_rows_without_a_target_and_vllms_whole_vocabulary(tmp_path, tiny_model, tokenizer):
    def trainer(data, **kwargs):
        args = config(ImportanceWeightedSFTConfig, tmp_path, **kwargs)
        return ImportanceWeightedSFTTrainer(tiny_model, args, train_dataset=data, processing_class=tokenizer)

    for data, kwargs in (
        (demonstrations(), {"max_length": 2}),
        (rewritten(tokenizer), {"max_length": 2}),
        (Dataset.from_list([{"input_ids": [5, 6], "labels": [-100, -100]}] * 3), {"packing": True, "max_length": 64}),
    ):
        with pytest.raises(ValueError, match=f"None of the {len(data)} training rows has a token to train on within"):
            trainer(data, **kwargs)
    known = trainer(rewritten(tokenizer).map(lambda _: {"top_k": -1, "top_p": 1.0})).train_dataset[0]
    assert any(x < 0 for x in known["behavior_log_probs"])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"objective": "dtf"},
            "use one of \\['nll', 'dft', 'p_alpha', 'iw', 'iw_sequence', 'pear', 'psft', 'asft', 'eaft', 'threshold', 'topr'\\]",
        ),
        ({"objective": {"self": "iw", "friend": "nll"}}, "\\['friend'\\] is no source"),
        ({"objective": "iw_sequence", "packing": True, "packing_strategy": "wrapped"}, "cuts examples in two"),
        (
            {"objective": "iw_sequence", "packing": True, "packing_strategy": "bfd_split"},
            "'bfd_split' cuts examples in two",
        ),
        (
            {"objective": "topr", "packing": True, "packing_strategy": "wrapped"},
            "objective='topr' needs whole examples",
        ),
        ({"objective": "threshold", "tau": 0}, "tau=0; it must be above 0"),
        ({"objective": "iw_sequence", "eval_packing": True}, "eval_packing=True without packing=True"),
        ({"clip_mode": "clip"}, "use one of \\['truncate', 'mask'\\]"),
        ({"objective": "iw", "loss_type": "dft"}, "write objective='dft'"),
        ({"objective": "iw", "label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({"expert_weighting": "zero"}, "use one of"),
        ({"clip_min": 2.0, "clip_max": 1.0}, "clip_min=2.0 above clip_max=1.0"),
        ({"beta": -0.1}, "beta=-0.1; it must be at least 0"),
        ({"objective": "p_alpha", "alpha": math.nan}, "alpha=nan; it must be at least 0"),
        ({"max_length": -1}, "max_length=-1; it must be at least 1, or None"),
        ({"clip_max": -1.0}, "clip_max=-1.0; it must be above 0, .* or None for no limit"),
        ({"clip_max": 0}, "clip_max=0; it must be above 0"),
        ({"clip_min": math.nan}, "clip_min=nan; it must be at least 0"),
        ({"truncation_mode": "keep_first"}, "truncation_mode='keep_first'; use one of"),
        ({"objective": ["iw", "dft"]}, "objective=\\['iw', 'dft'\\]; use one of"),
        ({"objective": {"self": ["iw"]}}, "use one of"),
        ({"objective": '{"self": iw}'}, "write a JSON object such as"),
    ],
)
def test_config_errors_say_what_to_write(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        config(ImportanceWeightedSFTConfig, tmp_path, **kwargs)


def test_arguments_that_contradict_the_objective_are_refused(tmp_path, tiny_model, tokenizer):
    """However they are passed."""
    smoothed = config(SFTConfig, tmp_path, label_smoothing_factor=0.1)
    kwargs = {"train_dataset": demonstrations(), "processing_class": tokenizer}
    with pytest.raises(ValueError, match="You passed label_smoothing_factor=0.1"):
        DFTTrainer(tiny_model, smoothed, **kwargs)
    assert ImportanceWeightedSFTTrainer(tiny_model, smoothed, **kwargs).objective == "nll"
    args = config(ImportanceWeightedSFTConfig, tmp_path, objective="iw")
    with pytest.raises(ValueError, match="`compute_loss_func` together with objective='iw'"):
        ImportanceWeightedSFTTrainer(
            tiny_model, args, None, demonstrations(), None, tokenizer, lambda *_, **__: torch.tensor(0.0)
        )
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}], "behavior_log_probs": [-0.1]}])  # fmt: skip
    with pytest.raises(ValueError, match="no `completion_ids`: .*2\\+2"):
        ImportanceWeightedSFTTrainer(tiny_model, args, train_dataset=rows, processing_class=tokenizer)
    with pytest.raises(ValueError, match="`completion_ids` but no `prompt`"):
        rows = rows.map(lambda _: {"completion_ids": [5]})
        ImportanceWeightedSFTTrainer(tiny_model, args, train_dataset=rows, processing_class=tokenizer)


def test_rows_are_counted_of_the_training_data_only(tmp_path, tiny_model, tokenizer):
    data = rewritten(tokenizer)
    trainer = ImportanceWeightedSFTTrainer(
        tiny_model, config(ImportanceWeightedSFTConfig, tmp_path), train_dataset=data,
        eval_dataset={"train": data.select([0, 1]), "test": data.select([2])}, processing_class=tokenizer,
    )  # fmt: skip
    trainer.evaluate({"train": data.select([2])})
    assert (trainer.num_train_rows, trainer.train_sources) == (8, {"self": 3, "guided": 3, "expert": 2})


@pytest.mark.slow
def test_wandb_offline_run_holds_the_diagnostics(tmp_path, tiny_model, tokenizer, monkeypatch):
    """A real W&B file, written offline and read back."""
    import wandb

    wandb.teardown()  # it reads its environment once
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    args = config(ImportanceWeightedSFTConfig, tmp_path, report_to="wandb", run_name="test", max_steps=2)
    trainer = ImportanceWeightedSFTTrainer(
        tiny_model, args, train_dataset=rewritten(tokenizer), processing_class=tokenizer
    )
    trainer.train()
    wandb.finish()
    wandb.teardown()  # waits until the service process has written the file
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    keys = {item.key or "/".join(item.nested_key) for record in wandb_records(file) for item in record.history.item}
    assert {"train/clip_fraction", "train/weight_max", "train/entropy/self", "train/nll/expert"} <= keys
    assert {"train/nll", "train/weight", "train/ess", "train/kl", "train/log_ratio", "train/loss"} <= keys
