"""The step of AdamW on one tensor: both backends, the rounding's random numbers, and the bytes that it moves."""

import pytest
import torch
from triton.runtime import interpreter

import grpo_kernels.adamw
from conftest import DEVICE
from grpo_kernels.adamw import adamw_, draw_keys, random_bits, round_stochastically_
from grpo_kernels.cost_model import launch_step
from grpo_kernels.triton_kernels import adamw_kernels
from grpo_kernels.triton_kernels.launch import Launch, PlannedGPU, planning
from support.traffic import Accesses, Traffic

OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
BACKENDS = ["torch", "triton"]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def tensors(count, weight=BF16, grad=BF16):
    mean, square = 0.1 * torch.randn(count), 0.01 * torch.rand(count)
    return [torch.randn(count).to(weight), torch.randn(count).to(grad), mean, square]


def ordered(weights):
    """Numbers of bfloat16 values that neighbours differ in by 1."""
    bits = weights.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


# Around whole blocks of the kernel, in which its accesses have no mask.
@pytest.mark.parametrize("count", [1, 2047, 2048, 4500])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, FP32), (FP32, FP32), (FP16, FP32)], ids=str)
def test_adamw_backends_agree(dtypes, count):
    start = tensors(count, *dtypes)
    got = {backend: [tensor.clone() for tensor in start] for backend in BACKENDS}
    for step in (1, 2, 1000):
        for backend, found in got.items():
            adamw_(*found, step=step, seed=3, **OPTIONS, backend=backend)
    for a, b in zip(got["torch"][2:], got["triton"][2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    a, b = got["torch"][0], got["triton"][0]
    if dtypes[0] == BF16:
        # They differ where one rounding of float32 decides.
        apart = (ordered(a) - ordered(b)).abs()
        assert apart.max() <= 1
        assert (apart > 0).sum() <= count / 500
        # Rounding to nearest would differ in every second weight.
        assert count < 9 or (a != start[0]).any()
    else:
        torch.testing.assert_close(a, b, rtol=1e-6 if dtypes[0] == FP32 else 1e-3, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_adamw_float32_is_torchs(backend):
    start = tensors(3000, FP32, FP32)
    weight, grad, mean, square = (tensor.clone() for tensor in start)
    parameter = torch.nn.Parameter(start[0].clone())
    parameter.grad = start[1].clone()
    optimizer = torch.optim.AdamW([parameter], **OPTIONS)
    optimizer.state[parameter] = {"step": torch.tensor(6.0), "exp_avg": start[2], "exp_avg_sq": start[3]}
    optimizer.step()
    adamw_(weight, grad, mean, square, step=7, seed=0, **OPTIONS, backend=backend)
    torch.testing.assert_close(weight, parameter.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [1.0, -1.5, 3e-5, -123.0])
def test_adamw_rounds_without_bias_and_between_neighbours(value, backend):
    """Weight decay alone: the weights should be a thousandth nearer to 0."""
    count = 200_000
    weight = torch.full((count,), value, dtype=BF16)
    start, zero = weight[0].double().item(), torch.zeros(count)
    options = {**OPTIONS, "lr": 0.01}
    adamw_(weight, zero, zero.clone(), zero.clone(), step=1, seed=0, **options, backend=backend)
    exact, found = start * 0.999, weight.double()
    spacing = (found.max() - found.min()).item()
    numbers = ordered(weight)
    assert numbers.max() - numbers.min() == 1
    share = abs(start - exact) / spacing
    # Four standard deviations.
    allowed = 4 * spacing * (share * (1 - share) / count) ** 0.5
    assert found.mean().item() == pytest.approx(exact, abs=allowed + abs(exact) * 2**-23)


@pytest.mark.parametrize("other", [{"seed": (0, 1)}, {"step": 2}])
def test_adamw_random_bits_depend_on_seed_and_step_alone(other):
    def rounded(seed=(0, 0), step=1):
        values = torch.full((4096,), 1.003)
        round_stochastically_(values, draw_keys(seed, step))
        return values

    torch.manual_seed(1)
    first = rounded()
    torch.manual_seed(2)
    assert torch.equal(first, rounded())
    # Independent bits: what rounds up once does so the next time with the same probability.
    up = first > 1.003
    again = rounded(**other) > 1.003
    assert up.double().mean() == pytest.approx(0.384, abs=0.04)
    assert again[up].double().mean() == pytest.approx(0.384, abs=0.06)
    assert again[~up].double().mean() == pytest.approx(0.384, abs=0.05)


def test_random_bits_are_uniform_and_uncorrelated():
    """Chi-squared of each byte, and correlations of neighbours and of numbers 2048 apart, within five deviations."""
    count = 1 << 18
    for start in (0, (1 << 32) - 1000):
        x = random_bits(start, count, draw_keys(7, 1), torch.device("cpu"))
        for shift in (0, 8, 16, 24):
            counts = torch.bincount((x >> shift) & 255, minlength=256).double()
            chi_squared = ((counts - count / 256) ** 2 / (count / 256)).sum().item()
            assert abs(chi_squared - 255) < 5 * 510**0.5
        low = (x & 0xFFFF).double() / 65536 - 0.5
        for distance in (1, 2, 2048):
            correlation = (low[distance:] * low[:-distance]).mean().item() * 12
            assert abs(correlation) < 5 / count**0.5


def test_random_bits_of_parts_are_those_of_the_whole():
    keys, device = draw_keys(1, 1), torch.device("cpu")
    whole = random_bits(0, 100, keys, device)
    assert torch.equal(whole[37:], random_bits(37, 63, keys, device))
    assert len(whole.unique()) == 100


def test_adamw_in_parts_is_that_of_the_whole(monkeypatch):
    # Whole vectors in each part, which torch computes otherwise than a rest.
    start = tensors(960)
    results = []
    for chunk in (1 << 24, 320):
        monkeypatch.setattr(grpo_kernels.adamw, "CHUNK", chunk)
        monkeypatch.setattr(grpo_kernels.adamw, "CPU_CHUNK", chunk // 2)
        found = [tensor.clone() for tensor in start]
        adamw_(*found, step=4, seed=0, **OPTIONS, backend="torch")
        results.append(found)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_adamw_keeps_what_is_not_finite(backend):
    """A NaN whose bits are all ones, as NVIDIA's GPUs make them, would be rounded to a zero."""
    weight = torch.tensor([0x7FFF, -1, 0x7F80, -128, 0x7FC0], dtype=torch.int16).view(BF16)
    zero = torch.zeros(5)
    adamw_(weight, zero, zero.clone(), zero.clone(), step=1, seed=0, **OPTIONS, backend=backend)
    assert not weight.isfinite().any()
    values = torch.tensor([0x7FFFFFFF, -1, 0x7F800000], dtype=torch.int32).view(FP32)
    round_stochastically_(values, (5, 5))
    assert values.isnan().tolist() == [True, True, False]
    assert values[2] == torch.inf


@pytest.mark.parametrize(("dtypes", "size"), [((BF16, BF16), 22), ((BF16, FP32), 24), ((FP32, FP32), 28)], ids=str)
def test_adamw_bytes_of_a_weight(dtypes, size):
    """On a GPU one kernel and nothing else; on tensors without data, so the host cannot have waited for them."""
    count, planned = 5000, PlannedGPU("sm_90", 132)
    with torch.device("meta"):
        found = [tensor.view(100, 50) for tensor in tensors(count, *dtypes)]
    with planning(planned), Traffic() as traffic:
        adamw_(*found, step=1, seed=0, **OPTIONS, backend="triton")
    assert traffic.written == []
    (launch,) = planned.record
    step = launch_step(launch, 132)
    assert step.read + step.written == size * count


@pytest.mark.skipif(DEVICE != "cpu", reason="the kernels are interpreted")
def test_adamw_kernel_touches_the_bytes_that_are_counted(monkeypatch):
    noted = []

    def note(kernel, device, programs, *arguments, **constants):
        accesses = Accesses(interpreter._interpreter)
        with monkeypatch.context() as patch:
            patch.setattr(interpreter, "_interpreter", accesses)
            run(kernel, device, programs, *arguments, **constants)
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        noted.append((accesses, launch_step(Launch(kernel.__name__, programs, named), 2)))

    run = adamw_kernels.run_kernel
    monkeypatch.setattr(adamw_kernels, "run_kernel", note)
    adamw_(*tensors(3000), step=1, seed=0, **OPTIONS, backend="triton")
    ((accesses, step),) = noted
    assert (len(accesses.read), len(accesses.written)) == (step.read, step.written) == (12 * 3000, 10 * 3000)


def test_adamw_refuses_an_unknown_backend():
    with pytest.raises(ValueError, match="adamw_: backend"):
        adamw_(*tensors(4), step=1, seed=0, **OPTIONS, backend="cuda")
