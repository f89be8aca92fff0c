"""Passes over the rows of a head, a chunk at a time: scoring, slopes and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from grpo_kernels._checks import IGNORE_INDEX, require, require_device, require_tensors, values_can_be_checked
from grpo_kernels._head import Chunk, Head, Rows, RowStatistics
from grpo_kernels._weight_gradient import WeightGradient
from grpo_kernels.support import RowSupport


@dataclass(frozen=True)
class Pass:
    """One call of an operation on the head: the inputs of N tokens, and the outputs and gradients to compute."""

    head: Head
    hidden: Tensor  # [N, H]
    targets: Tensor  # [N] int64, from `Head.local_targets`
    temperature: Tensor | None  # [N], None for 1
    needs: tuple[bool, bool, bool]  # whether to compute the gradients of hidden, weight and bias
    with_entropy: bool
    grad_weight_buffer: Tensor | None = None  # [V, H]: collects the weight's gradient, if given
    rows: Tensor | None = None  # [n], the tokens to compute, if the caller named them
    support: RowSupport | None = None  # the kept ids of the N tokens, None for the whole vocabulary

    def prepared(self) -> Self:
        return replace(self, head=self.head.prepared())

    def with_rows(self, op: str, rows: Tensor | Literal["all"] | None) -> Self:
        """This call with the tokens to compute, from an operation's `rows`; all others become ignored targets.

        Raises:
            ValueError: `rows` is neither "all" nor ascending indices ``[n]`` of tokens (checked on a CPU).
            TypeError: its dtype is not int64.
        """
        if rows is None:
            return self
        count, device = self.targets.numel(), self.targets.device
        if isinstance(rows, str):
            require(rows == "all", f"{op}: rows must be 'all', indices [n], or None, got {rows!r:.60}")
            return replace(self, rows=torch.arange(count, device=device))
        require_tensors(op, rows=rows)
        if rows.dtype != torch.int64:
            raise TypeError(f"{op}: rows must be int64, got {rows.dtype}")
        require(rows.dim() == 1, f"{op}: rows must have shape [n], got {tuple(rows.shape)}")
        require_device(op, device, rows=rows)
        if values_can_be_checked(device) and rows.numel():
            ascending = bool((rows.diff() > 0).all()) and rows[0].item() >= 0 and rows[-1].item() < count
            require(ascending, f"{op}: rows must be ascending indices of {count} tokens, without repetition")
        targets = torch.full_like(self.targets, IGNORE_INDEX).index_copy_(0, rows, self.targets[rows])
        return replace(self, rows=rows, targets=targets)

    @property
    def frozen(self) -> bool:
        return not (self.needs[1] or self.needs[2])

    def inputs(self, rows: Tensor, length: int) -> Iterator[tuple[Tensor | slice, Rows, bool]]:
        """The tokens ``rows [n]`` in chunks of at most `length`: (which of the N, their inputs, whether the last)."""
        every_row = rows.numel() == self.targets.numel()
        for part in self.head.row_slices(rows.numel(), length):
            # A slice, unlike indices, copies nothing.
            at = part if every_row else rows[part]
            temperature = None if self.temperature is None else self.temperature[at]
            support = None if self.support is None else self.support.take(at)
            chunk = Rows(self.head.operand(self.hidden[at]), self.targets[at], temperature, support)
            yield at, chunk, part.stop == rows.numel()

    def chunks(self, rows: Tensor, buffer: Tensor, with_entropy: bool) -> Iterator[Chunk]:
        """1U: the forward of the tokens ``rows [n]``. A chunk lies in `buffer` until the next one is made."""
        for at, chunk, last in self.inputs(rows, buffer.shape[0]):
            e = buffer[: chunk.hidden.shape[0]]
            stats = self.head.forward_(chunk, e, with_entropy)
            yield Chunk(at, chunk, e, stats if chunk.support is None else without_empty(stats), last)

    def gradient_chunks(self, rows: Tensor) -> Iterator[Chunk]:
        """`chunks` for `Gradients.add`."""
        return self.chunks(rows, self.head.buffer(rows.numel(), trained=self.needs[1]), self.with_entropy)

    def gradients(self, hidden_dtype: torch.dtype, weight_dtype: torch.dtype) -> Gradients:
        """What collects the gradients that are needed, hidden's and the weight's in the dtypes given."""
        return Gradients(self, hidden_dtype, weight_dtype)

    def score(self, rows: Tensor, scores: Scores, known: KnownRows | None = None) -> None:
        """1U: the scores of `rows`, and what their gradients need, in place."""
        for chunk in self.chunks(rows, self.head.scoring_buffer(rows.numel()), scores.entropy is not None):
            scores.write(chunk)
            if known is not None:
                known.write(chunk)

    def slopes(self, rows: Tensor, scores: Scores, slopes: list[Tensor]) -> None:
        """2U (3U with the entropy's): the scores of `rows`, and dlogp/dhidden and perhaps dentropy/dhidden, in place.

        `slopes` are one or two tensors ``[N, H]``.
        """
        head = self.head
        # The entropy's slope overwrites a copy of e.
        buffer = head.buffer(rows.numel(), copies=len(slopes))
        copy = head.allocate(buffer.shape[0]) if len(slopes) > 1 else None
        for chunk in self.chunks(rows, buffer, scores.entropy is not None):
            scores.write(chunk)
            if copy is not None:
                one, zero = torch.ones_like(chunk.stats.total), torch.zeros_like(chunk.stats.total)
                copied = chunk._replace(e=copy[: chunk.e.shape[0]].copy_(chunk.e))
                write_grad_hidden(head, *head.gradient_(copied, zero, one), slopes[1], chunk.at)
            grad_logprobs = within_support(chunk.rows, chunk.stats, None)
            write_grad_hidden(head, *head.gradient_(chunk, grad_logprobs), slopes[0], chunk.at)


def without_empty(stats: RowStatistics) -> RowStatistics:
    """The statistics with finite ones for a row of no kept ids: its log-probability is -inf, its entropy 0."""
    empty = stats.total == 0
    return stats._replace(
        maximum=torch.where(empty, 0.0, stats.maximum),
        total=torch.where(empty, 1.0, stats.total),
        target=torch.where(empty, float("-inf"), stats.target),
    )


def within_support(rows: Rows, stats: RowStatistics, grad_logprobs: Tensor | None) -> Tensor | None:
    """dL/dlogp ``[C]`` (None for 1) with 0 for a target outside of its support, which has no gradient."""
    if rows.support is None:
        return grad_logprobs
    grad_logprobs = torch.ones_like(stats.target) if grad_logprobs is None else grad_logprobs
    return torch.where(stats.target == float("-inf"), 0.0, grad_logprobs)


def write_grad_hidden(head: Head, d: Tensor, row_scale: Tensor | None, out: Tensor, at: Tensor | slice) -> None:
    """Write the hidden states' gradient of a chunk into its rows `at` of ``out [N, H]``."""
    if isinstance(at, slice):
        head.grad_hidden(d, row_scale, out[at])
        return
    rows = out.new_empty(d.shape[0], out.shape[1])
    head.grad_hidden(d, row_scale, rows)
    out.index_copy_(0, at, rows)


class Scores(NamedTuple):
    """The results of a forward for each token; 0 where it was not computed."""

    logprobs: Tensor  # [N]
    entropy: Tensor | None  # [N]

    @classmethod
    def zeros(cls, call: Pass) -> Self:
        logprobs = call.hidden.new_zeros(call.targets.shape, dtype=call.head.dtype)
        return cls(logprobs, torch.zeros_like(logprobs) if call.with_entropy else None)

    def write(self, chunk: Chunk) -> None:
        self.logprobs[chunk.at] = chunk.stats.logprobs
        if self.entropy is not None:
            self.entropy[chunk.at] = chunk.stats.entropy

    def clear(self, ignored: Tensor) -> None:
        """Set the tokens of a mask ``[N]`` to 0, in place."""
        for score in self:
            if score is not None:
                score.masked_fill_(ignored, 0.0)

    def take(self, at: Tensor | slice) -> Scores:
        return Scores(self.logprobs[at], None if self.entropy is None else self.entropy[at])


class KnownRows(NamedTuple):
    """The softmax statistics of tokens that were scored, for the gradients of the same logits."""

    planes: Tensor  # [3, N], or [4, N] with entropies: as in `RowStatistics`

    @classmethod
    def zeros(cls, call: Pass) -> Self:
        return cls(call.hidden.new_zeros(3 + call.with_entropy, call.targets.numel(), dtype=call.head.dtype))

    def write(self, chunk: Chunk) -> None:
        stats = chunk.stats
        planes = (stats.target, stats.maximum, stats.total, stats.weighted)
        self.planes[:, chunk.at] = torch.stack([plane for plane in planes if plane is not None])

    def take(self, at: Tensor | slice) -> RowStatistics:
        target, maximum, total, *weighted = self.planes[:, at]
        return RowStatistics(target, maximum, total, weighted[0] if weighted else None, None, 0)


class Gradients:
    """Collects the gradients that a pass needs, hidden's and the weight's in the dtypes given."""

    def __init__(self, call: Pass, hidden_dtype: torch.dtype, weight_dtype: torch.dtype):
        self.head = head = call.head
        self.hidden = call.hidden.new_zeros(call.hidden.shape, dtype=hidden_dtype) if call.needs[0] else None
        self.weight = WeightGradient(head, weight_dtype, call.grad_weight_buffer) if call.needs[1] else None
        self.bias = call.hidden.new_zeros(head.vocab_size, dtype=head.dtype) if call.needs[2] else None

    def add(self, chunk: Chunk, grad_logprobs: Tensor, grad_entropy: Tensor | None) -> None:
        """2U: add a chunk's share, given its dL/dlogp and dL/dentropy (or None), ``[C]``."""
        grad_logprobs = within_support(chunk.rows, chunk.stats, grad_logprobs)
        d, row_scale = self.head.gradient_(chunk, grad_logprobs, grad_entropy)
        self.multiply(chunk.at, chunk.rows, d, row_scale, chunk.last)

    def recompute(
        self, call: Pass, rows: Tensor, known: KnownRows, grad_logprobs: Tensor, grad_entropy: Tensor | None
    ) -> None:
        """3U: the share of `rows` that were scored, given dL/dlogp and dL/dentropy (or None), ``[N]``."""
        buffer = self.head.buffer(rows.numel(), trained=self.weight is not None)
        for at, chunk, last in call.inputs(rows, buffer.shape[0]):
            stats = known.take(at)
            upstreams = (
                within_support(chunk, stats, grad_logprobs[at]),
                None if grad_entropy is None else grad_entropy[at],
            )
            d, row_scale = self.head.recompute_(chunk, stats, buffer[: chunk.hidden.shape[0]], *upstreams)
            self.multiply(at, chunk, d, row_scale, last)

    def multiply(self, at: Tensor | slice, rows: Rows, d: Tensor, row_scale: Tensor | None, last: bool) -> None:
        """2U: add a chunk's share, given its dL/dlogits."""
        if self.hidden is not None:
            write_grad_hidden(self.head, d, row_scale, self.hidden, at)
        if self.weight is not None:
            self.weight.add(d, row_scale, rows.hidden, last)
        if self.bias is not None:
            self.head.accumulate_grad_bias(d, row_scale, self.bias)

    def collected(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of (hidden, weight, bias), after the last chunk."""
        return self.hidden, None if self.weight is None else self.weight.collected(), self.bias


def partition(category: Tensor, count: int) -> list[Tensor]:
    """The indices at which ``category [N]`` int is 0, 1, .. `count` - 1, each in order.

    The host reads their numbers once, which waits for a GPU: it must know how many rows to multiply.
    """
    if category.device.type == "cpu":
        return [(category == value).nonzero().squeeze(1) for value in range(count)]
    order = torch.argsort(category, stable=True)
    sizes = torch.stack([(category == value).sum() for value in range(count)]).tolist()
    return list(order[: sum(sizes)].split(sizes))
