"""JSON over HTTP to a server that may fail at any time: time, size and retries are bounded."""

from __future__ import annotations

import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any
from urllib.parse import urlsplit

from grpo_fast.errors import UserError, one_line
from grpo_fast.files import parse_json

# Seconds before each further attempt after a lost connection or a server error (5xx).
RETRIES = (0.5, 1.0, 2.0)
# Most pending requests.
PARALLEL = 256
# Seconds between health checks of a silent server, and seconds for it to answer one.
WATCH_EVERY, WATCH_TIMEOUT = 5.0, 30.0
# Seconds for an answer to arrive after its first byte, and the bytes per second that extend this time.
ANSWER_TIMEOUT, SLOWEST = 60.0, 16 << 10
# Most bytes of an answer, by default.
ANSWER_BYTES = 16 << 20


class ServerError(Exception):
    """All attempts failed to get a usable answer."""


class KeyRefused(ServerError):
    """The server requires an API key, or another one."""


class JsonClient:
    """Requests to one server. Proxies from the environment are ignored, and redirects are not followed.

    Args:
        base_url: ``http://host:port`` or ``https://host:port``, optionally with a path that precedes the endpoints'.
        key: API key to send with every request.

    Raises:
        UserError: `base_url` is not an HTTP address.
    """

    def __init__(self, base_url: str, key: str | None = None):
        try:
            parts = urlsplit(base_url)
            port, known = parts.port, parts.scheme in ("http", "https") and parts.hostname
        except ValueError:
            # Invalid brackets or an invalid port.
            known = None
        if not known:
            raise UserError(f"{base_url!r} is not a server's address; it must be like http://127.0.0.1:8000")
        self.base_url, self.key = base_url.rstrip("/"), key
        self._parts, self._port = parts, port
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._hung_up = False

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        timeout: float | None = 60.0,
        retries: Sequence[float] | None = None,
        max_bytes: int = ANSWER_BYTES,
        parse: Callable[[str], Any] = parse_json,
    ) -> Any:
        """Send a request and return the JSON of the answer, or None if the answer is empty.

        Args:
            body: sent as JSON.
            timeout: seconds for the answer to arrive; None waits for its start as long as the connection is open, and
                ANSWER_TIMEOUT for the rest. An answer at SLOWEST or faster is read to its end.
            retries: seconds before each further attempt (default: RETRIES); a request that the server refuses (4xx),
                or whose answer is too long, is not repeated.
            max_bytes: the longest allowed answer.
            parse: makes the result from the answer's text, or raises a ValueError.

        Raises:
            ServerError: no connection, an error of the server, or an answer that is too slow, too long or not JSON.
        """
        for pause in (*(RETRIES if retries is None else retries), None):
            try:
                return self._once(method, path, body, timeout, max_bytes, parse)
            except (OSError, http.client.HTTPException, _Broken) as error:
                reason = one_line(error)
            if pause is None or self._hung_up:
                raise ServerError(reason)
            time.sleep(pause)

    def post_all(self, path: str, bodies: Sequence[Any], patience: float, max_bytes: Sequence[int]) -> list[Any]:
        """Post all `bodies` and return their answers, as long as the server answers ``GET /health``.

        Args:
            patience: seconds in which at least one pending answer must arrive.
            max_bytes: the longest allowed answer to each body.

        Raises:
            ServerError: as `request`; all other requests are then ended as well.
        """
        self._hung_up = False
        with ThreadPoolExecutor(min(len(bodies), PARALLEL)) as pool:
            futures = [
                pool.submit(self.request, "POST", path, body, None, None, limit)
                for body, limit in zip(bodies, max_bytes, strict=True)
            ]
            try:
                pending, last = set(futures), time.monotonic()
                while pending:
                    done, pending = wait(pending, WATCH_EVERY, FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    if done:
                        last = time.monotonic()
                    elif time.monotonic() - last > patience:
                        raise ServerError(f"no answer in {patience:g} s")
                    else:
                        self.request("GET", "/health", timeout=WATCH_TIMEOUT)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.hang_up()
                raise
        return [future.result() for future in futures]

    def hang_up(self) -> None:
        """End all pending requests."""
        self._hung_up = True
        with self._lock:
            for connected in self._open:
                try:
                    connected.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue

    def _once(
        self, method: str, path: str, body: Any, timeout: float | None, max_bytes: int, parse: Callable[[str], Any]
    ) -> Any:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname, self._port, timeout=10.0)
        connection.response_class = lambda sock, **options: http.client.HTTPResponse(_Paced(sock, timeout), **options)
        connected = None
        try:
            connection.connect()
            connected = connection.sock
            with self._lock:
                self._open.add(connected)
            if self._hung_up and timeout is None:
                # It connected while `hang_up` ended the others, so `hang_up` missed it.
                raise ServerError("ended with the other requests")
            connected.settimeout(ANSWER_TIMEOUT)
            headers = {"Content-Type": "application/json"}
            if self.key is not None:
                headers["Authorization"] = f"Bearer {self.key}"
            content = None if body is None else json.dumps(body).encode()
            connection.request(method, self._parts.path.rstrip("/") + path, content, headers)
            answer = connection.getresponse()
            text = _read(answer, max_bytes).decode("utf-8", "replace")
        finally:
            with self._lock:
                self._open.discard(connected)
            connection.close()
        if answer.status >= 500:
            raise _Broken(f"status {answer.status}: {one_line(text)}")
        if answer.status in (401, 403):
            raise KeyRefused(f"status {answer.status}")
        if answer.status != 200:
            raise ServerError(f"status {answer.status}: {one_line(text)}")
        try:
            return parse(text) if text else None
        except ValueError as error:
            raise _Broken(f"not JSON ({one_line(error, 80)}): {one_line(text, 80)}") from None


class _Broken(Exception):
    """An error that another attempt may not have."""


class _Paced(io.RawIOBase):
    """A socket for `http.client` with a deadline for the whole answer.

    Args:
        connected: the socket.
        timeout: seconds from now; None allows ANSWER_TIMEOUT from the first byte.
    """

    def __init__(self, connected: socket.socket, timeout: float | None):
        self.socket, self.raw = connected, connected.makefile("rb", buffering=0)
        self.end = None if timeout is None else time.monotonic() + timeout

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        # Bytes that arrived before the deadline are read even after it: this thread may have waited for others.
        self.socket.settimeout(None if self.end is None else max(self.end - time.monotonic(), 0.0))
        count = self.raw.readinto(buffer)
        if count is None:
            raise TimeoutError("the answer came too slowly")
        self.end = (time.monotonic() + ANSWER_TIMEOUT if self.end is None else self.end) + count / SLOWEST
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()


def _read(answer: http.client.HTTPResponse, most: int) -> bytes:
    content = bytearray()
    while part := answer.read(1 << 16):
        content += part
        if len(content) > most:
            raise ServerError(f"an answer of more than {most:,} bytes")
    return bytes(content)
