"""Unit tests of generated Python: what passes, and what programs that mean harm can do."""

import json
import os
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from grpo_fast.errors import UserError
from grpo_fast.rewards import RewardModel, code, unit_tests
from grpo_fast.rewards.code import extract_code, run_tests

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox is made for Linux")

SQUARE = "def square(x):\n    return x * x"
TEST = "assert square(3) == 9"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```python\nx = 1\n```\nbetter:\n```python\nx = 2\n```", "x = 2\n"),
        ("```py\nx = 1\n```\nIt prints\n```\n1\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\nand\n```python\nx = 2", "x = 1\n"),
        ("```bash\nls\n```", None),
        ("```python\nx = 1", None),
        ("<answer>x = 1</answer>", "x = 1"),
        ("```python\nx = 1\n```<answer>```python\nx = 2\n```</answer>", "x = 2\n"),
        ("x = 1", None),
        ("", None),
    ],
)
def test_code_is_found(text, expected):
    assert extract_code(text) == expected


@pytest.mark.parametrize(
    ("program", "tests", "passes"),
    [
        (SQUARE, TEST, True),
        (SQUARE, f"{TEST}\nassert square(2) == 5", False),
        ("def square(x):\n    return x + x", TEST, False),
        ("def square(x) return", TEST, False),
        ("", TEST, False),
        ("raise SystemExit(0)", TEST, False),
        ("import os\nos._exit(0)", TEST, False),
        (f"{SQUARE}\nprint('x' * 10**7)", TEST, True),
        (f"{SQUARE}\nif __name__ == '__main__':\n    raise ValueError", TEST, True),
        (
            "import bisect, collections, dataclasses, datetime, decimal, functools, hashlib, heapq, itertools, json\n"
            "import math, random, re, statistics, string, typing, unicodedata, zoneinfo\n"
            "open('notes', 'w').write('kept')",
            "assert open('notes').read() == 'kept'\nassert json.loads('[1]') == [1]\n'x'.encode('idna')",
            True,
        ),
    ],
)
def test_programs(program, tests, passes):
    assert run_tests(program, tests, 20.0) is passes


def test_the_reward():
    completions = [f"```python\n{SQUARE}\n```", f"```python\n{SQUARE}\n```", "I cannot.", f"<answer>{SQUARE}</answer>"]
    tests = [TEST, [TEST, "assert square(1) == 2"], TEST, [TEST, "assert square(0) == 0"]]
    assert unit_tests([""] * 4, completions, tests=tests) == [1, 0, 0, 1]


# Each program passes if it can do its harm. The limits are set before it begins, so that this machine is safe.
FOREVER = {
    "a loop": "while True: pass",
    "sleep": "import time\nwhile True:\n    try:\n        time.sleep(60)\n    except BaseException:\n        pass",
    "ignored signals": "import signal\nfor number in signal.valid_signals() - {9, 19}:\n"
    "    try:\n        signal.signal(number, signal.SIG_IGN)\n    except OSError:\n        pass\nwhile True: pass",
    "a regular expression": "import re\nre.match(r'(a+)+$', 'a' * 60 + 'b')",
    "a number": "x = 9 ** 9 ** 9",
}
EXHAUSTION = {
    "a fork": "import os\nif not os.fork():\n    os._exit(0)",
    "forks without end": "import os\nfor _ in range(50):\n    os.fork()",
    "threads": "import threading\nthreading.Thread(target=print).start()",
    "a terabyte": "x = bytearray(1 << 40)",
    "two gigabytes, slowly": "x = []\nwhile len(x) < 2048:\n    x.append(bytearray(1 << 20))",
    "recursion": "def f(): return f()\nf()",
    "nesting": "x = eval('(' * 100000 + ')' * 100000)",
    "a large file": "with open('large', 'wb') as file:\n    for _ in range(64):\n        file.write(bytes(1 << 20))",
    "many files": "files = [open(str(n), 'w') for n in range(1000)]",
    "a higher limit": "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (1000, 1000))",
    "an early end": "import os\nos._exit(0)",
}
ESCAPES = {
    "another program": "import subprocess\nsubprocess.run(['true'], check=True)",
    "reading a file": "open(SECRET).read()",
    "reading the environment": "import os\nassert 'GRPO_FAST_SECRET' in os.environ",
    "reading the parent's environment": "import os\nopen(f'/proc/{os.getppid()}/environ').read()",
    "writing a file": "open(PLACE + '/written', 'w').write('x')",
    "writing to a file": "open(SECRET, 'r+').write('x')",
    "removing a file": "import os\nos.remove(SECRET)",
    "renaming a file": "import os\nos.rename(SECRET, 'mine')",
    "making a folder": "import os\nos.mkdir(PLACE + '/folder')",
    "a connection": "import socket\nsocket.create_connection(('127.0.0.1', PORT), timeout=1)",
    "a datagram": "import socket\nsocket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "a signal to the parent": "import os\nos.kill(os.getppid(), 0)",
}
# An audit hook sees only the name that Python passes on.
HIDDEN = "import sqlite3\nsqlite3.connect(PLACE + '/base').execute('create table t (x)')"
LIMIT = 1.0


@pytest.fixture(scope="module")
def outside():
    """What the programs may try to reach: a file that everyone may change, its folder, and a listening port."""
    place = Path(tempfile.mkdtemp(prefix="outside-", dir="/tmp"))
    place.chmod(0o777)
    (place / "secret").write_text("secret")
    (place / "secret").chmod(0o666)
    os.environ["GRPO_FAST_SECRET"] = "secret"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield f"SECRET, PLACE, PORT = {str(place / 'secret')!r}, {str(place)!r}, {server.getsockname()[1]}\n"
        with pytest.raises(BlockingIOError):
            server.accept()
    del os.environ["GRPO_FAST_SECRET"]
    assert [path.name for path in place.iterdir()] == ["secret"]
    assert (place / "secret").read_text() == "secret"
    (place / "secret").unlink()
    place.rmdir()


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    """For the programs' folders, none of which is left."""
    place = Path(tempfile.mkdtemp(prefix="folders-", dir="/tmp"))
    place.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield
    place.rmdir()


def fails_in_time(program, limit=20.0):
    start = time.monotonic()
    passed = run_tests(program, "", limit)
    assert time.monotonic() - start < limit + 5
    return not passed


@pytest.mark.parametrize("program", FOREVER.values(), ids=FOREVER)
def test_what_never_ends_is_scored_zero_in_bounded_time(program):
    assert fails_in_time(program, LIMIT)


@pytest.mark.parametrize("program", EXHAUSTION.values(), ids=EXHAUSTION)
def test_exhaustion_is_scored_zero(program):
    assert fails_in_time(program)


def without(tmp_path, monkeypatch, *lines):
    """A sandbox that lacks some of its parts."""
    source = code.SANDBOX.read_text()
    for line, instead in lines:
        assert source.count(line) == 1
        source = source.replace(line, instead)
    (tmp_path / "sandbox.py").write_text(source)
    monkeypatch.setattr(code, "SANDBOX", tmp_path / "sandbox.py")


@pytest.mark.parametrize("program", [*ESCAPES.values(), HIDDEN], ids=[*ESCAPES, "a database"])
def test_escapes_are_scored_zero(outside, program):
    assert fails_in_time(outside + program)


@pytest.mark.parametrize("escape", ESCAPES)
def test_the_audit_hook_alone_holds_what_it_sees(outside, escape, tmp_path, monkeypatch):
    without(
        tmp_path,
        monkeypatch,
        ("    restrict_files(libc, stdlib)\n", ""),
        ("alone = libc.unshare(CLONE_NEWNET | CLONE_NEWIPC) == 0", "alone = True"),
    )
    assert fails_in_time(outside + ESCAPES[escape])


@pytest.mark.parametrize("escape", ESCAPES)
def test_the_kernel_alone_holds_all(outside, escape, tmp_path, monkeypatch):
    without(tmp_path, monkeypatch, ("    sys.addaudithook(", "    print("))
    if run_tests("open('/etc/passwd')", "", 5.0):
        pytest.skip("this kernel has no Landlock")
    assert fails_in_time(outside + ESCAPES[escape])


def test_without_the_sandbox_they_do_harm(outside, tmp_path, monkeypatch):
    """Otherwise the tests above would show nothing."""
    without(tmp_path, monkeypatch, ('    confine(request["seconds"])\n', ""))
    for name in ("another program", "reading a file", "reading the parent's environment", "a signal to the parent"):
        assert not fails_in_time(outside + ESCAPES[name]), name
    for name in ("a fork", "threads", "two gigabytes, slowly", "a large file", "many files"):
        assert not fails_in_time(EXHAUSTION[name].replace("2048", "300")), name
    writes = outside + ESCAPES["writing a file"] + "\nimport os\nos.remove(PLACE + '/written')"
    assert not fails_in_time(writes)


def test_a_deep_chain_of_folders_is_removed(tmp_path, monkeypatch):
    """Deeper than Python's recursion, and locked at its end."""
    # The audit hook would look up every folder of every path.
    without(tmp_path, monkeypatch, ("    sys.addaudithook(", "    print("))
    program = "import os\nfor _ in range(1010):\n    os.mkdir('d')\n    os.chdir('d')\nos.chmod('.', 0)"
    assert run_tests(program, "", 20.0)


def test_the_run_goes_on_beside_harm():
    """Through the trainer's own door: harmless and harmful completions in one batch."""
    model = RewardModel(["unit_tests"], None, timeout=5.0)
    programs = [SQUARE, FOREVER["a loop"], EXHAUSTION["forks without end"], EXHAUSTION["a terabyte"], SQUARE, "1 +"]
    completions = [f"```python\n{program}\n```" for program in programs] + [f"```python\n{'x = 1;' * 180_000}\n```"]
    threads = threading.active_count()
    start = time.monotonic()
    got = model(["q"] * 7, completions, {"tests": [TEST] * 7})
    assert time.monotonic() - start < 30
    assert got.total.tolist() == [1, 0, 0, 0, 1, 0, 0]
    assert not got.errors.any()
    assert threading.active_count() <= threads
    model.pool.close()


def test_a_sandbox_that_does_not_work_is_named(tmp_path, monkeypatch):
    without(tmp_path, monkeypatch, ('"NPROC": 1', '"NPROC": 1000'))
    with pytest.raises(UserError, match="processes cannot be limited"):
        RewardModel(["unit_tests"], None)
    monkeypatch.setattr(code, "SANDBOX", Path("missing.py"))
    with pytest.raises(UserError, match="a harmless program fails"):
        RewardModel(["unit_tests"], None)


def test_the_result_cannot_be_guessed():
    """A program that writes to every open file, but not the token."""
    program = f"import os\nfor fd in range(64):\n    try:\n        os.write(fd, {json.dumps('0' * 32)}.encode())\n"
    assert not run_tests(program + "    except OSError:\n        pass\nos._exit(0)", "", 5.0)
