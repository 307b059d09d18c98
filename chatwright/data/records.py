"""The files of records that the data stage writes, read back: one JSON object a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from chatwright.config import UserError
from chatwright.data.examples import Document

Record = TypeVar("Record")


def records_of(directory: Path) -> Path:
    """The folder of record files in a data stage's directory, or the directory itself."""
    return directory / "records" if (directory / "records").is_dir() else directory


def read_records(file: Path, kind: type[Record]) -> Iterator[Record]:
    """The records of a file that the data stage wrote. Raises UserError when missing or damaged."""
    try:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                yield kind.from_json(line)  # type: ignore[attr-defined]
    except FileNotFoundError:
        raise UserError(
            f"{file} does not exist; the data stage writes it (its settings name the sources)"
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(f"{file} is damaged: {error}") from None


def read_texts(file: Path, limit: int = 0) -> Iterator[str]:
    """The texts of a file of documents; when `limit` is above 0, texts of at least `limit` bytes, then no
    more."""
    taken = 0
    for document in read_records(file, Document):
        yield document.text
        taken += len(document.text.encode("utf-8"))
        if 0 < limit <= taken:
            return
