"""A process that scores one sample at a time for `WorkerPool`, which kills it when a sample takes too long.

Its limits need Linux or macOS: `pool.check_workers` refuses other systems before one is started.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
from multiprocessing.connection import Connection

from grpo_fast.rewards.calls import Outcome, call
from grpo_fast.rewards.registry import load_reward

# Bytes that a worker may allocate, and seconds of CPU time beyond the limit after which it ends without being killed,
# should the trainer be gone.
MEMORY = 4 << 30
GRACE = 5


def score(function, arguments: dict[str, list], timeout: float) -> Outcome:
    if "reward_timeout" in inspect.signature(function).parameters:
        return call(lambda **columns: function(**columns, reward_timeout=timeout), arguments, 1, timeout)
    return call(function, arguments, 1, timeout)


def serve(connection: Connection) -> None:
    """Answer each (function's name, arguments of one sample, timeout) twice: when it starts, and with its outcome."""
    import resource

    functions = {}
    while True:
        try:
            name, arguments, timeout = connection.recv()
        except EOFError:
            return
        if name not in functions:
            functions[name] = load_reward(name)
            if functions[name].prepare:
                functions[name].prepare()
        spent = resource.getrusage(resource.RUSAGE_SELF)
        _limit("RLIMIT_CPU", math.ceil(spent.ru_utime + spent.ru_stime + timeout + GRACE))
        connection.send_bytes(b"started")
        outcome = score(functions[name], arguments, timeout)
        try:
            reply = json.dumps([outcome.values[0], outcome.errors.get(0)], default=float)
        except (TypeError, ValueError):
            reply = json.dumps([None, f"returned {outcome.values[0]!r:.80}, which is not a number"])
        connection.send_bytes(reply.encode())


def _limit(name: str, value: int) -> None:
    import resource

    kind = getattr(resource, name)
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    _limit("RLIMIT_DATA", MEMORY)
    serve(Connection(int(sys.argv[1])))
