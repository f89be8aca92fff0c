"""Mean over the entries that a mask selects.

    masked_mean(x, m, dim) = (x * m).sum(dim) / m.sum(dim)

The mean of an empty selection is NaN, as in ``torch.mean`` of an empty tensor. Entries outside the mask affect neither
the result nor the gradient, even if they are NaN or infinite. Sums are float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels._backend import choose_backend
from grpo_kernels._checks import accumulation_dtype, require, require_device, require_floating, require_tensors


def masked_mean(
    values: Tensor,  # any shape
    mask: Tensor,  # a shape that broadcasts to that of `values`
    dim: int | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Mean of `values` over the entries where `mask` is set, differentiable in `values`.

    Args:
        values: floating-point tensor of any shape.
        mask: boolean or 0/1 tensor of the same shape, or one that broadcasts to it.
        dim: dimension to reduce, or None for all of them.
        backend: ``"auto"`` (Triton on a supported GPU, else torch), ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        float32 (float64 for float64 `values`): a scalar, or `values` without `dim`. NaN where the mask is empty.

    Raises:
        ValueError: `mask` does not broadcast to `values`, devices differ, or `backend` is unknown.
        IndexError: `dim` is out of range.
        TypeError: `values` is not floating point.
    """
    op = "masked_mean"
    require_tensors(op, values=values, mask=mask)
    require_floating(op, values=values)
    require_device(op, values.device, mask=mask)
    try:
        broadcast = torch.broadcast_shapes(values.shape, mask.shape)
    except RuntimeError:
        broadcast = None
    require(
        broadcast == values.shape,
        f"{op}: mask of shape {tuple(mask.shape)} does not broadcast to values of shape {tuple(values.shape)}",
    )
    if dim is not None and not -values.dim() <= dim < values.dim():
        raise IndexError(f"{op}: dim={dim} is out of range for values of shape {tuple(values.shape)}")
    if choose_backend(op, backend, values.device, accumulation_dtype(values)) == "triton":
        from grpo_kernels.triton_kernels.elementwise_kernels import MaskedMeanTriton

        return MaskedMeanTriton.apply(values, mask, dim)
    return masked_mean_ref(values, mask, dim)


def masked_mean_ref(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """The definition above in PyTorch, which is also the torch backend; autograd saves the mask and its counts."""
    mask = mask.bool().expand(values.shape)
    selected = torch.where(mask, values.to(accumulation_dtype(values)), 0.0)
    return selected.sum() / mask.sum() if dim is None else selected.sum(dim) / mask.sum(dim)
