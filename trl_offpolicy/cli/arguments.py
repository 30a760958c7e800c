"""What several commands share: which rows, which model, and the engine that samples it."""

import argparse
import json
from dataclasses import dataclass, field
from importlib import import_module

from trl import TrlParser


@dataclass(kw_only=True)
class EngineArguments:
    """Which model, and the engine that samples it."""

    model_name_or_path: str = field(metadata={"help": "Model: Hub id or local directory."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    dtype: str = field(default="auto", metadata={"help": "Weights' dtype: auto, bfloat16, float16 or float32."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code from the model's repository."})
    sampler: str = field(
        default="transformers",
        metadata={"help": "Engine that samples.", "choices": ["transformers", "vllm", "openai"]},
    )
    batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Completions drawn at a time: 64 with transformers, 128 at each server with openai, by default what vLLM chooses."
        },
    )
    base_url: list[str] | None = field(
        default=None,
        metadata={"help": "openai: where the model is served, one or many, e.g. http://127.0.0.1:8000/v1."},
    )
    served_model_name: str | None = field(
        default=None, metadata={"help": "openai: what the servers call the model, if not model_name_or_path."}
    )
    request_timeout: float | None = field(
        default=None, metadata={"help": "openai: seconds for one completion (default: 600)."}
    )
    give_up_after: float | None = field(
        default=None,
        metadata={"help": "openai: stop, resumably, after so many seconds without any answer (default: 300)."},
    )
    adapter: str | None = field(
        default=None, metadata={"help": "vllm: LoRA adapter to sample with, Hub id or local directory."}
    )
    tensor_parallel_size: int | None = field(default=None, metadata={"help": "vllm: GPUs that share the model."})
    gpu_memory_utilization: float | None = field(
        default=None, metadata={"help": "vllm: share of the GPU's memory it may take."}
    )
    max_model_len: int | None = field(default=None, metadata={"help": "vllm: context, if less than the model's."})
    engine_kwargs: str | None = field(
        default=None, metadata={"help": """vllm: further engine arguments as JSON, e.g. '{"quantization": "fp8"}'."""}
    )


@dataclass(kw_only=True)
class DatasetArguments:
    """Which rows."""

    dataset_name: str = field(metadata={"help": "Rows: Hub id, directory, or JSONL, JSON, CSV or Parquet file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."})
    max_rows: int | None = field(
        default=None, metadata={"help": "Only the first rows; a later run may take more of them."}
    )


# Name on the command line → (module, class).
VERIFIERS = {
    "math": ("verification", "MathVerifier"),
    "choice": ("verifiers", "MultipleChoiceVerifier"),
    "exact": ("verifiers", "ExactMatchVerifier"),
    "numeric": ("verifiers", "NumericVerifier"),
    "json": ("verifiers", "JsonSchemaVerifier"),
    "code": ("code_verifier", "CodeVerifier"),
}


@dataclass(kw_only=True)
class VerifierArguments:
    """What tells right answers from wrong ones."""

    verifier: str = field(default="math", metadata={"help": "Which verifier.", "choices": list(VERIFIERS)})
    verifier_kwargs: str = field(
        default="{}", metadata={"help": """Its arguments as JSON, for example '{"timeout": 10, "num_workers": 4}'."""}
    )


def parser_for(types, command: str, description: str, examples: str):
    return TrlParser(
        types,
        prog=f"trl-offpolicy {command}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a misspelt flag must not pass for another one
    )


def load_dataset(arguments: DatasetArguments):
    from ..rows import load_rows

    dataset = load_rows(
        arguments.dataset_name, arguments.dataset_config, arguments.dataset_split, arguments.dataset_revision
    )
    if arguments.max_rows is not None:
        if arguments.max_rows < 1:
            raise ValueError(f"You passed max_rows={arguments.max_rows}; it must be at least 1.")
        dataset = dataset.select(range(min(arguments.max_rows, len(dataset))))
    return dataset


def check_dtype(dtype: str) -> None:
    import torch

    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(
            f"You passed dtype={dtype!r}, which torch does not know: use auto, bfloat16, float16 or float32."
        )


_ENGINE_OF = {
    **dict.fromkeys(("base_url", "served_model_name", "request_timeout", "give_up_after"), "openai"),
    **dict.fromkeys(
        ("adapter", "tensor_parallel_size", "gpu_memory_utilization", "max_model_len", "engine_kwargs"), "vllm"
    ),
}


def make_sampler(arguments: EngineArguments, second_adapter: str | None = None):
    """The engine; one on which `with_adapter(second_adapter)` can be called, if that is asked for."""
    given = {name: value for name in _ENGINE_OF if (value := getattr(arguments, name)) is not None}
    for name, value in given.items():
        if _ENGINE_OF[name] != arguments.sampler:
            raise ValueError(
                f"You passed {name}={value!r} with sampler={arguments.sampler!r}; it is an option of --sampler {_ENGINE_OF[name]}."
            )
    model, init = arguments.model_name_or_path, {"revision": arguments.model_revision}
    try:
        if arguments.sampler == "openai":
            from ..sampling.openai_sampler import OpenAISampler

            if not arguments.base_url:
                raise ValueError("--sampler openai needs --base_url, for example http://127.0.0.1:8000/v1.")
            return OpenAISampler(model, batch_size=arguments.batch_size or 128, **given, **init)
        init |= {"dtype": arguments.dtype, "trust_remote_code": arguments.trust_remote_code}
        if arguments.sampler == "vllm":
            from ..sampling.vllm_sampler import VLLMSampler, lora_engine_kwargs

            given |= _mapping("engine_kwargs", given.pop("engine_kwargs", {}), '{"max_num_seqs": 256}')
            if "hf_token" in given:  # `run_config.yaml` holds these options, and is pushed
                raise ValueError(
                    "You passed hf_token in engine_kwargs, which would be pushed with the run; set HF_TOKEN instead."
                )
            if second_adapter is not None:
                given = {**lora_engine_kwargs(second_adapter), **given}
            if arguments.batch_size is not None:
                given["max_num_seqs"] = arguments.batch_size
            return VLLMSampler(model, **given, **init)
        from ..sampling.transformers_sampler import TransformersSampler

        check_dtype(arguments.dtype)
        return TransformersSampler(model, batch_size=arguments.batch_size or 64, model_init_kwargs=init)
    except OSError as error:  # how transformers says that there is no such model, or none that may be read
        raise ValueError(f"You passed model_name_or_path={model!r}, which cannot be loaded: {error}") from error


def make_verifier(arguments: VerifierArguments):
    module, name = VERIFIERS[arguments.verifier]
    kwargs = _mapping("verifier_kwargs", arguments.verifier_kwargs, '{"timeout": 10}')
    try:
        return getattr(import_module(f"..{module}", __package__), name)(**kwargs)
    except TypeError as error:
        raise ValueError(f"You passed verifier_kwargs={arguments.verifier_kwargs!r} to {name}: {error}") from error
    except ImportError as error:  # an extra that is not installed
        raise ValueError(str(error)) from error


def _mapping(name: str, value: dict | str, example: str) -> dict:
    """From a config file it comes as a mapping, from the command line as JSON."""
    try:
        return dict(json.loads(value) if isinstance(value, str) else value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"You passed {name}={value!r}; write a JSON object such as '{example}'.") from error
