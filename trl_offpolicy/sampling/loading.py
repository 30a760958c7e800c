"""Models and tokenizers from the Hub or a directory, with errors that say what is missing."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .sampler import needs


class ModelNotFound(FileNotFoundError, ValueError):
    """There is no such model, or none that may be read; says which, and why."""


@contextmanager
def loading(model: str) -> Iterator[None]:
    """
    What is done within loads something of `model`, a Hub id or a directory.

    Raises:
        ModelNotFound: It is a path at which there is no directory, or transformers says that there is no such model.
    """
    message = f"You passed model={model!r}, which cannot be loaded"
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        raise ModelNotFound(f"{message}: there is no such directory.")
    try:
        yield
    except OSError as error:
        # Errors of transformers have no errno. Those of the operating system that are not about a missing file, such
        # as a full disk, pass through.
        if isinstance(error, ModelNotFound) or (
            error.errno and not isinstance(error, (FileNotFoundError, PermissionError))
        ):
            raise
        raise ModelNotFound(f"{message}: {error}") from error


def load_processing_class(model: str, processing_class=None, chat_template: str | None = None, **kwargs):
    """
    `processing_class`, or else the tokenizer of `model` (with `chat_template`, if given); every engine renders its
    prompts with it.

    Raises:
        ModelNotFound: There is no such model.
        ValueError: The tokenizer has no chat template.
    """
    if processing_class is None:
        from transformers import AutoTokenizer

        with loading(model):
            processing_class = AutoTokenizer.from_pretrained(model, **kwargs)
    if chat_template is not None:
        processing_class.chat_template = chat_template
    if processing_class.chat_template is None:
        raise ValueError(
            f"The tokenizer of {model!r} has no chat template, so neither sampling nor SFT knows how to write down a "
            "conversation. Pass a `processing_class` that has one (`trl.clone_chat_template` copies another model's), or on the command line "
            "--chat_template FILE, a Jinja template."
        )
    return processing_class


def load_config(model: str, **kwargs):
    """The config of a model; of a LoRA adapter, which has none of its own, that of the model it was trained on."""
    from transformers import AutoConfig
    from transformers.utils.peft_utils import find_adapter_config_file

    adapter = find_adapter_config_file(model, **{k: v for k, v in kwargs.items() if k in ("revision", "token")})
    if adapter is None:
        return AutoConfig.from_pretrained(model, **kwargs)
    needs("peft", "peft", f"The adapter {model!r}")
    base = json.loads(Path(adapter).read_text())["base_model_name_or_path"]
    return AutoConfig.from_pretrained(base, **{**kwargs, "revision": None})


def load_model(model: str, **kwargs):
    """
    The model at `model` (Hub id or directory), for text: a causal language model, or a vision-language checkpoint
    (Qwen2.5-VL, Mistral 3, LLaVA, ...) that is given no images, as TRL's trainers take it; or a LoRA adapter, on the
    model it was trained on. `kwargs` are those of `from_pretrained`; without a word of it the weights keep their dtype,
    and are on the GPUs if there are any.

    Raises:
        ModelNotFound: There is no such model.
        ValueError: It is of another kind.
    """
    import torch
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    shared = {k: v for k, v in kwargs.items() if k in ("revision", "trust_remote_code", "token")}
    kwargs = {"dtype": "auto", **({"device_map": "auto"} if torch.cuda.is_available() else {}), **kwargs}
    with loading(model):
        config = type(load_config(model, **shared))
        sees = config not in MODEL_FOR_CAUSAL_LM_MAPPING and config in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        return (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_pretrained(model, **kwargs)


def warn_of_slow_bfloat16(dtype) -> None:
    """Warns if weights of this `torch.dtype` are bfloat16, to be used on a CPU that has no instructions for it."""
    import torch

    known = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not tell
    has_none = known.get("architecture") == "x86_64" and not (known.get("avx512_bf16") or known.get("amx_bf16"))
    if dtype == torch.bfloat16 and has_none:
        warnings.warn(
            "The weights are bfloat16, and this CPU has no instructions for that (avx512_bf16, amx_bf16), so matrices are multiplied up to a hundred "
            "times more slowly than in float32. Pass --dtype float32 (in Python dtype='float32').",
            stacklevel=3,
        )


def model_and_tokenizer(model, processing_class=None, model_init_kwargs: dict | None = None) -> tuple:
    """A model that is loaded if it is given by its name, and its tokenizer if none is given."""
    from transformers import AutoTokenizer

    name = model if isinstance(model, str) else model.config._name_or_path
    kwargs = model_init_kwargs or {}
    if isinstance(model, str):
        model = load_model(model, **kwargs)
    if processing_class is None:
        shared = {k: v for k, v in kwargs.items() if k in ("revision", "trust_remote_code")}
        processing_class = AutoTokenizer.from_pretrained(name, **shared)
    return model, processing_class
