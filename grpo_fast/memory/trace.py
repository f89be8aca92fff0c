"""How activations are measured: one forward and backward on tensors that have shapes but no data.

The model runs as in training, with its adapters and checkpointing, and autograd decides what lives how long; no weights
and no GPU are needed. Parts that read data or need a GPU are replaced: attention (by a function that keeps what
flash-attention keeps: queries, keys, values, outputs and log-sum-exps), the output head (by one that keeps its
gradients), liger-kernel's fused layers (by the model's own layers) and 4-bit layers (by 16-bit ones, whose weights are
not counted here).
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary, weakref
from transformers import AttentionInterface, AutoModelForCausalLM

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError, one_line
from grpo_fast.model.activations import prepare_activations
from grpo_fast.model.loading import add_adapter

ATTENTION = "planned"
# The part of a layer that a module belongs to, by the name that models give it.
LABELS = {"attn": "attention", "attention": "attention", "mlp": "mlp", "feed_forward": "mlp", "moe": "mlp"}


class LiveMemory(TorchDispatchMode):
    """Adds up the bytes of live storages, labelled by the part of the model that allocated them.

    Attributes:
        live: bytes of each label now.
        peak: bytes of each label when their sum was largest.
        marked: bytes of each label when :meth:`mark` was called.
    """

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.marked: Counter[str] = Counter()
        self.modules: list[str] = []
        self.total = self.largest = 0
        self.storages = WeakIdKeyDictionary()
        for tensor in known:
            self.storages[tensor.untyped_storage()] = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self.storages:
            return
        # The backward runs without grad mode, but recomputation within it runs with grad mode.
        label = self.modules[-1] if self.modules else "residual" if torch.is_grad_enabled() else "gradients"
        size = storage.nbytes()
        self.storages[storage] = weakref.ref(storage, partial(self._freed, label, size))
        self.live[label] += size
        self.total += size
        if self.total > self.largest:
            self.largest, self.peak = self.total, Counter(self.live)

    def _freed(self, label: str, size: int, _: Any) -> None:
        self.live[label] -= size
        self.total -= size

    def mark(self) -> None:
        """Record what is alive now, and start the search for the peak again."""
        self.marked = Counter(self.live)
        self.largest, self.peak = self.total, Counter(self.live)

    def watch(self, model: nn.Module) -> None:
        """Label what the model's modules allocate."""
        for name, module in model.named_modules():
            label = LABELS.get(name.rsplit(".", 1)[-1].removeprefix("self_"))
            if label is None and module is model.get_input_embeddings():
                label = "embedding"
            if label is not None:
                module.register_forward_pre_hook(lambda *_, label=label: self.modules.append(label))
                module.register_forward_hook(lambda *_: self.modules.pop() and None, always_call=True)


class _Attention(torch.autograd.Function):
    """Keeps what flash-attention keeps; its backward accumulates the gradient of the queries in float32."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        batch, heads, rows, _ = query.shape
        out = query.new_empty(batch, rows, heads, value.shape[-1])
        sums = query.new_empty(batch, heads, rows, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums, mask)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        accumulated = query.new_empty(query.shape, dtype=torch.float32)
        grads = tuple(map(torch.empty_like, (query, key, value)))
        del accumulated
        return *grads, None


def _attend(module, query, key, value, attention_mask, *, gathered=1.0, padded=False, masked=0, **_):
    """An attention function for transformers; `gathered` is the number of attended positions per packed position.

    With `padded` the kernel takes neither unequal lengths nor fewer key heads than query heads. With `masked` it takes
    that many positions at a time, under a mask that it keeps in the dtype of the queries.
    """
    rows = query.shape[2]
    gathers = gathered != 1.0 or padded
    if gathers:
        longer = torch.zeros(round(gathered * rows), dtype=torch.int64, device=query.device)
        query, key, value = (x.index_select(2, longer) for x in (query, key, value))
    if padded and key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    mask = query.new_empty(max(rows // masked, 1), 1, masked, masked) if masked else None
    out = _Attention.apply(query, key, value, mask)
    return out.index_select(1, longer[:rows]) if gathers else out, None


AttentionInterface.register(ATTENTION, _attend)


class _Head(torch.autograd.Function):
    """`linear_policy_loss` without its chunks: the forward computes the gradients and keeps them for the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, live):
        live.modules.append("head")
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight, dtype=torch.float32)
        live.mark()
        ctx.grads = grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
        loss = hidden.new_empty(())
        live.modules.pop()
        return loss

    @staticmethod
    def backward(ctx, grad):
        grads, ctx.grads = ctx.grads, None
        return *grads, None


@dataclass(frozen=True)
class Setup:
    """Everything that decides what autograd keeps.

    Attributes:
        tokens: positions of the microbatch.
        predicted: positions that reach the head.
        gathered: attended positions per position, more than 1 if completions share a prompt.
        masked: positions of a prompt with its completions, if they are attended together under a mask; else 0.
    """

    config: GRPOConfig
    layers: int
    tokens: int
    predicted: int
    gathered: float = 1.0
    masked: int = 0
    training: bool = True

    @property
    def key(self) -> tuple:
        names = ("use_peft", "lora_r", "gradient_checkpointing", "tiled_mlp", "dtype", "bf16", "use_cpu")
        targets = tuple(self.config.lora_target_modules or ())
        rest = (self.layers, self.tokens, self.predicted, self.gathered, self.masked, self.training)
        return (*(getattr(self.config, name) for name in names), self.config.lora_dropout > 0, targets, *rest)


@dataclass(frozen=True)
class Traced:
    """Bytes by part (attention, mlp, residual, ...), without weights, their gradients and the head's workspace.

    Attributes:
        head: while the head is computed.
        peak: at the peak of the backward; of the forward if nothing is trained.
    """

    head: dict[str, float]
    peak: dict[str, float]

    def mixed(self, other: Traced, share: float) -> Traced:
        """Linear interpolation: this trace at `share` 0, the other at 1; shares outside extrapolate."""

        def mix(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
            return {name: a.get(name, 0) + share * (b.get(name, 0) - a.get(name, 0)) for name in {*a, *b}}

        return Traced(mix(self.head, other.head), mix(self.peak, other.peak))


def weights_dtype(model_config: Any, config: GRPOConfig) -> torch.dtype:
    """The dtype in which the weights are loaded; float32 if neither the run nor the checkpoint names one."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return getattr(model_config, "dtype", None) or torch.float32


def empty_model(model_config: Any, config: GRPOConfig, layers: int | None = None) -> nn.Module:
    """The model, with its adapters, on torch's default device and with `layers` of its layers (default: all).

    Raises:
        UserError: transformers does not know this model, or it cannot be built.
    """
    model_config = copy.deepcopy(model_config)
    text = model_config.get_text_config()
    if layers is not None:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    try:
        model = AutoModelForCausalLM.from_config(
            model_config, dtype=weights_dtype(model_config, config), attn_implementation=ATTENTION
        )
    except (ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"{config.model_name_or_path}: the model cannot be built: {one_line(error)}") from None
    if config.use_peft:
        add_adapter(model, config)
    return model


class Tracer:
    """Makes and keeps the traces of one model, and its data-less copies, under different settings."""

    def __init__(self, model_config: Any):
        self.model_config = model_config
        self.made: dict[tuple, Traced | UserError] = {}
        self.models: dict[tuple, nn.Module] = {}
        # What `plan` has counted on the models.
        self.counted: dict[tuple, Any] = {}

    def model(self, config: GRPOConfig) -> nn.Module:
        """The whole model on the meta device, for counting its parameters."""
        key = (config.use_peft, config.lora_r, tuple(config.lora_target_modules or ()), config.dtype)
        if key not in self.models:
            with torch.device("meta"):
                self.models[key] = empty_model(self.model_config, config)
        return self.models[key]

    def trace(self, setup: Setup) -> Traced:
        """A trace at full depth, extrapolated from a few layers, because every further layer adds the same.

        Raises:
            UserError: the model cannot be built or traced.
        """
        period = _period(getattr(self.model_config.get_text_config(), "layer_types", None) or [])
        shallow, deep = 2 * period, 3 * period
        if setup.layers <= deep:
            return self._run(setup)
        first, second = (self._run(replace(setup, layers=layers)) for layers in (shallow, deep))
        return first.mixed(second, (setup.layers - shallow) / period)

    def _run(self, setup: Setup) -> Traced:
        if setup.key not in self.made:
            self.made[setup.key] = self._trace_or_error(setup)
        if isinstance(made := self.made[setup.key], UserError):
            raise made
        return made

    def _trace_or_error(self, setup: Setup) -> Traced | UserError:
        reason = ""
        # The meta device is faster, but does not support autocast (mixed precision, adapters on experts).
        for device in ("cpu",) if setup.config.bf16 else ("meta", "cpu"):
            try:
                return _trace(self.model_config, setup, device)
            except UserError as error:
                return error
            except (NotImplementedError, RuntimeError, TypeError) as error:
                reason = one_line(error)
        return UserError(f"{setup.config.model_name_or_path}: this model's memory cannot be planned: {reason}")


def _period(layer_types: list[str]) -> int:
    """The number of layers after which their types repeat."""
    return next((n for n in range(1, len(layer_types)) if layer_types[n:] == layer_types[:-n]), 1)


def _trace(model_config: Any, setup: Setup, device: str) -> Traced:
    config = setup.config
    with ExitStack() as stack:
        with torch.device("meta"):
            model = empty_model(model_config, config, setup.layers)
        if device == "cpu":
            # Its log would repeat, at length, the errors that it raises.
            logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
            stack.enter_context(FakeTensorMode())
            copies = {id(t): torch.empty(t.shape, dtype=t.dtype) for t in (*model.parameters(), *model.buffers())}
            copies |= {id(p): nn.Parameter(copies[id(p)], p.requires_grad) for p in model.parameters()}
            model = copy.deepcopy(model, copies)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        ids = torch.zeros(1, setup.tokens, dtype=torch.int64, device=model.device)
        model.train(setup.training)
        as_trained = replace(config, activation_offloading=False, use_liger_kernel=False, layers_on_host=0)
        prepare_activations(model, as_trained if setup.training else replace(as_trained, gradient_checkpointing=False))
        live = LiveMemory([*model.parameters(), *model.buffers(), *(p.grad for p in trained), ids])
        live.watch(model)
        stack.enter_context(live)
        stack.enter_context(torch.set_grad_enabled(setup.training))

        def hidden_states() -> Tensor:
            options = {"gathered": setup.gathered, "masked": setup.masked, "padded": config.use_cpu}
            output = model.base_model(input_ids=ids, position_ids=ids, use_cache=False, **options)
            return output.last_hidden_state.flatten(0, 1).index_select(0, ids[0, : setup.predicted])

        with torch.autocast("cpu", torch.bfloat16) if config.bf16 else ExitStack():
            hidden = hidden_states()
            forward = live.peak
            loss = _Head.apply(hidden, model.get_output_embeddings().weight, live)
            del hidden
        if setup.training:
            loss.backward()
    return Traced(dict(live.marked), dict(live.peak if setup.training else forward))
