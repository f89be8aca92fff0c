"""Scores on held-out prompts: in a run, and by `grpo-fast eval`."""
