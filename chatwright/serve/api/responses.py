"""POST /v1/responses: OpenAI's newer interface to the same answers.

Responses are not stored: `previous_response_id` is refused, and `store` has no effect. Clients send the whole
conversation with each request instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field, model_validator

from chatwright.generate.sampling import Sampling
from chatwright.generate.tools import MOST_TOOLS
from chatwright.messages import Message
from chatwright.serve.api.form import Form
from chatwright.serve.api.formats import TextFormat
from chatwright.serve.api.input_items import InputItem, refuse_items
from chatwright.serve.api.messages import with_system, with_turn
from chatwright.serve.api.parameters import (
    BOOKKEEPING,
    DEFAULT_NEW_TOKENS,
    SAMPLERS,
    Body,
    Checked,
    Count,
    Effort,
    Nothing,
    Share,
    check_effort,
)
from chatwright.serve.api.reading import STREAM_TOO, HeldStream, Reading, guarded, unless_gone
from chatwright.serve.api.response_events import Writer
from chatwright.serve.api.tools import Choice, ResponseTool, SomeFunctions, refuse_choice
from chatwright.serve.errors import ApiError, naming
from chatwright.serve.pool import ModelPool


class TextSettings(Checked):
    """`text` of a request."""

    place: ClassVar[str] = "text"
    refused: ClassVar[Mapping[str, Nothing]] = {"verbosity": ("medium",)}

    format: TextFormat | None = None


class Reasoning(Checked):
    """`reasoning` of a request."""

    place: ClassVar[str] = "reasoning"
    harmless: ClassVar = {
        "summary": "a summary of thoughts, which no model here gives",
        "generate_summary": "the same",
        "context": "which earlier thoughts count; none are sent",
    }
    refused: ClassVar[Mapping[str, Nothing]] = {"mode": ()}

    effort: Effort | None = None


Includable = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
]
"""What a response may carry in addition. All but the last belong to tools and thoughts that no model here
has."""


class ResponsesRequest(Body):
    """Body of POST /v1/responses."""

    harmless: ClassVar = {
        **BOOKKEEPING,
        "max_tool_calls": "how often OpenAI's own tools may run, of which there are none here",
        "stream_options": "random characters that hide the lengths of the pieces",
    }
    refused: ClassVar[Mapping[str, Nothing]] = {
        **SAMPLERS,
        "previous_response_id": (),
        "conversation": (),
        "background": (False,),
        "background_options": (),
        "prompt": (),
        "context_management": ([],),
        "moderation": (),
        "image": (),
        "access_programs": (),
    }

    model: str
    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=2048)]
    instructions: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Share | None = None
    max_output_tokens: Count | None = None
    stream: bool | None = None
    text: TextSettings | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Choice | SomeFunctions | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: Annotated[list[Includable], Field(max_length=16)] | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, Any] | None = None
    """The response repeats it."""

    @model_validator(mode="before")
    @classmethod
    def _known_kinds(cls, data: Any) -> Any:
        if isinstance(data, dict):
            refuse_items(data.get("input"))
        return refuse_choice(data)

    @property
    def format(self) -> TextFormat:
        """The form of the answer's text."""
        return (self.text.format if self.text is not None else None) or TextFormat()

    @property
    def logprobs(self) -> int | None:
        """How many of the likeliest tokens to report at each position; None for no log-probabilities."""
        asked = self.top_logprobs or "message.output_text.logprobs" in (self.include or ())
        return self.top_logprobs or 0 if asked else None

    def messages(self) -> list[Message]:
        """The conversation. Calls and texts of one assistant turn become one message."""
        if isinstance(self.input, str):
            messages = [Message(role="user", content=self.input)]
        else:
            messages = []
            for item in self.input:
                messages = with_turn(messages, item.plain())
        return with_system(messages, self.instructions) if self.instructions else messages

    def echoed(self, sampling: Sampling) -> dict[str, Any]:
        """The settings that a response repeats."""
        choice = self.tool_choice
        return {
            "instructions": self.instructions,
            "model": self.model,
            "max_output_tokens": self.max_output_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_logprobs": self.logprobs or 0,
            "text": {"format": self.format.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": choice.model_dump() if isinstance(choice, Checked) else choice or "auto",
            "tools": [one.model_dump() for one in self.tools or ()],
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "truncation": self.truncation or "auto",
            "metadata": self.metadata or {},
        }

    def sampling(self, own: Mapping[str, Any]) -> Sampling:
        """The engine's settings; `own` are the model's. Raises UserError on values that it refuses."""
        given = {"temperature": self.temperature, "top_p": self.top_p}
        settings = {name: value for name, value in given.items() if value is not None}
        most, top = self.max_output_tokens or DEFAULT_NEW_TOKENS, self.logprobs or 0
        return Sampling(
            **{"temperature": 1.0, **own, **settings, "max_new_tokens": most, "top_logprobs": top}
        )

    def form(self) -> Form:
        """The form that the answer must have. Raises ApiError for contradictory settings."""
        choice = self.tool_choice
        return Form.of(
            self.format.wanted(),
            [one.plain() for one in self.tools or ()],
            choice if choice is None or isinstance(choice, str) else choice.plain(),
            self.parallel_tool_calls,
        )


def routes(pool: ModelPool) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/responses", response_model=None, responses=STREAM_TOO)
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        form, messages = body.form(), body.messages()
        async with AsyncExitStack() as stack:
            service = await stack.enter_async_context(pool.use(body.model))
            effort = body.reasoning.effort if body.reasoning is not None else None
            check_effort(service.model.template, effort, "reasoning.effort")
            sampling = body.sampling(service.own_sampling)
            with naming("input"):
                prepared = await service.prepare(
                    form.messages(messages, service.model),
                    sampling,
                    grammar=form.grammar,
                    beside=form.beside(service.model),
                )
            if body.truncation == "disabled" and prepared.dropped:
                message = "the conversation is too long for the model's context, and truncation is disabled"
                raise ApiError(400, message, param="input", code="context_length_exceeded")
            reading = Reading(service, prepared, form)
            reading.begin(stack)
            writer = Writer(body.echoed(sampling), reading, logprobs=body.logprobs)
            if body.stream:
                return HeldStream(
                    guarded(writer.events(), writer.failed), stack.pop_all(), headers=reading.headers
                )

            async def answered() -> dict[str, Any]:
                return writer.whole((await reading.wholes())[0])

            return await unless_gone(request, answered(), reading.headers)

    return router
