"""What a step trains on: dynamic sampling, and the KL to a reference in the reward."""

import json
import math

import pytest
import torch

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.rewards import RewardModel, Rewards
from grpo_fast.rollout import Response
from grpo_fast.train.advantages import group_advantages, reward_advantages
from grpo_fast.train.groups import Groups, sample_groups, token_advantages
from grpo_fast.train.metrics import reward_metrics
from support.killed import killed_at
from support.runs import assert_same_run, figures
from support.runs import trainer as run_trainer
from support.small import SMALL, run, trainer

WEIGHT = torch.ones(1)


def config(**fields) -> GRPOConfig:
    return GRPOConfig(**{**SMALL, "generation_batch_size": 16, **fields})


def rewards_of(values: torch.Tensor) -> Rewards:
    """The rewards of a single function."""
    return Rewards(values, values[:, None], [{} for _ in values], torch.zeros(len(values), 1, dtype=torch.bool))


def sampler(rewards: dict[int, list[float]]):
    """Groups of a numbered row each, in order; those in `rewards` have these, the others 1 for all completions."""
    numbers = iter(range(1000))
    calls = []

    def sample(count: int) -> Groups:
        calls.append(count)
        rows = [{"prompt": str(next(numbers))} for _ in range(count)]
        values = torch.tensor([r for row in rows for r in rewards.get(int(row["prompt"]), [1.0] * 4)])
        texts = [f"{row['prompt']}.{index}" for row in rows for index in range(4)]
        return groups_of(rows, texts, values)

    return sample, calls


def groups_of(rows: list[dict], texts: list[str], values: torch.Tensor) -> Groups:
    """Completions of a token each."""
    prompts = [[int(row["prompt"])] for row in rows]
    return Groups(rows, prompts, [Response([len(text)], "stop") for text in texts], texts, rewards_of(values))


MIXED = [0.0, 1.0, 1.0, 0.0]


def test_sample_groups_replaces_groups_without_variance():
    sample, calls = sampler({1: MIXED, 4: [0.0, 0.0, 2.0, 0.0], 7: MIXED, 8: MIXED})
    groups, drawn, metrics = sample_groups(sample, WEIGHT, config(dynamic_sampling=True))
    # Rows 0 to 3, of which 1 has variance; 4 to 6 for the others, of which 4 has; 7 and 8 both have.
    assert calls == [4, 3, 2]
    assert drawn == 9
    assert [row["prompt"] for row in groups.rows] == ["4", "1", "7", "8"]
    assert [sample.prompt_ids for sample in groups.samples()][::4] == [[4], [1], [7], [8]]
    assert groups.texts == [f"{row}.{index}" for row in (4, 1, 7, 8) for index in range(4)]
    assert groups.rewards.total.view(4, 4).tolist() == [[0.0, 0.0, 2.0, 0.0], MIXED, MIXED, MIXED]
    assert torch.equal(groups.rewards.each[:, 0], groups.rewards.total)
    assert metrics["dynamic_sampling/num_gen_batches"] == 3
    assert metrics["dynamic_sampling/refilled_share"] == 0.75
    assert metrics["dynamic_sampling/sampled_reward"] == pytest.approx((5 * 4 + 3 * 2 + 2) / 36)


def test_sample_groups_stops_at_the_limit():
    sample, calls = sampler({1: MIXED})
    groups, drawn, metrics = sample_groups(sample, WEIGHT, config(dynamic_sampling=True, max_num_gen_batches=3))
    assert calls == [4, 3, 3]
    assert drawn == 10
    assert [row["prompt"] for row in groups.rows] == ["7", "1", "8", "9"]
    assert metrics["dynamic_sampling/num_gen_batches"] == 3


def test_sample_groups_without_dynamic_sampling_samples_once():
    sample, calls = sampler({1: MIXED})
    assert sample_groups(sample, WEIGHT, config())[1:] == (4, {})
    assert calls == [4]


def test_collect_with_dynamic_sampling(tmp_path):
    fields = {"reward_funcs": ["digits_ordered"], "dynamic_sampling": True, "max_num_gen_batches": 40}
    made = trainer(tmp_path, **fields)
    batch, metrics = made.collect()
    assert metrics["frac_reward_zero_std"] == 0
    assert metrics["dynamic_sampling/num_gen_batches"] > 1
    assert batch.drawn > made.config.prompts_per_step
    assert len(batch.active) == len(batch.samples) == 32
    # Prompts continue after the last one drawn.
    assert made.sample(1).rows[0] == made.train_rows[_order(made)[batch.drawn]]


def _order(made):
    from grpo_fast.data import prompt_order

    order = prompt_order(len(made.train_rows), True, made.config.seed)
    return [next(order) for _ in range(1000)]


@pytest.mark.parametrize(
    "fields",
    [
        {"reward_funcs": ["digits_ordered"], "dynamic_sampling": True, "save_steps": 2},
        {"reward_funcs": ["digits_ordered"], "dynamic_sampling": True, "num_iterations": 2, "save_steps": 2},
        {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 3},
        {"beta": 0.1, "kl_in_reward": True, "sync_ref_model": True, "ref_model_sync_steps": 1},
    ],
    ids=lambda fields: ",".join(fields),
)
def test_resumed_runs_with_sampling_and_reference_are_bit_identical(tmp_path, fields):
    fields = {"max_steps": 6, "learning_rate": 1e-2, **fields}
    run_trainer(tmp_path / "whole", **fields).train()
    folder = tmp_path / "run"
    killed_at(4, run_trainer(folder, **fields))
    made = run_trainer(folder, resume=True, **fields)
    assert made.step == 4
    made.train()
    assert_same_run(folder, tmp_path / "whole")
    if "dynamic_sampling" in fields:
        state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
        assert state["num_prompts"] > 6 // fields.get("num_iterations", 1) * made.config.prompts_per_step
    else:
        # Without the saved reference, the KL would be that to the initial policy.
        assert figures(folder)[-1]["kl"] != 0


def test_collect_with_the_kl_in_the_reward(tmp_path):
    """``r - beta * sum_t (logp_t - ref_t)``, by hand; the loss has no KL term, and nothing else is dropped."""
    fields = {"beta": 0.3, "kl_in_reward": True, "learning_rate": 0.02, "reward_baseline": "leave_one_out"}
    made = trainer(tmp_path, **fields, scale_rewards="none", mask_truncated_completions=True)
    batch, metrics = made.collect()
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)
    made.learner.update(batch)
    seen = {}
    score = made.learner.score_reference

    def scored(batch):
        seen["own"], seen["ref"] = made.learner.score(made.learner.policy.eval(), batch), score(batch)
        return seen["ref"]

    made.learner.score_reference = scored
    sample = made.sample
    made.sample = lambda count: seen.setdefault("groups", sample(count))
    batch, metrics = made.collect()
    k1 = seen["own"] - seen["ref"]
    assert k1.abs().max() > 1e-2
    assert metrics["kl"] == pytest.approx(k1.mean().item())
    sums = torch.stack([part.sum() for part in k1.split(batch.offsets.diff().tolist())])
    groups = (seen["groups"].rewards.total - 0.3 * sums).view(-1, 4)
    expected = (groups - groups.mean(1, keepdim=True)) * 4 / 3
    got = batch.advantages[batch.offsets[:-1]]
    torch.testing.assert_close(got, expected.flatten().float(), rtol=1e-4, atol=1e-5)
    assert batch.ref_logprobs is None
    assert not made.objective.uses_reference
    # The logged reward is that of the task.
    assert metrics["reward"] == pytest.approx(seen["groups"].rewards.total.mean().item())
    assert "kl" not in made.learner.update(batch)


def test_train_with_the_kl_in_the_reward_and_adapters(tmp_path):
    fields = {"use_peft": True, "lora_r": 4, "beta": 0.1, "kl_in_reward": True, "learning_rate": 3e-2}
    metrics, _, _ = run(tmp_path, **fields)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert metrics[-1]["kl"] != pytest.approx(0, abs=1e-5)


def test_reward_advantages_of_huge_rewards_and_weights_do_not_overflow():
    """Their sum is beyond float32; the advantages are not."""
    model = RewardModel(["exact_answer", "final_number"], [3e38, 1.0])
    model.functions = [lambda **columns: [1e20, 2e20, 3e20, 3e20], lambda **columns: [0.5] * 4]
    scored = model(["q"] * 4, ["a"] * 4, {})
    got = reward_advantages(scored, model.weights, config())
    expected = group_advantages(torch.tensor([1.0, 2.0, 3.0, 3.0]), 4).values
    torch.testing.assert_close(got.outcome.float(), expected, rtol=2e-4, atol=0)
    figures = reward_metrics(model.names, scored, got.equal)
    assert figures["reward"] == pytest.approx(2.25e20 * 3e38)
    assert math.isfinite(figures["reward_std"])


def test_token_advantages_refuse_values_beyond_float32():
    groups = groups_of([{"prompt": "1"}], ["a", "b"], torch.tensor([0.0, 1.0]))
    model = RewardModel(["exact_answer"], [3e38])
    model.functions = [lambda **columns: [0.0, 1e20]]
    found = reward_advantages(
        model(["q"] * 2, ["a", "b"], {}), model.weights, config(num_generations=2, scale_rewards="none")
    )
    with pytest.raises(UserError, match="an advantage is beyond the numbers of float32; set smaller reward_weights"):
        token_advantages(groups, found, None)


def test_reward_advantages_with_a_penalty_move_equal_rewards():
    rewards = rewards_of(torch.ones(4))
    got = reward_advantages(rewards, WEIGHT, config(scale_rewards="none"), torch.tensor([0.0, 1.0, 0.0, 3.0]))
    assert got.outcome.tolist() == [1.0, 0.0, 1.0, -2.0]
    without = reward_advantages(rewards, WEIGHT, config())
    assert without.outcome.tolist() == [0.0] * 4
    assert without.equal.tolist() == [True] * 4


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_reference_follows_the_policy(tmp_path, share):
    fields = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": share}
    made = trainer(tmp_path, **fields, max_steps=5, learning_rate=1e-2)
    initial = [p.clone() for p in made.learner.reference.parameters()]
    weights = []
    for _ in made.steps():
        weights.append([p.detach().clone() for p in made.model.parameters()])
        reference = list(made.learner.reference.parameters())
        expected = initial
        for step in range(2, made.step + 1, 2):
            expected = [(1 - share) * old + share * new for old, new in zip(expected, weights[step - 1], strict=True)]
        for got, wanted in zip(reference, expected, strict=True):
            torch.testing.assert_close(got, wanted)
    assert not all(torch.equal(a, b) for a, b in zip(initial, reference, strict=True))


def test_reference_with_tied_weights_is_saved(tmp_path):
    tied = {**SMALL["model_init_kwargs"], "tie_word_embeddings": True}
    fields = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1, "model_init_kwargs": tied}
    made = run_trainer(tmp_path, **fields, max_steps=2)
    made.train()
    again = run_trainer(tmp_path, resume=True, **fields, max_steps=2)
    for got, wanted in zip(again.learner.reference.parameters(), made.learner.reference.parameters(), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kl_in_reward": True}, "kl_in_reward requires beta above 0"),
        ({"sync_ref_model": True}, "sync_ref_model requires beta above 0"),
        ({"sync_ref_model": True, "beta": 0.1, "use_peft": True}, "sync_ref_model requires use_peft=False"),
        ({"reward_baseline": "none"}, "reward_baseline='none' requires scale_rewards='none', not 'group'"),
        ({"reward_baseline": "best_only", "scale_rewards": "batch"}, "'best_only' requires scale_rewards='none'"),
        ({"reward_baseline": "median"}, "reward_baseline='median' is not allowed: it must be one of mean, leave"),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"},
            "normalize_then_sum' requires scale_rewards='group', not 'none'",
        ),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "kl_in_reward": True, "beta": 0.1},
            "normalize_then_sum' requires kl_in_reward=False, not True",
        ),
        ({"ref_model_mixup_alpha": 0.0}, "ref_model_mixup_alpha=0.0 is not allowed"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps=0 is not allowed"),
        ({"max_num_gen_batches": 0}, "max_num_gen_batches=0 is not allowed"),
    ],
)
def test_config_refuses_contradictions(fields, message):
    with pytest.raises(UserError, match=message):
        config(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"reward_baseline": "none", "scale_rewards": "none"},
        {"reward_baseline": "max"},
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"loss_type": "gspo", "num_iterations": 2, "dynamic_sampling": True, "max_num_gen_batches": 2},
    ],
    ids=lambda fields: ",".join(fields),
)
def test_train_with_options_of_advantages(tmp_path, fields):
    metrics, before, after = run(tmp_path, **fields)
    assert len(metrics) == 3
    assert after.isfinite().all()
    assert not torch.equal(before, after)
