"""`linear_logprob`: outputs and every gradient against full logits, over dtypes, shapes, options and hostile inputs."""

import pytest
import torch

from grpo_kernels import linear_logprob
from grpo_kernels.budget import MIB
from support.logprob_cases import LEAVES, make, run
from support.measure import LargestTensor, count_flops
from support.oracle import compare, relative_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trainable", ["hw", "h", "w", "hwb", "hb", ""])
@pytest.mark.parametrize(("N", "V"), [(1, 1), (33, 2), (1, 259), (33, 259), (70, 259)])
def test_outputs_and_gradients(N, V, trainable, dtype):
    arguments = make(N, 17, V, dtype, trainable=trainable, bias=torch.randn(V).to(dtype))
    compare(run, arguments, dtype)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("trainable", ["hw", "h"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_vocabulary(dtype, trainable):
    compare(run, make(33, 576, 49152, dtype, trainable=trainable), dtype)


@pytest.mark.usefixtures("large_tiles")
def test_largest_vocabulary():
    compare(run, make(3, 17, 151936, torch.bfloat16), torch.bfloat16, max_buffer_bytes=MIB)


def run_without_entropy(arguments, **options):
    logprobs = linear_logprob(**arguments, **options)
    logprobs.sum().backward()
    return {"logprobs": logprobs, "hidden": arguments["hidden"].grad, "weight": arguments["weight"].grad}


@pytest.mark.parametrize("trainable", ["hw", "h", "w"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probabilities_without_entropy(dtype, trainable):
    arguments = make(33, 17, 259, dtype, trainable=trainable)
    compare(run_without_entropy, arguments, dtype, max_buffer_bytes=9 * 4 * 259)


@pytest.mark.parametrize("trainable", ["hw", "h"])
@pytest.mark.parametrize("used", ["logprobs", "entropy", "neither"])
def test_only_one_output_in_the_loss(used, trainable):
    def run_one(arguments, **options):
        outputs = dict(
            zip(("logprobs", "entropy"), linear_logprob(**arguments, return_entropy=True, **options), strict=True)
        )
        loss = outputs[used].square().sum() if used in outputs else 0 * arguments["hidden"].sum()
        loss.backward()
        return {"hidden": arguments["hidden"].grad, "weight": arguments["weight"].grad}

    arguments = make(33, 17, 259, trainable=trainable)
    if used == "neither":
        assert not run_one(arguments)["hidden"].any()
    else:
        compare(run_one, arguments, torch.float32)


def test_tied_weight_gets_both_gradients():
    def run_tied(arguments, **options):
        table = arguments["weight"]
        hidden = torch.tanh(table[arguments["targets"].roll(1)]) * 2
        logprobs = linear_logprob(hidden, table, arguments["targets"], **options)
        logprobs.mean().backward()
        return {"logprobs": logprobs, "weight": table.grad}

    compare(run_tied, make(33, 17, 259, trainable="w"), torch.float32)


@pytest.mark.parametrize("trainable", ["hwb", "h"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("logit_scale", [1.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 0.7, "each"])
def test_transforms(temperature, logit_scale, softcap, dtype, trainable):
    if temperature == "each":
        temperature = torch.rand(33) + 0.5
    arguments = make(
        33, 17, 259, dtype, trainable=trainable, scale=3.0, bias=torch.randn(259),
        temperature=temperature, softcap=softcap, logit_scale=logit_scale,
    )  # fmt: skip
    compare(run, arguments, dtype, max_buffer_bytes=7 * 4 * 259)


@pytest.mark.parametrize("trainable", ["hwb", "h"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_excluded_tokens(softcap, trainable):
    bias = torch.randn(259)
    bias[::3] = float("-inf")
    arguments = make(33, 17, 259, trainable=trainable, bias=bias, softcap=softcap)
    arguments["targets"] = (arguments["targets"] // 3 * 3 + 1).clamp(max=256)
    results = compare(run, arguments, torch.float32)
    assert results["logprobs"].isfinite().all()
    # An excluded target has probability 0, and the other rows do not notice.
    arguments["targets"][4] = 3
    results = compare(run, arguments, torch.float32)
    assert results["logprobs"][4] == float("-inf")
    assert results["hidden"].isfinite().all()


@pytest.mark.parametrize("trainable", ["hw", "h"])
@pytest.mark.parametrize("ignored", [slice(5, 20), slice(None)])
def test_ignored_targets(ignored, trainable):
    arguments = make(33, 17, 259, trainable=trainable)
    arguments["targets"][ignored] = -100
    results = compare(run, arguments, torch.float32)
    for name in ("logprobs", "entropy", "hidden"):
        assert (results[name][ignored] == 0).all()


@pytest.mark.parametrize("trainable", ["hw", "h"])
def test_ignored_targets_hide_garbage(trainable):
    arguments = make(33, 17, 259, trainable=trainable, temperature=torch.rand(33) + 0.5)
    ignored = torch.zeros(33, dtype=torch.bool)
    ignored[::4] = True
    arguments["targets"][ignored] = -100
    clean = run(arguments)
    dirty = dict(arguments, hidden=arguments["hidden"].detach().clone(), temperature=arguments["temperature"].clone())
    dirty["hidden"][ignored] = float("nan")
    dirty["temperature"][ignored] = float("nan")
    dirty["hidden"].requires_grad_()
    dirty["weight"] = arguments["weight"].detach().requires_grad_("w" in trainable)
    outputs = linear_logprob(**dirty, return_entropy=True)
    upstream = torch.linspace(-1, 1.3, 33)
    # The incoming gradient is garbage too, as when 0 * inf comes from a masked loss.
    torch.autograd.backward(
        outputs, [torch.where(ignored, float("nan"), upstream), torch.where(ignored, float("inf"), upstream.flip(0))]
    )
    assert torch.equal(outputs[0], clean["logprobs"])
    torch.testing.assert_close(dirty["hidden"].grad, clean["hidden"])
    if "w" in trainable:
        torch.testing.assert_close(dirty["weight"].grad, clean["weight"])


def test_int32_targets():
    arguments = make(33, 17, 259)
    expected = run(arguments)
    arguments = dict(make(33, 17, 259), **{k: arguments[k].detach().requires_grad_() for k in ("hidden", "weight")},
                     targets=arguments["targets"].int())  # fmt: skip
    for name, value in run(arguments).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("trainable", ["hw", "h"])
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_non_contiguous_inputs(layout, trainable):
    arguments = make(34, 16, 258, trainable="")
    for name in ("hidden", "weight"):
        value = arguments[name]
        if layout == "transposed":
            value = value.t().contiguous().t()
        elif layout == "strided":
            value = torch.stack([value, value + 1], -1).flatten(1)[:, ::2]
        else:
            value = value[:1].expand_as(value)
        assert not value.is_contiguous()
        arguments[name] = value.requires_grad_(name[0] in trainable)
    compare(run, arguments, torch.float32, max_buffer_bytes=10 * 4 * 258)


@pytest.mark.parametrize("shape", [(4, 9), (2, 3, 5), (), (7, 0), (0,)], ids=str)
@pytest.mark.parametrize("trainable", ["hw", "h"])
def test_leading_shapes(shape, trainable):
    def run_shape(arguments, **options):
        logprobs = linear_logprob(**arguments, temperature=torch.full(shape, 0.8), **options)
        logprobs.square().sum().backward()
        return {"logprobs": logprobs, "hidden": arguments["hidden"].grad, "weight": arguments["weight"].grad}

    results = compare(run_shape, make(shape, 17, 259, trainable=trainable), torch.float32)
    assert results["logprobs"].shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trainable", ["hwb", "h"])
@pytest.mark.parametrize("budget", [1, 900, 40_000])
def test_many_chunks_and_vocabulary_blocks(budget, trainable, dtype):
    arguments = make(33, 17, 61, dtype, trainable=trainable, bias=torch.randn(61), softcap=4.0, temperature=0.9)
    compare(run, arguments, dtype, max_buffer_bytes=budget)


@pytest.mark.parametrize("trainable", ["hwb", "h"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_logits(dtype, trainable):
    # Multiples of 64 are exact in every dtype here, so that only the softmax can go wrong.
    arguments = make(40, 4, 30, dtype, trainable="", bias=torch.zeros(30, dtype=dtype))
    for name in ("hidden", "weight"):
        arguments[name] = (torch.randint(-7, 8, arguments[name].shape) * 8).to(dtype)
    arguments["hidden"][0] = 112.0
    arguments["weight"][3] = 24.0
    arguments["weight"][4] = -24.0
    arguments["targets"][:2] = torch.tensor([3, 4])
    logits = arguments["hidden"].double() @ arguments["weight"].double().T
    assert logits.max() > 1e4
    assert logits.min() < -1e4
    for name in LEAVES:
        arguments[name].requires_grad_(name[0] in trainable)
    results = compare(run, arguments, torch.float32)
    exact = torch.log_softmax(logits, -1).gather(1, arguments["targets"][:, None])[:, 0]
    torch.testing.assert_close(results["logprobs"].double(), exact, atol=1e-6, rtol=1e-6)


def test_large_common_offset_of_logits():
    # Logits near 1e4 have a spacing of 1e-3; their differences, and so the log-probabilities, are exact.
    hidden = torch.tensor([[1.0, 1.0]])
    weight = torch.stack([torch.full((64,), 8192.0), torch.arange(64) / 1024], 1)
    targets = torch.tensor([5])
    truth = linear_logprob(hidden.double(), weight.double(), targets, backend="reference")
    assert relative_error(linear_logprob(hidden, weight, targets), truth) < 1e-6


@pytest.mark.parametrize("trainable", ["hw", "h"])
@pytest.mark.parametrize("softcap", [None, 50.0])
def test_target_of_vanishing_probability(softcap, trainable):
    # exp(z - max) is 0 in float32 for these targets; their gradient is not.
    arguments = make(5, 3, 7, trainable="", softcap=softcap, temperature=0.05)
    arguments["hidden"] = torch.randint(-4, 5, (5, 3)).float()
    arguments["weight"] = torch.randint(-4, 5, (7, 3)).float()
    arguments["targets"] = (arguments["hidden"] @ arguments["weight"].T).argmin(1)
    for name in ("hidden", "weight"):
        arguments[name].requires_grad_(name[0] in trainable)
    results = compare(run, arguments, torch.float32)
    assert results["logprobs"].min() < -110


@pytest.mark.parametrize("trainable", ["hwb", "h"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, trainable):
    def run_autocast(arguments, backend="auto"):
        with torch.autocast("cpu", dtype, enabled=backend == "auto" or torch.is_autocast_enabled("cpu")):
            logprobs = linear_logprob(**arguments, backend=backend)
        logprobs.square().mean().backward()
        return {"logprobs": logprobs, **{name: arguments[name].grad for name in LEAVES}}

    arguments = make(33, 17, 259, trainable=trainable, bias=torch.randn(259))
    results = compare(run_autocast, arguments, dtype)
    assert results["logprobs"].dtype == torch.float32
    # Operands are rounded, which shows, and logits are not.
    exact = linear_logprob(**{k: v.detach() for k, v in arguments.items()})
    assert not torch.equal(results["logprobs"], exact)


@pytest.mark.parametrize("trainable", ["hw", "h", "w"])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)],
    ids=str,
)
def test_weight_in_another_dtype(dtype, weight_dtype, trainable):
    arguments = make(33, 17, 259, dtype, weight_dtype=weight_dtype, trainable=trainable)
    results = compare(run, arguments, None)
    assert results["hidden"] is None or results["hidden"].dtype == dtype
    assert results["weight"] is None or results["weight"].dtype == weight_dtype


def test_no_grad():
    arguments = make(33, 17, 259)
    with torch.no_grad():
        logprobs, entropy = linear_logprob(**arguments, return_entropy=True)
    assert not logprobs.requires_grad
    assert not entropy.requires_grad
    assert torch.equal(logprobs, linear_logprob(**arguments))


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("V", [259, 49152])
def test_log_probabilities_of_16_bit_inputs(V):
    arguments = make(64, 64, V, torch.bfloat16, trainable="")
    arguments["hidden"] = (arguments["hidden"] * 6.5).bfloat16()
    arguments = {k: v.detach() for k, v in arguments.items()}
    logits = arguments["hidden"].double() @ arguments["weight"].double().T
    assert 25 < logits.abs().max() < 40
    truth = torch.log_softmax(logits, -1).gather(1, arguments["targets"][:, None])[:, 0]
    assert (linear_logprob(**arguments).double() - truth).abs().max() <= 2e-5


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("trainable", ["hw", "h", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_budget_bounds_every_tensor(dtype, trainable):
    N, H, V, budget = 600, 8, 1000, 100_000
    arguments = make(N, H, V, dtype, trainable=trainable, softcap=3.0)
    with LargestTensor() as largest:
        run(arguments, max_buffer_bytes=budget)
    # Nothing beyond the budget but what has an input's own shape.
    assert largest.numel <= max(budget // 4, V * H, N * H)
    assert largest.numel < N * V / 20
    if trainable == "h":
        # Two such buffers are held, one for each output's slope.
        assert 2 * largest.numel <= budget // 4


@pytest.mark.parametrize("trainable", ["hw", "h"])
def test_budget_with_small_vocabulary(trainable):
    # Here [C, H] copies outweigh the [C, V] logits.
    N, H, V, budget = 600, 256, 2, 40_000
    arguments = make(N, H, V, trainable=trainable)
    peak = LargestTensor()
    with peak, torch.no_grad():
        linear_logprob(**{k: v.detach() for k, v in arguments.items()}, max_buffer_bytes=budget)
    assert peak.numel * 4 <= budget


@pytest.mark.parametrize(
    ("trainable", "entropy", "cost"),
    [("", False, 1), ("h", False, 2), ("h", True, 3), ("hw", False, 4), ("w", False, 3)],
)
def test_cost(trainable, entropy, cost):
    shapes = N, H, V = 40, 8, 50
    arguments = make(N, H, V, trainable=trainable)

    def step():
        outputs = linear_logprob(**arguments, return_entropy=entropy, max_buffer_bytes=2000)
        if trainable:
            sum(o.sum() for o in (outputs if entropy else [outputs])).backward()

    assert count_flops(step, shapes) == cost


def test_cost_of_rows_without_a_gradient():
    arguments = make(40, 8, 50)
    upstream = torch.zeros(40)
    upstream[::4] = 1.0
    arguments["targets"][1::4] = -100
    cost = count_flops(lambda: linear_logprob(**arguments).backward(upstream), (40, 8, 50))
    assert cost == 0.75 + 3 * 0.25


def test_weight_changed_before_backward_is_refused():
    arguments = make(5, 4, 7)
    logprobs = linear_logprob(**arguments)
    with torch.no_grad():
        arguments["weight"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"targets": torch.tensor([0, 1, 7])}, ValueError, "target id 7 .* 0..6 and -100"),
        ({"targets": torch.tensor([0, -1, 2])}, ValueError, "target id -1"),
        ({"targets": torch.tensor([0, 1])}, ValueError, r"targets must have shape \(3,\)"),
        ({"targets": torch.zeros(3)}, TypeError, "targets must be int64 or int32, got torch.float32"),
        ({"targets": [0, 1, 2]}, TypeError, "targets must be a tensor, got list"),
        ({"hidden": torch.zeros(3, 5)}, ValueError, "H=5, but weight .* H=4"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.long)}, TypeError, "hidden must be a floating-point"),
        ({"hidden": None}, TypeError, "hidden must be a tensor, got NoneType"),
        ({"weight": torch.zeros(7)}, ValueError, "weight must have shape"),
        ({"bias": torch.zeros(6)}, ValueError, r"bias must have shape \(7,\), got \(6,\)"),
        ({"bias": 0.5}, TypeError, "bias must be a tensor, got float"),
        ({"temperature": 0.0}, ValueError, "temperature .* got 0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature .* got nan"),
        ({"temperature": -1}, ValueError, "temperature .* got -1"),
        ({"temperature": float("inf")}, ValueError, "temperature .* got inf"),
        ({"temperature": 1e-46}, ValueError, "temperature=1e-46 is out of torch.float32's range, 1.18e-38 to 3.4e.38"),
        ({"temperature": 10**400}, ValueError, "temperature .* got 10000"),
        ({"temperature": True}, TypeError, "temperature must be a number, got True"),
        ({"temperature": None}, TypeError, "temperature must be a number or a tensor, got None"),
        ({"temperature": [1.0]}, TypeError, r"temperature must be a number, got \[1.0\]"),
        (
            {"temperature": torch.ones(3).bool()},
            TypeError,
            "temperature must be a floating-point tensor, got torch.bool",
        ),
        ({"temperature": torch.ones(3, 1)}, ValueError, r"temperature must have shape \(3,\), got \(3, 1\)"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number, got 'hot'"),
        ({"temperature": torch.tensor([1.0, -2.0, 1.0])}, ValueError, r"temperature .* got \[-2.0\]"),
        ({"temperature": torch.tensor([1.0, float("inf"), 1.0])}, ValueError, r"temperature .* got \[inf\]"),
        ({"temperature": torch.ones(2)}, ValueError, "temperature must have shape"),
        ({"softcap": -1.0}, ValueError, "softcap .* got -1.0"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale .* got 0.0"),
        ({"max_buffer_bytes": 0}, ValueError, "max_buffer_bytes .* got 0"),
        ({"backend": "triton2"}, ValueError, "backend='triton2' is unknown"),
        ({"targets": torch.zeros(3, dtype=torch.long, device="meta")}, ValueError, "targets is on meta"),
        ({"weight": torch.zeros(7, 4, device="meta")}, ValueError, "weight is on meta"),
        (
            {
                "hidden": torch.zeros(3, 4, device="meta"),
                "weight": torch.zeros(7, 4, device="meta"),
                "targets": torch.zeros(3, dtype=torch.long, device="meta"),
            },
            ValueError,
            "hidden is on meta, which holds no values",
        ),
        (
            {"weight": torch.zeros(7, 4, dtype=torch.float8_e4m3fn)},
            TypeError,
            "weight is torch.float8_e4m3fn; convert it",
        ),
        ({"hidden": torch.zeros(3, 4, dtype=torch.float8_e5m2)}, TypeError, "hidden is torch.float8_e5m2; convert it"),
        (
            {"weight": torch.zeros(7, 4).to_sparse()},
            TypeError,
            "weight must be a dense tensor, got layout torch.sparse_coo",
        ),
        (
            {"hidden": torch.zeros(3, 0), "weight": torch.zeros(7, 0)},
            ValueError,
            r"V and H of at least 1, got \(7, 0\)",
        ),
        ({"weight": torch.zeros(0, 4)}, ValueError, r"V and H of at least 1, got \(0, 4\)"),
    ],
    ids=str,
)
def test_bad_inputs(change, error, words):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "targets": torch.tensor([0, 1, 2])}
    with pytest.raises(error, match=f"linear_logprob: .*{words}"):
        linear_logprob(**{**arguments, **change})


def test_temperature_of_one_element():
    arguments = make(5, 4, 7)
    expected = linear_logprob(**arguments, temperature=0.5)
    for shape in ((), (1,), (1, 1)):
        assert torch.equal(linear_logprob(**arguments, temperature=torch.full(shape, 0.5)), expected)
