"""Token shards: documents -> flat files of token ids, memory-mapped for training.

A shard is a plain array of uint16 (uint32 for vocabularies over 65,536), little-endian; `shards.json` names
them in order with their lengths and checksums, and the tokenizer that made them. Every document is preceded
by the end-of-text token, so that the first token of a document is predicted from something.

Damage is found before it is trained on. A split of up to `WHOLE` bytes is compared with its SHA-256 when it
is opened, which takes a second. Larger ones would take minutes at each start, on each machine. There every
block of 64 kB is compared with its own CRC-32 when it is first read (0.05 ms), which costs the same at any
size.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from chatwright import files
from chatwright.config import UserError
from chatwright.metrics import progress_bar
from chatwright.tokenizer import Tokenizer

SHARD_TOKENS = 50_000_000
BATCH_DOCUMENTS = 512
WHOLE = 1_000_000_000
"""Largest split, in bytes, that is checked as a whole when it is opened."""
BLOCK = 2**16
"""Bytes of the blocks in which larger splits are checked."""


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

    with files.whole_directory(directory) as aside:
        buffer: list[np.ndarray] = []
        held = 0

        def flush() -> None:
            nonlocal buffer, held
            if held:
                file = aside / f"tokens-{len(entries):05}.bin"
                np.concatenate(buffer).tofile(file)
                blocks = file.with_suffix(".crc32")
                _block_sums(np.fromfile(file, dtype=np.uint8)).tofile(blocks)
                entries.append(
                    {
                        "file": file.name,
                        "tokens": held,
                        "sha256": files.sha256(file),
                        "blocks": blocks.name,
                        "blocks_sha256": files.sha256(blocks),
                    }
                )
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
        files.write_json(
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


def _block_sums(content: np.ndarray) -> np.ndarray:
    """CRC-32 of each block of a shard's bytes."""
    return np.array(
        [zlib.crc32(content[at : at + BLOCK].data) for at in range(0, len(content), BLOCK)], dtype="<u4"
    )


class _Guard:
    """Checks a shard block by block, each when it is first read."""

    def __init__(self, file: Path, array: np.ndarray, sums: np.ndarray) -> None:
        self.file, self.content, self.sums = file, array.view(np.uint8), sums
        self.seen = np.zeros(len(sums), dtype=bool)
        self.item = array.itemsize

    def check(self, start: int, stop: int) -> None:
        """Check tokens start ... stop - 1 before they are used. Raises UserError naming the file."""
        for number in range(start * self.item // BLOCK, -(-stop * self.item // BLOCK)):
            if not self.seen[number]:
                if zlib.crc32(self.content[number * BLOCK : (number + 1) * BLOCK].data) != self.sums[number]:
                    raise _damaged(self.file)
                self.seen[number] = True


def _damaged(file: Path) -> UserError:
    return UserError(
        f"token shard {file} is damaged (its checksum differs); delete {file.parent} and run again"
    )


@dataclass(frozen=True)
class TokenShards:
    """All shards of one split. `windows(context)` says how many training samples they hold."""

    arrays: tuple[np.ndarray, ...]
    tokens: int
    text_bytes: int
    documents: int
    tokenizer_fingerprint: str
    guards: tuple[_Guard, ...] = ()

    @classmethod
    def open(cls, directory: Path, tokenizer: Tokenizer | None = None) -> TokenShards:
        """Map the shards of a directory. Raises UserError when one is missing, short, damaged, or made by
        another tokenizer. Above `WHOLE` bytes a damaged block is found only when it is first read."""
        index = files.read_json(directory / "shards.json")
        arrays = []
        for entry in index["shards"]:
            file = directory / entry["file"]
            kind = np.dtype(index["dtype"])
            if not file.is_file() or file.stat().st_size != entry["tokens"] * kind.itemsize:
                raise UserError(f"token shard {file} is missing or cut off; delete {directory} and run again")
            arrays.append(np.memmap(file, dtype=kind, mode="r"))
        if tokenizer is not None and tokenizer.fingerprint != index["tokenizer"]:
            raise UserError(f"{directory} was encoded with another tokenizer; delete it and run again")
        found = cls(tuple(arrays), index["tokens"], index["bytes"], index["documents"], index["tokenizer"])
        if sum(array.nbytes for array in arrays) <= WHOLE or not all(
            "blocks" in entry for entry in index["shards"]
        ):
            found.verify(directory)
            return found
        return replace(
            found,
            guards=tuple(
                _Guard(
                    directory / entry["file"],
                    array,
                    _read_sums(directory / entry["blocks"], entry["blocks_sha256"]),
                )
                for entry, array in zip(index["shards"], arrays, strict=True)
            ),
        )

    def verify(self, directory: Path) -> None:
        """Compare every shard with its checksum. Raises UserError naming the first that differs."""
        entries = files.read_json(directory / "shards.json")["shards"]
        large = sum(array.nbytes for array in self.arrays) > WHOLE
        with progress_bar(f"checking {directory.name}") if large else nullcontext() as bar:
            for number, entry in enumerate(entries):
                if files.sha256(directory / entry["file"]) != entry["sha256"]:
                    raise _damaged(directory / entry["file"])
                if bar is not None:
                    bar.update((number + 1) / len(entries))

    def windows(self, context: int) -> int:
        """Number of windows of `context` inputs and as many targets; a shard's rest is left out."""
        return sum((len(array) - 1) // context for array in self.arrays)

    def rest(self, context: int) -> int:
        """Number of tokens that are in no window: less than one at the end of each shard."""
        return self.tokens - sum((len(array) - 1) // context * context for array in self.arrays)

    def window(self, number: int, context: int) -> Int[Tensor, " context+1"]:
        """Tokens number * context ... of the shard that holds it, context + 1 of them."""
        for place, array in enumerate(self.arrays):
            here = (len(array) - 1) // context
            if number < here:
                start = number * context
                if self.guards:
                    self.guards[place].check(start, start + context + 1)
                return torch.from_numpy(array[start : start + context + 1].astype(np.int64))
            number -= here
        raise IndexError("window number out of range")

    def stretches(self, context: int) -> Iterator[Int[Tensor, " length"]]:
        """Every token as a target exactly once, in order: windows of up to context + 1 tokens that overlap by
        one."""
        for place, array in enumerate(self.arrays):
            for start in range(0, len(array) - 1, context):
                if self.guards:
                    self.guards[place].check(start, min(start + context + 1, len(array)))
                yield torch.from_numpy(array[start : start + context + 1].astype(np.int64))


def _read_sums(file: Path, digest: str) -> np.ndarray:
    if not file.is_file() or files.sha256(file) != digest:
        raise _damaged(file)
    return np.fromfile(file, dtype="<u4")
