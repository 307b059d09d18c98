"""The items of `input` of /v1/responses: messages, calls, and what was given back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, PrivateAttr, Tag, model_validator

from chatwright.config import near_match
from chatwright.messages import Message, ToolCallPart, ToolResultPart, check_message
from chatwright.serve.api.messages import CACHE_MARKS, refuse_parts
from chatwright.serve.api.parameters import Checked, Nothing, parameter_error

ITEM_NOTES: Mapping[str, str] = {
    "id": "the item's identifier at another place",
    "status": "whether the item was complete",
    "phase": "a label of OpenAI's own models",
}


class InputText(Checked):
    """One piece of a content."""

    place: ClassVar[str] = "input.content"
    harmless: ClassVar = {
        **CACHE_MARKS,
        "annotations": "sources of a text that a model wrote",
        "logprobs": "log-probabilities of a text that a model wrote",
    }

    type: Literal["input_text", "output_text"]
    text: str

    def plain(self) -> dict[str, Any]:
        """The same in our form."""
        return {"type": "text", "text": self.text}


class InputImage(Checked):
    """An image among the pieces of a content."""

    place: ClassVar[str] = "input.content"
    harmless: ClassVar = {**CACHE_MARKS, "detail": "no model here reads images"}
    refused: ClassVar[Mapping[str, Nothing]] = {"file_id": ()}

    type: Literal["input_image"]
    image_url: Annotated[str, Field(min_length=1)]

    def plain(self) -> dict[str, Any]:
        """The same in our form."""
        return {"type": "image", "url": self.image_url}


PARTS = ("input_text", "output_text", "input_image")
ContentPart = Annotated[InputText | InputImage, Field(discriminator="type")]


class InputMessage(Checked):
    """A turn."""

    place: ClassVar[str] = "input"
    harmless: ClassVar = ITEM_NOTES

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]
    _plain: Message = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _name_parts(cls, data: Any) -> Any:
        if isinstance(data, dict):
            refuse_parts(data.get("content"), PARTS, "input")
        return data

    @model_validator(mode="after")
    def _read(self) -> InputMessage:
        role = "system" if self.role == "developer" else self.role
        content = self.content if isinstance(self.content, str) else [part.plain() for part in self.content]
        try:
            self._plain = check_message({"role": role, "content": content})
        except ValueError as error:
            raise parameter_error("invalid_value", f"input: {error}") from None
        return self

    def plain(self) -> Message:
        """The same in our form."""
        return self._plain


class InputCall(Checked):
    """A call that the model made, sent back."""

    place: ClassVar[str] = "input"
    harmless: ClassVar = ITEM_NOTES
    refused: ClassVar[Mapping[str, Nothing]] = {"caller": ({"type": "direct"},), "namespace": ()}

    type: Literal["function_call"]
    call_id: str
    name: Annotated[str, Field(min_length=1, max_length=64)]
    arguments: str

    def plain(self) -> Message:
        """The same in our form."""
        call = ToolCallPart(type="tool_call", id=self.call_id, name=self.name, arguments=self.arguments)
        return Message(role="assistant", content=[call])


class InputResult(Checked):
    """What a called function gave back."""

    place: ClassVar[str] = "input"
    harmless: ClassVar = {**ITEM_NOTES, "name": "the function's name; no model here is given it"}
    refused: ClassVar[Mapping[str, Nothing]] = {"caller": ({"type": "direct"},), "namespace": ()}

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]

    @model_validator(mode="before")
    @classmethod
    def _name_parts(cls, data: Any) -> Any:
        if isinstance(data, dict):
            refuse_parts(data.get("output"), PARTS[:1], "input")
        return data

    def plain(self) -> Message:
        """The same in our form."""
        output = self.output if isinstance(self.output, str) else "".join(part.text for part in self.output)
        result = ToolResultPart(type="tool_result", tool_call_id=self.call_id, content=output)
        return Message(role="tool", content=[result])


KINDS = {"message": "Message", "function_call": "Call", "function_call_output": "Result"}


def refuse_items(items: Any) -> None:
    """Raise for the first item of a type that is not supported."""
    for number, item in enumerate(items if isinstance(items, list) else ()):
        kind = item.get("type", "message") if isinstance(item, dict) else "message"
        if isinstance(kind, str) and kind not in KINDS:
            message = f"input: an item of type {kind!r:.40} is not supported{near_match(kind, list(KINDS))}"
            raise parameter_error("unsupported_value", message, f"input[{number}].type")


def _kind(item: Any) -> str:
    """Which of the items it is."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return KINDS.get(kind, "Message") if isinstance(kind, str) else "Message"


InputItem = Annotated[
    Annotated[InputMessage, Tag("Message")]
    | Annotated[InputCall, Tag("Call")]
    | Annotated[InputResult, Tag("Result")],
    Discriminator(_kind),
]
