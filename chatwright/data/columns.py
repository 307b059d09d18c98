"""Columns with other names than the usual ones: what stands behind the `#` of a source.

`chats.jsonl#turns` names the one column that counts: the list of messages, or the text.
`faq.csv#prompt=Frage,completion=Antwort` gives columns the names that formats.py and preferences.py know; of
the other columns only `system` and `annotator` are then read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from chatwright.config import UserError, near_match
from chatwright.data.reading import Faults, Row
from chatwright.data.shapes import ANSWERED, ASKED, LISTS, columns_of

BESIDE = ("system", "annotator")
"""Columns that are read beside those that the user named."""
KNOWN = (
    "text",
    "label",
    *LISTS,
    *ASKED,
    *ANSWERED,
    "instruction",
    "input",
    "output",
    "chosen",
    "rejected",
    "responses",
    "scores",
    *BESIDE,
)
"""The names that the readers know."""


@dataclass(frozen=True)
class Columns:
    """What the user said about columns; empty when nothing."""

    single: str = ""
    """The name of the one column that counts."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Usual name -> name in the file."""

    def __bool__(self) -> bool:
        return bool(self.single or self.names)

    def renamed(self, rows: Iterable[Row], faults: Faults) -> Iterator[Row]:
        """The rows with the usual names. Raises UserError: a column is not there."""
        for where, row in rows:
            missing = [name for name in self.names.values() if name not in row]
            if missing:
                faults.met(
                    UserError(f"{where}: no column {missing[0]!r}; the columns found are: {columns_of(row)}")
                )
                continue
            taken = {usual: row[name] for usual, name in self.names.items()}
            beside = {name: row[name] for name in BESIDE if name in row and name not in taken}
            yield where, {**taken, **beside}


def read_columns(text: str, where: str) -> Columns:
    """The columns written behind a `#`. Raises UserError for a name that no reader knows."""
    if "=" not in text:
        return Columns(single=text.strip())
    names: dict[str, str] = {}
    for piece in text.split(","):
        usual, equals, name = (part.strip() for part in piece.partition("="))
        if not equals or not name:
            raise UserError(
                f"{where}#{text}: {piece!r} is not of the form NAME=COLUMN, as in prompt=Question"
            )
        if usual not in KNOWN:
            raise UserError(f"{where}#{text}: no reader knows a column {usual!r}{near_match(usual, KNOWN)}")
        if usual in names:
            raise UserError(f"{where}#{text}: {usual} is given twice")
        names[usual] = name
    return Columns(names=names)


def cut_columns(spec: str) -> tuple[str, Columns]:
    """A source without what stands behind its `#`, and that. A file whose own name has a `#` stays whole.
    Raises UserError."""
    if Path(spec).exists() or "#" not in spec:
        return spec, Columns()
    name, _, text = spec.rpartition("#")
    return name, read_columns(text, name)


def split_at_commas(specs: str) -> list[str]:
    """Sources that commas separate; those between columns (`a.csv#prompt=x,completion=y`) separate none."""
    found: list[str] = []
    for piece in specs.split(","):
        usual = re.match(r"\s*(\w+)\s*=", piece)
        if found and usual and usual[1] in KNOWN and re.search(r"#[^#]*=", found[-1]):
            found[-1] += f",{piece}"
        else:
            found.append(piece)
    return found
