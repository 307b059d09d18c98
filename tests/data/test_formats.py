"""Others' formats: each gives back the conversation it was written from; nothing is guessed; what is broken
is named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from chatwright.chat import check_messages
from chatwright.config import UserError
from chatwright.data import formats, preferences
from chatwright.data.examples import Comparison, Dialogue
from chatwright.data.reading import Faults
from chatwright.data.sources import comparisons, dialogues
from chatwright.messages import parts_of, to_openai, write_tool_call

Row = dict[str, Any]
ABC = hashlib.sha256(b"ABC").hexdigest()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
PLAIN = st.text("ab é{}\n#.", min_size=1).filter(lambda text: text == text.strip() != "")
TALK = st.tuples(
    st.lists(st.tuples(st.just("system"), TEXT), max_size=1),
    st.lists(st.tuples(st.sampled_from(["user", "assistant"]), TEXT), min_size=1, max_size=5),
).map(lambda parts: [*parts[0], *parts[1]])


def dialogue_of(turns: list[tuple[str, str]]) -> Dialogue:
    return Dialogue.of([{"role": role, "content": text} for role, text in turns])  # type: ignore[typeddict-item]


# ---- every format gives the same dialogue ------------------------------------------------------------------


def ours(talk: Dialogue) -> Row:
    return dict(json.loads(talk.to_json()))


def openai(talk: Dialogue) -> Row:
    return {"messages": [{**message, "name": None} for message in talk.messages], "tools": None}


def openai_parts(talk: Dialogue) -> Row:
    """Contents as two text parts, system messages as developer's."""
    turns = []
    for message in talk.messages:
        text, role = message["content"], message["role"]
        half = len(text) // 2
        parts = [{"type": "text", "text": part} for part in (text[:half], text[half:])]
        turns.append({"role": "developer" if role == "system" else role, "content": parts})
    return {"messages": turns}


SPOKEN = {"user": "human", "assistant": "gpt", "system": "system"}


def sharegpt(talk: Dialogue) -> Row:
    return {
        "id": 7,
        "conversations": [{"from": SPOKEN[m["role"]], "value": m["content"]} for m in talk.messages],
    }


def sharegpt_with_a_system_column(talk: Dialogue) -> Row:
    row, first = sharegpt(talk), talk.messages[0]
    if first["role"] == "system":
        row = {"system": first["content"], "conversations": row["conversations"][1:]}
    return row


def openai_called_conversations(talk: Dialogue) -> Row:
    return {"conversations": list(talk.messages), "messages": None}


@pytest.mark.parametrize(
    "write",
    [ours, openai, openai_parts, sharegpt, sharegpt_with_a_system_column, openai_called_conversations],
)
@given(TALK)
def test_each_format_gives_back_the_conversation(
    write: Callable[[Dialogue], Row], turns: list[tuple[str, str]]
) -> None:
    talk = dialogue_of(turns)
    row = write(talk)
    assert formats.dialogue(row) == talk
    assert formats.dialogue(json.loads(json.dumps(row))) == talk


@given(TEXT, st.one_of(st.just(""), TEXT), TEXT)
def test_alpaca_is_one_exchange_with_the_standard_prompt(
    instruction: str, given_input: str, output: str
) -> None:
    row = {"instruction": instruction, "input": given_input, "output": output}
    asked, answer = formats.dialogue(row).messages
    middle = f"\n\n### Input:\n{given_input}" if given_input else ""
    assert asked["content"].endswith(
        f" completes the request.\n\n### Instruction:\n{instruction}{middle}\n\n### Response:"
    )
    assert asked["content"].startswith(
        "Below is an instruction that describes a task" + (", paired" if given_input else ". Write")
    )
    assert (asked["role"], answer) == ("user", {"role": "assistant", "content": output})
    plain = formats.dialogue(row, "alpaca-plain").messages
    assert (
        plain[0]["content"] == (f"{instruction}\n\n{given_input}" if given_input else instruction)
        and plain[1] == answer
    )
    under = formats.dialogue({**row, "system": "Be brief."}).messages
    assert under == ({"role": "system", "content": "Be brief."}, asked, answer)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "hub"])
def test_through_files_and_the_hub(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns that a record lacks are null in Parquet and on the hub: that must not make it ambiguous."""
    talks = [dialogue_of([("user", f"q{n}"), ("assistant", f"a{n}")]) for n in range(3)]
    rows = [openai(talks[0]), sharegpt(talks[1]), {"instruction": "i", "output": "o"}]
    rows = [
        {
            "messages": None,
            "conversations": None,
            "instruction": None,
            "input": None,
            "output": None,
            "id": None,
            **row,
        }
        for row in rows
    ]
    for row in rows:
        row.pop("tools", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    spec = f"a.{kind}"
    if kind == "jsonl":
        Path(spec).write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        Path(spec).write_text(json.dumps(rows))
    else:
        spec = spec if kind == "parquet" else "hf:./set"
        file = Path(spec) if kind == "parquet" else Path("set/data/train-0.parquet")
        file.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert [one.messages[-1]["content"] for one in dialogues(spec)] == ["a0", "a1", "o"]
    assert next(dialogues(spec)) == talks[0]


# ---- nothing is guessed ------------------------------------------------------------------------------------

ASKED = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
BOTH = {"messages": ASKED, "instruction": "add", "output": "2"}


def test_a_setting_decides_where_a_record_fits_two_formats() -> None:
    with pytest.raises(ValueError, match="columns of two formats: instruction, output and messages"):
        formats.dialogue(BOTH)
    assert formats.dialogue(BOTH, "openai").messages[1]["content"] == "ho"
    assert formats.dialogue(BOTH, "alpaca-plain").messages[1]["content"] == "2"
    assert formats.dialogue(BOTH, column="messages").messages[1]["content"] == "ho"


@pytest.mark.parametrize(
    ("row", "format", "message"),
    [
        ({"text": "x"}, "auto", r"no column 'messages' .*the columns found are: text"),
        (
            {"messages": ASKED, "conversations": ASKED},
            "auto",
            "both of the columns messages, conversations; choose one by #column",
        ),
        ({"messages": [{"content": "x"}]}, "auto", "neither role .* nor from"),
        ({"messages": [{"role": "user", "from": "human"}]}, "auto", "both role and from"),
        (
            {"messages": [*ASKED, {"from": "human", "value": "x"}]},
            "auto",
            "has role None",
        ),  # two ways in one list
        ({"messages": ASKED}, "sharegpt", "a message is from None; known: human, user, gpt"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "auto", "a message is from 'bot'"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "auto", "a message is from"),
        (
            {"conversations": [{"from": "gpt", "value": None}]},
            "auto",
            "content of a assistant message must be text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "auto",
            "url of a part of type 'image' must be text",
        ),
        (
            {"messages": [{"role": "user", "content": ["x"]}]},
            "auto",
            "must be an object with a type, found str",
        ),
        (
            {"messages": [*ASKED, {"role": "assistant", "content": None, "tool_calls": [1]}]},
            "auto",
            "a tool call must be an object",
        ),
        (
            {"messages": [*ASKED[:1], {**ASKED[1], "weight": 0.5}]},
            "auto",
            "weight 0.5: an answer is learnt or not",
        ),
        (
            {"system": "a", "messages": [{"role": "system", "content": "b"}, *ASKED]},
            "auto",
            "a system message in the conversation as well",
        ),
        ({"instruction": "a", "output": " "}, "auto", "output is empty"),
        ({"instruction": 3, "output": "x"}, "auto", "instruction must be text, found int"),
        ({"instruction": "a", "output": "x", "history": [["b", "c"]]}, "auto", "`history` are not read"),
        ({"messages": ASKED}, "alpaca", "instruction must be text, found nothing"),
        ({"messages": ASKED}, "chatml", "format 'chatml' is none of auto, openai"),
    ],
)
def test_what_is_not_understood_is_refused(row: Row, format: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        formats.dialogue(row, format)


CALL = {
    "id": "a",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Oslo", "é": [1]}},
}
CALLED = {"type": "tool_call", "id": "a", "name": "weather", "arguments": '{"city": "Oslo", "é": [1]}'}


def test_calls_results_and_thinking_become_parts() -> None:
    turns = [
        *ASKED[:1],
        {"role": "assistant", "content": "Hm.", "reasoning_content": "Ask.", "tool_calls": [CALL]},
        {"role": "tool", "content": "12 degrees", "tool_call_id": "a"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "as text"},
        ASKED[1],
    ]
    read = formats.dialogue({"messages": turns})
    assert read.messages == (
        ASKED[0],
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "Ask."}, {"type": "text", "text": "Hm."}, CALLED],
        },
        {"role": "tool", "content": [{"type": "tool_result", "tool_call_id": "a", "content": "12 degrees"}]},
        {"role": "assistant", "content": [CALLED]},
        {"role": "tool", "content": "as text"},
        ASKED[1],
    )
    assert formats.dialogue(ours(read)) == read
    assert formats.dialogue({"messages": to_openai(list(read.messages))}) == read
    assert Dialogue.from_json(read.to_json()) == read


def test_calls_in_sharegpt() -> None:
    spoken = [
        {"from": "human", "value": "Oslo?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo", "é": [1]}}'},
        {"from": "observation", "value": "12 degrees"},
        {
            "from": "function_call",
            "value": '[{"name": "a", "arguments": "{}"}, {"name": "b", "arguments": {}}]',
        },
        {"from": "gpt", "value": "Mild."},
    ]
    _, called, told, both, _ = formats.dialogue({"conversations": spoken}).messages
    assert called == {"role": "assistant", "content": [{**CALLED, "id": ""}]}
    assert told == {"role": "tool", "content": "12 degrees"}
    assert [part["name"] for part in both["content"]] == ["a", "b"]  # type: ignore[typeddict-item, index]
    for value in ("weather(Oslo)", "[]", "[1]", '{"name": "a"}', '{"name": 3, "arguments": {}}', None):
        with pytest.raises(ValueError, match="a function_call must be JSON like"):
            formats.dialogue({"conversations": [spoken[0], {"from": "function_call", "value": value}]})


def test_images_are_refused_where_records_are_read_for_training() -> None:
    image = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    turns = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, image]}, ASKED[1]]
    with pytest.raises(ValueError, match=r"holds an image, and models here learn from text only"):
        formats.dialogue({"messages": turns})
    kept = Dialogue.of(check_messages(turns))
    assert parts_of(kept.messages[0]["content"])[1]["type"] == "image"


def test_an_answer_of_a_pair_is_the_text_that_the_model_says() -> None:
    called = [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    read = preferences.comparison({"prompt": ASKED[:1], "chosen": called, "rejected": ASKED[1:]})
    assert read.responses == (write_tool_call("weather", '{"city": "Oslo", "é": [1]}'), "ho")


def test_ids_tell_parts_apart() -> None:
    """What differs in a call, a result or an image only is another conversation; texts in parts are not."""

    def identity(*parts: Row, role: str = "user") -> str:
        return Dialogue.of(check_messages([{"role": role, "content": list(parts)}])).id

    image = {"type": "image", "url": "a.png"}
    text = {"type": "text", "text": "a b"}
    assert identity({"type": "text", "text": "a "}, {"type": "text", "text": "b"}) == identity(text)
    found = [
        identity(text),
        identity(text, image),
        identity(text, {**image, "url": "b.png"}),
        identity(text, {**image, "sha256": "0" * 64}),
        identity(text, CALLED, role="assistant"),
        identity(text, {**CALLED, "arguments": "{}"}, role="assistant"),
        identity(text, {"type": "thinking", "thinking": "a"}, role="assistant"),
    ]
    assert len(set(found)) == len(found)
    one, other = ({**image, "url": f"data:{kind};base64,QUJD"} for kind in ("image/png", "image/x"))
    assert identity(one) == identity(other) == identity({**one, "url": "x", "sha256": ABC})


def test_text_is_written_to_files_as_before() -> None:
    """The bytes of a record of texts, however its parts were cut: files made earlier stay what they are."""
    for content in ("Grüße ☃", [{"type": "text", "text": "Grüße"}, {"type": "text", "text": " ☃"}]):
        turns = [{"role": "user", "content": content}, {**ASKED[1], "tool_calls": None}]
        assert formats.dialogue({"messages": turns}).to_json() == (
            '{"id": "678462deb1fc610bd2b2f42d865d5fc3", "messages": [{"role": "user", "content": "Grüße ☃"}, '
            '{"role": "assistant", "content": "ho"}]}'
        )


# ---- broken records ----------------------------------------------------------------------------------------


def test_broken_records_are_named_or_counted(tmp_path: Path) -> None:
    good = json.dumps({"messages": ASKED}).encode()
    broken = [b'{"messages": [', b"[1]", b'{"text": "x"}', b'{"messages": []}', b'{"messages": "\xff"}']
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join([good, broken[0], good, *broken[1:], good]) + b"\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2: not valid JSON"):
        list(dialogues(str(file)))
    faults = Faults(skip=True)
    assert len(list(dialogues(str(file), faults=faults))) == 3
    assert faults.count == len(broken) and "a.jsonl:2: not valid JSON" in faults.first
    file.write_bytes(b"\n".join(broken))
    with pytest.raises(UserError, match=r"none of its 5 records can be used; the first: .*a\.jsonl:1"):
        list(dialogues(str(file), faults=Faults(skip=True)))
    (tmp_path / "b.json").write_text(json.dumps([{"messages": ASKED}, 3]))
    faults = Faults(skip=True)
    assert len(list(dialogues(str(tmp_path / "b.json"), faults=faults))) == 1 == faults.count


# ---- comparisons -------------------------------------------------------------------------------------------

WORDS = st.lists(PLAIN, min_size=2, max_size=2)
PROMPT = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), PLAIN), min_size=1, max_size=3)


def pair_texts(prompt: list[Row], good: str, bad: str) -> Row:
    return {
        "prompt": prompt if len(prompt) > 1 or prompt[0]["role"] != "user" else prompt[0]["content"],
        "chosen": good,
        "rejected": bad,
    }


def pair_messages(prompt: list[Row], good: str, bad: str) -> Row:
    """As TRL has them: the answers are lists of one message."""
    return {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": good}],
        "rejected": [{"role": "assistant", "content": bad}],
    }


def pair_implicit(prompt: list[Row], good: str, bad: str) -> Row:
    """The prompt is in both, and nowhere else."""
    return {
        "chosen": [*prompt, {"role": "assistant", "content": good}],
        "rejected": [*prompt, {"role": "assistant", "content": bad}],
    }


def pair_repeated(prompt: list[Row], good: str, bad: str) -> Row:
    """The prompt is in a column of its own and in both."""
    return {"prompt": prompt, **pair_implicit(prompt, good, bad), "annotator": None}


def pair_sharegpt(prompt: list[Row], good: str, bad: str) -> Row:
    row = pair_messages(prompt, good, bad)
    return {
        key: [{"from": SPOKEN[turn["role"]], "value": turn["content"]} for turn in value]
        for key, value in row.items()
    }


def hh_text(prompt: list[Row], answer: str) -> str:
    turns = [*prompt, {"role": "assistant", "content": answer}]
    return "".join(
        f"\n\n{'Human' if turn['role'] == 'user' else 'Assistant'}: {turn['content']}" for turn in turns
    )


def pair_hh(prompt: list[Row], good: str, bad: str) -> Row:
    """As Anthropic's data has them: texts of whole conversations."""
    return {"chosen": hh_text(prompt, good), "rejected": hh_text(prompt, bad)}


def pair_hh_prompt(prompt: list[Row], good: str, bad: str) -> Row:
    return {"prompt": hh_text(prompt, "").rstrip(" "), "chosen": f" {good}", "rejected": f" {bad}"}


@pytest.mark.parametrize(
    "write", [pair_texts, pair_messages, pair_implicit, pair_repeated, pair_sharegpt, pair_hh, pair_hh_prompt]
)
@given(PROMPT, WORDS)
def test_every_way_to_write_a_pair_gives_the_same_comparison(
    write: Callable[..., Row], turns: list[tuple[str, str]], answers: list[str]
) -> None:
    prompt = [{"role": role, "content": text} for role, text in turns]
    assert preferences.comparison(write(prompt, *answers)) == Comparison.of(prompt, answers, (1.0, 0.0))  # type: ignore[arg-type]


@given(
    PROMPT,
    st.lists(st.tuples(PLAIN, st.integers(0, 4)), min_size=2, max_size=6),
    st.one_of(st.just(""), PLAIN),
)
def test_rankings_are_ours(
    turns: list[tuple[str, str]], answers: list[tuple[str, int]], annotator: str
) -> None:
    prompt = [{"role": role, "content": text} for role, text in turns]
    texts, scores = zip(*answers, strict=True)
    ranked = Comparison.of(prompt, texts, scores, annotator)  # type: ignore[arg-type]
    assert Comparison.from_json(ranked.to_json()) == ranked
    assert ("annotator" in json.loads(ranked.to_json())) == bool(
        annotator
    )  # older files have none, and still load
    assert preferences.comparison(json.loads(ranked.to_json())) == ranked
    assert (
        preferences.comparison(
            {"prompt": prompt, "responses": list(texts), "scores": list(scores), "annotator": annotator}
        )
        == ranked
    )


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
RANKED = {"prompt": "p", "responses": ["a", "b"], "scores": [0, 1]}


def test_a_setting_decides_between_rankings_and_pairs() -> None:
    with pytest.raises(ValueError, match="columns of two formats"):
        preferences.comparison(PAIR | RANKED)
    assert preferences.comparison(PAIR | RANKED, "ranked").scores == (0.0, 1.0)
    assert preferences.comparison(PAIR | RANKED, "pairs").scores == (1.0, 0.0)
    assert preferences.comparison({**PAIR, "annotator": 17}).annotator == "17"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "p", "chosen": "a"},
            "no columns 'responses' and 'scores', or 'chosen' and 'rejected'; the columns found are: prompt",
        ),
        ({"responses": ["a", "b"], "scores": [0, 1]}, "no column 'prompt'"),
        ({**RANKED, "responses": "ab"}, "responses must be a list"),
        ({**RANKED, "scores": [0]}, "2 responses but 1 scores"),
        ({**PAIR, "annotator": True}, "annotator must be a name or a number"),
        ({**PAIR, "chosen": ASKED}, "one of chosen and rejected is a text"),
        ({"chosen": "a", "rejected": "b"}, "two texts must begin alike, with the prompt"),
        ({"chosen": "Hi there", "rejected": "Hi you"}, "write the prompt into a column `prompt`"),
        (
            {"chosen": ASKED, "rejected": [{"role": "user", "content": "other"}, ASKED[1]]},
            "differ before their last message",
        ),
        ({"chosen": ASKED[1:], "rejected": ASKED[1:]}, "must hold it before their last message"),
        (
            {"prompt": ASKED[:1], "chosen": [*ASKED, *ASKED], "rejected": ASKED},
            "one message of the assistant, found: assistant, user, assistant",
        ),
        ({"chosen": ASKED[:1] * 2, "rejected": ASKED[:1] * 2}, "found: user"),
    ],
)
def test_comparisons_that_are_not_understood_are_refused(row: Row, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preferences.comparison(row)


def test_comparisons_come_from_files_and_not_from_named_sources(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIR) + "\n" + json.dumps({"prompt": "p"}) + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2: no columns 'responses'"):
        list(comparisons(str(tmp_path / "a.jsonl")))
    faults = Faults(skip=True)
    assert [one.responses for one in comparisons(str(tmp_path), faults=faults)] == [
        ("a", "b")
    ] and faults.count == 1
    with pytest.raises(
        UserError, match=r"chitchat holds text and dialogue records, not comparison; .*none \(give a file"
    ):
        comparisons("chitchat")
