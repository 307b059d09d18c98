"""What the readers of all kinds of files share: broken records, encodings, and notes on what was read."""

from __future__ import annotations

import codecs
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatwright.config import UserError

Row = tuple[str, Mapping[str, Any]]
"""The record's location ("file.jsonl:12"), and its columns."""


@dataclass
class Faults:
    """How unusable records are handled: the error is raised, or the record is left out and counted. Also
    counts how .txt files were cut."""

    skip: bool = False
    count: int = 0
    """Records that were left out."""
    first: str = ""
    """The error of the first of them, with its location."""
    text_files: int = 0
    """.txt files that were read."""
    pieces: int = 0
    """Documents that they became."""
    longest: int = 0
    """The most characters that such a document may have."""

    def met(self, error: UserError) -> None:
        """Raise the error, or count it."""
        if not self.skip:
            raise error
        self.count += 1
        self.first = self.first or str(error)

    def cut_line(self) -> str:
        """How .txt files became documents, in a sentence; "" where there was none."""
        if not self.pieces:
            return ""
        files = f"{self.text_files:,} .txt files" if self.text_files > 1 else "the .txt file"
        became = f"{self.pieces:,} documents" if self.pieces > 1 else "one document"
        return (
            f"{files} became {became} of at most {self.longest:,} characters, cut behind blank lines, else "
            "behind line ends or spaces"
        )


def open_bytes(path: Path) -> io.BufferedReader:
    """The file, opened for reading bytes. Raises UserError."""
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def decode(data: bytes, path: Path, offset: int, line: int = 0) -> str:
    """Bytes at `offset` of a file as text; a byte-order mark at its beginning is taken off. `line` is the
    number of the line that they are, 0 if they are more than a line. Raises UserError: not UTF-8."""
    try:
        text = data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        bom = 3 if offset == 0 and data.startswith(codecs.BOM_UTF8) else 0  # error.start does not count it
        at = bom + error.start
        number = line or data.count(b"\n", 0, at) + 1
        raise not_utf8(f"{path}:{number}", data[max(0, at - 2) : at + 16], offset + at, data[at]) from None
    if "\0" in text:
        at = data.index(b"\0")
        number = line or data.count(b"\n", 0, at) + 1
        raise not_utf8(f"{path}:{number}", data[max(0, at - 2) : at + 16], offset + at, 0)
    return text


UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def not_utf8(where: str, around: bytes, offset: int, byte: int) -> UserError:
    """The error for a byte that is not UTF-8, with a guess of the encoding from the bytes around it."""
    wide = byte == 0 or around.startswith(UTF16) or around.count(b"\0") > len(around) // 4
    if wide:
        encoding, looks = "UTF-16", "it looks like UTF-16, as some Windows programs write"
    else:
        encoding, looks = "WINDOWS-1252", "it may be Windows-1252, as older Windows programs write"
    return UserError(
        f"{where} is not UTF-8: byte 0x{byte:02x} at offset {offset}; {looks}: convert it with iconv -f "
        f"{encoding} -t UTF-8 FILE > NEW, or save it as UTF-8"
    )
