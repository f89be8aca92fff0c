"""Per-token estimates of the Kullback-Leibler divergence KL(policy || reference) from sampled tokens.

With ``d = logprobs - ref_logprobs`` (Schulman, "Approximating KL Divergence", 2020):

    k1 = d                      unbiased, any sign
    k2 = d**2 / 2               biased, >= 0; its gradient is unbiased for the reverse KL on on-policy samples
    k3 = exp(-d) - 1 + d        unbiased, >= 0 (TRL's and DeepSeekMath's choice)

The torch backend saves the derivative for the backward, the Triton backend the inputs. Arithmetic is elementwise in
float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import _checks as checks
from grpo_kernels._backend import choose_backend
from grpo_kernels.objective import KL_ESTIMATORS


def kl_estimate(
    logprobs: Tensor,  # any shape
    ref_logprobs: Tensor,  # the same shape
    estimator: str = "k3",
    *,
    backend: str = "auto",
) -> Tensor:
    """Per-token KL(policy || reference) estimate, elementwise and differentiable in both arguments.

    Args:
        logprobs: log-probabilities under the policy (nats), any shape, floating point.
        ref_logprobs: log-probabilities of the same tokens under the reference, same shape and device.
        estimator: ``"k1"``, ``"k2"`` or ``"k3"``.
        backend: ``"auto"`` (Triton on a supported GPU, else torch), ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        A tensor of the same shape, float32 (float64 if an input is float64).

    Raises:
        ValueError: shapes or devices differ, or `estimator` or `backend` is unknown.
        TypeError: an argument is not floating point.
    """
    op = "kl_estimate"
    checks.require_choice(op, "estimator", estimator, KL_ESTIMATORS)
    checks.require_tensors(op, logprobs=logprobs, ref_logprobs=ref_logprobs)
    checks.require_floating(op, logprobs=logprobs, ref_logprobs=ref_logprobs)
    checks.require_shape(op, logprobs.shape, ref_logprobs=ref_logprobs)
    checks.require_device(op, logprobs.device, ref_logprobs=ref_logprobs)
    dtype = checks.accumulation_dtype(logprobs, ref_logprobs)
    backend = choose_backend(op, backend, logprobs.device, dtype)
    if backend == "triton":
        from grpo_kernels.triton_kernels.elementwise_kernels import KLEstimateTriton

        return KLEstimateTriton.apply(logprobs, ref_logprobs, estimator)
    return (_KLEstimate.apply if backend == "torch" else kl_estimate_ref)(logprobs, ref_logprobs, estimator)


def kl_estimate_ref(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """The definition above, differentiated by autograd: what the tests compare with."""
    dtype = checks.accumulation_dtype(logprobs, ref_logprobs)
    d = logprobs.to(dtype) - ref_logprobs.to(dtype)
    return {"k1": lambda: d, "k2": lambda: d.square() / 2, "k3": lambda: torch.exp(-d) - 1 + d}[estimator]()


def kl_and_derivative(
    logprobs: Tensor, ref_logprobs: Tensor, estimator: str, clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """The estimate and its derivative with respect to `logprobs`, both elementwise.

    Outside ``[-clip, clip]`` the estimate is clamped and its derivative is 0, as with `torch.clamp`.

    ``expm1`` keeps k3 accurate where policy and reference nearly agree, which is where training spends its time.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        value, slope = d, torch.ones_like(d)
    elif estimator == "k2":
        value, slope = d.square() / 2, d
    else:
        excess = torch.expm1(-d)
        value, slope = excess + d, -excess
    if clip is None:
        return value, slope
    return value.clamp(-clip, clip), torch.where(value.abs() > clip, 0.0, slope)


class _KLEstimate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, ref_logprobs, estimator):
        dtype = checks.accumulation_dtype(logprobs, ref_logprobs)
        value, derivative = kl_and_derivative(logprobs.to(dtype), ref_logprobs.to(dtype), estimator)
        ctx.save_for_backward(derivative)
        ctx.dtypes = logprobs.dtype, ref_logprobs.dtype
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        (derivative,) = ctx.saved_tensors
        grad = grad_output * derivative
        # Every estimator depends only on d = logprobs - ref_logprobs.
        grad_logprobs = grad.to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        grad_ref = -grad.to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
        return grad_logprobs, grad_ref, None
