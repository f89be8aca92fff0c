import pytest
import torch

from grpo_fast.advantages import group_advantages

REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 4.0, 4.0, 2.0])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_formula(scale):
    expected = []
    for group in (REWARDS[:4], REWARDS[4:]):
        std = {"group": group.std(), "batch": REWARDS.std(), "none": None}[scale]
        expected.append((group - group.mean()) / (1.0 if std is None else std + 1e-4))
    got = group_advantages(REWARDS, 4, scale)
    torch.testing.assert_close(got.values, torch.cat(expected))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_missing_reward_counts_in_no_mean(scale):
    """As in TRL: the completion gets advantage 0, and the others what they would have without it."""
    nan = float("nan")
    rewards = torch.tensor([1.0, nan, 3.0, 2.0, nan, nan, nan, nan, nan, 5.0, nan, nan])
    got = group_advantages(rewards, 4, scale)
    known = torch.tensor([1.0, 3.0, 2.0])
    std = {"group": known.std(), "batch": torch.tensor([1.0, 3.0, 2.0, 5.0]).std(), "none": None}[scale]
    expected = (known - 2) / (1.0 if std is None else std + 1e-4)
    torch.testing.assert_close(got.values[[0, 2, 3]], expected)
    assert got.values[[1, *range(4, 12)]].tolist() == [0.0] * 9
    assert got.equal.tolist() == [False] * 4 + [True] * 8


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-8, -7.7, 1e20])
def test_equal_rewards_give_exactly_zero(scale, value):
    # The float32 mean of equal numbers need not equal them.
    rewards = torch.cat([torch.full((7,), value), torch.arange(7.0)])
    got = group_advantages(rewards, 7, scale)
    assert got.values[:7].tolist() == [0.0] * 7
    assert got.equal.tolist() == [True] * 7 + [False] * 7
    assert got.values[7:].isfinite().all()
    assert got.values[7:].abs().sum() > 0 or value == 1e20


def test_bad_input():
    with pytest.raises(ValueError, match="divide 8"):
        group_advantages(REWARDS, 3)
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(REWARDS, 1)
    with pytest.raises(ValueError, match="finite"):
        group_advantages(torch.tensor([1.0, float("inf")]), 2)
    with pytest.raises(ValueError, match="'grp' is unknown"):
        group_advantages(REWARDS, 4, "grp")
