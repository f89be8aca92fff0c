"""The output head's weight and bias as whole tensors, in the forward of a wrapped module."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from grpo_fast.errors import UserError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class HeadTensors(NamedTuple):
    """Of an output head, differentiable.

    Attributes:
        weight: ``[V, H]``; of a head that tensor parallelism has cut along the vocabulary, the rows of this process.
        bias: ``[V]``, or None.
        group: the processes that have a part of the vocabulary each, for the operations' `process_group`; None for a
            whole head. All of them work on the same tokens.
    """

    weight: Tensor
    bias: Tensor | None
    group: Any


def head_tensors(head: nn.Linear) -> HeadTensors:
    """To be called inside the wrapped module's forward, and once: a parametrization is computed at each access.

    Raises:
        UserError: FSDP2 has sharded the head by itself, so that it is not gathered in that forward; it is cut
            otherwise; or its weight is quantised.
    """
    weight, bias = head.weight, head.bias
    group = weight.device_mesh.get_group() if isinstance(weight, DTensor) else None
    weight, bias = _local(head, weight), None if bias is None else _local(head, bias)
    require_plain("the output head", weight)
    return HeadTensors(weight, bias, group)


def require_plain(name: str, weight: Tensor) -> None:
    """Refuse weights that a matrix product does not take as they are.

    Raises:
        UserError: `weight` is not of 16, 32 or 64 bits.
    """
    wrapped = is_traceable_wrapper_subclass(weight) and not isinstance(weight, DTensor)
    if wrapped or weight.dtype not in DTYPES:
        kind = type(weight).__name__ if wrapped else weight.dtype
        raise UserError(f"{name} is quantised ({kind}); leave it in 16 or 32 bits")


def require_values(head: nn.Linear) -> None:
    """Refuse a head that is still, or again, on the meta device.

    Raises:
        UserError: it is.
    """
    if next(head.parameters()).is_meta:
        raise UserError("the output head is on the meta device, without values; load or move the model before the call")


def _local(head: nn.Module, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    if isinstance(head, FSDPModule):
        raise UserError(
            "the output head is sharded by itself and is not gathered with the model; leave it to fully_shard(model), "
            "or to the group of the last norm: fully_shard([model.model.norm, model.lm_head])"
        )
    if tensor.placements != (Shard(0),):
        raise UserError(f"the output head is cut as {tensor.placements}; only the vocabulary may be, as (Shard(0),)")
    return tensor.to_local()
