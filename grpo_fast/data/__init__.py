"""Prompts and their columns: files, hub datasets, built-in tasks, prompt files, and their tokens."""

from grpo_fast.data.encoding import (
    as_scored,
    check_lengths,
    completion_text,
    encode_prompts,
    encode_rows,
    prompt_order,
    rendered_prompt,
)
from grpo_fast.data.loading import BUILT_IN, load_rows, prepare_rows, read_file
from grpo_fast.data.pass_rates import PassRates
from grpo_fast.data.tasks import addition, arithmetic, countdown, sort_digits
from grpo_fast.data.templates import PROMPTS, Prompt, Row, load_template

__all__ = [
    "BUILT_IN",
    "PROMPTS",
    "PassRates",
    "Prompt",
    "Row",
    "addition",
    "arithmetic",
    "as_scored",
    "check_lengths",
    "completion_text",
    "countdown",
    "encode_prompts",
    "encode_rows",
    "load_rows",
    "load_template",
    "prepare_rows",
    "prompt_order",
    "read_file",
    "rendered_prompt",
    "sort_digits",
]
