"""The OpenAI-compatible interface: chat completions, completions, responses, embeddings, models."""

from __future__ import annotations

from fastapi import APIRouter

from chatwright.serve import errors
from chatwright.serve.api import chat, completions, embeddings, models, responses
from chatwright.serve.pool import ModelPool


def routes(pool: ModelPool) -> APIRouter:
    """All routes, for the models in `pool`."""
    router = APIRouter(responses=errors.DOCUMENTED)
    for module in (chat, completions, responses, embeddings, models):
        router.include_router(module.routes(pool))
    return router
