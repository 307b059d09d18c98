"""Atomic files and directories: written under a temporary name, flushed, renamed.

A reader sees the old content or the new one, never half of one, even if the writer is killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chatwright.config import UserError

LARGEST_JSON = 64 << 20
"""Most bytes of a JSON file: as Python objects they take twenty times as much memory, and more."""


@contextlib.contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A temporary directory beside `target` that becomes `target` when the block ends without an error.

    Otherwise nothing is left of it, nor of the folders around it that had to be made. Raises UserError when
    it cannot be written.
    """
    aside = target.parent / f".{target.name}.{os.getpid()}.partial"
    with _parents_of(target):
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir()
            yield aside
            take_place(aside, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Path of a temporary file beside `target` that becomes `target` when the block ends without an error;
    otherwise as `whole_directory`."""
    aside = target.parent / f".{target.name}.{os.getpid()}.partial"
    with _parents_of(target):
        try:
            yield aside
            _flush(aside)
            os.replace(aside, target)
            _flush(target.parent)
        finally:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)


@contextlib.contextmanager
def _parents_of(target: Path) -> Iterator[None]:
    """Make the folders around `target`; those that were made go again when the block fails. An OSError inside
    becomes a UserError."""
    made = [place for place in target.parents if not place.exists()]  # innermost first
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        for place in made:
            with contextlib.suppress(OSError):  # not empty: somebody else has put something there meanwhile
                place.rmdir()
        if isinstance(error, OSError):
            raise UserError(
                f"cannot write {target}: {error.strerror or error}; what was there before is intact"
            ) from error
        raise


def take_place(aside: Path, target: Path) -> None:
    """Flush a finished directory to the disk and rename it to `target`, replacing an earlier one."""
    for file in aside.rglob("*"):
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


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8: a reader sees the old or the new text, never half of one.

    Bytes of file names that the locale could not read (they are surrogates in Python) are written as they
    were.
    """
    aside = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8", errors="surrogateescape")
        _flush(aside)
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a value as JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises UserError when missing or broken."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise UserError(f"{path} is larger than {LARGEST_JSON >> 20} MB: no settings are")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _flush(path: Path) -> None:
    """Flush a file to the disk; on Linux and macOS also a directory."""
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
