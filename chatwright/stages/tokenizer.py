"""Tokenizer: learn byte-level BPE merges, then turn all documents into token shards.

With `base` no merges are learnt: the documents are encoded with that model's tokenizer, for `text` in PPO
(the alignment tax).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from chatwright.config import UsageError, UserError
from chatwright.data.records import read_texts, records_of
from chatwright.data.shards import write_shards
from chatwright.metrics import progress_bar, say
from chatwright.stages.data import compressed_bits_per_byte
from chatwright.tokenizer import Tokenizer
from chatwright.train.api import Measure, Report, Stage, Workspace, open_base

SMALLEST_VOCABULARY = 264


@dataclass(frozen=True)
class Config:
    """Settings of the tokenizer."""

    data: str = field(default="data", metadata={"input": True})
    """The stage, or directory, with train.jsonl and validation.jsonl."""
    base: str = field(default="", metadata={"input": True, "words": ("",)})
    """The model whose tokenizer is taken as it is (a stage, a directory, smollm2 ...); empty learns one."""
    vocab_size: int = 4096
    """Number of tokens, the 256 bytes and the control tokens included. Small models want few: the head costs.
    """
    train_bytes: int = 50_000_000
    """Learn the merges on at most this much text (UTF-8 bytes) from the beginning of the training documents.
    """

    def __post_init__(self) -> None:
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise UsageError(
                f"vocab_size {self.vocab_size} is too small: 256 bytes and 8 control tokens need "
                f"{SMALLEST_VOCABULARY}"
            )


def own_or_learnt(config: Config, workspace: Workspace, file: Path) -> Tokenizer:
    """The tokenizer of `base`, or one learnt on the texts of a file. Raises UserError."""
    if not config.base:
        return Tokenizer.train(read_texts(file, config.train_bytes), config.vocab_size)
    found = open_base(config.base, workspace).tokenizer
    if found is None:
        raise UserError(f"{config.base} has no tokenizer")
    return found


def run(config: Config, workspace: Workspace) -> Report:
    """Train the tokenizer, write the shards, and measure bytes per token and what compressors need."""
    records = records_of(workspace.resolve(config.data))
    with progress_bar("tokenizer") as bar:
        bar.update(0.0, f"reading {config.base}" if config.base else "learning merges")
        tokenizer = own_or_learnt(config, workspace, records / "train.jsonl")
        tokenizer.save(workspace.directory)
        bar.update(0.4, "encoding the training documents")
        train = write_shards(workspace.directory / "train", read_texts(records / "train.jsonl"), tokenizer)
        bar.update(0.9, "encoding the held-out documents")
        held_out = write_shards(
            workspace.directory / "validation", read_texts(records / "validation.jsonl"), tokenizer
        )
        bar.update(1.0)
    text = "\n".join(read_texts(records / "validation.jsonl")).encode()
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
        notes=not_read(config, train.text_bytes),
    )


def not_read(config: Config, text_bytes: int) -> list[str]:
    """The line that says that merges were learnt on a part of `text_bytes` of text; also on the console."""
    if config.base or text_bytes <= config.train_bytes:
        return []
    part = f"{config.train_bytes:,} of {text_bytes:,} bytes"
    line = f"merges were learnt on the first {part} of the training documents (train_bytes)"
    say(f"  {line}")
    return [line]


STAGE = Stage(config=Config, run=run, plan=None, reads=lambda config: {"text": config.data})
