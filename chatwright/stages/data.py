"""Data: sources -> files of records on disk, each cut into training and held-out by a hash of its content.

`train.jsonl` and `validation.jsonl` are documents to learn the language from; `dialogues-*.jsonl`
conversations; `ratings-*.jsonl` texts with the number that people gave them; `comparisons-*.jsonl` prompts
with answers that people ranked, cut by prompt. Others' formats of conversations and comparisons:
data/formats.py. What is held out here is never trained on by any stage: a conversation has one id as a
document and as a dialogue.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from chatwright.config import UsageError, UserError
from chatwright.data import sources
from chatwright.data.files import Faults
from chatwright.data.formats import Format, PreferenceFormat
from chatwright.files import whole_directory
from chatwright.metrics import console, progress_bar, say
from chatwright.train.stage import Stage
from chatwright.train.workspace import Measure, Report, Workspace


@dataclass(frozen=True)
class Config:
    """What to learn from. Sources: a name of `chatwright data list`, a file, a directory, or
    hf:owner/name."""

    text: str = "boolq,quac,narrativeqa,chitchat"
    """Documents for the tokenizer and for pre-training, comma-separated."""
    path: str = ""
    """Your own text instead: a file or a directory of .txt, .jsonl, .parquet (column `text`)."""
    dialogues: str = "chitchat"
    """Conversations for SFT and for the prompts of PPO; empty for none."""
    dialogue_format: Format = "auto"
    """How your own conversations are written; auto: by the columns of each record (docs/alignment.md)."""
    ratings: str = "vader-movies,vader-tweets"
    """Texts with human ratings for the reward model; empty for none."""
    comparisons: str = ""
    """Completions that people ranked, for the reward model (its `comparisons` then names this stage); empty
    for none."""
    comparison_format: PreferenceFormat = "auto"
    """How your own comparisons are written; auto: by the columns of each record (docs/alignment.md)."""
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
    """What one side of a split holds."""

    records: int = 0
    bytes: int = 0


def write_split(directory: Path, prefix: str, records: Iterable[Record], share: float) -> dict[str, Count]:
    """Write records to `{prefix}train.jsonl` and `{prefix}validation.jsonl`; counts of both."""
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
    """What gzip and xz need for a text at their best setting, in bits per byte of it."""
    return {
        "gzip_bits_per_byte": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
    }


def parts_of(config: Config) -> list[tuple[str, str, Any, str, float]]:
    """What to write: prefix of the files, name for people, reader, sources, held-out share."""
    dialogues = partial(sources.dialogues, format=config.dialogue_format)
    comparisons = partial(sources.comparisons, format=config.comparison_format)
    parts = [
        ("", "documents", sources.documents, config.path or config.text, config.validation),
        ("dialogues-", "dialogues", dialogues, config.dialogues, config.validation),
        ("ratings-", "rated texts", sources.labelled_texts, config.ratings, config.ratings_validation),
        ("comparisons-", "comparisons", comparisons, config.comparisons, config.validation),
    ]
    return parts[:1] + [part for part in parts[1:] if part[3]]


def run(config: Config, workspace: Workspace) -> Report:
    """Fetch, read, split and write; a source that was fetched before is taken from the cache."""
    if not 0 < config.validation < 1 or not 0 < config.ratings_validation < 1:
        raise UserError("data: validation shares must lie between 0 and 1")
    facts: dict[str, float | str] = {}
    notes: list[str] = []
    parts = parts_of(config)
    target = workspace.directory / "records"
    with whole_directory(target) as aside, progress_bar("data") as bar:
        for number, (prefix, name, read, spec, share) in enumerate(parts):
            bar.update(number / len(parts), f"{name} from {spec}")
            faults = Faults(skip=config.broken == "skip")
            counts = write_split(aside, prefix, read(spec, faults=faults), share)
            for side, count in counts.items():
                facts[f"{name} {side}"] = count.records
            if not counts["train"].records or not counts["validation"].records:
                raise UserError(
                    f"data: {spec} gives {counts['train'].records} {name} for training and "
                    f"{counts['validation'].records} held out; both must be above 0: add data or change "
                    "`validation`"
                )
            line = (
                f"{name}: {counts['train'].records:,} for training, {counts['validation'].records:,} held out"
            )
            notes.append(
                f"{line} ({(counts['train'].bytes + counts['validation'].bytes) / 1e6:.1f} MB; {spec})"
            )
            say(f"  {notes[-1]}")
            if faults.count:
                facts[f"{name} left out"] = faults.count
                notes.append(f"{name}: {faults.count:,} broken records left out; the first: {faults.first}")
                say(f"  {notes[-1]}")
        bar.update(1.0)
    licences = {source.name: source.licence for source in sources.catalogue()}
    named = [name for _, _, _, spec, _ in parts for name in spec.split(",") if name in licences]
    notes += [f"licence of {name}: {licences[name]}" for name in dict.fromkeys(named)]
    return Report(
        measures=[Measure("documents held out", None, float(facts["documents validation"]), "context")],
        facts=dict(facts),
        notes=notes,
    )


def show_sources(argv: Sequence[str]) -> int:
    """`chatwright data list`: the sources that install by themselves, with their licences."""
    if argv:
        raise UsageError(f"chatwright data list takes no arguments, found {argv[0]!r}")
    from rich.table import Table

    table = Table(
        "name", "kind", "licence", "what", title="Data that installs by itself", title_justify="left"
    )
    for source in sources.catalogue():
        table.add_row(
            source.name, ", ".join(source.kinds), source.licence, f"{source.title}\n{source.homepage}"
        )
    console.print(table)
    say(
        "Also: a .txt, .jsonl or .parquet file, a directory of them, or "
        "hf:owner/name[:config[:split]][#column]"
    )
    return 0


STAGE = Stage(config=Config, run=run, plan=None, actions={"list": show_sources})
