"""The form that an answer must have (free text, JSON, JSON of a schema, or tool calls), and its grammar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from chatwright.chat import Beside, Message
from chatwright.config import UserError
from chatwright.generate.grammar import Grammar, json_object, json_schema
from chatwright.generate.tools import (
    Tool,
    ToolChoice,
    check_tool_choice,
    check_tools,
    described,
    tool_grammar,
    tools_prompt,
)
from chatwright.serve.api.messages import compact, with_system

if TYPE_CHECKING:
    from chatwright.language_model import LanguageModel


class SchemaFormat(BaseModel):
    """A JSON schema with its name."""

    model_config = ConfigDict(strict=True)
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None
    """Ignored: the answer always keeps to the schema."""


class ResponseFormat(BaseModel):
    """`text`, `json_object` (any object) or `json_schema`."""

    model_config = ConfigDict(strict=True)
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None


class FunctionTool(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(strict=True)
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolSpec(BaseModel):
    """An entry of `tools`."""

    model_config = ConfigDict(strict=True)
    type: Literal["function"]
    function: FunctionTool


class FunctionName(BaseModel):
    """Which function."""

    model_config = ConfigDict(strict=True)
    name: str


class NamedChoice(BaseModel):
    """A `tool_choice` that names the function to call."""

    model_config = ConfigDict(strict=True)
    type: Literal["function"]
    function: FunctionName


Choice = Literal["none", "auto", "required"]


@dataclass(frozen=True)
class Form:
    """The form asked for, in one shape for all interfaces. Raises UserError for contradictory settings."""

    kind: Literal["text", "json_object", "json_schema"] = "text"
    schema: dict[str, Any] | None = None
    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = "none"
    parallel: bool = True
    """Whether several calls may come in one answer."""

    def __post_init__(self) -> None:
        if self.kind == "json_schema" and self.schema is None:
            raise UserError("response_format: json_schema needs a schema")
        if self.kind != "text" and self.calls:
            raise UserError(
                "response_format and tools cannot be had in one answer: give tool_choice none, or leave one "
                "out"
            )

    @classmethod
    def of(
        cls,
        kind: Literal["text", "json_object", "json_schema"],
        schema: dict[str, Any] | None,
        tools: list[dict[str, Any]],
        choice: Any,
        parallel: bool | None,
    ) -> Form:
        """From the fields of OpenAI's chat interface: tools as {"type": "function", "function": ...}. Raises
        UserError."""
        checked = check_tools(tools)
        return cls(kind, schema, checked, check_tool_choice(choice, checked), parallel is not False)

    @property
    def calls(self) -> bool:
        """Whether the answer may contain tool calls."""
        return bool(self.tools) and self.choice != "none"

    def beside(self, model: LanguageModel) -> Beside:
        """What the model's chat template is given with the messages: the tools, where it has a form of its
        own for them and writes calls as they are read here (generate/tool_calls.py)."""
        able = model.require_template().abilities
        return Beside(tools=described(self.tools)) if self.calls and able.tools and able.hermes else Beside()

    def messages(self, messages: Sequence[Message], model: LanguageModel) -> list[Message]:
        """The conversation, with a description of the tools or of the form in its system message, unless the
        template writes that of the tools."""
        if self.beside(model):
            return list(messages)
        if self.calls:
            return with_system(messages, tools_prompt(self.tools))
        if self.kind == "json_schema":
            return with_system(messages, f"Answer with JSON of this schema alone:\n{compact(self.schema)}")
        if self.kind == "json_object":
            return with_system(messages, "Answer with a JSON object alone.")
        return list(messages)

    def grammar(self, model: LanguageModel) -> Grammar | None:
        """The grammar that constrains the answer; None for free text. Takes up to a second for large schemas.
        Raises UserError."""
        if not self.calls and self.kind == "text":
            return None
        tokenizer = model.tokenizer
        end_ids = model.require_template().end_ids(tokenizer)
        if self.calls:
            return tool_grammar(tokenizer, end_ids, self.tools, self.choice, self.parallel)
        if self.kind == "json_object":
            return json_object(tokenizer, end_ids)
        assert self.schema is not None
        return json_schema(tokenizer, end_ids, self.schema)
