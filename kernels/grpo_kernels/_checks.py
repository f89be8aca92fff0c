"""Argument checks that the operations share. Each raises one line that names the operation and the argument."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

IGNORE_INDEX = -100


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when any argument is float64 (so that the fast paths can be checked in it), else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def require_choice(op: str, name: str, value: object, allowed: Sequence[str]) -> None:
    require(value in allowed, f"{op}: {name}={value!r} is unknown; choose one of {', '.join(allowed)}")


def require_tensors(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")


def require_floating(op: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        require_tensors(op, **{name: tensor})
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be a floating-point tensor, got {tensor.dtype}")


def require_product_operands(op: str, **tensors: Tensor | None) -> None:
    """Dense tensors with values, in a dtype that needs no separate scale."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype.itemsize == 1:
            raise TypeError(
                f"{op}: {name} is {tensor.dtype}; convert it with its scale to bfloat16, float16 or float32"
            )
        if tensor.is_nested or tensor.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be a dense tensor, got layout {tensor.layout}; call .to_dense() first")
        require(not tensor.is_meta, f"{op}: {name} is on meta, which holds no values; load it onto a device first")


def require_device(op: str, device: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, but the other tensors are on {device}")


def require_shape(op: str, shape: torch.Size, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{op}: {name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def require_number(op: str, name: str, value: float | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")


def require_finite_positive(op: str, name: str, value: float | None) -> None:
    require_number(op, name, value)
    if value is not None and not 0 < value <= sys.float_info.max:
        raise ValueError(f"{op}: {name} must be a finite number above 0, got {value}")


def values_can_be_checked(device: torch.device) -> bool:
    """Whether reading tensor values is cheap enough for argument checks.

    On a GPU it would stall the stream, so there it happens only with ``GRPO_KERNELS_DEBUG=1`` in the environment.
    """
    return device.type == "cpu" or os.environ.get("GRPO_KERNELS_DEBUG") == "1"


def require_targets(op: str, targets: Tensor, vocab_size: int) -> None:
    """Targets are integers in ``[0, vocab_size)`` or ``IGNORE_INDEX``; values are read only if that is cheap."""
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: targets must be int64 or int32, got {targets.dtype}")
    if not values_can_be_checked(targets.device) or targets.numel() == 0:
        return
    wrong = ((targets < 0) | (targets >= vocab_size)) & (targets != IGNORE_INDEX)
    if wrong.any():
        raise ValueError(
            f"{op}: target id {targets[wrong][0].item()} is outside the vocabulary; "
            f"allowed are 0..{vocab_size - 1} and {IGNORE_INDEX} (ignored)"
        )


def require_cu_seqlens(op: str, cu_seqlens: Tensor, num_tokens: int) -> None:
    """`cu_seqlens` is ``[S + 1]`` int, starts at 0, never decreases and ends at `num_tokens`."""
    require_tensors(op, cu_seqlens=cu_seqlens)
    if cu_seqlens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: cu_seqlens must be int64 or int32, got {cu_seqlens.dtype}")
    require(cu_seqlens.dim() == 1 and cu_seqlens.numel() >= 1, f"{op}: cu_seqlens must have shape [S + 1]")
    if not values_can_be_checked(cu_seqlens.device):
        return
    first, last = cu_seqlens[0].item(), cu_seqlens[-1].item()
    require(first == 0, f"{op}: cu_seqlens must start at 0, got {first}")
    require(last == num_tokens, f"{op}: cu_seqlens must end at the number of tokens {num_tokens}, got {last}")
    require(bool((cu_seqlens.diff() >= 0).all()), f"{op}: cu_seqlens must not decrease")


def sequence_offsets(
    op: str, shape: torch.Size, cu_seqlens: Tensor | None, device: torch.device, needed_by: str | None
) -> Tensor | None:
    """Offsets of the sequences in the flattened tensor: given for ``[N]``, one sequence per row for ``[B, T]``.

    Returns None for a packed ``[N]`` tensor without `cu_seqlens`, if they are `needed_by` no option.
    """
    if cu_seqlens is not None:
        require(len(shape) == 1, f"{op}: cu_seqlens requires packed [N] tensors, got shape {tuple(shape)}")
        require_cu_seqlens(op, cu_seqlens, shape[0])
        require_device(op, device, cu_seqlens=cu_seqlens)
        return cu_seqlens
    if len(shape) == 1:
        require(needed_by is None, f"{op}: {needed_by} needs cu_seqlens for packed [N] tensors")
        return None
    rows, length = shape
    return torch.arange(rows + 1, device=device) * length


def sequence_ids(offsets: Tensor, num_tokens: int) -> Tensor:
    """The index of the sequence that each of the `num_tokens` tokens belongs to, ``[N]`` int64."""
    tokens = torch.arange(num_tokens, device=offsets.device)
    # Unlike repeat_interleave, a search stays within bounds if unchecked offsets do not end at `num_tokens`.
    return torch.searchsorted(offsets[1:].long(), tokens, right=True).clamp(max=max(offsets.numel() - 2, 0))


def sequence_sums(values: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """The sums of ``values [N, ...]`` over each sequence, ``[S, ...]``; `ids` are those of `sequence_ids`."""
    return values.new_zeros(offsets.numel() - 1, *values.shape[1:]).index_add_(0, ids, values)
