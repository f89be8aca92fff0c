"""A resumed run is bit-identical to one that was never stopped."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from grpo_fast.cli import main
from grpo_fast.errors import UserError
from grpo_fast.files import LinesFile, cut_metrics, read_metrics
from grpo_fast.report.run import read_run
from grpo_fast.train.checkpoint import checkpoints
from support.killed import NOISE, killed_at, seed_generators
from support.runs import assert_same_run, figures, saved_weights, trainer
from support.small import SMALL, weights


@pytest.mark.parametrize(
    "fields",
    [
        {"weight_decay": 0.1, "warmup_steps": 2, "lr_scheduler_type": "cosine", "noise": True},
        {"num_iterations": 2, "save_steps": 2, "max_steps": 6},
        {"beta": 0.1},
        {"use_peft": True, "lora_r": 4, "lora_dropout": 0.2, "beta": 0.1, "learning_rate": 1e-2},
        {"bf16": True, "logging_steps": 2, "shuffle_dataset": False},
        {"optim": "adamw_torch_8bit"},
        {"dtype": "bfloat16", "learning_rate": 1e-2},
    ],
    ids=lambda fields: ",".join(fields),
)
def test_resumed_runs_are_bit_identical(tmp_path, fields):
    fields = dict(fields)
    if fields.pop("noise", False):
        (tmp_path / "noise.py").write_text(NOISE)
        fields["reward_funcs"] = [f"{tmp_path / 'noise.py'}:noise", "exact_answer"]
    seed_generators(0)
    trainer(tmp_path / "whole", **fields).train()
    folder = tmp_path / "run"
    seed_generators(0)
    killed_at(2, trainer(folder, **fields))
    second = trainer(folder, resume=True, **fields)
    assert second.step == 2
    killed_at(2, second)
    third = trainer(folder, resume=True, **fields)
    assert third.step == 4
    # Only the checkpoint decides how the run continues.
    seed_generators(1)
    third.train()
    assert_same_run(folder, tmp_path / "whole")
    expected = saved_weights(folder)
    assert [name.startswith("adapter") for name in expected] == [bool(fields.get("use_peft"))]
    if not fields.get("use_peft"):
        loaded = AutoModelForCausalLM.from_pretrained(folder / f"checkpoint-{third.step}")
        assert torch.equal(weights(loaded), weights(third.model))


def test_resumed_run_repeats_steps_since_the_last_checkpoint(tmp_path):
    """The steps since the last checkpoint are repeated, and their lines are not duplicated."""
    trainer(tmp_path / "whole", save_steps=2).train()
    folder = tmp_path / "run"
    killed_at(3, trainer(folder, save_steps=2))
    assert [entry["step"] for entry in figures(folder)] == [1, 2, 3]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    made = trainer(folder, resume=True, save_steps=2)
    assert made.step == 2
    made.train()
    assert_same_run(folder, tmp_path / "whole")


def test_save_waits_for_the_end_of_a_generation_batch(tmp_path):
    made = trainer(tmp_path, num_iterations=2, save_total_limit=9)
    made.train()
    # max_steps cuts the last batch short.
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]


def test_resumed_run_repeats_a_failed_step(tmp_path):
    """The reward fails in the middle of a step, after prompts were drawn and completions sampled."""
    trainer(tmp_path / "whole").train()
    folder = tmp_path / "run"
    made = trainer(folder, save_steps=0)
    collect = made.collect

    def fail():
        batch = collect()
        if made.step == 2:
            raise UserError("no reward today")
        return batch

    made.collect = fail
    with pytest.raises(UserError, match="no reward today"):
        made.train()
    trainer(folder, resume=True).train()
    assert_same_run(folder, tmp_path / "whole")


def test_resumed_run_extends_a_finished_run(tmp_path):
    """A constant learning rate stays the same; others follow the schedule of the new max_steps."""
    trainer(tmp_path / "whole", lr_scheduler_type="constant").train()
    folder = tmp_path / "run"
    trainer(folder, lr_scheduler_type="constant", max_steps=3).train()
    # The other run packs differently, which changes the order of sums, so only this one is bit-identical.
    trainer(folder, resume=True, lr_scheduler_type="constant", save_steps=2, save_total_limit=1).train()
    assert_same_run(folder, tmp_path / "whole")
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-5"]

    trainer(tmp_path / "linear", max_steps=3).train()
    trainer(tmp_path / "linear", resume=True, max_steps=6, max_tokens_per_microbatch=50).train()
    rates = [entry["learning_rate"] for entry in figures(tmp_path / "linear")]
    assert rates == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3, 1e-3 / 2, 1e-3 / 3, 1e-3 / 6])


def test_resumed_run_that_was_finished_only_evaluates(tmp_path):
    trainer(tmp_path, max_steps=2).train()
    summary = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "summary.json").unlink()
    (tmp_path / "metrics.jsonl").unlink()
    made = trainer(tmp_path, resume=True, max_steps=2)
    made.collect = None
    made.train()
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_resume_on_the_command_line(tmp_path, capsys):
    path, folder = tmp_path / "small.yaml", tmp_path / "run"
    path.write_text(json.dumps({**SMALL, "save_steps": 1}))
    assert main(["train", str(path), "--resume"]) == 2
    assert "--resume needs the run folder: set output_dir" in capsys.readouterr().err
    assert main(["train", str(path), "--resume", "--output_dir", str(folder), "--max_steps", "2"]) == 0
    assert f"no checkpoint in {folder}: starting from the beginning" in capsys.readouterr().out
    assert yaml.safe_load((folder / "config.yaml").read_text())["resume_from_checkpoint"] is False
    assert main(["train", str(path), "--output_dir", str(folder)]) == 2
    assert "already holds a run; choose another one, or --resume that run" in capsys.readouterr().err
    assert main(["train", str(folder / "config.yaml"), "--max_steps", "3", "--resume"]) == 0
    assert f"resuming from {folder}/checkpoint-2" in capsys.readouterr().out
    assert [entry["step"] for entry in figures(folder)] == [1, 2, 3]
    assert yaml.safe_load((folder / "config.yaml").read_text())["resume_from_checkpoint"] is False
    # A checkpoint without metrics, which may not be due yet, is also a run.
    (folder / "metrics.jsonl").unlink()
    assert main(["train", str(path), "--output_dir", str(folder)]) == 2


@pytest.mark.parametrize(
    ("number", "status", "ended"), [(signal.SIGTERM, 143, SystemExit), (signal.SIGINT, 130, KeyboardInterrupt)]
)
def test_run_stops_after_a_signal(tmp_path, capfd, number, status, ended):
    trainer(tmp_path / "whole", num_iterations=2, max_steps=6).train()
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    folder = tmp_path / "run"
    made = trainer(folder, num_iterations=2, max_steps=6, save_steps=0)
    update = made.update

    def signalled(*args, **kwargs):
        if made.step == 2:
            os.kill(os.getpid(), number)
        return update(*args, **kwargs)

    made.update = signalled
    with pytest.raises(ended) as error:
        made.train()
    if ended is SystemExit:
        assert error.value.code == status
    # The signal came in the first of two updates on a batch.
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-4"]
    printed = capfd.readouterr()
    assert "stopping after this generation batch" in printed.err
    assert f"to continue: grpo-fast train {folder}/config.yaml --resume" in printed.out.replace("\n", " ")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    trainer(folder, resume=True, num_iterations=2, max_steps=6).train()
    assert_same_run(folder, tmp_path / "whole")


def test_run_ends_at_a_second_interrupt(tmp_path):
    made = trainer(tmp_path, save_steps=2)
    update = made.update

    def signalled(*args, **kwargs):
        if made.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            # Pending signals are delivered by number, not in the order in which they were sent.
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)
        return update(*args, **kwargs)

    made.update = signalled
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]


def entry(step: int, **more) -> dict:
    return {"step": step, "reward": None, "text": "a\u2028b", **more}


def write_metrics(path, entries) -> list[str]:
    with LinesFile(path, checksums=True) as file:
        for each in entries:
            file.write(each)
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def test_cut_metrics_keeps_the_lines_up_to_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert cut_metrics(path, 3) == ([], "")
    lines = write_metrics(path, map(entry, (1, 2, 3)))
    with path.open("a") as file:
        file.write('{"st')
    kept, note = cut_metrics(path, 2)
    assert note == ""
    assert [each["step"] for each in kept] == [1, 2]
    assert kept[0]["reward"] != kept[0]["reward"]
    assert "crc32" not in kept[0]
    assert path.read_text(encoding="utf-8").split("\n") == [*lines[:2], ""]


def test_cut_metrics_reads_lines_without_checksums(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    assert cut_metrics(path, 2) == ([{"step": 1}, {"step": 2}], "")
    with LinesFile(path, append=True, checksums=True) as file:
        file.write({"step": 3})
    assert [each["step"] for each in read_metrics(path)] == [1, 2, 3]


def test_cut_metrics_detects_every_changed_bit(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = write_metrics(path, map(entry, (1, 2, 3, 4)))
    whole, first = path.read_bytes(), len(lines[0].encode()) + 1
    for place in range(first, first + len(lines[1].encode())):
        content = bytearray(whole)
        content[place] ^= 1 << place % 7
        path.write_bytes(content)
        kept, note = cut_metrics(path, 4)
        assert [each["step"] for each in kept] == [1, 3, 4]
        assert note.startswith(f"{path}: line 2")
        copy = tmp_path / "metrics.jsonl.1"
        assert note.endswith(f"left out; the file as it was is kept as {copy}")
        assert copy.read_bytes() == content
        copy.unlink()


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        "7",
        "null",
        "{}",
        '{"step": "2"}',
        '{"step": true}',
        "[" * 100_000,
        '{"step": 2, "a": ' + "[" * 100_000,
        "\x00",
    ],
)
def test_cut_metrics_leaves_out_only_damaged_lines(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    kept, note = cut_metrics(path, 3)
    assert [each["step"] for each in kept] == [1, 3]
    assert "line 2 is damaged and left out" in note
    assert [each["step"] for each in read_metrics(path)] == [1, 3]


def test_resumed_run_reports_damaged_metrics(tmp_path, capsys):
    trainer(tmp_path, max_steps=3, lr_scheduler_type="constant").train()
    path = tmp_path / "metrics.jsonl"
    damaged = path.read_text().replace('"step": 2', '"step": 1')
    path.write_text(damaged)
    assert [each["step"] for each in read_run(tmp_path).history] == [1, 3]
    capsys.readouterr()
    trainer(tmp_path, resume=True, max_steps=4, lr_scheduler_type="constant").train()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert said == [f"warning: {path}: line 2 is damaged and left out; the file as it was is kept as {path}.1"]
    assert [each["step"] for each in figures(tmp_path)] == [1, 3, 4]
    assert path.with_name("metrics.jsonl.1").read_text() == damaged


def test_resumed_run_without_checkpoints_keeps_the_old_metrics(tmp_path, capsys):
    """As when somebody removed all checkpoints to free space."""
    trainer(tmp_path, max_steps=2).train()
    before = (tmp_path / "metrics.jsonl").read_text()
    for folder in checkpoints(tmp_path):
        shutil.rmtree(folder)
    trainer(tmp_path, resume=True, max_steps=2).train()
    assert "2 steps are made again; the file as it was is kept as" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl.1").read_text() == before
    assert [each["step"] for each in figures(tmp_path)] == [1, 2]
