"""The whole server as one ASGI application: guard, errors, interface, page."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from starlette.types import Scope

from chatwright.feedback.store import Store
from chatwright.serve import api, chat_page, errors
from chatwright.serve.guard import Guard
from chatwright.serve.jobs import JobStore
from chatwright.serve.pool import ModelPool

MAX_BODY = 1 << 20
"""Largest request in bytes: far more text than any model's context holds."""


class Static(StaticFiles):
    """Files that a browser asks about each time (a small 304), so that an upgrade shows at once."""

    async def get_response(self, path: str, scope: Scope) -> Any:
        """The file, or 304 when the browser has it."""
        response = await super().get_response(path, scope)
        response.headers["cache-control"] = "no-cache"
        return response


def create_app(
    pool: ModelPool,
    *,
    hosts: Iterable[str] | None = (),
    max_body: int = MAX_BODY,
    jobs: JobStore | None = None,
    store: str = "none",
) -> FastAPI:
    """The application. `hosts`: names it answers to beside loopback ones, None for any. Closes the engines at its end.

    `store`: where conversations are kept, as `feedback.store.Store` takes it. Raises StoreError.
    """
    conversations, answers = Store(store), jobs or JobStore()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await answers.close()
        pool.close()
        conversations.close()

    # No /docs: FastAPI's page loads its scripts from a CDN. The document itself is at /openapi.json.
    app = FastAPI(title="chatwright", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.pool = pool
    errors.install(app)
    app.include_router(api.routes(pool))
    app.state.store = conversations
    app.include_router(chat_page.routes(pool, answers))
    app.mount("/static", Static(directory=chat_page.STUDIO / "static"))
    app.add_middleware(Guard, hosts=hosts, max_body=max_body)
    return app
