"""Python processes in which Triton compiles kernels instead of interpreting them."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def compiled(*command: str) -> str:
    """What the process prints. A Triton on PYTHONPATH comes before the installed one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folders = [environment.get("PYTHONPATH"), str(TESTS.parent / "kernels"), str(TESTS)]
    environment["PYTHONPATH"] = os.pathsep.join(folder for folder in folders if folder)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
