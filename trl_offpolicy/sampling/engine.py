"""
The engine by its name and options, as the command line has them; the engines themselves are imported when one is made.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.redaction import redacted
from ..data.tokenization import json_mapping
from .loading import ModelNotFound, load_config, load_processing_class, loading
from .sampler import Sampler, check_positive


TEMPLATE_METADATA = {
    "help": "Jinja file that renders conversations, for a base model without a chat template of its own.",
    "aliases": ["--chat_template"],
}
TEMPLATE_KWARGS_HELP = """Variables of the chat template as JSON, e.g. '{"enable_thinking": false}'."""


@dataclass(kw_only=True)
class EngineArguments:
    """Which model, and the engine that samples it."""

    model_name_or_path: str = field(metadata={"help": "Model: Hub id or local directory."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    dtype: str = field(default="auto", metadata={"help": "Weights' dtype: auto, bfloat16, float16 or float32."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code from the model's repository."})
    chat_template_path: str | None = field(default=None, metadata=TEMPLATE_METADATA)
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
    engine_kwargs: dict | str | None = field(
        default=None, metadata={"help": """vllm: further engine arguments as JSON, e.g. '{"quantization": "fp8"}'."""}
    )


def read_template(path: str | None) -> str | None:
    """The text of a chat template's file; `ValueError` if it is no template."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    if path is None:
        return None
    try:
        text = Path(path).expanduser().read_text()
    except OSError as error:
        raise ValueError(f"You passed chat_template_path={path!r}, which cannot be read: {error.strerror}.") from error
    try:
        _compile_jinja_template(text)
    except TemplateSyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno}: this is no Jinja template: {error.message}") from error
    return text


def check_dtype(dtype: str) -> None:
    if dtype in ("auto", "bfloat16", "float16", "float32"):
        return  # known without torch, which takes seconds to import
    import torch

    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(
            f"You passed dtype={dtype!r}, which torch does not know: use auto, bfloat16, float16 or float32."
        )


def check_model(arguments: EngineArguments):
    """
    The tokenizer of the model, which is not loaded itself; `None` where only a server knows the model.

    Raises:
        ModelNotFound: There is no such model.
        ValueError: There is no such dtype, the engine does not take its options, or the model's tokenizer has no chat
            template.
    """
    model = arguments.model_name_or_path
    engine_options(arguments)
    shared: dict[str, Any] = {"revision": arguments.model_revision, "trust_remote_code": arguments.trust_remote_code}
    check_dtype(arguments.dtype)
    try:
        with loading(model):
            load_config(model, **shared)
        return load_processing_class(model, chat_template=read_template(arguments.chat_template_path), **shared)
    except ModelNotFound:
        if arguments.sampler == "openai":
            return None
        raise


_ENGINE_OF = {
    **dict.fromkeys(("base_url", "served_model_name", "request_timeout", "give_up_after"), "openai"),
    **dict.fromkeys(
        ("adapter", "tensor_parallel_size", "gpu_memory_utilization", "max_model_len", "engine_kwargs"), "vllm"
    ),
}


def engine_options(arguments: EngineArguments) -> dict[str, Any]:
    """The engine's own options by name, as far as they are given; `ValueError` for those that it does not take."""
    given: dict[str, Any] = {name: value for name in _ENGINE_OF if (value := getattr(arguments, name)) is not None}
    for name, value in given.items():
        if _ENGINE_OF[name] != arguments.sampler:
            raise ValueError(
                f"You passed {name}={value!r} with sampler={arguments.sampler!r}; it is an option of --sampler {_ENGINE_OF[name]}."
            )
    check_positive(batch_size=arguments.batch_size, **{k: v for k, v in given.items() if isinstance(v, (int, float))})
    if arguments.sampler == "openai" and not arguments.base_url:
        raise ValueError("--sampler openai needs --base_url, for example http://127.0.0.1:8000/v1.")
    given |= json_mapping("engine_kwargs", given.pop("engine_kwargs", {}), '{"max_num_seqs": 256}')
    if "hf_token" in given:  # `run_config.yaml` holds these options, and is pushed
        raise ValueError(
            "You passed hf_token in engine_kwargs, which would be pushed with the run; set HF_TOKEN instead."
        )
    return given


def make_sampler(arguments: EngineArguments, second_adapter: str | None = None):
    """The engine; one on which `with_adapter(second_adapter)` can be called, if that is asked for."""
    given = engine_options(arguments)
    model = arguments.model_name_or_path
    init: dict[str, Any] = {"revision": arguments.model_revision}
    if template := read_template(arguments.chat_template_path):
        shared = {"trust_remote_code": arguments.trust_remote_code, **init}
        given["processing_class"] = load_processing_class(model, chat_template=template, **shared)
    if arguments.sampler == "openai":
        from .openai_sampler import OpenAISampler

        sampler = OpenAISampler(model, batch_size=arguments.batch_size or 128, **given, **init)
        if template and not sampler.takes_token_ids:
            sampler.close()
            raise ValueError(
                f"You passed chat_template_path={arguments.chat_template_path!r}, but these servers render conversations themselves (they take "
                "no token ids). Start them with that template (`vllm serve --chat-template FILE`) and leave the flag out."
            )
        return sampler
    with loading(model):
        init |= {"dtype": arguments.dtype, "trust_remote_code": arguments.trust_remote_code}
        if arguments.sampler == "vllm":
            from .vllm_sampler import VLLMSampler, lora_engine_kwargs

            if second_adapter is not None:
                given = {**lora_engine_kwargs(second_adapter), **given}
            if arguments.batch_size is not None:
                given["max_num_seqs"] = arguments.batch_size
            return VLLMSampler(model, **given, **init)
        from .transformers_sampler import TransformersSampler

        check_dtype(arguments.dtype)
        return TransformersSampler(model, batch_size=arguments.batch_size or 64, model_init_kwargs=init, **given)


def make_teachers(arguments: EngineArguments, teachers: dict[str, str], log_probs: bool) -> dict[str, Sampler]:
    """
    The engines of other models, by name: where the model is served, or which it is.

    Args:
        arguments ([`EngineArguments`]): Those of the student.
        teachers (`dict[str, str]`): What [`read_teachers`] has read.
        log_probs (`bool`): Whether their token ids and log-probs are wanted, and not their texts alone.
    """
    made: dict[str, Sampler] = {}
    for name, model in teachers.items():
        if "://" in model:
            from .openai_sampler import OpenAISampler

            options: dict[str, Any] = {"batch_size": arguments.batch_size or 128, "text_only": not log_probs}
            given = {k: v for k in ("request_timeout", "give_up_after") if (v := getattr(arguments, k)) is not None}
            made[name] = OpenAISampler(name, model, **options, **given)
        elif arguments.sampler == "transformers":
            from .transformers_sampler import TransformersSampler

            with loading(model):
                init = {"dtype": arguments.dtype, "trust_remote_code": arguments.trust_remote_code}
                made[name] = TransformersSampler(model, batch_size=arguments.batch_size or 64, model_init_kwargs=init)
        else:
            raise ValueError(
                f"You passed teacher {name}={model} with sampler={arguments.sampler!r}: this process holds one such engine. Serve the teacher "
                f"(`vllm serve {model} --served-model-name {name}`) and pass {name}=http://host:8000/v1, or use --sampler transformers."
            )
    return made


def read_teachers(given: list[str] | None) -> dict[str, str]:
    """`NAME=MODEL` or `NAME=URL` of each teacher as a mapping; `ValueError` if one is neither, or a name comes twice."""
    pairs = [teacher.partition("=") for teacher in given or ()]
    if wrong := ["".join(pair) for pair in pairs if not (pair[0] and pair[2])]:
        raise ValueError(
            f"You passed teacher {redacted(wrong[0])!r}; write NAME=MODEL (Hub id or directory) or NAME=URL of a server that calls the model NAME."
        )
    names = [name for name, _, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"You passed the teachers {names}; each needs a name of its own.")
    return {name: model for name, _, model in pairs}
