"""What was measured on this machine, kept on disk in ``~/.cache/grpo_kernels`` or ``$GRPO_KERNELS_CACHE``."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")


def cache_folder() -> Path:
    return Path(os.environ.get("GRPO_KERNELS_CACHE") or Path.home() / ".cache" / "grpo_kernels")


class TuningFile(Generic[T]):
    """A JSON file ``{name: value}``, read once by a process.

    A file that is not a JSON object, and entries that `parse` refuses, count as absent, with one warning.

    Args:
        file: its name in the folder.
        parse: makes a value of an entry; raises TypeError or ValueError for a wrong one.
    """

    def __init__(self, file: str, parse: Callable[[Any], T]):
        self.file, self.parse = file, parse
        self._known: dict[Path, dict[str, T]] = {}

    @property
    def path(self) -> Path:
        return cache_folder() / self.file

    def known(self) -> dict[str, T]:
        """The values on disk when this process first read them, and those that it has kept since."""
        path = self.path
        if path not in self._known:
            values, wrong = {}, False
            for name, value in self._read(path).items():
                try:
                    values[name] = self.parse(value)
                except (TypeError, ValueError):
                    wrong = True
            if wrong:
                _warn(f"entries of {path} that are not of this version are ignored, and measured again where needed")
            self._known[path] = values
        return self._known[path]

    def forget(self) -> None:
        """Read the file again when it is next needed."""
        self._known.clear()

    def keep(self, name: str, value: T, entry: Any = None) -> None:
        """Store a value, in this process and on disk, where it is `entry`, or the value itself.

        The file is replaced in one step, so that processes that measure at the same time never read half of it.
        """
        path = self.path
        self.known()[name] = value
        stored = self._read(path, said=True) | {name: value if entry is None else entry}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{os.getpid()}")
            part.write_text(json.dumps(stored, indent=1, sort_keys=True))
            os.replace(part, path)
        except OSError as error:
            # This process keeps its measurements in memory; only the next one measures again.
            _warn(f"measurements cannot be stored in {path} ({error.strerror}); set GRPO_KERNELS_CACHE to a writable "
                  "folder")  # fmt: skip

    def _read(self, path: Path, said: bool = False) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text())
        except OSError:
            return {}
        except ValueError:
            found = None
        if isinstance(found, dict):
            return found
        if not said:
            _warn(f"{path} holds no measurements and is ignored")
        return {}


def _warn(text: str) -> None:
    warnings.warn(f"grpo_kernels: {text}", stacklevel=4)
