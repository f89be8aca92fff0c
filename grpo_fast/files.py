"""Files and folders that are complete or missing, even if the process is killed; JSON and YAML from other people."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from grpo_fast.errors import UserError, import_extra, one_line, writing

# Bytes of a YAML file, and characters of its values with aliases (``*name``) written out.
YAML_BYTES, YAML_CHARACTERS = 1 << 20, 4 << 20
# Characters of an integer in YAML; Python refuses to print one of more than 4,300 digits.
LONGEST_INTEGER = 100
# Levels of lists and mappings inside each other. Python's own limit depends on the caller's depth.
DEEPEST_YAML = 100

_CHECKSUM = re.compile(r', "crc32": (\d+)\}$')


def parse_json(text: str) -> Any:
    """The value of a JSON text; a ValueError if it is not JSON, or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_yaml(path: Path, name: str | None = None) -> Any:
    """The value of a YAML file, plain data of a bounded size.

    Raises:
        UserError: it is not YAML in UTF-8, is too large, or its aliases stand for too much; it calls the file `name`.
    """
    yaml = import_extra("yaml", "train")
    name = name or str(path)
    with path.open("rb") as file:
        content = file.read(YAML_BYTES + 1)
    if len(content) > YAML_BYTES:
        raise UserError(f"{name} is too large: a YAML file may have {YAML_BYTES:,} bytes")
    try:
        text = content.decode("utf-8-sig")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST_YAML:
                raise ValueError("nested too deeply")
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _characters(node, {}) > YAML_CHARACTERS:
            raise UserError(
                f"the aliases of {name} stand for more than {YAML_CHARACTERS:,} characters, or for themselves; "
                "write out what they stand for"
            )
        return loader.construct_document(node)
    except UserError:
        raise
    except Exception as error:
        # PyYAML also lets through many of Python's errors, such as that of a date in a 13th month.
        raise UserError(f"{name} is not valid YAML: {one_line(error)}") from None


def _characters(node: Any, known: dict[int, int]) -> int:
    """Characters of a YAML node's value; the target of an alias counts each time that it is used."""
    if id(node) not in known:
        # For a node that contains itself.
        known[id(node)] = YAML_CHARACTERS + 1
        if isinstance(node.value, str):
            if node.tag == "tag:yaml.org,2002:int" and len(node.value) > LONGEST_INTEGER:
                raise ValueError(f"an integer of {len(node.value):,} characters")
            known[id(node)] = 1 + len(node.value)
        else:
            parts = [part for child in node.value for part in (child if isinstance(child, tuple) else (child,))]
            known[id(node)] = 1 + sum(_characters(part, known) for part in parts)
    return known[id(node)]


def user_path(text: str) -> Path:
    """The path that a user wrote; ``~`` is the home folder."""
    return Path(os.path.expanduser(text))


def split_lines(text: str) -> list[str]:
    """The lines of `text`, split only at ``\\n``: `str.splitlines` also splits at U+2028, which JSON leaves alone."""
    return text.removesuffix("\n").split("\n") if text else []


def replace_text(path: Path, text: str) -> None:
    """Write a file under another name, sync it to the disk, and rename it; a UserError if the disk refuses."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_sums(paths: Iterable[Path]) -> list[str]:
    """The SHA-256 of each file, as hexadecimal digits; four files are read at once."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(_sha256, paths))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def discard(folder: Path) -> None:
    """Remove a folder; if the process is killed meanwhile, what is left has another, hidden name."""
    removed = folder.with_name(f".{folder.name}.removed")
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what interrupted writes and removals have left in `folder`."""
    for pattern in (".*.partial", ".*.removed"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def json_ready(content: Any) -> Any:
    """`content` with None for NaN and the infinities, which JSON lacks."""
    if isinstance(content, dict):
        return {key: json_ready(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [json_ready(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


class LinesFile:
    """A JSON-lines file with one object per line, flushed at once, so that an interrupted run keeps what it wrote.

    `append` keeps the lines of an existing file. `checksums` adds a last entry to each line, ``crc32``: that of the
    line without this entry.
    """

    def __init__(self, path: Path, append: bool = False, checksums: bool = False):
        self.path, self.mode, self.checksums, self.file = path, "a" if append else "w", checksums, None

    def write(self, entry: dict[str, Any]) -> None:
        with writing(self.path):
            if self.file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = self.path.open(self.mode, encoding="utf-8")
            line = json.dumps(json_ready(entry), ensure_ascii=False)
            if self.checksums:
                line = f'{line[:-1]}, "crc32": {zlib.crc32(line.encode())}}}'
            self.file.write(line + "\n")
            self.file.flush()

    def __enter__(self) -> LinesFile:
        return self

    def __exit__(self, *_) -> None:
        if self.file is not None:
            # A failure to flush was reported when the line was written.
            with suppress(OSError):
                self.file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The metrics of every step in ``metrics.jsonl``, with NaN for null; a UserError if a line is damaged."""
    lines, damaged = parse_metrics(path.read_text(encoding="utf-8", errors="replace"))
    if damaged:
        raise UserError(f"{path}: line {damaged[0]} is damaged")
    return [entry for _, entry in lines]


def cut_metrics(path: Path, step: int) -> tuple[list[dict[str, float]], str]:
    """Keep only the lines up to `step`, and return their metrics; the later steps are about to be made again.

    If lines are damaged, or none is kept, a copy of the file stays beside it, and a note that says so is returned.
    A UserError reports a file that cannot be written.
    """
    if not path.exists():
        return [], ""
    lines, damaged = parse_metrics(path.read_text(encoding="utf-8", errors="replace"))
    kept = [(line, entry) for line, entry in lines if entry["step"] <= step]
    note = ""
    if damaged or (lines and not kept):
        names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
        with writing(path):
            copy = shutil.copy2(path, next(name for name in names if not name.exists()))
        numbers = ", ".join(map(str, damaged[:3])) + f" and {len(damaged) - 3} more" * (len(damaged) > 3)
        what = f"line {numbers} is damaged and left out" if damaged else f"{len(lines)} steps are made again"
        note = f"{path}: {what}; the file as it was is kept as {copy}"
    replace_text(path, "".join(line + "\n" for line, _ in kept))
    return [entry for _, entry in kept], note


def without_checksum(line: str) -> str:
    """A line of ``metrics.jsonl`` without the CRC-32 at its end, if it has one; a ValueError if that is wrong."""
    line = line.rstrip("\n")
    found = _CHECKSUM.search(line)
    if not found:
        return line
    bare = line[: found.start()] + "}"
    if zlib.crc32(bare.encode()) != int(found[1]):
        raise ValueError("its checksum is that of another line")
    return bare


def parse_metrics(text: str) -> tuple[list[tuple[str, dict[str, float]]], list[int]]:
    """The lines of ``metrics.jsonl`` with their metrics, and the numbers of damaged lines.

    A last line that a kill has cut off is ignored. Lines without checksums, which earlier versions wrote, are damaged
    if they are not JSON, or follow a line that has a checksum.
    """
    lines, damaged, checked = [], [], False
    for number, line in enumerate(split_lines(text), 1):
        found = bool(_CHECKSUM.search(line))
        checked = checked or found
        try:
            entry = parse_json(without_checksum(line))
        except ValueError:
            entry = None
        if isinstance(entry, dict) and type(entry.get("step")) is int and found == checked:
            lines.append((line, {name: math.nan if value is None else value for name, value in entry.items()}))
        else:
            damaged.append(number)
    if not text.endswith("\n") and damaged[-1:] == [text.count("\n") + 1]:
        damaged.pop()
    return lines, damaged
