"""The products on a GPU, where 16-bit operands give float32 results, with the products emulated.

A CPU does not support `out_dtype`, so the emulation widens the operands; all other code is the real one.
"""

import pytest
import torch

from grpo_kernels import PolicyObjective, linear_logprob, linear_policy_loss
from grpo_kernels._head import HALF, Head
from support.loss_cases import make
from support.oracle import SLACK, relative_error

mm, addmm = torch.mm, torch.addmm


@pytest.fixture
def gpu_products(monkeypatch):
    calls = []

    def check(a, b, out_dtype):
        assert a.dtype == b.dtype
        assert a.dtype in HALF
        assert out_dtype == torch.float32
        calls.append(a.dtype)

    def mixed_mm(a, b, *, out_dtype=None, out=None):
        if out_dtype is None and a.dtype in (torch.float32, torch.float64):
            return mm(a, b, out=out)
        if out_dtype is None:
            assert a.dtype == b.dtype == out.dtype == torch.bfloat16
            # cuBLAS adds up in float32 and rounds once.
            assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
            return out.copy_(mm(a.float(), b.float()))
        check(a, b, out_dtype)
        return mm(a.float(), b.float(), out=out)

    def mixed_addmm(c, a, b, *, out_dtype=None, out=None):
        assert c.dtype == torch.float32
        if out_dtype is None:
            return addmm(c, a, b, out=out)
        check(a, b, out_dtype)
        return addmm(c, a.float(), b.float(), out=out)

    monkeypatch.setattr(torch, "mm", mixed_mm)
    monkeypatch.setattr(torch, "addmm", mixed_addmm)
    monkeypatch.setattr(Head, "mixed_products", property(lambda head: head.operand_dtype in HALF))
    return calls


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("trainable", ["hw", "h"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_linear_policy_loss_with_mixed_products(level, trainable, weight_dtype, gpu_products):
    objective = PolicyObjective(level=level, beta=0.1)
    arguments = make(dtype=torch.bfloat16, trainable=trainable)
    trained = arguments["weight"].requires_grad
    arguments["weight"] = arguments["weight"].detach().to(weight_dtype).requires_grad_(trained)
    # Mixed weights are promoted to float32 unless autocast asks for bfloat16, as a trainer does.
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_policy_loss(objective=objective, **arguments, max_buffer_bytes=20_000)
        got.loss.backward()
    assert len(gpu_products) >= 4
    exact = {k: v.detach() for k, v in arguments.items()}
    for name in ("hidden", "weight"):
        exact[name] = exact[name].double().requires_grad_(arguments[name].requires_grad)
    expected = linear_policy_loss(objective=objective, **exact, backend="reference")
    expected.loss.backward()
    assert relative_error(got.loss, expected.loss) < 1e-5
    for name in ("hidden", "weight"):
        if arguments[name].requires_grad:
            # One rounding of the operands of the gradient's product, and one of the gradient.
            assert relative_error(arguments[name].grad, exact[name].grad) < 3 * SLACK[torch.bfloat16]


@pytest.mark.parametrize("coefficient", [1.0, 2.0**-20])
@pytest.mark.parametrize("trainable", ["hw", "h"])
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "temperature": 0.05}], ids=["plain", "options"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_float16_head_with_mixed_products(level, backend, options, trainable, coefficient, gpu_products):
    """The gradient's 16-bit operands are those of a coefficient of 1, whatever the real one is."""
    arguments = make(dtype=torch.float16, trainable=trainable)
    arguments["weights"] = arguments["weights"] * coefficient
    exact = {k: v.detach() for k, v in arguments.items()}
    for name in ("hidden", "weight"):
        exact[name] = exact[name].double().requires_grad_(arguments[name].requires_grad)
    kind = "reinforce" if level == "token" else "clip"
    objective = PolicyObjective(kind=kind, level=level, entropy_coef=0.05)
    # The loss scale keeps the finished gradients within float16's range.
    got = linear_policy_loss(objective=objective, **arguments, **options, max_buffer_bytes=20_000, backend=backend)
    (got.loss / coefficient).backward()
    assert gpu_products
    assert set(gpu_products) == {torch.float16}
    expected = linear_policy_loss(objective=objective, **exact, **options, backend="reference")
    (expected.loss / coefficient).backward()
    assert relative_error(got.loss, expected.loss) < 1e-5
    for name in ("hidden", "weight"):
        if arguments[name].requires_grad:
            assert relative_error(arguments[name].grad, exact[name].grad) < 3 * SLACK[torch.float16]


def test_linear_logprob_with_mixed_products(gpu_products):
    hidden, weight = torch.randn(20, 64).bfloat16() * 4, torch.randn(500, 64).bfloat16()
    targets = torch.randint(0, 500, (20,))
    exact = linear_logprob(hidden.double(), weight.double(), targets, backend="reference")
    assert (linear_logprob(hidden, weight, targets) - exact).abs().max() < 2e-5
    assert gpu_products
