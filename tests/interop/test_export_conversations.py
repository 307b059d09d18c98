"""Conversations in exported directories: transformers' apply_chat_template gives our ids, and exactly when it
does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from chatwright.chat import NATIVE, ChatTemplate, Message
from chatwright.interop.leaving import portable
from chatwright.tokenizer import Tokenizer

from .conftest import SHAPES, export_hf, parts_of, their_ids, their_tokenizer

TALK = [
    Message(role="system", content="Be brief."),
    Message(role="user", content="What is 12 + 7?\n\n"),
    Message(role="assistant", content=" 19, naïve 東京 🙂"),
    Message(role="user", content=""),
]


@pytest.mark.parametrize("name", ["gpt1", "gpt2", "llama", "qwen3", "arcee"])
def test_text_has_the_same_ids(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Whatever class transformers takes for the family, it cuts text as we do."""
    theirs = their_tokenizer(export_hf(parts_of(SHAPES[name], tokenizer), tmp_path / "out"))
    for text in ("Hello there,  how are 1234 you?\n\n\tnaïve café — 東京 🙂 don't", "", " ", "x" * 99):
        assert theirs(text)["input_ids"] == tokenizer.encode_text(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.apply_chat_template(TALK, tokenize=False) == NATIVE.render(TALK)
    assert their_ids(theirs, TALK) == NATIVE.encode(TALK, tokenizer).ids


WORDY = ChatTemplate(
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n<|end|>\n{% endfor %}{% if add_generation_prompt "
    "%}assistant: {% endif %}",
    "<|end|>",
)
"""A template whose text touches the contents: there, tokens may join."""


@pytest.fixture(scope="module")
def twins(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = {}
    for name, template in (("native", NATIVE), ("wordy", WORDY)):
        parts = replace(parts_of(SHAPES["qwen3"], tokenizer), template=template)
        made[name] = their_tokenizer(export_hf(parts, tmp_path_factory.mktemp("twin") / name))
    return made


PIECES = st.sampled_from(
    [
        " ",
        "\n",
        "\t",
        "a",
        "you",
        "'s",
        "1",
        "12",
        "é",
        "東",
        "🙂",
        ":",
        "<",
        "<|",
        "|>",
        "<|end",
        "|",
        "end|>",
        ".",
        "\u0300",
    ]
)
CONTENTS = st.one_of(st.text(max_size=20), st.lists(PIECES, max_size=12).map("".join))
CHATS = st.lists(
    st.builds(Message, role=st.sampled_from(["system", "user", "assistant", "tool"]), content=CONTENTS),
    min_size=1,
    max_size=4,
)


def spells_a_control(messages: list[Message], tokenizer: Tokenizer) -> bool:
    return any(control in message["content"] for message in messages for control in tokenizer.controls)


@given(messages=CHATS, prompt=st.booleans())
@settings(max_examples=300)
def test_conversations_have_the_same_ids(
    twins: dict[str, Any], tokenizer: Tokenizer, messages: list[Message], prompt: bool
) -> None:
    """With the template of models trained here, all but contents that spell a control token: it stands on
    both sides of every content, so that nothing can join."""
    assume(not spells_a_control(messages, tokenizer))
    ours = NATIVE.encode(messages, tokenizer, add_generation_prompt=prompt).ids
    assert their_ids(twins["native"], messages, prompt=prompt) == ours


@given(messages=CHATS, prompt=st.booleans())
@settings(max_examples=300)
def test_conversations_whose_tokens_join_have_the_same_ids(
    twins: dict[str, Any], tokenizer: Tokenizer, messages: list[Message], prompt: bool
) -> None:
    """With text beside the contents, whose tokens join with theirs."""
    assume(not spells_a_control(messages, tokenizer))
    ours = WORDY.encode(messages, tokenizer, add_generation_prompt=prompt).ids
    assert their_ids(twins["wordy"], messages, prompt=prompt) == ours


def test_where_ids_differ(twins: dict[str, Any], tokenizer: Tokenizer) -> None:
    """The exception: a control token that is spelled out. Tokens that join at a border are none."""
    spelled = [Message(role="user", content="<|end|>")]
    assert tokenizer.control_ids["<|end|>"] in their_ids(twins["native"], spelled)[1:2]
    assert NATIVE.encode(spelled, tokenizer).ids.count(tokenizer.control_ids["<|end|>"]) == 1
    joined = [Message(role="user", content="you")]  # "user: " and "you", but " you" is a token
    assert their_ids(twins["native"], joined) == NATIVE.encode(joined, tokenizer).ids
    assert their_ids(twins["wordy"], joined) == WORDY.encode(joined, tokenizer).ids
    assert WORDY.encode(joined, tokenizer).ids[:3] != tokenizer.encode("user: ") + tokenizer.encode("you")[:1]
    assert twins["wordy"].decode(their_ids(twins["wordy"], joined)) == "user: you\n<|end|>\n"


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("{{ bos_token }}{% for m in messages %}{{ m.content }}<|end|>{% endfor %}", "hi<|end|>"),
        (
            "{%- set eos_token = '!' -%}{% for m in messages %}{{ m.content }}{{ eos_token }}<|end|>{% "
            "endfor %}",
            "hi!<|end|>",
        ),
    ],
)
def test_templates_that_speak_of_special_tokens(
    source: str, wanted: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Programs hand templates their own bos_token and eos_token; ours are empty, and stay so elsewhere."""
    template = ChatTemplate(source, "<|end|>")
    parts = replace(parts_of(SHAPES["llama"], tokenizer), template=template)
    theirs = their_tokenizer(export_hf(parts, tmp_path / "out"))
    messages = [Message(role="user", content="hi")]
    assert template.render(messages) == wanted == theirs.apply_chat_template(messages, tokenize=False)
    assert their_ids(theirs, messages) == template.encode(messages, tokenizer).ids
    assert portable(NATIVE) == NATIVE.source
