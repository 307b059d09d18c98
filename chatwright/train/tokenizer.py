"""Tokenizer: learn byte-level BPE merges on the training documents, then turn all documents into token shards.

With `base` nothing is learnt: the documents become shards of a model's own tokens, for `text` in PPO (the alignment tax).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from chatwright.config import UserError
from chatwright.data.examples import Document
from chatwright.data.shards import write_shards
from chatwright.language_model import load_parts
from chatwright.metrics import progress_bar, say
from chatwright.tokenizer import Tokenizer
from chatwright.train.data import compressed_bits_per_byte
from chatwright.train.workspace import Measure, Report, Workspace


@dataclass(frozen=True)
class Config:
    """Settings of the tokenizer."""

    data: str = field(default="data", metadata={"input": True})
    """The stage, or directory, with train.jsonl and validation.jsonl."""
    base: str = field(default="", metadata={"input": True, "words": ("",)})
    """The model whose tokenizer is taken as it is (a stage, a directory, smollm2 ...); empty learns one."""
    vocab_size: int = 4096
    """Number of tokens, the 256 bytes and the control tokens included. Small models want few: the head costs."""
    train_bytes: int = 50_000_000
    """Learn the merges on at most this much text (UTF-8 bytes) from the beginning of the training documents."""


def texts_of(file: Path, limit: int = 0) -> Iterator[str]:
    """The texts of a file of documents; at most `limit` bytes of them when it is above 0."""
    taken = 0
    try:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                text = Document.from_json(line).text
                yield text
                taken += len(text.encode("utf-8"))
                if 0 < limit <= taken:
                    return
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; run the data stage first") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{file} is damaged: {error}") from None


def records_of(directory: Path) -> Path:
    """The folder of record files in a data stage's directory, or the directory itself."""
    return directory / "records" if (directory / "records").is_dir() else directory


def own_or_learnt(config: Config, workspace: Workspace, file: Path) -> Tokenizer:
    """The tokenizer of `base`, or one learnt on the texts of a file. Raises UserError."""
    if not config.base:
        return Tokenizer.train(texts_of(file, config.train_bytes), config.vocab_size)
    found = load_parts(
        workspace.resolve(config.base) if config.base in workspace.inputs else config.base
    ).tokenizer
    if found is None:
        raise UserError(f"{config.base} has no tokenizer")
    return found


def run(config: Config, workspace: Workspace) -> Report:
    """Train the tokenizer, write the shards, and say what a byte costs before any model is trained."""
    records = records_of(workspace.resolve(config.data))
    with progress_bar("tokenizer") as bar:
        bar.update(0.0, f"reading {config.base}" if config.base else "learning merges")
        tokenizer = own_or_learnt(config, workspace, records / "train.jsonl")
        tokenizer.save(workspace.directory)
        bar.update(0.4, "encoding the training documents")
        train = write_shards(workspace.directory / "train", texts_of(records / "train.jsonl"), tokenizer)
        bar.update(0.9, "encoding the held-out documents")
        held_out = write_shards(
            workspace.directory / "validation", texts_of(records / "validation.jsonl"), tokenizer
        )
        bar.update(1.0)
    text = "\n".join(texts_of(records / "validation.jsonl")).encode()
    compressed = compressed_bits_per_byte(text[:20_000_000])
    per_token = held_out.text_bytes / held_out.tokens
    say(f"  {tokenizer.vocab_size:,} tokens; {train.tokens:,} training tokens, {held_out.tokens:,} held out")
    return Report(
        measures=[Measure("bytes per token, held out", 1.0, per_token, "higher")],
        facts={
            "vocab_size": tokenizer.vocab_size,
            "train_tokens": train.tokens,
            "fingerprint": tokenizer.fingerprint,
            "validation_tokens": held_out.tokens,
            "validation_bytes": held_out.text_bytes,
            **compressed,
        },
    )
