"""Files that survive: tensors as safetensors, state as JSON, checksums, and directories that appear whole or not.

A checkpoint is a directory `step-000100/` with `model.safetensors`, `state.json` and, while training goes on,
`optimizer.safetensors`. It is written under a temporary name, flushed to the disk and renamed; `state.json` holds the
SHA-256 of every other file, so that a flipped byte is found and named. Nothing here is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from chatwright.config import UserError

STEP = re.compile(r"step-(\d{6,})$")


@contextlib.contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A temporary directory beside `target` that becomes `target` when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.parent / f".{target.name}.{os.getpid()}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for file in aside.iterdir():
            if file.is_file():
                _flush(file)
        if target.exists():
            old = target.parent / f".{target.name}.{os.getpid()}.old"
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            aside.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            aside.rename(target)
        _flush(target.parent)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}; what was there before is intact") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file aside and rename it: a reader sees the old or the new text, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        aside.write_text(text, encoding="utf-8")
        _flush(aside)
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a value as JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises UserError when missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _flush(path: Path) -> None:
    """Push a file's (on Linux and macOS also a directory's) content to the disk before it is relied on."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, in C order and on the CPU, as safetensors."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    try:
        safetensors.torch.save_file(content, path)
        path.chmod(mode)  # the library makes files that nobody else can read, whatever the umask says
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


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and buffers by name, shared ones once under their first name."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Copy tensors into a model. Raises UserError naming what is missing, unexpected or of another shape."""
    wanted = model_tensors(model)
    missing, unexpected = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or unexpected:
        raise UserError(f"{where}: missing tensors {missing[:3]}, unexpected tensors {unexpected[:3]}")
    with torch.no_grad():
        for name, tensor in wanted.items():
            if tensor.shape != tensors[name].shape:
                shapes = f"{tuple(tensors[name].shape)}, the model has {tuple(tensor.shape)}"
                raise UserError(f"{where}: tensor {name} has shape {shapes}")
            tensor.copy_(tensors[name])


def optimiser_tensors(optimisers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimisers' state as named tensors: `0.17.exp_avg` is state `exp_avg` of parameter 17 of optimiser 0."""
    tensors = {}
    for number, optimiser in enumerate(optimisers):
        for index, state in optimiser.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"{number}.{index}.{key}"] = torch.as_tensor(value)
    return tensors


def load_optimiser_tensors(optimisers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]) -> None:
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
        for name, digest in files.items():
            file = self.path / name
            if not file.is_file():
                raise UserError(f"checkpoint {self.path}: {name} is missing")
            if sha256(file) != digest:
                raise UserError(f"checkpoint {self.path}: {name} is damaged (its checksum differs)")

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one of its files, `model` or `optimizer`."""
        return load_tensors(self.path / f"{name}.safetensors")


def save_checkpoint(
    target: Path,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    texts: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Write a checkpoint directory: `tensors["model"]` -> model.safetensors, `texts` as they are, `state.json` last.

    Raises UserError when the disk is full; the previous content of `target` is then intact.
    """
    with whole_directory(target) as aside:
        for name, content in tensors.items():
            save_tensors(aside / f"{name}.safetensors", content)
        for file_name, text in (texts or {}).items():
            (aside / file_name).write_text(text, encoding="utf-8")
        files = {file.name: sha256(file) for file in sorted(aside.iterdir())}
        (aside / "state.json").write_text(json.dumps({**state, "files": files}, indent=1), encoding="utf-8")
    return Checkpoint(target)


def checkpoints(directory: Path) -> list[Checkpoint]:
    """The checkpoints in a directory, oldest first. Unfinished ones have other names and are not seen."""
    if not directory.is_dir():
        return []
    found = [Checkpoint(path) for path in directory.iterdir() if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def newest_valid(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files pass their checksums, and a line for each newer one that did not."""
    complaints: list[str] = []
    for checkpoint in reversed(checkpoints(directory)):
        try:
            checkpoint.verify()
            return checkpoint, complaints
        except UserError as error:
            complaints.append(str(error))
    return None, complaints


def prune(directory: Path, keep: int, *, spare: Sequence[int] = ()) -> None:
    """Delete all but the newest `keep` checkpoints and those whose step is in `spare`; also unfinished leftovers."""
    for checkpoint in checkpoints(directory)[: -max(keep, 1)]:
        if checkpoint.step not in spare:
            shutil.rmtree(checkpoint.path, ignore_errors=True)
    for leftover in (*directory.glob(".step-*.partial"), *directory.glob(".step-*.old")):
        shutil.rmtree(leftover, ignore_errors=True)
