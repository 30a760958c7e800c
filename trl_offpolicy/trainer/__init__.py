"""Drop-in replacements for `SFTTrainer`: configs, collator, token weights, log-probs. Reads columns and knows nothing of rewriting."""
