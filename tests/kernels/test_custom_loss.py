"""A loss of the user's own: every preset, written as a plain function, is what the built-in one is."""

import dataclasses
import functools
import math

import pytest
import torch

from grpo_kernels import PRESETS, PolicyObjective, linear_policy_loss, policy_loss, register_objective
from grpo_kernels.objective import function_objective
from support.loss_cases import make as make_head
from support.oracle import compare, relative_error
from support.policy_cases import make, runner

EXACT = torch.float64


def sequence_ratio(logprobs, old_logprobs, cu_seqlens, mean=True):
    lengths = cu_seqlens.diff()
    reduced = torch.segment_reduce(logprobs - old_logprobs, "mean" if mean else "sum", lengths=lengths, unsafe=True)
    return torch.exp(reduced).repeat_interleave(lengths)


def clipped(ratio, advantages, epsilon, epsilon_high):
    high = epsilon if epsilon_high is None else epsilon_high
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + high) * advantages)


def clip(logprobs, old_logprobs, advantages, epsilon, epsilon_high):
    return clipped(torch.exp(logprobs - old_logprobs), advantages, epsilon, epsilon_high)


def clip_sequences(logprobs, old_logprobs, advantages, cu_seqlens, epsilon, epsilon_high):
    return clipped(sequence_ratio(logprobs, old_logprobs, cu_seqlens), advantages, epsilon, epsilon_high)


def clip_products(logprobs, old_logprobs, advantages, cu_seqlens, epsilon, epsilon_high):
    return clipped(sequence_ratio(logprobs, old_logprobs, cu_seqlens, False), advantages, epsilon, epsilon_high)


def dual_clip(logprobs, old_logprobs, advantages, epsilon, epsilon_high, delta):
    loss = clip(logprobs, old_logprobs, advantages, epsilon, epsilon_high)
    return torch.where(advantages < 0, torch.minimum(loss, -delta * advantages), loss)


def cispo(logprobs, old_logprobs, advantages, epsilon_high):
    return -torch.exp(logprobs - old_logprobs).clamp(max=epsilon_high).detach() * advantages * logprobs


def sapo(logprobs, old_logprobs, advantages):
    tau = torch.where(advantages > 0, torch.ones_like(advantages), 1.05)
    return -4 / tau * torch.sigmoid(tau * (torch.exp(logprobs - old_logprobs) - 1)) * advantages


def vespo(logprobs, old_logprobs, advantages, cu_seqlens):
    ratio = sequence_ratio(logprobs, old_logprobs, cu_seqlens, mean=False).detach()
    k, decay = torch.where(advantages > 0, 2.0, 3.0), torch.where(advantages > 0, 3.0, 2.0)
    return -(ratio**k) * torch.exp(decay * (1 - ratio)) * advantages * logprobs


def reinforce(logprobs, advantages):
    return -advantages * logprobs


def unclipped(logprobs, old_logprobs, advantages):
    return -torch.exp(logprobs - old_logprobs) * advantages


FUNCTIONS = {
    **dict.fromkeys(("grpo", "bnpo", "dr_grpo", "dapo"), clip),
    **dict.fromkeys(("luspo", "gspo"), clip_sequences),
    "rloo": clip_products,
    "dual_clip": dual_clip,
    "cispo": cispo,
    "sapo": sapo,
    "vespo": vespo,
    **dict.fromkeys(("reinforce", "gpg"), reinforce),
    "unclipped": unclipped,
}


def mine(preset: str, **fields) -> PolicyObjective:
    """The preset's formula as a function, with the settings that the preset has."""
    built_in = PRESETS[preset]
    fields = {name: getattr(built_in, name) for name in ("epsilon", "epsilon_high", "delta", "aggregation")} | fields
    return function_objective(FUNCTIONS[preset], level=fields.pop("level", built_in.level), **fields)


def of(objective, arguments, call=policy_loss):
    leaves = {name: arguments[name] for name in ("logprobs", "entropy", "hidden", "weight") if name in arguments}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    for leaf in leaves.values():
        leaf.grad = None
    result = call(objective=objective, **arguments)
    result.loss.backward()
    return [result.loss.detach(), *(leaf.grad.clone() for leaf in leaves.values() if leaf.grad is not None)], result


@pytest.mark.parametrize("fields", [{}, {"beta": 0.2, "kl_bias_correction": True, "entropy_coef": 0.1}], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_as_a_function_equals_the_built_in_loss(preset, fields):
    assert preset in FUNCTIONS or PRESETS[preset].function is not None
    if preset not in FUNCTIONS:
        return
    arguments = make(dtype=EXACT, correction=torch.rand(20, dtype=EXACT))
    expected, theirs = of(dataclasses.replace(PRESETS[preset], **fields), arguments)
    got, ours = of(mine(preset, **fields), arguments)
    assert expected[1].any()
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    for name in ("tokens", "entropy", "kl", "ratios", "ratio"):
        assert ours.stats[name] == theirs.stats[name]


@pytest.mark.parametrize("trainable", ["h", "hw"])
@pytest.mark.parametrize("preset", FUNCTIONS)
def test_linear_policy_loss_of_a_function_equals_the_built_in_loss(preset, trainable):
    """In chunks of a few rows, with a trainable head and a frozen one; packed and padded."""
    for dtype, tolerance in ((EXACT, 1e-12), (torch.float32, 1e-6)):
        arguments = make_head(dtype=dtype, trainable=trainable, max_buffer_bytes=3 * 259 * 8)
        expected, _ = of(PRESETS[preset], arguments, linear_policy_loss)
        got, _ = of(mine(preset), arguments, linear_policy_loss)
        assert all(relative_error(a, b) < tolerance for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("preset", ["dapo", "gspo"])
def test_function_equals_the_reference_backend(preset):
    fields = {"beta": 0.1, "kl_bias_correction": True}
    compare(runner(mine(preset, **fields)), make(dtype=EXACT), EXACT)
    compare(runner(mine(preset, **fields)), make(old_logprobs=None), torch.float32)


def test_ratio_follows_the_level():
    """A function of `ratio` is a token's loss or a sequence's, as the objective says."""

    def by_ratio(ratio, logprobs, advantages, epsilon, epsilon_high):
        return clipped(ratio, advantages, epsilon, epsilon_high) + 0.1 * logprobs.square()

    for level in ("token", "sequence", "product"):
        built_in = PolicyObjective(level=level, epsilon=0.1)
        arguments = make(dtype=EXACT)
        expected, _ = of(built_in, arguments)
        got, _ = of(function_objective(by_ratio, epsilon=0.1, level=level), arguments)
        logprobs, weights = arguments["logprobs"].detach(), arguments["weights"]
        torch.testing.assert_close(got[0], expected[0] + 0.1 * (weights * logprobs.square()).sum())
        torch.testing.assert_close(got[1], expected[1] + 0.2 * weights * logprobs)


def test_function_of_the_reference_policy():
    def to_reference(logprobs, ref_logprobs, advantages):
        return (logprobs - ref_logprobs).square() - advantages * logprobs

    objective = function_objective(to_reference)
    assert objective.uses_reference
    assert not objective.advantage_alone
    arguments = make(dtype=EXACT)
    logprobs = arguments["logprobs"].detach()
    slope = 2 * (logprobs - arguments["ref_logprobs"]) - arguments["advantages"]
    torch.testing.assert_close(of(objective, arguments)[0][1], arguments["weights"] * slope)
    with pytest.raises(ValueError, match="policy_loss: the objective needs ref_logprobs"):
        policy_loss(objective=objective, **{**arguments, "ref_logprobs": None})


def test_function_gets_only_the_counted_tokens_of_whole_sequences():
    seen = []

    def lengths(logprobs, advantages, cu_seqlens):
        seen.append(cu_seqlens.tolist())
        return -advantages * logprobs / cu_seqlens.diff().repeat_interleave(cu_seqlens.diff())

    objective = function_objective(lengths)
    assert objective.whole_sequences
    # Garbage under a zero weight stays out, and a sampler correction of 0 removes no token.
    arguments = make(dtype=EXACT, correction=torch.zeros(20, dtype=EXACT))
    with torch.no_grad():
        arguments["logprobs"][4:6] = math.nan
    (loss, grad, _), _ = of(objective, arguments)
    assert seen[-1] == [0, 3, 4, 10, 10, 15, 16, 18]
    assert loss == 0
    assert not grad.any()
    with pytest.raises(ValueError, match="the objective's function needs cu_seqlens for packed"):
        policy_loss(objective=objective, **{**arguments, "cu_seqlens": None})


def test_scales_with_advantage_skips_rows(monkeypatch):
    """Rows of advantage 0 keep out of the backward, and an infinite ratio there makes no NaN."""
    objective = mine("unclipped", scales_with_advantage=True)
    assert objective.advantage_alone
    arguments = make_head()
    arguments["advantages"][::2] = 0
    arguments["old_logprobs"][::2] = -400.0
    (loss, *_), result = of(objective, {**arguments, "skip_inactive": True}, linear_policy_loss)
    assert loss.isfinite()
    assert result.logprobs[::2].isnan().sum() > 10
    assert all(part.isfinite().all() for part in of(objective, arguments, linear_policy_loss)[0])


def test_loss_of_a_function_without_a_gradient_and_in_inference_mode():
    arguments = make(dtype=EXACT)
    expected = of(mine("dapo"), arguments)[0][0]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            inside = {name: value.clone() for name, value in arguments.items()}
            assert policy_loss(objective=mine("dapo"), **inside).loss.item() == expected.item()


def test_own_defaults_are_the_settings():
    def narrow(logprobs, old_logprobs, advantages, epsilon=0.05, epsilon_high=0.07):
        return clip(logprobs, old_logprobs, advantages, epsilon, epsilon_high)

    assert (function_objective(narrow).epsilon, function_objective(narrow).epsilon_high) == (0.05, 0.07)
    wider = functools.partial(narrow, epsilon=0.3)
    assert function_objective(wider).epsilon == 0.3
    assert function_objective(wider, epsilon=0.4).epsilon == 0.4
    arguments = make(dtype=EXACT)
    for objective, epsilon in ((function_objective(narrow), 0.05), (function_objective(narrow, epsilon=0.5), 0.5)):
        same = PolicyObjective(epsilon=epsilon, epsilon_high=0.07)
        torch.testing.assert_close(of(objective, arguments)[0], of(same, arguments)[0], rtol=1e-12, atol=0)


def test_register_objective_adds_a_preset():
    try:
        made = register_objective("mine", unclipped, aggregation="sequence_mean")
        assert PRESETS["mine"] is made
        assert (made.kind, made.function, made.aggregation) == ("function", unclipped, "sequence_mean")
        assert register_objective("mine", reinforce) is PRESETS["mine"] is not made
    finally:
        PRESETS.pop("mine", None)
    with pytest.raises(ValueError, match="register_objective: 'dapo' is a built-in preset; choose another name"):
        register_objective("dapo", unclipped)


BAD = {
    "returns the mean": (
        lambda logprobs: logprobs.mean(),
        r"must return one loss per token, of shape \[8\], got \[\];",
    ),
    "returns a number": (lambda logprobs: 3.0, "must return a tensor, one loss per token, got float"),
    "needs more": (
        lambda logprobs, values: logprobs,
        "needs 'values'; a loss function may take logprobs, old_logprobs",
    ),
    "takes no logprobs": (lambda advantages: advantages, "takes no logprobs, so it has no gradient"),
    "is detached": (lambda logprobs, advantages: logprobs.detach() * advantages, "has no gradient"),
    "fails": (lambda logprobs: logprobs + torch.ones(3), "fails on 8 tokens: RuntimeError: The size of tensor a"),
    "mixes tokens": (
        lambda logprobs, advantages: logprobs * (advantages - advantages.mean()),
        "mixes tokens, so chunks",
    ),
    "mixes sequences": (
        lambda logprobs, cu_seqlens: logprobs * logprobs.mean(),
        "mixes tokens of different sequences, so microbatches",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_function_that_cannot_be_used_is_refused(case):
    function, words = BAD[case]
    with pytest.raises(ValueError, match=f"^objective '<lambda>' {words}") as error:
        PolicyObjective(kind="function", function=function)
    assert "\n" not in str(error.value)


def test_function_and_kind_belong_together():
    with pytest.raises(ValueError, match="kind='function' and function belong together, got kind='clip'"):
        PolicyObjective(function=unclipped)
    with pytest.raises(ValueError, match="kind='function' and function belong together, got kind='function'"):
        PolicyObjective(kind="function")
    with pytest.raises(TypeError, match="function must be callable, got int"):
        PolicyObjective(kind="function", function=3)
    with pytest.raises(ValueError, match="is not 0 where the advantage is 0, so scales_with_advantage must be False"):
        function_objective(lambda logprobs, advantages: logprobs * (advantages - 1), scales_with_advantage=True)
