"""Tools in a request: a template that writes them itself gets them, any other a system message about them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from chatwright.chat import NATIVE, ChatTemplate, Message
from chatwright.serve.api.form import Form, Wanted

HERMES = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    '{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\n{"name": "{{ c.function.name }}", '
    '"arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|end|>{% endfor %}'
)
"""The form of calls that is read out of answers."""
OTHER = HERMES.replace("<tool_call>\n", "[CALL]")
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "now", "description": "The time."}}]
TALK = [Message(role="user", content="What time is it?")]


def asked(source: str, choice: str = "auto") -> tuple[Any, list[Message]]:
    model: Any = SimpleNamespace(require_template=lambda: ChatTemplate(source))
    form = Form.of(Wanted(), TOOLS, choice, None)
    return form.beside(model), form.messages(TALK, model)


def test_a_template_that_writes_tools_gets_them() -> None:
    beside, messages = asked(HERMES)
    assert [tool["function"]["name"] for tool in beside["tools"]] == ["now"] and messages == TALK
    text = ChatTemplate(HERMES).render(messages, **beside)
    assert '"name": "now", "description": "The time."' in text


@pytest.mark.parametrize("source", [NATIVE.source, OTHER], ids=["no form for tools", "another form of calls"])
def test_any_other_gets_a_system_message(source: str) -> None:
    beside, messages = asked(source)
    assert not beside and messages[0]["role"] == "system" and "<tools>" in str(messages[0]["content"])


def test_tools_that_may_not_be_called_are_not_shown() -> None:
    assert asked(HERMES, "none") == ({}, TALK)


def test_arguments_that_came_as_text_become_objects_where_the_template_wants_them() -> None:
    from chatwright.chat import check_messages

    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}
    talk = check_messages([*TALK, {"role": "assistant", "content": None, "tool_calls": [call]}])
    assert '"arguments": {"x": "é"}}' in ChatTemplate(HERMES).render(talk)
    taking = HERMES.replace("c.function.arguments | tojson", "c.function.arguments")
    assert '"arguments": {"x": "é"}}' in ChatTemplate(taking).render(talk)
    # As the client's message stands, it is passed on as it is: that is what transformers does.
    raw: list[Any] = [*TALK, {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert r'"arguments": "{\"x\": \"é\"}"' in ChatTemplate(HERMES).render(raw)
