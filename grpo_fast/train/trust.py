"""Whose Python a run executes: a configuration inside a run's folder is data, which may come from anywhere.

Its fields can name Python: reward functions of one's own, a model's code, kernels from the hub. They are followed only
where the command line names them again, or where this user started that run in that folder on this machine: then a file
in the user's own state folder says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.rewards.registry import is_built_in

# Arguments of `from_pretrained` that fetch or run code.
_CODE_ARGUMENTS = {"trust_remote_code", "code_revision", "attn_implementation", "allow_all_kernels", "use_kernels"}
_CODE_ARGUMENTS |= {"kernel_config"}
# By what a folder shows that a run or an evaluation wrote it.
_RUN_FILES = ("metrics.jsonl", "samples.jsonl", "settings.json", "summary.json", "trainer_state.json", "checkpoint-*")


def named_code(config: GRPOConfig) -> dict[str, Any]:
    """The fields that make a run execute Python beside this package's and the libraries' own."""
    code: dict[str, Any] = {}
    if not all(map(is_built_in, config.reward_funcs)):
        code["reward_funcs"] = config.reward_funcs
    if config.trust_remote_code:
        code["trust_remote_code"] = True
    if "/" in (config.attn_implementation or ""):
        code["attn_implementation"] = config.attn_implementation
    if _CODE_ARGUMENTS & set(config.model_init_kwargs or {}):
        code["model_init_kwargs"] = config.model_init_kwargs
    return code


def check_code(path: Path, config: GRPOConfig, allowed: Collection[str]) -> None:
    """Refuse Python that is named by a configuration inside a run's folder, and by nobody else.

    Args:
        path: the configuration's file.
        config: as resolved.
        allowed: fields that the command line names, or that nothing comes of.

    Raises:
        UserError: it says which options would allow it.
    """
    folder = path.resolve().parent
    if not any(any(place.glob(name)) for place in (folder, folder.parent) for name in _RUN_FILES):
        return
    code = {name: value for name, value in named_code(config).items() if name not in allowed}
    code = {name: value for name, value in code.items() if not _is_own(folder, name, value)}
    if code:
        options = " ".join(f"--{name} {shlex.quote(json.dumps(value))}" for name, value in code.items())
        raise UserError(
            f"{path} lies in a run's folder that was not written here by you, and it names Python to be run; "
            f"to allow that, add {options}"
        )


def remember_own(folder: Path, config: GRPOConfig) -> None:
    """Record that this user runs, in `folder`, the Python that `config` names."""
    for name, value in named_code(config).items():
        # Without a home, the next command has to name it again.
        with suppress(OSError, RuntimeError):
            record = _record(folder, name, value)
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(f"{folder.resolve()}\n", encoding="utf-8")


def _is_own(folder: Path, name: str, value: Any) -> bool:
    with suppress(OSError, RuntimeError):
        return _record(folder, name, value).is_file()
    return False


def _record(folder: Path, name: str, value: Any) -> Path:
    """The file that says so; its name stands for the folder, the field and its value, with full paths of files."""
    if name == "reward_funcs":
        parts = [reward.rpartition(":") for reward in value]
        value = [[str(Path(file).expanduser().resolve()) if colon else "", last] for file, colon, last in parts]
    content = json.dumps([str(folder.resolve()), name, value])
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    # A relative one would be looked for in the present folder, which may come from elsewhere.
    state = state if state.is_absolute() else Path.home() / ".local" / "state"
    return state / "grpo-fast" / "own-runs" / hashlib.sha256(content.encode()).hexdigest()
