"""A policy over several processes: whole in each (DDP), or a shard of every weight in each (FSDP2).

Gradients are summed over the processes, not averaged, since the tokens' weights are those of the whole step. With FSDP2
each layer is gathered for its own forward and backward; the other weights (embeddings, last norm, output head) are
gathered once per microbatch, in the policy's forward, and kept until its backward. Gradients are scattered after each
microbatch, so that none stays whole for longer; DDP sums them after the last one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from grpo_fast.config import GRPOConfig
from grpo_fast.distributed import processes
from grpo_fast.errors import UserError
from grpo_fast.model.packing import empty_microbatch

# accelerate's engines that are supported, and the only values of fields that sharded weights support.
_ENGINES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
_SHARDED_ONLY = {"load_in_4bit": False, "optim": "adamw_torch_fused", "optim_offload": False}


def is_sharded(config: GRPOConfig) -> bool:
    """Whether every process holds a shard of each weight, according to the configuration or to accelerate's."""
    return processes.size() > 1 and (config.fsdp or _launched_sharded())


def _launched_sharded() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_processes(config: GRPOConfig, accelerator: Accelerator) -> None:
    """Raise a UserError, before anything is loaded, for a field that several processes do not support."""
    if processes.size() == 1:
        return
    if accelerator.distributed_type not in _ENGINES:
        raise UserError(
            f"accelerate's {accelerator.distributed_type.value} is not supported; use DDP (MULTI_GPU), or FSDP with "
            "fsdp_version: 2"
        )
    if config.use_vllm and config.vllm_mode == "colocate":
        raise UserError("vllm_mode='colocate' supports one process only; several require vllm_mode='server'")
    if config.layers_on_host:
        raise UserError("layers_on_host supports one process only")
    if not is_sharded(config):
        return
    for name, allowed in _SHARDED_ONLY.items():
        if getattr(config, name) != allowed:
            raise UserError(f"{name}={getattr(config, name)!r} is not supported with FSDP: it must be {allowed!r}")
    plugin = fsdp_plugin()
    if plugin.fsdp_version != 2:
        raise UserError(f"fsdp_version: {plugin.fsdp_version} is not supported in accelerate's file; set it to 2")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise UserError("fsdp_offload_params: true is not supported in accelerate's file; set it to false")
    if plugin.activation_checkpointing:
        raise UserError("instead of fsdp_activation_checkpointing in accelerate's file, set gradient_checkpointing")
    # transformers would read weights in the first process only; here each reads them and keeps its shard.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def fsdp_plugin() -> FullyShardedDataParallelPlugin:
    """The settings of accelerate's file, or the defaults."""
    return FullyShardedDataParallelPlugin(**({} if _launched_sharded() else {"fsdp_version": 2}))


def ddp_arguments() -> DistributedDataParallelKwargs:
    """Options of accelerate's DDP."""
    return DistributedDataParallelKwargs(gradient_as_bucket_view=True)


def sum_gradients(policy: nn.Module) -> None:
    """Make DDP sum the processes' gradients instead of averaging them."""
    if isinstance(policy, DistributedDataParallel):
        policy.register_comm_hook(None, _sum_bucket)


# Not annotated: DDP compares annotations with its classes, but here they would be strings.
def _sum_bucket(state, bucket):
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


def shard(policy: nn.Module, config: GRPOConfig, device: torch.device) -> None:
    """Replace the weights of `policy` (a FusedPolicy on the CPU) by this process's shards, in place.

    Raises:
        UserError: the model does not name its layers.
    """
    model, plugin = policy.model, fsdp_plugin()
    names = set(plugin.transformer_cls_names_to_wrap or getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(
            f"FSDP: {type(model).__name__} does not name its layers; set fsdp_transformer_layer_cls_to_wrap in "
            "accelerate's file"
        )
    low = torch.bfloat16 if config.bf16 else None
    half = config.bf16 or model.dtype == torch.bfloat16
    options = {
        "mesh": init_device_mesh(device.type, (processes.size(),)),
        # The loss's arguments keep their precision.
        "mp_policy": MixedPrecisionPolicy(low, torch.float32 if half else None, cast_forward_inputs=False),
    }
    for layer in layers:
        fully_shard(layer, reshard_after_forward=plugin.reshard_after_forward, **options)
    fully_shard(policy, reshard_after_forward=False, **options)
    for module in _shards(policy):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    # Sampling uses whole weights; with this mark, transformers would make the processes wait for each other's tokens.
    model._is_fsdp_managed_module = False
    # The first forward determines which module is the outermost one, and which weights are trained.
    with torch.no_grad():
        policy(empty_microbatch(0, packed=False).to(device))
    release(policy)


def _shards(policy: nn.Module) -> list[FSDPModule]:
    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


@contextmanager
def whole_weights(policy: nn.Module) -> Iterator[None]:
    """Within it, every process holds all weights of the policy, for sampling or sending, not for training."""
    shards, reshard = _shards(policy), fsdp_plugin().reshard_after_forward
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.set_reshard_after_forward(module is not policy and reshard, recurse=False)
            module.reshard()


@contextmanager
def outer_weights(policy: nn.Module) -> Iterator[None]:
    """Within it, the weights outside the layers are whole, for forwards of the model inside the policy."""
    if isinstance(policy, FSDPModule):
        policy.unshard()
    try:
        yield
    finally:
        release(policy)


def release(policy: nn.Module) -> None:
    """Reshard the weights that a forward without a backward has left gathered: an update would not reach them."""
    if isinstance(policy, FSDPModule):
        policy.reshard()


def without_sync(policy: nn.Module, last: bool) -> AbstractContextManager:
    """Around a microbatch: DDP sums the gradients only after the last one."""
    waits = isinstance(policy, DistributedDataParallel) and not last
    return policy.no_sync() if waits else nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, in every process, if each holds a shard of it; any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(model: nn.Module, trained_only: bool = False) -> dict[str, Tensor]:
    """The state dict of a sharded model with whole tensors on the CPU; empty in all but the first process.

    Tied weights are one tensor. With `trained_only`, it holds only trained weights.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[int, Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        own = parameters.get(name, tensor)
        if own.requires_grad or not trained_only:
            if id(own) not in found:
                found[id(own)] = to_main(tensor)
            state[name] = found[id(own)]
    return state if processes.is_main() else {}


def to_main(tensor: Tensor) -> Tensor | None:
    """The whole tensor on the CPU, in the first process; every process must call it."""
    tensor = whole(tensor.detach())
    return tensor.cpu().contiguous() if processes.is_main() else None


def cut_like(tensor: Tensor, own: Tensor) -> Tensor:
    """This process's shard of a whole tensor that every process holds, if `own` is sharded; else the tensor itself."""
    if not isinstance(own, DTensor):
        return tensor
    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
