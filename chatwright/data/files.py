"""The user's own data: .txt, .jsonl, .json, .csv, .tsv, .parquet files, folders of them, hub data sets.

Everything is streamed: memory is bounded by one piece of text, one JSON line or row of a .csv file
(`MAX_RECORD_BYTES`), or one batch of Parquet rows. Only JSON that is not one object a line has to be read
whole (json_rows.py), and is refused above the same bound.
"""

from __future__ import annotations

import codecs
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from chatwright.config import UserError
from chatwright.data.csv_rows import CSV_SUFFIXES, csv_rows
from chatwright.data.json_rows import json_rows
from chatwright.data.reading import Faults, Row, not_utf8, open_bytes, suffix_of
from chatwright.data.shapes import columns_of, hint

RECORD_SUFFIXES = (".jsonl", ".json", ".parquet", *CSV_SUFFIXES)
TEXT_SUFFIX = ".txt"
PIECE_CHARS = 8192
"""A longer .txt file becomes several documents, so that a single book still has both a training and a
held-out part.
"""
FEWEST_PIECES = 10
"""A .txt file that is the only one of its source becomes about so many documents even where it is shorter
than that many times `PIECE_CHARS`, so that what is held out is a small part of it."""
SHORTEST_PIECE = 200
"""Characters below which a text is not cut for that reason."""
MAX_RECORD_BYTES = 256 << 20
READ_BYTES = 1 << 20
PARQUET_ROWS = 1024

UNREAD = {
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), "save it as .csv (UTF-8)"),
    **dict.fromkeys((".docx", ".doc", ".odt", ".pdf", ".html", ".htm", ".rtf", ".epub"), "save it as .txt"),
    **dict.fromkeys((".md", ".rst", ".text", ".log"), "give it the suffix .txt"),
    **dict.fromkeys((".ndjson", ".jsonlines"), "give it the suffix .jsonl"),
    **dict.fromkeys((".zip", ".bz2", ".xz", ".zst", ".tar", ".7z", ".tgz"), "unpack it first"),
    ".gz": "its name must say what is packed, as in talks.jsonl.gz",
}
"""Suffixes that are not read -> what to do."""


def find_files(path: Path, suffixes: Sequence[str]) -> list[Path]:
    """The file itself, or the files with these suffixes below a folder, sorted by path; hidden ones are
    skipped.

    Raises UserError: not there, another suffix, or a folder with no such file.
    """
    wanted = ", ".join(suffixes)
    if path.is_file():
        if suffix_of(path) not in suffixes:
            advice = UNREAD.get(path.suffix.lower(), "")
            if suffix_of(path) == TEXT_SUFFIX:
                advice = "a .txt file is text (`text` reads it); conversations and judgements have columns"
            raise UserError(
                f"{path} is not one of the kinds that can be read here: {wanted}"
                + (f"; {advice}" if advice else "")
            )
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} does not exist")
    found, others = [], set()
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if name.startswith("."):
                continue
            file = Path(folder) / name
            if suffix_of(file) in suffixes:
                found.append(file)
            else:
                others.add(file.suffix.lower() or name)
    if not found:
        seen = f"; it has {', '.join(sorted(others)[:8])}" if others else "; it is empty"
        raise UserError(f"{path} holds no file of the kinds {wanted}{seen}")
    return sorted(found, key=lambda file: file.relative_to(path).as_posix())


def piece_chars(listed: Sequence[Path]) -> int:
    """The most characters that a document from these .txt files may have; fewer for one short file alone."""
    if len(listed) != 1 or suffix_of(listed[0]) != TEXT_SUFFIX:
        return PIECE_CHARS
    return max(SHORTEST_PIECE, min(PIECE_CHARS, listed[0].stat().st_size // FEWEST_PIECES))


def text_pieces(path: Path, longest: int = 0) -> Iterator[str]:
    """A UTF-8 .txt file in pieces of at most `longest` characters (see `pieces`). Raises UserError."""

    def chunks() -> Iterator[bytes]:
        with open_bytes(path) as file:
            while chunk := file.read(READ_BYTES):
                yield chunk

    return pieces(chunks(), str(path), longest)


def pieces(chunks: Iterable[bytes], where: str, longest: int = 0) -> Iterator[str]:
    """UTF-8 bytes as pieces of at most `longest` characters (0: `PIECE_CHARS`), cut after a blank line, else
    after a line, else after a space, else anywhere.

    The pieces joined are the text (line ends made \\n, a byte order mark taken off), and do not depend on how
    the bytes are chunked. Pieces of white space only are left out. Raises UserError naming the first byte
    that is not UTF-8.
    """
    longest = longest or PIECE_CHARS
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    pending, offset, first = "", 0, True
    for chunk, final in _with_last(chunks):
        held = len(decoder.getstate()[0])  # bytes of a character that the chunk before ended in
        try:
            text = newlines.decode(decoder.decode(chunk, final), final)
        except UnicodeDecodeError as error:
            around = error.object[max(0, error.start - 2) : error.start + 16]
            raise not_utf8(where, around, offset - held + error.start, error.object[error.start]) from None
        if "\0" in text:
            raise not_utf8(where, b"\0", offset + max(0, chunk.find(b"\0")), 0)
        offset += len(chunk)
        if first and text:
            text, first = text.removeprefix("\ufeff"), False
        pending += text
        start = 0
        while len(pending) - start > longest:
            end = _cut(pending, start, longest)
            if not pending[start:end].isspace():
                yield pending[start:end]
            start = end
        pending = pending[start:]
    if pending.strip():
        yield pending


def _with_last(chunks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    for chunk in chunks:
        yield chunk, False
    yield b"", True


def _cut(text: str, start: int, longest: int) -> int:
    stop = start + longest
    for separator in ("\n\n", "\n", " "):
        found = text.rfind(separator, start + longest // 2, stop)
        if found >= 0:
            return found + len(separator)
    return stop


def records(
    path: Path, columns: Sequence[str], faults: Faults | None = None, instead: Sequence[str] = ()
) -> Iterator[Row]:
    """The records of a .jsonl, .json, .csv, .tsv or .parquet file with their locations; of Parquet only
    `columns`, or all when none is named. A record without them may have a column of `instead`.

    Raises UserError with file and line (or row): broken JSON, CSV or Parquet, not UTF-8, a missing column.
    With `faults` that skip, errors of a single record leave it out instead.
    """
    faults = faults or Faults()
    suffix = suffix_of(path)
    if suffix == ".parquet":
        yield from _parquet_rows(path, columns, instead)
        return
    if suffix in CSV_SUFFIXES:
        rows = csv_rows(path, faults, MAX_RECORD_BYTES)
    else:
        rows = json_rows(path, faults, MAX_RECORD_BYTES)
    yield from _with_columns(rows, columns, faults, instead)


def _with_columns(
    rows: Iterable[Row], columns: Sequence[str], faults: Faults, instead: Sequence[str] = ()
) -> Iterator[Row]:
    for where, row in rows:
        try:
            require_columns(row, columns, where, instead)
        except UserError as error:
            faults.met(error)
        else:
            yield where, row


def require_columns(
    row: Mapping[str, Any], columns: Sequence[str], where: str, instead: Sequence[str] = ()
) -> None:
    """Raise UserError naming the first missing column of texts, and the ones found, unless one of `instead`
    is there."""
    for column in columns:
        if column not in row and not any(name in row for name in instead):
            raise UserError(
                f"{where}: no column {column!r}; the columns found are: {columns_of(row)}{hint(row, 'text')}"
            )


def _parquet_rows(path: Path, columns: Sequence[str], instead: Sequence[str]) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            require_columns(dict.fromkeys(names, ""), columns, str(path), instead)
            there = [name for name in columns if name in names]
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=there or None):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: not a readable Parquet file (row {number + 1}): {first_line(error)}"
        ) from None


def hub_rows(
    spec: str, columns: Sequence[str], faults: Faults | None = None, instead: Sequence[str] = ()
) -> Iterator[Row]:
    """The records of a hub data set, streamed: `spec` is `owner/name[:config[:split]]` or a local folder.

    The split is "train" unless named. Raises UserError: no `datasets`, no such data set, configuration or
    split, no network, no such column (`faults` may have a record without it left out).
    """
    yield from _with_columns(_hub_rows(spec), columns, faults or Faults(), instead)


def _hub_rows(spec: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise UserError("hf: sources need the package datasets: pip install datasets") from None

    name, config, split = _split_hub_spec(spec)
    number = 0
    try:
        stream = datasets.load_dataset(name, config, split=split, streaming=True)
        for row in stream:
            number += 1
            yield f"hf:{spec} row {number}", row
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # datasets and the libraries under it raise dozens of unrelated types
        at = f" at row {number + 1}" if number else ""
        raise UserError(
            f"hf:{spec}: cannot be read{at} ({type(error).__name__}: {first_line(error)})"
        ) from None


def _split_hub_spec(spec: str) -> tuple[str, str | None, str]:
    if Path(spec).is_dir():  # a folder's name may hold colons (C:\...)
        return spec, None, "train"
    name, _, rest = spec.partition(":")
    config, _, split = rest.partition(":")
    if not name or ":" in split:
        raise UserError(f"hf:{spec} is not of the form hf:owner/name[:config[:split]][#column]")
    return name, config or None, split or "train"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else "no message"
