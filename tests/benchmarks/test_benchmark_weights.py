"""The benchmark of changed weights."""

import pytest
import torch

from benchmarks.harness.measure import Run
from benchmarks.weight_changes import measure

pytestmark = pytest.mark.slow


def test_measure_small_steps_change_few_values(tmp_path):
    """The values that change are a part at 1e-6 and nearly all at 1, and no more bytes are sent than there are."""
    run = Run(torch.device("cpu"), quick=True, output=tmp_path)
    small, large = (
        measure(run, "random-llama", rate, "adamw_torch_fused", 1, tmp_path / str(rate)) for rate in (1e-6, 1.0)
    )
    assert 0 < small["changed_median"] < 0.2
    assert small["sent_median"] < 0.5
    assert large["changed_median"] > 0.8
    assert large["sent_median"] <= 1
