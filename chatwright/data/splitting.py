"""Which records are held out: a hash of a record's content decides, and both sides have at least one.

A small file may have no record whose hash holds it out. Then the one with the smallest hash is held out: the
one that a larger share would hold out first. Conversations without an answer do not count for that, where
there are others: SFT could measure nothing on them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field
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


@dataclass
class _Extent:
    """Which sides some records are on, and the smallest and the largest hash among those that may move."""

    sides: set[Side] = field(default_factory=set)
    lowest: tuple[int, str] | None = None
    highest: tuple[int, str] | None = None

    def add(self, side: Side, place: tuple[int, str] | None) -> None:
        """Count a record; `place` is its hash and id, None when it stays where it is."""
        self.sides.add(side)
        if place is not None:
            self.lowest = min(self.lowest or place, place)
            self.highest = max(self.highest or place, place)

    @property
    def one_sided(self) -> bool:
        """Whether all are on one side although there are some to choose from."""
        return len(self.sides) == 1 and self.lowest != self.highest


class Splitter:
    """Says the sides of records as they stream by, and at the end which must change theirs."""

    def __init__(self, share: float, held_out: Collection[str] = ()) -> None:
        self.share, self.held_out = share, held_out
        self.all, self.useful = _Extent(), _Extent()

    def side(self, id: str, *, useful: bool = True) -> Side:
        """The side of the record with this id. Those in `held_out` are validation whatever their hash. There
        is something to learn from, or to measure on, only in those that are `useful`."""
        place = (position_of(id), id)
        side: Side = "validation"
        stays = id in self.held_out
        if not stays:
            side = _side_at(place[0], self.share)
        for extent in (self.all, self.useful) if useful else (self.all,):
            extent.add(side, None if stays else place)
        return side

    @property
    def both(self) -> bool:
        """Whether there are useful records on both sides, so that none has to change its own."""
        return len(self.useful.sides) == 2

    @property
    def can_split(self) -> bool:
        """Whether there are, or can be, records on both sides."""
        return len(self.all.sides) == 2 or self.all.one_sided

    def changes(self) -> dict[str, Side]:
        """The id whose records must change sides, and to which; empty where none has to, or none can."""
        extent = self.useful if self.useful.one_sided else self.all
        if self.both or not extent.one_sided or extent.lowest is None or extent.highest is None:
            return {}
        if "validation" not in extent.sides:
            return {extent.lowest[1]: "validation"}
        return {extent.highest[1]: "train"}
