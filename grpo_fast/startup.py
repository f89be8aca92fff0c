"""What runs before the heavy imports: UTF-8 under any locale, and Ctrl-C without a traceback."""

from __future__ import annotations

import codecs
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def use_utf8() -> None:
    """Restart this program in Python's UTF-8 mode if the locale has another encoding.

    Otherwise neither grpo-fast nor the libraries could open, read or print non-ASCII text.
    """
    utf8 = codecs.lookup(sys.getfilesystemencoding()).name == "utf-8"
    if not utf8 and os.environ.get("PYTHONUTF8") != "1":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONUTF8": "1"})
    for stream in (sys.stdout, sys.stderr):
        # PYTHONIOENCODING may still set another encoding.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """A context in which Ctrl-C ends the process immediately, with status 130.

    For imports, during which nothing can be lost: some of them swallow a KeyboardInterrupt or print its traceback.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: object) -> None:
    os.write(2, b"\ngrpo-fast: interrupted\n")
    os._exit(130)
