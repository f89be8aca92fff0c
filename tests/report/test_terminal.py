"""Runs that lose their terminal or the reader of their output."""

import contextlib
import dataclasses
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from grpo_fast.cli import main
from grpo_fast.config import GRPOConfig
from grpo_fast.evaluation.run import EvalOptions, EvalRun
from grpo_fast.files import read_metrics
from grpo_fast.report.terminal import lasting_output
from grpo_fast.train.checkpoint import checkpoints
from grpo_fast.train.interrupt import Interrupt
from grpo_fast.trainer import GRPOTrainer
from support.runs import assert_same_run, config


def on_terminal(fields: dict, tty: str, ignored: bool) -> None:
    """A run whose controlling terminal is `tty`."""
    os.setsid()
    terminal = os.open(tty, os.O_RDWR)
    for number in range(3):
        os.dup2(terminal, number)
    if terminal > 2:
        os.close(terminal)
    if ignored:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    path = Path(f"{fields['output_dir']}.yaml")
    path.write_text(yaml.safe_dump(fields))
    sys.exit(main(["train", str(path)]))


def train_apart(fields: dict) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    GRPOTrainer(GRPOConfig(**fields)).train()


def forkserver():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["grpo_fast.trainer", "transformers.models.llama.modeling_llama", "jsonargparse"])
    return context


def finish(settings) -> int:
    """The exit status of an undisturbed run, in a process like that of `hang_up`."""
    process = forkserver().Process(target=train_apart, args=(dataclasses.asdict(settings),))
    process.start()
    process.join(120)
    return process.exitcode


def hang_up(settings, ignored: bool = False) -> int:
    """The exit status of a run whose terminal is closed after its second step."""
    context = forkserver()
    terminal, tty = os.openpty()
    fields = dataclasses.asdict(settings)
    process = context.Process(target=on_terminal, args=(fields, os.ttyname(tty), ignored))
    process.start()
    metrics = Path(settings.output_dir) / "metrics.jsonl"
    try:
        while not metrics.exists() or metrics.read_text().count("\n") < 2:
            assert process.is_alive()
            time.sleep(0.01)
        os.close(tty)
        os.close(terminal)
        with contextlib.suppress(ProcessLookupError):
            # As a shell does.
            os.kill(process.pid, signal.SIGHUP)
        process.join(60)
        return process.exitcode
    finally:
        process.kill()
        process.join()


def test_train_closed_terminal_ends_with_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    settings = config(tmp_path / "run", max_steps=4000, save_steps=0, lr_scheduler_type="constant")
    assert hang_up(settings) == 128 + signal.SIGHUP
    steps = len(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"checkpoint-{steps}"]
    fields = {"max_steps": steps + 1, "lr_scheduler_type": "constant"}
    assert finish(config(tmp_path / "whole", **fields)) == 0
    assert finish(config(tmp_path / "run", resume_from_checkpoint=True, **fields)) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_train_ignoring_the_hangup_continues_without_terminal(tmp_path, monkeypatch):
    """As under nohup."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert hang_up(config(tmp_path / "run", max_steps=30, save_steps=0), ignored=True) == 0
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-30"]


@pytest.mark.slow
def test_train_command_survives_lost_output(tmp_path):
    """Runs in a shell whose reader ends after one line, or whose streams are closed from the start."""
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(dataclasses.asdict(config(tmp_path, max_steps=3))))
    ways = {"pipe": "2>errors | head -n 1", "closed": ">&- 2>&-"}
    train = f"{sys.executable} -m grpo_fast train {path} --output_dir {tmp_path}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    shells = {}
    for way, redirected in ways.items():
        (tmp_path / way).mkdir()
        command = ["bash", "-o", "pipefail", "-c", f"{train}/{way}/run {redirected}"]
        options = {"cwd": tmp_path / way, "env": environment, "stdout": subprocess.PIPE, "text": True}
        shells[way] = subprocess.Popen(command, **options)
    printed = {way: shell.communicate(timeout=250)[0] for way, shell in shells.items()}
    assert {way: shell.returncode for way, shell in shells.items()} == dict.fromkeys(ways, 0)
    assert printed["pipe"].startswith("random-llama (15.3k parameters) on sort_digits")
    assert printed["pipe"].count("\n") == 1
    errors = (tmp_path / "pipe" / "errors").read_text()
    assert errors == "grpo-fast: stdout takes no more output (Broken pipe); continuing without it\n"
    for way in ways:
        assert (tmp_path / way / "run" / "summary.json").is_file()
        assert_same_run(tmp_path / way / "run", tmp_path / "closed" / "run")


@pytest.mark.parametrize("way", ["pipe", "full"])
@pytest.mark.parametrize("act", ["train", "eval"])
def test_trainer_and_eval_survive_lost_output(tmp_path, monkeypatch, capfd, act, way):
    """In a program that calls the trainer."""
    if way == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    settings = config(tmp_path / "run", max_steps=2)
    made = EvalRun(settings, EvalOptions(output=tmp_path / "eval")) if act == "eval" else GRPOTrainer(settings)
    capfd.readouterr()
    with os.fdopen(writer, "w") as stream, monkeypatch.context() as context:
        context.setattr(sys, "stdout", stream)
        made.run() if act == "eval" else made.train()
    reason = {"pipe": "Broken pipe", "full": "No space left on device"}[way]
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("grpo-fast:")]
    assert told == [f"grpo-fast: stdout takes no more output ({reason}); continuing without it"]
    assert (tmp_path / ("eval" if act == "eval" else "run") / "summary.json").is_file()


class Full(io.StringIO):
    def flush(self):
        raise OSError(28, "No space left on device")


def test_other_command_reports_lost_output(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Full())
    assert main(["--version"]) == 2
    assert capsys.readouterr().err == "grpo-fast: error: the output could not be written: No space left on device\n"


def test_other_command_broken_pipe_ends_quietly(capfd, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream, monkeypatch.context() as context:
        context.setattr(sys, "stdout", stream)
        assert main(["--help"]) == 141
        # Its buffer has been dropped.
        stream.flush()
    assert capfd.readouterr() == ("", "")


def test_lasting_output_restores_the_streams(monkeypatch, capsys):
    before = sys.stdout, sys.stderr
    with lasting_output():
        print("a")
        assert sys.stdout.isatty() is False
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "a\n"
    with contextlib.redirect_stdout(None), lasting_output():
        assert sys.stdout is None


def test_lasting_output_text_that_the_terminal_cannot_encode(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with lasting_output():
        print("runs/ü ━")
    assert stream.buffer.getvalue() == b"runs/\\xfc \\u2501\n"


def test_interrupt_signal_within_the_handler_of_another(monkeypatch):
    restored = []

    def restore(number, handler):
        restored.append(number)
        if len(restored) == 1:
            os.kill(os.getpid(), signal.SIGHUP)

    with Interrupt() as interrupt, monkeypatch.context() as context:
        context.setattr(signal, "signal", restore)
        os.kill(os.getpid(), signal.SIGHUP)
    assert interrupt.signal == signal.SIGHUP
    assert sorted(restored) == [signal.SIGINT, signal.SIGTERM]
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        signal.signal(number, handler)


def test_interrupt_note_that_cannot_be_written(monkeypatch):
    def gone(number, text):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "write", gone)
    with Interrupt() as interrupt:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
        assert interrupt.signal == signal.SIGHUP
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    with pytest.raises(SystemExit, match="129"):
        interrupt.exit()
