"""Conversations over HTTP: what the page's scripts read and change. Every route reads and changes only the
conversations of the browser that asks.

GET    /chat/conversations              ?search&before&before_id: titles, the newest first, a page of them
POST   /chat/conversations              a new one with its first message
GET    /chat/conversations/ID           the whole tree, and the job that runs on it
PATCH  /chat/conversations/ID           rename, show another branch, other model or settings
DELETE /chat/conversations/ID
POST   /chat/conversations/ID/messages  add a person's message, or another version of one (a sibling)
POST   /chat/conversations/ID/answers   start an answer to a message, or continue one -> a job (chat_page.py)
GET    /chat/conversations/ID/messages/N/tokens   an answer's tokens with their probabilities
GET    /chat/conversations.jsonl        everything, as a file
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from chatwright.feedback.store import Conversation, Owned, Summary, Turn
from chatwright.generate.sampling import Sampling
from chatwright.serve.answers import Answering, Ask, shown
from chatwright.serve.errors import ApiError
from chatwright.serve.jobs import JobStore
from chatwright.serve.operation.owner import Mine
from chatwright.serve.pool import ModelPool

PAGE = 50
"""Conversations in one page of the list."""
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
Text = Annotated[str, Field(min_length=1)]
Number = Annotated[int, Field(ge=1, lt=1 << 31)]
"""A message's id; the bound is that of the databases' integers."""
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Settings(BaseModel):
    """How answers are sampled."""

    model_config = STRICT
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1 << 31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    seed: Annotated[int, Field(ge=0, lt=1 << 53)] | None = None
    """Below 2^53: JavaScript's numbers are exact up to there."""
    max_tokens: Annotated[int, Field(ge=1)] = 512
    stop: Annotated[list[Text], Field(max_length=16)] = Field(default_factory=list)

    @classmethod
    def recommended(cls, own: Mapping[str, Any]) -> Settings:
        """The settings that a page begins with: those that the model's makers recommend, or the defaults."""
        most = {"temperature": 2.0, "repetition_penalty": 10.0}  # where the page's fields end
        return cls(**{name: min(value, most.get(name, value)) for name, value in own.items()})

    def sampling(self) -> Sampling:
        """The engine's settings. Raises UserError on values that it refuses."""
        values = self.model_dump()
        return Sampling(max_new_tokens=values.pop("max_tokens"), stop=tuple(values.pop("stop")), **values)


class NewConversation(BaseModel):
    """A first message."""

    model_config = STRICT
    content: Text
    model: Text
    system: str = ""
    settings: Settings = Field(default_factory=Settings)


class NewMessage(BaseModel):
    """A person's message below `parent`; with null, at the beginning of the conversation."""

    model_config = STRICT
    parent: Number | None
    content: Text


class NewAnswer(BaseModel):
    """Ask for an answer to the message `parent`, or for a continuation of the answer `continues`."""

    model_config = STRICT
    parent: Number | None = None
    continues: Number | None = None
    model: Text
    system: str = ""
    settings: Settings = Field(default_factory=Settings)
    probabilities: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> NewAnswer:
        if (self.parent is None) == (self.continues is None):
            raise ValueError("give either parent or continues")
        return self


class Changes(BaseModel):
    """The fields of a conversation to change; None leaves one as it is."""

    model_config = STRICT
    title: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    leaf: Number | None = None
    model: Text | None = None
    system: str | None = None
    settings: Settings | None = None


def routes(pool: ModelPool, jobs: JobStore, render: Callable[[str], str], save_seconds: float) -> APIRouter:
    """The routes above. `save_seconds`: how often an answer under way is saved."""
    router = APIRouter(prefix="/chat", include_in_schema=False)
    # Without the lock, two answers could begin in one conversation: between the check and the start.
    starting = asyncio.Lock()

    @router.get("/conversations")
    def page(
        mine: Mine, search: str = "", before: float | None = None, before_id: str = ""
    ) -> dict[str, Any]:
        seen = None if before is None else (before, before_id)
        found, more = mine.page(search=search.strip(), before=seen, limit=PAGE)
        return {"conversations": [_summary(one) for one in found], "more": more}

    @router.post("/conversations", status_code=201)
    def create(body: NewConversation, mine: Mine) -> dict[str, Any]:
        pool.check(body.model)
        settings = body.settings.model_dump()
        return _whole(mine.create(body.content, model=body.model, system=body.system, settings=settings))

    @router.get("/conversations.jsonl")
    def export(mine: Mine) -> StreamingResponse:
        headers = {"content-disposition": 'attachment; filename="conversations.jsonl"'}
        return StreamingResponse(mine.export(), media_type="application/jsonl", headers=headers)

    @router.get("/conversations/{conversation}")
    async def read(conversation: str, mine: Mine) -> dict[str, Any]:
        # Before the store is read: a job that ends meanwhile can still be followed.
        job = jobs.running_on(conversation)
        found = await asyncio.to_thread(mine.get, conversation)
        return _whole(found, {"id": job.id, **job.about} if job else None)

    @router.patch("/conversations/{conversation}")
    def change(conversation: str, body: Changes, mine: Mine) -> dict[str, Any]:
        if body.model is not None:
            pool.check(body.model)
        mine.change(conversation, **body.model_dump(exclude_none=True))
        return {"id": conversation}

    @router.delete("/conversations/{conversation}")
    async def delete(conversation: str, mine: Mine) -> dict[str, Any]:
        await asyncio.to_thread(mine.delete, conversation)
        if job := jobs.running_on(conversation):
            jobs.stop(job)
        return {"id": conversation}

    @router.post("/conversations/{conversation}/messages", status_code=201)
    def say(conversation: str, body: NewMessage, mine: Mine) -> dict[str, Any]:
        return shown(mine.add(conversation, body.parent, "user", body.content))

    @router.get("/conversations/{conversation}/messages/{number}/tokens")
    def tokens(conversation: str, number: Number, mine: Mine) -> dict[str, Any]:
        return {"tokens": mine.probabilities(conversation, number)}

    @router.post("/conversations/{conversation}/answers", status_code=201)
    async def answer(conversation: str, body: NewAnswer, mine: Mine) -> dict[str, Any]:
        pool.check(body.model)
        sampling = body.settings.sampling()
        async with starting:
            found = await asyncio.to_thread(mine.get, conversation)
            if jobs.running_on(conversation):
                raise ApiError(
                    409, "an answer is being written in this conversation; stop it first", code="answering"
                )
            jobs.make_room()
            with ExitStack() as if_refused:
                reservation = ExitStack()
                if_refused.callback(reservation.close)
                reservation.enter_context(pool.promised(body.model))
                ask = await asyncio.to_thread(_place, mine, found, body, sampling)
                about = {"turn": ask.turn.id, "content": ask.turn.text}
                work = Answering(
                    ask, pool, jobs, reservation=reservation, render=render, save_seconds=save_seconds
                )
                job = jobs.start(work, owner=mine.owner, subject=conversation, about=about)
                if_refused.pop_all()  # from here on the job owns the reservation
        return {"id": job.id, "turn": shown(ask.turn)}

    return router


def _place(mine: Owned, found: Conversation, body: NewAnswer, sampling: Sampling) -> Ask:
    """Find the answer's turn in the tree, or add one. Raises Full before a turn is added."""
    changes: dict[str, Any] = {
        "model": body.model,
        "system": body.system,
        "settings": body.settings.model_dump(),
    }
    earlier = None
    if body.continues is not None:
        turn = found.turn(body.continues)
        if turn.role != "assistant" or any(other.parent == turn.id for other in found.turns):
            raise ApiError(400, "only an answer at the end of a conversation can go on", param="continues")
        parent = turn.parent
        if turn.has_probabilities:
            earlier = mine.probabilities(found.id, turn.id)
        mine.change(found.id, leaf=turn.id, **changes)
    else:
        parent = body.parent
        if parent is None or found.turn(parent).role == "assistant":
            raise ApiError(400, "an answer is not what can be answered", param="parent")
        mine.change(found.id, **changes)
        turn = mine.add(found.id, parent, "assistant", "", model=body.model)
    messages = replace(found, system=body.system).messages(parent)
    previous = found.leaf if found.leaf is not None else parent
    return Ask(
        owner_view=mine,
        conversation=found.id,
        turn=turn,
        previous_leaf=previous or turn.id,
        model=body.model,
        messages=messages,
        sampling=sampling,
        probabilities=body.probabilities,
        earlier=earlier,
    )


def _summary(one: Summary) -> dict[str, Any]:
    return {
        "id": one.id,
        "title": one.title,
        "model": one.model,
        "created": one.created,
        "updated": one.updated,
    }


def _whole(found: Conversation, job: dict[str, Any] | None = None) -> dict[str, Any]:
    """A conversation as the page gets it; `job` names the answer under way."""
    return {
        **_summary(found),  # type: ignore[arg-type]
        "system": found.system,
        "settings": found.settings,
        "leaf": found.leaf,
        "turns": [shown(_as_it_is(turn, job)) for turn in found.turns],
        "job": {"id": job["id"], "turn": job["turn"]} if job else None,
    }


def _as_it_is(turn: Turn, job: dict[str, Any] | None) -> Turn:
    """The turn to show. An answer under way is shown as it was when its job began: the events add the rest.
    An unfinished answer without a job is shown as interrupted."""
    if job and job["turn"] == turn.id:
        return replace(turn, content=job["content"], finish_reason=None)
    if turn.role == "assistant" and turn.finish_reason is None:
        return replace(turn, finish_reason="interrupted")
    return turn
