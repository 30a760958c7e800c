"""`DFTTrainer`: Dynamic Fine-Tuning (arXiv 2508.05629), `-sg(π)·log π`, with the NLL logged beside it."""

from dataclasses import dataclass
from typing import ClassVar

from .importance_weighted_sft_config import ImportanceWeightedSFTConfig
from .importance_weighted_sft_trainer import ImportanceWeightedSFTTrainer


@dataclass
class DFTConfig(ImportanceWeightedSFTConfig):
    r"""
    [`ImportanceWeightedSFTConfig`] with another default.

    Args:
        objective (`str`, *optional*, defaults to `"dft"`): See [`ImportanceWeightedSFTConfig`].
    """

    default_objective: ClassVar[str] = "dft"


class DFTTrainer(ImportanceWeightedSFTTrainer):
    """
    [`ImportanceWeightedSFTTrainer`] with the DFT objective as its default; the same updates as TRL's
    `loss_type="dft"`.
    """

    _tag_names = ["trl", "sft", "dft"]
    _name = "DFT"
    _paper = {
        "title": "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification",
        "id": "2508.05629",
    }
    _config_class = DFTConfig
