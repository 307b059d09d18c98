"""Tools that a model may call: the prompt that describes them, and the grammar of its calls.

The form is that of Hermes (NousResearch, function calling, 2024), which Qwen's models use as well: plain
text,

    <tool_call>
    {"name": "weather", "arguments": {"city": "Oslo"}}
    </tool_call>

tool_calls.py parses it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from chatwright.config import UserError
from chatwright.generate.grammar import Grammar, json_rule, lark
from chatwright.generate.schemas import LARGEST_SCHEMA, check_schema
from chatwright.generate.tool_calls import NAME
from chatwright.messages import (
    BEFORE_ARGUMENTS,
    BEFORE_NAME,
    BEHIND_ARGUMENTS,
    BETWEEN,
    CLOSE,
    OPEN,
    write_tool_call,
)
from chatwright.tokenizer import Tokenizer

MOST_TOOLS = 128
LONGEST_DESCRIPTION = 1 << 14
"""Most characters of a tool's description."""


@dataclass(frozen=True)
class Tool:
    """A function that the model may ask for."""

    name: str
    """1 to 64 of A-Z, a-z, 0-9, _ and -."""
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """JSON schema of its arguments, an object."""


ToolChoice = Literal["none", "auto", "required"] | Tool
"""No call; text or calls, as the model chooses; a call of any tool; a call of this tool."""


def check_tools(tools: Any) -> tuple[Tool, ...]:
    """Tools as OpenAI's interface gives them: objects {"type": "function", "function": {name, description,
    parameters}}.

    Raises UserError naming the tool and what is wrong with it, its parameters' schema included.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise UserError("tools must be a list")
    if len(tools) > MOST_TOOLS:
        raise UserError(f"there are {len(tools)} tools; at most {MOST_TOOLS} may be given")
    checked = tuple(_check_tool(tool, number) for number, tool in enumerate(tools))
    names = [tool.name for tool in checked]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two tools have the name {name}")
    size = sum(len(json.dumps(tool.parameters)) for tool in checked)
    if size > LARGEST_SCHEMA:
        raise UserError(
            f"the tools' parameters have {size:,} characters altogether; at most {LARGEST_SCHEMA:,} are read"
        )
    return checked


def _check_tool(tool: Any, number: int) -> Tool:
    where = f"tools[{number}]"
    if (
        not isinstance(tool, Mapping)
        or tool.get("type") != "function"
        or not isinstance(tool.get("function"), Mapping)
    ):
        raise UserError(f'{where}: expected an object {{"type": "function", "function": {{"name": ...}}}}')
    function = tool["function"]
    name, description = function.get("name"), function.get("description") or ""
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise UserError(
            f"{where}: the name {name!r:.80} must be 1 to 64 of the characters A-Z, a-z, 0-9, _ and -"
        )
    if not isinstance(description, str) or len(description) > LONGEST_DESCRIPTION:
        raise UserError(
            f"tool {name}: its description must be a text of at most {LONGEST_DESCRIPTION:,} characters"
        )
    parameters = function.get("parameters")
    if parameters is None:  # OpenAI: a function without parameters
        parameters = {"properties": {}, "additionalProperties": False}
    checked = check_schema(parameters, f"tool {name}: its parameters' JSON schema")
    if checked.setdefault("type", "object") != "object":
        raise UserError(f'tool {name}: its parameters must be of type "object", not {checked["type"]!r:.40}')
    return Tool(name, description, checked)


def check_tool_choice(choice: Any, tools: Sequence[Tool]) -> ToolChoice:
    """The choice that `tool_choice` of OpenAI's interface asks for; None is auto where there are tools.

    Raises UserError when it is neither a known word nor the name of a tool.
    """
    if choice is None:
        return "auto" if tools else "none"
    if choice in ("none", "auto"):
        return "none" if choice == "none" or not tools else "auto"
    if choice == "required":
        if not tools:
            raise UserError("tool_choice is required, but there are no tools")
        return "required"
    function = (
        choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    )
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(
            'tool_choice must be "none", "auto", "required" or {"type": "function", "function": '
            '{"name": ...}}, '
            f"not {choice!r:.80}"
        )
    found = next((tool for tool in tools if tool.name == function["name"]), None)
    if found is None:
        raise UserError(f"tool_choice names {function['name']!r:.80}, which is none of the tools")
    return found


def described(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The tools as OpenAI's interface has them."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": dict(tool.parameters),
            },
        }
        for tool in tools
    ]


def tools_prompt(tools: Sequence[Tool]) -> str:
    """A system message's text about the tools, for models whose template has none. Empty without tools."""
    if not tools:
        return ""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in described(tools))
    return (
        "# Tools\n\n"
        "You can call functions to help with the user's request. Their signatures stand between <tools> and "
        "</tools>, one a line:\n"
        f"<tools>\n{listed}\n</tools>\n\n"
        f"To call a function, write its name and arguments as a JSON object between {OPEN} and {CLOSE}:\n"
        + write_tool_call("<function-name>", "<arguments-as-json-object>")
    )


def tool_grammar(
    tokenizer: Tokenizer,
    end_ids: Iterable[int],
    tools: Sequence[Tool],
    choice: ToolChoice,
    parallel: bool = True,
) -> Grammar | None:
    """The grammar of an answer that may, or must, call tools; None where none may be called.

    A call's arguments satisfy its tool's schema. With `auto` free text may come first, and then calls. The
    opening tag always begins a call, so that free text cannot quote it. parallel: whether several calls may
    follow each other. Raises UserError when a schema cannot be compiled (grammar.py).
    """
    if choice == "none" or not tools:
        return None
    chosen = [choice] if isinstance(choice, Tool) else list(tools)
    try:
        return lark(
            tokenizer, end_ids, _rules(chosen, choice == "auto", parallel), what="the grammar of the tools"
        )
    except UserError:
        for tool in chosen:  # raise an error that names the tool at fault
            what = f"tool {tool.name}: its parameters' JSON schema"
            lark(tokenizer, end_ids, f"start: {json_rule(dict(tool.parameters))}", what=what)
        raise


def _rules(tools: Sequence[Tool], free: bool, parallel: bool) -> str:
    """The grammar in Lark. free: a text may come before the calls or instead of them.

    A lazy rule ends as soon as it can: here at the first tag.
    """
    again = f"({json.dumps(BETWEEN + OPEN)} call)*" if parallel else ""
    rules = [
        f"start: text | opening call {again}" if free else f"start: {json.dumps(OPEN)} call {again}",
        f"call: {json.dumps(BEFORE_NAME)} named {json.dumps(BEHIND_ARGUMENTS + CLOSE)}",
        "named: " + " | ".join(f"tool_{number}" for number in range(len(tools))),
    ]
    for number, tool in enumerate(tools):
        rules.append(f"tool_{number}: {json.dumps(tool.name + BEFORE_ARGUMENTS)} arguments_{number}")
        rules.append(f"arguments_{number}: {json_rule(dict(tool.parameters))}")
    if free:
        rules += [f"opening[lazy]: TEXT {json.dumps(OPEN)}", "text: TEXT", r"TEXT: /(.|\n)*/"]
    return "\n".join(rules)
