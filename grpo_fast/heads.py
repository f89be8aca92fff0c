"""What a transformers model does to its hidden states on the way to the loss: its head, its wrappers, its router."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from grpo_fast.errors import UserError

T = TypeVar("T")

# What a model's config calls the factor of its logits, and how it becomes one.
LOGIT_SCALES: dict[str, Callable[[float, Any], float]] = {
    "logit_scale": lambda value, config: value,  # Cohere
    "logits_scaling": lambda value, config: 1 / value,  # Granite
    "lm_head_multiplier": lambda value, config: value,  # Falcon-H1
    "output_multiplier": lambda value, config: value,  # Muse
    # MiniCPM, on the hidden states; MiniCPM3 calls its inverse logits_scaling as well.
    "dim_model_base": lambda value, config: 1.0 if hasattr(config, "logits_scaling") else value / config.hidden_size,
}
# What it calls the bound c of ``c * tanh(logits / c)``: Gemma and others, RecurrentGemma, xLSTM.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def logit_transform(config: Any) -> dict[str, float | None]:
    """The head's `logit_scale` and `softcap` by a model's config; a multimodal one's text config counts."""
    config = config.get_text_config()
    scale = 1.0
    for name, factor in LOGIT_SCALES.items():
        value = getattr(config, name, None)
        scale *= 1.0 if value is None else factor(value, config)
    caps = (getattr(config, name, None) for name in SOFTCAPS)
    return {"logit_scale": scale, "softcap": next((cap for cap in caps if cap), None)}


def output_head(model: nn.Module) -> nn.Linear:
    """The linear layer that makes a transformers model's logits.

    Raises:
        UserError: there is none, it carries an adapter, or its weight is quantised.
    """
    name = type(model).__name__
    if not hasattr(model, "get_output_embeddings"):
        raise UserError(f"{name} is not a transformers model: it has no get_output_embeddings()")
    head = model.get_output_embeddings()
    if hasattr(head, "base_layer") or hasattr(head, "modules_to_save"):
        raise UserError(
            f"the output head of {name} carries an adapter, but the fused loss multiplies the head as it is; leave it "
            "out of target_modules and modules_to_save"
        )
    if not isinstance(head, nn.Linear):
        raise UserError(f"{name} has no linear output head, but {type(head).__name__}")
    if not head.weight.is_floating_point():
        raise UserError(f"the output head of {name} is quantised ({head.weight.dtype}); leave it in 16 or 32 bits")
    return head


def body(model: nn.Module) -> nn.Module:
    """What makes the last hidden states of a transformers model.

    Raises:
        UserError: it cannot be told from the rest.
    """
    inner = model.base_model
    # Llama 4's prefix is that of its multimodal form.
    inner = getattr(model, "model", model) if inner is model else inner
    if inner is model:
        raise UserError(f"{type(model).__name__} has no base_model whose hidden states its head would multiply")
    return inner


def wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """`model` and what it wraps (compiled module, DDP, PeftModel), down to the transformers model, which comes last.

    Raises:
        UserError: a wrapper whose forward cannot be replaced.
    """
    while True:
        yield model
        if "_orig_mod" in model._modules:
            model = model._orig_mod
        elif isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(model, FullyShardedDataParallel):
            raise UserError("the model is in FullyShardedDataParallel; use fully_shard (FSDP2) instead")
        elif hasattr(model, "get_base_model"):
            kind = model.active_peft_config
            if kind.is_prompt_learning:
                raise UserError(f"{kind.peft_type.value} adds virtual tokens to the input, which is not supported")
            model = model.get_base_model()
        else:
            return


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
    """A mixture of experts' load-balancing loss (arXiv 2101.03961, eq. 4 to 6) by the model's own function, times its
    `router_aux_loss_coef`: the term that transformers' forward adds to its loss.

    Args:
        model: a transformers model with `output_router_logits` in its config.
        router_logits: ``[B * T, experts]`` of every layer.
        attention_mask: ``[B, T]``, or None where every position counts.

    Raises:
        UserError: the model has no such function or coefficient, or gives no router logits.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    balance = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    if balance is None:
        # FSDP2 gives a model's class another name, in another module.
        modules = (sys.modules[kind.__module__] for kind in type(model).__mro__)
        balance = next((m.load_balancing_loss_func for m in modules if hasattr(m, "load_balancing_loss_func")), None)
    coefficient = getattr(config, "router_aux_loss_coef", None)
    if balance is None or coefficient is None:
        missing = "router_aux_loss_coef" if balance else "load_balancing_loss_func"
        raise UserError(f"output_router_logits is on, but {name} has no {missing}; switch it off in the config")
    if not router_logits:
        # In transformers 5.17 Granite's mixtures give none, and their router loss is silently 0.
        raise UserError(f"output_router_logits is on, but {name} gives no router logits; switch it off in the config")
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    return coefficient * balance(router_logits, experts, config.num_experts_per_tok, attention_mask)
