"""GET /v1/models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from chatwright.serve.pool import ModelPool


def routes(pool: ModelPool) -> APIRouter:
    """The routes."""
    router = APIRouter()

    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": pool.created(name), "owned_by": "chatwright"}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in pool.names]}

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return card(name)

    return router
