"""Sharded checkpoints: many processes write one together, each its shards, while training goes on.

They use torch.distributed.checkpoint (DCP). Its usual format describes the shards in a pickle (`.metadata`),
and nothing here is ever unpickled. So shards are written by its safetensors writer, which puts the position
of every shard into the safetensors header. Any number of processes can read them, each the pieces that it
needs.

The directory follows the rules of `checkpoint`: `sharded/` with one file per process, the texts, and last
`state.json` with every file's SHA-256. It has a temporary name until it is complete.
"""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult

from chatwright import runtime
from chatwright.config import UserError
from chatwright.files import read_json, sha256, take_place, whole_directory
from chatwright.tensor_files import PARTS, save_tensors, write_state


def aside_of(target: Path) -> Path:
    """The temporary directory of a checkpoint until it is complete; the same in every process."""
    return target.parent / f".{target.name}.shared.partial"


class _Writer(HuggingFaceStorageWriter):
    """DCP's safetensors writer; each process also computes the checksums of its files."""

    def __init__(
        self, target: Path, state: Mapping[str, Any], texts: Mapping[str, str], then: Callable[[], None]
    ) -> None:
        super().__init__(str(aside_of(target) / PARTS), save_distributed=True)
        self.target, self.state, self.texts, self.then = target, dict(state), dict(texts), then

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Write this process's shards, and beside each file its checksum."""
        written = super().write_data(plan, planner)
        if plan.items:
            for file in (aside_of(self.target) / PARTS).glob(
                f"shard-{plan.storage_data['shard_index']:05}-*.safetensors"
            ):
                file.with_suffix(".sha256").write_text(sha256(file), encoding="ascii")
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """In rank zero, after all have written: write texts, checksums and state.json, and rename."""
        aside = aside_of(self.target)
        files = {}
        for digest in sorted((aside / PARTS).glob("*.sha256")):
            files[f"{PARTS}/{digest.stem}.safetensors"] = digest.read_text(encoding="ascii")
            digest.unlink()
        for name, text in self.texts.items():
            (aside / name).write_text(text, encoding="utf-8")
        write_state(aside, self.state, files)
        take_place(aside, self.target)
        self.then()


class Saving:
    """A checkpoint that is being written in the background. One at a time: `flush` before the next."""

    def __init__(self) -> None:
        self._future: Future[Any] | None = None
        self._target = Path()

    def start(
        self,
        target: Path,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        texts: Mapping[str, str],
        then: Callable[[], None],
    ) -> None:
        """Copy the tensors (DTensors, or equal ones in every process) and write the copies in the background.

        Every process must call this. Rank zero calls `then` when the checkpoint is complete.
        """
        self.flush()
        if runtime.is_rank_zero():
            shutil.rmtree(aside_of(target), ignore_errors=True)
        runtime.barrier()
        self._target = target
        with _without_dcp_warnings():
            self._future = async_save(  # type: ignore[assignment]
                {name: tensor.detach() for name, tensor in tensors.items()},
                storage_writer=_Writer(target, state, texts, then),
                process_group=runtime.group("saving"),
            )

    def flush(self) -> None:
        """Wait until the checkpoint is on the disk. Raises UserError in every process if writing failed."""
        future, self._future = self._future, None
        if future is None:
            return
        try:
            future.result()
        except CheckpointException as error:
            reason = next(iter(error.failures.values()))
            cause = reason[0] if isinstance(reason, tuple) else reason
            raise UserError(
                f"cannot write {self._target}: {cause}; what was there before is intact"
            ) from error
        finally:
            if runtime.is_rank_zero():
                shutil.rmtree(aside_of(self._target), ignore_errors=True)


def describe(directory: Path) -> dict[str, TensorStorageMetadata]:
    """Name -> size and type of every tensor in a sharded checkpoint. Raises UserError if damaged."""
    try:
        found = HuggingFaceStorageReader(str(directory / PARTS)).read_metadata().state_dict_metadata
    except Exception as error:  # the library's own errors have no common class
        raise UserError(f"{directory / PARTS} is damaged: {error}") from None
    return {name: item for name, item in found.items() if isinstance(item, TensorStorageMetadata)}


def read(directory: Path, tensors: Mapping[str, Tensor], *, alone: bool = False) -> None:
    """Fill tensors of the right shapes, DTensors or plain ones, from a sharded checkpoint.

    Every process must call this, unless `alone`. Raises UserError naming a missing or differently shaped
    tensor.
    """
    known = describe(directory)
    for name, tensor in tensors.items():
        if name not in known:
            raise UserError(f"{directory}: missing tensor {name!r}")
        if tuple(known[name].size) != tuple(tensor.shape):
            shapes = f"{tuple(known[name].size)}, the model has {tuple(tensor.shape)}"
            raise UserError(f"{directory}: tensor {name} has shape {shapes}")
    with _without_dcp_warnings():
        load(
            dict(tensors),
            storage_reader=HuggingFaceStorageReader(str(directory / PARTS)),
            process_group=None if alone else runtime.group("saving"),
            no_dist=alone,
        )


def whole_tensors(directory: Path, part: str) -> dict[str, Tensor]:
    """The whole tensors `part/...` of a sharded checkpoint, on this process's CPU, named without `part/`."""
    wanted = {name: item for name, item in describe(directory).items() if name.startswith(f"{part}/")}
    claimed = sum(item.size.numel() * item.properties.dtype.itemsize for item in wanted.values())
    there = sum(file.stat().st_size for file in (directory / PARTS).iterdir())
    if claimed > there:  # check before allocating memory
        raise UserError(
            f"{directory / PARTS} is damaged: tensors of {claimed} bytes are said to be in {there}"
        )
    tensors = {name: torch.empty(item.size, dtype=item.properties.dtype) for name, item in wanted.items()}
    read(directory, tensors, alone=True)
    return {name.removeprefix(f"{part}/"): tensor for name, tensor in tensors.items()}


def consolidate(directory: Path) -> None:
    """Replace a sharded checkpoint by an ordinary one of the same content. One process calls this; it works
    file by file."""
    state = read_json(directory / "state.json")
    state.pop("files", None)
    with whole_directory(directory) as aside:
        for part in sorted({name.partition("/")[0] for name in describe(directory)}):
            save_tensors(aside / f"{part}.safetensors", whole_tensors(directory, part))
        for file in directory.iterdir():
            if file.is_file() and file.name != "state.json":
                shutil.copyfile(file, aside / file.name)
        write_state(aside, state)


@contextlib.contextmanager
def _without_dcp_warnings() -> Iterator[None]:
    """Hide DCP's warnings: that there is only one process, and about its own future changes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
