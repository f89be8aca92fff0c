"""SIGINT, SIGTERM and SIGHUP during a run: the first signal asks it to stop, a second one ends it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable
from contextlib import suppress

from grpo_fast.distributed.processes import is_main, largest, size

# A terminal that closes sends SIGHUP, often twice; Windows has no such signal.
HANGUP = getattr(signal, "SIGHUP", None)
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([HANGUP] if HANGUP else []))
NOTE = b"\nstopping after this generation batch, with a checkpoint"

_RESTORED = object()


class Interrupt:
    """A context in which the first signal is only stored in ``signal``; after it, SIGINT and SIGTERM act as before.

    Further SIGHUPs have no effect, and a signal that was ignored before (SIGHUP under nohup) stays ignored. If there
    are several processes, each keeps storing signals, since their launcher forwards its own. Outside of the main
    thread, which alone receives signals in Python, nothing changes.
    """

    def __init__(self):
        self.signal: int | None = None
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._handlers = {number: signal.signal(number, self._keep) for number in heard}
        return self

    def __exit__(self, *_) -> None:
        self._restore(self._handlers)

    def _restore(self, numbers: Iterable[int]) -> None:
        for number in list(numbers):
            # Another signal may arrive here and restore the handlers first.
            handler = self._handlers.pop(number, _RESTORED)
            if handler is not _RESTORED:
                # A handler that was not set from Python reads as None.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _keep(self, number: int, frame: object) -> None:
        first, self.signal = self.signal is None, self.signal or number
        if size() == 1:
            self._restore(self._handlers.keys() - {HANGUP})
        if first and is_main():
            # Not print, which may be interrupted by this handler; and stderr may be closed.
            with suppress(OSError):
                os.write(2, NOTE + (b"; a second signal stops at once\n" if size() == 1 else b"\n"))

    def agree(self) -> int | None:
        """The signal that any process of the run has stored; all of them call this at the same point."""
        self.signal = largest(self.signal or 0) or None
        return self.signal

    def exit(self) -> None:
        """End as the signal would: a KeyboardInterrupt after SIGINT, otherwise a SystemExit with status 143 or 129."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.signal)
