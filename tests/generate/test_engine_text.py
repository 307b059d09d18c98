"""Texts of the engine: whole characters, stop texts that span tokens, pieces that add up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatwright.generate.engine import Engine, Piece, Request
from chatwright.generate.sampling import Sampling
from chatwright.generate.sequence import Text
from chatwright.model.gpt import GPT
from chatwright.tokenizer import Tokenizer
from support.vocabularies import sentencepiece

MakeModel = Callable[..., GPT]


def say(
    engine: Engine, tokenizer: Tokenizer, text: str, stop: tuple[str, ...] = (), new: int = 50
) -> list[Piece]:
    """Pieces of what a chain model says after the first character of its text."""
    sampling = Sampling(new, temperature=0.0, stop=stop)
    prompt = tuple(tokenizer.encode(text)[:1])
    return list(engine.stream(Request(prompt, sampling, frozenset({tokenizer.end_of_text_id}))))


def test_text_streams_in_whole_characters(make_chain: Callable[[str], GPT], tokenizer: Tokenizer) -> None:
    text = "xaé€😀z"
    pieces = say(Engine(make_chain(text), tokenizer), tokenizer, text)
    assert [piece.text for piece in pieces] == ["a", "", "é", "", "", "€", "", "", "", "😀", "z", ""]
    assert [piece.finish_reason for piece in pieces] == [None] * 11 + ["stop"]
    assert pieces[-1].ids == [tokenizer.end_of_text_id]
    cut = say(Engine(make_chain(text), tokenizer), tokenizer, text, new=5)
    assert (
        "".join(piece.text for piece in cut) == "aé\ufffd"
    )  # the end of the answer cuts a character: it shows
    assert cut[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("stop", "said", "reason", "tokens"),
    [
        (("fgh",), "bcde", "stop", 7),
        (("b",), "", "stop", 1),
        (("zz", "hi", "ghij"), "bcdefg", "stop", 8),
        (("ef", "def"), "bc", "stop", 5),  # both come with the same token: the longer one began earlier
        (("gx", "jk!"), "bcdefghijk", "stop", 11),  # what might have begun a stop text is said after all
        (("a",), "bcdefghijk", "stop", 11),  # the prompt does not count
    ],
)
def test_stop_texts_span_tokens_and_are_cut(
    make_chain: Callable[[str], GPT],
    tokenizer: Tokenizer,
    stop: tuple[str, ...],
    said: str,
    reason: str,
    tokens: int,
) -> None:
    engine = Engine(make_chain("abcdefghijk"), tokenizer)
    pieces = say(engine, tokenizer, "abcdefghijk", stop)
    assert "".join(piece.text for piece in pieces) == said
    assert sum(len(piece.ids) for piece in pieces) == tokens
    assert pieces[-1].finish_reason == reason
    request = Request(
        (tokenizer.encode("a")[0],), Sampling(50, 0.0, stop=stop), frozenset({tokenizer.end_of_text_id})
    )
    completion = engine.generate([request])[0]
    assert (completion.text, completion.finish_reason, len(completion.ids)) == (said, reason, tokens)


def test_a_held_back_text_comes_out_at_the_end(
    make_chain: Callable[[str], GPT], tokenizer: Tokenizer
) -> None:
    pieces = say(Engine(make_chain("abcdefgh"), tokenizer), tokenizer, "abcdefgh", stop=("defX",), new=5)
    assert [piece.text for piece in pieces] == ["b", "c", "", "", "def"]
    engine = Engine(make_chain("abcdefgh"), tokenizer)
    prompt = (tokenizer.encode("a")[0],)
    handle = engine.submit(Request(prompt, Sampling(50, 0.0, stop=("cdefX",))))
    for _ in range(4):
        engine.step()
    handle.cancel()
    assert handle.result().text == "bcde"
    assert "".join(piece.text for piece in handle.pieces()) == "bcde"
    assert list(handle.pieces()) == []  # each part once


@settings(max_examples=200, deadline=None)
@given(
    data=st.binary(max_size=30) | st.text("ab€", max_size=30).map(str.encode),
    stops=st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3),
)
def test_any_bytes_and_stop_texts(data: bytes, stops: list[str], tokenizer: Tokenizer) -> None:
    text, parts = Text(tokenizer, tuple(stops)), []
    stopped = False
    for token in tokenizer.encode(data):
        part, stopped = text.push(token)
        parts.append(part)
        if stopped:
            break
    if not stopped:
        parts.append(text.flush()[0])
    whole = data.decode("utf-8", errors="replace")
    first = min((at for at in map(whole.find, stops) if at >= 0), default=len(whole))
    said = "".join(parts)
    # A stop text ends the answer as soon as it is complete, so another one that began earlier but is longer
    # may be cut short; apart from that everything before the first stop text is said.
    assert whole.startswith(said)
    assert not any(stop in said for stop in stops)
    assert len(said) == first or (stopped and any(whole.startswith(stop, len(said)) for stop in stops))
    assert stopped == any(stop in whole for stop in stops)


def test_streamed_text_of_random_bytes_equals_the_final_one(
    make_model: MakeModel, tokenizer: Tokenizer
) -> None:
    engine = Engine(make_model(vocab_size=tokenizer.vocab_size + 9), tokenizer)
    handles = [
        engine.submit(
            Request((1, at), Sampling(100, temperature=3.0, seed=at, stop=("qq", "\ufffd\ufffd\ufffda")))
        )
        for at in range(8)
    ]
    for handle in handles:
        pieces = list(handle.pieces())
        completion = handle.result()
        assert [token for piece in pieces for token in piece.ids] == completion.ids
        assert "".join(piece.text for piece in pieces) == completion.text
        assert pieces[-1].finish_reason == completion.finish_reason
        known = [token for token in completion.ids if token < tokenizer.vocab_size]  # the table is padded
        assert tokenizer.decode(known).startswith(completion.text)
        assert len(completion.text) > 20


PIECES = Tokenizer(sentencepiece("llama"), end_of_text="</s>")


def spoken(text: Text, ids: list[int]) -> tuple[list[str], bool]:
    """What each token brings, up to where a stop text ends the answer."""
    said = []
    for number in ids:
        new, stopped = text.push(number)
        said.append(new)
        if stopped:
            return said, True
    return [*said, text.flush()[0]], False


def test_a_line_end_that_is_a_byte_token_stops_at_once() -> None:
    """SentencePiece's byte tokens are held back until their run ends; a stop text must not wait for that."""
    newline = PIECES.backend.token_to_id("<0x0A>")
    the = PIECES.encode("the")
    assert spoken(Text(PIECES, ("\n",)), [*the, newline, *the]) == (["the", ""], True)
    assert spoken(Text(PIECES, ("e\n\n",)), [*the, newline, newline, *the])[0] == ["th", "", ""]
    assert spoken(Text(PIECES, ()), [*the, newline, *the])[0] == ["the", "", "\n the", ""]


def test_an_answer_in_the_middle_of_a_text_keeps_its_space() -> None:
    the = PIECES.encode("the")
    assert spoken(Text(PIECES, ()), the)[0][0] == "the"
    assert spoken(Text(PIECES, (), continues=True), the)[0][0] == " the"
