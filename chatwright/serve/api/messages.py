"""The messages of a request, as the templates know them: text of a role.

Calls of tools and their results are text too, in the form that generate/tool_calls.py reads back: few
templates know more, and text of a message can never become a control token (chat.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from chatwright.chat import Message
from chatwright.generate.tool_calls import write_tool_call
from chatwright.serve.api.parameters import parameter_error


class TextPart(BaseModel):
    """One piece of a content that is given as a list."""

    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: str


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

    def written(self) -> str:
        """The call as the model wrote it."""
        return write_tool_call(self.function.name, self.function.arguments)


class ChatMessage(BaseModel):
    """One turn. `developer` counts as `system`; fields such as `name` and `tool_call_id` are ignored."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None

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
            raise parameter_error(
                "unsupported_value", "messages: content must be text or text parts", "messages"
            )
        if data.get("tool_calls") and data.get("role") != "assistant":
            raise parameter_error(
                "invalid_value", "messages: only an assistant's message has tool_calls", "messages"
            )
        return data

    def plain(self) -> Message:
        """With the parts of the content joined, and calls written out."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        calls = [call.written() for call in self.tool_calls or ()]
        whole = "\n".join([*([text] if text or not calls else []), *calls])
        return Message(role="system" if self.role == "developer" else self.role, content=whole)


def with_system(messages: Sequence[Message], text: str) -> list[Message]:
    """The messages with `text` at the end of the system message, which is made when there is none."""
    if messages and messages[0]["role"] == "system":
        first = Message(role="system", content=f"{messages[0]['content']}\n\n{text}")
        return [first, *messages[1:]]
    return [Message(role="system", content=text), *messages]


def compact(value: Any) -> str:
    """JSON without spaces."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
