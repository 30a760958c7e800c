"""The model card: what it says is what was trained, and nothing is made up."""

import json
import re

from conftest import POLICY
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from test_trainers import config, demonstrations, rewritten

from trl_offpolicy import DFTConfig, DFTTrainer, ImportanceWeightedSFTConfig, ImportanceWeightedSFTTrainer


def cube_root(log_probs, **_):
    """the cube root of π"""
    return (log_probs / 3).exp()


def test_card_says_what_was_trained(tmp_path, tokenizer):
    objective = {"self": "iw", "guided": cube_root, "expert": "asft"}
    args = config(
        ImportanceWeightedSFTConfig, tmp_path / "out", objective=objective, clip_max=2.5, beta=0.07, eval_strategy="steps", eval_steps=3,
        save_strategy="steps", save_steps=3,
    )  # fmt: skip
    evaluation = {"own": rewritten(tokenizer), "expert": demonstrations()}
    trainer = ImportanceWeightedSFTTrainer(
        POLICY, args, train_dataset=rewritten(tokenizer, 9), eval_dataset=evaluation, processing_class=tokenizer, peft_config=LoraConfig(r=4),
    )  # fmt: skip
    trainer.train()
    written = ModelCard.load(tmp_path / "out" / "README.md")  # by the checkpoint
    assert "2509.15157" in written.text
    trainer.create_model_card(model_name="mine", dataset_name="me/rewritten", tags="maths")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    data = card.data.to_dict()
    assert data["datasets"] == ["me/rewritten"] and data["library_name"] == "peft"
    assert {"maths", "trl", "importance-weighted-sft"} <= set(data["tags"])
    assert not {"base_model", "license", "licence"} & set(
        data
    )  # the base is a local directory; nobody told us a licence
    logged = trainer.state.log_history[-1] | trainer.state.log_history[-2] | trainer.state.log_history[-3]
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    for name in evaluation:
        for metric in ("loss", "nll", "mean_token_accuracy"):
            assert abs(results[name, metric] - logged[f"eval_{name}_{metric}"]) < 1e-6
    text = card.text
    assert "None]" not in text and "| self | 3 | 33.3 % |" in text and "quickstart_policy` (local)" in text
    for row in (
        "| self | `iw` | π(y_t)/μ(y_t)",
        "| guided | `cube_root` | the cube root of π |",
        "| expert | `asft` | π(y_t), and beta·KL",
    ):
        assert row in text  # fmt: skip
    assert "`clip_max=2.5`" in text and "`beta=0.07`" in text and "LORA, r 4" in text and "epsilon_high" not in text
    entries = re.findall(r"@\w+\{(\w+),", text)
    assert entries == ["zhao2025mind", "zhu2025anchored", "vonwerra2020trl"] and text.count("{") == text.count("}")
    saved = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert saved["global_step"] == 3


def test_card_of_a_plain_run(tmp_path, tiny_model, tokenizer):
    """No sources, no data set's name, no evaluation, no adapter: the card leaves out what it does not know."""
    data = Dataset.from_list(demonstrations().to_list())
    trainer = DFTTrainer(
        tiny_model, config(DFTConfig, tmp_path / "out"), train_dataset=data, processing_class=tokenizer
    )
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert not {"datasets", "base_model", "model-index"} & set(card.data.to_dict())
    assert "A model made in memory, fine-tuned with" in card.text and "10 rows of unknown source" in card.text
    assert "| every | `dft` | π(y_t) |" in card.text and "## Results" not in card.text and "None" not in card.text
