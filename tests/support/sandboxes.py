"""Runs attacks as root or as an ordinary user in another process, and reports which ones did harm."""

import ctypes
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from grpo_fast.rewards.sandbox import isolation
from support.attacks import PROLOGUE

# Before the user changes: the new one may lack access to it.
with suppress(ImportError):
    import seccompy.syscalls  # noqa: F401

ROOT = sys.platform.startswith("linux") and os.getuid() == 0
USERS = ["root", "ordinary"] if ROOT else ["ordinary"]
NOBODY = 65534
PR_SET_DUMPABLE = 4
LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]


def as_user(user: str, function: Callable[..., object], *arguments: object) -> object:
    """What `function` returns, after conversion to JSON and back, in a process of `user`."""
    interpreter = None if user == "root" or not ROOT else python_for_all()
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        try:
            if interpreter:
                become_nobody(interpreter)
            answer = {"returned": function(*arguments)}
        except BaseException as error:
            answer = {"raised": f"{type(error).__name__}: {error}"}
        with open(writing, "w") as file:
            json.dump(answer, file)
        os._exit(0)
    os.close(writing)
    with open(reading) as file:
        answer = json.load(file)
    os.waitpid(process, 0)
    assert "raised" not in answer, answer["raised"]
    return answer["returned"]


def become_nobody(interpreter: str) -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    # Like other processes of an ordinary user, it can be inspected by that user's processes.
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
    os.chdir("/")
    isolation.python = lambda: interpreter
    for cached in (isolation.readable_paths, isolation.obstacle):
        cached.cache_clear()


def python_for_all() -> str:
    """An interpreter of this version that every user may run."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for path in (os.path.realpath(sys.executable), shutil.which(version, path="/usr/bin:/usr/local/bin")):
        with suppress(OSError, subprocess.CalledProcessError):
            command = [path or "", "-S", "-c", "import ssl"]
            subprocess.run(command, cwd="/", user=NOBODY, group=NOBODY, extra_groups=[], check=True)
            return path
    pytest.skip(f"no {version} that an ordinary user can run")


def require_level(user: str, level: str) -> None:
    """Skip the test if a level does not work on this machine."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the sandbox is made for Linux")
    reason = as_user(user, isolation.obstacle, level)
    if reason:
        pytest.skip(f"{level}: {reason}")


def harmful(programs: dict[str, str], run: Callable[[str], bool]) -> list[str]:
    """The programs that did harm.

    Args:
        run: whether a program, whose function ``done`` is called by a test, passes.
    """
    os.environ["GRPO_FAST_SECRET"] = "secret"
    place = Path(tempfile.mkdtemp(prefix="outside-", dir="/tmp"))
    place.chmod(0o777)
    secret = place / "secret"
    servers = [socket.create_server(("127.0.0.1", 0)), socket.socket(type=socket.SOCK_DGRAM)]
    port = servers[0].getsockname()[1]
    servers[1].bind(("127.0.0.1", port))
    for name, kind in (
        (f"{place}/socket", socket.SOCK_STREAM),
        (f"{place}/datagrams", socket.SOCK_DGRAM),
        (f"\0{place}", socket.SOCK_STREAM),
    ):
        servers.append(socket.socket(socket.AF_UNIX, kind))
        servers[-1].bind(name)
        if kind == socket.SOCK_STREAM:
            servers[-1].listen()
        if name[0] != "\0":
            os.chmod(name, 0o777)
    victim, found = None, []
    for name, program in programs.items():
        if victim is None:
            victim = subprocess.Popen(["sleep", "1000"], start_new_session=True)
            secret.write_text("secret")
            secret.chmod(0o666)
            known = f"VICTIM, SECRET, PLACE, PORT = {victim.pid}, {str(secret)!r}, {str(place)!r}, {port}\n"
            before = settings(victim.pid), contents(place)
        passed = run(f"{PROLOGUE}{known}{program}\ndef done(): return True\n")
        unharmed = victim.poll() is None and (settings(victim.pid), contents(place)) == before
        if passed or not unharmed:
            found.append(name if passed else f"{name} (unnoticed)")
        if not unharmed:
            victim.kill()
            victim.wait()
            victim = None
            for left in set(os.listdir(place)) - {"secret", "socket", "datagrams"}:
                subprocess.run(["rm", "-rf", str(place / left)], check=True)
    if victim:
        victim.kill()
        victim.wait()
    for server in servers:
        server.close()
    shutil.rmtree(place)
    return found


def settings(process: int) -> list:
    """The settings of a process that other processes could change."""
    try:
        limits = [resource.prlimit(process, kind) for kind in LIMITS]
        adjustment = Path(f"/proc/{process}/oom_score_adj").read_text()
        affinity, scheduler = os.sched_getaffinity(process), os.sched_getscheduler(process)
        return [limits, sorted(affinity), os.getpriority(os.PRIO_PROCESS, process), scheduler, adjustment]
    except ProcessLookupError:
        return []


def contents(place: Path) -> list:
    return sorted((path.name, path.stat().st_mode, path.stat().st_size) for path in place.iterdir())
