# /// script
# dependencies = ["trl-offpolicy[peft,wandb]"]
# ///
r"""
Fine-tune on a rewritten dataset (or on any dataset SFTTrainer takes). TRL's `sft.py` with the trainer changed; after `pip install` the
same command is `accelerate launch -m trl_offpolicy.cli sft`, or `trl-offpolicy sft` on one GPU.

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

import sys

from trl_offpolicy.cli.sft import sft


if __name__ == "__main__":
    sys.exit(sft(sys.argv[1:]))
