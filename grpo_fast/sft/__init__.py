"""Supervised fine-tuning, as a cold start before GRPO, or of a model's own right completions."""
