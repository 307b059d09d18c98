"""Finds the verbs: the files of commands/ and stages/, and the entry points of other packages.

Listing imports nothing: a verb's one-line help is the first line of its file's docstring.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

from chatwright.config import UsageError, UserError, near_match

STAGES, SOURCES = "chatwright.stages", "chatwright.sources"
"""The groups of entry points by which other packages add stages and data sources."""

RENAMED = {"bestofn": "best_of_n", "eval": "evaluate"}
"""Former name of a stage -> its name now. Former names are accepted until version 0.3."""

ORDER = ("data", "tokenizer", "pretrain", "finetune", "sft", "reward", "classifier", "ppo", "reinforce")
"""Stages in the order of a whole run; the help lists others after them, by name."""


@dataclass(frozen=True)
class Verb:
    """A verb of the command line."""

    name: str
    module: str
    """Dotted name of its module."""
    package: str = ""
    """The other package that adds it; empty for our own."""

    def load(self) -> ModuleType:
        """Import the module. Raises UserError when a package of others cannot be imported."""
        if not self.package:
            return importlib.import_module(self.module)
        with named_package(f"the stage {self.name}", self.package):
            return importlib.import_module(self.module)

    def summary(self) -> str:
        """The first line of the file's docstring, without the paper that it cites after two spaces."""
        try:
            found = importlib.util.find_spec(self.module)
        except (ImportError, ValueError):
            return ""
        if found is None or not found.origin:
            return ""
        return first_line(Path(found.origin)).split("  ")[0].rstrip(".")


@contextlib.contextmanager
def named_package(what: str, package: str) -> Iterator[None]:
    """Whatever goes wrong inside, in a package of others, is a UserError that names the package."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the code of others may fail in any way
        told = f"{type(error).__name__}: {error}"
        raise UserError(f"{what} of package {package} cannot be loaded: {told}") from error


def brought(group: str) -> dict[str, tuple[metadata.EntryPoint, str]]:
    """What other packages bring as entry points of a group: name -> (entry point, package). Nothing is
    imported. Of two packages with the same name the first one counts."""
    found: dict[str, tuple[metadata.EntryPoint, str]] = {}
    for entry in metadata.entry_points(group=group):
        package = entry.dist.name if entry.dist is not None else entry.module
        found.setdefault(entry.name, (entry, package))
    return found


def first_line(file: Path) -> str:
    """The first line of a Python file's docstring; the file is parsed, not run."""
    try:
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, SyntaxError):
        return ""
    return (docstring or "").partition("\n")[0]


def _files(package: str) -> dict[str, Verb]:
    """The verbs that are files or folders of a package, except names that begin with an underscore."""
    folder = Path(__file__).parent / package
    names = [
        path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    ]
    public = sorted(name for name in names if not name.startswith("_"))
    return {name.rstrip("_"): Verb(name.rstrip("_"), f"chatwright.{package}.{name}") for name in public}


@functools.cache
def commands() -> dict[str, Verb]:
    """The verbs that are not stages, by name."""
    return _files("commands")


@functools.cache
def stages() -> dict[str, Verb]:
    """All stages by name, our own first. Another package cannot replace one of ours."""
    own = _files("stages")
    order = {name: place for place, name in enumerate(ORDER)}
    found = dict(sorted(own.items(), key=lambda item: (order.get(item[0], len(ORDER)), item[0])))
    for spelled, (entry, package) in brought(STAGES).items():
        name = spelled.replace("-", "_")
        if name not in commands():
            found.setdefault(name, Verb(name, entry.module, package))
    return found


def current_name(name: str) -> str:
    """A stage's current name: `best-of-n` and the former `bestofn` mean best_of_n."""
    name = name.replace("-", "_")
    return RENAMED.get(name, name)


def tell_new_name(name: str, *, where: str) -> None:
    """A line on standard error where somebody wrote a former name of a stage."""
    if name in RENAMED:
        told = f"{where}: {name} is called {RENAMED[name]} now; the former name is read until version 0.3"
        print(told, file=sys.stderr)


def stage_verb(name: str, *, where: str = "") -> Verb:
    """The verb of the stage `name`. Raises UsageError with a near match."""
    known = stages()
    if current_name(name) not in known:
        raise UsageError(f"{where}no stage is called {name!r}{near_match(current_name(name), list(known))}")
    return known[current_name(name)]
