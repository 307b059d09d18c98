"""What is odd about records that can be read: counted, and said in one line.

Records without anything to learn, and records that stand there twice, are no errors, but nobody should have
to find out alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from chatwright.data.examples import Comparison, Dialogue

REMEMBERED = 250_000
"""Records among which repetitions are looked for; more would take much memory (100 bytes each)."""


@dataclass
class Tally:
    """Counts of odd records of one kind."""

    records: int = 0
    unanswered: int = 0
    """Conversations without a word of the assistant."""
    open_ended: int = 0
    """Conversations with an answer that end with another turn than the assistant's."""
    alike: int = 0
    """Comparisons whose answers are all the same text; they are left out."""
    repeated: int = 0
    """Records that stood there before, word for word."""
    unlearnt: int = 0
    """Answers that are not to be learnt, in conversations with others that are."""
    partly: int = 0
    """The conversations that these are in."""
    wholly: int = 0
    """Conversations all of whose answers are marked so; they are left out."""
    _seen: set[int] = field(default_factory=set)

    def keep(self, record: Any, line: str = "") -> bool:
        """Count a record; returns False when it is to be left out. `line` is its JSON, where it is known."""
        if is_left_out(record):
            self.alike += is_alike(record)
            self.wholly += is_unlearnt(record)
            return False
        self.records += 1
        if isinstance(record, Dialogue):
            self.unlearnt += len(record.unlearnt)
            self.partly += bool(record.unlearnt)
            roles = [message["role"] for message in record.messages]
            self.unanswered += "assistant" not in roles
            self.open_ended += "assistant" in roles and roles[-1] != "assistant"
        mark = hash(line or record.to_json())
        if mark in self._seen:
            self.repeated += 1
        elif len(self._seen) < REMEMBERED:
            self._seen.add(mark)
        return True

    def line(self) -> str:
        """What was odd, in one line; "" when nothing was."""
        told = []
        if self.unanswered:
            told.append(
                f"{self.unanswered:,} without an answer of the assistant (SFT learns nothing from them, PPO "
                "takes them as prompts)"
            )
        if self.open_ended:
            told.append(
                f"{self.open_ended:,} that end with the user's turn (or a tool's), which nobody answers"
            )
        if self.alike:
            told.append(f"{self.alike:,} left out, for their answers are the same text")
        if self.wholly:
            told.append(f"{self.wholly:,} left out, for all their answers are marked as not to be learnt")
        if self.unlearnt:
            told.append(
                f"{self.unlearnt:,} answers in {self.partly:,} of them are not learnt but read as context: "
                "they are marked so, or stand in a prompt"
            )
        if self.repeated:
            among = f" (among the first {REMEMBERED:,})" if len(self._seen) >= REMEMBERED else ""
            told.append(f"{self.repeated:,} that repeat another word for word{among}")
        return "; ".join(told)


def is_useful(record: Any) -> bool:
    """Whether there is an answer to learn, or to measure, in a record; only conversations may have none."""
    return not isinstance(record, Dialogue) or bool(record.answers)


def is_alike(record: Any) -> bool:
    """Whether a record is a comparison whose answers are all the same text: nothing can be learnt from it."""
    return isinstance(record, Comparison) and len({text.strip() for text in record.responses}) == 1


def is_unlearnt(record: Any) -> bool:
    """Whether a record is a conversation all of whose answers are marked as not to be learnt."""
    return isinstance(record, Dialogue) and bool(record.unlearnt) and not record.answers


def is_left_out(record: Any) -> bool:
    """Whether a record is left out, because nothing can, or is to, be learnt from it."""
    return is_alike(record) or is_unlearnt(record)
