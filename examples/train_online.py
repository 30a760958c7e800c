# /// script
# dependencies = ["trl-offpolicy[peft,wandb]"]
# ///
r"""
Rewrite while training: the rows of the next steps are drawn from the model as it is then (`docs/online.md`).

    accelerate launch examples/train_online.py \
        --model_name_or_path Qwen/Qwen2.5-Math-1.5B --dataset_name openai/gsm8k --dataset_config main \
        --num_generations 4 --steps_per_generation 64 --gradient_accumulation_steps 8 --per_device_train_batch_size 4 \
        --learning_rate 1e-5 --report_to wandb --output_dir runs/online

The embedded policy, on a machine without a GPU:

    make rounds    # writes the demonstrations
    python examples/train_online.py --model_name_or_path examples/quickstart_policy --dataset_name runs/rounds/demonstrations.jsonl \
        --solve_prompt '{problem}' --use_cpu --bf16 False --learning_rate 1e-3 --output_dir runs/online

It takes the flags of a training's config and of `trl-offpolicy sft` that load a model, and those of `trl-offpolicy rewrite` that say what
is asked, drawn and kept; `--config file.yaml` takes the same keys, and `--resume_from_checkpoint last` goes on from the newest checkpoint.
"""

import sys
from dataclasses import dataclass

from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_offpolicy import OnlineRewriteSFTConfig, OnlineRewriteSFTTrainer
from trl_offpolicy.cli.arguments import (
    DemonstrationArguments,
    VerifierArguments,
    check_before_loading,
    last_checkpoint,
    load_demonstrations,
    make_verifier,
    model_init_kwargs,
    parser_for,
)


@dataclass(kw_only=True)
class OnlineArguments(DemonstrationArguments, VerifierArguments):
    """Which problems with demonstrations, and what tells right answers from wrong ones."""


def main(argv: list[str]) -> int:
    parser = parser_for((OnlineArguments, OnlineRewriteSFTConfig, ModelConfig), "online", __doc__, "")
    parser.prog = "train_online.py"
    arguments, args, model = parser.parse_args_and_config(argv)
    if model.model_name_or_path is None:
        raise ValueError("Pass --model_name_or_path: which model is trained, and asked.")
    if args.process_index == 0:
        check_before_loading(args.output_dir, "wandb" if "wandb" in args.report_to else "none")
    resume = last_checkpoint(args.resume_from_checkpoint, args.output_dir)
    args.model_init_kwargs = model_init_kwargs(model, args)
    trainer = OnlineRewriteSFTTrainer(
        model.model_name_or_path,
        args,
        train_dataset=load_demonstrations(arguments, args.answer_column),
        verifier=make_verifier(arguments),
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(args.output_dir)
    trainer.save_state()
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.dataset_name)
    trainer.end()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "\nstopped; the same command goes on, and with --resume_from_checkpoint last from the newest checkpoint."
        )
        sys.exit(3)
