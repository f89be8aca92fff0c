"""The memory benchmarks on a CPU: plans compared with real steps, and the search for the longest answer."""

import sys

import pytest
import torch

from benchmarks import longest, plan
from benchmarks.harness import measure, trainers
from benchmarks.harness.measure import Deadline, Run
from benchmarks.harness.process import OutOfTime
from benchmarks.longest import Bounds, Contender, search
from benchmarks.step import OURS, TRL
from benchmarks.trial import Job, Trials, planned
from benchmarks.worker import Worker
from grpo_fast.errors import UserError

CPU = torch.device("cpu")
SMALL = plan.SMALL
pytestmark = pytest.mark.slow  # the fixture `steps` takes 15 s


def test_search_ends_within_five_percent():
    for limit, begin, growth in ((97, 1024, 2.0), (30_000, 28_000, 1.15), (30_000, 40_000, 1.15), (1 << 21, 64, 2.0)):
        bounds, tried = Bounds(), []

        def trial(length, limit=limit, tried=tried):
            tried.append(length)
            return {"fits": length <= limit, "memory": length > limit, "detail": "out of memory"}

        search(trial, bounds, begin, growth, lambda reply: None)
        assert bounds.fits == max(length for length in tried if length <= limit)
        if limit > longest.MOST:
            assert (bounds.fits, bounds.fails) == (longest.MOST, None)
        else:
            assert limit / 1.05 < bounds.fits <= limit < bounds.fails
        assert len(tried) == len(set(tried)) <= 16
    # Nothing fits; a trial fails for another reason than memory.
    bounds = Bounds()
    search(lambda _: {"fits": False, "memory": True, "detail": ""}, bounds, 1024, 2.0, lambda reply: None)
    assert bounds.fits == 0
    with pytest.raises(UserError, match="no such kernel"):
        search(
            lambda _: {"fits": False, "memory": False, "detail": "no such kernel"},
            Bounds(),
            9999,
            2.0,
            lambda reply: None,
        )


@pytest.fixture(scope="module")
def steps():
    """Rows of whole steps on the CPU by the setting's name."""
    run = Run(CPU, commit="abc")
    return {setting.name: plan.measure_setting(run, setting) for setting in plan.ON_CPU}


def test_plan_agrees_with_real_steps_on_the_cpu(steps):
    for row in steps.values():
        assert row["status"] == "ok", row
        assert row["ratio"] == pytest.approx(1, abs=0.05), row


def test_peak_grows_linearly_with_the_answer(steps):
    peaks = [steps[name]["measured_bytes"] for name in ("300", "600", "1200")]
    assert (peaks[2] - peaks[1]) / (peaks[1] - peaks[0]) == pytest.approx(2, rel=0.02)


def test_plan_of_a_group_in_one_microbatch(steps):
    apart, together = steps["8x300-apart"], steps["8x300-together"]
    measured = together["measured_bytes"] - apart["measured_bytes"]
    assert measured > 2 * (apart["measured_bytes"] - held("qwen3-tiny"))
    assert together["planned_bytes"] - apart["planned_bytes"] == pytest.approx(measured, rel=0.05)
    # A microbatch with one answer of eight takes as much as with one of two.
    assert apart["measured_bytes"] == pytest.approx(steps["300"]["measured_bytes"], rel=0.02)


def held(model):
    parts = planned(Job(OURS, model, "cpu", SMALL), 300).training
    return sum(parts[name] for name in ("weights", "adapters", "optimizer state", "gradients"))


def test_run_plan_wrong_plan_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "measured_step", lambda *_: {"fits": True, "peak_bytes": 1 << 20, "seconds": 1.0})
    run = Run(CPU, output=tmp_path, commit="abc")
    with pytest.raises(UserError, match=r"does not hold within 10%.*: 300"):
        plan.run_plan(run, plan.ON_CPU[:1])
    (row,) = measure.read_csv(run.folder / "plan.csv")
    assert row["status"] == "off"
    assert float(row["ratio"]) > 1.1


def test_trial_of_one_microbatch_takes_as_much_as_a_step():
    trials = Trials(Job(OURS, "qwen3-tiny", "cpu", {**SMALL, "max_buffer_mib": 8}, group=3))
    # The head is the fullest moment here: the previous microbatch is freed, the next one's ids are allocated already.
    some, every = trials.trial(400), trials.trial(400, whole=True)
    assert some["peak_bytes"] == pytest.approx(every["peak_bytes"], rel=0.003)
    assert some["seconds"] < every["seconds"]
    trials.stop()


def test_trial_with_weights_in_four_bits():
    pytest.importorskip("bitsandbytes")
    job = Job(OURS, "qwen3-tiny", "cpu", {**SMALL, "load_in_4bit": True}, group=2)
    trials = Trials(job)
    held = trials.held_bytes()
    parts = planned(job, 300).training
    # Apart from the 4-bit codes, these are parameters; the scales are not.
    expected = parts["weights"] + parts["adapters"] + parts["optimizer state"]
    assert held == pytest.approx(expected, rel=0.02)
    reply = trials.trial(300)
    assert reply["fits"]
    assert reply["peak_bytes"] == pytest.approx(sum(parts.values()), rel=0.1)
    trials.stop()


@pytest.mark.long
def test_longest_on_the_cpu_continues_a_stopped_search(tmp_path, capsys):
    run = Run(CPU, quick=True, output=tmp_path, commit="abc")
    ours = longest.CONTENDERS[0]
    path = run.folder / "longest.csv"
    # A search that ran out of time: the row holds its bounds.
    table = run.table("longest", longest.KEY)
    table.add({
        "model": "qwen3-tiny", "contender": ours.name, "cap_gib": 0.01, "status": "stopped", "answer_tokens": 200,
        "too_long_tokens": 4000, "peak_bytes": 1, "seconds": 0.1,
    })  # fmt: skip
    longest.run_longest(run, [ours], [0.01])
    (row,) = measure.read_csv(path)
    assert row["status"] == "ok"
    assert row["whole_step"] == "yes"
    answer, cap = int(row["answer_tokens"]), 0.01 * longest.GIB
    assert 200 < answer < int(row["too_long_tokens"]) <= 1.05 * answer < 4000
    assert 0.9 * cap < float(row["peak_bytes"]) <= cap
    assert answer == pytest.approx(int(row["planned_tokens"]), rel=0.1)
    capsys.readouterr()
    longest.run_longest(run, [ours], [0.01])
    assert "measured before" in capsys.readouterr().out
    assert measure.read_csv(path) == [row]


def test_worker_failure_is_one_line():
    with pytest.raises(OutOfTime):
        Worker(Job(OURS, "qwen3-tiny", "cpu", SMALL), Deadline(0.0)).trial(8)
    worker = Worker(Job(OURS, "qwen3-tiny", "abacus", SMALL), Deadline())
    with pytest.raises(UserError, match=r"^RuntimeError: .*abacus"):
        worker.trial(8)
    assert worker.process is None


def test_trial_of_trl_holds_one_microbatch():
    if reason := trainers.missing_trl():
        pytest.skip(reason)
    job = Contender(TRL, TRL, options=longest.TRL_LEAN).job("qwen3-tiny", CPU, 0)
    trials = Trials(job)
    short, one, every = trials.trial(100), trials.trial(400), trials.trial(400, whole=True)
    assert short["fits"]
    assert one["peak_bytes"] == pytest.approx(every["peak_bytes"], rel=0.01)
    assert one["seconds"] < 0.7 * every["seconds"]
    assert one["peak_bytes"] - short["peak_bytes"] > 300 * 64 * 4 * 6
    trials.stop()


def test_summary_compares_the_longest_answers():
    rows = [
        {"cap_gib": "80", "contender": name, "status": status, "answer_tokens": str(tokens)}
        for name, status, tokens in (
            (OURS, "ok", 110_000), (f"{OURS} 4-bit", "ok", 120_000), (TRL, "ok", 30_000),
            (f"{TRL} Liger", "ok", 40_000), (f"{TRL} 4-bit", "stopped", 90_000),
        )
    ]  # fmt: skip
    assert longest.summary(rows) == [f"80 GiB: {OURS} 4-bit 120,000, TRL Liger 40,000 tokens: 3.00x"]
    assert longest.summary(rows[:2]) == []


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (longest, ["--caps", "much"], "'much' is not a list of GiB"),
        (longest, ["--caps", "0"], "must be above 0"),
        (longest, ["--contenders", "verl"], "'verl' is unknown; use one of grpo-fast, "),
        (plan, ["--settings", "9b"], "'9b' is unknown; use one of "),
    ],
)
def test_wrong_option_ends_in_one_line(module, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module.__name__, "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as end:
        measure.main(module.body)
    assert end.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
