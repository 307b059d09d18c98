"""Records that stages learn from, read from the data stage's files or directly from the user's file.

The data stage writes `dialogues-train.jsonl`, `dialogues-validation.jsonl` and so on: one JSON object a line.
A stage that needs only one kind of records takes a single file in place of the stage: `--data mine.jsonl`, or
`--data faq.csv#prompt=Frage,completion=Antwort`. The same names then mean the two sides of that file:
`mine.jsonl/dialogues-train.jsonl` are its conversations without the held-out ones. Formats, ids and the split
are those of the data stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from chatwright.config import UserError
from chatwright.data import sources
from chatwright.data.columns import cut_columns
from chatwright.data.examples import Document
from chatwright.data.files import RECORD_SUFFIXES, TEXT_SUFFIX
from chatwright.data.reading import Faults, suffix_of
from chatwright.data.shapes import LOOKS
from chatwright.data.splitting import Side, Splitter, split_of
from chatwright.data.tally import Tally, is_left_out, is_useful
from chatwright.metrics import say

Record = TypeVar("Record")

HELD_OUT = {"text": 0.02, "dialogues": 0.02, "comparisons": 0.02, "ratings": 0.1}
"""Kind of records -> the default share that the data stage holds out."""
VERDICT, FEWEST_HELD_OUT, MOST_SHARE = 0.1, 10, 0.5
"""Of a single file of comparisons: the share that is held out, and how many prompts at least, as far as they
are no more than the last share: the fewer there are, the less their accuracy shows."""

READERS: dict[str, Callable[..., Iterable[Any]]] = {
    "text": sources.documents,
    "dialogues": sources.dialogues,
    "comparisons": sources.comparisons,
    "ratings": sources.labelled_texts,
}
"""Kind of records -> the function that reads a file of them, whatever its format."""

NAMES = {
    "text": "document",
    "dialogues": "conversation",
    "comparisons": "comparison",
    "ratings": "rated text",
}
"""Kind of records -> what one of them is called."""


def own_file(name: str) -> Path | None:
    """The single file of records (.jsonl, .json, .csv, .tsv, .parquet, .txt) that a setting names, perhaps
    with columns behind a `#`; None when it names something else. Raises UserError for wrong columns."""
    path = Path(cut_columns(name)[0])
    return path if suffix_of(path) in (*RECORD_SUFFIXES, TEXT_SUFFIX) and path.is_file() else None


def is_record_file(name: str) -> bool:
    """Whether a setting names a single file of records and not a directory. Raises UserError."""
    return own_file(name) is not None


def records_of(place: Path) -> Path:
    """The folder of record files in a data stage's directory; or the directory itself, or the single file."""
    return place / "records" if (place / "records").is_dir() else place


def has_records(file: Path) -> bool:
    """Whether the file exists, or is one side of a single file."""
    return file.is_file() or is_record_file(str(file.parent))


def of_kind(file: str, kind: str) -> Iterator[Any]:
    """The records of the user's file. Raises UserError; for records of another kind it says how several kinds
    are put together."""
    try:
        yield from READERS[kind]([file])
    except UserError as error:
        if LOOKS not in str(error):
            raise
        raise UserError(
            f"{error}; wanted here is a file of {NAMES[kind]}s. Where a stage needs several kinds, the data "
            "stage puts them together, as in: chatwright data --dialogues FILE --ratings FILE"
        ) from None


def share_of(file: str, kind: str) -> float:
    """The share of the user's file that is held out. A few comparisons are counted, as far as their number
    decides. Raises UserError: a broken record."""
    if kind != "comparisons":
        return HELD_OUT[kind]
    prompts: set[str] = set()
    for record in of_kind(file, kind):
        if not is_left_out(record):
            prompts.add(record.id)
        if len(prompts) * VERDICT >= FEWEST_HELD_OUT:
            return VERDICT
    return min(MOST_SHARE, FEWEST_HELD_OUT / max(1, len(prompts)))


def changes_of(file: str, kind: str, share: float) -> Mapping[str, Side]:
    """Which records of the user's file change sides so that there are some on both (splitting.py). Reads only
    as far as that is open. Raises UserError: a broken record, or nothing that could be held out."""
    splitter, total = Splitter(share), 0
    for record in of_kind(file, kind):
        if is_left_out(record):
            continue
        total += 1
        splitter.side(record.id, useful=is_useful(record))
        if splitter.both:
            return {}
    if not splitter.can_split:
        raise UserError(f"{file}: {too_few(kind, total)}")
    return splitter.changes()


def too_few(kind: str, total: int) -> str:
    """The end of the error for data of which nothing can be held out: `total` records, all with one id."""
    name = NAMES[kind]
    if not total and kind == "dialogues":
        found = "all answers in it are marked as not to be learnt"
    elif not total:
        found = "the answers of each comparison in it are the same text"
    elif total == 1:
        found = f"it holds one {name} only"
    elif kind == "comparisons":
        found = f"its {total} comparisons have one prompt between them, and a prompt is held out as a whole"
    else:
        found = f"its {total} {name}s are one and the same"
    return f"{found}; one must be held out to measure on, and one left to learn from: add more" + (
        " text (a .txt file of some lines is enough)" if kind == "text" else ""
    )


def side_of_file(file: str, kind: str, side: str) -> Iterator[Any]:
    """One side, train or validation, of the records in the user's file. What is odd about them is said once,
    when the training side has been read. Raises UserError for a broken record, or when nothing can be held
    out."""
    share = share_of(file, kind)
    changes, tally, faults = changes_of(file, kind, share), Tally(), Faults()
    for record in READERS[kind]([file], faults=faults):
        if tally.keep(record) and changes.get(record.id, split_of(record.id, share)) == side:
            yield record
    for told in filter(None, (tally.line(), faults.wanted_line())) if side == "train" else ():
        say(f"  {file}: {told}")


def read_records(file: Path, kind: type[Record]) -> Iterator[Record]:
    """The records of a file that the data stage wrote, or of one side of the user's own file.

    Raises UserError when it is missing or damaged.
    """
    if is_record_file(str(file.parent)):
        name, _, side = file.stem.rpartition("-")
        yield from side_of_file(str(file.parent), name or "text", side)
        return
    try:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                yield kind.from_json(line)  # type: ignore[attr-defined]
    except FileNotFoundError:
        setting = setting_for(file)
        raise UserError(
            f"{file} does not exist; the data stage writes it where its setting `{setting}` names a source: "
            f"chatwright data --{setting} FILE. A single file of your own is named as such, not its folder"
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
