"""The engines that draw from a model while it is trained."""

import contextlib
import os
import shutil
from collections.abc import Iterator

import torch
from accelerate.utils import is_peft_model
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import ensure_master_addr_port

from ..sampling.log_probs import causal_lm
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

    @contextlib.contextmanager
    def drawing(self, version: int) -> Iterator[Sampler]:
        """The sampler, with the weights that the model has after `version` optimizer steps."""
        trainer = self.trainer
        with (
            unwrap_model_for_generation(
                trainer.model_wrapped,
                trainer.accelerator,
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
            ) as model,
            trainer.accelerator.autocast(),
        ):
            if version:
                self.sampler.revision = weights_digest(model.named_parameters())
            yield self.sampler


class ColocatedEngine:
    """
    vLLM in the process of the training, on the weights of the model as it is: a LoRA adapter is written to a directory
    of its own for each version, since vLLM takes an adapter of the same name for the same; other weights are handed
    over (TRL's `sync_weights` does not know the packed weights of vLLM's CPU build).

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
        directory = self.adapters / str(version)
        self.trainer.model.save_pretrained(directory)
        return str(directory)

    @contextlib.contextmanager
    def drawing(self, version: int) -> Iterator[Sampler]:
        """The sampler, with the weights that the model has after `version` optimizer steps."""
        model = self.trainer.model
        if is_peft_model(model):
            for file in self.adapters.glob("*"):
                shutil.rmtree(file)
            self.sampler.renew_adapter(self._write_adapter(version))
        else:
            self.sampler.reload_weights((name, p.detach()) for name, p in model.named_parameters())
        if version:
            self.sampler.revision = weights_digest(model.named_parameters())
        yield self.sampler
