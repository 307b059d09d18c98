"""Byte-level BPE: everything round-trips, nothing that people write becomes a control token."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models

from chatwright.config import UserError
from chatwright.tokenizer import CONTROLS, END_OF_TEXT, TextStream, Tokenizer, byte_alphabet, library
from chatwright.train.stopping import StopNow

TEXTS = [
    "Hello there, how are you?",
    "naïve café — 東京 🙂 ok",
    "don't 12345 stop!\r\n\n\tno",
    "<|end|> is a tag",
] * 3
TOKENIZER = Tokenizer.train(TEXTS, 320)
CONTROL_IDS = set(TOKENIZER.control_ids.values())

ANY_TEXT = st.text(st.characters())  # lone surrogates included
PIECES = st.sampled_from([*CONTROLS, "<|", "|>", "<", "|", "end", " ", "\n", "é", "🙂", "\ud800", "Hello"])
SPELLING = st.lists(st.one_of(PIECES, ANY_TEXT)).map("".join)


@given(st.binary())
def test_any_bytes_round_trip(data: bytes) -> None:
    ids = TOKENIZER.encode(data)
    assert TOKENIZER.decode_bytes(ids) == data
    assert b"".join(map(TOKENIZER.token_bytes, ids)) == data


@given(ANY_TEXT)
def test_any_text_round_trips(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode_bytes(ids) == text.encode("utf-8", errors="surrogatepass")
    if not any(0xD800 <= ord(character) < 0xE000 for character in text):
        assert TOKENIZER.decode(ids) == text
        assert TOKENIZER.encode(text.encode()) == ids


@given(SPELLING)
def test_text_never_becomes_a_control_token(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert not CONTROL_IDS & set(ids)
    assert TOKENIZER.decode_bytes(ids) == text.encode("utf-8", errors="surrogatepass")
    assert not CONTROL_IDS & set(TOKENIZER.encode(text.encode("utf-8", errors="surrogatepass")))


@given(st.lists(SPELLING, max_size=4))
def test_a_batch_is_its_texts(texts: list[str]) -> None:
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]


@given(st.lists(st.one_of(SPELLING.map(lambda text: TOKENIZER.encode(text)), st.lists(st.integers(0, 319)))))
def test_a_stream_gives_the_whole(parts: list[list[int]]) -> None:
    """Piece by piece, whole characters only, and together what `decode` gives; control tokens and broken
    bytes too."""
    ids = [number for part in parts for number in part]
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(number) for number in ids]
    assert "".join(pieces) + stream.flush() == TOKENIZER.decode(ids)


def test_a_stream_waits_for_whole_characters() -> None:
    stream, ids = (
        TextStream(TOKENIZER),
        TOKENIZER.encode(b"\xf0\x9f\x98\x80"),
    )  # not in the training text: bytes
    assert len(ids) > 1
    pieces = [stream.push(number) for number in ids]
    assert pieces[-1] == "😀" and set(pieces[:-1]) == {""}
    assert stream.push(ids[0]) == "" and stream.flush() == "�"


def test_control_tokens_stand_for_no_bytes() -> None:
    assert set(CONTROLS) == set(TOKENIZER.control_ids) and len(CONTROL_IDS) == len(CONTROLS)
    for name, number in TOKENIZER.control_ids.items():
        assert TOKENIZER.token_bytes(number) == b"" and TOKENIZER.name(number) == name
    assert TOKENIZER.decode([*CONTROL_IDS]) == ""
    assert TOKENIZER.end_of_text_id == TOKENIZER.control_ids[END_OF_TEXT]


def test_the_byte_table_is_gpt2s() -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert byte_alphabet() == {character: byte for byte, character in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]


def test_each_byte_and_the_size() -> None:
    assert TOKENIZER.vocab_size == 320
    for byte in range(256):
        (number,) = TOKENIZER.encode(bytes([byte]))
        assert TOKENIZER.token_bytes(number) == bytes([byte])


@pytest.fixture(scope="module")
def in_transformers(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save(directory)
    return PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))  # type: ignore[no-untyped-call]


@settings(max_examples=50)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_transformers_gives_the_same_ids(in_transformers, text: str) -> None:  # type: ignore[no-untyped-def]
    if any(control in text for control in CONTROLS):
        return
    assert in_transformers.encode(text, add_special_tokens=False) == TOKENIZER.encode(text)


def test_transformers_knows_the_control_tokens(in_transformers) -> None:  # type: ignore[no-untyped-def]
    """There, text that spells a control token is one: the template's own text needs that. Here, it never
    is."""
    for name, number in TOKENIZER.control_ids.items():
        assert in_transformers.convert_tokens_to_ids(name) == number
        assert in_transformers.encode(name, add_special_tokens=False) == [number] != TOKENIZER.encode(name)
    text = TEXTS[1]
    assert in_transformers.decode(TOKENIZER.encode(text)) == text
    assert len(in_transformers) == TOKENIZER.vocab_size


def test_saved_and_loaded(tmp_path: Path) -> None:
    file = TOKENIZER.save(tmp_path)
    for path in (tmp_path, file):
        again = Tokenizer.load(path)
        assert again.fingerprint == TOKENIZER.fingerprint
        assert again.control_ids == TOKENIZER.control_ids
        assert again.encode("Hello <|end|> 東京") == TOKENIZER.encode("Hello <|end|> 東京")


def test_the_fingerprint_tells_tokenizers_apart() -> None:
    assert Tokenizer.train(TEXTS, 320).fingerprint == TOKENIZER.fingerprint
    assert Tokenizer.train(TEXTS, 319).fingerprint != TOKENIZER.fingerprint
    assert re.fullmatch("[0-9a-f]{16}", TOKENIZER.fingerprint)


def test_training_limits() -> None:
    with pytest.raises(UserError, match=r"vocab_size 263 is too small.*need 264"):
        Tokenizer.train(TEXTS, 263)
    assert Tokenizer.train(TEXTS, 264).vocab_size == 264
    few = Tokenizer.train(["ab"], 5_000)
    assert few.vocab_size < 300 and few.decode(few.encode("東京")) == "東京"
    assert Tokenizer.train([], 300).vocab_size == 264


def test_merges_stop_where_they_should() -> None:
    """No token spans a word's end, more than one digit, or letters and digits."""
    learnt = [TOKENIZER.token_bytes(number) for number in range(TOKENIZER.vocab_size)]
    for token in learnt:
        text = token.decode("utf-8", errors="ignore")
        assert sum(character.isdigit() for character in text) <= 1
        assert " " not in text.strip(" ") or not text.strip()


@pytest.mark.parametrize("content", ["", "{}", "[]", "not json", '{"version": "1.0"}', "\x00\x01"])
def test_a_broken_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)


def test_a_truncated_file(tmp_path: Path) -> None:
    whole = TOKENIZER.to_json()
    (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_tokenizers_without_an_end(tmp_path: Path) -> None:
    content = json.loads(TOKENIZER.to_json())
    content["added_tokens"] = [dict(one, special=False) for one in content["added_tokens"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="ends a text"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="has no control token"):
        Tokenizer(TOKENIZER.backend, end_of_text="<nowhere>")


def test_a_vocabulary_without_some_bytes() -> None:
    """Vocabularies from elsewhere may lack bytes; what they have goes in, what they lack is named."""
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={character: n for n, character in enumerate("abí½")}, merges=[])
    )
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    few = Tokenizer(backend, end_of_text="</s>")
    table = byte_alphabet()
    assert few.encode(bytes([table["í"]])) == [2]
    with pytest.raises(UserError, match="no token for its byte 0xff"):
        few.encode(b"\xff")


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, StopNow])
def test_a_signal_inside_the_library_is_no_error_of_it(kind: type[BaseException]) -> None:
    """A SIGTERM that came while a text was encoded once ended a stage as a failure of the tokenizer."""
    with pytest.raises(kind), library("the tokenizer fails"):
        raise kind


def test_errors_and_panics_of_the_library_are_told_in_a_line() -> None:
    panic = type("PanicException", (BaseException,), {})
    for error in (Exception("bare"), panic("bare")):
        with pytest.raises(UserError, match=r"the tokenizer fails \(bare\)"), library("the tokenizer fails"):
            raise error
    with pytest.raises(TypeError), library("the tokenizer fails", TypeError):
        raise TypeError
