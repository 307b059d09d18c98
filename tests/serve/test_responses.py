"""POST /v1/responses through the real client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from support.serving import DIALOGUES, Running

ASK = {"model": "tiny/taught", "temperature": 0.0}


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=30) as made:
        yield made


def test_whole_response(client: openai.OpenAI) -> None:
    response = client.responses.create(input="hello", **ASK)
    assert response.output_text == DIALOGUES["hello"]
    assert (response.status, response.object, response.model) == ("completed", "response", "tiny/taught")
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens > 0
    assert response.output[0].role == "assistant"


def test_the_same_as_chat(client: openai.OpenAI) -> None:
    items: Any = [
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "hel"}, {"type": "input_text", "text": "lo"}],
        },
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": DIALOGUES["hello"]}],
        },
        {"role": "user", "content": "name?"},
    ]
    response = client.responses.create(input=items, instructions="Be brief.", max_output_tokens=20, **ASK)
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": DIALOGUES["hello"]},
        {"role": "user", "content": "name?"},
    ]
    chat = client.chat.completions.create(messages=messages, max_tokens=20, **ASK)
    assert response.output_text == chat.choices[0].message.content
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.instructions == "Be brief."


def test_calls_results_and_turns_of_one_assistant_are_joined(client: openai.OpenAI, server: Running) -> None:
    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": '{"a": 1}'}
    said = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    items: Any = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hm."},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]},
        call,
        call,
        {"role": "assistant", "content": "Yes."},
        {"type": "function_call_output", "call_id": "a", "output": "12"},
        {"role": "user", "content": "name?"},
    ]
    messages: Any = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": f"Hm.\nLet me see.\n{said}\n{said}\nYes."},
        {"role": "tool", "content": "12"},
        {"role": "user", "content": "name?"},
    ]
    response = client.responses.create(input=items, max_output_tokens=20, **ASK)
    chat = client.chat.completions.create(messages=messages, max_tokens=20, **ASK)
    assert chat.usage.prompt_tokens == response.usage.input_tokens
    assert chat.usage.prompt_tokens_details.cached_tokens == chat.usage.prompt_tokens - 1  # the same ids
    assert chat.choices[0].message.content == response.output_text


def test_what_a_client_got_it_may_send_back(client: openai.OpenAI) -> None:
    first = client.responses.create(input="hello", **ASK)
    turns: Any = [{"role": "user", "content": "hello"}, *first.output, {"role": "user", "content": "name?"}]
    assert client.responses.create(input=turns, max_output_tokens=8, **ASK).output_text


def test_too_long_is_incomplete(client: openai.OpenAI) -> None:
    response = client.responses.create(input="story", max_output_tokens=3, **ASK)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage.output_tokens == 3


def test_events_build_the_response(client: openai.OpenAI, server: Running) -> None:
    server.model.engine.allow(3)
    text, kinds, numbers, last = "", [], [], None
    for event in client.responses.create(input="story", stream=True, **ASK):
        kinds.append(event.type)
        numbers.append(event.sequence_number)
        if event.type == "response.output_text.delta":
            text += event.delta
            server.model.engine.allow(float("inf"))  # the first text came before the last was computed
        if event.type == "response.output_text.done":
            assert event.text == text
        last = event
    assert text == DIALOGUES["story"]
    assert numbers == list(range(len(numbers)))
    frame = [kind for kind in kinds if kind != "response.output_text.delta"]
    assert frame == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert kinds.count("response.output_text.delta") > 1
    assert last.response.output_text == text
    assert last.response.usage.output_tokens > 0


def test_the_clients_own_accumulation_agrees(client: openai.OpenAI) -> None:
    with client.responses.stream(input="hello", **ASK) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == DIALOGUES["hello"]


def test_an_error_in_the_middle_is_an_event(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("secret detail")

    monkeypatch.setattr(server.model.model, "hidden", broken)
    raw = httpx.post(f"{server.url}/v1/responses", json={**ASK, "input": "hello", "stream": True}, timeout=30)
    assert "event: error" in raw.text
    assert "secret" not in raw.text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        (
            {
                "input": [
                    {"role": "user", "content": [{"type": "input_image", "image_url": "https://x.org/a"}]}
                ]
            },
            "holds an image (https://x.org/a), and this model reads text only",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input_image"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"model": "other"}, "tiny/taught"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"input": "long " * 400}, "too long"),
    ],
    ids=str,
)
def test_refusals(server: Running, change: dict[str, Any], says: str) -> None:
    response = httpx.post(f"{server.url}/v1/responses", json={**ASK, "input": "x", **change}, timeout=30)
    assert response.status_code in (400, 404), response.text
    assert says in str(response.json()["error"])
