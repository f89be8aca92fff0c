"""Build the API reference from the docstrings with pdoc.

python docs/build_api.py [FOLDER]     # default: build/api
"""

import importlib
import sys
import warnings
from pathlib import Path

import pdoc

from grpo_fast.errors import UserError

MODULES = (
    "grpo_kernels",
    "grpo_fast",
    "grpo_fast.rewards",
    "grpo_fast.integrations.cs336",
    "grpo_fast.integrations.liger",
    "grpo_fast.integrations.trl",
    "grpo_fast.integrations.verl",
)


def build(folder: Path) -> list[str]:
    """Write a page for each module, and return a line for each one that was left out for want of a library."""
    found, left_out = [], []
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except UserError as error:
            left_out.append(f"left out {name}: {error}")
            continue
        found.append(name)
        # pdoc does not see names that a package imports only when they are asked for.
        for public in getattr(module, "__all__", ()):
            setattr(module, public, getattr(module, public))
    # Of the constructors that NamedTuple generates.
    warnings.filterwarnings("ignore", "Error parsing type annotation", UserWarning)
    pdoc.render.configure(docformat="google")
    # A package brings its submodules; only those of the table are public.
    pdoc.pdoc(*MODULES[:2], r"!grpo_(kernels|fast)\..+", *found[2:], output_directory=folder)
    return left_out


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "build/api")
    for line in build(target):
        print(line)
    print(target / "index.html")
