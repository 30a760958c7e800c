"""Sampling with vLLM in this process: requests go into the running engine, completions come out as they finish.

Each request is one sequence with its own seed; prefix caching makes the attempts of one prompt share its prefill. Prompts
are rendered and completions decoded here, as in every engine, so vLLM only ever sees token ids.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..rows import encode_prompt
from . import Completion, Request, SamplerError, beyond_context, hub_commit, load_processing_class, weights_digest


class VLLMSampler:
    """
    A [`Sampler`] on a vLLM engine in this process.

    Args:
        model (`str`): Hub id or local directory.
        processing_class (`PreTrainedTokenizerBase`, *optional*): Tokenizer with a chat template; by default the model's.
        adapter (`str`, *optional*): LoRA adapter (Hub id or local directory) to sample with; rows then carry its name.
        **engine_kwargs: vLLM's engine arguments: `dtype` (vLLM casts float32 checkpoints to 16 bits unless told `"float32"`),
            `revision`, `tensor_parallel_size`, `gpu_memory_utilization`, `max_model_len`, `max_num_seqs`, …

    Raises:
        ModuleNotFoundError: vLLM is not installed.
        ValueError: An engine argument that vLLM does not have, or a tokenizer without a chat template.
    """

    def __init__(self, model: str, processing_class=None, adapter: str | None = None, **engine_kwargs):
        if find_spec("vllm") is None:
            raise ModuleNotFoundError(
                "VLLMSampler needs vLLM, which is not installed: `pip install 'trl-offpolicy[vllm]'` (README says how on a CPU)."
            )
        shared = {k: v for k, v in engine_kwargs.items() if k in ("revision", "trust_remote_code")}
        self.processing_class = load_processing_class(model, processing_class, **shared)
        from vllm import LLM, EngineArgs
        from vllm.platforms import current_platform

        unknown = engine_kwargs.keys() - EngineArgs.__dataclass_fields__.keys()
        if unknown:
            raise ValueError(
                f"You passed {sorted(unknown)}, which vLLM's engine does not know; see `vllm serve --help`."
            )
        if current_platform.is_cpu():
            # A seeded prompt that is prefilled in two steps ends the CPU engine ("CPU Generator does not use offset").
            engine_kwargs.setdefault("enable_chunked_prefill", False)
        self.name, self._lora, adapter_revision = model, None, ""
        if adapter is not None:
            from vllm.lora.request import LoRARequest

            directory = _local(adapter)
            rank = json.loads((directory / "adapter_config.json").read_text())["r"]
            engine_kwargs |= {"enable_lora": True, "max_lora_rank": next(r for r in _LORA_RANKS if r >= rank)}
            self.name, self._lora = adapter, LoRARequest("adapter", 1, str(directory))
            adapter_revision = "+" + _checkpoint_digest(directory)
        # raw: the model's own log-probs, before temperature, top_p and top_k
        self.llm = LLM(model, **{"enable_prefix_caching": True, **engine_kwargs, "logprobs_mode": "raw_logprobs"})
        self.engine = self.llm.llm_engine
        config = self.engine.vllm_config
        commit = hub_commit(model, engine_kwargs.get("revision"))
        self.revision = (commit or _checkpoint_digest(_local(model))) + adapter_revision
        self.context = config.model_config.max_model_len
        # As many again wait in the engine's queue, so that no slot is idle while finished ones are verified.
        self.capacity = 2 * config.scheduler_config.max_num_seqs
        self._failed: list[Completion] = []

    def submit(self, request: Request) -> None:
        prompt, params = self.vllm_request(request)
        num_tokens = len(prompt["prompt_token_ids"])
        if num_tokens >= self.context:
            self._failed.append(beyond_context(request, num_tokens, self.context))
        else:
            self.engine.add_request(request.id, prompt, params, lora_request=self._lora)

    def vllm_request(self, request: Request) -> tuple[dict, Any]:
        """The prompt and the `vllm.SamplingParams` with which vLLM draws what is asked for."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        prompt = {"type": "token", "prompt_token_ids": encode_prompt(self.processing_class, request.prompt)}
        params, eos = request.params, self.processing_class.eos_token_id
        return prompt, SamplingParams(
            temperature=params.temperature, top_p=params.top_p, top_k=params.top_k, max_tokens=params.max_completion_length, seed=request.seed,
            stop_token_ids=[] if eos is None else [eos], logprobs=0, flat_logprobs=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip

    def poll(self) -> list[Completion]:
        finished, self._failed = self._failed, []
        try:
            while not finished and self.engine.has_unfinished_requests():
                finished = [self._completion(output) for output in self.engine.step() if output.finished]
        except Exception as error:
            raise SamplerError(f"the vLLM engine stopped: {type(error).__name__}: {error}") from error
        return finished

    def abort(self, request_id: str) -> None:
        self._failed = [c for c in self._failed if c.id != request_id]
        self.engine.abort_request([request_id])

    def close(self) -> None:
        self.engine.engine_core.shutdown()
        del self.llm, self.engine

    def _completion(self, output) -> Completion:
        drawn = output.outputs[0]
        ids, log_probs = list(drawn.token_ids), list(drawn.logprobs.logprobs)
        if drawn.finish_reason not in ("stop", "length"):
            return Completion(output.request_id, "", [], [], "error", f"vLLM ended it: {drawn.finish_reason}")
        text = self.processing_class.decode(ids, skip_special_tokens=True)
        return Completion(output.request_id, text, ids, log_probs, drawn.finish_reason)


_LORA_RANKS = (8, 16, 32, 64, 128, 256, 512)  # vLLM takes a `max_lora_rank` of these only


def _local(model: str) -> Path:
    """The directory of a model or adapter, fetched from the Hub if it is not one already."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model))


def _checkpoint_digest(directory: Path) -> str:
    """`weights_digest` of the files that a model in memory would have been loaded from (mapped, not read as a whole)."""
    from safetensors.torch import load_file

    return weights_digest(pair for file in directory.glob("*.safetensors") for pair in load_file(file).items())
