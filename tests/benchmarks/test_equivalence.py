"""`python -m benchmarks.gpu_proof.equivalence`: wrong results are found, and slow float64 shortens the cases."""

import pytest
import torch

from benchmarks.gpu_proof import equivalence
from benchmarks.harness.measure import Run, read_csv
from benchmarks.harness.problem import Shape, make_problem

CPU = torch.device("cpu")


@pytest.mark.parametrize("part", ["logprobs", "grad_hidden", "grad_weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equivalence_finds_a_wrong_result(monkeypatch, part, dtype):
    """An error of 1% in a gradient, of 0.01 nats in the log-probabilities, or NaN."""
    problem, truth = make_problem(Shape("tiny", 32, 211), 64, dtype, CPU, "trainable")
    right = equivalence.CALLS["trainable"]
    assert equivalence.compare(problem, truth, "trainable", "torch")["status"] == "ok"
    for error in (1e-2, float("nan")):

        def wrong(problem, backend, error=error):
            outcome = right(problem, backend)
            return {**outcome, part: outcome[part] + error * (1 if part == "logprobs" else outcome[part])}

        monkeypatch.setitem(equivalence.CALLS, "trainable", wrong)
        found = equivalence.compare(problem, truth, "trainable", "torch")
        assert found["status"] == "wrong"
        assert found["detail"]


def test_equivalence_with_a_wrong_operation_fails(monkeypatch, tmp_path):
    case = equivalence.Case(Shape("tiny", 32, 211), 64, torch.float32, ("scoring", "frozen"))
    monkeypatch.setattr(equivalence, "triton_obstacle", lambda *_: "not in this test")
    run = Run(CPU, quick=True, output=tmp_path)
    assert equivalence.run_equivalence(run, [case])
    shifted = lambda *arguments, **options: 1e-3 + true(*arguments, **options)  # noqa: E731
    true = equivalence.linear_logprob
    monkeypatch.setattr(equivalence, "linear_logprob", shifted)
    assert not equivalence.run_equivalence(run, [case])
    rows = {row["head"]: row["status"] for row in read_csv(run.folder / "equivalence.csv")}
    assert rows == {"scoring": "wrong", "frozen": "ok"}


def test_equivalence_tokens_follow_the_rate_of_float64():
    case = equivalence.Case(Shape("x", 4096, 151936), 16384, torch.bfloat16, ())
    assert equivalence.affordable_tokens(case, 50e12) == 16384
    assert equivalence.affordable_tokens(case, 0.5e12) == 4096
    assert equivalence.affordable_tokens(case, 1e6) == equivalence.FEWEST_TOKENS
