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
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_kernels._checks import IGNORE_INDEX
from grpo_kernels.budget import (
    BLOCK_SHARE,
    FREE_SHARE,
    NARROW_COPIES,
    chunks,
    cpu_block_bytes,
    equal_parts,
    free_bytes,
    row_slices,
    wave_rows,
)
from grpo_kernels.support import RowSupport
from grpo_kernels.weight_copies import copied

HALF = (torch.bfloat16, torch.float16)


@contextmanager
def float32_sums() -> Iterator[None]:
    """Within it cuBLAS adds up the parts of a bfloat16 product in float32, even where it splits the sum."""
    settings, name = torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"
    before, exact = getattr(settings, name), False
    # Newer versions of torch reset a second setting unless it is given.
    if hasattr(settings, f"{name}_split_k"):
        split = getattr(settings, f"{name}_split_k")
        before, exact = (before, split), (exact, split)
    setattr(settings, name, exact)
    try:
        yield
    finally:
        setattr(settings, name, before)


class Rows(NamedTuple):
    """The inputs of a chunk of C rows."""

    hidden: Tensor  # [C, H], from `Head.operand`
    targets: Tensor  # [C] int64, negative where another shard holds the target
    temperature: Tensor | None  # [C], None for 1
    support: RowSupport | None = None  # None for the whole vocabulary


class RowStatistics(NamedTuple):
    """Softmax statistics of C rows over the whole vocabulary, and the maxima that this shard's e is relative to."""

    target: Tensor  # [C], z at the target
    maximum: Tensor  # [C]
    total: Tensor  # [C], the sum of exp(z - maximum)
    weighted: Tensor | None  # [C], the sum of exp(z - maximum) * (z - maximum); only for entropies
    tile_maximum: Tensor | None  # [tiles, C]; None where e is relative to `maximum`, or where there is no e
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
    last: bool = True  # of its pass


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
    grows: bool  # beyond `max_buffer_bytes`, into a GPU's free memory
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
    def recompute_(
        self, rows: Rows, stats: RowStatistics, out: Tensor, grad_logprobs: Tensor, grad_entropy: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What `gradient_` returns, for rows whose statistics are known: one product, and no sums over the vocabulary.

        Args:
            out: ``[C, V]``, which d is written into.
            grad_logprobs, grad_entropy: ``[C]``; None stands for 0.
        """

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

    @staticmethod
    def scale_(values: Tensor, factor: Tensor) -> None:
        """``values *= factor`` for a scalar on their device, without waiting for it."""
        values.mul_(factor)

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

    def scratch_bytes(self, scoring: bool = False) -> int:
        """The part of the byte budget that a forward pass needs besides the ``[C, V]`` buffer, if there is one."""
        return 0

    def rows_per_chunk(self, copies: int = 1) -> int:
        """Rows of which `copies` fit the byte budget, the same on every rank of the group."""
        cast = not self.weight.dtype == self.product_dtype == self.gradient_dtype
        blocks = 2 * self.block_bytes if self.on_cpu or cast else 0
        row_bytes = self.sizing_vocab * self.buffer_dtype.itemsize + self.narrow_bytes()
        return max((int(self.max_buffer_bytes) - blocks - self.scratch_bytes()) // row_bytes // copies, 1)

    def row_slices(self, num_rows: int, rows: int) -> Iterator[slice]:
        """Chunks of at most `rows`: of equal length on a CPU, of exactly `rows` but for the last on a GPU."""
        return chunks(num_rows, rows) if self.on_cpu else row_slices(num_rows, rows)

    def chunk_rows(self, num_rows: int, copies: int, trained: bool) -> int:
        """C, such that `copies` of the ``[C, V]`` buffer fit the byte budget, or a share of a GPU's free memory."""
        most, device = self.rows_per_chunk(copies), self.weight.device
        if self.on_cpu:
            return equal_parts(num_rows, most)
        if self.grows and most < num_rows:
            # The sums of the weight's gradient are allocated later.
            free = free_bytes(device) - (self.weight.numel() * self.dtype.itemsize if trained else 0)
            most = max(most, replace(self, max_buffer_bytes=int(FREE_SHARE * free)).rows_per_chunk(copies))
        count = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        return wave_rows(num_rows, most, self.weight.shape[1], count, trained)

    def buffer(self, num_rows: int, copies: int = 1, trained: bool = False) -> Tensor:
        """The ``[C, V]`` buffer for chunks of `num_rows` rows of which `copies` exist at once.

        Args:
            trained: the weight's gradient is summed up over the chunks, so fewer are better.
        """
        return self.allocate(self.chunk_rows(num_rows, copies, trained))

    def allocate(self, rows: int) -> Tensor:
        """A buffer ``[rows, V]``."""
        width = -(-self.vocab_size // self.buffer_alignment) * self.buffer_alignment
        return torch.empty(rows, width, dtype=self.buffer_dtype, device=self.weight.device)[:, : self.vocab_size]

    def block_width(self, dtype: torch.dtype, num_rows: int) -> int:
        """Columns for one product of `num_rows` rows in `dtype`: the whole vocabulary, or less if operands are cast."""
        if self.weight.dtype == self.operand_dtype == self.buffer_dtype == dtype:
            return self.vocab_size
        return self.block_bytes // (max(num_rows, self.weight.shape[1], 1) * self.dtype.itemsize)

    def vocab_blocks(self, dtype: torch.dtype, num_rows: int) -> Iterator[slice]:
        """The vocabulary in blocks of `block_width`."""
        return chunks(self.vocab_size, self.block_width(dtype, num_rows))

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

    def grad_hidden(self, d: Tensor, row_scale: Tensor | None, out: Tensor) -> None:
        """Write ``row_scale * (d @ weight)`` over all shards into ``out [C, H]``, rounded once to its dtype."""
        # float16 that already is the gradient at unit scale loses nothing.
        dtype = d.dtype if d.dtype == torch.float16 and self.mixed_products else self.gradient_dtype
        blocks = list(self.vocab_blocks(dtype, d.shape[0]))
        rounded_by_product = (
            self.mixed_products
            and out.dtype == self.gradient_dtype
            and row_scale is None
            and self.process_group is None
            and len(blocks) == 1
        )
        direct = (out.dtype == self.dtype or rounded_by_product) and out.is_contiguous()
        product = out if direct else out.new_empty(out.shape, dtype=self.dtype)
        if not blocks:
            product.zero_()
        for index, block in enumerate(blocks):
            self.multiply(d[:, block], self.weight[block].to(self.operand_dtype), product, add=index > 0, dtype=dtype)
        if row_scale is not None:
            product *= row_scale[:, None]
        self.all_reduce(product)
        if not direct:
            out.copy_(product)

    def scaled_rows(self, hidden: Tensor, row_scale: Tensor | None) -> Tensor:
        """``row_scale * hidden``, the operand ``[C, H]`` of the weight gradient's product."""
        # Not rounded to the operands' float16, where the row scale would underflow.
        scaled = hidden if row_scale is None else hidden.to(self.dtype) * row_scale[:, None]
        return scaled.to(self.gradient_dtype)

    def accumulate_grad_bias(self, d: Tensor, row_scale: Tensor | None, grad_bias: Tensor) -> None:
        """``grad_bias [V] += d.T @ row_scale``, less the logit scale, which does not act on the bias."""
        if row_scale is None:
            grad_bias.add_(d.sum(0, dtype=self.dtype), alpha=1 / self.logit_scale)
        else:
            for block in self.vocab_blocks(self.dtype, d.shape[0]):
                grad_bias[block].addmv_(d[:, block].t().to(self.dtype), row_scale / self.logit_scale)

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, add: bool, dtype: torch.dtype) -> None:
        """``out = a @ b``, or ``out += a @ b``, with the operands in `dtype`.

        `out` has the accumulation dtype; without `add` it may have that of the operands, and is rounded once.
        """
        a, b = a.to(dtype), b.to(dtype)
        if dtype != self.dtype and out.dtype == dtype:
            with float32_sums():
                torch.mm(a, b, out=out)
            return
        if dtype != self.dtype and not self.mixed_products:
            product = torch.mm(a, b)
            out.add_(product) if add else out.copy_(product)
            return
        options = {"out_dtype": self.dtype} if dtype != self.dtype else {}
        torch.addmm(out, a, b, out=out, **options) if add else torch.mm(a, b, out=out, **options)
