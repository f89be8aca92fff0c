"""Files and folders that are whole or not there, whenever the process is killed."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from grpo_fast.errors import writing

HASHED_AT_ONCE = 4


def user_path(text: str) -> Path:
    """The path that a user wrote; ``~`` is the home folder."""
    return Path(os.path.expanduser(text))


def split_lines(text: str) -> list[str]:
    """The lines of `text`, split at ``\\n`` alone.

    `str.splitlines` also splits at U+2028, U+2029 and U+0085, which JSON leaves inside a line.
    """
    return text.removesuffix("\n").split("\n") if text else []


def replace_text(path: Path, text: str) -> None:
    """Write `path` beside itself, synced to the disk, and put it in place in one move.

    Raises:
        UserError: the disk is full or cannot be written to.
    """
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
    """The SHA-256 of each file, as hexadecimal digits; several files are read at once."""
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        return list(pool.map(_sha256, paths))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def discard(folder: Path) -> None:
    """Remove a folder; what a kill in the middle leaves is hidden and no longer bears the folder's name."""
    removed = folder.with_name(f".{folder.name}.removed")
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what interrupted writes and removals left in `folder`."""
    for pattern in (".*.partial", ".*.removed"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
