"""Packages from a folder of wheels, on a machine that reaches no package index."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from grpo_fast.errors import UserError, one_line

SECONDS = 600


def install_wheels(wheels: Path, base: Path) -> Path:
    """Install all wheels of the folder `wheels` into a folder under `base`, and return that folder.

    Nothing is downloaded, and the environment of the running Python does not change. A folder that is there from an
    earlier call with the same wheels is used again.

    Raises:
        UserError: there are no wheels, or pip refuses one.
    """
    files = sorted(wheels.glob("*.whl"))
    if not files:
        raise UserError(f"--wheels: there is no .whl file in {wheels}")
    named = "\n".join(f"{path.name} {path.stat().st_size}" for path in files)
    site = base / f"site-{hashlib.sha256(named.encode()).hexdigest()[:12]}"
    done = site / "installed.txt"
    if done.exists():
        return site
    command = [
        sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps",
        "--no-compile", "--upgrade", "--target", str(site), *map(str, files),
    ]  # fmt: skip
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"--wheels: pip did not install {wheels} within {SECONDS} s") from None
    if found.returncode:
        lines = [line for line in found.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:] or ["no message"]
        raise UserError(f"--wheels: pip refuses {wheels}: {one_line(errors[0].removeprefix('ERROR: '))}")
    done.write_text(named + "\n", encoding="utf-8")
    return site
