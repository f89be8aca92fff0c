"""The metrics of a step, computed once more by hand."""

import math

import pytest
import torch

from grpo_fast.config import GRPOConfig
from grpo_fast.files import read_metrics
from grpo_fast.model.packing import Sample
from grpo_fast.train.batch import build_step_batch
from grpo_fast.train.metrics import advantage_metrics, clip_extremes, group_metrics, loss_parts
from grpo_kernels import PRESETS, policy_loss
from support.runs import trainer
from support.small import SMALL

NAN = math.nan


def test_group_metrics_tell_spread_within_groups_from_spread_between_them():
    # Groups of means 2, 5 and 1 (one completion without a reward), and one without any.
    rewards = torch.tensor([1.0, 3.0, 5.0, 5.0, NAN, 1.0, NAN, NAN], dtype=torch.float64)
    figures = group_metrics(rewards, 2)
    assert figures["groups/reward_mean"] == pytest.approx((2 + 5 + 1) / 3)
    assert figures["groups/reward_std"] == pytest.approx((math.sqrt(2) + 0 + 0) / 3)
    assert figures["groups/reward_mean_std"] == pytest.approx(torch.tensor([2.0, 5.0, 1.0]).std().item())


def make_batch(objective, config):
    samples = [Sample([1], [2] * length, 0) for length in (1, 3, 2, 4)]
    batch = build_step_batch(samples, torch.tensor([True, True, True, False]), objective, config)
    each = torch.tensor([1.0, -2.0, 4.0, 100.0]).repeat_interleave(batch.offsets.diff())
    batch.set_advantages(each, objective)
    return batch


def test_advantage_metrics_are_of_the_completions_in_the_loss():
    config = GRPOConfig(**SMALL)
    figures = advantage_metrics(make_batch(config.objective(), config))
    expected = torch.tensor([1.0, -2.0, 4.0])
    assert figures["advantages/mean"] == pytest.approx(1)
    assert figures["advantages/std"] == pytest.approx(expected.std().item())


@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "rloo"])
def test_clip_extremes_are_those_of_the_completions(loss_type):
    """Completion by completion, as TRL's masked mean of each sequence; a forced token counts nowhere."""
    config = GRPOConfig(**{**SMALL, "loss_type": loss_type})
    objective = config.objective()
    batch = make_batch(objective, config)
    batch.weights[4] = 0.0
    batch.old_logprobs = -torch.rand(len(batch.weights))
    step = torch.tensor([0.5, -0.5, -0.5, 0.1, -0.5, 0.5, 0.01, 0.0, 0.0, 0.0])
    logprobs = batch.old_logprobs + step
    low, high = [], []
    for start, end, advantage in ((0, 1, 1), (1, 4, -1), (4, 6, 1)):
        moved = [step[index].item() for index in range(start, end) if index != 4]
        if objective.level != "token":
            moved = [sum(moved) / (len(moved) if objective.level == "sequence" else 1)] * len(moved)
        ratios = [math.exp(value) for value in moved]
        low.append(sum(ratio < 1 - objective.epsilon for ratio in ratios) / len(ratios) * (advantage < 0))
        high.append(sum(ratio > 1 + objective.upper_epsilon for ratio in ratios) / len(ratios) * (advantage > 0))
    got = clip_extremes(batch, logprobs, batch.advantages, objective)
    assert got == {"clip_ratio/low_min": pytest.approx(min(low)), "clip_ratio/high_max": pytest.approx(max(high))}
    assert got["clip_ratio/high_max"] > 0
    # Only the second completion has a negative advantage.
    batch.active = [1]
    got = clip_extremes(batch, logprobs, batch.advantages, objective)
    assert (got["clip_ratio/low_min"], got["clip_ratio/high_max"]) == (pytest.approx(low[1]), 0)
    assert low[1] > 0
    assert clip_extremes(batch, logprobs, batch.advantages, PRESETS["cispo"]) == {}


@pytest.mark.parametrize("loss_type", PRESETS)
@pytest.mark.parametrize("terms", [{"beta": 0.2}, {"beta": 0.2, "entropy_coef": 0.1}, {"entropy_coef": 0.1}, {}])
def test_loss_parts_add_up_to_the_loss(loss_type, terms):
    config = GRPOConfig(**{**SMALL, "loss_type": loss_type, **terms})
    objective = config.objective()
    batch = make_batch(objective, config)
    count = len(batch.weights)
    logprobs, batch.old_logprobs, batch.ref_logprobs = -torch.rand(3, count)
    entropy = torch.rand(count)
    batch.selected = (torch.arange(count) % 3 == 0).float() if objective.needs_selection else None
    given = {"old_logprobs": batch.old_logprobs, "ref_logprobs": batch.ref_logprobs, "cu_seqlens": batch.offsets}
    given["selected"] = batch.selected
    loss = policy_loss(logprobs, batch.advantages, batch.weights, objective, entropy=entropy, **given).loss.item()
    parts = loss_parts(loss, batch, logprobs, batch.advantages, objective)
    names = {"beta": "loss/kl", "entropy_coef": "loss/entropy"}
    assert set(parts) == ({"loss/policy", *(names[term] for term in terms)} if terms else set())
    assert not parts or sum(parts.values()) == pytest.approx(loss, rel=1e-5)
    if "entropy_coef" in terms:
        assert parts["loss/entropy"] == pytest.approx(-0.1 * (batch.weights * entropy).sum().item(), abs=1e-5)
    if "beta" in terms and not objective.kl_bias_correction:
        d = batch.ref_logprobs - logprobs
        assert parts["loss/kl"] == pytest.approx(0.2 * (batch.weights * (d.exp() - 1 - d)).sum().item(), rel=1e-4)


@pytest.mark.parametrize(
    "fields",
    [{"num_iterations": 2, "beta": 0.1}, {"entropy_coef": 0.01}, {"top_entropy_quantile": 0.5, "beta": 0.1}],
)
def test_run_logs_groups_advantages_and_the_parts_of_its_loss(tmp_path, fields):
    trainer(tmp_path, max_steps=4, **fields).train()
    for entry in read_metrics(tmp_path / "metrics.jsonl"):
        parts = [value for name, value in entry.items() if name.startswith("loss/")]
        assert len(parts) == 2
        assert sum(parts) == pytest.approx(entry["loss"], abs=1e-6)
        assert entry["groups/reward_mean"] == pytest.approx(entry["reward"])
        assert 0 < entry["groups/reward_std"] < entry["reward_std"] * 1.5
        assert entry["advantages/mean"] == pytest.approx(0, abs=1e-5)
        assert 0 < entry["advantages/std"] < 1.1
    assert "loss: KL part" in (tmp_path / "report.html").read_text() or "beta" not in fields
    assert "reward spread within the groups" in (tmp_path / "report.html").read_text()
