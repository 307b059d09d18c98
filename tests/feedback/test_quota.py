"""How much is kept: counted to the byte whatever happens to a conversation, and refused beyond the limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import select, text

from chatwright.feedback.quota import bytes_of, weigh_again
from chatwright.feedback.store import Full, Owned, Quota, Store
from chatwright.feedback.tables import VERSION, ConversationRow, MessageRow

TOKENS = [{"text": "ä", "p": 0.5, "alternatives": [{"text": "b", "p": 0.25}]}]
KEPT = [{"type": "text", "text": "kept"}, {"type": "image", "url": "ä.png"}]
MB = 1e-6
"""Limits are MB; tests use bytes."""


@contextmanager
def opened(place: str, quota: Quota | None = None) -> Iterator[Store]:
    store = Store(place, quota=quota or Quota())
    try:
        yield store
    finally:
        store.close()


def sizes(store: Store) -> tuple[dict[str, int], dict[int, int]]:
    """What the store says conversations and messages take, by their ids."""
    with store.session(writes=False) as session:
        whole = {one.id: one.size for one in session.scalars(select(ConversationRow))}
        return whole, {one.id: one.size for one in session.scalars(select(MessageRow))}


def counted(store: Store) -> tuple[dict[str, int], dict[int, int]]:
    """The same, counted anew from what is there."""
    with store.session(writes=False) as session:
        messages = list(session.scalars(select(MessageRow)))
        single = {one.id: bytes_of(one.content, one.parts, one.probabilities) for one in messages}
        whole = {
            one.id: bytes_of(one.title, one.system, one.settings)
            + sum(single[message.id] for message in messages if message.conversation == one.id)
            for one in session.scalars(select(ConversationRow))
        }
    return whole, single


def busy_life(store: Store) -> str:
    """A conversation to which everything has happened that can."""
    mine = store.of("me")
    made = mine.create("Grüße ☃", model="m", system="Be kind.", settings={"temperature": 0.5})
    turn = mine.add(made.id, made.leaf, "assistant", "")
    for content in ("a", "a longer ä", "short"):
        mine.write(
            made.id, turn.id, content, finish_reason="stop", tokens=1, seconds=1.0, probabilities=TOKENS
        )
    mine.change(made.id, title="Another", system="", settings={"stop": ["x" * 50]})
    below = mine.add(made.id, turn.id, "user", "below")
    mine.add(made.id, below.id, "assistant", "further below")
    kept = mine.add(made.id, None, "user", KEPT)
    mine.discard(made.id, below.id, leaf=kept.id)
    return made.id


def test_sizes_are_kept_up_to_date(store: Store) -> None:
    busy_life(store)
    gone = store.of("me").create("gone", model="m")
    store.of("me").delete(gone.id)
    assert sizes(store) == counted(store)
    assert len(sizes(store)[1]) == 3


def test_a_store_of_version_1_is_counted_when_it_is_opened(lasting: str) -> None:
    with opened(lasting) as store:
        conversation = busy_life(store)
        with store.session(writes=True) as session:
            session.execute(text("UPDATE messages SET parts = NULL"))
            for one in session.scalars(select(MessageRow)):
                one.size = bytes_of(one.content, one.probabilities)
            session.flush()
            weigh_again(session, session.get_one(ConversationRow, conversation))
        before = sizes(store)
        with store.session(writes=True) as session:
            session.execute(text("DROP INDEX weights"))
            session.execute(text("ALTER TABLE messages DROP COLUMN parts"))
            for table in ("messages", "conversations"):
                session.execute(text(f"ALTER TABLE {table} DROP COLUMN size"))
            session.execute(text("UPDATE schema_version SET version = 1"))
    with opened(lasting) as store:
        assert sizes(store) == before == counted(store)
        assert store.of("me").get(conversation).title == "Another"
        with store.session(writes=False) as session:
            assert session.execute(text("SELECT version FROM schema_version")).scalar() == VERSION


def test_a_number_of_conversations(place: str) -> None:
    with opened(place, Quota(max_conversations=2)) as store:
        mine = store.of("me")
        first = mine.create("one", model="m")
        mine.create("two", model="m")
        with pytest.raises(Full, match=r"2 conversations.*delete some.*--max_conversations"):
            mine.create("three", model="m")
        mine.add(first.id, first.leaf, "user", "messages are no conversations")
        store.of("you").create("another owner has room", model="m")
        mine.delete(first.id)
        mine.create("three", model="m")
        assert len(mine.page()[0]) == 2


GROWTH: dict[str, Callable[[Owned, str], object]] = {
    "create": lambda mine, _: mine.create("x" * 3000, model="m"),
    "system prompt": lambda mine, _: mine.create("x", model="m", system="x" * 3000),
    "say": lambda mine, one: mine.add(one, None, "user", "x" * 3000),
    "change": lambda mine, one: mine.change(one, system="x" * 3000),
    "settings": lambda mine, one: mine.change(one, settings={"stop": ["x" * 3000]}),
}


@pytest.mark.parametrize("way", GROWTH)
def test_bytes_of_an_owner(place: str, way: str) -> None:
    with opened(place, Quota(max_owner_mb=3000 * MB)) as store:
        mine = store.of("me")
        made = mine.create("one", model="m")
        before = sizes(store)
        with pytest.raises(Full, match=r"keeps 0\.003 MB.*delete some.*--max_owner_mb"):
            GROWTH[way](mine, made.id)
        assert sizes(store) == before  # nothing of it was kept
        mine.change(made.id, title="names still change", system="")
        answer = mine.add(made.id, made.leaf, "assistant", "")
        # An answer that has begun is written to its end; the next one is refused.
        mine.write(made.id, answer.id, "x" * 3000, finish_reason="stop", tokens=1, seconds=1.0)
        with pytest.raises(Full):
            mine.add(made.id, answer.id, "user", "and then?")
        mine.change(made.id, title="")  # what takes less is always taken
        mine.delete(made.id)
        mine.create("one", model="m")


def test_bytes_of_all_owners(place: str) -> None:
    with opened(place, Quota(max_store_mb=2000 * MB)) as store:
        made = store.of("me").create("x" * 600, model="m")
        store.of("you").create("x" * 300, model="m")
        with pytest.raises(Full, match=r"all people together.*delete some.*--max_store_mb"):
            store.of("a third").create("x" * 600, model="m")
        store.of("me").delete(made.id)
        store.of("a third").create("x" * 600, model="m")


def test_no_limits(place: str) -> None:
    with opened(place, Quota()) as store:
        for _ in range(3):
            store.of("me").create("x" * 100_000, model="m")
        assert len(store.of("me").page()[0]) == 3
