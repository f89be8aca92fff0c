"""From completions of unequal length to microbatches under a token budget.

The tokens of a step's completions are numbered consecutively. What belongs to a token (weight, advantage, old
log-probability) is stored in flat ``[N]`` tensors of the step, and a microbatch holds the indices of its tokens in
them, so any split into microbatches computes the same sum.

Sequences are packed side by side in one row without padding (`attention.Segments` holds the positions of each), and
completions of a group share their prompt:

    prompt | completion 1 | completion 2 | ... | prompt | completion | ...

Each completion attends to its prompt and itself, and its positions continue the prompt's, so the hidden states equal
those of separate rows while the prompt is computed once. A completion's last token predicts nothing and is left out.
If the model's attention does not support segments, each row holds one sequence and is padded.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.model.attention import Group, Segments
from grpo_fast.model.layout import Microbatch


class Sample(NamedTuple):
    """One completion: its prompt, its tokens (at least one) and the index of its group."""

    prompt_ids: list[int]
    completion_ids: list[int]
    group: int


class Row(NamedTuple):
    """Indices of samples that share one prompt, or of a single sample, and the number of their positions."""

    samples: list[int]
    length: int


def token_offsets(samples: list[Sample]) -> Tensor:
    """``[S + 1]`` int64 offsets of the samples' completions among the step's tokens."""
    lengths = torch.tensor([0] + [len(sample.completion_ids) for sample in samples])
    return lengths.cumsum(0)


def plan_rows(samples: list[Sample], chosen: list[int], longest_shared_row: int) -> list[Row]:
    """Put the chosen samples into rows; a row of several shares its prompt and is at most `longest_shared_row` long."""
    rows: list[Row] = []
    open_rows: dict[int, int] = {}
    for index in chosen:
        prompt_ids, completion_ids, group = samples[index]
        extra = len(completion_ids) - 1
        row = rows[open_rows[group]] if group in open_rows else None
        if row is not None and row.length + extra <= longest_shared_row:
            rows[open_rows[group]] = Row([*row.samples, index], row.length + extra)
        else:
            open_rows[group] = len(rows)
            rows.append(Row([index], len(prompt_ids) + extra))
    return rows


def fill_microbatches(rows: list[Row], max_tokens: int, packed: bool) -> list[list[Row]]:
    """Rows grouped so that their positions, padding included, stay within `max_tokens`; a longer row stays alone.

    Packed rows are placed, longest first, where they leave the least room; padded rows with rows of similar length.
    """
    microbatches: list[list[Row]] = []
    taken: list[int] = []
    for row in sorted(rows, key=lambda row: -row.length):
        if packed:
            fitting = [place for place, used in enumerate(taken) if used + row.length <= max_tokens]
            place = max(fitting, key=taken.__getitem__, default=len(taken))
        else:
            last = len(taken) - 1
            fits = last >= 0 and (len(microbatches[last]) + 1) * microbatches[last][0].length <= max_tokens
            place = last if fits else len(taken)
        if place == len(taken):
            microbatches.append([])
            taken.append(0)
        microbatches[place].append(row)
        taken[place] += row.length
    return microbatches


def deal_microbatches(rows: list[Row], max_tokens: int, packed: bool, ranks: int) -> list[list[list[Row]]]:
    """Microbatches for each of several processes, with about as many tokens for each; some may be empty.

    Every process gets the same number of them, and the n-th ones are of similar size, so that no process waits long
    for another. Packed rows are placed, longest first, in the microbatch with the fewest tokens.

    Returns:
        For each process the rows of its microbatches.
    """
    filled = fill_microbatches(rows, max_tokens if packed else min(max_tokens, fair_share(rows, ranks)), packed)
    count = math.ceil(len(filled) / ranks)
    if packed:
        while (spread := _spread(rows, count * ranks, max_tokens)) is None:
            count += 1
        filled = spread
    filled = sorted(filled, key=lambda rows: -sum(row.length for row in rows))
    filled += [[] for _ in range(count * ranks - len(filled))]
    rounds = [filled[first : first + ranks] for first in range(0, len(filled), ranks)]
    # Every second round is dealt backwards, or one process would get the largest microbatch of every round.
    rounds = [row if index % 2 == 0 else row[::-1] for index, row in enumerate(rounds)]
    return [[row[rank] for row in rounds] for rank in range(ranks)]


def _spread(rows: list[Row], count: int, max_tokens: int) -> list[list[Row]] | None:
    """`count` microbatches of about as many tokens; None if one of several rows would exceed `max_tokens`."""
    microbatches: list[list[Row]] = [[] for _ in range(count)]
    taken = [0] * count
    for row in sorted(rows, key=lambda row: -row.length):
        place = min(range(count), key=taken.__getitem__)
        if taken[place] and taken[place] + row.length > max_tokens:
            return None
        microbatches[place].append(row)
        taken[place] += row.length
    return microbatches


def fair_share(rows: list[Row], ranks: int) -> int:
    """Tokens per process if all processes get the same number."""
    return math.ceil(sum(row.length for row in rows) / ranks)


def empty_microbatch(token_id: int, packed: bool) -> Microbatch:
    """One position and no target: its gradient is zero, for a process with fewer microbatches than the others."""
    sample = Sample([token_id], [token_id], 0)
    whole = build_microbatch([sample], [Row([0], 1)], token_offsets([sample]), token_id, packed)
    nothing = whole.targets[:0]
    return dataclasses.replace(whole, sources=nothing, targets=nothing, tokens=nothing, cu_seqlens=torch.tensor([0]))


def build_microbatch(
    samples: list[Sample], rows: list[Row], offsets: Tensor, pad_token_id: int, packed: bool
) -> Microbatch:
    """The microbatch of `rows`, whose targets ``[n]`` are their samples' completions.

    `samples` are all of the step, and `offsets` those of :func:`token_offsets` for them. Without `packed`, each row
    holds one sample and is padded.
    """
    if not packed and any(len(row.samples) > 1 for row in rows):
        raise ValueError("build_microbatch: a padded row holds one sample, but one holds several")
    ids, positions, sources, targets, tokens, lengths, groups = [], [], [], [], [], [0], []
    for row in rows:
        prompt_ids = samples[row.samples[0]].prompt_ids
        completions = [samples[index].completion_ids for index in row.samples]
        group = Group(len(ids), len(prompt_ids), [len(completion) - 1 for completion in completions])
        groups.append(group)
        ids += prompt_ids
        last = len(ids) - 1
        positions += group.places()
        for index, completion in zip(row.samples, completions, strict=True):
            sources += [last, *range(len(ids), len(ids) + len(completion) - 1)]
            ids += completion[:-1]
            targets += completion
            tokens += range(int(offsets[index]), int(offsets[index + 1]))
            lengths.append(len(completion))
    microbatch = Microbatch(
        input_ids=torch.tensor([ids]), position_ids=torch.tensor([positions]), segments=Segments(groups),
        targets=torch.tensor(targets), sources=torch.tensor(sources), cu_seqlens=torch.tensor(lengths).cumsum(0),
        complete=True, tokens=torch.tensor(tokens),
    )  # fmt: skip
    return microbatch if packed else _padded(microbatch, [row.length for row in rows], pad_token_id)


def _padded(packed: Microbatch, lengths: list[int], pad_token_id: int) -> Microbatch:
    """The sequences of a packed row, of these lengths, in separate rows, padded on the right."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return dataclasses.replace(
        packed,
        input_ids=torch.full(mask.shape, pad_token_id).masked_scatter(mask, packed.input_ids),
        position_ids=torch.zeros(mask.shape, dtype=torch.int64).masked_scatter(mask, packed.position_ids),
        attention_mask=mask.long(),
        segments=None,
        sources=mask.flatten().nonzero().squeeze(1)[packed.sources],
    )
