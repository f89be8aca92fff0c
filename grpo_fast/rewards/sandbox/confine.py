"""The sandbox from inside: the processes of a program and of its tests give up everything they could do harm with.

`isolation.py` starts Python with these modules and calls `main`. Imports only what it needs of the standard library,
because every completion pays for it. `grpo_fast.rewards.functions.code` lists the guarantees.
"""

import ctypes
import marshal
import os
import sys

from grpo_fast.rewards.sandbox.judging import judge, program
from grpo_fast.rewards.sandbox.wire import Pipe

# Limits, in bytes and in numbers.
MEMORY, FILE_SIZE, FOLDER_SIZE = 1 << 30, 10 << 20, 64 << 20
FOLDER_FILES, OPEN_FILES, THREADS = 4096, 64, 64
# The program's folder in namespaces.
FOLDER = "/tmp"
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

# From linux/prctl.h, linux/sched.h, linux/mount.h and linux/landlock.h. System calls from 424 on have the same numbers
# on all processors.
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SIGKILL = 9
NEW_MOUNTS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NETWORK = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_RECURSIVE, MS_PRIVATE, MNT_DETACH = 2, 4, 32, 4096, 16384, 1 << 18, 2
MOUNT_SETATTR, AT_RECURSIVE, AT_EMPTY_PATH = 442, 0x8000, 0x1000
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8

# Audit events of the network, other programs and foreign memory; and those that change the files they name.
REFUSED = (
    "socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "ctypes.", "subprocess.",
    "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill", "pty.",
)  # fmt: skip
CHANGES = {
    "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.setxattr", "os.symlink",
    "os.truncate", "os.utime",
}  # fmt: skip


class FilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def main(setup: dict) -> None:
    """Set up the sandbox, start the program's process, and run the tests in this one.

    Args:
        setup: `level`, by name; `user`, which root becomes; `parent`, the process that this one must not outlive (0 if
            bubblewrap ensures that); `seconds` of CPU time; `readable` paths; `filter`, a seccomp program or b"";
            `pivot_root`, that call's number; `processes`, how many the user has already.

    The program and its tests are on standard input, which only the tests' process reads.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    result = os.dup(1)
    confine = CONFINE[setup["level"]](libc, setup)
    # Not before: a change of user or rights resets it.
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    if setup["parent"] and os.getppid() != setup["parent"]:
        os._exit(1)
    to_program, from_judge = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
        for number in (result, to_program[1], from_judge[0]):
            os.close(number)
        close_standard_streams()
        limit(setup)
        confine()
        program(Pipe(to_program[0], from_judge[1]))
        os._exit(0)
    os.close(to_program[0])
    os.close(from_judge[1])
    # Without namespaces, the process has the same number outside.
    os.write(result, b"%d\n" % child)
    with open(0, "rb", closefd=False) as file:
        code, tests, cases, tested = marshal.load(file)
    close_standard_streams()
    limit(setup)
    confine()
    os.write(result, judge(Pipe(from_judge[0], to_program[1]), code, tests, cases, tested).encode(errors="replace"))
    os._exit(0)


def close_standard_streams() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)


def limit(setup: dict) -> None:
    # Not at the top: this file is also imported on systems without this module.
    import resource

    processes = setup["processes"] + THREADS if setup["filter"] else 1
    limits = {"CPU": setup["seconds"] + 1, "AS": MEMORY, "NPROC": processes, "FSIZE": FILE_SIZE, "NOFILE": OPEN_FILES}
    for name, value in {**limits, **dict.fromkeys(("CORE", "MEMLOCK", "MSGQUEUE", "NICE", "RTPRIO"), 0)}.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def in_bubblewrap(libc: ctypes.CDLL, setup: dict):
    """Bubblewrap has made the namespaces and mounts. Limit the number of files, and stop being root."""
    mount(libc, "none", FOLDER, None, MS_REMOUNT | MS_NOSUID | MS_NODEV, f"size={FOLDER_SIZE},nr_inodes={FOLDER_FILES}")
    become_user(setup["user"])
    return lambda: drop_rights(libc, setup)


def in_namespaces(libc: ctypes.CDLL, setup: dict):
    """Make new namespaces: mounts, with the readable paths and an empty folder in memory; processes, from the next one
    on; an empty network; and unless this is root, users, which permits the others."""
    user, group = os.getuid(), os.getgid()
    spaces = NEW_MOUNTS | NEW_UTS | NEW_IPC | NEW_PIDS | NEW_NETWORK | (0 if user == 0 else NEW_USER)
    if libc.unshare(spaces):
        raise OSError(ctypes.get_errno(), "new namespaces are not allowed")
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    sources = {path: os.open(path, os.O_PATH) for path in (*setup["readable"], *DEVICES)}
    mount(libc, "none", "/", None, MS_RECURSIVE | MS_PRIVATE)
    mount(libc, "none", FOLDER, "tmpfs", 0, "mode=755,size=1m")
    for path, source in sources.items():
        target = FOLDER + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        handle = f"/proc/self/fd/{source}"
        if os.path.isdir(handle):
            os.makedirs(target, exist_ok=True)
        else:
            os.close(os.open(target, os.O_CREAT))
        mount(libc, handle, target, None, MS_BIND | MS_RECURSIVE)
        os.close(source)
    os.makedirs(FOLDER * 2, exist_ok=True)
    # struct mount_attr: the attributes to set (read-only is 1) and to clear, propagation, and a user namespace.
    attributes = (ctypes.c_uint64 * 4)(1 | MS_NOSUID)
    root = os.open(FOLDER, os.O_PATH)
    if libc.syscall(MOUNT_SETATTR, root, b"", AT_RECURSIVE | AT_EMPTY_PATH, attributes, ctypes.sizeof(attributes)):
        raise OSError(ctypes.get_errno(), "mounts cannot be made read-only")
    os.close(root)
    options = f"mode=777,size={FOLDER_SIZE},nr_inodes={FOLDER_FILES}"
    mount(libc, "none", FOLDER * 2, "tmpfs", MS_NOSUID | MS_NODEV, options)
    os.chdir(FOLDER)
    # The new root is mounted over the old one, which is then unmounted.
    if libc.syscall(setup["pivot_root"], b".", b".") or libc.umount2(b".", MNT_DETACH):
        raise OSError(ctypes.get_errno(), "the root cannot be changed")
    os.chdir(FOLDER)
    become_user(setup["user"])
    return lambda: drop_rights(libc, setup)


def in_process(libc: ctypes.CDLL, setup: dict):
    """No namespaces: only what any process may give up by itself."""
    library = os.path.dirname(os.__file__)
    stdlib = os.open(library, os.O_RDONLY)
    if os.getuid() == 0:
        os.chown(".", setup["user"], setup["user"])
    become_user(setup["user"])
    if not os.access(os.__file__, os.R_OK):
        find_modules_by(library, f"/proc/self/fd/{stdlib}")

    def confine() -> None:
        restrict_files(libc, stdlib, setup["readable"])
        drop_rights(libc, setup)
        sys.addaudithook(file_guard((library, *setup["readable"]), os.getcwd()))

    return confine


CONFINE = {"bubblewrap": in_bubblewrap, "namespaces": in_namespaces, "seccomp": in_process, "rlimits": in_process}


def mount(libc: ctypes.CDLL, source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind)]
    if libc.mount(*texts, ctypes.c_ulong(flags), options.encode() or None):
        raise OSError(ctypes.get_errno(), f"mount {target}")


def become_user(user: int) -> None:
    """Stop being root, to which limits on processes do not apply; separate users keep runs apart."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)


def drop_rights(libc: ctypes.CDLL, setup: dict) -> None:
    """Give up all capabilities, and all system calls that the filter does not list."""
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # The two processes have the same user, but must not read each other's memory.
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    # struct __user_cap_header_struct: version 3, this process.
    if libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), bytes(24)):
        raise OSError(ctypes.get_errno(), "capset")
    if setup["filter"]:
        code = FilterProgram(len(setup["filter"]) // 8, setup["filter"])
        if libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(code), 0, 0):
            raise OSError(ctypes.get_errno(), "seccomp")


def restrict_files(libc: ctypes.CDLL, stdlib: int, readable: list[str]) -> None:
    """Use Landlock, if the kernel has it: read Python's and the system's libraries, write in the current folder."""
    version = libc.syscall(LANDLOCK_CREATE, None, 0, 1)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if version < 1:
        return
    bits = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    everything = (1 << bits) - 1
    # struct landlock_ruleset_attr: what to control of files, the network (version 4) and other processes (version 6).
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = libc.syscall(LANDLOCK_CREATE, (ctypes.c_uint64 * 3)(everything, 3, 3), size, 0)
    rights = {stdlib: EXECUTE | READ_FILE | READ_DIR}
    for path in readable:
        try:
            handle = os.open(path, os.O_PATH)
        except PermissionError:
            continue
        rights[handle] = EXECUTE | READ_FILE | (READ_DIR if os.path.isdir(path) else 0)
    for path in DEVICES:
        rights[os.open(path, os.O_PATH)] = READ_FILE | (WRITE_FILE if path == os.devnull else 0)
    rights[os.open(".", os.O_PATH)] = everything
    for path, allowed in rights.items():
        # struct landlock_path_beneath_attr, packed.
        rule = allowed.to_bytes(8, sys.byteorder) + path.to_bytes(4, sys.byteorder)
        if libc.syscall(LANDLOCK_ADD, rules, 1, rule, 0):
            raise OSError(ctypes.get_errno(), "landlock")
        if path != stdlib:
            os.close(path)
    if libc.syscall(LANDLOCK_RESTRICT, rules, 0):
        raise OSError(ctypes.get_errno(), "landlock")
    os.close(rules)


def find_modules_by(library: str, handle: str) -> None:
    """Import the rest of the standard library through an open folder, whose path this user may not read."""
    sys.path[:] = [path.replace(library, handle) for path in sys.path]
    sys.path_importer_cache.clear()
    for module in list(sys.modules.values()):
        if hasattr(module, "__path__"):
            module.__path__ = [path.replace(library, handle) for path in module.__path__]


def file_guard(readable: tuple[str, ...], folder: str):
    """An audit hook that limits files where there is no Landlock; malicious code can evade it."""
    realpath, writing = os.path.realpath, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    local = 1

    def inside(path, folders) -> bool:
        path = realpath(os.fsdecode(path))
        return any(path == one or path.startswith(f"{one}/") for one in folders)

    def hook(event: str, arguments: tuple) -> None:
        # Event loops use a pair of local sockets.
        if event.startswith(REFUSED) or (event == "socket.__new__" and arguments[1] != local):
            raise PermissionError(f"{event} is not allowed here")
        paths = [argument for argument in arguments[:2] if isinstance(argument, (str, bytes, os.PathLike))]
        if event == "open" and paths and not isinstance(arguments[0], int):
            allowed = (folder, os.devnull) if (arguments[2] or 0) & writing else (folder, os.devnull, *readable)
            if not inside(arguments[0], allowed):
                raise PermissionError(f"{arguments[0]!r} is not allowed here")
        elif event in CHANGES and not all(inside(path, (folder,)) for path in paths):
            raise PermissionError(f"{paths} is not allowed here")

    return hook
