"""Which tokens of a batch are scored, where their predictions are, and which sequences lie in a packed row."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from grpo_fast.attention import Group, Segments
from grpo_fast.errors import UserError

IGNORE_INDEX = -100


@dataclass
class Layout:
    """A batch of B rows and T positions, of which the last K tokens are scored.

    Attributes:
        input_ids: ``[B, T]`` int64.
        attention_mask: ``[B, T]`` int64 of padded rows, or None.
        position_ids: ``[B, T]`` int64, or None where the model may number its positions as it likes.
        given_positions: whether `position_ids` are the caller's own.
        targets: ``[B, K]`` int64, the tokens; -100 where one is not scored.
        sources: ``[K]`` int64, the position that predicts each of them.
        segments: the sequences of a packed row.
        cu_seqlens: ``[S + 1]`` int64, their offsets among the K tokens of a packed row.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    given_positions: bool
    targets: Tensor
    sources: Tensor
    segments: Segments | None = None
    cu_seqlens: Tensor | None = None


def lay_out(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    completion_mask: Tensor | None = None,
    logits_to_keep: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Layout:
    """See :meth:`FusedPolicy.forward` for the arguments.

    Raises:
        UserError: shapes do not fit, or packed input has padding or several rows.
    """
    if input_ids.dim() != 2 or input_ids.shape[1] < 2:
        raise UserError(f"input_ids must be [B, T] with T of at least 2, got {list(input_ids.shape)}")
    rows, length = input_ids.shape
    for name, mask in {"attention_mask": attention_mask, "completion_mask": completion_mask}.items():
        wanted = f"[{rows}, {length if name == 'attention_mask' else f'1..{length}'}]"
        fits = mask is None or (mask.dim() == 2 and mask.shape[0] == rows and 1 <= mask.shape[1] <= length)
        if not fits or (name == "attention_mask" and mask is not None and mask.shape[1] != length):
            raise UserError(f"{name} must be {wanted}, got {list(mask.shape)}")
    kept = length - 1 if logits_to_keep is None else logits_to_keep
    if completion_mask is not None:
        kept = completion_mask.shape[1]
        if logits_to_keep not in (None, kept):
            raise UserError(f"logits_to_keep={logits_to_keep} and a completion_mask of {kept} columns do not agree")
    if not 1 <= kept <= length:
        raise UserError(f"logits_to_keep={logits_to_keep} must be from 1 to {length}, the length of input_ids")

    device, given = input_ids.device, position_ids is not None
    offsets = _offsets(input_ids, attention_mask, position_ids, cu_seqlens)
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    scored = real.clone()
    scored[:, 1:] &= real[:, :-1]
    scored[:, 0] = False
    segments = None
    if offsets is not None:
        starts = torch.tensor(offsets, device=device)
        scored[:, starts[:-1]] = False
        lengths = [b - a for a, b in pairwise(offsets)]
        segments = Segments([Group(start, size, [0]) for start, size in zip(offsets, lengths, strict=False)], device)
        if position_ids is None:
            position_ids = torch.cat([torch.arange(size, device=device) for size in lengths])[None]
    elif position_ids is None and attention_mask is not None:
        position_ids = (real.long().cumsum(1) - 1).clamp(min=0)
    scored = scored[:, length - kept :]
    if completion_mask is not None:
        scored = scored & completion_mask.bool()
    return Layout(
        input_ids, attention_mask, position_ids, given,
        targets=input_ids[:, length - kept :].masked_fill(~scored, IGNORE_INDEX),
        sources=(torch.arange(length - kept, length, device=device) - 1).clamp(min=0),
        segments=segments,
        cu_seqlens=None if offsets is None else (starts - (length - kept)).clamp(min=0),
    )  # fmt: skip


def _offsets(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cu_seqlens: Tensor | None
) -> list[int] | None:
    """The offsets of a packed row's sequences, from 0 to T; None where each row is one sequence."""
    rows, length = input_ids.shape
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        if offsets[:1] != [0] or offsets[-1] != length or any(b <= a for a, b in pairwise(offsets)):
            raise UserError(f"cu_seqlens must rise from 0 to {length}, the length of input_ids, got {offsets}")
    elif attention_mask is None and position_ids is not None and position_ids.dim() == 2:
        # As in transformers, a sequence begins wherever a position does not follow the one before.
        jumps = (position_ids.diff(dim=1) != 1).nonzero()
        if not len(jumps):
            return None
        offsets = [0, *(jumps[:, 1] + 1).tolist(), length]
    else:
        return None
    if rows != 1:
        raise UserError(f"packed input is one row [1, T], got {rows} rows; put them one behind another")
    if attention_mask is not None:
        raise UserError("packed input (cu_seqlens) has no padding, so it takes no attention_mask")
    return offsets
