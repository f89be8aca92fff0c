"""The example that compares PPO with GRPO: its parts in float64 against their definitions, and short runs of both."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


@pytest.fixture(scope="module")
def ppo():
    return load("ppo")


LENGTHS = [5, 1, 3]


def batch():
    torch.manual_seed(0)
    rewards, values = torch.randn(2, len(LENGTHS), 5, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    return rewards * mask, values * mask, mask


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_the_definition(ppo, gamma, lam):
    """The sum over all later temporal differences, written out for each token."""
    rewards, values, mask = batch()
    got, returns = ppo.gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(LENGTHS):
        after = [*values[row, 1:length].tolist(), 0.0]
        deltas = [rewards[row, t].item() + gamma * after[t] - values[row, t].item() for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (later - t) * deltas[later] for later in range(t, length))
            assert got[row, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(expected + values[row, t].item(), abs=1e-12)
        assert not got[row, length:].any()
        assert not returns[row, length:].any()


def test_gae_of_lambda_1_and_0_are_monte_carlo_and_one_step(ppo):
    rewards, values, mask = batch()
    sums = rewards.flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(ppo.gae(rewards, values, mask, 1.0, 1.0)[1], sums)
    one_step = rewards - values + torch.cat([values[:, 1:], torch.zeros(3, 1)], 1)
    torch.testing.assert_close(ppo.gae(rewards, values, mask, 1.0, 0.0)[0], one_step * mask)


def test_gae_ignores_what_follows_the_end(ppo):
    rewards, values, mask = batch()
    expected = ppo.gae(rewards, values, mask, 0.9, 0.8)
    got = ppo.gae(rewards.where(mask, 7.0), values.where(mask, -3.0), mask, 0.9, 0.8)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_value_loss_takes_the_larger_error_of_each_token(ppo):
    """Token by token; only where the value has left the bounds towards the return is there no gradient."""
    old, returns = torch.zeros(1, 4, dtype=torch.float64), torch.tensor([[1.0, 1.0, -1.0, 9.0]], dtype=torch.float64)
    values = torch.tensor([[0.1, 0.5, 0.5, 9.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, True, False]])
    loss = ppo.value_loss(values, old, returns, mask, 0.2)
    # 0.1 is inside; 0.5 counts as 0.2, which is further from 1; 0.5 is further from -1 than 0.2 is.
    assert loss.item() == pytest.approx((0.9**2 + 0.8**2 + 1.5**2) / 2 / 3)
    loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([[-0.9, 0.0, 1.5, 0.0]], dtype=torch.float64) / 3)
    free = ppo.value_loss(values, old, returns, mask, math.inf)
    assert free.item() == pytest.approx((0.9**2 + 0.5**2 + 1.5**2) / 2 / 3)


def test_adaptive_kl_moves_towards_its_target(ppo):
    """Ziegler et al.: the error is bounded by 0.2 either way, and the gain is 0.1."""
    controller = ppo.AdaptiveKL(0.5, target=4.0)
    for kl, factor in ((4.0, 1.0), (4.4, 1.01), (3.6, 0.99), (40.0, 1.02), (0.0, 0.98)):
        before = controller.beta
        controller.update(kl)
        assert controller.beta == pytest.approx(before * factor, rel=1e-12)
    # A policy whose KL falls with beta settles at the target.
    for _ in range(500):
        controller.update(2.0 / controller.beta)
    assert 2.0 / controller.beta == pytest.approx(4.0, rel=0.01)


def test_whiten_counts_tokens_only(ppo):
    _, values, mask = batch()
    got = ppo.whiten(values.where(mask, 100.0), mask)
    assert got[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert got[mask].std().item() == pytest.approx(1, abs=1e-6)
    assert not got[~mask].any()


def test_rewards_of_tokens_hold_the_kl_and_end_in_the_score(ppo):
    """With a critic that says 0, gamma 1 and lambda 1, an advantage is the rest of the rewards, before whitening."""
    how = ppo.PPO(ppo.make_config(), kl_target=10.0)
    ids, mask = torch.randint(10, (3, 8)), torch.arange(4) < torch.tensor([4, 1, 3])[:, None]
    rewards, (logprobs, ref) = torch.tensor([1.0, 0.5, 0.25]), -torch.rand(2, 3, 4)
    beta = how.controller.beta
    how.advantages(ids, mask, rewards, logprobs, ref)
    each = -beta * (logprobs - ref) * mask
    for row, last in enumerate((3, 0, 2)):
        each[row, last] += rewards[row]
    expected, _ = ppo.gae(each, torch.zeros(3, 4), mask, ppo.GAMMA, ppo.LAMBDA)
    torch.testing.assert_close(how.returns, expected)
    assert how.controller.beta < beta


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_example_learns(ppo, method):
    record = ppo.train(method, steps=20)
    assert record["before"] < 0.12
    assert record["after"] > record["before"] + 0.05
    assert len(record["rewards"]) == len(record["seconds"]) == 20
    assert record["kl"][0] == pytest.approx(0, abs=1e-5) != record["kl"][-1]
    size = record["state_bytes"]
    assert size["gradients"] == size["weights"] == size["optimizer"] / 2
    # A critic has the body's weights and its own head in place of the policy's.
    assert (size["weights"] > 1.9 * size["reference"]) == (method == "ppo")


def test_comparison_draws_finished_runs(tmp_path, capsys, monkeypatch):
    comparison = load("ppo_comparison")
    parts = {"weights": 2**20, "gradients": 2**20, "optimizer": 2**21, "reference": 2**19}
    for method, rate in (("grpo", 0.05), ("ppo", 0.02)):
        for seed in range(2):
            rewards = [min(rate * step, 1.0) for step in range(1, 41)]
            record = {"method": method, "rewards": rewards, "seconds": [0.5 * step for step in range(1, 41)]}
            record |= {"after": rewards[-1], "state_bytes": parts, "peak_rss_bytes": 2**30}
            (tmp_path / f"{method}-40-seed{seed}.json").write_text(json.dumps(record))
    options = ["--seeds", "2", "--steps", "40", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["ppo_comparison.py", *options])
    comparison.main()
    table = dict(
        name_and_cells(line) for line in capsys.readouterr().out.splitlines() if not line.startswith("columns")
    )
    assert table["held-out reward"] == ["1.000", "0.800"]
    # The mean of steps 15 to 24 is (0.75 + 0.8 + 0.85 + 0.9 + 0.95 + 5) / 10; one step earlier it is 0.895.
    assert table["steps to 0.9"] == ["24.000", "not reached"]
    assert table["CPU seconds to 0.9"] == ["12.000", "not reached"]
    assert table["MiB of weights, gradients, optimizer, reference"] == ["4.500", "4.500"]
    assert (tmp_path / "ppo_comparison.png").stat().st_size > 20_000


def name_and_cells(line):
    name, cells = line[:50].strip(), line[50:].split("  ")
    return name, [cell.strip() for cell in cells if cell.strip()]
