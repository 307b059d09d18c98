"""Contiguous cache: copies of the keys and values of running sequences, for decoding.

Attention needs a sequence's keys and values in one contiguous tensor. Gathering its pages for every token
would read and write all of them once more than attention itself does. So a running sequence keeps a
contiguous copy, and a step only adds to it. The pages stay complete: the copy may be dropped at any time, and
is where memory is scarce.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from chatwright.generate.runner import Feed

ROOM = 64
"""Spare tokens after the longest sequence of a new cache; the room grows by half when they are used up."""


class ContiguousCache:
    """Copies of up to `most` tokens in all; `keys` and `values` are (layers, rows, G, room, K)."""

    def __init__(self, pages: tuple[Tensor, Tensor], zeros: Callable[[tuple[int, ...]], Tensor]) -> None:
        self._pages, self._zeros = pages, zeros
        layers, count, self._size, *shape = pages[0].shape
        self.most = (count - 2) * self._size
        # The pages that each row copies; empty for an invalid row.
        self._copied: list[list[int]] = []
        self.keys = self.values = zeros((layers, 0, shape[0], 0, shape[1]))

    def arrange(self, feeds: Sequence[Feed], tokens: int) -> list[int] | None:
        """Move these sequences to the first rows, with room for `tokens` new tokens each. Each must have
        stored tokens already.

        Returns the number of the feed in each row. Returns None, and the feeds must do without, when memory
        is too small, or when these are a few new sequences beside others that will continue.
        """
        claims = self._claims(feeds)
        if 2 * len(claims) < len(self._copied) and len(feeds) < len(self._copied):
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
        self._copied = [list(feeds[number].pages) for number in order]
        return order

    def written(self, pages: Collection[int]) -> None:
        """Invalidate the copies of pages that were written to."""
        self._copied = [copied if set(pages).isdisjoint(copied) else [] for copied in self._copied]

    def clear(self) -> None:
        """Invalidate all copies."""
        self._copied = []

    def _claims(self, feeds: Sequence[Feed]) -> dict[int, int]:
        """Row -> the feed that continues its sequence, where its pages have not been written to otherwise."""
        owner = {page: row for row, copied in enumerate(self._copied) for page in copied}
        claims: dict[int, int] = {}
        for number, feed in enumerate(feeds):
            stored = -(-feed.start // self._size)
            row = owner.get(feed.pages[stored - 1])
            if row is not None and list(feed.pages[:stored]) == self._copied[row][:stored]:
                claims[row] = number
        return claims

    def _lay_out(self, row: int, feed: Feed) -> None:
        index = torch.tensor(feed.pages[: -(-feed.start // self._size)], device=self.keys.device)
        for copy, pages in ((self.keys, self._pages[0]), (self.values, self._pages[1])):
            copy[:, row, :, : feed.start] = (
                pages.index_select(1, index).flatten(1, 2)[:, : feed.start].transpose(1, 2)
            )
            # The old content may be NaN, which an attention weight of zero does not hide.
            copy[:, row, :, feed.start :] = 0.0

    def _grow(self, rows: int, room: int) -> bool:
        """Make room for so many sequences of so many tokens. When memory is too small, empty the cache and
        return False."""
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
            self._copied = []
            return False
        for copy, before in zip((self.keys, self.values), found, strict=True):
            copy[:, :kept, :, :old_room] = before[:, :kept, :, :room]
        return True
