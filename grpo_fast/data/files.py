"""Rows from data files and from the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_fast.data.templates import Row
from grpo_fast.errors import UserError, import_extra, one_line


def is_file(name: str) -> bool:
    """Whether a name is that of a data file, by its suffix."""
    return Path(name).suffix in (".jsonl", ".json", ".parquet")


def read_file(name: str) -> list[Row]:
    """Rows of a .jsonl, .json (a list of objects) or .parquet file."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"no such file: {name} (looked for {path.resolve()})")
    if path.suffix == ".jsonl":
        return list(_read_jsonl(path))
    if path.suffix == ".parquet":
        datasets = import_extra("datasets", "train")
        try:
            return list(datasets.Dataset.from_parquet(str(path)))
        except Exception as error:
            raise UserError(f"{name} is not a readable parquet file: {one_line(error)}") from None
    if path.suffix != ".json":
        raise UserError(f"{name}: only .jsonl, .json and .parquet files can be read")
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not valid JSON: {one_line(error)}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{name} must hold a list of objects")
    return rows


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: not valid JSON: {one_line(error)}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
            yield row


def load_hub(name: str, config: str | None, field: str) -> dict[str, Any]:
    """The splits of a hub dataset; `field` is what an error calls its name by.

    Raises:
        UserError: it could not be loaded.
    """
    datasets = import_extra("datasets", "train")
    try:
        return datasets.load_dataset(name, config)
    except Exception as error:
        raise UserError(f"{field}={name!r} could not be loaded: {one_line(error)}") from None
