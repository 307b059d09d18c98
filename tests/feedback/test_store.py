"""The store: trees of messages, owners apart, files that others hold, damage or newer programs have
written."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sqlite3
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.pool import NullPool

from chatwright.config import UserError
from chatwright.feedback import database
from chatwright.feedback.store import Conversation, NotThere, Owned, Store, StoreError, Turn, title_of
from chatwright.messages import check_message
from support.places import SERVER


def answer(mine: Owned, conversation: str, parent: int, text: str, **settings: Any) -> int:
    """A finished answer below `parent`."""
    turn = mine.add(conversation, parent, "assistant", "", model="small")
    mine.write(
        conversation, turn.id, text, **{"finish_reason": "stop", "tokens": 3, "seconds": 0.5, **settings}
    )
    return turn.id


def contents(mine: Owned, conversation: str) -> list[str]:
    found = mine.get(conversation)
    return [turn.content for turn in found.branch(found.leaf)]


def test_a_conversation_is_kept_as_it_was_said(mine: Owned) -> None:
    made = mine.create(
        "Hello ☃\n\nthere", model="small", system="Be kind.", settings={"temperature": 0.5, "stop": ["x"]}
    )
    assert made.leaf == made.turns[0].id
    number = answer(mine, made.id, made.turns[0].id, "Hi!", dropped=2)
    found = mine.get(made.id)
    assert (found.title, found.model, found.system) == ("Hello ☃ there", "small", "Be kind.")
    assert found.settings == {"temperature": 0.5, "stop": ["x"]}
    user, reply = found.turns
    assert (user.role, user.parent, user.content, user.finish_reason) == (
        "user",
        None,
        "Hello ☃\n\nthere",
        None,
    )
    assert (reply.id, reply.parent, reply.role, reply.content) == (number, user.id, "assistant", "Hi!")
    assert (reply.model, reply.finish_reason, reply.tokens, reply.seconds, reply.dropped) == (
        "small",
        "stop",
        3,
        0.5,
        2,
    )
    assert found.leaf == number
    assert found.updated >= found.created
    assert found.messages(found.leaf) == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello ☃\n\nthere"},
        {"role": "assistant", "content": "Hi!"},
    ]


CALL = {"type": "tool_call", "id": "1", "name": "look", "arguments": '{"at": "☃"}'}
IN_PARTS: dict[str, list[Any]] = {
    "user": [
        {"type": "text", "text": "What is this?"},
        {"type": "image", "url": "data:image/png;base64,QUJD"},
    ],
    "assistant": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "I look."}, CALL],
    "tool": [{"type": "tool_result", "tool_call_id": "1", "content": "a snowman"}],
}


def test_contents_in_parts_come_back(mine: Owned) -> None:
    made = mine.create(IN_PARTS["user"], model="m")
    reply = mine.add(made.id, made.leaf, "assistant", "")
    mine.write(made.id, reply.id, IN_PARTS["assistant"], finish_reason="stop", tokens=3, seconds=0.5)
    told = mine.add(made.id, reply.id, "tool", IN_PARTS["tool"])
    assert told.content == IN_PARTS["tool"] and told.text == "a snowman"
    found = mine.get(made.id)
    assert found.title == "What is this?"
    assert [turn.content for turn in found.turns] == list(IN_PARTS.values())
    assert found.messages(told.id) == [{"role": role, "content": parts} for role, parts in IN_PARTS.items()]
    name = hashlib.sha256(b"ABC").hexdigest()
    assert found.turns[0].text == f"What is this?[image {name}]"
    mine.write(made.id, reply.id, "A text after all", finish_reason="stop", tokens=3, seconds=0.5)
    assert mine.get(made.id).turns[1].content == "A text after all"
    assert mine.create(IN_PARTS["user"][1:], model="m").title.startswith("[image ")


def test_a_text_that_looks_like_parts_is_a_text(mine: Owned) -> None:
    text = json.dumps(IN_PARTS["user"])
    assert mine.create(text, model="m").turns[0].content == text


def test_parts_that_are_none_are_not_kept(mine: Owned) -> None:
    made = mine.create("a", model="m")
    attempts: list[tuple[str, list[Any]]] = [
        ("user", [{"type": "txt", "text": "x"}]),
        ("user", [{"type": "text"}]),
        ("user", [CALL]),
    ]
    for role, parts in attempts:
        with pytest.raises(StoreError, match="part"):
            mine.add(made.id, made.leaf, role, parts)
    with pytest.raises(StoreError, match="did you mean 'text'"):
        mine.create(attempts[0][1], model="m")
    assert len(mine.get(made.id).turns) == 1 and len(mine.page()[0]) == 1


def test_parts_are_exported_as_openai_has_them(mine: Owned) -> None:
    made = mine.create(IN_PARTS["user"], model="m")
    reply = mine.add(made.id, made.leaf, "assistant", IN_PARTS["assistant"])
    mine.add(made.id, reply.id, "tool", IN_PARTS["tool"])
    (line,) = mine.export()
    turns = json.loads(line)["messages"]
    function = {"name": "look", "arguments": '{"at": "☃"}'}
    assert turns[1:] == [
        {
            "role": "assistant",
            "reasoning_content": "Hm.",
            "content": "I look.",
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "a snowman"},
    ]
    assert [check_message(turn)["content"] for turn in turns] == list(IN_PARTS.values())


def test_a_store_from_before_there_were_parts_is_read(lasting: str) -> None:
    store = Store(lasting)
    made = store.of("me").create("hello", model="m")
    with store.session(writes=True) as session:
        session.execute(text("ALTER TABLE messages DROP COLUMN parts"))
        session.execute(text("UPDATE schema_version SET version = 2"))
    store.close()
    for number in range(2):
        store = Store(lasting)
        mine = store.of("me")
        assert mine.get(made.id).turns[0] == made.turns[0]
        added = mine.add(made.id, made.leaf, "user", IN_PARTS["user"])
        assert mine.get(made.id).turn(added.id).content == IN_PARTS["user"]
        assert len(mine.get(made.id).turns) == 2 + number
        store.close()


def test_edits_and_new_answers_are_siblings(mine: Owned) -> None:
    made = mine.create("one", model="small")
    first = answer(mine, made.id, made.turns[0].id, "answer 1")
    second = answer(mine, made.id, made.turns[0].id, "answer 2")
    assert contents(mine, made.id) == ["one", "answer 2"]
    edited = mine.add(made.id, None, "user", "one, edited")
    assert contents(mine, made.id) == ["one, edited"]
    answer(mine, made.id, edited.id, "answer 3")
    mine.change(made.id, leaf=first)
    assert contents(mine, made.id) == ["one", "answer 1"]
    assert [turn.content for turn in mine.get(made.id).turns] == [
        "one",
        "answer 1",
        "answer 2",
        "one, edited",
        "answer 3",
    ]
    assert second in {turn.id for turn in mine.get(made.id).turns}


def test_a_turn_that_came_to_nothing_goes(mine: Owned) -> None:
    made = mine.create("one", model="small")
    first = answer(mine, made.id, made.turns[0].id, "answer")
    second = mine.add(made.id, made.turns[0].id, "assistant", "")
    mine.discard(made.id, second.id, leaf=first)
    assert contents(mine, made.id) == ["one", "answer"]
    third = mine.add(made.id, made.turns[0].id, "assistant", "")
    mine.change(made.id, leaf=made.turns[0].id)  # the person looks elsewhere meanwhile
    mine.discard(made.id, third.id, leaf=first)
    assert contents(mine, made.id) == ["one"]


def test_probabilities_are_kept_apart(mine: Owned) -> None:
    made = mine.create("one", model="small")
    tokens = [{"text": "H\u2603", "p": 0.5, "alternatives": [{"text": "J", "p": 0.25}]}]
    number = answer(mine, made.id, made.leaf or 0, "H\u2603", probabilities=tokens)
    other = answer(mine, made.id, made.leaf or 0, "x")
    assert [turn.has_probabilities for turn in mine.get(made.id).turns] == [False, True, False]
    assert mine.probabilities(made.id, number) == tokens
    assert mine.probabilities(made.id, other) is None


def test_pages_are_newest_first_and_whole(mine: Owned) -> None:
    made = [mine.create(f"chat {number}", model="m").id for number in range(7)]
    mine.add(made[2], None, "user", "again")  # now the newest
    expected = [made[2], *(one for one in reversed(made) if one != made[2])]
    seen: list[str] = []
    before: tuple[float, str] | None = None
    while True:
        found, more = mine.page(before=before, limit=3)
        seen += [one.id for one in found]
        before = (found[-1].updated, found[-1].id)
        if not more:
            break
    assert seen == expected
    mine.change(made[0], title="renamed")  # a new name is nothing new that was said
    assert [one.id for one in mine.page()[0]] == expected


def test_search_looks_into_titles(mine: Owned) -> None:
    for title in ("ÄPFEL and pears", "50% off", "500 on", "a_b", "axb"):
        mine.create(title, model="m")
    for search, titles in {
        "äpfel": ["ÄPFEL and pears"],
        "0%": ["50% off"],
        "A_B": ["a_b"],
        "PEARS": ["ÄPFEL and pears"],
    }.items():
        assert [one.title for one in mine.page(search=search)[0]] == titles
    assert mine.page(search="nothing") == ([], False)


def test_changes_and_deletion(mine: Owned) -> None:
    made = mine.create("one", model="m")
    other = mine.create("other", model="m")
    mine.change(made.id, title="A name", model="n", system="s", settings={"top_k": 4})
    found = mine.get(made.id)
    assert (found.title, found.model, found.system, found.settings) == ("A name", "n", "s", {"top_k": 4})
    mine.delete(made.id)
    with pytest.raises(NotThere):
        mine.get(made.id)
    with pytest.raises(NotThere):
        mine.delete(made.id)
    assert [one.id for one in mine.page()[0]] == [other.id]
    with mine._store.session(writes=False) as session:
        rows = session.connection().exec_driver_sql("SELECT count(*) FROM messages").scalar()
    assert rows == 1  # a conversation's messages go with it


def test_an_owner_sees_nothing_of_another(store: Store) -> None:
    mine, yours = store.of("me"), store.of("you")
    made = mine.create("secret", model="m")
    number = made.leaf or 0
    own = yours.create("own", model="m")
    attempts = (
        lambda: yours.get(made.id),
        lambda: yours.add(made.id, number, "user", "x"),
        lambda: yours.add(own.id, number, "user", "x"),  # below another's message
        lambda: yours.write(made.id, number, "x", finish_reason="stop", tokens=1, seconds=1.0),
        lambda: yours.write(own.id, number, "x", finish_reason="stop", tokens=1, seconds=1.0),
        lambda: yours.discard(made.id, number, leaf=None),
        lambda: yours.probabilities(made.id, number),
        lambda: yours.change(made.id, title="x"),
        lambda: yours.change(own.id, leaf=number),
        lambda: yours.delete(made.id),
    )
    for attempt in attempts:
        with pytest.raises(NotThere):
            attempt()
    assert [one.title for one in yours.page()[0]] == ["own"]
    assert [json.loads(line)["messages"][0]["content"] for line in yours.export()] == ["own"]
    assert mine.get(made.id) == made


def test_a_long_conversation_is_read_in_one_go() -> None:
    """Looking for every turn among all of them took a second of processor time for so many."""
    turns = tuple(
        Turn(n, n - 1 or None, "user", "x", 0.0, None, None, None, None, 0, False) for n in range(1, 8001)
    )
    found = Conversation("id", "title", "m", "", {}, 0.0, 0.0, 8000, turns)
    begun = time.process_time()
    assert [turn.id for turn in found.branch(8000)] == list(range(1, 8001))
    assert time.process_time() - begun < 0.5
    with pytest.raises(NotThere):
        found.branch(8001)


def test_the_owner_is_not_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "store.db"
    store = Store(str(file))
    store.of("a-secret-of-the-browser").create("x", model="m")
    store.close()
    assert b"a-secret-of-the-browser" not in file.read_bytes()


def test_export_has_the_shown_branches(mine: Owned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatwright.feedback.store.EXPORT_BATCH", 2)
    for number in range(5):
        made = mine.create(f"ask {number}", model="m", system="Be kind." if number == 0 else "")
        answer(mine, made.id, made.leaf or 0, "old")
        answer(mine, made.id, made.leaf or 0, "naïve ☃")
    lines = [json.loads(line) for line in mine.export()]
    assert [line["messages"][-2]["content"] for line in lines] == [f"ask {number}" for number in range(5)]
    assert lines[0]["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "ask 0"},
        {"role": "assistant", "content": "naïve ☃"},
    ]


def test_what_databases_refuse_is_made_storable(mine: Owned) -> None:
    made = mine.create("a\0b", model="m")
    assert mine.get(made.id).turns[0].content == "a\ufffdb"
    made = mine.create([{"type": "text", "text": "a\0b"}, {"type": "image", "url": "\0"}], model="m")
    assert mine.get(made.id).turns[0].content == [
        {"type": "text", "text": "a\ufffdb"},
        {"type": "image", "url": "\ufffd"},
    ]
    with pytest.raises(StoreError, match="role"):
        mine.add(made.id, None, "king", "x")
    with pytest.raises(NotThere):
        mine.add(made.id, 999, "user", "x")


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("short", "short"),
        ("  two\n\nlines ", "two lines"),
        ("word " * 40, "word " * 10 + "word…"),
        ("x" * 200, "x" * 59 + "…"),
    ],
)
def test_titles(text: str, title: str) -> None:
    assert title_of(text) == title


def test_everything_is_there_after_opening_again(lasting: str) -> None:
    for _ in range(2):
        store = Store(lasting)
        store.of("me").create("hello", model="m")
        store.close()
    store = Store(lasting)
    assert [one.title for one in store.of("me").page()[0]] == ["hello", "hello"]
    store.close()


def test_threads_and_event_loops(store: Store) -> None:
    mine = store.of("me")
    made = mine.create("hello", model="m")

    async def main() -> None:
        await asyncio.gather(
            *(
                asyncio.to_thread(mine.add, made.id, made.leaf, "assistant", str(number))
                for number in range(40)
            ),
            *(asyncio.to_thread(mine.get, made.id) for _ in range(20)),
        )

    asyncio.run(main())
    assert {turn.content for turn in mine.get(made.id).turns} == {"hello", *map(str, range(40))}


def test_two_programs_share_a_database(lasting: str) -> None:
    """Both read, then write, at the same time: none of them may find the database changed under its feet."""
    stores = [Store(lasting, busy_seconds=20) for _ in range(2)]
    made = stores[0].of("me").create("hello", model="m")
    errors: list[BaseException] = []

    def work(store: Store) -> None:
        try:
            for number in range(25):
                store.of("me").add(made.id, made.leaf, "assistant", str(number))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(stores[0].of("me").get(made.id).turns) == 51
    for store in stores:
        store.close()


@pytest.mark.parametrize("lasting", [SERVER], indirect=True)
def test_a_server_that_was_started_again(lasting: str) -> None:
    """Its clients' connections are gone, and nobody notices."""
    store = Store(lasting)
    made = store.of("me").create("hello", model="m")
    with create_engine(lasting, poolclass=NullPool).connect() as other:
        ended = other.execute(
            text(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = "
                "current_database() AND pid != pg_backend_pid()"
            )
        )
        assert ended.scalar_one() >= 1
    assert store.of("me").get(made.id) == made
    store.close()


@pytest.mark.parametrize("lasting", [SERVER], indirect=True)
def test_a_server_that_is_not_there(lasting: str) -> None:
    away = make_url(lasting).set(port=1, password="secret")
    with pytest.raises(StoreError, match=r"[Rr]efused") as caught:
        Store(away.render_as_string(hide_password=False))
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(os.name != "posix", reason="rights as POSIX has them")
def test_the_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "store.db"
    store = Store(str(file))
    store.of("me").create("hello", model="m")
    for path in (file, Path(f"{file}-wal"), Path(f"{file}-shm")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    store.close()


def test_the_default_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATWRIGHT_DATA", str(tmp_path / "data"))
    Store("").close()
    assert (tmp_path / "data" / "conversations.db").is_file()
    monkeypatch.delenv("CHATWRIGHT_DATA")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert database.data_dir() == tmp_path / "chatwright"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert database.data_dir() == Path.home() / ".local" / "share" / "chatwright"


def no_database(file: Path) -> None:
    file.write_bytes(b"These are no conversations at all. " * 100)


def damaged(file: Path) -> None:
    """The pages behind the first, which holds the header, are overwritten."""
    store = Store(str(file))
    for number in range(50):
        store.of("me").create(f"chat {number} " * 50, model="m")
    store.close()
    content = bytearray(file.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    file.write_bytes(content)


def newer(file: Path) -> None:
    Store(str(file)).close()
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE schema_version SET version = 99")
    connection.close()


def foreign(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE messages (id INTEGER)")
    connection.close()


def versionless(file: Path) -> None:
    Store(str(file)).close()
    with sqlite3.connect(file) as connection:
        connection.execute("DELETE FROM schema_version")
    connection.close()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_database, "no SQLite file, or it is damaged"),
        (damaged, "damaged"),
        (newer, "written by a newer chatwright.*version 99.*upgrade"),
        (foreign, "'messages' that is not chatwright's"),
        (versionless, "does not say which version"),
        (lambda file: file.mkdir(), "is not a file"),
    ],
)
def test_files_that_cannot_be_used_are_left_alone(tmp_path: Path, spoil: Any, message: str) -> None:
    file = tmp_path / "store.db"
    spoil(file)
    before = file.read_bytes() if file.is_file() else b""

    def use() -> None:
        store = Store(str(file))
        try:
            store.of("me").page()
        finally:
            store.close()

    with pytest.raises(UserError, match=f"(?s){file}.*{message}"):
        use()
    assert before == (file.read_bytes() if file.is_file() else b"")


def test_a_locked_file_is_a_clear_error_and_then_usable(tmp_path: Path) -> None:
    file = tmp_path / "store.db"
    store = Store(str(file), busy_seconds=0.05)
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreError, match="another program has locked"):
        store.of("me").create("hello", model="m")
    other.execute("ROLLBACK")
    other.close()
    store.of("me").create("hello", model="m")
    store.close()


@pytest.mark.skipif(os.name != "posix", reason="rights as POSIX has them")
@pytest.mark.parametrize("place", ["/proc/store.db", "/proc/folder/store.db"])
def test_a_place_that_cannot_be_written(place: str) -> None:
    with pytest.raises(UserError, match=r"choose another place with --store"):
        Store(place)


def test_a_file_that_may_only_be_read(tmp_path: Path) -> None:
    file = tmp_path / "store.db"
    Store(str(file)).close()
    with pytest.raises(UserError, match="may not be written"):
        Store(f"sqlite:///file:{file}?mode=ro&uri=true")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nothing://host/name", "no driver"),
        ("postgresql+nodriver://me:secret@host/name", "no driver"),
        ("://", "no SQLAlchemy URL"),
    ],
)
def test_urls_that_lead_nowhere(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Store(url)
    assert "secret" not in str(caught.value)
