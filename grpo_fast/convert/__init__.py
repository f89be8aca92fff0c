"""Configurations of TRL, verl and LLaMA-Factory as ours; the tables of fields here also fill docs/migration.md."""

from grpo_fast.convert.conversion import TRAINERS, Conversion, convert, fill_tables, read_file

__all__ = ["TRAINERS", "Conversion", "convert", "fill_tables", "read_file"]
