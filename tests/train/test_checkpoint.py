"""Checkpoints are complete or missing, and only the run that wrote a checkpoint continues from it."""

import errno
import json
import shutil
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState
from safetensors import SafetensorError

from grpo_fast import files
from grpo_fast.cli import main
from grpo_fast.errors import CheckpointError, UserError
from grpo_fast.evaluation.run import EvalOptions, EvalRun
from grpo_fast.files import remove_leftovers
from grpo_fast.train import checkpoint
from grpo_fast.train.checkpoint import checkpoint_bytes, checkpoints, find_checkpoint, read_state
from grpo_fast.train.run_folder import LOCK_FILE
from grpo_fast.trainer import GRPOTrainer
from support.killed import Killed
from support.runs import assert_same_run, config, trainer
from support.small import SMALL

FILES = ["trainer_state.json", "optimizer.safetensors", "rng.safetensors", "model.safetensors", "config.json"]
FULL = "No space left on device"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two finished runs, of one and of two steps; tests change only copies."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    trainer(folder, max_steps=1).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer(folder.parent / "two", max_steps=2).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


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
def test_find_checkpoint_refuses_another_run(finished, change, message):
    finished = finished.parent / ("two" if "max_steps" in change else "run")
    with pytest.raises(UserError, match=message) as error:
        find_checkpoint(finished, config(finished, **change))
    assert "\n" not in str(error.value)


def test_trainer_refuses_another_model_or_other_data_under_the_same_name(tmp_path):
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
    with pytest.raises(UserError, match=r"training data='\d+ prompts \(\w+\)' is not that of"):
        trainer(tmp_path / "run", resume=True, **fields)
    (tmp_path / "rows.json").write_text(json.dumps(rows))

    other = trainer(tmp_path / "other", model_init_kwargs={"hidden_size": 16, "intermediate_size": 32})
    other.model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"number of parameters=\d+ is not that of \S+, \d+"):
        trainer(tmp_path / "run", resume=True, **fields)


@pytest.mark.parametrize("name", FILES)
def test_find_checkpoint_names_damaged_files(finished, tmp_path, name):
    folder = shutil.copytree(finished.parent / "two", tmp_path / "run")
    path = folder / "checkpoint-2" / name
    whole = path.read_bytes()
    assert find_checkpoint(folder, config(folder))[1].step == 2
    offer = r"remove that folder to continue from checkpoint-1$"
    for content in (whole[: len(whole) // 2], whole[:-2], b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"checkpoint-2 is damaged \({name}.*{offer}"):
            find_checkpoint(folder, config(folder))
    path.unlink()
    with pytest.raises(UserError, match=rf"checkpoint-2 is damaged \({name}.*{offer}"):
        find_checkpoint(folder, config(folder))


@pytest.mark.parametrize(
    "content",
    ["[]", "null", '{"step": 2}', "{", "7", "[" * 100_000, '{"fixed":' * 100_000, "1" * 5000],
    ids=lambda text: text[:12],
)
def test_find_checkpoint_refuses_content_that_is_no_state(finished, tmp_path, content):
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "checkpoint-1" / "trainer_state.json").write_text(content)
    with pytest.raises(UserError, match=r"trainer_state.json.*remove that folder to start from the beginning"):
        find_checkpoint(folder, config(folder))


@pytest.mark.parametrize("name", ["optimizer.safetensors", "rng.safetensors", "model.safetensors"])
def test_trainer_refuses_overwritten_tensors(finished, tmp_path, name):
    """Files of the right length that hold no tensors are refused before training."""
    folder = shutil.copytree(finished, tmp_path / "run")
    path = folder / "checkpoint-1" / name
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(UserError, match="checkpoint-1 is damaged"):
        trainer(folder, resume=True)


TENSORS = ["optimizer.safetensors", "rng.safetensors", "model.safetensors"]


def flip(path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("name", [*TENSORS, "config.json"])
def test_find_checkpoint_detects_a_flipped_bit(finished, tmp_path, name):
    folder = shutil.copytree(finished.parent / "two", tmp_path / "run")
    path = folder / "checkpoint-2" / name
    length = path.stat().st_size
    for place in (0, length // 2, length - 1):
        flip(path, place)
        with pytest.raises(UserError, match=rf"checkpoint-2 is damaged \({name} was changed after.*from checkpoint-1$"):
            find_checkpoint(folder, config(folder))
        flip(path, place)
    assert find_checkpoint(folder, config(folder))[1].step == 2


def test_verify_model_detects_a_flipped_bit(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run") / "checkpoint-1"
    fields = {"model_name_or_path": str(folder), "model_init_kwargs": None}
    # Files that only a resumed run needs may be missing or damaged.
    (folder / "optimizer.safetensors").unlink()
    flip(folder / "rng.safetensors", 0)
    trainer(tmp_path / "other", **fields)
    flip(folder / "model.safetensors", folder.joinpath("model.safetensors").stat().st_size - 5)
    message = r"model_name_or_path='.*checkpoint-1' is damaged: model.safetensors was changed after it was written"
    with pytest.raises(UserError, match=message):
        trainer(tmp_path / "other", **fields)
    with pytest.raises(UserError, match=message):
        EvalRun(config(tmp_path, **fields), EvalOptions(output=tmp_path / "eval"))


def test_find_checkpoint_detects_a_flipped_bit_of_the_state(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    path = folder / "checkpoint-1" / "trainer_state.json"
    text = path.read_bytes()
    for place in range(0, len(text), 7):
        # Whitespace between entries has no meaning.
        if chr(text[place]).isspace():
            continue
        flip(path, place)
        with pytest.raises(UserError, match=r"trainer_state.json|newer version"):
            find_checkpoint(folder, config(folder))
        flip(path, place)
    path.write_text(json.dumps(json.loads(text)))
    assert find_checkpoint(folder, config(folder))[1].step == 1


def write_state(folder, checksum: bool, **values) -> None:
    path = folder / "trainer_state.json"
    content = {**json.loads(path.read_text()), **values}
    old = content.pop("checksum")
    path.write_text(json.dumps({**content, "checksum": checkpoint._checksum(content) if checksum else old}))


WRONG_VALUES = {
    "step": [-1, "1", True],
    "num_prompts": [1.5],
    "best_score": ["high"],
    "train_seconds": [None],
    "fixed": [[]],
    "files": [{"model.safetensors": "1"}],
    "sha256": [{"model.safetensors": 5}],
}


@pytest.mark.parametrize(
    "values", [{name: value} for name, values in WRONG_VALUES.items() for value in values], ids=str
)
def test_find_checkpoint_refuses_a_state_that_was_edited(finished, tmp_path, values):
    for checksum in (False, True):
        folder = shutil.copytree(finished, tmp_path / str(checksum))
        write_state(folder / "checkpoint-1", checksum, **values)
        reason = next(iter(values)) if checksum else "was changed after it was written"
        with pytest.raises(UserError, match=rf"checkpoint-1 is damaged \(trainer_state.json:? ?.*{reason}") as error:
            find_checkpoint(folder, config(folder))
        assert "\n" not in str(error.value)


def test_find_checkpoint_does_not_suggest_removing_a_newer_checkpoint(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    write_state(folder / "checkpoint-1", checksum=True, format=checkpoint.FORMAT + 1, something_new=1)
    with pytest.raises(UserError, match=r"checkpoint-1 is of a newer version of grpo-fast .format 3") as error:
        find_checkpoint(folder, config(folder))
    assert "remove" not in str(error.value)


def test_trainer_resumes_from_a_checkpoint_without_checksums(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    path = folder / "checkpoint-1" / "trainer_state.json"
    content = json.loads(path.read_text())
    path.write_text(
        json.dumps({name: content[name] for name in content if name not in ("format", "sha256", "checksum")})
    )
    trainer(folder, resume=True).train()
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-4", "checkpoint-5"]


def outcome(made: GRPOTrainer, step: int) -> BaseException | None:
    """The error of a save after `step`, if any."""
    made.state.step = step
    try:
        made.saver.save()
    except (Killed, OSError, CheckpointError) as error:
        return error


def operations(monkeypatch, act) -> None:
    """Call `act` before every disk operation of a save."""

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


@pytest.mark.parametrize("failure", [Killed, OSError])
def test_save_that_fails_anywhere_leaves_complete_checkpoints(tmp_path, monkeypatch, failure):
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
        newest = made.saver.saved_step = steps[-1]
        allowed, calls = allowed + 1, 0
    # Failures before the new checkpoint was in place, before an old one was removed, and during its removal.
    assert moments == {(False, False), (True, False), (True, True)}
    assert allowed >= 15
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{newest + 1}"]


def test_train_on_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch, capsys):
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


def test_check_space_knows_the_size_of_checkpoints(finished, tmp_path, monkeypatch):
    newest = checkpoints(finished)[-1]
    files = read_state(newest).files
    made = trainer(tmp_path / "run")
    known = checkpoint_bytes(made.model, made.config)
    # The files also hold names, shapes and steps.
    assert known <= files["model.safetensors"] + files["optimizer.safetensors"] <= known + 10_000

    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3 * known - 1))
    with pytest.raises(UserError, match=r"3 checkpoints take .* MiB; lower save_total_limit"):
        trainer(tmp_path / "run")
    trainer(tmp_path / "run", save_total_limit=1)
    trainer(tmp_path / "run", save_steps=3)
    # A resumed run replaces its checkpoints.
    written = sum(path.stat().st_size for path in newest.iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3 * known - written))
    trainer(finished, resume=True)
    lora = trainer(tmp_path / "lora", use_peft=True, lora_r=2)
    assert checkpoint_bytes(lora.model, lora.config) < known / 4


def test_train_removes_leftovers(tmp_path):
    for name in (".checkpoint-9.partial", ".checkpoint-3.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    (tmp_path / ".config.yaml.partial").write_text("half")
    assert checkpoints(tmp_path) == []
    trainer(tmp_path, resume=True, max_steps=1).train()
    assert [path.name for path in tmp_path.glob(".*")] == [LOCK_FILE]
