"""The folders that runs write into: whose they are, what is moved aside, and what a failed start leaves.

A stage's folder has a clock.json from its first second on. A folder that has none belongs to somebody else,
and so does a file that no stage writes. Neither is ever moved, replaced or deleted: the stage refuses to
begin, with one line.

A stage that begins anew, because its settings or inputs have changed, does this with what is there:

* A finished result is renamed to STAGE.old-N: it cost hours, and somebody may want to compare.
* Of unfinished attempts that saved a checkpoint the latest is kept, as STAGE.old-unfinished. Every start
  with changed settings makes one of these, so that numbered copies would fill a disk with things that nobody
  reads; but one change by mistake must not cost the hours of the attempt before it.
* An unfinished attempt without a checkpoint holds nothing that cost time, and is replaced.

A stage that fails before it has learnt or written anything, as it does when an input is wrong, leaves the
disk as it was: `StageFolder.undo` takes back the renaming, and the folder that was made. One that was killed
then could not; the next start does it (`StageFolder.take_back`).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatwright import discovery
from chatwright.config import UsageError, UserError, read_yaml
from chatwright.files import read_json

CLOCK, RESULT, CHECKPOINTS = "clock.json", "result.json", "checkpoints"
OLD = ".old-"
"""Stands in the name of a folder that was moved aside: STAGE.old-1, STAGE.old-unfinished."""

WRITTEN = frozenset(
    {
        *(CLOCK, RESULT, CHECKPOINTS, "config.yaml", "metrics.jsonl", "report.md", "curves.png"),
        *("calibration.png", "pairs.json", "per_prompt.json", "adapter", "records", "tokenizer.json"),
        *("train", "validation", "tensorboard", "wandb"),
    }
)
"""What our own stages write into their folders. What others write is noted in clock.json when they end."""
INSIDE = {
    CHECKPOINTS: re.compile(r"step-\d{6,}|best|unfinished"),
    "records": re.compile(r"((dialogues|ratings|comparisons)-)?(train|validation)\.jsonl"),
    "adapter": re.compile(r"adapter_config\.json|adapter_model\.safetensors|README\.md"),
    "train": re.compile(r"shards\.json|tokens-\d+\.(bin|crc32)"),
    "validation": re.compile(r"shards\.json|tokens-\d+\.(bin|crc32)"),
}
"""What our own stages write into folders of their folders. In others (of trackers) nothing is looked for."""
_PARTIAL = re.compile(r"\.(partial|gone|old)(\.png)?$")
"""How the names of files end that were not finished."""


# ---- places ------------------------------------------------------------------------------------------------


def check_place(directory: Path, *, given: str, example: str) -> None:
    """Raise UsageError when `directory` can be no folder of its own: the current one or one around it, a
    file, a link, inside a stage's folder, or where nobody may write.

    `given` names it in messages (`--out .`), `example` is a name that would do. Nothing is written.
    """
    instead = f"name a folder of its own, for example {example}"
    try:
        whole, here = Path(os.path.abspath(directory)), Path.cwd()
        if here.is_relative_to(whole):
            what = "the folder that you are in" if here == whole else "a folder around the one you are in"
            raise UsageError(f"{given} is {what}; {instead}")
        if directory.exists() and not directory.is_dir():
            raise UsageError(f"{given} is a file; {instead}")
    except (OSError, ValueError) as error:  # a name that is too long, a part that may not be looked into
        raise UsageError(f"{given}: {getattr(error, 'strerror', None) or error}; {instead}") from None
    _check_around(directory, given, instead)
    if directory.is_dir() and not os.access(directory, os.W_OK | os.X_OK):
        raise UsageError(f"{given}: you may not write there; {instead}")


def check_file_place(file: Path, *, given: str) -> None:
    """Raise UsageError when no file can be written to this path: it is a folder or a link, lies inside a
    stage's folder, or nobody may write there."""
    instead = "name another file"
    try:
        if file.is_dir():
            raise UsageError(f"{given} is a directory; name a file")
    except (OSError, ValueError) as error:
        raise UsageError(f"{given}: {getattr(error, 'strerror', None) or error}; {instead}") from None
    _check_around(file, given, instead)


def _check_around(path: Path, given: str, instead: str) -> None:
    """The part of `check_place` that concerns a path as such, and the folders around it."""
    try:
        if path.is_symlink():
            raise UsageError(f"{given} is a link to {os.readlink(path)}; {instead}")
        around = Path(os.path.abspath(path)).parents
        for parent in around:
            if parent.exists() and not parent.is_dir():
                raise UsageError(f"{given}: {_shown(parent)} is a file and no folder; {instead}")
            if (parent / CLOCK).is_file():
                raise UsageError(f"{given} lies in {_shown(parent)}, the folder of a stage; {instead}")
        near = next(place for place in around if place.exists())
    except (OSError, ValueError) as error:
        raise UsageError(f"{given}: {getattr(error, 'strerror', None) or error}; {instead}") from None
    if not path.exists() and not os.access(near, os.W_OK | os.X_OK):
        raise UsageError(f"{given}: you may not write in {_shown(near)}; {instead}")


def check_root(root: Path, *, given: str) -> None:
    """Raise UsageError or UserError when `root` cannot be the folder of a run: as `check_place`, or it holds
    other things and no stage."""
    check_place(root, given=given, example="runs/mine (--out runs --name mine)")
    others = _visible(root)
    if others and not any((root / name / file).is_file() for name in others for file in (CLOCK, RESULT)):
        kind = "a stage's folder" if CLOCK in others or RESULT in others else "not the folder of a run"
        raise UserError(
            f"{given} is {kind}: it holds {_listed(others)}; nothing was touched. Give the run another "
            "--name or --out"
        )


def _visible(directory: Path) -> list[str]:
    """The names in a folder, sorted, except those that begin with a dot; none if there is no such folder."""
    if not directory.is_dir():
        return []
    try:
        return sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}") from None


def _shown(path: Path) -> str:
    """A path as the person would write it: from the current folder, where it lies inside of it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _listed(names: Iterable[str], most: int = 3) -> str:
    known = list(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(known[:most]) + more


# ---- a stage's folder --------------------------------------------------------------------------------------


@dataclass
class StageFolder:
    """The folder of one stage, `verb`, while it is begun."""

    path: Path
    verb: str
    _renamed: list[tuple[Path, Path]] = field(default_factory=list)
    """What `begin` renamed: (from, to)."""
    _replaced: list[Path] = field(default_factory=list)
    """Those of them that are deleted once the new attempt is under way."""
    _made: Path | None = None
    """The topmost folder that `begin` made; None when the stage's folder was there."""
    _is_new: bool = False
    """Whether the folder was empty, or not there, so that all in it comes from this attempt."""
    _before: frozenset[str] = frozenset()
    """The names that were there when the stage began or went on."""

    def check(self) -> None:
        """Raise UserError when the folder holds anything but this stage, finished or begun."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file, and the stage {self.verb} needs a folder of that name")
        names = _visible(self.path)
        if not names:
            return
        example = self.path.with_name(f"{self.path.name}-2")
        if self._mark() is None:
            stages = [name for name in names if (self.path / name / CLOCK).is_file() and OLD not in name]
            if stages:
                raise UserError(
                    f"{self.path} is the folder of a whole run ({_listed(stages)}); give the stage "
                    f"{self.verb} a folder of its own in it: --out {self.path / self.verb}"
                )
            raise UserError(
                f"{self.path} holds {_listed(names)}, which is no work of the stage {self.verb}; nothing was "
                f"touched. Name a new or empty folder, for example --out {example}"
            )
        found = self._found_verb()
        if found and discovery.current_name(found) != discovery.current_name(self.verb):
            raise UserError(
                f"{self.path} is the folder of the stage {found}, not of {self.verb}; nothing was touched. "
                f"Name a folder of its own, for example --out {self.path.with_name(self.verb)}"
            )

    @property
    def has_result(self) -> bool:
        """Whether an attempt was finished, with whatever settings."""
        return (self.path / RESULT).is_file()

    def is_begun(self, mark: str) -> bool:
        """Whether what lies here has the fingerprint `mark`: a result, or an attempt to go on with."""
        return self._mark() == mark

    @contextlib.contextmanager
    def attempt(self, *, kept: type[BaseException], tell: Callable[[str], None]) -> Iterator[None]:
        """An attempt, from before `begin` to its end. If it fails at once, `begin` is taken back, except
        after an exception of the type `kept`, which says that the same command goes on."""
        try:
            yield
        except kept:
            self.settle()
            raise
        except BaseException:
            moved = bool(self._renamed)
            if self.undo() and moved:  # people have read that it was moved
                tell(f"[{self.path.name}] could not begin: {self.path} is as it was")
            raise
        self.settle()

    def begin(self, mark: str) -> str:
        """Make the folder, and move an attempt with another fingerprint aside; returns what to tell about it.

        Raises UserError, and nothing is changed, when a file lies in it that the stage did not write, or the
        folder cannot be made.
        """
        told = ""
        if self.path.is_symlink():
            raise UserError(
                f"{self.path} is a link to {os.readlink(self.path)}, and settings or inputs of what lies "
                "there have changed; remove the link, or name another folder"
            )
        if _visible(self.path) and not self.is_begun(mark):
            unknown = self._unknown(self.path)
            if unknown:
                raise UserError(
                    f"settings or inputs of {self.path} have changed, so that it would be moved aside; but "
                    f"it holds {_listed(unknown)}, which the stage did not write. Move that elsewhere, or "
                    "name another folder"
                )
            told = self._move_aside()
        self._made = next(
            (place for place in (*reversed(self.path.parents), self.path) if not place.exists()), None
        )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self.undo()
            raise UserError(f"cannot make the folder {self.path}: {error.strerror or error}") from None
        self._before = frozenset(_visible(self.path))
        self._is_new = not self._before
        return told

    @property
    def aside(self) -> str:
        """The name of the finished result that `begin` has moved aside, for clock.json; "" where there is
        none."""
        return next((to.name for place, to in self._renamed if place == self.path and OLD in to.name), "")

    def can_take_back(self) -> bool:
        """Whether what lies here is an attempt that has saved and logged nothing, in whose place a finished
        result lay: it was killed while it began."""
        aside = str(self._clock().get("aside") or "")
        if not aside.startswith(f"{self.path.name}{OLD}") or self.has_result or self._has_work():
            return False
        return (self.path.with_name(aside) / RESULT).is_file() and not self._unknown(self.path)

    def take_back(self) -> str:
        """Put the finished result back in its place (`can_take_back`); returns what to tell. Raises
        UserError."""
        aside = self.path.with_name(str(self._clock()["aside"]))
        gone = self._hidden(self.path)
        try:
            self.path.rename(gone)
            aside.rename(self.path)
        except OSError as error:
            raise UserError(f"cannot rename {aside} to {self.path}: {error.strerror}") from None
        shutil.rmtree(gone, ignore_errors=True)
        return (
            f"[{self.path.name}] the last start was ended before it saved anything: {aside} is back in place"
        )

    def noted(self) -> list[str]:
        """Names that the stage has written beside those of WRITTEN, for clock.json."""
        earlier = set(self._clock().get("files") or ())
        now = set(_visible(self.path))
        return sorted((now & earlier) | (now - self._before - WRITTEN))

    def undo(self) -> bool:
        """Take back `begin`, if the stage has saved and logged nothing since; returns whether it did.

        Only files that stages are known to write are deleted. Where anything else has appeared, all stays.
        """
        if self._has_work() or self._unknown(self.path, noted=False):
            self.settle()
            return False
        if self._is_new and self.path.is_dir():
            for entry in self.path.iterdir():
                if not entry.name.startswith(".") or _PARTIAL.search(entry.name):
                    _delete(entry)
            self._remove_made()
        for source, target in reversed(self._renamed):
            with contextlib.suppress(OSError):
                target.rename(source)
        self._renamed, self._replaced, self._made = [], [], None
        return True

    def settle(self) -> None:
        """Delete what the new attempt has replaced: it is under way."""
        for place in self._replaced:
            shutil.rmtree(place, ignore_errors=True)
        self._renamed, self._replaced = [], []

    def _remove_made(self) -> None:
        """Remove the stage's folder and the empty ones around it that `begin` made."""
        for place in (self.path, *self.path.parents) if self._made is not None else ():
            with contextlib.suppress(OSError):  # somebody else has put something there meanwhile
                place.rmdir()
            if place == self._made:
                return

    def _move_aside(self) -> str:
        """Rename the folder, by the rules at the top of this file; returns what to tell."""
        name = self.path.name
        changed = f"[{name}] settings or inputs have changed: running again"
        if (self.path / RESULT).is_file():
            number = 1
            while (aside := self.path.with_name(f"{name}{OLD}{number}")).exists():
                number += 1
            self._rename(self.path, aside)
            return f"{changed}; the earlier result is now {aside}"
        if not any((self.path / CHECKPOINTS).glob("step-*")):
            self._rename(self.path, self._hidden(self.path), replaced=True)
            return f"{changed}, in place of an attempt that had saved nothing"
        aside = self.path.with_name(f"{name}{OLD}unfinished")
        if aside.exists():
            unknown = self._unknown(aside)
            if unknown:
                raise UserError(
                    f"{aside}, an unfinished attempt, would be replaced; but it holds {_listed(unknown)}, "
                    "which the stage did not write. Move that elsewhere, or name another folder"
                )
            self._rename(aside, self._hidden(aside), replaced=True)
        self._rename(self.path, aside)
        return f"{changed}; the unfinished attempt is now {aside}, where the next unfinished one replaces it"

    def _rename(self, source: Path, target: Path, *, replaced: bool = False) -> None:
        try:
            source.rename(target)
        except OSError as error:
            self.undo()
            raise UserError(f"cannot rename {source} to {target}: {error.strerror}") from None
        self._renamed.append((source, target))
        if replaced:
            self._replaced.append(target)

    @staticmethod
    def _hidden(path: Path) -> Path:
        gone = path.with_name(f".{path.name}.{os.getpid()}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        return gone

    def _has_work(self) -> bool:
        """Whether the attempt has a checkpoint, a report, or a metric."""
        log = self.path / "metrics.jsonl"
        return (
            any((self.path / CHECKPOINTS).glob("step-*"))
            or (self.path / CHECKPOINTS / "unfinished").exists()
            or (self.path / "report.md").exists()
            or (log.is_file() and log.stat().st_size > 0)
        )

    def _unknown(self, place: Path, *, noted: bool = True) -> list[str]:
        """Names in a stage's folder that the stage did not write; `noted`: those in clock.json count as
        written."""
        known = set(WRITTEN)
        if noted:
            known |= {str(name) for name in _object(place / CLOCK).get("files") or ()}
            known |= {str(name) for name in _object(place / RESULT).get("pictures") or ()}
        unknown = [name for name in _visible(place) if name not in known]
        inside = [
            f"{folder}/{name}"
            for folder, ours in INSIDE.items()
            for name in _visible(place / folder)
            if not ours.fullmatch(name)
        ]
        return unknown + inside

    def _clock(self) -> dict[str, Any]:
        return _object(self.path / CLOCK)

    def _mark(self) -> str | None:
        """The fingerprint of what lies here; a result that was copied without its clock has one as well."""
        found = self._clock() or _object(self.path / RESULT)
        mark = found.get("fingerprint")
        return None if mark is None else str(mark)

    def _found_verb(self) -> str:
        """The stage whose folder this is; empty where no file says it."""
        found = self._clock().get("verb") or _object(self.path / RESULT).get("verb")
        if not found:
            with contextlib.suppress(UserError):
                found = read_yaml(self.path / "config.yaml").get("use")
        return str(found or "")


def _delete(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)


def _object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file. Raises UserError for anything else."""
    if not file.is_file():
        return {}
    found = read_json(file)
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected an object")
    return found
