"""The output head: byte budgets, vocabulary shards, and the steps that a backend implements.

For a chunk of C rows, in float32 whatever the inputs' dtype,

    e, stats = forward_(rows)       z = logits(hidden), one product (1U); e = exp(z - maximum) [C, V] in a buffer
    d, row_scale = gradient_(e)     in place: dL/d(hidden @ weight.T) = row_scale * d
    dH = row_scale * (d @ W)        one product (1U)
    dW += d.T @ (row_scale * H)     one product (1U)

`TorchHead` and `TritonHead` implement the first two; the last two are the same products for both. They take bfloat16
operands for a bfloat16 head, a block of the vocabulary at a time, and their results are added up in float32. For a
float16 head only dH can, where d is within float16's range: the row scale of dW, about 1 / tokens, is not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_kernels._checks import IGNORE_INDEX
from grpo_kernels.budget import BLOCK_SHARE, NARROW_COPIES, chunks, cpu_block_bytes, equal_parts
from grpo_kernels.weight_copies import copied

HALF = (torch.bfloat16, torch.float16)


class Rows(NamedTuple):
    """The inputs of a chunk of C rows."""

    hidden: Tensor  # [C, H], from `Head.operand`
    targets: Tensor  # [C] int64, negative where another shard holds the target
    temperature: Tensor | None  # [C], None for 1


class RowStatistics(NamedTuple):
    """Softmax statistics of C rows over the whole vocabulary, and the maxima that this shard's e is relative to."""

    target: Tensor  # [C], z at the target
    maximum: Tensor  # [C]
    total: Tensor  # [C], the sum of exp(z - maximum)
    weighted: Tensor | None  # [C], the sum of exp(z - maximum) * (z - maximum); only for entropies
    tile_maximum: Tensor  # [tiles, C]
    tile_width: int  # columns that share a maximum

    @property
    def logprobs(self) -> Tensor:
        # Subtract the maximum first: rounding maximum + log(total) would cost large logits their last digits.
        return (self.target - self.maximum) - torch.log(self.total)

    @property
    def entropy(self) -> Tensor | None:
        return None if self.weighted is None else torch.log(self.total) - self.weighted / self.total


class Chunk(NamedTuple):
    """A chunk after its forward; `e` lies in the buffer that the next chunk overwrites."""

    at: Tensor | slice  # which of the N tokens
    rows: Rows
    e: Tensor  # [C, V]
    stats: RowStatistics


@dataclass(frozen=True)
class Head(ABC):
    """An output head, or this rank's shard of its vocabulary, and the transform from products to logits.

    ``z = softcap(logit_scale * hidden @ weight.T + bias) / temperature``, softcap(x) = softcap * tanh(x / softcap).
    """

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    logit_scale: float
    softcap: float | None
    process_group: dist.ProcessGroup | None
    max_buffer_bytes: int
    operand_dtype: torch.dtype
    dtype: torch.dtype  # of sums and statistics
    vocab_start: int
    sizing_vocab: int  # the largest shard's vocabulary: chunk lengths follow from it, so that all ranks agree

    # The rows of the buffer start at multiples of this many elements.
    buffer_alignment: ClassVar[int]

    @property
    @abstractmethod
    def buffer_dtype(self) -> torch.dtype:
        """The dtype of the ``[C, V]`` buffer."""

    @abstractmethod
    def scoring_buffer(self, num_rows: int) -> Tensor:
        """The buffer for chunks of `num_rows` rows without gradients."""

    @abstractmethod
    def operand(self, rows: Tensor) -> Tensor:
        """Hidden states in the dtype that the logits' product takes."""

    @abstractmethod
    def forward_(self, rows: Rows, out: Tensor, with_entropy: bool) -> RowStatistics:
        """Write e of the rows into ``out [C, V]`` and return the statistics (over all shards)."""

    @abstractmethod
    def gradient_(
        self, chunk: Chunk, grad_logprobs: Tensor | None, grad_entropy: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Turn e into d, in its memory, where row_scale * d is dL/d(hidden @ weight.T).

        dL/dz_v = grad_logprobs * (1[v = y] - p_v) - grad_entropy * p_v * (log p_v + entropy).

        Args:
            grad_logprobs, grad_entropy: ``[C]``; None stands for 1 and for 0.

        Returns:
            (d, row_scale ``[C]`` or None for 1).
        """

    @property
    def on_cpu(self) -> bool:
        return self.weight.device.type == "cpu"

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def mixed_products(self) -> bool:
        """Whether the device multiplies 16-bit operands as they are into float32; of torch's devices only CUDA does."""
        return self.weight.device.type == "cuda" and self.operand_dtype in HALF

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype in which operands enter the product that makes the logits."""
        return self.operand_dtype if self.mixed_products else self.dtype

    @property
    def gradient_dtype(self) -> torch.dtype:
        """The dtype in which operands enter the products that make the gradients (`grad_hidden` may take float16)."""
        return self.operand_dtype if self.operand_dtype == torch.bfloat16 else self.dtype

    def prepared(self) -> Self:
        """This head for one forward or backward: on a GPU the weight is cast once.

        A 16-bit copy is always made, on top of the byte budget: a kernel that casts pieces of a float32 weight needs
        more shared memory than a GPU has. A wider copy is made if half the budget holds it.
        """
        if self.weight.dtype == self.product_dtype or self.on_cpu:
            return self
        if self.product_dtype.itemsize == 2:
            return replace(self, weight=copied(self.weight, self.product_dtype))
        size = self.sizing_vocab * self.weight.shape[1] * self.product_dtype.itemsize
        if 2 * size > self.max_buffer_bytes:
            return self
        cast = self.weight.to(self.operand_dtype).to(self.product_dtype)
        return replace(self, weight=cast, max_buffer_bytes=self.max_buffer_bytes - size)

    def narrow_bytes(self) -> int:
        """Memory for a row, without its logits."""
        return NARROW_COPIES * self.weight.shape[1] * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Memory for the rows, or the copies of operands, that are processed at once."""
        return cpu_block_bytes(self.max_buffer_bytes) if self.on_cpu else int(BLOCK_SHARE * self.max_buffer_bytes)

    def rows_per_chunk(self) -> int:
        """Rows that fit the byte budget, the same on every rank of the group."""
        cast = not self.weight.dtype == self.product_dtype == self.gradient_dtype
        blocks = 2 * self.block_bytes if self.on_cpu or cast else 0
        row_bytes = self.sizing_vocab * self.buffer_dtype.itemsize + self.narrow_bytes()
        return max((int(self.max_buffer_bytes) - blocks) // row_bytes, 1)

    def buffer(self, num_rows: int, copies: int = 1) -> Tensor:
        """The ``[C, V]`` buffer for chunks of `num_rows` rows; C is such that `copies` of it fit the byte budget."""
        rows = equal_parts(num_rows, self.rows_per_chunk() // copies)
        width = -(-self.vocab_size // self.buffer_alignment) * self.buffer_alignment
        return torch.empty(rows, width, dtype=self.buffer_dtype, device=self.weight.device)[:, : self.vocab_size]

    def vocab_blocks(self, dtype: torch.dtype, num_rows: int) -> Iterator[slice]:
        """The vocabulary for products of `num_rows` rows in `dtype`: whole, or in blocks where an operand is cast."""
        width = self.vocab_size
        if not self.weight.dtype == self.operand_dtype == self.buffer_dtype == dtype:
            width = self.block_bytes // (max(num_rows, self.weight.shape[1], 1) * self.dtype.itemsize)
        return chunks(self.vocab_size, width)

    def local_targets(self, targets: Tensor) -> Tensor:
        """Target ids within this rank's shard, -1 for those of other shards; int64. Ignored targets stay ignored."""
        targets = targets.long().contiguous()
        if self.process_group is None:
            return targets
        local = targets - self.vocab_start
        local = torch.where((local >= 0) & (local < self.vocab_size), local, -1)
        return torch.where(targets == IGNORE_INDEX, IGNORE_INDEX, local)

    def all_reduce(self, tensor: Tensor, op=dist.ReduceOp.SUM) -> Tensor:
        if self.process_group is not None:
            dist.all_reduce(tensor, op=op, group=self.process_group)
        return tensor

    def over_shards(self, stats: RowStatistics) -> RowStatistics:
        """The statistics of the whole vocabulary from those of this rank's shard: two all-reduces."""
        if self.process_group is None:
            return stats
        maximum = self.all_reduce(stats.maximum.clone(), dist.ReduceOp.MAX)
        # A shard in which every logit is -inf adds nothing, and has no finite maximum to subtract.
        shift = torch.where(stats.total > 0, stats.maximum - maximum, 0.0)
        factor = shift.exp()
        sums = [stats.target, factor * stats.total]
        if stats.weighted is not None:
            sums.append(factor * (stats.weighted + shift * stats.total))
        target, total, *weighted = self.all_reduce(torch.stack(sums))
        return stats._replace(target=target, maximum=maximum, total=total, weighted=weighted[0] if weighted else None)

    def grad_hidden(self, d: Tensor, row_scale: Tensor | None) -> Tensor:
        """``row_scale * (d @ weight)`` over all shards, ``[C, H]`` in the accumulation dtype."""
        out = d.new_zeros(d.shape[0], self.weight.shape[1], dtype=self.dtype)
        # float16 that already is the gradient at unit scale loses nothing.
        dtype = d.dtype if d.dtype == torch.float16 and self.mixed_products else self.gradient_dtype
        for block in self.vocab_blocks(dtype, d.shape[0]):
            self._multiply(d[:, block], self.weight[block].to(self.operand_dtype), out, add=True, dtype=dtype)
        if row_scale is not None:
            out *= row_scale[:, None]
        return self.all_reduce(out)

    def accumulate_grad_weight(
        self, d: Tensor, row_scale: Tensor | None, hidden: Tensor, grad_weight: Tensor, unwritten: bool = False
    ) -> None:
        """``grad_weight [V, H] += d.T @ (row_scale * hidden)``, or ``=`` if it is still `unwritten`."""
        # Not rounded to the operands' float16, where the row scale would underflow.
        scaled = hidden if row_scale is None else hidden.to(self.dtype) * row_scale[:, None]
        scaled = scaled.to(self.gradient_dtype)
        for block in self.vocab_blocks(self.gradient_dtype, d.shape[0]):
            self._multiply(d[:, block].t(), scaled, grad_weight[block], add=not unwritten, dtype=self.gradient_dtype)

    def accumulate_grad_bias(self, d: Tensor, row_scale: Tensor | None, grad_bias: Tensor) -> None:
        """``grad_bias [V] += d.T @ row_scale``, less the logit scale, which does not act on the bias."""
        if row_scale is None:
            grad_bias.add_(d.sum(0, dtype=self.dtype), alpha=1 / self.logit_scale)
        else:
            for block in self.vocab_blocks(self.dtype, d.shape[0]):
                grad_bias[block].addmv_(d[:, block].t().to(self.dtype), row_scale / self.logit_scale)

    def _multiply(self, a: Tensor, b: Tensor, out: Tensor, add: bool, dtype: torch.dtype) -> None:
        """``out = a @ b``, or ``out += a @ b``, with the operands in `dtype`."""
        a, b = a.to(dtype), b.to(dtype)
        if dtype != self.dtype and not self.mixed_products:
            product = torch.mm(a, b)
            out.add_(product) if add else out.copy_(product)
            return
        options = {"out_dtype": self.dtype} if dtype != self.dtype else {}
        torch.addmm(out, a, b, out=out, **options) if add else torch.mm(a, b, out=out, **options)
