"""Rounds of rewriting and training: each step a command of this package in a process of its own."""
