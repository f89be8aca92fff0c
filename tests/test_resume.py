"""A run that was killed, stopped or failed goes on as if nothing had happened, and never leaves half a checkpoint."""

import dataclasses
import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grpo_fast import checkpoint, files
from grpo_fast.checkpoint import checkpoint_bytes, checkpoints, find_checkpoint, read_state
from grpo_fast.cli import main
from grpo_fast.config import GRPOConfig
from grpo_fast.errors import CheckpointError, UserError
from grpo_fast.files import remove_leftovers
from grpo_fast.metrics import MACHINE_METRICS, cut_metrics, read_metrics
from grpo_fast.trainer import GRPOTrainer
from test_trainer import SMALL, weights

# `make test-kill` asks for 20.
KILLS = int(os.environ.get("KILLS", "3"))
# Every generator that a checkpoint keeps has a part in the rewards, and so in the gradients.
NOISE = (
    "import random\nimport numpy\nimport torch\n"
    "def noise(prompts, completions, **columns):\n"
    "    parts = lambda: (random.gauss(0, 1), numpy.random.normal(), torch.rand(()).item())\n"
    "    return [sum(parts()) for _ in prompts]\n"
)


class Killed(BaseException):
    """Like SIGKILL, it is caught by nothing."""


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def config(folder, **fields) -> GRPOConfig:
    return GRPOConfig(**{**SMALL, "max_steps": 5, "save_steps": 1, "output_dir": str(folder), **fields})


def trainer(folder, resume=False, **fields) -> GRPOTrainer:
    return GRPOTrainer(config(folder, resume_from_checkpoint=resume, **fields))


def killed_at(step: int, made: GRPOTrainer) -> None:
    """Train until `step` updates were made in this process, and die in the next one."""
    update, calls = made.update, []

    def count(*args, **kwargs):
        calls.append(args)
        if len(calls) > step:
            raise Killed
        return update(*args, **kwargs)

    made.update = count
    with pytest.raises(Killed):
        made.train()


def seed_generators(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def figures(folder: Path) -> list[dict]:
    """The run's metrics, but for those that depend on the machine."""
    entries = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in entry.items() if name not in MACHINE_METRICS} for entry in entries]


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = checkpoints(folder)[-1]
    return {path.name: load_file(path) for path in newest.glob("*model*.safetensors")}


def assert_same_run(folder: Path, whole: Path) -> None:
    assert figures(folder) == figures(whole)
    assert checkpoints(folder)[-1].name == checkpoints(whole)[-1].name
    ours, theirs = saved_weights(folder), saved_weights(whole)
    assert ours
    for name, tensors in theirs.items():
        assert tensors.keys() == ours[name].keys()
        assert all(torch.equal(tensor, ours[name][key]) for key, tensor in tensors.items())
    summaries = [json.loads((path / "summary.json").read_text()) for path in (folder, whole)]
    assert [s.pop("train_seconds") > 0 for s in summaries] == [True, True]
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize(
    "fields",
    [
        {"weight_decay": 0.1, "warmup_steps": 2, "lr_scheduler_type": "cosine", "noise": True},
        {"num_iterations": 2, "save_steps": 2, "max_steps": 6},
        {"beta": 0.1},
        {"use_peft": True, "lora_r": 4, "lora_dropout": 0.2, "beta": 0.1, "learning_rate": 1e-2},
        {"bf16": True, "logging_steps": 2, "shuffle_dataset": False},
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
    # Only what the checkpoint holds decides what comes.
    seed_generators(1)
    third.train()
    assert_same_run(folder, tmp_path / "whole")
    expected = saved_weights(folder)
    assert [name.startswith("adapter") for name in expected] == [bool(fields.get("use_peft"))]
    if not fields.get("use_peft"):
        loaded = AutoModelForCausalLM.from_pretrained(folder / f"checkpoint-{third.step}")
        assert torch.equal(weights(loaded), weights(third.model))


def test_a_kill_between_two_saves_repeats_the_steps(tmp_path):
    """The steps since the last checkpoint are made again, and their lines are not doubled."""
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


def test_saves_wait_for_the_end_of_a_generation_batch(tmp_path):
    made = trainer(tmp_path, num_iterations=2, save_total_limit=9)
    made.train()
    # Max_steps cuts the last batch short.
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]


def test_a_failed_step_is_made_again_as_it_was(tmp_path):
    """The reward fails in the middle of a step, when prompts were drawn and completions sampled."""
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


def test_a_finished_run_can_be_extended(tmp_path):
    """A constant learning rate goes on as it would have; others follow the schedule of the new max_steps."""
    trainer(tmp_path / "whole", lr_scheduler_type="constant").train()
    folder = tmp_path / "run"
    trainer(folder, lr_scheduler_type="constant", max_steps=3).train()
    # Packed otherwise, the sums have another order, so that only this one is bit-identical.
    trainer(folder, resume=True, lr_scheduler_type="constant", save_steps=2, save_total_limit=1).train()
    assert_same_run(folder, tmp_path / "whole")
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-5"]

    trainer(tmp_path / "linear", max_steps=3).train()
    trainer(tmp_path / "linear", resume=True, max_steps=6, max_tokens_per_microbatch=50).train()
    rates = [entry["learning_rate"] for entry in figures(tmp_path / "linear")]
    assert rates == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3, 1e-3 / 2, 1e-3 / 3, 1e-3 / 6])


def test_a_finished_run_only_measures_again(tmp_path):
    trainer(tmp_path, max_steps=2).train()
    summary = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "summary.json").unlink()
    made = trainer(tmp_path, resume=True, max_steps=2)
    made.collect = None
    made.train()
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 2e-3}, r"learning_rate=0.002 is not that of \S+checkpoint-1, 0.001"),
        ({"seed": 7}, r"seed=7 is not that of \S+checkpoint-1, 42"),
        ({"loss_type": "grpo"}, "loss_type='grpo' is not that of"),
        ({"generation_batch_size": 16}, "generation_batch_size=16 is not that of"),
        ({"num_generations": 8}, "num_generations=8 is not that of"),
        ({"use_peft": True}, "use_peft=True is not that of"),
        ({"optim": "adamw_torch_8bit"}, "optim='adamw_torch_8bit' is not that of"),
        ({"lr_scheduler_type": "constant"}, "lr_scheduler_type='constant' is not that of"),
        ({"dataset_kwargs": {"length": 3, "test_size": 20}}, "dataset_kwargs={'length': 3"),
        ({"model_init_kwargs": {"hidden_size": 16}}, "model_init_kwargs={'hidden_size': 16} is not that of"),
        ({"max_steps": 1}, "max_steps=1 is less than the 2 steps of"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_another_run_is_refused_before_anything_is_loaded(finished, change, message):
    finished = finished.parent / ("two" if "max_steps" in change else "run")
    with pytest.raises(UserError, match=message) as error:
        find_checkpoint(finished, config(finished, **change))
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two finished runs, of one and of two steps, not to be changed by a test."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    trainer(folder, max_steps=1).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer(folder.parent / "two", max_steps=2).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def test_another_model_or_other_data_under_the_same_name(tmp_path):
    made = trainer(tmp_path / "run")
    made.model.save_pretrained(tmp_path / "model")
    made.tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{a}{b}>", "answer": f"{b}{a}"} for a in range(10) for b in range(a)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    fields = {"model_name_or_path": str(tmp_path / "model"), "model_init_kwargs": None, "max_steps": 1}
    fields |= {"dataset_name": str(tmp_path / "rows.json"), "dataset_kwargs": None}
    trainer(tmp_path / "run", **fields).train()
    trainer(tmp_path / "run", resume=True, **fields)

    (tmp_path / "rows.json").write_text(json.dumps([{**row, "prompt": row["prompt"][::-1]} for row in rows]))
    with pytest.raises(UserError, match=r"training data='41 prompts \(\w+\)' is not that of"):
        trainer(tmp_path / "run", resume=True, **fields)
    (tmp_path / "rows.json").write_text(json.dumps(rows))

    other = trainer(tmp_path / "other", model_init_kwargs={"hidden_size": 16, "intermediate_size": 32})
    other.model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"number of parameters=\d+ is not that of \S+, \d+"):
        trainer(tmp_path / "run", resume=True, **fields)


FILES = ["trainer_state.json", "optimizer.safetensors", "rng.safetensors", "model.safetensors", "config.json"]


@pytest.mark.parametrize("name", FILES)
def test_damaged_checkpoints_are_named(finished, tmp_path, name):
    folder = shutil.copytree(finished.parent / "two", tmp_path / "run")
    path = folder / "checkpoint-2" / name
    whole = path.read_bytes()
    assert find_checkpoint(folder, config(folder))[1].step == 2
    offer = r"remove that folder to go on from checkpoint-1$"
    for content in (whole[: len(whole) // 2], whole[:-2], b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"checkpoint-2 is damaged \({name}.*{offer}"):
            find_checkpoint(folder, config(folder))
    path.unlink()
    with pytest.raises(UserError, match=rf"checkpoint-2 is damaged \({name}.*{offer}"):
        find_checkpoint(folder, config(folder))


@pytest.mark.parametrize("content", ["[]", "null", '{"step": 2}', "{", "7"])
def test_a_state_that_is_none(finished, tmp_path, content):
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "checkpoint-1" / "trainer_state.json").write_text(content)
    with pytest.raises(UserError, match=r"trainer_state.json.*remove that folder to start from the beginning"):
        find_checkpoint(folder, config(folder))


@pytest.mark.parametrize("name", ["optimizer.safetensors", "rng.safetensors", "model.safetensors"])
def test_overwritten_tensors_end_in_one_line(finished, tmp_path, name):
    """Of the right length, but no tensors: that is seen when they are read, still before anything is trained."""
    folder = shutil.copytree(finished, tmp_path / "run")
    path = folder / "checkpoint-1" / name
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(UserError, match="checkpoint-1 is damaged"):
        trainer(folder, resume=True)


def operations(monkeypatch, act) -> None:
    """Call `act` before everything that a save does to the disk."""

    def before(function):
        def wrapped(*args, **kwargs):
            act()
            return function(*args, **kwargs)

        return wrapped

    for place, name in (
        (checkpoint, "save_file"),
        (checkpoint, "sync"),
        (checkpoint.shutil, "rmtree"),
        (files.Path, "rename"),
        (files.Path, "write_text"),
    ):
        monkeypatch.setattr(place, name, before(getattr(place, name)))


FULL = "No space left on device"


def outcome(made: GRPOTrainer, step: int) -> BaseException | None:
    """What a save as if after `step` ends in."""
    made.step = step
    try:
        made.save()
    except (Killed, OSError, CheckpointError) as error:
        return error


@pytest.mark.parametrize("failure", [Killed, OSError])
def test_a_save_that_breaks_anywhere_leaves_whole_checkpoints(tmp_path, monkeypatch, failure):
    """A kill or a full disk before each write, sync, rename and removal of a save in turn."""
    made = trainer(tmp_path, save_total_limit=1, max_steps=1)
    made.train()
    calls = 0

    def act():
        nonlocal calls
        calls += 1
        if calls > allowed:
            raise Killed if failure is Killed else OSError(errno.ENOSPC, FULL)

    allowed, newest, moments = 0, 1, set()
    operations(monkeypatch, act)
    while (broken := outcome(made, newest + 1)) is not None:
        if isinstance(broken, CheckpointError):
            assert str(broken) == f"the checkpoint {tmp_path}/checkpoint-{newest + 1} could not be written: " + FULL
        calls, removing = -1000, any(tmp_path.glob(".*.removed"))
        remove_leftovers(tmp_path)
        found = checkpoints(tmp_path)
        assert sorted(tmp_path.glob("*checkpoint*")) == sorted(found)
        steps = [read_state(path).step for path in found]
        assert steps[-1] in (newest, newest + 1)
        moments.add((newest + 1 in steps, removing))
        newest = made.saved_step = steps[-1]
        allowed, calls = allowed + 1, 0
    # Broken before the new checkpoint was in place, between that and the removal of an old one, and within that.
    assert moments == {(False, False), (True, False), (True, True)}
    assert allowed >= 15
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{newest + 1}"]


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    save_file = checkpoint.save_file

    def full(tensors, path):
        if "checkpoint-3" in str(path):
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save_file(tensors, path)

    path = tmp_path / "small.yaml"
    path.write_text(json.dumps({**SMALL, "max_steps": 4, "save_steps": 1}))
    with monkeypatch.context() as context:
        context.setattr(checkpoint, "save_file", full)
        assert main(["train", str(path), "--output_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "checkpoint-3 could not be written: I/O error: No space left on device" in error[0]
    assert main(["train", str(tmp_path / "run" / "config.yaml"), "--resume"]) == 0
    assert main(["train", str(path), "--output_dir", str(tmp_path / "whole")]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_what_a_checkpoint_takes_is_known_before(finished, tmp_path, monkeypatch):
    newest = checkpoints(finished)[-1]
    files = read_state(newest).files
    made = trainer(tmp_path / "run")
    known = checkpoint_bytes(made.model, made.config)
    # Names, shapes and steps come on top of the numbers.
    assert known <= files["model.safetensors"] + files["optimizer.safetensors"] <= known + 10_000

    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3 * known - 1))
    with pytest.raises(UserError, match=r"3 checkpoints take .* MiB; lower save_total_limit"):
        trainer(tmp_path / "run")
    trainer(tmp_path / "run", save_total_limit=1)
    trainer(tmp_path / "run", save_steps=3)
    # Those of the run that goes on are to be replaced, not added to.
    written = sum(path.stat().st_size for path in newest.iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3 * known - written))
    trainer(finished, resume=True)
    lora = trainer(tmp_path / "lora", use_peft=True, lora_r=2)
    assert checkpoint_bytes(lora.model, lora.config) < known / 4


def test_resume_from_the_command_line(tmp_path, capsys):
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
    assert f"going on from {folder}/checkpoint-2" in capsys.readouterr().out
    assert [entry["step"] for entry in figures(folder)] == [1, 2, 3]
    assert yaml.safe_load((folder / "config.yaml").read_text())["resume_from_checkpoint"] is False
    # A checkpoint alone is a run, too: its metrics may not be due yet.
    (folder / "metrics.jsonl").unlink()
    assert main(["train", str(path), "--output_dir", str(folder)]) == 2


@pytest.mark.parametrize(
    ("number", "status", "ended"), [(signal.SIGTERM, 143, SystemExit), (signal.SIGINT, 130, KeyboardInterrupt)]
)
def test_a_signal_stops_after_the_step(tmp_path, capfd, number, status, ended):
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
    assert f"to go on: grpo-fast train {folder}/config.yaml --resume" in printed.out.replace("\n", " ")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    trainer(folder, resume=True, num_iterations=2, max_steps=6).train()
    assert_same_run(folder, tmp_path / "whole")


def test_a_second_interrupt_ends_at_once(tmp_path):
    made = trainer(tmp_path, save_steps=2)
    update = made.update

    def signalled(*args, **kwargs):
        if made.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        return update(*args, **kwargs)

    made.update = signalled
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]


def test_leftovers_are_removed(tmp_path):
    for name in (".checkpoint-9.partial", ".checkpoint-3.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    (tmp_path / ".config.yaml.partial").write_text("half")
    assert checkpoints(tmp_path) == []
    trainer(tmp_path, resume=True, max_steps=1).train()
    assert not list(tmp_path.glob(".*"))


def test_cut_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert cut_metrics(path, 3) == []
    lines = ['{"step": 1, "reward": null}\n', '{"step": 2, "reward": 1.5}\n', '{"step": 3, "reward": 2}\n']
    path.write_text("".join(lines) + '{"st')
    kept = cut_metrics(path, 2)
    assert [entry["step"] for entry in kept] == [1, 2]
    assert kept[0]["reward"] != kept[0]["reward"]
    assert path.read_text() == "".join(lines[:2])


def child(fields: dict, output: str, limit: int | None = None) -> None:
    """A run in a process of its own, whose exit status is the command line's."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
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

    def start_child(settings: GRPOConfig, limit: int | None = None):
        arguments = (dataclasses.asdict(settings), str(tmp_path / "output"), limit)
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
def test_kills_at_random_moments(tmp_path, start):
    """SIGKILL again and again, while loading, training and saving: the run ends like one that was never killed."""
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
    assert not list(folder.glob(".*"))


def test_a_second_sigterm_kills(tmp_path, start):
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


def test_a_disk_that_takes_no_more(tmp_path, start):
    """The system refuses to write beyond a size, as it does on a full disk; the checkpoint before stays whole."""
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
    assert not list(folder.glob(".*"))
    assert find_checkpoint(folder, settings)[1].step == 1
