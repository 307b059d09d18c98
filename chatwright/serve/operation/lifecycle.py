"""From start to end: whether the server takes new work, what is still under way, and the gate that refuses
the rest.

On the first SIGTERM or Ctrl-C the server drains (running.py): /ready says 503, new requests get 503 and are
told to come again, and what is under way is finished. The page's scripts may still follow and stop their
answers, and read.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from chatwright.serve.errors import ApiError

ALWAYS = ("/health", "/ready", "/metrics")
"""Paths that are served to the end."""


class Lifecycle:
    """What the parts of a server know in common about its life. Changed in the event loop and by signal
    handlers."""

    def __init__(self) -> None:
        self.draining = False
        self.in_flight = 0
        """HTTP requests that have come and whose answers are not sent yet."""


class DrainMiddleware:
    """ASGI middleware: while the server drains, new work is refused."""

    def __init__(self, app: ASGIApp, *, lifecycle: Lifecycle, retry_after: int) -> None:
        self._app, self._lifecycle = app, lifecycle
        self._headers = {"retry-after": str(retry_after), "connection": "close"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on."""
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
