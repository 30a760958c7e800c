"""The engines that draw from a model while it is trained."""

import contextlib
import json
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import ensure_master_addr_port

from ..sampling.log_probs import causal_lm
from ..sampling.openai_sampler import OpenAISampler
from ..sampling.provenance import hub_commit, weights_digest
from ..sampling.sampler import Sampler
from ..sampling.transformers_sampler import TransformersSampler
from ..sampling.vllm_sampler import VLLMSampler, lora_engine_kwargs


class TrainedModel:
    """
    The model that `trainer` trains, drawn from with `transformers`.

    Args:
        trainer ([`OnlineRewriteSFTTrainer`]): Its model, in evaluation mode while it draws, is left as it was found.
        given (`str` or `PreTrainedModel`): The model as the trainer was given it: rows carry its name.
    """

    def __init__(self, trainer, given):
        self.trainer = trainer
        options = {} if (size := trainer.args.sampling_batch_size) is None else {"batch_size": size}
        self.sampler: Sampler = TransformersSampler(causal_lm(trainer.model), trainer._tokenizer, **options)
        if isinstance(given, str):
            revision = (trainer.args.model_init_kwargs or {}).get("revision")
            self.sampler.name = given
            self.sampler.revision = hub_commit(given, revision) or self.sampler.revision

    def renew(self, version: int) -> None:
        """Every process calls this before it draws: from now on with the weights after `version` optimizer steps."""
        if version:
            self.sampler.revision = weights_digest(causal_lm(self.trainer.model).named_parameters())

    @contextlib.contextmanager
    def drawing(self) -> Iterator[Sampler]:
        """The sampler, ready to draw."""
        trainer = self.trainer
        with (
            unwrap_model_for_generation(
                trainer.model_wrapped,
                trainer.accelerator,
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
            ),
            trainer.accelerator.autocast(),
        ):
            yield self.sampler


class ColocatedEngine:
    """
    vLLM in the process of the training, on the weights of the model as it is: a LoRA adapter is written to a directory
    of its own for each version; other weights are handed over (TRL's `sync_weights` does not know the packed weights
    of vLLM's CPU build).

    Args:
        trainer ([`OnlineRewriteSFTTrainer`]): Its model must be one that vLLM can load by its name.
        given (`str` or `PreTrainedModel`): The model as the trainer was given it.
    """

    def __init__(self, trainer, given):
        self.trainer, args = trainer, trainer.args
        name = given if isinstance(given, str) else causal_lm(given).config._name_or_path
        self.adapters = trainer.drawn_rows.directory / f"adapter-{args.process_index}"
        options = {
            "dtype": "bfloat16"
            if args.bf16
            else "float16"
            if args.fp16
            else str(trainer.model.dtype).removeprefix("torch."),
            "max_model_len": args.vllm_max_model_length,
            "max_num_seqs": args.sampling_batch_size,
            "trust_remote_code": args.trust_remote_code,
            # In this process, beside the other processes of the training.
            "distributed_executor_backend": "external_launcher",
            "seed": args.process_index,
            "gpu_memory_utilization": args.vllm_gpu_memory_utilization if torch.cuda.is_available() else None,
            "revision": (args.model_init_kwargs or {}).get("revision"),
        }
        if is_peft_model(trainer.model):
            options |= lora_engine_kwargs(self._write_adapter(0))
        given_options = {k: v for k, v in options.items() if v is not None} | (args.vllm_engine_kwargs or {})
        # As `trl.generation.VLLMGeneration` sets them; vLLM reads them.
        os.environ |= {
            "RANK": str(args.process_index),
            "LOCAL_RANK": str(args.local_process_index),
            "WORLD_SIZE": str(trainer.accelerator.num_processes),
        }
        ensure_master_addr_port()
        with torch.random.fork_rng():  # it seeds them
            self.sampler = VLLMSampler(name, trainer._tokenizer, **given_options)

    def _write_adapter(self, version: int) -> str:
        return write_adapter(self.trainer.model, self.adapters, version)

    def renew(self, version: int) -> None:
        """Every process calls this before it draws: from now on with the weights after `version` optimizer steps."""
        model = self.trainer.model
        if is_peft_model(model):
            self.sampler.renew_adapter(self._write_adapter(version))
        else:
            self.sampler.reload_weights((name, p.detach()) for name, p in model.named_parameters())
        if version:
            self.sampler.revision = weights_digest(model.named_parameters())

    @contextlib.contextmanager
    def drawing(self) -> Iterator[Sampler]:
        """The sampler, ready to draw."""
        yield self.sampler


class ServedEngine:
    """
    A `vllm serve` that is given the LoRA adapter that is trained, under a new name for each version: it reads an
    adapter whose name it knows at every request again, and keeps the prefixes of the one before. Started with

        VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora --max-lora-rank RANK --max-loras 2

    where it sees the directory of the training.

    Args:
        trainer ([`OnlineRewriteSFTTrainer`]): It trains an adapter.
        given (`str` or `PreTrainedModel`): The model as the trainer was given it: the server has it under this name.

    Raises:
        SamplerError: The server does not answer.
        ValueError: It does not serve the model, or takes no adapters.
    """

    def __init__(self, trainer, given):
        self.trainer, self.url = trainer, f"{trainer.args.vllm_server_base_url.rstrip('/').removesuffix('/v1')}/v1"
        self.adapters = (trainer.drawn_rows.directory / "adapter").absolute()
        self.model = given if isinstance(given, str) else causal_lm(given).config._name_or_path
        self.sampler: Sampler = self._sampler(self.model)
        self.sampler.revision = weights_digest(causal_lm(trainer.model).named_parameters())
        self.loaded: str | None = None

    def _sampler(self, served_model_name: str) -> OpenAISampler:
        size = self.trainer.args.sampling_batch_size
        options = {} if size is None else {"batch_size": size}
        return OpenAISampler(self.model, self.url, self.trainer._tokenizer, served_model_name, **options)

    def renew(self, version: int) -> None:
        """Every process calls this before it draws: from now on with the weights after `version` optimizer steps."""
        revision = weights_digest(self.trainer.model.named_parameters())
        name, before, self.loaded = f"online-{revision}", self.loaded, f"online-{revision}"
        if name != before and self.trainer.accelerator.is_main_process:
            directory = write_adapter(self.trainer.model, self.adapters, version)
            # A training that was stopped may have left these weights under this name, which no other adapter may take.
            for known in {before, name} - {None}:
                self._ask("unload_lora_adapter", lora_name=known)
            self._ask("load_lora_adapter", lora_name=name, lora_path=directory)
        self.trainer.accelerator.wait_for_everyone()
        self.sampler.close()
        self.sampler = self._sampler(name)
        self.sampler.revision = revision

    @contextlib.contextmanager
    def drawing(self) -> Iterator[Sampler]:
        """The sampler, ready to draw."""
        yield self.sampler

    def _ask(self, what: str, **content: str) -> None:
        headers = {
            "Content-Type": "application/json",
            "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '').strip() or 'EMPTY'}",
        }
        request = urllib.request.Request(f"{self.url}/{what}", json.dumps(content).encode(), headers)
        try:
            urllib.request.urlopen(request, timeout=600).close()
        except urllib.error.HTTPError as error:
            if what == "unload_lora_adapter" and error.code == 404:
                return  # it is not there
            said = error.read().decode(errors="replace")
            raise ValueError(
                f"{request.full_url} says {error.code} to {content}: {said:.500} Start the server with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and "
                "--enable-lora, where it sees that directory."
            ) from error


def write_adapter(model, directory: Path, version: int) -> str:
    """Writes the adapter of a version of the policy, and removes the one before it; the directory that it is in."""
    for earlier in directory.glob("*"):
        shutil.rmtree(earlier)
    model.save_pretrained(directory / str(version))
    return str(directory / str(version))
