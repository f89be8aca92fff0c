"""The simulation of `max_staleness`, against times that can be computed by hand."""

import csv

import pytest

from benchmarks import staleness
from benchmarks.staleness import Batch, Times, simulate

# Every answer has 100 tokens, of a second each.
EQUAL = Batch(prompts=2, num_generations=2, median=100, sigma=0.0, longest=200)
VARIED = Batch(prompts=4, num_generations=4, median=100, sigma=0.8, longest=600)


def times(train, sync=0.0, row=0.0, prefill=0.0):
    return Times(train=train, sync=sync, token=1.0, row=row, prefill=prefill)


def test_simulate_without_staleness_adds_the_times():
    outcome = simulate(times(30.0, sync=5.0, row=0.25), EQUAL, 0, 10)
    # A step of four rows takes two seconds.
    assert outcome.seconds_per_batch == pytest.approx(200 + 30 + 5)
    assert outcome.max_staleness == 0
    assert outcome.sampler_busy == pytest.approx(200 / 235)
    assert outcome.trainer_busy == pytest.approx(30 / 235)


def test_simulate_with_staleness_takes_the_longer_time():
    """Sampling overlaps training; only the first batch waits for its answers and the last one for its training."""
    bound = simulate(times(300.0), EQUAL, 1, 20)
    assert bound.seconds_per_batch == pytest.approx((100 + 20 * 300) / 20)
    assert bound.max_staleness == 1
    sampling = simulate(times(10.0), EQUAL, 1, 20)
    # Both batches of the first part finish together; then each lasts as long as its sampling.
    assert 50 <= sampling.seconds_per_batch <= 100


@pytest.mark.parametrize("bound", [0, 1, 2, 5])
def test_simulate_with_unequal_lengths_keeps_the_bound(bound):
    outcome = simulate(times(60.0, sync=1.0), VARIED, bound, 15)
    assert outcome.max_staleness == bound
    base = simulate(times(60.0, sync=1.0), VARIED, 0, 15)
    assert outcome.seconds_per_batch <= base.seconds_per_batch
    assert bound == 0 or outcome.seconds_per_batch < 0.8 * base.seconds_per_batch


def test_staleness_writes_a_table_and_a_figure(tmp_path, monkeypatch, capsys):
    options = {"prompts": 2, "num_generations": 2, "median": 20, "longest": 60, "batches": 4, "max_staleness": "0,1"}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    monkeypatch.setattr("sys.argv", ["staleness", "--train_seconds=1,2", *arguments, f"--output={tmp_path}"])
    staleness.body()
    rows = list(csv.DictReader((tmp_path / "staleness.csv").open()))
    assert [(row["train_seconds"], row["max_staleness"]) for row in rows] == [
        ("1.0", "0"), ("1.0", "1"), ("2.0", "0"), ("2.0", "1"),
    ]  # fmt: skip
    assert [float(row["speedup"]) for row in rows[::2]] == [1.0, 1.0]
    assert (tmp_path / "staleness.png").stat().st_size > 1000
    assert "max_staleness 1:" in capsys.readouterr().out
