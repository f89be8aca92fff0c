"""Masks of tokens and sequences, covariance and adaptive entropy in the trainer, and the diagnosis of its updates."""

import json
import math
from typing import get_args, get_type_hints

import pytest
import torch

from grpo_fast.config import GRPOConfig, ignored_settings
from grpo_fast.errors import UserError
from grpo_fast.train.diagnosis import diagnose
from grpo_kernels import REJECTION_MODES, covariance_mask
from support.runs import figures, trainer
from support.small import SMALL

VLLM = {"use_vllm": True, "use_cpu": False}


def off_policy_batch(made):
    """A batch one update old, whose policy has moved by different distances in different completions."""
    batch, _ = made.collect()
    learner = made.learner
    batch.old_logprobs = learner.score(learner.policy, batch)
    moved = torch.linspace(-0.6, 0.8, len(batch.samples)).repeat_interleave(batch.offsets.diff())
    batch.old_logprobs = batch.old_logprobs + moved
    return batch


def gradient(made, batch):
    metrics = made.learner.accumulate_gradients(batch)
    found = torch.cat([p.grad.flatten() for p in made.model.parameters()])
    made.learner.optimizer.zero_grad()
    return found, metrics


def left_out(batch, logprobs, threshold):
    """By equation 9 of DeepSeek-V3.2, completion by completion."""
    found = []
    for index, (first, last) in enumerate(zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), strict=True)):
        fell = (batch.old_logprobs - logprobs)[first:last].mean()
        found.append(index in batch.active and batch.advantages[first] < 0 and fell > threshold)
    return found


@pytest.mark.parametrize("packed", [True, False])
def test_off_policy_mask_leaves_out_the_policy_gradient_of_sequences(tmp_path, packed):
    """The KL term of those sequences stays, as in TRL."""
    made = trainer(
        tmp_path, loss_type="unclipped", num_iterations=2, off_policy_mask_threshold=0.3, beta=0.1,
        padding_free="auto" if packed else "never",
    )  # fmt: skip
    batch = off_policy_batch(made)
    out = left_out(batch, made.learner.score(made.learner.policy, batch), 0.3)
    assert 0 < sum(out) < len(out) - 5
    masked, metrics = gradient(made, batch)
    assert metrics["objective/masked_sequences"] == pytest.approx(sum(out) / len(batch.active))
    made.config.off_policy_mask_threshold = None
    everything, plain = gradient(made, batch)
    assert "objective/masked_sequences" not in plain
    kept = torch.tensor([not o for o in out]).repeat_interleave(batch.offsets.diff())
    batch.advantages = batch.advantages * kept
    expected, _ = gradient(made, batch)
    assert (masked - expected).norm() < 1e-5 * expected.norm()
    assert (masked - everything).norm() > 0.05 * expected.norm()
    assert metrics["loss/policy"] + metrics["loss/kl"] == pytest.approx(metrics["loss"], abs=1e-6)


def test_rejection_leaves_out_what_the_sampler_drew_far_from_the_policy(tmp_path):
    made = trainer(tmp_path)
    batch, _ = made.collect()
    scored = made.learner.score(made.learner.policy, batch)
    far = torch.arange(len(batch.samples)) % 3 == 0
    shift = far.float().repeat_interleave(batch.offsets.diff())
    batch.sampling_logprobs = scored - shift
    config = made.config
    config.vllm_importance_sampling_correction = False
    config.rollout_rs, config.rollout_rs_threshold = "seq_mean_k2", 0.1
    rejected, metrics = gradient(made, batch)
    assert torch.equal(batch.correction[batch.weights != 0] == 0, (shift == 1)[batch.weights != 0])
    active = torch.tensor(batch.active)
    assert metrics["objective/masked_sequences"] == pytest.approx(far[active].float().mean().item())
    batch.sampling_logprobs = batch.correction = None
    batch.advantages = batch.advantages * (1 - shift)
    expected, _ = gradient(made, batch)
    assert (rejected - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_covariance_is_that_of_the_step_under_the_policy_of_the_update(tmp_path, name):
    fields = {"covariance_ratio": 0.1, "num_iterations": 2, "max_steps": 2}
    fields |= {"covariance_low": 0.01, "covariance_high": 5.0} if name == "clip_cov" else {}
    made = trainer(tmp_path, loss_type=name, **fields)
    seen = []
    ask = made.learner.high_covariance
    made.learner.high_covariance = lambda batch: seen.append((batch, ask(batch))) or seen[-1][1]
    made.train()
    (batch, first), (again, second) = seen
    assert batch is again
    assert first.sum() == second.sum() == int(0.1 * (batch.weights != 0).sum())
    assert (first != second).any()
    entries = figures(tmp_path)
    assert entries[0]["objective/selected_tokens"] == pytest.approx(
        first[batch.weights != 0].float().mean().item(), abs=0.1
    )
    if name == "kl_cov":
        made.learner.policy.eval()
        logprobs = made.learner.score_counted(batch)
        assert torch.equal(ask(batch), covariance_mask(logprobs, batch.advantages, batch.weights, 0.1))


def test_adaptive_entropy_follows_the_target_and_resumes(tmp_path):
    """Up while the entropy is below the target, down above it, within the bounds; a resumed run continues with it."""
    fields = {"use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_coef_delta": 0.004, "save_steps": 1}
    made = trainer(tmp_path / "up", entropy_target=99.0, entropy_coef_max=0.017, max_steps=3, **fields)
    bonuses = []
    update = made.learner.update
    made.learner.update = lambda *args: (bonuses.append(made.learner.objective.entropy_coef), update(*args))[1]
    made.train()
    # None before the first measurement.
    assert bonuses == pytest.approx([0.0, 0.014, 0.017])
    assert [entry["entropy_coef"] for entry in figures(tmp_path / "up")] == pytest.approx([0.014, 0.017, 0.017])
    down = trainer(tmp_path / "down", entropy_target=0.0, max_steps=3, **fields)
    down.train()
    assert [entry["entropy_coef"] for entry in figures(tmp_path / "down")] == pytest.approx([0.006, 0.002, 0.0])
    assert down.learner.objective.entropy_coef == 0
    state = json.loads((tmp_path / "up" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["entropy_coef"] == pytest.approx(0.017)
    more = trainer(tmp_path / "up", resume=True, entropy_target=99.0, entropy_coef_max=0.017, max_steps=4, **fields)
    assert more.state.entropy_coef == pytest.approx(0.017)
    assert more.state.entropy == pytest.approx(figures(tmp_path / "up")[-1]["entropy"])


def test_diagnosis_equals_the_counts_by_hand(tmp_path):
    made = trainer(tmp_path, num_iterations=2, beta=0.1)
    batch = off_policy_batch(made)
    logprobs = made.learner.score(made.learner.policy, batch)
    count = len(logprobs)
    entropy, correction = torch.rand(count), torch.rand(count) + 0.5
    correction[batch.offsets[-3] :] = 0.0
    batch.ref_logprobs = logprobs + 0.1 * torch.randn(count)
    found = diagnose(batch, made.objective, logprobs, entropy, batch.advantages, correction)
    low = high = informative = masked = tokens = 0
    weights, parts = [], [[[], [], [], []] for _ in range(3)]
    for index in batch.active:
        first, last = batch.offsets[index].item(), batch.offsets[index + 1].item()
        for i in range(first, last):
            tokens += 1
            ratio = math.exp(logprobs[i] - batch.old_logprobs[i])
            weights.append(ratio * correction[i].item())
            masked += correction[i].item() == 0
            d = (logprobs[i] - batch.ref_logprobs[i]).item()
            values = entropy[i].item(), math.exp(-d) - 1 + d, (logprobs[i] - batch.old_logprobs[i]).item() ** 2 / 2
            for column, value in zip(parts, values, strict=True):
                column[(i - first) * 4 // (last - first)].append(value)
            if correction[i] != 0 and batch.advantages[i] != 0:
                informative += 1
                low += batch.advantages[i].item() < 0 and ratio < 0.8
                high += batch.advantages[i].item() > 0 and ratio > 1.2
    assert low
    assert high
    expected = {
        "objective/clipped_low": low / informative,
        "objective/clipped_high": high / informative,
        "objective/masked_tokens": masked / tokens,
        "objective/masked_sequences": sum(index >= len(batch.samples) - 2 for index in batch.active)
        / len(batch.active),
        "objective/effective_sample_size": sum(weights) ** 2 / sum(w * w for w in weights) / len(weights),
    }
    for name, column in zip(("entropy", "kl", "moved"), parts, strict=True):
        for part, values in enumerate(column):
            if values:
                expected[f"position/{name}_{part + 1}"] = sum(values) / len(values)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name


def test_run_without_old_policy_reports_no_ratio(tmp_path):
    trainer(tmp_path, max_steps=1).train()
    (entry,) = figures(tmp_path)
    assert entry["objective/clipped_low"] == entry["objective/clipped_high"] == 0
    assert not {name for name in entry if "effective" in name or "moved" in name or "position/kl" in name}
    parts = [value for name, value in entry.items() if name.startswith("position/entropy")]
    assert min(parts) <= entry["entropy"] <= max(parts)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"loss_type": "reinforce", "epsilon_high": 0.3}, "epsilon_high=0.3 has no effect with loss_type='reinforce'"),
        ({"loss_type": "cispo", "epsilon": 0.1}, "epsilon=0.1 has no effect with loss_type='cispo'"),
        ({"loss_type": "dapo", "sapo_temperature_neg": 2.0}, "sapo_temperature_neg=2.0 has no effect with"),
        ({"loss_type": "dapo", "covariance_ratio": 0.1}, "covariance_ratio=0.1 has no effect with loss_type='dapo'"),
        ({"kl_clip": 10.0}, "kl_clip=10.0 has no effect without beta"),
        ({"entropy_target": 0.4}, "entropy_target=0.4 has no effect without use_adaptive_entropy"),
        ({"loss_type": "reinforce", "importance_sampling_level": "sequence", "beta": 0.1}, ""),
        ({"loss_type": "cispo", "epsilon_high": 3.0}, ""),
        ({"kl_clip": 10.0, "beta": 0.1}, ""),
        ({}, ""),
    ],
)
def test_settings_without_effect_are_named(fields, words):
    config = GRPOConfig(**{**SMALL, **fields})
    lines = ignored_settings(config, config.objective())
    assert len(lines) == bool(words)
    assert words in "".join(lines)


def test_config_takes_every_mode_of_rejection():
    modes = [name for hint in get_args(get_type_hints(GRPOConfig)["rollout_rs"]) for name in get_args(hint)]
    assert tuple(modes) == REJECTION_MODES


def test_trainer_says_which_settings_have_no_effect(tmp_path, capsys):
    trainer(tmp_path, loss_type="reinforce", epsilon=0.1)
    assert capsys.readouterr().err.count("epsilon=0.1 has no effect with loss_type='reinforce'") == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold=0.1 has no effect: without use_vllm"),
        ({"rollout_rs": "token_k3", "rollout_rs_threshold": 1.0}, "rollout_rs='token_k3' requires use_vllm"),
        ({"rollout_rs": "token_k3", **VLLM}, "rollout_rs='token_k3' requires rollout_rs_threshold"),
        ({"rollout_rs_threshold": 1.0}, "rollout_rs_threshold=1.0 requires rollout_rs"),
        (
            {"rollout_rs": "token_k3", "rollout_rs_threshold": 1.0, "rollout_rs_threshold_lower": 0.5, **VLLM},
            "rollout_rs_threshold_lower requires a rollout_rs of k1, not 'token_k3'",
        ),
        (
            {"use_adaptive_entropy": True, "entropy_coef_min": 0.5, "entropy_coef_max": 0.1},
            "entropy_coef_min=0.5 is above entropy_coef_max=0.1",
        ),
        ({"loss_type": "clip_cov", "covariance_ratio": 2.0}, "covariance_ratio=2.0 is not allowed"),
    ],
)
def test_masks_that_cannot_act_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        GRPOConfig(**{**SMALL, **fields})
