"""Weights on their way to another process: private, checksummed files, and only the changed values where that is less.

vLLM's processes import this module, so it must not import the trainer.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from grpo_fast.errors import writing
from grpo_fast.files import sha256_sums

# The checksums of a folder's files.
SUMS = "sha256.json"
# Bytes of weights in one file, which are held in memory while it is written.
FILE_BYTES = 1 << 30
# A changed tensor is sent as its changed values, and their positions as int32 or as one bit for each value.
VALUES, POSITIONS, BITS = "//values", "//positions", "//bits"
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
POSITION_BYTES, MOST_POSITIONS = 4, 2**31


class RunFolder:
    """A folder for the files of one run, which only its owner can open; removed by `remove`, or when Python ends.

    Raises:
        UserError: the temporary folder cannot be written.
    """

    def __init__(self) -> None:
        with writing(Path(tempfile.gettempdir())):
            self.path = Path(tempfile.mkdtemp(prefix="grpo-fast-weights-"))
        self.remove = weakref.finalize(self, shutil.rmtree, self.path, True)
        self.made = 0

    def new(self) -> Path:
        """A new, empty folder inside."""
        self.made += 1
        folder = self.path / str(self.made)
        with writing(folder):
            folder.mkdir(mode=0o700)
        return folder


def write_tensors(
    files: Iterable[tuple[str, Mapping[str, Tensor]]], folder: Path, texts: Mapping[str, str] | None = None
) -> str:
    """Write safetensors files and text files that only their owner can read, and their checksums.

    Args:
        files: names of the files, and their tensors.
        texts: names and contents of the text files.

    Returns:
        The checksum of the file of checksums, for `verify`.

    Raises:
        UserError: the disk is full, or `folder` cannot be written.
    """
    names = []
    with writing(folder):
        for name, tensors in files:
            save_file(dict(tensors), _private(folder / name), {"format": "pt"})
            names.append(name)
        for name, text in (texts or {}).items():
            _private(folder / name).write_text(text, encoding="utf-8")
            names.append(name)
        sums = dict(zip(names, sha256_sums(folder / name for name in names), strict=True))
        content = json.dumps(sums)
        _private(folder / SUMS).write_text(content, encoding="utf-8")
    return hashlib.sha256(content.encode()).hexdigest()


def verify(folder: Path, checksum: str) -> list[Path]:
    """The files of `folder`, whose content is what `write_tensors` wrote.

    Raises:
        FileNotFoundError: there are no weights in the folder.
        ValueError: a file has different content.
    """
    if not (folder / SUMS).is_file():
        raise FileNotFoundError(f"there are no weights in {folder}")
    content = (folder / SUMS).read_bytes()
    sums = json.loads(content) if hashlib.sha256(content).hexdigest() == checksum else None
    if sums is None:
        raise ValueError(f"damaged: {folder / SUMS} differs from what was sent")
    paths = [folder / name for name in sums]
    for path, found in zip(paths, sha256_sums(paths), strict=True):
        if found != sums[path.name]:
            raise ValueError(f"damaged: {path} differs from what was sent")
    return paths


def read_tensors(paths: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of safetensors files, one tensor at a time."""
    for path in paths:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_tensor(name)


def in_files(tensors: Iterable[tuple[str, Tensor]], most: int = FILE_BYTES) -> Iterator[dict[str, Tensor]]:
    """The tensors in groups of at most `most` bytes; a larger tensor is a group by itself."""
    group: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if group and size + tensor.nbytes > most:
            yield group
            group, size = {}, 0
        group[name] = tensor.contiguous()
        size += tensor.nbytes
    if group:
        yield group


def changes(tensors: Iterable[tuple[str, Tensor]], last: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What `apply_changes` needs to turn the tensors `last` into `tensors`, bit for bit; `last` is updated.

    Each tensor is given whole or by its changed values, whichever is smaller, and not at all if nothing changed.

    Args:
        tensors: names and tensors, always the same names with the same shapes and dtypes.
        last: tensors in main memory; empty at first.
    """
    for name, tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        if name not in last:
            last[name] = tensor.clone()
            yield name, tensor
            continue
        now, before = _integers(tensor), _integers(last[name])
        changed = now != before
        count, size = int(changed.sum()), tensor.element_size()
        if not count:
            continue
        by_position = count * (size + POSITION_BYTES) if len(now) <= MOST_POSITIONS else tensor.nbytes
        by_bit = -(-len(now) // 8) + count * size
        if tensor.nbytes <= min(by_position, by_bit):
            yield name, tensor
        elif by_position < by_bit:
            yield name + VALUES, now[changed]
            yield name + POSITIONS, changed.nonzero().flatten().int()
        else:
            yield name + VALUES, now[changed]
            yield name + BITS, _packed(changed)
        before.copy_(now)


def apply_changes(tensors: Iterable[tuple[str, Tensor]], last: dict[str, Tensor]) -> None:
    """Update the tensors `last` by what `changes` gave."""
    values: dict[str, Tensor] = {}
    places: dict[str, Tensor] = {}
    for key, tensor in tensors:
        name, mark, kind = key.rpartition("//")
        if not mark:
            last[key] = tensor.clone()
            continue
        (values if mark + kind == VALUES else places)[name] = tensor
        if name in values and name in places:
            flat, where = _integers(last[name]), places.pop(name)
            index = where.long() if where.dtype == torch.int32 else _unpacked(where, len(flat)).nonzero().flatten()
            flat[index] = values.pop(name)


def _integers(tensor: Tensor) -> Tensor:
    """The values' bits ``[n]``: unlike numbers, they tell -0 from 0 and are equal for the same NaN."""
    return tensor.view(-1).view(INTEGERS[tensor.element_size()])


def _packed(flags: Tensor) -> Tensor:
    """Eight flags ``[n]`` a byte."""
    padded = torch.nn.functional.pad(flags, (0, -len(flags) % 8)).view(-1, 8)
    return (padded.to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _unpacked(packed: Tensor, count: int) -> Tensor:
    return ((packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).bool().view(-1)[:count]


def _private(path: Path) -> Path:
    """Create a file that only its owner can read, to be written under the same name."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    return path
