"""The store of conversations: trees of messages, by owner.

A `Store` is a database; `Store.of(owner)` is the owner view, which gives access to one owner's conversations
only. Everything here blocks and may be called from any thread; in an event loop, use `asyncio.to_thread`.

A conversation is a tree because a person may edit a message, or have an answer generated again: this adds a
sibling, and nothing is lost. The conversation's `leaf` is the end of the branch that is shown.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sqlalchemy import delete, select, tuple_
from sqlalchemy.orm import Session

from chatwright.config import UserError
from chatwright.feedback.database import WRITES, StoreError, explained, locate, open_database
from chatwright.feedback.quota import Full, Quota, bytes_of, grow, of_frame, of_message, weigh_again
from chatwright.feedback.tables import ConversationRow, MessageRow
from chatwright.messages import (
    ROLES,
    Content,
    Message,
    check_message,
    described,
    parts_of,
    text_of,
    to_openai,
)

__all__ = [
    "Conversation",
    "Full",
    "NotThere",
    "Owned",
    "Quota",
    "Store",
    "StoreError",
    "Summary",
    "Turn",
    "title_of",
]

TITLE = 60
"""Most characters of a title made from the first message."""
EXPORT_BATCH = 50


class NotThere(UserError):
    """There is no such conversation or message, or it is another owner's."""


@dataclass(frozen=True)
class Summary:
    """A conversation in a list."""

    id: str
    title: str
    model: str
    created: float
    updated: float
    """When a message was last added, in seconds since 1970."""


@dataclass(frozen=True)
class Turn:
    """A message in a conversation's tree."""

    id: int
    parent: int | None
    role: str
    content: Content
    created: float
    model: str | None
    """The model that wrote an answer."""
    finish_reason: str | None
    """Why an answer ended; None: it is being written, or its server crashed meanwhile."""
    tokens: int | None
    seconds: float | None
    dropped: int
    """How many of the oldest messages the model did not see."""
    has_probabilities: bool

    @property
    def text(self) -> str:
        """The content as people read it."""
        return described(self.content)


@dataclass(frozen=True)
class Conversation:
    """A whole conversation."""

    id: str
    title: str
    model: str
    system: str
    settings: dict[str, Any]
    created: float
    updated: float
    leaf: int | None
    turns: tuple[Turn, ...]
    """The tree, in the order in which the turns were made: parents come before their children."""

    def turn(self, number: int) -> Turn:
        """The turn with this id. Raises NotThere."""
        if number not in self._by_id:
            raise NotThere(f"there is no message {number} in this conversation")
        return self._by_id[number]

    @cached_property
    def _by_id(self) -> dict[int, Turn]:
        return {turn.id: turn for turn in self.turns}

    def branch(self, leaf: int | None) -> list[Turn]:
        """The turns from the first to `leaf`. Raises NotThere."""
        turns: list[Turn] = []
        while leaf is not None:
            turns.append(self.turn(leaf))
            leaf = turns[-1].parent
        return turns[::-1]

    def messages(self, leaf: int | None) -> list[Message]:
        """The branch that ends in `leaf`, as a prompt for a model: the system prompt first."""
        system = [Message(role="system", content=self.system)] if self.system.strip() else []
        return [*system, *(Message(role=turn.role, content=turn.content) for turn in self.branch(leaf))]


def title_of(text: str) -> str:
    """A title made from a conversation's first message: its beginning, cut between words, on one line."""
    line = " ".join(text.split())
    if len(line) <= TITLE:
        return line
    head = line[: TITLE - 1]
    return f"{head[: head.rfind(' ')] if ' ' in head[TITLE // 2 :] else head}…"


class Store:
    """A database of conversations; close it."""

    def __init__(self, place: str, *, busy_seconds: float = 5.0, quota: Quota = Quota()) -> None:  # noqa: B008
        """`place`: a SQLite file (made if missing), a SQLAlchemy URL, "" for the default file, `none` for
        memory.

        `busy_seconds`: how long to wait for another writer. `quota`: limits of what is stored. Raises
        StoreError.
        """
        url = locate(place)
        self.name = url.database or url.render_as_string()
        """The store's name for messages, without its password."""
        self.quota = quota
        self._engine = open_database(url, busy_seconds=busy_seconds)

    def close(self) -> None:
        """Close the connections to the database."""
        self._engine.dispose()

    def of(self, owner: str) -> Owned:
        """The owner view for `owner`, a secret that only the owner's browser knows."""
        return Owned(self, hashlib.sha256(owner.encode()).hexdigest())

    @contextmanager
    def session(self, *, writes: bool) -> Iterator[Session]:
        """A transaction, committed at the end unless something is raised. Raises StoreError."""
        engine = self._engine.execution_options(**WRITES) if writes else self._engine
        with explained(self.name), Session(engine) as session, session.begin():
            yield session


class Owned:
    """The owner view: one owner's conversations. Every method raises StoreError, and NotThere for ids that
    are not this owner's."""

    def __init__(self, store: Store, owner: str) -> None:
        self._store, self.owner = store, owner

    def page(
        self, *, search: str = "", before: tuple[float, str] | None = None, limit: int = 50
    ) -> tuple[list[Summary], bool]:
        """The newest conversations whose title contains `search`, and whether there are more.

        `before`: (updated, id) of the last one seen, for the next page.
        """
        row = ConversationRow
        query = select(row.id, row.title, row.model, row.created, row.updated).where(row.owner == self.owner)
        if search:
            query = query.where(row.title.icontains(search, autoescape=True))
        if before is not None:
            query = query.where(tuple_(row.updated, row.id) < tuple_(*before))
        query = query.order_by(row.updated.desc(), row.id.desc()).limit(limit + 1)
        with self._store.session(writes=False) as session:
            found = [Summary(*values) for values in session.execute(query)]
        return found[:limit], len(found) > limit

    def get(self, conversation: str) -> Conversation:
        """The conversation with its whole tree."""
        with self._store.session(writes=False) as session:
            return _read(session, self._row(session, conversation))

    def create(
        self, content: Content, *, model: str, system: str = "", settings: Mapping[str, Any] | None = None
    ) -> Conversation:
        """A new conversation that begins with a person's message `content`. Raises Full."""
        now = time.time()
        plain, parts = _columns("user", content)
        with self._store.session(writes=True) as session:
            row = ConversationRow(
                id=secrets.token_urlsafe(12),
                owner=self.owner,
                title=title_of(plain or _storable(described(content))),
                model=model,
                system=_storable(system),
                settings=dict(settings or {}),
                created=now,
                updated=now,
                leaf=None,
            )
            row.size = of_frame(row)
            size = row.size + bytes_of(plain, parts)
            self._store.quota.check(session, self.owner, more=size, conversations=1)
            session.add(row)
            session.flush()
            _add(session, row, None, "user", content)
            return _read(session, row)

    def add(
        self, conversation: str, parent: int | None, role: str, content: Content, *, model: str | None = None
    ) -> Turn:
        """A new turn below `parent` (None: at the beginning), which becomes the leaf. Raises Full."""
        if role not in ROLES:
            raise StoreError(f"a message's role is one of {', '.join(ROLES)}, not {role!r}")
        with self._store.session(writes=True) as session:
            row = self._row(session, conversation)
            if parent is not None:
                self._message(session, conversation, parent)
            self._store.quota.check(session, self.owner, more=bytes_of(*_columns(role, content)))
            return _turn(_add(session, row, parent, role, content, model))

    def write(
        self,
        conversation: str,
        number: int,
        content: Content,
        *,
        finish_reason: str | None,
        tokens: int,
        seconds: float,
        dropped: int = 0,
        probabilities: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Store an answer's content so far; `finish_reason` is None until the answer has ended."""
        with self._store.session(writes=True) as session:
            message = self._message(session, conversation, number)
            message.content, message.parts = _columns(message.role, content)
            message.finish_reason, message.tokens, message.seconds = finish_reason, tokens, seconds
            message.dropped = dropped
            message.probabilities = None if probabilities is None else [dict(one) for one in probabilities]
            before, message.size = message.size, of_message(message)
            grow(session, conversation, message.size - before)
            if finish_reason is not None:
                self._row(session, conversation).updated = time.time()

    def discard(self, conversation: str, number: int, *, leaf: int | None) -> None:
        """Delete a failed turn and the turns below it; if its branch was shown, show `leaf` again."""
        with self._store.session(writes=True) as session:
            session.delete(self._message(session, conversation, number))
            row = self._row(session, conversation)
            if row.leaf == number:
                row.leaf = leaf
            weigh_again(session, row)

    def probabilities(self, conversation: str, number: int) -> list[dict[str, Any]] | None:
        """The tokens of an answer with their probabilities; None when they were not asked for."""
        with self._store.session(writes=False) as session:
            self._row(session, conversation)
            return self._message(session, conversation, number).probabilities

    def change(
        self,
        conversation: str,
        *,
        title: str | None = None,
        leaf: int | None = None,
        model: str | None = None,
        system: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Change the title, the branch shown, or the model, system prompt and settings of further answers.
        Raises Full."""
        changes = {"title": title, "leaf": leaf, "model": model, "system": system}
        with self._store.session(writes=True) as session:
            row = self._row(session, conversation)
            before = of_frame(row)
            if leaf is not None:
                self._message(session, conversation, leaf)
            for name, value in changes.items():
                if value is not None:
                    setattr(row, name, _storable(value) if isinstance(value, str) else value)
            if settings is not None:
                row.settings = dict(settings)
            more = of_frame(row) - before
            self._store.quota.check(session, self.owner, more=more)
            grow(session, conversation, more)

    def delete(self, conversation: str) -> None:
        """Delete the conversation and its messages for good."""
        with self._store.session(writes=True) as session:
            self._row(session, conversation)
            session.execute(delete(ConversationRow).where(ConversationRow.id == conversation))

    def export(self) -> Iterator[str]:
        """The shown branch of each conversation, oldest conversation first: one line of JSON each,
        {"messages": [...]} as in OpenAI's fine-tuning files."""
        row, last = ConversationRow, (0.0, "")
        while True:
            query = select(row).where(row.owner == self.owner, tuple_(row.created, row.id) > tuple_(*last))
            query = query.order_by(row.created, row.id).limit(EXPORT_BATCH)
            with self._store.session(writes=False) as session:
                batch = [_read(session, found) for found in session.scalars(query).all()]
            for one in batch:
                yield json.dumps({"messages": to_openai(one.messages(one.leaf))}, ensure_ascii=False) + "\n"
            if len(batch) < EXPORT_BATCH:
                return
            last = (batch[-1].created, batch[-1].id)

    def _row(self, session: Session, conversation: str) -> ConversationRow:
        row = session.get(ConversationRow, conversation)
        if row is None or row.owner != self.owner:
            raise NotThere("this conversation is not here (any more)")
        return row

    def _message(self, session: Session, conversation: str, number: int) -> MessageRow:
        self._row(session, conversation)
        message = session.get(MessageRow, number)
        if message is None or message.conversation != conversation:
            raise NotThere(f"there is no message {number} in this conversation")
        return message


def _add(
    session: Session,
    row: ConversationRow,
    parent: int | None,
    role: str,
    content: Content,
    model: str | None = None,
) -> MessageRow:
    plain, parts = _columns(role, content)
    message = MessageRow(
        conversation=row.id,
        parent=parent,
        role=role,
        content=plain,
        parts=parts,
        created=time.time(),
        model=model,
        dropped=0,
    )
    message.size = of_message(message)
    session.add(message)
    session.flush()
    grow(session, row.id, message.size)
    row.leaf, row.updated = message.id, message.created
    return message


def _read(session: Session, row: ConversationRow) -> Conversation:
    one = MessageRow
    known = one.probabilities.is_not(None)
    columns = (one.id, one.parent, one.role, one.content, one.created, one.model, one.finish_reason)
    query = select(*columns, one.tokens, one.seconds, one.dropped, known, one.parts)
    found = session.execute(query.where(one.conversation == row.id).order_by(one.id))
    turns = [
        Turn(number, parent, role, plain if parts is None else parts, *rest)
        for number, parent, role, plain, *rest, parts in found
    ]
    values = (
        row.id,
        row.title,
        row.model,
        row.system,
        dict(row.settings),
        row.created,
        row.updated,
        row.leaf,
    )
    return Conversation(*values, tuple(turns))


def _turn(row: MessageRow) -> Turn:
    content: Content = row.content if row.parts is None else row.parts
    values = (row.id, row.parent, row.role, content, row.created, row.model, row.finish_reason)
    return Turn(*values, row.tokens, row.seconds, row.dropped, row.probabilities is not None)


def _columns(role: str, content: Content) -> tuple[str, list[Any] | None]:
    """The columns `content` and `parts` of a message. Raises StoreError for invalid parts."""
    if isinstance(content, str):
        return _storable(content), None
    try:
        checked = check_message({"role": role, "content": content})["content"]
    except ValueError as error:
        raise StoreError(str(error)) from None
    parts = [{name: _storable(str(value)) for name, value in part.items()} for part in parts_of(checked)]
    return _storable(text_of(checked)), parts


def _storable(text: str) -> str:
    """The text with U+FFFD for NUL: PostgreSQL refuses NUL, and browsers show it as U+FFFD anyway."""
    return text.replace("\0", "\ufffd")
