"""What others read on the Hub: the model card."""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

from .losses import OBJECTIVES


CITATIONS = {
    "2509.15157": ("zhao2025mind", "Mind the Gap: Data Rewriting for Stable Off-Policy Supervised Fine-Tuning", "Zhao, Shiwan and Zhao, Xuyang and Zhou, Jiaming and Kong, Aobo and Li, Qicheng and Qin, Yong"),
    "2508.05629": ("wu2025generalization", "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification", "Wu, Yongliang and Zhou, Yizhou and Zhou, Ziheng and Peng, Yingzhe and Ye, Xinyu and Hu, Xinting and Zhu, Wenbo and Qi, Lu and Yang, Ming-Hsuan and Yang, Xu"),
    "2510.00526": ("li2025beyond", "Beyond Log Likelihood: Probability-Based Objectives for Supervised Fine-Tuning across the Model Capability Continuum", "Li, Gaotang and Qiu, Ruizhong and Chen, Xiusi and Ji, Heng and Tong, Hanghang"),
    "2507.12856": ("qin2025supervised", "Supervised Fine Tuning on Curated Data is Reinforcement Learning (and can be improved)", "Qin, Chongli and Springenberg, Jost Tobias"),
    "2508.17784": ("zhu2025proximal", "Proximal Supervised Fine-Tuning", "Zhu, Wenhong and Xie, Ruobing and Wang, Rui and Sun, Xingwu and Wang, Di and Liu, Pengfei"),
    "2509.23753": ("zhu2025anchored", "Anchored Supervised Fine-Tuning", "Zhu, He and Su, Junyou and Lai, Peng and Ma, Ren and Zhang, Wenjia and Yang, Linyi and Chen, Guanhua"),
    "2601.02151": ("diao2026entropy", "Entropy-Adaptive Fine-Tuning: Resolving Confident Conflicts to Mitigate Forgetting", "Diao, Muxi and Yang, Lele and Gong, Wuxuan and Zhang, Yutong and Yan, Zhonghao and Han, Yufei and Liang, Kongming and Xu, Weiran and Ma, Zhanyu"),
}  # fmt: skip
# What the card says of the last logged step.
REPORTED = ("loss", "nll", "mean_token_accuracy", "entropy", "weight", "ess", "clip_fraction", "kl", "reference_kl")
TRL_CITATION = """@software{vonwerra2020trl,
  title   = {{TRL: Transformers Reinforcement Learning}},
  author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallouédec, Quentin},
  license = {Apache-2.0},
  url     = {https://github.com/huggingface/trl},
  year    = {2020}
}"""


def bibtex(arxiv_id: str) -> str:
    """The BibTeX entry of one of the papers in `CITATIONS`."""
    name, title, authors = CITATIONS[arxiv_id]
    return (
        f"@misc{{{name},\n  title         = {{{{{title}}}}},\n  author        = {{{authors}}},\n  year          = {{20{arxiv_id[:2]}}},\n"
        f"  eprint        = {{{arxiv_id}}},\n  archivePrefix = {{arXiv}},\n  url           = {{https://arxiv.org/abs/{arxiv_id}}}\n}}"
    )


def versions(*packages: str) -> str:
    """`name version` of each package that is installed."""
    found = []
    for name in packages:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def trained_model_card(trainer, model_name: str | None = None, dataset_name: str | None = None, tags=None):
    """
    The card of the model that an `ImportanceWeightedSFTTrainer` holds, from what it knows and nothing else.

    Args:
        dataset_name (`str`, *optional*): Hub id or local path; only an id goes into the metadata. Likewise the base model's.

    Returns:
        `huggingface_hub.ModelCard`.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

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
        template_path=str(files(__package__) / "templates" / "model_card.md"),
        model_name=model_name,
        hub_model_id=trainer.hub_model_id or args.output_dir,
        base=_link(base_model, "") or "A model made in memory",
        dataset=_link(dataset_name, "datasets/"),
        trainer=type(trainer).__name__,
        wandb_url=_wandb_url(),
        num_rows=trainer.num_train_rows,
        sources=trainer.train_sources,
        objectives=[
            (source, known[o].equation, o) if o in known else (source, *_of_a_user(o))
            for source, o in by_source.items()
        ],
        settings={name: getattr(args, name) for objective in known.values() for name in objective.settings},
        training=_training_facts(trainer, trainer.model.active_peft_config if peft else None),
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
            if match := re.fullmatch(r"eval_(?:(.+)_)?(loss|nll|mean_token_accuracy)", key):
                found[match[1] or "eval", match[2]] = value
    return found


def _training_facts(trainer, adapter) -> dict[str, str]:
    args, processes = trainer.args, trainer.accelerator.num_processes
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    dtype = str(trainer.model.dtype).removeprefix("torch.")
    facts = {
        "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler_type.value}, warm-up {args.warmup_steps:g}",
        "optimizer": f"{args.optim.value}, weight decay {args.weight_decay:g}, gradient norm {args.max_grad_norm:g}",
        "batch": f"{batch} rows ({args.per_device_train_batch_size} on each of {processes} processes, {args.gradient_accumulation_steps} accumulated)",
        "steps": f"{trainer.state.global_step} ({trainer.state.epoch or 0:.2f} epochs)",
        "sequences": f"up to {args.max_length} tokens" + (f", packed ({args.packing_strategy})" if args.packing else ""),
        "trained on": "assistant turns" if args.assistant_only_loss else "completions" if trainer.completion_only_loss else "whole sequences",
        "precision": f"{'bfloat16' if args.bf16 else 'float16' if args.fp16 else 'no'} autocast, {dtype} weights",
        "seed": str(args.seed),
    }  # fmt: skip
    if adapter is not None:
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


def _link(name: str | None, kind: str) -> str | None:
    if not name:
        return None
    if is_hub_id(name):
        return f"[{name}](https://huggingface.co/{kind}{name})"
    return f"`{name.rstrip('/').split('/')[-1]}` (local)"


def is_hub_id(name: str | None) -> bool:
    """Whether `name` can be a Hub id (`owner/name` or `name`) and is no local path."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
