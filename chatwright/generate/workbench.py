"""Answers that grow token by token, each in one piece.

Attention wants a sequence's keys and values side by side. Laying its pages together anew for every token
would read and write all of them once more than attention itself does; so a sequence that is being answered
keeps a copy in one piece, and a step only adds to it. The pages stay complete: the copy may be thrown away at
any time, and is, where memory is scarce.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from chatwright.generate.runner import Feed

ROOM = 64
"""Tokens of room behind the longest sequence of a new bench; it grows by half when that is used up."""


class ContiguousCache:
    """Copies of up to `most` tokens in all; `keys` and `values` are (layers, rows, G, room, K)."""

    def __init__(self, pages: tuple[Tensor, Tensor], zeros: Callable[[tuple[int, ...]], Tensor]) -> None:
        self._pages, self._zeros = pages, zeros
        layers, count, self._size, *shape = pages[0].shape
        self.most = (count - 2) * self._size
        self._places: list[
            list[int]
        ] = []  # the pages of what lies in each row; none when it is worth nothing
        self.keys = self.values = zeros((layers, 0, shape[0], 0, shape[1]))

    def arrange(self, feeds: Sequence[Feed], tokens: int) -> list[int] | None:
        """Bring these sequences to the front of the bench, with room for `tokens` new ones each; all have a
        beginning.

        Returns the number of the feed in each row. None when the bench is better left alone: there is too
        little memory, or these are a few newcomers beside sequences that will go on.
        """
        claims = self._claims(feeds)
        if 2 * len(claims) < len(self._places) and len(feeds) < len(self._places):
            return None
        rows = max(len(feeds), max(claims, default=0) + 1)
        if not self._grow(rows, max(feed.start for feed in feeds) + tokens):
            return None
        claimed = set(claims.values())
        new = [number for number in range(len(feeds)) if number not in claimed]
        far = [row for row in claims if row >= len(feeds)]
        order = []
        for row in range(len(feeds)):
            if row in claims:
                order.append(claims[row])
            elif far:
                source = far.pop()
                for copy in (self.keys, self.values):
                    copy[:, row] = copy[:, source]
                order.append(claims[source])
            else:
                order.append(new.pop())
                self._lay_out(row, feeds[order[-1]])
        self._places = [list(feeds[number].pages) for number in order]
        return order

    def written(self, pages: Collection[int]) -> None:
        """Pages were written to, and the bench was not: a copy of what they held is worth nothing."""
        self._places = [place if set(pages).isdisjoint(place) else [] for place in self._places]

    def clear(self) -> None:
        """Forget what lies here."""
        self._places = []

    def _claims(self, feeds: Sequence[Feed]) -> dict[int, int]:
        """Row -> the feed that goes on with what lies there: nobody else has written to its pages."""
        owner = {page: row for row, place in enumerate(self._places) for page in place}
        claims: dict[int, int] = {}
        for number, feed in enumerate(feeds):
            stored = -(-feed.start // self._size)
            row = owner.get(feed.pages[stored - 1])
            if row is not None and list(feed.pages[:stored]) == self._places[row][:stored]:
                claims[row] = number
        return claims

    def _lay_out(self, row: int, feed: Feed) -> None:
        index = torch.tensor(feed.pages[: -(-feed.start // self._size)], device=self.keys.device)
        for copy, pages in ((self.keys, self._pages[0]), (self.values, self._pages[1])):
            copy[:, row, :, : feed.start] = (
                pages.index_select(1, index).flatten(1, 2)[:, : feed.start].transpose(1, 2)
            )
            copy[:, row, :, feed.start :] = (
                0.0  # what lay there may be no number, which a weight of zero does not hide
            )

    def _grow(self, rows: int, room: int) -> bool:
        """Make room for so many sequences of so many tokens; False, and nothing is left, when there is too
        little."""
        layers, old_rows, heads, old_room, width = self.keys.shape
        if rows <= old_rows and room <= old_room:
            return True
        fits = rows * room <= self.most
        wanted = room + max(ROOM, room // 2) if room > old_room else old_room
        room = max(room, min(wanted, self.most // rows))
        kept, found = min(rows, old_rows), (self.keys, self.values)
        shape = (layers, rows if fits else 0, heads, room, width)
        self.keys, self.values = (self._zeros(shape) for _ in range(2))
        if not fits:
            self._places = []
            return False
        for copy, before in zip((self.keys, self.values), found, strict=True):
            copy[:, :kept, :, :old_room] = before[:, :kept, :, :room]
        return True
