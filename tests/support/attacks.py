"""Malicious programs for the tests of the sandbox.

Each runs to its end only if it can do its harm, and is made harmless to this machine: what it reaches for is set up for
it. They see VICTIM, a process of the same user, SECRET, a file, PLACE, the folder that it lies in, PORT, a listening
port, and ``call``, which makes a system call and raises where that fails.
"""

from grpo_fast.rewards.sandbox import wire

PROLOGUE = """
import os, resource, signal, socket, sys
for module in list(sys.modules.values()):
    # Disable the audit hook if it can be reached.
    if hasattr(module, "REFUSED"):
        module.REFUSED, module.CHANGES = ("none",), set()
try:
    import ctypes
    _libc = ctypes.CDLL(None, use_errno=True)
except OSError:
    pass
def call(number, *arguments, fault=False):
    # Numbers below 424 are those of x86-64; later ones are the same on all processors.
    result = _libc.syscall(number, *arguments)
    # The kernel reports a wrong address only if the call is allowed.
    if result < 0 and not (fault and ctypes.get_errno() == 14):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
"""

# Other processes of the user, above all the trainer.
PROCESSES = {
    "kill": "os.kill(VICTIM, signal.SIGKILL)",
    "signal 0": "os.kill(VICTIM, 0)",
    "a signal to a group": "os.killpg(os.getpgid(VICTIM), signal.SIGKILL)",
    "a signal to all": "os.kill(-1, 0)",
    "a signal to the parent": "os.kill(os.getppid() or VICTIM, 0)",
    "tgkill": "call(234, VICTIM, VICTIM, 9)",
    "tkill": "call(200, VICTIM, 9)",
    "rt_sigqueueinfo": "info = ctypes.create_string_buffer(128)\n"
    "info[8:12] = bytes([255] * 4)\ncall(129, VICTIM, 10, info)",
    "pidfd": "signal.pidfd_send_signal(os.pidfd_open(VICTIM), signal.SIGKILL)",
    "pidfd_getfd": "call(438, os.pidfd_open(VICTIM), 1, 0)",
    "a pipe's owner": "import fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, 10, signal.SIGKILL)\n"
    "fcntl.fcntl(r, fcntl.F_SETOWN, VICTIM)\nfcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\nos.write(w, b'x')",
    "a socket's owner": "import fcntl, struct\na, b = socket.socketpair()\n"
    "fcntl.ioctl(a, 0x8901, struct.pack('i', VICTIM))",
    "prlimit of files": "resource.prlimit(VICTIM, resource.RLIMIT_NOFILE, (3, 3))",
    "prlimit of CPU time": "resource.prlimit(VICTIM, resource.RLIMIT_CPU, (1, 1))",
    "reading limits": "resource.prlimit(VICTIM, resource.RLIMIT_CPU)",
    "affinity": "os.sched_setaffinity(VICTIM, {0})",
    "priority": "os.setpriority(os.PRIO_PROCESS, VICTIM, 19)",
    "priority of a user": "os.setpriority(os.PRIO_USER, os.getuid(), 19)",
    "scheduler": "os.sched_setscheduler(VICTIM, os.SCHED_IDLE, os.sched_param(0))",
    "ioprio_set": "call(251, 1, VICTIM, 3 << 13)",
    "ptrace": "call(101, 16, VICTIM, 0, 0)",
    "ptrace, seized": "call(101, 0x4206, VICTIM, 0, 0)",
    "process_vm_readv": "buffer = ctypes.create_string_buffer(8)\n"
    "local = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), 8)\n"
    "remote = (ctypes.c_uint64 * 2)(id(None), 8)\ncall(310, VICTIM, local, 1, remote, 1, 0, fault=True)",
    "process_vm_writev": "buffer = ctypes.create_string_buffer(8)\n"
    "local = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), 8)\n"
    "remote = (ctypes.c_uint64 * 2)(id(None), 8)\ncall(311, VICTIM, local, 1, remote, 1, 0, fault=True)",
    "process_madvise": "call(440, os.pidfd_open(VICTIM), 0, 0, 20, 0)",
    "move_pages": "call(279, VICTIM, 0, 0, 0, 0, 0)",
    "migrate_pages": "mask = ctypes.c_uint64(1)\ncall(256, VICTIM, 8, ctypes.byref(mask), ctypes.byref(mask))",
    "kcmp": "call(312, VICTIM, VICTIM, 1, 0, 0)",
    "get_robust_list": "a, b = ctypes.c_uint64(), ctypes.c_uint64()\n"
    "call(274, VICTIM, ctypes.byref(a), ctypes.byref(b))",
    "environment": "assert b'GRPO_FAST_SECRET' in open(f'/proc/{VICTIM}/environ', 'rb').read()",
    "environment, hook avoided": "file = _libc.open(f'/proc/{VICTIM}/environ'.encode(), 0)\nassert file >= 0\n"
    "data = ctypes.create_string_buffer(100000)\n"
    "_libc.read(file, data, 100000)\nassert b'GRPO_FAST_SECRET' in data.raw",
    "own environment": "assert 'GRPO_FAST_SECRET' in os.environ",
    "memory": "assert _libc.open(f'/proc/{VICTIM}/mem'.encode(), 2) >= 0",
    "open files": "os.listdir(f'/proc/{VICTIM}/fd')",
    "root folder": "open(f'/proc/{VICTIM}/root{SECRET}').read()",
    "oom_score_adj": "open(f'/proc/{VICTIM}/oom_score_adj', 'w').write('1000')",
    "commands of all processes": "assert [p for p in os.listdir('/proc') if p.isdecimal() and "
    "open(f'/proc/{p}/cmdline').read()]",
    "outliving the deadline": "call(157, 1, 0, 0, 0, 0)\nos.setsid()",
    "another group": "os.setpgid(0, 0)",
    "another session": "os.setsid()",
}
# Ways into the kernel that no program here needs.
KERNEL = {
    "io_uring": "parameters = ctypes.create_string_buffer(120)\ncall(425, 8, parameters)",
    "keyctl": "call(250, 0, -3, 1)",
    "add_key": "call(248, b'user', b'name', b'data', 4, -3)",
    "mount": "call(165, b'none', b'/tmp', b'tmpfs', 0, 0)",
    "unshare": "call(272, 0x10000000)",
    "namespaces of others": "call(308, os.pidfd_open(VICTIM), 0x40000000)",
    "bpf": "attributes = ctypes.create_string_buffer(128)\nattributes[0] = 1\nattributes[4] = attributes[8] = 8\n"
    "attributes[12] = 1\ncall(321, 0, attributes, 128)",
    "perf_event_open": "attributes = ctypes.create_string_buffer(128)\nattributes[4] = 128\nattributes[0] = 1\n"
    "call(298, attributes, 0, -1, -1, 0)",
    "userfaultfd": "call(323, 1)",
    "personality": "call(135, 0x0040000)",
    "chroot": "os.chroot('.')",
    "being root": "os.setuid(0)",
    "being another user": "os.setuid(os.getuid() + 1)",
    "being traced": "call(101, 0, 0, 0, 0)",
    "a device": "os.mknod('null', 0o666 | 0o020000, os.makedev(1, 3))\nopen('null', 'w')",
    "settings of the kernel": "open('/proc/sys/kernel/core_pattern', 'w')",
    "time": "import time\ntime.clock_settime(time.CLOCK_REALTIME, time.time())",
    "host's name": "import socket\nsocket.sethostname('harmed')",
    "inotify": "call(294, 0)",
    "seccomp listener": "call(317, 1, 8, ctypes.create_string_buffer(16))",
}
# Other programs and processes.
PROGRAMS = {
    "fork": "if not os.fork():\n    os._exit(0)",
    "forks without end": "for _ in range(50):\n    os.fork()",
    "vfork": "pid = _libc.syscall(56, 0x4011, 0, 0, 0, 0)\nif not pid:\n    os._exit(0)\nassert pid > 0",
    "clone3": "a = (ctypes.c_uint64 * 8)()\na[4] = 17\npid = _libc.syscall(435, a, 64)\nif not pid:\n    os._exit(0)\n"
    "assert pid > 0",
    "subprocess": "import subprocess\nsubprocess.run(['true'], check=True)",
    "posix_spawn": "os.waitpid(os.posix_spawn('/usr/bin/true', ['true'], {}), 0)",
    "system": "assert os.system('true') == 0",
    "exec": "os.execv('/usr/bin/env', ['env'])",
    "multiprocessing": "import multiprocessing\np = multiprocessing.get_context('fork').Process(target=print)\n"
    "p.start()\np.join()\nassert p.exitcode == 0",
}
NETWORK = {
    "a connection": "socket.create_connection(('127.0.0.1', PORT), timeout=1)",
    "a connection, hook avoided": "s = _libc.socket(2, 1, 0)\nassert s >= 0\naddress = bytes([2, 0]) + "
    "PORT.to_bytes(2, 'big') + bytes([127, 0, 0, 1]) + bytes(8)\nassert _libc.connect(s, address, 16) == 0",
    "a datagram": "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "a datagram, hook avoided": "s = _libc.socket(2, 2, 0)\nassert s >= 0\naddress = bytes([2, 0]) + "
    "PORT.to_bytes(2, 'big') + bytes([127, 0, 0, 1]) + bytes(8)\nassert _libc.sendto(s, b'x', 1, 0, address, 16) == 1",
    "a server": "socket.create_server(('127.0.0.1', 0))",
    "a local socket": "s = socket.socket(socket.AF_UNIX)\ns.connect(PLACE + '/socket')",
    "a local socket, hook avoided": "s = _libc.socket(1, 1, 0)\nassert s >= 0\n"
    "address = bytes([1, 0]) + (PLACE + '/socket').encode() + bytes(1)\n"
    "assert _libc.connect(s, address, len(address)) == 0",
    "a local datagram": "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
    "a.sendto(b'x', PLACE + '/datagrams')",
    "an abstract socket": "s = socket.socket(socket.AF_UNIX)\ns.connect('\\0' + PLACE)",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
}
FILES = {
    "reading a file": "open(SECRET).read()",
    "reading, hook avoided": "assert _libc.open(SECRET.encode(), 0) >= 0",
    "reading by a link": "os.symlink(SECRET, 'link')\nopen('link').read()",
    "reading by a hard link": "os.link(SECRET, 'hard')\nopen('hard').read()",
    "reading users": "open('/etc/passwd').read()",
    "listing a folder": "assert os.listdir(PLACE)",
    "listing, hook avoided": "assert _libc.open(PLACE.encode(), 0) >= 0",
    "writing a file": "open(PLACE + '/written', 'w').write('x')",
    "writing, hook avoided": "assert _libc.open((PLACE + '/written').encode(), 0o102, 0o600) >= 0",
    "a database": "import sqlite3\nsqlite3.connect(PLACE + '/base').execute('create table t (x)')",
    "writing to a file": "open(SECRET, 'r+').write('x')",
    "truncating": "os.truncate(SECRET, 0)",
    "removing a file": "os.remove(SECRET)",
    "removing, hook avoided": "assert _libc.unlink(SECRET.encode()) == 0",
    "renaming a file": "os.rename(SECRET, 'mine')",
    "making a folder": "os.mkdir(PLACE + '/folder')",
    "a file's mode": "os.chmod(SECRET, 0o600)",
    "a file's times": "os.utime(SECRET, (0, 0))",
    "Python's library": "open(os.__file__, 'r+')",
    "programs": "open('/usr/bin/harm', 'w')",
}
# Memory in all its forms, and other resources.
RESOURCES = {
    "a terabyte": "x = bytearray(1 << 40)",
    "two gigabytes, slowly": "x = []\nwhile len(x) < 2048:\n    x.append(bytearray(1 << 20))",
    "shared memory": "import mmap\nx = [mmap.mmap(-1, 1 << 28) for _ in range(6)]",
    "memfd": "file = os.memfd_create('x')\nfor _ in range(8):\n    os.write(file, bytes(1 << 20))",
    "many memfds": "x = []\nfor n in range(40):\n    x.append(os.memfd_create('x'))\n"
    "    os.write(x[-1], bytes(9 << 20))",
    "System V shared memory": "call(29, 0, 1 << 26, 0o1600)",
    "System V messages": "call(68, 0, 0o1600)",
    "System V semaphores": "call(64, 0, 1, 0o1600)",
    "a POSIX queue": "assert _libc.mq_open(b'/queue', 0o102, 0o600, None) >= 0",
    "/dev/shm": "open('/dev/shm/harm', 'w')",
    "locked memory": "x = ctypes.create_string_buffer(1 << 20)\nassert _libc.mlock(x, 1 << 20) == 0",
    "recursion": "def f(): return f()\nf()",
    "nesting": "x = eval('(' * 100000 + ')' * 100000)",
    "a large file": "with open('large', 'wb') as file:\n    for _ in range(64):\n        file.write(bytes(1 << 20))",
    "a large sparse file": "os.truncate(os.open('sparse', os.O_CREAT | os.O_RDWR), 1 << 34)",
    "many open files": "files = [open(str(n), 'w') for n in range(1000)]",
    "a thousand threads": "import threading\nthreading.stack_size(65536)\nend = threading.Event()\n"
    "ts = [threading.Thread(target=end.wait, daemon=True) for _ in range(1000)]\n[t.start() for t in ts]",
    "a higher limit of processes": "resource.setrlimit(resource.RLIMIT_NPROC, (100000, 100000))",
    "a higher limit of memory": "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
    "real time": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
}
# A folder in memory limits these; on a disk they continue until the deadline.
FOLDER = {
    "many large files": "for n in range(12):\n    open(str(n), 'wb').write(bytes(9 << 20))",
    "ten thousand files": "for n in range(10000):\n    open(str(n), 'w').close()",
}
# If these fail, the others show nothing.
HARMLESS = {"nothing": "", "a call": "assert call(39) == os.getpid()", "a folder": "os.mkdir('x')\nos.listdir('.')"}
HARM = {
    f"{group}: {name}": program
    for group, programs in (
        ("processes", PROCESSES),
        ("kernel", KERNEL),
        ("programs", PROGRAMS),
        ("network", NETWORK),
        ("files", FILES),
        ("resources", RESOURCES),
        ("folder", FOLDER),
    )
    for name, program in programs.items()
}

# What resource limits, Landlock and the audit hook prevent; the other attacks require the filter.
WITHOUT_FILTER = [
    *(f"programs: {name}" for name in PROGRAMS if name not in ("vfork", "clone3")),
    *(f"network: {name}" for name in ("a connection", "a datagram", "a server")),
    *(f"files: {name}" for name in FILES if name not in ("a file's mode", "a file's times")),
    *(f"processes: {name}" for name in ("kill", "signal 0", "own environment", "environment", "oom_score_adj")),
    *(
        f"resources: {name}"
        for name in RESOURCES
        if "memfd" not in name and "System V" not in name and name != "a POSIX queue"
    ),
]

SQUARE = "def square(x):\n    return x * x\n"
# Each claims to square numbers; the test calls it with 3 and 4 and compares with 9 and 16, which none of them computes.
_EQUAL = "class Equal{base}:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
_EVERYTHING = (
    "class Anything:\n    def __getattr__(self, name): return self\n    def __call__(self, *a): return self\n"
    + "".join(
        f"    def __{name}__(self, *a): return True\n"
        for name in ("eq", "lt", "le", "gt", "ge", "bool", "contains", "instancecheck")
    )
    + "".join(
        f"    def __{name}__(self, *a): return self\n"
        for name in ("sub", "rsub", "add", "radd", "abs", "neg", "mul", "truediv", "round", "enter", "iter", "getitem")
    )
    + "    def __exit__(self, *a): return True\n    def __hash__(self): return 9\n    def __next__(self): return 9\n"
)
_READ_ALL = (
    "import gc, sys\ndef square(x):\n    texts = []\n    frame = sys._getframe()\n    while frame:\n"
    "        texts += [*map(str, frame.f_code.co_consts), *map(str, frame.f_locals.values()),\n"
    "                  *map(str, frame.f_globals.values())]\n        frame = frame.f_back\n"
    "    texts += [o for o in gc.get_objects() if isinstance(o, (list, dict, tuple)) for o in [repr(o)]][:10**5]\n"
    "    text = ' '.join(texts)\n"
)
_WIRE = f"import sys\nwire = sys.modules[{wire.__name__!r}]\n"
CHEATS = {
    "equals everything": _EQUAL.format(base="") + "def square(x): return Equal()",
    "a number that equals everything": _EQUAL.format(base="(int)") + "def square(x): return Equal(0)",
    "a list that equals everything": _EQUAL.format(base="(list)") + "def square(x): return Equal()",
    "anything": _EVERYTHING + "def square(x): return Anything()",
    "a class that is anything": _EVERYTHING + "class square(Anything):\n    def __init__(self, x): pass",
    "an object for a function": _EVERYTHING + "square = Anything()",
    "leaving early": "import os\nos._exit(0)",
    "leaving in a call": "import os\ndef square(x): os._exit(0)",
    "SystemExit": "raise SystemExit(0)",
    "SystemExit in a call": "def square(x): raise SystemExit(0)",
    "StopIteration": "def square(x): raise StopIteration",
    "no exception": "class E(BaseException): pass\ndef square(x): raise E",
    "a printed verdict": "import os\nprint('passed', flush=True)\nfor fd in range(64):\n    try:\n"
    "        os.write(fd, b'passed')\n    except OSError:\n        pass\nos._exit(0)",
    "replaced builtins": "import builtins\nbuiltins.compile = lambda *a, **k: (lambda: 0).__code__\n"
    "builtins.exec = builtins.eval = lambda *a, **k: None\nbuiltins.print = lambda *a, **k: None\n"
    "builtins.AssertionError = type('A', (BaseException,), {})",
    "a trace that jumps": "import sys\ndef trace(frame, event, arg):\n    if event == 'line':\n        try:\n"
    "            frame.f_lineno += 1\n        except Exception:\n            pass\n    return trace\n"
    "def square(x):\n    frame = sys._getframe()\n    while frame:\n        frame.f_trace = trace\n"
    "        frame = frame.f_back\n    sys.settrace(trace)\n    return 0",
    "reading the tests": _READ_ALL + "    import re\n    found = re.search(r'square\\(%d\\) == (\\d+)' % x, text)\n"
    "    return int(found[1])",
    "finding the judge": "import sys, gc\nfor module in list(sys.modules.values()):\n"
    "    if hasattr(module, 'Judge'):\n        module.Judge.passes = lambda *a: True\n"
    "        module.judge = lambda *a: (True, 1)\n        module._lines = lambda *a: []\ndef square(x): return 0",
    "a forged reply": _WIRE
    + "import gc\ndef square(x):\n    pipe = next(o for o in gc.get_objects() if isinstance(o, wire.Pipe))\n"
    "    for kind in (['returned', True, []], ['returned', ['class', 'builtins', 'object'], []]):\n"
    "        pipe.send(kind)\n    return 0",
    "a forged exit": _WIRE
    + "import gc\ndef square(x):\n    pipe = next(o for o in gc.get_objects() if isinstance(o, wire.Pipe))\n"
    "    pipe.send(['raised', ['builtins.SystemExit', 'builtins.BaseException'], ['list', 0], ['dict']])\n    return 0",
    "a module by name": _WIRE
    + "wire.Peer.encode = lambda self, value: value if type(value) in wire.SCALARS else ['module', 'os']\n"
    "def square(x): return []",
    "code by name": _WIRE + "wire.Peer.encode = lambda self, value: value if type(value) in wire.SCALARS else "
    "['library', 'builtins', 'eval', '9']\ndef square(x): return []",
    "its own abs": "def abs(x): return 0\ndef round(*a): return 0\ndef len(x): return 9\ndef square(x): return 0\n"
    "class math:\n    isclose = staticmethod(lambda *a: True)\n"
    "import builtins\nbuiltins.abs, builtins.round = abs, round",
    "a foreign number": _WIRE
    + "wire.Peer.encode = lambda self, value: value if type(value) in wire.SCALARS else ['yours', -1]\n"
    "def square(x): return []",
}
# Tests of equality, intervals, order and context, which cheats might exploit.
CHEATED_TESTS = {
    "equal": "assert square(3) == 9\nassert square(4) == 16",
    "near": "assert abs(square(3) - 9) < 1e-6\nassert abs(16 - square(4)) < 1e-6",
    "rounded": "assert round(square(3) - 9, 3) == 0",
    "in order": "assert 8 < square(3) < 10 and square(4) > 15",
    "close": "assert math.isclose(square(3), 9)",
    "among": "assert square(3) in (9, 9.0)\nassert [square(4)] == [16]",
    "caught": "try:\n    assert square(3) == 9\nexcept Exception:\n    raise SystemExit(1)",
}
