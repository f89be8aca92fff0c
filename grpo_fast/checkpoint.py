"""Saving the trained model where `from_pretrained` finds it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from grpo_fast.errors import UserError, one_line


def save_model(model: nn.Module, tokenizer: Any, folder: Path) -> Path:
    """Write weights (safetensors), config and tokenizer to `folder`, which appears only when it is whole.

    Raises:
        UserError: the disk is full or cannot be written to.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"the checkpoint {folder} could not be written: {reason}") from None
    return folder


def check_space(model: nn.Module, folder: Path) -> None:
    """The disk must have room for one checkpoint.

    Raises:
        UserError: it does not, or the folder cannot be made.
    """
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise UserError(f"output_dir={str(folder)!r} cannot be created: {there} is not a folder")
    if not os.access(there, os.W_OK):
        raise UserError(f"output_dir={str(folder)!r} cannot be created: {there} is not writable")
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"output_dir={str(folder)!r}: the disk has {free / 2**20:,.1f} MiB left, "
            f"and the checkpoint takes {needed / 2**20:,.1f} MiB"
        )
