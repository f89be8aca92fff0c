"""The system call filter for generated code: the calls of a Python program that computes and uses files and threads.

All others fail, such as those that reach other processes, the network, other namespaces, or memory that no limit
covers. seccompy (extra `train`) compiles the filter in the run's process; the sandbox gets the finished program.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache

from grpo_fast.errors import UserError, import_extra, one_line

ALLOWED = """
    access alarm arch_prctl brk chdir clock_getres clock_gettime clock_nanosleep close close_range copy_file_range dup
    dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_wait eventfd2 exit exit_group faccessat faccessat2
    fadvise64 fallocate fchdir fdatasync flock fstat fstatfs fsync ftruncate futex getcpu getcwd getdents getdents64
    getegid geteuid getgid getgroups getitimer getpeername getpgid getpgrp getpid getppid getrandom getresgid getresuid
    getrlimit getrusage getsid getsockname getsockopt gettid gettimeofday getuid link linkat lseek lstat madvise
    membarrier mincore mkdir mkdirat mmap mprotect mremap msync munmap nanosleep newfstatat open openat pause pipe pipe2
    poll ppoll pread64 preadv preadv2 pselect6 pwrite64 pwritev pwritev2 read readlink readlinkat readv recvfrom recvmsg
    rename renameat renameat2 restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigreturn
    rt_sigsuspend rt_sigtimedwait sched_getaffinity sched_yield select sendfile sendmsg sendto set_robust_list
    set_tid_address setitimer setrlimit setsockopt shutdown sigaltstack stat statfs statx symlink symlinkat sysinfo time
    times truncate umask uname unlink unlinkat write writev
""".split()  # noqa: SIM905
# Landlock does not limit these, so without namespaces they reach files that are not the program's.
IN_NAMESPACES = "chmod fchmod fchmodat utime utimensat utimes".split()  # noqa: SIM905
# These fail with ENOSYS, after which the C library uses older calls; all others fail with EPERM.
ABSENT = ("clone3", "epoll_pwait2", "fchmodat2", "openat2")
EPERM, ENOSYS = 1, 38
_EQUAL, _MASKED = 0, 6
_CLONE_THREAD, _NEW_NAMESPACES, _AF_UNIX, _SOCK_STREAM, _SOCK_KINDS = 0x10000, 0x7E020080, 1, 1, 0xF
# Allowed with certain arguments only: alternatives of (argument, comparison, value, mask if the comparison has one).
PARTLY: dict[str, list[list[tuple[int, ...]]]] = {
    # A thread, not a process, in the current namespaces.
    "clone": [[(0, _MASKED, _CLONE_THREAD, _NEW_NAMESPACES | _CLONE_THREAD)]],
    # Of this process.
    "prlimit64": [[(0, _EQUAL, 0)]],
    # Its name, and the names of its memory.
    "prctl": [[(0, _EQUAL, value)] for value in (15, 16, 0x53564D41)],
    # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, locks, F_DUPFD_CLOEXEC; none that sends signals.
    "fcntl": [[(1, _EQUAL, value)] for value in (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030)],
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIOCLEX, FIONCLEX.
    "ioctl": [[(1, _EQUAL, value)] for value in (0x5401, 0x5413, 0x541B, 0x5421, 0x5451, 0x5450)],
    # Two connected sockets, as event loops use; nothing can be sent to an address.
    "socketpair": [[(0, _EQUAL, _AF_UNIX), (1, _MASKED, _SOCK_STREAM, _SOCK_KINDS)]],
}


@cache
def numbers() -> dict[str, int]:
    """The numbers of this processor's system calls by name; UserError without seccompy or for an unknown processor."""
    syscalls = import_extra("seccompy.syscalls", "train")
    try:
        syscalls.audit_arch()
    except Exception as error:
        raise UserError(f"no system call filter for this processor: {one_line(error)}") from None
    found = {}
    for name in (*ALLOWED, *IN_NAMESPACES, *ABSENT, *PARTLY, "pivot_root"):
        # Newer architectures lack the older calls.
        with suppress(ValueError):
            found[name] = syscalls.syscall_nr(name)
    return found


@cache
def filter_program(in_namespaces: bool) -> bytes:
    """The compiled filter, which allows more in namespaces; raises UserError like :func:`numbers`."""
    known = numbers()
    seccompy = import_extra("seccompy", "train")
    built = seccompy.Filter(seccompy.Action.ERRNO | EPERM)
    allowed = {*ALLOWED, *IN_NAMESPACES} if in_namespaces else ALLOWED
    for name in known:
        if name in allowed:
            built.allow(name)
        elif name in ABSENT:
            built.errno(name, ENOSYS)
        for way in PARTLY.get(name, ()):
            built.allow(name, args=way)
    return built.program
