"""The arguments that both operations on the output head take: checked, and made into a `Head` and a `Pass`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from grpo_kernels import _checks as checks
from grpo_kernels._backend import choose_backend
from grpo_kernels._head import Head
from grpo_kernels._passes import Pass
from grpo_kernels._support_pass import with_support
from grpo_kernels._torch_head import TorchHead
from grpo_kernels.budget import CPU_BUFFER_BYTES, FROZEN_GPU_BUFFER_BYTES, GPU_BUFFER_BYTES
from grpo_kernels.support import Support, check_support

# For memory, offset and length of a shard: the group of its last call, and the lengths of all its shards.
_SHARDS: dict[tuple[int, int, int], tuple[StorageWeakRef, Callable[[], dist.ProcessGroup | None], list[int]]] = {}


def make_pass(
    op: str,
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [...]
    *,
    bias: Tensor | None,  # [V]
    temperature: float | Tensor,  # [...]
    logit_scale: float,
    softcap: float | None,
    max_buffer_bytes: int | None,
    process_group: dist.ProcessGroup | None,
    with_entropy: bool,
    backend: str,
    support: Support | None = None,
    rows: Tensor | Literal["all"] | None = None,  # [n]
) -> tuple[str, Pass]:
    """Check the arguments and flatten them; return the name of the backend and the pass."""
    checks.require_tensors(op, hidden=hidden, weight=weight, targets=targets)
    checks.require_floating(op, hidden=hidden, weight=weight, bias=bias)
    checks.require_device(op, hidden.device, weight=weight, targets=targets, bias=bias)
    checks.require_product_operands(op, hidden=hidden, weight=weight, bias=bias)
    checks.require(hidden.dim() >= 1, f"{op}: hidden must have shape [..., H], got a scalar")
    checks.require(weight.dim() == 2, f"{op}: weight must have shape [V, H], got {tuple(weight.shape)}")
    checks.require(
        hidden.shape[-1] == weight.shape[1],
        f"{op}: hidden has H={hidden.shape[-1]}, but weight [V, H] has H={weight.shape[1]}",
    )
    checks.require_shape(op, hidden.shape[:-1], targets=targets)
    checks.require_shape(op, weight.shape[:1], bias=bias)
    checks.require(
        weight.shape[1] > 0 and (weight.shape[0] > 0 or process_group is not None),
        f"{op}: weight [V, H] must have V and H of at least 1, got {tuple(weight.shape)}",
    )
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"{op}: process_group must be a torch.distributed.ProcessGroup, got {process_group!r}")
    for name, number in (("softcap", softcap), ("logit_scale", logit_scale), ("max_buffer_bytes", max_buffer_bytes)):
        checks.require_finite_positive(op, name, number)
    dtype = checks.accumulation_dtype(hidden, weight)
    temperatures = _flat_temperatures(op, temperature, targets, dtype)
    backend = choose_backend(op, backend, hidden.device, dtype)
    shards = [weight.shape[0]] if process_group is None else _shard_sizes(weight, process_group)
    checks.require_targets(op, targets, sum(shards))
    head = make_head(
        weight, bias, hidden_dtype=hidden.dtype, logit_scale=logit_scale, softcap=softcap,
        max_buffer_bytes=max_buffer_bytes, process_group=process_group, shards=shards, backend=backend,
    )  # fmt: skip
    # Under no_grad, an autograd function still sees that its inputs require gradients.
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    call = Pass(
        head, hidden.reshape(-1, hidden.shape[-1]), head.local_targets(targets.reshape(-1)), temperatures,
        needs=(needs[0], needs[1], needs[2]), with_entropy=with_entropy,
    ).with_rows(op, rows)  # fmt: skip
    if support is not None:
        support = check_support(op, support, targets.reshape(-1), sum(shards))
        call = with_support(call, support, gathered=backend != "reference")
    return backend, call


def make_head(
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    *,
    hidden_dtype: torch.dtype,
    logit_scale: float,
    softcap: float | None,
    max_buffer_bytes: int | None,
    process_group: dist.ProcessGroup | None,
    shards: list[int],  # the vocabulary of every rank's shard
    backend: str,
) -> Head:
    """The head of a backend; autocast and the dtypes decide the dtype of operands."""
    device = weight.device.type
    operand_dtype = torch.promote_types(hidden_dtype, weight.dtype)
    dtype = torch.float64 if operand_dtype == torch.float64 else torch.float32
    if torch.is_autocast_enabled(device) and operand_dtype != torch.float64:
        operand_dtype = torch.get_autocast_dtype(device)
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    on_gpu = GPU_BUFFER_BYTES if trained else FROZEN_GPU_BUFFER_BYTES
    kind: type[Head] = TorchHead
    if backend == "triton":
        from grpo_kernels.triton_kernels.triton_head import TritonHead as kind
    return kind(
        weight=weight.detach(),
        bias=None if bias is None else bias.detach().contiguous(),
        logit_scale=float(logit_scale),
        softcap=softcap,
        process_group=process_group,
        max_buffer_bytes=max_buffer_bytes or (CPU_BUFFER_BYTES if device == "cpu" else on_gpu),
        # The ranks of a group must agree on the length of chunks, and their free memory differs.
        grows=max_buffer_bytes is None and process_group is None and device == "cuda",
        operand_dtype=operand_dtype,
        dtype=dtype,
        vocab_start=0 if process_group is None else sum(shards[: dist.get_rank(process_group)]),
        sizing_vocab=max(shards),
    )


def _flat_temperatures(op: str, temperature: float | Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Temperatures ``[N]`` in the accumulation dtype; None for 1."""
    if temperature is None:
        raise TypeError(f"{op}: temperature must be a number or a tensor, got None; leave it out for 1.0")
    if not isinstance(temperature, Tensor):
        checks.require_finite_positive(op, "temperature", temperature)
        smallest, largest = torch.finfo(dtype).tiny, torch.finfo(dtype).max
        checks.require(
            smallest <= temperature <= largest,
            f"{op}: temperature={temperature} is out of {dtype}'s range, {smallest:.3g} to {largest:.3g}",
        )
        return None if temperature == 1.0 else targets.new_full((targets.numel(),), temperature, dtype=dtype)
    checks.require_floating(op, temperature=temperature)
    checks.require_device(op, targets.device, temperature=temperature)
    if temperature.numel() == 1:
        temperature = temperature.reshape(()).expand(targets.shape)
    checks.require_shape(op, targets.shape, temperature=temperature)
    flat = temperature.detach().reshape(-1).to(dtype).contiguous()
    if checks.values_can_be_checked(targets.device):
        used = flat[targets.reshape(-1) != checks.IGNORE_INDEX]
        wrong = used[~(used.isfinite() & (used > 0))]
        checks.require(wrong.numel() == 0, f"{op}: temperature must be finite and above 0, got {wrong[:1].tolist()}")
    return flat


def _shard_sizes(weight: Tensor, process_group: dist.ProcessGroup) -> list[int]:
    """The vocabulary of every rank's shard, in rank order; gathered once for each weight, which waits for a GPU.

    Ranks exchange their weights for others together, so that all of them gather or none does. A weight is known by its
    memory, to which the cache holds a weak reference: another one does not get its address as long as that exists.
    """
    storage = weight.untyped_storage()
    key = storage._cdata, weight.storage_offset(), weight.shape[0]
    reference, group, sizes = _SHARDS.get(key, (None, None, []))
    if reference is None or reference.expired() or group() is not process_group:
        for old in [old for old, (reference, *_) in _SHARDS.items() if reference.expired()]:
            del _SHARDS[old]
        sizes = _gather_sizes(weight, process_group)
        _SHARDS[key] = StorageWeakRef(storage), weakref.ref(process_group), sizes
    return sizes


def _gather_sizes(weight: Tensor, process_group: dist.ProcessGroup) -> list[int]:
    size = torch.tensor([weight.shape[0]], device=weight.device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(sizes, size, group=process_group)
    return torch.cat(sizes).tolist()
