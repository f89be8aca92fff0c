"""The parts of the benchmarks: problems, contenders, timing, result tables, trainers, figures and options."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import head, plots, race, step
from benchmarks.growth import with_one_buffer
from benchmarks.harness import measure, trainers
from benchmarks.harness.contenders import BY_NAME, FLOOR, OURS, Contender, choose, floor_call, forward_backward
from benchmarks.harness.measure import Deadline, Run, Times, fit_exponent, format_value, interleave, slug
from benchmarks.harness.problem import Shape, errors, grpo_loss, make_problem, norm_error, verdict
from benchmarks.own_loss import run_own_loss
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


def small_results(folder):
    """A results folder with one measured and one failed contender."""
    run = Run(CPU, output=folder, commit="abc")
    table = run.table("head", head.KEY)
    case = {"model": "m", "N": 64, "H": 8, "V": 99, "dtype": "float32", "head": "frozen", "status": "ok"}
    for who, seconds in ((FLOOR, 0.5), ("full logits", 2.0), (OURS, 1.0)):
        memory = {} if who == FLOOR else {"beyond_gradients_bytes": 3 << 20}
        table.add({**case, "contender": who, "seconds": seconds, "to_floor": 2 * seconds, **memory})
    table.add({**case, "contender": "TRL", "status": "wrong", "detail": "off"})
    return slug(measure.device_name(CPU))


def test_fill_tables_has_measured_rows_only(tmp_path):
    device = small_results(tmp_path)
    before = (
        f"a\n<!-- table: head {device} -->\nold\n<!-- /table -->\nb\n<!-- table: race cpu -->\nkept\n<!-- /table -->\n"
    )
    after = plots.fill_tables(before, tmp_path)
    assert after.startswith(f"a\n<!-- table: head {device} -->\n| head | bare GEMMs | grpo-fast | full logits |\n")
    assert "| m (8 x 99), N=64, float32, frozen | 0.50 s (1.00x) | **1.00 s (2.00x)** | 2.00 s (4.00x) |" in after
    assert "old" not in after
    assert "TRL" not in after
    assert "kept" in after
    assert plots.fill_tables(after, tmp_path) == after
    memory = plots.fill_tables("<!-- table: head-memory cpu -->\n<!-- /table -->", tmp_path)
    assert "| m (8 x 99), N=64, float32, frozen | 3 MiB | 3 MiB |" in memory


@pytest.fixture
def documents(tmp_path, monkeypatch):
    """A folder of documents with a place for every table, most of them in a page of docs/."""
    (tmp_path / "docs").mkdir()
    places = {name: f"<!-- table: {name} cpu -->\nold\n<!-- /table -->\n" for name in plots.TABLES}
    (tmp_path / "README.md").write_text("first\n" + places.pop("head"))
    (tmp_path / "docs" / "results.md").write_text("".join(places.values()))
    (tmp_path / "docs" / "other.md").write_text("no table\n")
    monkeypatch.setattr(plots, "ROOT", tmp_path)
    return tmp_path


def test_plots_fills_the_places_in_all_documents(documents, monkeypatch, capsys):
    small_results(documents / "results")
    monkeypatch.setattr(sys, "argv", ["plots", "--results", str(documents / "results")])
    plots.body()
    assert (documents / "README.md").read_text().startswith("first\n<!-- table: head cpu -->\n| head | bare GEMMs |")
    page = (documents / "docs" / "results.md").read_text()
    assert "<!-- table: head-memory cpu -->\n| head | grpo-fast | full logits |" in page
    assert "<!-- table: race cpu -->\nold\n<!-- /table -->" in page
    assert "no race.csv for cpu; its table race stays as it is" in capsys.readouterr().out
    assert plots.read_documents(documents).keys() == {documents / "README.md", documents / "docs" / "results.md"}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("<!-- table: race cpu -->\nold\n<!-- /table -->\n", "", "table 'race' has no place; put <!-- table: race cpu"),
        ("table: race cpu", "table: rice cpu", r"docs/results.md: table 'rice' is unknown \(did you mean 'race'\?\)"),
        ("table: race cpu", "table: race", "docs/results.md: a place is not <!-- table: NAME DEVICE --> to"),
        ("old\n<!-- /table -->\n<!-- table: loss", "<!-- table: loss", "docs/results.md: a place is not"),
    ],
)
def test_read_documents_wrong_place_ends_in_one_line(documents, before, after, message):
    page = documents / "docs" / "results.md"
    assert before in page.read_text()
    page.write_text(page.read_text().replace(before, after))
    with pytest.raises(UserError, match=message):
        plots.read_documents(documents)


def test_documents_have_a_place_for_every_table():
    """And every place a table; see `read_documents`."""
    names = [
        name for page in plots.read_documents(measure.ROOT).values() for name in re.findall(r"table: ([\w-]+)", page)
    ]
    assert set(names) == set(plots.TABLES)


def test_draw_makes_a_figure_per_csv(tmp_path):
    device = small_results(tmp_path)
    assert plots.draw(tmp_path / device) == [tmp_path / device / "head.png"]
    assert (tmp_path / device / "head.png").stat().st_size > 10_000


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
