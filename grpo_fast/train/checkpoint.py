"""Checkpoints: everything that decides the rest of a run, in a folder that appears only when it is complete.

``checkpoint-N/`` holds what `from_pretrained` loads (the model and its tokenizer, or only the adapter of an adapted
model) and beside it ``trainer_state.json``, ``optimizer.safetensors``, ``rng.safetensors`` and, with `sync_ref_model`,
the weights of the reference policy, ``reference.safetensors``. The state is written last and lists the other files with
their lengths and checksums. The folder is written under another name, synced to the disk and renamed. The learning rate
follows from the step and needs no state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grpo_fast.config import FREE_FIELDS, UNSET, GRPOConfig
from grpo_fast.distributed.sharding import cut_like
from grpo_fast.errors import CheckpointError, UserError, one_line, shown
from grpo_fast.files import discard, json_ready, parse_json, sha256_sums, sync

STATE_FILE = "trainer_state.json"
# The format of trainer_state.json; format 1 had no checksums.
FORMAT = 2
# Files that a run needs to continue, but a model does not.
RUN_FILES = frozenset({"optimizer.safetensors", "rng.safetensors", "reference.safetensors"})


@dataclass
class TrainerState:
    """``trainer_state.json``."""

    step: int  # optimizer steps so far
    num_tokens: int  # of the prompts and completions that were trained on
    num_prompts: int  # drawn from the training rows
    train_seconds: float  # time of the steps
    before: float  # score on the held-out prompts before training; NaN (null in the file) without one
    fixed: dict[str, Any]  # what a resumed run must have in common with this one
    best_step: int = 0  # the step with the best score on the held-out prompts so far, 0 for none
    best_score: float = -math.inf  # its score; null in the file without one
    entropy_coef: float | None = None  # of adaptive entropy control, and the entropy that it has last seen
    entropy: float | None = None
    files: dict[str, int] = field(default_factory=dict)  # lengths of the checkpoint's other files, bytes
    sha256: dict[str, str] = field(default_factory=dict)  # their checksums
    format: int = FORMAT


def checkpoints(run_folder: Path) -> list[Path]:
    """The run's checkpoints, ordered by step."""
    found = [path for path in run_folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    tokenizer: Any,
    state: TrainerState,
    tensors: dict[str, dict[str, Tensor]],
    weights: dict[str, Tensor] | None = None,
) -> Path:
    """Write `model` (for a PeftModel its adapter), `tokenizer`, `state`, and each of `tensors` as ``NAME.safetensors``.

    `weights` are those of a sharded model, whole. A CheckpointError, if the disk is full or cannot be written to,
    leaves the other checkpoints untouched.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write_model(partial, model, tokenizer, weights)
        for name, content in tensors.items():
            save_file(content, partial / f"{name}.safetensors")
        paths = sorted(path for path in partial.rglob("*") if path.is_file())
        names = [path.relative_to(partial).as_posix() for path in paths]
        state = dataclasses.replace(
            state,
            files={name: path.stat().st_size for name, path in zip(names, paths, strict=True)},
            sha256=dict(zip(names, sha256_sums(paths), strict=True)),
            format=FORMAT,
        )
        content = json_ready(dataclasses.asdict(state))
        text = json.dumps({**content, "checksum": _checksum(content)}, indent=2)
        (partial / STATE_FILE).write_text(text + "\n", encoding="utf-8")
        for path in (*partial.rglob("*"), partial):
            sync(path)
        partial.rename(folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or one_line(error)
        raise CheckpointError(f"the checkpoint {folder} could not be written: {reason}") from None
    return folder


def _write_model(folder: Path, model: nn.Module, tokenizer: Any, weights: dict[str, Tensor] | None) -> None:
    # Without the option, peft asks the hub whether the embeddings were resized.
    adapter = {"save_embedding_layers": False, "selected_adapters": ["default"]}
    model.save_pretrained(folder, state_dict=weights, **(adapter if hasattr(model, "get_base_model") else {}))
    tokenizer.save_pretrained(folder)


def save_model(folder: Path, model: nn.Module, tokenizer: Any, weights: dict[str, Tensor] | None = None) -> None:
    """Write `model` (for a PeftModel its adapter) and `tokenizer` alone; `weights` as in `save_checkpoint`.

    A UserError refuses a folder that cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"the model cannot be saved to {folder}, which is a file")
    try:
        _write_model(folder, model, tokenizer, weights)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"the model could not be saved to {folder}: {reason}") from None


def check_newest(wanted: Path, run_folder: Path, newest: Path | None) -> None:
    """Refuse to resume from another checkpoint than the newest one of `run_folder`; says what to do."""
    wanted = Path(os.path.expanduser(wanted))
    if wanted.resolve().parent != run_folder.resolve():
        raise UserError(
            f"resume_from_checkpoint={str(wanted)!r} is not in output_dir={str(run_folder)!r}; set output_dir to the "
            "folder of that run"
        )
    if newest is None or not wanted.is_dir():
        raise UserError(f"resume_from_checkpoint={str(wanted)!r} is no checkpoint; the newest one is {newest}")
    if newest.resolve() != wanted.resolve():
        raise UserError(
            f"resume_from_checkpoint={str(wanted)!r} is older than {newest}, which a resumed run would have to "
            "overwrite; move the newer checkpoints elsewhere first"
        )


def keep_newest(run_folder: Path, limit: int, best_step: int = 0) -> None:
    """Remove all checkpoints except the newest `limit` and that of `best_step`."""
    for folder in checkpoints(run_folder)[:-limit]:
        if folder.name != f"checkpoint-{best_step}":
            discard(folder)


class _Damage(Exception):
    """What is wrong with a checkpoint."""


@contextmanager
def _reading(folder: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Report damage, and errors of these `kinds`, in one line that says which older checkpoint remains."""
    try:
        yield
    except (_Damage, *kinds) as error:
        older = [path.name for path in checkpoints(folder.parent) if path != folder]
        raise UserError(
            f"the checkpoint {folder} is damaged ({one_line(error)}); remove that folder to "
            + (f"continue from {older[-1]}" if older else "start from the beginning")
        ) from None


def read_state(folder: Path) -> TrainerState:
    """The state of a checkpoint; a UserError if it was changed, or files are missing or have other lengths."""
    with _reading(folder):
        state = _parse_state(folder)
        _check_files(folder, state, list(state.files), sums=False)
    return state


def _parse_state(folder: Path) -> TrainerState:
    try:
        content = parse_json((folder / STATE_FILE).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise _Damage(f"{STATE_FILE} holds no state")
        version = content.get("format", 1)
        if type(version) is int and version > FORMAT:
            raise UserError(
                f"the checkpoint {folder} is of a newer version of grpo-fast (format {shown(version)}, this one reads "
                f"up to {FORMAT}); install that version"
            )
        checksum = content.pop("checksum", None)
        if version != 1 and checksum != _checksum(content):
            raise _Damage(f"{STATE_FILE} was changed after it was written")
        state = TrainerState(**{"format": 1, **content})
    except UserError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise _Damage(f"{STATE_FILE}: {getattr(error, 'strerror', None) or one_line(error)}") from None
    _check_fields(state)
    state.before = math.nan if state.before is None else state.before
    state.best_score = -math.inf if state.best_score is None else state.best_score
    return state


def _check_fields(state: TrainerState) -> None:
    """Refuse impossible values: whoever edits the file by hand may also update the checksum."""
    for name in ("step", "num_tokens", "num_prompts", "best_step"):
        value = getattr(state, name)
        if type(value) is not int or value < 0:
            raise _Damage(f"{STATE_FILE}: {name}={shown(value)} is not a number from 0 on")
    for name in ("train_seconds", "before", "best_score"):
        value = getattr(state, name)
        if not (isinstance(value, (int, float)) or (value is None and name != "train_seconds")):
            raise _Damage(f"{STATE_FILE}: {name}={shown(value)} is not a number")
    for name, kind in (("fixed", object), ("files", int), ("sha256", str)):
        value = getattr(state, name)
        if not isinstance(value, dict) or not all(isinstance(each, kind) for each in value.values()):
            raise _Damage(f"{STATE_FILE}: {name} has the wrong type")


def _checksum(content: dict[str, Any]) -> str:
    """The checksum of a state, whatever the file's whitespace."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_files(folder: Path, state: TrainerState, names: list[str], sums: bool) -> None:
    """Check that files of the checkpoint have their lengths and, with `sums`, their checksums."""
    for name in names:
        path, size = folder / name, state.files[name]
        if not path.is_file():
            raise _Damage(f"{name} is missing")
        if path.stat().st_size != size:
            raise _Damage(f"{name} has {path.stat().st_size:,} bytes instead of {size:,}")
    # Format 1 has no checksums.
    names = [name for name in names if name in state.sha256] if sums else []
    try:
        found = sha256_sums(folder / name for name in names)
    except OSError as error:
        raise _Damage(f"{error.filename}: {error.strerror}") from None
    for name, checksum in zip(names, found, strict=True):
        if checksum != state.sha256[name]:
            raise _Damage(f"{name} was changed after it was written: its SHA-256 is not the one in {STATE_FILE}")


def verify_model(folder: Path) -> None:
    """Raise a UserError if `folder` is a checkpoint whose weights were changed, or which a newer version wrote."""
    if not (folder / STATE_FILE).is_file():
        return
    try:
        state = _parse_state(folder)
        weights = [name for name in state.files if name.endswith(".safetensors") and name not in RUN_FILES]
        _check_files(folder, state, weights, sums=True)
    except _Damage as damage:
        raise UserError(f"model_name_or_path={str(folder)!r} is damaged: {damage}") from None


def find_checkpoint(run_folder: Path, config: GRPOConfig) -> tuple[Path, TrainerState] | None:
    """The newest checkpoint and its state, or None; a UserError if it is damaged, or that of another run."""
    found = checkpoints(run_folder)
    if not found:
        return None
    state = read_state(found[-1])
    check_same(found[-1], state.fixed, fixed_fields(config))
    # Epochs become steps when the rows are known, and are compared then.
    if state.step > config.max_steps != UNSET:
        raise UserError(f"max_steps={config.max_steps} is less than the {state.step} steps of {found[-1]}")
    with _reading(found[-1]):
        _check_files(found[-1], state, list(state.files), sums=True)
    return found[-1], state


def fixed_fields(config: GRPOConfig) -> dict[str, Any]:
    """The fields that a resumed run must not change, as they are read back from JSON."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_FIELDS}
    return json.loads(json.dumps(values))


def fingerprint(encoded: list[list[int]]) -> str:
    """The number of prompts and a checksum of their tokens."""
    checksum = 0
    for ids in encoded:
        checksum = zlib.crc32(array("q", [len(ids), *ids]).tobytes(), checksum)
    return f"{len(encoded)} prompts ({checksum:08x})"


def check_same(folder: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise a UserError for the first value in which a resumed run differs from the one that wrote the checkpoint.

    Only its learning_rate may be smaller.
    """
    for name, value in now.items():
        if name not in saved or saved[name] == value or (name == "learning_rate" and value < saved[name]):
            continue
        allowed = "that value or a smaller one" if name == "learning_rate" else "that value"
        raise UserError(
            f"{name}={value!r} is not that of {folder}, {saved[name]!r}: a resumed run keeps its settings; "
            f"take {allowed}, or another output_dir for a new run"
        )


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of ``NAME.safetensors``; a UserError if the file cannot be read."""
    with _reading(folder, OSError, SafetensorError):
        return load_file(folder / f"{name}.safetensors")


def load_weights(folder: Path, model: nn.Module) -> None:
    """Load the weights into `model` (for a PeftModel into its adapter), bit for bit; a UserError if they do not fit."""
    load = _load_adapter if hasattr(model, "get_base_model") else _load_model
    with _reading(folder, OSError, ValueError, RuntimeError, SafetensorError):
        load(folder, model)


def _load_model(folder: Path, model: nn.Module) -> None:
    # By from_pretrained, since transformers may name or join the tensors in the file differently from the model.
    loaded, report = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"it lacks the weights {', '.join(sorted(report['missing_keys'])[:3])}")
    own = model.state_dict()
    model.load_state_dict({name: cut_like(tensor, own[name]) for name, tensor in loaded.state_dict().items()})


def _load_adapter(folder: Path, model: nn.Module) -> None:
    import peft

    weights = peft.load_peft_weights(str(folder), device="cpu")
    own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    if weights.keys() != own.keys():
        raise ValueError(f"it lacks or adds the weights {', '.join(sorted(weights.keys() ^ own.keys())[:3])}")
    peft.set_peft_model_state_dict(model, {name: cut_like(tensor, own[name]) for name, tensor in weights.items()})


def checkpoint_bytes(model: nn.Module, config: GRPOConfig) -> int:
    """Bytes of one checkpoint: the weights (or only the adapter's), two moments, and a reference policy that moves."""
    trained = [p for p in model.parameters() if p.requires_grad]
    saved = trained if config.use_peft else list(model.parameters())
    weights = sum(p.numel() * p.element_size() for p in saved)
    # float32 moments and, offloaded, float32 weights; 8-bit moments have a float32 scale for every 256 of them.
    each = {"adamw_torch_fused": 12 if config.optim_offload else 8}.get(config.optim, 2 * (1 + 4 / 256))
    reference = weights if config.sync_ref_model else 0
    return weights + reference + math.ceil(each * sum(p.numel() for p in trained))


def check_space(model: nn.Module, folder: Path, config: GRPOConfig) -> None:
    """Raise a UserError unless the disk has room for the checkpoints to keep and the one being written."""
    saves = math.ceil(config.max_steps / config.save_steps) if config.save_steps else 1
    saves += math.ceil(config.max_steps / config.eval_steps) if config.keep_best else 0
    count, size = min(config.save_total_limit + 1 + config.keep_best, saves), checkpoint_bytes(model, config)
    written = sum(path.stat().st_size for old in checkpoints(folder) for path in old.rglob("*"))
    free = shutil.disk_usage(folder).free
    if free + written < count * size:
        raise UserError(
            f"output_dir={str(folder)!r}: the disk has {free / 2**20:,.1f} MiB left, and {count} "
            f"checkpoint{'s take' if count > 1 else ' takes'} {count * size / 2**20:,.1f} MiB"
            + ("; lower save_total_limit" if count > 1 else "")
        )
