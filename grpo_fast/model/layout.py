"""Which tokens of a batch are scored, where their predictions are, and which sequences lie in a packed row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from grpo_fast.errors import UserError
from grpo_fast.model.attention import Group, Segments

IGNORE_INDEX = -100
# What transformers' collators call the offsets of packed sequences, the longest length and each token's sequence.
OFFSETS = ("cu_seq_lens_q", "cu_seq_lens_k")
LONGEST = ("max_length_q", "max_length_k")
PACKING = (*OFFSETS, *LONGEST, "seq_idx")


@dataclass
class Layout:
    """A batch of B rows and T positions, of which the last K tokens are scored.

    Attributes:
        input_ids: ``[B, T]`` int64.
        attention_mask: ``[B, T]`` int64 of padded rows, or None.
        position_ids: ``[B, T]`` (or ``[3, B, T]``, ``[4, B, T]``) int64, or None where the model may number its
            positions as it likes.
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
    packing: Mapping[str, Any] | None = None,
) -> Layout:
    """See :meth:`FusedPolicy.forward` for the arguments; `packing` are those of :data:`PACKING`.

    Raises:
        UserError: shapes do not fit, packed input has padding or several rows, or the arguments do not agree on where
            its sequences begin.
    """
    if input_ids.dim() != 2 or input_ids.shape[1] < 2 or input_ids.dtype not in (torch.int64, torch.int32):
        got = f"{list(input_ids.shape)} {input_ids.dtype}"
        raise UserError(f"input_ids must be [B, T] with T of at least 2, int64 or int32, got {got}")
    rows, length = input_ids.shape
    if position_ids is not None:
        axes, *sizes = (1, *position_ids.shape) if position_ids.dim() == 2 else position_ids.shape or (0,)
        if axes not in (1, 3, 4) or sizes not in ([rows, length], [1, length]):
            raise UserError(
                f"position_ids must be [{rows}, {length}], or [3, {rows}, {length}] for a model that places images, "
                f"got {list(position_ids.shape)}"
            )
    for name, mask in {"attention_mask": attention_mask, "completion_mask": completion_mask}.items():
        wanted = f"[{rows}, {length if name == 'attention_mask' else f'1..{length}'}]"
        fits = mask is None or (mask.dim() == 2 and mask.shape[0] == rows and 1 <= mask.shape[1] <= length)
        if not fits or (name == "attention_mask" and mask is not None and mask.shape[1] != length):
            raise UserError(f"{name} must be {wanted}, got {list(mask.shape)}")
    kept = length - 1 if logits_to_keep is None else logits_to_keep
    if isinstance(kept, bool) or not isinstance(kept, int):
        raise UserError(f"logits_to_keep must be a whole number from 1 to {length}, got {kept!r:.60}")
    if completion_mask is not None:
        kept = completion_mask.shape[1]
        if logits_to_keep not in (None, kept):
            raise UserError(f"logits_to_keep={logits_to_keep} and a completion_mask of {kept} columns do not agree")
    if not 1 <= kept <= length:
        raise UserError(f"logits_to_keep={logits_to_keep} must be from 1 to {length}, the length of input_ids")

    device, given = input_ids.device, position_ids is not None
    offsets = _offsets(input_ids, attention_mask, position_ids, {"cu_seqlens": cu_seqlens, **(packing or {})})
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    attention_mask = None if attention_mask is None or offsets is not None else real.long()
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
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, packing: Mapping[str, Any]
) -> list[int] | None:
    """The offsets of a packed row's sequences, from 0 to T; None where each row is one sequence."""
    rows, length = input_ids.shape
    packing = {name: value for name, value in packing.items() if value is not None}
    told = {name: _checked(name, packing[name], length) for name in ("cu_seqlens", *OFFSETS) if name in packing}
    if "seq_idx" in packing:
        runs = _runs("seq_idx", packing["seq_idx"], input_ids)
        told |= {} if runs == [0, length] else {"seq_idx": runs}
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        # Reading values stalls a GPU's stream for a moment, as transformers does when it makes its masks.
        odd = attention_mask[(attention_mask != 0) & (attention_mask != 1)]
        if len(odd):
            if (odd < 0).any() or (odd != odd.round()).any():
                raise UserError(f"attention_mask holds {odd[0].item()}; allowed are 0, 1 and the numbers of sequences")
            # One number a row, padding apart, packs nothing.
            lowest = attention_mask.where(attention_mask != 0, odd.max()).amin(1)
            if (lowest < attention_mask.amax(1)).any():
                told["attention_mask"] = _runs("attention_mask", attention_mask, input_ids)
    if position_ids is not None:
        plain = attention_mask is None and not told
        starts = _starts(position_ids, None if attention_mask is None else attention_mask != 0, plain)
        if len(starts):
            told["position_ids"] = [0, *starts[:, 1].tolist(), length] if rows == 1 else None
    longest = [name for name in LONGEST if name in packing]
    if not told:
        if longest:
            raise UserError(f"{longest[0]} says nothing without the sequences' offsets; give cu_seqlens")
        return None
    names = " and ".join(told)
    if rows != 1:
        raise UserError(f"packed input ({names}) is one row [1, T], got {rows} rows; put them one behind another")
    if attention_mask is not None and not attention_mask.all():
        raise UserError(f"packed input ({names}) has no padding, so it takes no attention_mask with zeros")
    offsets, *others = told.values()
    for other in others:
        if other != offsets:
            raise UserError(f"{names} do not agree on where sequences begin: {list(told.values())}")
    for name in longest:
        if packing[name] < max(b - a for a, b in pairwise(offsets)):
            raise UserError(f"{name}={packing[name]} is shorter than the longest sequence of {offsets}; leave it out")
    return offsets


def _checked(name: str, offsets: Tensor, length: int) -> list[int]:
    found = offsets.tolist() if offsets.dim() == 1 and not offsets.is_floating_point() else []
    if found[:1] != [0] or found[-1] != length or any(b <= a for a, b in pairwise(found)):
        raise UserError(
            f"{name} must rise from 0 to {length}, the length of input_ids, got {found or offsets.tolist()}"
        )
    return found


def _runs(name: str, numbers: Tensor, input_ids: Tensor) -> list[int] | None:
    """Offsets by the number of each token's sequence; None for several rows of which one has several numbers."""
    rows, length = input_ids.shape
    if numbers.shape != input_ids.shape:
        raise UserError(f"{name} must be [{rows}, {length}], got {list(numbers.shape)}")
    changes = numbers.diff(dim=1).nonzero()
    if rows != 1:
        return None if len(changes) else [0, length]
    if len(changes) + 1 != len(numbers.unique()):
        raise UserError(f"{name} numbers a sequence that is not in one piece; sequences lie one behind another")
    return [0, *(changes[:, 1] + 1).tolist(), length]


def _starts(position_ids: Tensor, real: Tensor | None, plain: bool) -> Tensor:
    """``[n, 2]``: row and position where a sequence begins within a row.

    As in transformers, that is wherever a position does not follow the one before, if nothing else says so (`plain`);
    otherwise only where it does not rise. Of the axes of ``[3, B, T]``, which repeat positions within an image, all
    are 0 there.
    """
    if position_ids.dim() == 3 and position_ids.shape[0] == 4:
        # The first are those of the text.
        position_ids = position_ids[0]
    if position_ids.dim() == 3:
        begins = (position_ids == 0).all(0)[:, 1:]
    else:
        steps = position_ids.diff(dim=1)
        begins = steps != 1 if plain else steps <= 0
    if real is not None:
        begins = begins & real[:, 1:] & real[:, :-1]
    return torch.nn.functional.pad(begins, (1, 0)).nonzero()
