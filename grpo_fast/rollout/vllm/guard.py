"""The key of a vLLM server: where both sides get it, and the server's middleware that asks for it.

vLLM's own check leaves out the paths over which weights are renewed and methods are called. The middleware is imported
in vLLM's processes, so nothing here needs the trainer.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import os
import re
from typing import Any

from grpo_fast.errors import UserError

# vLLM reads the same variable.
KEY_VARIABLE = "VLLM_API_KEY"
MIDDLEWARE = "grpo_fast.rollout.vllm.guard.Guard"
# Bytes of a request's body, and seconds in which it must arrive.
BODY_BYTES, BODY_TIMEOUT = 64 << 20, 60.0


def server_key(host: str) -> str | None:
    """The API key for a server at `host`, from the environment; None where this machine alone reaches the server.

    Raises:
        UserError: there is no key and `host` may be reached by others, or the key cannot be sent.
    """
    key = os.environ.get(KEY_VARIABLE) or None
    if key is None and not is_loopback(host):
        raise UserError(
            f"a vLLM server at {host} can be reached by others, so it needs a key: set {KEY_VARIABLE} in the "
            f"environment of both train and serve to one secret, as in: export {KEY_VARIABLE}=$(openssl rand -hex 32)"
        )
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise UserError(f"the value of {KEY_VARIABLE} is not allowed: it must be printable ASCII without spaces")
    return key


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine as it reaches itself; names other than ``localhost`` are not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """ASGI middleware: every path but ``/health`` needs the key of the environment, and bodies are bounded.

    Without a key it answers requests from this machine alone, and none that a web page makes in a browser there.
    """

    def __init__(self, app: Any):
        self.app, self.key = app, os.environ.get(KEY_VARIABLE) or None

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket") or scope["path"] == "/health":
            await self.app(scope, receive, send)
        elif not self._allowed(scope):
            await _refuse(scope, send, 401, f"this server asks for the key in its {KEY_VARIABLE}")
        elif scope["type"] == "websocket":
            await self.app(scope, receive, send)
        else:
            await self._with_body(scope, receive, send)

    def _allowed(self, scope: dict[str, Any]) -> bool:
        headers = dict(scope["headers"])
        if self.key is not None:
            return hmac.compare_digest(headers.get(b"authorization", b""), f"Bearer {self.key}".encode())
        # A socket in the file system has no client address, and the file's permissions.
        client = scope.get("client")
        return (client is None or is_loopback(client[0])) and b"origin" not in headers

    async def _with_body(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        return
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > BODY_BYTES:
                        await _refuse(scope, send, 413, f"a request may have {BODY_BYTES:,} bytes")
                        return
        except TimeoutError:
            await _refuse(scope, send, 408, f"a request must arrive in {BODY_TIMEOUT:g} s")
            return
        messages = iter([{"type": "http.request", "body": bytes(body), "more_body": False}])

        async def replay() -> dict[str, Any]:
            return next(messages, None) or await receive()

        await self.app(scope, replay, send)


async def _refuse(scope: dict[str, Any], send: Any, status: int, reason: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": reason})
        return
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": reason.encode()})
