"""Lengths of chunks: multiples of a tile on a GPU, equal parts on a CPU, and growth into free memory."""

from dataclasses import replace

import pytest
import torch

from grpo_kernels import _head
from grpo_kernels._head_arguments import make_head
from grpo_kernels.budget import GPU_BUFFER_BYTES, MIB, most_rows, row_slices, wave_rows

H, V, PROCESSORS = 4096, 151936, 132


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("most", [128, 1520, 3041, 12_000])
@pytest.mark.parametrize("num_rows", [129, 4097, 16384])
def test_wave_rows_are_whole_tiles_within_the_budget(num_rows, most, trained):
    rows = wave_rows(num_rows, most, H, PROCESSORS, trained)
    assert rows <= most_rows(num_rows, most) <= most
    assert rows == num_rows or rows % 128 == 0
    slices = list(row_slices(num_rows, rows))
    assert [part.start for part in slices] == [0, *(part.stop for part in slices[:-1])]
    assert slices[-1].stop == num_rows
    assert {part.stop - part.start for part in slices[:-1]} <= {rows}


def test_wave_rows_fill_the_processors():
    """A chunk of 3,041 rows rounds up to 24 tiles, whose 384 tiles of 256 columns take 3 rounds, as 23 do."""
    assert wave_rows(16384, 3041, H, PROCESSORS, True) == 2944
    # 8 tiles make 128 products at once, 9 need a second round.
    assert wave_rows(16384, 1520, H, PROCESSORS, False) == 1024
    # Two chunks either way, in as many rounds, so that the shorter length is enough.
    assert wave_rows(16384, 12_000, H, PROCESSORS, True) == 8192


@pytest.mark.parametrize(("num_rows", "most", "rows"), [(100, 3041, 100), (16384, 20_000, 16384), (5000, 70, 70)])
def test_wave_rows_of_one_chunk_or_less_than_a_tile(num_rows, most, rows):
    assert wave_rows(num_rows, most, H, PROCESSORS, True) == rows


def head_on(device: str, **options):
    weight = torch.empty(V, H, dtype=torch.bfloat16, device=device, requires_grad=True)
    head = make_head(
        weight, None, hidden_dtype=torch.bfloat16, logit_scale=1.0, softcap=None, process_group=None, shards=[V],
        backend="triton", **{"max_buffer_bytes": None, **options},
    )  # fmt: skip
    # What it is for a GPU.
    return replace(head, max_buffer_bytes=GPU_BUFFER_BYTES) if options.get("max_buffer_bytes") is None else head


@pytest.fixture
def no_autocast(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


def test_buffer_grows_into_a_share_of_free_memory(no_autocast, monkeypatch):
    head, sums = head_on("meta"), V * H * 4
    row = V * 2 + 3 * H * 4
    monkeypatch.setattr(_head, "free_bytes", lambda device: sums + 4 * 5000 * row)
    fixed = head.chunk_rows(16384, 1, True)
    assert fixed <= GPU_BUFFER_BYTES // row
    growing = replace(head, grows=True)
    assert fixed < growing.chunk_rows(16384, 1, True) <= 5000
    assert growing.chunk_rows(2000, 1, True) == 2000
    # Little is free beside the sums of the weight's gradient: the default remains.
    monkeypatch.setattr(_head, "free_bytes", lambda device: sums + 64 * MIB)
    assert growing.chunk_rows(16384, 1, True) == fixed
    monkeypatch.setattr(_head, "free_bytes", lambda device: 0)
    assert growing.chunk_rows(16384, 1, True) == fixed


def test_chunks_on_a_cpu_are_equal_parts():
    head = make_head(
        torch.zeros(1000, 8), None, hidden_dtype=torch.float32, logit_scale=1.0, softcap=None,
        max_buffer_bytes=1_000_000, process_group=None, shards=[1000], backend="torch",
    )  # fmt: skip
    assert not head.grows
    rows = head.chunk_rows(400, 1, True)
    lengths = [part.stop - part.start for part in head.row_slices(400, rows)]
    assert len(lengths) == 3
    assert max(lengths) - min(lengths) <= 1
