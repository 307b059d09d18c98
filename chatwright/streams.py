"""Standard input, output and error: whatever they are, they end no command.

A console may have an encoding that lacks most characters (cp1252, ASCII), its reader may have gone (a closed
pipe), or there is none at all. What cannot be written is written as `?`, or nowhere.
"""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, TextIO


def prepare() -> None:
    """Make the three streams usable: open ones where there are none, and none that fails on a character.

    Text of ASCII is read as UTF-8, of which it is a part: LANG=C says nothing about the text that comes.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None or getattr(stream, "closed", False):
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (open to the end)
        elif hasattr(stream, "reconfigure"):
            plain = name == "stdin" and _name(stream.encoding) == "ascii"
            fails = stream.errors == "strict" or (
                stream.errors == "surrogateescape" and _name(stream.encoding) != "utf-8"
            )
            with suppress(OSError, ValueError):  # something was read already
                stream.reconfigure(
                    encoding="utf-8" if plain else None, errors="replace" if fails or plain else None
                )


def meant(text: str) -> str:
    """A text of the command line as UTF-8, where the locale (LANG=C) could not read it: Python then keeps its
    bytes as surrogates, which file names need, and which are no text."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # other surrogates: no command line has them
        return text


def _name(encoding: str | None) -> str:
    """The usual name of an encoding."""
    try:
        return codecs.lookup(encoding or "ascii").name
    except LookupError:
        return ""


class Steady:
    """A text stream whose `write` and `flush` never fail: what nobody can take any more is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write, or drop. Returns the number of characters."""
        try:
            self.stream.write(text)
        except (OSError, ValueError):  # ValueError: the stream is closed
            leave(self.stream)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop."""
        try:
            self.stream.flush()
        except (OSError, ValueError):
            leave(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def leave(stream: TextIO) -> None:
    """Let a stream whose reader has gone end nowhere: flushing its buffer at exit would fail once more."""
    with suppress(OSError, ValueError):  # a stream without a file, as in tests
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def steady(name: Literal["stdout", "stderr"]) -> Iterator[None]:
    """A context in which writing to this stream never ends the work."""
    before = getattr(sys, name)
    setattr(sys, name, Steady(before))
    try:
        yield
    finally:
        getattr(sys, name).flush()
        setattr(sys, name, before)
