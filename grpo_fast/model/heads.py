"""From a transformers model's last hidden states to the loss: its output head, its wrappers and its router."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from grpo_fast.errors import UserError

T = TypeVar("T")

# Hooks run when their module is called; the output head and the modules around the model's body are not called.
HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}
# Owners of hooks that are allowed: FSDP2 and tensor parallelism, which `head_tensors` supports, and TRL's float32
# product, which is exact here anyway.
FOLLOWED = ("torch.distributed.", "trl.")

# Names of the logits' factor in the models' configs, and how to compute it from the value.
LOGIT_SCALES: dict[str, Callable[[float, Any], float]] = {
    "logit_scale": lambda value, config: value,  # Cohere
    "logits_scaling": lambda value, config: 1 / value,  # Granite
    "lm_head_multiplier": lambda value, config: value,  # Falcon-H1
    "output_multiplier": lambda value, config: value,  # Muse
    # MiniCPM, on the hidden states; MiniCPM3 calls its inverse logits_scaling as well.
    "dim_model_base": lambda value, config: 1.0 if hasattr(config, "logits_scaling") else value / config.hidden_size,
}
# Names of the bound c in ``c * tanh(logits / c)``: Gemma and others, RecurrentGemma, xLSTM.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def logit_transform(config: Any) -> dict[str, float | None]:
    """The head's `logit_scale` and `softcap` from a model's config, or from the text config of a multimodal model."""
    config = config.get_text_config()
    scale = 1.0
    for name, factor in LOGIT_SCALES.items():
        value = getattr(config, name, None)
        scale *= 1.0 if value is None else factor(value, config)
    caps = (getattr(config, name, None) for name in SOFTCAPS)
    return {"logit_scale": scale, "softcap": next((cap for cap in caps if cap), None)}


def require_temperature(temperature: Any) -> float:
    """The temperature as a number; a UserError if it is none, or outside 1e-6 to 1e6, as float32 logits require."""
    value = temperature.item() if isinstance(temperature, Tensor) and temperature.numel() == 1 else temperature
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-6 <= value <= 1e6:
        raise UserError(f"temperature must be a number from 1e-6 to 1e6, got {value!r:.60}")
    return value


def output_head(model: nn.Module) -> nn.Linear:
    """The linear layer that computes a transformers model's logits; cheap enough to be called in every forward.

    Raises:
        UserError: there is none, or it does more than multiply by its weight: it carries an adapter or a hook, has
            its own forward, or is quantised.
    """
    name = type(model).__name__
    if not hasattr(model, "get_output_embeddings"):
        raise UserError(f"{name} is not a transformers model: it has no get_output_embeddings()")
    head = model.get_output_embeddings()
    # peft's layers have a base_layer, its wrappers of whole modules and of single tokens an original_module.
    if "base_layer" in getattr(head, "_modules", ()) or hasattr(head, "original_module"):
        raise UserError(
            f"the output head of {name} carries an adapter, but the fused loss multiplies the head as it is; leave the "
            "head and embeddings tied to it out of target_modules, modules_to_save and trainable_token_indices, or "
            "merge the adapter with merge_and_unload()"
        )
    if not isinstance(head, nn.Linear):
        raise UserError(f"{name} has no linear output head, but {type(head).__name__}")
    weight = head._parameters.get("weight")
    if weight is not None:
        require_plain(f"the output head of {name}", weight)
    elif not is_parametrized(head, "weight"):
        raise UserError(f"the weight of {name}'s output head is no parameter; make it one, or use torch's parametrize")
    if type(head).forward is not nn.Linear.forward or not _is_linear(vars(head).get("forward"), head):
        raise UserError(f"the output head of {name} has its own forward, which would not run; restore nn.Linear's")
    _require_no_hooks(head, f"the output head of {name}")
    return head


def _is_linear(forward: Callable | None, head: nn.Linear) -> bool:
    """Whether an instance's own `forward`, or None, computes what nn.Linear's does."""
    if type(getattr(head, "_hf_hook", None)).__name__ == "AlignDevicesHook" and not head._hf_hook.offload:
        # accelerate's, which moves the input to the head's device.
        forward = head._old_forward
    return forward is None or getattr(forward, "__func__", None) is nn.Linear.forward or _is_followed(forward)


def _is_followed(function: Callable) -> bool:
    while isinstance(function, partial):
        function = function.func
    return (getattr(function, "__module__", None) or "").startswith(FOLLOWED)


def _require_no_hooks(module: nn.Module, name: str) -> None:
    for attribute, kind in HOOKS.items():
        for hook in getattr(module, attribute).values():
            if not _is_followed(hook):
                hook_name = getattr(hook, "__qualname__", type(hook).__name__)
                raise UserError(
                    f"{name} has a {kind} ({hook_name}), which would not run, since the hidden states go to the loss "
                    "without logits; remove it, or put it on the model's base_model"
                )


def require_no_skipped_hooks(model: nn.Module) -> None:
    """Raise a UserError if a module around the model's body, which is called alone, has a hook; see `wrappers`."""
    for module in wrappers(model):
        _require_no_hooks(module, type(module).__name__)


def body(model: nn.Module) -> nn.Module:
    """The module that computes a transformers model's last hidden states; a UserError if there is none."""
    inner = model.base_model
    # Llama 4's text model has the prefix of its multimodal form.
    inner = getattr(model, "model", model) if inner is model else inner
    if inner is model:
        raise UserError(f"{type(model).__name__} has no base_model whose hidden states its head would multiply")
    return inner


def wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """`model` and the modules that it wraps (compiled module, DDP, PeftModel); the transformers model comes last.

    Raises a UserError at a wrapper whose forward cannot be replaced.
    """
    while True:
        yield model
        if "_orig_mod" in model._modules:
            model = model._orig_mod
        elif isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(model, FullyShardedDataParallel):
            raise UserError("the model is in FullyShardedDataParallel; use fully_shard (FSDP2) instead")
        elif hasattr(model, "get_base_model") or type(model).__name__ == "PeftMixedModel":
            _require_layers_alone(model)
            yield model.base_model
            model = model.base_model.model
        else:
            return


def _require_layers_alone(model: nn.Module) -> None:
    """Refuse peft's methods that need the forward of the PeftModel, which is not called, besides that of its layers."""
    kind = getattr(model, "active_peft_config", None)
    if getattr(kind, "is_prompt_learning", False):
        raise UserError(f"{kind.peft_type.value} adds virtual tokens to the input, which is not supported")
    if getattr(kind, "alora_invocation_tokens", None):
        raise UserError("an activated LoRA (alora_invocation_tokens) is not supported; use a LoRA without them")
    tuner = type(model.base_model)
    own = next(kind for kind in tuner.__mro__ if "forward" in vars(kind)).__name__
    # AdaLoRA's only adds a term to the loss that a model computes from labels.
    if own not in ("BaseTuner", "AdaLoraModel"):
        raise UserError(f"{tuner.__name__} does more than its layers do, which is not supported; use LoRA")


def within(model: nn.Module, compute: Callable[[], T]) -> T:
    """`compute()` as the forward of the module inside DDP or FSDP2, where their hooks expect the model's work."""
    for module in wrappers(model):
        if isinstance(module, DistributedDataParallel | FSDPModule):
            break
    else:
        return compute()
    target = module.module if isinstance(module, DistributedDataParallel) else module
    own = vars(target).get("forward")

    def restore() -> None:
        vars(target).pop("forward", None)
        if own is not None:
            target.forward = own

    def forward(_: None) -> T:
        restore()
        return compute()

    target.forward = forward
    try:
        return module(None)
    finally:
        restore()


def router_loss(model: nn.Module, router_logits: tuple[Tensor, ...], attention_mask: Tensor | None) -> Tensor:
    """A mixture of experts' load-balancing loss (arXiv 2101.03961, eq. 4 to 6), computed by the model's own function.

    Args:
        model: a transformers model with `output_router_logits` in its config.
        router_logits: ``[B * T, experts]`` of every layer.
        attention_mask: ``[B, T]``, or None where every position counts.

    Raises:
        UserError: the model has no such function, no `router_aux_loss_coef` or no router logits.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    # FSDP2 puts a subclass of the model's class into another module.
    modules = (sys.modules[kind.__module__] for kind in type(model).__mro__)
    balance = next((m.load_balancing_loss_func for m in modules if hasattr(m, "load_balancing_loss_func")), None)
    if balance is None or getattr(config, "router_aux_loss_coef", None) is None:
        missing = "router_aux_loss_coef" if balance else "load_balancing_loss_func"
        raise UserError(f"output_router_logits is on, but {name} has no {missing}; switch it off in the config")
    if not router_logits:
        # In transformers 5.17 Granite's mixtures return none, and their router loss is silently 0.
        raise UserError(f"output_router_logits is on, but {name} gives no router logits; switch it off in the config")
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    return balance(router_logits, experts, config.num_experts_per_tok, attention_mask)


def head_tensors(head: nn.Linear) -> dict[str, Any]:
    """The differentiable tensors of an output head, as arguments of the operations.

    Call it inside the wrapped module's forward, and only once: each access computes a parametrization again.

    Returns:
        ``weight [V, H]`` and ``bias [V]`` or None; if tensor parallelism shards the vocabulary, this process's rows,
        and as `process_group` the processes that hold the other shards and work on the same tokens.

    Raises:
        UserError: FSDP2 has sharded the head by itself, so that it is not gathered in that forward; the head is
            sharded along another dimension than the vocabulary; or its weight is quantised.
    """
    weight, bias = head.weight, head.bias
    group = weight.device_mesh.get_group() if isinstance(weight, DTensor) else None
    weight, bias = _local(head, weight), None if bias is None else _local(head, bias)
    require_plain("the output head", weight)
    return {"weight": weight, "bias": bias, "process_group": group}


def require_plain(name: str, weight: Tensor) -> None:
    """Raise a UserError if `weight` is not of 16, 32 or 64 bits, as a matrix product requires."""
    wrapped = is_traceable_wrapper_subclass(weight) and not isinstance(weight, DTensor)
    if wrapped or weight.dtype not in DTYPES:
        kind = type(weight).__name__ if wrapped else weight.dtype
        raise UserError(f"{name} is quantised ({kind}); leave it in 16 or 32 bits")


def require_values(head: nn.Linear) -> None:
    """Raise a UserError if the head is on the meta device."""
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
        raise UserError(f"the output head is sharded as {tensor.placements}; only (Shard(0),) is supported")
    return tensor.to_local()
