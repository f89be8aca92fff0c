"""The kept pairs of a pass in PyTorch, for any device: blocks of gathered rows, each as large as the cache allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_kernels._head import RowStatistics
from grpo_kernels.budget import chunks

if TYPE_CHECKING:
    from grpo_kernels._passes import Pass


class TorchGather:
    """`Gather` on any device; on a GPU the host waits for the number of pairs.

    Args:
        call: the pass, with its `support`.
        at: which of its N tokens.
        with_entropy: whether the statistics are to have the sums for entropies.
    """

    def __init__(self, call: Pass, at: Tensor | slice, with_entropy: bool):
        self.head, self.at, self.with_entropy = call.head, at, with_entropy
        support = call.support.take(at)
        # For each pair its row among the tokens, and its id.
        self.rows, places, self.offsets = support.flat()
        self.ids = support.ids[places].long()
        self.hidden, self.targets = call.hidden[at], call.targets[at]
        self.temperature = None if call.temperature is None else call.temperature[at]

    def forward(self) -> tuple[Tensor, RowStatistics]:
        head, rows = self.head, self.rows
        z = torch.empty(len(rows), dtype=head.dtype, device=rows.device)
        for block in self._blocks():
            torch.linalg.vecdot(self._hidden(block), self._weight(block), out=z[block])
        z *= head.logit_scale
        if head.bias is not None:
            z += head.bias[self.ids.clamp(min=0)]
        if head.softcap is not None:
            z = torch.where(z == float("-inf"), z, head.softcap * torch.tanh(z / head.softcap))
        if self.temperature is not None:
            z /= self.temperature[rows]
        z = z.masked_fill(self.ids < 0, float("-inf"))
        maximum = torch.segment_reduce(z, "max", offsets=self.offsets)
        # A row in which every logit is -inf has no finite maximum to subtract.
        lowest = torch.finfo(z.dtype).min
        log_e = z - maximum.clamp(min=lowest)[rows]
        e = log_e.exp()
        weighted = self._sums(e * log_e.clamp(min=lowest)) if self.with_entropy else None
        # Where another shard holds both the id and the target, both are -1.
        is_target = (self.ids == self.targets[rows]) & (self.ids >= 0)
        target = self._sums(torch.where(is_target, z, 0.0))
        missing = (self.targets >= 0) & (self._sums(is_target.to(z.dtype)) == 0)
        target = target.masked_fill(missing, float("-inf"))
        return z, head.over_shards(RowStatistics(target, maximum, self._sums(e), weighted, None, 0))

    def gradient(
        self, z: Tensor, stats: RowStatistics, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> Tensor:
        head, rows, temperature = self.head, self.rows, self.temperature
        logprob = (z - stats.maximum[rows]) - stats.total.log()[rows]
        p = logprob.exp()
        # p - 1 at the target, without cancellation.
        d = torch.where(self.ids == self.targets[rows], -torch.expm1(logprob), -p)
        if grad_logprobs is not None:
            d *= grad_logprobs[rows]
        if grad_entropy is not None:
            slope = torch.where(p > 0, p * (logprob + stats.entropy[rows]), 0.0)
            d -= grad_entropy[rows] * slope
        if head.softcap is not None:
            capped = z / head.softcap if temperature is None else z * temperature[rows] / head.softcap
            d *= torch.where(z == float("-inf"), 0.0, 1 - capped.square()).clamp(min=0)
        d *= head.logit_scale
        if temperature is not None:
            d /= temperature[rows]
        return d.masked_fill(self.ids < 0, 0.0)

    def write_grad_hidden(self, d: Tensor, out: Tensor) -> None:
        head = self.head
        if head.weight.dtype == head.operand_dtype == head.dtype and head.weight.is_contiguous():
            found = weighted_bags(head.weight, self.ids.clamp(min=0), self.offsets, d)
        else:
            found = torch.zeros(self.hidden.shape, dtype=head.dtype, device=d.device)
            for block in self._blocks():
                found.index_add_(0, self.rows[block], d[block, None] * self._weight(block))
        head.all_reduce(found)
        out[self.at] = found.to(out.dtype)

    def add_grad_weight(self, d: Tensor, out: Tensor, add: bool) -> None:
        ids, order = self.ids.sort(stable=True)
        bounds = torch.searchsorted(ids, torch.arange(out.shape[0] + 1, device=d.device))
        hidden = self.hidden.to(self.head.operand_dtype).to(self.head.dtype).contiguous()
        rows, d = self.rows[order], d[order]
        # Sums of a part of the vocabulary at a time, each of which is rounded once.
        for part in chunks(out.shape[0], self._block_length()):
            offsets = bounds[part.start : part.stop + 1]
            first, last = int(offsets[0]), int(offsets[-1])
            if first == last:
                continue
            sums = weighted_bags(hidden, rows[first:last], offsets - first, d[first:last])
            if add:
                out[part] += sums
            else:
                out[part] = sums.to(out.dtype)

    def add_grad_bias(self, d: Tensor, out: Tensor) -> None:
        # The logit scale does not act on the bias; an id of another shard has no gradient.
        out.index_add_(0, self.ids.clamp(min=0), d / self.head.logit_scale)

    def _sums(self, values: Tensor) -> Tensor:
        return torch.segment_reduce(values, "sum", offsets=self.offsets)

    def _block_length(self) -> int:
        return max(self.head.block_bytes // (self.head.weight.shape[1] * self.head.dtype.itemsize), 1)

    def _blocks(self) -> Iterator[slice]:
        return chunks(len(self.rows), self._block_length())

    def _hidden(self, pairs: slice) -> Tensor:
        return self.hidden.index_select(0, self.rows[pairs]).to(self.head.operand_dtype).to(self.head.dtype)

    def _weight(self, pairs: slice) -> Tensor:
        rows = self.head.weight.index_select(0, self.ids[pairs].clamp(min=0))
        return rows.to(self.head.operand_dtype).to(self.head.dtype)


def weighted_bags(table: Tensor, rows: Tensor, offsets: Tensor, factors: Tensor) -> Tensor:
    """``[n, H]``: for each range of ``offsets [n + 1]`` the sum of ``factors[k] * table[rows[k]]``."""
    return torch.nn.functional.embedding_bag(
        rows, table, offsets, mode="sum", per_sample_weights=factors, include_last_offset=True
    )
