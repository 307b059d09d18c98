"""Tokens with probabilities: whatever a model writes, their texts together are the answer's text."""

from __future__ import annotations

import math

import pytest

from chatwright.chat import Message
from chatwright.generate.request import Piece
from chatwright.language_model import LanguageModel
from chatwright.serve.tokens import Token, TokenTexts, spelled
from support.serving import DIALOGUES, TinyModel


def tokens_of(model: LanguageModel, ask: str, **options: object) -> tuple[list[Token], str, bool]:
    """The tokens of an answer, its text, and whether they came in the text's own order at every piece."""
    texts, tokens, text, ahead = TokenTexts(model.tokenizer), [], "", False
    request, _ = model.chat_request([Message(role="user", content=ask)], top_logprobs=3, **options)
    for piece in model.engine.stream(request):
        text += piece.text
        tokens += texts.push(piece)
        ahead |= not text.startswith("".join(token["text"] for token in tokens))
    return tokens, text, ahead


@pytest.mark.parametrize("seed", range(12))
def test_broken_characters(small: LanguageModel, seed: int) -> None:
    """A model that has learnt nothing writes bytes that are no text."""
    tokens, text, ahead = tokens_of(small, "hello", temperature=1.5, seed=seed, max_new_tokens=60)
    assert "".join(token["text"] for token in tokens) == text
    assert not ahead
    assert "\ufffd" in text


@pytest.mark.parametrize("stop", ["small", "upon a", "e t", "model. O", "x"])
def test_stop_texts(tiny: TinyModel, stop: str) -> None:
    tokens, text, ahead = tokens_of(tiny, "story", temperature=0.0, stop=(stop,), max_new_tokens=120)
    assert "".join(token["text"] for token in tokens) == text == DIALOGUES["story"].partition(stop)[0]
    assert not ahead


def test_a_character_of_several_tokens_has_the_product(tiny: TinyModel) -> None:
    """One that spells out the bytes of a snowman, and one that breaks off in the middle of it."""
    texts = TokenTexts(tiny.tokenizer)
    a, *snowman = (tiny.tokenizer.encode(bytes([byte]))[0] for byte in "a☃".encode())
    top = [[(a, math.log(0.5))]]
    half = math.log(0.5)
    assert texts.push(Piece("a", [a], None, [half], top)) == [
        {"text": "a", "p": 0.5, "alternatives": [{"text": "a", "p": 0.5}]}
    ]
    assert texts.push(Piece("", snowman[:2], None, [half] * 2, top * 2)) == []
    assert [
        (token["text"], token["p"]) for token in texts.push(Piece("☃", snowman[2:], None, [half], top))
    ] == [("☃", 0.125)]
    assert texts.push(Piece("", snowman[:1], None, [half], top)) == []
    end = tiny.tokenizer.end_of_text_id
    assert [
        (token["text"], token["p"]) for token in texts.push(Piece("\ufffd", [end], "stop", [half], top))
    ] == [("\ufffd", 0.5)]


def test_how_tokens_are_spelled(tiny: TinyModel) -> None:
    tokenizer = tiny.tokenizer
    assert spelled(tokenizer, tokenizer.end_of_text_id) == "<|endoftext|>"
    assert spelled(tokenizer, tokenizer.vocab_size + 3) == f"<{tokenizer.vocab_size + 3}>"
    (byte,) = tokenizer.encode(b"\xe2")
    assert spelled(tokenizer, byte) == "\\xe2"
    assert spelled(tokenizer, tokenizer.encode("a")[0]) == "a"
