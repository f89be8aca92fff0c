"""`python -m benchmarks.gpu_proof`: limits, crashes, continuing, wheels, and a rehearsal on the CPU."""

import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_proof import __main__ as command
from benchmarks.gpu_proof import stages
from benchmarks.gpu_proof.process import run_command
from benchmarks.gpu_proof.stages import STAGES, Finding, Proof, Stage
from benchmarks.gpu_proof.wheels import install_wheels
from grpo_fast.errors import UserError

ROOT = Path(__file__).parents[2]
FACTS = {"device": "CPU of the tests", "torch": "2", "commit": "abc"}
ENVIRONMENT = {**os.environ, "PYTHONFAULTHANDLER": "1"}
HANG = "import time; print('before', flush=True); time.sleep(60)"


def python_stage(name, source, **options):
    """A stage that runs a line of Python."""
    last = lambda proof, log: Finding(stages.last_line(log))  # noqa: E731
    return Stage(name, 1, 1, lambda proof, _: [sys.executable, "-c", source], last, **options)


@pytest.fixture
def proof(tmp_path):
    return Proof("cpu", True, tmp_path, tmp_path / "device", FACTS, ("grpo-fast", "TRL", "Liger"))


def run(proof, stage, limit=30.0):
    return command.run_stage(proof, stage, ENVIRONMENT, proof.output / f"{stage.name}.log", limit)


def alive(pid):
    """Whether a process still runs; one that has ended but was not collected by its parent does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_command_at_its_limit_is_killed_with_what_it_started(tmp_path):
    source = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {HANG!r}]); print(p.pid); p.wait()"
    ended = run_command([sys.executable, "-uc", source], ENVIRONMENT, tmp_path / "log", 3.0)
    assert ended.code is None
    log = (tmp_path / "log").read_text()
    child = next(int(line) for line in log.splitlines() if line.isdigit())
    wait_until(lambda: not alive(child))
    # Where it was.
    assert "most recent call first" in log
    assert "wait" in log


def test_command_that_ends_leaves_no_process(tmp_path):
    source = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {HANG!r}]).pid)"
    assert run_command([sys.executable, "-c", source], ENVIRONMENT, tmp_path / "log", 30.0).code == 0
    child = next(int(line) for line in (tmp_path / "log").read_text().splitlines() if line.isdigit())
    wait_until(lambda: not alive(child))


def test_stage_over_its_limit_is_reported(proof):
    stage = replace(python_stage("slow", HANG), finding=lambda proof, log: Finding("3U 1.3x"), quick_minutes=1 / 60)
    outcome = run(proof, stage, limit=1.0)
    assert (outcome.status, outcome.bad) == ("FAIL", False)
    assert outcome.headline == "stopped at its limit of 0.0 minutes, see the end of its log; so far 3U 1.3x"
    assert 1.0 <= outcome.seconds < 30


def test_stage_without_its_whole_time_has_not_failed(proof):
    outcome = run(proof, python_stage("slow", HANG, correctness=True), limit=3.0)
    assert (outcome.status, outcome.bad) == ("stopped", False)
    assert outcome.headline == "the 0.1 minutes left were too few; so far before"


@pytest.mark.parametrize("correctness", [True, False])
def test_stage_that_crashes_is_reported(proof, correctness):
    outcome = run(proof, python_stage("crash", "import os; os.kill(os.getpid(), 11)", correctness=correctness))
    assert (outcome.status, outcome.bad) == ("FAIL", correctness)
    assert outcome.headline.startswith("killed by signal 11 (SIGSEGV)")


@pytest.mark.parametrize(
    ("source", "optional", "status", "headline"),
    [
        ("raise SystemExit('error: vllm is not installed; pip install vllm')", True, "skipped", "vllm is not install"),
        ("raise SystemExit('error: vllm is not installed; pip install vllm')", False, "FAIL", "vllm is not installed"),
        ("import no_such_module", True, "skipped", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("print('error: a b\\nand more'); raise SystemExit(2)", True, "FAIL", "a b"),
        ("1 / 0", True, "FAIL", "ZeroDivisionError: division by zero"),
        ("print('all right')", True, "pass", "all right"),
        ("print('grpo-fast is wrong for x')", True, "FAIL", "grpo-fast is wrong for x"),
    ],
)
def test_stage_ends(proof, source, optional, status, headline):
    outcome = run(proof, python_stage("stage", source, optional=optional))
    assert outcome.status == status
    assert outcome.headline.startswith(headline)
    assert outcome.bad == ("is wrong" in source)


def test_stage_is_repeated_without_a_peer_that_broke_cuda(proof):
    source = "import sys; print(sys.argv[1:] or 'TRL broke CUDA, leave it out with --contenders: an error')"
    outcome = run(proof, python_stage("head", source), limit=300)
    assert (outcome.status, outcome.headline) == ("pass", "['--contenders', 'grpo-fast,Liger']; TRL broke CUDA")
    ours = run(proof, python_stage("head", source.replace("TRL", "grpo-fast")), limit=300)
    assert (ours.status, ours.bad) == ("FAIL", True)


@pytest.fixture
def without_a_machine(monkeypatch, proof):
    found = {"facts": FACTS, "folder": str(proof.folder), "contenders": list(proof.contenders)}
    monkeypatch.setattr(command, "describe_machine", lambda *_: found)
    return ["--device", "cpu", "--quick", "--output", str(proof.output)]


def test_failed_stages_stop_no_other_and_finished_ones_are_skipped(without_a_machine, proof, capsys):
    """The hanging stage has a limit of 0.6 s in the first call."""
    counted = proof.output / "count"
    count = f"open({str(counted)!r}, 'a').write('x'); print('counted')"
    table = [
        replace(python_stage("hang", HANG), quick_minutes=0.01),
        python_stage("crash", "import os; os.abort()"),
        python_stage("wrong", "raise SystemExit('error: 3 is not 4')", correctness=True),
        Stage("absent", 1, 1, lambda *_: ["/no/such/program"], lambda *_: Finding("")),
        replace(python_stage("other", "pass"), finding=lambda *_: {}["seconds"]),
        python_stage("counts", count),
        python_stage("draws", count, repeated=True),
    ]
    assert command.prove(without_a_machine, table) == 1
    assert counted.read_text() == "xx"
    rows = {row["stage"]: row for row in stages.read_rows(proof.folder / "gpu_proof.csv")}
    assert [row["status"] for row in rows.values()] == ["FAIL"] * 5 + ["pass"] * 2
    assert rows["absent"]["headline"].startswith("FileNotFoundError: ")
    assert rows["other"]["headline"] == "KeyError: 'seconds'"
    assert rows["wrong"]["headline"] == "3 is not 4"
    assert {row["device"] for row in rows.values()} == {FACTS["device"]}
    # The command that could not start has left no signal blocked.
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])

    mended = [python_stage(stage.name, "print('mended')") for stage in table[:5]]
    capsys.readouterr()
    assert command.prove(without_a_machine, [*mended, *table[5:]]) == 0
    assert counted.read_text() == "xxx"
    printed = capsys.readouterr().out
    assert "counts: finished before, at commit abc" in printed
    assert "  wrong        pass" in printed

    assert command.prove([*without_a_machine, "--again", "counts", "--stages", "counts"], table) == 0
    assert counted.read_text() == "xxxx"


def test_summary_names_the_commit_of_earlier_results(without_a_machine, proof, monkeypatch, capsys):
    table = [python_stage("first", "print('result')"), python_stage("second", "print('other')")]
    assert command.prove([*without_a_machine, "--stages", "first"], table) == 0
    later = {"facts": {**FACTS, "commit": "def"}, "folder": str(proof.folder), "contenders": []}
    monkeypatch.setattr(command, "describe_machine", lambda *_: later)
    capsys.readouterr()
    assert command.prove(without_a_machine, table) == 0
    printed = capsys.readouterr().out
    assert "result (commit abc)\n" in printed
    assert "other\n" in printed
    assert [row["commit"] for row in stages.read_rows(proof.folder / "gpu_proof.csv")] == ["abc", "def"]


def test_minutes_end_the_call_before_the_next_stage(without_a_machine, capsys):
    table = [python_stage("first", "print(1)")]
    assert command.prove([*without_a_machine, "--minutes", "0.1"], table) == 0
    assert "first: too little time is left; call again to continue" in capsys.readouterr().out


def test_summary_fits_on_one_screen(proof):
    facts = {"device": "NVIDIA H200", "commit": "abc"}
    outcomes = {
        stage.name: command.Outcome(stage.name, "pass", "x" * 500, "3U 1.32x 2U 1.46x", 61.0) for stage in STAGES
    }
    lines = command.summary(replace(proof, facts=facts), outcomes, Path("logs")).splitlines()
    assert len(lines) <= 2 * len(STAGES) + 4 <= 30
    assert max(map(len, lines)) <= 180
    assert lines[2].startswith("  doctor       pass      1:01  xxx")


def call(*arguments):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu_proof", *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**environment, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def test_no_cuda_device_ends_in_one_line_before_anything_starts(tmp_path):
    process = call("--output", str(tmp_path))
    printed, errors = process.communicate()
    assert process.returncode == 2
    assert printed == ""
    assert errors.count("\n") == 1
    assert "sees no CUDA device; --device cpu --quick rehearses without one" in errors
    assert list(tmp_path.iterdir()) == []


def test_signal_ends_the_stage_and_the_command(tmp_path):
    process = call("--device", "cpu", "--quick", "--stages", "equivalence", "--output", str(tmp_path))
    assert process.stdout.readline().startswith("equivalence: up to")
    wait_until(lambda: children(process.pid))
    stage = children(process.pid)[0]
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (130, "stopped; the same command continues\n")
    wait_until(lambda: not alive(stage))


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--device cpu is a rehearsal at tiny sizes; add --quick"),
        (["--stages", "docter"], r"--stages: 'docter' is unknown \(did you mean 'doctor'\?\); use one of doctor, eq"),
        (["--again", "everything"], "--again: 'everything' is unknown"),
        (["--minutes", "0"], "--minutes=0.0 is not allowed: it must be above 0"),
        (["--limits", "-1"], "--limits=-1.0 is not allowed"),
        (["--vllm-python", "/no/python"], "--vllm-python: there is no program /no/python"),
        (["--wheels", "/no/such/folder"], "there is no .whl file in /no/such/folder"),
    ],
)
def test_wrong_option_ends_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        command.prove(arguments)


def make_wheel(folder, name="carried", source="ANSWER = 42\n"):
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", source)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def test_wheels_are_installed_once_for_the_stages_alone(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    make_wheel(wheels)
    site = install_wheels(wheels, tmp_path)
    environment = command.child_environment("cpu", site)
    ended = run_command(
        [sys.executable, "-c", "import carried; print(carried.ANSWER)"], environment, tmp_path / "log", 30.0
    )
    assert (ended.code, (tmp_path / "log").read_text()) == (0, "42\n")
    before = (site / "carried.py").stat().st_mtime_ns
    assert install_wheels(wheels, tmp_path) == site
    assert (site / "carried.py").stat().st_mtime_ns == before
    make_wheel(wheels, "another")
    assert install_wheels(wheels, tmp_path) != site


def test_wheel_for_another_platform_ends_in_one_line(tmp_path):
    make_wheel(tmp_path).rename(tmp_path / "carried-1.0-cp27-cp27m-win32.whl")
    with pytest.raises(UserError, match=r"--wheels: pip refuses .*: carried-1.0-cp27-cp27m-win32.whl is not a support"):
        install_wheels(tmp_path, tmp_path)


@pytest.mark.slow
@pytest.mark.long
def test_rehearsal_on_the_cpu(tmp_path):
    """Real stages at tiny sizes, each in its process: correct results, our step, a stage that cannot run, figures."""
    names = "doctor,equivalence,memcheck,step,figures"
    process = call("--device", "cpu", "--quick", "--stages", names, "--output", str(tmp_path))
    printed, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    (results,) = tmp_path.glob("*/gpu_proof.csv")
    rows = {row["stage"]: row for row in stages.read_rows(results)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "doctor": "pass", "equivalence": "pass", "memcheck": "skipped", "step": "pass", "figures": "pass"
    }  # fmt: skip
    assert "17 right (torch)" in rows["equivalence"]["headline"]
    assert rows["step"]["headline"].startswith("equal 0: ")
    assert all(row["torch"] == torch.__version__ and row["date"] for row in rows.values())
    assert {path.name for path in results.parent.iterdir()} >= {"equivalence.csv", "step.csv", "step.png", "logs"}
    assert printed.splitlines()[-1].strip().startswith("4 pass, 1 skipped;")
