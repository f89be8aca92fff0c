"""AdamW in forms that save memory: fused, with 8-bit moments, on the CPU; and its state as plain tensors.

Rounding to the nearest bfloat16 loses small updates. Weights that are trained in bfloat16 are therefore rounded
stochastically (`grpo_kernels.adamw`) or have float32 masters, and their moments are never bfloat16.
"""

from __future__ import annotations

import math
import os
import shutil
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from transformers import get_scheduler

from grpo_fast.config import GRPOConfig
from grpo_fast.distributed.processes import is_main, rank
from grpo_fast.distributed.sharding import cut_like, to_main
from grpo_fast.errors import UserError, import_extra, one_line
from grpo_kernels.adamw import adamw_

_BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}


def check_optimizer(config: GRPOConfig, device: torch.device) -> None:
    """Raise a UserError, before anything is loaded, if this device or installation lacks the optimizer."""
    on_cpu = device.type == "cpu"
    if config.optim_offload and config.optim != "adamw_torch_fused":
        raise UserError(f"optim_offload requires optim='adamw_torch_fused', not {config.optim!r}")
    if config.optim_offload and on_cpu:
        raise UserError("optim_offload=True needs a GPU: without one, the optimizer's state is already in host memory")
    if config.optim in _BITSANDBYTES and on_cpu:
        raise UserError(f"optim={config.optim!r} needs a GPU; on the CPU use 'adamw_torch_fused' or 'adamw_torch_8bit'")
    if config.optim in _BITSANDBYTES:
        import_extra("bitsandbytes", "lowbit")
    if config.optim == "adamw_torch_8bit":
        # torchao compiles its step.
        compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
        if on_cpu and not any(map(shutil.which, compilers)):
            raise UserError(
                f"torchao's optimizers need a C++ compiler on the CPU, and {' or '.join(compilers)} was not found"
            )
        import_extra("torchao", "lowbit")


def build_optimizer(policy: nn.Module, config: GRPOConfig) -> Optimizer:
    """AdamW according to `optim` and `optim_offload`, with weight decay on matrices but not on norms and biases.

    A UserError refuses weights in 16 bits whose small updates the optimizer would lose, and a model with float16
    weights, frozen ones included.
    """
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.adam_beta1, config.adam_beta2)
    options: dict[str, Any] = {"lr": config.learning_rate, "betas": betas, "eps": config.adam_epsilon}
    low = {p.dtype for p in trained} - {torch.float32, torch.float64}
    if low - {torch.bfloat16}:
        raise UserError(f"weights of {', '.join(map(str, low))} are not trained; use dtype float32 or bfloat16")
    # Frozen ones too: gradients pass through their products in their dtype.
    if any(parameter.dtype == torch.float16 for parameter in policy.parameters()):
        raise UserError(
            "the model has float16 weights, through which gradients of about 1 / tokens would underflow without a loss "
            "scale, which this trainer does not have; use dtype float32 or bfloat16"
        )
    if config.optim_offload:
        return OffloadedAdamW(groups, **options)
    if config.optim in _BITSANDBYTES:
        if low:
            raise UserError(
                f"optim={config.optim!r} would lose small updates of bfloat16 weights; use optim='adamw_torch_8bit', "
                "which rounds stochastically, or dtype='float32' with bf16=True, or use_peft=True"
            )
        return getattr(import_extra("bitsandbytes.optim", "lowbit"), _BITSANDBYTES[config.optim])(groups, **options)
    if config.optim == "adamw_torch_8bit":
        return _adamw_8bit()(groups, **options, bf16_stochastic_round=True)
    if low:
        return StochasticAdamW(groups, **options, seed=config.seed)
    return torch.optim.AdamW(groups, **options, fused=True)


class _ExactState:
    """Loads state exactly as it was saved, whereas torch casts and moves it to the dtype and device of the weights."""

    def place(self, parameter: Tensor, key: str) -> torch.device:
        return parameter.device

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        parameters = _parameters(self)
        for index, values in state_dict["state"].items():
            parameter = parameters[index]
            self.state[parameter] = {key: value.to(self.place(parameter, key)) for key, value in values.items()}


@cache
def _adamw_8bit() -> Any:
    base = import_extra("torchao.optim", "lowbit").AdamW8bit

    class AdamW8bit(_ExactState, base):
        """torchao's AdamW with 8-bit moments, or float32 moments for tensors that are too small to be quantised.

        torchao keeps those small moments in the weights' dtype. In bfloat16 the second moment would stop at a quarter
        of its value, since its updates of one in a thousand are rounded away, and every step would be twice too long.
        """

        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            buffer = super()._new_buffer(p, signed)
            return buffer.float() if type(buffer) is Tensor else buffer

        def place(self, parameter: Tensor, key: str) -> torch.device:
            return torch.device("cpu") if key == "step" else parameter.device

    return AdamW8bit


class _AdamW(_ExactState, torch.optim.AdamW):
    """AdamW without a default weight decay; a subclass defines the step."""

    def __init__(self, params: Any, **options: Any):
        super().__init__(params, **{"weight_decay": 0.0, **options})


class StochasticAdamW(_AdamW):
    """AdamW for bfloat16 weights: float32 moments, and new weights rounded up or down at random.

    The expected rounded weight is the unrounded one, so updates far below a weight's precision count (as with torchao's
    ``bf16_stochastic_round``, but nothing is compiled). Weights of other dtypes are not rounded. The random bits depend
    on `seed`, on the number of the step and on the place of the weight alone, so a resumed run rounds as one that was
    not interrupted. On a GPU each tensor is one kernel, and the host waits for nothing.
    """

    def __init__(self, params: Any, seed: int = 0, **options: Any):
        super().__init__(params, **options)
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        index = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, group, index)
                index += 1

    def place(self, parameter: Tensor, key: str) -> torch.device:
        # The host computes with the number of the step.
        return torch.device("cpu") if key == "step" else parameter.device

    def _step(self, p: Tensor, group: dict[str, Any], index: int) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), device="cpu")
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(p, dtype=torch.float32)
        state["step"] += 1
        # For a sharded weight, this process's shard.
        tensors = (p.detach(), p.grad, state["exp_avg"], state["exp_avg_sq"])
        adamw_(
            *(t.to_local() if isinstance(t, DTensor) else t for t in tensors), step=int(state["step"]),
            seed=(self.seed, index, rank() if isinstance(p, DTensor) else 0), lr=group["lr"], betas=group["betas"],
            eps=group["eps"], weight_decay=group["weight_decay"],
        )  # fmt: skip


def _fused_step(
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: Tensor, group: dict[str, Any]
) -> None:
    adamw(
        [weight], [grad], [mean], [square], [], [step],
        fused=True, amsgrad=False, maximize=False, lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
        eps=group["eps"], weight_decay=group["weight_decay"],
    )  # fmt: skip


class OffloadedAdamW(_AdamW):
    """AdamW whose float32 weights and moments stay in host memory, where its fused step runs.

    It takes 12 bytes of host memory per weight, and on the device only the weights (of any dtype) and gradients.
    Unlike torchao's `CPUOffloadOptimizer`, which copies gradients out during the backward, it reads them at the step,
    so clipping has an effect, and the masters of bfloat16 weights are float32. While the CPU updates one tensor, the
    next gradient is copied; two pinned buffers as long as the longest tensor serve all of them. All parameters must be
    on one device.
    """

    def __init__(self, params: Any, **options: Any):
        super().__init__(params, **options)
        self.staging: list[Tensor] = []
        self.stream: torch.Stream | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        work = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not work:
            return
        self._prepare([p for p, _ in work])
        arriving = self._fetch(work[0][0], 0)
        for index, (p, group) in enumerate(work):
            staged, event = arriving
            if index + 1 < len(work):
                arriving = self._fetch(work[index + 1][0], index + 1)
            if event is not None:
                event.synchronize()
            state = self.state[p]
            _fused_step(state["master"], staged.float(), state["exp_avg"], state["exp_avg_sq"], state["step"], group)
            with self._beside():
                p.copy_(staged.copy_(state["master"]), non_blocking=True)
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)

    def place(self, parameter: Tensor, key: str) -> torch.device:
        return torch.device("cpu")

    def _prepare(self, parameters: list[Tensor]) -> None:
        on_gpu = parameters[0].is_cuda
        longest = max(p.numel() * p.element_size() for p in parameters)
        if not self.staging:
            self.staging = [torch.empty(longest, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
            self.stream = torch.cuda.Stream() if on_gpu else None
        for p in parameters:
            if not self.state[p]:
                master = p.detach().to("cpu", torch.float32, copy=True).contiguous()
                moments = {key: torch.zeros_like(master) for key in ("exp_avg", "exp_avg_sq")}
                self.state[p] = {"step": torch.tensor(0.0), **moments, "master": master}
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())

    def _fetch(self, p: Tensor, index: int) -> tuple[Tensor, torch.Event | None]:
        """Start the copy of a gradient into its staging buffer, after the buffer's previous copy back."""
        buffer = self.staging[index % 2][: p.numel() * p.element_size()].view(p.dtype).view(p.shape)
        with self._beside():
            buffer.copy_(p.grad, non_blocking=True)
            return buffer, None if self.stream is None else self.stream.record_event()

    def _beside(self):
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as plain, contiguous CPU tensors that share no memory with each other.

    Names are ``<parameter index>.<key>``; the parts of a quantised moment are ``<index>.<key>.codes``, ``.scale`` and
    ``.qmap``, a plain integer is ``<index>.<key>.int``, and ``lr.<group>`` is a group's learning rate (float64).
    Parameters are numbered as in `state_dict`. Other hyperparameters are part of the configuration and are left out.
    The first process gathers sharded tensors; the other processes return nothing.
    """
    saved = optimizer.state_dict()
    tensors = {
        f"lr.{index}": torch.as_tensor(group["lr"], dtype=torch.float64, device="cpu")
        for index, group in enumerate(saved["param_groups"])
    }
    for index, values in saved["state"].items():
        # bitsandbytes nests some of its tensors one level deeper.
        nested = [value if isinstance(value, dict) else {key: value} for key, value in values.items()]
        for key, value in (item for part in nested for item in part.items()):
            name = f"{index}.{key}"
            if hasattr(value, "__tensor_flatten__") and not isinstance(value, DTensor):
                tensors |= {f"{name}.{part}": _plain(getattr(value, part)) for part in value.__tensor_flatten__()[0]}
            elif isinstance(value, DTensor):
                tensors[name] = to_main(value)
            elif isinstance(value, Tensor):
                tensors[name] = _plain(value)
            else:
                tensors[f"{name}.int"] = torch.tensor(value, dtype=torch.int64)
    return tensors if is_main() else {}


def load_optimizer_tensors(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load what `optimizer_tensors` took from a like optimizer, bit for bit; a UserError for other parameters."""
    parameters = _parameters(optimizer)
    state: dict[int, dict[str, Any]] = {}
    quantised: dict[int, dict[str, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        first, key, *part = name.split(".")
        if first == "lr":
            continue
        index = int(first)
        if index >= len(parameters):
            raise UserError(f"the optimizer's state holds tensor {index}, but the model trains {len(parameters)}")
        values = state.setdefault(index, {})
        if part == ["int"]:
            values[key] = int(tensor)
        elif part:
            quantised.setdefault(index, {}).setdefault(key, {})[part[0]] = tensor.clone()
        else:
            like = parameters[index] if tensor.shape == parameters[index].shape else tensor
            values[key] = cut_like(tensor, like).clone()
    for index, moments in quantised.items():
        kind = import_extra("torchao.optim.subclass_8bit", "lowbit").OptimState8bit
        for key, pieces in moments.items():
            # The map of a signed moment begins below 0, that of a squared moment at 0.
            signed = bool(pieces["qmap"][0] < 0)
            state[index][key] = kind(**pieces, signed=signed, dtype=parameters[index].dtype)
    for index, values in state.items():
        shape = tuple(parameters[index].shape)
        for key in ("exp_avg", "state1"):
            if key in values and tuple(values[key].shape) != shape:
                raise UserError(
                    f"the optimizer's state of tensor {index} has shape {tuple(values[key].shape)}, "
                    f"but the model's tensor has {shape}"
                )
    groups = optimizer.state_dict()["param_groups"]
    for index, group in enumerate(groups):
        rate = tensors[f"lr.{index}"]
        group["lr"] = rate.to(group["lr"]) if isinstance(group["lr"], Tensor) else rate.item()
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    """The optimizer's parameters in the order of their numbers in `state_dict`."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def build_scheduler(optimizer: Optimizer, config: GRPOConfig) -> torch.optim.lr_scheduler.LRScheduler:
    """transformers' schedule; as in transformers, `warmup_steps` below 1, or else `warmup_ratio`, is a share of the
    steps, rounded up."""
    warmup = config.warmup_steps or config.warmup_ratio or 0
    share = warmup < 1 or not config.warmup_steps
    warmup = math.ceil(warmup * config.max_steps) if share else int(warmup)
    try:
        return get_scheduler(
            config.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=config.max_steps
        )
    except ValueError as error:
        raise UserError(f"lr_scheduler_type={config.lr_scheduler_type!r}: {one_line(error)}") from None
