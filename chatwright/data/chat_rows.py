"""Files of conversations -> packed rows for SFT, with the number of tokens in the loss."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from chatwright.chat import ChatTemplate
from chatwright.config import UserError
from chatwright.data.examples import Dialogue
from chatwright.data.loader import SampleOrder
from chatwright.data.packing import ChatBatch, PackedRow, batch_rows, cut_dialogue, pack
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


def rows_of(
    file: Path, template: ChatTemplate, tokenizer: Tokenizer, length: int, *, packing: bool, limit: int = 0
) -> list[PackedRow]:
    """The conversations of a file as rows; with `limit` above 0 only the first ones, about `limit` rows of
    tokens. Raises UserError when there is no answer to learn."""
    pieces, tokens = [], 0
    for dialogue in read_records(file, Dialogue):
        for piece in cut_dialogue(dialogue.messages, template, tokenizer, length):
            if any(piece.mask):
                pieces.append(piece)
                tokens += len(piece.ids)
        if limit and tokens > limit * length:
            break
    if not pieces:
        raise UserError(f"{file} holds no conversation with an assistant's answer; nothing to learn from")
    return pack(pieces, length, enabled=packing)


def check_end_is_learnt(rows: list[PackedRow], template: ChatTemplate, tokenizer: Tokenizer) -> None:
    """Raise UserError unless the token that ends an answer is in the loss: else no answer would end."""
    end = tokenizer.control_ids[template.end]
    if not any(flag and token == end for row in rows for token, flag in zip(row.ids, row.mask, strict=True)):
        raise UserError(
            f"no training row learns the end token {template.end}: the model would never stop talking. Look "
            "at the chat template (chatwright doctor MODEL shows the loss mask)"
        )


def learnt_tokens(row: PackedRow) -> int:
    """Tokens of a row in the loss; a conversation's first token is not, for nothing predicts it."""
    return sum(flag and position > 0 for flag, position in zip(row.mask, row.positions, strict=True))
