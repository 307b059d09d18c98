"""Data: sources -> files of records; a hash of a record decides whether it is held out.

* `train.jsonl` and `validation.jsonl`: documents to learn the language from.
* `dialogues-*.jsonl`: conversations.
* `ratings-*.jsonl`: texts, each with the number that people gave it.
* `comparisons-*.jsonl`: prompts with answers that people ranked; a prompt is in one of the two files only.

data/formats.py reads the formats of other data sets. No stage trains on records that are held out here: a
conversation has the same id as a document and as a dialogue.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from chatwright.config import UsageError, UserError
from chatwright.data import sources
from chatwright.data.catalogue import find, names
from chatwright.data.files import Faults
from chatwright.data.formats import Format, PreferenceFormat
from chatwright.files import whole_directory
from chatwright.metrics import console, progress_bar, say
from chatwright.train.api import Measure, Report, Stage, Workspace


@dataclass(frozen=True)
class Config:
    """What to learn from. Sources: a name of `chatwright data list`, a file, a directory, or
    hf:owner/name."""

    text: str = "boolq,quac,narrativeqa,chitchat"
    """Documents for the tokenizer and for pre-training, comma-separated; empty for none."""
    path: str = ""
    """Your own text instead: a file or a directory of .txt, .jsonl, .parquet (column `text`)."""
    dialogues: str = "chitchat"
    """Conversations for SFT and for the prompts of PPO; empty for none."""
    dialogue_format: Format = "auto"
    """How your own conversations are written; auto: by each record's columns (docs/reference/formats.md)."""
    ratings: str = "vader-movies,vader-tweets"
    """Texts with human ratings for the reward model; empty for none."""
    comparisons: str = ""
    """Completions that people ranked, for the reward model (its `comparisons` then names this stage); empty
    for none."""
    comparison_format: PreferenceFormat = "auto"
    """How your own comparisons are written; auto: by each record's columns (docs/reference/formats.md)."""
    broken: Literal["refuse", "skip"] = "refuse"
    """What happens at a record that cannot be used: the stage ends and names it, or it is left out and
    counted."""
    validation: float = 0.02
    """Share of documents, of dialogues and of the prompts of comparisons that is held out."""
    ratings_validation: float = 0.1
    """Share of rated texts that is held out (they are few)."""


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


def write_split(directory: Path, prefix: str, records: Iterable[Record], share: float) -> dict[str, Count]:
    """Write records to `{prefix}train.jsonl` and `{prefix}validation.jsonl`; returns the counts of both."""
    counts = {"train": Count(), "validation": Count()}
    files = {side: (directory / f"{prefix}{side}.jsonl").open("w", encoding="utf-8") for side in counts}
    try:
        for record in records:
            side = sources.split_of(record.id, share)
            line = record.to_json() + "\n"
            files[side].write(line)
            counts[side].records += 1
            counts[side].bytes += len(line.encode("utf-8"))
    finally:
        for file in files.values():
            file.close()
    return counts


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits per byte of a text under gzip and xz at their best setting."""
    return {
        "gzip_bits_per_byte": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
    }


@dataclass(frozen=True)
class Part:
    """One kind of records, to be written to two files."""

    prefix: str
    """Prefix of the files' names."""
    name: str
    """Name of the kind, for people."""
    read: Callable[..., Iterable[Record]]
    sources: str
    held_out: float
    """Share that is held out."""


def parts_of(config: Config) -> list[Part]:
    """The kinds of records to write: those for which the settings name sources."""
    dialogues = partial(sources.dialogues, format=config.dialogue_format)
    comparisons = partial(sources.comparisons, format=config.comparison_format)
    share = config.validation
    others = [
        Part("dialogues-", "dialogues", dialogues, config.dialogues, share),
        Part("ratings-", "rated texts", sources.labelled_texts, config.ratings, config.ratings_validation),
        Part("comparisons-", "comparisons", comparisons, config.comparisons, share),
    ]
    documents = Part("", "documents", sources.documents, config.path or config.text, share)
    return [part for part in (documents, *others) if part.sources]


def write_part(part: Part, directory: Path, config: Config) -> tuple[dict[str, Any], list[str]]:
    """Read one kind of records and write its two files; returns facts and notes for the report. Raises
    UserError when one of the files would be empty."""
    faults = Faults(skip=config.broken == "skip")
    counts = write_split(directory, part.prefix, part.read(part.sources, faults=faults), part.held_out)
    train, held_out = counts["train"], counts["validation"]
    if not train.records or not held_out.records:
        raise UserError(
            f"data: {part.sources} gives {train.records} {part.name} for training and {held_out.records} "
            "held out; both must be above 0: add data or change `validation`"
        )
    facts: dict[str, Any] = {f"{part.name} {side}": count.records for side, count in counts.items()}
    size = f"{(train.bytes + held_out.bytes) / 1e6:.1f} MB; {part.sources}"
    line = f"{part.name}: {train.records:,} for training, {held_out.records:,} held out ({size})"
    if not faults.count:
        return facts, [line]
    facts[f"{part.name} left out"] = faults.count
    broken = f"{part.name}: {faults.count:,} broken records left out; the first: {faults.first}"
    return facts, [line, broken]


def run(config: Config, workspace: Workspace) -> Report:
    """Fetch, read, split and write; a source that was fetched before is taken from the cache."""
    if not 0 < config.validation < 1 or not 0 < config.ratings_validation < 1:
        raise UserError("data: validation shares must lie between 0 and 1")
    facts: dict[str, Any] = {}
    notes: list[str] = []
    parts = parts_of(config)
    if not parts:
        raise UserError(
            "data: text, dialogues, ratings and comparisons are all empty: name a source for one of them"
        )
    with whole_directory(workspace.directory / "records") as aside, progress_bar("data") as bar:
        for number, part in enumerate(parts):
            bar.update(number / len(parts), f"{part.name} from {part.sources}")
            counted, told = write_part(part, aside, config)
            for line in told:
                say(f"  {line}")
            facts, notes = {**facts, **counted}, [*notes, *told]
        bar.update(1.0)
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
        "Also: a .txt, .jsonl or .parquet file, a directory of them, or "
        "hf:owner/name[:config[:split]][#column]"
    )
    return 0


STAGE = Stage(config=Config, run=run, plan=None, actions={"list": show_sources})
