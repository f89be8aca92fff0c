"""verl's call: values and gradients compared with full logits, in one process and in vocabulary shards."""

import sys
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from grpo_fast.errors import UserError
from grpo_fast.integrations import verl as integration
from support.oracle import relative_error

H, V, CUT = 17, 259, 150
# float32 against float64
TOLERANCE = 1e-5


def make(trainable=True):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(3, 7, H, generator=generator).requires_grad_()
    weight = (torch.randn(V, H, generator=generator) / 3).requires_grad_(trainable)
    return hidden, weight, torch.randint(0, V, (3, 7), generator=generator)


def full_logits(hidden, weight, labels, temperature):
    logits = hidden.double() @ weight.double().T / torch.as_tensor(temperature, dtype=torch.float64).unsqueeze(-1)
    distribution = torch.distributions.Categorical(logits=logits)
    return distribution.log_prob(labels).flatten(), distribution.entropy().flatten()


def backward(logprobs, entropy):
    """Different gradients for every token; none for some log-probabilities."""
    upstream = torch.linspace(-1, 1, entropy.numel(), dtype=entropy.dtype)
    ((upstream[2:] * logprobs[2:]).sum() + (upstream.flip(0) * entropy).sum()).backward()


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7, torch.linspace(0.5, 2, 21).view(3, 7)], ids=["1", "0.7", "tokens"])
def test_linear_cross_entropy_equals_full_logits(temperature, trainable):
    leaves, exact = make(trainable), make(trainable)
    got = integration.linear_cross_entropy(*leaves, temperature)
    wanted = full_logits(*exact, temperature)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == (21,)
        assert a.dtype == torch.float32
        assert relative_error(a, b) < TOLERANCE
    backward(*got)
    backward(*wanted)
    assert leaves[0].grad.shape == (3, 7, H)
    assert relative_error(leaves[0].grad, exact[0].grad) < TOLERANCE
    if trainable:
        assert relative_error(leaves[1].grad, exact[1].grad) < TOLERANCE


@pytest.mark.parametrize("reduction", ["sum", "mean", "SUM"])
def test_linear_cross_entropy_reductions(reduction):
    leaves, exact = make(), make()
    logprobs, entropy = integration.linear_cross_entropy(*leaves, 1.0, reduction)
    wanted, wanted_entropy = full_logits(*exact, 1.0)
    wanted = getattr(wanted, reduction.lower())()
    assert logprobs.shape == ()
    assert relative_error(logprobs, wanted) < TOLERANCE
    assert relative_error(entropy, wanted_entropy) < TOLERANCE
    logprobs.backward()
    wanted.backward()
    assert relative_error(leaves[0].grad, exact[0].grad) < TOLERANCE


def test_linear_cross_entropy_defaults_and_refusals():
    leaves = make()
    a, b = integration.linear_cross_entropy(*leaves, None, None), integration.linear_cross_entropy(*leaves)
    assert torch.equal(a[0], b[0])
    with pytest.raises(ValueError, match="reduction='median' is unknown"):
        integration.linear_cross_entropy(*leaves, 1.0, "median")


def shard(rank: int, store: str):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    part = slice(0, CUT) if rank == 0 else slice(CUT, V)
    for trainable in (True, False):
        exact = make(trainable)
        wanted = full_logits(*exact, 0.7)
        backward(*wanted)
        hidden, whole, labels = make(trainable)
        weight = whole.detach()[part].clone().requires_grad_(trainable)
        got = integration.linear_cross_entropy(hidden, weight, labels, 0.7, "none", dist.group.WORLD)
        backward(*got)
        # The ranks' gradients add up, as under Megatron's sequence-parallel gather.
        dist.all_reduce(hidden.grad)
        for a, b in [*zip(got, wanted, strict=True), (hidden.grad, exact[0].grad)]:
            assert relative_error(a, b) < TOLERANCE
        if trainable:
            assert relative_error(weight.grad, exact[1].grad[part]) < TOLERANCE
    dist.destroy_process_group()


def test_linear_cross_entropy_in_vocabulary_shards(tmp_path):
    mp.spawn(shard, args=(str(tmp_path / "store"),), nprocs=2)


def test_install_replaces_verls_function(monkeypatch):
    """Every module in which verl has the name, with modules that replace verl's."""
    names = [integration.OWNER, integration.IMPORTERS[0]]
    parents = {name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)}
    for name in sorted(parents | set(names)):
        module = ModuleType(name)
        module.__path__ = []
        module.linear_cross_entropy = None
        monkeypatch.setitem(sys.modules, name, module)
    integration.install()
    assert all(sys.modules[name].linear_cross_entropy is integration.linear_cross_entropy for name in names)


def test_install_without_verl_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(UserError, match=r"pip install 'grpo-fast\[verl\]'"):
        integration.install()


def test_install_with_verls_own_forward(monkeypatch):
    """With verl installed: its forward of a transformers model, with our function instead of its kernel."""
    pytest.importorskip("verl")
    import verl.utils.kernel.linear_cross_entropy as owner
    from verl.models.transformers import dense_common

    from grpo_fast.integrations.verl import install
    from support.tiny import tiny_model

    monkeypatch.setattr(owner, "linear_cross_entropy", None)
    install()
    model = tiny_model(torch.float32)
    ids, found = torch.randint(0, 41, (1, 33)), []
    for forward in (dense_common.forward_with_triton_backend, dense_common.forward_with_torch_backend):
        model.zero_grad()
        output = forward(model, input_ids=ids, temperature=0.7, return_dict=True)
        backward(output.log_probs.flatten(), output.entropy.flatten())
        grad = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append((output.log_probs.flatten(), output.entropy.flatten(), grad))
    for a, b in zip(*found, strict=True):
        assert relative_error(a, b) < TOLERANCE


def test_arguments_of_wrong_type_are_refused_in_one_line():
    hidden, weight, labels = make()
    wrong = [
        ((hidden, weight, labels.tolist()), "labels must be a tensor, got list"),
        ((hidden, weight.detach().to(torch.float8_e4m3fn), labels), r"weight is quantised \(torch.float8_e4m3fn\)"),
        ((hidden, weight.detach().to("meta"), labels), "weight is on meta"),
        *(((hidden, weight, labels, t), "temperature must be a number") for t in (0, "0.7", float("inf"), 1e-45, True)),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message) as caught:
            integration.linear_cross_entropy(*arguments)
        assert "\n" not in str(caught.value)
