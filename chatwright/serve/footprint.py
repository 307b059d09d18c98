"""How much memory a model will take, from the headers of its files: nothing is loaded for it."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from pathlib import Path

import safetensors

from chatwright.config import UserError
from chatwright.language_model import WORTH_COMPILING, find_checkpoint

PACKED_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.06, "int4": 0.63}
"""Bytes per weight of the copies that the CPU kernels make, group scales included (kernels/packing.py)."""


def weight_bytes(source: str, dtype: str = "auto") -> int:
    """Bytes for the weights of a model that `load` would read: float32, and the packed copy where kernels are used.

    Keys and values are not in it. 0 where the files are not on this machine yet, or say nothing: the loader will.
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
