"""Checkpoints: tensors as safetensors, state as JSON, with checksums, in directories that appear at once.

A checkpoint is a directory `step-000100/` with `model.safetensors`, `state.json` and, while training goes on,
`optimizer.safetensors`. It is written under a temporary name, flushed to the disk and renamed, so that it is
never half-written. `state.json` holds the SHA-256 of every file, its own included: a flipped byte is found,
and its file is named. Nothing here is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chatwright.config import UserError
from chatwright.files import read_json, sha256, whole_directory, write_text
from chatwright.tensor_files import NO_DIGEST, PARTS, load_tensors, save_tensors, write_state

STEP = re.compile(r"step-(\d{6,})$")
BEST = "best"
"""The file beside the checkpoints that has the name of the best one (`fit.keep_best`)."""
UNFINISHED = "unfinished"
"""The directory beside the checkpoints with the mid-step state of a step that was stopped (an iteration of
PPO)."""


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and buffers by name. A shared one appears once, under its first name."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Copy tensors into a model. Raises UserError naming missing, unexpected or differently shaped ones."""
    fill(model_tensors(model), tensors, where=where)


def fill(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Copy tensors into those of the same names, all or none. Raises UserError as `load_model_tensors`."""
    _check_fit(wanted, tensors, where=where)
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])


def check_fit(model: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Check that tensors fit a model, which may be on the meta device. Raises UserError as
    `load_model_tensors`."""
    _check_fit(model_tensors(model), tensors, where=where)


def _check_fit(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, where: str) -> None:
    missing, unexpected = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or unexpected:
        raise UserError(f"{where}: missing tensors {missing[:3]}, unexpected tensors {unexpected[:3]}")
    for name, tensor in wanted.items():
        if tensor.shape != tensors[name].shape:
            shapes = f"{tuple(tensors[name].shape)}, the model has {tuple(tensor.shape)}"
            raise UserError(f"{where}: tensor {name} has shape {shapes}")
        if tensor.is_floating_point() != tensors[name].is_floating_point():
            raise UserError(f"{where}: tensor {name} has numbers of type {tensors[name].dtype}")


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Hexadecimal SHA-256 of tensors with their names, shapes and values as float32, in the order of the
    names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().float().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def optimiser_tensors(optimisers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimisers' state as named tensors: `0.17.exp_avg` is state `exp_avg` of parameter 17 of optimiser
    0."""
    tensors = {}
    for number, optimiser in enumerate(optimisers):
        for index, state in optimiser.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"{number}.{index}.{key}"] = torch.as_tensor(value)
    return tensors


def load_optimiser_tensors(
    optimisers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]
) -> None:
    """Inverse of `optimiser_tensors`, for optimisers built in the same way."""
    for number, optimiser in enumerate(optimisers):
        content = optimiser.state_dict()
        content["state"] = {}
        for name, tensor in tensors.items():
            owner, index, key = name.split(".", 2)
            if owner == str(number):
                content["state"].setdefault(int(index), {})[key] = tensor
        optimiser.load_state_dict(content)


@dataclass(frozen=True)
class Checkpoint:
    """One `step-NNNNNN` directory."""

    path: Path

    @property
    def step(self) -> int:
        """The number in its name."""
        found = STEP.search(self.path.name)
        return int(found.group(1)) if found else 0

    def state(self) -> dict[str, Any]:
        """Content of state.json. Raises UserError when it cannot be read or is not an object."""
        state = read_json(self.path / "state.json")
        if not isinstance(state, dict):
            raise UserError(f"{self.path / 'state.json'}: expected an object")
        return state

    def verify(self) -> None:
        """Compare every file with its checksum. Raises UserError naming the first that differs."""
        files = self.state().get("files", {})
        if not isinstance(files, dict):
            raise UserError(f"{self.path / 'state.json'}: `files` must be an object of checksums")
        if not _state_is_whole((self.path / "state.json").read_bytes(), files.pop("state.json", None)):
            raise UserError(
                f"checkpoint {self.path}: state.json is damaged (its checksum differs); if it was edited on "
                "purpose, take the entry state.json out of its `files`"
            )
        for name, digest in files.items():
            file = self.path / name
            if not file.is_file():
                raise UserError(f"checkpoint {self.path}: {name} is missing")
            if sha256(file) != digest:
                raise UserError(f"checkpoint {self.path}: {name} is damaged (its checksum differs)")

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one of its files, `model` or `optimizer`; of a sharded checkpoint, consolidated."""
        if self.is_sharded:
            from chatwright import sharded  # torch's distributed part takes a second to import

            return sharded.whole_tensors(self.path, name)
        return load_tensors(self.path / f"{name}.safetensors")

    @property
    def is_sharded(self) -> bool:
        """Whether many processes wrote it, each its shards (sharded.py)."""
        return (self.path / PARTS).is_dir()


def save_checkpoint(
    target: Path,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    texts: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Write a checkpoint directory: `tensors["model"]` becomes model.safetensors, each of `texts` a file of
    that name; `state.json` is written last.

    Raises UserError when the disk is full; the previous content of `target` is then intact.
    """
    with whole_directory(target) as aside:
        for name, content in tensors.items():
            save_tensors(aside / f"{name}.safetensors", content)
        for file_name, text in (texts or {}).items():
            (aside / file_name).parent.mkdir(exist_ok=True)  # other chat templates have a folder
            (aside / file_name).write_text(text, encoding="utf-8")
        below = {name: sha256(aside / name) for name in texts or {} if "/" in name}
        write_state(aside, state, below)
    return Checkpoint(target)


def _state_is_whole(text: bytes, own: object) -> bool:
    """Whether a state.json passes its own checksum. One without a checksum (edited by hand, or from the first
    versions) passes.

    The checksum is searched for in the text, since a flipped byte may have changed its key.
    """
    found = re.findall(rb'"state\.json": "([0-9a-f]{64})"', text)
    if not found:
        return own is None
    zeroed = NO_DIGEST.encode().join(text.rsplit(found[-1], 1))
    return bool(hashlib.sha256(zeroed).hexdigest().encode() == found[-1])


def checkpoints(directory: Path) -> list[Checkpoint]:
    """The checkpoints in a directory, oldest first. Half-written ones have other names and are not listed."""
    if not directory.is_dir():
        return []
    found = [Checkpoint(path) for path in directory.iterdir() if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def newest_valid(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files pass their checksums, and a line for each newer one that fails."""
    complaints: list[str] = []
    for checkpoint in reversed(checkpoints(directory)):
        try:
            checkpoint.verify()
            return checkpoint, complaints
        except UserError as error:
            complaints.append(str(error))
    return None, complaints


def prune(directory: Path, keep: int, *, protected: Sequence[int] = ()) -> None:
    """Delete all checkpoints but the newest `keep` and the `protected` steps; also half-written leftovers."""
    for checkpoint in checkpoints(directory)[: -max(keep, 1)]:
        if checkpoint.step not in protected:
            delete(checkpoint)
    for name in ("step-*", f"{UNFINISHED}.*"):
        for kind in ("partial", "old", "gone"):
            for leftover in directory.glob(f".{name}.{kind}"):
                shutil.rmtree(leftover, ignore_errors=True)


def delete(checkpoint: Checkpoint) -> None:
    """Delete a checkpoint. It is renamed first: a process that dies meanwhile leaves no half of it under its
    name."""
    gone = checkpoint.path.with_name(f".{checkpoint.path.name}.{os.getpid()}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        checkpoint.path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def recover(directory: Path) -> None:
    """Bring back a checkpoint whose writer died after it moved the old one away and before it moved the new
    one into place.

    Only the one process that writes here may call this: a replacement in progress looks the same.
    """
    for old in directory.glob(".step-*.old"):
        target = directory / old.name[1:].split(".")[0]
        if not target.exists():
            old.rename(target)


def write_best(directory: Path, step: int) -> None:
    """Write the name of a directory's best checkpoint into the file `best`."""
    write_text(directory / BEST, f"step-{step:06}\n")


def best(directory: Path) -> Checkpoint | None:
    """The checkpoint that `write_best` named; None without such a file. Raises UserError when no checkpoint
    has that name."""
    file = directory / BEST
    if not file.is_file():
        return None
    name = file.read_text(encoding="utf-8", errors="replace").strip()
    if not STEP.fullmatch(name) or not (directory / name).is_dir():
        raise UserError(f"{file} names {name!r}, which is no checkpoint beside it")
    return Checkpoint(directory / name)
