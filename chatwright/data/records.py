"""Records that stages learn from, read from the data stage's files or directly from the user's file.

The data stage writes `dialogues-train.jsonl`, `dialogues-validation.jsonl` and so on: one JSON object a line.
A stage that needs only one kind of records takes a single file in place of the stage: `--data mine.jsonl`.
The same names then mean the two sides of that file: `mine.jsonl/dialogues-train.jsonl` are its conversations
without the held-out ones. Formats, ids and the split are those of the data stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from chatwright.config import UserError
from chatwright.data import sources
from chatwright.data.examples import Document
from chatwright.data.files import RECORD_SUFFIXES

Record = TypeVar("Record")

HELD_OUT = {"dialogues": 0.02, "comparisons": 0.02, "ratings": 0.1}
"""Kind of records -> the default share that is held out."""

READERS: dict[str, Callable[[str], Iterable[Any]]] = {
    "dialogues": sources.dialogues,
    "comparisons": sources.comparisons,
    "ratings": sources.labelled_texts,
}
"""Kind of records -> the function that reads a file of them, whatever its format."""


def is_record_file(name: str) -> bool:
    """Whether a setting names a single file of records (.jsonl, .json, .parquet) and not a directory."""
    path = Path(name)
    return path.suffix.lower() in RECORD_SUFFIXES and path.is_file()


def records_of(place: Path) -> Path:
    """The folder of record files in a data stage's directory; or the directory itself, or the single file."""
    return place / "records" if (place / "records").is_dir() else place


def has_records(file: Path) -> bool:
    """Whether the file exists, or is one side of a single file."""
    return file.is_file() or file.parent.is_file()


def side_of_file(file: Path, kind: str, side: str) -> Iterator[Any]:
    """One side, train or validation, of the records in the user's file. Raises UserError for a broken record,
    or when there is no record on this side."""
    total = kept = 0
    for record in READERS[kind](str(file)):
        total += 1
        if sources.split_of(record.id, HELD_OUT[kind]) == side:
            kept += 1
            yield record
    if not kept:
        lacking = "held out" if side == "validation" else "left to train on"
        emptied = " ".join(f"--{name} ''" for name in ("text", "dialogues", "ratings") if name != kind)
        share = "ratings_validation" if kind == "ratings" else "validation"
        raise UserError(
            f"{file}: of its {total} {kind} none is {lacking} ({100 * HELD_OUT[kind]:.0f} % are held out, by "
            f"a hash of their content); add more, or choose the share: chatwright data {emptied} --{kind} "
            f"{file} --{share} 0.2"
        )


def read_records(file: Path, kind: type[Record]) -> Iterator[Record]:
    """The records of a file that the data stage wrote, or of one side of the user's own file.

    Raises UserError when it is missing or damaged.
    """
    if file.parent.is_file():
        name, _, side = file.stem.rpartition("-")
        if name not in READERS:
            raise UserError(
                f"{file.parent} is a single file; documents come from the data stage: --path {file.parent}"
            )
        yield from side_of_file(file.parent, name, side)
        return
    try:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                yield kind.from_json(line)  # type: ignore[attr-defined]
    except FileNotFoundError:
        raise UserError(
            f"{file} does not exist; the data stage writes it where its setting `{setting_for(file)}` names "
            "a source"
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(f"{file} is damaged: {error}") from None


def setting_for(file: Path) -> str:
    """The setting of the data stage that names the source of a file of records."""
    return file.stem.rpartition("-")[0] or "text"


def read_texts(file: Path, limit: int = 0) -> Iterator[str]:
    """The texts of a file of documents; with `limit` above 0, only until they add up to `limit` bytes."""
    taken = 0
    for document in read_records(file, Document):
        yield document.text
        taken += len(document.text.encode("utf-8"))
        if 0 < limit <= taken:
            return
