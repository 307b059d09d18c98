"""Data: sources -> three files of records on disk, each cut into training and held-out by a hash of its content.

`train.jsonl` and `validation.jsonl` are documents to learn the language from; `dialogues-*.jsonl` conversations;
`ratings-*.jsonl` texts with the number that people gave them. What is held out here is never trained on by any stage:
a conversation has one id as a document and as a dialogue.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from chatwright import checkpoint
from chatwright.config import UserError
from chatwright.data import sources
from chatwright.metrics import progress_bar, say
from chatwright.train.workspace import Measure, Report, Workspace


@dataclass(frozen=True)
class Config:
    """What to learn from. Sources: a name of `chatwright data list`, a file, a directory, or hf:owner/name."""

    text: str = "boolq,quac,narrativeqa,chitchat"
    """Documents for the tokenizer and for pre-training, comma-separated."""
    path: str = ""
    """Your own text instead: a file or a directory of .txt, .jsonl, .parquet (column `text`)."""
    dialogues: str = "chitchat"
    """Conversations for SFT and for the prompts of PPO; empty for none."""
    ratings: str = "vader-movies,vader-tweets"
    """Texts with human ratings for the reward model; empty for none."""
    validation: float = 0.02
    """Share of documents and dialogues that is held out."""
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


def run(config: Config, workspace: Workspace) -> Report:
    """Fetch, read, split and write; a source that was fetched before is taken from the cache."""
    if not 0 < config.validation < 1 or not 0 < config.ratings_validation < 1:
        raise UserError("data: validation shares must lie between 0 and 1")
    parts = [("", "documents", sources.documents, config.path or config.text, config.validation)]
    if config.dialogues:
        parts.append(("dialogues-", "dialogues", sources.dialogues, config.dialogues, config.validation))  # type: ignore[arg-type]
    if config.ratings:
        parts.append(("ratings-", "rated texts", sources.labelled_texts, config.ratings, config.ratings_validation))  # type: ignore[arg-type]
    facts: dict[str, float | str] = {}
    notes: list[str] = []
    target = workspace.directory / "records"
    with checkpoint.whole_directory(target) as aside, progress_bar("data") as bar:
        for number, (prefix, name, read, spec, share) in enumerate(parts):
            bar.update(number / len(parts), f"{name} from {spec}")
            counts = write_split(aside, prefix, read(spec), share)
            for side, count in counts.items():
                facts[f"{name} {side}"] = count.records
            if not counts["train"].records or not counts["validation"].records:
                raise UserError(
                    f"data: {spec} gives {counts['train'].records} {name} for training and "
                    f"{counts['validation'].records} held out; both must be above 0: add data or change `validation`"
                )
            line = f"{name}: {counts['train'].records:,} for training, {counts['validation'].records:,} held out"
            notes.append(f"{line} ({(counts['train'].bytes + counts['validation'].bytes) / 1e6:.1f} MB; {spec})")
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
