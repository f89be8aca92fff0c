"""What one forward computes (`Microbatch`), and how it follows from a caller's tensors (`lay_out`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from grpo_fast.errors import UserError
from grpo_fast.model.attention import Group, Segments
from grpo_fast.model.transfer import send
from grpo_kernels import Support

IGNORE_INDEX = -100
# transformers' collators name the offsets of packed sequences, the longest length and each token's sequence like this.
OFFSETS = ("cu_seq_lens_q", "cu_seq_lens_k")
LONGEST = ("max_length_q", "max_length_k")
PACKING = (*OFFSETS, *LONGEST, "seq_idx")


@dataclass(kw_only=True)
class Microbatch:
    """Inputs of one forward, and the tokens that it scores: B rows of T positions; B is 1 in a packed row.

    Attributes:
        input_ids: ``[B, T]`` int64.
        position_ids: ``[B, T]`` (``[3, B, T]`` or ``[4, B, T]`` for a model that places images) int64, or None where
            the model numbers the positions.
        default_positions: whether `position_ids` only leave out padding or restart at each packed sequence; the model
            may then number the positions itself.
        attention_mask: ``[B, T]`` int64 of padded rows, or None.
        segments: the sequences of a packed row, or None.
        targets: ``[n]`` or ``[B, K]`` int64, the tokens to score; -100 where one is not scored.
        sources: as `targets`, the index into ``B * T`` of the position that predicts each of them.
        cu_seqlens: ``[S + 1]`` int64, offsets of the sequences among the targets; None where each row is a sequence.
        complete: whether every target is known to be scored, so that the head need not ask the device which ones are.
        support: the ids that the sampler kept for each target, in their flattened order; None for the whole vocabulary.
        tokens: ``[n]`` int64, the targets' indices among the tokens of the optimizer step; empty outside the trainer.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    default_positions: bool = False
    attention_mask: Tensor | None = None
    segments: Segments | None = None
    targets: Tensor
    sources: Tensor
    cu_seqlens: Tensor | None = None
    complete: bool = False
    support: Support | None = None
    tokens: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def to(self, device: torch.device) -> Microbatch:
        """On `device`; the host does not wait for the copies."""
        moved = {name: send(x, device) if isinstance(x, Tensor) else x for name, x in vars(self).items()}
        moved["segments"] = self.segments and self.segments.to(device)
        moved["support"] = self.support and Support(*(send(x, device) for x in self.support))
        return Microbatch(**moved)


def lay_out(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    completion_mask: Tensor | None = None,
    logits_to_keep: int | None = None,
    cu_seqlens: Tensor | None = None,
    packing: Mapping[str, Any] | None = None,
) -> Microbatch:
    """A microbatch of a caller's rows, whose last K tokens are its targets ``[B, K]``.

    See :meth:`FusedPolicy.forward` for the arguments; `packing` holds those of :data:`PACKING`.

    Raises:
        UserError: a shape is wrong, packed input has padding or several rows, or the arguments disagree on where its
            sequences begin.
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
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise UserError(f"attention_mask must be [{rows}, {length}], got {list(attention_mask.shape)}")
    kept = length - 1 if logits_to_keep is None else logits_to_keep
    if isinstance(kept, bool) or not isinstance(kept, int):
        raise UserError(f"logits_to_keep must be a whole number from 1 to {length}, got {kept!r:.60}")
    if completion_mask is not None:
        shape = completion_mask.shape
        if len(shape) != 2 or shape[0] != rows or not 1 <= shape[1] <= length:
            raise UserError(f"completion_mask must be [{rows}, 1..{length}], got {list(shape)}")
        kept = shape[1]
        if logits_to_keep not in (None, kept):
            raise UserError(f"logits_to_keep={logits_to_keep} and a completion_mask of {kept} columns do not agree")
    if not 1 <= kept <= length:
        raise UserError(f"logits_to_keep={logits_to_keep} must be from 1 to {length}, the length of input_ids")

    device, first, default_positions = input_ids.device, length - kept, position_ids is None
    offsets = _offsets(input_ids, attention_mask, position_ids, {"cu_seqlens": cu_seqlens, **(packing or {})})
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    scored = real & torch.nn.functional.pad(real, (1, -1))
    segments = target_offsets = None
    if offsets is not None:
        attention_mask = None
        starts = torch.tensor(offsets, device=device)
        scored[:, starts[:-1]] = False
        groups = [Group(start, end - start, [0]) for start, end in pairwise(offsets)]
        segments, target_offsets = Segments(groups, device), (starts - first).clamp(min=0)
        if position_ids is None:
            position_ids = torch.cat([torch.arange(group.length, device=device) for group in groups])[None]
    elif attention_mask is not None:
        attention_mask = real.long()
        if position_ids is None:
            position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    scored = scored[:, first:]
    if completion_mask is not None:
        scored = scored & completion_mask.bool()
    sources = (torch.arange(first, length, device=device) - 1).clamp(min=0)
    return Microbatch(
        input_ids=input_ids,
        position_ids=position_ids,
        default_positions=default_positions,
        attention_mask=attention_mask,
        segments=segments,
        targets=input_ids[:, first:].masked_fill(~scored, IGNORE_INDEX),
        sources=sources + length * torch.arange(rows, device=device)[:, None],
        cu_seqlens=target_offsets,
    )


def _offsets(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, packing: Mapping[str, Any]
) -> list[int] | None:
    """The offsets of a packed row's sequences, from 0 to T; None where each row is one sequence."""
    rows, length = input_ids.shape
    packing = {name: value for name, value in packing.items() if value is not None}
    # By each argument that defines sequences, their offsets; None for several rows that each hold several.
    found = {name: _checked(name, packing[name], length) for name in ("cu_seqlens", *OFFSETS) if name in packing}
    if "seq_idx" in packing:
        runs = _runs("seq_idx", packing["seq_idx"], input_ids)
        found |= {} if runs == [0, length] else {"seq_idx": runs}
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        # Reading values stalls a GPU's stream for a moment, as transformers does when it makes its masks.
        odd = attention_mask[(attention_mask != 0) & (attention_mask != 1)]
        if len(odd):
            if (odd < 0).any() or (odd != odd.round()).any():
                raise UserError(f"attention_mask holds {odd[0].item()}; allowed are 0, 1 and the numbers of sequences")
            # A row that holds one number besides padding is one sequence.
            lowest = attention_mask.where(attention_mask != 0, odd.max()).amin(1)
            if (lowest < attention_mask.amax(1)).any():
                found["attention_mask"] = _runs("attention_mask", attention_mask, input_ids)
    if position_ids is not None:
        plain = attention_mask is None and not found
        starts = _starts(position_ids, None if attention_mask is None else attention_mask != 0, plain)
        if len(starts):
            found["position_ids"] = [0, *starts[:, 1].tolist(), length] if rows == 1 else None
    longest = [name for name in LONGEST if name in packing]
    if not found:
        if longest:
            raise UserError(f"{longest[0]} needs the sequences' offsets as well; give cu_seqlens")
        return None
    names = " and ".join(found)
    if rows != 1:
        raise UserError(f"packed input ({names}) is one row [1, T], got {rows} rows; concatenate them")
    if attention_mask is not None and not attention_mask.all():
        raise UserError(f"packed input ({names}) has no padding, so it takes no attention_mask with zeros")
    offsets, *others = found.values()
    if any(other != offsets for other in others):
        raise UserError(f"{names} do not agree on where sequences begin: {list(found.values())}")
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
    """Offsets from the number of each token's sequence; None where one of several rows holds several numbers."""
    rows, length = input_ids.shape
    if numbers.shape != input_ids.shape:
        raise UserError(f"{name} must be [{rows}, {length}], got {list(numbers.shape)}")
    changes = numbers.diff(dim=1).nonzero()
    if rows != 1:
        return None if len(changes) else [0, length]
    if len(changes) + 1 != len(numbers.unique()):
        raise UserError(f"{name} gives tokens that are not adjacent the same number; a sequence must be contiguous")
    return [0, *(changes[:, 1] + 1).tolist(), length]


def _starts(position_ids: Tensor, real: Tensor | None, plain: bool) -> Tensor:
    """``[n, 2]``: row and position of each sequence that begins within a row.

    If nothing else defines sequences (`plain`), one begins wherever a position is not the previous one plus 1, as in
    transformers; otherwise only where positions do not increase. Positions ``[3, B, T]`` repeat within an image, so
    there a sequence begins where all three axes are 0.
    """
    if position_ids.dim() == 3 and position_ids.shape[0] == 4:
        # The first axis holds the positions of the text.
        position_ids = position_ids[0]
    if position_ids.dim() == 3:
        begins = (position_ids == 0).all(0)[:, 1:]
    else:
        steps = position_ids.diff(dim=1)
        begins = steps != 1 if plain else steps <= 0
    if real is not None:
        begins = begins & real[:, 1:] & real[:, :-1]
    return torch.nn.functional.pad(begins, (1, 0)).nonzero()
