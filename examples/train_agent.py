# /// script
# dependencies = ["trl-offpolicy[peft,vllm]"]
# ///
r"""
Train a rewriting agent on all GPUs of a machine, or on several: `trl-offpolicy agent` under `accelerate launch`.

The paper's settings (arXiv 2602.11220), vLLM on the training GPUs:

    accelerate launch examples/train_agent.py \
        --model_name_or_path mistralai/Mistral-7B-Instruct-v0.3 \
        --dataset_name demonstrations.jsonl \
        --preset paper --use_vllm --dtype bfloat16 --output_dir runs/agent

vLLM on GPUs of its own (`vllm serve` as TRL's documentation says), a smaller batch, W&B, and the adapter on the Hub:

    accelerate launch examples/train_agent.py --model_name_or_path Qwen/Qwen2.5-Math-1.5B --dataset_name openai/gsm8k --dataset_config main \
        --num_generations 8 --per_device_train_batch_size 8 --gradient_accumulation_steps 8 --learning_rate 1e-5 --beta 0.001 \
        --lora_r 64 --lora_alpha 32 --max_completion_length 1024 --use_vllm --vllm_mode server --vllm_server_base_url http://127.0.0.1:8000 \
        --dtype bfloat16 --report_to wandb --push_to_hub --hub_model_id me/agent --output_dir runs/agent

On a machine without a GPU, add `--use_cpu --bf16 False`. What it prints last is the command that rewrites with the adapter.
"""

import sys

from trl_offpolicy.cli.agent import agent


if __name__ == "__main__":
    sys.exit(agent(sys.argv[1:]))
