"""Runs in separate processes, killed by SIGKILL and SIGTERM, or on a full disk."""

import dataclasses
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from grpo_fast.cli import main
from grpo_fast.config import GRPOConfig
from grpo_fast.train.checkpoint import checkpoints, find_checkpoint, read_state
from grpo_fast.train.run_folder import LOCK_FILE
from support.runs import assert_same_run, config, figures, trainer
from support.separate import use_separate_engine

# `make test-kill` asks for 20.
KILLS = int(os.environ.get("KILLS", "3"))


def child(fields: dict, output: str, limit: int | None = None, ahead: bool = False) -> None:
    """A run in a separate process, which exits with the command line's status; `ahead`: its engine samples ahead."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if ahead:
        use_separate_engine()
    path = Path(f"{output}.yaml")
    path.write_text(yaml.safe_dump(fields))
    sys.exit(main(["train", str(path)]))


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start a child; all are forked from one process that has imported everything and computed nothing."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["grpo_fast.trainer", "transformers.models.llama.modeling_llama", "jsonargparse"])
    children = []

    def start_child(settings: GRPOConfig, limit: int | None = None, ahead: bool = False):
        arguments = (dataclasses.asdict(settings), str(tmp_path / "output"), limit, ahead)
        children.append(context.Process(target=child, args=arguments))
        children[-1].start()
        return children[-1]

    yield start_child
    for process in children:
        process.kill()
        process.join()


def newest_step(folder: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in checkpoints(folder)), default=0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_run_killed_at_random_moments_ends_like_an_uninterrupted_run(tmp_path, start):
    """Repeated SIGKILLs while loading, training and saving."""
    max_steps = 8 * KILLS
    whole = start(config(tmp_path / "whole", max_steps=max_steps))
    while not (tmp_path / "whole" / "metrics.jsonl").exists():
        time.sleep(0.01)
    begun = time.perf_counter()
    whole.join()
    assert whole.exitcode == 0
    step_seconds = (time.perf_counter() - begun) / max_steps

    folder = tmp_path / "run"
    settings = config(folder, max_steps=max_steps, resume_from_checkpoint=True)
    moments = random.Random(0)
    kills, in_saves = 0, 0
    for attempt in range(10 * KILLS):
        if kills == KILLS:
            break
        process, before = start(settings), newest_step(folder)
        if attempt % 4 < 3:
            # Beyond the last kill, and then anywhere in a step or save.
            while newest_step(folder) == before and process.is_alive():
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 2 * step_seconds))
        else:
            time.sleep(moments.uniform(0, 2))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), Path(tmp_path / "output").read_text()
        kills += process.exitcode == -signal.SIGKILL
        in_saves += any(folder.glob(".*.partial")) or any(folder.glob(".*.removed"))
        if checkpoints(folder):
            read_state(checkpoints(folder)[-1])
    print(f"\n{kills} kills, {in_saves} of them within a write; {max_steps} steps of {step_seconds:.3f} s")
    assert kills == KILLS
    last = start(settings)
    last.join()
    assert last.exitcode == 0, Path(tmp_path / "output").read_text()
    assert_same_run(folder, tmp_path / "whole")
    assert [path.name for path in folder.glob(".*")] == [LOCK_FILE]


def prompts_of_steps(folder: Path) -> list[list[str]]:
    """The prompts of each step, from the completions that the run logged."""
    found = []
    for path in sorted((folder / "completions").glob("*.jsonl")):
        lines = map(json.loads, path.read_text().splitlines())
        found.append(list(dict.fromkeys((line["group"], line["prompt"]) for line in lines)))
    return found


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_queue_killed_at_random_moments_loses_and_repeats_no_prompt(tmp_path, start):
    """Repeated SIGKILLs while answers are sampled ahead; every step has the prompts of an uninterrupted run."""
    max_steps, moments = 6 * KILLS, random.Random(1)
    fields = {
        "max_steps": max_steps, "use_vllm": True, "vllm_mode": "server", "max_staleness": 2, "log_completions_steps": 1,
        "generation_batch_size": 8, "dataset_kwargs": {"length": 2, "test_size": 3}, "sync_tolerance": 1e-2,
    }  # fmt: skip
    whole = start(config(tmp_path / "whole", **fields), ahead=True)
    whole.join()
    assert whole.exitcode == 0, Path(tmp_path / "output").read_text()
    folder, kills = tmp_path / "run", 0
    settings = config(folder, resume_from_checkpoint=True, **fields)
    while kills < KILLS:
        process, before = start(settings, ahead=True), newest_step(folder)
        while newest_step(folder) == before and process.is_alive():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, Path(tmp_path / "output").read_text()
        kills += 1
    last = start(settings, ahead=True)
    last.join()
    assert last.exitcode == 0, Path(tmp_path / "output").read_text()
    steps = prompts_of_steps(folder)
    assert len(steps) == max_steps
    assert steps == prompts_of_steps(tmp_path / "whole")
    assert all(entry["sampling/staleness/max"] <= 2 for entry in figures(folder))


def test_run_ends_at_a_second_sigterm(tmp_path, start):
    folder = tmp_path / "run"
    (tmp_path / "slow.py").write_text(
        "import time\ncalls = 0\ndef slow(prompts, completions, **columns):\n"
        "    global calls\n    calls += 1\n"
        "    if calls > 1:\n        time.sleep(30)\n"
        "    return [float(i) for i in range(len(prompts))]\n"
    )
    process = start(config(folder, reward_funcs=[f"{tmp_path / 'slow.py'}:slow"]))
    while not (folder / "config.yaml").exists() or "before:" not in (tmp_path / "output").read_text():
        time.sleep(0.01)
    time.sleep(0.5)
    process.terminate()
    time.sleep(0.5)
    assert process.is_alive()
    process.terminate()
    process.join(10)
    assert process.exitcode == -signal.SIGTERM


def test_run_on_a_full_disk_keeps_the_checkpoint_before(tmp_path, start):
    """A limit on the size of files stands for a full disk; the previous checkpoint stays complete."""
    folder = tmp_path / "run"
    trainer(folder, lr_scheduler_type="constant", max_steps=1).train()
    size = read_state(folder / "checkpoint-1").files["optimizer.safetensors"]
    settings = config(folder, lr_scheduler_type="constant", resume_from_checkpoint=True)
    process = start(settings, limit=size - 1)
    process.join()
    output = (tmp_path / "output").read_text()
    assert process.exitcode == 2
    assert "checkpoint-2 could not be written" in output.splitlines()[-1]
    assert "File too large" in output.splitlines()[-1]
    assert [path.name for path in folder.glob(".*")] == [LOCK_FILE]
    assert find_checkpoint(folder, settings)[1].step == 1
