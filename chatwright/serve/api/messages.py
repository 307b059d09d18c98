"""The messages of a request: checks OpenAI's form and converts it to ours (chatwright/messages.py).

Tool calls and their results are parts of a message, which chat.py renders as text for the model. An image is
a part as well; a model that reads only text refuses it when the prompt is encoded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from chatwright.config import near_match
from chatwright.messages import Message, check_message, joined, parts_of
from chatwright.serve.api.parameters import parameter_error


class TextPart(BaseModel):
    """One piece of a content that is given as a list."""

    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: str


class ImageLink(BaseModel):
    """Where an image is."""

    model_config = ConfigDict(strict=True)
    url: Annotated[str, Field(min_length=1)]


class ImagePart(BaseModel):
    """An image among the pieces of a content."""

    model_config = ConfigDict(strict=True)
    type: Literal["image_url"]
    image_url: ImageLink


PARTS = ("text", "image_url")
ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def refuse_parts(content: Any, known: Sequence[str], param: str) -> None:
    """Raise for the first part of a content that is of another type than the known ones."""
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in known:
            message = f"{param}: a part of type {kind!r:.40} is not supported{near_match(kind, known)}"
            raise parameter_error("unsupported_value", message, param)


class CalledFunction(BaseModel):
    """Which function an assistant called, and how."""

    model_config = ConfigDict(strict=True)
    name: Annotated[str, Field(min_length=1, max_length=64)]
    arguments: str
    """JSON, as the model wrote it."""


class ToolCall(BaseModel):
    """A call in an assistant's message that a client sends back."""

    model_config = ConfigDict(strict=True)
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    """One turn. `developer` counts as `system`; fields such as `name` are ignored."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: str | None = None
    _plain: Message = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _refuse_others(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in ("function_call", "audio"):
            if data.get(name):
                raise parameter_error(
                    "unsupported_parameter", f"messages: {name} is not supported", "messages"
                )
        if data.get("content") is None and data.get("role") != "assistant":
            raise parameter_error("unsupported_value", "messages: content must be text or parts", "messages")
        refuse_parts(data.get("content"), PARTS, "messages")
        if data.get("tool_calls") and data.get("role") != "assistant":
            raise parameter_error(
                "invalid_value", "messages: only an assistant's message has tool_calls", "messages"
            )
        return data

    @model_validator(mode="after")
    def _read(self) -> ChatMessage:
        given = self.model_dump(exclude_none=True)
        role = "system" if self.role == "developer" else self.role
        try:
            self._plain = check_message({**given, "role": role, "content": given.get("content", "")})
        except ValueError as error:
            raise parameter_error("invalid_value", f"messages: {error}", "messages") from None
        return self

    def plain(self) -> Message:
        """The same in our form."""
        return self._plain


def with_system(messages: Sequence[Message], text: str) -> list[Message]:
    """The messages with `text` at the end of the system message, which is added if there is none."""
    if messages and messages[0]["role"] == "system":
        first = Message(role="system", content=joined(messages[0]["content"], f"\n\n{text}"))
        return [first, *messages[1:]]
    return [Message(role="system", content=text), *messages]


def with_turn(messages: list[Message], turn: Message) -> list[Message]:
    """The messages and one more turn. Two assistant turns in a row become one message with a line break
    between."""
    if not messages or not turn["role"] == messages[-1]["role"] == "assistant":
        return [*messages, turn]
    *others, last = messages
    seam = (parts_of(last["content"])[-1]["type"], parts_of(turn["content"])[0]["type"])
    between = "" if "tool_call" in seam else "\n"  # calls are rendered on lines of their own anyway
    content = joined(joined(last["content"], between) if between else last["content"], turn["content"])
    return [*others, Message(role="assistant", content=content)]


def compact(value: Any) -> str:
    """JSON without spaces."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
