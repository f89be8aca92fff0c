"""Optimizers: updates below a weight's precision, what is refused, and state that survives a checkpoint."""

import sys
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.train import optimizers
from grpo_fast.train.optimizers import (
    OffloadedAdamW,
    build_optimizer,
    check_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
)
from support.tiny import tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")
# torchao compiles one step for every shape: few shapes here, and only where it is needed.
KINDS = ["fused", "stochastic", "offloaded", pytest.param("8bit", marks=pytest.mark.slow)]


def config(**fields) -> GRPOConfig:
    return GRPOConfig("random-llama", dataset_name="sort_digits", reward_funcs=["exact_answer"], **fields)


class Weights(nn.Module):
    """One matrix that is large enough for 8-bit moments, and one vector that is not."""

    def __init__(self, dtype, value=1.0):
        super().__init__()
        self.matrix = nn.Parameter(torch.full((32, 256), value, dtype=dtype))
        self.vector = nn.Parameter(torch.full((512,), value, dtype=dtype))


def make(kind, dtype=torch.bfloat16, **fields):
    """Weights, and the optimizer of that kind for them."""
    weights = Weights(torch.float32 if kind == "fused" else dtype)
    # The configuration allows offloading only on a GPU; on a CPU its copies are not pinned.
    fields["optim_offload"] = kind == "offloaded"
    fields["optim"] = "adamw_torch_8bit" if kind == "8bit" else "adamw_torch_fused"
    return weights, build_optimizer(weights, config(**fields))


def train(weights, optimizer, steps, seed=None):
    """Steps with a constant gradient, or with random ones."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in weights.parameters():
            random = torch.ones(p.shape) if seed is None else torch.randn(p.shape, generator=generator)
            p.grad = random.to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_optimizers_keep_small_updates_of_bfloat16_weights(kind):
    """300 steps of 1e-6 at a weight of 1, where bfloat16's spacing is 2**-8 below and 2**-7 above.

    Stochastic rounding has a standard deviation: a weight is 1 - 2**-8 with probability 300e-6 · 2**8 = 0.077, so the
    mean over n weights is off by 2**-8 · sqrt(0.077 · 0.923 / n), 1.2e-5 for 8192 and 4.6e-5 for 512 of them.
    """
    torch.manual_seed(0)
    weights, optimizer = make(kind, learning_rate=1e-6)
    train(weights, optimizer, 300)
    for p in weights.parameters():
        moved = 1 - p.double().mean().item()
        if kind == "offloaded":
            # The masters are exact; their bfloat16 copies follow when half a spacing is reached.
            assert moved == 0
            moved = 1 - optimizer.state[p]["master"].double().mean().item()
        noise = {"fused": 0, "offloaded": 0}.get(kind, 2**-8 * (0.077 * 0.923 / p.numel()) ** 0.5)
        assert moved == pytest.approx(300e-6, abs=4 * noise + 300e-6 * 0.02)


def test_offloaded_adamw_copies_masters_to_the_weights():
    weights, optimizer = make("offloaded", learning_rate=1e-6)
    train(weights, optimizer, 2200)
    for p in weights.parameters():
        assert torch.equal(p, torch.full_like(p, 1 - 2**-8))  # 1 - 0.0022, rounded to nearest


def test_plain_adamw_loses_small_updates():
    weights = Weights(torch.bfloat16)
    optimizer = torch.optim.AdamW(weights.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    train(weights, optimizer, 300)
    assert all(torch.equal(p, torch.ones_like(p)) for p in weights.parameters())


def test_optimizers_keep_the_second_moment_in_float32():
    """Its updates are a thousandth: in bfloat16 it would stop at a quarter of the squared gradient."""
    for kind in ("stochastic", "offloaded"):
        weights, optimizer = make(kind, learning_rate=1e-6)
        train(weights, optimizer, 600)
        for p in weights.parameters():
            expected = 1 - 0.999**600
            assert optimizer.state[p]["exp_avg_sq"].mean().item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["stochastic", "offloaded"])
def test_optimizers_follow_torch_for_float32_weights(kind):
    """Without rounding they are torch's AdamW."""
    fields = {"learning_rate": 1e-2, "weight_decay": 0.1}
    expected, reference = make("fused", **fields)
    got = Weights(torch.float32)
    groups = [{"params": [got.matrix], "weight_decay": 0.1}, {"params": [got.vector]}]
    optimizer = (optimizers.StochasticAdamW if kind == "stochastic" else OffloadedAdamW)(groups, lr=1e-2)
    for weights, one in ((expected, reference), (got, optimizer)):
        train(weights, one, 5, seed=1)
    for a, b in zip(expected.parameters(), got.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_optimizer_tensors_restore_the_state_bit_for_bit(kind):
    """Six steps at once, or three, a file, and three more with a new optimizer."""
    weights, optimizer = make(kind, learning_rate=1e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train(weights, optimizer, 3, seed=1)
    scheduler.step()
    file = save(optimizer_tensors(optimizer))
    model = {name: tensor.clone() for name, tensor in weights.state_dict().items()}
    torch.manual_seed(7)
    train(weights, optimizer, 3, seed=2)

    again, resumed = make(kind, learning_rate=1e-3, weight_decay=0.1)
    again.load_state_dict(model)
    load_optimizer_tensors(resumed, load(file))
    assert float(resumed.param_groups[0]["lr"]) == pytest.approx(5e-4)
    torch.manual_seed(7)
    train(again, resumed, 3, seed=2)

    assert all(torch.equal(a, b) for a, b in zip(weights.parameters(), again.parameters(), strict=True))
    left, right = optimizer_tensors(optimizer), optimizer_tensors(resumed)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left)
    moments = {"8bit": "0.exp_avg.codes"}.get(kind, "0.exp_avg")
    assert left[moments].dtype == (torch.uint8 if kind == "8bit" else torch.float32)
    assert left["1.exp_avg_sq"].dtype == torch.float32
    assert all(a.data_ptr() != b.data_ptr() for a, b in pairwise(left.values()))


def test_stochastic_adamw_resumes_whatever_the_random_state():
    """Its random numbers follow from the seed and the number of the step, and differ from tensor to tensor."""
    weights, optimizer = make("stochastic", learning_rate=1e-4, seed=5)
    train(weights, optimizer, 2, seed=1)
    file = save(optimizer_tensors(optimizer))
    again, resumed = make("stochastic", learning_rate=1e-4, seed=5)
    again.load_state_dict(weights.state_dict())
    load_optimizer_tensors(resumed, load(file))
    other, differs = make("stochastic", learning_rate=1e-4, seed=6)
    other.load_state_dict(weights.state_dict())
    load_optimizer_tensors(differs, load(file))
    for state, (model, one) in enumerate(((weights, optimizer), (again, resumed), (other, differs))):
        torch.manual_seed(state)
        train(model, one, 2, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(weights.parameters(), again.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights.parameters(), other.parameters(), strict=True))
    assert all(resumed.state[p]["step"].device.type == "cpu" for p in again.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_load_state_dict_restores_the_state(kind):
    weights, optimizer = make(kind, learning_rate=1e-3)
    train(weights, optimizer, 2, seed=1)
    again, resumed = make(kind, learning_rate=1e-3)
    resumed.load_state_dict(optimizer.state_dict())
    for p, q in zip(weights.parameters(), again.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            other = resumed.state[q][key]
            assert type(other) is type(value)
            if hasattr(value, "dequantize") and hasattr(value, "codes"):
                value, other = value.dequantize(), other.dequantize()
            assert value.dtype == other.dtype
            assert torch.equal(value, other)


def test_load_optimizer_tensors_refuses_another_model():
    weights, optimizer = make("fused")
    train(weights, optimizer, 1)
    tensors = optimizer_tensors(optimizer)
    other = nn.Linear(256, 31)
    with pytest.raises(UserError, match=r"tensor 0 has shape \(32, 256\), but the model's tensor has \(31, 256\)"):
        load_optimizer_tensors(build_optimizer(other, config()), tensors)
    with pytest.raises(UserError, match="holds tensor 1, but the model trains 1"):
        load_optimizer_tensors(build_optimizer(nn.Linear(256, 32, bias=False), config()), tensors)


@pytest.mark.parametrize(
    ("fields", "device", "words"),
    [
        ({"optim": "adamw_8bit"}, CPU, "optim='adamw_8bit' needs a GPU"),
        ({"optim": "paged_adamw_8bit"}, CPU, "optim='paged_adamw_8bit' needs a GPU"),
        ({"optim_offload": True}, CPU, "optim_offload=True needs a GPU"),
        ({"optim_offload": True, "optim": "adamw_8bit"}, GPU, "not 'adamw_8bit'"),
        ({"optim_offload": True, "optim": "adamw_torch_8bit"}, CPU, "not 'adamw_torch_8bit'"),
    ],
)
def test_check_optimizer_refuses_unsuitable_devices(fields, device, words):
    with pytest.raises(UserError, match=words):
        check_optimizer(config(**fields), device)


@pytest.mark.parametrize(("optim", "module"), [("adamw_torch_8bit", "torchao"), ("adamw_8bit", "bitsandbytes")])
def test_check_optimizer_without_the_extra(optim, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"'?{module}'? is not installed.*grpo-fast\[lowbit\]"):
        check_optimizer(config(optim=optim), GPU)


def test_check_optimizer_without_a_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"C\+\+ compiler"):
        check_optimizer(config(optim="adamw_torch_8bit"), CPU)


def test_build_optimizer_refuses_weights_that_would_not_move():
    with pytest.raises(UserError, match="would lose small updates of bfloat16"):
        build_optimizer(tiny_model(torch.bfloat16), config(optim="adamw_8bit"))
    with pytest.raises(UserError, match=r"torch\.float16 are not trained"):
        build_optimizer(tiny_model(torch.float16), config())


def test_build_optimizer_refuses_frozen_float16_weights():
    model = tiny_model(torch.float16).requires_grad_(False)
    model.register_parameter("adapter", torch.nn.Parameter(torch.zeros(2, 2)))
    with pytest.raises(UserError, match=r"float16 weights.*loss scale.*use dtype float32 or bfloat16"):
        build_optimizer(model, config())
    build_optimizer(model.bfloat16().float(), config())


def test_build_optimizer_does_not_decay_norms():
    model = tiny_model(torch.bfloat16)
    optimizer = build_optimizer(model, config(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert decay[id(p)] == (0 if "norm" in name else 0.1)
