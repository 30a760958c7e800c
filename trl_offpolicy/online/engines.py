"""The engines that draw from a model while it is trained."""

import contextlib
from collections.abc import Iterator

from trl.models import unwrap_model_for_generation

from ..sampling.log_probs import causal_lm
from ..sampling.provenance import hub_commit, weights_digest
from ..sampling.sampler import Sampler
from ..sampling.transformers_sampler import TransformersSampler


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

    def close(self) -> None:
        """The model stays the trainer's."""
