"""Tests that need a GPU: bfloat16 products, memory, and synchronization."""

import warnings

import pytest
import torch

from grpo_kernels import PRESETS, linear_logprob, linear_policy_loss
from support.oracle import SLACK, relative_error

pytestmark = pytest.mark.gpu
MIB = 1 << 20


@pytest.fixture(autouse=True)
def need_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm device")


def make(N, H, V, dtype=torch.bfloat16, trainable=True):
    device = "cuda"
    hidden = (3 * torch.randn(N, H, device=device)).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, device=device) / H**0.5).to(dtype).requires_grad_(trainable)
    tokens = {"advantages": torch.randn(N, device=device), "weights": torch.full((N,), 1 / N, device=device)}
    return hidden, weight, torch.randint(0, V, (N,), device=device), tokens


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("shape", [(4096, 576, 49152), (1000, 1024, 151936), (300, 64, 259)], ids=str)
def test_linear_policy_loss_bfloat16_at_full_size(shape, trainable):
    hidden, weight, targets, tokens = make(*shape, trainable=trainable)
    result = linear_policy_loss(hidden, weight, targets, **tokens, objective=PRESETS["dapo"], backend="triton")
    result.loss.backward()
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (hidden, weight)]
    truth = linear_policy_loss(*exact, targets, **tokens, objective=PRESETS["dapo"], backend="torch")
    truth.loss.backward()
    assert (result.logprobs - truth.logprobs).abs().max() <= 5e-5
    # One rounding of the gradient's operands, and one of the gradient.
    assert relative_error(hidden.grad, exact[0].grad) < 3 * SLACK[torch.bfloat16]
    if trainable:
        assert relative_error(weight.grad, exact[1].grad) < 3 * SLACK[torch.bfloat16]


def test_linear_logprob_without_gradient_stores_no_logits():
    hidden, weight, targets, _ = make(65536, 576, 49152)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        linear_logprob(hidden, weight, targets, backend="triton")
    # One row of statistics for each split; the logits would take 12 GiB.
    assert torch.cuda.max_memory_allocated() - before < 256 * MIB


@pytest.mark.parametrize("trainable", [True, False])
def test_linear_policy_loss_workspace_fits_the_budget(trainable):
    hidden, weight, targets, tokens = make(32768, 576, 49152, trainable=trainable)
    budget = 256 * MIB
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_policy_loss(hidden, weight, targets, **tokens, max_buffer_bytes=budget, backend="triton")
    gradients = hidden.numel() * 2 + (weight.numel() * 4 if trainable else 0)
    assert torch.cuda.max_memory_allocated() - before < 1.1 * budget + gradients + 8 * MIB


@pytest.mark.parametrize("trainable", [True, False])
def test_linear_policy_loss_synchronizes_at_most_once(trainable):
    """For the number of rows that are multiplied; never in the backward."""
    hidden, weight, targets, tokens = make(512, 64, 1000, trainable=trainable)

    def syncs(function) -> int:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    def forward():
        return linear_policy_loss(hidden, weight, targets, **tokens, objective=PRESETS["dapo"], backend="triton").loss

    forward().backward()  # compiles
    assert syncs(forward) <= 1
    loss = 2 * forward()
    assert syncs(loss.backward) == 0
