"""What the operations on the head write, keep and wait for on a GPU, on tensors without data.

The tensors are on the meta device, where any look at a value is an error, as it is a wait on a GPU. Triton's kernels
are not launched.
"""

from contextlib import nullcontext

import pytest
import torch

import grpo_kernels._checks
import grpo_kernels._weight_gradient
from grpo_kernels import PolicyObjective, linear_logprob, linear_policy_loss
from grpo_kernels._head import HALF, Head
from grpo_kernels._head_arguments import make_head
from grpo_kernels._weight_gradient import WeightGradient
from grpo_kernels.triton_kernels import elementwise_kernels, policy_kernels, scale_kernels, triton_head
from support.loss_cases import make
from support.traffic import Traffic

N, H, V = 96, 64, 1000
NOT_ON_META = (NotImplementedError, RuntimeError)


@pytest.fixture
def launched(monkeypatch):
    """Lets the operations run on the meta device; the names of the kernels that they would launch are collected."""
    names = []
    monkeypatch.setattr(grpo_kernels._checks, "require_product_operands", lambda *_, **__: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    # The meta device stands for a GPU.
    monkeypatch.setattr(Head, "mixed_products", property(lambda head: head.operand_dtype in HALF))
    for module in (triton_head, policy_kernels, elementwise_kernels, scale_kernels):
        monkeypatch.setattr(module, "run_kernel", lambda kernel, *_, **__: names.append(kernel.__name__))
    return names


def inputs(frozen: bool = False, dtype: torch.dtype = torch.bfloat16, size=(N, H, V)) -> tuple:
    tokens, width, vocab = size
    with torch.device("meta"):
        hidden = torch.empty(tokens, width, dtype=dtype, requires_grad=True)
        weight = torch.empty(vocab, width, dtype=dtype, requires_grad=not frozen)
        return hidden, weight, torch.empty(tokens, dtype=torch.int64)


def loss_of(head: tuple, **options):
    with torch.device("meta"):
        tokens = {name: torch.empty(head[2].shape) for name in ("advantages", "weights", "old_logprobs")}
        tokens["cu_seqlens"] = torch.empty(4, dtype=torch.int64)
    return linear_policy_loss(*head, **tokens, **options)


@pytest.mark.parametrize("rows", ["all", "indices"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("operation", ["token", "sequence", "logprob"])
def test_head_operations_with_rows_never_wait_for_the_device(operation, backend, frozen, rows, launched):
    def run(rows):
        options = {"rows": rows, "backend": backend, "return_entropy": True, "max_buffer_bytes": 100_000}
        if operation == "logprob":
            logprobs, entropy = linear_logprob(*inputs(frozen), **options)
            (logprobs.sum() + entropy.sum()).backward()
        else:
            loss_of(inputs(frozen), objective=PolicyObjective(level=operation), **options).loss.backward()

    run(rows if rows == "all" else torch.empty(50, dtype=torch.int64, device="meta"))
    assert ("head_forward" in launched) == (backend == "triton")
    with pytest.raises(NOT_ON_META):
        run(None)


def test_linear_policy_loss_one_chunk_writes_gradients_without_temporaries(launched):
    with Traffic() as traffic:
        loss_of(inputs(), rows="all", backend="triton").loss.backward()
    wide = [w for w in traffic.written if w.shape in ((N, H), (V, H))]
    # Two products, and zeros for the hidden states' gradient.
    assert sorted((w.call, w.shape, w.dtype) for w in wide) == [
        ("aten::mm", (N, H), torch.bfloat16),
        ("aten::mm", (V, H), torch.bfloat16),
        ("aten::new_zeros", (N, H), torch.bfloat16),
    ]
    # The incoming gradient is looked at by a kernel, which returns if it is 1.
    assert launched.count("scale_unless_one") == 2


def test_linear_policy_loss_several_chunks_round_the_weight_gradient_in_place(launched, monkeypatch):
    monkeypatch.setattr(grpo_kernels._weight_gradient, "ROUNDED_BYTES", 65536)
    tokens, width, vocab = size = 64, 256, 4096
    with Traffic() as traffic:
        head = inputs(size=size)
        before = traffic.peak
        budget = 200_000
        loss_of(head, rows="all", backend="triton", max_buffer_bytes=budget).loss.backward()
    chunks = launched.count("head_gradient")
    assert chunks >= 3
    sums = [w for w in traffic.written if w.dtype == torch.float32 and w.shape[-1:] == (width,)]
    rounded = [w for w in traffic.written if w.dtype == torch.bfloat16 and w.call == "aten::copy_"]
    # Each chunk writes the sums once, and those of the last one are rounded.
    assert sum(w.bytes for w in sums) == chunks * vocab * width * 4
    assert {w.call for w in sums} == {"aten::mm", "aten::addmm"}
    assert sum(w.bytes for w in rounded) == vocab * width * 2
    # Never the sums and the result, which would be 6 * vocab * width.
    assert traffic.peak - before <= 4 * vocab * width + budget + 65536 + 2 * tokens * width


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("operation", ["sequence", "logprob"])
def test_gradients_of_scored_rows_sum_up_nothing_over_the_vocabulary(operation, backend, launched):
    options = {"rows": "all", "backend": backend}
    with Traffic() as traffic:
        if operation == "logprob":
            linear_logprob(*inputs(), **options).sum().backward()
        else:
            loss_of(inputs(), objective=PolicyObjective(level="sequence"), **options).loss.backward()
    if backend == "triton":
        heads = [name for name in launched if name.startswith("head_")]
        assert heads == ["head_forward", "head_gradient_known"]
    # The first pass alone looks for maxima and adds up exponentials, though both make logits.
    calls = [w.call for w in traffic.written if w.shape in ((N,), (N, V))]
    passes = 1 if backend == "torch" else 0
    assert calls.count("aten::amax") == passes
    assert calls.count("aten::exp_") == 2 * passes
    assert sum(w.call == "aten::sum" and w.shape == (N,) for w in traffic.written) == passes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocab", [1, 2, 7, 260])
@pytest.mark.parametrize("chunks", [1, 3])
def test_weight_gradient_is_the_rounded_sum(chunks, vocab, dtype, monkeypatch):
    # A few rows of the vocabulary are rounded at once.
    monkeypatch.setattr(grpo_kernels._weight_gradient, "ROUNDED_BYTES", 3 * 4 * H)
    weight = torch.zeros(vocab, H)
    head = make_head(
        weight, None, hidden_dtype=torch.float32, logit_scale=1.0, softcap=None, max_buffer_bytes=None,
        process_group=None, shards=[vocab], backend="torch",
    )  # fmt: skip
    gradient, expected = WeightGradient(head, dtype), torch.zeros(vocab, H)
    for index in range(chunks):
        # Small integers and powers of 2, so that every sum is exact.
        hidden, d = torch.randint(-9, 9, (5, H)).float(), torch.randint(-9, 9, (5, vocab)).float()
        scale = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0])
        gradient.add(d, scale, hidden, last=index == chunks - 1)
        expected.addmm_(d.t(), hidden * scale[:, None])
    found = gradient.collected()
    assert found.is_contiguous()
    # Autograd would not add to a view in place.
    assert not found._is_view()
    assert found.untyped_storage().nbytes() <= vocab * H * dtype.itemsize
    assert torch.equal(found, expected.to(dtype))


def test_weight_gradient_without_a_chunk_is_zero():
    hidden, weight = torch.randn(4, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    linear_logprob(hidden, weight, torch.full((4,), -100)).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(V, H))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scale_unless_one(dtype, monkeypatch):
    builder, stores = scale_kernels.triton.runtime.interpreter.interpreter_builder, []
    store = type(builder).create_masked_store
    monkeypatch.setattr(type(builder), "create_masked_store", lambda *args: stores.append(1) or store(*args))
    values = torch.randn(3, 2000, dtype=dtype)
    before = values.clone()
    scale_kernels.scale_unless_one_(values, torch.ones(()))
    assert not stores
    assert torch.equal(values, before)
    scale_kernels.scale_unless_one_(values, torch.tensor(0.5))
    assert stores
    assert torch.equal(values, before / 2)
    scale_kernels.scale_unless_one_(values[:0], torch.tensor(0.5))


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("trainable", ["hw", "h"])
@pytest.mark.parametrize("operation", ["token", "sequence", "logprob"])
def test_head_operations_with_rows_equal_those_with_the_other_targets_ignored(operation, trainable, backend):
    arguments = make(trainable=trainable)
    targets = arguments["targets"]
    # One of the rows is ignored, and its incoming gradient is not a number; others have weight 0.
    rows = torch.tensor([0, 1, 2, 4, 5, 9, 20, len(targets) - 1])
    others = torch.full_like(targets, -100).index_copy(0, rows, targets[rows])

    def results(targets, rows):
        leaves = {name: arguments[name].detach().clone() for name in ("hidden", "weight")}
        for name in leaves:
            leaves[name].requires_grad_(arguments[name].requires_grad)
        options = {"backend": backend, "max_buffer_bytes": 6_000, "rows": rows, "return_entropy": True}
        if operation == "logprob":
            logprobs, entropy = linear_logprob(leaves["hidden"], leaves["weight"], targets, **options)
            upstream = torch.linspace(-1, 1, len(targets))
            if backend != "reference":
                upstream[1] = float("nan")
            torch.autograd.backward([logprobs, entropy], [upstream, upstream.flip(0).nan_to_num()])
        else:
            given = arguments | leaves | {"targets": targets}
            loss, _, logprobs, entropy = linear_policy_loss(
                **given, objective=PolicyObjective(level=operation, beta=0.1), **options
            )
            loss.backward()
        return [logprobs, entropy, *(leaf.grad for leaf in leaves.values() if leaf.requires_grad)]

    for got, expected in zip(results(targets, rows), results(others, None), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for got, expected in zip(results(others, "all"), results(others, None), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("none", "rows must be 'all', indices"),
        (torch.tensor([0, 0]), "ascending"),
        (torch.tensor([3, 40]), "ascending"),
        (torch.tensor([[0]]), "shape"),
    ],
)
def test_rows_out_of_range_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        linear_logprob(torch.randn(5, H), torch.randn(V, H), torch.zeros(5, dtype=torch.int64), rows=rows)


def test_rows_of_another_dtype_are_refused():
    with pytest.raises(TypeError, match="rows must be int64"):
        linear_logprob(torch.randn(5, H), torch.randn(V, H), torch.zeros(5, dtype=torch.int64), rows=torch.ones(5))


def test_rows_beside_skip_inactive_are_refused():
    with pytest.raises(ValueError, match="skip_inactive finds the rows itself"):
        linear_policy_loss(**make(), rows="all", skip_inactive=True)
