"""Rows: the formats they come in, what they become, their prompts and token ids. Knows no model and no engine."""
