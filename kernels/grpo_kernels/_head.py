"""The output head, a chunk of rows at a time: what `linear_logprob` and `linear_policy_loss` are made of.

For a chunk of C rows, in float32 whatever the inputs' dtype,

    z = logits(hidden)            [C, V]     one product (1U)
    e, stats = exponentiate_(z)   in place   e = exp(z - max), with the row's max, sum(e) and sum(e * log e)
    d, row_scale = gradient_(e)   in place   dL/dlogits = row_scale * d
    dH = row_scale * (d @ W)                 one product (1U)
    dW += d.T @ (row_scale * hidden)         one product (1U)

A bfloat16 head on a CPU multiplies float32 copies of its operands in the first product, since torch has no CPU product
of bfloat16 operands with a float32 result. The last two products take bfloat16 operands, a block of the vocabulary at a
time, and their results are added up in float32.

The row scale (coefficient, 1 / sum(e), temperature, logit scale) is applied to the narrow [C, H] operands, so the wide
[C, V] buffer is written once by the product and once by the exponential. It is the only buffer of width V. This is the
portable engine; `triton_kernels.triton_head.TritonHead` replaces the steps that touch logits by kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_kernels.budget import BLOCK_SHARE, NARROW_COPIES, chunks, cpu_block_bytes, equal_parts


class RowStatistics(NamedTuple):
    """What the softmax of a row leaves behind, ``[C]`` each: z at the target, max of z, sum(e), sum(e * log e).

    Where e is relative to the maximum of a tile of `tile_width` columns instead, these are in ``[tiles, C]``.
    """

    target: Tensor
    maximum: Tensor
    total: Tensor
    weighted: Tensor | None
    tile_maximum: Tensor | None = None
    tile_width: int = 0

    @property
    def logprobs(self) -> Tensor:
        # The maximum goes first: rounding maximum + log(total) would cost large logits their last digits.
        return (self.target - self.maximum) - torch.log(self.total)

    @property
    def entropy(self) -> Tensor | None:
        return None if self.weighted is None else torch.log(self.total) - self.weighted / self.total


@dataclass(frozen=True)
class Head:
    """A (possibly vocabulary-parallel) output head and the transform from products to logits.

    ``z = softcap(logit_scale * hidden @ weight.T + bias) / temperature``, softcap(x) = softcap * tanh(x / softcap).
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    process_group: dist.ProcessGroup | None
    max_buffer_bytes: int
    operand_dtype: torch.dtype
    dtype: torch.dtype
    vocab_start: int
    sizing_vocab: int
    """The largest shard's vocabulary: chunk lengths follow from it, so that they agree on all ranks."""

    def prepared(self) -> Head:
        """This head for one forward or backward: on a GPU the weight is cast once, if half the budget holds it."""
        copied = self.sizing_vocab * self.weight.shape[1] * self.product_dtype.itemsize
        cast = self.weight.dtype == self.product_dtype
        if cast or self.on_cpu or 2 * copied > self.max_buffer_bytes:
            return self
        cast = self.weight.to(self.operand_dtype).to(self.product_dtype)
        return replace(self, weight=cast, max_buffer_bytes=self.max_buffer_bytes - copied)

    @property
    def on_cpu(self) -> bool:
        return self.weight.device.type == "cpu"

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def mixed_products(self) -> bool:
        """Whether the device multiplies operands as they are into float32 (bfloat16 on a GPU).

        float16 is widened everywhere: the row scale, about 1 / tokens, would underflow in it.
        """
        return not self.on_cpu and self.operand_dtype == torch.bfloat16

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype in which operands enter the product that makes the logits."""
        return self.operand_dtype if self.mixed_products else self.dtype

    @property
    def gradient_dtype(self) -> torch.dtype:
        """The dtype in which operands enter the products that make the gradients."""
        return self.operand_dtype if self.operand_dtype == torch.bfloat16 else self.dtype

    def all_reduce(self, tensor: Tensor, op=dist.ReduceOp.SUM) -> Tensor:
        if self.process_group is not None:
            dist.all_reduce(tensor, op=op, group=self.process_group)
        return tensor

    def over_shards(self, stats: RowStatistics) -> RowStatistics:
        """The statistics of the whole vocabulary from those of this rank's shard: two all-reduces."""
        if self.process_group is None:
            return stats
        maximum = self.all_reduce(stats.maximum.clone(), dist.ReduceOp.MAX)
        # A shard of nothing but -inf adds nothing, and has no finite maximum to subtract.
        shift = torch.where(stats.total > 0, stats.maximum - maximum, 0.0)
        factor = shift.exp()
        sums = [stats.target, factor * stats.total]
        if stats.weighted is not None:
            sums.append(factor * (stats.weighted + shift * stats.total))
        target, total, *weighted = self.all_reduce(torch.stack(sums))
        return stats._replace(target=target, maximum=maximum, total=total, weighted=weighted[0] if weighted else None)

    @property
    def buffer_dtype(self) -> torch.dtype:
        """The dtype of the ``[C, V]`` buffer."""
        return self.dtype

    def narrow_bytes(self) -> int:
        """Memory of a row beside the logits."""
        return NARROW_COPIES * self.weight.shape[1] * self.dtype.itemsize

    def row_bytes(self) -> int:
        """Memory of a row of a chunk."""
        return self.sizing_vocab * self.buffer_dtype.itemsize + self.narrow_bytes()

    @property
    def block_bytes(self) -> int:
        """Memory of a block of rows, or of copies of operands, that is worked on at once."""
        return cpu_block_bytes(self.max_buffer_bytes) if self.on_cpu else int(BLOCK_SHARE * self.max_buffer_bytes)

    def rows_per_chunk(self) -> int:
        """Rows that fit the byte budget, the same on every rank of the group."""
        blocks = 2 * self.block_bytes if self.on_cpu or self.weight.dtype != self.product_dtype else 0
        return max((int(self.max_buffer_bytes) - blocks) // max(self.row_bytes(), 1), 1)

    def buffer(self, num_rows: int, copies: int = 1) -> Tensor:
        """The ``[C, V]`` buffer for chunks of `num_rows` rows; C is such that `copies` of it fit the byte budget."""
        rows = equal_parts(num_rows, self.rows_per_chunk() // copies)
        return torch.empty(rows, self.vocab_size, dtype=self.buffer_dtype, device=self.weight.device)

    def scoring_buffer(self, num_rows: int) -> Tensor:
        """The buffer for chunks whose logits nobody needs afterwards."""
        return self.buffer(num_rows)

    def vocab_blocks(self, dtype: torch.dtype, num_rows: int) -> Iterator[slice]:
        """The vocabulary for products of `num_rows` rows in `dtype`: whole, or in blocks where an operand is cast."""
        width = self.vocab_size
        if not self.weight.dtype == self.operand_dtype == self.buffer_dtype == dtype:
            width = self.block_bytes // (max(num_rows, self.weight.shape[1], 1) * self.dtype.itemsize)
        return chunks(self.vocab_size, width)

    def operand(self, rows: Tensor) -> Tensor:
        """Hidden states, or rows of the weight, in the dtype that the logits' product takes."""
        return rows.to(self.operand_dtype).to(self.product_dtype)

    def logits(self, hidden: Tensor, temperature: Tensor | None, out: Tensor) -> Tensor:
        """Transformed logits of ``hidden [C, H]`` (an operand), written into ``out [C, V]``."""
        for block in self.vocab_blocks(self.product_dtype, hidden.shape[0]):
            weight = self.operand(self.weight[block])
            if self.mixed_products:
                torch.mm(hidden, weight.t(), out_dtype=self.dtype, out=out[:, block])
            elif self.operand_dtype == torch.bfloat16 and torch.backends.mkldnn.is_available():
                # oneDNN's float32 product. torch.mm takes MKL's, which is half as fast on an AMD processor.
                out[:, block] = torch.ops.mkldnn._linear_pointwise(hidden, weight, None, "none", [], "")
            else:
                torch.mm(hidden, weight.t(), out=out[:, block])
        if self.logit_scale != 1.0:
            out *= self.logit_scale
        if self.bias is not None:
            out += self.bias
        if self.softcap is not None:
            for rows in self.row_blocks(out):
                excluded = out[rows] == float("-inf")
                out[rows].div_(self.softcap).tanh_().mul_(self.softcap).masked_fill_(excluded, float("-inf"))
        if temperature is not None:
            out /= temperature[:, None]
        return out

    def row_blocks(self, logits: Tensor) -> Iterator[slice]:
        """Rows to be treated together by elementwise work: all on a GPU, a cacheful on a CPU."""
        row_bytes = max(logits.shape[1], 1) * logits.element_size()
        return chunks(logits.shape[0], self.block_bytes // row_bytes if self.on_cpu else logits.shape[0])

    def forward_(
        self, hidden: Tensor, local_targets: Tensor, temperature: Tensor | None, out: Tensor, with_entropy: bool
    ) -> RowStatistics:
        """Write ``e = exp(z - max)`` of ``hidden [C, H]`` (an operand) into ``out [C, V]``; return the statistics."""
        z = self.logits(hidden, temperature, out)
        return self.exponentiate_(z, local_targets, with_entropy)

    def exponentiate_(self, logits: Tensor, local_targets: Tensor, with_entropy: bool) -> RowStatistics:
        """Replace z by e = exp(z - max) and return the row statistics (over all shards)."""
        target = logits.gather(1, local_targets.clamp(min=0)[:, None]).squeeze(1)
        maximum, total = logits.new_empty(2, logits.shape[0])
        weighted = torch.empty_like(total) if with_entropy else None
        if self.process_group is not None:
            target = torch.where(local_targets < 0, 0.0, target)
            torch.amax(logits, 1, out=maximum)
            self.all_reduce(maximum, dist.ReduceOp.MAX)
        for rows in self.row_blocks(logits):
            block = logits[rows]
            if self.process_group is None:
                torch.amax(block, 1, out=maximum[rows])
            block -= maximum[rows, None]
            if with_entropy:
                # Excluded columns are -inf, and 0 * -inf must count as 0.
                shifted = block.clamp(min=torch.finfo(block.dtype).min)
                block.exp_()
                torch.linalg.vecdot(block, shifted, dim=1, out=weighted[rows])
            else:
                block.exp_()
            torch.sum(block, 1, out=total[rows])
        if self.process_group is not None:
            target, total, *rest = self.all_reduce(torch.stack([target, total, *([weighted] if with_entropy else [])]))
            weighted = rest[0] if with_entropy else None
        return RowStatistics(target, maximum, total, weighted)

    def gradient_(
        self,
        e: Tensor,
        stats: RowStatistics,
        local_targets: Tensor,
        temperature: Tensor | None,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Turn e into d, in its memory, where row_scale * d is dL/d(hidden @ weight.T).

        Returns (d, row_scale ``[C]`` or None for 1).

        dL/dz_v = grad_logprobs * (1[v = y] - p_v) - grad_entropy * p_v * (log p_v + entropy). Without `grad_entropy`,
        d = e - sum(e) 1[v = y] and the coefficient joins the row scale. `grad_logprobs` None stands for 1.
        """
        if grad_entropy is None:
            row_scale = -1 / stats.total if grad_logprobs is None else -grad_logprobs / stats.total
            at_target = -stats.total
        else:
            row_scale = torch.ones_like(stats.total)
            at_target = grad_logprobs
        if grad_entropy is not None:
            # log p + entropy = log e - weighted / total, since both shift by log(total).
            slope = -(grad_entropy / stats.total)[:, None]
            level = -(grad_logprobs / stats.total)[:, None] - slope * (stats.weighted / stats.total)[:, None]
        local = local_targets >= 0
        index = local_targets.clamp(min=0)[:, None]
        for rows in self.row_blocks(e):
            block = e[rows]
            flattening = None
            if self.softcap is not None:
                z = block.log().add_(stats.maximum[rows, None])
                # The target alone keeps a gradient where its e has underflowed to 0, so its z is not taken from e.
                at_index = torch.where(local[rows, None], stats.target[rows, None], z.gather(1, index[rows]))
                z.scatter_(1, index[rows], at_index)
                if temperature is not None:
                    z *= temperature[rows, None]
                flattening = 1 - z.div_(self.softcap).square_()
                flattening.clamp_(min=0)
            if grad_entropy is not None:
                torch.addcmul(block * level[rows], slope[rows], torch.xlogy(block, block), out=block)
            block.scatter_add_(1, index[rows], torch.where(local[rows], at_target[rows], 0.0)[:, None])
            if flattening is not None:
                block *= flattening
        row_scale = row_scale * self.logit_scale
        return e, row_scale if temperature is None else row_scale / temperature

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        """``out = a @ b``, or added to `out`, with the operands as products of gradients take them."""
        a, b = a.to(self.gradient_dtype), b.to(self.gradient_dtype)
        if self.gradient_dtype != self.dtype and not self.mixed_products:
            product = torch.mm(a, b)
            out.add_(product) if add else out.copy_(product)
            return
        options = {"out_dtype": self.dtype} if self.mixed_products else {}
        torch.addmm(out, a, b, out=out, **options) if add else torch.mm(a, b, out=out, **options)

    def grad_hidden(self, d: Tensor, row_scale: Tensor | None) -> Tensor:
        """``row_scale * (d @ weight)`` over all shards, ``[C, H]`` in the accumulation dtype."""
        out = d.new_zeros(d.shape[0], self.weight.shape[1], dtype=self.dtype)
        for block in self.vocab_blocks(self.gradient_dtype, d.shape[0]):
            self.multiply(d[:, block], self.weight[block].to(self.operand_dtype), out, add=True)
        if row_scale is not None:
            out *= row_scale[:, None]
        return self.all_reduce(out)

    def accumulate_grad_weight(
        self, d: Tensor, row_scale: Tensor | None, hidden: Tensor, grad_weight: Tensor, unwritten: bool = False
    ) -> None:
        """``grad_weight [V, H] += d.T @ (row_scale * hidden)``; written, not added to, where it is `unwritten` yet."""
        # Not rounded to the operands' float16, where the row scale would underflow.
        scaled = hidden if row_scale is None else hidden.to(self.dtype) * row_scale[:, None]
        scaled = scaled.to(self.gradient_dtype)
        for block in self.vocab_blocks(self.gradient_dtype, d.shape[0]):
            self.multiply(d[:, block].t(), scaled, grad_weight[block], add=not unwritten)

    def accumulate_grad_bias(self, d: Tensor, row_scale: Tensor | None, grad_bias: Tensor) -> None:
        """``grad_bias [V] += d.T @ row_scale``, less the logit scale, which does not act on the bias."""
        if row_scale is None:
            grad_bias.add_(d.sum(0, dtype=self.dtype), alpha=1 / self.logit_scale)
        else:
            grad_bias.addmv_(d.t(), row_scale / self.logit_scale)


def local_targets(head: Head, targets: Tensor) -> Tensor:
    """Target ids within this rank's shard, -1 for those of other shards; int64."""
    targets = targets.long().contiguous()
    if head.process_group is None:
        return targets
    local = targets - head.vocab_start
    return torch.where((local >= 0) & (local < head.vocab_size), local, -1)
