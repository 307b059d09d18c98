"""Cutting and packing: whole exchanges, nothing lost, what is packed together cannot see each other."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatwright.chat import NATIVE, ChatTemplate, EncodedChat, Message
from chatwright.data.packing import PackedRow, batch_rows, cut_dialogue, pack
from chatwright.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["a"], 264)
END = TOKENIZER.control_ids["<|end|>"]
GREETING = ChatTemplate(  # writes something before the first turn: pieces must be encoded as a whole
    "{{ '<|tool|>' }}" + NATIVE.source, end="<|end|>"
)


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def exchange(n: int, length: int = 3) -> list[Message]:
    return [turn("user", f"q{n}"), turn("assistant", chr(ord("a") + n) * length)]


def cut(messages: list[Message], context: int, template: ChatTemplate = NATIVE) -> list[EncodedChat]:
    return list(cut_dialogue(messages, template, TOKENIZER, context))


# An exchange costs <|user|> q n <|end|> <|assistant|> a a a <|end|> = 9 tokens.


def test_what_fits_stays_whole() -> None:
    messages = [*exchange(0), *exchange(1), *exchange(2)]
    assert cut(messages, 27) == [NATIVE.encode(messages, TOKENIZER)]


def test_cuts_stand_between_exchanges() -> None:
    messages = [*exchange(0), *exchange(1), *exchange(2)]
    assert cut(messages, 26) == [
        NATIVE.encode(messages[:4], TOKENIZER),
        NATIVE.encode(messages[4:], TOKENIZER),
    ]
    assert cut(messages, 9) == [NATIVE.encode(messages[n : n + 2], TOKENIZER) for n in (0, 2, 4)]


def test_the_system_message_stands_before_every_piece() -> None:
    system = turn("system", "s")  # 3 tokens
    messages = [system, *exchange(0), *exchange(1)]
    assert cut(messages, 12) == [
        NATIVE.encode([system, *exchange(0)], TOKENIZER),
        NATIVE.encode([system, *exchange(1)], TOKENIZER),
    ]


def test_an_answer_that_is_too_long_loses_its_end_and_its_end_token() -> None:
    messages = [*exchange(0, length=50), *exchange(1)]
    long, short = cut(messages, 20)
    whole = NATIVE.encode(exchange(0, length=50), TOKENIZER)
    assert long == EncodedChat(whole.ids[:20], whole.mask[:20])
    assert not any(flag and token == END for token, flag in zip(long.ids, long.mask, strict=True))
    assert short == NATIVE.encode(exchange(1), TOKENIZER)


def test_turns_without_an_answer_are_left_out() -> None:
    hanging = [turn("assistant", "hello"), *exchange(0), turn("user", "and?")]
    assert cut(hanging, 99) == [NATIVE.encode(exchange(0), TOKENIZER)]
    assert cut([turn("user", "alone")], 99) == []
    assert cut([turn("assistant", "first")], 99) == []
    assert cut([turn("system", "only")], 99) == []


def test_several_turns_of_one_person_are_one_exchange() -> None:
    messages = [
        turn("user", "a"),
        turn("user", "b"),
        turn("assistant", "c"),
        turn("assistant", "d"),
        *exchange(0),
    ]
    assert cut(messages, 13) == [
        NATIVE.encode(messages[:4], TOKENIZER),
        NATIVE.encode(messages[4:], TOKENIZER),
    ]


def test_a_template_that_begins_with_something_is_encoded_as_a_whole() -> None:
    assert NATIVE.concatenates and not GREETING.concatenates
    messages = [*exchange(0), *exchange(1), *exchange(2)]
    assert cut(messages, 19, GREETING) == [
        GREETING.encode(messages[:4], TOKENIZER),
        GREETING.encode(messages[4:], TOKENIZER),
    ]


Turns = st.lists(
    st.tuples(st.sampled_from(["user", "assistant", "system"]), st.text("abc é", max_size=12)), max_size=10
)


@given(Turns, st.integers(8, 60))
def test_pieces_hold_each_exchange_once_and_the_fast_way_equals_the_slow_one(
    turns: list[tuple[str, str]], context: int
) -> None:
    messages = [turn(role, content) for role, content in turns]
    slow = ChatTemplate(NATIVE.source, NATIVE.end)
    slow.__dict__["concatenates"] = False
    pieces = cut(messages, context)
    assert pieces == cut(messages, context, slow)
    assert all(len(piece.ids) <= context and len(piece.ids) == len(piece.mask) for piece in pieces)
    if context == 60 and messages and messages[0]["role"] != "system":
        answers = sum(piece.mask.count(True) for piece in pieces)
        assert answers <= sum(len(m["content"].encode()) + 1 for m in messages if m["role"] == "assistant")


def piece_of(size: int, start: int = 0) -> EncodedChat:
    return EncodedChat([start + n for n in range(size)], [n % 2 == 1 for n in range(size)])


def test_packing_takes_the_longest_first_and_the_first_row_with_room() -> None:
    rows = pack([piece_of(n, 100 * n) for n in (2, 7, 14, 11)], 20)
    # 14 | 11 | 7 beside 11 | 2 beside 14, where there is room first, though the other row is fuller
    assert [row.ids for row in rows] == [
        [*range(1400, 1414), 200, 201],
        [*range(1100, 1111), *range(700, 707)],
    ]


@given(st.lists(st.integers(1, 12), max_size=40), st.integers(12, 30))
def test_packing_is_first_fit_decreasing(sizes: list[int], length: int) -> None:
    slow: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        row = next((row for row in slow if sum(row) + size <= length), None)
        if row is None:
            slow.append(row := [])
        row.append(size)
    rows = pack([piece_of(size) for size in sizes], length)
    assert [[row.documents.count(n) for n in sorted(set(row.documents))] for row in rows] == slow


def test_a_row_knows_its_pieces() -> None:
    (row,) = pack([piece_of(3, 10), piece_of(2, 20)], 6)
    assert row == PackedRow(
        ids=[10, 11, 12, 20, 21],
        mask=[False, True, False, False, True],
        documents=[1, 1, 1, 2, 2],
        positions=[0, 1, 2, 0, 1],
    )


@given(st.lists(st.integers(1, 12), max_size=30), st.integers(12, 30), st.booleans())
def test_packing_loses_nothing(sizes: list[int], length: int, enabled: bool) -> None:
    pieces = [piece_of(size, 1000 * number) for number, size in enumerate(sizes)]
    rows = pack(pieces, length, enabled=enabled)
    found: Counter[Any] = Counter()
    for row in rows:
        assert 0 < len(row.ids) <= length
        assert len(row.ids) == len(row.mask) == len(row.documents) == len(row.positions)
        for number in set(row.documents):
            at = [n for n, document in enumerate(row.documents) if document == number]
            assert [row.positions[n] for n in at] == list(range(len(at)))
            found[tuple((row.ids[n], row.mask[n]) for n in at)] += 1
    assert found == Counter(tuple(zip(piece.ids, piece.mask, strict=True)) for piece in pieces)
    if not enabled:
        assert len(rows) == len(pieces)
    elif len(rows) > 1:
        # no two rows could have been one: any two hold more than a row's length together
        two = sorted(len(row.ids) for row in rows)[:2]
        assert sum(two) > length


def test_a_batch_is_padded_and_learns_no_first_token() -> None:
    (packed,) = pack([EncodedChat([5, 6, 7], [True, True, True]), EncodedChat([8, 9], [True, False])], 5)
    batch = batch_rows([packed, PackedRow([1, 2], [False, True], [1, 1], [0, 1])], 6)
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9, 0], [1, 2, 0, 0, 0, 0]]
    assert batch.documents.tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0]]
    # the first token of a piece follows nothing of its own; padding is never learnt
    assert batch.learn.tolist() == [
        [False, True, True, False, False, False],
        [False, True, False, False, False, False],
    ]
    assert batch.weight == 3.0
    assert batch.learn.dtype == torch.bool


@pytest.mark.parametrize("enabled", [True, False])
def test_packing_of_nothing_is_nothing(enabled: bool) -> None:
    assert pack([], 8, enabled=enabled) == []
