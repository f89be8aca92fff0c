"""A head in two shards of the vocabulary, on two processes, equals the whole head."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from grpo_kernels import PolicyObjective, linear_logprob, linear_policy_loss

H, V, CUT = 17, 259, 150
CASES = {
    "plain": ({}, {}),
    "options": ({"softcap": 4.0, "temperature": 0.7, "logit_scale": 1.3}, {"beta": 0.1, "entropy_coef": 0.2}),
    "sequence": ({}, {"level": "sequence"}),
    "several chunks": ({"max_buffer_bytes": 20_000}, {"entropy_coef": 0.1}),
}


def make(trainable: bool):
    generator = torch.Generator().manual_seed(5)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    arguments = {"hidden": randn(4, 9, H), "weight": randn(V, H) / 3, "bias": randn(V)}
    arguments["targets"] = torch.randint(0, V, (4, 9), generator=generator)
    arguments["targets"][1, 3:] = -100
    loss = {"advantages": randn(4, 9), "weights": torch.full((4, 9), 1 / 36, dtype=torch.float64)}
    loss |= {"old_logprobs": randn(4, 9) - 6, "ref_logprobs": randn(4, 9) - 6}
    for name in ("hidden", "weight", "bias"):
        arguments[name].requires_grad_(trainable or name == "hidden")
    return arguments, loss


def outputs(arguments, loss, options, objective, group=None):
    """Values, and gradients of both operations added up."""
    logprobs, entropy = linear_logprob(**arguments, **options, return_entropy=True, process_group=group)
    upstream = torch.linspace(-1, 1, 36, dtype=torch.float64).view(4, 9)
    (logprobs * upstream + entropy * upstream.flip(0)).sum().backward()
    objective = PolicyObjective(epsilon=0.9, **objective)
    result = linear_policy_loss(**arguments, **loss, **options, objective=objective, process_group=group)
    result.loss.backward()
    values = [logprobs, entropy, result.loss, result.logprobs, *result.stats.values()]
    return [v.detach() for v in values], [arguments[name].grad for name in ("hidden", "weight", "bias")]


def shard(rank: int, store: str, trainable: bool):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    try:
        for name, (options, objective) in CASES.items():
            whole, loss = make(trainable)
            expected, expected_grads = outputs(whole, loss, options, objective)
            part = slice(0, CUT) if rank == 0 else slice(CUT, V)
            mine, loss = make(trainable)
            for leaf in ("weight", "bias"):
                mine[leaf] = mine[leaf].detach()[part].clone().requires_grad_(trainable)
            got, grads = outputs(mine, loss, options, objective, dist.group.WORLD)
            pairs = [*zip(got, expected, strict=True), (grads[0], expected_grads[0])]
            if trainable:
                pairs += [(grads[1], expected_grads[1][part]), (grads[2], expected_grads[2][part])]
            for a, b in pairs:
                assert (a - b).norm() <= 1e-12 * max(b.norm().item(), 1.0), name
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("trainable", [True, False])
def test_two_shards_equal_the_whole_head(trainable, tmp_path):
    mp.spawn(shard, args=(str(tmp_path / "store"), trainable), nprocs=2)
