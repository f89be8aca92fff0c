"""The compiled kernels, executed without a GPU: `make test-emulated` fetches the emulator."""

import json
import os
from pathlib import Path

import pytest

from support.compiled import TESTS, compiled

EMULATOR = os.environ.get("GRPO_KERNELS_TINYGRAD")


@pytest.mark.slow
@pytest.mark.skipif(EMULATOR is None, reason="set GRPO_KERNELS_TINYGRAD to a checkout of tinygrad")
def test_compiled_bfloat16_kernels_are_right(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(EMULATOR).resolve()))
    found = json.loads(compiled(str(TESTS / "support" / "amd_emulator.py")).splitlines()[-1])
    assert found["instructions"] == ["v_mfma_f32_16x16x16_bf16"]
    for name, (error, slack) in found["errors"].items():
        # The gradients of a 16-bit head are products of 16-bit operands, rounded once more at the end.
        assert error <= (3 if slack > 1e-4 else 1) * slack, (name, error)
