"""Stores of every kind: in memory, in a file, and on a database server when CHATWRIGHT_TEST_DATABASE names
one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url

from chatwright.feedback.store import Owned, Store
from chatwright.feedback.tables import Base
from support.places import DATABASE, SERVER


def _drop() -> None:
    assert "test" in str(make_url(DATABASE).database), (
        "CHATWRIGHT_TEST_DATABASE: the database's name must have 'test' in it"
    )
    engine = create_engine(DATABASE)
    Base.metadata.drop_all(engine)
    engine.dispose()


def _place(kind: str, tmp_path: Path) -> Iterator[str]:
    file = tmp_path / "new" / "folder" / "conversations.db"
    if kind == "server":
        _drop()
    yield {"memory": "none", "file": str(file), "url": f"sqlite:///{file}", "server": DATABASE}[kind]
    if kind == "server":
        _drop()


@pytest.fixture(params=["memory", "file", "url", SERVER])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where a store may be: in memory, a file by its path, a file by its URL, a server."""
    yield from _place(request.param, tmp_path)


@pytest.fixture(params=["file", SERVER])
def lasting(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A place that can be opened twice."""
    yield from _place(request.param, tmp_path)


@pytest.fixture
def store(place: str) -> Iterator[Store]:
    """A store at each of the places."""
    store = Store(place)
    yield store
    store.close()


@pytest.fixture
def mine(store: Store) -> Owned:
    """One owner's part of it."""
    return store.of("me")
