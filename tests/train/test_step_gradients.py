"""The gradient of an optimizer step does not depend on its division into microbatches."""

import dataclasses
from itertools import pairwise

import pytest
import torch

from grpo_fast.config import GRPOConfig
from grpo_fast.model.attention import install
from grpo_fast.model.loading import add_adapter
from grpo_fast.model.microbatch_policy import MicrobatchPolicy
from grpo_fast.model.packing import build_microbatch, plan_rows
from grpo_fast.model.policy import LossInputs
from grpo_fast.train.batch import build_step_batch
from grpo_kernels import PRESETS
from grpo_kernels._policy_terms import Tokens
from grpo_kernels.policy_loss import policy_loss_ref
from support.rows import LAYOUTS, plain_logprobs
from support.tiny import random_samples, tiny_model

SAMPLES = random_samples(groups=4, per_group=4)
CONFIG = GRPOConfig("x", dataset_name="x", reward_funcs=["x"], max_completion_length=11)


def step(objective, old_shift=0.0):
    """A step's batch: unequal lengths, one group without variance, one completion left out of the loss."""
    torch.manual_seed(1)
    advantages = torch.randn(16)
    advantages[4:8] = 0.0
    counted = torch.ones(16, dtype=torch.bool)
    counted[9] = False
    batch = build_step_batch(SAMPLES, counted, objective, CONFIG)
    batch.set_advantages(advantages.repeat_interleave(batch.offsets.diff()), objective)
    if old_shift:
        with torch.no_grad():
            logprobs = plain_logprobs(tiny_model(), SAMPLES)
        batch.old_logprobs = logprobs + old_shift * torch.randn_like(logprobs)
    if objective.needs_selection:
        batch.selected = torch.rand_like(batch.weights) < 0.3
    if objective.uses_reference:
        batch.ref_logprobs = torch.randn(batch.weights.shape, dtype=torch.float64) - 3
    return batch, counted


def split(items, count):
    """`count` unequal, non-empty parts."""
    bounds = [round(len(items) * (index / count) ** 1.3) for index in range(count + 1)]
    bounds = [max(bound, index) for index, bound in enumerate(bounds)]
    return [items[a:b] for a, b in pairwise(bounds) if items[a:b]]


def trained_model(adapters):
    """A model, possibly with LoRA adapters that have an effect, and its trained parameters."""
    model = tiny_model()
    if adapters:
        config = GRPOConfig("x", dataset_name="x", reward_funcs=["x"], use_peft=True, lora_r=4)
        add_adapter(model, config)
        torch.manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter, dtype=torch.float64) / 4
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradient(objective, batch, microbatches, layout, adapters=False):
    model, trained = trained_model(adapters)
    policy = MicrobatchPolicy(model)
    packed = layout != "padded"
    assert not packed or install(model)
    rows = plan_rows(batch.samples, batch.active, 10_000 if layout == "shared" else 0)
    parts = split(rows, min(microbatches, len(rows)))
    total = 0.0
    for part in parts:
        microbatch = build_microbatch(batch.samples, part, batch.offsets, 0, packed)
        names = ("advantages", "weights", "old_logprobs", "ref_logprobs", "selected")
        fields = {name: getattr(batch, name) for name in names}
        inputs = LossInputs(
            objective=objective, **{n: None if f is None else f[microbatch.tokens] for n, f in fields.items()}
        )
        loss = policy(microbatch, inputs).loss
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in trained]), len(parts)


def reference_gradient(objective, batch, adapters=False):
    """Full logits of all completions at once, and the loss by its definition."""
    model, trained = trained_model(adapters)
    tokens = Tokens(
        batch.advantages.double(), batch.weights.double(), batch.old_logprobs, batch.ref_logprobs,
        selected=None if batch.selected is None else batch.selected.double(),
    )  # fmt: skip
    loss, _ = policy_loss_ref(plain_logprobs(model, batch.samples), tokens, objective, None, batch.offsets)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trained])


@pytest.mark.parametrize("old_shift", [0.0, 0.3])
@pytest.mark.parametrize("beta", [0.0, 0.1])
# The remaining presets differ only in their bounds.
@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - {"bnpo", "dual_clip", "unclipped"}))
def test_gradient_is_the_same_for_any_number_of_microbatches(preset, beta, old_shift):
    objective = dataclasses.replace(PRESETS[preset], beta=beta, kl_bias_correction=True)
    batch, counted = step(objective, old_shift)
    expected_loss, expected = reference_gradient(objective, batch)
    assert expected.norm() > 1e-3
    # Without KL the group without variance is not even computed.
    assert len(batch.active) == int(counted.sum()) - (4 if objective.advantage_alone else 0)
    for microbatches in (1, 2, 5, 16):
        for layout in LAYOUTS:
            loss, got, parts = gradient(objective, batch, microbatches, layout)
            assert layout == "shared" or parts == min(microbatches, len(batch.active))
            assert loss == pytest.approx(expected_loss, rel=1e-9, abs=1e-12)
            assert (got - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("dropping", [True, False], ids=["dropped", "all"])
@pytest.mark.parametrize("preset", ["grpo", "dapo", "gspo"])
def test_gradient_is_the_same_with_adapters_and_without_dropping(preset, dropping, adapters):
    """Groups without variance, whose gradient is zero, may be computed or not."""
    objective = PRESETS[preset]
    batch, counted = step(objective, old_shift=0.3)
    expected_loss, expected = reference_gradient(objective, batch, adapters)
    assert len(batch.active) == int(counted.sum()) - 4
    if not dropping:
        batch.active = counted.nonzero().squeeze(1).tolist()
    for microbatches in (1, 16):
        for layout in LAYOUTS:
            loss, got, _ = gradient(objective, batch, microbatches, layout, adapters)
            assert loss == pytest.approx(expected_loss, rel=1e-9, abs=1e-12)
            assert (got - expected).norm() <= 1e-9 * expected.norm()


def test_gradient_with_a_wrong_normaliser_differs():
    """The checks above detect weights that are normalised in a microbatch instead of over the step."""
    objective = PRESETS["dapo"]
    batch, _ = step(objective)
    _, expected = reference_gradient(objective, batch)
    batch.weights = batch.weights * 1.01
    _, got, _ = gradient(objective, batch, 2, "packed")
    assert (got - expected).norm() > 1e-3 * expected.norm()
