"""An answer as it is generated: text, tool calls, log-probabilities and finish reasons, for all interfaces.

Streams and whole answers are made from the same deltas, so that they cannot differ.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from chatwright.config import UserError
from chatwright.generate.request import Request as EngineRequest
from chatwright.generate.tool_calls import ArgumentsDelta, CallStarted, TextDelta, ToolCallParser, ToolEvent
from chatwright.serve import errors
from chatwright.serve.api.form import Form
from chatwright.serve.api.messages import compact
from chatwright.serve.api.probabilities import Spelling, TokenProbability, token_probabilities
from chatwright.serve.service import Answer, ChatService, Prepared

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
DROPPED_HEADER = "x-chatwright-dropped-messages"


@dataclass(frozen=True)
class CallDelta:
    """What is new in a call: its beginning (with id and name), or more of its arguments."""

    number: int
    """Which call of the answer, from 0."""
    id: str = ""
    name: str = ""
    """Given once, at the beginning."""
    arguments: str = ""


@dataclass(frozen=True)
class Delta:
    """What is new in one of the answers."""

    index: int
    text: str = ""
    tokens: tuple[TokenProbability, ...] = ()
    calls: tuple[CallDelta, ...] = ()
    finish: str | None = None
    """OpenAI's finish reason, in the last delta."""


@dataclass
class Call:
    """A tool call so far."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Whole:
    """One of the answers so far."""

    text: str = ""
    tokens: list[TokenProbability] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    finish: str = "length"

    def add(self, delta: Delta) -> None:
        """Append what is new."""
        self.text += delta.text
        self.tokens += delta.tokens
        for news in delta.calls:
            if news.name:
                self.calls.append(Call(news.id, news.name))
            self.calls[news.number].arguments += news.arguments
        self.finish = delta.finish or self.finish


class Reading:
    """The answers to one request."""

    def __init__(
        self, service: ChatService, prepared: Prepared, form: Form | None = None, *, ends: bool = False
    ) -> None:
        """`form`: the form of the answers; if it allows tool calls, they are parsed from the text. `ends`:
        whether the token that ends an answer is listed with the others."""
        self.service, self.prepared = service, prepared
        self.spelling = Spelling(service.model.tokenizer)
        self.headers = {DROPPED_HEADER: str(prepared.dropped)}
        self.new_tokens = self.cached_tokens = 0
        self._answer: Answer | None = None
        self._ends = ends
        self._tools = [tool.name for tool in form.tools] if form is not None and form.calls else []

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts; several answers to one prompt count it once."""
        return self.prepared.prompt_tokens

    def begin(self, stack: AsyncExitStack) -> None:
        """Ask the engine; closing `stack` frees its slots. Raises as `ChatService.answer`.

        Call it directly after `prepare`, which has checked that a slot is free, and before a stream sends its
        status: a refused request then still gets an error status.
        """
        self._answer = stack.enter_context(self.service.answer(self.prepared))

    async def deltas(self) -> AsyncGenerator[Delta]:
        """What is new, as it is generated. Call `begin` first."""
        assert self._answer is not None
        parsers = [self._parser(request) for request in self.prepared.requests]
        called = [0] * len(parsers)
        async for index, piece in self._answer:
            self.new_tokens += len(piece.ids)
            end_ids = frozenset() if self._ends else self.prepared.requests[index].end_ids
            tokens = tuple(token_probabilities(piece, end_ids))
            text, calls = piece.text, tuple[CallDelta, ...]()
            if (parser := parsers[index]) is not None:
                events = parser.push(piece.text)
                events += parser.flush() if piece.finish_reason is not None else []
                text, calls = _parted(events)
                called[index] += sum(bool(call.name) for call in calls)
            finish = openai_reason(piece.finish_reason, calls=called[index] > 0)
            if text or tokens or calls or finish:
                yield Delta(index, text, tokens, calls, finish)
        self.cached_tokens = self._answer.cached_tokens

    def _parser(self, request: EngineRequest) -> ToolCallParser | None:
        return ToolCallParser(self._tools, constrained=request.grammar is not None) if self._tools else None

    async def wholes(self) -> list[Whole]:
        """The answers, when all have ended."""
        wholes = [Whole() for _ in self.prepared.requests]
        async for delta in self.deltas():
            wholes[delta.index].add(delta)
        return wholes

    def usage(self) -> dict[str, Any]:
        """Token counts so far, in the shape of chat and completions."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.new_tokens,
            "total_tokens": self.prompt_tokens + self.new_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def _parted(events: list[ToolEvent]) -> tuple[str, tuple[CallDelta, ...]]:
    """A piece's text without the calls, and the calls."""
    text, calls = "", []
    for one in events:
        if isinstance(one, TextDelta):
            text += one.text
        elif isinstance(one, CallStarted):
            calls.append(CallDelta(one.index, one.id, one.name))
        elif isinstance(one, ArgumentsDelta):
            calls.append(CallDelta(one.index, arguments=one.text))
    return text, tuple(calls)


def openai_reason(reason: str | None, *, calls: bool = False) -> str | None:
    """OpenAI's finish reason. It has no "cancelled": an answer that the server cut short gets "length"."""
    if reason == "stop" and calls:
        return "tool_calls"
    return "length" if reason == "cancelled" else reason


def new_id(prefix: str) -> str:
    """A fresh identifier."""
    return f"{prefix}{secrets.token_hex(12)}"


def event(body: dict[str, Any], name: str = "") -> bytes:
    """A server-sent event."""
    return (f"event: {name}\n" if name else "").encode() + f"data: {compact(body)}\n\n".encode()


DONE = b"data: [DONE]\n\n"
STREAM_TOO: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""For the OpenAPI document: a route that answers with JSON, or with events when a stream is asked for."""


async def guarded(
    events: AsyncGenerator[bytes], refuse: Callable[[dict[str, Any]], bytes] = event
) -> AsyncGenerator[bytes]:
    """The stream; if it fails in the middle, it ends with an error event, which `refuse` writes."""
    try:
        async with aclosing(events):
            async for one in events:
                yield one
    except UserError as error:
        yield refuse(errors.from_user_error(error).body())
    except Exception:
        logger.exception("an answer failed")
        yield refuse(errors.body("the model failed while it answered", status=500))


class HeldStream(StreamingResponse):
    """A stream that holds resources, such as its model, and frees them at its end or if it never begins."""

    def __init__(self, events: AsyncGenerator[bytes], hold: AsyncExitStack, **settings: Any) -> None:
        super().__init__(events, media_type="text/event-stream", **settings)
        self._events, self._hold = events, hold

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, then free the resources."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._hold.aclose()


async def unless_gone(request: Request, work: Awaitable[dict[str, Any]], headers: dict[str, str]) -> Response:
    """The result of `work` as a response; if the client disconnects before, the work is cancelled.

    Returns only when the work has ended, so that the caller holds its resources exactly as long as needed.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
    if task.cancelled():
        return Response(status_code=499)  # nginx's number for "client closed request"
    return JSONResponse(task.result(), headers=headers)


async def to_the_end(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `work` in a thread, and wait for its end even if the caller is cancelled.

    A thread cannot be stopped, and its slot and model must stay reserved while it computes.
    """
    running = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(running)
    finally:
        if not running.done():
            await asyncio.wait({running})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
