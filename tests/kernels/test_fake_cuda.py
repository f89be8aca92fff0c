"""The operations on a fake GPU: what their first launch on a real one would refuse, wait for or do in small pieces."""

from pathlib import Path

import pytest
import torch

from conftest import DEVICE
from support.fake_cuda import SHARED_BYTES, Report, run_cases

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="replaces the GPU")
SCRIPT = Path(__file__).parents[1] / "support" / "fake_cuda_heads.py"
INSTRUCTIONS = {
    "sm_80": "mma", "sm_86": "mma", "sm_89": "mma", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "sm_120": "mma",
    "gfx942": "v_mfma",
}  # fmt: skip

# Dtypes, what is trained, and a shape: hidden size, and vocabularies with and without a factor of 16.
EVERYWHERE = [
    "bf16 head 2048x151936", "bf16 hidden 4096x50257", "fp16 head 4096x151936", "fp16 hidden 2048x32003",
    "fp32 head 2048x49153", "fp32-bf16 head 2048x151936", "fp32-fp16 hidden 2048x49153", "bf16-fp32 hidden 2048x32003",
]  # fmt: skip
OPTIONS = ["bf16 head 2048x50257", "fp16 head 2048x151936", "fp32-bf16 head 2048x32003"]
FURTHER = [
    "bf16 none 4096x151936", "bf16 head 2048x32003", "bf16 head 2048x49153", "fp16 none 2048x151936",
    "fp16 head 2048x50257", "fp32 hidden 4096x151936", "fp32 none 2048x151936", "fp32-bf16 hidden 2048x151936",
    "fp32-bf16 none 4096x151936", "fp32-bf16 head 2048x50257", "fp32-fp16 head 4096x151936",
]  # fmt: skip

LONG = ("sm_80", "sm_86", "sm_89", "sm_100", "gfx942")


def cases(architecture: str) -> list[str]:
    heads = EVERYWHERE + (FURTHER if architecture == "sm_90" else [])
    return [
        *(f"{operation} {head}" for operation in ("logprob", "loss") for head in heads),
        *(f"entropy {head}" for head in EVERYWHERE[1:4]),
        *(f"loss_options {head}" for head in OPTIONS),
        *(f"loss_torch {head}" for head in EVERYWHERE),
        *(f"check_up {dtypes}" for dtypes in ("bf16", "fp16", "fp32")),
    ]  # fmt: skip


@pytest.fixture(
    scope="module",
    params=["sm_90", "sm_120", *(pytest.param(gpu, marks=pytest.mark.long) for gpu in LONG)],
)
def architecture(request) -> str:
    return request.param


# Operation, head, and the share of the vocabulary that is kept.
KEPT = [
    "loss bf16 head 2048x151936 0.0001", "loss bf16 head 2048x151936 0.1", "logprob bf16 head 4096x50257 0.0001",
    "loss fp32-bf16 hidden 2048x32003 0.0001", "loss fp16 head 2048x50257 0.0001",
    "logprob fp16 hidden 2048x32003 0.1",
]  # fmt: skip


@pytest.fixture(scope="module")
def kept(architecture, fake_cuda_guard) -> dict[str, Report]:
    cases = KEPT[:2] if architecture in ("sm_90", "sm_120") else KEPT
    return run_cases(SCRIPT, fake_cuda_guard, architecture, *(f"kept_ids {case}" for case in cases))


@pytest.mark.slow
def test_supports_launch_without_waiting(kept, architecture):
    for name, report in kept.items():
        assert report.error is None, f"{name}: {report.error}"
        assert report.refused == [], name
        assert all(launch.shared <= SHARED_BYTES[architecture] for launch in report.launches), name
        assert not report.waits, name
        gathered = name.endswith("0.0001")
        assert bool(report.of("support_forward")) == gathered, name
        assert bool(report.of("head_forward")) != gathered, name
        # A bfloat16 copy of a float32 weight would cost more than what is read of it.
        assert not gathered or not report.products, name


@pytest.fixture(scope="module")
def reports(architecture, fake_cuda_guard) -> dict[str, Report]:
    return run_cases(SCRIPT, fake_cuda_guard, architecture, *cases(architecture))


def sixteen_bit(name: str) -> str | None:
    """The name of the 16-bit dtype in which a case multiplies, if any."""
    dtypes = name.split()[1]
    if dtypes in ("fp32", "bf16-fp32"):
        return None
    return "float16" if dtypes.endswith("fp16") else "bfloat16"


@pytest.mark.slow
def test_every_launch_fits_the_shared_memory(reports, architecture):
    for name, report in reports.items():
        assert report.error is None, f"{name}: {report.error}"
        assert report.refused == [], name
        assert report.launches or name.startswith("loss_torch"), name
        assert all(launch.shared <= SHARED_BYTES[architecture] for launch in report.launches), name


@pytest.mark.slow
def test_16_bit_heads_multiply_in_16_bits(reports, architecture):
    for name, report in reports.items():
        dtype, operation = sixteen_bit(name), name.split()[0]
        short = {"float16": "fp16", "bfloat16": "bf16", None: None}[dtype]
        for launch in report.of("head_forward") + report.of("head_gradient_known"):
            if short and operation != "check_up":
                assert f"{short}[" in launch.signature["weight"] or launch.signature["weight"] == f"*{short}", name
                assert launch.tensor_instruction == INSTRUCTIONS[architecture], name
        if dtype is None or operation in ("check_up", "loss_torch"):
            continue
        # float16's row scale would underflow in the weight gradient's operands.
        # A product of one chunk may be the finished gradient; float16's is scaled first.
        narrow = (f"{dtype} -> float32", "bfloat16 -> bfloat16")
        wide = {product for product in report.products if not product.endswith(narrow)}
        assert all(dtype == "float16" and product.endswith("float32 -> float32") for product in wide), name
        if " hidden " in name:
            assert not wide, name


@pytest.mark.slow
def test_gradients_have_the_dtypes_of_their_leaves(reports):
    long = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    for name, report in reports.items():
        operation, dtypes, trained, *_ = (*name.split(), "")
        if operation == "check_up":
            continue
        weight, _, other = dtypes.partition("-")
        hidden = other or weight
        expected = {
            "hidden": None if trained == "none" else long[hidden],
            "weight": long[weight] if trained == "head" else None,
        }
        assert report.returned == expected, name


@pytest.mark.slow
def test_host_waits_at_most_once_in_each_direction(reports):
    for name, report in reports.items():
        if name.split()[0] != "check_up":
            assert report.waits.keys() <= {"partition", "index by a mask"}, name
            assert report.waits.get("partition", 0) <= 1, name
            # The rows with a gradient, in the backward of `linear_logprob` with a trained head.
            backward = name.startswith(("logprob", "entropy")) and " head " in name
            assert report.waits.get("index by a mask", 0) <= backward, name


@pytest.mark.slow
def test_buffers_are_read_and_written_16_bytes_at_a_time(reports, architecture):
    """Whatever the vocabulary: 50257, 32003 and 49153 are odd."""
    found = set()
    for name, report in reports.items():
        for launch in report.of("head_gradient"):
            # Bytes of other sizes belong to the rows' statistics, float32, and targets, int64.
            assert set(launch.vectors["st"]) == {16}, f"{name}: {launch.vectors}"
            assert set(launch.vectors["ld"]) == {4, 8, 16}, f"{name}: {launch.vectors}"
            found.add(name.split("x")[-1])
        for launch in report.of("head_forward") + report.of("head_gradient_known"):
            described = "tensordesc" in launch.signature["out"]
            if launch.constants.get("STORE", "True") == "True" and not described:
                # AMD's wider waves hold half as many neighbours each.
                assert (8 if architecture == "gfx942" else 16) in launch.vectors["st"], f"{name}: {launch.vectors}"
            assert 2 not in launch.vectors["st"], f"{name}: {launch.vectors}"
    assert {"151936", "50257", "32003"} <= found


@pytest.mark.parametrize(("gpu", "tile", "needed"), [("sm_90", "128", 311_352), ("sm_120", "128", 114_704)])
def test_next_tile_is_taken_where_one_does_not_fit(gpu, tile, needed, fake_cuda_guard):
    name = "loss_without_copy fp32-bf16 head 2048x151936"
    report = run_cases(SCRIPT, fake_cuda_guard, gpu, name)[name]
    assert report.error is None
    (refused,) = report.refused
    # The figure is that of Triton 3.6 to 3.9, on which it depends.
    assert SHARED_BYTES[gpu] < refused.shared
    assert abs(refused.shared - needed) < 0.2 * needed
    taken = report.of("head_forward")
    # Later chunks do not try the tile again.
    assert len(taken) > 1
    assert {launch.constants["BLOCK_V"] for launch in taken} == {tile}


def test_gpu_without_kernels_takes_the_portable_path(fake_cuda_guard):
    """A T4, whose tensor cores multiply float16: the logits' product uses them."""
    names = "logprob fp16 hidden 2048x50257", "loss fp32-fp16 head 2048x32003"
    for name, report in run_cases(SCRIPT, fake_cuda_guard, "sm_75", *names).items():
        assert report.error is None
        assert report.launches == []
        assert report.products["mm.dtype_out float16 -> float32"] > 0, name
        assert {product.split()[-1] for product in report.products} == {"float32"}, name


def test_one_copy_of_the_weight_serves_a_step(fake_cuda_guard):
    """Alone, each of two forwards of both operations makes one, and so does the backward of `linear_logprob`."""
    head = "fp32-bf16 head 512x32000"
    names = {f"step {head} {kept}": copies for kept, copies in (("alone", 6), ("kept", 1), ("changed", 2))}
    reports = run_cases(SCRIPT, fake_cuda_guard, "sm_90", *names)
    copy = 512 * 32000 * (4 + 2)
    for name, copies in names.items():
        assert reports[name].error is None
        # Casts of the hidden states' rows and of gradients are counted, too.
        others = reports[f"step {head} kept"].moved_bytes["_to_copy.default"] - copy
        assert reports[name].moved_bytes["_to_copy.default"] - others == copies * copy, name


def test_fake_gpu_measures_peaks_and_refuses_wrong_products(fake_cuda_guard, tmp_path):
    script = tmp_path / "cases.py"
    script.write_text(
        """
import torch
from support.fake_cuda import main

def peak():
    a = torch.empty(1 << 20, device="cuda")
    b = a + 1
    del a
    return (b * 2).sum().item()

def mixed():
    a = torch.empty(4, 4, device="cuda", dtype=torch.bfloat16)
    torch.mm(a, a, out=torch.empty(4, 4, device="cuda", dtype=torch.float16), out_dtype=torch.float32)

main({"peak": peak, "mixed": mixed})
"""
    )
    found = run_cases(script, fake_cuda_guard, "sm_90")
    assert found["peak"].error is None
    # Two of the three vectors, and the sum.
    assert found["peak"].peak_bytes == (8 << 20) + 4
    assert found["peak"].waits == {"item": 1}
    assert "mm.dtype_out of torch.bfloat16 into torch.float32, but out is torch.float16" in found["mixed"].error
    assert torch.version.cuda is None
