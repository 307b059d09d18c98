"""Which pages of other sites may use /v1: none, unless --cors_origins names them. Other paths stay closed.

/v1 never accepts cookies (auth.py): such a page must send an API key of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatwright.config import UsageError

METHODS = "GET, POST, DELETE"
EXPOSED = "x-request-id, retry-after, x-chatwright-dropped-messages"
HEADER_NAMES = re.compile(r"[A-Za-z0-9-]{1,64}(\s*,\s*[A-Za-z0-9-]{1,64}){0,31}")


def check_origins(origins: Iterable[str]) -> list[str]:
    """The origins in the form in which browsers send them. Raises UsageError for an invalid origin."""
    return [_origin(text) for text in origins]


def _origin(text: str) -> str:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port, parts = "", None, urlsplit("")
    if (
        parts.scheme not in ("http", "https")
        or not host
        or parts.path not in ("", "/")
        or parts.query
        or parts.username
    ):
        raise UsageError(
            f"--cors_origins {text!r}: an origin is scheme, host and port, such as https://app.example.org "
            "or http://localhost:3000; there is no sign for all origins"
        )
    host = f"[{host}]" if ":" in host else host
    usual = {"http": 80, "https": 443}[parts.scheme]
    return f"{parts.scheme}://{host}" + ("" if port in (None, usual) else f":{port}")


def is_api(path: str) -> bool:
    """Whether a path belongs to the interface for programs, /v1."""
    return path == "/v1" or path.startswith("/v1/")


class Cors:
    """ASGI middleware: answers preflight requests of allowed origins, and lets their pages read responses."""

    def __init__(self, app: ASGIApp, *, origins: Iterable[str]) -> None:
        self._app, self._origins = app, frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a preflight request, or pass the request on."""
        if scope["type"] != "http" or not self._origins or not is_api(scope["path"]):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin", "")
        allowed = origin in self._origins

        async def sharing(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer.add_vary_header("origin")
                if allowed:
                    answer["access-control-allow-origin"] = origin
                    answer["access-control-expose-headers"] = EXPOSED
            await send(message)

        if allowed and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await _preflight(headers, sharing)
            return
        await self._app(scope, receive, sharing)


async def _preflight(headers: Headers, send: Send) -> None:
    wanted = headers.get("access-control-request-headers", "")
    given = wanted if HEADER_NAMES.fullmatch(wanted) else "authorization, content-type"
    answer = [
        (b"access-control-allow-methods", METHODS.encode()),
        (b"access-control-allow-headers", given.encode()),
        (b"access-control-max-age", b"600"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": answer})
    await send({"type": "http.response.body", "body": b""})
