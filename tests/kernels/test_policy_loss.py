"""`policy_loss`: value, gradients and statistics against the definition in float64, for every objective."""

import dataclasses
import math

import pytest
import torch

from grpo_kernels import PRESETS, PolicyObjective, policy_loss
from support.objectives import OBJECTIVES
from support.oracle import compare
from support.policy_cases import make, runner

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_equals_reference(name, dtype):
    compare(runner(OBJECTIVES[name]), make(dtype=dtype), dtype)
    compare(runner(OBJECTIVES[name]), make(dtype=dtype, correction=torch.rand(20, dtype=dtype)), dtype)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_first_update_on_fresh_samples(name):
    """Without old log-probabilities every ratio is 1, and its derivative is not 0."""
    arguments = make(old_logprobs=None)
    results = compare(runner(OBJECTIVES[name]), arguments, torch.float32)
    assert results["ratio"] == results["ratios"]
    assert results["clip_low"] == results["clip_high"] == 0
    same = {**make(), "old_logprobs": arguments["logprobs"].detach(), "logprobs": arguments["logprobs"]}
    same |= {key: arguments[key] for key in ("advantages", "weights", "ref_logprobs")}
    same["entropy"] = arguments["entropy"].detach().requires_grad_()
    arguments["logprobs"].grad = None
    again = runner(OBJECTIVES[name])(same)
    torch.testing.assert_close(again["d logprobs"], results["d logprobs"])


# These stop the gradient of the ratio, which finite differences cannot.
STOPS = [name for name in OBJECTIVES if OBJECTIVES[name].kind in ("cispo", "vespo") or name.startswith("dppo")]


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in STOPS])
def test_gradcheck(name):
    arguments = make(dtype=torch.float64)
    leaves = arguments.pop("logprobs"), arguments.pop("entropy")

    def loss(logprobs, entropy):
        return policy_loss(logprobs, objective=OBJECTIVES[name], entropy=entropy, **arguments).loss

    assert torch.autograd.gradcheck(loss, leaves)


def one_token(log_ratio, advantage, objective, **extra):
    logprobs = torch.tensor([log_ratio - 1.0], dtype=torch.float64, requires_grad=True)
    result = policy_loss(
        logprobs,
        torch.tensor([advantage], dtype=torch.float64),
        torch.ones(1, dtype=torch.float64),
        objective,
        old_logprobs=torch.full((1,), -1.0, dtype=torch.float64),
        **extra,
    )
    result.loss.backward()
    return result.loss.item(), logprobs.grad.item(), result.stats


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "low", "high"),
    [
        (1.0, 2.0, -2.0, -2.0, 0, 0),
        (1.1, 2.0, -2.2, -2.2, 0, 0),
        (1.5, 2.0, -2.4, 0.0, 0, 1),  # flat above 1 + 0.2
        (0.5, 2.0, -1.0, -1.0, 0, 0),  # a good token that became less likely always has a gradient
        (1.5, -2.0, 3.0, 3.0, 0, 0),  # a bad token that became more likely always has a gradient
        (0.5, -2.0, 1.6, 0.0, 1, 0),  # flat below 1 - 0.2
    ],
)
def test_clip_of_known_ratios(ratio, advantage, loss, slope, low, high):
    got_loss, got_slope, stats = one_token(math.log(ratio), advantage, PolicyObjective())
    assert got_loss == pytest.approx(loss)
    assert got_slope == pytest.approx(slope)
    assert (stats["clip_low"].item(), stats["clip_high"].item()) == (low, high)


def test_delta_bounds_the_ratio_of_negative_advantages():
    assert one_token(math.log(9.0), -2.0, PolicyObjective())[0] == pytest.approx(18)
    loss, slope, _ = one_token(math.log(9.0), -2.0, PolicyObjective(delta=3.0))
    assert (loss, slope) == (pytest.approx(6), 0)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("side", ["on", "inside", "outside"])
def test_gradient_at_the_clip_bound(advantage, side):
    """As in torch.clamp and torch.minimum, and so in every implementation that uses them."""
    objective = PolicyObjective(epsilon=0.5)
    bound = 1.5 if advantage > 0 else 0.5
    # exp(log(x)) may differ from x, so search for the log-ratio that gives exactly the bound.
    nearby = math.log(bound) + torch.arange(-4.0, 5.0, dtype=torch.float64) * 2.0**-53
    log_ratio = next(x for x in nearby if x.exp() == bound)
    outward = 1 if advantage > 0 else -1
    log_ratio = log_ratio.item() + outward * {"on": 0, "inside": -1e-9, "outside": 1e-9}[side]
    logprobs = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    arguments = torch.tensor([advantage]), torch.ones(1)
    policy_loss(logprobs, *arguments, objective, old_logprobs=torch.zeros(1, dtype=torch.float64)).loss.backward()
    assert (logprobs.grad.item() != 0) == (side != "outside")


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in ("dro", "kimi")])
@pytest.mark.parametrize("log_ratio", [-800.0, -200.0, 200.0, 800.0])
def test_zero_advantage_gives_exactly_zero(name, log_ratio):
    # exp(800) is infinite in float64 as well, and 0 * inf must not become NaN.
    objective = dataclasses.replace(OBJECTIVES[name], beta=0.0, entropy_coef=0.0)
    extra = {"cu_seqlens": torch.tensor([0, 1])}
    loss, slope, _ = one_token(log_ratio, 0.0, objective, **extra)
    assert (loss, slope) == (0, 0)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_sapo_gradient_with_saturated_gate(level):
    # The ratio is infinite in float32, and its gradient is still a number: 0.
    objective = dataclasses.replace(PRESETS["sapo"], level=level)
    logprobs = torch.tensor([0.0], requires_grad=True)
    arguments = torch.tensor([1.5]), torch.ones(1), objective
    loss = policy_loss(logprobs, *arguments, old_logprobs=torch.tensor([-200.0]), cu_seqlens=torch.tensor([0, 1])).loss
    loss.backward()
    assert (loss.item(), logprobs.grad.item()) == (-4 * 1.5, 0.0)


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
def test_weight_zero_hides_garbage(name, garbage, backend):
    objective = OBJECTIVES[name]
    clean, dirty = make(), make()
    for key, value in clean.items():
        dirty[key] = value.detach().clone().requires_grad_(value.requires_grad) if value is not None else None
    hidden = clean["weights"] == 0
    assert hidden.any()
    for key in ("logprobs", "advantages", "old_logprobs", "ref_logprobs", "entropy"):
        with torch.no_grad():
            dirty[key][hidden] = garbage
    expected, got = runner(objective)(clean, backend=backend), runner(objective)(dirty, backend=backend)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=0)
    assert (got["d logprobs"][hidden] == 0).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_equals_padded(name):
    objective = OBJECTIVES[name]
    packed = make([4, 1, 6])
    offsets = packed["cu_seqlens"].tolist()

    def pad(values):
        # Padding holds garbage, which weight 0 must hide.
        rows = torch.full((3, 6), 7.0)
        for row in range(3):
            rows[row, : offsets[row + 1] - offsets[row]] = values[offsets[row] : offsets[row + 1]]
        return rows

    padded = {key: pad(value.detach()) for key, value in packed.items() if key != "cu_seqlens"}
    padded["weights"][padded["weights"] == 7] = 0
    padded["logprobs"].requires_grad_()
    padded["entropy"].requires_grad_()
    expected, got = runner(objective)(packed), runner(objective)(padded)
    for key in ("loss", "ratio", "ratios", "tokens", "kl", "clip_low", "clip_high"):
        torch.testing.assert_close(got[key], expected[key])
    for row in range(3):
        part = slice(offsets[row], offsets[row + 1])
        torch.testing.assert_close(got["d logprobs"][row, : part.stop - part.start], expected["d logprobs"][part])


def test_advantage_per_sequence():
    arguments = make([4, 1, 6], advantages=torch.tensor([1.0, -1.0, 2.0]))
    expected = {**arguments, "advantages": torch.tensor([1.0] * 4 + [-1.0] + [2.0] * 6)}
    assert policy_loss(**arguments).loss == policy_loss(**expected).loss


def test_sequence_ratio_is_the_geometric_mean():
    old = torch.zeros(5)
    logprobs = torch.tensor([0.1, 0.2, 0.3, -0.5, 0.9])
    result = policy_loss(
        logprobs, torch.ones(5), torch.full((5,), 0.2), PolicyObjective(level="sequence", epsilon=0.9),
        old_logprobs=old, cu_seqlens=torch.tensor([0, 3, 5]),
    )  # fmt: skip
    ratios = [math.exp(0.2), math.exp(0.2)]
    assert result.stats["ratios"] == 2
    assert result.stats["ratio"].item() == pytest.approx(sum(ratios))
    assert result.loss.item() == pytest.approx(-0.2 * (3 * ratios[0] + 2 * ratios[1]))


def test_product_ratio_is_the_product():
    logprobs, cu_seqlens = torch.tensor([0.1, 0.2, 0.3, -0.5, 0.9]), torch.tensor([0, 3, 5])
    result = policy_loss(
        logprobs, torch.ones(5), torch.full((5,), 0.2), PolicyObjective(level="product", epsilon=2.0),
        old_logprobs=torch.zeros(5), cu_seqlens=cu_seqlens,
    )  # fmt: skip
    assert result.stats["ratio"].item() == pytest.approx(math.exp(0.6) + math.exp(0.4))
    assert result.loss.item() == pytest.approx(-0.2 * (3 * math.exp(0.6) + 2 * math.exp(0.4)))


@pytest.mark.parametrize("log_ratio", [-200.0, 200.0])
def test_vespo_weight_of_extreme_ratios(log_ratio):
    """Also where the ratio itself is 0 or infinite in the arithmetic's dtype."""
    logprobs = torch.tensor([log_ratio - 1.0], requires_grad=True)
    result = policy_loss(
        logprobs, torch.ones(1), torch.ones(1), PRESETS["vespo"], old_logprobs=torch.full((1,), -1.0),
        cu_seqlens=torch.tensor([0, 1]),
    )  # fmt: skip
    result.loss.backward()
    # 1e-8 squared times e^3 at most.
    assert abs(logprobs.grad.item()) < 1e-14


def test_all_masked():
    arguments = make()
    arguments["weights"] = torch.zeros(20)
    results = runner(PRESETS["gspo"])(arguments)
    assert results["loss"] == results["tokens"] == 0
    assert (results["d logprobs"] == 0).all()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_no_tokens(level):
    result = policy_loss(
        torch.zeros(0, requires_grad=True), torch.zeros(0), torch.zeros(0), PolicyObjective(level=level),
        cu_seqlens=torch.zeros(1, dtype=torch.int64),
    )  # fmt: skip
    result.loss.backward()
    assert result.loss == 0


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"advantages": torch.zeros(3)}, ValueError, "advantages must have shape (20,), got (3,)"),
        ({"weights": torch.zeros(19)}, ValueError, "weights must have shape (20,), got (19,)"),
        ({"old_logprobs": torch.zeros(2, 10)}, ValueError, "old_logprobs must have shape (20,), got (2, 10)"),
        ({"weights": torch.ones(20, dtype=torch.int64)}, TypeError, "weights must be a floating-point tensor"),
        ({"advantages": [1.0]}, TypeError, "advantages must be a tensor, got list"),
        ({"cu_seqlens": torch.tensor([0, 19])}, ValueError, "must end at the number of tokens 20, got 19"),
        ({"cu_seqlens": torch.tensor([1, 20])}, ValueError, "must start at 0, got 1"),
        ({"cu_seqlens": torch.tensor([0, 9, 5, 20])}, ValueError, "cu_seqlens must not decrease"),
        ({"cu_seqlens": None, "objective": PRESETS["gspo"]}, ValueError, "level='sequence' needs cu_seqlens"),
        ({"cu_seqlens": None, "objective": PRESETS["rloo"]}, ValueError, "level='product' needs cu_seqlens"),
        ({"ref_logprobs": None, "objective": PolicyObjective(beta=0.1)}, ValueError, "beta=0.1 needs ref_logprobs"),
        ({"entropy": None, "objective": PolicyObjective(entropy_coef=1.0)}, ValueError, "needs the entropy argument"),
        ({"objective": "dapo"}, TypeError, "objective must be a PolicyObjective (see PRESETS), got str"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' is unknown; choose one of auto, triton, torch, reference"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error) as caught:
        policy_loss(**{**make(), **change})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "ppo"}, "kind='ppo' is unknown; choose one of clip, cispo"),
        ({"level": "word"}, "level='word' is unknown"),
        ({"kl": "k4"}, "kl='k4' is unknown"),
        ({"aggregation": "mean"}, "aggregation='mean' is unknown"),
        ({"epsilon": 0.0}, "epsilon must be above 0, got 0.0"),
        ({"epsilon": float("nan")}, "epsilon must be above 0, got nan"),
        ({"vespo_k_neg": 0.0}, "vespo_k_neg must be a finite number above 0"),
        ({"epsilon_high": -1.0}, "epsilon_high must be a finite number above 0"),
        ({"delta": 1.1}, "delta must be at least 1 + epsilon_high = 1.2, got 1.1"),
        ({"beta": -0.1}, "beta must be >= 0, got -0.1"),
        ({"beta": float("nan")}, "beta must be finite, got nan"),
        ({"kind": "cispo"}, "kind='cispo' needs epsilon_high"),
    ],
)
def test_bad_objective(fields, words):
    with pytest.raises(ValueError, match="PolicyObjective") as caught:
        PolicyObjective(**fields)
    assert words in str(caught.value)
