"""Complete configurations that ship with the package: ``grpo-fast train sort``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from grpo_fast.errors import UserError, nearest, say
from grpo_fast.files import user_path

RECIPES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}


def find_config(name: str) -> Path:
    """The file of a shipped recipe, by its name, or of a configuration, by its path.

    A file in the current folder needs a suffix or a folder (``./name``), so that it cannot be confused with a recipe.

    Raises:
        UserError: `name` is neither the name of a recipe nor the path of a file.
    """
    path = user_path(name)
    if name in RECIPES:
        return RECIPES[name]
    if path.parent.name == "examples" and path.stem in RECIPES and not path.exists():
        # Where the recipes were before they shipped with the package.
        say(f"note: {name} is the recipe {path.stem!r} of this package", file=sys.stderr)
        return RECIPES[path.stem]
    if os.sep in name or path.suffix in (".yaml", ".yml") or (path.suffix and path.is_file()):
        return path
    raise UserError(
        f"{name!r} is not a recipe{nearest(name, RECIPES)}; there is: {', '.join(RECIPES)}; give a file with its "
        f"suffix or folder: {name}.yaml or ./{name}"
    )


def describe_recipes() -> str:
    """A line for each recipe: its name and the comment at the top of its file."""
    width = max(map(len, RECIPES))
    lines = [(name, path.read_text(encoding="utf-8").partition("\n")[0]) for name, path in RECIPES.items()]
    return "\n".join(f"  {name.ljust(width)}  {first.removeprefix('# ')}" for name, first in lines)
