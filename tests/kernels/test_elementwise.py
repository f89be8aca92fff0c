"""`kl_estimate` and `masked_mean`."""

import math

import pytest
import torch

from grpo_kernels import kl_estimate, masked_mean
from support.oracle import compare

ESTIMATORS = ["k1", "k2", "k3"]
pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shape", [(1,), (33,), (3, 5), (0,), ()])
def test_kl_estimate_equals_reference(shape, estimator, dtype):
    def run(arguments, **options):
        kl = kl_estimate(**arguments, estimator=estimator, **options)
        (kl * 1.7).sum().backward()
        return {"kl": kl, "d": arguments["logprobs"].grad, "d ref": arguments["ref_logprobs"].grad}

    tensors = {name: (torch.randn(shape) - 2).to(dtype).requires_grad_() for name in ("logprobs", "ref_logprobs")}
    results = compare(run, tensors, dtype)
    assert results["kl"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_estimate_gradcheck(estimator):
    pair = [torch.randn(7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: kl_estimate(a, b, estimator), pair)


def test_kl_estimate_k3_of_nearly_equal_policies():
    """exp(-d) - 1 + d is d**2 / 2 there, which float32 loses when it subtracts 1."""
    d = torch.tensor([1e-4, -1e-4, 3e-3])
    logprobs = torch.zeros(3, requires_grad=True)
    kl = kl_estimate(logprobs, -d)
    kl.sum().backward()
    torch.testing.assert_close(logprobs.grad, -torch.expm1(-d.double()).float(), rtol=1e-6, atol=0)


def test_kl_estimate_k1_and_k3_are_unbiased():
    """The mean over samples of the policy is the divergence."""
    p, q = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]], dtype=torch.float64)
    exact = (p * (p / q).log()).sum()
    for estimator in ("k1", "k3"):
        assert ((p * kl_estimate(p.log(), q.log(), estimator)).sum() - exact).abs() < 1e-12


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.zeros(3), torch.zeros(4)), ValueError, "ref_logprobs must have shape (3,), got (4,)"),
        ((torch.zeros(3), torch.zeros(3), "k5"), ValueError, "estimator='k5' is unknown"),
        ((torch.zeros(3), torch.zeros(3).long()), TypeError, "ref_logprobs must be a floating-point tensor"),
        (([0.0], torch.zeros(1)), TypeError, "logprobs must be a tensor, got list"),
    ],
)
def test_kl_estimate_bad_input(arguments, error, words):
    with pytest.raises(error) as caught:
        kl_estimate(*arguments)
    assert words in str(caught.value)


MASKS = {
    "same shape": lambda: torch.rand(4, 5, 6) > 0.4,
    "a row": lambda: torch.rand(6) > 0.4,
    "a column": lambda: torch.rand(4, 1, 1) > 0.4,
    "0 and 1": lambda: (torch.rand(4, 5, 6) > 0.4).float(),
    "integers": lambda: (torch.rand(5, 6) > 0.4).long(),
    "everything": lambda: torch.ones(4, 5, 6, dtype=torch.bool),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [None, 0, 1, -1])
@pytest.mark.parametrize("mask", MASKS)
def test_masked_mean_equals_reference(mask, dim, dtype):
    def run(arguments, **options):
        mean = masked_mean(arguments["values"], chosen, dim, **options)
        weights = torch.linspace(0.5, 2, mean.numel(), dtype=torch.float64).view(mean.shape).to(mean.dtype)
        (mean * weights)[mean.isfinite()].sum().backward()
        return {"mean": mean.nan_to_num(77.0), "d": arguments["values"].grad.nan_to_num(99.0)}

    chosen = MASKS[mask]()
    if dim is not None:
        chosen = chosen.expand(4, 5, 6).clone()
        chosen.movedim(dim, 0)[0] = 1  # no empty slices here
    results = compare(run, {"values": torch.randn(4, 5, 6).to(dtype).requires_grad_()}, dtype)
    assert not (results["d"] == 99).any()


def test_masked_mean_of_known_values():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 1]])
    assert masked_mean(values, mask) == 3
    assert masked_mean(values, mask, 1).tolist() == [1.5, 6]
    assert masked_mean(values, mask, 0).tolist() == [1, 2, 6]


def test_masked_mean_of_empty_mask_is_nan():
    values = torch.randn(3, 4, requires_grad=True)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    mean = masked_mean(values, mask, 1)
    assert mean.isnan().tolist() == [False, True, False]
    mean[::2].sum().backward()
    assert values.grad[1].abs().sum() == 0
    assert values.grad.isfinite().all()
    assert math.isnan(masked_mean(values, torch.zeros(3, 4)).item())


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_masked_mean_ignores_garbage_outside_the_mask(garbage):
    values = torch.tensor([1.0, garbage, 3.0], requires_grad=True)
    mean = masked_mean(values, torch.tensor([True, False, True]))
    mean.backward()
    assert mean == 2
    assert values.grad.tolist() == [0.5, 0, 0.5]


def test_masked_mean_gradcheck():
    mask = torch.rand(3, 4) > 0.3
    values = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: masked_mean(x, mask), values)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.zeros(3, 4), torch.ones(3)), ValueError, "mask of shape (3,) does not broadcast to values"),
        ((torch.zeros(4), torch.ones(3, 4)), ValueError, "mask of shape (3, 4) does not broadcast to values"),
        ((torch.zeros(4), torch.ones(4), 1), IndexError, "dim=1 is out of range"),
        ((torch.zeros(4).long(), torch.ones(4)), TypeError, "values must be a floating-point tensor"),
        ((torch.zeros(4), [1, 1, 1, 1]), TypeError, "mask must be a tensor, got list"),
    ],
)
def test_masked_mean_bad_input(arguments, error, words):
    with pytest.raises(error) as caught:
        masked_mean(*arguments)
    assert words in str(caught.value)
