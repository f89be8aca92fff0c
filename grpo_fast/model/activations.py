"""What a forward keeps for its backward: checkpoints, their offloading to host memory, and tiled MLPs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError, import_extra

# Smaller tensors stay on the device: copying them costs more time than the memory is worth.
MIN_OFFLOADED_BYTES = 1 << 20
# Tokens of one MLP tile: enough for matrix products at full speed.
MLP_TILE_TOKENS = 2048


def check_activations(config: GRPOConfig, device: torch.device) -> None:
    """Refuse, before anything is loaded, what this device or installation does not support.

    Raises:
        UserError: use_liger_kernel without a GPU or without liger-kernel.
    """
    if config.use_liger_kernel:
        if device.type == "cpu":
            raise UserError("use_liger_kernel=True needs a GPU: its kernels are written in Triton")
        import_extra("liger_kernel", "liger")


def prepare_activations(model: nn.Module, config: GRPOConfig) -> None:
    """Change `model` (a transformers causal LM) in place according to the configuration's activation fields.

    Raises:
        UserError: the model does not support one of them.
    """
    if config.use_liger_kernel:
        _use_liger_kernel(model)
    if config.tiled_mlp:
        tile_mlps(model)
    if config.gradient_checkpointing:
        # The older name is deprecated where the newer one exists.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        try:
            enable({"use_reentrant": False})
        except ValueError as error:
            raise UserError(f"gradient_checkpointing=True: {error}") from None
    if config.activation_offloading:
        offload_checkpoints(model)


def _use_liger_kernel(model: nn.Module) -> None:
    patch = import_extra("liger_kernel.transformers.monkey_patch", "liger")
    kind = model.config.model_type
    if kind not in patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = ", ".join(sorted(patch.MODEL_TYPE_TO_APPLY_LIGER_FN))
        raise UserError(f"use_liger_kernel=True does not support model type {kind!r}, only {known}")
    # Our loss is computed without logits, so liger-kernel's cross entropies are not needed.
    patch._apply_liger_kernel_to_instance(
        model, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False
    )


def tile_mlps(model: nn.Module, tokens: int = MLP_TILE_TOKENS) -> int:
    """Compute every MLP in tiles of `tokens` tokens, each recomputed in the backward; returns how many MLPs.

    The intermediates of one tile exist at a time, instead of those of all tokens. torch's checkpoint around each tile
    handles dropout, autocast and inputs that need no gradient; liger-kernel 0.8.5's ``apply_tiled_mlp`` draws dropout
    again in the backward, without autocast, and gives adapters after an input without gradient none.

    Raises:
        UserError: the model has no MLPs, or they are mixtures of experts, whose router needs all tokens at once.
    """
    mlps = [m.mlp for m in model.modules() if isinstance(getattr(m, "mlp", None), nn.Module)]
    if not mlps:
        raise UserError(f"tiled_mlp=True: the layers of {type(model).__name__} have no module named 'mlp'")
    for mlp in mlps:
        if any("expert" in name or "router" in name for name, _ in mlp.named_modules()):
            raise UserError(f"tiled_mlp=True is for dense MLPs, but {type(mlp).__name__} is a mixture of experts")
        mlp.forward = partial(_tiled, mlp.forward, tokens)
    return len(mlps)


def _tiled(forward: Callable[[Tensor], Tensor], tokens: int, hidden: Tensor) -> Tensor:
    flat = hidden.reshape(-1, hidden.shape[-1])
    if len(flat) <= tokens:
        return forward(hidden)
    return torch.cat([checkpoint(forward, tile, use_reentrant=False) for tile in flat.split(tokens)]).view_as(hidden)


def offload_checkpoints(model: nn.Module, min_bytes: int = MIN_OFFLOADED_BYTES) -> ActivationOffloader:
    """Keep the inputs of `model`'s checkpointed layers in host memory until their backward.

    Raises:
        UserError: the model's layers do not checkpoint themselves.
    """
    layers = list(checkpointed_layers(model))
    if not layers:
        raise UserError(f"activation_offloading=True: {type(model).__name__} has no layers that checkpoint themselves")
    offloader = ActivationOffloader(min_bytes)
    for index, layer in enumerate(layers):
        # The backward begins with the last layer and needs its input at once, so that stays.
        keep = index == len(layers) - 1
        layer._gradient_checkpointing_func = partial(offloader.run, keep, layer._gradient_checkpointing_func)
    return offloader


def checkpointed_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of a model that checkpoint themselves, in the order of the forward."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func"):
            # Modules that contain layers have the same attributes, but do not checkpoint.
            below = (m for child in module.children() for m in child.modules())
            if not any(getattr(m, "gradient_checkpointing", False) for m in below):
                yield module


class Saved:
    """A tensor kept for the backward, on its device or in a buffer of host memory."""

    def __init__(self, tensor: Tensor, previous: Saved | None):
        self.tensor: Tensor | None = tensor
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.previous = (lambda: None) if previous is None else weakref.ref(previous)
        self.host: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None


class ActivationOffloader:
    """Moves what layers save to host memory in the forward, and back one layer ahead in the backward.

    On a GPU the copies run on a separate stream, beside the computation. A tensor's memory on the device is free once
    the next layer begins, which waits for the copy; so at most one layer's tensors are on their way out, however far
    the CPU has run ahead. Host buffers are pinned, of a power of two bytes (torch pins no other sizes), and reused in
    every step. On a CPU the copies are plain ones.
    """

    def __init__(self, min_bytes: int = MIN_OFFLOADED_BYTES):
        self.min_bytes = min_bytes
        self.free: list[Tensor] = []
        self.stream: torch.cuda.Stream | None = None
        self.leaving: list[Saved] = []
        self.latest: Callable[[], Saved | None] = lambda: None
        # By address: the storage (which may be gone, and its address reused), and what was saved of it.
        self.seen: dict[tuple, tuple[StorageWeakRef, Callable[[], Saved | None]]] = {}

    def run(self, keep: bool, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call `function`, a checkpoint, and offload what it saves; with `keep`, leave it on the device."""
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        self._let_go()
        with torch.autograd.graph.saved_tensors_hooks(partial(self._pack, keep), self._unpack):
            return function(*args, **kwargs)

    def _pack(self, keep: bool, tensor: Tensor) -> Saved | Tensor:
        if isinstance(tensor, nn.Parameter) or tensor.nbytes < self.min_bytes:
            return tensor
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        key += (tensor._version,)
        self.seen = {key: value for key, value in self.seen.items() if value[1]() is not None}
        if key in self.seen:
            known, earlier = self.seen[key]
            if (saved := earlier()) is not None and not known.expired():
                return saved
        saved = Saved(tensor, self.latest())
        self.latest = weakref.ref(saved)
        if not keep:
            self.seen[key] = (StorageWeakRef(storage), self.latest)
            self._send(saved, tensor)
        return saved

    def _send(self, saved: Saved, tensor: Tensor) -> None:
        saved.host = self._buffer(tensor)
        # The graph owns what was saved; when it is deleted, with or without a backward, the buffer is free.
        weakref.finalize(saved, self.free.append, saved.host)
        saved.arrived = self._copy(_view(saved), tensor, tensor.device)
        self.leaving.append(saved)

    def _let_go(self) -> None:
        """Free the memory of what is on its way out. The computation's stream, not the CPU, waits for the copy."""
        for saved in self.leaving:
            self._wait(saved)
            saved.tensor = None
        self.leaving.clear()

    def _unpack(self, saved: Saved | Tensor) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self._let_go()
        tensor = self._fetch(saved)
        self._wait(saved)
        if saved.host is not None:
            saved.tensor = None
        if (previous := saved.previous()) is not None:
            self._fetch(previous)
        return tensor

    def _fetch(self, saved: Saved) -> Tensor:
        if saved.tensor is None:
            saved.tensor = torch.empty(saved.shape, dtype=saved.dtype, device=saved.device)
            saved.arrived = self._copy(saved.tensor, _view(saved), saved.device)
        return saved.tensor

    def _wait(self, saved: Saved) -> None:
        if saved.arrived is not None:
            torch.cuda.current_stream(saved.device).wait_event(saved.arrived)
            saved.arrived = None

    def _copy(self, target: Tensor, source: Tensor, device: torch.device) -> torch.cuda.Event | None:
        """On a GPU, begin a copy after the work queued so far, and return the event of its end."""
        if device.type != "cuda":
            target.copy_(source)
            return None
        self.stream = self.stream or torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def _buffer(self, tensor: Tensor) -> Tensor:
        fitting = [index for index, buffer in enumerate(self.free) if buffer.numel() >= tensor.nbytes]
        if fitting:
            return self.free.pop(min(fitting, key=lambda index: self.free[index].numel()))
        size = 1 << (tensor.nbytes - 1).bit_length()
        return torch.empty(size, dtype=torch.uint8, pin_memory=tensor.is_cuda)


def _view(saved: Saved) -> Tensor:
    """The host buffer of `saved` as a tensor like it."""
    size = saved.shape.numel() * saved.dtype.itemsize
    return saved.host[:size].view(saved.dtype).view(saved.shape)
