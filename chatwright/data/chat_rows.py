"""Files of conversations -> packed rows for SFT, with the number of tokens in the loss, and a count of what
was cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from chatwright.chat import ChatTemplate, EncodedChat, Message
from chatwright.config import UserError
from chatwright.data.cuts import Cuts
from chatwright.data.examples import Dialogue
from chatwright.data.loader import SampleOrder
from chatwright.data.packing import (
    ChatBatch,
    PackedRow,
    batch_rows,
    cut_and_lost,
    exchanges_of,
    pack,
    whole_dialogue,
)
from chatwright.data.records import read_records
from chatwright.tokenizer import Tokenizer


@dataclass(frozen=True)
class Rows:
    """Packed rows in a random order; a sample depends on the seed and its index alone."""

    rows: list[PackedRow]
    length: int
    order: SampleOrder

    def take(self, start: int, count: int) -> ChatBatch:
        """Samples start ... start + count - 1."""
        return batch_rows([self.rows[n] for n in self.order.take(start, count)], self.length)

    @property
    def size(self) -> int:
        """Tokens of all rows, with their padding."""
        return len(self.rows) * self.length

    @cached_property
    def tokens(self) -> int:
        """Tokens of all rows, without padding."""
        return sum(len(row.ids) for row in self.rows)

    @cached_property
    def learnt(self) -> int:
        """Tokens of all rows that are in the loss."""
        return sum(map(learnt_tokens, self.rows))

    def __str__(self) -> str:
        """How full the rows are, and how much of them is learnt, in a sentence."""
        return (
            f"{len(self.rows):,} rows of {self.length} tokens, {100 * self.tokens / self.size:.0f} % filled; "
            f"{self.learnt:,} of {self.tokens:,} tokens are learnt ({100 * self.learnt / self.tokens:.0f} %)"
        )


@dataclass(frozen=True)
class Conversation:
    """A conversation and its ids."""

    messages: tuple[Message, ...]
    whole: EncodedChat | None
    """In one piece of any length; None when nobody answers in it."""


def conversations_of(file: Path, template: ChatTemplate, tokenizer: Tokenizer) -> Iterator[Conversation]:
    """The conversations of a file, each turn encoded once."""
    for dialogue in read_records(file, Dialogue):
        messages = with_marks(dialogue)
        yield Conversation(messages, whole_dialogue(messages, template, tokenizer))


def with_marks(dialogue: Dialogue) -> tuple[Message, ...]:
    """The messages, those that are not to be learnt with `learn` False, as `ChatTemplate.encode` takes
    them."""
    if not dialogue.unlearnt:
        return dialogue.messages
    out = set(dialogue.unlearnt)
    return tuple(
        Message(role=one["role"], content=one["content"], learn=False) if number in out else one
        for number, one in enumerate(dialogue.messages)
    )


def rows_of(
    file: Path,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    length: int,
    *,
    packing: bool,
    limit: int = 0,
    cuts: Cuts | None = None,
    read: Iterable[Conversation] = (),
) -> list[PackedRow]:
    """The conversations of a file as rows; with `limit` above 0 only the first ones, about `limit` rows of
    tokens. `read` are the file's conversations, where they are already read. Counts in `cuts` what is cut.
    Raises UserError when there is no answer to learn."""
    cuts = cuts or Cuts("conversations", "context", length)
    pieces, tokens = [], 0
    for one in read or conversations_of(file, template, tokenizer):
        for piece in pieces_of(one, template, tokenizer, length, cuts):
            pieces.append(piece)
            tokens += len(piece.ids)
        if limit and tokens > limit * length:
            break
    if not pieces and cuts.too_long:
        raise UserError(
            f"{file}: nothing is left to learn, for the conversations are too long: none of their answers "
            f"begins within a row; {cuts}"
        )
    if not pieces:
        raise UserError(f"{file} holds no conversation with an assistant's answer; nothing to learn from")
    return pack(pieces, length, enabled=packing)


def pieces_of(
    one: Conversation, template: ChatTemplate, tokenizer: Tokenizer, length: int, cuts: Cuts
) -> Iterator[EncodedChat]:
    """A conversation's pieces that have something to learn, of at most `length` tokens."""
    if one.whole is None or not has_learnt(one.whole):
        cuts.saw(0)
        cuts.add("left out, for nobody answers", length=False)
        return
    cuts.saw(len(one.whole.ids))
    system, exchanges = exchanges_of(one.messages)
    if len(system) + sum(map(len, exchanges)) < len(one.messages):
        cuts.add("without their turns that nobody answers", length=False)
    if len(one.whole.ids) <= length:
        yield one.whole
        return
    made = list(cut_and_lost(one.messages, template, tokenizer, length))
    kept = [piece for piece, _ in made if has_learnt(piece)]
    marked = any(not message.get("learn", True) for message in one.messages)
    if len(kept) < len(made) and marked:
        cuts.add("cut, without the parts in which nothing is learnt")
    elif len(kept) < len(made):
        cuts.add("with a question that fills a row alone, whose answer is left out")
    elif any(lost for _, lost in made):
        cuts.add("with an answer that lost its end")
    else:
        cuts.add("cut between exchanges")
    yield from kept


def has_learnt(piece: EncodedChat) -> bool:
    """Whether a piece has anything to learn; its first token is not, for nothing predicts it."""
    return any(piece.mask[1:])


def check_end_is_learnt(
    rows: list[PackedRow], template: ChatTemplate, tokenizer: Tokenizer, cuts: Cuts | None = None
) -> None:
    """Raise UserError unless the token that ends an answer is in the loss: else no answer would end. `cuts`
    says whether the answers have lost it."""
    ends = template.ends(tokenizer)
    tokens = set(ends.ids(tokenizer))
    if tokens:
        learnt = (
            token
            for row in rows
            for token, flag in zip(row.ids, row.mask, strict=True)
            if flag and token in tokens
        )
        if any(True for _ in learnt):
            return
    elif any(text in _learnt_text(row, tokenizer) for row in rows for text in ends.texts):
        return
    why = "look at the chat template (chatwright doctor MODEL shows the loss mask)"
    if cuts is not None and cuts.advice:
        why = str(cuts)
    raise UserError(
        f"no training row learns the end token {ends.last}: the model would never stop talking; {why}"
    )


def _learnt_text(row: PackedRow, tokenizer: Tokenizer) -> str:
    """What is learnt of a row, as text."""
    return tokenizer.decode([token for token, flag in zip(row.ids, row.mask, strict=True) if flag])


def learnt_tokens(row: PackedRow) -> int:
    """Tokens of a row in the loss; a conversation's first token is not, for nothing predicts it."""
    return sum(flag and position > 0 for flag, position in zip(row.mask, row.positions, strict=True))
