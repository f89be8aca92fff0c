"""Do the operations run on this machine, and are they right? ``python -m grpo_kernels.doctor``

With ``--head H,V --tokens N`` it predicts instead what such a head takes on a GPU, which need not be at hand:
`grpo_kernels.cost_model`.

Prints versions, devices and the backend of each operation, then compares every operation with its definition in
float64 on random inputs, for each dtype and backend that can run here. Takes about five seconds (on a GPU, the kernels
are compiled first). The exit status is 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata

import torch
from torch import Tensor

from grpo_kernels import PolicyObjective, kl_estimate, linear_logprob, linear_policy_loss, masked_mean, policy_loss
from grpo_kernels._backend import choose_backend, triton_obstacle

Outputs = tuple[list[Tensor], list[str]]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Allowed relative errors: 32 roundings of float32; one rounding of the operands of a 16-bit product and one of the
# finished gradient. Log-probabilities and losses of 16-bit inputs must have float32's accuracy.
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


def _policy_loss(t: dict[str, Tensor], backend: str) -> Outputs:
    loss = policy_loss(
        t["logprobs"], t["advantages"], t["weights"], PolicyObjective(beta=0.1), old_logprobs=t["old_logprobs"],
        ref_logprobs=t["ref_logprobs"], backend=backend,
    ).loss  # fmt: skip
    return [loss], ["logprobs"]


def _linear_policy_loss(t: dict[str, Tensor], backend: str) -> Outputs:
    names = ("hidden", "weight", "targets", "advantages", "weights")
    result = linear_policy_loss(*(t[name] for name in names), backend=backend)
    return [result.loss, result.logprobs], ["hidden", "weight"]


def _linear_logprob(t: dict[str, Tensor], backend: str) -> Outputs:
    outputs = linear_logprob(t["hidden"], t["weight"], t["targets"], return_entropy=True, backend=backend)
    return list(outputs), ["hidden", "weight"]


# operation -> a call of it: the outputs, and the names of the inputs to differentiate in
CHECKS: dict[str, Callable[[dict[str, Tensor], str], Outputs]] = {
    "linear_logprob": _linear_logprob,
    "policy_loss": _policy_loss,
    "linear_policy_loss": _linear_policy_loss,
    "kl_estimate": lambda t, backend: (
        [kl_estimate(t["logprobs"], t["ref_logprobs"], backend=backend)], ["logprobs"]
    ),
    "masked_mean": lambda t, backend: (
        [masked_mean(t["hidden"], t["targets"][:, None] % 2 == 0, 0, backend=backend)], ["hidden"]
    ),
}  # fmt: skip


def results(operation: str, given: dict[str, Tensor], dtype: torch.dtype | None, backend: str) -> list[Tensor]:
    """Outputs and gradients of the operation on `given`, whose floating-point tensors are cast to `dtype`, if any."""
    leaves = {
        name: tensor.detach().to(dtype or tensor.dtype).requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in given.items()
    }
    outputs, names = CHECKS[operation](leaves, backend)
    # The outputs with opposite signs, so that none hides behind another.
    loss = sum(sign * out.sum() for sign, out in zip((1, -1), outputs, strict=False) if out.requires_grad)
    return [*outputs, *torch.autograd.grad(loss, [leaves[name] for name in names])]


def worst_share(operation: str, dtype: torch.dtype, device: torch.device, backend: str) -> float:
    """The largest error of the operation's results, as a share of the allowed error; NaN counts as infinite."""
    given = inputs(dtype, device)
    shares = []
    found, truth = results(operation, given, None, backend), results(operation, given, torch.float64, "reference")
    for result, exact in zip(found, truth, strict=True):
        error = ((result.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()
        share = error / ROUNDED.get(result.dtype, EXACT)
        shares.append(share if share == share else float("inf"))
    return max(shares)


def describe(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device}: {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    from grpo_kernels.triton_kernels.launch import device_name

    return f"{device}: {properties.name}, {device_name(device)}, {properties.total_memory / 2**30:.0f} GiB"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def _whole(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: it must be a number from 1 on")
    return int(text)


def _sizes(text: str) -> tuple[int, int]:
    sizes = text.split(",")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: it must be H,V, as in 4096,151936")
    return int(sizes[0]), int(sizes[1])


def parser() -> argparse.ArgumentParser:
    description = "Which kernels run on this machine, and whether their results are right; or what a head would take."
    parser = _Parser(prog="doctor", description=description, allow_abbrev=False)
    parser.add_argument(
        "--head", type=_sizes, metavar="H,V", help="predict the time of a head: hidden size, vocabulary"
    )
    parser.add_argument("--tokens", type=_whole, metavar="N", help="tokens for --head (default: 16384)")
    parser.add_argument("--device", choices=("h100", "h200"), help="for --head (default: both)")
    return parser


def main(argv: Sequence[str] = ()) -> int:
    """Check the operations or, with --head, print predictions. Returns the exit status, 2 for wrong arguments."""
    try:
        chosen = parser().parse_args(argv)
        if chosen.head is None and (chosen.tokens or chosen.device):
            raise ValueError("--tokens and --device need --head H,V")
    except ValueError as error:
        print(f"doctor: error: {error}", file=sys.stderr)
        return 2
    return predict(*chosen.head, chosen.tokens or 16384, chosen.device) if chosen.head else check()


def predict(hidden: int, vocabulary: int, tokens: int, device: str | None) -> int:
    if importlib.util.find_spec("triton") is None:
        print("doctor: error: --head reads the Triton kernels; pip install triton", file=sys.stderr)
        return 2
    from grpo_kernels.cost_model import GPUS, report

    print(report(tokens, hidden, vocabulary, [device] if device else list(GPUS)))
    return 0


def check() -> int:
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] or [torch.device("cpu")]
    triton = metadata.version("triton") if importlib.util.find_spec("triton") else "not installed"
    print(f"python {platform.python_version()}, torch {torch.__version__}, triton {triton}")
    failures = 0
    for device in devices:
        print(describe(device))
        obstacle = triton_obstacle(device, torch.float32)
        print(f"  Triton kernels: {'yes' if obstacle is None else 'no, ' + obstacle}")
        for operation in CHECKS:
            chosen = {choose_backend(operation, "auto", device, dtype) for dtype in DTYPES[:3]}
            print(f"  {operation:20} backend='auto' takes {' or '.join(sorted(chosen))}")
        started = time.perf_counter()
        for operation in CHECKS:
            for dtype in DTYPES:
                for backend in ("torch",) if triton_obstacle(device, dtype) else ("triton", "torch"):
                    share = worst_share(operation, dtype, device, backend)
                    failures += share > 1
                    verdict = "ok" if share <= 1 else "WRONG"
                    name = str(dtype).removeprefix("torch.")
                    print(f"  {operation:20} {name:9} {backend:7} {verdict:5} error {share:.2f} of the allowed")
        print(f"  checked in {time.perf_counter() - started:.1f} s")
    print("every result is right" if not failures else f"{failures} results are wrong; please report this output")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
