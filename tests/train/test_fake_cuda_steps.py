"""Whole optimizer steps of the trainer on a fake GPU: launches, dtypes, waits of the host, and the planned memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.fake_cuda import SHARED_BYTES, Report, run_cases

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[1] / "support" / "fake_cuda_trainer.py"
# What the host reads in a step, once each: whether all tokens count, the sums of the loss, the gradient's norm, and
# whether the weights are finite.
# After the last microbatch: the number of known rows, then the figures of the loss, of its bounds and of the objective.
READS = {"learner.py": 2, "metrics.py": 2, "diagnosis.py": 1, "finite.py": 1}
LONG = [
    "padded", "checkpointed", "activations offloaded", "optimizer offloaded", "lora", "autocast", "float32", "tiled",
    "reference", "several steps",
]  # fmt: skip
# On AMD's GPUs packed rows are attended by a kernel that torch compiles, which needs the GPU.
FURTHER = [("sm_80", "packed"), ("sm_86", "packed"), ("sm_100", "packed"), ("sm_120", "packed"), ("gfx942", "padded")]


def files(places: dict[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for place, count in places.items():
        name = place.partition(":")[0]
        found[name] = found.get(name, 0) + count
    return found


def check_step(name: str, report: Report, architecture: str) -> None:
    assert report.error is None, f"{name}: {report.error}"
    assert report.refused == [], name
    assert all(launch.shared <= SHARED_BYTES[architecture] for launch in report.launches), name
    found = report.returned
    assert found["packed"] == (name != "padded")
    assert found["microbatches"] >= 1 + (name != "several steps")
    # No microbatch waits: neither for its copies nor for its results.
    expected = dict(READS)
    if name == "optimizer offloaded":
        # The step is the host's: it waits for each gradient.
        expected["optimizers.py"] = found["tensors"]
    if name == "reference":
        # The metrics of the parts of the loss.
        expected["metrics.py"] += 3
    assert files(report.places) == expected, (name, report.places)
    assert found["waits of scoring"] == {}, name
    steps = report.of("adamw_step")
    assert len(steps) == (found["tensors"] if found["optimizer"] == "StochasticAdamW" else 0), name
    for launch in steps:
        # Whole blocks' weight, gradient and moments, by wide accesses; the rest of a tensor has a mask.
        for kind, least in (("ld", 4), ("st", 3)):
            assert sum(n for size, n in launch.vectors[kind].items() if size >= 8) >= least, launch
    wide = {product for product in report.products if product.split()[1] == "float32"}
    if name not in ("lora", "autocast", "float32"):
        assert not wide, name
    # Once per step and microbatch, whatever the number of chunks.
    assert len(report.of("scale_unless_one")) == found["microbatches"] * (1 if name == "lora" else 2)


@pytest.fixture(scope="module")
def further(fake_cuda_guard) -> dict[str, Report]:
    return run_cases(SCRIPT, fake_cuda_guard, "sm_90", *LONG)


def test_packed_step(fake_cuda_guard):
    report = run_cases(SCRIPT, fake_cuda_guard, "sm_90", "packed")["packed"]
    check_step("packed", report, "sm_90")
    assert report.returned["dtypes"] == ["bfloat16"]
    assert report.returned["optimizer"] == "StochasticAdamW"
    assert report.returned["peak"] == pytest.approx(report.returned["planned"], rel=0.03)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", LONG)
def test_step(name, further):
    report = further[name]
    check_step(name, report, "sm_90")
    wide = ("lora", "autocast", "float32")
    assert report.returned["dtypes"] == ["float32" if name in wide else "bfloat16"]
    if name == "autocast":
        # The adapters' and the model's own products under autocast are 16 bits; those of positions are not.
        wide_flops = sum(n for product, n in report.products.items() if product.split()[1] == "float32")
        assert wide_flops < 0.05 * sum(report.products.values())
    # Padded microbatches are not as full as the plan's, a part of a batch is half of one, and the fake reference stays
    # where it was.
    if name not in ("padded", "several steps", "reference"):
        assert report.returned["peak"] == pytest.approx(report.returned["planned"], rel=0.03)


@pytest.mark.long
@pytest.mark.parametrize(("architecture", "name"), FURTHER)
def test_step_on_other_gpus(architecture, name, fake_cuda_guard):
    check_step(name, run_cases(SCRIPT, fake_cuda_guard, architecture, name)[name], architecture)


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["sm_75", "sm_90"])
def test_float16_step_of_a_user(architecture, fake_cuda_guard):
    report = run_cases(SCRIPT, fake_cuda_guard, architecture, "float16")["float16"]
    assert report.error is None
    assert report.waits == {}
    assert report.returned["dtypes"] == ["float32"]
    # A T4 has no kernels; the portable path's products are float16 as well, but for the float32 weight's gradient.
    assert bool(report.launches) == (architecture == "sm_90")
    assert report.products["mm.dtype_out float16 -> float32"] > 0
