"""Shared pieces: no network, a tiny model made from a config, and the tokenizer that is shipped with the quickstart."""

import os
import sys
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on a busy box wait for each other: 60 x slower, measured

import pytest  # noqa: E402


ROOT = Path(__file__).parents[1]
POLICY = str(ROOT / "examples" / "quickstart_policy")
sys.path.insert(0, str(ROOT / "examples"))


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(POLICY)


@pytest.fixture
def tiny_model(tokenizer):
    """A random 2-layer Qwen2 in float32: a fresh copy for each test, always the same weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.3,
    )
    return Qwen2ForCausalLM(config)
