"""The output head's weight and bias as whole tensors, in the forward of a wrapped module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from grpo_fast.errors import UserError


def head_weight(head: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """``[V, H]`` and ``[V]`` (or None), differentiable; to be called inside the wrapped module's forward.

    Of a head that tensor parallelism has cut along the vocabulary, the rows of this process; see `head_group`.

    Raises:
        UserError: FSDP2 has sharded the head by itself, so that it is not gathered in that forward; or it is cut
            otherwise.
    """
    return _local(head, head.weight), None if head.bias is None else _local(head, head.bias)


def head_group(head: nn.Linear) -> Any:
    """The processes that have a part of the vocabulary each, for the operations' `process_group`; None for a whole
    head. All of them work on the same tokens."""
    return head.weight.device_mesh.get_group() if isinstance(head.weight, DTensor) else None


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
