"""Messages in parts: read in both forms, written back without loss, refused with what is wrong with them."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatwright.messages import (
    Message,
    Part,
    UnreadablePart,
    check_message,
    check_part,
    described,
    image_name,
    is_text,
    joined,
    parts_of,
    text_of,
    to_openai,
    write_tool_call,
    written,
)

TEXT = st.text(max_size=6)
NAME = st.text("abc_", min_size=1, max_size=4)
TEXTS = st.builds(lambda text: {"type": "text", "text": text}, TEXT)
PNG = "data:image/png;base64,iVBORw0KGgo="
IMAGES = st.sampled_from(
    [
        {"type": "image", "url": PNG},
        {"type": "image", "url": "pictures/a.png", "mime": "image/png", "sha256": "0" * 64},
        {"type": "image", "url": "https://example.org/a.png"},
    ]
)
CALLS = st.builds(
    lambda name, call, arguments: {
        "type": "tool_call",
        "id": call,
        "name": name,
        "arguments": json.dumps(arguments),
    },
    NAME,
    NAME,
    st.dictionaries(TEXT, TEXT, max_size=2),
)
THINKING = st.builds(lambda text: {"type": "thinking", "thinking": text}, st.text(min_size=1, max_size=6))
RESULTS = st.builds(
    lambda call, text: {"type": "tool_result", "tool_call_id": call, "content": text}, NAME, TEXT
)
WHOSE = {
    "system": TEXTS,
    "user": st.one_of(TEXTS, IMAGES),
    "assistant": st.one_of(TEXTS, THINKING, CALLS),
    "tool": st.one_of(RESULTS, IMAGES),
}


def is_sharded(role: str) -> st.SearchStrategy[dict[str, Any]]:
    content = st.one_of(TEXT, st.lists(WHOSE[role], min_size=1, max_size=4))
    return st.builds(lambda content: {"role": role, "content": content}, content)


MESSAGES = st.one_of(*map(is_sharded, WHOSE))


def part(kind: str, *values: str) -> Part:
    names = {"text": ["text"], "thinking": ["thinking"], "tool_call": ["id", "name", "arguments"]}[kind]
    return check_part({"type": kind, **dict(zip(names, values, strict=True))})


@given(MESSAGES)
def test_json_gives_back_what_was_written(message: dict[str, Any]) -> None:
    assert check_message(message) == message
    assert check_message(json.loads(json.dumps(message))) == message


@given(MESSAGES)
def test_what_else_a_message_and_its_parts_carry_is_left_out(message: dict[str, Any]) -> None:
    content = message["content"]
    more = content if isinstance(content, str) else [{**one, "cache_control": {}} for one in content]
    assert check_message({**message, "content": more, "name": "n", "tool_calls": None}) == message


ASSISTANTS = st.tuples(
    st.lists(THINKING, max_size=1),
    st.lists(TEXTS.filter(lambda one: one["text"]), max_size=1),
    st.lists(CALLS),
).map(lambda kinds: [*kinds[0], *kinds[1], *kinds[2]])


@given(ASSISTANTS.filter(bool))
def test_openais_form_of_an_answer_comes_back(parts: list[Any]) -> None:
    message = Message(role="assistant", content=parts)
    (turn,) = to_openai([message])
    assert set(turn) <= {"role", "content", "reasoning_content", "tool_calls"}
    read = check_message(json.loads(json.dumps(turn)))
    assert parts_of(read["content"]) == parts


@given(st.lists(MESSAGES, max_size=4))
def test_nothing_is_lost_in_openais_form(messages: list[Any]) -> None:
    """One message may become several, and an image has no mime and no sha256 there. All else is kept, in
    order."""
    turns = to_openai(messages)
    read = [check_message(turn) for turn in json.loads(json.dumps(turns))]

    def told(some: list[Any]) -> str:
        return "".join(
            described(
                [{k: v for k, v in one.items() if k != "sha256"} for one in parts_of(message["content"])]
            )  # type: ignore[misc]
            for message in some
        ).replace("\n", "")

    assert told(read) == told(messages)
    assert all(message in turns for message in messages if isinstance(message["content"], str))


def test_one_message_of_ours_may_be_several_of_theirs() -> None:
    said = [
        part("text", "First."),
        part("tool_call", "1", "a", "{}"),
        part("text", "Then."),
        part("tool_call", "2", "b", "{}"),
    ]
    results = [{"type": "tool_result", "tool_call_id": n, "content": f"r{n}"} for n in "12"]
    messages = [
        check_message({"role": role, "content": c}) for role, c in (("assistant", said), ("tool", results))
    ]

    def calls(number: str, name: str) -> list[Any]:
        return [{"id": number, "type": "function", "function": {"name": name, "arguments": "{}"}}]

    assert to_openai(messages) == [
        {"role": "assistant", "content": "First.", "tool_calls": calls("1", "a")},
        {"role": "assistant", "content": "Then.", "tool_calls": calls("2", "b")},
        {"role": "tool", "tool_call_id": "1", "content": "r1"},
        {"role": "tool", "tool_call_id": "2", "content": "r2"},
    ]
    only_calls = to_openai([Message(role="assistant", content=[part("tool_call", "1", "a", "{}")])])
    assert only_calls == [{"role": "assistant", "content": None, "tool_calls": calls("1", "a")}]


def test_openais_image_is_ours() -> None:
    link = {"type": "image_url", "image_url": {"url": PNG, "detail": "low"}}
    message = check_message({"role": "user", "content": [{"type": "text", "text": "?"}, link]})
    assert message["content"] == [{"type": "text", "text": "?"}, {"type": "image", "url": PNG}]
    assert to_openai([message])[0]["content"][1] == {"type": "image_url", "image_url": {"url": PNG}}
    shown = check_message({"role": "tool", "tool_call_id": "1", "content": [link]})
    assert [one["type"] for one in shown["content"]] == ["tool_result", "image"]  # type: ignore[index]
    assert check_message(to_openai([shown])[0]) == shown


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "user", "content": 3}, "the content of a user message must be text or parts, found int 3"),
        ({"role": "tool", "tool_call_id": "1"}, "a tool message must be text or parts, found nothing"),
        ({"role": "user", "content": [{"type": "txt", "text": "x"}]}, "of type 'txt'; did you mean 'text'?"),
        ({"role": "user", "content": [{"type": "tool_cal"}]}, "'tool_cal'; did you mean 'tool_call'?"),
        ({"role": "user", "content": [{"type": "smell"}]}, "'smell'; known: text, image, tool_call"),
        ({"role": "user", "content": [{"text": "x"}]}, "of type None; known: text"),
        ({"role": "user", "content": [{"type": ["text"]}]}, r"of type \['text'\]; known: text"),
        ({"role": "user", "content": ["x"]}, "must be an object with a type, found str 'x'"),
        (
            {"role": "user", "content": [{"type": "text"}]},
            "text of a part of type 'text' must be text, found",
        ),
        (
            {"role": "user", "content": [{"type": "image", "url": ""}]},
            "url of a part of type 'image' is empty",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "url of a part of type 'image'",
        ),
        (
            {"role": "user", "content": [{"type": "image", "url": "a", "sha256": "1f"}]},
            "sha256 of an image must be 64 hexadecimal digits, found '1f'",
        ),
        (
            {"role": "user", "content": [{"type": "image", "url": "a", "mime": "text/html"}]},
            "mime of an image must begin with image/, found 'text/html'",
        ),
        ({"role": "user", "content": [{"type": "image", "url": "data:,x"}]}, "must begin with data:image/"),
        (
            {"role": "user", "content": [{"type": "image", "url": "data:image/png;base64,?"}]},
            "no sound base64",
        ),
        (
            {"role": "system", "content": [{"type": "image", "url": "a"}]},
            "a part of type 'image' belongs into a message of user or tool, not system",
        ),
        (
            {"role": "user", "content": [{"type": "tool_call", "id": "", "name": "a", "arguments": "{}"}]},
            "belongs into a message of assistant, not user",
        ),
        (
            {
                "role": "assistant",
                "content": [{"type": "tool_call", "id": "", "name": "", "arguments": "{}"}],
            },
            "the name of a tool that is called is empty",
        ),
        ({"role": "user", "content": "x", "tool_calls": [{}]}, "only an assistant's message has tool_calls"),
        (
            {"role": "assistant", "content": "x", "tool_calls": "a"},
            "tool_calls must be a list, found str 'a'",
        ),
        ({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, "a tool call must be an object"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": 3}}]},
            "arguments of a part of type 'tool_call' must be text, found int 3",
        ),
    ],
)
def test_what_is_wrong_is_named(message: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        check_message(message)
    assert "\n" not in str(error.value)


def test_an_empty_list_is_an_empty_text() -> None:
    assert check_message({"role": "user", "content": []}) == {"role": "user", "content": ""}


def test_text_beside_other_parts() -> None:
    content = [part("thinking", "hm"), part("text", "a"), part("text", "b"), part("tool_call", "", "f", "{}")]
    assert text_of(content) == "ab" and text_of("ab") == "ab"
    assert not is_text(content) and is_text(content[1:3]) and is_text("x")
    assert joined("a", "b") == "ab" and joined("a", content[3:]) == [part("text", "a"), content[3]]


def test_what_a_model_that_reads_text_is_told() -> None:
    call = write_tool_call("f", '{"a": 1}')
    one = part("tool_call", "1", "f", '{"a": 1}')
    assert call == '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    assert written("x") == "x" and written([part("text", "x"), part("text", "y")]) == "xy"
    assert written([one, one]) == f"{call}\n{call}"
    assert written([part("text", "Hm."), one, part("text", "So.")]) == f"Hm.\n{call}\nSo."
    assert written([part("thinking", "2 + 2"), part("text", "4")]) == "<think>\n2 + 2\n</think>\n\n4"
    results = [{"type": "tool_result", "tool_call_id": n, "content": f"r{n}"} for n in "12"]
    assert written(check_message({"role": "tool", "content": results})["content"]) == "r1\nr2"


def test_no_text_stands_for_an_image() -> None:
    image = check_part({"type": "image", "url": "https://example.org/" + "a" * 900})
    with pytest.raises(UnreadablePart) as error:
        written([part("text", "What is this?"), image])
    assert "holds an image (https://example.org/" in str(error.value) and len(str(error.value)) < 200
    assert described([part("text", "Look: "), image]) == f"Look: [image https://example.org/{'a' * 900}]"


def test_an_image_is_named_by_its_bytes_where_they_are_known() -> None:
    data = b"\x89PNG\r\n"
    digest = hashlib.sha256(data).hexdigest()
    inside: Any = {"type": "image", "url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}
    assert image_name(inside) == image_name({"type": "image", "url": "a.png", "sha256": digest}) == digest
    assert image_name({"type": "image", "url": "a.png"}) == "a.png"
