"""The server's lifecycle: whether it takes new work, what is under way, and the drain middleware.

On the first SIGTERM or Ctrl-C the server drains (running.py): /ready and new requests get 503 with a
Retry-After, and the work under way is finished. The page's scripts may still read, and follow and stop
their answers.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from chatwright.serve.errors import ApiError

ALWAYS = ("/health", "/ready", "/metrics")
"""Paths that are served until the server ends."""


class Lifecycle:
    """State of the server's life that its parts share. Changed in the event loop and by signal handlers."""

    def __init__(self) -> None:
        self.draining = False
        self.in_flight = 0
        """HTTP requests whose responses are not completely sent yet."""


class DrainMiddleware:
    """ASGI middleware: refuses new work while the server drains."""

    def __init__(self, app: ASGIApp, *, lifecycle: Lifecycle, retry_after: int) -> None:
        self._app, self._lifecycle = app, lifecycle
        self._headers = {"retry-after": str(retry_after), "connection": "close"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it on."""
        if scope["type"] != "http" or not self._lifecycle.draining or _belongs_to_old_work(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(503, "the server is stopping", code="server_stopping", headers=self._headers)
        await error.response()(scope, receive, send)


def _belongs_to_old_work(scope: Scope) -> bool:
    path, reading = str(scope["path"]), scope["method"] in ("GET", "HEAD")
    if path in ALWAYS or path.startswith("/static/"):
        return True
    return path.startswith("/chat/") if reading else path.endswith("/stop")
