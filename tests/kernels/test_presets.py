"""Every preset against its paper's formula, written out sequence by sequence in float64.

The formulas are objectives to maximise, as in the papers; docs/objectives.md names the equations.
"""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch

from grpo_fast.config import GRPOConfig
from grpo_kernels import PRESETS, high_entropy_mask, policy_loss, token_weights
from grpo_kernels.objective import BUILT_IN
from grpo_kernels.objective_table import SOURCES, objective_table
from support.oracle import relative_error

LENGTHS = [7, 1, 12, 4, 9, 10]
SEQUENCES, TOKENS, MAX_LENGTH = len(LENGTHS), sum(LENGTHS), 16
# Everything is float64 except `token_weights`, which are float32.
TOLERANCE = 1e-6


def clipped(ratio, A, low=0.2, high=0.2):
    return torch.minimum(ratio * A, ratio.clamp(1 - low, 1 + high) * A)


def token_ratio(s):
    return torch.exp(s["logp"] - s["old"])


def mean_ratio(s):
    return torch.exp((s["logp"] - s["old"]).mean())


def product_ratio(s):
    return torch.exp((s["logp"] - s["old"]).sum())


def dual_clip(s):
    inner = clipped(token_ratio(s), s["A"])
    return torch.where(s["A"] < 0, torch.maximum(inner, 3.0 * s["A"]), inner)


def sapo_gate(s):
    tau = 1.0 if s["A"] > 0 else 1.05
    return 4 / tau * torch.sigmoid(tau * (token_ratio(s) - 1))


def vespo_weight(s):
    k, decay = (2.0, 3.0) if s["A"] > 0 else (3.0, 2.0)
    W = product_ratio(s).detach()
    return W**k * torch.exp(decay * (1 - W))


def dppo(s, divergence, bound):
    """Written token by token."""
    terms = []
    for logp, old in zip(s["logp"], s["old"], strict=True):
        ratio, far = torch.exp(logp - old).item(), divergence(logp.exp().item(), old.exp().item()) > bound
        leaves = ratio > 1 if s["A"] > 0 else ratio < 1
        terms.append(0.0 * logp if far and leaves else min(ratio, 20.0) * s["A"] * logp)
    return torch.stack(terms)


def binary_kl(p, old):
    return old * math.log(old / p) + (1 - old) * math.log((1 - old) / (1 - p))


def kl_cov(s):
    return token_ratio(s) * s["A"] - s["selected"] * (s["logp"] - s["old"]).abs()


def gmpo(s):
    """The paper's product over tokens, of each `min` (A > 0) or `max` (A < 0) of a ratio and its bound."""
    ratio, bounds = token_ratio(s), (math.exp(-0.4), math.exp(0.4))
    bounded = torch.minimum(ratio, torch.tensor(bounds[1])) if s["A"] > 0 else ratio.clamp(min=bounds[0])
    return bounded.prod() ** (1 / len(ratio)) * s["A"]


# preset -> the objective J of all sequences; each is a dict of logp, old, A.
FORMULAS = {
    "grpo": lambda batch: sum(clipped(token_ratio(s), s["A"]).mean() for s in batch) / SEQUENCES,
    "bnpo": lambda batch: sum(clipped(token_ratio(s), s["A"]).sum() for s in batch) / TOKENS,
    "dapo": lambda batch: sum(clipped(token_ratio(s), s["A"]).sum() for s in batch) / TOKENS,
    "dr_grpo": lambda batch: sum(clipped(token_ratio(s), s["A"]).sum() for s in batch) / SEQUENCES / MAX_LENGTH,
    "gspo": lambda batch: sum(clipped(mean_ratio(s), s["A"], 3e-4, 4e-4) for s in batch) / SEQUENCES,
    "luspo": lambda batch: sum(len(s["logp"]) * clipped(mean_ratio(s), s["A"]) for s in batch) / SEQUENCES,
    "rloo": lambda batch: sum(clipped(product_ratio(s), s["A"]) for s in batch) / SEQUENCES,
    "dual_clip": lambda batch: sum(dual_clip(s).sum() for s in batch) / TOKENS,
    "cispo": lambda batch: (
        sum((token_ratio(s).clamp(max=5.0).detach() * s["A"] * s["logp"]).sum() for s in batch) / TOKENS
    ),
    "sapo": lambda batch: sum((sapo_gate(s) * s["A"]).mean() for s in batch) / SEQUENCES,
    "vespo": lambda batch: sum((vespo_weight(s) * s["A"] * s["logp"]).sum() for s in batch) / TOKENS,
    "reinforce": lambda batch: sum((s["A"] * s["logp"]).sum() for s in batch) / TOKENS,
    "unclipped": lambda batch: sum((token_ratio(s) * s["A"]).sum() for s in batch) / TOKENS,
    "gpg": lambda batch: sum((s["A"] * s["logp"]).sum() for s in batch) / TOKENS,
    "dppo_tv": lambda batch: sum(dppo(s, lambda p, old: abs(p - old), 0.15).sum() for s in batch) / TOKENS,
    "dppo_kl": lambda batch: sum(dppo(s, binary_kl, 0.05).sum() for s in batch) / TOKENS,
    "gmpo": lambda batch: sum(gmpo(s) for s in batch) / SEQUENCES,
    "clip_cov": lambda batch: (
        sum(((1 - s["selected"]) * clipped(token_ratio(s), s["A"])).sum() for s in batch) / TOKENS
    ),
    "kl_cov": lambda batch: sum(kl_cov(s).sum() for s in batch) / TOKENS,
    "kimi": lambda batch: (
        sum(s["A"] * s["logp"].sum() - 0.025 * (s["logp"] - s["old"]).sum() ** 2 for s in batch) / SEQUENCES
    ),
    "dro": lambda batch: sum((s["A"] * s["logp"] - 0.025 * (s["logp"] - s["old"]) ** 2).sum() for s in batch) / TOKENS,
}


def make(spread=0.6):
    """A packed batch: advantages of both signs meet sequences whose ratio is high and whose ratio is low."""
    old = (torch.randn(TOKENS, dtype=torch.float64) - 2).clamp(max=-0.2)
    old[[8, 21]] = -3
    shift = 0.2 * torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    lengths = torch.tensor(LENGTHS)
    logprobs = old + shift.repeat_interleave(lengths) + spread * torch.randn(TOKENS, dtype=torch.float64)
    logprobs = logprobs.clamp(max=-0.05)
    # One ratio beyond cispo's bound of 5 and dual clip's of 3, of either sign.
    logprobs[[8, 21]] = old[[8, 21]] + 2.0
    # Beyond DPPO's bound on the total variation (0.152), within that on the KL divergence (0.0485).
    old[26], logprobs[26] = math.log(0.5), math.log(0.652)
    return {
        "logprobs": logprobs,
        "old_logprobs": old,
        "advantages": torch.tensor([0.7, -0.9, -1.3, 0.4, 0.6, -0.2], dtype=torch.float64),
        "ref_logprobs": old + 0.5 * torch.randn(TOKENS, dtype=torch.float64),
        "entropy": 3 * torch.rand(TOKENS, dtype=torch.float64),
        "selected": (torch.arange(TOKENS) % 3 == 0).double(),
        "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0),
    }


def by_formula(batch, formula):
    """(loss, gradient) of ``-formula``, a function of a list of sequences."""
    logp = batch["logprobs"].clone().requires_grad_()
    names = {"old": "old_logprobs", "ref": "ref_logprobs", "entropy": "entropy", "selected": "selected"}
    columns = {"logp": logp.split(LENGTHS), **{name: batch[key].split(LENGTHS) for name, key in names.items()}}
    sequences = [
        {"A": A, **{name: parts[index] for name, parts in columns.items()}}
        for index, A in enumerate(batch["advantages"])
    ]
    loss = -formula(sequences)
    loss.backward()
    return loss.detach(), logp.grad


def by_us(batch, objective, token_advantages=None):
    logp = batch["logprobs"].clone().requires_grad_()
    weights = token_weights(
        torch.ones(TOKENS), objective.aggregation, cu_seqlens=batch["cu_seqlens"], constant_length=MAX_LENGTH
    )
    result = policy_loss(
        logp,
        batch["advantages"] if token_advantages is None else token_advantages,
        weights,
        objective,
        old_logprobs=batch["old_logprobs"],
        ref_logprobs=batch["ref_logprobs"] if objective.uses_reference else None,
        entropy=batch["entropy"],
        selected=batch["selected"] if objective.needs_selection else None,
        cu_seqlens=batch["cu_seqlens"],
    )
    result.loss.backward()
    return result.loss.detach(), logp.grad


def assert_equal(got, expected):
    assert expected[1].any()
    assert relative_error(got[0], expected[0]) < TOLERANCE
    assert relative_error(got[1], expected[1]) < TOLERANCE


# Presets of one formula.
SAME = ({"bnpo", "dapo"}, {"reinforce", "gpg"})


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_equals_formula(preset):
    batch = make()
    expected = by_formula(batch, FORMULAS[preset])
    assert_equal(by_us(batch, PRESETS[preset]), expected)
    # The gradient differs from that of every preset with another formula.
    same = next((names for names in SAME if preset in names), {preset})
    for other in PRESETS.keys() - same:
        assert relative_error(by_us(batch, PRESETS[other])[1], expected[1]) > 1e-3, other


def test_preset_reinforce_and_rloo_are_policy_gradients():
    """With raw rewards, or rewards less a baseline, as advantages; RLOO's first step is such a gradient."""
    batch = make()
    batch["old_logprobs"] = batch["logprobs"]
    _, expected = by_formula(batch, lambda sequences: sum(s["A"] * s["logp"].sum() for s in sequences) / SEQUENCES)
    assert relative_error(by_us(batch, PRESETS["rloo"])[1], expected) < TOLERANCE
    _, token_mean = by_formula(batch, FORMULAS["reinforce"])
    assert relative_error(by_us(batch, PRESETS["unclipped"])[1], token_mean) < TOLERANCE


def test_preset_kimi_has_the_gradient_of_the_papers_square():
    """``(r - tau log Z - tau log(p / p_old))^2``, with the mean reward in place of ``tau log Z``: equation 3."""
    batch, tau = make(), 0.05

    def square(sequences):
        return -sum((s["A"] - tau * (s["logp"] - s["old"]).sum()) ** 2 for s in sequences) / SEQUENCES

    _, gradient = by_formula(batch, square)
    assert relative_error(by_us(batch, PRESETS["kimi"])[1], gradient / (2 * tau)) < TOLERANCE


KL = {
    "k1": lambda s: s["logp"] - s["ref"],
    "k2": lambda s: (s["logp"] - s["ref"]) ** 2 / 2,
    "k3": lambda s: torch.exp(s["ref"] - s["logp"]) - (s["ref"] - s["logp"]) - 1,
}


@pytest.mark.parametrize("corrected", [False, True], ids=["", "corrected"])
@pytest.mark.parametrize("kl", KL)
def test_kl_term_equals_formula(kl, corrected):
    """GRPO's equation 3 with each estimate, and DeepSeek-V3.2's, weighted by the ratio."""

    def formula(sequences):
        penalty = sum(
            (KL[kl](s) * (token_ratio(s) if corrected else torch.ones_like(s["logp"]))).mean() for s in sequences
        )
        return FORMULAS["grpo"](sequences) - 0.3 * penalty / SEQUENCES

    objective = dataclasses.replace(PRESETS["grpo"], beta=0.3, kl=kl, kl_bias_correction=corrected)
    batch = make()
    assert_equal(by_us(batch, objective), by_formula(batch, formula))


def test_corrected_kl_gradient_is_that_of_reverse_kl():
    """Over a whole vocabulary, the expected gradient of ratio times k3 is that of the reverse KL, and k3's is not."""
    policy = torch.randn(5, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(5, dtype=torch.float64).log_softmax(0)
    logp = policy.log_softmax(0)
    exact = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), policy, retain_graph=True)[0]
    found = {}
    for corrected in (False, True):
        objective = dataclasses.replace(PRESETS["grpo"], beta=1.0, kl_bias_correction=corrected)
        # Each token once, weighted by its probability: the expectation over fresh samples.
        loss = policy_loss(logp, torch.zeros_like(ref), logp.detach().exp(), objective, ref_logprobs=ref).loss
        found[corrected] = torch.autograd.grad(loss, policy, retain_graph=True)[0]
    assert relative_error(found[True], exact) < 1e-12
    assert relative_error(found[False], exact) > 1e-2


def test_entropy_bonus():
    def formula(sequences):
        return FORMULAS["dapo"](sequences) + 0.1 * sum(s["entropy"].sum() for s in sequences) / TOKENS

    objective = dataclasses.replace(PRESETS["dapo"], entropy_coef=0.1)
    batch = make()
    assert_equal(by_us(batch, objective), by_formula(batch, formula))


@pytest.mark.parametrize("preset", ["dapo", "grpo", "gspo"])
def test_high_entropy_mask_in_the_loss(preset):
    """As in "Beyond the 80/20 Rule": an indicator in front of the clipped term, without effect on the normaliser."""
    batch = make()
    keep = high_entropy_mask(batch["entropy"], torch.ones(TOKENS), 0.2)
    # ceil(0.2 * (43 - 1)) and the highest: 9 of 43.
    assert keep.sum() == 9
    assert batch["entropy"][keep].min() > batch["entropy"][~keep].max()
    objective = dataclasses.replace(PRESETS[preset], beta=0.1)
    low, high = objective.epsilon, objective.upper_epsilon

    def formula(sequences):
        total = 0.0
        for s, kept in zip(sequences, keep.split(LENGTHS), strict=True):
            ratio = mean_ratio(s) if objective.level == "sequence" else token_ratio(s)
            term = kept * clipped(ratio, s["A"], low, high) - 0.1 * KL["k3"](s)
            total = total + (term.sum() / TOKENS if preset == "dapo" else term.mean() / SEQUENCES)
        return total

    advantages = batch["advantages"].repeat_interleave(torch.tensor(LENGTHS)) * keep
    assert_equal(by_us(batch, objective, advantages), by_formula(batch, formula))


@pytest.mark.parametrize("count", [1, 2, 10, 11, 101])
@pytest.mark.parametrize("quantile", [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0])
def test_high_entropy_mask_is_the_quantile(quantile, count):
    entropy, mask = torch.rand(4, count), torch.rand(4, count) < 0.7
    mask[0, 0] = True
    values = entropy[mask].double()
    rank = round((1 - quantile) * (values.numel() - 1), 6)
    threshold = values.quantile(rank / max(values.numel() - 1, 1))
    expected = mask & (entropy.double() >= threshold - 1e-12)
    assert torch.equal(high_entropy_mask(entropy, mask, quantile), expected)


def test_high_entropy_mask_of_ties_and_of_empty_mask():
    entropy = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.5])
    assert high_entropy_mask(entropy, torch.ones(5), 0.0).tolist() == [False, True, True, True, False]
    assert not high_entropy_mask(entropy, torch.zeros(5), 0.5).any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantile": 1.5}, "quantile must be from 0 to 1, got 1.5"),
        ({"mask": torch.ones(4)}, "mask must have shape (5,), got (4,)"),
    ],
)
def test_high_entropy_mask_bad_input(change, words):
    with pytest.raises(ValueError, match="high_entropy_mask") as caught:
        high_entropy_mask(**{"entropy": torch.rand(5), "mask": torch.ones(5), "quantile": 0.2, **change})
    assert words in str(caught.value)


def test_epsilon_of_one_or_more_never_clips_below():
    batch = make()
    for epsilon in (1.0, 3.0):
        objective = dataclasses.replace(PRESETS["unclipped"], epsilon=epsilon, epsilon_high=1e9)
        assert_equal(by_us(batch, objective), by_formula(batch, FORMULAS["unclipped"]))


def test_config_fields_reach_the_objective():
    fields = {"kl_estimator": "k1", "importance_sampling_level": "product", "beta": 0.1, "vespo_k_neg": 1.5}
    fields |= {
        "vespo_k_pos": 1.1,
        "vespo_lambda_pos": 1.2,
        "vespo_lambda_neg": 1.3,
        "entropy_coef": 0.2,
        "epsilon": 2.0,
    }
    objective = GRPOConfig(
        "x", dataset_name="x", reward_funcs=["x"], loss_type="dual_clip", delta=4.0, **fields
    ).objective()
    names = {"kl_estimator": "kl", "importance_sampling_level": "level"}
    for name, value in fields.items():
        assert getattr(objective, names.get(name, name)) == value
    assert (objective.delta, objective.aggregation, objective.kl_bias_correction) == (4.0, "token_mean", True)


@pytest.mark.parametrize("name", ["dpo", "GRPO", None])
def test_unknown_preset_is_refused(name):
    with pytest.raises(KeyError) as caught:
        PRESETS[name]
    assert f"PRESETS has no {name!r}; choose one of grpo, bnpo, dr_grpo, dapo" in str(caught.value)
    assert PRESETS.get(name) is None


def test_every_part_of_a_preset_exists():
    """Formula, paper, equation, names elsewhere, the row in the documentation and the word in the help."""
    described = GRPOConfig.__doc__.partition("loss_type: ")[2].partition("\n        epsilon:")[0]
    documentation = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text(encoding="utf-8")
    assert FORMULAS.keys() == SOURCES.keys() == PRESETS.keys() == BUILT_IN
    assert objective_table() in documentation, "python -m grpo_kernels.objective_table prints the table"
    for name, source in SOURCES.items():
        assert re.search(rf"\b{name}\b", described), name
        assert all((source.paper, "`" in source.equation, source.trl, source.verl)), name
        assert not any(set("|\n") & set(cell) for cell in source), name
