"""Generated cases for every operation and backend: shapes, dtypes, options, masks, strides, frozen and tied weights.

`make test` runs a fixed selection; `make fuzz` runs more, different ones each time, and prints how to repeat a failure.
"""

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from grpo_kernels import PolicyObjective, kl_estimate, linear_logprob, linear_policy_loss, masked_mean, policy_loss
from support.oracle import compare

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.slow]
FUZZ = int(os.environ.get("FUZZ_EXAMPLES", "0"))
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LEAVES = ("hidden", "weight", "bias")


def examples(number: int):
    return settings(
        max_examples=FUZZ or number, derandomize=not FUZZ, deadline=None, database=None,
        suppress_health_check=list(HealthCheck), print_blob=bool(FUZZ),
        # Shrinking interpreted cases is slow.
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if FUZZ else [])],
    )  # fmt: skip


@st.composite
def heads(draw):
    """Arguments of the output head: hidden states or the ids that tie them to the weight, and options."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    lengths = draw(st.lists(st.integers(0, 9), max_size=9))
    N, H, V = sum(lengths), draw(st.integers(1, 70)), draw(st.sampled_from([1, 2, 7, 64, 65, 130, 259]))
    dtype = draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from(["usual", "usual", "extreme"]))
    if kind == "extreme":
        # Whole numbers, so that logits of +-1e4 are exact and differences between results are not their roundings.
        hidden, weight = torch.randint(-60, 61, (N, H)).double(), torch.randint(-60, 61, (V, H)).double()
        weight *= 10 if H < 10 and dtype != torch.bfloat16 else 1
    else:
        hidden, weight = torch.randn(N, H), torch.randn(V, H) / H**0.5
    arguments = {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "targets": torch.randint(0, V, (N,))}
    if draw(st.booleans()):
        bias = torch.randn(V)
        if draw(st.booleans()):
            # All but one are excluded.
            bias[torch.arange(V) != draw(st.integers(0, V - 1))] = float("-inf")
        arguments["bias"] = bias
    # Near the softcap, 1 - tanh**2 has no accurate digits in float32, in any implementation.
    arguments["softcap"] = draw(st.sampled_from([None, None, 2.5, 30.0])) if kind == "usual" else None
    arguments["logit_scale"] = draw(st.sampled_from([1.0, 1.0, 0.25]))
    arguments["temperature"] = draw(st.sampled_from([1.0, 0.7 if kind == "usual" else 0.5, "each"]))
    if arguments["temperature"] == "each":
        # Powers of two round no logit.
        arguments["temperature"] = torch.rand(N) + 0.5 if kind == "usual" else 2.0 ** torch.randint(-1, 2, (N,))
    arguments["max_buffer_bytes"] = draw(st.sampled_from([None, 1, 4000, 30_000]))
    ignored = draw(st.sampled_from([0.0, 0.3, 1.0]))
    arguments["targets"][torch.rand(N) < ignored] = -100
    for name in ("hidden", "weight"):
        arguments[name] = stride(
            draw(st.sampled_from(["plain", "plain", "transposed", "gaps", "rows"])), arguments[name]
        )
    trainable = draw(st.sampled_from(["hw", "h", "w", "hwb", "b", "tied", ""]))
    for name in LEAVES:
        if name in arguments and (name[0] in trainable if trainable != "tied" else name == "weight"):
            arguments[name].requires_grad_(True)
    arguments["tied"] = trainable == "tied"
    return arguments, lengths, dtype


def stride(layout: str, matrix):
    """The same values behind other strides."""
    columns = matrix.shape[1]
    if layout == "transposed":
        return matrix.t().contiguous().t()
    if layout == "gaps":
        return torch.stack([matrix, matrix + 1], -1).flatten(1)[:, ::2] if columns else matrix
    if layout == "rows":
        return torch.cat([matrix, matrix], 1)[:, :columns]
    return matrix


def hidden_of(arguments: dict):
    """Hidden states, tied to the weight where asked for; with the rest of the arguments."""
    rest = {key: value for key, value in arguments.items() if key != "tied"}
    if arguments["tied"]:
        ids = torch.arange(rest["hidden"].shape[0]) % rest["weight"].shape[0]
        rest["hidden"] = torch.tanh(rest["weight"][ids])
    return rest


def against(scale: float, value: torch.Tensor) -> torch.Tensor:
    """A sum of terms of both signs, compared relative to the size of the terms, which may cancel."""
    return torch.stack([value / scale, torch.ones_like(value)])


def gradients(arguments: dict):
    return {f"d {name}": arguments[name].grad for name in LEAVES if name in arguments}


@examples(100)
@given(heads(), st.sampled_from(["logprobs", "both"]))
def test_linear_logprob_generated(case, used):
    arguments, _, dtype = case

    def run(arguments, **options):
        logprobs, entropy = linear_logprob(**hidden_of(arguments), return_entropy=True, **options)
        upstream = torch.linspace(-1, 1.3, logprobs.numel(), dtype=torch.float64).to(logprobs.dtype)
        loss = (logprobs * upstream)[logprobs.isfinite()].sum()
        if used == "both":
            loss = loss + (entropy * upstream.flip(0)).sum()
        if loss.requires_grad:
            loss.backward()
        return {"logprobs": logprobs, "entropy": entropy, **gradients(arguments)}

    compare(run, arguments, dtype)


@st.composite
def objectives(draw):
    kind = draw(st.sampled_from(["clip", "clip", "cispo", "sapo", "vespo", "reinforce"]))
    high = {"clip": [None, 0.3], "cispo": [1.1, 5.0]}.get(kind, [None])
    return PolicyObjective(
        kind=kind,
        epsilon=draw(st.sampled_from([0.1, 0.2])),
        epsilon_high=draw(st.sampled_from(high)),
        delta=draw(st.sampled_from([None, 1.5])) if kind == "clip" else None,
        level=draw(st.sampled_from(["token", "sequence", "product"])),
        beta=draw(st.sampled_from([0.0, 0.1])),
        kl=draw(st.sampled_from(["k1", "k2", "k3"])),
        kl_bias_correction=draw(st.booleans()),
        entropy_coef=draw(st.sampled_from([0.0, 0.0, 0.2, -0.1])),
        sapo_temperature_neg=draw(st.sampled_from([1.05, 2.0])),
    )


@st.composite
def token_arguments(draw, logprobs, lengths, objective):
    """Arguments of the loss near given exact log-probabilities, with masks, zero advantages and -inf under weight 0."""
    N = logprobs.numel()
    exact = torch.where(logprobs.isfinite(), logprobs, -20.0).double()
    # Differences of a product's factors multiply.
    spread = 0.05 if objective.level == "product" else draw(st.sampled_from([0.05, 0.4]))
    old = exact + spread * torch.randn(N)
    # A ratio on a bound to within the rounding of the log-probabilities may fall on either side of it.
    bounds = [1 - objective.epsilon, 1 + objective.upper_epsilon, objective.epsilon_high or 9.0, objective.delta or 9.0]
    near = torch.stack([((exact - old).exp() - bound).abs() < 1e-3 for bound in bounds]).any(0)
    old = torch.where(near, exact, old)
    weights = torch.rand(N) + 0.1
    weights[torch.rand(N) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = 0
    advantages = torch.randn(N)
    advantages[torch.rand(N) < draw(st.sampled_from([0.0, 0.4, 1.0]))] = 0
    arguments = {"advantages": advantages, "weights": weights, "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}
    if draw(st.booleans()):
        arguments["old_logprobs"] = old.float()
    if objective.beta or draw(st.booleans()):
        arguments["ref_logprobs"] = (exact + 0.3 * torch.randn(N)).float()
    if draw(st.booleans()):
        arguments["correction"] = torch.rand(N)
    return arguments


def term_size(arguments: dict, logprobs: torch.Tensor) -> float:
    """The sum of the sizes of the loss's terms and of its KL estimates."""
    per_token = (1 + arguments["advantages"].abs()) * (1 + torch.where(logprobs.isfinite(), logprobs, 0.0).abs())
    return max(((1 + arguments["weights"]) * per_token).sum().item(), 1.0)


@examples(100)
@given(heads(), objectives(), st.data())
def test_linear_policy_loss_generated(case, objective, data):
    arguments, lengths, dtype = case
    plain = {k: v.detach().double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
             for k, v in arguments.items()}  # fmt: skip
    logprobs = linear_logprob(**hidden_of(plain), backend="reference").detach()
    # The loss of a token of probability 0 is infinite; a policy does not sample it.
    arguments["targets"][~logprobs.isfinite()] = -100
    arguments |= data.draw(token_arguments(logprobs, lengths, objective))
    scale = term_size(arguments, logprobs)

    def run(arguments, **options):
        result = linear_policy_loss(objective=objective, return_entropy=True, **hidden_of(arguments), **options)
        if result.loss.requires_grad:
            (result.loss * 1.7).backward()
        counted = (arguments["weights"] != 0) & (arguments["targets"] != -100)
        outputs = {"logprobs": result.logprobs[counted], "entropy": result.entropy[counted]}
        sums = {"loss": against(scale, result.loss), "kl": against(scale, result.stats["kl"])}
        return {**sums, "tokens": result.stats["tokens"].float(), **outputs, **gradients(arguments)}

    compare(run, arguments, dtype)


@examples(100)
@given(st.lists(st.integers(0, 40), max_size=9), objectives(), st.integers(0, 2**16), st.booleans(), st.data())
def test_policy_loss_generated(lengths, objective, seed, padded, data):
    torch.manual_seed(seed)
    if padded:
        lengths = [max(lengths, default=0)] * len(lengths)
    logprobs = -3 * torch.rand(sum(lengths))
    arguments = data.draw(token_arguments(logprobs, lengths, objective))
    scale = term_size(arguments, logprobs)
    arguments |= {"logprobs": logprobs, "entropy": 3 * torch.rand(sum(lengths))}
    if padded:
        arguments.pop("cu_seqlens")
        shape = len(lengths), lengths[0] if lengths else 0
        arguments = {name: value.view(shape) for name, value in arguments.items()}
    for name in ("logprobs", "entropy"):
        arguments[name].requires_grad_(True)

    def run(arguments, **options):
        result = policy_loss(objective=objective, **arguments, **options)
        (result.loss * 1.7).backward()
        sums = {"loss": against(scale, result.loss), "kl": against(scale, result.stats["kl"])}
        stats = {name: value.float() for name, value in result.stats.items() if name not in sums}
        return {**sums, **stats, "d": arguments["logprobs"].grad, "d entropy": arguments["entropy"].grad}

    results = compare(run, arguments, torch.float32)
    if objective.advantage_alone and objective.level == "token":
        assert (results["d"][(arguments["advantages"] == 0) | (arguments["weights"] == 0)] == 0).all()


SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@examples(50)
@given(
    SHAPES, st.sampled_from(["k1", "k2", "k3"]), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.integers(0, 99)
)
def test_kl_estimate_generated(shape, estimator, dtype, ref_dtype, seed):
    torch.manual_seed(seed)
    names = {"logprobs": dtype, "ref_logprobs": ref_dtype}
    arguments = {name: (-3 * torch.rand(shape)).to(kind).requires_grad_() for name, kind in names.items()}

    def run(arguments, **options):
        kl = kl_estimate(**arguments, estimator=estimator, **options)
        (kl * 1.7).sum().backward()
        return {"kl": kl, **{name: arguments[name].grad for name in names}}

    compare(run, arguments, None)


@examples(50)
@given(SHAPES, st.data(), st.sampled_from(DTYPES), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 99))
def test_masked_mean_generated(shape, data, dtype, share, seed):
    torch.manual_seed(seed)
    dim = data.draw(st.sampled_from([None, *range(-len(shape), len(shape))]))
    start = data.draw(st.integers(0, len(shape)))
    mask_shape = tuple(data.draw(st.sampled_from([1, size])) for size in shape[start:])
    mask = torch.rand(mask_shape) < share
    values = torch.randn(shape)
    selected = mask.expand(shape)
    values[~selected] = float("nan")
    # The reference must not see values outside the mask, which it would multiply by 0.
    count = selected.sum() if dim is None else selected.sum(dim)

    def run(arguments, **options):
        mean = masked_mean(arguments["values"], mask, dim, **options)
        mean.masked_fill(count == 0, 0.0).sum().backward()
        assert torch.equal(mean.isnan(), count == 0)
        return {"mean": mean.nan_to_num(), "d": arguments["values"].grad}

    assert math.prod(shape) == values.numel()
    compare(run, {"values": values.to(dtype).requires_grad_()}, None)
