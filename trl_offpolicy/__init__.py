"""Close the gap between a model and the demonstrations it is fine-tuned on: rewrite the data, weight the loss.

Importing this package imports neither torch nor trl: each public name is loaded when it is first used.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING


__version__ = "0.1.0"

_HOME = {
    "DataRewriter": "rewriting.rewriter",
    "RewriteConfig": "rewriting.rewrite_config",
    "TransformersSampler": "sampling.transformers_sampler",
    "VLLMSampler": "sampling.vllm_sampler",
    "OpenAISampler": "sampling.openai_sampler",
    "MathVerifier": "verification.math_verifier",
    "Verdict": "data.rows",
    "Source": "data.rows",
    "RewriteDataCollator": "trainer.data_collator",
    "ImportanceWeightedSFTConfig": "trainer.importance_weighted_sft_config",
    "ImportanceWeightedSFTTrainer": "trainer.importance_weighted_sft_trainer",
    "DFTConfig": "trainer.dft_trainer",
    "DFTTrainer": "trainer.dft_trainer",
    "OnlineRewriteSFTConfig": "online.online_config",
    "OnlineRewriteSFTTrainer": "online.online_trainer",
    "measure_policy_gap": "evaluation.policy_gap",
    "evaluate": "evaluation.evaluate",
    "EvaluationConfig": "evaluation.evaluation_config",
}
__all__ = list(_HOME)

if TYPE_CHECKING:
    from .data.rows import Source, Verdict
    from .evaluation.evaluate import evaluate
    from .evaluation.evaluation_config import EvaluationConfig
    from .evaluation.policy_gap import measure_policy_gap
    from .online.online_config import OnlineRewriteSFTConfig
    from .online.online_trainer import OnlineRewriteSFTTrainer
    from .rewriting.rewrite_config import RewriteConfig
    from .rewriting.rewriter import DataRewriter
    from .sampling.openai_sampler import OpenAISampler
    from .sampling.transformers_sampler import TransformersSampler
    from .sampling.vllm_sampler import VLLMSampler
    from .trainer.data_collator import RewriteDataCollator
    from .trainer.dft_trainer import DFTConfig, DFTTrainer
    from .trainer.importance_weighted_sft_config import ImportanceWeightedSFTConfig
    from .trainer.importance_weighted_sft_trainer import ImportanceWeightedSFTTrainer
    from .verification.math_verifier import MathVerifier


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'trl_offpolicy' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *_HOME])


def relocated(old: str, *places: str):
    """
    A `__getattr__` for the module `old`, whose names are in `places` (modules of this package) now: it finds them
    there with a `DeprecationWarning` that says where.
    """

    def find(name: str):
        for place in places:
            found = import_module(f".{place}", __name__)
            if not name.startswith("__") and hasattr(found, name):
                warnings.warn(
                    f"{old}.{name} has moved to {found.__name__}; the old place goes with the next release.",
                    DeprecationWarning,
                    stacklevel=2,
                )
                return getattr(found, name)
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    return find
