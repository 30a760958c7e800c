"""The model card: what it says is what was trained, and nothing is made up."""

import re
import sys

from ..cards import bibtex, fence, is_hub_id, link, template_path, versions
from .losses import OBJECTIVES


# What the card says of the last logged step.
REPORTED = ("loss", "nll", "mean_token_accuracy", "entropy", "weight", "ess", "clip_fraction", "kl", "reference_kl")
TRL_CITATION = """@software{vonwerra2020trl,
  title   = {{TRL: Transformers Reinforcement Learning}},
  author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallouédec, Quentin},
  license = {Apache-2.0},
  url     = {https://github.com/huggingface/trl},
  year    = {2020}
}"""


def trained_model_card(trainer, model_name: str | None = None, dataset_name: str | None = None, tags=None):
    """
    The card of the model that an `ImportanceWeightedSFTTrainer` holds, from what it knows and nothing else.

    Args:
        dataset_name (`str`, *optional*): Hub id or local path; only an id goes into the metadata. Likewise the base
            model's. By default the Hub dataset that the training rows were loaded from.

    Returns:
        `huggingface_hub.ModelCard`.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    dataset_name = dataset_name or trainer.train_dataset_id
    args, peft = trainer.args, hasattr(trainer.model, "peft_config")
    base_model = trainer.model.config._name_or_path or None
    model_name = model_name or args.output_dir.rstrip("/").split("/")[-1]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset_name if is_hub_id(dataset_name) else "local",
            dataset_name=eval_set,
            dataset_split=eval_set,  # by which huggingface_hub tells results apart
            metric_type=metric,
            metric_value=round(value, 6),
        )
        for (eval_set, metric), value in _evaluations(trainer.state.log_history).items()
    ]
    data = ModelCardData(
        base_model=base_model if is_hub_id(base_model) else None,
        datasets=[dataset_name] if is_hub_id(dataset_name) else None,
        library_name="peft" if peft else "transformers",
        pipeline_tag="text-generation",
        tags=["generated_from_trainer", *trainer._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
        model_name=model_name if results else None,
        eval_results=results or None,
    )
    by_source = trainer.objective if isinstance(trainer.objective, dict) else {"": trainer.objective}
    known = {o: OBJECTIVES[o] for o in by_source.values() if isinstance(o, str)}
    last = next((entry for entry in reversed(trainer.state.log_history) if "loss" in entry), {})
    return ModelCard.from_template(
        data,
        template_path=template_path("model_card"),
        model_name=model_name,
        hub_model_id=trainer.hub_model_id or args.output_dir,
        base=link(base_model, "") or "A model made in memory",
        dataset=link(dataset_name, "datasets/"),
        trainer=type(trainer).__name__,
        wandb_url=_wandb_url(),
        num_rows=trainer.num_train_rows,
        sources=trainer.train_sources,
        num_unlearned=trainer.num_unlearned_rows,
        objectives=[
            (source, known[o].equation, o) if o in known else (source, *_of_a_user(o))
            for source, o in by_source.items()
        ],
        settings={
            name: value
            for objective in known.values()
            for name in objective.settings
            if (value := getattr(args, name)) is not None
        },
        training=_training_facts(
            trainer,
            {
                "sequences": f"up to {args.max_length} tokens"
                + (f", packed ({args.packing_strategy})" if args.packing else ""),
                "trained on": "assistant turns"
                if args.assistant_only_loss
                else "completions"
                if trainer.completion_only_loss
                else "whole sequences",
                **trainer.card_facts,
            },
        ),
        results={key: last[key] for key in REPORTED if key in last},
        versions=versions(
            "trl-offpolicy", "trl", "transformers", "torch", "datasets", "tokenizers", "accelerate", "peft"
        ),
        citations="\n\n".join(
            [*map(bibtex, dict.fromkeys(["2509.15157", *(o.paper for o in known.values() if o.paper)])), TRL_CITATION]
        ),
    )


def _evaluations(log_history: list[dict]) -> dict[tuple[str, str], float]:
    """(eval set, metric) → the last value logged."""
    found = {}
    for entry in log_history:
        for key, value in entry.items():
            match = re.fullmatch(r"(eval_(?:(.+)_)?)(loss|nll|mean_token_accuracy)", key)
            if match and f"{match[1]}loss" in entry:  # beside `eval_a_loss` TRL writes `eval_mean_token_accuracy`
                found[match[2] or "eval", match[3]] = value
    return found


def agent_card(trainer, model_name: str | None = None, dataset_name: str | None = None, tags=None):
    """
    The card of the adapter that a `RewritingAgentTrainer` holds; the arguments are those of [`trained_model_card`].

    Returns:
        `huggingface_hub.ModelCard`.
    """
    from huggingface_hub import ModelCard, ModelCardData

    args, base_model = trainer.args, trainer.model.config._name_or_path or None
    dataset_name = dataset_name or trainer.dataset_name
    data = ModelCardData(
        base_model=base_model if is_hub_id(base_model) else None,
        datasets=[dataset_name] if is_hub_id(dataset_name) else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["generated_from_trainer", *trainer._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
    )
    last = next((entry for entry in reversed(trainer.state.log_history) if "reward" in entry), {})
    drawn = (
        f"{args.num_generations} a prompt, up to {args.max_completion_length} tokens, temperature {args.temperature:g}"
    )
    return ModelCard.from_template(
        data,
        template_path=template_path("agent_card"),
        model_name=model_name or args.output_dir.rstrip("/").split("/")[-1],
        adapter=trainer.hub_model_id or args.output_dir,
        base=link(base_model, "") or "a model made in memory",
        base_model=base_model if is_hub_id(base_model) else "BASE",
        dataset=link(dataset_name, "datasets/"),
        wandb_url=_wandb_url(),
        reward=next((r for r in trainer.reward_funcs if hasattr(r, "lambda_dist")), None),
        guided_prompt=fence(trainer.guided_template),
        training=_training_facts(trainer, {"completions": drawn, "KL to the base": f"{args.beta:g}"}),
        results={key: value for key, value in last.items() if key == "reward" or key.startswith("reward/")},
        versions=versions("trl-offpolicy", "trl", "transformers", "torch", "peft", "vllm"),
        citations=f"{bibtex('2602.11220')}\n\n{TRL_CITATION}",
    )


def _training_facts(trainer, what: dict[str, str]) -> dict[str, str]:
    """Optimizer, batch, `what` was trained on, precision, adapter."""
    args, processes = trainer.args, trainer.accelerator.num_processes
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    dtype = str(trainer.model.dtype).removeprefix("torch.")
    facts = {
        "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler_type.value}, warm-up {args.warmup_steps:g}",
        "optimizer": f"{args.optim.value}, weight decay {args.weight_decay:g}, gradient norm {args.max_grad_norm:g}",
        "batch": f"{batch} rows ({args.per_device_train_batch_size} on each of {processes} processes, {args.gradient_accumulation_steps} accumulated)",
        "steps": f"{trainer.state.global_step} ({trainer.state.epoch or 0:.2f} epochs)",
        **what,
        "precision": f"{'bfloat16' if args.bf16 else 'float16' if args.fp16 else 'no'} autocast, {dtype} weights",
        "seed": str(args.seed),
    }  # fmt: skip
    if hasattr(trainer.model, "peft_config"):
        adapter = trainer.model.active_peft_config
        sizes = [
            f"{n} {getattr(adapter, n)}" for n in ("r", "lora_alpha", "num_virtual_tokens") if hasattr(adapter, n)
        ]
        facts["adapter"] = ", ".join([adapter.peft_type.value, *sizes])
    return facts


def _of_a_user(function) -> tuple[str, str]:
    lines = (function.__doc__ or "").strip().splitlines()
    return lines[0] if lines else "a function of the user's own", getattr(
        function, "__name__", type(function).__name__
    )


def _wandb_url() -> str | None:
    """Page of the W&B run under way, if there is one online."""
    run = getattr(sys.modules.get("wandb"), "run", None)
    return None if run is None else run.url
