"""Losses that are plain PyTorch functions of per-token tensors, at the cost of the built-in ones in the output head.

    def mine(logprobs, old_logprobs, advantages):      # [N] each
        return -torch.exp(logprobs - old_logprobs) * advantages      # [N]: the loss of each token

Every loss of log-probabilities reaches the hidden states through one number per token, dL/dlogp. For such a function
autograd computes that number on ``[N]`` tensors, so nothing else changes: 3U in the head if a token's loss depends on
that token alone, or 1U + 3U f if the function takes `cu_seqlens`, and with it whole sequences.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from grpo_kernels._checks import require

# What a function may take, by the names of its parameters.
TENSORS = ("logprobs", "old_logprobs", "advantages", "ratio", "ref_logprobs", "selected", "cu_seqlens")
# Settings of `PolicyObjective` that a function may take as well.
SETTINGS = ("epsilon", "epsilon_high", "delta", "covariance_kl")
# Sequences of the probe, in tokens.
PROBED_LENGTHS = (3, 1, 4)


def parameters_of(function: Callable[..., Tensor]) -> dict[str, Any]:
    """The parameters of a loss function that are passed to it, with their defaults.

    Raises:
        ValueError: the function needs a parameter that is neither in `TENSORS` nor in `SETTINGS`.
        TypeError: it is no function.
    """
    if not callable(function):
        raise TypeError(f"PolicyObjective: function must be callable, got {type(function).__name__}")
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in TENSORS + SETTINGS and parameter.kind is not parameter.POSITIONAL_ONLY:
            found[name] = parameter.default
        elif parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            raise ValueError(
                f"{named(function)} needs {name!r}; a loss function may take {', '.join(TENSORS + SETTINGS)}, "
                "and parameters with defaults"
            )
    require("logprobs" in found, f"{named(function)} takes no logprobs, so it has no gradient")
    return found


def own_defaults(function: Callable[..., Tensor]) -> dict[str, Any]:
    """The defaults that a loss function gives to settings of `PolicyObjective`."""
    found = parameters_of(function)
    missing = inspect.Parameter.empty
    return {name: found[name] for name in SETTINGS if found.get(name, missing) is not missing}


def named(function: Callable[..., Tensor]) -> str:
    return f"objective {getattr(function, '__name__', type(function).__name__)!r}"


def function_terms(
    function: Callable[..., Tensor],
    settings: Mapping[str, Any],
    scale: Tensor,  # [N]
    counted: Tensor,  # [N] bool
    logprobs: Tensor,  # [N]
    log_ratio: Tensor,  # [N]
    old_logprobs: Tensor | None,  # [N]
    advantages: Tensor,  # [N]
    ref_logprobs: Tensor | None,  # [N]
    selected: Tensor | None,  # [N]
    cu_seqlens: Tensor | None,  # [S + 1]
) -> tuple[Tensor, Tensor, Tensor]:
    """``scale * function(...)`` of every token, and the derivatives of its sum, ``[N]`` each.

    The derivatives are those with respect to `log_ratio`, through `ratio` alone, and to `logprobs` at a fixed `ratio`.
    A function that takes `cu_seqlens` sees the counted tokens only, and their offsets.
    """
    wanted = parameters_of(function)
    kept = None
    if "cu_seqlens" in wanted and cu_seqlens is not None:
        kept = counted.nonzero().squeeze(1)
        ends = torch.cat([kept.new_zeros(1), counted.cumsum(0)])
        cu_seqlens = ends[cu_seqlens.long()]

    def taken(values: Tensor | None) -> Tensor | None:
        # A copy outside of inference mode, whose tensors autograd refuses.
        return None if values is None else (values.clone() if kept is None else values[kept])

    with torch.inference_mode(False), torch.enable_grad():
        scale, leaf, log_ratio_leaf = taken(scale), taken(logprobs).requires_grad_(), taken(log_ratio).requires_grad_()
        tensors = {
            "logprobs": leaf,
            "old_logprobs": leaf.detach().clone() if old_logprobs is None else taken(old_logprobs),
            "advantages": taken(advantages),
            "ratio": torch.exp(log_ratio_leaf) if "ratio" in wanted else None,
            "ref_logprobs": taken(ref_logprobs),
            "selected": taken(selected),
            "cu_seqlens": cu_seqlens,
        }
        given = {name: tensors[name] if name in tensors else settings[name] for name in wanted}
        value = function(**given)
        _check_value(function, value, leaf)
        loss = scale * value
        slopes = [None, None]
        if loss.requires_grad:
            slopes = torch.autograd.grad(loss.sum(), (log_ratio_leaf, leaf), allow_unused=True)
    made = [torch.zeros_like(scale) if part is None else part for part in (loss.detach(), *slopes)]
    if kept is not None:
        made = [torch.zeros_like(logprobs).index_copy(0, kept, part) for part in made]
    return made[0], made[1], made[2]


def check_function(function: Callable[..., Tensor], settings: Mapping[str, Any], scales_with_advantage: bool) -> None:
    """Try a loss function out on a few tokens.

    Raises:
        ValueError: it fails, does not return one loss per token, has no gradient, or mixes tokens that it must not mix:
            chunks and microbatches would then change the loss.
    """
    wanted = parameters_of(function)
    generator = torch.Generator().manual_seed(0)
    total = sum(PROBED_LENGTHS)
    noise = torch.randn(3, total, generator=generator, dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0] * total, dtype=torch.float64)[:total]
    advantages = signs * (0.5 + torch.rand(total, generator=generator, dtype=torch.float64))
    if "cu_seqlens" in wanted:
        advantages = advantages[:3].repeat_interleave(torch.tensor(PROBED_LENGTHS))
    old = noise[0] - 2

    def probe(first: int, last: int, advantages: Tensor) -> tuple[Tensor, Tensor]:
        part = slice(first, last)
        logprobs = old[part] + 0.1 * noise[1, part]
        offsets = torch.tensor([0, *PROBED_LENGTHS]).cumsum(0)
        offsets = offsets[(offsets >= first) & (offsets <= last)] - first
        try:
            value, through, direct = function_terms(
                function, settings, torch.ones_like(logprobs), torch.ones_like(logprobs).bool(), logprobs,
                logprobs - old[part], old[part],
                advantages[part], old[part] + 0.1 * noise[2, part], (noise[2, part] > 0).double(), offsets,
            )  # fmt: skip
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            if text.startswith(named(function)):
                raise
            raise ValueError(
                f"{named(function)} fails on {last - first} tokens: {type(error).__name__}: {text}"
            ) from None
        return value, through + direct

    whole = probe(0, total, advantages)
    require(bool(whole[1].any()), f"{named(function)} has no gradient: its result does not depend on logprobs")
    # Where a sequence ends; token-level losses may be cut anywhere.
    cut = PROBED_LENGTHS[0] + (PROBED_LENGTHS[1] if "cu_seqlens" in wanted else 2)
    parts = zip(probe(0, cut, advantages), probe(cut, total, advantages), strict=True)
    for one, (first, last) in zip(whole, parts, strict=True):
        same = torch.allclose(one, torch.cat([first, last]), rtol=1e-9, atol=1e-12, equal_nan=True)
        if "cu_seqlens" in wanted:
            require(
                same, f"{named(function)} mixes tokens of different sequences, so microbatches would change its loss"
            )
        require(
            same,
            f"{named(function)} mixes tokens, so chunks would change its loss; a function that takes cu_seqlens "
            "gets whole sequences",
        )
    if scales_with_advantage:
        value, slope = probe(0, total, torch.zeros_like(advantages))
        require(
            not value.any() and not slope.any(),
            f"{named(function)} is not 0 where the advantage is 0, so scales_with_advantage must be False",
        )


def _check_value(function: Callable[..., Tensor], value: object, logprobs: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{named(function)} must return a tensor, one loss per token, got {type(value).__name__}")
    require(
        value.shape == logprobs.shape,
        f"{named(function)} must return one loss per token, of shape {list(logprobs.shape)}, got {list(value.shape)}; "
        "the weights of the step contain the mean",
    )
