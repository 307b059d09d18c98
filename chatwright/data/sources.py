"""Sources of records: named data sets, the user's files, the hub.

A source is written as one of
    boolq                                    a name of catalogue.py
    notes/  book.txt  chats.jsonl#turns      a file or a folder; `#column` in place of the usual column
    faq.csv#prompt=Frage,completion=Antwort  several columns with other names (columns.py)
    hf:owner/name:config:split#column        a hub data set (all but the name optional), or hf:./folder
and several of them as a comma list or a sequence. Columns looked for in records: `text` for documents (or a
conversation, whose transcript is the text); for dialogues, comparisons and ratings those of the formats that
formats.py and preferences.py know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from chatwright.config import UserError, near_match
from chatwright.data import formats, preferences
from chatwright.data.archives import Progress, fetch
from chatwright.data.catalogue import Kind, Source, catalogue, find, names
from chatwright.data.columns import Columns, cut_columns, split_at_commas
from chatwright.data.examples import Comparison, Dialogue, Document, LabelledText, transcript
from chatwright.data.files import (
    RECORD_SUFFIXES,
    TEXT_SUFFIX,
    find_files,
    hub_rows,
    piece_chars,
    records,
    text_pieces,
)
from chatwright.data.reading import Faults, Row, suffix_of
from chatwright.data.shapes import LISTS, columns_of, hint

Specs = str | Sequence[str]


class _Identified(Protocol):
    @property
    def id(self) -> str: ...


Record = TypeVar("Record", bound=_Identified)


def documents(
    specs: Specs, *, faults: Faults | None = None, cache: Path | None = None, progress: Progress | None = None
) -> Iterator[Document]:
    """The documents of one or more sources (see the module), in a fixed order.

    Passages that a named source repeats appear once; the user's own data is taken as it is, without empty
    texts. A .txt file longer than `files.piece_chars` is several documents; `faults` counts them. Names are
    looked up, folders listed and archives fetched at the call; reading begins with the first item. Raises
    UserError: unknown source, unreadable or broken data (with file and line; `faults` may have single records
    left out), nothing to read.
    """
    return _chain(
        [(spec, _documents_of(spec, faults, cache, progress)) for spec in split_specs(specs)], faults
    )


def dialogues(
    specs: Specs,
    *,
    format: formats.Format = "auto",
    faults: Faults | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Iterator[Dialogue]:
    """The dialogues of one or more sources, in a fixed order. Raises UserError as `documents` does."""
    return _chain(
        [(spec, _dialogues_of(spec, format, faults, cache, progress)) for spec in split_specs(specs)], faults
    )


def labelled_texts(
    specs: Specs, *, faults: Faults | None = None, cache: Path | None = None, progress: Progress | None = None
) -> Iterator[LabelledText]:
    """The labelled texts of one or more sources, in a fixed order. Raises UserError as `documents` does."""
    return _chain(
        [(spec, _labelled_of(spec, faults, cache, progress)) for spec in split_specs(specs)], faults
    )


def comparisons(
    specs: Specs, *, format: preferences.PreferenceFormat = "auto", faults: Faults | None = None
) -> Iterator[Comparison]:
    """The comparisons of the user's files or of hub data sets, in a fixed order. Raises UserError as
    `documents` does."""
    listed = split_specs(specs)
    for spec in listed:
        if (source := find(spec)) is not None:
            raise _wrong_kind(source, "comparison")

    def make(row: Mapping[str, Any], column: str) -> Comparison:
        if column:
            raise ValueError(
                f"#{column} names one column, but a comparison has several: "
                "FILE#prompt=COLUMN,chosen=COLUMN,rejected=COLUMN"
            )
        return preferences.comparison(row, format)

    return _chain([(spec, _own_records(spec, make, faults)) for spec in listed], faults)


def fetch_archives(
    specs: Specs, *, cache: Path | None = None, progress: Progress | None = None
) -> list[Path]:
    """Download the archives of the named sources, each once, and return the files.

    Reading these sources then needs no network. Raises UserError.
    """
    named = [source for spec in split_specs(specs) if (source := find(spec)) is not None]
    known = dict.fromkeys(source.archive for source in named if source.archive is not None)
    return [fetch(archive, cache, progress) for archive in known]


def split_specs(specs: Specs) -> list[str]:
    """One or more sources as a list: a string is cut at its commas unless it is an existing path. Raises
    UserError.
    """
    if isinstance(specs, str):
        specs = [specs] if Path(specs).exists() else split_at_commas(specs)
    listed = [spec.strip() for spec in specs if spec.strip()]
    if not listed:
        raise UserError(f"no data source given; the named ones are: {', '.join(names())}")
    return listed


def _documents_of(
    spec: str, faults: Faults | None, cache: Path | None, progress: Progress | None
) -> Iterator[Document]:
    source = find(spec)
    if source is None:
        return _own_documents(spec, faults)
    if source.text is not None:
        texts = source.text(source.fetch(cache, progress))
        return _unique(Document.of(text.strip()) for text in texts if text.strip())
    if source.dialogue is not None:
        chats = _unique(Dialogue.of(messages) for messages in source.dialogue(source.fetch(cache, progress)))
        return (Document(chat.id, transcript(chat.messages)) for chat in chats)
    raise _wrong_kind(source, "text")


def _dialogues_of(
    spec: str, format: formats.Format, faults: Faults | None, cache: Path | None, progress: Progress | None
) -> Iterator[Dialogue]:
    source = find(spec)
    if source is None:
        faults = faults or Faults()

        def make(row: Mapping[str, Any], column: str) -> Dialogue:
            made = formats.dialogue(row, format, column)
            faults.wanted += formats.wanted_of_others(row)
            return made

        return _own_records(spec, make, faults)
    if source.dialogue is None:
        raise _wrong_kind(source, "dialogue")
    return _unique(Dialogue.of(messages) for messages in source.dialogue(source.fetch(cache, progress)))


def _labelled_of(
    spec: str, faults: Faults | None, cache: Path | None, progress: Progress | None
) -> Iterator[LabelledText]:
    source = find(spec)
    if source is None:
        return _own_records(spec, preferences.rated_text, faults)
    if source.labelled is None:
        raise _wrong_kind(source, "labelled")
    rated = source.labelled(source.fetch(cache, progress))
    return _unique(LabelledText.of(text, label) for text, label in rated)


def _own_documents(spec: str, faults: Faults | None) -> Iterator[Document]:
    faults = faults or Faults()
    if spec.startswith("hf:"):
        name, columns = cut_columns(spec.removeprefix("hf:"))
        stream = partial(hub_rows, name, faults=faults, instead=() if columns else LISTS)
        return _texts(stream, columns, faults)
    path, columns = path_and_columns(spec)
    listed = find_files(path, (TEXT_SUFFIX, *RECORD_SUFFIXES))
    longest = piece_chars(listed)

    def read() -> Iterator[Document]:
        for file in listed:
            if suffix_of(file) == TEXT_SUFFIX:
                yield from _pieces(file, longest, faults)
            else:
                rows = partial(records, file, faults=faults, instead=() if columns else LISTS)
                yield from _texts(rows, columns, faults)

    return read()


def _pieces(file: Path, longest: int, faults: Faults) -> Iterator[Document]:
    """The documents of a .txt file; counts them."""
    faults.text_files, faults.longest = faults.text_files + 1, max(faults.longest, longest)
    for piece in text_pieces(file, longest):
        faults.pieces += 1
        yield Document.of(piece.strip())


def _texts(
    rows: Callable[[Sequence[str]], Iterator[Row]], columns: Columns, faults: Faults
) -> Iterator[Document]:
    """Documents from records: the texts of a column, or transcripts of conversations."""
    wanted = columns.names.get("text", columns.single or "text")
    make = partial(_document_or_none, faults=faults)
    if columns.names and "text" not in columns.names:  # a conversation with other names of columns
        return _make(columns.renamed(rows(()), faults), "text", make, faults)
    return _make(rows((wanted,)), wanted, make, faults)


def _document_or_none(row: Mapping[str, Any], column: str, faults: Faults) -> Document | None:
    """An empty text is left out rather than refused: it is common in scraped data, and teaches nothing. Where
    there is no text but a conversation, its transcript is the text, without answers that are marked as not to
    be learnt; the id is that of the whole, so that it is on the same side of the split."""
    if row.get(column) is None and any(row.get(name) is not None for name in LISTS):
        chat = formats.dialogue(row)
        faults.unlearnt += len(chat.unlearnt)
        learnt = [one for number, one in enumerate(chat.messages) if number not in chat.unlearnt]
        text = transcript(learnt)
        return Document(chat.id, text) if text.strip() else None
    if column not in row:
        raise ValueError(f"no column {column!r}; the columns found are: {columns_of(row)}{hint(row, 'text')}")
    text = row[column]
    return None if isinstance(text, str) and not text.strip() else Document.of(text)


Make = Callable[[Mapping[str, Any], str], Record | None]
"""Makes one of our records from the columns of another; the second argument is the column that the user
named, "" if none."""


def _own_records(spec: str, make: Make[Record], faults: Faults | None = None) -> Iterator[Record]:
    """Records of the user's files or of the hub."""
    faults = faults or Faults()
    if spec.startswith("hf:"):
        name, columns = cut_columns(spec.removeprefix("hf:"))
        rows = hub_rows(name, (), faults)
    else:
        path, columns = path_and_columns(spec)
        listed = find_files(path, RECORD_SUFFIXES)
        rows = (row for file in listed for row in records(file, (), faults))
    if columns.names:
        rows = columns.renamed(rows, faults)
    return _make(rows, columns.single, make, faults)


def _make(rows: Iterable[Row], column: str, make: Make[Record], faults: Faults) -> Iterator[Record]:
    for where, row in rows:
        try:
            record = make(row, column)
        except ValueError as error:
            faults.met(UserError(f"{where}: {error}"))
            continue
        if record is not None:
            yield record


def _unique(found: Iterable[Record]) -> Iterator[Record]:
    """The first record of every id. Only for named sources, whose ids are known to fit into memory."""
    seen = set()
    for record in found:
        if record.id not in seen:
            seen.add(record.id)
            yield record


def _chain(plans: Iterable[tuple[str, Iterator[Record]]], faults: Faults | None) -> Iterator[Record]:
    for spec, found in plans:
        empty, before = True, faults.count if faults else 0
        for record in found:
            empty = False
            yield record
        if empty and faults is not None and faults.count > before:
            raise UserError(
                f"{spec}: none of its {faults.count - before:,} records can be used; the first: "
                f"{faults.first}"
            )
        if empty:
            raise UserError(f"{spec}: nothing to read in it (no record with any text)")


def path_and_columns(spec: str) -> tuple[Path, Columns]:
    """The existing file or folder, and the columns named behind a `#`. Raises UserError."""
    name, columns = cut_columns(spec)
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(
            f"{name!r} is neither a file or folder nor a named data source{near_match(name, names())} "
            "(`chatwright data list` describes them; hf:owner/name reads from the Hugging Face hub)"
        )
    return path, columns


def _wrong_kind(source: Source, kind: Kind) -> UserError:
    others = ", ".join(other.name for other in catalogue() if kind in other.kinds)
    return UserError(
        f"{source.name} holds {' and '.join(source.kinds)} records, not {kind}; named sources that do: "
        f"{others or 'none (give a file, a folder or hf:owner/name)'}"
    )
