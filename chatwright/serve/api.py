"""The OpenAI-compatible interface: POST /v1/chat/completions, GET /v1/models.

Supported parameters are the fields of `ChatRequest`. Of the others, those that would change the answer are refused
with 400 (`REFUSED`, unless they have the value that asks for nothing), those that would not are ignored (`IGNORED`),
and names that nobody knows are refused. `max_tokens` is an upper bound and may exceed the model's context.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.types import Receive, Scope, Send

from chatwright.chat import Message
from chatwright.config import UserError, near_match
from chatwright.generate.sampling import Sampling
from chatwright.serve import errors
from chatwright.serve.pool import ModelPool
from chatwright.serve.service import Answer, ChatService, Prepared

logger = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 512
"""Length of an answer for which no maximum is asked."""
DROPPED_HEADER = "x-chatwright-dropped-messages"

REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}
"""Parameters that this server does not carry out -> the values (beside null) that ask for nothing."""
IGNORED = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "parallel_tool_calls",
    "prediction",
    "reasoning_effort",
    "verbosity",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
}
"""Parameters that concern bookkeeping, speed or features that only a refused parameter would turn on."""


class TextPart(BaseModel):
    """One piece of a content that is given as a list."""

    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn. `developer` counts as `system`; fields such as `name` are ignored."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_calls(cls, data: Any) -> Any:
        for name in ("tool_calls", "function_call", "audio"):
            if isinstance(data, dict) and data.get(name):
                raise _parameter_error(
                    "unsupported_parameter", f"messages: {name} is not supported", "messages"
                )
        if isinstance(data, dict) and data.get("content") is None and data.get("role") != "assistant":
            raise _parameter_error(
                "unsupported_value", "messages: content must be text or text parts", "messages"
            )
        return data

    def plain(self) -> Message:
        """With the parts of the content joined."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return Message(role="system" if self.role == "developer" else self.role, content=text)


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    model_config = ConfigDict(strict=True)
    include_usage: bool = False


Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class ChatRequest(BaseModel):
    """Body of POST /v1/chat/completions. `top_k`, `min_p` and `repetition_penalty` are additions of ours."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=2048)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 31)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 62)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _other_parameters(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in REFUSED:
                if value is not None and value not in REFUSED[name]:
                    raise _parameter_error(
                        "unsupported_parameter", f"{name} is not supported by this server", name
                    )
            elif name not in IGNORED:
                hint = near_match(name, list(cls.model_fields)).partition("; known")[0]
                raise _parameter_error("unknown_parameter", f"unknown parameter {name!r}{hint}", name)
        return kept

    def sampling(self) -> Sampling:
        """The engine's settings. Raises UserError on values that it refuses."""
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "max_new_tokens": self.max_completion_tokens or self.max_tokens,
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            "seed": self.seed,
        }
        settings = {name: value for name, value in given.items() if value is not None}
        return Sampling(**{"temperature": 1.0, "max_new_tokens": DEFAULT_NEW_TOKENS, **settings})


def _parameter_error(code: str, message: str, param: str) -> PydanticCustomError:
    # Pydantic fills {names} in the template from the context; the message itself may hold braces.
    return PydanticCustomError(code, "{message}", {"message": message, "param": param})


class Reply:
    """The objects of one completion, whole or in chunks."""

    def __init__(self, service: ChatService, prepared: Prepared) -> None:
        self.prepared = prepared
        self.headers = {DROPPED_HEADER: str(prepared.dropped)}
        self.tokens = 0
        self._common: dict[str, Any] = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.name,
        }
        self._note = {"chatwright": {"dropped_messages": prepared.dropped}}

    def usage(self) -> dict[str, int]:
        """Tokens so far; several answers to one prompt count it once."""
        prompt = self.prepared.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.tokens,
            "total_tokens": prompt + self.tokens,
        }

    def whole(self, texts: Sequence[str], reasons: Sequence[str]) -> dict[str, Any]:
        """The body of a completion that is not streamed."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": openai_reason(reason),
            }
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        kind = {"object": "chat.completion"}
        return {**self._common, **kind, "choices": choices, "usage": self.usage(), **self._note}

    def chunk(self, choices: list[dict[str, Any]], usage: Any = ..., *, first: bool = False) -> bytes:
        """One server-sent event. `usage` is left out unless given."""
        body = {**self._common, "object": "chat.completion.chunk", "choices": choices}
        return _event(body | ({} if usage is ... else {"usage": usage}) | (self._note if first else {}))


def openai_reason(reason: str) -> str:
    """OpenAI knows no "cancelled": an answer that was cut short by us ends like one that ran out of room."""
    return "length" if reason == "cancelled" else reason


def _event(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()


def _delta(index: int, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


async def stream_events(service: ChatService, reply: Reply, *, include_usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events of a completion. Closing the iterator, as a lost client does, frees the engine's slots."""
    usage: Any = None if include_usage else ...
    with service.answer(reply.prepared) as answer:
        opening = [
            _delta(index, {"role": "assistant", "content": ""}) for index in range(len(answer.requests))
        ]
        yield reply.chunk(opening, usage, first=True)
        try:
            async for index, piece in answer:
                reply.tokens += len(piece.ids)
                if piece.text:
                    yield reply.chunk([_delta(index, {"content": piece.text})], usage)
                if piece.finish_reason:
                    yield reply.chunk([_delta(index, {}, openai_reason(piece.finish_reason))], usage)
        except UserError as error:
            yield _event(errors.from_user_error(error).body())
            return
        except Exception:
            logger.exception("an answer failed")
            yield _event(errors.body("the model failed while it answered", status=500))
            return
    if include_usage:
        yield reply.chunk([], reply.usage())
    yield b"data: [DONE]\n\n"


async def collect(answer: Answer, reply: Reply) -> dict[str, Any]:
    """The whole completion."""
    texts = [""] * len(answer.requests)
    reasons = ["cancelled"] * len(answer.requests)
    async for index, piece in answer:
        texts[index] += piece.text
        reply.tokens += len(piece.ids)
        reasons[index] = piece.finish_reason or reasons[index]
    return reply.whole(texts, reasons)


async def collect_unless_gone(service: ChatService, reply: Reply, request: Request) -> Response:
    """The completion as a response; when the client leaves before, its slots are freed and nobody reads the answer."""
    with service.answer(reply.prepared) as answer:
        work = asyncio.create_task(collect(answer, reply))
        gone = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
        if not work.done():
            work.cancel()
            return Response(status_code=499)  # nginx's number for "client closed request"
        return JSONResponse(work.result(), headers=reply.headers)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class HeldStream(StreamingResponse):
    """A stream for whose whole time something is held, a model above all; let go also when it never begins."""

    def __init__(self, events: AsyncIterator[bytes], hold: AsyncExitStack, **settings: Any) -> None:
        super().__init__(events, **settings)
        self._hold = hold

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, then let go."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._hold.aclose()


def routes(pool: ModelPool) -> APIRouter:
    """The routes of the models in `pool`."""
    router = APIRouter()

    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": pool.created(name), "owned_by": "chatwright"}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in pool.names]}

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return card(name)

    @router.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        async with AsyncExitStack() as stack:
            service = await stack.enter_async_context(pool.use(body.model))
            messages = [message.plain() for message in body.messages]
            prepared = await service.prepare(messages, body.sampling(), answers=body.n or 1)
            reply = Reply(service, prepared)
            if not body.stream:
                return await collect_unless_gone(service, reply, request)
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            events = stream_events(service, reply, include_usage=include_usage)
            return HeldStream(events, stack.pop_all(), media_type="text/event-stream", headers=reply.headers)

    return router
