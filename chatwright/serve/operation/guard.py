"""Checks of every request before any route sees it: host name and origin (Guard) and size (BodyLimit). Guard
also adds the security headers to every response.

A server on 127.0.0.1 has no password, and every web page that its owner visits may send requests to it. Two
rules keep such pages out. First, the Host header must name this machine; this detects a page that points its
own domain at 127.0.0.1 ("DNS rebinding"). Second, a request from a page that changes something must come from
our own page (its Origin is this server) or from a site that cors.py allows. Programs send no Origin, so the
second rule does not concern them.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatwright.serve.operation.cors import is_api

SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # with "no-referrer" browsers send a form with Origin: null
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
DRAIN = 16
"""A body that is too large is read and discarded up to this multiple of the limit. A client reads only after
it has written: it then sees the response and not a broken connection."""
BODY_SECONDS = 60.0
"""Time, in seconds, in which a request's body has to arrive."""


def is_loopback(host: str) -> bool:
    """True for localhost and loopback addresses, which never leave this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware that checks host and origin. `hosts`: names accepted besides loopback ones; None
    accepts any name. `origins`: other sites whose pages may use /v1."""

    def __init__(self, app: ASGIApp, *, hosts: Iterable[str] | None, origins: Iterable[str] = ()) -> None:
        self._app = app
        self._hosts = None if hosts is None else {host.lower() for host in hosts}
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        headers = Headers(scope=scope)
        if problem := self._wrong_host(headers) or self._wrong_origin(scope, headers):
            await refuse(send_with_headers, 403, problem, "forbidden")
            return
        await self._app(scope, receive, send_with_headers)

    def _wrong_host(self, headers: Headers) -> str:
        if self._hosts is None:
            return ""
        host = _hostname(headers.get("host", ""))
        if is_loopback(host) or host in self._hosts:
            return ""
        return f"this server does not answer to the name {host!r}; start it with --allowed_hosts to add names"

    def _wrong_origin(self, scope: Scope, headers: Headers) -> str:
        origin = headers.get("origin")
        if scope["method"] in ("GET", "HEAD", "OPTIONS") or origin is None:
            return ""
        if _address(origin) and _address(origin) == headers.get("host", "").lower():
            return ""
        if origin in self._origins and is_api(scope["path"]):
            return ""
        return "requests from other sites' pages are not accepted"


class BodyLimit:
    """ASGI middleware: reads the body, and refuses one that is larger than `most` bytes or does not
    arrive."""

    def __init__(self, app: ASGIApp, *, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it on with its body already read."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._read(Headers(scope=scope), receive)
        except TimeoutError:
            problem = f"the request's body did not arrive within {BODY_SECONDS:g} seconds"
            await refuse(send, 408, problem, "request_timeout")
            return
        if body is None:
            await refuse(send, 413, f"the request is larger than {self._most} bytes", "request_too_large")
            return
        await self._app(scope, _replay(body, receive), send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The body, or None when it is too large."""
        announced = headers.get("content-length", "")
        total, kept = 0, bytearray()
        if announced.isdigit() and int(announced) > DRAIN * self._most:
            return None
        while total <= DRAIN * self._most:
            message = await receive()
            if message["type"] == "http.disconnect":
                return bytes(kept)
            total += len(message.get("body", b""))
            if total <= self._most:
                kept += message.get("body", b"")
            if not message.get("more_body"):
                break
        return bytes(kept) if total <= self._most else None


def _hostname(host: str) -> str:
    """The Host header without its port and brackets, in lower case; "" when it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _address(origin: str) -> str:
    """Host and port of an origin; "" when it is malformed."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body` first, then the connection's messages (only the disconnect is left)."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def refuse(send: Send, status: int, message: str, code: str) -> None:
    """Send an error in the shape that OpenAI's clients understand."""
    body = json.dumps(
        {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    )
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body.encode()})
