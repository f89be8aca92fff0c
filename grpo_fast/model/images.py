"""Images (and videos) of a batch: positions of their tokens in a packed row, and copies for a second row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grpo_fast.model.inputs import function_arguments
from grpo_fast.model.layout import Microbatch


def has_images(model_inputs: Mapping[str, Any], input_ids: Tensor) -> bool:
    """Whether there are inputs other than one number for each token."""
    return any(
        isinstance(value, list) or (isinstance(value, Tensor) and value.shape != input_ids.shape)
        for value in model_inputs.values()
    )


def places_images(inner: nn.Module) -> bool:
    """Whether a model's body numbers the tokens of an image by their place in it (M-RoPE, as in Qwen2-VL)."""
    return hasattr(inner, "get_rope_index")


def image_positions(inner: nn.Module, microbatch: Microbatch, model_inputs: Mapping[str, Any]) -> Tensor | None:
    """The positions ``[3, 1, T]`` of a packed row by the model's own rule, or else those of `microbatch`."""
    if not places_images(inner):
        return microbatch.position_ids
    lengths = torch.tensor([group.length for group in microbatch.segments.groups])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).to(microbatch.input_ids.device)
    known = function_arguments(inner.get_rope_index.__func__)
    given = {name: value for name, value in model_inputs.items() if name in known}

    def rows(packed: Tensor) -> Tensor:
        """``[S, longest]``, padded on the right, from ``[1, T]``."""
        return packed.new_zeros(mask.shape).masked_scatter(mask, packed)

    for name, value in given.items():
        if isinstance(value, Tensor) and value.shape == microbatch.input_ids.shape:
            given[name] = rows(value)
    positions, _ = inner.get_rope_index(rows(microbatch.input_ids), attention_mask=mask.long(), **given)
    return positions[:, mask][:, None]


def twice(value: Any, length: int, axis: int) -> Any:
    """Two copies of a row's input: for two rows (`axis` 0), or for one row of twice the length (`axis` 1).

    Per-token values of the row's `length` tokens are concatenated along `axis`, images along their first dimension.
    """
    if isinstance(value, list):
        return value * 2
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return torch.cat([value, value], dim=axis if value.shape[:2] == (1, length) else 0)
