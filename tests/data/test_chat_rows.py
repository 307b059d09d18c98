"""Conversations become rows, and what is cut of them is counted by its cause."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from chatwright.chat import NATIVE, ChatTemplate, Message
from chatwright.config import UserError
from chatwright.data.chat_rows import conversations_of, learnt_tokens, rows_of
from chatwright.data.cuts import Cuts, Room
from chatwright.data.examples import Dialogue
from chatwright.data.packing import cut_dialogue, whole_dialogue
from chatwright.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["a"], 264)
GREETING = ChatTemplate("{{ '<|tool|>' }}" + NATIVE.source, end="<|end|>")


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def exchange(question: int = 2, answer: int = 3) -> list[Message]:
    """`question` + `answer` + 4 tokens."""
    return [turn("user", "q" * question), turn("assistant", "a" * answer)]


def write(directory: Path, *talks: Sequence[Message]) -> Path:
    file = directory / "dialogues-train.jsonl"
    file.write_text("".join(Dialogue.of(talk).to_json() + "\n" for talk in talks))
    return file


def counted(file: Path, length: int, template: ChatTemplate = NATIVE) -> Cuts:
    cuts = Cuts("conversations", "context", length)
    rows_of(file, template, TOKENIZER, length, packing=True, cuts=cuts)
    return cuts


@pytest.mark.parametrize("template", [NATIVE, GREETING], ids=["concatenates", "greeting"])
def test_each_kind_of_cut_is_counted(tmp_path: Path, template: ChatTemplate) -> None:
    file = write(
        tmp_path,
        exchange(),  # whole
        [*exchange(), *exchange(), *exchange()],  # 27 tokens, or 28 behind a greeting
        exchange(answer=30),
        exchange(question=30),
        [turn("user", "q")],
        [*exchange(), turn("user", "and?")],
        [turn("assistant", "aa"), *exchange()],
    )
    found = counted(file, 20, template)
    assert found.total == 7
    assert found.causes == {
        "cut between exchanges": 1,
        "with an answer that lost its end": 1,
        "with a question that fills a row alone, whose answer is left out": 1,
        "left out, for nobody answers": 1,
        "without their turns that nobody answers": 2,
    }
    assert found.too_long == 3 and found.longest == 37 + (template is GREETING)


def test_what_fits_exactly_is_not_cut(tmp_path: Path) -> None:
    file = write(tmp_path, [*exchange(), *exchange()])
    assert counted(file, 18).causes == {}
    assert counted(file, 17).causes == {"cut between exchanges": 1}


@pytest.mark.parametrize("template", [NATIVE, GREETING], ids=["concatenates", "greeting"])
def test_a_whole_conversation_is_the_piece_of_a_row_without_end(template: ChatTemplate) -> None:
    system = turn("system", "s")
    for talk in ([*exchange(), *exchange()], [system, *exchange(), turn("user", "q")]):
        assert [whole_dialogue(talk, template, TOKENIZER)] == list(
            cut_dialogue(talk, template, TOKENIZER, 1_000)
        )
    assert whole_dialogue([system, turn("user", "q")], template, TOKENIZER) is None


def test_conversations_that_were_read_are_not_read_again(tmp_path: Path) -> None:
    file = write(tmp_path, exchange(), exchange(answer=40))
    known = list(conversations_of(file, NATIVE, TOKENIZER))
    wanted = rows_of(file, NATIVE, TOKENIZER, 20, packing=True)
    file.unlink()
    assert rows_of(file, NATIVE, TOKENIZER, 20, packing=True, read=known) == wanted


def test_a_file_without_answers_is_refused_as_before(tmp_path: Path) -> None:
    file = write(tmp_path, [turn("user", "q")])
    with pytest.raises(UserError, match="no conversation with an assistant's answer"):
        counted(file, 20)


def test_conversations_that_are_all_too_long_say_so(tmp_path: Path) -> None:
    file = write(tmp_path, exchange(question=30), exchange(question=40))
    cuts = Cuts("conversations", "context", 20, Room(20, "the model's context"))
    with pytest.raises(UserError) as error:
        rows_of(file, NATIVE, TOKENIZER, 20, packing=True, cuts=cuts)
    assert f"{file}: nothing is left to learn, for the conversations are too long" in str(error.value)
    assert "of 2 conversations: 2 with a question that fills a row alone" in str(error.value)
    assert "context 20; the longest has 47 tokens, the model's context allows 20" in str(error.value)
    with pytest.raises(UserError, match="holds no conversation with an assistant's answer"):
        rows_of(write(tmp_path, [turn("user", "q" * 99)]), NATIVE, TOKENIZER, 20, packing=True)


@pytest.mark.parametrize("packing", [False, True])
def test_no_row_is_without_anything_to_learn(packing: bool, tmp_path: Path) -> None:
    file = write(tmp_path, *([*exchange(question=n), *exchange(question=60 - n)] for n in range(1, 60, 3)))
    for length in (9, 20, 40, 60, 80):
        rows = rows_of(file, NATIVE, TOKENIZER, length, packing=packing)
        assert all(learnt_tokens(row) > 0 for row in rows)
