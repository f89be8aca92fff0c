"""The sampling benchmark."""

import csv

import pytest
import torch

from benchmarks import rollout
from benchmarks.harness.measure import Run

pytestmark = pytest.mark.slow


def rows(folder):
    (path,) = folder.glob("*/rollout.csv")
    with path.open() as file:
        return {row["contender"]: row for row in csv.DictReader(file)}


@pytest.fixture
def run(tmp_path):
    return Run(torch.device("cpu"), quick=True, repeats=1, output=tmp_path)


def test_run_rollout_rows_of_all_contenders(run, tmp_path):
    rollout.run_rollout(run, ["llama-tiny"], contenders=[rollout.OURS, rollout.PADDED])
    measured = rows(tmp_path)
    assert {row["status"] for row in measured.values()} == {"ok"}
    ours, padded = measured[rollout.OURS], measured[rollout.PADDED]
    assert float(ours["logprob_difference"]) < 1e-5
    assert float(ours["speedup"]) == pytest.approx(
        float(ours["tokens_per_second"]) / float(padded["tokens_per_second"]), rel=1e-2
    )
    for row in measured.values():
        tokens = float(row["mean_tokens"]) * float(row["sequences"])
        assert float(row["tokens_per_second"]) == pytest.approx(tokens / float(row["seconds"]), rel=1e-2)
        assert rollout.SHORTEST < float(row["mean_tokens"]) <= 32


def test_run_rollout_wrong_logprobs_are_not_timed(run, tmp_path, monkeypatch):
    sampled = rollout.ours

    def wrong(case):
        return [(tokens, [logprob - 0.01 for logprob in logprobs]) for tokens, logprobs in sampled(case)]

    monkeypatch.setitem(rollout.CONTENDERS, rollout.OURS, wrong)
    rollout.run_rollout(run, ["llama-tiny"], contenders=[rollout.OURS])
    row = rows(tmp_path)[rollout.OURS]
    assert (row["status"], row["detail"]) == ("wrong", "log-probabilities differ by 0.01")
    assert not row.get("seconds")
