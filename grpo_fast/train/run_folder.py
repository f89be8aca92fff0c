"""Run folders: a lock, which ends with its process, lets only one process at a time write to each."""

from __future__ import annotations

import itertools
import os
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError, one_line
from grpo_fast.train.checkpoint import TrainerState, checkpoints, find_checkpoint

LOCK_FILE = ".lock"
# The locks that this process holds, and whether it created their folders.
_held: dict[Path, tuple[FileLock, bool]] = {}


def claim(folder: Path, field: str = "output_dir", created: bool = False) -> None:
    """Make this process the only one that writes to `folder`, which is created if it is missing.

    The claim lasts until :func:`release` or the end of the process, however it ends. Claiming a folder twice in one
    process changes nothing. `field` is the option that names the folder, for errors; `created` says whether the caller
    has just created it. A UserError refuses a folder that another process has, or that cannot be written to.
    """
    place = folder.resolve()
    # A forked child has its parent's table, but not its locks.
    if place in _held and _held[place][0].is_locked:
        return
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise UserError(f"{field}={str(folder)!r} cannot be created: {there} is not a folder")
    lock = FileLock(place / LOCK_FILE, timeout=0, thread_local=False)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir()
            created = True
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{field}={str(folder)!r} is in use by another process; wait until it has ended, or choose another folder"
        ) from None
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(f"{field}={str(folder)!r} cannot be written to: {reason}") from None
    _held[place] = lock, created


def claim_new(name: str) -> Path:
    """Create and claim ``runs/NAME-TIME``, or ``runs/NAME-TIME-2`` and so on if that name is taken."""
    stem = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        folder = stem if number == 1 else stem.with_name(f"{stem.name}-{number}")
        try:
            stem.parent.mkdir(exist_ok=True)
            folder.mkdir()
        except FileExistsError:
            if not stem.parent.is_dir():
                raise UserError(f"{folder} cannot be created: {stem.parent} is not a folder") from None
            continue
        except OSError as error:
            raise UserError(f"{folder} cannot be created: {error.strerror or one_line(error)}") from None
        claim(folder, created=True)
        return folder


def release(folder: Path) -> None:
    """Let other processes write to `folder`. If nothing was written, it is empty or missing again, as it was before."""
    lock, created = _held.pop(folder.resolve(), (None, False))
    if lock is None:
        return
    with suppress(OSError):
        if os.listdir(folder) == [LOCK_FILE]:
            # While the lock is held: a process that has just opened this file will notice that it was removed.
            (folder / LOCK_FILE).unlink()
            if created:
                folder.rmdir()
    lock.release()


def choose_run_folder(config: GRPOConfig) -> tuple[Path, tuple[Path, TrainerState] | None]:
    """The run folder, claimed for this process, and the checkpoint to continue from.

    A UserError refuses a folder that another process has, or that holds a run which is not to be resumed.
    """
    if config.output_dir is None:
        if config.resume_from_checkpoint:
            raise UserError("--resume needs the run folder: set output_dir, or give that folder's own config.yaml")
        return claim_new(config.run_name or config.dataset_name.replace("/", "-")), None
    folder = Path(config.output_dir)
    if not config.resume_from_checkpoint:
        # Also before the claim, which would leave its file there.
        refuse_other_run(folder)
    claim(folder)
    try:
        if config.resume_from_checkpoint:
            return folder, find_checkpoint(folder, config)
        refuse_other_run(folder)
        return folder, None
    except BaseException:
        release(folder)
        raise


def refuse_other_run(folder: Path) -> None:
    """Raise a UserError if `folder` holds a run: a new run never writes into another one's folder."""
    if (folder / "metrics.jsonl").exists() or checkpoints(folder):
        raise UserError(f"output_dir={str(folder)!r} already holds a run; choose another one, or --resume that run")
