"""A bfloat16 head on a CPU: products read only the memory of their operands, and change no setting of torch."""

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo_kernels import linear_logprob, linear_policy_loss
from support.oracle import SLACK, relative_error

LEAVES = ("hidden", "weight")


def make(N, H, V, trainable="hw"):
    arguments = {
        "hidden": torch.randn(N, H).bfloat16(),
        "weight": (torch.randn(V, H) / H**0.5).bfloat16(),
        "targets": torch.randint(0, V, (N,)),
    }
    for name in LEAVES:
        arguments[name].requires_grad_(name[0] in trainable)
    return arguments


def from_logprobs(arguments, **options):
    logprobs = linear_logprob(**arguments, **options)
    return logprobs, (logprobs * torch.linspace(-1, 1.3, len(logprobs))).sum()


def from_loss(arguments, **options):
    advantages, weights = torch.linspace(-1, 1.3, len(arguments["targets"])), torch.ones(len(arguments["targets"]))
    result = linear_policy_loss(**arguments, advantages=advantages, weights=weights, **options)
    return result.logprobs, result.loss


def outcome(run, arguments, **options):
    """Log-probabilities and gradients, by name."""
    leaves = {name: arguments[name] for name in LEAVES if arguments[name].requires_grad}
    logprobs, loss = run(arguments, **options)
    return {"logprobs": logprobs.detach(), **dict(zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True))}


class TilesReadOn(TorchDispatchMode):
    """bfloat16 products as AMX tiles compute them: 32 columns at a time if the rows are far enough apart.

    Memory beyond the last column is multiplied by 0, so a NaN there makes the product NaN.
    """

    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            first = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)][-2]
            if first.dtype == torch.bfloat16:
                self.products += 1
                if self.reads_on(first):
                    out.fill_(float("nan"))
        return out

    def reads_on(self, matrix) -> bool:
        columns, (to_row, to_column) = matrix.shape[1], matrix.stride()
        if columns % 32 == 0:
            return False
        if to_column == 1:
            return to_row > columns
        end = matrix.storage_offset() + columns * to_column
        return end < matrix.untyped_storage().nbytes() // matrix.element_size()


@pytest.mark.parametrize("run", [from_logprobs, from_loss])
@pytest.mark.parametrize("trainable", ["hw", "h"])
@pytest.mark.parametrize("budget", [None, 40_000])
@pytest.mark.parametrize("V", [33, 100, 250, 1000])
def test_linear_operations_when_products_read_beyond_the_last_column(V, budget, trainable, run):
    arguments = make(9, 16, V, trainable)
    expected = outcome(run, arguments, max_buffer_bytes=budget)
    with TilesReadOn() as tiles:
        found = outcome(run, arguments, max_buffer_bytes=budget)
    assert tiles.products > 0
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("run", [from_logprobs, from_loss])
@pytest.mark.parametrize("trainable", ["hw", "h"])
@pytest.mark.parametrize("V", [33, 100, 250, 1000, 32001, 50257])
def test_linear_operations_with_nan_between_the_rows_of_inputs(V, trainable, run):
    arguments = make(9, 40, V, trainable)
    expected = outcome(run, arguments)
    for name in LEAVES:
        matrix = arguments[name].detach()
        wide = torch.full((len(matrix) + 3, 72), float("nan"), dtype=torch.bfloat16)
        view = wide[: len(matrix), :40].copy_(matrix)
        arguments[name] = view.requires_grad_(name[0] in trainable)
    for name, value in outcome(run, arguments).items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("run", [from_logprobs, from_loss])
def test_linear_operations_without_onednn(run, monkeypatch):
    arguments = make(33, 40, 259)
    expected = outcome(run, arguments)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    found = outcome(run, arguments)
    assert relative_error(found["logprobs"], expected["logprobs"]) < SLACK[torch.float32]
    for name in LEAVES:
        assert relative_error(found[name], expected[name]) < SLACK[torch.bfloat16]


def test_linear_operations_change_no_torch_setting(monkeypatch):
    def refuse(*setting):
        raise AssertionError(f"changed for every thread: {setting}")

    for name in ("_set_fp32_precision_setter", "_set_float32_matmul_precision"):
        monkeypatch.setattr(torch._C, name, refuse)
    for run in (from_logprobs, from_loss):
        outcome(run, make(9, 16, 100))


def test_linear_logprob_is_exact_with_bf16_matmul_precision():
    arguments = make(64, 64, 4096, trainable="")
    arguments["hidden"] = (arguments["hidden"] * 6.5).bfloat16()
    logits = arguments["hidden"].double() @ arguments["weight"].double().T
    assert 25 < logits.abs().max() < 40
    exact = torch.log_softmax(logits, -1).gather(1, arguments["targets"][:, None])[:, 0]
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        found = linear_logprob(**arguments)
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before
    assert (found - exact).abs().max() <= 2e-5


def test_matmul_in_other_threads_stays_exact():
    before = torch.backends.mkldnn.matmul.fp32_precision
    a, b = torch.randn(128, 256), torch.randn(256, 128)
    exact, errors, done = a.double() @ b.double(), [0.0], threading.Event()

    def heads():
        arguments = make(64, 64, 2000)
        for _ in range(20):
            outcome(from_loss, arguments)

    def products():
        while not done.is_set():
            errors.append(((a @ b).double() - exact).abs().max().item())

    running = [threading.Thread(target=heads) for _ in range(2)]
    watching = threading.Thread(target=products)
    for thread in (*running, watching):
        thread.start()
    for thread in running:
        thread.join()
    done.set()
    watching.join()
    errors.append(((a @ b).double() - exact).abs().max().item())
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert len(errors) > 2
    assert max(errors) < 1e-4


@pytest.mark.slow
def test_linear_policy_loss_compiled_with_dynamic_shapes():
    def loss(hidden, weight, targets, advantages, weights):
        return linear_policy_loss(hidden, weight, targets, advantages, weights).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, dynamic=True, backend="aot_eager")
    for N, V in ((5, 33), (9, 100)):
        arguments = make(N, 16, V)
        rest = arguments["targets"], torch.linspace(-1, 1.3, N), torch.ones(N)
        leaves = arguments["hidden"], arguments["weight"]
        found, expected = (torch.autograd.grad(f(*leaves, *rest), leaves) for f in (compiled, loss))
        torch.testing.assert_close(found, expected)
