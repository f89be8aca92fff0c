"""The output head's weight and bias as whole tensors, in the forward of a wrapped module."""

from __future__ import annotations

from torch import Tensor, nn


def head_weight(head: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """``[V, H]`` and ``[V]`` (or None), differentiable; to be called inside the wrapped module's forward."""
    return head.weight, head.bias
