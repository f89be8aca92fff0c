"""Advantages by name: each estimator against its formula, written out completion by completion."""

import math
import statistics
from pathlib import Path

import pytest
import torch

from grpo_fast.config import ESTIMATOR_NAMES, GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.train.estimators import ESTIMATORS, estimate_advantages, estimator_table
from support.runs import config, figures, trainer

REWARDS = [[1.0, 0.0, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 1.0, 0.0]]
LENGTHS = [[3, 9, 1, 4], [2, 2, 5, 6], [1, 8, 2, 3], [7, 1, 4, 4]]


def whiten(values):
    rows = zip(values, LENGTHS, strict=True)
    tokens = [value for row, lengths in rows for value, n in zip(row, lengths, strict=True) for _ in range(n)]
    mean, deviation = statistics.mean(tokens), math.sqrt(statistics.variance(tokens) + 1e-8)
    return [[(value - mean) / deviation for value in row] for row in values]


def centre(rewards):
    return [[value - statistics.mean(row) for value in row] for row in rewards]


FORMULAS = {
    "reinforce_plus_plus": lambda: whiten(REWARDS),
    "reinforce_plus_plus_baseline": lambda: whiten(centre(REWARDS)),
    "opo": lambda: [
        [value - sum(r * n for r, n in zip(row, lengths, strict=True)) / sum(lengths) for value in row]
        for row, lengths in zip(REWARDS, LENGTHS, strict=True)
    ],
    # Two of the four groups have a gradient.
    "gpg": lambda: [[2 * value for value in row] for row in centre(REWARDS)],
    "maxrl": lambda: [
        [(value - statistics.mean(row)) / (statistics.mean(row) or 1) for value in row] for row in REWARDS
    ],
    "raft": lambda: [[float(place == row.index(max(row))) for place in range(len(row))] for row in REWARDS],
    "rejection_sampling": lambda: [[float(value >= 1) for value in row] for row in REWARDS],
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimator_equals_its_formula(name):
    expected = torch.tensor(FORMULAS[name](), dtype=torch.float64)
    got = estimate_advantages(name, torch.tensor(REWARDS), torch.tensor(LENGTHS))
    assert got.any()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimator_leaves_out_completions_without_a_reward(name):
    """Theirs is 0, and the others' is what they would have without it."""
    rewards, lengths = torch.tensor(REWARDS), torch.tensor(LENGTHS)
    more = torch.cat([rewards, torch.full((4, 1), math.nan)], 1)
    got = estimate_advantages(name, more, torch.cat([lengths, torch.full((4, 1), 50)], 1))
    assert not got[:, 4].any()
    torch.testing.assert_close(got[:, :4], estimate_advantages(name, rewards, lengths))


def test_maxrl_is_the_gradient_of_the_log_likelihood():
    """With 0 or 1 as rewards, the mean of A times the score is that of the successes (2602.02710)."""
    policy = torch.randn(6, dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0, 0.0]])
    logprobs = policy.log_softmax(0)
    got = (estimate_advantages("maxrl", rewards, torch.ones(1, 6))[0] * logprobs).mean()
    of_successes = logprobs[rewards[0] == 1].mean() - logprobs.mean()
    torch.testing.assert_close(got, of_successes)


def test_every_part_of_an_estimator_exists():
    help_text = GRPOConfig.__doc__.partition("advantage_estimator: ")[2].partition("multi_objective")[0]
    assert tuple(ESTIMATORS) == ESTIMATOR_NAMES
    assert FORMULAS.keys() == ESTIMATORS.keys()
    assert estimator_table() in (Path(__file__).parents[2] / "docs" / "objectives.md").read_text(encoding="utf-8")
    assert all(name in help_text for name in ESTIMATORS)


@pytest.mark.parametrize("name", ["opo", "own"])
def test_estimator_trains(tmp_path, monkeypatch, name):
    """A function of the user's own that is the default gives the default's run."""
    if name == "own":
        (tmp_path / "own.py").write_text(
            "def mine(rewards):\n"
            "    return (rewards - rewards.nanmean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)\n"
        )
        name = f"{tmp_path / 'own.py'}:mine"
    trainer(tmp_path / "run", advantage_estimator=name, max_steps=2).train()
    trainer(tmp_path / "default", max_steps=2).train()
    ours, default = figures(tmp_path / "run"), figures(tmp_path / "default")
    same = ours[-1]["grad_norm"] == pytest.approx(default[-1]["grad_norm"], rel=1e-4)
    assert same == ("own.py" in name)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def mine(rewards, values): return rewards", "needs 'values'; it may take rewards, lengths"),
        ("def mine(rewards): return rewards.mean()", r"must return a tensor \[8, 4\], got \[\]"),
        ("def mine(rewards): return rewards / 0 * 3 + 1 / (rewards * 0)", "returned an infinite advantage"),
        ("def mine(rewards): raise KeyError('no')", "failed: KeyError: 'no'"),
    ],
)
def test_estimator_that_cannot_be_used_is_refused(tmp_path, code, words):
    (tmp_path / "bad.py").write_text(code)
    with pytest.raises(UserError, match=f"advantage_estimator: .*{words}"):
        trainer(tmp_path / "run", advantage_estimator=f"{tmp_path / 'bad.py'}:mine").train()


def test_estimator_is_refused_beside_what_it_replaces(tmp_path):
    with pytest.raises(UserError, match="advantage_estimator takes the place of scale_rewards='none'"):
        config(tmp_path, advantage_estimator="opo", scale_rewards="none")
    with pytest.raises(UserError, match="advantage_estimator='opp' is not allowed: it must be one of reinforce_plus_"):
        config(tmp_path, advantage_estimator="opp")
    with pytest.raises(UserError, match="rewards must be at least 0, got -1"):
        estimate_advantages("maxrl", torch.tensor([[1.0, -1.0]]), torch.ones(1, 2))
