"""Unit tests of generated Python.

Each program runs in a process of its own (``sandbox.py``), started as ``python -P -s -S`` in an empty temporary folder,
which is removed afterwards, with an environment that holds nothing of ours. What holds on every Linux:

- It ends with its time: CPU seconds are limited, and the process is killed at the deadline by the clock. It cannot have
  started others, nor threads: their limit is one, and as root it first becomes an unprivileged user, since root has no
  such limit.
- 1 GiB of address space, files of at most 10 MiB, 64 open ones, no core dumps. What it prints is thrown away.
- It passes only by running to the end of its tests: leaving early is a failure.

Where the kernel allows them (most do; containers may not): no network, by a network namespace; no reading but of
Python's and the system's libraries, and no writing but in its folder, by Landlock. Where it allows neither, an audit
hook in Python refuses sockets, other programs and files elsewhere, and a program that is made to can get around it; use
a container or a virtual machine then. Not prevented anywhere: a program that cheats its tests from inside, as with an
object that equals everything; and filling the disk with many small files until the deadline.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path

from grpo_fast.errors import UserError
from grpo_fast.rewards.base import between, isolated, text_of

SANDBOX = Path(__file__).with_name("sandbox.py")


def extract_code(text: str) -> str | None:
    """The last fenced block of Python in the last ``<answer>``, or in all of the text where there is none.

    An answer without a fenced block is code as a whole; a text with neither has none.
    """
    answer = between(text, "<answer>", "</answer>")
    blocks = (text if answer is None else answer).split("```")[1:-1:2]
    for languages in (("python", "py", "python3"), ("",)):
        for block in reversed(blocks):
            language, _, code = block.partition("\n")
            if language.strip().lower() in languages:
                return code
    return answer


def run_tests(code: str, tests: str, seconds: float) -> bool:
    """Whether `code`, and then `tests` in the same names, run to their end without an exception in `seconds`."""
    token = secrets.token_hex(16)
    request = json.dumps({"code": code, "tests": tests, "token": token, "seconds": seconds}).encode()
    with _folder() as folder:
        process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", "-B", str(SANDBOX)],
            # The order of sets, and so the reward, is the same every time.
            env={"PYTHONHASHSEED": "0", "LANG": "C.UTF-8"},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            with suppress(BrokenPipeError), process.stdin:
                process.stdin.write(request)
            answered = wait([process.stdout], seconds)
            return bool(answered) and os.read(process.stdout.fileno(), len(token) + 1) == token.encode()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()


@contextmanager
def _folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="grpo-fast-")
    try:
        yield folder
    finally:
        # Not shutil first: a chain of folders can be deeper than Python's recursion.
        if subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL).returncode:
            subprocess.run(["chmod", "-R", "u+rwX", folder], stderr=subprocess.DEVNULL)
            shutil.rmtree(folder, ignore_errors=True)


def _check_sandbox() -> None:
    if not sys.platform.startswith("linux"):
        raise UserError("unit_tests runs generated code under Linux only")
    probe = "import collections, heapq, json, random, re\nopen('file', 'w').close()"
    if not run_tests(probe, "assert re.match('a', 'a')", 30.0):
        raise UserError("unit_tests: the sandbox for generated code does not work here: a harmless program fails in it")
    if run_tests("import os\nif not os.fork():\n    os._exit(0)", "", 30.0):
        raise UserError("unit_tests: the sandbox for generated code does not work here: processes cannot be limited")


@isolated(over_limit=0.0, check=_check_sandbox)
def unit_tests(prompts, completions, tests, reward_timeout=10.0, **columns) -> list[float]:
    """1 where the completion's Python passes its ``tests``, else 0.

    Args:
        tests: for each sample code with asserts, or a list of them; all must pass. They see the completion's names.
        reward_timeout: seconds for a sample, of which the program gets all but a second.
    """
    seconds = max(reward_timeout - 1, reward_timeout / 2)
    rewards = []
    for completion, test in zip(completions, tests, strict=True):
        code = extract_code(text_of(completion))
        test = test if isinstance(test, str) else "\n".join(test)
        rewards.append(float(code is not None and run_tests(code, test, seconds)))
    return rewards
