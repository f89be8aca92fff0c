"""bfloat16 in Triton's interpreter: products and rounding as on a GPU, and kernels that round where a GPU does."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from grpo_kernels import kl_estimate, masked_mean
from grpo_kernels._head_arguments import make_pass
from grpo_kernels.triton_kernels.interpreter import round_to_nearest, widen
from grpo_kernels.triton_kernels.launch import interpreting
from support.logprob_cases import make

pytestmark = pytest.mark.skipif(not interpreting(), reason="tests the interpreter")


@triton.jit
def product(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, columns, depth = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + rows[:, None] * K + depth[None, :])
    right = tl.load(b + columns[:, None] * K + depth[None, :])
    z = tl.dot(left, right.T, tl.full([M, N], 1.0, tl.float32), input_precision="ieee")
    tl.store(out + rows[:, None] * N + columns[None, :], z)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dot_multiplies_values(dtype):
    a, b, out = torch.randn(16, 64).to(dtype), torch.randn(32, 64).to(dtype), torch.empty(16, 32)
    product[(1,)](a, b, out, M=16, N=32, K=64)
    torch.testing.assert_close(out, (a.double() @ b.double().T + 1).float())


@triton.jit
def cast(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


def test_cast_to_bfloat16_rounds_as_torch_does():
    ties = (torch.arange(0x3F80, 0x4000, dtype=torch.int32) << 16 | 0x8000).view(torch.float32)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.4e38, -3.4e38, 1e-40, -1e-45])
    values = torch.cat([ties, -ties, special, torch.randn(2048 - 2 * len(ties) - len(special)).exp()])
    found = torch.empty(2048, dtype=torch.bfloat16)
    cast[(1,)](values, found, N=2048)
    expected = values.bfloat16()
    assert found.isnan().equal(expected.isnan())
    assert found.nan_to_num().view(torch.int16).equal(expected.nan_to_num().view(torch.int16))
    # A NaN whose upper 16 bits alone would read as infinity.
    assert np.isnan(widen(round_to_nearest(np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)))).all()


def test_cast_from_bfloat16_is_exact():
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    found = torch.empty(1 << 16)
    cast[(1,)](every, found, N=1 << 16)
    assert found.view(torch.int32).equal(every.float().view(torch.int32))


def test_kernels_store_bfloat16():
    """The head's buffer and the elementwise gradients have the dtype, and so the rounding, that they have on a GPU."""
    arguments = make(9, 24, 130, torch.bfloat16)
    _, call = make_pass(
        "test", *(arguments[name] for name in ("hidden", "weight", "targets")), bias=None, temperature=1.0,
        logit_scale=1.0, softcap=None, max_buffer_bytes=None, process_group=None, with_entropy=False, backend="triton",
    )  # fmt: skip
    (chunk,) = call.chunks(torch.arange(9), call.head.buffer(9), False)
    assert chunk.e.dtype == torch.bfloat16
    z = arguments["hidden"].detach().float() @ arguments["weight"].detach().float().T
    width = chunk.stats.tile_width
    for tile, maximum in enumerate(chunk.stats.tile_maximum):
        at = slice(tile * width, (tile + 1) * width)
        torch.testing.assert_close(chunk.e[:, at].float(), (z[:, at] - maximum[:, None]).exp(), rtol=2**-8, atol=0)
    values = torch.randn(5, 3, dtype=torch.bfloat16, requires_grad=True)
    other = torch.randn(5, 3, dtype=torch.bfloat16)
    for operation in (lambda backend: kl_estimate(values, other, backend=backend).sum(),
                      lambda backend: masked_mean(values, other > 0, backend=backend)):  # fmt: skip
        grads = [torch.autograd.grad(operation(backend), values)[0] for backend in ("triton", "torch")]
        torch.testing.assert_close(*grads, rtol=2**-8, atol=0)
