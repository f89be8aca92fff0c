"""Tokens that were forced, to close the thinking: no loss, no share in any mean, and no part in the correction."""

import dataclasses

import pytest
import torch
from accelerate import Accelerator

from grpo_fast.config import GRPOConfig
from grpo_fast.files import read_metrics
from grpo_fast.rollout import Response
from grpo_fast.train.batch import build_step_batch
from grpo_fast.train.learner import Learner
from support.rows import plain_logprobs
from support.small import trainer
from support.tiny import random_samples, tiny_model

SAMPLES = random_samples(groups=2, per_group=2, longest=9)


def step(mode="sequence_mask", forced=True, **fields):
    """A learner and a batch of unequal completions; in each, the first token (and one more) was forced."""
    config = GRPOConfig(
        "x", dataset_name="x", reward_funcs=["x"], use_cpu=True, use_vllm=True, max_completion_length=9,
        vllm_importance_sampling_mode=mode, max_grad_norm=0.0, **fields,
    )  # fmt: skip
    learner = Learner(tiny_model(), config, Accelerator(cpu=True), [2, 3], 0)
    lengths = [len(sample.completion_ids) for sample in SAMPLES]
    mask = torch.cat([torch.arange(length) % 4 != 0 for length in lengths])
    batch = build_step_batch(
        SAMPLES, torch.ones(4, dtype=torch.bool), learner.objective, config, mask if forced else None
    )
    torch.manual_seed(1)
    advantages = torch.randn(4).repeat_interleave(torch.tensor(lengths))
    batch.set_advantages(advantages, learner.objective)
    with torch.no_grad():
        batch.sampling_logprobs = plain_logprobs(learner.model, SAMPLES)
    # What a sampler may report for a token that it did not sample.
    batch.sampling_logprobs = batch.sampling_logprobs.masked_fill(~mask, 0.0) if forced else batch.sampling_logprobs
    return learner, batch, mask


def gradient(learner):
    return torch.cat([p.grad.flatten() for p in learner.policy.parameters()])


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask", "geometric_mask"])
def test_gradient_is_that_of_the_sampled_tokens(mode):
    """On-policy: the mean over the sampled tokens of -A grad log p, each corrected with ratio 1."""
    learner, batch, mask = step(mode)
    metrics = learner.accumulate_gradients(batch)
    model = tiny_model()
    loss = -(batch.advantages * plain_logprobs(model, SAMPLES))[mask].sum() / mask.sum()
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradient(learner), expected, rtol=1e-5, atol=1e-7)
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-5
    for statistic in ("min", "mean", "max"):
        assert metrics[f"sampling/importance_sampling_ratio/{statistic}"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("level", ["sequence", "product"])
def test_sequence_ratio_leaves_forced_tokens_out(level):
    """Of old log-probabilities that differ everywhere, those of forced tokens have no effect."""
    gradients = []
    for shift in (0.0, 3.0):
        learner, batch, mask = step(importance_sampling_level=level, epsilon=10.0)
        with torch.no_grad():
            old = plain_logprobs(learner.model, SAMPLES) + 0.1
        batch.old_logprobs = torch.where(mask, old, old + shift)
        learner.accumulate_gradients(batch)
        gradients.append(gradient(learner))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    assert gradients[0].norm() > 1e-3


def test_kl_in_the_reward_leaves_forced_tokens_out():
    learner, batch, mask = step(beta=0.5, kl_in_reward=True)
    with torch.no_grad():
        k1 = torch.arange(len(mask)) / 8
        batch.ref_logprobs = plain_logprobs(learner.model, SAMPLES) - k1
    penalty, mean = learner.kl_penalty(batch)
    expected = [0.5 * part.sum().item() for part in (k1 * mask).split(batch.offsets.diff().tolist())]
    assert penalty.tolist() == pytest.approx(expected, abs=1e-4)
    assert mean == pytest.approx(k1[mask].mean().item(), abs=1e-4)


def test_high_entropy_counts_completions_that_begin_with_a_forced_token():
    learner, batch, mask = step(top_entropy_quantile=0.5)
    marked = learner.high_entropy(batch)
    assert not marked[~mask].any()
    assert marked.sum() == pytest.approx(mask.sum() / 2, abs=1)


def test_step_without_forced_tokens_is_unchanged():
    """A mask without gaps, and no mask."""
    results = []
    for mask in (None, True):
        learner, batch, _ = step(forced=False)
        if mask:
            whole = torch.ones_like(batch.weights)
            batch = dataclasses.replace(
                build_step_batch(SAMPLES, batch.counted, learner.objective, learner.config, whole),
                advantages=batch.advantages, active=batch.active, sampling_logprobs=batch.sampling_logprobs,
            )  # fmt: skip
        results.append((learner.accumulate_gradients(batch), gradient(learner)))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_trainer_gives_forced_tokens_no_weight(tmp_path, monkeypatch):
    """From the engine's masks to the weights of the loss, the metrics and the completions file."""
    made = trainer(tmp_path, max_steps=1, log_completions_steps=1)
    engine, batches = made.rollout.engine, []
    generate, accumulate = engine.generate, made.learner.accumulate_gradients

    def forced(prompt_ids, sampling):
        responses = generate(prompt_ids, sampling)
        return [
            Response(ids, reason, logprobs, mask=[place > 0 or index % 2 == 0 for place in range(len(ids))])
            for index, (ids, reason, logprobs, *_) in enumerate(responses)
        ]

    monkeypatch.setattr(engine, "generate", forced)
    monkeypatch.setattr(
        made.learner, "accumulate_gradients", lambda batch, *rest: batches.append(batch) or accumulate(batch, *rest)
    )
    made.train()
    (batch,) = batches
    firsts = batch.weights[batch.offsets[:-1]] != 0
    assert firsts.tolist() == [True, False] * 16
    assert int((batch.weights == 0).sum()) == 16
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["completions/thinking_closed_ratio"] == 0.5
