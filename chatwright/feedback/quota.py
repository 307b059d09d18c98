"""Quotas: the sizes of conversations in bytes, and the limits for one owner and for all owners together.

The size of a conversation is updated when it changes (`size` in tables.py). Sizes are added up when something
new is to be stored. Only new messages, conversations and settings are refused: an answer that has begun is
always stored whole, and the model's context limits its length.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from chatwright.config import UserError
from chatwright.feedback.tables import ROW_BYTES, ConversationRow, MessageRow


class Full(UserError):
    """There is no room for more. The message says what to delete, or which setting of the server to raise."""


@dataclass(frozen=True)
class Quota:
    """Limits of what is stored; 0 is no limit. The settings of `chatwright serve` have these names."""

    max_conversations: int = 0
    """Most conversations of one owner."""
    max_owner_mb: float = 0.0
    """Largest size of one owner's conversations together, in MB (millions of bytes)."""
    max_store_mb: float = 0.0
    """Largest size of all owners' conversations together, in MB."""

    def check(self, session: Session, owner: str, *, more: int, conversations: int = 0) -> None:
        """Check that there is room for `more` bytes and `conversations` new conversations. Raises Full."""
        if more <= 0:
            return
        row = ConversationRow
        if self.max_conversations or self.max_owner_mb:
            found = select(func.count(), func.coalesce(func.sum(row.size), 0)).where(row.owner == owner)
            count, size = session.execute(found).one()
            if conversations and 0 < self.max_conversations < count + conversations:
                raise Full(
                    f"you have {count} conversations here, and this server keeps {self.max_conversations} "
                    "for each person: delete some that you no longer need, or have --max_conversations "
                    "raised where the server is started"
                )
            if 0 < self.max_owner_mb * 1e6 < int(size) + more:
                raise Full(
                    f"your conversations take {int(size) / 1e6:.1f} MB here, and this server keeps "
                    f"{self.max_owner_mb:g} MB for each person: delete some that you no longer need, or have "
                    "--max_owner_mb raised where the server is started"
                )
        if self.max_store_mb:
            total = session.execute(select(func.coalesce(func.sum(row.size), 0))).scalar_one()
            if self.max_store_mb * 1e6 < int(total) + more:
                raise Full(
                    f"this server keeps {self.max_store_mb:g} MB of conversations for all people together, "
                    f"and has {int(total) / 1e6:.1f} MB: delete some that you no longer need, or have "
                    "--max_store_mb raised where the server is started"
                )


def bytes_of(*values: Any) -> int:
    """Size in bytes of a row with these texts and JSON values."""
    return ROW_BYTES + sum(_bytes(value) for value in values)


def _bytes(value: Any) -> int:
    if value is None:
        return 0
    return len((value if isinstance(value, str) else json.dumps(value)).encode())


def of_message(row: MessageRow) -> int:
    """Size of a message, in bytes."""
    return bytes_of(row.content, row.parts, row.probabilities)


def of_frame(row: ConversationRow) -> int:
    """Size of a conversation without its messages, in bytes."""
    return bytes_of(row.title, row.system, row.settings)


def grow(session: Session, conversation: str, by: int) -> None:
    """Add `by` bytes to a conversation's size. The database adds: two writers may do so at the same time."""
    row = ConversationRow
    changed = update(row).where(row.id == conversation).values(size=row.size + by)
    session.execute(changed.execution_options(synchronize_session=False))


def weigh_again(session: Session, row: ConversationRow) -> None:
    """Compute a conversation's size again, after some of its messages were deleted."""
    session.flush()
    left = select(func.coalesce(func.sum(MessageRow.size), 0)).where(MessageRow.conversation == row.id)
    row.size = of_frame(row) + int(session.execute(left).scalar_one())
