"""A KV cache whose rows (sequences) can join and leave during decoding."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Steps after which a sliding layer moves its columns to the front of its buffer.
SLACK = 64


# Caches of prompts, each with the rows of it that join; None instead of a cache for empty rows.
Joining = Sequence[tuple[DynamicCache | None, Tensor]]


class RowsLayer(DynamicLayer):
    """A layer's keys and values ``[rows, heads, columns, dim]``, in buffers with room for more rows and columns.

    All rows end in the same column, so a step appends one column to each. Shorter rows have zeros on the left, which
    must be masked. A sliding layer keeps the last ``window - 1`` columns.
    """

    def __init__(self, window: int | None = None):
        super().__init__()
        self.window, self.is_sliding = window, window is not None
        self.rows = self.width = self.start = 0
        self.room = (0, 0)

    def held(self, width: int) -> int:
        """The number of columns that the layer keeps of `width`."""
        return width if self.window is None else min(width, self.window - 1)

    def _columns(self) -> slice:
        return slice(self.start, self.start + self.held(self.width))

    def _buffer(self, like: Tensor) -> Tensor:
        rows, columns = self.room
        if self.window is not None:
            columns = min(columns, self.window - 1 + SLACK)
        return like.new_empty(rows, like.shape[1], columns, like.shape[3])

    def reserve(self, rows: int, width: int, columns: int) -> None:
        """Make room for `rows` of `columns`, and pad the present rows with zeros on the left to `width` columns."""
        self.room = rows, columns
        if self.is_initialized:
            kept, held = self._columns(), self.held(width)
            first = held - (kept.stop - kept.start)
            for name in ("keys", "values"):
                old = getattr(self, name)
                new = self._buffer(old)
                new[: self.rows, :, :first] = 0
                new[: self.rows, :, first:held] = old[: self.rows, :, kept]
                setattr(self, name, new)
                del old, new
        self.start, self.width = 0, width

    def join(self, prompts: DynamicLayer | None, sources: Tensor) -> None:
        """Append rows `sources` of the layer `prompts`, or empty rows if it is None."""
        rows, held = slice(self.rows, self.rows + len(sources)), self._columns()
        if prompts is not None and not self.is_initialized:
            self.lazy_initialization(prompts.keys, prompts.values)
        if self.is_initialized:
            joined = (None, None) if prompts is None else (prompts.keys, prompts.values)
            for buffer, new in zip((self.keys, self.values), joined, strict=True):
                count = 0 if new is None else min(new.shape[2], held.stop - held.start)
                buffer[rows, :, held.start : held.stop - count] = 0
                if count:
                    buffer[rows, :, held.stop - count : held.stop] = new[sources, :, new.shape[2] - count :]
        self.rows = rows.stop

    def move(self, places: Tensor, sources: Tensor, rows: int, width: int) -> None:
        """Copy the rows `sources` to `places`, then keep the first `rows` rows and their last `width` columns."""
        if self.is_initialized:
            for buffer in (self.keys, self.values):
                kept = buffer[:, :, self._columns()]
                kept[places] = kept[sources]
        self.start += self.held(self.width) - self.held(width)
        self.rows, self.width = rows, width

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self._buffer(key_states), self._buffer(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append one column ``[rows, heads, 1, dim]`` and return the keys and values of all columns."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        kept = self._columns()
        if kept.stop == self.keys.shape[2]:
            for buffer in (self.keys, self.values):
                buffer[: self.rows, :, : kept.stop - kept.start] = buffer[: self.rows, :, kept].clone()
            self.start, kept = 0, slice(0, kept.stop - kept.start)
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            buffer[: self.rows, :, kept.stop] = new[:, :, 0]
        every = slice(kept.start, kept.stop + 1)
        self.width += 1
        self.start = every.stop - self.held(self.width)
        return self.keys[: self.rows, :, every], self.values[: self.rows, :, every]

    def get_seq_length(self) -> int:
        return self.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = self.held(self.width)
        return held + query_length, self.width - held


class RowsCache(Cache):
    """A cache of :class:`RowsLayer`, one for each of the layers that :func:`plain_layers` returns."""

    def __init__(self, layers: list[DynamicLayer]):
        super().__init__(layers=[RowsLayer(getattr(layer, "sliding_window", None)) for layer in layers])

    def reserve(self, rows: int, width: int, columns: int, joining: Joining = ()) -> None:
        """Make room for `rows` of `columns`, each layer in its turn, and append the rows `joining`.

        It takes the keys and values out of the caches of prompts, so that those of one layer at most exist twice.
        """
        for index, layer in enumerate(self.layers):
            layer.reserve(rows, width, columns)
            for prompts, sources in joining:
                layer.join(prompts and prompts.layers[index], sources)
                release(prompts, index)

    def move(self, places: Tensor, sources: Tensor, rows: int, width: int) -> None:
        for layer in self.layers:
            layer.move(places, sources, rows, width)


def release(prompts: DynamicCache | None, index: int) -> None:
    """Free the keys and values of a layer of `prompts`."""
    if prompts is not None:
        prompts.layers[index].keys = prompts.layers[index].values = None


def forward_arguments(module: nn.Module) -> list[str]:
    """The named arguments of the module's `forward`; those of its class if the instance has a wrapper without names."""
    for forward in (module.forward, type(module).forward):
        parameters = inspect.signature(forward).parameters.values()
        names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if names:
            return names
    return []


def cache_argument(module: nn.Module) -> str | None:
    """The name of the cache argument of the module's `forward`, or None if it takes no cache.

    It is ``cache`` since transformers 5.24 and ``past_key_values`` before.
    """
    names = forward_arguments(module)
    return next((name for name in ("cache", "past_key_values") if name in names), None)


def plain_layers(config) -> list[DynamicLayer] | None:
    """The layers of a model's cache; None if one is neither full attention nor sliding-window attention."""
    layers = DynamicCache(config=config).layers
    plain = layers and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return layers if plain else None
