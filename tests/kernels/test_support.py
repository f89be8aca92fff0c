"""The support of a truncated sampler: both ways to compute over it, against full logits with -inf elsewhere."""

import pytest
import torch

from grpo_kernels import (
    PolicyObjective,
    Support,
    _support_pass,
    linear_logprob,
    linear_policy_loss,
    sampling_ratio,
    support,
)
from support.logprob_cases import LEAVES, make, run
from support.loss_cases import make as make_loss
from support.measure import count_flops
from support.oracle import compare, relative_error
from support.supports import mask_of, nucleus, random_support

# Tokens, hidden size and vocabulary: several tiles of the head's kernels, or several blocks of the gathered rows, whose
# interpreted programs take longer.
SIZES = {"masked": (33, 17, 259), "gathered": (7, 70, 41)}
MOST = 20
DTYPES = [
    (torch.float64, "hwb"), (torch.float64, "h"), (torch.float32, "hwb"), (torch.float32, "h"), (torch.float32, "w"),
    (torch.float32, ""), (torch.bfloat16, "hwb"), pytest.param(torch.bfloat16, "h", marks=pytest.mark.long),
    pytest.param(torch.float16, "hwb", marks=pytest.mark.long), (torch.float16, "h"),
]  # fmt: skip
pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture(params=["gathered", "masked"])
def way(request, monkeypatch):
    """Every support is computed in this way, and at least one was."""
    passes = []
    monkeypatch.setattr(_support_pass, "gathers", lambda *_: passes.append(1) or request.param == "gathered")
    yield request.param
    assert passes


def cases(way, most=MOST, bias=False, **extra):
    n, width, vocab = SIZES[way]
    if bias:
        extra["bias"] = torch.randn(vocab).to(extra.get("dtype", torch.float32))
    arguments = make(n, width, vocab, **extra)
    arguments["support"] = random_support(arguments["targets"], vocab, most)
    return arguments


@pytest.mark.parametrize(("dtype", "trainable"), DTYPES)
def test_outputs_and_gradients(dtype, trainable, way):
    n, _, vocab = SIZES[way]
    options = {"softcap": 2.5, "logit_scale": 0.7, "temperature": torch.rand(n) + 0.5}
    arguments = cases(way, dtype=dtype, trainable=trainable, scale=3.0, bias=True, **options)
    compare(run, arguments, dtype, max_buffer_bytes=25 * 4 * vocab if way == "masked" else None)


@pytest.mark.parametrize("trainable", ["hw", "h"])
def test_without_options(trainable, way):
    compare(run, cases(way, trainable=trainable, weight_dtype=torch.bfloat16), torch.float32)
    compare(run, cases(way, most=1, dtype=torch.bfloat16, trainable=trainable), torch.bfloat16)


@pytest.mark.parametrize("way", ["masked"], indirect=True)
def test_engine_of_products_leaves_supports_to_the_fused_one(way, monkeypatch):
    monkeypatch.setenv("GRPO_KERNELS_ENGINE", "products")
    compare(run, cases(way, trainable="h"), torch.float32)


def test_fp8_precision_is_refused():
    arguments = make(4, 5, 9, targets=torch.tensor([1, 2, 3, 4]))
    kept = Support.of([torch.tensor([0, target]) for target in range(1, 5)])
    with torch.no_grad(), pytest.raises(ValueError, match="precision='fp8' is not possible with a support"):
        linear_logprob(**arguments, support=kept, precision="fp8")


def test_full_logits_with_minus_infinity_elsewhere(way):
    n, _, V = SIZES[way]
    arguments = cases(way, dtype=torch.float64, bias=True, trainable="hwb", temperature=0.8, softcap=3.0)
    found = run(arguments)
    plain = {name: arguments[name].detach().clone().requires_grad_() for name in LEAVES}
    logits = plain["hidden"] @ plain["weight"].T + plain["bias"]
    logits = (3.0 * torch.tanh(logits / 3.0) / 0.8).masked_fill(~mask_of(arguments["support"], V), float("-inf"))
    distribution = torch.distributions.Categorical(logits=logits.clamp(min=-1e9))
    logprobs, entropy = distribution.log_prob(arguments["targets"]), distribution.entropy()
    upstream = torch.linspace(-1, 1.3, n, dtype=torch.float64)
    (logprobs * upstream + entropy * upstream.flip(0)).sum().backward()
    expected = {"logprobs": logprobs, "entropy": entropy, **{name: plain[name].grad for name in LEAVES}}
    for name, value in expected.items():
        assert relative_error(found[name], value) < 1e-12, name


def test_gradients_equal_differences(way):
    arguments = cases(way, dtype=torch.float64, bias=True, trainable="hwb", softcap=4.0)
    leaves = [arguments.pop(name) for name in LEAVES]

    def both(hidden, weight, bias):
        return linear_logprob(hidden=hidden, weight=weight, bias=bias, return_entropy=True, **arguments)

    assert torch.autograd.gradcheck(both, leaves, fast_mode=True)


@pytest.mark.parametrize(("dtype", "trainable"), [DTYPES[0], DTYPES[1], DTYPES[2], DTYPES[5], DTYPES[9]])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_policy_loss(level, dtype, trainable, way):
    V = SIZES[way][2]
    lengths = [3, 1, 0, 5]
    arguments = make_loss(
        lengths, dtype, trainable, V, bias=torch.randn(V).to(dtype), temperature=0.8
    )  # fmt: skip
    arguments["support"] = random_support(arguments["targets"], V, MOST)
    exact = linear_logprob(
        *(arguments[name].detach().double() for name in ("hidden", "weight")), arguments["targets"],
        temperature=0.8, bias=arguments["bias"].detach().double(), support=arguments["support"],
    )  # fmt: skip
    arguments["old_logprobs"] = (exact + 0.3 * torch.randn(len(exact))).float()
    objective = PolicyObjective(level=level, beta=0.1, entropy_coef=0.2)

    def loss(arguments, **options):
        result = linear_policy_loss(objective=objective, return_entropy=True, **arguments, **options)
        if result.loss.requires_grad:
            (result.loss * 1.7).backward()
        counted = (arguments["weights"] != 0) & (arguments["targets"] != -100)
        gradients = {name: arguments[name].grad for name in LEAVES}
        found = {"loss": result.loss, "logprobs": result.logprobs[counted], "entropy": result.entropy[counted]}
        return found | gradients | {"clipped": result.stats["clip_low"].float() + 1}

    compare(loss, arguments, dtype)


def test_weight_gradient_is_added_to_a_buffer(way):
    V = SIZES[way][2]
    arguments = make_loss([3, 1, 0, 5], vocab=V)
    arguments["support"] = random_support(arguments["targets"], V, MOST)
    linear_policy_loss(**arguments).loss.backward()
    expected = arguments["weight"].grad + 2
    buffer = torch.full((V, 17), 2.0)
    linear_policy_loss(**arguments, grad_weight_buffer=buffer).loss.backward()
    assert relative_error(buffer, expected) < 1e-6


@pytest.mark.parametrize("rows", [None, "all", [0, 1, 5]])
def test_given_rows_and_ignored_targets(rows, way):
    n, _, vocab = SIZES[way]
    arguments = cases(way, bias=True, trainable="hwb")
    arguments["targets"][2:4] = -100
    # The ignored tokens have no kept ids at all.
    arguments["support"] = random_support(arguments["targets"], vocab, MOST)
    if isinstance(rows, list):
        rows = torch.tensor(rows)
        arguments["targets"][[row for row in range(n) if row not in rows]] = -100
    # The reference finds the rows by their targets.
    found = compare(lambda a, backend=None, **o: run(a, **({"backend": backend} if backend else {"rows": rows})),
                    arguments, torch.float32)  # fmt: skip
    assert (found["hidden"][2:4] == 0).all()


def test_target_outside_of_its_support_is_minus_infinity_where_values_are_not_read(way, monkeypatch):
    monkeypatch.setattr(support, "values_can_be_checked", lambda device: False)
    V = SIZES[way][2]
    arguments = cases(way, softcap=3.0)
    first, last = arguments["support"].offsets[4:6].tolist()
    ids = arguments["support"].ids[first:last]
    arguments["targets"][4] = next(id for id in range(V) if id not in ids)
    found = compare(run, arguments, torch.float32)
    assert found["logprobs"][4] == float("-inf")
    assert found["logprobs"].isinf().sum() == 1
    arguments["hidden"].grad = None
    run(arguments, entropy_in_loss=False)
    assert (arguments["hidden"].grad[4] == 0).all()


def test_target_outside_of_its_support_is_refused():
    arguments = make(4, 5, 9, targets=torch.tensor([0, 1, -100, 5]))
    kept = [torch.tensor(ids, dtype=torch.int64) for ids in ([0, 3], [1], [], [6, 2])]
    with pytest.raises(ValueError, match=r"target of token \[3\] is id \[5\], which is not in its support"):
        linear_logprob(**arguments, support=Support.of(kept))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda ids, offsets: ids, TypeError, r"must be a pair of tensors \(ids, offsets\)"),
        (lambda ids, offsets: (ids.float(), offsets), TypeError, "support.ids must be int64 or int32"),
        (lambda ids, offsets: (ids, offsets[1:]), ValueError, r"must be \[N \+ 1\] for 4 targets, got 4"),
        (lambda ids, offsets: (ids, offsets + 1), ValueError, "must rise from 0 to the number of ids 8"),
        (lambda ids, offsets: (ids + 8, offsets), ValueError, r"id \[9\], outside the vocabulary of 9"),
        (lambda ids, offsets: (ids * 0, offsets), ValueError, r"lists id \[0\] twice for token \[0\]"),
    ],
)
def test_support_that_does_not_fit_is_refused(change, error, message):
    arguments = make(4, 5, 9, targets=torch.tensor([1, 2, 3, 4]))
    kept = Support.of([torch.tensor([0, target]) for target in range(1, 5)])
    linear_logprob(**arguments, support=tuple(kept))
    with pytest.raises(error, match=message):
        linear_logprob(**arguments, support=change(*kept))


def test_few_kept_ids_need_no_product_with_the_whole_weight():
    arguments = make(4, 32, 4096)
    for most, passes in ((20, 0), (3000, 4)):
        kept = random_support(arguments["targets"], 4096, most)

        def work(kept=kept):
            linear_logprob(**arguments, support=kept, backend="torch").sum().backward()

        assert count_flops(work, (4, 32, 4096)) == pytest.approx(passes)


def test_take_and_join():
    whole = random_support(torch.arange(9), 20, 5)
    parts = [whole.take(torch.tensor(tokens, dtype=torch.int64)) for tokens in ([3], [], [0, 8])]
    joined = Support.joined(parts)
    for found, token in enumerate([3, 0, 8]):
        ids = joined.ids[joined.offsets[found] : joined.offsets[found + 1]]
        assert torch.equal(ids, whole.ids[whole.offsets[token] : whole.offsets[token + 1]])
    assert len(joined.offsets) == 4


def test_ratio_to_a_truncated_sampler_vanishes_without_its_support():
    """1,000 tokens drawn with top_p=0.95: the product of the kept masses is what the ratio becomes."""
    n = 1000
    hidden, weight = torch.randn(n, 16) * 0.5, torch.randn(64, 16)
    kept = nucleus(hidden @ weight.T, 0.95)
    logits = (hidden @ weight.T).masked_fill(~mask_of(Support.of(kept), 64), float("-inf"))
    targets = torch.distributions.Categorical(logits=logits).sample()
    sampled = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    options = {"mode": "sequence_mask", "cu_seqlens": torch.tensor([0, n])}
    whole = linear_logprob(hidden, weight, targets, backend="torch")
    assert sampling_ratio(whole, sampled, **options).max() < 1e-20
    truncated = linear_logprob(hidden, weight, targets, support=Support.of(kept), backend="torch")
    assert (truncated - sampled).abs().max() < 1e-5
    assert (sampling_ratio(truncated, sampled, "token_mask") - 1).abs().max() < 1e-5
    assert (sampling_ratio(truncated, sampled, **options) - 1).abs().max() < 1e-4
