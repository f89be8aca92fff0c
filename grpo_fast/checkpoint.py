"""Checkpoints: everything that decides the rest of a run, in a folder that appears only when it is whole.

``checkpoint-N/`` holds what `from_pretrained` loads (the model and its tokenizer; of an adapted model the adapter
alone) and beside it ``trainer_state.json``, ``optimizer.safetensors`` and ``rng.safetensors``, and with
`sync_ref_model` the reference policy's weights, ``reference.safetensors``. It is written under another name, synced to
the disk and renamed. A learning rate follows from the step and needs no state.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import shutil
import zlib
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import CheckpointError, UserError, one_line
from grpo_fast.files import discard, sync
from grpo_fast.metrics import json_ready
from grpo_fast.sharding import cut_like

STATE_FILE = "trainer_state.json"

# Fields that a resumed run may change: where and how much it writes, how long it goes on, and how the same figures are
# computed. The learning rate follows the schedule of the new max_steps.
FREE_FIELDS = frozenset(
    {
        "output_dir",
        "run_name",
        "max_steps",
        "logging_steps",
        "log_completions_steps",
        "eval_steps",
        "keep_best",
        "report_to",
        "reward_timeout",
        "on_reward_error",
        "code_isolation",
        "save_steps",
        "save_total_limit",
        "resume_from_checkpoint",
        "max_tokens_per_microbatch",
        "max_tokens_per_generation_batch",
        "max_buffer_mib",
        "gradient_checkpointing",
        "activation_offloading",
        "use_liger_kernel",
        "tiled_mlp",
        "attn_implementation",
        "fsdp",
        "padding_free",
        "share_prompts",
        "use_cpu",
        "trust_remote_code",
        "vllm_mode",
        "vllm_server_base_url",
        "vllm_server_host",
        "vllm_server_port",
        "vllm_server_timeout",
        "vllm_max_model_length",
        "vllm_gpu_memory_utilization",
        "vllm_enable_sleep_mode",
        "sync_tolerance",
    }
)


@dataclass
class TrainerState:
    """``trainer_state.json``.

    Args:
        step: optimizer steps that were taken.
        num_tokens: tokens of prompts and completions that were trained on.
        num_prompts: prompts that were drawn from the training rows.
        train_seconds: time of the steps, seconds.
        before: score on the held-out prompts before training, None where it is not a number.
        fixed: what the resumed run must have in common with this one.
        best_step: the step with the best score on the held-out prompts so far, 0 for none.
        best_score: its score, None for none.
        files: bytes of every other file of the checkpoint.
    """

    step: int
    num_tokens: int
    num_prompts: int
    train_seconds: float
    before: float | None
    fixed: dict[str, Any]
    best_step: int = 0
    best_score: float | None = None
    files: dict[str, int] = field(default_factory=dict)


def checkpoints(run_folder: Path) -> list[Path]:
    """The run's checkpoints, by their steps."""
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
    """Write `model` (a PeftModel: its adapter), `tokenizer`, each of `tensors` as ``NAME.safetensors``, and `state`.

    A sharded model's `weights` are given, whole.

    Raises:
        CheckpointError: the disk is full or cannot be written to; other checkpoints are as they were.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if hasattr(model, "get_base_model"):
            # Otherwise peft asks the hub whether the embeddings were resized.
            model.save_pretrained(partial, save_embedding_layers=False, state_dict=weights)
        else:
            model.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        for name, content in tensors.items():
            save_file(content, partial / f"{name}.safetensors")
        files = {str(path.relative_to(partial)): path.stat().st_size for path in partial.rglob("*") if path.is_file()}
        text = json.dumps(json_ready(dataclasses.asdict(dataclasses.replace(state, files=files))), indent=2)
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


def keep_newest(run_folder: Path, limit: int, best_step: int = 0) -> None:
    """Remove all checkpoints but the newest `limit` and that of `best_step`."""
    for folder in checkpoints(run_folder)[:-limit]:
        if folder.name != f"checkpoint-{best_step}":
            discard(folder)


def read_state(folder: Path) -> TrainerState:
    """The state of a checkpoint whose files are all there, as long as they were written.

    Raises:
        UserError: they are not.
    """
    try:
        state = TrainerState(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
        sizes = dict(state.files)
    except OSError as error:
        raise damaged(folder, f"{STATE_FILE}: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise damaged(folder, f"{STATE_FILE}: {one_line(error)}") from None
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            raise damaged(folder, f"{name} is missing")
        if path.stat().st_size != size:
            raise damaged(folder, f"{name} has {path.stat().st_size:,} bytes instead of {size:,}")
    return state


def find_checkpoint(run_folder: Path, config: GRPOConfig) -> tuple[Path, TrainerState] | None:
    """The newest checkpoint and its state; None where the run folder has none.

    Raises:
        UserError: it is damaged, or the configuration is that of another run.
    """
    found = checkpoints(run_folder)
    if not found:
        return None
    state = read_state(found[-1])
    check_same(found[-1], state.fixed, fixed_fields(config))
    if state.step > config.max_steps:
        raise UserError(f"max_steps={config.max_steps} is less than the {state.step} steps of {found[-1]}")
    return found[-1], state


def damaged(folder: Path, reason: str) -> UserError:
    """The error for a checkpoint that cannot be read; it says what remains."""
    older = [path.name for path in checkpoints(folder.parent) if path != folder]
    return UserError(
        f"the checkpoint {folder} is damaged ({reason}); remove that folder to "
        + (f"go on from {older[-1]}" if older else "start from the beginning")
    )


def fixed_fields(config: GRPOConfig) -> dict[str, Any]:
    """The fields that a resumed run must not change, as JSON gives them back."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_FIELDS}
    return json.loads(json.dumps(values))


def fingerprint(encoded: list[list[int]]) -> str:
    """Number of prompts and a checksum of their tokens."""
    checksum = 0
    for ids in encoded:
        checksum = zlib.crc32(array("q", [len(ids), *ids]).tobytes(), checksum)
    return f"{len(encoded)} prompts ({checksum:08x})"


def check_same(folder: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """What a resumed run has in common with the one that wrote the checkpoint.

    Raises:
        UserError: a value differs; the line names it, and both values.
    """
    for name, value in now.items():
        if name in saved and saved[name] != value:
            raise UserError(
                f"{name}={value!r} is not that of {folder}, {saved[name]!r}: a resumed run goes on as it began; "
                "take that value, or another output_dir for a new run"
            )


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of ``NAME.safetensors``.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return load_file(folder / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        raise damaged(folder, f"{name}.safetensors: {one_line(error)}") from None


def load_weights(folder: Path, model: nn.Module) -> None:
    """Give `model` (a PeftModel: its adapter) the checkpoint's weights, bit for bit.

    Raises:
        UserError: they cannot be read, or are those of another model.
    """
    load = _load_adapter if hasattr(model, "get_base_model") else _load_model
    try:
        load(folder, model)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise damaged(folder, one_line(error)) from None


def _load_model(folder: Path, model: nn.Module) -> None:
    # Not the file's tensors by their names: transformers may name or join them otherwise than the model does.
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


def rng_state() -> dict[str, Tensor]:
    """States of the random generators of torch (CPU, and the GPU in use), Python and numpy."""
    _, python, gauss = random.getstate()
    _, keys, *numpy_rest = numpy.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(python),
        # A normal number kept for the next call, or NaN.
        "python_gauss": torch.tensor(math.nan if gauss is None else gauss, dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype("int64")),
        "numpy_rest": torch.tensor(numpy_rest, dtype=torch.float64),
    }
    if torch.cuda.is_initialized():
        state["cuda.0"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Put the generators where `rng_state` found them."""
    gauss = state["python_gauss"].item()
    random.setstate((3, tuple(state["python"].tolist()), None if math.isnan(gauss) else gauss))
    position, has_gauss, cached = state["numpy_rest"].tolist()
    numpy.random.set_state(("MT19937", state["numpy"].numpy().astype("uint32"), int(position), int(has_gauss), cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_initialized() and "cuda.0" in state:
        torch.cuda.set_rng_state(state["cuda.0"])


def checkpoint_bytes(model: nn.Module, config: GRPOConfig) -> int:
    """Bytes of one checkpoint: the weights, or the trained ones where they are an adapter, and AdamW's two moments.

    A reference policy that is refreshed is one more model.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    saved = trained if config.use_peft else list(model.parameters())
    weights = sum(p.numel() * p.element_size() for p in saved)
    # float32 moments and, offloaded, float32 weights; 8-bit ones come with a float32 scale for 256 of them.
    each = {"adamw_torch_fused": 12 if config.optim_offload else 8}.get(config.optim, 2 * (1 + 4 / 256))
    reference = weights if config.sync_ref_model else 0
    return weights + reference + math.ceil(each * sum(p.numel() for p in trained))


def check_space(model: nn.Module, folder: Path, config: GRPOConfig) -> None:
    """The disk must have room for the checkpoints that are there at once: those kept, and the one being written.

    Raises:
        UserError: it does not, or the folder cannot be made.
    """
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise UserError(f"output_dir={str(folder)!r} cannot be created: {there} is not a folder")
    if not os.access(there, os.W_OK):
        raise UserError(f"output_dir={str(folder)!r} cannot be created: {there} is not writable")
    saves = math.ceil(config.max_steps / config.save_steps) if config.save_steps else 1
    saves += math.ceil(config.max_steps / config.eval_steps) if config.keep_best else 0
    count, size = min(config.save_total_limit + 1 + config.keep_best, saves), checkpoint_bytes(model, config)
    written = sum(path.stat().st_size for old in checkpoints(folder) for path in old.rglob("*"))
    free = shutil.disk_usage(there).free
    if free + written < count * size:
        raise UserError(
            f"output_dir={str(folder)!r}: the disk has {free / 2**20:,.1f} MiB left, and {count} "
            f"checkpoint{'s take' if count > 1 else ' takes'} {count * size / 2**20:,.1f} MiB"
            + ("; lower save_total_limit" if count > 1 else "")
        )
