"""The tokens that a truncated sampler kept: what `linear_logprob` and `linear_policy_loss` take as `support`.

`top_p`, `top_k` and `min_p` cut the distribution before a token is drawn. The distribution that was sampled is then the
softmax over the kept ids of that position alone, and so must be the log-probabilities of a loss on these samples:
otherwise each token's ratio to the sampler is off by the kept mass, 5e-23 over 1,000 tokens at 0.95.

The kept ids are data, like the targets: they come from the policy that sampled and stay as they are while the policy
is trained. A threshold of the logits or of the probabilities is no substitute. Applied to the present policy it keeps
other ids after an update, so a ratio would compare two distributions with different supports, and a sampled token could
drop out of its own; on the same weights, rounding moves ids across it. Its gradient exists almost everywhere, but it is
that of another function. The kept mass alone, subtracted as a constant, gives the right ratio and a wrong gradient:
that of the mass is missing. If an engine reports only a threshold, turn it into ids once, with the weights that
sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from grpo_kernels._checks import IGNORE_INDEX, require, require_device, require_tensors, values_can_be_checked


class Support(NamedTuple):
    """The kept ids of N tokens, those of each next to each other."""

    ids: Tensor  # [K] int64 or int32, in the vocabulary; in any order, none of them twice for a token
    offsets: Tensor  # [N + 1] int64 or int32: the ids of token n are ids[offsets[n] : offsets[n + 1]]

    @classmethod
    def of(cls, kept: Sequence[Tensor]) -> Self:
        """From the ids of each token ``[k]``; without any token the support is empty."""
        counts = torch.tensor([0, *(len(ids) for ids in kept)])
        return cls(torch.cat([torch.empty(0, dtype=torch.int32), *kept]), counts.cumsum(0))

    @classmethod
    def joined(cls, parts: Sequence[Support]) -> Self:
        """Those of all tokens of `parts`, in order."""
        counts = [torch.zeros(1, dtype=torch.int64), *(part.offsets.diff() for part in parts)]
        ids = [torch.empty(0, dtype=torch.int32), *(part.ids for part in parts)]
        return cls(torch.cat(ids), torch.cat(counts).cumsum(0))

    def take(self, tokens: Tensor) -> Support:
        """The support of ``tokens [n]`` int64, in their order. On a GPU the host waits for the number of ids."""
        starts, counts = self.offsets[:-1][tokens].long(), self.offsets.diff()[tokens].long()
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        return Support(self.ids[expanded(starts, offsets, int(offsets[-1]))], offsets)

    def to(self, device: torch.device | str) -> Support:
        return Support(self.ids.to(device), self.offsets.to(device))


def expanded(starts: Tensor, offsets: Tensor, total: int) -> Tensor:
    """``[total]`` int64: starts[0], starts[0] + 1, .. for as many as there are in each range of ``offsets [n + 1]``."""
    places = torch.arange(total, device=starts.device)
    shift = starts - offsets[:-1]
    return places + shift.repeat_interleave(offsets.diff(), output_size=total)


def check_support(op: str, support: Support, targets: Tensor, vocab_size: int) -> Support:
    """`support` as a :class:`Support` of the flattened ``targets [N]``, checked.

    Raises:
        ValueError: shapes or devices do not fit; or (checked on a CPU, and on a GPU with GRPO_KERNELS_DEBUG=1) an id is
            outside the vocabulary or listed twice, or a target is not in its support.
        TypeError: it is no pair of int64 or int32 tensors.
    """
    if not isinstance(support, tuple | list) or len(support) != 2:
        raise TypeError(f"{op}: support must be a pair of tensors (ids, offsets), got {support!r:.60}")
    ids, offsets = support
    require_tensors(op, **{"support.ids": ids, "support.offsets": offsets})
    for name, tensor in (("ids", ids), ("offsets", offsets)):
        if tensor.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{op}: support.{name} must be int64 or int32, got {tensor.dtype}")
        require(tensor.dim() == 1, f"{op}: support.{name} must have one dimension, got {tuple(tensor.shape)}")
    require_device(op, targets.device, **{"support.ids": ids, "support.offsets": offsets})
    count = targets.numel()
    require(
        offsets.numel() == count + 1,
        f"{op}: support.offsets must be [N + 1] for {count} targets, got {offsets.numel()}",
    )
    if values_can_be_checked(targets.device):
        _check_values(op, ids.long(), offsets.long(), targets, vocab_size)
    return Support(ids, offsets)


def _check_values(op: str, ids: Tensor, offsets: Tensor, targets: Tensor, vocab_size: int) -> None:
    counts, last = offsets.diff(), ids.numel()
    require(
        int(offsets[0]) == 0 and int(offsets[-1]) == last and bool((counts >= 0).all()),
        f"{op}: support.offsets must rise from 0 to the number of ids {last}, got {offsets[:3].tolist()}.. to "
        f"{int(offsets[-1])}",
    )
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    require(
        not len(wrong), f"{op}: support holds id {wrong[:1].tolist()}, outside the vocabulary of {vocab_size} tokens"
    )
    tokens = torch.arange(len(counts), device=ids.device).repeat_interleave(counts)
    ordered = (tokens * vocab_size + ids).sort().values
    twice = ordered[1:][ordered.diff() == 0]
    require(
        not len(twice),
        f"{op}: support lists id {(twice[:1] % vocab_size).tolist()} twice for token "
        f"{(twice[:1] // vocab_size).tolist()}",
    )
    inside = torch.zeros_like(targets, dtype=torch.bool)
    inside[tokens[ids == targets[tokens]]] = True
    outside = (~inside & (targets != IGNORE_INDEX)).nonzero().squeeze(1)
    require(
        not len(outside),
        f"{op}: the target of token {outside[:1].tolist()} is id {targets[outside[:1]].tolist()}, which is not in its "
        "support: the kept ids must be those it was sampled from",
    )


class RowSupport(NamedTuple):
    """The kept ids of C rows in a head's shard."""

    ids: Tensor  # [K] int32, within the shard; -1 for those of other shards
    starts: Tensor  # [C] int64
    ends: Tensor  # [C] int64

    @classmethod
    def of(cls, support: Support, vocab_start: int, vocab_size: int) -> Self:
        """Of all N tokens, in the shard of `vocab_size` tokens that begins at `vocab_start`."""
        ids = support.ids.int() - vocab_start
        ids = torch.where((ids >= 0) & (ids < vocab_size), ids, -1)
        # Unchecked offsets are cut off: nothing is read outside of the ids.
        offsets = support.offsets.long().clamp(0, len(ids))
        return cls(ids, offsets[:-1].contiguous(), torch.maximum(offsets[1:], offsets[:-1]))

    def take(self, at: Tensor | slice) -> RowSupport:
        return self._replace(starts=self.starts[at], ends=self.ends[at])

    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """(the row of each id, its place in `ids`, offsets ``[C + 1]``). On a GPU the host waits for their number."""
        counts = self.ends - self.starts
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        total = int(offsets[-1])
        rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=total)
        return rows, expanded(self.starts, offsets, total), offsets

    def mask(self, vocab_size: int) -> Tensor:
        """``[C, vocab_size]`` bool, True where a column is kept."""
        kept = torch.zeros(len(self.starts), vocab_size, dtype=torch.bool, device=self.ids.device)
        rows, places, _ = self.flat()
        kept[rows, self.ids[places].long()] = True
        return kept

    def exclude_(self, logits: Tensor) -> None:
        """Set all but the kept columns of ``logits [C, V]`` to -inf."""
        rows, places, _ = self.flat()
        ids = self.ids[places].long()
        if bool((ids < 0).any()):
            rows, ids = rows[ids >= 0], ids[ids >= 0]
        kept = logits[rows, ids]
        logits.fill_(float("-inf"))
        logits[rows, ids] = kept
