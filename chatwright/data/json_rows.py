"""Records of .jsonl and .json files. How the records stand in the file decides, not the file's suffix:

* one object a line (JSON lines), which is streamed;
* a list of objects;
* objects over several lines, one after the other, as jq and editors write them; a single one too.

The last two are read whole.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from chatwright.config import UserError
from chatwright.data import broken_json
from chatwright.data.reading import Faults, Row, decode, open_bytes, suffix_of

LINES = ".jsonl"
"""The suffix of files that should have one object a line."""


def json_rows(path: Path, faults: Faults, longest: int) -> Iterator[Row]:
    """The records of a file, which may have at most `longest` bytes in a line, or in all where it has to be
    read whole. Raises UserError with file and line, or item."""
    with open_bytes(path) as file:
        numbered = _Lines(file, path, longest)
        before = b""
        for line in numbered:
            if line.strip(b" \t\r\n\xef\xbb\xbf"):  # white space, and a byte-order mark
                break
            before += line
        else:
            return
        whole = _Whole(path, file, before + line, longest)
        rows = whole.rows() if _is_whole(line) else None
        for where, row in rows or ():
            if isinstance(row, dict):
                yield where, row
            else:
                faults.met(UserError(f"{where} is not an object but {type(row).__name__}"))
        if rows is not None:
            return
        behind: Any = io.BufferedReader(io.BytesIO(whole.behind))
        rest: io.BufferedReader = behind if whole.read else file
        again = _Lines(rest, path, longest, number=numbered.number, offset=len(before) + len(line))
        yield from _line_rows(chain([(numbered.number, len(before), line)], again.numbered()), again, faults)


class _Lines:
    """The lines of a file, with their numbers. Raises UserError for one that is too long."""

    def __init__(
        self, file: io.BufferedReader, path: Path, longest: int, *, number: int = 0, offset: int = 0
    ) -> None:
        self.file, self.path, self.longest, self.number, self.offset = file, path, longest, number, offset

    def __iter__(self) -> Iterator[bytes]:
        return (line for _, _, line in self.numbered())

    def numbered(self) -> Iterator[tuple[int, int, bytes]]:
        """(number, where it begins, the line)."""
        while line := self.file.readline(self.longest + 1):
            self.number += 1
            if len(line) > self.longest:
                size = f"{self.longest >> 20} MiB"
                if suffix_of(self.path) == LINES:
                    raise UserError(
                        f"{self.path}:{self.number}: a line of more than {size}; one record a line, please"
                    )
                raise UserError(
                    f"{self.path}: over {size} in one line; write it as {LINES} (one object a line) to "
                    "stream it"
                )
            start, self.offset = self.offset, self.offset + len(line)
            yield self.number, start, line

    @property
    def at_end(self) -> bool:
        """Whether no line is left."""
        return not self.file.peek(1)


def _is_whole(line: bytes) -> bool:
    """Whether a file that begins with this line may have to be read whole: it begins a list, or an object
    that does not end on it, or behind which another one begins."""
    text = line.decode("utf-8", "replace").lstrip("\ufeff").strip()
    if not text.startswith("{"):
        return text.startswith("[")
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return not error.msg.startswith("Extra data") or text[error.pos :].lstrip().startswith("{")
    except (ValueError, RecursionError):
        return False
    return False


class _Whole:
    """A file that is read whole, of which the beginning up to its first line with anything has been read."""

    def __init__(self, path: Path, file: io.BufferedReader, begun: bytes, longest: int) -> None:
        self.path, self.file, self.begun, self.longest = path, file, begun, longest
        self.read, self.behind = False, b""

    def rows(self) -> list[tuple[str, Any]] | None:
        """The records with their locations; None where the file must be read by lines, and what is wrong
        said of a line. Raises UserError."""
        self.read, self.behind = True, self.file.read(self.longest + 1)
        data = self.begun + self.behind
        if len(data) > self.longest:
            raise UserError(
                f"{self.path}: over {self.longest >> 20} MiB, and its first line is no whole object; write "
                "it as one object a line (.jsonl) to stream it"
            )
        try:
            text = decode(data, self.path, 0)
        except UserError:
            if self._is_called_lines():
                return None
            raise
        if text.lstrip().startswith("["):
            return self._listed(text)
        return self._one_after_the_other(text)

    def _listed(self, text: str) -> list[tuple[str, Any]] | None:
        """The items of a list."""
        try:
            found = parse(text, str(self.path))
        except UserError:
            if self._is_called_lines() and self.begun.strip() != b"[":
                return None
            raise
        return [(f"{self.path}: item {number}", one) for number, one in enumerate(found, start=1)]

    def _one_after_the_other(self, text: str) -> list[tuple[str, Any]] | None:
        """Objects with nothing but white space between."""
        found: list[tuple[str, Any]] = []
        decoder, at, line, counted = json.JSONDecoder(), 0, 1, 0
        while at < len(text):
            if text[at] in " \t\r\n":
                at += 1
                continue
            line += text.count("\n", counted, at)
            counted = at
            try:
                value, at = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                if not found and self._are_lines():
                    return None
                raise _broken(error, text, str(self.path)) from None
            found.append((f"{self.path}:{line}", value))
        return found

    def _are_lines(self) -> bool:
        """Whether what follows the first line looks like one object a line, or nothing follows and the name
        says so."""
        following = next((one for one in self.behind.split(b"\n") if one.strip()), b"").strip()
        if not following:
            return self._is_called_lines()
        return following.startswith(b"{") and following.endswith(b"}")

    def _is_called_lines(self) -> bool:
        return suffix_of(self.path) == LINES


def _line_rows(numbered: Iterator[tuple[int, int, bytes]], lines: _Lines, faults: Faults) -> Iterator[Row]:
    """The records of a file of one object a line."""
    for number, offset, line in numbered:
        where = f"{lines.path}:{number}"
        try:
            text = decode(line, lines.path, offset, number).rstrip("\r\n")
            row = _parse_object(text, where, lambda: lines.at_end) if text.strip() else None
        except UserError as error:
            faults.met(error)
            continue
        if row is not None:
            yield where, row


def _parse_object(text: str, where: str, is_last: Callable[[], bool]) -> dict[str, Any]:
    """The object on one line of a file; `is_last` says whether it is the last line."""
    row = parse(text, where, is_last)
    if not isinstance(row, dict):
        more = "; a list of objects is a .json file" if isinstance(row, list) else ""
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}{more}")
    return row


def parse(text: str, where: str, is_last: Callable[[], bool] | None = None) -> Any:
    """The value of a JSON text: a whole file, or one line of one (then with `is_last`). Raises UserError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken(error, text, where, is_last) from None


def _broken(
    error: ValueError | RecursionError, text: str, where: str, is_last: Callable[[], bool] | None = None
) -> UserError:
    """The error for a text that is no JSON."""
    if not isinstance(
        error, json.JSONDecodeError
    ):  # a number with thousands of digits; thousands of brackets
        return UserError(f"{where}: JSON that cannot be read: {error}")
    lines, last = is_last is not None, is_last is None or is_last()
    line = "" if lines else f":{error.lineno}"
    why = broken_json.reason(text, error, lines=lines, last=last)
    return UserError(f"{where}{line}: not valid JSON at column {error.colno}: {why}")
