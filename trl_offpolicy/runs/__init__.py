"""A run on disk: its journal, shards, log and settings. Knows not how rows are made."""
