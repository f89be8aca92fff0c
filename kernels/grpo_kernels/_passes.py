"""Passes over the rows of a head, a chunk at a time: scoring, slopes and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from grpo_kernels._head import Chunk, Head, Rows
from grpo_kernels.budget import chunks


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

    def prepared(self) -> Self:
        return replace(self, head=self.head.prepared())

    @property
    def frozen(self) -> bool:
        return not (self.needs[1] or self.needs[2])

    def chunks(self, rows: Tensor, buffer: Tensor, with_entropy: bool) -> Iterator[Chunk]:
        """1U: the forward of the tokens ``rows [n]``. A chunk lies in `buffer` until the next one is made."""
        every_row = rows.numel() == self.targets.numel()
        for part in chunks(rows.numel(), buffer.shape[0]):
            # A slice, unlike indices, copies nothing.
            at = part if every_row else rows[part]
            temperature = None if self.temperature is None else self.temperature[at]
            chunk = Rows(self.head.operand(self.hidden[at]), self.targets[at], temperature)
            e = buffer[: chunk.hidden.shape[0]]
            yield Chunk(at, chunk, e, self.head.forward_(chunk, e, with_entropy))

    def score(self, rows: Tensor, scores: Scores) -> None:
        """1U: the scores of `rows`, in place."""
        for chunk in self.chunks(rows, self.head.scoring_buffer(rows.numel()), scores.entropy is not None):
            scores.write(chunk)

    def slopes(self, rows: Tensor, scores: Scores, slopes: list[Tensor]) -> None:
        """2U (3U with the entropy's): the scores of `rows`, and dlogp/dhidden and perhaps dentropy/dhidden, in place.

        `slopes` are one or two tensors ``[N, H]``.
        """
        head = self.head
        # The entropy's slope overwrites a copy of e.
        buffer = head.buffer(rows.numel(), copies=len(slopes))
        copy = head.buffer(rows.numel(), copies=len(slopes)) if len(slopes) > 1 else None
        for chunk in self.chunks(rows, buffer, scores.entropy is not None):
            scores.write(chunk)
            if copy is not None:
                one, zero = torch.ones_like(chunk.stats.total), torch.zeros_like(chunk.stats.total)
                copied = chunk._replace(e=copy[: chunk.e.shape[0]].copy_(chunk.e))
                slopes[1][chunk.at] = head.grad_hidden(*head.gradient_(copied, zero, one)).to(slopes[1].dtype)
            slopes[0][chunk.at] = head.grad_hidden(*head.gradient_(chunk, None)).to(slopes[0].dtype)


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

    def take(self, at: Tensor | slice) -> Scores:
        return Scores(self.logprobs[at], None if self.entropy is None else self.entropy[at])


class Gradients:
    """Collects the gradients that a pass needs, hidden's in `hidden_dtype`, the others in the accumulation dtype."""

    def __init__(self, call: Pass, hidden_dtype: torch.dtype):
        self.head = head = call.head
        self.hidden = torch.zeros_like(call.hidden, dtype=hidden_dtype) if call.needs[0] else None
        self.weight = call.grad_weight_buffer
        # The first chunk writes a new weight gradient, and the others add to it.
        self.unwritten = self.weight is None and call.needs[1]
        if self.unwritten:
            self.weight = torch.empty(head.weight.shape, dtype=head.dtype, device=head.weight.device)
        self.bias = call.hidden.new_zeros(head.vocab_size, dtype=head.dtype) if call.needs[2] else None

    def add(self, chunk: Chunk, grad_logprobs: Tensor, grad_entropy: Tensor | None) -> None:
        """2U: add a chunk's share, given its dL/dlogp and dL/dentropy (or None), ``[C]``."""
        d, row_scale = self.head.gradient_(chunk, grad_logprobs, grad_entropy)
        if self.hidden is not None:
            self.hidden[chunk.at] = self.head.grad_hidden(d, row_scale).to(self.hidden.dtype)
        if self.weight is not None:
            self.head.accumulate_grad_weight(d, row_scale, chunk.rows.hidden, self.weight, self.unwritten)
            self.unwritten = False
        if self.bias is not None:
            self.head.accumulate_grad_bias(d, row_scale, self.bias)

    def recompute(self, call: Pass, rows: Tensor, grad_logprobs: Tensor, grad_entropy: Tensor | None) -> None:
        """3U: a second forward of `rows`, then their share, given dL/dlogp and dL/dentropy (or None), ``[N]``."""
        for chunk in call.chunks(rows, self.head.buffer(rows.numel()), grad_entropy is not None):
            at = chunk.at
            self.add(chunk, grad_logprobs[at], None if grad_entropy is None else grad_entropy[at])

    def collected(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of (hidden, weight, bias), after the last chunk."""
        if self.unwritten and self.weight is not None:
            self.weight.zero_()
        return self.hidden, self.weight, self.bias


def partition(category: Tensor, count: int) -> list[Tensor]:
    """The indices at which ``category [N]`` int is 0, 1, .. `count` - 1, each in order.

    The host reads their numbers once, which waits for a GPU: it must know how many rows to multiply.
    """
    if category.device.type == "cpu":
        return [(category == value).nonzero().squeeze(1) for value in range(count)]
    order = torch.argsort(category, stable=True)
    sizes = torch.stack([(category == value).sum() for value in range(count)]).tolist()
    return list(order[: sum(sizes)].split(sizes))
