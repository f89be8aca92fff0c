"""Prompts and their columns: files, hub datasets, built-in tasks, prompt files, and their tokens."""

from grpo_fast.data.encoding import check_lengths, encode_prompts, opened_turn, prompt_order
from grpo_fast.data.loading import BUILT_IN, load_rows, read_file
from grpo_fast.data.questions import gsm8k, last_boxed, math
from grpo_fast.data.tasks import addition, arithmetic, countdown, sort_digits
from grpo_fast.data.templates import PROMPTS, Prompt, Row, load_template

__all__ = [
    "BUILT_IN",
    "PROMPTS",
    "Prompt",
    "Row",
    "addition",
    "arithmetic",
    "check_lengths",
    "countdown",
    "encode_prompts",
    "gsm8k",
    "last_boxed",
    "load_rows",
    "load_template",
    "math",
    "opened_turn",
    "prompt_order",
    "read_file",
    "sort_digits",
]
