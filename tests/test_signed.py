"""Learning from rows that were judged right and wrong, and from tokens to which the model gives hardly any probability."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from training import config, demonstrations, first_loss, rewritten, train, with_own_log_probs

from trl_offpolicy import ImportanceWeightedSFTConfig, ImportanceWeightedSFTTrainer
from trl_offpolicy.trainer.losses import pear_weights, topr_weights


def signed(model, tokenizer, num_rows=8):
    """Rows of `self` with log μ of `model`; every third one is right."""
    sampled = rewritten(tokenizer, 2 * num_rows).filter(lambda row: row["source"] != "expert").select(range(num_rows))
    judged = sampled.map(lambda _, i: {"source": "self", "reward": -1.0 if i % 3 else 1.0}, with_indices=True)
    return judged.map(with_own_log_probs(model, tokenizer))


def trainer_of(model, tokenizer, tmp_path, data, **settings):
    args = config(ImportanceWeightedSFTConfig, tmp_path, **{"objective": "topr", "optim": "sgd", **settings})
    return ImportanceWeightedSFTTrainer(copy.deepcopy(model), args, train_dataset=data, processing_class=tokenizer)


def weights_after(trainer):
    train(trainer)
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_topr_divides_by_an_examples_length_however_a_step_is_cut(tmp_path, tiny_model, tokenizer):
    """One step on four rows of different lengths: the mean over rows of each row's own mean, in one micro-batch, two or four."""
    data, settings = signed(tiny_model, tokenizer, 4), {"max_steps": 1, "learning_rate": 0.5, "max_grad_norm": 1e9}
    reference = copy.deepcopy(tiny_model)
    loss = 0.0
    for row in data:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        ids = row["completion_ids"]
        log_p = reference(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        loss = loss - row["reward"] * log_p[range(len(ids)), ids].mean() / 4  # π = μ: every ratio is 1
    loss.backward()
    with torch.no_grad():
        expected = torch.cat([(p - 0.5 * p.grad).flatten() for p in reference.parameters()])
    assert len({len(ids) for ids in data["completion_ids"]}) > 1
    for size, layout in ((4, {}), (2, {}), (1, {}), (2, {"padding_free": True, "max_length": None})):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, **layout}
        trained = weights_after(trainer_of(tiny_model, tokenizer, tmp_path, data, **settings, **cut))
        torch.testing.assert_close(trained, expected, atol=1e-6, rtol=1e-5)


def test_positive_rows_alone_are_plain_sft(tmp_path, tiny_model, tokenizer):
    """A row a step, since SFT weighs the rows of a step by their lengths; and μ need not be known."""
    rows = demonstrations(4).map(lambda _: {"reward": 0.5})
    one = {"per_device_train_batch_size": 1, "max_steps": 4}
    topr, nll = (
        weights_after(trainer_of(tiny_model, tokenizer, tmp_path, rows, objective=objective, **one))
        for objective in ("topr", "nll")
    )
    torch.testing.assert_close(topr, nll, atol=1e-7, rtol=1e-6)


def test_a_wrong_row_loses_its_weight_as_it_becomes_unlikely_and_reinforce_diverges():
    """Five tokens, one of them drawn and wrong: gradient descent on both losses from the same start."""

    def descend(tapered):
        logits = torch.zeros(5, requires_grad=True)
        mu, path, weights = torch.log_softmax(torch.zeros(1, 5), -1)[:, :1], [], []
        for _ in range(600):
            log_pi = torch.log_softmax(logits, -1)[None, :1]
            known = {"log_probs": log_pi.detach(), "behavior_log_probs": mu, "reward": torch.full((1, 1), -1.0)}
            known |= {"mask": torch.ones(1, 1), "segment_ids": torch.zeros(1, 1, dtype=torch.long), "mean_length": 1.0}
            weight = topr_weights(**known) if tapered else torch.full((1, 1), -1.0)
            (gradient,) = torch.autograd.grad(-(weight * log_pi).sum(), logits)
            with torch.no_grad():
                logits -= 0.5 * gradient
            path.append(log_pi.item())
            weights.append(weight.item())
        return path, weights

    path, weights = descend(tapered=True)
    assert all(-1 <= a < b < 0 for a, b in zip(weights, weights[1:], strict=False)) and weights[-1] > -0.02
    plain, _ = descend(tapered=False)
    fall, plain_fall = (p[300] - p[-1] for p in (path, plain))
    assert fall < 1 and plain_fall > 100 and plain[-1] < -200 < path[-1], (path[-1], plain[-1])


def test_pears_suffix_is_that_of_its_own_example():
    """Three examples in one row, one of a token; a number that can be checked by hand."""
    log_pi = torch.tensor([[-1.0, -1.0, -1.0, -2.0, -1.0, -3.0]])
    mu = torch.tensor([[-1.1, -1.2, -1.05, -1.0, math.nan, math.nan]])
    known = {"segment_ids": torch.tensor([[0, 0, 0, 1, 2, 2]]), "mask": torch.tensor([[1, 1, 1, 1, 1, 1]])}
    weights = pear_weights(log_probs=log_pi, behavior_log_probs=mu, gamma=0.5, **known)
    expected = [[0.25 * math.exp(0.25), 0.5 * math.exp(0.05), 1.0, 1.0, 1.0, 1.0]]
    torch.testing.assert_close(weights, torch.tensor(expected))


@pytest.mark.parametrize("streaming", [False, True])
def test_rewards_and_objectives_that_do_not_go_together_are_refused(tmp_path, tiny_model, tokenizer, streaming):
    data = signed(tiny_model, tokenizer, 3)

    def first_batch(rows, **settings):
        rows = rows.to_iterable_dataset() if streaming else rows
        return next(iter(trainer_of(tiny_model, tokenizer, tmp_path, rows, **settings).get_train_dataloader()))

    for objective in ("nll", "iw", {"expert": "topr"}, {"self": "dft", "expert": "topr"}):
        named = objective if isinstance(objective, str) else objective.get("self", "nll")
        with pytest.raises(ValueError, match=f"Row 1 has the reward -1.0, and objective='{named}' does not look at"):
            first_batch(data, objective=objective)
    for rows in (demonstrations(), data.remove_columns("reward"), data.map(lambda _: {"reward": 0.0})):
        with pytest.raises(
            ValueError, match="Row 0 has (no reward|the reward 0), and objective='topr' needs one above 0"
        ):
            first_batch(rows)
    with pytest.raises(ValueError, match="Row 1 has the reward -1.0 but no `behavior_log_probs`"):
        first_batch(data.remove_columns("behavior_log_probs"))
    with pytest.raises(ValueError, match="Row 0 has reward='good', which is no finite number"):
        first_batch(data.map(lambda _: {"reward": "good"}))
    assert "reward" in first_batch(data, objective={"self": "topr"})
    assert (first_batch(data.filter(lambda row: row["reward"] > 0), objective="iw")["reward"] != -1).all()


def test_what_was_prepared_for_topr_is_refused_by_others_and_an_evaluation_needs_rewards(
    tmp_path, tiny_model, tokenizer
):
    data = signed(tiny_model, tokenizer, 4)
    trainer = trainer_of(tiny_model, tokenizer, tmp_path, data)
    again = trainer_of(tiny_model, tokenizer, tmp_path, trainer.train_dataset)
    assert first_loss(again) == pytest.approx(first_loss(trainer), abs=1e-6)
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(trainer.evaluate(trainer.train_dataset)["eval_loss"])
    with pytest.raises(ValueError, match="objective='topr' needs one above 0"):
        trainer.evaluate(demonstrations())
    with pytest.raises(ValueError, match="prepared for an objective that takes rewards, and some are below 0"):
        first_loss(trainer_of(tiny_model, tokenizer, tmp_path, trainer.train_dataset, objective="nll"))
    without = trainer_of(tiny_model, tokenizer, tmp_path, data.remove_columns("reward"), objective="nll").train_dataset
    with pytest.raises(ValueError, match="token is nan under objective='topr'.* and topr a reward"):
        first_loss(trainer_of(tiny_model, tokenizer, tmp_path, without))


def test_a_base_model_learns_to_end_its_turn_only_with_a_floor(tmp_path, tiny_model, tokenizer):
    """Trained on texts that go on, it gives the end of a turn no probability; DFT then never teaches it, and says so."""
    rows = rewritten(tokenizer, 6).filter(lambda row: row["completion_ids"])
    endless = rows.map(lambda row: {"completion_ids": row["completion_ids"][:-1], "behavior_log_probs": []})
    settings = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 15, "per_device_train_batch_size": 4}
    base = trainer_of(tiny_model, tokenizer, tmp_path, endless, objective="nll", **settings)
    train(base)
    base.model.eval()

    def after_dft(**floor):
        trainer = trainer_of(base.model, tokenizer, tmp_path, rows, objective="dft", **settings, **floor)
        _, history = train(trainer)
        return trainer.evaluate(rows), history

    with pytest.warns(UserWarning, match="end of a turn has a weight of .* write clip_min=0.1"):
        without, history = after_dft()
    floored, history_with = after_dft(clip_min=0.1)
    assert history[0]["weight/end_of_turn"] < 0.01 and history_with[0]["weight/end_of_turn"] == pytest.approx(0.1)
    ends, ends_with = (math.exp(-metrics["eval_nll/end_of_turn"]) for metrics in (without, floored))
    assert ends < 0.05 and ends_with > 0.9, (ends, ends_with)


def test_the_card_says_what_was_unlearned(tmp_path, tiny_model, tokenizer):
    trainer = trainer_of(
        tiny_model, tokenizer, tmp_path, Dataset.from_list(signed(tiny_model, tokenizer, 6).to_list())
    )
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "4 of the rows have a reward below 0" in text and "| `topr` | 1 where the reward is above 0" in text
    assert "leroux2025tapered" in text
