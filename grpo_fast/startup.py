"""What happens before anything heavy is imported: paths in any script, and Ctrl-C without a traceback."""

from __future__ import annotations

import codecs
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def use_utf8() -> None:
    """Start this program again in Python's UTF-8 mode where the locale has another encoding.

    Otherwise neither we nor the libraries could open, read or print what ASCII cannot express.
    """
    utf8 = codecs.lookup(sys.getfilesystemencoding()).name == "utf-8"
    if not utf8 and os.environ.get("PYTHONUTF8") != "1":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONUTF8": "1"})
    for stream in (sys.stdout, sys.stderr):
        # PYTHONIOENCODING may still ask for another one.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Within it, Ctrl-C ends the process on the spot, with status 130.

    For imports, during which there is nothing to lose: some of them swallow an exception that comes in their middle,
    or print it with a traceback.
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
