"""A KV cache in which every token of a row has the column of its position, so that rows grow by unequal amounts."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from grpo_fast.rollout.rows import Joining, release


class SlotsLayer(DynamicLayer):
    """A layer's keys and values ``[rows, heads, columns, dim]``, in buffers with room for more rows and columns.

    A step writes each row's tokens to the columns of their positions. Columns beyond a row's last token hold anything,
    such as rejected draft tokens: the mask hides them until they are written again.
    """

    def __init__(self, shared: SlotsCache):
        super().__init__()
        self.shared = shared

    def _buffer(self, like: Tensor) -> Tensor:
        rows, columns = self.shared.room
        # Zeros, because a hidden value that is not a number would still spoil the sums.
        return like.new_zeros(rows, like.shape[1], columns, like.shape[3])

    def reserve(self, rows: int, width: int) -> None:
        """New buffers with the first `width` columns of the first `rows` rows."""
        for name in ("keys", "values") if self.is_initialized else ():
            old = getattr(self, name)
            width = min(width, old.shape[2])
            new = self._buffer(old)
            new[:rows, :, :width] = old[:rows, :, :width]
            setattr(self, name, new)
            del old, new

    def join(self, prompts: DynamicLayer, sources: Tensor, first: int) -> None:
        """Write rows `sources` of the layer `prompts` to the rows from `first` on."""
        if not self.is_initialized:
            self.lazy_initialization(prompts.keys, prompts.values)
        for buffer, new in ((self.keys, prompts.keys), (self.values, prompts.values)):
            buffer[first : first + len(sources), :, : new.shape[2]] = new[sources]

    def move(self, places: Tensor, sources: Tensor) -> None:
        for buffer in (self.keys, self.values) if self.is_initialized else ():
            buffer[places] = buffer[sources]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self._buffer(key_states), self._buffer(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write ``[rows, heads, tokens, dim]`` to the step's columns; returns those of all columns in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, columns = len(key_states), self.shared.columns
        lines = torch.arange(rows, device=columns.device)[:, None]
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            buffer[lines, :, columns] = new.transpose(1, 2)
        return self.keys[:rows, :, : self.shared.end], self.values[:rows, :, : self.shared.end]

    def get_seq_length(self) -> int:
        return self.shared.end

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.shared.end, 0


class SlotsCache(Cache):
    """A cache of :class:`SlotsLayer`, with the methods of :class:`~grpo_fast.rollout.rows.RowsCache`.

    Layers of sliding-window attention keep all columns.

    Args:
        windows: each layer's sliding window; None for full attention.
        additive: masks are 0 and the dtype's smallest number, for eager attention, instead of booleans.
    """

    def __init__(self, windows: list[int | None], additive: bool):
        super().__init__(layers=[SlotsLayer(self) for _ in windows])
        self.windows, self.additive = windows, additive
        self.room, self.rows, self.end = (0, 0), 0, 0
        self.columns = torch.empty(0, 0, dtype=torch.long)

    def reserve(self, rows: int, width: int, columns: int, joining: Joining = ()) -> None:
        """Make room, each layer in its turn, and append the rows `joining`, which begin in the first column."""
        self.room, present = (rows, columns), self.rows
        self.rows += sum(len(sources) for _, sources in joining)
        for index, layer in enumerate(self.layers):
            layer.reserve(present, width)
            first = present
            for prompts, sources in joining:
                if prompts is not None:
                    layer.join(prompts.layers[index], sources, first)
                    release(prompts, index)
                first += len(sources)

    def move(self, places: Tensor, sources: Tensor, rows: int, width: int) -> None:
        for layer in self.layers:
            layer.move(places, sources)
        self.rows = rows

    def begin(self, columns: Tensor, end: int) -> None:
        """Begin a step that writes to `columns` ``[rows, tokens]``, all below `end`."""
        self.columns, self.end = columns, end

    def mask(self, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """What each token of the step sees, ``[rows, 1, tokens, end]``: the columns up to its own, within a window.

        Models with both kinds of layers get a mask for each.
        """
        kinds = {}
        for window in dict.fromkeys(self.windows):
            every, own = torch.arange(self.end, device=self.columns.device), self.columns[:, None, :, None]
            seen = every <= own
            if window is not None:
                seen &= every > own - window
            if self.additive:
                seen = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
            kinds["full_attention" if window is None else "sliding_attention"] = seen
        return kinds if len(kinds) > 1 else next(iter(kinds.values()))
