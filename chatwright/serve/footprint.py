"""How much memory a model will take, from the headers of its files or from its shape, without loading it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import safetensors

from chatwright.config import UserError
from chatwright.generate.engine import CACHE_BYTES
from chatwright.generate.pages import PAGE_TOKENS
from chatwright.language_model import WORTH_COMPILING, find_checkpoint
from chatwright.model.config import GPTConfig

PACKED_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.06, "int4": 0.63}
"""Bytes per weight of the copies that the CPU kernels make, group scales included (kernels/packing.py)."""

BATCH = 16
"""Default number of answers that an engine computes at a time."""
TILE, GROUP = 16, 32
"""Outputs and inputs that the kernels' matrices are padded to (kernels/packing.py)."""


@dataclass(frozen=True)
class Serving:
    """Memory of a model while it is served, in bytes; predicts `LanguageModel.memory_bytes`."""

    weights: int
    """The parameters themselves."""
    packed: int
    """The kernels' copy of them; 0 where torch computes."""
    cache: int
    """Keys and values of a full batch of conversations, within the engine's budget."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.packed + self.cache


def serving(config: GPTConfig, count: int, dtype: str, *, kernels: bool = True) -> Serving:
    """Memory to serve a model of this shape with `count` parameters in `dtype` (fp32, bf16, int8, int4).

    kernels: the compiled CPU kernels compute; else torch, which supports only fp32 and bf16.
    """
    if kernels:
        weights, packed = 4 * count, packed_bytes(config, dtype)
        item, head = (4 if dtype == "fp32" else 2), _up_to(config.head_dim, GROUP)
    else:
        item, head, packed = (2 if dtype == "bf16" else 4), config.head_dim, 0
        weights = item * count
    page = 2 * config.layers * config.kv_heads * head * item * PAGE_TOKENS
    one = -(-config.context // PAGE_TOKENS)
    return Serving(weights, packed, page * max(one, min(BATCH * one, CACHE_BYTES // page)))


def packed_bytes(config: GPTConfig, dtype: str) -> int:
    """Bytes of the kernels' copy of the matrices, with scales and padding, without biases and norms (a few
    thousand numbers)."""
    width, heads = config.width, config.heads
    attended = heads * _up_to(config.head_dim, GROUP)
    up = (2 if config.gated else 1) * _up_to(config.mlp_width, TILE)
    block = _matrix((heads + 2 * config.kv_heads) * config.head_dim, width, dtype) + _matrix(
        width, attended, dtype
    )
    block += _matrix(up, width, dtype) + _matrix(width, config.mlp_width, dtype)
    size = config.layers * block + _matrix(config.vocab_size, width, "int8" if dtype == "int4" else dtype)
    if not config.tied:
        size += _matrix(config.vocab_size, width, "fp32" if dtype == "fp32" else "bf16")
    if config.position == "learned":  # the table of positions stays float32
        size += 4 * config.context * _up_to(width, GROUP)
    return size


def _matrix(outputs: int, inputs: int, dtype: str) -> int:
    """Bytes of a packed matrix. Integer weights have a 16-bit scale for each group; int4 also has the
    group's smallest value."""
    bits = {"fp32": 128, "bf16": 64, "int8": 34, "int4": 20}[dtype]  # a weight's, times four
    return _up_to(outputs, TILE) * _up_to(inputs, GROUP) * bits // 32


def _up_to(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def weight_bytes(source: str, dtype: str = "auto") -> int:
    """Bytes for the weights of a model that `load` would read: float32, and the packed copy where kernels are
    used. Keys and values are not counted.

    Returns 0 if the files are not on this machine yet or cannot be read: loading reports the error.
    """
    try:
        count = _parameters(source)
    except (UserError, OSError, safetensors.SafetensorError):
        return 0
    kind = dtype if dtype != "auto" else ("bf16" if count >= WORTH_COMPILING else "")
    return int(count * (4.0 + PACKED_BYTES.get(kind, 0.0)))


def _parameters(source: str) -> int:
    if source == "smollm2":
        from chatwright.data.archives import smollm2_gguf

        source = str(smollm2_gguf())
    path = Path(source)
    if path.is_file() and path.suffix == ".gguf":
        from chatwright.interop.gguf_file import read_gguf

        return sum(prod(tensor.shape) for tensor in read_gguf(path).tensors)
    found = find_checkpoint(path) if path.exists() else None
    directory = found.path if found is not None else path
    return _stored(directory.glob("model*.safetensors"))


def _stored(files: Iterable[Path]) -> int:
    count = 0
    for file in files:
        with safetensors.safe_open(str(file), framework="np") as opened:
            count += sum(prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118 (not a dict)
    return count
