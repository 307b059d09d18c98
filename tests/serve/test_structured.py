"""Completions that keep to a form: JSON, JSON of a schema, calls of tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from support.serving import DIALOGUES, Running

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "mood": {"enum": ["good", "bad"]},
        "score": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["mood", "score"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
TOOLS: Any = [
    {
        "type": "function",
        "function": {"name": "rate", "description": "Rates something.", "parameters": SCHEMA},
    },
    {"type": "function", "function": {"name": "now"}},
]
MESSAGES: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture
def client(roomy_server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{roomy_server.url}/v1", api_key="unused", max_retries=0, timeout=60
    ) as made:
        yield made


def check(value: Any) -> None:
    assert set(value) == {"mood", "score"}
    assert value["mood"] in ("good", "bad")
    assert value["score"] in range(10)


@pytest.mark.parametrize("seed", range(3))
def test_json_of_a_schema(client: openai.OpenAI, seed: int) -> None:
    settings: Any = {"model": "tiny/taught", "messages": MESSAGES, "seed": seed, "temperature": 1.0}
    whole = client.chat.completions.create(**settings, response_format=FORMAT)
    check(json.loads(whole.choices[0].message.content))
    assert whole.choices[0].finish_reason == "stop"
    streamed = "".join(
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**settings, response_format=FORMAT, stream=True)
    )
    assert streamed == whole.choices[0].message.content
    newer = client.responses.create(
        model="tiny/taught",
        input="hello",
        text={"format": {"type": "json_schema", "name": "answer", "schema": SCHEMA}},
    )
    check(json.loads(newer.output_text))


WRAPPED: Any = {"name": "answer", "schema": SCHEMA}
KEPT: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema", "json_schema": {**WRAPPED, "strict": False}}},
    {"response_format": {"type": "json_schema", "json_schema": {**WRAPPED, "description": "A mood."}}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    {"response_format": {"type": "json_schema", "schema": SCHEMA}},
    {"response_format": {"type": "json_schema", **WRAPPED, "strict": True}},
    {"response_format": {"type": "json_object", "schema": SCHEMA}},
    {"response_format": {"type": "json_object", "json_schema": WRAPPED}},
    {"guided_json": SCHEMA},
    {"guided_json": json.dumps(SCHEMA)},
    {"structured_outputs": {"json": SCHEMA}},
    {"structured_outputs": {"json": json.dumps(SCHEMA)}, "response_format": {"type": "text"}},
    {"json_schema": SCHEMA},
]
"""How clients ask for JSON of a schema."""


@pytest.mark.parametrize("change", KEPT, ids=lambda change: json.dumps(change)[:60])
def test_a_schema_is_kept_to_however_it_is_asked_for(roomy_server: Running, change: dict[str, Any]) -> None:
    body = {"model": "tiny/taught", "messages": MESSAGES, "temperature": 1.0, "seed": 3, **change}
    response = httpx.post(f"{roomy_server.url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    check(json.loads(response.json()["choices"][0]["message"]["content"]))


@pytest.mark.parametrize("strict", [True, False, None])
def test_responses_keep_to_their_format(client: openai.OpenAI, strict: bool | None) -> None:
    form: Any = {"type": "json_schema", "name": "answer", "schema": SCHEMA, "strict": strict}
    said = client.responses.create(model="tiny/taught", input="hello", text={"format": form}).output_text
    check(json.loads(said))
    free = client.responses.create(
        model="tiny/taught", input="hello", text={"format": {"type": "text"}}, temperature=0
    )
    assert free.output_text == DIALOGUES["hello"]


@pytest.mark.parametrize(
    "change",
    [
        {"guided_choice": ["good ☃", "bad\nline", 'a "quoted" one']},
        {"structured_outputs": {"choice": ["good ☃", "bad\nline", 'a "quoted" one']}},
        {"guided_regex": "good ☃|bad\nline"},
        {"structured_outputs": {"regex": "good ☃|bad\nline"}},
    ],
    ids=str,
)
def test_choices_and_patterns(roomy_server: Running, change: dict[str, Any]) -> None:
    for seed in range(3):
        body = {"model": "tiny/taught", "messages": MESSAGES, "seed": seed, "temperature": 2.0, **change}
        response = httpx.post(f"{roomy_server.url}/v1/chat/completions", json=body, timeout=60)
        choice = response.json()["choices"][0]
        assert choice["message"]["content"] in ("good ☃", "bad\nline", 'a "quoted" one')
        assert choice["finish_reason"] == "stop"


def test_a_description_reaches_the_model(client: openai.OpenAI) -> None:
    def tokens(**more: str) -> int:
        form: Any = {"type": "json_schema", "json_schema": {**WRAPPED, **more}}
        answer = client.chat.completions.create(
            model="tiny/taught", messages=MESSAGES, response_format=form, max_tokens=1
        )
        return int(answer.usage.prompt_tokens)

    assert tokens(description="How somebody feels.") > tokens() == tokens(description="")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}},
        {"type": "object", "not": {"required": ["a"]}},
        {"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}},
        {"type": "object", "dependentRequired": {"a": ["b"]}},
        {"type": "object", "propertyNames": {"pattern": "^x"}},
        {"type": "array", "contains": {"type": "integer"}},
        {"type": "string", "format": "no-such-format"},
        {"type": "object", "minProperties": 7, "maxProperties": 8},
        {"type": "object", "unevaluatedProperties": False},
    ],
    ids=json.dumps,
)
def test_a_schema_is_kept_to_or_refused(roomy_server: Running, schema: dict[str, Any]) -> None:
    """No keyword is passed over: what the answer would not keep to is refused, and the message names it."""
    import jsonschema_rs

    for strict in (True, False):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}
        body = {"model": "tiny/taught", "messages": MESSAGES, "response_format": form, "max_tokens": 200}
        for seed in range(2):
            response = httpx.post(
                f"{roomy_server.url}/v1/chat/completions", json={**body, "seed": seed}, timeout=60
            )
            if response.status_code == 400:
                error = response.json()["error"]
                assert error["param"] == "response_format", error
                break
            choice = response.json()["choices"][0]
            if choice["finish_reason"] == "stop":
                jsonschema_rs.validate(schema, json.loads(choice["message"]["content"]))


def test_allowed_tools(client: openai.OpenAI) -> None:
    def named(*names: str) -> Any:
        return [{"type": "function", "function": {"name": name}} for name in names]

    allowed: Any
    for mode in ("required", "auto"):
        allowed = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named("rate")}}
        for seed in range(3):
            choice = client.chat.completions.create(
                model="tiny/taught",
                messages=MESSAGES,
                tools=TOOLS,
                seed=seed,
                max_tokens=120,
                tool_choice=allowed,
                parallel_tool_calls=False,
            ).choices[0]
            calls = [call.function.name for call in choice.message.tool_calls or ()]
            assert calls == ["rate"] if mode == "required" else calls in ([], ["rate"])
    tools: Any = [{"type": "function", "name": name, "parameters": SCHEMA} for name in ("rate", "other")]
    one = {"type": "function", "name": "other"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [one]}
    made = client.responses.create(
        model="tiny/taught",
        input="hello",
        tools=tools,
        tool_choice=allowed,
        max_output_tokens=120,
        parallel_tool_calls=False,
    )
    assert [item.name for item in made.output] == ["other"]


def test_any_json_object(client: openai.OpenAI) -> None:
    for seed in range(4):
        choice = client.chat.completions.create(
            model="tiny/taught",
            messages=MESSAGES,
            seed=seed,
            max_tokens=120,
            response_format={"type": "json_object"},
        ).choices[0]
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
        else:
            assert choice.message.content.lstrip().startswith("{")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "rate"}}], ids=str)
def test_a_call_can_be_forced(client: openai.OpenAI, choice: Any) -> None:
    settings: Any = {"model": "tiny/taught", "messages": MESSAGES, "seed": 5, "max_tokens": 120}
    whole = client.chat.completions.create(
        **settings, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False
    ).choices[0]
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
    (call,) = whole.message.tool_calls
    if choice == "required":
        assert call.function.name in ("rate", "now")
    else:
        assert call.function.name == "rate"
    if call.function.name == "rate":
        check(json.loads(call.function.arguments))
    names, arguments, reasons, ids = "", "", [], set()
    for chunk in client.chat.completions.create(
        **settings, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, stream=True
    ):
        reasons.append(chunk.choices[0].finish_reason)
        for one in chunk.choices[0].delta.tool_calls or ():
            names += one.function.name or ""
            arguments += one.function.arguments or ""
            ids |= {one.id} if one.id else set()
    assert (names, arguments, reasons[-1], len(ids)) == (
        call.function.name,
        call.function.arguments,
        "tool_calls",
        1,
    )
    again: Any = [*MESSAGES, whole.message, {"role": "tool", "tool_call_id": call.id, "content": "42"}]
    after = client.chat.completions.create(model="tiny/taught", messages=again, tools=TOOLS, max_tokens=5)
    assert after.choices[0].finish_reason in ("length", "stop", "tool_calls")


def test_responses_call_tools(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "name": "rate", "parameters": SCHEMA, "strict": True}]
    settings: Any = {
        "model": "tiny/taught",
        "input": "hello",
        "tools": tools,
        "temperature": 0.0,
        "max_output_tokens": 120,
        "tool_choice": {"type": "function", "name": "rate"},
        "parallel_tool_calls": False,
    }
    whole = client.responses.create(**settings)
    (call,) = whole.output
    assert (call.type, call.name) == ("function_call", "rate")
    check(json.loads(call.arguments))
    arguments, kinds = "", []
    for event in client.responses.create(**settings, stream=True):
        kinds.append(event.type)
        if event.type == "response.function_call_arguments.delta":
            arguments += event.delta
        if event.type == "response.function_call_arguments.done":
            assert event.arguments == arguments
    assert arguments == call.arguments
    assert kinds[2] == "response.output_item.added"
    assert kinds[-3:] == [
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    turns: Any = [
        {"role": "user", "content": "hello"},
        {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments},
        {"type": "function_call_output", "call_id": call.call_id, "output": "42"},
    ]
    assert (
        client.responses.create(model="tiny/taught", input=turns, max_output_tokens=4).usage.output_tokens
        == 4
    )


def test_without_a_form_nothing_changes(client: openai.OpenAI) -> None:
    for form in (
        {},
        {"response_format": {"type": "text"}},
        {"tools": TOOLS, "tool_choice": "none"},
        {"tools": []},
    ):
        answer = client.chat.completions.create(model="tiny/taught", messages=MESSAGES, temperature=0, **form)
        assert answer.choices[0].message.content == DIALOGUES["hello"], form


def test_tools_are_described_to_the_model(client: openai.OpenAI) -> None:
    bare = client.chat.completions.create(model="tiny/taught", messages=MESSAGES, max_tokens=2)
    told = client.chat.completions.create(
        model="tiny/taught", messages=MESSAGES, max_tokens=2, tools=TOOLS[1:]
    )
    assert told.usage.prompt_tokens > bare.usage.prompt_tokens + 20


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "wizard"}},
                }
            },
            "schema",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"$ref": "http://x/y"}},
                }
            },
            "schema",
        ),
        ({"response_format": {"type": "json_object"}, "tools": TOOLS}, "cannot be had"),
        ({"response_format": {"type": "text", "schema": SCHEMA}}, "type text has no schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "needs a schema"),
        (
            {"response_format": {"type": "json_schema", "schema": {}, "json_schema": WRAPPED}},
            "two schemas",
        ),
        ({"response_format": {"type": "json_object", "pattern": "a"}}, "response_format.pattern"),
        ({"response_format": {"type": "grammar", "grammar": "root ::= x"}}, "response_format"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "an answer has one form"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[]"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["x"] * 257}, "guided_choice"),
        ({"guided_regex": "("}, "regular expression"),
        ({"structured_outputs": {"grammar": "root ::= x"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "an answer has one form"),
        ({"grammar": "root ::= x"}, "grammar"),
        ({"guided_grammar": "root ::= x"}, "guided_grammar"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}},
            "tool_choice.allowed_tools.tools",
        ),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "the name rate"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}},
            "none of the tools",
        ),
        ({"tools": TOOLS * 65}, "tools"),
    ],
    ids=str,
)
def test_refusals(roomy_server: Running, change: dict[str, Any], says: str) -> None:
    body = {"model": "tiny/taught", "messages": MESSAGES, **change}
    response = httpx.post(f"{roomy_server.url}/v1/chat/completions", json=body, timeout=30)
    assert response.status_code == 400, response.text
    assert says in response.json()["error"]["message"]
