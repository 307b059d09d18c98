"""Tensors in safetensors files, never pickle; and `state.json`, which holds every file's checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from chatwright.config import UserError
from chatwright.files import sha256

PARTS = "sharded"
"""The folder of a sharded checkpoint with one file per process."""
NO_DIGEST = "0" * 64  # stands for the checksum of state.json while that checksum is computed


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors, in C order and on the CPU, as safetensors; `metadata` goes into the file's header."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    try:
        safetensors.torch.save_file(content, path, metadata)
        path.chmod(mode)  # the library ignores the umask and makes files that only the owner can read
    except safetensors.SafetensorError as error:
        raise OSError(None, str(error)) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises UserError when missing, cut off or not safetensors."""
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file: {error}") from None


def write_state(directory: Path, state: Mapping[str, Any], known: Mapping[str, str] | None = None) -> None:
    """Write `state.json` after all other files of a directory: `state`, and `files` with every file's
    checksum.

    Its own checksum is that of its text with 64 zeros in the checksum's place, so that it covers every byte.
    `known` are checksums of files in folders below, computed by their writers.
    """
    files = {file.name: sha256(file) for file in sorted(directory.iterdir()) if file.is_file()} | dict(
        known or {}
    )
    text = json.dumps({**state, "files": {**files, "state.json": NO_DIGEST}}, indent=1)
    own = hashlib.sha256(text.encode()).hexdigest()
    (directory / "state.json").write_bytes(own.join(text.rsplit(NO_DIGEST, 1)).encode())
