"""The messages of a request: checks OpenAI's form and converts it to ours (chatwright/messages.py).

Tool calls and their results are parts of a message, which chat.py renders as text for the model. An image is
a part as well; a model that reads only text refuses it when the prompt is encoded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from chatwright.config import near_match
from chatwright.messages import Message, check_message, joined, parts_of
from chatwright.serve.api.parameters import Checked, Nothing, parameter_error

CACHE_MARKS: Mapping[str, str] = {
    "cache_control": "marks what Anthropic's prompt cache keeps; the one here needs no marks",
    "prompt_cache_breakpoint": "marks what OpenAI's prompt cache keeps; the one here needs no marks",
}


class TextPart(Checked):
    """One piece of a content that is given as a list."""

    place: ClassVar[str] = "messages.content"
    harmless: ClassVar = {**CACHE_MARKS, "annotations": "sources of a text that a model wrote"}

    type: Literal["text"]
    text: str


class ImageLink(Checked):
    """Where an image is."""

    place: ClassVar[str] = "messages.content.image_url"
    harmless: ClassVar = {"detail": "no model here reads images"}

    url: Annotated[str, Field(min_length=1)]


class ImagePart(Checked):
    """An image among the pieces of a content."""

    place: ClassVar[str] = "messages.content"
    harmless: ClassVar = CACHE_MARKS

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
            raise parameter_error("unsupported_value", message, field="content")


class CalledFunction(Checked):
    """Which function an assistant called, and how."""

    place: ClassVar[str] = "messages.tool_calls.function"

    name: Annotated[str, Field(min_length=1, max_length=64)]
    arguments: str
    """JSON, as the model wrote it."""


class ToolCall(Checked):
    """A call in an assistant's message that a client sends back."""

    place: ClassVar[str] = "messages.tool_calls"
    harmless: ClassVar = {
        **CACHE_MARKS,
        "index": "the call's place in a stream",
        "provider_specific_fields": "LiteLLM's own notes",
        "extra_content": "notes of Google's interface",
    }

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Checked):
    """One turn. `developer` counts as `system`."""

    place: ClassVar[str] = "messages"
    harmless: ClassVar = {
        **CACHE_MARKS,
        "name": "the speaker's or the function's name; no model here is given it",
        "annotations": "sources of a text that a model wrote",
        "parsed": "what a client read out of the content, which is sent as well",
        "id": "the message's identifier at another place",
        "created_at": "when it was written",
        "provider_specific_fields": "LiteLLM's own notes",
    }
    refused: ClassVar[Mapping[str, Nothing]] = {
        "audio": ({},),
        "function_call": ({},),
        "refusal": ("",),
        "type": ("text", "message"),
        "prefix": (False,),
        "partial": (False,),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    reasoning_content: str | None = None
    """What an assistant had thought before it answered."""
    reasoning: str | None = None
    """vLLM's and OpenRouter's name for the same."""
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: str | None = None
    _plain: Message = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _refuse_others(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("content") is None and data.get("role") != "assistant":
            message = "messages: content must be text or parts"
            raise parameter_error("unsupported_value", message, field="content")
        refuse_parts(data.get("content"), PARTS, "messages")
        if data.get("tool_calls") and data.get("role") != "assistant":
            message = "messages: only an assistant's message has tool_calls"
            raise parameter_error("invalid_value", message, field="tool_calls")
        return data

    @model_validator(mode="after")
    def _read(self) -> ChatMessage:
        given = self.model_dump(exclude_none=True)
        role = "system" if self.role == "developer" else self.role
        thought = given.pop("reasoning", None)
        given.setdefault("reasoning_content", thought)
        if given["reasoning_content"] and role != "assistant":
            message = "messages: only an assistant's message has thoughts"
            raise parameter_error("invalid_value", message, field="reasoning_content")
        try:
            self._plain = check_message({**given, "role": role, "content": given.get("content", "")})
        except ValueError as error:
            raise parameter_error("invalid_value", f"messages: {error}") from None
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
