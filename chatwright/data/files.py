"""The user's own data: .txt, .jsonl, .json and .parquet files, folders of them, and hub data sets.

Everything is streamed: memory is bounded by one piece of text, one JSON line (`MAX_RECORD_BYTES`) or one
batch of Parquet rows. Only a `.json` file (a list of objects) has to be read whole, and is refused above the
same bound.
"""

from __future__ import annotations

import codecs
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatwright.config import UserError

RECORD_SUFFIXES = (".jsonl", ".json", ".parquet")
TEXT_SUFFIX = ".txt"
PIECE_CHARS = 8192
"""A longer .txt file becomes several documents, so that a single book still has both a training and a
held-out part.
"""
MAX_RECORD_BYTES = 256 << 20
READ_BYTES = 1 << 20
PARQUET_ROWS = 1024

Row = tuple[str, Mapping[str, Any]]
"""The record's location ("file.jsonl:12"), and its columns."""


@dataclass
class Faults:
    """How unusable records are handled: the error is raised, or the record is left out and counted."""

    skip: bool = False
    count: int = 0
    """Records that were left out."""
    first: str = ""
    """The error of the first of them, with its location."""

    def met(self, error: UserError) -> None:
        """Raise the error, or count it."""
        if not self.skip:
            raise error
        self.count += 1
        self.first = self.first or str(error)


def find_files(path: Path, suffixes: Sequence[str]) -> list[Path]:
    """The file itself, or the files with these suffixes below a folder, sorted by path; hidden ones are
    skipped.

    Raises UserError: not there, another suffix, or a folder with no such file.
    """
    wanted = ", ".join(suffixes)
    if path.is_file():
        if path.suffix.lower() not in suffixes:
            raise UserError(f"{path} is not one of the kinds that can be read here: {wanted}")
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
            if file.suffix.lower() in suffixes:
                found.append(file)
            else:
                others.add(file.suffix.lower() or name)
    if not found:
        seen = f"; it has {', '.join(sorted(others)[:8])}" if others else "; it is empty"
        raise UserError(f"{path} holds no file of the kinds {wanted}{seen}")
    return sorted(found, key=lambda file: file.relative_to(path).as_posix())


def text_pieces(path: Path) -> Iterator[str]:
    """A UTF-8 .txt file in pieces of at most `PIECE_CHARS` characters (see `pieces`). Raises UserError."""

    def chunks() -> Iterator[bytes]:
        with _open(path) as file:
            while chunk := file.read(READ_BYTES):
                yield chunk

    return pieces(chunks(), str(path))


def pieces(chunks: Iterable[bytes], where: str) -> Iterator[str]:
    """UTF-8 bytes as pieces of text, cut after a blank line, else after a line, else after a space, else
    anywhere.

    The pieces joined are the text (line ends made \\n, a byte order mark taken off), and do not depend on how
    the bytes are chunked. Pieces of white space only are left out. Raises UserError naming the first byte
    that is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    pending, offset, first = "", 0, True
    for chunk, final in _with_last(chunks):
        held = len(decoder.getstate()[0])  # bytes of a character that the chunk before ended in
        try:
            text = newlines.decode(decoder.decode(chunk, final), final)
        except UnicodeDecodeError as error:
            raise _not_utf8(where, offset - held + error.start, error.object[error.start]) from None
        offset += len(chunk)
        if first and text:
            text, first = text.removeprefix("\ufeff"), False
        pending += text
        start = 0
        while len(pending) - start > PIECE_CHARS:
            end = _cut(pending, start)
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


def _cut(text: str, start: int) -> int:
    stop = start + PIECE_CHARS
    for separator in ("\n\n", "\n", " "):
        found = text.rfind(separator, start + PIECE_CHARS // 2, stop)
        if found >= 0:
            return found + len(separator)
    return stop


def records(path: Path, columns: Sequence[str], faults: Faults | None = None) -> Iterator[Row]:
    """The records of a .jsonl, .json or .parquet file with their locations; of Parquet only `columns`, or all
    when none is named.

    Raises UserError with file and line (or row): broken JSON or Parquet, not UTF-8, a missing column. With
    `faults` that skip, errors of a single record leave it out instead.
    """
    faults = faults or Faults()
    suffix = path.suffix.lower()
    rows = {".jsonl": _jsonl_rows, ".json": _json_rows}.get(suffix)
    if rows is None:
        yield from _parquet_rows(path, columns)
        return
    yield from _with_columns(rows(path, faults), columns, faults)


def _with_columns(rows: Iterable[Row], columns: Sequence[str], faults: Faults) -> Iterator[Row]:
    for where, row in rows:
        try:
            require_columns(row, columns, where)
        except UserError as error:
            faults.met(error)
        else:
            yield where, row


def require_columns(row: Mapping[str, Any] | Sequence[str], columns: Sequence[str], where: str) -> None:
    """Raise UserError naming the first missing column and the ones found."""
    for column in columns:
        if column not in row:
            found = ", ".join(map(str, row)) or "none"
            raise UserError(f"{where}: no column {column!r}; the columns found are: {found}")


def _jsonl_rows(path: Path, faults: Faults) -> Iterator[Row]:
    offset = 0
    with _open(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_RECORD_BYTES + 1), b""), start=1):
            where = f"{path}:{number}"
            if len(line) > MAX_RECORD_BYTES:
                raise UserError(
                    f"{where}: a line of more than {MAX_RECORD_BYTES >> 20} MiB; one record a line, please"
                )
            start, offset = offset, offset + len(line)
            try:
                text = _decode(line, path, start)
                row = _parse_object(text, where) if text.strip() else None
            except UserError as error:
                faults.met(error)
                continue
            if row is not None:
                yield where, row


def _json_rows(path: Path, faults: Faults) -> Iterator[Row]:
    with _open(path) as file:
        data = file.read(MAX_RECORD_BYTES + 1)
    if len(data) > MAX_RECORD_BYTES:
        raise UserError(
            f"{path}: over {MAX_RECORD_BYTES >> 20} MiB; write it as .jsonl (one object a line) to stream it"
        )
    listed = _parse_json(_decode(data, path, 0), str(path))
    if not isinstance(listed, list):
        raise UserError(f"{path}: expected a list of objects; for one object a line use the suffix .jsonl")
    for number, row in enumerate(listed, start=1):
        if isinstance(row, dict):
            yield f"{path}: item {number}", row
        else:
            faults.met(UserError(f"{path}: item {number} is not an object but {type(row).__name__}"))


def _parse_object(text: str, where: str) -> dict[str, Any]:
    row = _parse_json(text, where)
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number with thousands of digits; thousands of brackets
        raise UserError(f"{where}: JSON that cannot be read: {error}") from None


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            require_columns(file.schema_arrow.names, columns, str(path))
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=list(columns) or None):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: not a readable Parquet file (row {number + 1}): {first_line(error)}"
        ) from None


def hub_rows(spec: str, columns: Sequence[str], faults: Faults | None = None) -> Iterator[Row]:
    """The records of a hub data set, streamed: `spec` is `owner/name[:config[:split]]` or a local folder.

    The split is "train" unless named. Raises UserError: no `datasets`, no such data set, configuration or
    split, no network, no such column (`faults` may have a record without it left out).
    """
    yield from _with_columns(_hub_rows(spec), columns, faults or Faults())


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


def _open(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        bom = 3 if offset == 0 and data.startswith(codecs.BOM_UTF8) else 0  # error.start does not count it
        raise _not_utf8(str(path), offset + bom + error.start, error.object[error.start]) from None


def _not_utf8(where: str, offset: int, byte: int) -> UserError:
    return UserError(
        f"{where} is not UTF-8: byte 0x{byte:02x} at offset {offset}; convert it, for example: iconv -f "
        "WINDOWS-1252 -t UTF-8 FILE > NEW (or -f UTF-16, or whatever it was written in)"
    )
