"""From completions of unequal length to microbatches under a token budget.

A step's completions are numbered, and so are their tokens, one after another: everything that belongs to a token
(weight, advantage, old log-probability) lies in flat ``[N]`` tensors of the step, and a microbatch holds the indices of
its tokens in them. Any split into microbatches therefore computes the same sum.

A row of a microbatch is a prompt and one completion, or, with a shared prompt, all completions of its group:

    prompt | completion 1 | completion 2 | ...

Each completion sees the prompt and itself, and its positions continue the prompt's, so the hidden states equal those of
separate rows while the prompt is computed once. A completion's last token predicts nothing and is not computed at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Rows of shared prompts need a [T, T] mask, which is worth it only while T is short.
LONGEST_SHARED_ROW = 4096


class Sample(NamedTuple):
    """One completion: its prompt, its tokens (at least one) and the index of its group."""

    prompt_ids: list[int]
    completion_ids: list[int]
    group: int


class Row(NamedTuple):
    """Indices of the samples that share one row."""

    samples: list[int]
    length: int


@dataclass
class Microbatch:
    """Inputs of one forward.

    Attributes:
        input_ids, position_ids: ``[B, T]`` int64.
        attention_mask: ``[B, T]`` int64 for plain rows, ``[B, 1, T, T]`` bool (True where attended) for shared ones.
        sources: ``[n]`` int64, index into ``B * T`` of the position whose hidden state predicts each target.
        targets: ``[n]`` int64, the completion tokens.
        tokens: ``[n]`` int64, their indices among the step's tokens.
        cu_seqlens: ``[S + 1]`` int64, offsets of the completions in the three above.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    sources: Tensor
    targets: Tensor
    tokens: Tensor
    cu_seqlens: Tensor

    def to(self, device: torch.device) -> Microbatch:
        return Microbatch(**{name: value.to(device) for name, value in vars(self).items()})


def token_offsets(samples: list[Sample]) -> Tensor:
    """``[S + 1]`` int64 offsets of the samples' completions among the step's tokens."""
    lengths = torch.tensor([0] + [len(sample.completion_ids) for sample in samples])
    return lengths.cumsum(0)


def plan_rows(samples: list[Sample], chosen: list[int], max_tokens: int, longest_shared_row: int) -> list[Row]:
    """Put the chosen samples into rows; a row of several shares its prompt and is at most `longest_shared_row` long."""
    longest = min(max_tokens, longest_shared_row)
    rows: list[Row] = []
    open_rows: dict[int, Row] = {}
    for index in chosen:
        prompt_ids, completion_ids, group = samples[index]
        extra = len(completion_ids) - 1
        row = open_rows.get(group)
        if row is not None and row.length + extra <= longest:
            row = Row([*row.samples, index], row.length + extra)
            rows[rows.index(open_rows[group])] = row
        else:
            row = Row([index], len(prompt_ids) + extra)
            rows.append(row)
        open_rows[group] = row
    return rows


def fill_microbatches(rows: list[Row], max_tokens: int) -> list[list[Row]]:
    """Rows of similar length side by side, so that rows times the longest stays within `max_tokens`."""
    microbatches: list[list[Row]] = []
    width = 0
    for row in sorted(rows, key=lambda row: -row.length):
        if microbatches and (len(microbatches[-1]) + 1) * width <= max_tokens:
            microbatches[-1].append(row)
        else:
            microbatches.append([row])
            width = row.length
    return microbatches


def build_microbatch(samples: list[Sample], rows: list[Row], offsets: Tensor, pad_token_id: int) -> Microbatch:
    """Tensors of one microbatch; `offsets` are those of :func:`token_offsets`."""
    width = max(row.length for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    position_ids = torch.zeros_like(input_ids)
    # 0: prompt, 1, 2, ...: completions, -1: padding
    segments = torch.full_like(input_ids, -1)
    sources, targets, tokens, lengths = [], [], [], [0]
    for line, row in enumerate(rows):
        prompt_ids = samples[row.samples[0]].prompt_ids
        start = len(prompt_ids)
        input_ids[line, :start] = torch.tensor(prompt_ids)
        position_ids[line, :start] = torch.arange(start)
        segments[line, :start] = 0
        for number, index in enumerate(row.samples, 1):
            completion = torch.tensor(samples[index].completion_ids)
            extra = completion.numel() - 1
            end = start + extra
            input_ids[line, start:end] = completion[:-1]
            position_ids[line, start:end] = len(prompt_ids) + torch.arange(extra)
            segments[line, start:end] = number
            sources += [line * width + len(prompt_ids) - 1, *range(line * width + start, line * width + end)]
            targets.append(completion)
            tokens.append(torch.arange(int(offsets[index]), int(offsets[index + 1])))
            lengths.append(completion.numel())
            start = end
    shared = any(len(row.samples) > 1 for row in rows)
    mask = _shared_mask(segments) if shared else (segments >= 0).long()
    return Microbatch(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=mask,
        sources=torch.tensor(sources),
        targets=torch.cat(targets),
        tokens=torch.cat(tokens),
        cu_seqlens=torch.tensor(lengths).cumsum(0),
    )


def _shared_mask(segments: Tensor) -> Tensor:
    """``[B, 1, T, T]``: causal, and a completion sees the prompt and itself. Padding sees itself, lest it be NaN."""
    width = segments.shape[1]
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    seen = causal & ((key == 0) | (key == query)) & (key >= 0)
    return (seen | torch.eye(width, dtype=torch.bool))[:, None]
