"""The tile of `head_forward` for each architecture, and how its work is split over a GPU.

Each tile is the largest whose inner loop keeps everything in registers and whose stages fit the shared memory, by the
compiler's resource reports (`python -m grpo_kernels.triton_kernels.compile_report`). With GRPO_KERNELS_AUTOTUNE=1 the
candidates are measured once for each head instead, and the fastest is stored on disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch

from grpo_kernels.triton_kernels.tuning_file import TuningFile

KIB = 1 << 10


@dataclass(frozen=True)
class Tile:
    """A block of `rows` x `columns` products in steps of `depth`, handled by `warps` in `stages` of loads.

    The statistics are computed for `part` columns at a time, which share one stored maximum. Where several programs run
    on a processor at once, one multiplies while another computes statistics.
    """

    rows: int
    columns: int
    depth: int
    part: int
    warps: int
    stages: int
    per_processor: int = 1


@dataclass(frozen=True)
class Architecture:
    """The table's row for one kind of GPU.

    Attributes:
        shared_bytes: shared memory that one program may use.
        descriptors: loads through tensor descriptors (TMA), and a fixed number of programs.
        half: tiles for 16-bit operands, the default first, then candidates for autotuning.
        single: the same for float32 operands.
        capped: the same for heads with a softcap, where the compiler fails on the others.
    """

    shared_bytes: int
    descriptors: bool
    half: tuple[Tile, ...]
    single: tuple[Tile, ...]
    capped: tuple[Tile, ...] | None = None

    def candidates(self, dtype: torch.dtype, softcap: bool) -> tuple[Tile, ...]:
        if dtype == torch.float32:
            return self.single
        return self.capped if softcap and self.capped else self.half


_SINGLE = (Tile(64, 128, 16, 128, 8, 2), Tile(64, 64, 16, 64, 4, 2))
_SMALL = (Tile(128, 128, 32, 64, 8, 4), Tile(128, 128, 64, 64, 8, 3), Tile(64, 128, 64, 64, 4, 3))
# Both programs of a pair fit a processor's registers and shared memory.
_PAIR = Tile(128, 128, 64, 32, 4, 3, per_processor=2)
_LARGE = (Tile(128, 256, 64, 64, 8, 4), Tile(128, 128, 64, 64, 8, 4), Tile(128, 256, 64, 64, 8, 3))

ARCHITECTURES = {
    "sm_80": Architecture(163 * KIB, False, _SMALL, _SINGLE),
    "sm_86": Architecture(99 * KIB, False, _SMALL, _SINGLE),
    "sm_89": Architecture(99 * KIB, False, _SMALL, _SINGLE),
    "sm_90": Architecture(227 * KIB, True, (*_LARGE, _PAIR), _SINGLE),
    # Triton 3.9 cannot lay out a softcap between tensor memory that is read in parts and a store.
    "sm_100": Architecture(227 * KIB, True, _LARGE, _SINGLE, capped=(Tile(128, 128, 64, 128, 8, 4),)),
    "sm_120": Architecture(99 * KIB, True, (Tile(128, 128, 64, 64, 8, 3), Tile(128, 128, 32, 64, 8, 3)), _SINGLE),
    # Splitting a tile for its statistics would go through AMD's shared memory, so it stays whole.
    "gfx942": Architecture(
        64 * KIB, False, (Tile(128, 128, 32, 128, 8, 2), Tile(128, 256, 32, 256, 8, 2)), (Tile(64, 64, 16, 64, 4, 2),)
    ),
    # Small, so that small tests have several tiles, parts and splits; the interpreter would run larger ones faster.
    "interpreter": Architecture(1 << 40, False, (Tile(64, 128, 32, 64, 4, 2),), (Tile(64, 128, 32, 64, 4, 2),)),
}


def nearest_architecture(name: str) -> str | None:
    """The table's row for a GPU: its own, or that of the nearest older GPU of its generation (sm_103 -> sm_100)."""
    if name in ARCHITECTURES or not name.startswith("sm_"):
        return name if name in ARCHITECTURES else None
    number = int(name[3:])
    older = [int(row[3:]) for row in ARCHITECTURES if row.startswith("sm_")]
    older = [row for row in older if row <= number and row // 10 == number // 10]
    return f"sm_{max(older)}" if older else None


@lru_cache(maxsize=4096)
def splits_of(row_blocks: int, tiles: int, programs: int) -> tuple[int, int]:
    """How many splits of the vocabulary, and tiles in each, keep `programs` busy: (splits, tiles per split).

    The time of a launch is its rounds of work items times the tiles of an item. More splits even out the rounds, but
    each writes its own statistics, so the result is the fewest splits within 2% of the best.
    """
    costs = {}
    for splits in range(1, min(tiles, 4 * programs) + 1):
        each = -(-tiles // splits)
        used = -(-tiles // each)
        rounds = -(-row_blocks * used // programs)
        costs.setdefault(used, (rounds * each, each))
    best = min(cost for cost, _ in costs.values())
    splits = min(used for used, (cost, _) in costs.items() if cost <= 1.02 * best)
    return splits, costs[splits][1]


def _tile(fields: dict) -> Tile:
    return Tile(**fields)


tuned = TuningFile("tiles.json", _tile)
# Tiles that the device had too little shared memory for in this process: (architecture and key, tile).
_refused: set[tuple[str, Tile]] = set()


def tiles_to_try(
    candidates: tuple[Tile, ...], architecture: str, key: str, measure: Callable[[Tile], float]
) -> tuple[Tile, ...]:
    """The tiles for a head, in the order in which to try them: the table's, or with autotuning the fastest first.

    Args:
        candidates: from :meth:`Architecture.candidates`.
        architecture: a key of :data:`ARCHITECTURES`.
        key: the dtypes, sizes and options of the head, on which a measurement also depends.
        measure: seconds that a launch with a tile takes, infinite if the device refuses it; called for each candidate
            if no fastest one is on disk.
    """
    name = f"{architecture} {key}"
    candidates = tuple(tile for tile in candidates if (name, tile) not in _refused)
    if os.environ.get("GRPO_KERNELS_AUTOTUNE") != "1" or len(candidates) <= 1:
        return candidates
    known = tuned.known()
    if known.get(name) not in candidates:
        seconds = {tile: measure(tile) for tile in candidates}
        fastest = min(candidates, key=seconds.__getitem__)
        if seconds[fastest] == float("inf"):
            return candidates
        tuned.keep(name, fastest, asdict(fastest))
    return known[name], *(tile for tile in candidates if tile != known[name])


def refuse_tile(tile: Tile, architecture: str, key: str) -> None:
    """Leave `tile` out of `tiles_to_try` for such heads from now on."""
    _refused.add((f"{architecture} {key}", tile))
