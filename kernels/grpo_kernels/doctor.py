"""Is this machine served, and rightly? ``python -m grpo_kernels.doctor``

Prints versions, devices and the path that each operation takes, then compares every operation with its definition in
float64 on random inputs, for each dtype and backend that can run here. Takes about five seconds (on a GPU, the kernels
are compiled first). Exit status 1 when a result is wrong.
"""

from __future__ import annotations

import importlib.util
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata

import torch
from torch import Tensor

from grpo_kernels import PolicyObjective, kl_estimate, linear_logprob, linear_policy_loss, masked_mean, policy_loss
from grpo_kernels._backend import backend_name, triton_obstacle

OPERATIONS = ("linear_logprob", "policy_loss", "linear_policy_loss", "kl_estimate", "masked_mean")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Relative errors that are allowed: 32 roundings of float32; one rounding of the operands of a 16-bit product and one
# of the finished gradient. Log-probabilities and losses of 16-bit inputs are held to float32.
EXACT, ROUNDED = 32 * 2.0**-24, {torch.bfloat16: 3 * 2.0**-9, torch.float16: 3 * 2.0**-12}
N, H, V = 96, 64, 1000


def inputs(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"hidden": (3 * randn(N, H)).to(dtype), "weight": (randn(V, H) / H**0.5).to(dtype)}
    tensors |= {name: randn(N) / 4 - 3 for name in ("logprobs", "old_logprobs", "ref_logprobs")}
    tensors |= {"advantages": randn(N), "weights": torch.full((N,), 1 / N)}
    tensors |= {"targets": torch.randint(0, V, (N,), generator=generator)}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def _linear_logprob(t: dict[str, Tensor], backend: str) -> list[Tensor]:
    outputs = linear_logprob(t["hidden"], t["weight"], t["targets"], return_entropy=True, backend=backend)
    return [*outputs, *_gradients(outputs[0].sum() - outputs[1].sum(), [t["hidden"], t["weight"]])]


def _policy_loss(t: dict[str, Tensor], backend: str) -> list[Tensor]:
    old, ref = t["old_logprobs"], t["ref_logprobs"]
    result = policy_loss(
        t["logprobs"], t["advantages"], t["weights"], PolicyObjective(beta=0.1), old_logprobs=old, ref_logprobs=ref,
        backend=backend,
    )  # fmt: skip
    return [result.loss, *_gradients(result.loss, [t["logprobs"]])]


def _linear_policy_loss(t: dict[str, Tensor], backend: str) -> list[Tensor]:
    result = linear_policy_loss(
        t["hidden"], t["weight"], t["targets"], t["advantages"], t["weights"], PolicyObjective(), backend=backend
    )
    return [result.loss, result.logprobs, *_gradients(result.loss, [t["hidden"], t["weight"]])]


def _kl_estimate(t: dict[str, Tensor], backend: str) -> list[Tensor]:
    kl = kl_estimate(t["logprobs"], t["ref_logprobs"], backend=backend)
    return [kl, *_gradients(kl.sum(), [t["logprobs"]])]


def _masked_mean(t: dict[str, Tensor], backend: str) -> list[Tensor]:
    mean = masked_mean(t["hidden"], t["targets"][:, None] % 2 == 0, 0, backend=backend)
    return [mean, *_gradients(mean.sum(), [t["hidden"]])]


CHECKS: dict[str, Callable[[dict[str, Tensor], str], list[Tensor]]] = {
    "linear_logprob": _linear_logprob,
    "policy_loss": _policy_loss,
    "linear_policy_loss": _linear_policy_loss,
    "kl_estimate": _kl_estimate,
    "masked_mean": _masked_mean,
}


def worst_share(operation: str, dtype: torch.dtype, device: torch.device, backend: str) -> float:
    """The largest error of the operation's results, as a share of what is allowed; NaN counts as infinite."""
    given = inputs(dtype, device)

    def leaves(kind: torch.dtype | None) -> dict[str, Tensor]:
        return {
            name: tensor.detach().to(kind or tensor.dtype).requires_grad_(tensor.is_floating_point())
            if tensor.is_floating_point()
            else tensor
            for name, tensor in given.items()
        }

    results, truth = CHECKS[operation](leaves(None), backend), CHECKS[operation](leaves(torch.float64), "reference")
    shares = []
    for result, exact in zip(results, truth, strict=True):
        error = ((result.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()
        share = error / ROUNDED.get(result.dtype, EXACT)
        shares.append(share if share == share else float("inf"))
    return max(shares)


def backends(device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    if triton_obstacle(device, dtype) is None:
        yield "triton"
    yield "torch"


def describe(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device}: {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    from grpo_kernels.triton_kernels.launch import device_name

    return f"{device}: {properties.name}, {device_name(device)}, {properties.total_memory / 2**30:.0f} GiB"


def version(package: str) -> str:
    return metadata.version(package) if importlib.util.find_spec(package) else "not installed"


def main() -> int:
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] or [torch.device("cpu")]
    versions = f"python {platform.python_version()}, torch {torch.__version__}, triton {version('triton')}"
    print(versions)
    failures = 0
    for device in devices:
        print(describe(device))
        obstacle = triton_obstacle(device, torch.float32)
        print(f"  Triton kernels: {'yes' if obstacle is None else 'no, ' + obstacle}")
        for operation in OPERATIONS:
            chosen = {backend_name(operation, "auto", device, dtype) for dtype in DTYPES[:3]}
            print(f"  {operation:20} backend='auto' takes {' or '.join(sorted(chosen))}")
        started = time.perf_counter()
        for operation in OPERATIONS:
            for dtype in DTYPES:
                for backend in backends(device, dtype):
                    share = worst_share(operation, dtype, device, backend)
                    failures += share > 1
                    verdict = "ok" if share <= 1 else "WRONG"
                    name = str(dtype).removeprefix("torch.")
                    print(f"  {operation:20} {name:9} {backend:7} {verdict:5} error {share:.2f} of the allowed")
        print(f"  checked in {time.perf_counter() - started:.1f} s")
    print("every result is right" if not failures else f"{failures} results are wrong; please report this output")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
