"""The chat page and what its scripts talk to.

GET  /                        the page
POST /chat/jobs               {"messages": [...], "temperature", "max_tokens"} -> {"id", "dropped"}
GET  /chat/jobs/ID/events     ?after=N: the events behind number N, one JSON object per line (see jobs.py)
POST /chat/jobs/ID/stop       end the answer where it is
POST /chat/render             {"texts": [...]} -> {"html": [...]}: Markdown of earlier answers, after a reload
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any

import jinja2
from fastapi import APIRouter
from fastapi.responses import HTMLResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from chatwright.generate.sampling import Sampling
from chatwright.serve.api.messages import ChatMessage
from chatwright.serve.errors import ApiError
from chatwright.serve.jobs import Job, JobStore
from chatwright.serve.markdown import render
from chatwright.serve.pool import ModelPool

STUDIO = Path(__file__).parent / "studio"
DEFAULT_TEMPERATURE = 0.7
DEFAULT_NEW_TOKENS = 256


class JobRequest(BaseModel):
    """A conversation whose next answer is wanted."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=2048)]
    temperature: Annotated[float, Field(ge=0, le=2)] = DEFAULT_TEMPERATURE
    max_tokens: Annotated[int, Field(ge=1)] = DEFAULT_NEW_TOKENS


class RenderRequest(BaseModel):
    """Answers to show again."""

    model_config = ConfigDict(strict=True, extra="forbid")
    texts: Annotated[list[str], Field(max_length=2048)]


def routes(pool: ModelPool, jobs: JobStore) -> APIRouter:
    """The page's routes."""
    router = APIRouter(include_in_schema=False)
    pages = jinja2.Environment(loader=jinja2.FileSystemLoader(STUDIO / "templates"), autoescape=True)

    def find(job_id: str) -> Job:
        if job := jobs.get(job_id):
            return job
        raise ApiError(404, "this answer is no longer on the server", code="job_not_found")

    @router.get("/")
    async def page() -> HTMLResponse:
        async with pool.use(pool.default) as service:
            context = {
                "model": service.name,
                "window": service.context,
                "temperature": DEFAULT_TEMPERATURE,
                "max_tokens": min(DEFAULT_NEW_TOKENS, service.context // 2),
            }
        return HTMLResponse(pages.get_template("chat.html").render(context))

    @router.post("/chat/jobs", status_code=201)
    async def start(body: JobRequest) -> dict[str, Any]:
        messages = [message.plain() for message in body.messages]
        sampling = Sampling(temperature=body.temperature, max_new_tokens=body.max_tokens)
        async with AsyncExitStack() as stack:
            service = await stack.enter_async_context(pool.use(pool.default))
            prepared = await service.prepare(messages, sampling)
            job = jobs.start(service, prepared, hold=stack.pop_all())
        return {"id": job.id, "dropped": prepared.dropped}

    @router.get("/chat/jobs/{job_id}/events")
    async def events(job_id: str, after: Annotated[int, Field(ge=0)] = 0) -> StreamingResponse:
        return StreamingResponse(jobs.follow(find(job_id), after), media_type="application/x-ndjson")

    @router.post("/chat/jobs/{job_id}/stop")
    async def stop(job_id: str) -> dict[str, Any]:
        jobs.stop(find(job_id))
        return {"id": job_id}

    @router.post("/chat/render")
    async def render_again(body: RenderRequest) -> dict[str, Any]:
        return {"html": await asyncio.to_thread(lambda: [render(text) for text in body.texts])}

    return router
