"""`linear_policy_loss`: loss, gradients, statistics and cost, against full logits and the definition of the loss."""

import dataclasses

import pytest
import torch

from grpo_kernels import PRESETS, PolicyObjective, linear_logprob, linear_policy_loss, policy_loss
from support.loss_cases import LENGTHS, H, V, make
from support.measure import count_flops
from support.objectives import OBJECTIVES
from support.oracle import compare

LEAVES = ("hidden", "weight", "bias")
pytestmark = pytest.mark.usefixtures("backend")


def runner(objective):
    def run(arguments, **options):
        result = linear_policy_loss(objective=objective, return_entropy=True, **arguments, **options)
        if result.loss.requires_grad:
            (result.loss * 1.7).backward()
        counted = (arguments["weights"] != 0) & (arguments["targets"] != -100)
        gradients = {f"d {name}": arguments[name].grad for name in LEAVES if name in arguments}
        # The operation skips rows of weight 0, which the reference computes.
        outputs = {"logprobs": result.logprobs[counted], "entropy": result.entropy[counted]}
        stats = {name: value.float() for name, value in result.stats.items()}
        # Terms of both signs cancel, so the error is relative to their count.
        stats["kl"] = stats["kl"] + stats["tokens"]
        loss = result.loss
        if objective.level == "product":
            loss = loss + (arguments["weights"] * arguments["advantages"].abs())[counted].sum()
        return {"loss": loss, **outputs, **gradients, **stats}

    return run


@pytest.mark.parametrize("trainable", ["hw", "h", "w", ""])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective(name, trainable):
    compare(runner(OBJECTIVES[name]), make(trainable=trainable), torch.float32)
    compare(runner(OBJECTIVES[name]), make(trainable=trainable, old_logprobs=None), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trainable", ["hwb", "h"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("budget", [None, 5 * 4 * V])
def test_dtypes_and_chunks(level, trainable, dtype, budget):
    objective = PolicyObjective(level=level, beta=0.1, entropy_coef=0.2)
    arguments = make(dtype=dtype, trainable=trainable, bias=torch.randn(V).to(dtype))
    arguments |= {"temperature": 0.8, "softcap": 6.0, "logit_scale": 1.3}
    arguments["correction"] = torch.rand(arguments["targets"].shape)
    compare(runner(objective), arguments, dtype, max_buffer_bytes=budget)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("trainable", ["hw", "h"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_vocabulary(dtype, trainable):
    arguments = make([20, 13], dtype=dtype, trainable=trainable, vocab=49152, width=576)
    compare(runner(PRESETS["dapo"]), arguments, dtype)


@pytest.mark.parametrize("lengths", [[1], [1] * 33, [33]])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_small_batches(lengths, level):
    arguments = make(lengths)
    arguments["targets"][0] = 7
    compare(runner(PolicyObjective(level=level)), arguments, torch.float32)


@pytest.mark.parametrize("name", ["dapo", "gspo", "cispo", "everything"])
@pytest.mark.parametrize("trainable", ["hw", "h"])
def test_loss_equals_the_two_operations(name, trainable):
    arguments, objective = make(trainable=trainable), OBJECTIVES[name]
    got = linear_policy_loss(objective=objective, **arguments)
    got.loss.backward()
    gradients = [arguments[leaf].grad for leaf in ("hidden", "weight")]
    arguments["hidden"].grad = arguments["weight"].grad = None
    head = arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("targets")
    logprobs, entropy = linear_logprob(*head, return_entropy=True)
    arguments["weights"] = arguments["weights"].masked_fill(head[2] == -100, 0.0)
    expected = policy_loss(logprobs, objective=objective, entropy=entropy, **arguments)
    expected.loss.backward()
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(gradients[0], head[0].grad, rtol=1e-4, atol=1e-6)
    if trainable == "hw":
        torch.testing.assert_close(gradients[1], head[1].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["grpo", "gspo", "everything"])
def test_loss_padded_equals_packed(name):
    packed, objective = make([4, 2, 6]), OBJECTIVES[name]
    offsets = packed["cu_seqlens"].tolist()
    padded = {}
    for key, value in packed.items():
        if key in ("cu_seqlens", "weight"):
            continue
        rows = torch.full((3, 6, *value.shape[1:]), 5, dtype=value.dtype)  # garbage where there is no token
        for row in range(3):
            rows[row, : offsets[row + 1] - offsets[row]] = value.detach()[offsets[row] : offsets[row + 1]]
        padded[key] = rows
    padded["weights"][padded["weights"] == 5] = 0
    padded["hidden"].requires_grad_()
    padded["weight"] = packed["weight"].detach().requires_grad_()
    got, expected = (linear_policy_loss(objective=objective, **a) for a in (padded, packed))
    got.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(padded["weight"].grad, packed["weight"].grad)
    for row in range(3):
        part = slice(offsets[row], offsets[row + 1])
        torch.testing.assert_close(padded["hidden"].grad[row, : part.stop - part.start], packed["hidden"].grad[part])
        torch.testing.assert_close(got.logprobs[row, : part.stop - part.start], expected.logprobs[part])
        assert (padded["hidden"].grad[row, part.stop - part.start :] == 0).all()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("trainable", ["hw", "h"])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_weight_zero_hides_garbage(level, trainable, garbage):
    objective = PolicyObjective(level=level, beta=0.1)
    clean = make(trainable=trainable)
    dirty = {k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in clean.items()}
    hidden = clean["weights"] == 0
    with torch.no_grad():
        for key in ("hidden", "advantages", "old_logprobs", "ref_logprobs"):
            dirty[key][hidden] = garbage
    expected, got = runner(objective)(clean), runner(objective)(dirty)
    for key, value in expected.items():
        if value is not None:
            torch.testing.assert_close(got[key], value, rtol=0, atol=0)
    assert (got["d hidden"][hidden] == 0).all()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("trainable", ["hw", "h"])
def test_all_masked(level, trainable):
    arguments = make(trainable=trainable)
    arguments["weights"] = torch.zeros_like(arguments["weights"])
    result = linear_policy_loss(objective=PolicyObjective(level=level, beta=0.1, entropy_coef=0.1), **arguments)
    result.loss.backward()
    assert result.loss == result.stats["tokens"] == 0
    assert (arguments["hidden"].grad == 0).all()
    assert trainable == "h" or (arguments["weight"].grad == 0).all()


@pytest.mark.parametrize("trainable", ["hw", "h"])
def test_no_tokens(trainable):
    arguments = make([0, 0], trainable=trainable)
    result = linear_policy_loss(**arguments)
    result.loss.backward()
    assert result.loss == 0
    assert arguments["hidden"].grad.shape == (0, H)


def test_tied_weight_gets_both_gradients():
    arguments = make()
    table = torch.randn(V, H, requires_grad=True)
    ids = torch.randint(0, V, arguments["targets"].shape)
    for key in ("hidden", "weight"):
        arguments.pop(key)

    def gradient(backend):
        table.grad = None
        hidden = torch.tanh(table[ids])
        linear_policy_loss(hidden, table, **arguments, backend=backend).loss.backward()
        return table.grad

    torch.testing.assert_close(gradient("auto"), gradient("reference"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_grad_weight_buffer_accumulates_over_microbatches(level):
    objective = PolicyObjective(level=level)
    batches = [make(), make([2, 9])]
    weight = batches[0]["weight"].detach().bfloat16().requires_grad_()
    expected = torch.zeros(V, H)
    buffer = torch.full((V, H), 0.5)
    for batch in batches:
        batch["hidden"] = batch["hidden"].detach().bfloat16().requires_grad_()
        batch["weight"] = weight
        linear_policy_loss(objective=objective, **batch).loss.backward()
        expected += weight.grad.float()
        plain = batch["hidden"].grad
        weight.grad = batch["hidden"].grad = None
        linear_policy_loss(objective=objective, grad_weight_buffer=buffer, **batch).loss.backward()
        assert weight.grad is None
        torch.testing.assert_close(batch["hidden"].grad, plain)
    # The weight's own gradient was rounded to bfloat16 each time; the buffer was not.
    assert ((buffer - 0.5) - expected).norm() < 2**-8 * expected.norm()
    with pytest.raises(ValueError, match=r"must be backpropagated with gradient 1, got 2\.0"):
        (2 * linear_policy_loss(objective=objective, grad_weight_buffer=buffer, **batches[0]).loss).backward()
    before = buffer.clone()
    with torch.no_grad():
        linear_policy_loss(objective=objective, grad_weight_buffer=buffer, **batches[0])
    assert torch.equal(buffer, before)


def half_without_advantage(**extra):
    arguments = make([8] * 4, old_logprobs=None, ref_logprobs=None, **extra)
    arguments["targets"][1] = 3
    arguments["weights"] = torch.full((32,), 1 / 32)
    arguments["advantages"][8:24] = 0
    return arguments


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("trainable", ["hw", "h"])
def test_skip_inactive_rows(level, trainable):
    objective = PolicyObjective(level=level)
    arguments = half_without_advantage(trainable=trainable)
    expected = runner(objective)(arguments)
    arguments["hidden"].grad = arguments["weight"].grad = None
    got = runner(objective)(arguments, skip_inactive=True)
    for key in ("loss", "d hidden", "d weight"):
        torch.testing.assert_close(got[key], expected[key])
    assert got["logprobs"].isnan().tolist() == [False] * 8 + [True] * 16 + [False] * 8
    torch.testing.assert_close(got["logprobs"][:8], expected["logprobs"][:8])
    assert (got["tokens"], expected["tokens"]) == (16, 32)


@pytest.mark.parametrize(
    ("level", "trainable", "skip", "cost"),
    [
        ("token", "", False, 1),
        ("token", "hw", False, 1 * 0.5 + 3 * 0.5),
        ("token", "hw", True, 3 * 0.5),
        ("token", "h", False, 1 * 0.5 + 2 * 0.5),
        ("token", "h", True, 2 * 0.5),
        ("sequence", "hw", False, 1 + 3 * 0.5),
        ("sequence", "h", False, 1 * 0.5 + 2 * 0.5),
    ],
)
def test_cost(level, trainable, skip, cost):
    """The products of the module's table, with half of the rows known to be without a gradient."""
    arguments = half_without_advantage(trainable=trainable)

    def step():
        result = linear_policy_loss(objective=PolicyObjective(level=level), skip_inactive=skip, **arguments)
        if trainable:
            result.loss.backward()

    assert count_flops(step, (32, H, V)) == pytest.approx(cost)


def test_cost_of_masked_rows():
    arguments = half_without_advantage()
    arguments["advantages"].fill_(1.0)
    arguments["weights"][:8] = 0
    arguments["targets"][8:16] = -100
    assert count_flops(lambda: linear_policy_loss(**arguments).loss.backward(), (32, H, V)) == pytest.approx(1.5)


def test_cost_of_clipped_sequences():
    """Sequence level, trainable head: 1U for all rows, 3U for those of the sequences whose ratio is not clipped."""
    arguments = half_without_advantage()
    arguments["advantages"].fill_(1.0)
    arguments["old_logprobs"] = linear_logprob(*(arguments[k].detach() for k in ("hidden", "weight", "targets")))
    arguments["old_logprobs"][:24] -= 1.0  # ratio e, far above 1.2
    objective = PolicyObjective(level="sequence")
    flops = count_flops(lambda: linear_policy_loss(objective=objective, **arguments).loss.backward(), (32, H, V))
    assert flops == pytest.approx(1 + 3 * 0.25)


@pytest.mark.parametrize("trainable", ["hw", "h"])
def test_sequence_level_gradient_of_one_token_reaches_its_sequence(trainable):
    objective = PolicyObjective(level="sequence", epsilon=0.9)
    advantages = torch.zeros(sum(LENGTHS))
    advantages[[8, 20]] = torch.tensor([1.0, -2.0])
    results = compare(runner(objective), make(trainable=trainable, advantages=advantages), torch.float32)
    assert (results["d hidden"] != 0).any(1).sum() > 10


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("trainable", ["hw", "h"])
def test_float16_gradients_with_loss_scale(trainable, level):
    scale = 2.0**20
    arguments = make(dtype=torch.float16, trainable=trainable)
    # Without the scale the gradients are far below float16's smallest number, 6e-8.
    arguments["weights"] *= 2.0**-20

    def run(arguments, **options):
        objective = PolicyObjective(level=level, epsilon=0.9)
        (linear_policy_loss(objective=objective, **arguments, **options).loss * scale).backward()
        return {"d hidden": arguments["hidden"].grad, "d weight": arguments["weight"].grad}

    results = compare(run, arguments, None)
    assert results["d hidden"].dtype == torch.float16


def test_second_backward_is_refused():
    arguments = make()
    loss = linear_policy_loss(**arguments).loss
    loss.backward(retain_graph=True)
    with pytest.raises(ValueError, match="a second backward needs a second forward"):
        loss.backward()


def test_outputs_are_detached():
    result = linear_policy_loss(return_entropy=True, **make())
    assert result.loss.requires_grad
    assert not any(t.requires_grad for t in (result.logprobs, result.entropy, *result.stats.values()))
    assert linear_policy_loss(**make()).entropy is None


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden": torch.zeros(33, 5)}, ValueError, "hidden has H=5, but weight [V, H] has H=17"),
        ({"hidden": torch.zeros(17)}, ValueError, "hidden must have shape [N, H] or [B, T, H], got (17,)"),
        ({"targets": torch.zeros(3).long()}, ValueError, "targets must have shape (33,), got (3,)"),
        ({"targets": torch.full((33,), V)}, ValueError, "target id 259 is outside the vocabulary; allowed are 0..258"),
        ({"targets": torch.full((33,), -1)}, ValueError, "target id -1 is outside the vocabulary"),
        ({"targets": torch.zeros(33)}, TypeError, "targets must be int64 or int32, got torch.float32"),
        ({"weights": torch.zeros(4)}, ValueError, "weights must have shape (33,), got (4,)"),
        ({"advantages": torch.zeros(33).to("meta")}, ValueError, "advantages is on meta, but the other tensors are on"),
        ({"weight": torch.zeros(V, H).to("meta")}, ValueError, "weight is on meta"),
        ({"weight": torch.zeros(V, H, dtype=torch.float8_e4m3fn)}, TypeError, "weight is torch.float8_e4m3fn; convert"),
        ({"advantages": [0.5] * 33}, TypeError, "advantages must be a tensor, got list"),
        ({"advantages": None}, TypeError, "advantages must be a tensor, got NoneType"),
        ({"weights": 1.0}, TypeError, "weights must be a tensor, got float"),
        ({"old_logprobs": [0.5] * 33}, TypeError, "old_logprobs must be a tensor, got list"),
        ({"temperature": 0.0}, ValueError, "temperature must be a finite number above 0, got 0.0"),
        ({"softcap": -1.0}, ValueError, "softcap must be a finite number above 0, got -1.0"),
        ({"max_buffer_bytes": 0}, ValueError, "max_buffer_bytes must be a finite number above 0, got 0"),
        ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, "cu_seqlens must end at the number of tokens 33, got 4"),
        ({"grad_weight_buffer": torch.zeros(3, 3)}, ValueError, "grad_weight_buffer must have shape (259, 17)"),
        ({"grad_weight_buffer": torch.zeros(V, H).half()}, TypeError, "grad_weight_buffer must be torch.float32"),
        ({"objective": PolicyObjective(beta=0.1), "ref_logprobs": None}, ValueError, "beta=0.1 needs ref_logprobs"),
        ({"objective": dataclasses.asdict(PolicyObjective())}, TypeError, "objective must be a PolicyObjective"),
        ({"process_group": "tp"}, TypeError, "process_group must be a torch.distributed.ProcessGroup, got 'tp'"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error) as caught:
        linear_policy_loss(**{**make(), **change})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("trainable", ["hw", "h"])
def test_all_targets_ignored_warns(trainable):
    arguments = make(trainable=trainable, targets=torch.full((33,), -100))
    with pytest.warns(UserWarning, match=r"all 33 targets are -100 \(ignored\), so the loss and its gradients are 0"):
        result = linear_policy_loss(**arguments)
    result.loss.backward()
    assert result.loss == 0
    assert result.stats["tokens"] == 0
    assert not any(arguments[name].grad.any() for name in ("hidden", "weight") if arguments[name].requires_grad)
