"""SIGINT and SIGTERM while a run goes on: the first asks it to stop, the second ends it."""

from __future__ import annotations

import os
import signal
import threading

from grpo_fast.distributed import is_main, largest, size

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTE = b"\nstopping after this generation batch, with a checkpoint"


class Interrupt:
    """Within it, the first signal is only kept in ``signal``; after that both do again what they did before.

    Of several processes, whose launcher passes on what it gets itself, each keeps all signals. Outside of the main
    thread, where Python takes no signals, nothing changes.
    """

    def __init__(self):
        self.signal: int | None = None
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._keep) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        while self._handlers:
            # A handler that was not set from Python reads as None.
            number, handler = self._handlers.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _keep(self, number: int, frame: object) -> None:
        first, self.signal = self.signal is None, number
        if size() == 1:
            self.__exit__()
        if first and is_main():
            # Not print: the handler may run in the middle of one.
            os.write(2, NOTE + (b"; a second signal stops at once\n" if size() == 1 else b"\n"))

    def agree(self) -> int | None:
        """The signal that any process of the run has kept; asked by all of them at the same point."""
        self.signal = largest(self.signal or 0) or None
        return self.signal

    def exit(self) -> None:
        """End as a program that was stopped by the signal does: with status 130 or 143.

        Raises:
            KeyboardInterrupt: after SIGINT.
            SystemExit: after SIGTERM.
        """
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.signal)
