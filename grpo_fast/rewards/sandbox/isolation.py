"""The levels at which this machine can contain generated code, what each needs, and how a sandbox is started."""

from __future__ import annotations

import ctypes
import marshal
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from grpo_fast.errors import UserError, one_line
from grpo_fast.rewards.sandbox import confine
from grpo_fast.rewards.sandbox.system_calls import filter_program, numbers


class Level(NamedTuple):
    """A way to contain generated code: whether it `holds` a malicious program back from other processes, the network
    and files, whether it is `filtered` by system calls, what it `says` in the log, and how to get what it `needs`."""

    name: str
    holds: bool
    filtered: bool
    says: str
    needs: str


NAMESPACES = "a kernel that lets ordinary users make namespaces (user.max_user_namespaces above 0, Linux 5.12)"
SECCOMP = "pip install 'grpo-fast[train]', on x86-64 or ARM64"
# From the best to the worst.
LEVELS = (
    Level("bubblewrap", True, True, "in bubblewrap, with a system call filter", "apt-get install bubblewrap"),
    Level("namespaces", True, True, "in its own namespaces, with a system call filter", NAMESPACES),
    Level("seccomp", False, True, "in a process with a system call filter, but without namespaces", SECCOMP),
    Level(
        "rlimits", False, False, "in a process with resource limits only, which can signal this user's others", "Linux"
    ),
)

# Reads the modules and the setup from standard input, and leaves the rest there.
_START = """
import marshal, os, sys
def read(size):
    data = b""
    while len(data) < size:
        part = os.read(0, size - len(data))
        if not part:
            os._exit(1)
        data += part
    return data
modules, setup = marshal.loads(read(int.from_bytes(read(8), "big")))
for name, code in modules:
    module = sys.modules[name] = type(sys)(name)
    exec(code, vars(module))
module.main(setup)
"""
LONGEST_VERDICT = 1000
# Root runs programs as one of these users, which own nothing.
_FIRST_USER, _USERS = 20000, 40000


class Outcome(NamedTuple):
    """The result of a run: ``passed``, ``failed``, ``unused`` (the tests did not use the program), ``late`` (no verdict
    before the deadline or the end of its process) or ``broken`` (the sandbox did not start); and details of the last
    three."""

    verdict: str
    detail: str = ""


@cache
def readable_paths() -> list[str]:
    """The paths a Python program reads: Python and the system's libraries. No path lies inside another."""
    wanted = {"/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/nix/store", sys.base_prefix, sys.base_exec_prefix}
    wanted |= {os.path.dirname(os.__file__), python()}
    found = sorted(path for path in wanted if os.path.exists(path))
    return [path for path in found if not any(path.startswith(f"{other}/") for other in found)]


def python() -> str:
    """The interpreter itself, without the virtual environment around it."""
    return os.path.realpath(sys.executable)


@cache
def _modules() -> list[tuple[str, bytes]]:
    """The code that runs inside, compiled: importing it there would be slower, and its files may be unreadable."""
    sources = [Path(__file__).with_name(f"{name}.py") for name in ("wire", "judging", "confine")]
    return [
        (f"{__package__}.{path.stem}", compile(path.read_bytes(), path.name, "exec", dont_inherit=True))
        for path in sources
    ]


def _command(level: str) -> list[str]:
    start = [python(), "-P", "-s", "-S", "-B", "-c", _START]
    if level != "bubblewrap":
        return start
    # Bubblewrap creates the folders above a mount with mode 0700, which other users cannot pass.
    above = sorted({str(one) for path in (*readable_paths(), *confine.DEVICES) for one in Path(path).parents} - {"/"})
    folders = [word for path in above for word in ("--perms", "0755", "--dir", path)]
    binds = [word for path in readable_paths() for word in ("--ro-bind", path, path)]
    devices = [word for path in confine.DEVICES for word in ("--dev-bind", path, path)]
    # The sandbox needs these to bound its folder, and root to become another user; then it drops them.
    rights = ["CAP_SYS_ADMIN", *(["CAP_SETUID", "CAP_SETGID"] if os.getuid() == 0 else [])]
    return [
        "bwrap", "--die-with-parent", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts",
        *([] if os.getuid() == 0 else ["--unshare-user"]), *folders, *binds, *devices,
        "--perms", "0777", "--size", str(confine.FOLDER_SIZE), "--tmpfs", confine.FOLDER, "--remount-ro", "/",
        *(word for right in rights for word in ("--cap-add", right)), "--chdir", confine.FOLDER, "--", *start,
    ]  # fmt: skip


def run(
    level: str, code: str, tests: str, cases: list[tuple[str, str]], seconds: float, tested: Collection[str] = ()
) -> Outcome:
    """Judge a program at a level, by name, within `seconds`.

    `tests` is code that uses the program's names, `cases` are pairs of input and output of the program as a script, and
    `tested` are names of Python's functions and modules that mean the program's in `tests`.
    """
    deadline = time.monotonic() + seconds
    filtered = next(one.filtered for one in LEVELS if one.name == level)
    spaces = level in ("bubblewrap", "namespaces")
    setup = {
        "level": level,
        "user": _FIRST_USER + os.getpid() % _USERS,
        "parent": 0 if level == "bubblewrap" else os.getpid(),
        "seconds": int(seconds),
        "readable": readable_paths(),
        "filter": filter_program(spaces) if filtered else b"",
        "pivot_root": numbers()["pivot_root"] if filtered else 0,
        "processes": 0 if spaces or os.getuid() == 0 or not filtered else _processes(),
    }
    start = marshal.dumps((_modules(), setup))
    request = len(start).to_bytes(8, "big") + start + marshal.dumps((code, tests, cases, list(tested)))
    with _folder(needed=not spaces) as folder, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            _command(level),
            # A fixed hash seed makes the order of sets, and so the reward, reproducible.
            env={"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "PATH": os.environ.get("PATH", os.defpath)},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        answer = b""
        try:
            with suppress(BrokenPipeError), process.stdin:
                process.stdin.write(request)
            answer = _read(process.stdout.fileno(), deadline)
        finally:
            number, started, verdict = answer.partition(b"\n")
            # The program may have left the process group. Its number cannot be reused before its parent ends.
            with suppress(ProcessLookupError, ValueError, PermissionError):
                if not spaces:
                    os.kill(int(number), signal.SIGKILL)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
        if not started:
            errors.seek(0)
            lines = errors.read(10000).decode(errors="replace").strip().splitlines()
            return Outcome("broken", one_line(lines[-1] if lines else "it does not start", 120))
    word, _, detail = verdict.decode(errors="replace").partition(" ")
    return Outcome(word or "late", detail)


def _read(file: int, deadline: float) -> bytes:
    """Read until the end of the file, the deadline, or LONGEST_VERDICT bytes."""
    answer = b""
    with selectors.DefaultSelector() as selector:
        selector.register(file, selectors.EVENT_READ)
        while len(answer) < LONGEST_VERDICT and selector.select(max(deadline - time.monotonic(), 0)):
            part = os.read(file, LONGEST_VERDICT)
            if not part:
                break
            answer += part
    return answer


@contextmanager
def _folder(needed: bool) -> Iterator[str]:
    """An empty folder for a program, which is removed afterwards with everything in it."""
    if not needed:
        # In namespaces, the folder is in memory and disappears with them.
        yield "/"
        return
    folder = tempfile.mkdtemp(prefix="grpo-fast-")
    try:
        yield folder
    finally:
        # Not shutil first: folders can be nested more deeply than Python can recurse.
        if subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL).returncode:
            subprocess.run(["chmod", "-R", "u+rwX", folder], stderr=subprocess.DEVNULL)
            shutil.rmtree(folder, ignore_errors=True)


def _processes() -> int:
    """The number of this user's processes and threads, which count towards its limit."""
    user, count = os.getuid(), 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            count += len(os.listdir(process / "task")) if process.stat().st_uid == user else 0
    return count


@cache
def obstacle(level: str) -> str:
    """Why a level does not work on this machine; empty if a trial of it succeeds."""
    if level == "bubblewrap" and not shutil.which("bwrap"):
        return "bwrap is not installed"
    try:
        for check, (code, tests, verdict) in _PROBES.items():
            token = secrets.token_hex(8)
            found = run(level, code, tests.replace("TOKEN", token), [], 30.0)
            if found.verdict != verdict:
                return found.detail if found.verdict == "broken" else check
    except UserError as error:
        return str(error)
    except OSError as error:
        return one_line(error)
    return ""


_PROBES = {
    "a harmless program fails in it": (
        "import collections, heapq, json, random, re\nopen('file', 'w').close()\ndef same(text): return text",
        "import re\nassert re.match('TOKEN', same('TOKEN'))",
        "passed",
    ),
    "processes cannot be limited in it": (
        "import os\nif not os.fork():\n    os._exit(0)\ndef same(text): return text",
        "assert same('TOKEN') == 'TOKEN'",
        "failed",
    ),
}


def has_landlock() -> bool:
    """Whether the kernel can limit the files of a process that is in no namespaces."""
    return ctypes.CDLL(None).syscall(confine.LANDLOCK_CREATE, None, 0, 1) > 0


def choose(code_isolation: str, obstacle: Callable[[str], str] = obstacle) -> tuple[str, str]:
    """The best level that works on this machine and that `code_isolation` allows, and a line about it for the log.

    Args:
        code_isolation: ``strict``: a level that contains malicious programs; ``available``: the best one here;
            ``none``: resource limits only; or a level by name. UserError if there is none.
        obstacle: why a level does not work on this machine, or an empty string.
    """
    if not sys.platform.startswith("linux"):
        raise UserError("unit_tests runs generated code under Linux only")
    choices = {"strict": [level for level in LEVELS if level.holds], "available": LEVELS, "none": LEVELS[-1:]}
    wanted = {**choices, **{level.name: [level] for level in LEVELS}}.get(code_isolation)
    if wanted is None:
        raise UserError(f"code_isolation={code_isolation!r} is not allowed: it must be one of {', '.join(choices)}")
    missing = []
    for level in wanted:
        reason = obstacle(level.name)
        if not reason:
            note = f"unit_tests: generated code runs {level.says}"
            if not level.holds and not has_landlock():
                note += "; it can read and write this user's files because this kernel has no Landlock"
            return level.name, note + "; for more: " * bool(missing) + ", or ".join(missing)
        missing.append(f"{level.name} ({reason}: {level.needs})")
    raise UserError(
        f"code_isolation={code_isolation!r}: unit_tests cannot run generated code like that on this machine: "
        + ", ".join(missing)
    )
