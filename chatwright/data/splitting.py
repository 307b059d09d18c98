"""Which records are held out: a hash of a record's content decides, and both sides have at least one.

A small file may have no record whose hash holds it out. Then the one with the smallest hash is held out: the
one that a larger share would hold out first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Literal

from chatwright.config import UserError

Side = Literal["train", "validation"]


def position_of(id: str) -> int:
    """Where a content id lies among 2^64 places: a hash of it."""
    digest = hashlib.sha256(b"split:" + id.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big")


def split_of(id: str, share: float = 0.02) -> Side:
    """The side of a record: a function of its content id alone, so that a held-out record stays held out.

    A `share` of the ids, in [0, 1), is validation; a larger share holds out more and releases nothing.
    """
    return _side_at(position_of(id), share)


def _side_at(position: int, share: float) -> Side:
    if not 0.0 <= share < 1.0:
        raise UserError(f"the validation share must be at least 0 and less than 1, not {share}")
    return "validation" if position < share * 2.0**64 else "train"


class Splitter:
    """Says the sides of records as they stream by, and at the end which must change theirs."""

    def __init__(self, share: float, held_out: Collection[str] = ()) -> None:
        self.share, self.held_out = share, held_out
        self.seen: set[Side] = set()
        self.lowest: tuple[int, str] | None = None
        self.highest: tuple[int, str] | None = None

    def side(self, id: str) -> Side:
        """The side of the record with this id. Those in `held_out` are validation whatever their hash."""
        if id in self.held_out:
            self.seen.add("validation")
            return "validation"
        place = (position_of(id), id)
        side = _side_at(place[0], self.share)
        self.seen.add(side)
        self.lowest = min(self.lowest or place, place)
        self.highest = max(self.highest or place, place)
        return side

    @property
    def both(self) -> bool:
        """Whether there are records on both sides, so that none has to change its own."""
        return len(self.seen) == 2

    def changes(self) -> dict[str, Side]:
        """The id whose records must change sides, and to which; empty where none has to, or none can."""
        if self.both or self.lowest is None or self.highest is None or self.lowest == self.highest:
            return {}
        if "validation" not in self.seen:
            return {self.lowest[1]: "validation"}
        return {self.highest[1]: "train"}
