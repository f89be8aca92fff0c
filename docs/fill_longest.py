"""``python docs/fill_longest.py`` writes the table of longest answers by model and memory into docs/long-answers.md."""

from pathlib import Path

from grpo_fast.memory.longest_table import fill_table

PAGE = Path(__file__).parent / "long-answers.md"

if __name__ == "__main__":
    PAGE.write_text(fill_table(PAGE.read_text(encoding="utf-8"), print), encoding="utf-8")
