"""The container format GGUF: a header of names and values, then tensors. Nothing in it is believed unchecked.

The header is walked by our own code: the `gguf` library's reader believes every length in it, so that a small
file could make it loop for ever or fill the memory. Here each length is compared with what is left of the
file before it is used; tensors must lie within the file, and apart from each other, or a small file could
stand for an enormous model. The library's tables of quantised blocks and its dequantisation are used as they
are.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize

from chatwright.config import UserError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LEAST_FIELD, _LEAST_TENSOR = 13, 24  # bytes that an entry of the header takes at the very least
_MOST_DIMENSIONS = 4  # as in llama.cpp
_MOST_ALIGNMENT = 1 << 20


class _Damaged(Exception):
    """What is wrong with the bytes."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its file, checked to lie within it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    """As torch says it: GGUF writes the innermost size first."""
    kind: gguf.GGMLQuantizationType
    offset: int
    size: int
    """In bytes."""

    def read(self) -> torch.Tensor:
        """Its numbers, dequantised to float32. Raises UserError for kinds that stand for no numbers, or not
        for floats."""
        with self.path.open("rb") as file:
            data = np.fromfile(file, np.uint8, self.size, offset=self.offset)
        if data.nbytes != self.size:
            raise UserError(f"{self.path} became shorter while it was read")
        try:
            with np.errstate(all="ignore"):  # scales of damaged blocks may be anything
                numbers = dequantize(data.reshape(*self.shape[:-1], -1), self.kind)
        except NotImplementedError:
            raise UserError(
                f"{self.path}: {self.name} is quantised as {self.kind.name}, which cannot be read"
            ) from None
        return torch.from_numpy(np.require(numbers, np.float32, "W")).reshape(self.shape)


@dataclass(frozen=True)
class GGUFFile:
    """A file's header: values by key, and its tensors in the order of the header."""

    values: dict[str, Any]
    tensors: tuple[StoredTensor, ...]


class _Cursor:
    """A place in the bytes of the header, that cannot leave them."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place, self.end = data, 0, len(data)

    def take(self, count: int) -> int:
        """Go on by `count` bytes; the place before."""
        if count > self.end - self.place:
            raise _Damaged(f"{count} bytes are said to follow byte {self.place} of {self.end}")
        place = self.place
        self.place += count
        return place

    def scalar(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        count = self.scalar("Q")
        place = self.take(count)
        return self.data[place : place + count].decode("utf-8")

    def value(self, kind: int) -> Any:
        """A value of metadata: a number, a text, or a list of either."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise _Damaged(f"metadata of unknown type {kind}")
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner == _STRING:
            self.room(count, 8)
            return [self.text() for _ in range(count)]
        if inner not in _SCALARS:
            raise _Damaged(f"a list of items of type {inner}")
        code = _SCALARS[inner]
        place = self.take(count * struct.calcsize("<" + code))
        return np.frombuffer(self.data, np.dtype("<" + code), count, place).tolist()

    def room(self, count: int, least: int) -> None:
        """Whether `count` things of at least so many bytes can follow at all."""
        if count * least > self.end - self.place:
            raise _Damaged(f"{count} entries are said to follow byte {self.place} of {self.end}")


def read_gguf(path: Path) -> GGUFFile:
    """The header of a GGUF file. Raises UserError when it is damaged, cut short, or of a kind that we do not
    read."""
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{path} is not a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _header(_Cursor(data), path)
    except (_Damaged, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _header(cursor: _Cursor, path: Path) -> GGUFFile:
    cursor.take(4)
    version = cursor.scalar("I")
    if version and not version & 0xFFFF:
        raise UserError(f"{path} was written for machines of the other byte order")
    if version not in (2, 3):
        raise _Damaged(f"version {version}")
    tensor_count, field_count = cursor.scalar("Q"), cursor.scalar("Q")
    cursor.room(field_count, _LEAST_FIELD)
    values: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.text()
        if key in values:
            raise _Damaged(f"{key!r:.80} occurs twice")
        values[key] = cursor.value(cursor.scalar("I"))
    cursor.room(tensor_count, _LEAST_TENSOR)
    infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    names = {name for name, *_ in infos}
    if len(names) < len(infos):
        raise _Damaged("two tensors have the same name")
    alignment = values.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= _MOST_ALIGNMENT or alignment & (alignment - 1):
        raise _Damaged(f"an alignment of {alignment!r:.80}")
    start = -(-cursor.place // alignment) * alignment
    return GGUFFile(values, _placed(path, infos, start, cursor.end))


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of a tensor, as they stand in the header."""
    name, dimensions = cursor.text(), cursor.scalar("I")
    if dimensions > _MOST_DIMENSIONS:
        raise _Damaged(f"{name!r:.80} has {dimensions} dimensions")
    shape = tuple(cursor.scalar("Q") for _ in range(dimensions))[::-1]
    return name, shape, cursor.scalar("I"), cursor.scalar("Q")


def _placed(
    path: Path, infos: list[tuple[str, tuple[int, ...], int, int]], start: int, end: int
) -> tuple[StoredTensor, ...]:
    """The tensors, if each lies within the file and none over another."""
    tensors = []
    for name, shape, number, offset in infos:
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise _Damaged(f"{name!r:.80} is of unknown type {number}") from None
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        count = math.prod(shape)
        if count < 1 or (shape[-1] if shape else 1) % block:
            raise _Damaged(f"{name!r:.80} has the shape {shape}")
        tensor = StoredTensor(path, name, shape or (1,), kind, start + offset, count // block * block_bytes)
        if tensor.offset + tensor.size > end:
            raise _Damaged(f"{name!r:.80} ends at byte {tensor.offset + tensor.size} of {end}")
        tensors.append(tensor)
    in_place = sorted(tensors, key=lambda tensor: tensor.offset)
    for before, after in pairwise(in_place):
        if before.offset + before.size > after.offset:
            raise _Damaged(f"{before.name!r:.80} and {after.name!r:.80} lie over each other")
    return tuple(tensors)
