"""The exact result of an operation, and the allowed error.

Truth is the operation's `<op>_ref` (``backend="reference"``: full logits, autograd) in float64 on the same input
values. Native is the same reference in the dtype at hand: float32 as it is, 16-bit types under autocast, where the
product of the head is made and stored in 16 bits, as a model's own `lm_head` does. A result passes when

    ||result - truth|| / ||truth||  <=  2 * ||native - truth|| / ||truth|| + SLACK[result's dtype]

A float32 bias beside a 16-bit head has the head's slack: its gradient is a sum of dL/dlogits, which the kernels store
in 16 bits.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

# The native error may be 0 by chance, mostly in small shapes, so a few roundings are always allowed.
SLACK = {
    # Truth is rounded to float64; its errors grow with logits and log-ratios in the hundreds.
    torch.float64: 1e-12,
    # Sums over the vocabulary and the tokens in another order: 16 units of the last place.
    torch.float32: 2e-6,
    # One rounding of the finished gradient to 16 bits: half a unit of the last place.
    torch.bfloat16: 2.0**-9,
    torch.float16: 2.0**-12,
}


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Norm-wise; infinities must be at the same places. If the truth is zero, the error is absolute."""
    assert result.shape == truth.shape
    result, truth = result.detach().double(), truth.detach().double()
    infinite = truth.isinf()
    assert torch.equal(result[infinite], truth[infinite])
    result, truth = result[~infinite], truth[~infinite]
    norm = truth.norm().item()
    return (result - truth).norm().item() / (norm or 1.0)


def check(
    results: dict[str, Tensor | None],
    native: dict[str, Tensor | None],
    truth: dict[str, Tensor | None],
    head_dtype: torch.dtype | None = None,
) -> None:
    """Check every output and gradient of `results` by the rule at the top of this module."""
    assert results.keys() == truth.keys()
    for name, result in results.items():
        if truth[name] is None:
            assert result is None, f"{name}: expected none"
            continue
        error, allowed = relative_error(result, truth[name]), SLACK[result.dtype]
        if name == "bias" and head_dtype is not None:
            allowed = max(allowed, SLACK[head_dtype])
        if result.dtype != torch.float64:
            allowed += 2 * relative_error(native[name], truth[name])
        assert error <= allowed, f"{name}: relative error {error:.3g} of {result.dtype} is above {allowed:.3g}"


def to_double(value):
    """`value` in float64 where it is a floating-point tensor (the leaf it came from stays a leaf)."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def fresh(value):
    """A new leaf, so that gradients of several runs do not add up. Strides are kept."""
    if isinstance(value, Tensor) and value.requires_grad:
        return value.detach().requires_grad_(True)
    return value


def lower_precision(dtype: torch.dtype | None):
    """The context in which the reference becomes native PyTorch of a 16-bit dtype."""
    return (
        torch.autocast(torch.get_default_device().type, dtype)
        if dtype in (torch.bfloat16, torch.float16)
        else nullcontext()
    )


def compare(run, arguments: dict, native_dtype: torch.dtype | None, **options) -> dict[str, Tensor | None]:
    """Check ``run(arguments, **options)``, which returns outputs and gradients by name, and return its results.

    `run` is called a second and a third time with ``backend="reference"``, for native and for truth.
    """
    truth = run({k: to_double(v) for k, v in arguments.items()}, backend="reference")
    with lower_precision(native_dtype):
        native = run({k: fresh(v) for k, v in arguments.items()}, backend="reference")
    results = run({k: fresh(v) for k, v in arguments.items()}, **options)
    check(results, native, truth, native_dtype)
    return results
