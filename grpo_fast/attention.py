"""Attention over sequences that lie side by side in one row, without padding and without a [T, T] mask.

A packed row holds every prompt once and its completions behind it. `Segments` says which positions make up each
sequence (a prompt's may belong to several); attention gathers them, works on whole sequences with plain causal
attention, and puts each position's own output back. Everything else in a layer works on the packed row as it is.

`install` wraps the attention that a transformers model has: with `segments` among the model's keyword arguments packed
rows are attended here, without them (in sampling, say) the model's own attention works as before.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grpo_fast.errors import UserError

PREFIX = "packed_"
# Sequences at least this share as long as the longest of a bucket are padded to it where no kernel takes them as
# they are; shorter than SHORT, all are.
LEAST_FILL = 0.75
SHORT = 16
# What some models add to the scores, and packed attention does not know.
UNKNOWN = ("s_aux", "position_bias")

Varlen = Callable[..., Tensor]


@dataclass
class Segments:
    """The sequences of a packed row of T positions; L is the sum of their lengths.

    Attributes:
        positions: ``[L]`` int64, positions in the row of each sequence's tokens, one sequence after another.
        cu_seqlens: ``[S + 1]`` int32, offsets of the sequences in `positions`.
        longest: length of the longest sequence.
        outputs: ``[T]`` int64, index in `positions` at which each position of the row has its output.
        buckets: ``[B, W]`` int64 each, positions of B sequences, the shorter ones' last one repeated up to W.
        bucket_outputs: ``[T]`` int64, like `outputs` in all buckets' entries, one after another.
    """

    positions: Tensor
    cu_seqlens: Tensor
    longest: int
    outputs: Tensor
    buckets: list[Tensor]
    bucket_outputs: Tensor

    @property
    def shared(self) -> bool:
        """Whether a position belongs to several sequences."""
        return self.positions.numel() != self.outputs.numel()

    def to(self, device: torch.device) -> Segments:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Segments(**{**vars(self), **moved, "buckets": [bucket.to(device) for bucket in self.buckets]})


def build_segments(sequences: list[Tensor], num_positions: int) -> Segments:
    """Segments of ``sequences``, the positions ``[l]`` int64 of each, in a row of `num_positions`.

    A position's output is that of the first sequence it belongs to.
    """
    lengths = torch.tensor([sequence.numel() for sequence in sequences])
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
    positions = torch.cat(sequences)
    order = sorted(range(len(sequences)), key=lambda index: -sequences[index].numel())
    chosen: list[list[Tensor]] = []
    for index in order:
        length = sequences[index].numel()
        widest = chosen[-1][0].numel() if chosen else 0
        if not chosen or (length < LEAST_FILL * widest and widest > SHORT):
            chosen.append([])
        chosen[-1].append(sequences[index])
    buckets, entries, real = [], [], []
    for bucket in chosen:
        width = bucket[0].numel()
        padded = torch.stack([torch.cat([s, s[-1:].expand(width - s.numel())]) for s in bucket])
        buckets.append(padded)
        entries.append(padded.flatten())
        widths = torch.tensor([s.numel() for s in bucket])
        real.append((torch.arange(width) < widths[:, None]).flatten())
    entry_positions, real = torch.cat(entries), torch.cat(real)
    return Segments(
        positions=positions,
        cu_seqlens=cu_seqlens.int(),
        longest=int(lengths.max()),
        outputs=_first(positions, torch.arange(positions.numel()), num_positions),
        buckets=buckets,
        bucket_outputs=_first(entry_positions[real], real.nonzero().squeeze(1), num_positions),
    )


def _first(positions: Tensor, places: Tensor, num_positions: int) -> Tensor:
    """For each position the smallest of the `places` at which it stands."""
    found = torch.full((num_positions,), torch.iinfo(torch.int64).max)
    return found.scatter_reduce(0, positions, places, "amin")


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scale: float | None = None,
    window: int | None = None, softcap: float | None = None, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """Causal attention within each sequence of a packed row.

    Args:
        query: ``[T, heads, D]``.
        key, value: ``[T, key heads, D]``; the key heads divide the heads.
        segments: the sequences.
        scale: factor of the scores (default: 1 / sqrt(D)).
        window: a position sees itself and the `window` - 1 before it.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        dropout: probability with which a weight is dropped.

    Returns:
        ``[T, heads, D]``.
    """
    kernel = varlen_kernel(query, softcap, dropout)
    if kernel is None:
        attend = partial(_attend, scale=scale, window=window, softcap=softcap, dropout=dropout)
        parts = [attend(query, key, value, bucket) for bucket in segments.buckets]
        return torch.cat(parts).index_select(0, segments.bucket_outputs)
    if segments.shared:
        query, key, value = (x.index_select(0, segments.positions) for x in (query, key, value))
    out = kernel(query, key, value, segments.cu_seqlens, segments.longest, scale, window, softcap, dropout)
    return out.index_select(0, segments.outputs) if segments.shared else out


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bucket: Tensor, scale: float | None, window: int | None,
    softcap: float | None, dropout: float,
) -> Tensor:  # fmt: skip
    """One bucket's outputs ``[B * W, heads, D]``. What is repeated at a sequence's end is seen by nothing before it."""
    count, width = bucket.shape

    def gather(rows: Tensor) -> Tensor:
        return rows.index_select(0, bucket.flatten()).unflatten(0, (count, width)).transpose(1, 2)

    q, k, v = gather(query), gather(key), gather(value)
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    mask = None
    if softcap is not None or (window is not None and window < width):
        mask = torch.ones(width, width, dtype=torch.bool, device=q.device).tril()
        if window is not None:
            mask = mask.triu(1 - window)
    if softcap is None:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, dropout_p=dropout
        )
    else:
        scores = (q @ k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, float("-inf"))
        probabilities = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        out = F.dropout(probabilities, dropout) @ v
    return out.transpose(1, 2).flatten(0, 1)


def varlen_kernel(query: Tensor, softcap: float | None, dropout: float) -> Varlen | None:
    """The fastest installed kernel that takes sequences of any length as they are; None where there is none.

    flash-attn 3 and 2, then torch's own; on CUDA in 16 bits. Called as
    ``kernel(query, key, value, cu_seqlens, longest, scale, window, softcap, dropout)``.
    """
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16) or query.shape[-1] > 256:
        return None
    for make, can_cap, can_drop in ((_flash3, True, False), (_flash2, True, True), (_torch_varlen, False, False)):
        if (softcap is None or can_cap) and (not dropout or can_drop) and make() is not None:
            return make()
    return None


@cache
def _flash3() -> Varlen | None:
    if find_spec("flash_attn_interface") is None or torch.cuda.get_device_capability()[0] != 9:
        return None
    from flash_attn_interface import flash_attn_varlen_func

    def call(query, key, value, cu_seqlens, longest, scale, window, softcap, dropout):
        out = flash_attn_varlen_func(
            query, key, value, cu_seqlens, cu_seqlens, longest, longest, softmax_scale=scale, causal=True,
            window_size=(window - 1 if window else -1, -1), softcap=softcap or 0.0,
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out

    return call


@cache
def _flash2() -> Varlen | None:
    if find_spec("flash_attn") is None:
        return None
    from flash_attn import flash_attn_varlen_func

    def call(query, key, value, cu_seqlens, longest, scale, window, softcap, dropout):
        return flash_attn_varlen_func(
            query, key, value, cu_seqlens, cu_seqlens, longest, longest, dropout_p=dropout, softmax_scale=scale,
            causal=True, window_size=(window - 1 if window else -1, -1), softcap=softcap or 0.0,
        )  # fmt: skip

    return call


@cache
def _torch_varlen() -> Varlen | None:
    if torch.version.hip is not None or torch.cuda.get_device_capability()[0] < 8:
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known or "scale" not in known:
        return None

    def call(query, key, value, cu_seqlens, longest, scale, window, softcap, dropout):
        options: dict[str, Any] = {"scale": scale, "window_size": (window - 1 if window else -1, 0)}
        if query.shape[1] != key.shape[1]:
            if "enable_gqa" in known:
                options["enable_gqa"] = True
            else:
                key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        return varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **options)

    return call


def install(model: nn.Module) -> bool:
    """Let `model` take ``segments`` among its keyword arguments; False where its attention cannot be replaced.

    Only causal attention is known: full, or in a sliding window.
    """
    config = model.config.get_text_config()
    own = config._attn_implementation
    if own is None or own.startswith(PREFIX):
        return own is not None
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not layers <= {"full_attention", "sliding_attention"} or own == "flex_attention":
        return False
    name = PREFIX + own
    if own != "eager" and own not in ALL_ATTENTION_FUNCTIONS:
        return False
    AttentionInterface.register(name, partial(_forward, own))
    if own in ALL_MASK_ATTENTION_FUNCTIONS:
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    model.set_attn_implementation(name)
    return config._attn_implementation == name


def _forward(
    own: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    segments: Segments | None = None, **options: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """transformers' attention function: packed rows here, others by the model's `own` implementation."""
    if segments is None:
        if own == "eager":
            attend = sys.modules[type(module).__module__].eager_attention_forward
        else:
            attend = ALL_ATTENTION_FUNCTIONS[own]
        return attend(module, query, key, value, attention_mask, **options)
    for name in UNKNOWN:
        if options.get(name) is not None:
            raise UserError(f"{type(module).__name__} adds {name} to its scores, which packed attention does not know")
    out = packed_attention(
        *(x.squeeze(0).transpose(0, 1) for x in (query, key, value)), segments, scale=options.get("scaling"),
        window=options.get("sliding_window"), dropout=options.get("dropout", 0.0),
        # transformers' sdpa has no softcap either, and sampling uses it.
        softcap=None if own == "sdpa" else options.get("softcap"),
    )  # fmt: skip
    return out[None], None
