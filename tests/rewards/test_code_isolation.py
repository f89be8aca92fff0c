"""Containment of generated code: attacks at all levels that work here, as root and as an ordinary user."""

import os
import platform
import re
import subprocess
import sys
import time

import pytest

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.rewards import RewardModel
from grpo_fast.rewards.sandbox import isolation, system_calls
from grpo_fast.rewards.sandbox.isolation import LEVELS, choose
from support.attacks import FOLDER, HARM, HARMLESS, WITHOUT_FILTER
from support.sandboxes import USERS, as_user, harmful, require_level

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox is made for Linux")
NAMES = [level.name for level in LEVELS]
BY_NAME = {level.name: level for level in LEVELS}


def passes(level: str, seconds: float = 10.0):
    return lambda code: isolation.run(level, code, "assert done()", [], seconds).verdict == "passed"


def attacks_on(level: str) -> dict[str, str]:
    if BY_NAME[level].holds:
        return HARM
    if BY_NAME[level].filtered:
        return {name: program for name, program in HARM.items() if not name.startswith("folder")}
    return {name: HARM[name] for name in WITHOUT_FILTER}


@pytest.mark.slow
@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("level", NAMES)
def test_attacks_do_no_harm(user, level):
    if platform.machine() != "x86_64":
        pytest.skip("the attacks use the system call numbers of x86-64")
    require_level(user, level)
    if not BY_NAME[level].holds and not isolation.has_landlock():
        pytest.skip("this kernel has no Landlock, which holds files where there are no namespaces")
    needed = HARMLESS if BY_NAME[level].filtered else {"nothing": "", "a folder": HARMLESS["a folder"]}
    assert as_user(user, harmful, needed, passes(level)) == list(needed)
    assert as_user(user, harmful, attacks_on(level), passes(level)) == []


def test_attacks_are_of_every_kind():
    assert len(HARM) >= 100
    assert set(WITHOUT_FILTER) < set(HARM)
    assert len(WITHOUT_FILTER) >= 40
    assert set(FOLDER) == {"many large files", "ten thousand files"}


# What a program could do to its user's other processes, by names of attacks.
REACHED = {name: HARM[f"processes: {name}"] for name in ("prlimit of files", "affinity", "priority", "scheduler")}


def test_attacks_succeed_without_the_filter():
    """The attacks work without the sandbox, so their failures above are due to it."""
    require_level("ordinary", "rlimits")
    assert as_user("ordinary", harmful, REACHED, passes("rlimits")) == list(REACHED)


FOREVER = {
    "a loop": "while True: pass",
    "sleep": "import time\nwhile True:\n    try:\n        time.sleep(60)\n    except BaseException:\n        pass",
    "ignored signals": "import signal\nfor number in signal.valid_signals() - {9, 19}:\n"
    "    try:\n        signal.signal(number, signal.SIG_IGN)\n    except OSError:\n        pass\nwhile True: pass",
    "a regular expression": "import re\nre.match(r'(a+)+$', 'a' * 60 + 'b')",
    "a number": "x = 9 ** 9 ** 9",
    "another session": "import ctypes, os, sys, time\nfor module in list(sys.modules.values()):\n"
    "    if hasattr(module, 'REFUSED'):\n        module.REFUSED = ('none',)\n"
    "try:\n    os.setsid()\n    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\nexcept OSError:\n    pass\ntime.sleep(600)",
}


@pytest.mark.parametrize("program", FOREVER.values(), ids=FOREVER)
@pytest.mark.parametrize("level", ["bubblewrap", "namespaces", "rlimits"])
def test_endless_program_is_killed_with_its_processes(level, program):
    require_level("root" if os.getuid() == 0 else "ordinary", level)
    before = processes()
    start = time.monotonic()
    assert isolation.run(level, program, "assert done()", [], 0.8).verdict == "late"
    assert time.monotonic() - start < 10
    deadline = time.monotonic() + 10
    while left := [line for line in processes() - before if "marshal" in line or "bwrap" in line]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def processes() -> set[str]:
    listed = subprocess.run(["ps", "-eo", "pid,stat,args"], capture_output=True, text=True, check=True).stdout
    return {line for line in listed.splitlines() if not re.match(r" *\d+ Z", line)}


def missing(*levels):
    """An `obstacle` function for a machine without these levels."""
    return lambda name: "not here" if name in levels else ""


@pytest.mark.parametrize(
    ("code_isolation", "absent", "level", "note"),
    [
        ("available", [], "bubblewrap", r"runs in bubblewrap, with a system call filter$"),
        ("available", NAMES[:1], "namespaces", r"namespaces.*; for more: bubblewrap \(not here: apt-get install bub"),
        (
            "available",
            NAMES[:2],
            "seccomp",
            r"without namespaces; for more: bubblewrap .*, or namespaces \(not here: a k",
        ),
        (
            "available",
            NAMES[:3],
            "rlimits",
            r"resource limits only, .*seccomp \(not here: pip install 'grpo-fast\[train\]",
        ),
        ("strict", [], "bubblewrap", "runs in bubblewrap"),
        ("strict", NAMES[:1], "namespaces", "its own namespaces"),
        ("none", [], "rlimits", r"in a process with resource limits only, which can signal this user's others$"),
    ],
)
def test_choose_best_level_and_note(code_isolation, absent, level, note):
    chosen, line = choose(code_isolation, missing(*absent))
    assert chosen == level
    assert re.search(note, line), line
    assert "\n" not in line


def test_choose_note_without_landlock(monkeypatch):
    monkeypatch.setattr(isolation, "has_landlock", lambda: False)
    assert "it can read and write this user's files" in choose("none", missing())[1]
    assert "files" not in choose("strict", missing())[1]


def test_choose_strict_without_namespaces():
    with pytest.raises(
        UserError, match=r"code_isolation='strict': .* bubblewrap \(not here: .*, namespaces \(not here"
    ):
        choose("strict", missing(*NAMES[:2]))
    with pytest.raises(UserError, match="'available': unit_tests cannot run generated code like that on this machine"):
        choose("available", missing(*NAMES))


def test_choose_unknown_value():
    with pytest.raises(
        UserError, match=r"code_isolation='most' is not allowed: it must be one of strict, available, no"
    ):
        choose("most")
    with pytest.raises(UserError, match="code_isolation"):
        GRPOConfig(model_name_or_path="m", dataset_name="d", reward_funcs=["unit_tests"], code_isolation="most")


def test_reward_model_refuses_strict_before_a_run(monkeypatch):
    monkeypatch.setattr(isolation.choose, "__defaults__", (missing(*NAMES[:2]),))
    with pytest.raises(UserError, match="code_isolation='strict'"):
        RewardModel(["unit_tests"], None, code_isolation="strict")
    model = RewardModel(["unit_tests"], None)
    assert model.settings["code_isolation"] == "seccomp"
    assert "without namespaces" in model.notes[0]
    # The setting does not affect functions that run no generated code.
    assert RewardModel(["exact_answer"], None, code_isolation="strict").notes == []


def test_obstacle_missing_software(monkeypatch, tmp_path):
    check = isolation.obstacle.__wrapped__
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check("bubblewrap") == "bwrap is not installed"
    # A program of that name that does not work.
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'no permissions to create a new namespace' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    assert check("bubblewrap") == "no permissions to create a new namespace"
    monkeypatch.setitem(sys.modules, "seccompy.syscalls", None)
    system_calls.numbers.cache_clear()
    assert "pip install 'grpo-fast[train]'" in check("namespaces")
    system_calls.numbers.cache_clear()


def test_obstacle_of_a_sandbox_without_limits(monkeypatch):
    weak = dict(isolation._modules())
    source = (isolation.Path(isolation.confine.__file__)).read_text()
    for call in ("sys.addaudithook(", "limit(setup)\n"):
        assert f" {call}" in source
        source = source.replace(f" {call}", f" str{call[call.index('(') :]}")
    weak["grpo_fast.rewards.sandbox.confine"] = compile(source, "confine.py", "exec")
    monkeypatch.setattr(isolation, "_modules", lambda: list(weak.items()))
    assert isolation.obstacle.__wrapped__("rlimits") == "processes cannot be limited in it"
