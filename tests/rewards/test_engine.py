"""Running reward functions: concurrency, time limits, failures, and worker processes."""

import asyncio
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.rewards import RewardModel
from grpo_fast.train.metrics import reward_metrics


async def slow_length(prompts, completions, **columns):
    await asyncio.gather(*(asyncio.sleep(0.1) for _ in prompts))
    return [float(len(completion)) for completion in completions]


def test_functions_run_concurrently():
    """Functions that wait for each other would never end if they were called one after the other."""
    barrier = threading.Barrier(2, timeout=20)

    def waiting(prompts, completions, **columns):
        barrier.wait()
        return [1.0] * len(prompts)

    model = RewardModel(["exact_answer", "final_number", "digits_included"], None)
    model.functions = [slow_length, waiting, waiting]
    got = model(["a", "b"], ["c", "dd"], {})
    assert got.each.tolist() == [[1, 1, 1], [2, 1, 1]]


def test_async_function_is_cancelled_at_the_limit():
    cancelled = threading.Event()

    async def endless(prompts, completions, **columns):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    model = RewardModel(["exact_answer"], None, timeout=0.2, on_error="raise")
    model.functions = [endless]
    with pytest.raises(UserError, match=r"took longer than 0.2 s|raised TimeoutError"):
        model(["a"], ["b"], {})
    assert cancelled.wait(10)


def picky(prompts, completions, **columns):
    """Compares completions, and refuses some of them."""
    if "bad" in completions:
        raise ValueError(f"bad among {len(completions)}")
    return [math.inf if completion == "inf" else float(len(set(completions))) for completion in completions]


def test_failing_sample_has_no_reward_and_a_warning():
    model = RewardModel(["exact_answer", "digits_included"], None)
    model.functions[1] = picky
    warnings = []
    model.warn = warnings.append
    columns = {"answer": ["a"] * 5}
    got = model(["p" * 200, "q", "r", "s", "t"], ["a", "bad", "inf", "b", "b"], columns)
    # Without the one that raises, the batch has three different completions.
    assert got.each[:, 1].tolist() == pytest.approx([3, math.nan, math.nan, 3, 3], nan_ok=True)
    assert got.errors.tolist() == [[False, index in (1, 2)] for index in range(5)]
    assert got.total.tolist() == [4, 0, 0, 3, 3]
    assert len(warnings) == 1
    assert "'picky'" not in warnings[0]  # named as it is configured
    assert "'digits_included' raised ValueError: bad among 1 (test_engine.py, line" in warnings[0]
    assert "for the prompt 'q' and for 1 more of 5 samples" in warnings[0]
    metrics = reward_metrics(model.names, got, torch.zeros(5, dtype=torch.bool))
    assert metrics["rewards/digits_included/errors"] == pytest.approx(0.4)
    assert metrics["rewards/exact_answer/errors"] == 0
    model(["q"] * 2, ["bad", "a"], {"answer": ["a"] * 2})
    assert len(warnings) == 1


def test_function_that_fails_for_its_first_batch_raises():
    model = RewardModel(["exact_answer"], None)
    model.functions = [picky]
    with pytest.raises(UserError, match=r"raised ValueError: bad among 2 .* for the prompt 'p' and for 1 more"):
        model(["p", "q"], ["bad", "bad"], {})
    model.warn = lambda text: None
    assert model(["p"], ["good"], {}).total.item() == 1
    assert model(["p", "q"], ["bad", "bad"], {}).total.isnan().all()


def test_hanging_function_loses_its_batch():
    release = threading.Event()

    def hanging(prompts, completions, **columns):
        if "hang" in completions:
            release.wait(60)
        return [1.0] * len(prompts)

    model = RewardModel(["exact_answer"], None, timeout=0.1)
    model.functions, warnings = [hanging], []
    model.warn = warnings.append
    assert model(["p"], ["a"], {}).total.item() == 1
    start = time.monotonic()
    assert model(["p", "q"], ["hang", "a"], {}).total.isnan().all()
    assert model(["p"], ["a"], {}).total.isnan().all()
    assert time.monotonic() - start < 5
    assert "took longer than 0.1 s for each of 2 samples" in warnings[0]
    assert threading.active_count() < 10
    release.set()
    model.threads["exact_answer"].join(10)
    assert model(["p"], ["a"], {}).total.item() == 1


def test_reward_settings_out_of_range():
    for fields, message in (
        ({"reward_timeout": 0.0}, "reward_timeout=0.0"),
        ({"on_reward_error": "stop"}, "one of none, raise"),
    ):
        with pytest.raises(UserError, match=message):
            GRPOConfig(model_name_or_path="m", dataset_name="d", reward_funcs=["exact_answer"], **fields)


def test_workers_start_without_torch():
    code = "import sys, grpo_fast.rewards.workers; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


MARKED = """
import os, time
from grpo_fast.rewards import isolated

@isolated()
def mine(prompts, completions, factor, **columns):
    [text] = completions
    if text == "hang":
        while True:
            pass
    if text == "die":
        os._exit(3)
    if text == "raise":
        raise KeyError("no such key")
    if text == "pid":
        # The pool's process keeps this one.
        return [float(os.getppid())]
    if text == "regex":
        import re
        re.match(r"(a+)+$", "a" * 60 + "b")
    if text == "memory":
        return [float(len(bytearray(1 << 40)))]
    return [factor[0] * len(text)]
"""


def test_isolated_function_is_killed_at_the_limit(tmp_path):
    (tmp_path / "marked.py").write_text(MARKED)
    model = RewardModel([f"{tmp_path / 'marked.py'}:mine"], None, timeout=1.0)
    warnings = []
    model.warn = warnings.append
    texts = ["ab", "hang", "abc", "die", "raise", "regex", "memory", "abcd"]
    start = time.monotonic()
    got = model(list("pqrstuvw"), texts, {"factor": [10.0] * 8})
    assert time.monotonic() - start < 30
    nan = math.nan
    assert got.total.tolist() == pytest.approx([20, nan, 30, nan, nan, nan, nan, 40], nan_ok=True)
    assert "'mine' took longer than 1 s for the prompt 'q' and for 4 more of 8 samples" in warnings[0]
    # The workers are other processes than this one, and still work.
    again = model(["p"], ["ab"], {"factor": [1.0]})
    assert again.total.item() == 2
    workers = [worker.process for worker in model.pool.idle]
    assert model(["p"], ["pid"], {"factor": [1.0]}).each.item() in {process.pid for process in workers}
    model.pool.close()
    assert all(process.poll() is not None for process in workers)


BUSY = """
import os, re, subprocess, sys, time
from grpo_fast.rewards import isolated
from grpo_fast.rewards.functions.code import read_tests, run_tests
from grpo_fast.rewards.sandbox.isolation import choose
from grpo_fast.rewards.workers import WorkerPool

@isolated()
def busy(prompts, completions, **columns):
    [text] = completions
    if text == "idle":
        return [0.0]
    if text == "program":
        # The trials of the level end by themselves; the program after `started` does not.
        choose("available")
        open(columns["started"][0], "w").close()
        run_tests("import time\\ndef f(): time.sleep(1000)", read_tests("f()"), 1000.0)
    # One in this process's group, one in another.
    subprocess.Popen(["sleep", "1000"])
    subprocess.Popen(["sh", "-c", "sleep 1000 & sleep 1000"], start_new_session=True)
    open(columns["started"][0], "w").close()
    if text == "regex":
        # Python runs no signal handlers during a match.
        re.match(r"(a+)+$", "a" * 60 + "b")
    time.sleep(1000)

if __name__ == "__main__":
    kind, started = sys.argv[1:]
    arguments = {"prompts": ["p"], "completions": [kind], "started": [started]}
    pool = WorkerPool()
    pool.run(f"{__file__}:busy", arguments, 1, 1000.0, None)
    open(started, "w").close()
    time.sleep(1000)
"""


def descendants(process: int) -> dict[int, str]:
    """All descendants of a process, each with its start time."""
    below: dict[int, list[tuple[int, str]]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        below.setdefault(int(fields[1]), []).append((int(path.parent.name), fields[19]))
    found, waiting = {}, [process]
    while waiting:
        for child, start in below.get(waiting.pop(), []):
            found[child] = start
            waiting.append(child)
    return found


def alive(process: int, start: str) -> bool:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] not in "ZX" and fields[19] == start


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="other kernels do not tell a process of its parent's end"
)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize(("kind", "processes"), [("idle", 2), ("sleep", 6), ("regex", 6), ("program", 4)])
def test_workers_and_their_children_end_with_the_run(tmp_path, kind, processes, how):
    script, started = tmp_path / "busy.py", tmp_path / "started"
    script.write_text(BUSY)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen([sys.executable, str(script), kind, str(started)], env=environment)
    deadline = time.monotonic() + 60
    while not started.exists() or len(descendants(run.pid)) < processes:
        assert time.monotonic() < deadline
        assert run.poll() is None
        time.sleep(0.05)
    below = descendants(run.pid)
    run.send_signal(how)
    run.wait()
    deadline = time.monotonic() + 20
    while left := [process for process, start in below.items() if alive(process, start)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def test_workers_outlive_the_thread_that_needed_them(tmp_path):
    """The kernel signals a child when the thread that started it ends, as if that were the process."""
    (tmp_path / "marked.py").write_text(MARKED)
    model = RewardModel([f"{tmp_path / 'marked.py'}:mine"], None)
    first = model(["p"], ["pid"], {"factor": [1.0]}).each.item()
    time.sleep(0.3)
    assert model(["p"], ["pid"], {"factor": [1.0]}).each.item() == first
    model.pool.close()


def test_rewards_import_without_unix_modules():
    """As on Windows: modules for Unix are imported only where they are used."""
    code = (
        "import sys\nfor name in ('resource', 'fcntl', 'pwd', 'grp', 'termios'):\n    sys.modules[name] = None\n"
        "import grpo_fast.rewards, grpo_fast.rewards.workers, grpo_fast.rewards.functions.code\n"
        "from grpo_fast.errors import UserError\nsys.platform = 'win32'\n"
        "from grpo_fast.rewards.sandbox.isolation import choose\n"
        "try:\n    choose('available')\nexcept UserError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "unit_tests runs generated code under Linux only"
