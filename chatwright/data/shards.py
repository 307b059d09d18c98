"""Token shards: documents -> flat files of token ids, memory-mapped for training.

A shard is a plain array of uint16 (uint32 for vocabularies over 65,536), little-endian; `shards.json` names them in
order with their lengths and checksums, and the tokenizer that made them. Every document is preceded by the
end-of-text token, so that the first token of a document is predicted from something.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from chatwright import checkpoint
from chatwright.config import UserError
from chatwright.tokenizer import Tokenizer

SHARD_TOKENS = 50_000_000
BATCH_DOCUMENTS = 512


def write_shards(
    directory: Path,
    texts: Iterable[str],
    tokenizer: Tokenizer,
    *,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenShards:
    """Encode texts into shards of at most `shard_tokens` tokens; the directory appears whole or not at all.

    Raises UserError when there is not a single token.
    """
    kind = np.dtype("<u2") if tokenizer.vocab_size <= 2**16 else np.dtype("<u4")
    entries: list[dict[str, object]] = []
    total_bytes = documents = 0

    with checkpoint.whole_directory(directory) as aside:
        buffer: list[np.ndarray] = []
        held = 0

        def flush() -> None:
            nonlocal buffer, held
            if held:
                file = aside / f"tokens-{len(entries):05}.bin"
                np.concatenate(buffer).tofile(file)
                entries.append({"file": file.name, "tokens": held, "sha256": checkpoint.sha256(file)})
            buffer, held = [], 0

        pending = iter(texts)
        while batch := list(islice(pending, BATCH_DOCUMENTS)):
            documents += len(batch)
            total_bytes += sum(len(text.encode("utf-8", "surrogatepass")) for text in batch)
            for ids in tokenizer.encode_batch(batch):
                piece = np.asarray([tokenizer.end_of_text_id, *ids], dtype=kind)
                for part in np.split(piece, range(shard_tokens - held, len(piece), shard_tokens)):
                    if held + len(part) > shard_tokens:
                        flush()
                    buffer.append(part)
                    held += len(part)
        flush()
        if not entries:
            raise UserError(
                f"{directory.name}: there is no text to encode; add data or raise the validation share"
            )
        checkpoint.write_json(
            aside / "shards.json",
            {
                "dtype": kind.str,
                "tokenizer": tokenizer.fingerprint,
                "documents": documents,
                "bytes": total_bytes,
                "tokens": sum(int(str(entry["tokens"])) for entry in entries),
                "shards": entries,
            },
        )
    return TokenShards.open(directory)


@dataclass(frozen=True)
class TokenShards:
    """All shards of one split. `windows(context)` says how many training samples they hold."""

    arrays: tuple[np.ndarray, ...]
    tokens: int
    text_bytes: int
    documents: int
    tokenizer_fingerprint: str

    @classmethod
    def open(cls, directory: Path, tokenizer: Tokenizer | None = None) -> TokenShards:
        """Map the shards of a directory. Raises UserError when one is missing, short, or made by another tokenizer."""
        index = checkpoint.read_json(directory / "shards.json")
        arrays = []
        for entry in index["shards"]:
            file = directory / entry["file"]
            kind = np.dtype(index["dtype"])
            if not file.is_file() or file.stat().st_size != entry["tokens"] * kind.itemsize:
                raise UserError(f"token shard {file} is missing or cut off; delete {directory} and run again")
            arrays.append(np.memmap(file, dtype=kind, mode="r"))
        if tokenizer is not None and tokenizer.fingerprint != index["tokenizer"]:
            raise UserError(f"{directory} was encoded with another tokenizer; delete it and run again")
        return cls(tuple(arrays), index["tokens"], index["bytes"], index["documents"], index["tokenizer"])

    def verify(self, directory: Path) -> None:
        """Compare every shard with its checksum. Raises UserError naming the first that differs."""
        for entry in checkpoint.read_json(directory / "shards.json")["shards"]:
            if checkpoint.sha256(directory / entry["file"]) != entry["sha256"]:
                raise UserError(f"token shard {directory / entry['file']} is damaged (its checksum differs)")

    def windows(self, context: int) -> int:
        """Number of windows of `context` inputs and as many targets; a shard's rest is left out."""
        return sum((len(array) - 1) // context for array in self.arrays)

    def window(self, number: int, context: int) -> Int[Tensor, " context+1"]:
        """Tokens number * context ... of the shard that holds it, context + 1 of them."""
        for array in self.arrays:
            here = (len(array) - 1) // context
            if number < here:
                start = number * context
                return torch.from_numpy(array[start : start + context + 1].astype(np.int64))
            number -= here
        raise IndexError("window number out of range")

    def stretches(self, context: int) -> Iterator[Int[Tensor, " length"]]:
        """Every token as a target exactly once, in order: windows of up to context + 1 tokens that overlap by one."""
        for array in self.arrays:
            for start in range(0, len(array) - 1, context):
                yield torch.from_numpy(array[start : start + context + 1].astype(np.int64))
