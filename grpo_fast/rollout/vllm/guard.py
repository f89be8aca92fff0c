"""The API key of a vLLM server: where both sides read it, and the middleware with which the server checks it.

vLLM's own check does not cover the paths that update weights and call methods. vLLM's processes import this module, so
it must not import the trainer.
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
# Most bytes of a request's body, and seconds for it to arrive.
BODY_BYTES, BODY_TIMEOUT = 64 << 20, 60.0


def server_key(host: str) -> str | None:
    """The API key for a server at `host`, from the environment; None if it is not set and `host` is a loopback address.

    Raises:
        UserError: no key is set and others may reach `host`, or the key cannot be sent in a header.
    """
    key = os.environ.get(KEY_VARIABLE) or None
    if key is None and not is_loopback(host):
        raise UserError(
            f"other machines can reach a vLLM server at {host}, so it needs a key: set {KEY_VARIABLE} to the same "
            f"secret in the environment of train and serve, as in: export {KEY_VARIABLE}=$(openssl rand -hex 32)"
        )
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise UserError(f"the value of {KEY_VARIABLE} is not allowed: it must be printable ASCII without spaces")
    return key


def is_loopback(host: str) -> bool:
    """Whether `host` is a loopback address or ``localhost``; other names are not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """ASGI middleware: every path except ``/health`` requires the key from the environment, and bodies are bounded.

    Without a key it answers only requests from this machine, and none that a web page makes in a browser.
    """

    def __init__(self, app: Any):
        self.app, self.key = app, os.environ.get(KEY_VARIABLE) or None

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket") or scope["path"] == "/health":
            await self.app(scope, receive, send)
        elif not self._allowed(scope):
            await _refuse(scope, send, 401, f"this server requires the key in its {KEY_VARIABLE}")
        elif scope["type"] == "websocket":
            await self.app(scope, receive, send)
        else:
            await self._with_body(scope, receive, send)

    def _allowed(self, scope: dict[str, Any]) -> bool:
        headers = dict(scope["headers"])
        if self.key is not None:
            return hmac.compare_digest(headers.get(b"authorization", b""), f"Bearer {self.key}".encode())
        # A Unix socket has no client address; its file permissions protect it.
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
                        await _refuse(scope, send, 413, f"a request may have at most {BODY_BYTES:,} bytes")
                        return
        except TimeoutError:
            await _refuse(scope, send, 408, f"a request must arrive within {BODY_TIMEOUT:g} s")
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
