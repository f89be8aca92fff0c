"""JSON over HTTP to a server that may die: bounded retries, and one line when it is gone."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any
from urllib.parse import urlsplit

from grpo_fast.errors import UserError, one_line

# Seconds before each further attempt after a lost connection or an error of the server's own.
RETRIES = (0.5, 1.0, 2.0)
# Requests that are under way at once.
PARALLEL = 256
# Seconds between looks at a silent server, and for how long it may leave such a look unanswered.
WATCH_EVERY, WATCH_TIMEOUT = 5.0, 30.0


class ServerError(Exception):
    """No usable answer after all attempts."""


class JsonClient:
    """Requests to one server. Proxies of the environment are not used.

    Args:
        base_url: ``http://host:port``, or https, with a path before the endpoints' own if there is one.

    Raises:
        UserError: no such address.
    """

    def __init__(self, base_url: str):
        try:
            parts = urlsplit(base_url)
            port, known = parts.port, parts.scheme in ("http", "https") and parts.hostname
        except ValueError:
            # Brackets, or a port, that are none.
            known = None
        if not known:
            raise UserError(f"{base_url!r} is not a server's address; it must be like http://127.0.0.1:8000")
        self.base_url = base_url.rstrip("/")
        self._parts, self._port = parts, port
        self._open: set[http.client.HTTPConnection] = set()
        self._lock = threading.Lock()
        self._hung_up = False

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        timeout: float | None = 60.0,
        retries: Sequence[float] | None = None,
    ) -> Any:
        """The JSON of the answer (None where it is empty).

        Args:
            body: sent as JSON.
            timeout: seconds without a byte from the server; None waits as long as the connection stands.
            retries: seconds before each further attempt (default: RETRIES); a request that the server refused (4xx)
                is not repeated.

        Raises:
            ServerError: no connection, an error of the server, or an answer that is not JSON.
        """
        for pause in (*(RETRIES if retries is None else retries), None):
            try:
                return self._once(method, path, body, timeout)
            except (OSError, http.client.HTTPException, _Broken) as error:
                reason = one_line(error)
            if pause is None or self._hung_up:
                raise ServerError(reason)
            time.sleep(pause)

    def post_all(self, path: str, bodies: Sequence[Any]) -> list[Any]:
        """The answers to all of `bodies`, however long they take while the server still answers ``GET /health``.

        Raises:
            ServerError: as `request`; all other requests are then given up, too.
        """
        self._hung_up = False
        with ThreadPoolExecutor(min(len(bodies), PARALLEL)) as pool:
            futures = [pool.submit(self.request, "POST", path, body, None) for body in bodies]
            try:
                pending = set(futures)
                while pending:
                    done, pending = wait(pending, WATCH_EVERY, FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    if not done:
                        self.request("GET", "/health", timeout=WATCH_TIMEOUT)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.hang_up()
                raise
        return [future.result() for future in futures]

    def hang_up(self) -> None:
        """End all requests under way."""
        self._hung_up = True
        with self._lock:
            for connection in self._open:
                if connection.sock is not None:
                    try:
                        connection.sock.shutdown(socket.SHUT_RDWR)
                    except OSError:
                        continue

    def _once(self, method: str, path: str, body: Any, timeout: float | None) -> Any:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname, self._port, timeout=10.0)
        with self._lock:
            self._open.add(connection)
        try:
            connection.connect()
            if self._hung_up and timeout is None:
                # It was on its way when the others were ended, and nobody would end it.
                raise ServerError("given up with the other requests")
            connection.sock.settimeout(timeout)
            content = None if body is None else json.dumps(body).encode()
            path = self._parts.path.rstrip("/") + path
            connection.request(method, path, content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode("utf-8", "replace")
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()
        if answer.status >= 500:
            raise _Broken(f"status {answer.status}: {one_line(text)}")
        if answer.status != 200:
            raise ServerError(f"status {answer.status}: {one_line(text)}")
        try:
            return json.loads(text) if text else None
        except ValueError:
            raise _Broken(f"not JSON: {one_line(text, 80)}") from None


class _Broken(Exception):
    """An answer that another attempt may mend."""
