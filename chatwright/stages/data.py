"""Data: sources -> files of records; a hash of a record decides whether it is held out.

* `train.jsonl` and `validation.jsonl`: documents to learn the language from.
* `dialogues-*.jsonl`: conversations.
* `ratings-*.jsonl`: texts, each with the number that people gave it.
* `comparisons-*.jsonl`: prompts with answers that people ranked; a prompt is in one of the two files only.

data/formats.py and data/preferences.py read the formats of other data sets. No stage trains on records that
are held out here: a conversation has the same id as a document and as a dialogue.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from chatwright.config import UsageError, UserError
from chatwright.data import sources
from chatwright.data.catalogue import find, names
from chatwright.data.formats import Format
from chatwright.data.preferences import PreferenceFormat
from chatwright.data.preview import main as show_preview
from chatwright.data.reading import Faults
from chatwright.data.records import too_few
from chatwright.data.splitting import Side, Splitter
from chatwright.data.tally import Tally, is_useful
from chatwright.files import whole_directory
from chatwright.metrics import console, progress_bar, say
from chatwright.train.api import Measure, Report, Stage, Workspace

AUTO = "auto"
BUILT_IN = {
    "text": "boolq,quac,narrativeqa,chitchat",
    "dialogues": "chitchat",
    "ratings": "vader-movies,vader-tweets",
    "comparisons": "",
}
"""Setting -> the sources that it takes where no setting names any."""


@dataclass(frozen=True)
class Config:
    """What to learn from. Sources: a name of `chatwright data list`, a file, a directory, or hf:owner/name.
    What is named is all that is read; where nothing is named, the built-in data."""

    text: str = AUTO
    """Documents for the tokenizer and for pre-training, comma-separated; empty for none. auto: none where
    another setting names a source, else boolq,quac,narrativeqa,chitchat."""
    path: str = ""
    """Your own text instead: a file or a directory of .txt, .jsonl, .csv, .parquet (column `text`)."""
    dialogues: str = AUTO
    """Conversations for SFT and for the prompts of PPO; empty for none. auto: none where another setting
    names a source, else chitchat."""
    dialogue_format: Format = "auto"
    """How your own conversations are written; auto: by each record's columns (docs/reference/formats.md)."""
    ratings: str = AUTO
    """Texts with human ratings for the reward model; empty for none. auto: none where another setting names a
    source, else vader-movies,vader-tweets."""
    comparisons: str = ""
    """Completions that people ranked, for the reward model (its `comparisons` then names this stage); empty
    for none."""
    comparison_format: PreferenceFormat = "auto"
    """How your own comparisons are written; auto: by each record's columns (docs/reference/formats.md)."""
    broken: Literal["refuse", "skip"] = "refuse"
    """What happens at a record that cannot be used: the stage ends and names it, or it is left out and
    counted."""
    validation: float = 0.02
    """Share of documents, dialogues and prompts of comparisons that is held out; at least one of each is."""
    ratings_validation: float = 0.1
    """Share of rated texts that is held out (they are few); at least one is."""


def sources_of(config: Config) -> dict[str, str]:
    """The sources that each setting names; the built-in ones where no setting names any."""
    given = {kind: getattr(config, kind) for kind in BUILT_IN} | (
        {"text": config.path} if config.path else {}
    )
    named = any(spec not in ("", AUTO) for spec in given.values())
    built_in = dict.fromkeys(BUILT_IN, "") if named else BUILT_IN
    return {kind: built_in[kind] if spec == AUTO else spec for kind, spec in given.items()}


class Record(Protocol):
    """Anything with an id that can be written as a line."""

    @property
    def id(self) -> str:
        """Content id."""

    def to_json(self) -> str:
        """One line."""


@dataclass
class Count:
    """Number and size of the records on one side of a split."""

    records: int = 0
    bytes: int = 0

    def add(self, line: str) -> None:
        """Count a line."""
        self.records += 1
        self.bytes += len(line.encode("utf-8"))


@dataclass
class Written:
    """The two files of one kind of records."""

    counts: dict[Side, Count]
    tally: Tally
    changes: Mapping[str, Side]
    """The id whose records changed sides, because there would have been none on the other."""


SIDES: tuple[Side, Side] = ("train", "validation")
ID = slice(8, 40)
"""Where the id stands in a record's line: {"id": "... (examples.py)."""


def write_split(
    directory: Path, prefix: str, records: Iterable[Record], share: float, held_out: Collection[str] = ()
) -> Written:
    """Write records to `{prefix}train.jsonl` and `{prefix}validation.jsonl`, at least one to each where they
    have two different ids. Those with ids in `held_out` are held out whatever their hash."""
    written = Written({side: Count() for side in SIDES}, Tally(), {})
    splitter = Splitter(share, held_out)
    files = {side: (directory / f"{prefix}{side}.jsonl").open("w", encoding="utf-8") for side in SIDES}
    try:
        for record in records:
            line = record.to_json() + "\n"
            if written.tally.keep(record, line):
                side = splitter.side(record.id, useful=is_useful(record))
                files[side].write(line)
                written.counts[side].add(line)
    finally:
        for file in files.values():
            file.close()
    written.changes = splitter.changes()
    for side in SIDES:
        move(directory, prefix, [id for id, to in written.changes.items() if to == side], side, written)
    return written


def move(directory: Path, prefix: str, ids: Collection[str], to: Side, written: Written) -> None:
    """Move the records with these ids from the other side's file to that of `to`, and count them anew."""
    if not ids:
        return
    other: Side = "train" if to == "validation" else "validation"
    source, target = (directory / f"{prefix}{side}.jsonl" for side in (other, to))
    aside = source.with_suffix(".part")
    with (
        source.open(encoding="utf-8") as lines,
        aside.open("w", encoding="utf-8") as kept,
        target.open("a", encoding="utf-8") as moved,
    ):
        written.counts[other] = Count()
        for line in lines:
            goes = line[ID] in ids
            (moved if goes else kept).write(line)
            written.counts[to if goes else other].add(line)
    aside.replace(source)


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits per byte of a text under gzip and xz at their best setting."""
    return {
        "gzip_bits_per_byte": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
    }


@dataclass(frozen=True)
class Part:
    """One kind of records, to be written to two files."""

    kind: str
    """The setting that names its sources."""
    name: str
    """Name of the kind, for people."""
    read: Callable[..., Iterable[Record]]
    sources: str
    share: float
    """Share that is held out."""

    @property
    def prefix(self) -> str:
        """Prefix of the files' names."""
        return "" if self.kind == "text" else f"{self.kind}-"


def parts_of(config: Config) -> list[Part]:
    """The kinds of records to write: those for which the settings name sources."""
    named, share = sources_of(config), config.validation
    dialogues = partial(sources.dialogues, format=config.dialogue_format)
    comparisons = partial(sources.comparisons, format=config.comparison_format)
    parts = [
        Part("text", "documents", sources.documents, named["text"], share),
        Part("dialogues", "dialogues", dialogues, named["dialogues"], share),
        Part("ratings", "rated texts", sources.labelled_texts, named["ratings"], config.ratings_validation),
        Part("comparisons", "comparisons", comparisons, named["comparisons"], share),
    ]
    return [part for part in parts if part.sources]


@dataclass
class Done:
    """One kind of records that has been written."""

    part: Part
    written: Written
    faults: Faults = field(default_factory=Faults)

    def facts(self) -> dict[str, int]:
        """Counts for the report."""
        name, tally = self.part.name, self.written.tally
        facts = {f"{name} {side}": count.records for side, count in self.written.counts.items()}
        odd = {
            "left out": self.faults.count,
            "left out, answers alike": tally.alike,
            "without an answer": tally.unanswered,
            "ending with the user's turn": tally.open_ended,
            "repeated": tally.repeated,
            "left out, all answers marked": tally.wholly,
            "answers marked as not to be learnt": tally.unlearnt,
            "turns of others marked as to be learnt": self.faults.wanted,
        }
        return facts | {f"{name} {what}": count for what, count in odd.items() if count}

    def lines(self) -> list[str]:
        """What to say on the console and in the report."""
        part, (train, held_out) = self.part, self.written.counts.values()
        size = f"{(train.bytes + held_out.bytes) / 1e6:.1f} MB; {part.sources}"
        lines = [f"{train.records:,} for training, {held_out.records:,} held out ({size})"]
        if self.written.changes:
            for_what = "measure on" if "validation" in self.written.changes.values() else "learn from"
            lines[0] += f"; their hashes alone would leave nothing to {for_what}, so one was taken"
        faults = self.faults
        lines += filter(None, (faults.cut_line(), self.written.tally.line(), faults.wanted_line()))
        if self.faults.count:
            lines.append(f"{self.faults.count:,} broken records left out; the first: {self.faults.first}")
        return [f"{part.name}: {line}" for line in lines]


def write_part(part: Part, directory: Path, config: Config, held_out: Collection[str]) -> Done:
    """Read one kind of records and write its two files. Raises UserError when one of them would be empty."""
    faults = Faults(skip=config.broken == "skip")
    read = part.read(part.sources, faults=faults)
    done = Done(part, write_split(directory, part.prefix, read, part.share, held_out), faults)
    counts = [count.records for count in done.written.counts.values()]
    if not all(counts):
        raise UserError(f"data: {part.sources}: {too_few(part.kind, sum(counts))}")
    return done


def write_parts(parts: Sequence[Part], directory: Path, config: Config) -> list[Done]:
    """Write all kinds of records. What had to be held out of one kind is held out of all: a conversation may
    be a document too. Documents, which may be many, come last and are written once."""
    held_out: set[str] = set()
    finished: dict[str, Done] = {}
    with progress_bar("data") as bar:
        for number, part in enumerate(sorted(parts, key=lambda part: part.kind == "text")):
            bar.update(number / len(parts), f"{part.name} from {part.sources}")
            done = write_part(part, directory, config, held_out)
            new = {id for id, to in done.written.changes.items() if to == "validation"}
            for before in finished.values():
                move(directory, before.part.prefix, new, "validation", before.written)
            held_out |= new
            finished[part.kind] = done
        bar.update(1.0)
    return [finished[part.kind] for part in parts]


def run(config: Config, workspace: Workspace) -> Report:
    """Fetch, read, split and write; a source that was fetched before is taken from the cache."""
    if not 0 < config.validation < 1 or not 0 < config.ratings_validation < 1:
        raise UserError("data: validation shares must lie between 0 and 1")
    parts = parts_of(config)
    if not parts:
        raise UserError(
            "data: text, dialogues, ratings and comparisons are all empty: name a source for one of them"
        )
    if AUTO in (config.text, config.dialogues, config.ratings) and sources_of(config) == BUILT_IN:
        say("  no setting names a source: the built-in data (chatwright data list)")
    with whole_directory(workspace.directory / "records") as aside:
        finished = write_parts(parts, aside, config)
    facts: dict[str, Any] = {}
    notes: list[str] = []
    for done in finished:
        facts |= done.facts()
        notes += done.lines()
    for line in notes:
        say(f"  {line}")
    named = dict.fromkeys(name for part in parts for name in part.sources.split(","))
    licences = {name: source.licence for name in named if (source := find(name)) is not None}
    held_out = facts.get("documents validation")
    return Report(
        measures=[Measure("documents held out", None, float(held_out), "context")] if held_out else [],
        facts=facts,
        notes=[*notes, *(f"licence of {name}: {licence}" for name, licence in licences.items())],
    )


def show_sources(argv: Sequence[str]) -> int:
    """`chatwright data list`: the sources that install by themselves, with their licences."""
    if argv:
        raise UsageError(f"chatwright data list takes no arguments, found {argv[0]!r}")
    from rich.table import Table

    table = Table(
        "name", "kind", "licence", "what", title="Data that installs by itself", title_justify="left"
    )
    for name in names():
        try:
            source = find(name)
        except UserError as error:  # from another package's source; the list goes on
            table.add_row(name, "", "", str(error))
            continue
        if source is not None:
            what = f"{source.title}\n{source.homepage}"
            table.add_row(name, ", ".join(source.kinds), source.licence, what)
    console.print(table)
    say(
        "Also: a .txt, .jsonl, .json, .csv, .tsv or .parquet file, a directory of them, or "
        "hf:owner/name[:config[:split]][#column]"
    )
    return 0


STAGE = Stage(config=Config, run=run, plan=None, actions={"list": show_sources, "preview": show_preview})
