"""The tables of the store. A change of a table needs a higher VERSION, and an upgrade of older files in
database.py."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, Float, ForeignKey, Index, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

VERSION = 3
"""1: the first. 2: adds sizes of conversations and messages (`size`). 3: adds contents in parts (`parts`)."""
ROW_BYTES = 200
"""Bytes that a conversation or a message counts besides its texts, so that an empty one is not free."""


class Base(DeclarativeBase):
    """All tables of the store."""


class SchemaRow(Base):
    """One row: the version of the other tables."""

    __tablename__ = "schema_version"
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class ConversationRow(Base):
    """A conversation of one owner. Its messages form a tree; `leaf` is the end of the branch that is
    shown."""

    __tablename__ = "conversations"
    __table_args__ = (Index("newest", "owner", "updated", "id"), Index("weights", "owner", "size"))

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    owner: Mapped[str] = mapped_column(String(64))
    """SHA-256 of the browser's secret, so that a reader of the database cannot pose as an owner."""
    title: Mapped[str] = mapped_column(String(200))
    model: Mapped[str] = mapped_column(Text)
    system: Mapped[str] = mapped_column(Text)
    settings: Mapped[dict[str, Any]] = mapped_column(JSON)
    created: Mapped[float] = mapped_column(Float(53))
    updated: Mapped[float] = mapped_column(Float(53))
    leaf: Mapped[int | None]
    """Not a foreign key: the two tables would refer to each other, and some databases cannot create that."""
    size: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    """Size in bytes, its messages included (quota.py)."""


class MessageRow(Base):
    """A turn. Children of one parent are versions of the same turn, in the order in which they were made."""

    __tablename__ = "messages"

    id: Mapped[int] = mapped_column(primary_key=True)
    conversation: Mapped[str] = mapped_column(ForeignKey("conversations.id", ondelete="CASCADE"), index=True)
    parent: Mapped[int | None] = mapped_column(ForeignKey("messages.id", ondelete="CASCADE"), index=True)
    role: Mapped[str] = mapped_column(String(16))
    content: Mapped[str] = mapped_column(Text)
    """The text; for a content in parts, the text that `text_of` finds in it."""
    parts: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True))
    """A content in parts (messages.py), else None. A column of its own, because a plain text may be JSON too.
    """
    created: Mapped[float] = mapped_column(Float(53))
    model: Mapped[str | None] = mapped_column(Text)
    finish_reason: Mapped[str | None] = mapped_column(String(16))
    """None while an answer is being written; stays None if its server crashed meanwhile."""
    tokens: Mapped[int | None]
    seconds: Mapped[float | None] = mapped_column(Float(53))
    dropped: Mapped[int] = mapped_column(default=0)
    """How many of the oldest messages the model did not see."""
    probabilities: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True))
    """[{"text", "p", "alternatives": [{"text", "p"}, ...]}, ...]; the texts, joined, are the content."""
    size: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    """Size in bytes (quota.py)."""
