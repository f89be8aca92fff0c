"""Functions of the user that a configuration names: rewards, losses and advantages."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo_fast.errors import UserError, one_line
from grpo_fast.files import user_path

# Folders of the files loaded so far.
_FOLDERS: set[Path] = set()


def names_function(name: str) -> bool:
    """Whether `name` has the form of a dotted path or of ``file.py:function``."""
    path, _, attribute = name.rpartition(":" if ":" in name else ".")
    return bool(path) and attribute.isidentifier()


def split_names(text: str) -> list[str]:
    """The names in a text with commas between them; commas in parentheses or quotes belong to a name's arguments."""
    names, depth, quote = [""], 0, ""
    for before, character in zip(" " + text, text, strict=False):
        if quote:
            quote = quote * (character != quote or before == "\\")
        elif character in "\"'" and depth:
            quote = character
        else:
            depth += (character == "(") - (character == ")")
        if character == "," and not depth and not quote:
            names.append("")
        else:
            names[-1] += character
    return [name.strip() for name in names if name.strip()]


def time_of_change(name: str) -> float:
    """When the file of ``file.py:function`` was last changed; 0 for a dotted path, or without the file."""
    file = user_path(name.rpartition(":")[0])
    return file.stat().st_mtime if ":" in name and file.is_file() else 0.0


def load_function(name: str, field: str, accepts: Callable[[Any], bool] = callable) -> Any:
    """Load what ``package.module.function``, also from the current folder, or ``path/to/file.py:function`` names.

    The file may import its neighbours. `field` is the field of the configuration that holds the name, for errors;
    `accepts` tells whether what was found can be used.

    Raises:
        UserError: there is no such module, file or function, or its module fails when it is imported.
    """
    path, _, attribute = name.rpartition(":" if ":" in name else ".")
    try:
        module = _load_file(path, field) if ":" in name else _import_module(path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{field}: {name!r} cannot be loaded: {type(error).__name__}: {one_line(error)}") from None
    function = getattr(module, attribute, None)
    if not accepts(function):
        raise UserError(f"{field}: {name!r} names no function: {module.__name__} has no callable {attribute!r}")
    return function


def _load_file(path: str, field: str) -> ModuleType:
    file = user_path(path)
    if not file.is_file():
        raise UserError(f"{field}: no such file: {path}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None:
        raise UserError(f"{field}: {path} is not a Python file")
    _check_neighbours(file.parent.resolve(), field)
    _extend_path(file.parent)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check_neighbours(folder: Path, field: str) -> None:
    """Python imports one module per name: a second file would silently get the first one's neighbour."""
    _FOLDERS.add(folder)
    for path in folder.iterdir():
        loaded = Path(getattr(sys.modules.get(path.stem), "__file__", None) or path).resolve()
        if loaded.parent != folder and loaded.parent in _FOLDERS:
            raise UserError(f"{field}: {loaded} and {path} are modules of the same name; rename one of them")


def _import_module(module: str) -> ModuleType:
    _extend_path(Path.cwd())
    return importlib.import_module(module)


def _extend_path(folder: Path) -> None:
    if str(folder.resolve()) not in sys.path:
        sys.path.append(str(folder.resolve()))
