"""Run as a script: executes generated code and its tests in this process, after giving up all it can harm with.

Imports nothing but the standard library. See `grpo_fast.rewards.code` for what is guaranteed.
"""

import ctypes
import json
import os
import resource
import signal
import sys

MEMORY = 1 << 30
FILE_SIZE = 10 << 20
OPEN_FILES = 64

# linux/prctl.h, linux/sched.h, linux/landlock.h; system calls have these numbers on all processors since Linux 5.
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = 0x08000000, 0x10000000, 0x40000000
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8

# Audit events of the network, of other programs and of foreign memory, and those that change the files they name.
REFUSED = ("socket.", "ctypes.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.kill", "pty.")
CHANGES = {
    "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.setxattr", "os.symlink",
    "os.truncate", "os.utime",
}  # fmt: skip


class LandlockRuleset(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("files", "network", "scoped")]


class LandlockPath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("path", ctypes.c_int32)]


def main() -> None:
    request = json.load(sys.stdin.buffer)
    result = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    confine(request["seconds"])
    if passes(request["code"], request["tests"]):
        os.write(result, request["token"].encode())
    os._exit(0)


def passes(code: str, tests: str) -> bool:
    scope = {"__name__": "solution"}
    try:
        exec(compile(code, "solution", "exec"), scope)
        exec(compile(tests, "tests", "exec"), scope)
    except BaseException:
        return False
    return True


def confine(seconds: float) -> None:
    """Leave this process with no privileges, no network, no other processes, and the present folder to write in."""
    libc = ctypes.CDLL(None, use_errno=True)
    library = os.path.dirname(os.__file__)
    stdlib = os.open(library, os.O_RDONLY)
    alone = libc.unshare(CLONE_NEWNET | CLONE_NEWIPC) == 0
    if os.getuid() == 0:
        # Limits on processes do not bind root. An own user keeps runs apart.
        user = 20000 + os.getpid() % 40000
        os.chown(".", user, user)
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    if not alone:
        libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    limits = {
        "CPU": int(seconds) + 1,
        "AS": MEMORY,
        "NPROC": 1,
        "FSIZE": FILE_SIZE,
        "NOFILE": OPEN_FILES,
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    restrict_files(libc, stdlib)
    if not os.access(os.__file__, os.R_OK):
        find_modules_by(library, f"/proc/self/fd/{stdlib}")
    sys.addaudithook(file_guard((library, "/usr", "/lib", "/lib64"), os.getcwd()))


def restrict_files(libc: ctypes.CDLL, stdlib: int) -> None:
    """Landlock, where the kernel has it: read the standard library and the system's, write in the present folder."""
    version = libc.syscall(LANDLOCK_CREATE, None, 0, 1)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if version < 1:
        return
    bits = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    everything = (1 << bits) - 1
    ruleset = LandlockRuleset(everything, 3, 3)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = libc.syscall(LANDLOCK_CREATE, ctypes.byref(ruleset), size, 0)
    reading = EXECUTE | READ_FILE | READ_DIR
    readable = [os.open(path, os.O_RDONLY) for path in ("/usr", "/lib", "/lib64") if os.path.isdir(path)]
    rights = dict.fromkeys([stdlib, *readable], reading)
    rights[os.open(os.devnull, os.O_RDONLY)] = READ_FILE | WRITE_FILE
    rights[os.open(".", os.O_RDONLY)] = everything
    for path, allowed in rights.items():
        libc.syscall(LANDLOCK_ADD, rules, 1, ctypes.byref(LandlockPath(allowed, path)), 0)
    if libc.syscall(LANDLOCK_RESTRICT, rules, 0):
        raise OSError(ctypes.get_errno(), "landlock")


def find_modules_by(library: str, handle: str) -> None:
    """Import what is left of the standard library through a folder that is open, its path being closed to this user."""
    sys.path[:] = [path.replace(library, handle) for path in sys.path]
    sys.path_importer_cache.clear()
    for module in list(sys.modules.values()):
        if hasattr(module, "__path__"):
            module.__path__ = [path.replace(library, handle) for path in module.__path__]


def file_guard(readable: tuple[str, ...], folder: str):
    """A second line where there is no Landlock: an audit hook, which code that is made to can get around."""
    realpath, writing = os.path.realpath, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def inside(path, folders) -> bool:
        path = realpath(os.fsdecode(path))
        return any(path == one or path.startswith(f"{one}/") for one in folders)

    def hook(event: str, arguments: tuple) -> None:
        if event.startswith(REFUSED):
            raise PermissionError(f"{event} is not allowed here")
        paths = [argument for argument in arguments[:2] if isinstance(argument, (str, bytes, os.PathLike))]
        if event == "open" and paths and not isinstance(arguments[0], int):
            allowed = (folder, os.devnull) if (arguments[2] or 0) & writing else (folder, os.devnull, *readable)
            if not inside(arguments[0], allowed):
                raise PermissionError(f"{arguments[0]!r} is not allowed here")
        elif event in CHANGES and not all(inside(path, (folder,)) for path in paths):
            raise PermissionError(f"{paths} is not allowed here")

    return hook


if __name__ == "__main__":
    main()
