"""Finds the verbs: the files of commands/ and stages/, and the entry points of other packages.

Listing imports nothing: a verb's one-line help is the first line of its file's docstring.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
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
        """Import the module. Raises UserError when the module of another package cannot be imported."""
        try:
            return importlib.import_module(self.module)
        except ImportError as error:
            if not self.package:
                raise
            raise UserError(
                f"the stage {self.name} of package {self.package} cannot be imported: {error}"
            ) from None

    def summary(self) -> str:
        """The first line of the file's docstring, without the paper that it cites after two spaces."""
        try:
            found = importlib.util.find_spec(self.module)
        except (ImportError, ValueError):
            return ""
        if found is None or not found.origin:
            return ""
        return first_line(Path(found.origin)).split("  ")[0].rstrip(".")


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
    for entry in metadata.entry_points(group=STAGES):
        package = entry.dist.name if entry.dist is not None else entry.module
        found.setdefault(entry.name, Verb(entry.name, entry.module, package))
    return found


def current_name(name: str) -> str:
    """A stage's current name: `best-of-n` and the former `bestofn` mean best_of_n."""
    name = name.replace("-", "_")
    return RENAMED.get(name, name)


def stage_verb(name: str, *, where: str = "") -> Verb:
    """The verb of the stage `name`. Raises UsageError with a near match."""
    known = stages()
    if current_name(name) not in known:
        raise UsageError(f"{where}no stage is called {name!r}{near_match(name, list(known))}")
    return known[current_name(name)]
