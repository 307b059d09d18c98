"""POST /v1/chat/completions.

Supported parameters are the fields of `ChatRequest`. `max_tokens` is an upper bound and may exceed the
model's context.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field, model_validator

from chatwright.generate.sampling import Sampling
from chatwright.generate.tools import MOST_TOOLS
from chatwright.serve.api.form import Form
from chatwright.serve.api.formats import FormBody
from chatwright.serve.api.messages import ChatMessage
from chatwright.serve.api.parameters import (
    BOOKKEEPING,
    SAMPLERS,
    Count,
    Effort,
    Nothing,
    SampledBody,
    check_answers,
    check_effort,
    parameter_error,
)
from chatwright.serve.api.reading import (
    DONE,
    STREAM_TOO,
    Call,
    CallDelta,
    Delta,
    HeldStream,
    Reading,
    Whole,
    event,
    guarded,
    new_id,
    unless_gone,
)
from chatwright.serve.api.tools import Choice, SomeTools, ToolSpec, refuse_choice
from chatwright.serve.errors import naming
from chatwright.serve.pool import ModelPool


class ChatRequest(SampledBody, FormBody):
    """Body of POST /v1/chat/completions."""

    harmless: ClassVar = {
        **BOOKKEEPING,
        "prediction": "OpenAI: a guess at the answer, which makes it faster",
    }
    refused: ClassVar[Mapping[str, Nothing]] = {
        **SAMPLERS,
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
        "moderation": (),
        "verbosity": ("medium",),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "documents": ([],),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "echo": (False,),
        "best_of": (1,),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=2048)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[ToolSpec], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Choice | SomeTools | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_choice(cls, data: Any) -> Any:
        return refuse_choice(data)

    @model_validator(mode="after")
    def _logprobs_are_asked_for(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise parameter_error("invalid_value", "top_logprobs needs logprobs: true", "top_logprobs")
        return self

    def sampling(self, own: Mapping[str, Any]) -> Sampling:
        """The engine's settings; `own` are the model's. Raises UserError on values that it refuses."""
        both = [one for one in (self.max_completion_tokens, self.max_tokens) if one is not None]
        most = min(both) if both else None
        return self.sampling_with(own, max_new_tokens=most, top_logprobs=self.top_logprobs or 0)

    def form(self) -> Form:
        """The form that the answer must have. Raises ApiError for contradictory settings."""
        choice = self.tool_choice
        return Form.of(
            self.wanted,
            [one.model_dump() for one in self.tools or ()],
            choice if choice is None or isinstance(choice, str) else choice.model_dump(),
            self.parallel_tool_calls,
        )


class Writer:
    """The objects of one completion, whole or in chunks."""

    def __init__(self, body: ChatRequest, reading: Reading) -> None:
        self._body, self._reading = body, reading
        self._common: dict[str, Any] = {
            "id": new_id("chatcmpl-"),
            "created": int(time.time()),
            "model": body.model,
        }
        self._note = {"chatwright": {"dropped_messages": reading.prepared.dropped}}

    def whole(self, wholes: Sequence[Whole]) -> dict[str, Any]:
        """The body of a completion that is not streamed."""
        choices = [
            {
                "index": index,
                "message": _message(one),
                "logprobs": self._logprobs(one),
                "finish_reason": one.finish,
            }
            for index, one in enumerate(wholes)
        ]
        kind = {"object": "chat.completion"}
        return {**self._common, **kind, "choices": choices, "usage": self._reading.usage(), **self._note}

    async def events(self) -> AsyncGenerator[bytes]:
        """Server-sent events."""
        opening = [
            self._choice(index, {"role": "assistant", "content": ""})
            for index in range(len(self._reading.prepared.requests))
        ]
        yield self._chunk(opening, first=True)
        async with aclosing(self._reading.deltas()) as deltas:
            async for delta in deltas:
                news: dict[str, Any] = (
                    {"content": delta.text} if delta.text or (delta.tokens and self._body.logprobs) else {}
                )
                if delta.calls:
                    news["tool_calls"] = [_call_chunk(one) for one in delta.calls]
                if news:
                    yield self._chunk([self._choice(delta.index, news, logprobs=self._logprobs(delta))])
                if delta.finish:
                    yield self._chunk([self._choice(delta.index, {}, finish=delta.finish)])
        if self._body.include_usage:
            yield self._chunk([], usage=self._reading.usage())
        yield DONE

    def _chunk(self, choices: list[dict[str, Any]], *, usage: Any = None, first: bool = False) -> bytes:
        body = {**self._common, "object": "chat.completion.chunk", "choices": choices}
        return event(
            body | ({"usage": usage} if self._body.include_usage else {}) | (self._note if first else {})
        )

    def _choice(
        self, index: int, delta: dict[str, Any], *, finish: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, one: Whole | Delta) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return self._reading.spelling.chat(one.tokens, self._body.top_logprobs or 0)


def _message(one: Whole) -> dict[str, Any]:
    """An answer. With calls and no text the content is null, as clients expect it."""
    message: dict[str, Any] = {"role": "assistant", "content": one.text, "refusal": None}
    if one.calls:
        message["content"] = one.text.strip() or None
        message["tool_calls"] = [_call(call) for call in one.calls]
    return message


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _call_chunk(one: CallDelta) -> dict[str, Any]:
    """The first chunk of a call has its id and name, the others only more of its arguments."""
    function: dict[str, Any] = {"arguments": one.arguments}
    if not one.name:
        return {"index": one.number, "function": function}
    return {"index": one.number, "id": one.id, "type": "function", "function": {"name": one.name, **function}}


def routes(pool: ModelPool) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None, responses=STREAM_TOO)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        form = body.form()
        async with AsyncExitStack() as stack:
            service = await stack.enter_async_context(pool.use(body.model))
            body.check_bias(service.model.model.config.vocab_size)
            check_effort(service.model.template, body.reasoning_effort, "reasoning_effort")
            check_answers(body.answers, service.limits.max_requests)
            messages = form.messages([message.plain() for message in body.messages], service.model)
            with naming("messages"):
                prepared = await service.prepare(
                    messages,
                    body.sampling(service.own_sampling),
                    answers=body.answers,
                    grammar=form.grammar,
                    beside=form.beside(service.model),
                )
            reading = Reading(service, prepared, form)
            reading.begin(stack)
            writer = Writer(body, reading)
            if body.stream:
                return HeldStream(guarded(writer.events()), stack.pop_all(), headers=reading.headers)

            async def answered() -> dict[str, Any]:
                return writer.whole(await reading.wholes())

            return await unless_gone(request, answered(), reading.headers)

    return router
