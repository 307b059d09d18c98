"""What the readers of all kinds of files share: broken records, encodings, and notes on what was read.

What a file holds decides, not its name: one that is packed by gzip is unpacked while it is read, and UTF-16
becomes UTF-8, with a byte-order mark or without.
"""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
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
    wanted: int = 0
    """Turns of others than the assistant that are marked as to be learnt; none is."""
    unlearnt: int = 0
    """Answers left out of the texts of conversations, because they are marked as not to be learnt."""

    def met(self, error: UserError) -> None:
        """Raise the error, or count it."""
        if not self.skip:
            raise error
        self.count += 1
        self.first = self.first or str(error)

    def wanted_line(self) -> str:
        """What marks of the conversations ask for and do not get, or what they take out of a text; "" for
        nothing."""
        told = []
        if self.wanted:
            told.append(
                f"{self.wanted:,} turns of users, tools or the system are marked as to be learnt; only "
                "answers are"
            )
        if self.unlearnt:
            told.append(
                f"{self.unlearnt:,} answers that are marked as not to be learnt are no part of the texts"
            )
        return "; ".join(told)

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


GZIP = b"\x1f\x8b"
OTHERS = {
    b"PK\x03\x04": "a ZIP archive, as .xlsx and .docx files are: unpack it, or save it as .csv or .txt",
    b"PAR1": "a Parquet file: give it the suffix .parquet",
    b"\x28\xb5\x2f\xfd": "packed by zstd: unpack it first (zstd -d FILE)",
    b"BZh": "packed by bzip2: unpack it first (bunzip2 FILE)",
    b"\xfd7zXZ": "packed by xz: unpack it first (unxz FILE)",
    b"version https://git-lfs": "a pointer of Git LFS and not the file itself: fetch it by git lfs pull",
    b"%PDF": "a PDF: save its text as .txt",
}
"""How files begin that are read under no name -> what they are, and what to do."""
WIDE = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte-order mark -> the encoding; a longer one comes before one that it begins with."""
UNPACKED = 1 << 20
"""Bytes that are unpacked or decoded at a time."""


def suffix_of(path: Path) -> str:
    """The suffix that tells how a file is read, in lower case; that of `talks.jsonl.gz` is .jsonl."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix == ".gz" else suffix


def open_bytes(path: Path) -> io.BufferedReader:
    """The file's text, opened for reading bytes of UTF-8, whether it is packed by gzip or not. Raises
    UserError: it cannot be opened, or is no text at all."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        begins = file.peek(32)
        if begins.startswith(GZIP):
            file = io.BufferedReader(_Recoded(gzip.GzipFile(fileobj=file), file, path))
            begins = file.peek(32)
        for mark, what in OTHERS.items():
            if begins.startswith(mark):
                raise UserError(f"{path} is {what}")
    except OSError as error:
        file.close()
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except UserError:
        file.close()
        raise
    encoding = wide_encoding(begins)
    return io.BufferedReader(_Recoded(file, file, path, encoding)) if encoding else file


def wide_encoding(begins: bytes) -> str:
    """The encoding of a text that begins so, where a character of it has two or four bytes; "" for others.

    Without a byte-order mark, two plain characters at the beginning tell UTF-16: every other byte is 0.
    """
    for mark, encoding in WIDE.items():
        if begins.startswith(mark):
            return encoding
    if len(begins) >= 4 and [byte == 0 for byte in begins[:4]] in ([False, True] * 2, [True, False] * 2):
        return "utf-16-le" if begins[1] == 0 else "utf-16-be"
    return ""


class _Recoded(io.RawIOBase):
    """The bytes of a file that is packed, or has another encoding, as UTF-8. Errors are UserErrors."""

    def __init__(
        self, source: io.BufferedIOBase, opened: io.BufferedReader, path: Path, encoding: str = ""
    ) -> None:
        """`source` gives the bytes; `opened` is the file under it, which is closed with this one."""
        self._source, self._opened, self._path, self._encoding = source, opened, path, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)() if encoding else None
        self._left = b""

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, as `io.RawIOBase` says."""
        ended = False
        while not self._left and not ended:
            self._left, ended = self._next()
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size

    def _next(self) -> tuple[bytes, bool]:
        """The next bytes, and whether they are the last. Raises UserError."""
        try:
            data = self._source.read(UNPACKED)
            if self._decoder is None:
                return data, not data
            return self._decoder.decode(data, final=not data).encode("utf-8"), not data
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(f"{self._path}: it is packed by gzip, and damaged or cut off: {error}") from None
        except UnicodeError as error:
            raise UserError(
                f"{self._path}: it begins as {self._encoding.upper()}, but is not: {error}"
            ) from None

    def close(self) -> None:
        """Close the file, too."""
        self._source.close()
        self._opened.close()
        super().close()


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


def not_utf8(where: str, around: bytes, offset: int, byte: int) -> UserError:
    """The error for a byte that is not UTF-8, with a guess of the encoding from the bytes around it."""
    wide = byte == 0 or around.startswith(tuple(WIDE)) or around.count(b"\0") > len(around) // 4
    if wide:
        encoding, looks = "UTF-16", "it looks like UTF-16, as some Windows programs write"
    else:
        encoding, looks = "WINDOWS-1252", "it may be Windows-1252, as older Windows programs write"
    return UserError(
        f"{where} is not UTF-8: byte 0x{byte:02x} at offset {offset}; {looks}: convert it with iconv -f "
        f"{encoding} -t UTF-8 FILE > NEW, or save it as UTF-8"
    )
