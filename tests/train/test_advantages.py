import pytest
import torch

from grpo_fast.config import UNCENTRED
from grpo_fast.train.advantages import BASELINES, apart_advantages, group_advantages

REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 4.0, 4.0, 2.0])
NAN = float("nan")
CENTRED = [name for name in BASELINES if name not in UNCENTRED]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_with_each_scale(scale):
    expected = []
    for group in (REWARDS[:4], REWARDS[4:]):
        std = {"group": group.std(), "batch": REWARDS.std(), "none": None}[scale]
        expected.append((group - group.mean()) / (1.0 if std is None else std + 1e-4))
    got = group_advantages(REWARDS, 4, scale)
    torch.testing.assert_close(got.values, torch.cat(expected))


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        # By hand: of 5, 2, 3, 6 the others' means are 11/3, 14/3, 13/3, 10/3; one completion has no reward.
        ("mean", [1.0, -2.0, 0.0, -1.0, 2.0]),
        ("leave_one_out", [4 / 3, -8 / 3, 0.0, -4 / 3, 8 / 3]),
        ("max", [-1.0, -4.0, 0.0, -3.0, 0.0]),
        ("none", [5.0, 2.0, 0.0, 3.0, 6.0]),
        ("best_only", [0.0, 0.0, 0.0, 0.0, 6.0]),
    ],
)
def test_group_advantages_with_each_baseline(baseline, expected):
    rewards = torch.tensor([5.0, 2.0, NAN, 3.0, 6.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    got = group_advantages(rewards, 5, "none", baseline)
    # Rewards that are not centred have an effect even without variance.
    equal = 1.0 if baseline in UNCENTRED else 0.0
    torch.testing.assert_close(got.values, torch.tensor(expected + [equal] * 5))
    assert got.equal.tolist() == [False] * 5 + [True] * 5


def test_group_advantages_leaving_out_a_single_reward_are_zero():
    got = group_advantages(torch.tensor([NAN, 3.0, NAN, 1.0, 2.0, 6.0]), 3, "none", "leave_one_out")
    torch.testing.assert_close(got.values, torch.tensor([0.0, 0.0, 0.0, -3.0, -1.5, 4.5]))


def test_apart_advantages_follow_trl():
    """Each in its group, their weighted sum over the batch: TRL's computation written out."""
    torch.manual_seed(0)
    each, weights = torch.rand(12, 3) * torch.tensor([1.0, 100.0, 0.01]), torch.tensor([1.0, 0.5, 2.0])
    each[4:8, 1] = 7.0  # no variance in one of the rewards
    grouped = each.view(3, 4, 3)
    apart = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    total = (apart.view(12, 3) * weights).sum(1)
    expected = (total - total.mean()) / (total.std() + 1e-4)
    got = apart_advantages(each, weights, 4)
    torch.testing.assert_close(got.values, expected, rtol=1e-4, atol=1e-5)
    assert not got.equal.any()
    # Summed first, the reward of large spread drowns the others.
    summed = group_advantages((each * weights).sum(1), 4)
    assert (summed.values - got.values).abs().max() > 0.5


def test_apart_advantages_with_missing_rewards():
    each = torch.tensor(
        [[1.0, NAN], [3.0, 2.0], [NAN, NAN], [2.0, 4.0], [5.0, 1.0], [5.0, 1.0], [5.0, 1.0], [5.0, NAN]]
    )
    got = apart_advantages(each, torch.ones(2), 4)
    first, second = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([2.0, 4.0])
    first, second = ((x - x.mean()) / (x.std() + 1e-4) for x in (first, second))
    total = torch.stack([first[0], first[1] + second[0], first[2] + second[1]])
    batch = torch.cat([total, torch.zeros(4)])
    expected = torch.cat([total[:2], torch.tensor([NAN]), total[2:], torch.zeros(4)])
    expected = ((expected - batch.mean()) / (batch.std() + 1e-4)).nan_to_num(0.0)
    torch.testing.assert_close(got.values, expected)
    assert got.values[2] == 0
    assert got.values[4:].tolist() == [0.0] * 4
    assert got.equal.tolist() == [False] * 4 + [True] * 4


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_ignore_missing_rewards(scale):
    """As in TRL: the completion gets advantage 0, and the others what they would have without it."""
    rewards = torch.tensor([1.0, NAN, 3.0, 2.0, NAN, NAN, NAN, NAN, NAN, 5.0, NAN, NAN])
    got = group_advantages(rewards, 4, scale)
    known = torch.tensor([1.0, 3.0, 2.0])
    std = {"group": known.std(), "batch": torch.tensor([1.0, 3.0, 2.0, 5.0]).std(), "none": None}[scale]
    expected = (known - 2) / (1.0 if std is None else std + 1e-4)
    torch.testing.assert_close(got.values[[0, 2, 3]], expected)
    assert got.values[[1, *range(4, 12)]].tolist() == [0.0] * 9
    assert got.equal.tolist() == [False] * 4 + [True] * 8


@pytest.mark.parametrize("baseline", CENTRED)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-8, -7.7, 1e20])
def test_group_advantages_of_equal_rewards_are_exactly_zero(scale, value, baseline):
    # The float32 mean of equal numbers need not equal them.
    rewards = torch.cat([torch.full((7,), value), torch.arange(7.0)])
    got = group_advantages(rewards, 7, scale, baseline)
    assert got.values[:7].tolist() == [0.0] * 7
    assert got.equal.tolist() == [True] * 7 + [False] * 7
    assert got.values[7:].isfinite().all()
    assert got.values[7:].abs().sum() > 0 or value == 1e20


@pytest.mark.parametrize("baseline", CENTRED)
@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_group_advantages_of_huge_rewards_do_not_overflow(scale, baseline, dtype):
    """The squares of rewards of 1e20 are beyond float32: their spread was infinite, and every advantage 0."""
    rewards = torch.tensor([1.0, 2.0, 3.0, 3.0, 0.0, 5.0, 5.0, 5.0], dtype=dtype)
    expected = group_advantages(rewards, 4, scale, baseline).values
    got = group_advantages(rewards * 1e20, 4, scale, baseline).values
    assert got.dtype == dtype
    # For rewards of about 1, the 1e-4 that is added to the deviation matters.
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=0)
    apart = apart_advantages(torch.stack([rewards, rewards * 1e20], 1), torch.tensor([1.0, 1e30]), 4)
    assert apart.values.isfinite().all()
    assert apart.values.abs().max() > 0.1


def test_group_advantages_refuse_bad_input():
    with pytest.raises(ValueError, match="divide 8"):
        group_advantages(REWARDS, 3)
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(REWARDS, 1)
    with pytest.raises(ValueError, match="finite"):
        group_advantages(torch.tensor([1.0, float("inf")]), 2)
    with pytest.raises(ValueError, match="'grp' is unknown"):
        group_advantages(REWARDS, 4, "grp")
    with pytest.raises(ValueError, match="'median' is unknown; choose one of mean, leave_one_out"):
        group_advantages(REWARDS, 4, "group", "median")
