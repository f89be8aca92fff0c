"""What a run is measured on, as one line of JSON: device, driver, versions. Run in a process with a time limit, since
a broken driver hangs."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.contenders import BY_NAME
from benchmarks.harness.measure import main, parser, start, version
from grpo_fast.errors import UserError

PACKAGES = ("triton", "transformers", "accelerate", "peft", "trl", "liger-kernel", "cut-cross-entropy", "vllm")
DRIVER = Path("/proc/driver/nvidia/version")


def driver_version() -> str:
    """The NVIDIA driver's version, or an empty string."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()[0]
    found = re.search(r"\b\d{3}\.[\d.]+\d", DRIVER.read_text()) if DRIVER.exists() else None
    return found[0] if found else ""


def describe(device: torch.device) -> dict[str, Any]:
    """Columns that name the GPU; a small computation shows that it works."""
    if device.type == "cpu":
        return {"capability": "cpu", "memory_gib": "", "driver": "", "cuda": ""}
    torch.ones(1024, device=device).sum().item()
    properties = torch.cuda.get_device_properties(device)
    capability = properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return {
        "capability": capability, "memory_gib": f"{properties.total_memory / 2**30:.0f}", "driver": driver_version(),
        "cuda": torch.version.cuda or f"hip {torch.version.hip}",
    }  # fmt: skip


def body() -> None:
    chosen = parser(__doc__.splitlines()[0]).parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"torch {torch.__version__} sees no CUDA device; --device cpu --quick rehearses without one")
    run = start(chosen)
    facts = run.facts()
    columns = {"device": facts["device"], **describe(run.device), "python": platform.python_version()}
    columns |= {"torch": torch.__version__, **{name.replace("-", "_"): version(name) for name in PACKAGES}}
    columns |= {"commit": facts["commit"], "date": facts["date"]}
    print(json.dumps({"facts": columns, "folder": str(run.folder), "contenders": list(BY_NAME)}))


if __name__ == "__main__":
    main(body)
