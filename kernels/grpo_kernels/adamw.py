"""One step of AdamW on a tensor, with stochastic rounding of bfloat16 weights.

bfloat16 has 8 bits of precision, so rounding to nearest loses an update below 1/512 of a weight. Here, a weight is
rounded up or down at random with such probabilities that its expected value is the unrounded one.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from grpo_kernels._backend import choose_backend

# Weights that the portable path updates at once, which bounds its temporary memory of about 20 bytes each.
CHUNK = 1 << 24
# Random numbers that are computed at once on a CPU, few enough to stay in its cache.
CPU_CHUNK = 1 << 14


@torch.no_grad()
def adamw_(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, step: int, seed: object, lr: float,
    betas: tuple[float, float], eps: float, weight_decay: float, backend: str = "auto",
) -> None:  # fmt: skip
    """Update `weight`, `exp_avg` and `exp_avg_sq` in place. The host does not wait for the device.

    Backend "triton" is one kernel, which moves 22 bytes for a bfloat16 weight with a bfloat16 gradient; "torch" moves
    three times as much. Both round alike: the random bits depend on `seed`, `step` and a weight's index alone.

    Args:
        weight: any shape, contiguous; bfloat16 is rounded stochastically, float32 not at all, float16 to nearest.
        grad: the same shape, any floating dtype.
        exp_avg, exp_avg_sq: the same shape, contiguous, float32: the moments before the step.
        step: the number of this step, from 1 on.
        seed: anything whose `repr` differs from those of other tensors' seeds.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.

    Raises:
        ValueError: an unknown backend, or one that cannot run here.
    """
    flat = weight.view(-1), grad.reshape(-1), exp_avg.view(-1), exp_avg_sq.view(-1)
    keys = draw_keys(seed, step)
    if choose_backend("adamw_", backend, weight.device, torch.float32) == "triton":
        from grpo_kernels.triton_kernels.adamw_kernels import adamw_step_

        step_size, correction = lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** -0.5
        adamw_step_(*flat, keys, lr * weight_decay, *betas, step_size, correction, eps)
        return
    options = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay}
    start = 0
    for part, part_grad, mean, square in zip(*(tensor.split(CHUNK) for tensor in flat), strict=True):
        master = part.float()
        # The call counts it up to `step`.
        before = torch.full((), step - 1, dtype=torch.float32, device=weight.device)
        adamw(
            [master], [part_grad.float()], [mean], [square], [], [before],
            fused=True, amsgrad=False, maximize=False, **options,
        )  # fmt: skip
        if part.dtype == torch.bfloat16:
            round_stochastically_(master, keys, start)
        if master is not part:
            part.copy_(master)
        start += part.numel()


def draw_keys(seed: object, step: int) -> tuple[int, int]:
    """Two random int32 for a step, always the same for the same arguments."""
    drawn = hashlib.blake2b(repr((seed, step)).encode(), digest_size=8).digest()
    return int.from_bytes(drawn[:4], "little", signed=True), int.from_bytes(drawn[4:], "little", signed=True)


def round_stochastically_(values: Tensor, keys: tuple[int, int], start: int = 0) -> None:
    """Round float32 `values` ``[n]`` up or down to bfloat16, in place, so that the expected result is the value.

    bfloat16 is the upper half of float32: adding a random number below 2**16 to the lower half carries into the upper
    half with the right probability, away from zero for either sign. Infinities and NaN are unchanged.

    Args:
        keys: of `draw_keys`.
        start: index of the first value among those of the tensor.
    """
    for part in values.split(CPU_CHUNK if values.device.type == "cpu" else CHUNK):
        bits = random_bits(start, part.numel(), keys, part.device)
        bits &= 0xFFFF
        bits += part.view(torch.int32)
        bits &= -(1 << 16)
        # Adding could carry a NaN's mantissa into its exponent and sign.
        torch.where(part.isnan(), part, bits.view(torch.float32), out=part)
        start += part.numel()


def random_bits(start: int, count: int, keys: tuple[int, int], device: torch.device) -> Tensor:
    """``[count]`` int32 of random bits, a function of the keys and of a counter that begins at `start`.

    The counter, modulo 2**32, is mixed twice, with one key each time. The Triton kernel computes the same.
    """
    # Signed integers wrap around here, as unsigned ones do there.
    x = torch.arange(count, dtype=torch.int32, device=device)
    x += _signed(start)
    for key in keys:
        x ^= key
        _shifted_xor_(x, 16)
        x *= 0x7FEB352D
        _shifted_xor_(x, 15)
        x *= _signed(0x846CA68B)
        _shifted_xor_(x, 16)
    return x


def _shifted_xor_(x: Tensor, by: int) -> None:
    """``x ^= x >> by`` with zeros shifted in."""
    x ^= (x >> by).bitwise_and_((1 << (32 - by)) - 1)


def _signed(number: int) -> int:
    """The int32 with the lowest 32 bits of a number."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)
