"""The rewriting agent: GRPO on a LoRA adapter that retells references, and the terms of its reward."""
