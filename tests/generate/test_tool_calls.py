"""Calls of tools: what is asked of a model, what it may say, and what is read from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import jsonschema_rs
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from chatwright.config import UserError
from chatwright.generate.engine import Completion, Engine, Request
from chatwright.generate.sampling import Sampling
from chatwright.generate.tool_calls import (
    ArgumentsDelta,
    CallEnded,
    CallStarted,
    TextDelta,
    ToolCall,
    ToolCallParser,
    ToolEvent,
    read_answer,
)
from chatwright.generate.tools import (
    Tool,
    ToolChoice,
    check_tool_choice,
    check_tools,
    tool_grammar,
    tools_prompt,
)
from chatwright.messages import CLOSE, OPEN, write_tool_call
from chatwright.model.gpt import GPT
from chatwright.tokenizer import Tokenizer

MakeModel = Callable[..., GPT]
NAMES = ("weather", "now")


def function(name: str, **parts: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **parts}}


WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 3},
        "where": {"$ref": "#/$defs/place"},
    },
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"lat": {"type": "boolean"}},
            "required": ["lat"],
            "additionalProperties": False,
        }
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS = check_tools(
    [function("weather", description="Weather of a city", parameters=WEATHER), function("now")]
)


# ---- reading -----------------------------------------------------------------------------------------------


def events_of(pieces: Sequence[str], *, constrained: bool = False) -> list[ToolEvent]:
    """All events, with deltas that follow each other joined."""
    numbers = count()
    parser = ToolCallParser(NAMES, constrained=constrained, make_id=lambda: f"id{next(numbers)}")
    joined: list[ToolEvent] = []
    for event in [event for piece in pieces for event in parser.push(piece)] + parser.flush():
        last = joined[-1] if joined else None
        if isinstance(event, TextDelta) and isinstance(last, TextDelta):
            joined[-1] = TextDelta(last.text + event.text)
        elif isinstance(event, ArgumentsDelta) and isinstance(last, ArgumentsDelta):
            assert event.index == last.index
            joined[-1] = ArgumentsDelta(event.index, last.text + event.text)
        else:
            joined.append(event)
    return joined


def call(index: int, name: str, arguments: str) -> list[ToolEvent]:
    return [CallStarted(index, f"id{index}", name), ArgumentsDelta(index, arguments), CallEnded(index)]


GOOD = write_tool_call("weather", '{"city": "O\\"s<tool_call>lo </tool_call>", "n": [{"a": 1}]}')
ANSWERS: dict[str, tuple[str, list[ToolEvent]]] = {
    "text": ("Hello <tool> a < b\n", [TextDelta("Hello <tool> a < b\n")]),
    "half a tag": ("Hello \n<tool_ca", [TextDelta("Hello \n<tool_ca")]),
    "one": (GOOD, call(0, "weather", '{"city": "O\\"s<tool_call>lo </tool_call>", "n": [{"a": 1}]}')),
    "text before": (
        "Let me see.\n\n" + GOOD,
        [
            TextDelta("Let me see."),
            *call(0, "weather", '{"city": "O\\"s<tool_call>lo </tool_call>", "n": [{"a": 1}]}'),
        ],
    ),
    "two, text after": (
        f"{write_tool_call('now', '')}\n{write_tool_call('weather', '{ }')}\n So be it. ",
        [*call(0, "now", "{}"), *call(1, "weather", "{ }"), TextDelta("So be it. ")],
    ),
    "no white space": (f'{OPEN}{{"name":"now","arguments":{{}}}}{CLOSE}', call(0, "now", "{}")),
    "other order": (
        f'{OPEN}{{"arguments": {{"a": "\u00e9"}}, "name": "now"}}{CLOSE}',
        call(0, "now", '{"a": "\\u00e9"}'),
    ),
    "no arguments": (f'{OPEN}{{"name": "now"}}{CLOSE}', call(0, "now", "{}")),
    "twice the arguments": (
        f'{OPEN}{{"name": "now", "arguments": {{"a": 1}}, "arguments": {{"b": 2}}}}{CLOSE}',
        call(0, "now", '{"b": 2}'),
    ),
    "more keys": (
        f'{OPEN}{{"name": "now", "arguments": {{"a": 1}}, "id": 7}}{CLOSE}',
        call(0, "now", '{"a": 1}'),
    ),
    "half a character": (
        f'{OPEN}{{"name": "now", "id": 1, "arguments": {{"a": "\\ud800"}}}}{CLOSE}',
        call(0, "now", '{"a": "\\ud800"}'),
    ),
    "broken JSON": (
        f" {OPEN}\n{{'name': 'now'}}\n{CLOSE}",
        [TextDelta(f" {OPEN}\n{{'name': 'now'}}\n{CLOSE}")],
    ),
    "broken, then good": (
        f'{OPEN}{{"name: 1}}\n{CLOSE}\n{write_tool_call("now", "")}',
        [TextDelta(f'{OPEN}{{"name: 1}}\n{CLOSE}'), *call(0, "now", "{}")],
    ),
    "tag within a broken call": (
        f"{OPEN} {{ {write_tool_call('now', '')}",
        [TextDelta(f"{OPEN} {{"), *call(0, "now", "{}")],
    ),
    "unknown tool": (write_tool_call("rm", ""), [TextDelta(write_tool_call("rm", ""))]),
    "arguments no object": (
        f'{OPEN}{{"name": "now", "arguments": [1]}}{CLOSE}',
        [TextDelta(f'{OPEN}{{"name": "now", "arguments": [1]}}{CLOSE}')],
    ),
    "not a number": (
        f'{OPEN}{{"name": "now", "arguments": {{"a": NaN}}}}{CLOSE}',
        [TextDelta(f'{OPEN}{{"name": "now", "arguments": {{"a": NaN}}}}{CLOSE}')],
    ),
    "cut short": (GOOD[:-9] + "</too", [TextDelta(GOOD[:-9] + "</too")]),
    "deep": (f"{OPEN}{'[' * 5000}{CLOSE}", [TextDelta(f"{OPEN}{'[' * 5000}{CLOSE}")]),
    "empty": (f"{OPEN}{CLOSE}", [TextDelta(f"{OPEN}{CLOSE}")]),
}


@pytest.mark.parametrize("name", list(ANSWERS))
def test_answers_are_read(name: str) -> None:
    text, expected = ANSWERS[name]
    assert events_of([text]) == expected
    assert events_of(list(text)) == expected


PIECES = st.sampled_from(
    [
        OPEN,
        CLOSE,
        "<tool",
        "_call>",
        "</",
        "<",
        '{"name": "now", "arguments": {',
        '"',
        "\\",
        "}",
        "}}",
        "\n",
        " ",
        "a",
        "é",
        "[1]",
        ", ",
        GOOD,
        write_tool_call("now", "{}"),
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=14).map("".join), st.data(), st.booleans())
def test_cuts_change_nothing(text: str, data: st.DataObject, constrained: bool) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert events_of(pieces, constrained=constrained) == events_of([text], constrained=constrained)


@pytest.mark.parametrize("after", [OPEN, CLOSE, '"a\n'])
def test_arguments_that_break_off_are_told_at_once_as_in_pieces(after: str) -> None:
    begun = OPEN + '{"name": "now", "arguments": {'
    assert events_of([begun + after], constrained=True) == events_of([begun, after], constrained=True)
    assert ArgumentsDelta(0, "{") in events_of([begun + OPEN], constrained=True)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=14).map("".join))
def test_what_is_no_call_is_text(text: str) -> None:
    """Nothing is lost but the white space around calls, and each call that is told is sound."""
    events = events_of([text])
    left = text
    for event in events:
        if isinstance(event, TextDelta):
            assert left.lstrip().startswith(event.text.lstrip())
            left = left.lstrip()[len(event.text.lstrip()) :]
        elif isinstance(event, CallStarted):
            assert event.name in NAMES
            left = left.lstrip()
            assert left.startswith(OPEN)
        elif isinstance(event, ArgumentsDelta):
            assert isinstance(json.loads(event.text), dict)
        else:
            body, tag, left = left[len(OPEN) :].partition(CLOSE)
            while tag and body.count('"') - body.count('\\"') & 1 and not _is_json(body):
                more, tag, left = left.partition(CLOSE)
                body += CLOSE + more
            assert _is_json(body)
    assert not left.strip()


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def test_no_tag_is_shown_in_part() -> None:
    parser = ToolCallParser(NAMES)
    assert parser.push("See: <") == [TextDelta("See:")]
    assert parser.push("b> and ") == [TextDelta(" <b> and")]
    assert parser.push("<tool_call") == []
    assert parser.push(">\n{") == []
    assert [type(event) for event in parser.push('"name": "now"}\n</tool_call>')] == [
        CallStarted,
        ArgumentsDelta,
        CallEnded,
    ]
    assert parser.flush() == []


def test_what_cannot_become_a_call_is_given_back_at_once() -> None:
    """No JSON string goes on over the end of a line, no call over the beginning of another."""
    parser = ToolCallParser(NAMES)
    assert parser.push('<tool_call>{"name: 1}') == []
    assert parser.push("\n") == [TextDelta('<tool_call>{"name: 1}')]
    assert parser.push("<tool_call> no ") == []
    assert parser.push("<tool_call>") == [TextDelta("\n<tool_call> no")]


def test_arguments_come_as_they_are_said_where_a_grammar_holds() -> None:
    parser = ToolCallParser(NAMES, constrained=True, make_id=lambda: "id")
    assert parser.push('Well\n<tool_call>\n{"name": "weather", "argu') == [TextDelta("Well")]
    assert parser.push('ments": {"city": "Os') == [
        CallStarted(0, "id", "weather"),
        ArgumentsDelta(0, '{"city": "Os'),
    ]
    assert parser.push("lo }</tool_call>\\") == [ArgumentsDelta(0, "lo }</tool_call>")]
    assert parser.push('"", "n": {}') == [ArgumentsDelta(0, '\\"", "n": {}')]
    assert parser.push("} ") == [ArgumentsDelta(0, "}")]
    assert parser.push("}\n</tool") == []
    assert parser.push("_call>") == [CallEnded(0)]
    assert parser.push('<tool_call>\n{"name": "now", "arguments": {"a": "') == [
        CallStarted(1, "id", "now"),
        ArgumentsDelta(1, '{"a": "'),
    ]
    assert parser.flush() == []  # cut short: it has no end


def test_ids_differ() -> None:
    _, calls = read_answer(f"{write_tool_call('now', '')}{write_tool_call('now', '')}", NAMES)
    assert len({call.id for call in calls}) == 2 and all(call.id.startswith("call_") for call in calls)


def test_a_whole_answer() -> None:
    text, calls = read_answer("Hm.\n" + write_tool_call("weather", '{"city": "Oslo"}'), NAMES)
    assert text == "Hm."
    assert calls == [ToolCall(calls[0].id, "weather", '{"city": "Oslo"}')]


def test_long_answers_are_read_in_time() -> None:
    import time

    begun = time.monotonic()
    for text in (
        OPEN * 20_000,
        (OPEN + '"') * 20_000,
        (OPEN + '{"' + CLOSE) * 10_000,
        " " * 200_000 + "x",
        "<tool_cal" * 20_000,
        OPEN + "{" * 200_000 + CLOSE,
    ):
        assert "".join(event.text for event in events_of([text]) if isinstance(event, TextDelta)) == text
    assert time.monotonic() - begun < 10


# ---- tools -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ({}, "must be a list"),
        ([function("a")] * 129, "129 tools; at most 128"),
        ([{"type": "retrieval"}], r"tools\[0\]: expected"),
        ([function("ok"), {"type": "function"}], r"tools\[1\]: expected"),
        ([function("two words")], "name 'two words' must be"),
        ([function("a" * 65)], "must be 1 to 64"),
        ([function("")], "must be 1 to 64"),
        ([{"type": "function", "function": {}}], "name None must be"),
        ([function("a"), function("a")], "two tools have the name a"),
        ([function("a", description=7)], "description must be a text"),
        ([function("a", parameters=[])], "must be an object, not list"),
        ([function("a", parameters={"type": "array"})], "must be of type"),
        ([function("a", parameters={"properties": {"b": {"$ref": "http://c"}}})], "tool a: .* not supported"),
        ([function(f"a{n}", parameters={"description": "b" * 60_000}) for n in range(3)], "altogether"),
    ],
)
def test_bad_tools_are_refused_in_words(tools: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_tools(tools)


def test_choices() -> None:
    assert check_tool_choice(None, TOOLS) == "auto" and check_tool_choice(None, ()) == "none"
    assert check_tool_choice("auto", TOOLS) == "auto" and check_tool_choice("auto", ()) == "none"
    assert check_tool_choice("none", TOOLS) == "none"
    assert check_tool_choice("required", TOOLS) == "required"
    assert check_tool_choice(function("now"), TOOLS) is TOOLS[1]
    for wrong, said in (
        ("sometimes", "must be"),
        ({"type": "function"}, "must be"),
        (function("rm"), "none of the tools"),
        (3, "must be"),
    ):
        with pytest.raises(UserError, match=said):
            check_tool_choice(wrong, TOOLS)
    with pytest.raises(UserError, match="there are no tools"):
        check_tool_choice("required", ())


def test_the_prompt_lists_the_tools() -> None:
    text = tools_prompt(TOOLS)
    listed = text.partition("<tools>\n")[2].partition("\n</tools>")[0].splitlines()
    assert [json.loads(line)["function"] for line in listed] == [
        {"name": tool.name, "description": tool.description, "parameters": tool.parameters} for tool in TOOLS
    ]
    assert OPEN in text and CLOSE in text
    assert tools_prompt(()) == ""


# ---- grammars ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer.train([GOOD * 30 + "weather unit city days now where"], 340)


@pytest.fixture(scope="module")
def model(make_model: MakeModel, words: Tokenizer) -> GPT:
    return make_model(vocab_size=words.vocab_size + 4, context=1024)


def answers(
    model: GPT,
    words: Tokenizer,
    choice: ToolChoice,
    *,
    parallel: bool = True,
    bias: dict[int, float] | None = None,
    number: int = 8,
) -> list[Completion]:
    end = frozenset({words.end_of_text_id})
    grammar = tool_grammar(words, end, TOOLS, choice, parallel)
    settings = [
        Sampling(500, 1.0, seed=seed, logit_bias=tuple((bias or {}).items())) for seed in range(number)
    ]
    return Engine(model, words).generate([Request((5, 6), one, end, grammar=grammar) for one in settings])


def check(calls: Sequence[ToolCall], tools: Sequence[Tool] = TOOLS) -> None:
    schemas = {tool.name: tool.parameters for tool in tools}
    for call in calls:
        jsonschema_rs.validator_for(dict(schemas[call.name])).validate(json.loads(call.arguments))


@pytest.mark.parametrize("parallel", [True, False])
def test_required_calls_satisfy_their_schemas(model: GPT, words: Tokenizer, parallel: bool) -> None:
    now = [number for number in range(words.vocab_size) if words.token_bytes(number) in (b"n", b"no", b"now")]
    bias = {words.end_of_text_id: -2.0, **dict.fromkeys(now, 3.0)}  # where more calls may follow, they do
    seen: list[ToolCall] = []
    counts = set()
    for answer in answers(model, words, "required", parallel=parallel, bias=bias, number=16):
        text, calls = read_answer(answer.text, NAMES)
        if answer.finish_reason == "stop":
            assert text == "" and calls
            counts.add(len(calls))
        seen += calls
    check(seen)
    assert {call.name for call in seen} == set(NAMES)
    assert (max(counts) > 1) == parallel and (parallel or counts == {1})


def test_a_named_tool_is_called(model: GPT, words: Tokenizer) -> None:
    for answer in answers(model, words, TOOLS[0], parallel=False):
        text, calls = read_answer(answer.text, NAMES)
        assert answer.finish_reason == "stop" and text == "" and [call.name for call in calls] == ["weather"]
        check(calls)


def test_auto_lets_text_be_and_holds_calls(model: GPT, words: Tokenizer) -> None:
    """With a tag that is a single token, as in Qwen's vocabularies, and without."""
    backend = tokenizers.Tokenizer.from_str(words.to_json())
    backend.add_tokens([tokenizers.AddedToken(OPEN, special=False, normalized=False)])
    single = Tokenizer(backend)
    assert len(single.encode(OPEN)) == 1
    for tokenizer in (single, words):
        opening = tokenizer.encode(OPEN)
        likely = dict.fromkeys(opening, 5.0 if len(opening) == 1 else 12.0) | {
            words.end_of_text_id: 4.0 if len(opening) == 1 else 9.0
        }
        kinds = set()
        for answer in answers(model, tokenizer, "auto", bias=likely, number=24):
            text, calls = read_answer(answer.text, NAMES)
            if answer.finish_reason == "stop":
                assert OPEN not in text
                kinds.add((bool(text), bool(calls)))
            check(calls)
        assert {(True, False), (True, True)} <= kinds, len(opening)


def test_none_is_free(words: Tokenizer) -> None:
    assert tool_grammar(words, [0], TOOLS, "none") is None
    assert tool_grammar(words, [0], (), "auto") is None


def test_a_schema_that_cannot_be_compiled_is_named(words: Tokenizer) -> None:
    tools = check_tools([function("now"), function("bad", parameters={"properties": {"a": {"not": {}}}})])
    with pytest.raises(
        UserError,
        match=r"tool bad: its parameters' JSON schema cannot be used: Unimplemented keys: \[\"not\"\]",
    ):
        tool_grammar(words, [0], tools, "auto")


def test_streams_of_constrained_answers_equal_the_whole(model: GPT, words: Tokenizer) -> None:
    for answer in answers(model, words, "required", number=4):
        whole = events_of([answer.text])
        assert [
            event
            for event in events_of(list(answer.text), constrained=True)
            if answer.finish_reason == "stop"
        ] in (whole, [])
