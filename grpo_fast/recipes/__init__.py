"""Complete configurations that ship with the package: ``grpo-fast train sort``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from grpo_fast.errors import UserError, nearest, say
from grpo_fast.files import user_path

_FOLDER = Path(__file__).parent
RECIPES = {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}
# Those of commands with a configuration of their own, by the command.
OWN_RECIPES = {
    command: {path.stem: path for path in sorted((_FOLDER / command).glob("*.yaml"))} for command in ("sft", "distill")
}


def find_config(name: str, command: str = "train") -> Path:
    """The file of a shipped recipe of `command`, by its name, or of a configuration, by its path.

    A file in the current folder needs a suffix or a folder (``./name``), so that it cannot be confused with a recipe.

    Raises:
        UserError: `name` is neither the name of a recipe nor the path of a file.
    """
    path, known = user_path(name), OWN_RECIPES.get(command, RECIPES)
    if name in known:
        return known[name]
    if path.parent.name == "examples" and path.stem in RECIPES and not path.exists():
        # Where the recipes were before they shipped with the package.
        say(f"note: {name} is the recipe {path.stem!r} of this package", file=sys.stderr)
        return RECIPES[path.stem]
    if os.sep in name or path.suffix in (".yaml", ".yml") or (path.suffix and path.is_file()):
        return path
    raise UserError(
        f"{name!r} is not a recipe{nearest(name, known)}; there is: {', '.join(known)}; give a file with its "
        f"suffix or folder: {name}.yaml or ./{name}"
    )


def describe_recipes() -> str:
    """A line for each recipe, those of `train` first: its name and the comment at the top of its file."""
    width = max(len(name) for known in (RECIPES, *OWN_RECIPES.values()) for name in known)
    lines = _lines(RECIPES, width)
    for command, known in OWN_RECIPES.items():
        lines += ["", f"grpo-fast {command} takes these:", "", *_lines(known, width)]
    return "\n".join(lines)


def _lines(recipes: dict[str, Path], width: int) -> list[str]:
    lines = [(name, path.read_text(encoding="utf-8").partition("\n")[0]) for name, path in recipes.items()]
    return [f"  {name.ljust(width)}  {first.removeprefix('# ')}" for name, first in lines]
