"""`trl-offpolicy sft`, which `examples/train.py` runs too."""

import contextlib
import os
import shlex
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from trl import ScriptArguments

from ..data.tokenization import template_kwargs
from ..sampling.engine import TEMPLATE_KWARGS_HELP, read_template
from ..sampling.loading import load_config, loading
from .arguments import CommandParser, check_before_loading, last_checkpoint, model_init_kwargs, parser_for, say_next


SFT_EXAMPLES = """\
examples:
  trl-offpolicy sft --model_name_or_path M --dataset_name runs/gsm8k/dataset --objective dft --output_dir runs/gsm8k-dft
  accelerate launch -m trl_offpolicy.cli sft --model_name_or_path M --dataset_name runs/gsm8k/dataset --objective dft \\
      --output_dir runs/gsm8k-dft                                    # the same on all GPUs of a machine
  trl-offpolicy sft --model_name_or_path M --dataset_name D --objective iw --use_peft --lora_r 32 --output_dir runs/iw-lora
  trl-offpolicy sft --config sft.yaml --resume_from_checkpoint last

It takes the options of TRL's `trl sft` (but mixtures of datasets), and those of the objective. On a machine without a GPU, add --use_cpu --bf16 False.
"""


@dataclass
class SFTArguments(ScriptArguments):
    """TRL's, and how the rows are rendered."""

    chat_template_kwargs: str | None = field(
        default=None, metadata={"help": f"{TEMPLATE_KWARGS_HELP} Rows with a column of that name keep theirs."}
    )


def sft_parser() -> CommandParser:
    from trl import ModelConfig

    from ..trainer.importance_weighted_sft_config import ImportanceWeightedSFTConfig

    return parser_for(
        (SFTArguments, ImportanceWeightedSFTConfig, ModelConfig),
        "sft",
        "Fine-tune on a rewritten dataset, or on any dataset that SFTTrainer takes, with an objective that weights each token.",
        SFT_EXAMPLES,
    )


def sft(argv: list[str]) -> int:
    parser = sft_parser()
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        return 0
    with contextlib.redirect_stdout(
        sys.stderr
    ):  # transformers prints the W&B mode; our first line of output must be the directory
        script_args, args, model_args = parser.parse_args_and_config(argv)
    if not (script_args.dataset_name and model_args.model_name_or_path and args.output_dir):
        raise ValueError(
            "Pass --model_name_or_path, --dataset_name and --output_dir: which model is trained on which rows, and where it goes."
        )
    main = args.process_index == 0
    if main:
        print(f"output_dir: {args.output_dir}", flush=True)
        check_before_loading(args.output_dir, "wandb" if "wandb" in args.report_to else "none")
    if args.chat_template_path is not None:  # from a config file, where no shell has replaced ~
        args.chat_template_path = os.path.expanduser(args.chat_template_path)
        if args.chat_template_path.endswith((".jinja", ".j2")):
            read_template(args.chat_template_path)  # or says what is wrong with it
    script_args.chat_template_kwargs = template_kwargs(script_args.chat_template_kwargs)
    resume = last_checkpoint(args.resume_from_checkpoint, args.output_dir)
    with loading(model_args.model_name_or_path):
        load_config(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            trust_remote_code=args.trust_remote_code,
        )
    try:
        rewritten = _train(script_args, args, model_args, resume)
    except KeyboardInterrupt:
        print("\nstopped; run the same command with --resume_from_checkpoint last to go on from the last checkpoint.")
        return 3
    if main:
        print(f"Model saved to {args.output_dir}.")
        command = ["trl-offpolicy", "eval", "--model_name_or_path", args.output_dir, "--benchmarks", "math500"]
        command += ["--output_dir", f"{args.output_dir.rstrip('/')}-eval"]
        # With these it refuses to ask in other words than the model was trained with.
        command += ["--train_dataset", script_args.dataset_name] if rewritten else []
        say_next(f"{shlex.join(command)}    # or gsm8k, or a file of your own problems")
    return 0


def _train(script_args, args, model_args, resume: str | None) -> bool:
    """Trains and saves; whether the rows are a rewrite's on this disk, whose prompts `eval` can compare its own with."""
    from trl import get_peft_config, get_quantization_config

    from ..data.loading import load_rows
    from ..trainer.importance_weighted_sft_trainer import ImportanceWeightedSFTTrainer

    args.model_init_kwargs = model_init_kwargs(model_args, args)
    splits = [script_args.dataset_train_split]
    if args.eval_strategy != "no":
        splits.append(script_args.dataset_test_split)
    train_dataset, *eval_dataset = (
        _with_template_kwargs(
            _as_expert_rows(
                load_rows(
                    script_args.dataset_name,
                    script_args.dataset_config,
                    split,
                    streaming=script_args.dataset_streaming,
                ),
                args.dataset_text_field,
            ),
            script_args.chat_template_kwargs,
        )
        for split in splits
    )
    trainer = ImportanceWeightedSFTTrainer(
        model=model_args.model_name_or_path,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset[0] if eval_dataset else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(args.output_dir)
    trainer.save_state()  # trainer_state.json: the curves of `trl-offpolicy report`
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()
    return "completion_ids" in (train_dataset.column_names or ()) and Path(script_args.dataset_name).exists()


def _as_expert_rows(dataset, text_field: str):
    """
    Rows that `SFTTrainer` takes, as they are; those in a format that else only a rewrite reads (problem + solution,
    Alpaca, …) as the `expert` rows that it makes of them.
    """
    from ..data.formats import KNOWN_FORMATS, expert_row, known_format

    names = dataset.column_names  # `None` for some streamed datasets
    if not names or {"prompt", "messages", "conversations", "input_ids", text_field} & set(names):
        return dataset
    pair = known_format(names)
    if pair is None:
        raise ValueError(
            f"The dataset has the columns {names}, but SFT takes input_ids, a column of texts (--dataset_text_field) or one of {KNOWN_FORMATS}. "
            "Rename yours with `dataset.rename_columns`."
        )
    warnings.warn(
        f"{' and '.join(pair)} are trained on as a rewrite would keep them: asked with its prompt, answered with the demonstration, whose "
        "final answer is put into a box where the prompt asks for one.",
        stacklevel=2,
    )
    return dataset.map(expert_row, with_indices=True, remove_columns=names)


def _with_template_kwargs(dataset, given: dict | None):
    """The rows with what TRL passes to the chat template beside each; a row that has its own keeps it."""
    if given is None:
        return dataset
    return dataset.map(lambda row: {"chat_template_kwargs": given | (row.get("chat_template_kwargs") or {})})
