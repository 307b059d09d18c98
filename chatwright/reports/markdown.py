"""Escapes foreign text for Markdown: text of a model or a user cannot become a heading, a link or a tag."""

from __future__ import annotations

import re
from collections.abc import Sequence

LONGEST = 400
"""Most characters of one text in a report."""


def harmless(text: str, *, longest: int = LONGEST) -> str:
    """One line of at most `longest` characters, plus a note of how many were cut off. Unprintable characters
    (control characters, marks that change the direction of writing) become escapes such as \\u202e."""
    line = " ".join(text.split())
    if len(line) > longest:
        line = f"{line[:longest]}… (+{len(line) - longest:,} characters)"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def cell(text: str, *, longest: int = LONGEST) -> str:
    """The text for a cell of a Markdown table. Characters that begin markup or HTML are escaped, and so are
    addresses that GitHub would turn into links."""
    line = re.sub(r"([\\|`<>*_\[\]~&$])", r"\\\1", harmless(text, longest=longest))
    return re.sub(r"(?i)(:)(//)|(www)(\.)", r"\1\3\\\2\4", line)


def item(text: str, *, longest: int = LONGEST) -> str:
    """The same for a list item or a paragraph, whose beginning could make a heading, a list or a rule."""
    return re.sub(r"^(\d{0,9})([#+.)=-])(?=[#=-]*(\s|$))", r"\1\\\2", cell(text, longest=longest))


def row(cells: Sequence[str]) -> str:
    """A line of a Markdown table; the cells are escaped."""
    return f"| {' | '.join(map(cell, cells))} |"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [row(columns), f"|{'|'.join(['---'] * len(columns))}|", *map(row, rows)]
