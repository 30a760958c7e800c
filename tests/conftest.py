"""Shared pieces: no network, a tiny model made from a config, the quickstart's tokenizer, and a real vLLM server."""

import json
import multiprocessing
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
from types import SimpleNamespace


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
from filelock import FileLock  # noqa: E402


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


@pytest.fixture
def command(capsys):
    """`command("verify", *options)`: what `trl-offpolicy verify *options` returns and prints, in this process."""
    from trl_offpolicy.cli import main

    def run(*argv):
        capsys.readouterr()
        returncode = main([str(arg) for arg in argv])
        stdout, stderr = capsys.readouterr()
        return SimpleNamespace(returncode=returncode, stdout=stdout, stderr=stderr)

    return run


@pytest.fixture(autouse=True)
def process_group(monkeypatch):
    """The end of a training in this process leaves the process group that vLLM's engines in it share, or none could be started after it."""
    if "vllm" in sys.modules:
        monkeypatch.setattr("accelerate.PartialState.destroy_process_group", lambda self, group=None: None)


# The processes of a test are forked from one that has imported this once, instead of importing it again each time.
IMPORTED = (
    "rewriting.rewriter",
    "evaluation.evaluate",
    "trainer.importance_weighted_sft_trainer",
    "agent.rewriting_agent_trainer",
    "online.online_trainer",
    "sampling.transformers_sampler",
)
multiprocessing.get_context("forkserver").set_forkserver_preload([f"trl_offpolicy.{name}" for name in IMPORTED])


@pytest.fixture
def process(tmp_path):
    """`process(function, *args, **kwargs)` calls a module's function in a started process of its own; what it writes is in the file `log`."""
    started = []

    def start(function, *args, **kwargs):
        log = tmp_path / f"process-{len(started)}.log"
        child = multiprocessing.get_context("forkserver").Process(
            target=_logged, args=(log, function, *args), kwargs=kwargs
        )
        child.log = log
        started.append(child)
        child.start()
        return child

    yield start
    for child in started:
        child.kill()
        child.join()


def in_two_processes(function, *args):
    """What a module's function returns in each of two CPU processes (gloo), which torchrun's own launcher starts."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    }
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
        start_method="forkserver",
    )  # fmt: skip
    try:
        returned = elastic_launch(config, function)(*args)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return [returned[rank] for rank in (0, 1)]


def _logged(log, function, *args, **kwargs):
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    function(*args, **kwargs)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A fresh Hub and fresh caches; the clients read their settings at import, so they are set where they are kept."""
    from loopback_hub import TOKEN, LoopbackHub

    with LoopbackHub() as hub:
        url, home = "{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}", str(tmp_path / "hf")
        for name, value in {
            "huggingface_hub.constants.ENDPOINT": hub.endpoint,
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE": url.format(endpoint=hub.endpoint),
            "huggingface_hub.constants.HF_HUB_OFFLINE": False,
            "huggingface_hub.constants.HF_HUB_DISABLE_XET": True,
            "huggingface_hub.constants.HF_HUB_CACHE": f"{home}/hub",
            "huggingface_hub.hf_api.api.endpoint": hub.endpoint,
            "datasets.config.HF_ENDPOINT": hub.endpoint,
            "datasets.config.HF_HUB_OFFLINE": False,
            "datasets.config.HF_DATASETS_CACHE": Path(home, "datasets"),
            "transformers.utils.hub._hf_api": None,
        }.items():
            monkeypatch.setattr(name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub
        assert not hub.unrouted


VLLM_KWARGS = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder that the workers of pytest-xdist have in common; whoever makes something in it holds its lock."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def policy(shared):
    """
    The quickstart's policy with settings that would spoil every draw, which engines must not follow: in its generation config, and, as in
    base checkpoints with a chat template, an end of sequence that is not the token with which the model ends a turn (`<|im_end|>`).
    """
    directory = shared / "policy"
    spoilt = {"do_sample": True, "repetition_penalty": 5.0, "top_k": 1, "top_p": 0.1, "temperature": 0.1}
    end = {"eos_token_id": 0}
    changes = {"generation_config": spoilt | end, "config": end, "tokenizer_config": {"eos_token": "<|endoftext|>"}}
    with FileLock(shared / "policy.lock"):
        if not directory.exists():
            shutil.copytree(POLICY, directory)
            for name, change in changes.items():
                file = directory / f"{name}.json"
                file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return str(directory)


@pytest.fixture(scope="session")
def vllm_server(policy, shared):
    """
    The URL of `policy` served by a real vLLM on loopback (its module, since the CPU build's `vllm` command needs a dist named vllm). The
    first worker that wants it starts it; it ends with the session.
    """
    started = shared / "vllm.json"
    with FileLock(shared / "vllm.lock"):
        if not started.exists():
            started.write_text(json.dumps(serve_vllm(policy, shared / "vllm.log")))
    return json.loads(started.read_text())["url"]


def serve_vllm(policy, log, *options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", policy, "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20), "--no-enable-chunked-prefill", *options,
    ]  # fmt: skip
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    url, deadline = f"http://127.0.0.1:{port}/v1", time.monotonic() + 300
    try:
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{url}/models", timeout=10).close()
                return {"url": url, "group": process.pid}
            except OSError:
                time.sleep(0.2)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def pytest_sessionfinish(session):
    """Ends the server of all workers, in the process that has started them."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        started = session.config._tmp_path_factory.getbasetemp() / "vllm.json"
        if started.exists():
            os.killpg(
                json.loads(started.read_text())["group"], signal.SIGKILL
            )  # it takes its time over a clean shutdown


@pytest.fixture(scope="session")
def engine(policy, request):
    """`make(name, in_flight)`: the engine of that name, on `policy` in float32.

    vLLM engines end with the process: several in one share what closing any of them takes down. So one that is asked for again is shared.
    """
    from trl_offpolicy import OpenAISampler, TransformersSampler, VLLMSampler

    vllm, made = {}, []

    def make(name, in_flight=8, **kwargs):
        if name == "transformers":
            return TransformersSampler(policy, batch_size=in_flight)
        if name == "vllm":
            key = (in_flight, *sorted(kwargs.items()))
            if key not in vllm:
                options = {"model": policy, **VLLM_KWARGS, **kwargs}
                vllm[key] = VLLMSampler(options.pop("model"), max_num_seqs=in_flight, **options)
            return vllm[key]
        made.append(OpenAISampler(policy, request.getfixturevalue("vllm_server"), batch_size=in_flight))
        return made[-1]

    yield make
    for sampler in made:
        sampler.close()
