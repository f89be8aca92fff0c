"""`linear_policy_loss` compared with Liger's fused loss: value and gradients of the variants that both support."""

import dataclasses

import pytest
import torch

from grpo_kernels import PRESETS, linear_logprob, linear_policy_loss, token_weights
from support.oracle import relative_error

pytest.importorskip("liger_kernel")
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

LENGTHS = [7, 1, 12, 4, 9, 10]
B, T, H, V, MAX_LENGTH = len(LENGTHS), max(LENGTHS), 24, 259, 16
# Both are float32 inside.
TOLERANCE = 5e-6

CASES = {
    **{name: (name, {}) for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")},
    "delta": ("grpo", {"delta": 1.3}),
    "kl": ("dapo", {"beta": 0.1}),
    "kl, cispo": ("cispo", {"beta": 0.1}),
    "kl, sapo": ("sapo", {"beta": 0.1, "sapo_temperature_pos": 0.5, "sapo_temperature_neg": 3.0}),
    "corrected kl": ("bnpo", {"beta": 0.1, "kl_bias_correction": True}),
    "sequence, grpo": ("grpo", {"level": "sequence"}),
    "sequence, dr_grpo": ("dr_grpo", {"level": "sequence"}),
    "sequence, dapo, delta": ("dapo", {"level": "sequence", "delta": 1.16}),
    "sequence, corrected kl": ("bnpo", {"level": "sequence", "beta": 0.1, "kl_bias_correction": True}),
    # Shared as long as a sequence has one loss: at token level, with a KL term or with a correction for each token,
    # Liger multiplies every position, padding included, by its sequence's length.
    "sequence, luspo": ("luspo", {"level": "sequence"}),
}


def objective_of(name):
    loss_type, changes = CASES[name]
    preset = PRESETS[loss_type]
    if preset.kind == "clip":
        bounds = (0.1, 0.15) if changes.get("level", preset.level) == "sequence" else (0.2, 0.28)
        changes = {"epsilon": bounds[0], "epsilon_high": bounds[1], **changes}
    elif preset.kind == "cispo":
        changes = {"epsilon_high": 1.05, **changes}
    return dataclasses.replace(preset, **changes)


def make(temperature, with_bias):
    arguments = {
        "hidden": 2 * torch.randn(B, T, H),
        "weight": torch.randn(V, H) / H**0.5,
        "targets": torch.randint(0, V, (B, T)),
        "bias": torch.randn(V) if with_bias else None,
    }
    logprobs = linear_logprob(**arguments, temperature=temperature)
    # For each sign of the advantage, one sequence has high ratios and another low ones.
    advantages = torch.tensor([0.7, -0.9, -1.3, 0.4, 0.0, -0.2])
    shift = 0.3 * torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, 1.0])[:, None]
    old = logprobs - shift + 0.3 * torch.randn(B, T)
    arguments |= {
        "mask": torch.arange(T) < torch.tensor(LENGTHS)[:, None],
        "advantages": advantages,
        "old_logprobs": old,
        "ref_logprobs": old + 0.5 * torch.randn(B, T),
        "correction": torch.rand(B, T) + 0.5,
    }
    return arguments


def leaves(arguments, frozen):
    wanted = {"hidden": True, "weight": not frozen, "bias": not frozen}
    return {
        name: None if arguments[name] is None else arguments[name].clone().requires_grad_(grad)
        for name, grad in wanted.items()
    }


def liger(arguments, loss_type, objective, temperature, correction, frozen, chunk_size=1):
    leaf = leaves(arguments, frozen)
    module = LigerFusedLinearGRPOLoss(
        beta=objective.beta,
        compiled=False,
        use_ref_model=objective.uses_reference,
        chunk_size=chunk_size,
        epsilon_low=objective.epsilon,
        epsilon_high=objective.upper_epsilon,
        loss_type=loss_type,
        max_completion_length=MAX_LENGTH,
        importance_sampling_level=objective.level,
        sapo_temperature_pos=objective.sapo_temperature_pos,
        sapo_temperature_neg=objective.sapo_temperature_neg,
        temperature=temperature,
        delta=objective.delta,
        use_bias_correction_kl=objective.kl_bias_correction,
    )
    loss, _ = module(
        leaf["hidden"],
        leaf["weight"],
        arguments["targets"],
        arguments["mask"].float(),
        arguments["advantages"],
        bias=leaf["bias"],
        ref_per_token_logps=arguments["ref_logprobs"] if objective.uses_reference else None,
        old_per_token_logps=arguments["old_logprobs"],
        vllm_is_ratio=arguments["correction"] if correction else None,
    )
    return loss, leaf


def ours(arguments, objective, temperature, correction, frozen):
    leaf = leaves(arguments, frozen)
    result = linear_policy_loss(
        leaf["hidden"],
        leaf["weight"],
        arguments["targets"],
        arguments["advantages"],
        token_weights(arguments["mask"], objective.aggregation, constant_length=MAX_LENGTH),
        objective,
        old_logprobs=arguments["old_logprobs"],
        ref_logprobs=arguments["ref_logprobs"] if objective.uses_reference else None,
        correction=arguments["correction"].expand(B, T) if correction else None,
        bias=leaf["bias"],
        temperature=temperature,
        max_buffer_bytes=11 * 4 * (V + 3 * H),
    )
    return result.loss, leaf


def gradients(loss, leaf):
    (1.7 * loss).backward()
    return {"loss": loss.detach(), **{k: v.grad for k, v in leaf.items() if v is not None and v.requires_grad}}


def compare(name, temperature=1.0, correction=False, frozen=False, with_bias=False, chunk_size=1):
    arguments, objective = make(temperature, with_bias), objective_of(name)
    if CASES[name][0] == "luspo":
        arguments["correction"] = arguments["correction"][:, :1]
    theirs = gradients(
        *liger(arguments, CASES[name][0], objective, temperature, correction, frozen, chunk_size=chunk_size)
    )
    mine = gradients(*ours(arguments, objective, temperature, correction, frozen))
    assert mine.keys() == theirs.keys()
    for part, value in mine.items():
        assert theirs[part].any(), part
        assert relative_error(value, theirs[part]) < TOLERANCE, part


@pytest.mark.parametrize("correction", [False, True], ids=["", "corrected"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("name", CASES)
def test_linear_policy_loss_equals_liger(name, frozen, correction):
    compare(name, frozen=frozen, correction=correction)


@pytest.mark.parametrize("name", ["grpo", "kl", "cispo", "sequence, grpo"])
def test_bias_and_temperature_equal_liger(name):
    compare(name, temperature=0.8, with_bias=True, chunk_size=4)


def test_comparison_detects_differences():
    arguments = make(1.0, False)
    right = gradients(*liger(arguments, "grpo", objective_of("grpo"), 1.0, False, False))
    for wrong, temperature, correction in [("dapo", 1.0, False), ("grpo", 0.99, False), ("grpo", 1.0, True)]:
        other = gradients(*ours(arguments, objective_of(wrong), temperature, correction, False))
        for part, value in other.items():
            assert relative_error(value, right[part]) > 1e-3, part
