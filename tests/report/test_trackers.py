"""Experiment trackers, and the progress line."""

import os

import pytest
import torch
from accelerate import Accelerator
from rich.text import Text
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.files import read_metrics
from grpo_fast.report.console import Terminal
from grpo_fast.report.progress import Progress, step_figures
from grpo_fast.report.trackers import Trackers, hyperparameters, tracker_arguments
from grpo_fast.train.metrics import peak_memory
from grpo_fast.trainer import GRPOTrainer
from support.runs import MACHINE_METRICS
from support.small import SMALL


def config(folder, **fields):
    return GRPOConfig(**{**SMALL, "output_dir": str(folder), **fields})


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """Every series below `folder`: name -> (step, value)."""
    found = {}
    for root, _, files in os.walk(folder):
        if any("tfevents" in file for file in files):
            events = EventAccumulator(root)
            events.Reload()
            for tag in events.Tags()["scalars"]:
                found[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found


def test_tensorboard_has_all_metrics(tmp_path):
    GRPOTrainer(config(tmp_path, report_to=["tensorboard"], logging_steps=2)).train()
    series = scalars(tmp_path / "tensorboard")
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [2, 3]
    for name in ("reward", "rewards/exact_answer/mean", "loss", "memory/peak_rss_gib"):
        assert series[name] == [(m["step"], pytest.approx(m[name])) for m in metrics]
    assert "step" not in series
    assert [step for step, _ in series["eval/rewards/exact_answer/mean"]] == [0, 3]
    (written,) = (tmp_path / "tensorboard").rglob("hparams.yml")
    assert "learning_rate: 0.001" in written.read_text()


def test_train_without_trackers_writes_no_events(tmp_path):
    GRPOTrainer(config(tmp_path)).train()
    assert not (tmp_path / "tensorboard").exists()
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_tracker_missing_package_is_reported_before_loading(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trackio", None)
    monkeypatch.setattr("grpo_fast.trainer.load_model", lambda config: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=r"'?trackio'? is not installed; install it with: .*grpo-fast\[trackers\]"):
        GRPOTrainer(config(tmp_path, report_to=["trackio"]))
    assert not list(tmp_path.iterdir())


def started(folder, warnings, **fields) -> Trackers:
    made = config(folder, report_to=["tensorboard"], **fields)
    accelerator = Accelerator(cpu=True, **tracker_arguments(made, folder))
    return Trackers(accelerator, made, folder, warnings.append)


def test_tracker_that_fails_gets_no_more_metrics(tmp_path, monkeypatch):
    warnings, calls = [], []

    def fail(self, values, step=None, **kwargs):
        calls.append(step)
        raise ConnectionError("no route\nto host")

    with started(tmp_path, warnings) as trackers:
        trackers.log({"reward": 1.0}, step=1)
        monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.log", fail)
        trackers.log({"reward": 2.0}, step=2)
        trackers.log({"reward": 3.0}, step=3)
    assert calls == [2]
    assert warnings == ["tensorboard failed and gets no more metrics: no route to host"]


def test_tracker_that_cannot_start_is_an_error(tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("no key")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.start", fail)
    with pytest.raises(UserError, match=r"report_to=\['tensorboard'\] could not be started: no key"):
        started(tmp_path, [])


def test_hyperparameters_are_flat(tmp_path):
    values = hyperparameters(config(tmp_path))
    assert values["reward_funcs"] == '["digits_included", "digits_ordered", "exact_answer"]'
    assert (values["learning_rate"], values["epsilon"]) == (1e-3, "null")
    assert {type(value) for value in values.values()} <= {bool, int, float, str}


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_hosted_tracker_offline(tmp_path, package, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip(package)
    GRPOTrainer(config(tmp_path / "run", report_to=[package])).train()
    assert "gets no more metrics" not in capsys.readouterr().out
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb") if package == "wandb" else
                (tmp_path / "trackio").glob("grpo-fast*"))  # fmt: skip


FIGURES = {
    "step": 12, "reward": -12.345, "rewards/format_and_right_answer/mean": 0.98765, "completions/mean_length": 12345.6,
    "tokens_per_second": 123456.7, "memory/peak_allocated_gib": 123.456,
}  # fmt: skip


def test_step_figures_fit_a_line():
    line = step_figures(FIGURES, "format_and_right_answer")
    assert line == "reward -12.345  format_and_righ… 98.8%  length 12346  123,457 tokens/s  123.5 GiB"
    assert len(line) <= 82
    assert "GiB" not in step_figures({k: v for k, v in FIGURES.items() if "memory" not in k}, "format_and_right_answer")


def progress(tmp_path, width, terminal, monkeypatch, total=120):
    console = Terminal(width=width, force_terminal=terminal, record=True, quiet=False)
    monkeypatch.setattr("grpo_fast.report.progress.Terminal", lambda **_: console)
    made = config(tmp_path, max_steps=total, reward_funcs=["exact_answer"])
    return Progress(made, tmp_path, "exact_answer", 1000), console


@pytest.mark.parametrize("width", [100, 60])
def test_progress_line_fits_the_terminal(tmp_path, width, monkeypatch):
    live, console = progress(tmp_path, width, True, monkeypatch)
    live.started(0.5)
    live.update({**FIGURES, "reward": 2.5, "rewards/exact_answer/mean": 0.5, "completions/mean_length": 640.0,
                 "memory/peak_allocated_gib": 12.3})  # fmt: skip
    with console.capture() as captured:
        console.print(live.bar.get_renderable())
    lines = Text.from_ansi(captured.get()).plain.splitlines()
    assert len(lines) == 1
    assert len(lines[0]) <= width
    shown = ["12/120", "left 0:0", "reward 2.500"]
    wanted = [*shown, "exact_answer 50.0%", "length 640", "123,457 tokens/s", "12.3 GiB"]
    for figure in wanted if width == 100 else shown:
        assert figure in lines[0]


def test_progress_time_left_of_a_resumed_run(tmp_path, monkeypatch):
    """Ten steps are left at a second each; the steps before the interruption do not count."""
    clock = iter([0.0, 1.0, 2.0])
    monkeypatch.setattr("grpo_fast.report.progress.time.perf_counter", lambda: next(clock))
    live, _ = progress(tmp_path, 100, False, monkeypatch, total=112)
    live.started(0.5)
    for step in (101, 102):
        live.update({**FIGURES, "step": step, "rewards/exact_answer/mean": 0.5})
    assert live.bar.tasks[0].fields["figures"].startswith("left 0:10  reward")


def test_peak_memory_grows_with_the_process():
    before = peak_memory(torch.device("cpu"))["memory/peak_rss_gib"]
    block = torch.ones(int((before + 0.25) * 2**30) // 4)
    after = peak_memory(torch.device("cpu"))["memory/peak_rss_gib"]
    assert after >= before + 0.24
    assert block.sum() > 0
    assert set(peak_memory(torch.device("cpu"))) <= MACHINE_METRICS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
def test_peak_memory_on_a_gpu_is_that_of_the_step():
    device = torch.device("cuda")
    peak_memory(device)
    held = torch.cuda.memory_allocated()
    torch.empty(2**30, dtype=torch.uint8, device=device)
    first, second = (peak_memory(device)["memory/peak_allocated_gib"] for _ in range(2))
    assert first == pytest.approx(held / 2**30 + 1, abs=0.01)
    assert second == pytest.approx(held / 2**30, abs=0.01)
