"""The form that an answer must have, and its grammar: free text, JSON, JSON of a schema, a choice, a pattern,
tool calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from chatwright.chat import Beside, Message
from chatwright.config import UserError
from chatwright.generate.grammar import Grammar, json_object, json_schema, one_of, regex
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
from chatwright.serve.errors import naming

if TYPE_CHECKING:
    from chatwright.language_model import LanguageModel

Kind = Literal["text", "json_object", "json_schema", "choice", "regex"]


@dataclass(frozen=True)
class Wanted:
    """The form of the answer's text, as a request asks for it."""

    kind: Kind = "text"
    schema: dict[str, Any] | None = None
    description: str = ""
    """What the answer is for: the model is told."""
    choices: tuple[str, ...] = ()
    pattern: str = ""
    param: str = "response_format"
    """The parameter that asks for it, for messages."""


@dataclass(frozen=True)
class Form:
    """The form asked for, in one shape for all interfaces. Raises UserError for contradictory settings."""

    wanted: Wanted = Wanted()
    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = "none"
    parallel: bool = True
    """Whether several calls may come in one answer."""

    def __post_init__(self) -> None:
        with naming(self.wanted.param):
            if self.wanted.kind == "json_schema" and self.wanted.schema is None:
                raise UserError(f"{self.wanted.param}: json_schema needs a schema")
            if self.wanted.kind != "text" and self.calls:
                raise UserError(
                    f"{self.wanted.param} and tools cannot be had in one answer: give tool_choice none, or "
                    "leave one out"
                )

    @classmethod
    def of(cls, wanted: Wanted, tools: list[dict[str, Any]], choice: Any, parallel: bool | None) -> Form:
        """From the fields of OpenAI's chat interface: tools as {"type": "function", "function": ...}, the
        choice as there. Raises ApiError, which names the field."""
        with naming("tools"):
            checked = check_tools(tools)
        with naming("tool_choice"):
            if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
                checked, choice = _allowed(choice["allowed_tools"], checked)
            chosen = check_tool_choice(choice, checked)
        return cls(wanted, checked, chosen, parallel is not False)

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
        told = self._told()
        return with_system(messages, told) if told else list(messages)

    def _told(self) -> str:
        """What the model is told about the form of its text; empty for free text."""
        wanted = self.wanted
        about = f" {wanted.description}" if wanted.description else ""
        if wanted.kind == "json_schema":
            return f"Answer with JSON of this schema alone:{about}\n{compact(wanted.schema)}"
        if wanted.kind == "json_object":
            return "Answer with a JSON object alone."
        if wanted.kind == "choice":
            return f"Answer with one of these alone: {compact(list(wanted.choices))}"
        return ""

    def grammar(self, model: LanguageModel) -> Grammar | None:
        """The grammar that constrains the answer; None for free text. Takes up to a second for large schemas.
        Raises ApiError, which names the field."""
        if not self.calls and self.wanted.kind == "text":
            return None
        model.require_template()
        end_ids = model.end_ids
        with naming("tools" if self.calls else self.wanted.param):
            if self.calls:
                return tool_grammar(model.tokenizer, end_ids, self.tools, self.choice, self.parallel)
            return self._text_grammar(model, end_ids)

    def _text_grammar(self, model: LanguageModel, end_ids: frozenset[int]) -> Grammar:
        wanted = self.wanted
        if wanted.kind == "json_object":
            return json_object(model.tokenizer, end_ids)
        if wanted.kind == "choice":
            return one_of(model.tokenizer, end_ids, wanted.choices)
        if wanted.kind == "regex":
            return regex(model.tokenizer, end_ids, wanted.pattern)
        assert wanted.schema is not None
        return json_schema(model.tokenizer, end_ids, wanted.schema)


def _allowed(allowed: Mapping[str, Any], tools: Sequence[Tool]) -> tuple[tuple[Tool, ...], str]:
    """The tools that `allowed_tools` leaves, and the choice among them. Raises UserError."""
    names = [check_tool_choice(one, tools) for one in allowed["tools"]]
    kept = tuple(tool for tool in tools if tool in names)
    if not kept:
        raise UserError("tool_choice: allowed_tools names no tool; for no calls give none")
    return kept, str(allowed["mode"])
