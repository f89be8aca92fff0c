"""Elementwise functions that Triton's language lacks or computes with too few digits, in float32."""

import triton
import triton.language as tl


@triton.jit
def expm1(x):
    """exp(x) - 1 to within a few units of the last place; the series avoids the cancellation near 0."""
    series = 1.0 / 40320 + x * (1.0 / 362880 + x * (1.0 / 3628800))
    series = 1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040 + x * series))
    series = x + x * x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * series)))
    return tl.where(tl.abs(x) < 0.7, series, tl.exp(x) - 1.0)


@triton.jit
def tanh(x):
    """tanh(x) = expm1(2|x|) / (expm1(2|x|) + 2) with x's sign; 1 beyond 15, before the exponential overflows."""
    twice = expm1(2.0 * tl.minimum(tl.abs(x), 15.0))
    value = twice / (twice + 2.0)
    return tl.where(x < 0, -value, value)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), whose exponential never overflows."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)
