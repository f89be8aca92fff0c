"""The head's benchmark: its problem and true values, contenders, the check before timing, and the floor."""

import dataclasses
import math

import pytest
import torch

from benchmarks import head
from benchmarks.growth import with_one_buffer
from benchmarks.harness.contenders import BY_NAME, FLOOR, OURS, Contender, floor_call, forward_backward
from benchmarks.harness.measure import Run
from benchmarks.harness.problem import Shape, errors, grpo_loss, make_problem, norm_error, verdict
from grpo_fast.errors import UserError

CPU = torch.device("cpu")
PLAIN, CAPPED = Shape("plain", 24, 307), Shape("capped", 24, 307, softcap=5.0)


def problem_of(shape=PLAIN, tokens=80, dtype=torch.float32, mode="trainable"):
    return make_problem(shape, tokens, dtype, CPU, mode)


@pytest.mark.parametrize("shape", [PLAIN, CAPPED], ids=lambda shape: shape.model)
def test_truth_equals_float64_autograd(shape, monkeypatch):
    # The vocabulary in two chunks.
    whole = [slice(0, 100), slice(100, 307)]
    monkeypatch.setattr("benchmarks.harness.problem._vocabulary_chunks", lambda *_: whole)
    problem, truth = problem_of(shape)
    leaf = {name: getattr(problem, name).double().requires_grad_() for name in ("hidden", "weight")}
    logits = leaf["hidden"] @ leaf["weight"].T
    if shape.softcap is not None:
        logits = shape.softcap * torch.tanh(logits / shape.softcap)
    logprobs = torch.log_softmax(logits, -1).gather(1, problem.batch.targets[:, None]).squeeze(1)
    batch = dataclasses.replace(problem.batch, weights=problem.batch.weights.double())
    loss = grpo_loss(logprobs, batch)
    loss.backward()
    found = errors(truth, loss, logprobs, leaf["hidden"].grad, leaf["weight"].grad)
    assert set(found) == {"error_loss", "error_logprob", "error_logprob_median", "error_hidden", "error_weight"}
    assert max(found.values()) < 1e-12
    # There are clipped and unclipped tokens of both signs, and the log-probabilities are like a language model's.
    assert 0 < (truth.grad_hidden.norm(dim=1) == 0).sum() < truth.rows.numel()
    assert problem.batch.advantages.min() < 0 < problem.batch.advantages.max()
    if shape.softcap is None:
        assert -3 < truth.logprobs.median() < 0


@pytest.mark.parametrize("mode", ["trainable", "frozen", "scoring"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [OURS, "full logits"])
def test_gate_correct_contender_passes(name, dtype, mode):
    problem, truth = problem_of(CAPPED, dtype=dtype, mode=mode)
    call, status = head.gate(BY_NAME[name], problem, truth)
    assert status["status"] == "ok", status
    assert ("error_weight" in status) == (mode == "trainable")
    outcome = call()
    assert (outcome["grad_hidden"] is None) == (mode == "scoring")


def spoiled(part, factor):
    """Full logits with one gradient, or the loss, scaled."""

    def make(batch):
        loss = BY_NAME["full logits"].make(batch)

        def run(hidden, weight, batch):
            value, logprobs = loss(
                hidden * factor - (hidden * (factor - 1)).detach() if part == "hidden" else hidden,
                weight * factor - (weight * (factor - 1)).detach() if part == "weight" else weight,
                batch,
            )
            return (value * factor if part == "loss" else value), logprobs

        return run

    return Contender("spoiled", make)


@pytest.mark.parametrize("part", ["hidden", "weight", "loss"])
def test_gate_wrong_contender_is_not_timed(part):
    problem, truth = problem_of()
    assert head.gate(spoiled(part, 1.0), problem, truth)[1]["status"] == "ok"
    call, status = head.gate(spoiled(part, 1.01), problem, truth)
    assert call is None
    assert status["status"] == "wrong"
    assert "above" in status["detail"]
    assert head.gate(spoiled(part, math.nan), problem, truth)[1]["status"] == "wrong"


def test_gate_missing_package_names_the_pip_command():
    absent = Contender("absent", lambda _: None, package="no-such-package", module="no_such_module")
    problem, truth = problem_of()
    call, status = head.gate(absent, problem, truth)
    assert call is None
    assert status == {
        "status": "left out",
        "detail": "no_such_module is not installed; install it with: pip install no-such-package",
    }
    assert "softcap" in head.gate(BY_NAME["Liger"], *problem_of(CAPPED))[1]["detail"] or not trl_and_liger()


def trl_and_liger():
    return not (BY_NAME["Liger"].missing() or BY_NAME["TRL"].missing())


def test_gate_cuda_error_ends_the_run():
    def make(batch):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(UserError, match="rude broke CUDA, leave it out with --contenders"):
        head.gate(Contender("rude", make), *problem_of())


def test_gate_contender_too_large_for_memory_is_left_out(monkeypatch):
    monkeypatch.setattr("benchmarks.harness.contenders.available_bytes", lambda _: 1000)
    problem, truth = problem_of()
    assert "needs about" in head.gate(BY_NAME["full logits"], problem, truth)[1]["detail"]
    assert head.gate(BY_NAME[OURS], problem, truth)[1]["status"] == "ok"


def test_measure_problem_failed_contender_is_recorded(tmp_path):
    def make(batch):
        def loss(hidden, weight, batch):
            raise RuntimeError("no\nluck")

        return loss

    run = Run(CPU, repeats=1, output=tmp_path)
    rows = head.measure_problem(run, *problem_of(), [Contender("broken", make), BY_NAME[OURS]])
    by_name = {row["contender"]: row for row in rows}
    assert by_name["broken"]["detail"] == "RuntimeError: no luck"
    assert by_name[OURS]["status"] == by_name[FLOOR]["status"] == "ok"
    assert by_name[OURS]["seconds"] > 0
    assert by_name[OURS]["to_floor"] == pytest.approx(by_name[OURS]["seconds"] / by_name[FLOOR]["seconds"])


@pytest.mark.parametrize("count", [1, 3, 8])
def test_forward_backward_microbatches_give_the_whole_gradient(count):
    problem, truth = problem_of()
    problem = dataclasses.replace(problem, microbatches=count)
    for outcome in (forward_backward(problem, BY_NAME[OURS].make(problem.batch)), with_one_buffer(problem)):
        assert verdict(errors(truth, **outcome), torch.float32) is None


def test_floor_in_chunks_computes_the_whole_product():
    problem, _ = problem_of()
    made = []
    original = torch.empty_like
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda tensor: made.append(original(tensor)) or made[-1])
        patch.setattr("benchmarks.harness.contenders.FLOOR_BYTES", {"cpu": 7 * 307 * 4, "cuda": 0})
        call = floor_call(problem)
    call()
    call()
    logits = problem.hidden @ problem.weight.T
    assert norm_error(made[0], (logits @ problem.weight).double()) < 1e-6
    assert norm_error(made[1], (logits.T @ problem.hidden).double()) < 1e-6


def test_forward_backward_repeated_keeps_no_gradient():
    problem, _ = problem_of()
    loss = BY_NAME[OURS].make(problem.batch)
    first, second = forward_backward(problem, loss), forward_backward(problem, loss)
    torch.testing.assert_close(first["grad_weight"], second["grad_weight"])
    assert problem.weight.grad is None
