"""The policy: a transformers model, its packed forward, its attention and its output head."""
