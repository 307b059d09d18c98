"""What a record is, by the names of its columns: which setting of the data stage reads it.

formats.py and preferences.py read the records; here they are only told apart, for error messages and for
`chatwright data preview`. Names of kinds are those of TRL's documentation ("Dataset formats and types"),
which has each in a standard form (texts) and a conversational one (lists of messages).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LISTS = ("messages", "conversations")
"""Columns that hold a list of messages."""
ASKED = ("prompt", "question")
"""Columns that hold a prompt: a text, or a list of messages."""
ANSWERED = ("completion", "response", "answer")
"""Columns that hold the one answer to a prompt."""


LOOKS = "these look like"
"""Words of the error for records of another kind than the wanted one."""


@dataclass(frozen=True)
class Shape:
    """One kind of records."""

    name: str
    columns: tuple[tuple[str, ...], ...]
    """One column of each of these groups is there."""
    reads: str
    """The setting that reads it: text, dialogues, ratings or comparisons; "" for none."""

    def found(self, row: Mapping[str, Any]) -> list[str]:
        """The columns by which the record is of this kind; empty when it is not."""
        found = [[name for name in group if row.get(name) is not None] for group in self.columns]
        return [names[0] for names in found] if all(found) else []


SHAPES = (
    Shape("stepwise supervision", (ASKED, ("completions",), ("labels",)), ""),
    Shape("preference pairs", (ASKED, ("chosen",), ("rejected",)), "comparisons"),
    Shape("preference pairs with the prompt inside", (("chosen",), ("rejected",)), "comparisons"),
    Shape("ranked answers", (ASKED, ("responses",), ("scores",)), "comparisons"),
    Shape("unpaired preferences", (ASKED, ANSWERED, ("label",)), "ratings"),
    Shape("conversations", (LISTS,), "dialogues"),
    Shape("instructions and outputs (Alpaca)", (("instruction",), ("output",)), "dialogues"),
    Shape("prompts and completions", (ASKED, ANSWERED), "dialogues"),
    Shape("rated texts", (("text",), ("label",)), "ratings"),
    Shape("texts", (("text",),), "text"),
    Shape("prompts without answers", (ASKED,), "dialogues"),
)
"""All kinds; a record is of the first that fits."""


def shape_of(row: Mapping[str, Any]) -> Shape | None:
    """The kind of a record; None if it is of none."""
    return next((shape for shape in SHAPES if shape.found(row)), None)


def hint(row: Mapping[str, Any], wanted: str) -> str:
    """The end of an error: what a record that the setting `wanted` cannot read looks like, and what reads
    it."""
    shape = shape_of(row)
    if shape is None:
        return (
            "; a column with another name is given behind the file's: FILE#text=COLUMN, or "
            "FILE#prompt=COLUMN,completion=COLUMN (the first line of a .csv file names its columns)"
        )
    looks = f"; {LOOKS} {shape.name} (columns {', '.join(shape.found(row))})"
    if shape.reads == wanted:
        return looks
    if not shape.reads:
        return f"{looks}, which no setting reads"
    return f"{looks}, which the setting `{shape.reads}` reads"


def columns_of(row: Mapping[str, Any]) -> str:
    """The names of a record's columns, for error messages."""
    return ", ".join(map(str, row)) or "none"
