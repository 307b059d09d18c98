"""The tools of a request and the choice among them, as chat completions and /v1/responses write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from chatwright.generate.tools import MOST_TOOLS
from chatwright.serve.api.messages import CACHE_MARKS
from chatwright.serve.api.parameters import Checked, Nothing, parameter_error

Choice = Literal["none", "auto", "required"]


def refuse_kinds(data: Any, place: str) -> Any:
    """Raise for a tool, or a choice of one, that is no function: it would run on OpenAI's servers."""
    kind = data.get("type") if isinstance(data, dict) else None
    if isinstance(kind, str) and kind != "function":
        message = f"{place}: type {kind!r:.40} is not supported; the only type of tools is function"
        raise parameter_error("unsupported_value", message, field="type")
    return data


class Function(Checked):
    """A function that the model may call."""

    place: ClassVar[str] = "tools.function"

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """Without effect: where a call is forced, it keeps to its schema, strict or not."""


class ToolSpec(Checked):
    """An entry of `tools`."""

    place: ClassVar[str] = "tools"
    harmless: ClassVar = CACHE_MARKS

    type: Literal["function"]
    function: Function

    @model_validator(mode="before")
    @classmethod
    def _functions_alone(cls, data: Any) -> Any:
        return refuse_kinds(data, "tools")


class ResponseTool(Function):
    """A function that the model may call, in the shape of /v1/responses."""

    place: ClassVar[str] = "tools"
    harmless: ClassVar = CACHE_MARKS
    refused: ClassVar[Mapping[str, Nothing]] = {
        "async": (False,),
        "defer_loading": (False,),
        "allowed_callers": (["direct"],),
        "output_schema": (),
    }

    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _functions_alone(cls, data: Any) -> Any:
        return refuse_kinds(data, "tools")

    def plain(self) -> dict[str, Any]:
        """The same in the shape of chat completions."""
        return {"type": "function", "function": self.model_dump(exclude={"type"})}


class FunctionName(Checked):
    """Which function."""

    place: ClassVar[str] = "tool_choice.function"

    name: str


class NamedChoice(Checked):
    """A `tool_choice` that names the function to call."""

    place: ClassVar[str] = "tool_choice"

    type: Literal["function"]
    function: FunctionName


class NamedFunction(Checked):
    """The same in the shape of /v1/responses."""

    place: ClassVar[str] = "tool_choice"

    type: Literal["function"]
    name: str

    def plain(self) -> dict[str, Any]:
        """The same in the shape of chat completions."""
        return {"type": "function", "function": {"name": self.name}}


class AllowedTools(Checked):
    """Which of the tools may be called, and whether one must be."""

    place: ClassVar[str] = "tool_choice.allowed_tools"

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedChoice], Field(min_length=1, max_length=MOST_TOOLS)]


class AllowedChoice(Checked):
    """A `tool_choice` of some of the tools."""

    place: ClassVar[str] = "tool_choice"

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class AllowedFunctions(Checked):
    """The same in the shape of /v1/responses."""

    place: ClassVar[str] = "tool_choice"

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=MOST_TOOLS)]

    def plain(self) -> dict[str, Any]:
        """The same in the shape of chat completions."""
        allowed = {"mode": self.mode, "tools": [one.plain() for one in self.tools]}
        return {"type": "allowed_tools", "allowed_tools": allowed}


SomeTools = Annotated[NamedChoice | AllowedChoice, Field(discriminator="type")]
SomeFunctions = Annotated[NamedFunction | AllowedFunctions, Field(discriminator="type")]
KINDS_OF_CHOICE: Sequence[str] = ("function", "allowed_tools")


def refuse_choice(data: Any) -> Any:
    """Raise for a body whose `tool_choice` is of a type that is not supported."""
    choice = data.get("tool_choice") if isinstance(data, dict) else None
    kind = choice.get("type") if isinstance(choice, dict) else None
    if isinstance(kind, str) and kind not in KINDS_OF_CHOICE:
        message = f"tool_choice: type {kind!r:.40} is not supported; known: {', '.join(KINDS_OF_CHOICE)}"
        raise parameter_error("unsupported_value", message, "tool_choice")
    return data
