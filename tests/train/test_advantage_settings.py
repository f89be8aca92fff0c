"""The settings of advantages: their scale, deviation, weights, and groups in which a reward is missing."""

import numpy as np
import pytest
import torch

from grpo_fast.cli import parse_config
from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.files import read_metrics
from grpo_fast.rewards import Rewards
from grpo_fast.train.advantages import group_advantages, reward_advantages
from grpo_kernels import policy_loss, token_weights
from support.runs import trainer
from support.small import SMALL

NAN = float("nan")


def config(**fields) -> GRPOConfig:
    return GRPOConfig(**{**SMALL, "num_generations": 4, **fields})


def scored(total, steps=None) -> Rewards:
    total = torch.tensor(total, dtype=torch.float64)
    return Rewards(total, total[:, None], steps or [{} for _ in total], torch.zeros(len(total), 1, dtype=torch.bool))


def outcome(total, **fields):
    return reward_advantages(scored(total), torch.ones(1, dtype=torch.float64), config(**fields))


def test_recipe_of_nano_aha_moment_has_its_own_arithmetic():
    """Advantages by NumPy, and the gradient of ``sum(-A logp + 0.001 kl) / tokens``, as that notebook writes them."""
    recipe = parse_config(["countdown_qwen"])
    rewards = np.array([2.0, 1.0, 1.0, 0.0, 0.5, 0.5, 0.5, 0.5, 1.0, 0.0, 0.0, 0.0])
    groups = rewards.reshape(-1, 4)
    theirs = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, keepdims=True) + 1e-4)
    ours = reward_advantages(scored(rewards.tolist()), torch.ones(1, dtype=torch.float64), recipe).outcome
    np.testing.assert_allclose(ours.numpy(), theirs.ravel(), rtol=0, atol=1e-6)
    # With Bessel's correction they would not agree.
    assert (ours - group_advantages(torch.from_numpy(rewards), 4).values).abs().max() > 0.1

    lengths = torch.arange(1, 13)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    count, objective = int(lengths.sum()), recipe.objective()
    advantages = torch.from_numpy(theirs.ravel()).repeat_interleave(lengths)
    ref = -torch.rand(count, dtype=torch.float64)
    logprobs = (-torch.rand(count, dtype=torch.float64)).requires_grad_()
    gap = ref - logprobs
    whole = (-advantages * logprobs + 0.001 * (gap.exp() - 1 - gap)).sum() / count
    expected = torch.autograd.grad(whole, logprobs)[0]
    weights = token_weights(torch.ones(count, dtype=torch.bool), objective.aggregation, cu_seqlens=offsets)
    loss = policy_loss(
        logprobs, ours.repeat_interleave(lengths), weights.double(), objective, ref_logprobs=ref, cu_seqlens=offsets
    )
    got = torch.autograd.grad(loss.loss, logprobs)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("deviation", ["sample", "population"])
@pytest.mark.parametrize("scale", ["group", "batch", "whiten"])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
def test_advantages_divide_by_the_chosen_deviation_plus_eps(scale, deviation, eps):
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 4.0, 4.0, 2.0, 3.0, 3.0, 3.0, 3.0], dtype=torch.float64)
    groups = rewards.view(3, 4)
    centred, correction = groups - groups.mean(1, keepdim=True), int(deviation == "sample")
    spread = {
        "group": groups.std(1, keepdim=True, correction=correction),
        "batch": rewards.std(correction=correction),
        "whiten": centred.std(correction=correction),
    }[scale]
    got = outcome(rewards.tolist(), scale_rewards=scale, advantage_std=deviation, advantage_eps=eps).outcome
    # Without eps, the last group would be 0 / 0.
    expected = (centred / (spread + eps)).nan_to_num(nan=0.0)
    torch.testing.assert_close(got, expected.flatten())
    if scale == "whiten" and not eps:
        assert got.std(correction=correction).item() == pytest.approx(1)


def test_whitening_leaves_missing_rewards_out():
    got = outcome([1.0, 3.0, NAN, 2.0, 0.0, 4.0, 2.0, 2.0], scale_rewards="whiten", advantage_eps=0.0).outcome
    present = torch.tensor([-1.0, 1.0, 0.0, -2.0, 2.0, 0.0, 0.0], dtype=torch.float64)
    expected = torch.cat([present[:2], torch.zeros(1), present[2:]]) / present.std()
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_relative_and_baseline_weights_add_two_advantages(scale):
    rewards = [1.0, 0.0, 0.0, 1.0, 3.0, 3.0, 3.0, 3.0]
    values = torch.tensor(rewards, dtype=torch.float64)
    relative = outcome(rewards, scale_rewards=scale).outcome
    batch = values - values.mean()
    batch = batch / (values.std() + 1e-4) if scale == "group" else batch
    got = outcome(rewards, scale_rewards=scale, relative_weight=0.5, baseline_weight=2.0).outcome
    torch.testing.assert_close(got, 0.5 * relative + 2 * batch)
    # A group of equal rewards has an advantage over the batch.
    assert relative[4] == 0 < got[4]


def test_incomplete_groups_are_dropped_whole():
    rewards = [1.0, NAN, 0.0, 0.0, 2.0, 0.0, 0.0, 2.0]
    kept, dropped = outcome(rewards), outcome(rewards, incomplete_groups="drop")
    assert kept.outcome[0] > 0 == kept.outcome[1]
    assert dropped.outcome[:4].tolist() == [0.0] * 4
    assert dropped.equal.tolist() == [True] * 4 + [False] * 4
    torch.testing.assert_close(dropped.outcome[4:], kept.outcome[4:])
    # Nor do they count in the batch's deviation.
    alone = group_advantages(torch.tensor(rewards[4:]).double(), 4, "batch").values
    torch.testing.assert_close(outcome(rewards, incomplete_groups="drop", scale_rewards="batch").outcome[4:], alone)


def test_incomplete_groups_lose_their_step_rewards():
    steps = [{0: [(1, 1.0)]}, {}, {0: [(1, 0.0)]}, {0: [(1, 0.5)]}]
    rewards = scored([1.0, NAN, 0.0, 0.5], steps)
    one = torch.ones(1, dtype=torch.float64)
    assert reward_advantages(rewards, one, config()).steps[0].abs().sum() > 0
    assert not reward_advantages(rewards, one, config(incomplete_groups="drop")).steps


REWARD_FILE = """
def some(prompts, completions, **columns):
    return [None if i == 0 else float(len(text)) for i, text in enumerate(completions)]
"""


@pytest.mark.parametrize("choice", ["keep", "drop", "error"])
def test_run_keeps_drops_or_refuses_incomplete_groups(tmp_path, choice):
    (tmp_path / "rewards.py").write_text(REWARD_FILE)
    fields = {"reward_funcs": [f"{tmp_path}/rewards.py:some"], "max_steps": 1, "incomplete_groups": choice}
    made = trainer(tmp_path / "run", log_completions_steps=1, **fields)
    if choice == "error":
        with pytest.raises(
            UserError, match=r"^1 of 32 completions have no reward .*incomplete_groups=drop leaves such"
        ):
            made.train()
        return
    batches = []
    made.learner.parts = lambda batch: [batches.append(batch) or batch]
    made.train()
    assert batches[0].counted.tolist() == [choice == "keep"] * 4 + [True] * 28
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["loss"] is not None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"advantage_eps": -1.0}, "advantage_eps=-1.0 is not allowed"),
        ({"advantage_std": "both"}, "advantage_std='both' is not allowed: it must be one of sample, population"),
        ({"incomplete_groups": "no"}, "it must be one of keep, drop, error"),
        ({"relative_weight": 0}, "relative_weight and baseline_weight are both 0"),
        ({"scale_rewards": "whiten", "reward_baseline": "max"}, "scale_rewards='whiten' requires reward_baseline mean"),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "baseline_weight": 1.0},
            "'normalize_then_sum' requires baseline_weight=0.0, not 1.0",
        ),
    ],
)
def test_config_refuses_wrong_settings(fields, message):
    with pytest.raises(UserError, match=message):
        config(**fields)
