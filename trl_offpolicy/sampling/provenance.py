"""Which weights, which adapter and which chat template drew a completion: commits of the Hub, or digests."""

import hashlib
import os
from pathlib import Path


def template_digest(processing_class) -> str | None:
    """16 hex digits of the chat template that prompts are rendered with; `None` where nobody here renders them."""
    template = getattr(processing_class, "chat_template", None)
    return None if template is None else hashlib.blake2b(str(template).encode(), digest_size=8).hexdigest()


def weights_digest(named_tensors) -> str:
    """12 hex digits that change when the weights do: the revision of a model that no Hub commit names.

    Args:
        named_tensors (`Iterable[tuple[str, torch.Tensor]]`): Parameters in any order; the head of each is looked at.
    """
    digest = hashlib.blake2b(digest_size=6)
    for name, tensor in sorted(named_tensors, key=lambda pair: pair[0]):
        head = tensor.detach().flatten()[:1024].float().cpu().numpy().tobytes()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + head)
    return digest.hexdigest()


def local_directory(model: str) -> Path:
    """The directory of a model or adapter, fetched from the Hub if it is not one already."""
    if Path(model).is_dir():
        return Path(model)
    if model.startswith((".", "/", "~")):
        raise FileNotFoundError(f"You passed {model!r}, but there is no such directory.")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model))


def checkpoint_digest(directory: Path) -> str:
    """
    `weights_digest` of the files that a model in memory would have been loaded from (mapped, not read as a whole).
    """
    from safetensors.torch import load_file

    return weights_digest(pair for file in directory.glob("*.safetensors") for pair in load_file(file).items())


def adapted_revision(revision: str, adapter: str) -> str:
    """`revision` of the base and that of the LoRA `adapter` on it: a Hub commit, else a digest of its weights."""
    return f"{revision}+{hub_commit(adapter) or checkpoint_digest(Path(adapter))}"


def hub_commit(model: str, revision: str | None = None) -> str | None:
    """
    The commit from which a Hub model was just loaded, as the cache has it (a config no longer says so in transformers
    5); `None` for a local directory."""
    from huggingface_hub import HfApi

    if os.path.isdir(model):
        return None
    return HfApi().resolve_revision(model, revision=revision, local_files_only=True).resolved
