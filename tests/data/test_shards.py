"""Token shards: what goes in comes out, windows and stretches cover what they say, damage is named."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatwright.config import UserError
from chatwright.data import shards as module
from chatwright.data.shards import TokenShards, write_shards
from chatwright.tokenizer import Tokenizer

TEXTS = ["The cat sat.", "Ünïcödé ☃", "x" * 40, "two\nlines", "end"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """256 single bytes and the control tokens."""
    return Tokenizer.train(["a"], 264)


def stream_of(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    return [token for text in texts for token in (tokenizer.end_of_text_id, *tokenizer.encode(text))]


def everything(found: TokenShards) -> list[int]:
    return [int(token) for array in found.arrays for token in array]


@pytest.mark.parametrize("shard_tokens", [1, 7, 13, 64, 10_000])
def test_documents_come_back_in_order_each_behind_an_end_of_text(
    tmp_path: Path, tokenizer: Tokenizer, shard_tokens: int
) -> None:
    found = write_shards(tmp_path / "s", TEXTS, tokenizer, shard_tokens=shard_tokens)
    expected = stream_of(tokenizer, TEXTS)
    assert everything(found) == expected
    assert found.tokens == len(expected) == sum(map(len, found.arrays))
    assert all(len(array) <= shard_tokens for array in found.arrays)
    assert all(len(array) == shard_tokens for array in found.arrays[:-1])
    assert found.documents == len(TEXTS)
    assert found.text_bytes == sum(len(text.encode()) for text in TEXTS)
    found.verify(tmp_path / "s")
    again = TokenShards.open(tmp_path / "s", tokenizer)
    assert everything(again) == expected and again.tokenizer_fingerprint == tokenizer.fingerprint


def test_batches_of_documents_join_without_a_seam(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 2)
    assert everything(write_shards(tmp_path / "s", iter(TEXTS), tokenizer)) == stream_of(tokenizer, TEXTS)


def made(arrays: list[list[int]]) -> TokenShards:
    return TokenShards(
        tuple(np.array(array, dtype="<u2") for array in arrays), sum(map(len, arrays)), 1, 1, "x"
    )


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(1, 9))
def test_stretches_have_every_token_but_a_shards_first_as_a_target_once(
    lengths: list[int], context: int
) -> None:
    arrays = [[100 * number + n for n in range(length)] for number, length in enumerate(lengths)]
    targets: list[int] = []
    for stretch in made(arrays).stretches(context):
        tokens = stretch.tolist()
        assert 2 <= len(tokens) <= context + 1
        targets += tokens[1:]
    assert targets == [token for array in arrays for token in array[1:]]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(1, 9))
def test_windows_have_each_target_at_most_once_and_leave_only_a_rest(
    lengths: list[int], context: int
) -> None:
    arrays = [[100 * number + n for n in range(length)] for number, length in enumerate(lengths)]
    found = made(arrays)
    targets = []
    for number in range(found.windows(context)):
        tokens = found.window(number, context).tolist()
        assert len(tokens) == context + 1
        assert tokens == list(range(tokens[0], tokens[0] + context + 1))  # never across two shards
        targets += tokens[1:]
    assert len(set(targets)) == len(targets)
    assert found.windows(context) == sum((len(array) - 1) // context for array in arrays)
    with pytest.raises(IndexError):
        found.window(found.windows(context), context)


def test_large_vocabularies_get_wide_numbers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    class Wide(Tokenizer):
        vocab_size = 70_000  # type: ignore[assignment]

        def encode_batch(self, texts):  # type: ignore[no-untyped-def]
            return [[65_536, 69_999] for _ in texts]

    found = write_shards(tmp_path / "s", ["a"], Wide(tokenizer.backend))
    assert everything(found)[1:] == [65_536, 69_999]
    assert found.arrays[0].dtype == np.dtype("<u4")


def test_no_text_at_all_is_an_error_and_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="no text"):
        write_shards(tmp_path / "s", [], tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def texts():  # type: ignore[no-untyped-def]
        yield "one"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        write_shards(tmp_path / "s", texts(), tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_damage_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    directory = tmp_path / "s"
    found = write_shards(directory, TEXTS, tokenizer, shard_tokens=20)
    file = directory / "tokens-00001.bin"
    content = bytearray(file.read_bytes())
    del found
    content[5] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"tokens-00001\.bin is damaged"):
        TokenShards.open(directory)
    file.write_bytes(content[:-2])
    with pytest.raises(UserError, match=r"tokens-00001\.bin is missing or cut off"):
        TokenShards.open(directory)
    file.unlink()
    with pytest.raises(UserError, match=r"tokens-00001\.bin is missing"):
        TokenShards.open(directory)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of any size are checked block by block, and blocks have 16 tokens."""
    monkeypatch.setattr(module, "WHOLE", 0)
    monkeypatch.setattr(module, "BLOCK", 32)


@pytest.mark.usefixtures("small_blocks")
def test_a_damaged_block_of_a_large_shard_is_found_when_it_is_first_read(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    directory = tmp_path / "s"
    write_shards(directory, ["x" * 199], tokenizer, shard_tokens=100)
    whole = [TokenShards.open(directory).window(number, 10).tolist() for number in range(18)]
    file = directory / "tokens-00001.bin"
    content = bytearray(file.read_bytes())
    content[2 * 50] ^= 1  # token 50, in the fourth block: tokens 48 ... 63
    file.write_bytes(content)
    found = TokenShards.open(directory)  # opening reads none of it
    for number in range(18):
        tokens = range(number % 9 * 10, number % 9 * 10 + 11)
        blocks = {token // 16 for token in tokens} if number >= 9 else set()
        if 3 in blocks:
            with pytest.raises(UserError, match=r"tokens-00001\.bin is damaged"):
                found.window(number, 10)
        else:
            assert found.window(number, 10).tolist() == whole[number]
    with pytest.raises(UserError, match=r"tokens-00001\.bin is damaged"):
        list(found.stretches(10))


@pytest.mark.usefixtures("small_blocks")
def test_every_flipped_byte_of_large_shards_is_found(tmp_path: Path, tokenizer: Tokenizer) -> None:
    directory = tmp_path / "s"
    expected = everything(write_shards(directory, TEXTS, tokenizer, shard_tokens=64))
    for file in sorted(directory.glob("tokens-*")):
        content = file.read_bytes()
        for place in range(len(content)):
            flipped = bytearray(content)
            flipped[place] ^= 1 << place % 8
            file.write_bytes(flipped)
            with pytest.raises(UserError, match=f"{file.name} is damaged"):
                list(TokenShards.open(directory).stretches(7))
        file.write_bytes(content)
    found = TokenShards.open(directory)
    targets = [int(token) for stretch in found.stretches(7) for token in stretch[1:]]
    assert targets == [int(token) for array in found.arrays for token in array[1:]] and len(found.guards) > 1
    assert everything(found) == expected


@pytest.mark.usefixtures("small_blocks")
def test_large_shards_of_the_first_versions_are_checked_as_a_whole(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    directory = tmp_path / "s"
    write_shards(directory, TEXTS, tokenizer)
    index = json.loads((directory / "shards.json").read_text())
    for entry in index["shards"]:
        (directory / entry.pop("blocks")).unlink()
        del entry["blocks_sha256"]
    (directory / "shards.json").write_text(json.dumps(index))
    assert TokenShards.open(directory).guards == ()
    file = directory / "tokens-00000.bin"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(UserError, match=r"tokens-00000\.bin is damaged"):
        TokenShards.open(directory)


def test_another_tokenizer_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_shards(tmp_path / "s", TEXTS, tokenizer)
    other = Tokenizer.train(["the cat the cat"], 266)
    with pytest.raises(UserError, match="another tokenizer"):
        TokenShards.open(tmp_path / "s", other)
    assert json.loads((tmp_path / "s" / "shards.json").read_text())["tokenizer"] == tokenizer.fingerprint


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=12), st.integers(1, 40))
def test_any_text_survives(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, texts: list[str], shard_tokens: int
) -> None:
    directory = tmp_path_factory.mktemp("shards") / "s"
    found = everything(write_shards(directory, texts, tokenizer, shard_tokens=shard_tokens))
    assert found == stream_of(tokenizer, texts)
