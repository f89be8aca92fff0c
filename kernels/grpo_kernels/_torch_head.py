"""The output head in PyTorch, for any device: logits in one buffer ``[C, V]``, transformed and exponentiated in place.

The row scale (coefficient, 1 / sum(e), temperature, logit scale) is applied to the narrow ``[C, H]`` operands, so the
wide buffer is written once by the product and once by the exponential. A bfloat16 head on a CPU multiplies float32
copies of its operands, since torch has no CPU product of bfloat16 operands with a float32 result.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from grpo_kernels._head import Chunk, Head, Rows, RowStatistics
from grpo_kernels.budget import chunks


class TorchHead(Head):
    """`Head` on any device; e is relative to the maximum of the shard."""

    buffer_alignment = 1

    @property
    def buffer_dtype(self) -> torch.dtype:
        return self.dtype

    def scoring_buffer(self, num_rows: int) -> Tensor:
        return self.buffer(num_rows)

    def operand(self, rows: Tensor) -> Tensor:
        return rows.to(self.operand_dtype).to(self.product_dtype)

    def forward_(self, rows: Rows, out: Tensor, with_entropy: bool) -> RowStatistics:
        z = self.logits(rows, out)
        target = z.gather(1, rows.targets.clamp(min=0)[:, None]).squeeze(1)
        # Another shard's target adds 0. Without shards a negative id is an error, and NaN reveals it.
        target = torch.where(rows.targets < 0, float("nan") if self.process_group is None else 0.0, target)
        maximum, total = z.new_empty(2, z.shape[0])
        weighted = torch.empty_like(total) if with_entropy else None
        lowest = torch.finfo(z.dtype).min
        for at in self._row_blocks(z):
            block = z[at]
            torch.amax(block, 1, out=maximum[at])
            # A row in which every logit is -inf has no finite maximum to subtract.
            block -= maximum[at].clamp(min=lowest)[:, None]
            if weighted is not None:
                # Excluded columns are -inf, and 0 * -inf must count as 0.
                shifted = block.clamp(min=lowest)
                block.exp_()
                torch.linalg.vecdot(block, shifted, dim=1, out=weighted[at])
            else:
                block.exp_()
            torch.sum(block, 1, out=total[at])
        return self.over_shards(RowStatistics(target, maximum, total, weighted, maximum[None], self.vocab_size))

    def recompute_(
        self, rows: Rows, stats: RowStatistics, out: Tensor, grad_logprobs: Tensor, grad_entropy: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        z = self.logits(rows, out)
        for at in self._row_blocks(z):
            z[at].sub_(stats.maximum[at].clamp(min=torch.finfo(z.dtype).min)[:, None]).exp_()
        return self.gradient_(Chunk(slice(0, z.shape[0]), rows, z, stats), grad_logprobs, grad_entropy)

    def gradient_(
        self, chunk: Chunk, grad_logprobs: Tensor | None, grad_entropy: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As in `Head`. Without `grad_entropy`, d = e - sum(e) 1[v = y] and the coefficient joins the row scale."""
        (_, targets, temperature, _), e, stats = chunk.rows, chunk.e, chunk.stats
        if grad_entropy is None:
            row_scale = -1 / stats.total if grad_logprobs is None else -grad_logprobs / stats.total
            at_target = -stats.total
            slope = level = None
        else:
            row_scale = torch.ones_like(stats.total)
            at_target = row_scale if grad_logprobs is None else grad_logprobs
            # log p + entropy = log e - weighted / total, since both shift by log(total).
            slope = -(grad_entropy / stats.total)[:, None]
            level = -(at_target / stats.total)[:, None] - slope * (stats.weighted / stats.total)[:, None]
        local = targets >= 0
        index = targets.clamp(min=0)[:, None]
        for at in self._row_blocks(e):
            block = e[at]
            flattening = None
            if self.process_group is not None and stats.tile_maximum is not None:
                # From here on e is relative to the maximum of all shards.
                block *= (stats.tile_maximum[0, at] - stats.maximum[at]).exp()[:, None]
            if self.softcap is not None:
                z = block.log().add_(stats.maximum[at, None])
                # Only the target keeps a gradient when its e underflows to 0, so its z is not computed from e.
                at_index = torch.where(local[at, None], stats.target[at, None], z.gather(1, index[at]))
                z.scatter_(1, index[at], at_index)
                if temperature is not None:
                    z *= temperature[at, None]
                flattening = 1 - z.div_(self.softcap).square_()
                flattening.clamp_(min=0)
            if slope is not None:
                torch.addcmul(block * level[at], slope[at], torch.xlogy(block, block), out=block)
            block.scatter_add_(1, index[at], torch.where(local[at], at_target[at], 0.0)[:, None])
            if flattening is not None:
                block *= flattening
        row_scale = row_scale * self.logit_scale
        return e, row_scale if temperature is None else row_scale / temperature

    def logits(self, rows: Rows, out: Tensor) -> Tensor:
        """Transformed logits, written into ``out [C, V]``."""
        hidden = rows.hidden
        for block in self.vocab_blocks(self.product_dtype, hidden.shape[0]):
            weight = self.operand(self.weight[block])
            if self.mixed_products:
                torch.mm(hidden, weight.t(), out_dtype=self.dtype, out=out[:, block])
            elif self.on_cpu and self.operand_dtype == torch.bfloat16 and torch.backends.mkldnn.is_available():
                # oneDNN's float32 product. torch.mm takes MKL's, which is half as fast on an AMD processor.
                out[:, block] = torch.ops.mkldnn._linear_pointwise(hidden, weight, None, "none", [], "")
            else:
                torch.mm(hidden, weight.t(), out=out[:, block])
        if self.logit_scale != 1.0:
            out *= self.logit_scale
        if self.bias is not None:
            out += self.bias
        if self.softcap is not None:
            for at in self._row_blocks(out):
                excluded = out[at] == float("-inf")
                out[at].div_(self.softcap).tanh_().mul_(self.softcap).masked_fill_(excluded, float("-inf"))
        if rows.temperature is not None:
            out /= rows.temperature[:, None]
        if rows.support is not None:
            rows.support.exclude_(out)
        return out

    def _row_blocks(self, logits: Tensor) -> Iterator[slice]:
        """Rows for one step of elementwise work: all of them on a GPU, as many as fit the cache on a CPU."""
        row_bytes = max(logits.shape[1], 1) * logits.element_size()
        return chunks(logits.shape[0], self.block_bytes // row_bytes if self.on_cpu else logits.shape[0])
