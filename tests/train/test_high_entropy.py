"""`top_entropy_quantile` in the trainer: which tokens carry the policy gradient, and the gradient itself."""

import dataclasses

import pytest
import torch

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from support.small import SMALL, trainer

QUANTILE = 0.25
FIELDS = {"max_completion_length": 6, "top_entropy_quantile": QUANTILE, "log_completions_steps": 0, "max_steps": 1}


def plain(model, batch):
    """Log-probabilities and entropies ``[N]`` from the model's own logits."""
    found = []
    for sample in batch.samples:
        ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
        log_p = model(ids).logits[0, len(sample.prompt_ids) - 1 : -1].log_softmax(-1)
        targets = torch.tensor(sample.completion_ids)[:, None]
        found.append(torch.stack([log_p.gather(1, targets).squeeze(1), -(log_p.exp() * log_p).sum(-1)]))
    return torch.cat(found, 1)


@pytest.mark.parametrize("microbatch", [8192, 30])
@pytest.mark.parametrize("preset", ["dapo", "grpo"])
def test_gradient_comes_from_the_tokens_of_highest_entropy(tmp_path, preset, microbatch):
    made = trainer(tmp_path, loss_type=preset, max_tokens_per_microbatch=microbatch, **FIELDS)
    batch, _ = made.collect()
    # Tokens of groups without variance also count for the quantile.
    batch.advantages[batch.offsets[4] : batch.offsets[8]] = 0.0
    batch.active = [index for index in batch.active if not 4 <= index < 8]
    logprobs, entropy = plain(made.model, batch)
    assert len(torch.unique((entropy * 1e4).round())) > 20
    expected_mask = entropy >= entropy.detach().quantile(1 - QUANTILE)
    lengths = batch.offsets.diff()
    normaliser = len(logprobs) if preset == "dapo" else (lengths * len(lengths)).repeat_interleave(lengths)
    loss = -(expected_mask * batch.advantages * logprobs / normaliser).sum()
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in made.model.parameters()])
    made.model.zero_grad()

    batch.high_entropy = made.learner.high_entropy(batch)
    assert torch.equal(batch.high_entropy, expected_mask)
    made.learner.accumulate_gradients(batch)
    got = torch.cat([p.grad.flatten() for p in made.model.parameters()])
    assert (got - expected).norm() < 1e-4 * expected.norm()
    made.model.zero_grad()
    made.learner.accumulate_gradients(dataclasses.replace(batch, high_entropy=None))
    everything = torch.cat([p.grad.flatten() for p in made.model.parameters()])
    assert (everything - expected).norm() > 0.1 * expected.norm()


def test_high_entropy_ignores_completions_outside_of_the_loss(tmp_path):
    made = trainer(tmp_path, mask_truncated_completions=True, **FIELDS)
    batch, _ = made.collect()
    counted = batch.weights != 0
    assert 0 < counted.sum() < len(counted)
    entropy = plain(made.model, batch)[1].detach()
    expected = counted & (entropy >= entropy[counted].quantile(1 - QUANTILE))
    assert torch.equal(made.learner.high_entropy(batch), expected)


def test_high_entropy_follows_the_policy_in_every_update(tmp_path):
    """With two updates on a batch, the second mask comes from the changed weights."""
    made = trainer(tmp_path, num_iterations=2, **{**FIELDS, "max_steps": 2, "learning_rate": 0.05})
    masks = []
    ask = made.learner.high_entropy
    made.learner.high_entropy = lambda batch: masks.append(ask(batch)) or masks[-1]
    made.train()
    assert len(masks) == 2
    assert masks[0].shape == masks[1].shape
    assert (masks[0] != masks[1]).any()


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_config_refuses_a_quantile_out_of_range(value):
    with pytest.raises(UserError, match=r"top_entropy_quantile=.* must be a finite number, from 0 to 1"):
        GRPOConfig(**{**SMALL, "top_entropy_quantile": value})
