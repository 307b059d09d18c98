"""Opens the store's database: a SQLite file, or any database with a SQLAlchemy URL."""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    LargeBinary,
    Text,
    cast,
    create_engine,
    event,
    func,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import QueuePool

from chatwright.config import UserError
from chatwright.feedback.tables import ROW_BYTES, VERSION, Base, ConversationRow, MessageRow, SchemaRow

WRITES = {"chatwright_writes": True}
"""Execution options of connections that will write."""


class StoreError(UserError):
    """The store cannot be opened, read or written."""


def data_dir() -> Path:
    """The folder for users' data: $CHATWRIGHT_DATA, else the platform's usual folder. Not created here."""
    if named := os.environ.get("CHATWRIGHT_DATA"):
        return Path(named).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData" / "Local") / "chatwright"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "chatwright"
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "chatwright"


def locate(place: str) -> URL:
    """The URL of the store: "" is the default file, `none` is memory, else a path or a URL. Raises
    StoreError."""
    if place == "none":
        return URL.create("sqlite")
    if "://" in place:
        try:
            return make_url(place)
        except ArgumentError:
            raise StoreError(
                "the store's URL is no SQLAlchemy URL (dialect://user:password@host/name)"
            ) from None
    file = Path(place).expanduser() if place else data_dir() / "conversations.db"
    return URL.create("sqlite", database=str(file))


def open_database(url: URL, *, busy_seconds: float) -> Engine:
    """An engine whose tables exist and have version VERSION. `busy_seconds`: how long to wait for another
    writer.

    Raises StoreError if the database cannot be used, is damaged, is not chatwright's, or was written by a
    newer version of this program.
    """
    shown = url.database if url.get_backend_name() == "sqlite" and url.database else url.render_as_string()
    with explained(shown or "the store"):
        if url.get_backend_name() == "sqlite":
            engine = _sqlite(url, busy_seconds)
        else:  # pre_ping tests a connection before use: a restarted database server has dropped it
            engine = create_engine(url, pool_pre_ping=True)
        try:
            _prepare(engine, shown or "the store")
            if url.get_backend_name() == "sqlite":  # only now: the file is known to be ours
                _write_ahead(engine)
        except BaseException:
            engine.dispose()
            raise
    return engine


def _write_ahead(engine: Engine) -> None:
    """Let readers read while somebody writes. The file stores this mode; no transaction may be open."""
    connection = engine.raw_connection()
    try:
        connection.cursor().execute("PRAGMA journal_mode = WAL")
    finally:
        connection.close()


@contextmanager
def explained(shown: str) -> Iterator[None]:
    """Convert the database's errors into a StoreError that says what to do; `shown` names the store."""
    try:
        yield
    except PoolTimeout:
        raise StoreError(f"{shown}: too many want the database at once; try again in a moment") from None
    except DBAPIError as error:
        raise StoreError(f"{shown}: {_remedy(error.orig)}") from error
    except sqlite3.Error as error:  # from the settings that each new connection gets
        raise StoreError(f"{shown}: {_remedy(error)}") from error
    except (NoSuchModuleError, ImportError) as error:
        raise StoreError(f"{shown}: there is no driver for this kind of database ({error})") from None
    except OSError as error:
        raise StoreError(f"{shown}: {error.strerror or error}; choose another place with --store") from None


def _remedy(error: BaseException | None) -> str:
    said = str(error).partition("\n")[0]
    reasons = (
        (
            "not a database",
            "this is no SQLite file, or it is damaged; move it away, or choose another with --store",
        ),
        ("malformed", "the file is damaged; move it away, or restore a copy of it"),
        ("locked", "another program has locked the database; end it, or try again in a moment"),
        ("readonly", "the file may not be written; give yourself the right, or choose another with --store"),
        ("unable to open", "the file cannot be opened; choose another with --store"),
        ("is full", "the disk is full"),
    )
    return next((remedy for sign, remedy in reasons if sign in said), said)


def _sqlite(url: URL, busy_seconds: float) -> Engine:
    """An engine for SQLite. A database in memory gets a single connection, since each new connection would
    open another database."""
    options: dict[str, Any] = {"connect_args": {"check_same_thread": False, "timeout": busy_seconds}}
    if url.database in (None, "", ":memory:"):
        options |= {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0}
    elif not str(url.database).startswith("file:"):  # SQLite's own URLs say themselves what to create
        _make_private(Path(str(url.database)))
    engine = create_engine(url, **options)

    @event.listens_for(engine, "connect")
    def _(connection: sqlite3.Connection, __: Any) -> None:
        # Transactions begin in the "begin" event below, not when the driver sees the first write.
        connection.isolation_level = None
        connection.create_function("lower", 1, _lower, deterministic=True)  # SQLite's own knows only ASCII
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def _(connection: Connection) -> None:
        # IMMEDIATE takes the write lock at once. A transaction that reads first and then writes fails if
        # another one has written in between, and waiting does not help it.
        writes = connection.get_execution_options().get("chatwright_writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _lower(text: Any) -> Any:
    return text.lower() if isinstance(text, str) else text


def _make_private(file: Path) -> None:
    """Create the file with access for its owner alone, before SQLite does. SQLite gives the files that it
    writes beside it the same rights."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        if not file.is_file():
            raise StoreError(f"{file} is not a file; choose another with --store") from None


def _prepare(engine: Engine, shown: str) -> None:
    """Make the tables in an empty database, or check and upgrade existing ones. Check write access."""
    with engine.execution_options(**WRITES).begin() as connection:
        present = set(inspect(connection).get_table_names())
        if SchemaRow.__tablename__ not in present:
            if foreign := present & set(Base.metadata.tables):
                raise StoreError(
                    f"{shown} has a table {min(foreign)!r} that is not chatwright's; choose another place"
                )
            Base.metadata.create_all(connection)
            connection.execute(SchemaRow.__table__.insert().values(version=VERSION))  # type: ignore[attr-defined]
        version = connection.execute(select(SchemaRow.version)).scalar()
        if version is None:
            raise StoreError(f"{shown} does not say which version it has: it is damaged, or not chatwright's")
        if version > VERSION:
            raise StoreError(
                f"{shown} was written by a newer chatwright (its tables have version {version}, this one "
                f"knows {VERSION}); upgrade, or choose another place with --store"
            )
        if version < 2:
            _count_sizes(connection)
        if version < 3:  # older messages are plain texts
            kind = MessageRow.__table__.c.parts.type.compile(connection.dialect)
            connection.execute(text(f"ALTER TABLE {MessageRow.__tablename__} ADD COLUMN parts {kind}"))
        # Even if nothing changes: without the right to write, this fails now and not at the first answer.
        connection.execute(update(SchemaRow).values(version=VERSION))


def _count_sizes(connection: Connection) -> None:
    """From version 1 to 2: add the sizes of conversations and messages, in bytes."""
    for table in (MessageRow.__tablename__, ConversationRow.__tablename__):
        connection.execute(text(f"ALTER TABLE {table} ADD COLUMN size BIGINT DEFAULT 0 NOT NULL"))

    def octets(column: Any) -> ColumnElement[int]:
        written = cast(column, Text)
        if connection.dialect.name == "sqlite":  # older versions (before 2023) have no octet_length
            return func.coalesce(func.length(cast(written, LargeBinary)), 0)
        return func.coalesce(func.octet_length(written), 0)

    one, whole = MessageRow, ConversationRow
    connection.execute(update(one).values(size=ROW_BYTES + octets(one.content) + octets(one.probabilities)))
    said = select(func.coalesce(func.sum(one.size), 0)).where(one.conversation == whole.id).scalar_subquery()
    frame = ROW_BYTES + octets(whole.title) + octets(whole.system) + octets(whole.settings)
    connection.execute(update(whole).values(size=frame + said))
    next(index for index in whole.__table__.indexes if index.name == "weights").create(connection)  # type: ignore[attr-defined]
