"""Sampling with vLLM in this process: requests go into the running engine, completions come out as they finish.

Each request is one sequence with its own seed; prefix caching makes the attempts of one prompt share its prefill.
Prompts are rendered and completions decoded here, as in every engine, so vLLM only ever sees token ids.
"""

import copy
import json
import os
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from itertools import chain
from typing import Any

from ..data.turns import stop_token_ids
from .loading import load_processing_class, warn_of_slow_bfloat16
from .provenance import adapted_revision, checkpoint_digest, hub_commit, local_directory
from .sampler import (
    LONGEST_BLOCK,
    Completion,
    Request,
    Sampler,
    SamplerError,
    cannot_draw_hinted,
    drawn_completion,
    prompt_ids,
)


class VLLMSampler(Sampler):
    """
    A [`Sampler`] on a vLLM engine in this process.

    Args:
        model (`str`): Hub id or local directory.
        processing_class (`PreTrainedTokenizerBase`, *optional*): Tokenizer with a chat template; by default the
            model's.
        adapter (`str`, *optional*): LoRA adapter (Hub id or local directory) to sample with; rows then carry its name.
        **engine_kwargs: vLLM's engine arguments: `dtype` (vLLM casts float32 checkpoints to 16 bits unless told
            `"float32"`), `revision`, `tensor_parallel_size`, `gpu_memory_utilization`, `max_model_len`,
            `max_num_seqs`, …

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
        import psutil  # installed with vLLM
        from vllm import LLM, EngineArgs
        from vllm.platforms import current_platform

        unknown = engine_kwargs.keys() - EngineArgs.__dataclass_fields__.keys()
        if unknown:
            raise ValueError(
                f"You passed {sorted(unknown)}, which vLLM's engine does not know; see `vllm serve --help`."
            )
        if adapter is not None:
            engine_kwargs |= lora_engine_kwargs(adapter)
        if current_platform.is_cpu():
            # A seeded prompt that is prefilled in two steps ends the CPU engine ("CPU Generator does not use offset").
            engine_kwargs.setdefault("enable_chunked_prefill", False)
            if engine_kwargs.get("enable_lora"):
                # In a batch with adapters, vLLM gives a request without one the adapter of the last slot, so there
                # must be one slot more, left empty.
                engine_kwargs.setdefault("max_loras", 2)
            engine_kwargs |= cpu_memory(engine_kwargs, psutil.virtual_memory())
            warn_of_slow_bfloat16(EngineArgs(model, **engine_kwargs).create_model_config().dtype)
        print(f"vLLM is starting with {model}, which takes a minute or more", file=sys.stderr, flush=True)  # noqa: T201
        began = time.monotonic()
        # raw: the model's own log-probs, before temperature, top_p and top_k
        self.llm = LLM(model, **{"enable_prefix_caching": True, **engine_kwargs, "logprobs_mode": "raw_logprobs"})
        print(f"vLLM is ready after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)  # noqa: T201
        self.engine = self.llm.llm_engine
        config = self.engine.vllm_config
        commit = hub_commit(model, engine_kwargs.get("revision"))
        self.name, self.revision, self._lora = model, commit or checkpoint_digest(local_directory(model)), None
        self.context = config.model_config.max_model_len
        declared = config.model_config.try_get_generation_config().get("eos_token_id")
        self.stop_token_ids = stop_token_ids(self.processing_class, declared)
        # Twice as many requests as slots are accepted, so that no slot is idle while finished completions are verified
        # ...
        self.slots = config.scheduler_config.max_num_seqs
        self.capacity = 2 * self.slots
        # ... and they enter the engine when its own queue is this short, many at a time: tokenizing a prompt between
        # two engine steps takes more than twice as long as tokenizing many in a row (caches).
        self._low = self.slots + self.slots // 4
        self._adapters: dict[str, int] = {}
        # Several samplers may share an engine: which requests wait, which are in it, and which sampler each belongs
        # to.
        self._waiting: dict[str, tuple[VLLMSampler, Request]] = {}
        self._owners: dict[str, tuple[VLLMSampler, Request]] = {}
        self._encoded: tuple[list, list[int] | Completion] = [], []  # the last prompt and its token ids
        self._done: list[Completion] = []
        self._scored: dict[str, Any] = {}  # by name: what `token_log_probs` waits for, `None` until it is there
        self._drawn = 0  # tokens of requests that are finished or aborted
        self._shared = False
        if adapter is not None:
            self._adapt(adapter)

    def with_adapter(self, adapter: str) -> "VLLMSampler":
        """
        A sampler on the same engine that draws with a LoRA `adapter`; the engine ends with this one's `close`.

        Raises:
            ValueError: The engine was started without [`lora_engine_kwargs`].
        """
        other = copy.copy(self)
        other._done, other._shared, other._drawn = [], True, 0
        other._adapt(adapter)
        return other

    def _adapt(self, adapter: str) -> None:
        from vllm.lora.request import LoRARequest
        from vllm.platforms import current_platform

        if self.engine.vllm_config.lora_config is None:
            needed = ", ".join(f"{name}={value}" for name, value in lora_engine_kwargs(adapter).items())
            raise ValueError(
                f"This engine was started without LoRA: pass {needed} to VLLMSampler, then add {adapter!r}."
            )
        if self._lora is not None:
            raise ValueError(f"You passed adapter={adapter!r} to a sampler that draws with {self.name} already.")
        # vLLM takes two adapters with one id for the same.
        number = self._adapters.get(adapter, len(self._adapters) + 1)
        slots = self.engine.vllm_config.lora_config.max_loras
        if current_platform.is_cpu() and number >= slots:
            raise ValueError(
                f"You passed adapter={adapter!r} as the {number}. one on this engine, whose {slots} slots must hold all of them and an empty one for "
                f"requests without (vLLM's CPU build). Pass max_loras={number + 1} to VLLMSampler."
            )
        self._lora = LoRARequest(adapter, number, str(local_directory(adapter)))
        self._adapters[adapter] = number
        self.name, self.revision = adapter, adapted_revision(self.revision, adapter)

    def renew_adapter(self, directory: str) -> None:
        """
        Draws with the LoRA adapter in `directory` from now on, and with none before it any more, also where the one
        before was in the same directory: vLLM caches prefixes by an adapter's name, and each has another.
        """
        from vllm.lora.request import LoRARequest

        number = 1 + max(self._adapters.values(), default=0)
        name = f"{directory}#{number}"
        before, self._lora = self._lora, LoRARequest(name, number, directory)
        if before is not None:
            del self._adapters[before.lora_name]
            self.engine.remove_lora(before.lora_int_id)
        self._adapters[name] = number

    def reload_weights(self, named_tensors) -> None:
        """
        Draws with these weights from now on; the engine must be in this process.

        Args:
            named_tensors (`Iterable[tuple[str, torch.Tensor]]`): All weights of the model, under the names that its
                checkpoint has.
        """
        from vllm.platforms import current_platform

        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(named_tensors)})
        if current_platform.is_cpu():
            self.llm.apply_model(_pack_heads)
        self.llm.reset_prefix_cache()

    def submit(self, request: Request) -> None:
        if request.unhinted_prompt is not None:
            raise cannot_draw_hinted(repr(self))
        self._waiting[request.id] = self, request

    def _add_requests(self) -> None:
        """Gives the engine all that waits, when it has little to go on with."""
        if len(self._owners) > self._low or not self._waiting:
            return
        for owner, request in self._waiting.values():
            prompt, params = owner.vllm_request(request)
            if isinstance(prompt, Completion):
                owner._done.append(prompt)
            else:
                self._owners[request.id] = owner, request
                self.engine.add_request(request.id, prompt, params, lora_request=owner._lora)
        self._waiting.clear()

    def vllm_request(self, request: Request) -> tuple[dict | Completion, Any]:
        """The prompt (or why there is none) and the `vllm.SamplingParams` with which vLLM draws what is asked for."""
        from vllm import SamplingParams
        from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind

        asked = [request.prompt, request.chat_template_kwargs]
        if asked != self._encoded[0]:  # otherwise it is another attempt at the same problem
            self._encoded = asked, prompt_ids(self.processing_class, request, self.context)
        ids = self._encoded[1]
        prompt = (
            replace(ids, id=request.id)
            if isinstance(ids, Completion)
            else {"type": "token", "prompt_token_ids": [*ids]}
        )
        params, most = request.params, request.params.max_repeats
        repeats = RepetitionDetectionParams(max_pattern_size=LONGEST_BLOCK, min_count=most) if most else None
        return prompt, SamplingParams(
            temperature=params.temperature, top_p=params.top_p, top_k=params.top_k, max_tokens=params.max_completion_length, seed=request.seed,
            min_p=params.min_p, repetition_penalty=params.repetition_penalty, stop=[*params.stop], detokenize=bool(params.stop),
            stop_token_ids=[*self.stop_token_ids], logprobs=0, flat_logprobs=True, skip_special_tokens=False, output_kind=RequestOutputKind.FINAL_ONLY,
            repetition_detection=repeats,
        )  # fmt: skip

    def poll(self) -> list[Completion]:
        while True:
            self._add_requests()
            if self._done or not self._under_way() or self.over():
                finished, self._done = self._done, []
                return finished
            self._step()

    def _step(self) -> None:
        try:
            outputs = self.engine.step()
        except Exception as error:
            raise SamplerError(f"the vLLM engine stopped: {type(error).__name__}: {error}") from error
        for output in outputs:
            if output.finished and output.request_id in self._scored:
                self._scored[output.request_id] = output.prompt_logprobs
            elif output.finished and (found := self._owners.pop(output.request_id, None)):
                owner, request = found
                owner._done.append(self._completion(output, request.params.stop))
                owner._drawn += len(output.outputs[0].token_ids)

    def token_log_probs(self, pairs: list[tuple[list[int], list[int]]]) -> list[list[float] | None]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)  # fmt: skip
        fits = {f"score/{i}": [*prompt, *target] for i, (prompt, target) in enumerate(pairs)}
        fits = {name: ids for name, ids in fits.items() if len(ids) < self.context}  # vLLM draws a token behind them
        self._scored.update(dict.fromkeys(fits))
        try:
            for name, ids in fits.items():
                prompt = {"type": "token", "prompt_token_ids": ids}
                self.engine.add_request(name, prompt, params, lora_request=self._lora)  # type: ignore[arg-type]
            while any(self._scored[name] is None for name in fits):
                self._step()
            # Of each position its own token's, the first position's being unknown.
            scored = {
                name: [of[i].logprob for of, i in zip(self._scored[name][1:], ids[1:], strict=True)]
                for name, ids in fits.items()
            }
        finally:
            self._scored.clear()
        return [
            (scored[name][-len(target) :] if target else []) if (name := f"score/{i}") in fits else None
            for i, (_, target) in enumerate(pairs)
        ]

    def _under_way(self) -> bool:
        return any(owner is self for owner, _ in chain(self._owners.values(), self._waiting.values()))

    def _under_way_tokens(self) -> dict[str, int]:
        """
        How many tokens the engine has drawn of each request of this sampler, as far as they have come out of its
        process.
        """
        states = list(
            self.engine.output_processor.request_states.values()
        )  # copied in one step, because another thread may call this
        drawn = {getattr(s, "external_req_id", s.request_id): s.detokenizer.num_output_tokens() for s in states}
        return {name: tokens for name, tokens in drawn.items() if self._owners.get(name, (None,))[0] is self}

    @property
    def drawn_tokens(self) -> int:
        """Tokens drawn so far, those of requests under way and of aborted ones included."""
        return self._drawn + sum(self._under_way_tokens().values())

    def abort(self, request_id: str) -> int:
        drawn = sum(
            len(c.completion_ids) for c in self._done if c.id == request_id
        )  # finished, but not returned by `poll` yet
        self._done = [c for c in self._done if c.id != request_id]
        self._waiting.pop(request_id, None)
        if request_id in self._owners:
            drawn = self._under_way_tokens().get(request_id, 0)
            self._drawn += drawn
            del self._owners[request_id]
            self.engine.abort_request([request_id])
        return drawn

    def close(self) -> None:
        if self._shared:
            return
        self.engine.engine_core.shutdown()
        del self.llm, self.engine

    def _completion(self, output, stop: tuple[str, ...]) -> Completion:
        drawn = output.outputs[0]
        ids, log_probs = list(drawn.token_ids), list(drawn.logprobs.logprobs)
        reason = {"repetition": "length"}.get(drawn.finish_reason, drawn.finish_reason)
        if reason not in ("stop", "length"):
            return Completion(output.request_id, "", [], [], "error", f"vLLM ended it: {drawn.finish_reason}")
        return drawn_completion(
            output.request_id, ids, log_probs, reason, self.processing_class, self.stop_token_ids, stop
        )


def _pack_heads(model) -> None:
    """
    vLLM's CPU build multiplies with a copy of the LM head that it has packed when it loaded the model, and does not
    pack anew where the head is tied to the embeddings.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def cpu_memory(engine_kwargs: dict[str, Any], memory) -> dict[str, float]:
    """
    The share of this machine's memory that vLLM's CPU build may take, weights included, which is said; nothing where
    the user chose its size. Its own default is a share of all memory, free or not, and where less is free the engine
    ends with a hundred lines.

    Args:
        memory: `total` and `available` bytes, as of `psutil.virtual_memory()`.

    Raises:
        ValueError: The user chose a share that is not free.
    """
    free, given = memory.available / memory.total, engine_kwargs.get("gpu_memory_utilization")
    sized = engine_kwargs.get("kv_cache_memory_bytes") is not None or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    if sized:
        return {}
    share = int(80 * free) / 100  # the rest is left for this process and for other programs
    gib = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB are free"
    if given is not None:
        if given > free:
            raise ValueError(
                f"You passed gpu_memory_utilization={given}, which on a CPU is vLLM's share of this machine's memory, but only {gib}. Pass at "
                f"most {share}, or leave it out."
            )
        return {}
    print(  # noqa: T201
        f"vLLM may take {share * memory.total / 2**30:.1f} GiB for weights and cache (gpu_memory_utilization={share}: {gib})",
        file=sys.stderr,
    )
    return {"gpu_memory_utilization": max(share, 0.01)}


_LORA_RANKS = (8, 16, 32, 64, 128, 256, 512)  # vLLM takes a `max_lora_rank` of these only


def lora_engine_kwargs(adapter: str) -> dict[str, Any]:
    """The engine arguments without which a [`VLLMSampler`] cannot sample with a LoRA `adapter`."""
    rank = json.loads((local_directory(adapter) / "adapter_config.json").read_text())["r"]
    return {"enable_lora": True, "max_lora_rank": next(r for r in _LORA_RANKS if r >= rank)}
