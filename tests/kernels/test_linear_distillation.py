"""`linear_distillation`: its values and gradients, its memory, and what it refuses."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from grpo_kernels import linear_distillation
from grpo_kernels.linear_distillation import divergence_ref

N, H, H_TEACHER, V = 13, 4, 7, 19
BETAS = (0.0, 0.3, 1.0)
MIB = 2**20


def problem(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    tensors = {
        "hidden": torch.randn(N, H, dtype=dtype), "weight": torch.randn(V, H, dtype=dtype),
        "teacher_hidden": torch.randn(N, H_TEACHER, dtype=dtype),
        "teacher_weight": torch.randn(V, H_TEACHER, dtype=dtype) / 2,
    }  # fmt: skip
    weights = torch.rand(N, dtype=dtype) + 0.1
    weights[[2, 7]] = 0.0
    return {**tensors, "weights": weights}


OPTIONS = {
    "plain": {},
    "bias": {"bias": True, "teacher_bias": True},
    "transforms": {
        "temperature": 0.7, "logit_scale": 0.5, "teacher_logit_scale": 1.5, "softcap": 3.0, "teacher_softcap": 4.0,
    },
    "one temperature per token": {"temperature": True, "softcap": 2.0, "bias": True},
}  # fmt: skip


def with_options(options, dtype=torch.float64):
    made = dict(options)
    for name in ("bias", "teacher_bias"):
        if made.get(name):
            made[name] = torch.randn(V, dtype=dtype)
    if made.get("temperature") is True:
        made["temperature"] = torch.rand(N, dtype=dtype) + 0.5
    return made


def backward(tensors, options, **more):
    """The loss, the divergences, and the gradients of what is trained."""
    leaves = {name: tensors[name].clone().requires_grad_() for name in ("hidden", "weight")}
    options = dict(options)
    if options.get("bias") is not None:
        leaves["bias"] = options["bias"] = options["bias"].clone().requires_grad_()
    result = linear_distillation(**{**tensors, **{k: v for k, v in leaves.items() if k != "bias"}}, **options, **more)
    (3 * result.loss).backward()
    return result.loss.detach(), result.divergence, *(leaf.grad for leaf in leaves.values())


@pytest.mark.parametrize("budget", [None, 1_000], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_linear_distillation_equals_the_reference(options, beta, budget):
    tensors, options = problem(), with_options(options)
    found = backward(tensors, options, beta=beta, max_buffer_bytes=budget)
    expected = backward(tensors, options, beta=beta, backend="reference")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert (found[1][[2, 7]] == 0).all()
    assert (found[1][:2] > 0).all()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("options", [{}, OPTIONS["one temperature per token"]], ids=["plain", "transforms"])
def test_linear_distillation_gradcheck(options, beta):
    tensors, options = problem(), with_options(options)
    bias = options.pop("bias", None)

    def loss(hidden, weight, *bias):
        made = {"bias": bias[0]} if bias else {}
        return linear_distillation(**{**tensors, "hidden": hidden, "weight": weight}, beta=beta, **made, **options).loss

    leaves = [tensors["hidden"], tensors["weight"], *([] if bias is None else [bias])]
    assert torch.autograd.gradcheck(partial(_Anew.apply, loss), [leaf.requires_grad_() for leaf in leaves])


class _Anew(torch.autograd.Function):
    """A function that recomputes the operation for each backward, since gradcheck runs several."""

    @staticmethod
    def forward(ctx, function, *leaves):
        ctx.function, ctx.leaves = function, leaves
        return function(*leaves).detach()

    @staticmethod
    def backward(ctx, grad):
        leaves = [leaf.detach().requires_grad_() for leaf in ctx.leaves]
        with torch.enable_grad():
            loss = ctx.function(*leaves)
        return None, *(grad * part for part in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("beta", BETAS)
def test_linear_distillation_is_torchs_divergence(beta):
    """By `torch.nn.functional.kl_div`, as in TRL's `generalized_jsd_loss`."""
    tensors = problem()
    log_p = (tensors["hidden"] @ tensors["weight"].T).log_softmax(-1)
    log_q = (tensors["teacher_hidden"] @ tensors["teacher_weight"].T).log_softmax(-1)

    def kl(log_a, log_b):
        return torch.nn.functional.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)

    log_m = torch.logsumexp(torch.stack([log_p + torch.tensor(1 - beta).log(), log_q + torch.tensor(beta).log()]), 0)
    expected = {0.0: kl(log_q, log_p), 1.0: kl(log_p, log_q)}.get(
        beta, beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)
    )
    found = linear_distillation(**tensors, beta=beta)
    kept = tensors["weights"] != 0
    # torch.tensor(0.3) is a float32.
    torch.testing.assert_close(found.divergence[kept], expected[kept], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(divergence_ref(log_p, log_q, beta), expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.loss, (tensors["weights"] * found.divergence).sum())


def test_linear_distillation_of_equal_heads_is_zero():
    tensors = problem(torch.float32)
    tensors |= {"teacher_hidden": tensors["hidden"], "teacher_weight": tensors["weight"]}
    for beta in BETAS:
        _, divergence, *grads = backward(tensors, {}, beta=beta)
        assert divergence.abs().max() < 1e-6
        assert all(grad.abs().max() < 1e-5 for grad in grads)


@pytest.mark.parametrize("beta", BETAS)
def test_linear_distillation_excluded_tokens(beta):
    """A bias of -inf excludes a token for both, or for the student alone, which is then no part of the reverse KL."""
    tensors = problem()
    bias = torch.zeros(V, dtype=torch.float64)
    bias[3] = float("-inf")
    options = {"bias": bias, "teacher_bias": bias}
    found, expected = (backward(tensors, options, beta=beta, backend=name) for name in ("torch", "reference"))
    for one, other in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other)
    assert all(grad.isfinite().all() for grad in found[2:])
    if beta == 1.0:
        alone = backward(tensors, {"bias": bias}, beta=beta)
        assert all(part.isfinite().all() for part in alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_distillation_dtypes(dtype):
    """Within the rounding of 16-bit operands of the float64 result; gradients have the leaves' dtypes."""
    tensors = {name: value.to(dtype) for name, value in problem().items()}
    tensors["weights"] = tensors["weights"].float()
    found = backward(tensors, {})
    exact = backward({name: value.double() for name, value in tensors.items()}, {})
    assert [part.dtype for part in found] == [torch.float32, torch.float32, dtype, dtype]
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    for one, other in zip(found, exact, strict=True):
        assert (one.double() - other).norm() <= bound * other.norm()


def test_linear_distillation_frozen_and_no_grad():
    tensors = problem()
    expected = backward(tensors, {})
    hidden = tensors["hidden"].clone().requires_grad_()
    (3 * linear_distillation(**{**tensors, "hidden": hidden}).loss).backward()
    torch.testing.assert_close(hidden.grad, expected[2])
    with torch.no_grad():
        result = linear_distillation(**{**tensors, "hidden": hidden})
    assert not result.loss.requires_grad
    torch.testing.assert_close(result.loss, expected[0])
    none = linear_distillation(**{**tensors, "weights": torch.zeros(N, dtype=torch.float64)})
    assert none.loss == 0


def test_linear_distillation_shapes_and_second_backward():
    tensors = problem()
    rows = {name: tensors[name][:12].unflatten(0, (3, 4)) for name in ("hidden", "teacher_hidden", "weights")}
    result = linear_distillation(**{**tensors, **rows})
    assert result.divergence.shape == (3, 4)
    flat = linear_distillation(**{**tensors, **{name: value.flatten(0, 1) for name, value in rows.items()}})
    torch.testing.assert_close(result.divergence.flatten(), flat.divergence)
    leaf = tensors["hidden"].requires_grad_()
    loss = linear_distillation(**{**tensors, "hidden": leaf}).loss
    loss.backward(retain_graph=True)
    with pytest.raises(ValueError, match="a second backward needs a second forward"):
        loss.backward()


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"teacher_weight": torch.zeros(V + 1, H_TEACHER)}, ValueError, r"same vocabulary, got weight \[19, 4\]"),
        ({"teacher_weight": torch.zeros(V, H_TEACHER + 1)}, ValueError, "hidden has H=7, but weight .V, H. has H=8"),
        ({"teacher_hidden": torch.zeros(N - 1, H_TEACHER)}, ValueError, r"teacher_hidden must have shape \[13"),
        ({"weights": torch.ones(N - 1)}, ValueError, "weights"),
        ({"weights": torch.ones(N, dtype=torch.int64)}, TypeError, "weights"),
        ({"beta": 1.5}, ValueError, "beta must be from 0 to 1, got 1.5"),
        ({"beta": True}, ValueError, "beta must be from 0 to 1, got True"),
        ({"backend": "triton"}, ValueError, "backend"),
        ({"temperature": 0.0}, ValueError, "temperature"),
    ],
)  # fmt: skip
def test_linear_distillation_refuses_wrong_arguments(fields, error, message):
    with pytest.raises(error, match=message):
        linear_distillation(**{**problem(torch.float32), **fields})


def test_linear_distillation_never_allocates_the_logits(monkeypatch):
    """The largest tensor that it allocates follows from the budget, whatever the number of tokens."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for part in result if isinstance(result, tuple | list) else [result]:
                if isinstance(part, torch.Tensor):
                    self.bytes = max(self.bytes, part.untyped_storage().nbytes())
            return result

    rows, vocab, budget = 512, 1024, MIB
    tensors = {
        "hidden": torch.randn(rows, 8), "weight": torch.randn(vocab, 8), "teacher_hidden": torch.randn(rows, 16),
        "teacher_weight": torch.randn(vocab, 16), "weights": torch.ones(rows) / rows,
    }  # fmt: skip
    for beta in BETAS:
        with Largest() as largest:
            leaf = tensors["hidden"].clone().requires_grad_()
            linear_distillation(**{**tensors, "hidden": leaf}, beta=beta, max_buffer_bytes=budget).loss.backward()
        assert largest.bytes <= budget // 2 < 4 * rows * vocab


SCRIPT = """
import sys, torch
from grpo_kernels import linear_distillation
N, kind = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(2)

def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

def step(n):
    h = hidden[:n].detach().requires_grad_()
    backend = "reference" if kind == "full" else "auto"
    loss = linear_distillation(h, weight, teacher_hidden[:n], teacher_weight, weights[:n], backend=backend,
                               max_buffer_bytes=32 * 2**20).loss
    loss.backward()
    grads = h.grad, weight.grad
    weight.grad = None
    return grads

hidden, weight = torch.randn(N, 64), (torch.randn(24576, 64) / 8).requires_grad_()
teacher_hidden, teacher_weight = torch.randn(N, 128), torch.randn(24576, 128) / 11
weights = torch.full((N,), 1 / N)
step(2)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
grads = step(N)
print(status("VmHWM") - before)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_linear_distillation_peak_memory():
    def peak(tokens, kind):
        command = [sys.executable, "-c", SCRIPT, str(tokens), kind]
        # Otherwise the allocator keeps freed blocks of ever larger sizes.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)

    gradients, sizes = 4 * 24576 * 64, {}
    for tokens in (512, 2048):
        sizes[tokens] = peak(tokens, "fused")
        print(f"N={tokens}: {sizes[tokens] / MIB:.0f} MiB, of which gradients {gradients / MIB:.0f} MiB")
        assert sizes[tokens] <= 32 * MIB + gradients + 2 * 4 * tokens * 64 + 16 * MIB
    full = peak(2048, "full")
    print(f"N=2048, full logits: {full / MIB:.0f} MiB")
    assert full > 5 * sizes[2048]
