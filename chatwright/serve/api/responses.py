"""POST /v1/responses: OpenAI's newer interface to the same answers.

Responses are not stored: `previous_response_id` is refused and `store` is ignored. Clients send the whole
conversation with each request instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from chatwright.config import UserError
from chatwright.generate.sampling import Sampling
from chatwright.generate.tools import MOST_TOOLS
from chatwright.messages import Message, ToolCallPart, ToolResultPart, check_message
from chatwright.serve.api.form import Choice, Form, FunctionTool
from chatwright.serve.api.messages import refuse_parts, with_system, with_turn
from chatwright.serve.api.parameters import DEFAULT_NEW_TOKENS, Body, Count, parameter_error
from chatwright.serve.api.reading import STREAM_TOO, HeldStream, Reading, guarded, unless_gone
from chatwright.serve.api.response_events import Writer
from chatwright.serve.pool import ModelPool


class InputText(BaseModel):
    """One piece of a content."""

    model_config = ConfigDict(strict=True)
    type: Literal["input_text", "output_text"]
    text: str

    def plain(self) -> dict[str, Any]:
        """The same in our form."""
        return {"type": "text", "text": self.text}


class InputImage(BaseModel):
    """An image among the pieces of a content."""

    model_config = ConfigDict(strict=True)
    type: Literal["input_image"]
    image_url: Annotated[str, Field(min_length=1)]

    def plain(self) -> dict[str, Any]:
        """The same in our form."""
        return {"type": "image", "url": self.image_url}


class InputMessage(BaseModel):
    """A turn."""

    model_config = ConfigDict(strict=True)
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[InputText | InputImage, Field(discriminator="type")]]
    _plain: Message = PrivateAttr()

    @model_validator(mode="after")
    def _read(self) -> InputMessage:
        role = "system" if self.role == "developer" else self.role
        content = self.content if isinstance(self.content, str) else [part.plain() for part in self.content]
        try:
            self._plain = check_message({"role": role, "content": content})
        except ValueError as error:
            raise parameter_error("invalid_value", f"input: {error}", "input") from None
        return self

    def plain(self) -> Message:
        """The same in our form."""
        return self._plain


class InputCall(BaseModel):
    """A call that the model made, sent back."""

    model_config = ConfigDict(strict=True)
    type: Literal["function_call"]
    call_id: str
    name: Annotated[str, Field(min_length=1, max_length=64)]
    arguments: str

    def plain(self) -> Message:
        """The same in our form."""
        call = ToolCallPart(type="tool_call", id=self.call_id, name=self.name, arguments=self.arguments)
        return Message(role="assistant", content=[call])


class InputResult(BaseModel):
    """What a called function gave back."""

    model_config = ConfigDict(strict=True)
    type: Literal["function_call_output"]
    call_id: str
    output: str

    def plain(self) -> Message:
        """The same in our form."""
        result = ToolResultPart(type="tool_result", tool_call_id=self.call_id, content=self.output)
        return Message(role="tool", content=[result])


class ResponseTool(FunctionTool):
    """A function that the model may call, in this interface's shape."""

    type: Literal["function"]


class NamedFunction(BaseModel):
    """A `tool_choice` that names the function to call."""

    model_config = ConfigDict(strict=True)
    type: Literal["function"]
    name: str


class TextFormat(BaseModel):
    """The form of the answer's text."""

    model_config = ConfigDict(strict=True)
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextSettings(BaseModel):
    """`text` of a request; `verbosity` is ignored."""

    model_config = ConfigDict(strict=True)
    format: TextFormat = Field(default_factory=TextFormat)


class ResponsesRequest(Body):
    """Body of POST /v1/responses."""

    refused: ClassVar = {
        "previous_response_id": (),
        "conversation": (),
        "background": (False,),
        "prompt": (),
        "include": ([],),
        "truncation": ("auto", "disabled"),
        "top_logprobs": (0,),
    }
    ignored: ClassVar = frozenset(
        {
            "user",
            "metadata",
            "store",
            "service_tier",
            "reasoning",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
            "max_tool_calls",
            "stream_options",
        }
    )

    model: str
    input: str | Annotated[list[InputMessage | InputCall | InputResult], Field(min_length=1, max_length=2048)]
    instructions: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_output_tokens: Count | None = None
    stream: bool | None = None
    text: TextSettings | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Choice | NamedFunction | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_parts(cls, data: Any) -> Any:
        for item in data["input"] if isinstance(data, dict) and isinstance(data.get("input"), list) else ():
            refuse_parts(
                item.get("content") if isinstance(item, dict) else None,
                ("input_text", "output_text", "input_image"),
                "input",
            )
        return data

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
            "text": (self.text or TextSettings()).model_dump(by_alias=True, exclude_none=True),
            "tool_choice": choice.model_dump() if isinstance(choice, NamedFunction) else choice or "auto",
            "tools": [one.model_dump() for one in self.tools or ()],
            "parallel_tool_calls": self.parallel_tool_calls is not False,
        }

    def sampling(self, own: Mapping[str, Any]) -> Sampling:
        """The engine's settings; `own` are the model's. Raises UserError on values that it refuses."""
        given = {"temperature": self.temperature, "top_p": self.top_p}
        settings = {name: value for name, value in given.items() if value is not None}
        most = self.max_output_tokens or DEFAULT_NEW_TOKENS
        return Sampling(**{"temperature": 1.0, **own, **settings, "max_new_tokens": most})

    def form(self) -> Form:
        """The form that the answer must have. Raises UserError for contradictory settings."""
        wanted, choice = (self.text or TextSettings()).format, self.tool_choice
        return Form.of(
            wanted.type,
            wanted.schema_,
            [{"type": "function", "function": one.model_dump(exclude={"type"})} for one in self.tools or ()],
            {"type": "function", "function": {"name": choice.name}}
            if isinstance(choice, NamedFunction)
            else choice,
            self.parallel_tool_calls,
        )


def routes(pool: ModelPool) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/responses", response_model=None, responses=STREAM_TOO)
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        form, messages = body.form(), body.messages()
        if not messages:
            raise UserError("input: there is no message")
        async with AsyncExitStack() as stack:
            service = await stack.enter_async_context(pool.use(body.model))
            sampling = body.sampling(service.model.own_sampling)
            prepared = await service.prepare(
                form.messages(messages, service.model),
                sampling,
                grammar=form.grammar,
                beside=form.beside(service.model),
            )
            reading = Reading(service, prepared, form)
            reading.begin(stack)
            writer = Writer(body.echoed(sampling), reading)
            if body.stream:
                return HeldStream(
                    guarded(writer.events(), writer.failed), stack.pop_all(), headers=reading.headers
                )

            async def answered() -> dict[str, Any]:
                return writer.whole((await reading.wholes())[0])

            return await unless_gone(request, answered(), reading.headers)

    return router
