"""Who may ask the server: only who knows the token of its address, on this machine, from its own pages.

The token is the first part of every path, so that nothing else than the address is needed: no cookie,
which other servers of this machine would be sent. Requests that name another host (DNS rebinding) or come
from another origin are refused, and pages load nothing from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_INLINE = re.compile(rb"<script(?![^>]*\bsrc=)[^>]*>(.*?)</script>", re.DOTALL)
_LONGEST = 4096  # bytes of a path with its query


class Guard:
    """An ASGI application before another: it refuses strangers, and adds headers to every answer."""

    def __init__(self, inner: App, port: int, token: str) -> None:
        self.app = inner
        self._prefix = f"/{token}"
        self._hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        self._origins = {f"http://{host}" for host in self._hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None:
            scope["root_path"] = self._prefix
            await self.app(scope, receive, _Answer(send) if scope["type"] == "http" else send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _refuse(send, *refusal)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Return status and reason of a refusal; None where the request is let through."""
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        if len(headers.get("host", [])) != 1 or headers["host"][0] not in self._hosts:
            return 421, "This server answers to its own address alone."
        if any(origin not in self._origins for origin in headers.get("origin", [])):
            return 403, "Other pages may not ask this server."
        if "x-forwarded-prefix" in headers:
            return 400, "This server stands behind no other."
        path = str(scope["path"])
        if len(path) + len(scope.get("query_string", b"")) > _LONGEST:
            return 414, "The address is too long."
        mine = path[: len(self._prefix)].encode("utf-8", "replace")
        known = secrets.compare_digest(mine, self._prefix.encode())
        if not known or path[len(self._prefix) : len(self._prefix) + 1] not in ("", "/"):
            return 403, "Open the whole address that `excise ui` has printed."
        return None


async def _refuse(send: Send, status: int, reason: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *_FIXED]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{reason}\n".encode()})


# The library compiles its components in the browser, which takes `unsafe-eval`; inline scripts run only
# where they are the page's own, by their hashes, so what is put into a page later runs no script.
_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-eval'{hashes}; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; object-src 'none'"
)
_FIXED = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class _Answer:
    """The way back of one answer: it gets the headers, a page of HTML after it was read whole."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._body: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            names = {name.lower(): value for name, value in message["headers"]}
            packed = b"content-encoding" in names
            if names.get(b"content-type", b"").startswith(b"text/html") and not packed:
                self._start = message
                return
            await self._send(_with_headers(message, b""))
        elif self._start is not None:
            self._body.append(message.get("body", b""))
            if not message.get("more_body"):
                body = b"".join(self._body)
                await self._send(_with_headers(self._start, body))
                await self._send({"type": "http.response.body", "body": body})
        else:
            await self._send(message)


def _with_headers(start: Message, page: bytes) -> Message:
    digests = [hashlib.sha256(script).digest() for script in _INLINE.findall(page)]
    hashes = "".join(f" 'sha256-{base64.b64encode(d).decode()}'" for d in dict.fromkeys(digests))
    policy = (b"content-security-policy", _POLICY.format(hashes=hashes).encode())
    return {**start, "headers": [*start["headers"], *_FIXED, policy]}
