"""`policy_loss` with `token_weights` compared with TRL's loss: value, gradient and metrics."""

import dataclasses
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from grpo_kernels import (
    PRESETS,
    PolicyObjective,
    high_entropy_mask,
    off_policy_mask,
    policy_loss,
    token_weights,
)
from support.oracle import relative_error

pytest.importorskip("trl", minversion="1.16")
from trl import GRPOTrainer, RLOOTrainer

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo")
# Presets that have another name in TRL: loss_type with epsilon, importance_sampling_level or delta.
TRL_NAMES = {"gspo": "grpo", "dual_clip": "bnpo", "unclipped": "bnpo"}
LENGTHS = [7, 1, 12, 4, 9, 10]
B, T, MAX_LENGTH = len(LENGTHS), max(LENGTHS), 16
# Everything is float64 but `token_weights`, which are float32, and the loss is a small difference of large terms.
TOLERANCE = 2e-6


def make(lengths=LENGTHS, spread=0.3):
    """A padded batch with holes in its mask, log-ratios on both sides of every bound, and advantages of both signs."""
    rows = len(lengths)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    mask &= torch.rand(rows, T) > 0.2
    mask[:, 0] = torch.tensor(lengths) > 0
    old = torch.randn(rows, T, dtype=torch.float64) - 2
    # For each sign of the advantage, one sequence has high ratios and another low ones.
    advantages = torch.tensor([0.7, -0.9, -1.3, 0.4, 0.0, -0.2], dtype=torch.float64)[:rows]
    shift = spread * torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, 1.0], dtype=torch.float64)[:rows, None]
    return {
        "logprobs": old + shift + spread * torch.randn(rows, T, dtype=torch.float64),
        # TRL takes the quantile of entropies in float32.
        "entropy": 3 * torch.rand(rows, T).double(),
        "mask": mask,
        "advantages": advantages,
        "old_logprobs": old,
        "ref_logprobs": old + 0.5 * torch.randn(rows, T, dtype=torch.float64),
        "correction": torch.rand(rows, T, dtype=torch.float64) + 0.5,
    }


ACCELERATOR = SimpleNamespace(
    num_processes=1,
    sync_gradients=True,
    gather=lambda x: x,
    reduce=lambda x, reduction: x,
    pad_across_processes=lambda x, **_: x,
)


def leaves(batch):
    return {k: batch[k].detach().clone().requires_grad_() for k in ("logprobs", "entropy")}


def trl_loss(batch, loss_type, objective, *, steps=1, num_tokens=None, correction=False, quantile=1.0):
    """(loss, gradients, logged metrics) of TRL for one of `steps` microbatches."""
    leaf = leaves(batch)
    clips = objective.kind == "clip"
    args = SimpleNamespace(
        delta=objective.delta,
        use_bias_correction_kl=objective.kl_bias_correction,
        sapo_temperature_pos=objective.sapo_temperature_pos,
        sapo_temperature_neg=objective.sapo_temperature_neg,
        vespo_k_pos=objective.vespo_k_pos,
        vespo_lambda_pos=objective.vespo_lambda_pos,
        vespo_k_neg=objective.vespo_k_neg,
        vespo_lambda_neg=objective.vespo_lambda_neg,
        steps_per_generation=steps,
    )
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf["logprobs"], leaf["entropy"], None),
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        args=args,
        accelerator=ACCELERATOR,
        model=SimpleNamespace(training=True),
        loss_type=loss_type,
        importance_sampling_level="token" if loss_type == "vespo" else objective.level,
        beta=objective.beta,
        epsilon_low=objective.epsilon,
        epsilon_high=objective.upper_epsilon if clips else objective.epsilon_high,
        max_completion_length=MAX_LENGTH,
        current_gradient_accumulation_steps=steps,
        use_vllm=correction,
        vllm_importance_sampling_correction=correction,
        aux_loss_enabled=False,
        top_entropy_quantile=quantile,
        off_policy_mask_threshold=None,
        _entropy_bonus_enabled=objective.entropy_coef != 0,
        use_adaptive_entropy=False,
        entropy_coef=objective.entropy_coef,
        _metrics={"train": defaultdict(list)},
    )
    trainer.get_high_entropy_mask = partial(GRPOTrainer.get_high_entropy_mask, trainer)
    mask = batch["mask"].double()
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 2, dtype=torch.long),
        "prompt_mask": torch.ones(len(mask), 2, dtype=torch.long),
        "completion_ids": torch.zeros(mask.shape, dtype=torch.long),
        "completion_mask": mask,
        "advantages": batch["advantages"],
        "old_per_token_logps": batch["old_logprobs"],
        "ref_per_token_logps": batch["ref_logprobs"],
        **({"importance_sampling_ratio": batch["correction"]} if correction else {}),
        "num_items_in_batch": mask.sum() if num_tokens is None else num_tokens,
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return loss.detach(), {k: v.grad for k, v in leaf.items()}, metrics


def our_loss(batch, objective, *, weights=None, correction=False, quantile=1.0):
    leaf = leaves(batch)
    advantages = batch["advantages"]
    if quantile < 1:
        advantages = advantages[:, None] * high_entropy_mask(batch["entropy"], batch["mask"], quantile)
    if weights is None:
        weights = token_weights(batch["mask"], objective.aggregation, constant_length=MAX_LENGTH)
    result = policy_loss(
        leaf["logprobs"],
        advantages,
        weights,
        objective,
        old_logprobs=batch["old_logprobs"],
        ref_logprobs=batch["ref_logprobs"] if objective.uses_reference else None,
        entropy=leaf["entropy"],
        correction=batch["correction"] if correction else None,
    )
    result.loss.backward()
    return result.loss.detach(), {k: v.grad for k, v in leaf.items()}, result.stats


def compare(batch, loss_type, objective, **options):
    loss, grads, metrics = trl_loss(batch, loss_type, objective, **options)
    our, our_grads, stats = our_loss(batch, objective, **options)
    assert grads["logprobs"].any()
    assert relative_error(our, loss) < TOLERANCE
    assert relative_error(our_grads["logprobs"], grads["logprobs"]) < TOLERANCE
    if objective.entropy_coef != 0:
        assert relative_error(our_grads["entropy"], grads["entropy"]) < TOLERANCE
    return metrics, stats


def variant(loss_type, level, **changes):
    # A sequence's ratio is a mean and stays near 1, so its bounds are narrower.
    bounds = {"token": (0.2, 0.28, 1.05), "sequence": (0.1, 0.15, 1.02)}[level]
    if PRESETS[loss_type].kind == "clip":
        changes = {"epsilon": bounds[0], "epsilon_high": bounds[1], **changes}
    elif PRESETS[loss_type].kind == "cispo":
        changes = {"epsilon_high": bounds[2], **changes}
    return dataclasses.replace(PRESETS[loss_type], level=level, **changes)


@pytest.mark.parametrize("correction", [False, True], ids=["", "corrected"])
@pytest.mark.parametrize("kl", [{}, {"beta": 0.1}, {"beta": 0.1, "kl_bias_correction": True}], ids=str)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_policy_loss_presets_equal_trl(loss_type, level, kl, correction):
    objective = variant(loss_type, level, **kl)
    metrics, stats = compare(make(), loss_type, objective, correction=correction)
    assert metrics["entropy"] == pytest.approx((stats["entropy"] / stats["tokens"]).item())
    if objective.uses_reference and not objective.kl_bias_correction:
        assert metrics["kl"] == pytest.approx((stats["kl"] / stats["tokens"]).item())
    # TRL logs the mean over tokens, or over sequences where the ratio is a sequence's.
    fractions = {"low": stats["clip_low"] / stats["ratios"], "high": stats["clip_high"] / stats["ratios"]}
    if objective.kind == "clip":
        assert min(fractions.values()) > 0
        assert metrics["clip_ratio/low_mean"] == pytest.approx(fractions["low"].item())
        assert metrics["clip_ratio/high_mean"] == pytest.approx(fractions["high"].item())
    elif objective.kind == "cispo":
        assert fractions["high"] > 0
        assert metrics["cispo_clip_ratio"] == pytest.approx(fractions["high"].item())


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"])
def test_delta_equals_trl(loss_type, level):
    """The bound of the unclipped ratio changes both losses equally."""
    batch = make()
    objective = variant(loss_type, level, delta={"token": 1.3, "sequence": 1.16}[level])
    compare(batch, loss_type, objective)
    compare(batch, loss_type, dataclasses.replace(objective, beta=0.1, kl_bias_correction=True))
    unbounded = dataclasses.replace(objective, delta=None)
    assert not torch.allclose(our_loss(batch, objective)[0], our_loss(batch, unbounded)[0], rtol=1e-4)


@pytest.mark.parametrize("preset", TRL_NAMES)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_presets_with_other_names_equal_trl(preset, beta):
    """With their default bounds; gspo's are so narrow that only log-ratios near 0 are within them."""
    spread = 3e-4 if preset == "gspo" else 0.6
    _, stats = compare(make(spread=spread), TRL_NAMES[preset], dataclasses.replace(PRESETS[preset], beta=beta))
    assert (stats["clip_low"] + stats["clip_high"] > 0) == (preset != "unclipped")


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_vespo_equals_trl(beta):
    """Without KL correction, for which TRL uses a token's ratio, and ours the sequence's."""
    objective = dataclasses.replace(PRESETS["vespo"], beta=beta)
    compare(make(), "vespo", objective)
    compare(make(), "vespo", dataclasses.replace(objective, vespo_k_pos=1.5, vespo_lambda_neg=0.7))
    # Ratios outside the bounds of the weight's logarithm.
    compare(make(spread=4.0), "vespo", objective)


def test_rloo_equals_trl():
    """TRL's RLOOTrainer: the ratio is the product of the sequence's, and its clipped loss a mean over sequences."""
    batch = make(spread=0.1)
    leaf = leaves(batch)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf["logprobs"], leaf["entropy"], None),
        accelerator=ACCELERATOR,
        model=SimpleNamespace(training=True),
        epsilon_low=0.2,
        epsilon_high=0.2,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    mask = batch["mask"].double()
    inputs = {
        "prompt_ids": torch.zeros(B, 2, dtype=torch.long),
        "prompt_mask": torch.ones(B, 2, dtype=torch.long),
        "completion_ids": torch.zeros(mask.shape, dtype=torch.long),
        "completion_mask": mask,
        "advantages": batch["advantages"],
        "old_logps": (batch["old_logprobs"] * mask).sum(1),
    }
    loss = RLOOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    our, our_grads, stats = our_loss(batch, PRESETS["rloo"])
    assert leaf["logprobs"].grad.any()
    assert relative_error(our, loss) < TOLERANCE
    assert relative_error(our_grads["logprobs"], leaf["logprobs"].grad) < TOLERANCE
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    assert metrics["clip_ratio/high_mean"] == pytest.approx((stats["clip_high"] / stats["ratios"]).item())
    assert metrics["clip_ratio/low_mean"] == pytest.approx((stats["clip_low"] / stats["ratios"]).item())
    assert stats["clip_high"] + stats["clip_low"] > 0


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("bounds", [(0.4, 0.4), (0.2, 0.3)])
def test_gmpo_equals_trl(bounds, beta):
    """TRL's experimental GMPOTrainer: the bounds are those of the log-ratio, and the KL is a mean over sequences."""
    gmpo = pytest.importorskip("trl.experimental.gmpo")
    batch = make()
    leaf = leaves(batch)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf["logprobs"], leaf["entropy"], None),
        accelerator=ACCELERATOR,
        model=SimpleNamespace(training=True),
        epsilon_low=bounds[0],
        epsilon_high=bounds[1],
        beta=beta,
        top_entropy_quantile=1.0,
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    mask = batch["mask"].double()
    inputs = {
        "prompt_ids": torch.zeros(B, 2, dtype=torch.long),
        "prompt_mask": torch.ones(B, 2, dtype=torch.long),
        "completion_ids": torch.zeros(mask.shape, dtype=torch.long),
        "completion_mask": mask,
        "advantages": batch["advantages"],
        "old_per_token_logps": batch["old_logprobs"],
        "ref_per_token_logps": batch["ref_logprobs"],
    }
    loss = gmpo.GMPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    objective = dataclasses.replace(PRESETS["gmpo"], epsilon=bounds[0], epsilon_high=bounds[1], beta=beta)
    our, our_grads, _ = our_loss(batch, objective)
    assert leaf["logprobs"].grad.any()
    assert relative_error(our, loss) < TOLERANCE
    assert relative_error(our_grads["logprobs"], leaf["logprobs"].grad) < TOLERANCE


@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.3])
def test_off_policy_mask_equals_trl(threshold):
    batch, left_out = make(), 0
    batch["old_logprobs"][2, 1] = float("nan")
    mask, advantages = batch["mask"].double(), batch["advantages"][:, None]
    arguments = batch["logprobs"], batch["old_logprobs"]
    theirs = GRPOTrainer.get_off_policy_mask(advantages, *arguments, mask, threshold)
    ours = off_policy_mask(*arguments, advantages.expand(B, T), threshold, mask=mask)
    assert torch.equal(ours, theirs.expand(B, T).float())
    left_out += (ours == 0).any(1).sum().item()
    assert 0 < left_out < B


@pytest.mark.parametrize("quantile", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("kl", [{}, {"beta": 0.1, "kl_bias_correction": True}], ids=str)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_high_entropy_mask_equals_trl(loss_type, level, kl, quantile):
    batch, objective = make(), variant(loss_type, level, **kl)
    compare(batch, loss_type, objective, quantile=quantile)
    everything, some = (our_loss(batch, objective, quantile=q)[1]["logprobs"] for q in (1.0, quantile))
    assert relative_error(some, everything) > 0.01


def test_sapo_temperatures_equal_trl():
    compare(make(), "sapo", variant("sapo", "token", sapo_temperature_pos=0.5, sapo_temperature_neg=3.0))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_without_old_logprobs_equals_trl(loss_type, level):
    compare({**make(), "old_logprobs": None}, loss_type, variant(loss_type, level))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_empty_sequences_count_as_in_trl(loss_type, level):
    compare(make([7, 0, 12, 4]), loss_type, variant(loss_type, level, beta=0.1))


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo", "cispo"])
def test_entropy_bonus_equals_trl(loss_type):
    """For loss types that weight tokens equally: TRL always averages the entropy over tokens."""
    compare(make(), loss_type, variant(loss_type, "token", entropy_coef=0.1))


@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if name != "bnpo"])
def test_gradient_accumulation_equals_trl(loss_type):
    """Two microbatches against two of TRL's. Its bnpo takes the mean over each microbatch, so it depends on the split;
    ours does not."""
    batch, objective = make(), variant(loss_type, "token", beta=0.1)
    weights = token_weights(batch["mask"], objective.aggregation, constant_length=MAX_LENGTH)
    assert batch["mask"][: B // 2].sum() != batch["mask"][B // 2 :].sum()
    for rows in (slice(0, B // 2), slice(B // 2, B)):
        part = {name: value[rows] for name, value in batch.items()}
        loss, grads, _ = trl_loss(part, loss_type, objective, steps=2, num_tokens=batch["mask"].sum())
        our, our_grads, _ = our_loss(part, objective, weights=weights[rows])
        assert relative_error(our, loss) < TOLERANCE
        assert relative_error(our_grads["logprobs"], grads["logprobs"]) < TOLERANCE


def test_comparison_detects_differences():
    """Another preset, bound or correction differs by a wide margin."""
    batch, right = make(), variant("grpo", "token", beta=0.1)
    expected = trl_loss(batch, "grpo", right)[1]["logprobs"]
    for wrong in (
        variant("dapo", "token", beta=0.1),
        variant("grpo", "sequence", beta=0.1),
        variant("grpo", "token", beta=0.1, epsilon=0.4),
        variant("grpo", "token", beta=0.1, kl_bias_correction=True),
        PolicyObjective(kind="reinforce", beta=0.1),
    ):
        assert relative_error(our_loss(batch, wrong)[1]["logprobs"], expected) > 1e-3
    assert relative_error(our_loss(batch, right, correction=True)[1]["logprobs"], expected) > 1e-3
