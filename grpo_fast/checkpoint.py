"""Saving the trained model where `from_pretrained` finds it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from grpo_fast.errors import UserError


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
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"the checkpoint {folder} could not be written: {error.strerror or error}") from None
    return folder
