"""Micro-benchmarks of each operation against regressions: python -m pytest tests/benchmarks/test_benchmark_ops.py."""

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from grpo_kernels import (
    PRESETS,
    kl_estimate,
    linear_logprob,
    linear_policy_loss,
    masked_mean,
    policy_loss,
    token_weights,
)

pytestmark = pytest.mark.benchmark

N, H, V, LENGTH = 256, 128, 8192, 32
TOKENS = 1 << 16
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Replaces the fixture that fills uninitialised memory, which would be timed too."""


def head(dtype, trainable):
    hidden = torch.randn(N, H).to(dtype).requires_grad_()
    weight = (torch.randn(V, H) / H**0.5).to(dtype).requires_grad_(trainable)
    return hidden, weight, torch.randint(V, (N,))


def tokens(size):
    logprobs = torch.randn(size).sub_(2)
    return {
        "logprobs": logprobs.requires_grad_(),
        "old": logprobs.detach() + 0.1 * torch.randn(size),
        "ref": logprobs.detach() + 0.1 * torch.randn(size),
        "advantages": torch.randn(size),
        "weights": torch.full((size,), 1 / size),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_logprob_scoring(benchmark, dtype):
    hidden, weight, targets = head(dtype, trainable=False)
    with torch.no_grad():
        logprobs = benchmark(linear_logprob, hidden, weight, targets)
    assert bool((logprobs < 0).all())


@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_logprob_backward(benchmark, dtype, trainable):
    hidden, weight, targets = head(dtype, trainable)
    wanted = [hidden, weight] if trainable else [hidden]
    grads = benchmark(lambda: torch.autograd.grad(linear_logprob(hidden, weight, targets).sum(), wanted))
    assert all(bool(grad.any()) for grad in grads)


@pytest.mark.parametrize("preset", ["dapo", "gspo"])
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_policy_loss(benchmark, dtype, trainable, preset):
    hidden, weight, targets = head(dtype, trainable)
    x = tokens(N)
    offsets = torch.arange(0, N + 1, LENGTH)
    wanted = [hidden, weight] if trainable else [hidden]

    def step():
        result = linear_policy_loss(
            hidden, weight, targets, x["advantages"], x["weights"], PRESETS[preset], cu_seqlens=offsets
        )
        return torch.autograd.grad(result.loss, wanted)

    assert all(bool(grad.any()) for grad in benchmark(step))


@pytest.mark.parametrize("preset", ["dapo", "cispo", "sapo", "gspo"])
def test_policy_loss(benchmark, preset):
    x = tokens(TOKENS)
    offsets = torch.arange(0, TOKENS + 1, LENGTH)

    def step():
        loss = policy_loss(
            x["logprobs"], x["advantages"], x["weights"], PRESETS[preset], old_logprobs=x["old"], cu_seqlens=offsets
        ).loss
        return torch.autograd.grad(loss, x["logprobs"])[0]

    assert bool(benchmark(step).any())


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimate(benchmark, estimator):
    x = tokens(TOKENS)
    grad = benchmark(lambda: torch.autograd.grad(kl_estimate(x["logprobs"], x["ref"], estimator).sum(), x["logprobs"]))
    assert bool(grad[0].any())


@pytest.mark.parametrize("dim", [None, 1])
def test_masked_mean(benchmark, dim):
    values = torch.randn(TOKENS // LENGTH, LENGTH, requires_grad=True)
    mask = torch.rand(values.shape) < 0.8
    mask[:, 0] = True
    grad = benchmark(lambda: torch.autograd.grad(masked_mean(values, mask, dim).sum(), values)[0])
    assert not bool(grad[~mask].any())


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_token_weights(benchmark, aggregation):
    mask = torch.rand(TOKENS // LENGTH, LENGTH) < 0.8
    weights = benchmark(token_weights, mask, aggregation)
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-2)
