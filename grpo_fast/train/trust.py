"""Which Python code a configuration may run: inside a run's folder it is data, which may come from anywhere.

Its fields can name Python code: the user's rewards, loss and advantages, a model's code, kernels from the hub. Such
fields are accepted only if the command line repeats them, or if this user started that run in that folder on this
machine, which is recorded in a file in the user's own state folder.
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

from grpo_fast.config import ESTIMATOR_NAMES, GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.rewards.registry import is_built_in
from grpo_kernels import PRESETS

# Arguments of `from_pretrained` that fetch or run code.
_CODE_ARGUMENTS = {"trust_remote_code", "code_revision", "attn_implementation", "allow_all_kernels", "use_kernels"}
_CODE_ARGUMENTS |= {"kernel_config"}
# Fields that name functions of the user.
FUNCTION_FIELDS = ("reward_funcs", "loss_type", "advantage_estimator")
# Files that show that a run or an evaluation wrote the folder.
_RUN_FILES = ("metrics.jsonl", "samples.jsonl", "settings.json", "summary.json", "trainer_state.json", "checkpoint-*")


def named_code(config: GRPOConfig) -> dict[str, Any]:
    """The fields that make a run execute Python code other than that of this package and the libraries."""
    names_code = {
        "reward_funcs": not all(map(is_built_in, config.reward_funcs)),
        "loss_type": config.loss_type not in PRESETS,
        "advantage_estimator": config.advantage_estimator not in (None, *ESTIMATOR_NAMES),
        "trust_remote_code": config.trust_remote_code,
        "attn_implementation": "/" in (config.attn_implementation or ""),
        "model_init_kwargs": bool(_CODE_ARGUMENTS & set(config.model_init_kwargs or {})),
        "teacher_model_init_kwargs": bool(
            _CODE_ARGUMENTS & set(getattr(config, "teacher_model_init_kwargs", None) or {})
        ),
    }
    return {name: getattr(config, name) for name, does in names_code.items() if does}


def check_code(path: Path, config: GRPOConfig, allowed: Collection[str]) -> None:
    """Refuse Python code that only a configuration inside a run's folder names; the UserError says how to allow it.

    Fields in `allowed`, which the command line names or the command does not use, need no permission.
    """
    folder = path.resolve().parent
    if not any(any(place.glob(name)) for place in (folder, folder.parent) for name in _RUN_FILES):
        return
    code = {name: value for name, value in named_code(config).items() if name not in allowed}
    code = {name: value for name, value in code.items() if not _is_own(folder, name, value)}
    if code:
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in code.items()}
        options = " ".join(f"--{name} {shlex.quote(text)}" for name, text in texts.items())
        raise UserError(
            f"{path} lies in a run's folder that was not written here by you, and it names Python to be run; "
            f"to allow that, add {options}"
        )


def remember_own(folder: Path, config: GRPOConfig) -> None:
    """Record that this user runs, in `folder`, the Python code that `config` names."""
    for name, value in named_code(config).items():
        # Without a home folder, the next command has to name the code again.
        with suppress(OSError, RuntimeError):
            record = _record(folder, name, value)
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(f"{folder.resolve()}\n", encoding="utf-8")


def _is_own(folder: Path, name: str, value: Any) -> bool:
    with suppress(OSError, RuntimeError):
        return _record(folder, name, value).is_file()
    return False


def _record(folder: Path, name: str, value: Any) -> Path:
    """The file of the record; its name hashes the folder, the field and its value, with absolute paths of files."""
    if name in FUNCTION_FIELDS:
        parts = [function.rpartition(":") for function in ([value] if isinstance(value, str) else value)]
        value = [[str(Path(file).expanduser().resolve()) if colon else "", last] for file, colon, last in parts]
    content = json.dumps([str(folder.resolve()), name, value])
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    # A relative path would lead into the current folder, which may come from elsewhere.
    state = state if state.is_absolute() else Path.home() / ".local" / "state"
    return state / "grpo-fast" / "own-runs" / hashlib.sha256(content.encode()).hexdigest()
