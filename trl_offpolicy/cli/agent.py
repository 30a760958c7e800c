"""`trl-offpolicy agent`, which `examples/train_agent.py` runs on several GPUs."""

import contextlib
import json
import os
import shlex
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..data import prompts
from ..data.control_tokens import HELP, MODES
from ..rewriting.rewrite_config import RewriteConfig
from ..sampling.engine import TEMPLATE_METADATA, read_template
from .arguments import (
    DemonstrationArguments,
    VerifierArguments,
    check_before_loading,
    last_checkpoint,
    load_demonstrations,
    make_verifier,
    model_init_kwargs,
    parser_for,
)


DESCRIPTION = "Train a rewriting agent: GRPO on a LoRA adapter, rewarded for rewrites that are right, like the base's own answers, and diverse."
AGENT_EXAMPLES = """\
examples:
  trl-offpolicy agent --model_name_or_path M --dataset_name D --output_dir runs/agent --use_vllm --dtype bfloat16
  trl-offpolicy agent --model_name_or_path M --dataset_name D --output_dir runs/agent --resume_from_checkpoint last
  trl-offpolicy agent --model_name_or_path M --dataset_name D --output_dir runs/agent --use_vllm --vllm_mode server \\
      --vllm_server_base_url http://node1:8000 --push_to_hub --hub_model_id me/agent
  accelerate launch examples/train_agent.py --model_name_or_path mistralai/Mistral-7B-Instruct-v0.3 --dataset_name D \\
      --output_dir runs/agent --preset paper --use_vllm --dtype bfloat16      # the same command on all GPUs of a machine

Beside the options above it takes every one of TRL's GRPOConfig (`trl grpo --help`): generation, vLLM, KL, optimizer, logging, Hub; and
of its ModelConfig: dtype, attention, LoRA (--lora_r, --lora_alpha, --lora_target_modules; by default all linear layers), 4-bit.

Preset `paper` (arXiv 2602.11220; flags beside it win): the settings of its released script, and K = 10 of its text, where the script
draws 5. A model of a few million parameters cannot judge reasoning: with one, add --judge False.
"""

# Settings of arXiv 2602.11220's script (verl), with TRL's names; a step's batch depends on the number of processes:
# see `_batches`.
PAPER: dict[str, Any] = {
    "judge": True, "lambda_dist": 0.35, "lambda_div": 0.5,  # the function's own defaults there are 0.2, its entry point passes these
    "qa_prompt": prompts.PAPER_QA_PROMPT, "max_prompt_length": 2048, "max_completion_length": 4096,
    "num_generations": 10,  # K of the text; n=5 in the script
    "learning_rate": 3e-6, "beta": 0.001, "use_bias_correction_kl": False,  # verl's low_var_kl is TRL's k3 without the correction
    "lora_r": 64, "lora_alpha": 32, "num_train_epochs": 2, "save_steps": 10, "vllm_gpu_memory_utilization": 0.6,
}  # fmt: skip
PAPER_PROMPTS, PAPER_MINI_BATCH, PAPER_MICRO_BATCH = 504, 252, 4  # 504 in the script, 512 in the text


@dataclass(kw_only=True)
class AgentArguments(DemonstrationArguments, VerifierArguments):
    """The rows it learns to rewrite, and its reward."""

    preset: str | None = field(default=None, metadata={"help": "Settings of the paper.", "choices": ["paper"]})
    judge: bool = field(
        default=False,
        metadata={"help": "A right answer counts only if the base, asked YES or NO, finds the reasoning valid."},
    )
    lambda_dist: float = field(default=0.35, metadata={"help": "Weight of the alignment with the base (the paper's)."})
    lambda_div: float = field(default=0.5, metadata={"help": "Weight of the diversity of a group (the paper's)."})
    embedding_model: str | None = field(
        default=None,
        metadata={"help": "SentenceTransformer for the diversity; by default the base's own hidden states."},
    )
    qa_prompt: str | None = field(
        default=None,
        metadata={
            "help": "Bare text with {problem} under which the base's likelihood is taken; by default a row's own prompt through the chat template."
        },
    )
    solve_prompt: str = field(
        default=prompts.SOLVE_PROMPT, metadata={"help": "What a row without a prompt of its own is asked."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System turn before it."})
    chat_template_path: str | None = field(default=None, metadata=TEMPLATE_METADATA)
    guided_prompt: str = field(
        default=prompts.GUIDED_PROMPT, metadata={"help": "What the agent is asked, with {problem} and {solution}."}
    )
    answer_column: str = field(default="answer", metadata={"help": "Column with gold final answers."})
    control_tokens: str = field(default="warn", metadata={"help": HELP, "choices": MODES})
    max_prompt_length: int | None = field(default=None, metadata={"help": "Rows with longer prompts are left out."})


@dataclass
class _Group:
    """What the paper's batches depend on, whoever sets it."""

    num_generations: int = PAPER["num_generations"]


def agent(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):  # TRL's own options need torch
        parser_for((AgentArguments,), "agent", DESCRIPTION, AGENT_EXAMPLES).parse_args(["--help"])
    with contextlib.redirect_stdout(
        sys.stderr
    ):  # transformers prints the W&B mode; our first line of output must be the directory
        arguments, args, model_args = _parse(argv)
    main = args.process_index == 0
    if main:
        print(f"output_dir: {args.output_dir}", flush=True)
        check_before_loading(args.output_dir, "wandb" if "wandb" in args.report_to else "none")
    try:
        trainer = _train(arguments, args, model_args)
    except KeyboardInterrupt:
        print("\nstopped; run the same command with --resume_from_checkpoint last to go on from the last checkpoint.")
        return 3
    if main:
        print(f"adapter saved to {args.output_dir}")
        print(_next_command(arguments, args, model_args, trainer.hub_model_id or args.output_dir))
    return 0


def _parse(argv: list[str]):
    from trl import GRPOConfig, ModelConfig

    parser = parser_for((AgentArguments, GRPOConfig, ModelConfig), "agent", DESCRIPTION, AGENT_EXAMPLES)
    parser.set_defaults(use_peft=True, lora_target_modules=["all-linear"])
    first = parser_for((AgentArguments, _Group), "agent", DESCRIPTION, AGENT_EXAMPLES)
    own, group, *_ = first.parse_args_and_config(argv, return_remaining_strings=True)
    if own.preset:  # a flag or a key of the config file wins over the preset
        parser.set_defaults(**PAPER, **_batches(int(os.environ.get("WORLD_SIZE", 1)), group.num_generations))
    arguments, args, model_args = parser.parse_args_and_config(argv)
    if not args.output_dir or not model_args.model_name_or_path:
        raise ValueError("Pass --model_name_or_path and --output_dir: which model, and where its adapter goes.")
    if not model_args.use_peft:
        raise ValueError(
            "You passed use_peft=False, but the agent is a LoRA adapter: its reward asks the model without it."
        )
    return arguments, args, model_args


def _batches(num_processes: int, num_generations: int) -> dict[str, int]:
    """504 prompts a generation, 252 an update, at most 4 completions at a time on each of `num_processes`."""
    update = PAPER_MINI_BATCH * num_generations
    micro = next((m for m in range(PAPER_MICRO_BATCH, 0, -1) if update % (m * num_processes) == 0), None)
    if micro is None:
        raise ValueError(
            f"{update:,} completions an update cannot be shared by {num_processes} processes: set --per_device_train_batch_size, "
            "--gradient_accumulation_steps and --steps_per_generation yourself instead of --preset paper."
        )
    steps = update // (micro * num_processes)
    return {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": steps,
        "steps_per_generation": steps * PAPER_PROMPTS // PAPER_MINI_BATCH,
    }


def _train(arguments: AgentArguments, args, model_args):
    from transformers import AutoTokenizer
    from trl import get_peft_config, get_quantization_config

    from ..agent.rewriting_agent_trainer import GroupReward, RewritingAgentTrainer, agent_dataset
    from ..sampling.loading import loading

    resume = last_checkpoint(args.resume_from_checkpoint, args.output_dir)
    args.model_init_kwargs = model_init_kwargs(model_args, args)
    model = model_args.model_name_or_path
    shared = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
    with loading(model):
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left", **shared)
        if template := read_template(arguments.chat_template_path):
            tokenizer.chat_template = template
    with make_verifier(arguments) as verifier:
        dataset = agent_dataset(
            load_demonstrations(arguments, arguments.answer_column), verifier, arguments.answer_column, arguments.solve_prompt, arguments.guided_prompt,
            arguments.qa_prompt, tokenizer, arguments.max_prompt_length, arguments.control_tokens, arguments.system_prompt,
            args.chat_template_kwargs,
        )  # fmt: skip
        reward = GroupReward(
            verifier,
            arguments.lambda_dist,
            arguments.lambda_div,
            arguments.judge,
            embed=_embedder(arguments.embedding_model, str(args.device)),
        )
        trainer = RewritingAgentTrainer(
            model, reward, args, dataset, processing_class=tokenizer,
            quantization_config=get_quantization_config(model_args), peft_config=get_peft_config(model_args),
            guided_template=arguments.guided_prompt, dataset_name=arguments.dataset_name,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(args.output_dir)
    trainer.create_model_card()
    trainer.save_state()  # trainer_state.json: the terms of the reward, step by step
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()
    return trainer


def _embedder(name: str | None, device: str):
    if name is None:
        return None
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ModuleNotFoundError(
            f"embedding_model={name!r} needs sentence-transformers, which is not installed: pip install 'trl-offpolicy[embeddings]'"
        ) from error
    return SentenceTransformer(name, device=device).encode


def _next_command(arguments: AgentArguments, args, model_args, adapter: str) -> str:
    """The rewrite with the adapter, of the same rows, prompts and verifier, on the same base."""
    model, usual = model_args.model_name_or_path, {f.name: f.default for f in fields(arguments)}
    same = (
        "dataset_name", "dataset_config", "dataset_split", "dataset_revision", "data_files", "column_mapping", "answer_column", "solve_prompt", "system_prompt", "guided_prompt",
        "chat_template_path", "verifier", "verifier_kwargs", "control_tokens",
    )  # fmt: skip
    given = {name: value for name in same if (value := getattr(arguments, name)) != usual[name]}
    for own, usual_of, name in (
        (model_args, type(model_args), "model_revision"),
        (model_args, type(model_args), "dtype"),
        (args, type(args), "trust_remote_code"),
        (args, RewriteConfig, "max_completion_length"),
    ):
        if (value := getattr(own, name)) != getattr(usual_of, name):
            given[name] = str(value)
    if isinstance(mapping := given.get("column_mapping"), dict):  # from a config file
        given["column_mapping"] = ",".join(f"{ours}={theirs}" for ours, theirs in mapping.items())
    if arguments.skip_incomplete:
        given["skip_incomplete"] = "True"
    if args.chat_template_kwargs:
        given["chat_template_kwargs"] = json.dumps(args.chat_template_kwargs)
    flags = []
    for name, value in given.items():
        flags += [f"--{name}", *(value if isinstance(value, list) else [value])]
    command = ["trl-offpolicy", "rewrite", "--model_name_or_path", model, "--rewriter_adapter", adapter, *flags]
    return shlex.join([*command, "--stages", "guided", "--output_dir", f"{Path(adapter).name}-rewrite"])
