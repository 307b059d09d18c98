"""The chat page, and the routes that its scripts use besides those of conversations.py.

GET  /, /c/ID                 the page; its scripts choose the conversation to show
POST /chat/owner              sets the cookie that says whose conversations are shown (owner.py)
GET  /chat/models             {"models": [{"name", "loaded", "window"}]}, the default one first
GET  /chat/jobs/ID/events     ?after=N: the events after number N, one JSON object per line (jobs.py,
                              answers.py)
POST /chat/jobs/ID/stop       end the answer where it is
POST /chat/render             {"texts": [...]} -> {"html": [...]}: Markdown of earlier answers
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import jinja2
from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from chatwright.feedback.store import Owned
from chatwright.serve import conversations
from chatwright.serve.errors import ApiError
from chatwright.serve.jobs import Job, JobStore
from chatwright.serve.markdown import render
from chatwright.serve.operation.owner import Mine, give_owner
from chatwright.serve.operation.request_context import context_of
from chatwright.serve.pool import ModelPool

STUDIO = Path(__file__).parent / "studio"


class RenderRequest(BaseModel):
    """Answers to show again."""

    model_config = ConfigDict(strict=True, extra="forbid")
    texts: Annotated[list[str], Field(max_length=2048)]


def routes(pool: ModelPool, jobs: JobStore, *, save_seconds: float = 1.0) -> APIRouter:
    """The page's routes. `save_seconds`: how often an answer under way is saved."""
    router = APIRouter(include_in_schema=False)
    router.include_router(conversations.routes(pool, jobs, render, save_seconds))
    pages = jinja2.Environment(loader=jinja2.FileSystemLoader(STUDIO / "templates"), autoescape=True)

    def find(job_id: str, mine: Owned) -> Job:
        if job := jobs.get(job_id, mine.owner):
            return job
        raise ApiError(404, "this answer is no longer on the server", code="job_not_found")

    def models() -> list[dict[str, Any]]:
        windows = {service.name: service.context for service in pool.services}
        return [{"name": name, "loaded": name in windows, "window": windows.get(name)} for name in pool.names]

    @router.get("/")
    @router.get("/c/{conversation}")
    async def page(request: Request, conversation: str = "") -> HTMLResponse:
        own = next((one.model.own_sampling for one in pool.services if one.name == pool.names[0]), {})
        settings = conversations.Settings.recommended(own)
        context = {"models": models(), "settings": settings, "key": context_of(request).key}
        return HTMLResponse(pages.get_template("chat.html").render(context))

    @router.post("/chat/owner")
    async def owner(request: Request, response: Response) -> dict[str, Any]:
        give_owner(request, response)
        return {}

    @router.get("/chat/models")
    async def list_models() -> dict[str, Any]:
        return {"models": models()}

    @router.get("/chat/jobs/{job_id}/events")
    async def events(job_id: str, mine: Mine, after: Annotated[int, Field(ge=0)] = 0) -> StreamingResponse:
        return StreamingResponse(jobs.follow(find(job_id, mine), after), media_type="application/x-ndjson")

    @router.post("/chat/jobs/{job_id}/stop")
    async def stop(job_id: str, mine: Mine) -> dict[str, Any]:
        jobs.stop(find(job_id, mine))
        return {"id": job_id}

    @router.post("/chat/render")
    async def render_again(body: RenderRequest) -> dict[str, Any]:
        return {"html": await asyncio.to_thread(lambda: [render(text) for text in body.texts])}

    return router
