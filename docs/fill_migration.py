"""``python docs/fill_migration.py`` writes the tables of ``grpo-fast convert`` into docs/migration.md."""

from pathlib import Path

from grpo_fast.convert import fill_tables

PAGE = Path(__file__).parent / "migration.md"

if __name__ == "__main__":
    PAGE.write_text(fill_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
