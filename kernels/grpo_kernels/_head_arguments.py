"""The arguments that both operations on the output head take: checked, and made into a `Head`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_kernels._checks import (
    IGNORE_INDEX,
    accumulation_dtype,
    require,
    require_device,
    require_finite_positive,
    require_floating,
    require_product_operands,
    require_shape,
    require_targets,
    require_tensors,
    values_can_be_checked,
)
from grpo_kernels._head import Head
from grpo_kernels.budget import CPU_BUFFER_BYTES, FROZEN_GPU_BUFFER_BYTES, GPU_BUFFER_BYTES


def make_head(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    max_buffer_bytes: int | None,
    process_group: dist.ProcessGroup | None,
) -> tuple[Head, Tensor | None]:
    """Check the arguments that both operations take; return the head and per-token temperatures (None for 1)."""
    require_tensors(op, hidden=hidden, weight=weight, targets=targets)
    require_floating(op, hidden=hidden, weight=weight, bias=bias)
    require_device(op, hidden.device, weight=weight, targets=targets, bias=bias)
    require_product_operands(op, hidden=hidden, weight=weight, bias=bias)
    require(hidden.dim() >= 1, f"{op}: hidden must have shape [..., H], got a scalar")
    require(weight.dim() == 2, f"{op}: weight must have shape [V, H], got {tuple(weight.shape)}")
    require(
        hidden.shape[-1] == weight.shape[1],
        f"{op}: hidden has H={hidden.shape[-1]}, but weight [V, H] has H={weight.shape[1]}",
    )
    require_shape(op, hidden.shape[:-1], targets=targets)
    require_shape(op, weight.shape[:1], bias=bias)
    require(
        weight.shape[1] > 0 and (weight.shape[0] > 0 or process_group is not None),
        f"{op}: weight [V, H] must have V and H of at least 1, got {tuple(weight.shape)}",
    )
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"{op}: process_group must be a torch.distributed.ProcessGroup, got {process_group!r}")
    require_finite_positive(op, "softcap", softcap)
    require_finite_positive(op, "logit_scale", logit_scale)
    require_finite_positive(op, "max_buffer_bytes", max_buffer_bytes)
    dtype = accumulation_dtype(hidden, weight)

    if temperature is None:
        raise TypeError(f"{op}: temperature must be a number or a tensor, got None; leave it out for 1.0")
    if isinstance(temperature, Tensor):
        require_floating(op, temperature=temperature)
        require_device(op, hidden.device, temperature=temperature)
        if temperature.numel() == 1:
            temperature = temperature.reshape(()).expand(targets.shape).contiguous()
        require_shape(op, targets.shape, temperature=temperature)
        temperatures = temperature.detach().reshape(-1).to(dtype).contiguous()
        if values_can_be_checked(hidden.device):
            used = temperatures[targets.reshape(-1) != IGNORE_INDEX]
            wrong = used[~(used.isfinite() & (used > 0))]
            require(wrong.numel() == 0, f"{op}: temperature must be finite and above 0, got {wrong[:1].tolist()}")
    else:
        require_finite_positive(op, "temperature", temperature)
        smallest, largest = torch.finfo(dtype).tiny, torch.finfo(dtype).max
        require(
            smallest <= temperature <= largest,
            f"{op}: temperature={temperature} is out of {dtype}'s range, {smallest:.3g} to {largest:.3g}",
        )
        temperatures = None if temperature == 1.0 else hidden.new_full((targets.numel(),), temperature, dtype=dtype)

    device = hidden.device.type
    operand_dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(device) and operand_dtype != torch.float64:
        operand_dtype = torch.get_autocast_dtype(device)
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    on_gpu = GPU_BUFFER_BYTES if trained else FROZEN_GPU_BUFFER_BYTES
    default = CPU_BUFFER_BYTES if device == "cpu" else on_gpu
    shards = [weight.shape[0]]
    rank = 0
    if process_group is not None:
        rank, shards = dist.get_rank(process_group), _gather_sizes(weight, process_group)
    head = Head(
        weight=weight.detach(),
        bias=None if bias is None else bias.detach().contiguous(),
        logit_scale=float(logit_scale),
        softcap=softcap,
        process_group=process_group,
        max_buffer_bytes=max_buffer_bytes or default,
        operand_dtype=operand_dtype,
        dtype=dtype,
        vocab_start=sum(shards[:rank]),
        sizing_vocab=max(shards),
    )
    require_targets(op, targets, sum(shards))
    return head, temperatures


def _gather_sizes(weight: Tensor, process_group: dist.ProcessGroup) -> list[int]:
    """The vocabulary of every rank's shard, in rank order."""
    size = torch.tensor([weight.shape[0]], device=weight.device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(sizes, size, group=process_group)
    return torch.cat(sizes).tolist()
