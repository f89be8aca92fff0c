"""The parts of the benchmarks: timing, result tables, trainers and options."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import head, plots, race, step
from benchmarks.harness import measure, trainers
from benchmarks.harness.contenders import OURS, choose
from benchmarks.harness.measure import Deadline, Run, Times, fit_exponent, format_value, interleave, slug
from benchmarks.own_loss import run_own_loss

CPU = torch.device("cpu")


def test_times_quantiles_are_interpolated():
    times = Times([5.0, 1.0, 2.0, 3.0, 4.0])
    assert times.columns() == {
        "seconds": 3.0, "seconds_p20": pytest.approx(1.8), "seconds_p80": pytest.approx(4.2), "repeats": 5
    }  # fmt: skip
    assert math.isnan(Times().median)


def test_interleave_calls_take_turns():
    calls: list[str] = []
    measured = interleave({name: lambda name=name: calls.append(name) for name in "abc"}, CPU, repeats=3)
    assert calls == list("abcbcacab")
    assert {name: len(entry.times.seconds) for name, entry in measured.items()} == {"a": 3, "b": 3, "c": 3}


def test_interleave_deadline_and_failed_call():
    def broken():
        raise ValueError("not\ntoday")

    measured = interleave(
        {"slow": lambda: time.sleep(0.02), "broken": broken}, CPU, repeats=50, least=2, deadline=Deadline(0.0)
    )
    assert len(measured["slow"].times.seconds) == 2
    assert measured["slow"].times.median >= 0.02
    assert measured["broken"].failure == "ValueError: not today"


PEAK = """
import torch
from benchmarks.harness.measure import peak_memory
with peak_memory(torch.device("cpu")) as peak:
    torch.ones(12 << 20)
    torch.ones(24 << 20)
print(int(peak.bytes))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_counts_freed_memory():
    """In a fresh process, where no freed memory of other tests can be reused."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, env=environment, check=True)
    assert 95 << 20 <= int(done.stdout) < 112 << 20


def test_table_row_replaces_the_one_of_the_same_key(tmp_path):
    run = Run(CPU, output=tmp_path, commit="abc")
    table = run.table("t", ("case", "who"))
    table.add({"case": 1, "who": "a", "seconds": 0.123456})
    table.add({"case": 1, "who": "b", "seconds": 2.0})
    again = run.table("t", ("case", "who"))
    again.add({"case": 1, "who": "a", "seconds": 0.5, "more": math.nan})
    rows = measure.read_csv(table.path)
    assert [(row["who"], row["seconds"], row["more"]) for row in rows] == [("b", "2", ""), ("a", "0.5", "")]
    assert {row["commit"] for row in rows} == {"abc"}
    assert {"device", "torch", "triton", "date"} <= rows[0].keys()
    assert table.path.parent == tmp_path / slug(measure.device_name(CPU))


def test_format_value_is_short():
    assert [format_value(v) for v in (0.123456, 1e9, 3, None, math.nan, "x")] == [
        "0.1235",
        "1000000000",
        "3",
        "",
        "",
        "x",
    ]


def test_device_slug_names_only_the_hardware(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nmodel name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz\n")
    monkeypatch.setattr(measure, "Path", lambda _: info)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert slug(measure.device_name(CPU)) == "cpu-2-cores-intel-xeon-platinum-8481c"


def test_fit_exponent_of_power_laws():
    assert fit_exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert fit_exponent([1, 2, 4], [3, 3, 3]) == pytest.approx(0)
    assert math.isnan(fit_exponent([1, 2], [1, 0]))


def test_mixed_lengths_have_the_mean_and_the_spread():
    lengths = step.mixed_lengths(64, 24)
    assert max(lengths) == 8 * 24
    assert sum(lengths) / len(lengths) == pytest.approx(24, rel=0.05)
    assert len(set(lengths)) > 20
    assert min(lengths) >= 1


@pytest.mark.parametrize(("equal", "groups"), [(0.0, 0), (0.5, 4), (0.75, 6)])
def test_make_rollouts_has_groups_of_equal_reward(equal, groups):
    setting = step.Setting("x", "float32", 8, 4, 8, 6)
    rewards = [step.parity_reward([], [], group) for group in step.make_rollouts(setting, 101, equal)]
    assert [len(set(group)) == 1 for group in rewards] == [True] * groups + [False] * (8 - groups)


def test_make_prompts_are_distinct():
    prompts = step.make_prompts(step.Setting("llama-tiny", "float32", 8, 4, 8, 6))
    assert len(set(prompts)) == 8
    assert {len(prompt.split()) for prompt in prompts} == {8}


def test_gradient_difference_in_the_norm():
    ours = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0])}
    theirs = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([0.0])}
    assert step.gradient_difference(ours, theirs) == pytest.approx(0.5 / math.hypot(3, 4.5))
    assert step.gradient_difference(ours, {"a": theirs["a"]}) == math.inf


def test_step_without_trl_measures_ours(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step, "missing_trl", lambda: "trl is not installed; install it with: pip install trl")
    run = Run(CPU, quick=True, repeats=1, output=tmp_path)
    step.run_step(run, [0.5])
    rows = {row["trainer"]: row for row in measure.read_csv(run.folder / "step.csv")}
    assert rows["TRL"]["detail"].endswith("pip install trl")
    assert rows["TRL"].get("seconds", "") == ""
    tokens, seconds = float(rows[OURS]["tokens"]), float(rows[OURS]["seconds"])
    assert float(rows[OURS]["tokens_per_second"]) == pytest.approx(tokens / seconds, rel=1e-2)
    assert tokens == pytest.approx(16 * (8 + 4), rel=0.2)
    assert "pip install trl" in capsys.readouterr().out


def test_step_with_trl_has_the_same_gradient(tmp_path):
    if reason := trainers.missing_trl():
        pytest.skip(reason)
    run = Run(CPU, quick=True, repeats=1, output=tmp_path)
    step.run_step(run, [0.5])
    rows = {row["trainer"]: row for row in measure.read_csv(run.folder / "step.csv")}
    assert rows[OURS]["status"] == rows["TRL"]["status"] == "ok"
    assert 0 < float(rows[OURS]["gradient_difference"]) < 1e-5
    # TRL pads all rows to the longest, and drops no group.
    assert float(rows["TRL"]["padded_tokens"]) == 16 * (8 + 32)


def test_race_prompts_depend_on_the_seed():
    rows = race.training_rows(1, 20)
    assert len(rows) == 20 * race.PROMPTS
    assert rows == race.training_rows(1, 20)
    assert rows != race.training_rows(2, 20)
    assert all("What is" in row["prompt"][0]["content"] for row in rows)


def test_reached_needs_three_consecutive_steps():
    assert not race.reached([1.0, 1.0], 0.75)
    assert not race.reached([0.9, 0.7, 0.6], 0.75)
    assert race.reached([0.1, 0.7, 0.8, 0.75], 0.75)


def test_parse_cases_and_contenders():
    case, other = head.parse_cases("qwen3-8b:16384:bfloat16, 576x4096:33:float32")
    assert (case.shape.hidden, case.shape.vocab, case.tokens, case.dtype) == (4096, 151936, 16384, torch.bfloat16)
    assert (other.shape.hidden, other.shape.vocab, other.tokens) == (576, 4096, 33)
    assert [contender.name for contender in choose("TRL, full logits")] == ["TRL", "full logits"]


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (head, ["--shapes", "qwen3-8b:many:float32"], "is not MODEL:TOKENS:DTYPE"),
        (head, ["--shapes", "gpt5:16:float32"], "models are smollm2-135m"),
        (head, ["--heads", "tied"], "'tied' is unknown"),
        (head, ["--contenders", "verl"], "'verl' is unknown"),
        (head, ["--device", "tpu9000"], "is not a device"),
        (head, ["--repeats", "0"], "must be above 0"),
        (step, ["--equal", "half"], "is not a list of fractions"),
        (step, ["--equal", "1.0"], "below 1"),
        (step, ["--quick", "--model", "gpt5"], "--model='gpt5' is unknown"),
        (race, ["--seeds", "one"], "'one' is not a seed"),
        (plots, ["--results", "/no/such/folder"], "there is no folder"),
    ],
)
def test_wrong_option_ends_in_one_line(module, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    with pytest.raises(SystemExit) as end:
        measure.main(module.body)
    assert end.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_quick_run_results_are_kept_apart():
    assert "runs" in Run(CPU, quick=True).folder.parts
    assert Run(CPU).folder.parent == measure.ROOT / "benchmarks" / "results"
    assert json.dumps(Run(CPU).facts())


def test_race_cut_short_keeps_the_earlier_result(tmp_path, monkeypatch):
    run = Run(CPU, output=tmp_path, commit="abc")
    monkeypatch.setattr(race, "our_race", lambda config, run: ((2.0, reward) for reward in (0.1, 0.7, 0.8, 0.9, 1.0)))
    race.run_one(run, OURS, 1, 10, 0.75)
    rows, curve = (measure.read_csv(run.folder / f"{name}.csv") for name in ("race", "race_curves"))
    assert [(row["status"], row["steps"], row["seconds"]) for row in rows] == [("ok", "4", "8")]
    assert [(row["step"], row["seconds"], row["reward"]) for row in curve] == [
        ("1", "2", "0.1"), ("2", "4", "0.7"), ("3", "6", "0.8"), ("4", "8", "0.9")
    ]  # fmt: skip
    # The same seed again, with time for one step only.
    late = Run(CPU, output=tmp_path, deadline=Deadline(0.0))
    race.run_one(late, OURS, 1, 10, 0.75)
    assert measure.read_csv(run.folder / "race.csv") == rows
    assert measure.read_csv(run.folder / "race_curves.csv") == curve
    table = plots.fill_tables("<!-- table: race cpu -->\n<!-- /table -->", tmp_path)
    assert "| trainer | steps to 75% |" in table
    assert "| grpo-fast, seed 1 | 4 | 8 s | 2.0 s |" in table
    assert [path.name for path in plots.draw(run.folder)] == ["race.png"]


def test_own_loss_measures_two_forms_of_one_result(tmp_path):
    run_own_loss(Run(CPU, quick=True, repeats=1, output=tmp_path))
    rows = measure.read_csv(next(tmp_path.glob("*/own_loss.csv")))
    assert len(rows) == 2 * 2 * 2
    assert {row["loss"] for row in rows} == {"built in", "own function"}
    assert all(row["status"] == "ok" and float(row["seconds"]) > 0 for row in rows)
