"""`chatwright data preview FILE`: what a source is read as, how much there is, and its first records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from chatwright.config import UsageError, UserError, parse
from chatwright.data import sources
from chatwright.data.catalogue import find
from chatwright.data.columns import cut_columns
from chatwright.data.examples import Comparison, Dialogue, Document, LabelledText
from chatwright.data.files import RECORD_SUFFIXES, TEXT_SUFFIX, find_files, hub_rows, records
from chatwright.data.formats import Format
from chatwright.data.preferences import PreferenceFormat
from chatwright.data.reading import Faults, Row, suffix_of
from chatwright.data.records import HELD_OUT, NAMES, too_few
from chatwright.data.shapes import Shape, shape_of
from chatwright.data.splitting import Splitter
from chatwright.data.tally import Tally, is_useful
from chatwright.messages import described
from chatwright.metrics import say

EXCERPT = 300
"""Characters of a text that are shown."""


@dataclass(frozen=True)
class Config:
    """Settings of `chatwright data preview`."""

    count: int = 3
    """Number of records to show."""
    kind: Literal["auto", "text", "dialogues", "ratings", "comparisons"] = "auto"
    """The setting of the data stage that is to read it; auto: by the columns of its first record."""
    dialogue_format: Format = "auto"
    """How conversations are written; auto: by each record's columns."""
    comparison_format: PreferenceFormat = "auto"
    """How comparisons are written; auto: by each record's columns."""

    def __post_init__(self) -> None:
        if self.count < 0:
            raise UsageError(f"count {self.count} must be at least 0")


def main(argv: Sequence[str]) -> int:
    """Read a source as the data stage would, and say what was found. Nothing is written. Raises UserError."""
    config, found = parse(
        Config,
        argv,
        prog="chatwright data preview",
        description="What a file, a folder or hf:owner/name is read as, and its first records as they will "
        "be learnt. Nothing is written.",
        positionals={"source": "A file, a folder or hf:owner/name, perhaps with #columns."},
    )
    spec = str(found["source"])
    row = first_row(spec)
    kind = config.kind if config.kind != "auto" else kind_of(spec, row)
    for line in described_source(spec, row, kind):
        say(line)
    preview(spec, kind, config)
    return 0


def first_row(spec: str) -> Mapping[str, Any] | None:
    """The columns of the first record of a source, with the names that the user gave them; None for a text
    file or a named source. Raises UserError."""
    if find(spec) is not None:
        return None
    name, columns = cut_columns(spec.removeprefix("hf:"))
    faults = Faults(skip=True)
    rows: Iterator[Row]
    if spec.startswith("hf:"):
        rows = hub_rows(name, ())
    else:
        path, _ = sources.path_and_columns(spec)
        listed = find_files(path, (TEXT_SUFFIX, *RECORD_SUFFIXES))
        if suffix_of(listed[0]) == TEXT_SUFFIX:
            return None
        rows = records(listed[0], (), faults)
    rows = columns.renamed(rows, Faults()) if columns.names else rows
    row = next((row for _, row in rows), None)
    if row is None:
        raise UserError(faults.first or f"{spec}: nothing to read in it (no record)")
    return row


def kind_of(spec: str, row: Mapping[str, Any] | None) -> str:
    """The setting that reads a source. Raises UserError when its columns do not tell."""
    if row is None:
        source = find(spec)
        if source is None:
            return "text"
        return {"dialogue": "dialogues", "labelled": "ratings"}.get(source.kinds[-1], "text")
    shape = shape_of(row)
    columns = cut_columns(spec.removeprefix("hf:"))[1]
    if shape is not None and shape.reads:
        return shape.reads
    if columns.single:
        return "text" if isinstance(row.get(columns.single), str) else "dialogues"
    looks = f"it looks like {shape.name}, which no setting reads" if shape else "its columns tell no kind"
    raise UserError(
        f"{spec}: {looks}; the columns found are: {', '.join(map(str, row))}. Name the kind (--kind "
        "dialogues), or columns: FILE#prompt=COLUMN,completion=COLUMN"
    )


def described_source(spec: str, row: Mapping[str, Any] | None, kind: str) -> Iterator[str]:
    """What the source is read as, in lines."""
    yield f"{spec}: read as {kind} (chatwright data --{kind} {spec})"
    if row is None:
        return
    shape: Shape | None = shape_of(row)
    by = shape.found(row) if shape is not None else []
    if shape is not None:
        yield f"  {shape.name}, by the columns {', '.join(by)} of the first record"
    others = [str(name) for name in row if name not in by]
    if others:
        yield f"  other columns: {', '.join(others)}"


def preview(spec: str, kind: str, config: Config) -> None:
    """Show the first records, and count all of them. Raises UserError when none can be used."""
    readers: dict[str, Callable[..., Iterable[Any]]] = {
        "text": sources.documents,
        "dialogues": partial(sources.dialogues, format=config.dialogue_format),
        "ratings": sources.labelled_texts,
        "comparisons": partial(sources.comparisons, format=config.comparison_format),
    }
    faults, tally, splitter = Faults(skip=True), Tally(), Splitter(HELD_OUT[kind])
    held_out = 0
    for record in readers[kind]([spec], faults=faults):
        if tally.keep(record):
            held_out += splitter.side(record.id, useful=is_useful(record)) == "validation"
            if tally.records <= config.count:
                show(record, tally.records)
    say("")
    changes = splitter.changes()
    held_out += "validation" in changes.values()
    noun = NAMES[kind] + ("s" if tally.records != 1 else "")
    say(f"{tally.records:,} {noun}, of which about {held_out:,} would be held out")
    for line in filter(None, (faults.cut_line(), tally.line(), faults.wanted_line())):
        say(f"  {line}")
    if faults.count:
        say(f"  {faults.count:,} that cannot be used; the first: {faults.first}")
    if not splitter.can_split:
        say(f"  the data stage would refuse it: {too_few(kind, tally.records)}")


def show(record: Any, number: int) -> None:
    """Print a record; what a model learns to say stands in [[ ]]."""
    say(f"\n{number}.")
    for label, text in shown(record):
        lines = text.splitlines() or [""]
        say(f"  {label}: " + "\n    ".join(lines))


def shown(record: Any) -> Iterator[tuple[str, str]]:
    """The parts of a record, each with its name."""
    if isinstance(record, Document):
        yield "text", f"[[{cut(record.text)}]]"
    elif isinstance(record, Dialogue):
        learnt = set(record.answers)
        for number, message in enumerate(record.messages):
            text, role = cut(described(message["content"])), message["role"]
            marked = " (marked as not to be learnt)" if number in record.unlearnt else ""
            yield f"{role}{marked}", f"[[{text}]]" if number in learnt else text
    elif isinstance(record, LabelledText):
        yield f"rated {record.label:g}", cut(record.text)
    elif isinstance(record, Comparison):
        for message in record.prompt:
            yield message["role"], cut(described(message["content"]))
        order = sorted(range(len(record.scores)), key=lambda n: -record.scores[n])
        for n in order:
            yield f"answer with score {record.scores[n]:g}", cut(record.responses[n])


def cut(text: str) -> str:
    """The beginning of a text."""
    text = text.strip()
    return text if len(text) <= EXCERPT else f"{text[:EXCERPT]} ... ({len(text):,} characters)"
