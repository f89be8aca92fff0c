"""Attention over sequences that are packed in one row, without padding and without a [T, T] mask.

A packed row holds every prompt once, followed by its completions. `Segments` holds the positions of each sequence (a
prompt's may belong to several). A kernel for sequences of any length gets them gathered, each whole, with plain causal
attention; each position's own output is put back. Without such a kernel (on a CPU, in float32), sequences of similar
length are attended together, and so are short groups, under a mask in which a completion sees its prompt and itself.
Everything else in a layer works on the packed row directly.

`install` wraps a transformers model's attention: with `segments` among the model's keyword arguments packed rows are
attended here, without them (in sampling, say) the model's own attention works as before.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from importlib.util import find_spec
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grpo_fast.errors import UserError
from grpo_fast.model.transfer import send

PREFIX = "packed_"
# Sequences are padded to the longest of a bucket if they have at least this share of its length, or if it is SHORT.
LEAST_FILL = 0.75
SHORT = 16
# A group is attended under a mask if it is at most this long, and computes at most MASK_WASTE times the scores of its
# sequences one by one.
MASK_WASTE = 2
LONGEST_MASKED = 4096
# Passed instead of `segments`: the model's own attention, which must not look ahead.
REQUIRE_CAUSAL = "causal"
# What some models add to the scores; packed attention does not support it.
UNKNOWN = ("s_aux", "position_bias")

Kernel = Callable[..., Tensor]


@dataclass
class Bucket:
    """B sequences, or groups of them, that are attended together, padded to W positions.

    Attributes:
        positions: ``[B, W]`` int64, positions in the row; the last one is repeated up to W.
        pieces: ``[B, W]`` int64, for groups: 0 for the prompt, then the number of the completion, -1 for padding.
        places: ``[B, W]`` int64, for groups: position in the sequence.
    """

    positions: Tensor
    pieces: Tensor | None = None
    places: Tensor | None = None
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, needed: bool) -> Tensor | None:
        """True where a query sees a key, ``[B or 1, 1, W, W]``; None where it is causal and not `needed`."""
        width = self.positions.shape[1]
        window = window if window is not None and window < width else None
        if self.pieces is None and window is None and not needed:
            return None
        if window not in self.masks:
            causal = torch.ones(width, width, dtype=torch.bool, device=self.positions.device).tril()
            if self.pieces is not None:
                query, key = self.pieces[:, :, None], self.pieces[:, None, :]
                causal = causal & ((key == 0) | (key == query)) & (key >= 0)
                if window is not None:
                    causal &= self.places[:, :, None] - self.places[:, None, :] < window
                # Padding sees itself, or it would be NaN.
                causal |= torch.eye(width, dtype=torch.bool, device=causal.device)
                self.masks[window] = causal[:, None]
            else:
                self.masks[window] = (causal if window is None else causal.triu(1 - window))[None, None]
        return self.masks[window]


class Group(NamedTuple):
    """A prompt followed by its completions in a row: where it starts, and their numbers of positions."""

    start: int
    prompt: int
    completions: list[int]

    @property
    def length(self) -> int:
        return self.prompt + sum(self.completions)

    @property
    def masked(self) -> bool:
        """Whether it is attended as a whole under a mask rather than one sequence at a time."""
        apart = sum((self.prompt + completion) ** 2 for completion in self.completions)
        short = self.length <= LONGEST_MASKED and self.length**2 <= MASK_WASTE * apart
        return short and len(self.completions) > 1

    def sequences(self) -> list[list[int]]:
        """The positions of each completion, its prompt's before it."""
        ends = accumulate(self.completions, initial=self.start + self.prompt)
        prompt = list(range(self.start, self.start + self.prompt))
        return [[*prompt, *range(a, b)] for a, b in pairwise(ends)]

    def pieces(self) -> list[int]:
        """For each position 0 in the prompt, or the number of its completion."""
        counts = (self.prompt, *self.completions)
        return [piece for piece, count in enumerate(counts) for _ in range(count)]

    def places(self) -> list[int]:
        """For each position its place in its sequence."""
        own = [range(self.prompt, self.prompt + count) for count in self.completions]
        return [place for places in (range(self.prompt), *own) for place in places]


class Segments:
    """The sequences of a packed row, which consists of `groups`, one after another; indices are on `device`."""

    def __init__(self, groups: list[Group], device: torch.device | str = "cpu"):
        self.groups, self.device = groups, torch.device(device)

    def to(self, device: torch.device) -> Segments:
        return Segments(self.groups, device)

    @cached_property
    def varlen(self) -> tuple[Tensor | None, Tensor, int, Tensor]:
        """The sequences one after another, for kernels that take any lengths; L is the sum of their lengths.

        Returns:
            ``[L]`` int64 positions in the row (None if that is every position once, in order); ``[S + 1]`` int32
            offsets of the sequences; the longest length; and ``[T]`` int64, which of the L entries is the output of
            each position of the row.
        """
        sequences = [sequence for group in self.groups for sequence in group.sequences()]
        positions = [position for sequence in sequences for position in sequence]
        ends = list(accumulate(map(len, sequences), initial=0))
        offsets = self._send(ends, torch.int32)
        outputs = self._first(positions)
        gathered = None if len(positions) == len(outputs) else self._send(positions)
        return gathered, offsets, max(map(len, sequences)), outputs

    @cached_property
    def buckets(self) -> tuple[list[Bucket], Tensor]:
        """The sequences for attention without such a kernel; and which entry of all buckets, one after another, is the
        output of each position, ``[T]``."""
        buckets, entries = [], []
        whole = [group for group in self.groups if group.masked]
        alone = [sequence for group in self.groups if not group.masked for sequence in group.sequences()]
        for alike in _alike(alone, len):
            entries += (rows := _padded(alike))
            buckets.append(Bucket(self._send(rows)))
        for alike in _alike(whole, lambda group: group.length):
            entries += (rows := _padded([list(range(group.start, group.start + group.length)) for group in alike]))
            pieces, places = _padded([g.pieces() for g in alike], -1), _padded([g.places() for g in alike])
            buckets.append(Bucket(*map(self._send, (rows, pieces, places))))
        # Padding repeats a position after its real entry, so the first one is real.
        return buckets, self._first([position for row in entries for position in row])

    def _first(self, positions: list[int]) -> Tensor:
        """``[T]``: the first index of each of the row's positions in `positions`."""
        found = torch.full((sum(group.length for group in self.groups),), len(positions))
        found.scatter_reduce_(0, torch.tensor(positions), torch.arange(len(positions)), "amin")
        return send(found, self.device)

    def _send(self, numbers: list, dtype: torch.dtype = torch.int64) -> Tensor:
        return send(torch.tensor(numbers, dtype=dtype), self.device)


def _alike(items: list, length: Callable[[Any], int]) -> list[list]:
    """Items of similar length together, longest first."""
    found: list[list] = []
    for item in sorted(items, key=length, reverse=True):
        widest = length(found[-1][0]) if found else 0
        if not found or (length(item) < LEAST_FILL * widest and widest > SHORT):
            found.append([])
        found[-1].append(item)
    return found


def _padded(rows: list[list[int]], value: int | None = None) -> list[list[int]]:
    """Rows as long as the first, which is the longest; padded with `value`, or by repeating their last entry."""
    width = len(rows[0])
    return [row + [row[-1] if value is None else value] * (width - len(row)) for row in rows]


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
        buckets, outputs = segments.buckets
        parts = [_attend(query, key, value, bucket, scale, window, softcap, dropout) for bucket in buckets]
        return torch.cat(parts).index_select(0, outputs)
    positions, cu_seqlens, longest, outputs = segments.varlen
    if positions is not None:
        query, key, value = (x.index_select(0, positions) for x in (query, key, value))
    out = kernel(query, key, value, cu_seqlens, longest, scale, window, softcap, dropout)
    return out if positions is None else out.index_select(0, outputs)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bucket: Bucket, scale: float | None, window: int | None,
    softcap: float | None, dropout: float,
) -> Tensor:  # fmt: skip
    """One bucket's outputs ``[B * W, heads, D]``."""
    count, width = bucket.positions.shape

    def gather(rows: Tensor) -> Tensor:
        return rows.index_select(0, bucket.positions.flatten()).unflatten(0, (count, width)).transpose(1, 2)

    q, k, v = gather(query), gather(key), gather(value)
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    # Nothing before a sequence's end sees the positions repeated there, so causal attention needs no mask.
    mask = bucket.mask(window, needed=softcap is not None)
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


def varlen_kernel(query: Tensor, softcap: float | None, dropout: float) -> Kernel | None:
    """The fastest installed kernel that takes sequences of any length; None if there is none.

    flash-attn 3 and 2, then torch's own, flex attention for softcapped scores; on CUDA in 16 bits. Called as
    ``kernel(query, key, value, cu_seqlens, longest, scale, window, softcap, dropout)``.
    """
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16) or query.shape[-1] > 256:
        return None
    for make, can_cap, can_drop in _KERNELS:
        if (softcap is None or can_cap) and (not dropout or can_drop) and make() is not None:
            return make()
    return None


@cache
def _flash(module: str) -> Kernel | None:
    if find_spec(module) is None or (module == FLASH_3 and torch.cuda.get_device_capability()[0] != 9):
        return None
    function = importlib.import_module(module).flash_attn_varlen_func

    def call(query, key, value, cu_seqlens, longest, scale, window, softcap, dropout):
        out = function(
            query, key, value, cu_seqlens, cu_seqlens, longest, longest, softmax_scale=scale, causal=True,
            window_size=(window - 1 if window else -1, -1), softcap=softcap or 0.0,
            **({"dropout_p": dropout} if dropout else {}),
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out

    return call


@cache
def _torch_varlen() -> Kernel | None:
    if torch.version.hip is not None or torch.cuda.get_device_capability()[0] < 8:
        return None
    from torch.nn.attention.varlen import varlen_attn

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


@cache
def _flex() -> Kernel:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=True)

    def call(query, key, value, cu_seqlens, longest, scale, window, softcap, dropout):
        length, on_gpu = query.shape[0], query.is_cuda
        sequence = torch.arange(len(cu_seqlens) - 1, device=query.device)
        sequence = sequence.repeat_interleave(cu_seqlens.diff(), output_size=length)

        def seen(batch, head, q, k):
            inside = (sequence[q] == sequence[k]) & (q >= k)
            return inside if window is None else inside & (q - k < window)

        def capped(score, batch, head, q, k):
            return softcap * torch.tanh(score / softcap)

        mask = create_block_mask(seen, None, None, length, length, device=query.device, _compile=on_gpu)
        out = (compiled if on_gpu else flex_attention)(
            *(x.transpose(0, 1)[None] for x in (query, key, value)), score_mod=None if softcap is None else capped,
            block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        return out[0].transpose(0, 1)

    return call


FLASH_3 = "flash_attn_interface"
# Kernels in the order of preference, whether they support a softcap, and whether dropout.
_KERNELS = (
    (partial(_flash, FLASH_3), True, False),
    (partial(_flash, "flash_attn"), True, True),
    (_torch_varlen, False, False),
    (_flex, True, False),
)


def install(model: nn.Module) -> bool:
    """Let `model` take ``segments`` among its keyword arguments; False if its attention cannot be replaced.

    Only causal attention is supported: full, or in a sliding window.
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
    segments: Segments | str | None = None, **options: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """transformers' attention function: packed rows here, others by the model's `own` implementation.

    Vision towers, whose attention is not causal, may receive the text's segments, which do not apply to them.
    """
    if segments is None or segments is REQUIRE_CAUSAL or not getattr(module, "is_causal", True):
        if segments is REQUIRE_CAUSAL and _looks_ahead(attention_mask):
            raise UserError(f"{type(module).__name__} looks ahead within images, which packed attention does not")
        eager = own == "eager"
        attend = sys.modules[type(module).__module__].eager_attention_forward if eager else ALL_ATTENTION_FUNCTIONS[own]
        # Some implementations look themselves up by the name in the configuration.
        name, module.config._attn_implementation_internal = module.config._attn_implementation, own
        try:
            return attend(module, query, key, value, attention_mask, **options)
        finally:
            module.config._attn_implementation_internal = name
    for name in UNKNOWN:
        if options.get(name) is not None:
            raise UserError(
                f"{type(module).__name__} adds {name} to its scores, which packed attention does not support"
            )
    out = packed_attention(
        *(x.squeeze(0).transpose(0, 1) for x in (query, key, value)), segments, scale=options.get("scaling"),
        window=options.get("sliding_window"), dropout=options.get("dropout", 0.0),
        # transformers' sdpa has no softcap either, and sampling uses it.
        softcap=None if own == "sdpa" else options.get("softcap"),
    )  # fmt: skip
    return out[None], None


def _looks_ahead(mask: Tensor | None) -> bool:
    """Whether a query sees a later key by an attention mask ``[..., T, T]``, in which True or 0 means that it does."""
    if mask is None or mask.dim() != 4 or mask.shape[-2] != mask.shape[-1]:
        return False
    return bool((mask if mask.dtype == torch.bool else mask == 0).triu(1).any())
