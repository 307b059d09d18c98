"""The whole server as one ASGI application: guard, errors, interface, page.

A request passes, in this order: AccessLogMiddleware (id, log, figures), Guard (host, origin), Cors,
DrainMiddleware (is the server stopping?), AuthMiddleware (keys), BodyLimit, Crash, and then its route.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from starlette.types import Scope

from chatwright.feedback.store import Quota, Store
from chatwright.serve import api, chat_page, errors
from chatwright.serve.document import document
from chatwright.serve.jobs import JobStore
from chatwright.serve.operation import login, status
from chatwright.serve.operation.access_log import AccessLog, AccessLogMiddleware
from chatwright.serve.operation.auth import Authenticator, AuthMiddleware
from chatwright.serve.operation.cors import Cors
from chatwright.serve.operation.guard import BodyLimit, Guard
from chatwright.serve.operation.keys import KeyRing
from chatwright.serve.operation.lifecycle import DrainMiddleware, Lifecycle
from chatwright.serve.operation.telemetry import Telemetry
from chatwright.serve.pool import ModelPool

MAX_BODY = 1 << 20
"""Largest request in bytes: far more text than any model's context holds."""


class Static(StaticFiles):
    """Files that a browser revalidates each time (a small 304), so that an upgrade shows at once."""

    async def get_response(self, path: str, scope: Scope) -> Any:
        """The file, or 304 when the browser has its current version."""
        response = await super().get_response(path, scope)
        response.headers["cache-control"] = "no-cache"
        return response


@dataclass(frozen=True)
class Operation:
    """How an application is run: who may use it, its limits, and what it logs."""

    hosts: Iterable[str] | None = ()
    """Host names it answers to besides loopback ones; None for any."""
    origins: Iterable[str] = ()
    """Other sites whose pages may use /v1."""
    keys: KeyRing | None = None
    """Keys that give access; None: everybody has access."""
    max_body: int = MAX_BODY
    log: AccessLog | None = None
    keep_texts: bool = False
    """Whether the log has the prompts and the answers."""
    quota: Quota = field(default_factory=Quota)
    """The most that is kept of conversations."""
    drain_seconds: float = 30.0
    """Time the server has to stop; refused clients get it as Retry-After."""


def create_app(
    pool: ModelPool,
    *,
    operation: Operation = Operation(),
    jobs: JobStore | None = None,
    store: str = "none",
) -> FastAPI:
    """The application. Closes the engines, the store and the log at its end.

    `store`: where conversations are kept, as `feedback.store.Store` takes it. Raises StoreError.
    """
    conversations, answers = Store(store, quota=operation.quota), jobs or JobStore()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await answers.close()
        await asyncio.to_thread(pool.close)
        await asyncio.to_thread(conversations.close)
        if operation.log is not None:
            await asyncio.to_thread(operation.log.close)

    # No /docs: FastAPI's page loads its scripts from a CDN. The document itself is at /openapi.json.
    app = FastAPI(title="chatwright", docs_url=None, redoc_url=None, lifespan=lifespan)
    lifecycle = Lifecycle()
    telemetry = Telemetry(pool, lifecycle)
    app.state.pool, app.state.lifecycle, app.state.keys = pool, lifecycle, operation.keys
    app.state.store = conversations
    app.openapi = lambda: document(app, pool)  # type: ignore[method-assign]
    errors.install(app)
    app.include_router(status.routes(pool, lifecycle, telemetry, names=operation.keys is None))
    app.include_router(api.routes(pool))
    app.include_router(chat_page.routes(pool, answers))
    app.mount("/static", Static(directory=chat_page.STUDIO / "static"))
    # Starlette runs the middleware added last first.
    app.add_middleware(errors.Crash)
    app.add_middleware(BodyLimit, most=operation.max_body)
    if operation.keys is not None:
        app.state.authenticator = authenticator = Authenticator(operation.keys)
        app.include_router(login.routes(authenticator))
        app.add_middleware(AuthMiddleware, authenticator=authenticator, login=login.page_maker())
    app.add_middleware(
        DrainMiddleware, lifecycle=lifecycle, retry_after=max(1, math.ceil(operation.drain_seconds))
    )
    app.add_middleware(Cors, origins=operation.origins)
    app.add_middleware(Guard, hosts=operation.hosts, origins=operation.origins)
    app.add_middleware(
        AccessLogMiddleware,
        lifecycle=lifecycle,
        telemetry=telemetry,
        log=operation.log,
        keep_texts=operation.keep_texts,
    )
    return app
