"""The oldest versions that pyproject.toml allows, as constraints for pip.

torch and triton are left out unless ``--torch`` is given, because PyPI's builds of an old torch include CUDA.
"""

import re
import sys
import tomllib
from pathlib import Path


def oldest(project: dict) -> dict[str, str]:
    """The lower bound of each requirement of the package and of its extra `train`."""
    requirements = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    return dict(re.match(r"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)", line).groups() for line in requirements)


if __name__ == "__main__":
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    for name, version in oldest(tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]).items():
        if name not in ("torch", "triton") or "--torch" in sys.argv:
            print(f"{name}=={version}")
