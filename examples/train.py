# /// script
# dependencies = ["trl-offpolicy[peft,wandb]"]
# ///
r"""
Fine-tune on a rewritten dataset (or on any dataset SFTTrainer takes). TRL's `sft.py` with the trainer changed.

Full training with importance weights:

    accelerate launch examples/train.py \
        --model_name_or_path Qwen/Qwen2.5-Math-1.5B \
        --dataset_name runs/gsm8k/dataset \
        --objective iw \
        --learning_rate 5e-5 --num_train_epochs 1 --lr_scheduler_type cosine --warmup_steps 0.1 \
        --per_device_train_batch_size 4 --gradient_accumulation_steps 32 --max_length 2048 \
        --report_to wandb --output_dir runs/gsm8k-iw

LoRA with the DFT objective:

    accelerate launch examples/train.py --model_name_or_path Qwen/Qwen2.5-Math-1.5B --dataset_name runs/gsm8k/dataset \
        --objective dft --use_peft --lora_r 32 --lora_alpha 16 --learning_rate 2e-4 --output_dir runs/gsm8k-dft-lora

QLoRA (`pip install trl-offpolicy[qlora]`), anchored to the model without its adapter:

    accelerate launch examples/train.py --model_name_or_path Qwen/Qwen2.5-Math-1.5B --dataset_name runs/gsm8k/dataset \
        --objective asft --beta 0.1 --use_peft --load_in_4bit --learning_rate 2e-4 --output_dir runs/gsm8k-asft-qlora

On a machine without a GPU, add `--use_cpu --bf16 False`. `--config file.yaml` takes the same keys.
"""


def main(script_args, training_args, model_args):
    from trl import get_peft_config, get_quantization_config

    from trl_offpolicy import ImportanceWeightedSFTTrainer
    from trl_offpolicy.rows import load_rows

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    splits = [script_args.dataset_train_split]
    if training_args.eval_strategy != "no":
        splits.append(script_args.dataset_test_split)
    train_dataset, *eval_dataset = (
        load_rows(script_args.dataset_name, script_args.dataset_config, split, streaming=script_args.dataset_streaming)
        for split in splits
    )
    trainer = ImportanceWeightedSFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset[0] if eval_dataset else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.save_state()  # trainer_state.json: the curves of `trl-offpolicy report`
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


if __name__ == "__main__":
    from trl import ModelConfig, ScriptArguments, TrlParser

    from trl_offpolicy import ImportanceWeightedSFTConfig

    parser = TrlParser((ScriptArguments, ImportanceWeightedSFTConfig, ModelConfig))
    main(*parser.parse_args_and_config())
