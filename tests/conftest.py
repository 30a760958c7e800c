"""Shared pieces: no network, a tiny model made from a config, the quickstart's tokenizer, and a real vLLM server."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on a busy box wait for each other: 60 x slower, measured
# vLLM on a CPU: the engine in this process, no core pinned, nothing compiled with g++ first, nothing reported home.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"

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


VLLM_KWARGS = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="session")
def policy(tmp_path_factory):
    """
    The quickstart's policy with settings that would spoil every draw, which engines must not follow: in its generation config, and, as in
    base checkpoints with a chat template, an end of sequence that is not the token with which the model ends a turn (`<|im_end|>`).
    """
    directory = tmp_path_factory.mktemp("policy") / "policy"
    shutil.copytree(POLICY, directory)
    spoilt = {"do_sample": True, "repetition_penalty": 5.0, "top_k": 1, "top_p": 0.1, "temperature": 0.1}
    end = {"eos_token_id": 0}
    changes = {"generation_config": spoilt | end, "config": end, "tokenizer_config": {"eos_token": "<|endoftext|>"}}
    for name, change in changes.items():
        file = directory / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return str(directory)


@pytest.fixture(scope="session")
def vllm_server(policy, tmp_path_factory):
    """The URL of `policy` served by a real vLLM on loopback (its module, since the CPU build's `vllm` command needs a dist named vllm)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", policy, "--host", "127.0.0.1", "--port", str(port),
                "--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20), "--no-enable-chunked-prefill",
            ],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}/v1"
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{url}/models", timeout=10).close()
                break
            except OSError:
                time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # it takes its time over a clean shutdown
        process.wait(60)
