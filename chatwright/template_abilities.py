"""What a chat template does with messages, found by rendering probes and looking for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError, nodes

from chatwright.config import UserError
from chatwright.messages import BEFORE_ARGUMENTS, BEFORE_NAME, OPEN
from chatwright.sandbox import Sandbox

Render = Callable[..., str]
"""Messages, and tools by name, to text. Raises UserError where the template refuses them."""

_NAME, _KEY, _VALUE, _WORD = "probe_tool", "probe_key", "probe_value", "probe text"
_AS_A_LIST = re.compile(rf"""['"]text['"]: ['"]{_WORD}""")  # a list that was printed, not gone through
TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": "A value."}}},
    },
}


class Abilities:
    """What a template can do. Each is found when it is first asked for."""

    def __init__(self, source: str, render: Render) -> None:
        self._source, self._render = source, render

    def _written(self, *messages: Mapping[str, Any], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """What the template makes of a conversation; empty where it refuses it."""
        try:
            return str.__str__(self._render(messages, tools=tools))
        except UserError:
            return ""

    @cached_property
    def lists_only(self) -> bool:
        """Goes through lists of text parts and drops a content that is a text."""
        return self.lists and _WORD not in self._written({"role": "user", "content": _WORD})

    @cached_property
    def lists(self) -> bool:
        """Writes a content that is a list of text parts. Templates that never name a part's `text` are not
        tried."""
        if "text" not in self._source:
            return False
        found = self._written({"role": "user", "content": [{"type": "text", "text": _WORD}]})
        return _WORD in found and not _AS_A_LIST.search(found)

    def _call(self, arguments: Any) -> str:
        call = {
            "id": "callprobe",
            "type": "function",
            "function": {"name": _NAME, "arguments": arguments},
        }
        asked = {"role": "user", "content": "One?"}
        said = {"role": "assistant", "content": "", "tool_calls": [call]}
        result = {"role": "tool", "tool_call_id": "callprobe", "name": _NAME, "content": "1"}
        return self._written(asked, said) or self._written(asked, said, result)

    @cached_property
    def _called(self) -> tuple[str, str]:
        """A call with arguments as an object, and as a text."""
        if "tool_call" not in self._source:
            return "", ""
        return self._call({_KEY: _VALUE}), self._call(f'{{"{_KEY}": "{_VALUE}"}}')

    @cached_property
    def calls(self) -> bool:
        """Writes `tool_calls` of an assistant's message."""
        return any(_NAME in text for text in self._called)

    @cached_property
    def objects(self) -> bool:
        """Wants the arguments of a call as an object: a text would be written as a text within JSON, or
        refused."""
        by_object, by_text = self._called
        return _VALUE in by_object and (_VALUE not in by_text or f'\\"{_KEY}' in by_text)

    @cached_property
    def thinking(self) -> bool:
        """Writes what stands in `reasoning_content`."""
        if not any(name in self._source for name in ("reasoning_content", "thinking", "reasoning")):
            return False
        said = {"role": "assistant", "content": "Two.", "reasoning_content": _WORD, "thinking": _WORD}
        return _WORD in self._written({"role": "user", "content": "One?"}, said)

    @cached_property
    def tools(self) -> bool:
        """Writes what the tools are."""
        if "tools" not in self._source:
            return False
        return _NAME in self._written({"role": "user", "content": "One?"}, tools=[TOOL])

    @cached_property
    def hermes(self) -> bool:
        """Writes calls in the form that generate/tool_calls.py reads."""
        return f"{OPEN}{BEFORE_NAME}{_NAME}{BEFORE_ARGUMENTS}" in self._called[not self.objects]


def independent_turns(source: str) -> bool:
    """Whether a template writes each message by itself: one loop over the messages whose body looks at
    nothing but its own message."""
    try:
        tree = Sandbox().parse(source)
    except (TemplateError, RecursionError):
        return False
    constants, loops = {"raise_exception"}, 0
    for node in tree.body:
        if isinstance(node, nodes.For) and isinstance(node.iter, nodes.Name) and node.iter.name == "messages":
            loops += 1
            names = list(node.find_all(nodes.Name))
            own = {name.name for name in names if name.ctx == "store"}
            free = {name.name for name in names if name.ctx == "load"} - own - constants - {"messages"}
            inner = sum(name.name == "messages" for name in names) > 1
            if free or inner or any(node.find_all((nodes.CallBlock, nodes.Macro, nodes.NSRef))):
                return False
        elif isinstance(node, nodes.Assign) and isinstance(node.node, nodes.Const):
            constants |= {name.name for name in node.target.find_all(nodes.Name)} | _name(node.target)
        elif any(name.name == "messages" for name in node.find_all(nodes.Name)) or any(
            node.find_all((nodes.Macro, nodes.Assign))
        ):
            return False
    return loops == 1


def _name(node: nodes.Node) -> set[str]:
    return {node.name} if isinstance(node, nodes.Name) else set()
