"""The whole server as one ASGI application: guard, errors, interface, page."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.staticfiles import StaticFiles
from starlette.types import Scope

from chatwright import __version__
from chatwright.serve import api, chat_page, errors
from chatwright.serve.guard import Guard
from chatwright.serve.jobs import JobStore
from chatwright.serve.markdown import render
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


def document(app: FastAPI, pool: ModelPool) -> dict[str, Any]:
    """The OpenAPI document, in which `model` is one of the models served and errors have the shape they really have."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=__version__, routes=app.routes)
        schemas = made["components"]["schemas"]
        for schema in schemas.values():
            if "model" in schema.get("properties", {}):
                schema["properties"]["model"]["enum"] = pool.names
        for path in made["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # FastAPI's own; ours is 400 (errors.py)
                for parameter in operation.get("parameters", ()):
                    if parameter["name"] == "name":
                        parameter["schema"]["enum"] = pool.names
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        app.openapi_schema = made
    return app.openapi_schema


def create_app(
    pool: ModelPool,
    *,
    hosts: Iterable[str] | None = (),
    max_body: int = MAX_BODY,
    jobs: JobStore | None = None,
) -> FastAPI:
    """The application. `hosts`: names it answers to beside loopback ones, None for any. Closes the engines at its end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        pool.close()

    # No /docs: FastAPI's page loads its scripts from a CDN. The document itself is at /openapi.json.
    app = FastAPI(title="chatwright", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.pool = pool
    app.openapi = lambda: document(app, pool)  # type: ignore[method-assign]
    errors.install(app)
    app.include_router(api.routes(pool))
    app.include_router(chat_page.routes(pool, jobs or JobStore(render)))
    app.mount("/static", Static(directory=chat_page.STUDIO / "static"))
    app.add_middleware(errors.Crash)  # what is added last comes first
    app.add_middleware(Guard, hosts=hosts, max_body=max_body)
    return app
