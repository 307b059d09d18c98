"""What tokens stand for: as the library decodes them, piece by piece and at once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from chatwright.config import UserError
from chatwright.token_spelling import decoding_of
from chatwright.tokenizer import TextStream, Tokenizer
from support.vocabularies import KINDS, TEXTS, sentencepiece


def metaspace() -> Backend:
    """T5's way: the decoder itself knows the sign."""
    backend = sentencepiece("always")
    backend.decoder = decoders.Metaspace("▁", "always")
    return backend


OURS = {kind: Tokenizer(sentencepiece(kind), end_of_text="</s>") for kind in KINDS} | {
    "metaspace": Tokenizer(metaspace(), end_of_text="</s>")
}
SIZE = OURS["llama"].vocab_size
LOSING = ("first", "always")
BYTES = st.integers(3, 258)
"""Ids of byte tokens: runs of them are the hard part."""
IDS = st.lists(st.one_of(BYTES, st.integers(0, SIZE - 1)), max_size=12)


@pytest.mark.parametrize("kind", OURS)
@settings(max_examples=150)
@given(ids=IDS)
def test_any_ids_decode_as_in_the_library(kind: str, ids: list[int]) -> None:
    """Broken runs of bytes, control tokens in between and spaces in front included; a stream gives the
    same."""
    ours = OURS[kind]
    assert ours.decode(ids) == ours.backend.decode(ids, skip_special_tokens=True)
    stream = TextStream(ours)
    assert "".join([*map(stream.push, ids), stream.flush()]) == ours.decode(ids)


@pytest.mark.parametrize("kind", OURS)
@settings(max_examples=100)
@given(ids=IDS)
def test_a_stream_that_goes_on_keeps_every_space(kind: str, ids: list[int]) -> None:
    """What goes on behind a text is the text of all, less the text before."""
    ours = OURS[kind]
    before = ours.encode("the")
    stream = TextStream(ours, continues=True)
    goes_on = "".join([*map(stream.push, ids), stream.flush()])
    assert ours.decode(before) + goes_on == ours.decode([*before, *ids])


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.binary(max_size=12))
@settings(max_examples=100)
def test_any_bytes_come_back(kind: str, data: bytes) -> None:
    """Where bytes are no UTF-8 they become byte tokens, and nothing is put between them."""
    ours = OURS[kind]
    if "▁".encode() in data or (kind in LOSING and data.startswith(b" ")):
        return  # the sign for a space is a space; Metaspace adds none to a text that begins with one
    assert ours.decode_bytes(ours.encode(data)) == data


def test_bytes_of_tokens() -> None:
    """A piece that begins a word begins with a space; a byte token is its byte; a control token nothing."""
    ours = OURS["llama"]
    number = ours.backend.token_to_id("▁the")
    assert ours.token_bytes(number) == b" the"
    assert ours.token_bytes(ours.backend.token_to_id("<0x0A>")) == b"\n"
    assert ours.token_bytes(ours.backend.token_to_id("</s>")) == b""
    assert ours.decode([number]) == "the" and OURS["gemma"].decode([number]) == " the"


def test_characters_of_several_bytes_come_whole() -> None:
    ours = OURS["llama"]
    stream, ids = TextStream(ours), ours.encode("🙂 the")
    pieces = [stream.push(number) for number in ids]
    assert "".join(pieces) + stream.flush() == "🙂 the"
    assert all("�" not in piece for piece in pieces) and "" in pieces


def test_what_is_held_back_can_be_seen() -> None:
    """A line end is a byte token: a stop text must not wait for the token behind it."""
    ours = OURS["llama"]
    stream = TextStream(ours)
    assert stream.push(ours.backend.token_to_id("<0x0A>")) == "" and stream.pending() == "\n"
    assert stream.push(ours.backend.token_to_id("<0xFF>")) == "" and stream.pending() == ""
    assert stream.flush() == "��"


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_texts_come_back(kind: str, text: str) -> None:
    ours = OURS[kind]
    backend = ours.backend
    assert ours.encode(text) == backend.encode(text, add_special_tokens=False).ids
    assert ours.decode(ours.encode(text)) == backend.decode(ours.encode(text))
    if "▁" not in text and not (kind in LOSING and text.startswith(" ")):
        assert ours.decode(ours.encode(text)) == text
    assert not set(ours.encode(text)) & set(ours.control_ids.values())


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ({"type": "WordPiece"}, "its decoder 'WordPiece' is not supported, only ByteLevel, Replace"),
        ({"type": "Sequence", "decoders": []}, "its decoder is damaged"),
        (
            {"type": "Sequence", "decoders": [{"type": "Strip"}, {"type": "Fuse"}]},
            "parts in an order that is not supported",
        ),
        (
            {"type": "Replace", "pattern": {"Regex": "a*"}, "content": "b"},
            "only short texts can be",
        ),
        (
            {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 99},
            "writes a text of 99 characters for a sign",
        ),
        (
            {
                "type": "Sequence",
                "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": "x", "start": 1, "stop": 0}],
            },
            "strips other things than spaces",
        ),
    ],
)
def test_decoders_that_are_not_known_are_named(decoder: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        decoding_of({"decoder": decoder}, "x/tokenizer.json")
