"""One process writes to a run folder, whatever the timing."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from grpo_fast.cli import main
from grpo_fast.errors import UserError
from grpo_fast.evaluation.run import EvalOptions, EvalRun
from grpo_fast.train.run_folder import LOCK_FILE, claim, claim_new, release
from grpo_fast.trainer import GRPOTrainer
from support.runs import config, trainer
from support.small import SMALL

RIVALS = 12


def rival(act, folder: str, barrier, found) -> None:
    """Claim at the same moment as the others, and keep the claim until all have tried."""
    os.chdir(folder)
    barrier.wait()
    try:
        found.put(str(act()))
    except UserError as error:
        found.put(f"refused: {error}")
    barrier.wait()


def race(act, folder: Path) -> list[str]:
    """The outcomes of `act` in many processes that call it at once in `folder`."""
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(RIVALS), context.Queue()
    processes = [context.Process(target=rival, args=(act, str(folder), barrier, found)) for _ in range(RIVALS)]
    for process in processes:
        process.start()
    outcomes = [found.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    return outcomes


def test_claim_new_gives_simultaneous_runs_different_names(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda form: "20261125-120000")
    names = race(lambda: claim_new("sort"), tmp_path)
    assert len(set(names)) == RIVALS
    stem = "runs/sort-20261125-120000"
    assert set(names) == {stem, *(f"{stem}-{number}" for number in range(2, RIVALS + 1))}
    assert sorted(names) == sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "runs").iterdir())


@pytest.mark.parametrize("exists", [False, True])
def test_claim_has_one_winner(tmp_path, exists):
    if exists:
        (tmp_path / "run").mkdir()
    outcomes = race(lambda: claim(Path("run")), tmp_path)
    assert outcomes.count("None") == 1
    refused = (
        "refused: output_dir='run' is in use by another process; wait until it has ended, or choose another folder"
    )
    assert outcomes.count(refused) == RIVALS - 1


def holder(folder: str, ready) -> None:
    claim(Path(folder))
    ready.set()
    signal.pause()


@pytest.fixture
def elsewhere():
    """Claims folders in other processes, which are killed at the end."""
    context, processes = multiprocessing.get_context("fork"), []

    def start(folder: Path):
        ready = context.Event()
        processes.append(context.Process(target=holder, args=(str(folder), ready)))
        processes[-1].start()
        assert ready.wait(60)
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.join()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_trainer_refuses_a_folder_in_use_and_changes_nothing(tmp_path, elsewhere):
    folder = tmp_path / "run"
    trainer(folder, max_steps=1).train()
    process, before = elsewhere(folder), contents(folder)
    with pytest.raises(UserError, match="is in use by another process"):
        trainer(folder, resume=True)
    assert contents(folder) == before
    process.kill()
    process.join()
    # The lock ends with its process.
    assert trainer(folder, resume=True).step == 1


def test_trainer_refuses_a_folder_that_was_just_claimed(tmp_path, elsewhere):
    elsewhere(tmp_path / "run")
    for resume in (False, True):
        with pytest.raises(UserError, match="is in use by another process"):
            trainer(tmp_path / "run", resume=resume)
    assert os.listdir(tmp_path / "run") == [LOCK_FILE]


def test_eval_refuses_a_folder_in_use_and_changes_nothing(tmp_path, elsewhere):
    settings, options = config(tmp_path / "run"), EvalOptions(output=tmp_path / "eval")
    EvalRun(settings, options).run()
    elsewhere(tmp_path / "eval")
    before = contents(tmp_path / "eval")
    with pytest.raises(UserError, match=r"--output='.*eval' is in use by another process"):
        EvalRun(settings, EvalOptions(output=tmp_path / "eval", resume=True))
    assert contents(tmp_path / "eval") == before


def test_train_of_a_second_trainer_keeps_the_first_run(tmp_path):
    first, second = (trainer(tmp_path / "run", max_steps=1) for _ in range(2))
    first.train()
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match="already holds a run"):
        second.train()
    assert contents(tmp_path / "run") == before


def test_commands_with_wrong_input_leave_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(json.dumps(SMALL))
    Path("empty").mkdir()
    for options in ([], ["--output_dir", "given"], ["--output_dir", "empty"]):
        assert main(["train", "small.yaml", "--reward_funcs", "[exact_anser]", *options]) == 2
    assert main(["eval", "small.yaml", "--reward_funcs", "[exact_anser]"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert list(Path("runs").iterdir()) == []
    assert not Path("given").exists()
    assert list(Path("empty").iterdir()) == []


def test_train_releases_the_folder(tmp_path, elsewhere):
    trainer(tmp_path / "run", max_steps=1).train()
    elsewhere(tmp_path / "run")


def test_claim_ends_with_its_process_despite_a_forked_child(tmp_path):
    """As when a reward function's forked worker outlives a killed run."""
    reader, writer = os.pipe()
    run = os.fork()
    if not run:
        claim(tmp_path / "run")
        child = os.fork()
        if not child:
            os.write(writer, str(os.getpid()).encode())
            signal.pause()
        signal.pause()
    child = int(os.read(reader, 20))
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    try:
        claim(tmp_path / "run")
        release(tmp_path / "run")
    finally:
        os.kill(child, signal.SIGKILL)


def test_trainer_names_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output_dir='.*file/run' cannot be created: .*file is not a folder"):
        GRPOTrainer(config(tmp_path / "file" / "run"))
    with pytest.raises(UserError, match=r"output_dir='.*file' cannot be created: .*file is not a folder"):
        GRPOTrainer(config(tmp_path / "file"))
