"""FP8 scoring: rounded as a GPU rounds it, near the exact scores, and refused where it cannot be."""

import re

import pytest
import torch

from conftest import DEVICE
from grpo_kernels import linear_logprob
from grpo_kernels._fp8 import rounded, scaled
from support.fake_cuda import run_cases
from support.logprob_cases import make

interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="tests the emulation")


def test_rounded_rows_keep_four_bits_of_every_element():
    rows = torch.randn(50, 64) * torch.logspace(-20, 20, 50)[:, None]
    rows[3] = 0
    error = (rounded(rows) - rows).abs()
    # Half a unit of the fourth bit; below the smallest normal number, of the row's largest element.
    assert (error <= torch.maximum(rows.abs() / 16, rows.abs().amax(1, keepdim=True) * 2.0**-17)).all()
    assert error.mean() > 0
    values, factors = scaled(rows)
    assert values.float().abs().amax(1)[[0, 20, 49]].min() >= 224
    assert (factors.log2() % 1 == 0).all()
    assert values[3].float().eq(0).all()
    # At the largest number.
    assert rounded(torch.tensor([[448.0, 1.0], [447.99997, 1.0], [512.0, 1.0]])).isfinite().all()
    assert rounded(torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0]])).isnan().any(1).all()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_scores_are_those_of_rounded_operands(backend, dtype):
    arguments = make(33, 17, 259, dtype, trainable="", scale=3.0, bias=torch.randn(259), temperature=0.7, softcap=9.0)
    arguments["targets"][4] = -100
    found = linear_logprob(
        **arguments, return_entropy=True, precision="fp8", backend=backend, max_buffer_bytes=33 * 4 * 259
    )
    exact = {name: rounded(arguments[name]).double() for name in ("hidden", "weight")}
    expected = linear_logprob(**arguments | exact, return_entropy=True, backend="reference")
    unrounded = linear_logprob(**arguments, return_entropy=True, backend="reference")
    for got, truth, other in zip(found, expected, unrounded, strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)
        assert (got - other).abs().max() > 1e-3


def test_errors_are_four_percent_of_the_spread_of_logits():
    """What the documentation states, with logits of the spread of a language model's."""
    N, H, V = 64, 256, 2000
    arguments = {"hidden": torch.randn(N, H) * 3, "weight": torch.randn(V, H) / H**0.5}
    logits = arguments["hidden"] @ arguments["weight"].T
    arguments["targets"] = torch.multinomial(logits.softmax(1), 1).squeeze(1)
    found = linear_logprob(**arguments, precision="fp8")
    error = (found - linear_logprob(**arguments)).abs()
    share = error.mean() / logits.std()
    assert 0.02 < share < 0.05


def test_fp8_is_refused_where_it_cannot_score():
    def refused(said: str, arguments: dict, precision: str = "fp8", **options):
        with pytest.raises(ValueError, match=f"^{re.escape('linear_logprob: ' + said)}$"):
            linear_logprob(**arguments, precision=precision, **options)

    trained, plain = make(5, 8, 20, trainable="h"), make(5, 8, 20, trainable="")
    refused("precision='fp8' has no gradients; call it under torch.no_grad(), or leave precision out", trained)
    with torch.no_grad():
        assert linear_logprob(**trained, precision="fp8").isfinite().all()
    refused("precision must be 'fp8' or None, got 'fp4'", plain, "fp4")
    said = "precision='fp8' needs backend 'auto', 'triton' or 'torch', got 'reference'"
    refused(said, plain, backend="reference")
    wide = {name: value.double() if value.is_floating_point() else value for name, value in plain.items()}
    refused("precision='fp8' needs 16-bit or float32 operands, got float64", wide)


CASE = """
import torch
from grpo_kernels import linear_logprob
from support.fake_cuda import main

def score():
    # Neither the hidden size nor the vocabulary is a multiple of 16.
    hidden = torch.empty(3000, 1000, dtype=torch.bfloat16, device="cuda")
    weight = torch.empty(32003, 1000, dtype=torch.bfloat16, device="cuda")
    return list(linear_logprob(hidden, weight, torch.empty(3000, dtype=torch.int64, device="cuda"), precision="fp8").shape)

main({"score": score})
"""  # noqa: E501


@interpreted
def test_fp8_on_fake_gpus(fake_cuda_guard, tmp_path):
    (tmp_path / "case.py").write_text(CASE)
    report = run_cases(tmp_path / "case.py", fake_cuda_guard, "sm_90")["score"]
    assert report.error is None
    assert report.returned == [3000]
    assert all(launch.constants["HAS_SCALES"] == "True" for launch in report.of("row_statistics"))
    assert report.of("row_statistics")
    assert report.moved_bytes["_scaled_mm.default"] > 0
    report = run_cases(tmp_path / "case.py", fake_cuda_guard, "sm_80")["score"]
    assert (
        "precision='fp8' needs an NVIDIA GPU of sm_89 or newer, or a CPU, where it is emulated; got sm_80"
        in report.error
    )
