"""Platform-specific modules are imported where they are used, so that everything else works without them."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from grpo_fast.cli import main
from grpo_fast.errors import UserError
from grpo_fast.rewards import RewardModel
from grpo_fast.train import metrics

# Modules of the standard library that Windows lacks, and Triton, which only Linux has.
MISSING = ["_posixsubprocess", "crypt", "curses", "fcntl", "grp", "nis", "ossaudiodev", "posix", "pty", "pwd"]
MISSING += ["readline", "resource", "spwd", "syslog", "termios", "triton", "tty"]

# Other packages may import them.
IMPORT_ALL = """
import builtins, importlib, json, pkgutil, sys
import grpo_fast, grpo_kernels

ours, missing, real = ("grpo_fast", "grpo_kernels"), set(json.loads(sys.argv[1])), builtins.__import__

def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "").split(".")[0]
    if importer in ours and not level and name.split(".")[0] in missing:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return real(name, globals, locals, fromlist, level)

builtins.__import__ = guarded
for name in [name for name in sys.modules if name.split(".")[0] in ours]:
    del sys.modules[name]
failed, count = {}, 0
for package in map(importlib.import_module, ours):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        count += 1
        try:
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
        except BaseException as error:
            failed[module.name] = str(error)
print(json.dumps([count, failed]))
"""
# These modules define Triton's kernels, and are imported when one is needed.
TRITON = "grpo_kernels.triton_kernels"
OPTIONAL = {"trl", "verl", "vllm"}


def test_modules_import_without_platform_packages():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, json.dumps(MISSING)], capture_output=True, text=True, check=True
    )
    count, failed = json.loads(done.stdout.splitlines()[-1])
    assert count > 80
    without = {extra for extra in OPTIONAL if importlib.util.find_spec(extra) is None}
    failed = {
        name: error
        for name, error in failed.items()
        if not (name.startswith(TRITON) and "'triton" in error) and not any(f"'{extra}" in error for extra in without)
    }
    assert failed == {}


def test_isolated_rewards_without_process_limits_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    with pytest.raises(UserError, match=r"reward_funcs: math_answer runs in its own process.*Linux and macOS"):
        RewardModel(["math_answer"], None)
    assert RewardModel(["exact_answer"], None).names == ["exact_answer"]


def test_peak_memory_on_windows(monkeypatch):
    class Process:
        def memory_info(self):
            return type("Info", (), {"peak_wset": 3 << 30})

    assert 0 < metrics.peak_memory(torch.device("cpu"))["memory/peak_rss_gib"] < 1024
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr("psutil.Process", Process)
    assert metrics.peak_memory(torch.device("cpu")) == {"memory/peak_rss_gib": 3.0}


def test_doctor_command(monkeypatch, capsys):
    monkeypatch.setattr("grpo_kernels.doctor.check", lambda: 1)
    assert main(["doctor"]) == 1
    assert main(["doctor", "--fast"]) == 2
    assert "unrecognized arguments: --fast" in capsys.readouterr().err
