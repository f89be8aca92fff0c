"""``python docs/fill_longest.py`` writes the table of longest answers by model and memory into docs/long-answers.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_fast.config import GRPOConfig
from grpo_fast.memory.longest import best, longest_answers
from grpo_fast.memory.plan import GIB
from grpo_fast.memory.shapes import known_config
from grpo_fast.memory.trace import Tracer

PAGE = Path(__file__).parent / "long-answers.md"
MODELS = (
    "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen2.5-1.5B",
    "Qwen/Qwen3-1.7B",
    "meta-llama/Llama-3.2-3B",
    "Qwen/Qwen3-4B",
    "Qwen/Qwen2.5-7B",
    "Qwen/Qwen3-8B",
    "meta-llama/Llama-3.1-8B",
    "Qwen/Qwen3-14B",
    "Qwen/Qwen3-32B",
)
SIZES = (16, 24, 48, 80)
PROMPT_TOKENS = 512
START, END = "<!-- longest answers -->", "<!-- end of longest answers -->"
SHORT = {
    "all weights": "all", "LoRA": "LoRA", "QLoRA (4-bit)": "QLoRA", "LoRA, layers on host": "LoRA, host",
    "QLoRA, layers on host": "QLoRA, host",
}  # fmt: skip


def cell(model: str, gigabytes: int, tracer: Tracer | None = None) -> str:
    """What can be trained and the longest answer, in tokens; in brackets what memory alone would allow."""
    config = GRPOConfig(model_name_or_path=model, dataset_name="any", reward_funcs=["any"])
    found = best(longest_answers(config, tracer or Tracer(known_config(model)), gigabytes * GIB, PROMPT_TOKENS))
    if not found.answer:
        return "none"
    beyond = f" ({found.by_memory:,})" if found.by_memory > 1.02 * found.answer else ""
    return f"{found.answer:,}{beyond} {SHORT[found.trained]}"


def table(tell: Callable[[str], Any]) -> list[str]:
    """The lines of the table, in Markdown."""
    lines = [f"| model | {' | '.join(f'{size} GiB' for size in SIZES)} |", "|---" * (1 + len(SIZES)) + "|"]
    for model in MODELS:
        tracer = Tracer(known_config(model))
        lines.append(f"| {model} | {' | '.join(cell(model, size, tracer) for size in SIZES)} |")
        tell(lines[-1])
    return lines


def fill_table(page: str, tell: Callable[[str], Any]) -> str:
    """`page` with the table between its marks replaced."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return "\n".join([before + START, "", *table(tell), "", END]) + after


if __name__ == "__main__":
    PAGE.write_text(fill_table(PAGE.read_text(encoding="utf-8"), print), encoding="utf-8")
