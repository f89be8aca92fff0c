"""Advantages by name: each estimator against its formula, written out completion by completion."""

import itertools
import math
import statistics
from pathlib import Path

import pytest
import torch

from grpo_fast.config import ESTIMATOR_NAMES, GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.train.estimators import ESTIMATORS, estimate_advantages, estimator_table
from grpo_fast.train.groups import sample_and_score
from support.runs import config, figures, trainer

REWARDS = [[1.0, 0.0, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 1.0, 0.0]]
BINARY = [[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0]]
GREEDY = [0.5, 0.0, 1.0, 0.25]
LENGTHS = [[3, 9, 1, 4], [2, 2, 5, 6], [1, 8, 2, 3], [7, 1, 4, 4]]


def whiten(values):
    rows = zip(values, LENGTHS, strict=True)
    tokens = [value for row, lengths in rows for value, n in zip(row, lengths, strict=True) for _ in range(n)]
    mean, deviation = statistics.mean(tokens), math.sqrt(statistics.variance(tokens) + 1e-8)
    return [[(value - mean) / deviation for value in row] for row in values]


def centre(rewards):
    return [[value - statistics.mean(row) for value in row] for row in rewards]


def sets_with(index, k):
    return [chosen for chosen in itertools.combinations(range(4), k) if index in chosen]


def pass_at_k(row, k):
    """The mean over all sets with this completion of the sets' normalised rewards."""
    every = [float(max(row[i] for i in chosen)) for chosen in itertools.combinations(range(4), k)]
    mean, spread = statistics.mean(every), statistics.pstdev(every)
    if not spread:
        return [0.0] * 4
    return [
        statistics.mean((max(row[i] for i in chosen) - mean) / spread for chosen in sets_with(index, k))
        for index in range(4)
    ]


def pkpo(row, k):
    gains = []
    for index in range(4):
        pairs = [(chosen, [row[i] for i in chosen if i != index]) for chosen in sets_with(index, k)]
        total = sum(max(row[i] for i in chosen) - max(others, default=0.0) for chosen, others in pairs)
        gains.append(4 * total / math.comb(4, k))
    return gains


def best_alone(row):
    ranked = sorted(row, reverse=True)
    lead = (ranked[0] - ranked[1]) / (statistics.stdev(row) + 1e-6)
    return [lead if i == row.index(ranked[0]) else 0.0 for i in range(4)]


def shortened(row, lengths, penalty):
    right = [n for r, n in zip(row, lengths, strict=True) if r > 0]
    spread = statistics.pstdev(right) if len(right) > 1 else 0.0
    values = []
    for r, n in zip(row, lengths, strict=True):
        place = (n - statistics.mean(right)) / spread if spread else 0.0
        values.append(r * (1 - penalty / (1 + math.exp(-place))) if r > 0 else r)
    return values


def others_mean(row):
    return [value - (sum(row) - value) / 3 for value in row]


def normalised(row):
    return [(value - statistics.mean(row)) / (statistics.stdev(row) + 1e-4) for value in row]


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
    "remax": lambda: [[value - greedy for value in row] for row, greedy in zip(REWARDS, GREEDY, strict=True)],
    "pass_at_k": lambda: [pass_at_k(row, 2) for row in BINARY],
    "pkpo": lambda: [pkpo(row, 2) for row in REWARDS],
    "grpo_passk": lambda: [best_alone(row) for row in REWARDS],
    "length_penalised": lambda: [
        others_mean(shortened(row, lengths, 0.3)) for row, lengths in zip(REWARDS, LENGTHS, strict=True)
    ],
    # The last group has the highest mean reward.
    "grpo_lambda": lambda: [
        *(normalised(row) if statistics.stdev(row) else [0.0] * 4 for row in REWARDS[:3]),
        normalised(shortened(REWARDS[3], LENGTHS[3], 0.3)),
    ],
}
GIVEN = {
    "remax": {"greedy_rewards": torch.tensor(GREEDY)},
    "pass_at_k": {"advantage_k": 2},
    "pkpo": {"advantage_k": 2},
    "length_penalised": {"length_penalty": 0.3},
    "grpo_lambda": {"length_penalty": 0.3, "length_penalty_share": 0.25},
}


def rewards_for(name):
    return torch.tensor(BINARY if name == "pass_at_k" else REWARDS)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimator_equals_its_formula(name):
    expected = torch.tensor(FORMULAS[name](), dtype=torch.float64)
    got = estimate_advantages(name, rewards_for(name), torch.tensor(LENGTHS), **GIVEN.get(name, {}))
    assert got.any()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimator_leaves_out_completions_without_a_reward(name):
    """Theirs is 0, and the others' is what they would have without it."""
    rewards, lengths, given = rewards_for(name), torch.tensor(LENGTHS), GIVEN.get(name, {})
    more = torch.cat([rewards, torch.full((4, 1), math.nan)], 1)
    got = estimate_advantages(name, more, torch.cat([lengths, torch.full((4, 1), 50)], 1), **given)
    assert not got[:, 4].any()
    torch.testing.assert_close(got[:, :4], estimate_advantages(name, rewards, lengths, **given))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pass_at_k_and_pkpo_equal_the_enumeration_of_sets(k):
    for name, rows, formula in (("pass_at_k", BINARY, pass_at_k), ("pkpo", REWARDS, pkpo)):
        got = estimate_advantages(name, torch.tensor(rows), torch.ones(4, 4), advantage_k=k)
        expected = torch.tensor([formula(row, k) for row in rows], dtype=torch.float64)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_pkpo_gradient_is_that_of_the_expected_maximum():
    """Over all draws of three completions from a small policy: the exact gradient of the expected best of two."""
    policy = torch.randn(4, dtype=torch.float64, requires_grad=True)
    worth = torch.tensor([0.1, 1.0, 0.4, 0.7], dtype=torch.float64)
    logprobs = policy.log_softmax(0)
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    best = (logprobs[pairs].sum(1).exp() * worth[pairs].amax(1)).sum()
    expected = torch.autograd.grad(best, policy, retain_graph=True)[0]
    draws = torch.cartesian_prod(*[torch.arange(4)] * 3)
    values = estimate_advantages("pkpo", worth[draws], torch.ones(draws.shape), advantage_k=2)
    weights = logprobs[draws].sum(1).exp().detach()
    surrogate = (weights * (values * logprobs[draws]).mean(1)).sum()
    torch.testing.assert_close(torch.autograd.grad(surrogate, policy)[0], expected)


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


def test_remax_samples_one_greedy_completion_per_prompt(tmp_path):
    """Its reward is what the likeliest tokens get, and is subtracted from that of every completion."""
    made = trainer(tmp_path, advantage_estimator="remax", max_steps=1)
    calls = []
    generate = made.rollout.generate
    made.rollout.generate = lambda prompts, sampling: (calls.append(sampling), generate(prompts, sampling))[1]
    groups = made.sample(8)
    assert [(sampling.num_generations, sampling.temperature) for sampling in calls] == [(4, 1.0), (1, 0.0)]
    # Greedy, so sampling again gives the same.
    again = sample_and_score(made.rollout, made.rewards, made.tokenizer, groups.rows, groups.prompts, calls[1])
    assert torch.equal(again[2].total, groups.greedy)
    # The greedy rewards of replaced groups are replaced as well.
    others = made.sample(2)
    others.greedy = torch.tensor([7.0, 8.0], dtype=torch.float64)
    assert groups.replaced([2, 5], others).greedy[[2, 5, 0]].tolist() == [7.0, 8.0, groups.greedy[0].item()]
    made.sample = lambda count: groups
    batch, metrics = made.collect()
    expected = groups.rewards.total - groups.greedy.repeat_interleave(4)
    torch.testing.assert_close(batch.advantages[batch.offsets[:-1]], expected.float())
    assert metrics["greedy_reward"] == pytest.approx(groups.greedy.mean().item())
    assert "greedy_reward" not in trainer(tmp_path / "other", max_steps=1).collect()[1]


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
    with pytest.raises(UserError, match=r"rewards must be 0 or 1, got 0\.25; pkpo takes any"):
        estimate_advantages("pass_at_k", torch.tensor(REWARDS), torch.ones(4, 4))
    with pytest.raises(UserError, match="advantage_k=5 must be at most the 4 completions of a prompt"):
        estimate_advantages("pkpo", torch.tensor(REWARDS), torch.ones(4, 4), advantage_k=5)
    with pytest.raises(UserError, match=r"length_penalty=0\.1 requires an advantage_estimator that takes it"):
        config(tmp_path, length_penalty=0.1)
    with pytest.raises(UserError, match="advantage_k=3 has no effect: 'opo' does not take it"):
        trainer(tmp_path / "run", advantage_estimator="opo", advantage_k=3)
    with pytest.raises(UserError, match="rewards must be at least 0, got -1"):
        estimate_advantages("maxrl", torch.tensor([[1.0, -1.0]]), torch.ones(1, 2))
