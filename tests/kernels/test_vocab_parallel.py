"""A head in two shards of the vocabulary, on two processes, equals the whole head."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from grpo_kernels import PolicyObjective, linear_logprob, linear_policy_loss
from support.supports import random_support

H, V, CUT = 17, 259, 150
CASES = {
    "plain": ({}, {}),
    "options": ({"softcap": 4.0, "temperature": 0.7, "logit_scale": 1.3}, {"beta": 0.1, "entropy_coef": 0.2}),
    "sequence": ({}, {"level": "sequence"}),
    "several chunks": ({"max_buffer_bytes": 20_000}, {"entropy_coef": 0.1}),
    # Few kept ids are gathered, many mask the logits; some rows keep none in one of the shards.
    "few kept ids": ({"kept": 4, "softcap": 4.0, "temperature": 0.7}, {"entropy_coef": 0.2}),
    "many kept ids": ({"kept": 200, "logit_scale": 1.3}, {"entropy_coef": 0.2}),
}


# Backend, dtype and the allowed error; only the torch backend supports float64.
BACKENDS = {"torch": (torch.float64, 1e-12), "triton": (torch.float32, 2e-6)}


def make(trainable: bool, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(5)

    def randn(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    arguments = {"hidden": randn(4, 9, H), "weight": randn(V, H) / 3, "bias": randn(V)}
    arguments["targets"] = torch.randint(0, V, (4, 9), generator=generator)
    arguments["targets"][1, 3:] = -100
    loss = {"advantages": randn(4, 9), "weights": torch.full((4, 9), 1 / 36)}
    loss |= {"old_logprobs": randn(4, 9) - 6, "ref_logprobs": randn(4, 9) - 6}
    for name in ("hidden", "weight", "bias"):
        arguments[name].requires_grad_(trainable or name == "hidden")
    return arguments, loss


def outputs(arguments, loss, options, objective, backend, group=None):
    """Values, and gradients of both operations added up."""
    options = {**options, "process_group": group, "backend": backend}
    if (kept := options.pop("kept", None)) is not None:
        torch.manual_seed(7)
        options["support"] = random_support(arguments["targets"], V, kept)
    logprobs, entropy = linear_logprob(**arguments, **options, return_entropy=True)
    upstream = torch.linspace(-1, 1, 36).view(4, 9)
    (logprobs * upstream + entropy * upstream.flip(0)).sum().backward()
    objective = PolicyObjective(epsilon=0.9, **objective)
    result = linear_policy_loss(**arguments, **loss, **options, objective=objective)
    result.loss.backward()
    values = [logprobs, entropy, result.loss, result.logprobs, *result.stats.values()]
    return [v.detach() for v in values], [arguments[name].grad for name in ("hidden", "weight", "bias")]


def shard(rank: int, store: str, trainable: bool, backend: str):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    try:
        dtype, allowed = BACKENDS[backend]
        for name, (options, objective) in CASES.items():
            if "kept" in options and not trainable:
                continue
            whole, loss = make(trainable, dtype)
            expected, expected_grads = outputs(whole, loss, options, objective, backend)
            part = slice(0, CUT) if rank == 0 else slice(CUT, V)
            mine, loss = make(trainable, dtype)
            for leaf in ("weight", "bias"):
                mine[leaf] = mine[leaf].detach()[part].clone().requires_grad_(trainable)
            got, grads = outputs(mine, loss, options, objective, backend, dist.group.WORLD)
            pairs = [*zip(got, expected, strict=True), (grads[0], expected_grads[0])]
            if trainable:
                pairs += [(grads[1], expected_grads[1][part]), (grads[2], expected_grads[2][part])]
            for a, b in pairs:
                assert (a - b).norm() <= allowed * max(b.norm().item(), 1.0), name
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trainable", [True, False])
def test_two_shards_equal_the_whole_head(trainable, backend, tmp_path):
    mp.spawn(shard, args=(str(tmp_path / "store"), trainable, backend), nprocs=2)


COLLECTIVES = ("all_gather", "all_reduce", "broadcast", "all_gather_into_tensor")


def count_collectives(rank: int, store: str, backend: str):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    arguments, _ = make(False, torch.float32)
    part = slice(0, CUT) if rank == 0 else slice(CUT, V)
    arguments |= {name: arguments[name].detach()[part] for name in ("weight", "bias")}
    # A TorchDispatchMode would make torch keep the group until the process exits, which may abort it.
    with mock.patch.multiple(dist, **{name: mock.Mock(wraps=getattr(dist, name)) for name in COLLECTIVES}):
        linear_logprob(**arguments, process_group=dist.group.WORLD, backend=backend).sum().backward()
        count = {name: getattr(dist, name).call_count for name in COLLECTIVES}
        again = linear_logprob(**arguments, process_group=dist.group.WORLD, backend=backend)
        gathered = dist.all_gather.call_count
        # Other weights: this rank's shard is as long as before in the first, the other one's is not.
        for cut in (CUT, CUT + 10):
            whole, _ = make(False, torch.float32)
            part = slice(0, CUT) if rank == 0 else slice(CUT, 2 * CUT - cut + V - CUT)
            cut_off = {name: whole[name].detach()[: 2 * CUT - cut + V - CUT] for name in ("weight", "bias")}
            expected = linear_logprob(**whole | cut_off | {"targets": whole["targets"] % CUT}, backend=backend)
            mine = {name: whole[name].detach()[part].clone() for name in ("weight", "bias")}
            found = linear_logprob(
                **whole | mine | {"targets": whole["targets"] % CUT}, process_group=dist.group.WORLD, backend=backend
            )
            assert (found - expected).abs().max() < 1e-4
        regathered = dist.all_gather.call_count
    dist.destroy_process_group()
    # One exchange of the shards' sizes; maxima and sums; the hidden states' gradient.
    assert count == {"all_gather": 1, "all_reduce": 3, "broadcast": 0, "all_gather_into_tensor": 0}, count
    # The sizes of a weight's shards are exchanged once.
    assert (gathered, regathered) == (1, 3)
    assert again.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_collectives_of_one_forward_and_backward(backend, tmp_path):
    mp.spawn(count_collectives, args=(str(tmp_path / "store"), backend), nprocs=2)
