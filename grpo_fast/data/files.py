"""Reading rows from data files and from the hub."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from grpo_fast.data.templates import Row
from grpo_fast.errors import UserError, import_extra, one_line
from grpo_fast.files import user_path

# Describes a data file in errors.
DATA_FILE = ".jsonl, .json, .csv (each also with .gz) or .parquet file"
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
# Characters; the csv module's default is 128 KiB.
_LONGEST_CELL = 2**31 - 1


def is_file(name: str) -> bool:
    """Whether a name has the suffix of a data file, in upper or lower case."""
    return _suffix(name)[0] in _SUFFIXES


def _suffix(name: str) -> tuple[str, bool]:
    """The suffix that tells a file's format, and whether the file is compressed with gzip."""
    path = Path(name.lower())
    inner = Path(path.stem).suffix
    # Parquet has compression of its own; pyarrow cannot read it through gzip.
    return (inner, True) if path.suffix == ".gz" and inner != ".parquet" else (path.suffix, False)


def read_file(name: str) -> list[Row]:
    """Rows of a .jsonl, .json (a list of objects), .csv (column names in the first line) or .parquet file.

    The first three may be compressed with gzip. The cells of a .csv file are text; empty ones are None.

    Raises:
        UserError: there is no such file, or its content is malformed; names the number of the wrong line.
    """
    path = user_path(name)
    if not path.is_file():
        raise UserError(f"no such file: {name} (looked for {path.resolve()})")
    suffix, compressed = _suffix(name)
    if suffix not in _SUFFIXES:
        raise UserError(f"{name}: only a {DATA_FILE} can be read")
    if suffix == ".parquet":
        datasets = import_extra("datasets", "train")
        try:
            return list(datasets.Dataset.from_parquet(str(path)))
        except Exception as error:
            raise UserError(f"{name} is not a readable parquet file: {one_line(error)}") from None
    try:
        with gzip.open(path) if compressed else path.open("rb") as file:
            return list(_READERS[suffix](path, file))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{name} is not a complete gzip file: {one_line(error)}") from None


def _read_jsonl(path: Path, file: IO[bytes]) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not valid JSON: {one_line(error)}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
        yield row


def _read_json(path: Path, file: IO[bytes]) -> list[Row]:
    try:
        rows = json.loads(file.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {one_line(error)}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} must hold a list of objects")
    return rows


def _read_csv(path: Path, file: IO[bytes]) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_CELL)
    lines = csv.reader(_decoded(path, file), strict=True)
    try:
        names = next(lines, [])
        if len(set(names)) != len(names) or not all(names):
            raise UserError(f"{path}: the first line must have a different name for every column, got {names!r:.200}")
        for cells in lines:
            if not cells:
                continue
            if len(cells) != len(names):
                raise UserError(f"{path}, line {lines.line_num}: {len(cells)} cells for {len(names)} columns")
            yield {name: cell or None for name, cell in zip(names, cells, strict=True)}
    except csv.Error as error:
        raise UserError(f"{path}, line {lines.line_num}: not valid CSV: {one_line(error)}") from None


def _decoded(path: Path, file: IO[bytes]) -> Iterator[str]:
    """Lines as text, with their line ends, which are part of quoted cells."""
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {number}: not UTF-8 text: {one_line(error)}") from None


_READERS: dict[str, Callable[[Path, IO[bytes]], Iterable[Row]]] = {
    ".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv,
}  # fmt: skip


def load_hub(name: str, config: str | None, field: str) -> dict[str, Any]:
    """The splits of a hub dataset, or a UserError with `field` as the name's field."""
    datasets = import_extra("datasets", "train")
    try:
        return datasets.load_dataset(name, config)
    except Exception as error:
        raise UserError(f"{field}={name!r} could not be loaded: {one_line(error)}") from None
