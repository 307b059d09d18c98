"""Records of .csv and .tsv files, streamed. The first line names the columns.

The separator of a .csv file is the one that its first line has most of: a comma, a semicolon (as spreadsheets
write where the comma is the decimal sign) or a tab. Texts that hold the separator, a quote or line breaks
stand in double quotes (RFC 4180).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from chatwright.config import UserError
from chatwright.data.columns import KNOWN
from chatwright.data.reading import Faults, Row, decode, open_bytes, suffix_of

CSV_SUFFIXES = (".csv", ".tsv")
SEPARATORS = (",", ";", "\t")
LONGEST_NAME = 80
"""Characters; what is longer is no column's name."""


class Lines:
    """The lines of a file as text, for csv.reader. Knows their numbers, and how long a record is."""

    def __init__(self, file: io.BufferedReader, path: Path, longest: int) -> None:
        self.file, self.path, self.longest = file, path, longest
        self.number = self.offset = self.held = 0
        self.begun = 1
        """The line in which the record begins."""

    def begin(self) -> None:
        """The next line is the first of a record."""
        self.begun, self.held = self.number + 1, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        data = self.file.readline(self.longest + 1)
        if not data:
            raise StopIteration
        self.held += len(data)
        if self.held > self.longest:
            raise UserError(
                f"{self.path}:{self.begun}: the record that begins here is longer than {self.longest >> 20} "
                "MiB; is a double quote not closed?"
            )
        self.number += 1
        offset, self.offset = self.offset, self.offset + len(data)
        return decode(data, self.path, offset, self.number)


def csv_rows(path: Path, faults: Faults, longest: int) -> Iterator[Row]:
    """The records of a file, each column a text; `longest` bounds a record's bytes.

    Raises UserError with file and line: no header, a row with more or fewer fields than it, an open quote,
    not UTF-8. With `faults` that skip, a broken row is left out instead.
    """
    csv.field_size_limit(longest)
    with open_bytes(path) as file:
        lines = Lines(file, path, longest)
        separator, first = _separator(lines)
        reader = csv.reader(chain([first], lines), delimiter=separator, strict=True, skipinitialspace=True)
        header = _header(path, reader, lines)
        while True:
            lines.begin()
            where = f"{path}:{lines.begun}"
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                faults.met(UserError(f"{where}: {_reason(error)}"))
                continue
            if not fields:  # an empty line
                continue
            while len(fields) > len(header) and not fields[-1]:
                fields.pop()
            if len(fields) != len(header):
                faults.met(_ragged(where, fields, header, separator))
                continue
            yield where, {name: text for name, text in zip(header, fields, strict=True) if name}


def _separator(lines: Lines) -> tuple[str, str]:
    """The separator, and the first line that is not empty. Raises UserError when there is none."""
    for line in lines:
        if line.lower().startswith("sep=") and len(line.strip()) == 5:  # Excel's own way to say it
            return line.strip()[4], next(lines, "")
        if line.strip():
            if suffix_of(lines.path) == ".tsv":
                return "\t", line
            return max(SEPARATORS, key=_without_quoted(line).count), line
    raise UserError(f"{lines.path} is empty; its first line must name the columns, such as prompt,completion")


def _without_quoted(line: str) -> str:
    """A line without what stands in double quotes."""
    return "".join(line.split('"')[::2])


def _header(path: Path, reader: Iterator[list[str]], lines: Lines) -> list[str]:
    """The names of the columns; the usual names in lower case, "" for a column without one. Raises
    UserError."""
    try:
        written = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise UserError(f"{path}:1: {_reason(error)}") from None
    names = [name.lower() if name.lower() in KNOWN else name for name in written]
    named = [name for name in names if name]
    long = next((name for name in named if len(name) > LONGEST_NAME or "\n" in name), "")
    if long or not named or all(_is_number(name) for name in named):
        raise UserError(
            f"{path}:{lines.number}: no names of columns{f', but {long[:40]!r}' if long else ''}; the first "
            "line of the file must name them, such as prompt,completion"
        )
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice:
        raise UserError(f"{path}:{lines.number}: two columns are called {twice[0]!r}; rename one")
    return names


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _ragged(where: str, fields: list[str], header: list[str], separator: str) -> UserError:
    named = {"\t": "tab", ",": "comma", ";": "semicolon"}.get(separator, separator)
    number = f"{len(fields)} field{'s' if len(fields) != 1 else ''}"
    return UserError(
        f"{where}: {number}, but the first line names {len(header)} columns ({', '.join(header)}); a text "
        f'that holds a {named} stands in double quotes: "..."'
    )


def _reason(error: csv.Error) -> str:
    """The likely mistake behind csv's error."""
    text = str(error)
    if "unexpected end of data" in text:
        return "a double quote is opened in the record that begins here, and never closed"
    if "expected after" in text:
        return 'text stands behind a closing double quote; a double quote inside a text is written twice: ""'
    if "new-line character" in text:
        return "a carriage return stands inside the line; save the file with usual line ends"
    return f"not valid CSV: {text}"
