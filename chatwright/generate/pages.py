"""The pages of the key-value cache: reference counts, and the prefix cache of texts that may come again.

A page has room for the keys and values of `size` tokens (Kwon et al. 2023, "PagedAttention",
arXiv:2309.06180). The prefix cache is a tree (Zheng et al. 2023, SGLang's RadixAttention, arXiv:2312.07104).
Below the root are the pages with the first tokens of some text, below each page those that continue it. Its
keys are the tokens themselves, compared one by one, and a page is found by its whole path only: two prompts
are never mixed up. A placeholder token (for an image) is compared together with a hash of its content: two
images behind the same tokens never share a page.

Three rules make it safe:
* Sequences share full pages only, and a full page is never written to. A sequence that continues in the
  middle of a page takes a copy of it.
* A cached page without users stays until its room is needed; the least recently used is evicted first.
* A sequence that uses a page uses its whole path, so a page is never evicted before those below it.

This file only counts; it has no tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

PAGE_TOKENS = 16
"""Tokens per page: few enough that little is copied or left empty, many enough to be moved in one piece."""


Key = int | tuple[int, str]
"""The key of one position in the tree: the token, or (token, hash) for a placeholder."""


class OutOfPages(Exception):
    """No page can be taken: every page has a user."""


@dataclass(eq=False, slots=True)
class _Known:
    """A node of the prefix cache: a page with its tokens, and the pages that continue it."""

    page: int
    tokens: tuple[Key, ...]
    """Fewer than a full page at the end of a text; such a page has nothing below it."""
    above: _Known | None
    whole: dict[tuple[Key, ...], _Known] = field(default_factory=dict)
    """The full pages below, by their tokens."""
    below: dict[Key, list[_Known]] = field(default_factory=dict)
    """All pages below, by their first token."""


@dataclass(frozen=True)
class Match:
    """The part of a text that is cached already."""

    pages: tuple[int, ...]
    """Full pages with its beginning, which can be shared."""
    source: int | None
    """A page whose first tokens continue the text, which must be copied."""
    tokens: int
    """Number of cached tokens, those in `source` included."""


class PagePool:
    """The pages of one engine, numbered from 0."""

    def __init__(self, pages: int, size: int = PAGE_TOKENS) -> None:
        self.pages, self.size = pages, size
        self.users = [0] * pages
        """How many sequences use each page."""
        self._free = list(range(pages - 1, -1, -1))
        # Cached pages without users, least recently used first.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._known: dict[int, _Known] = {}
        self._root = _Known(-1, (), None)

    @property
    def available(self) -> int:
        """Pages that `take` could give."""
        return len(self._free) + len(self._idle)

    def needed(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.size)

    def take(self) -> int:
        """A page for one user to write to; what it held is no longer cached. Raises OutOfPages."""
        if self._free:
            page = self._free.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            self._unlearn(page)
        else:
            raise OutOfPages(f"all {self.pages} pages are in use")
        self.users[page] = 1
        return page

    def share(self, page: int) -> None:
        """Count another user of a page that is used or cached."""
        if not self.users[page]:
            del self._idle[page]
        self.users[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Count one user less of each page of a sequence. Cached pages stay; the end of the text is evicted
        first."""
        for page in reversed(pages):
            self.users[page] -= 1
            if self.users[page]:
                continue
            if page in self._known:
                self._idle[page] = None
            else:
                self._free.append(page)

    def match(self, tokens: Sequence[Key]) -> Match:
        """The longest cached beginning of `tokens`. It is not reserved: `share` it before the next `take`."""
        above, pages, at = self._root, [], 0
        while at + self.size <= len(tokens):
            found = above.whole.get(tuple(tokens[at : at + self.size]))
            if found is None:
                break
            above, at = found, at + self.size
            pages.append(found.page)
        rest = tuple(tokens[at : at + self.size])
        source, most = None, 0
        for candidate in above.below.get(rest[0], ()) if rest else ():
            alike = _alike(candidate.tokens, rest)
            if alike > most:
                source, most = candidate.page, alike
        return Match(tuple(pages), source, at + most)

    def learn(self, tokens: Sequence[Key], pages: Sequence[int]) -> list[int]:
        """Add the `pages` of a sequence, which hold `tokens`, to the prefix cache; returns the pages that the
        sequence uses from now on.

        Where an equal full page is cached already, the sequence uses that one, and its own becomes free.
        """
        above, own = self._root, list(pages)
        for number, at in enumerate(range(0, len(tokens), self.size)):
            chunk, page = tuple(tokens[at : at + self.size]), own[number]
            if len(chunk) < self.size:
                if not any(
                    known.page != page and known.tokens[: len(chunk)] == chunk
                    for known in above.below.get(chunk[0], ())
                ):
                    self._remember(page, chunk, above)
                break
            twin = above.whole.get(chunk)
            if twin is None:
                twin = self._remember(page, chunk, above)
            elif twin.page != page:
                if page in self._known:
                    self._unlearn(page)
                self.share(twin.page)
                self.release([page])
                own[number] = twin.page
            above = twin
        return own

    def invalidate(self, pages: Sequence[int]) -> None:
        """Drop those of the pages that are not full from the cache: a failed request has written to them."""
        for page in pages:
            known = self._known.get(page)
            if known is not None and len(known.tokens) < self.size:
                self._unlearn(page)

    def forget(self) -> None:
        """Empty the prefix cache, for the model has changed. Pages in use stay with their users."""
        self._known.clear()
        self._root = _Known(-1, (), None)
        self._free.extend(self._idle)
        self._idle.clear()

    def _remember(self, page: int, tokens: tuple[Key, ...], above: _Known) -> _Known:
        if page in self._known:  # it was cached when it held fewer tokens
            self._unlearn(page)
        known = self._known[page] = _Known(page, tokens, above)
        above.below.setdefault(tokens[0], []).append(known)
        if len(tokens) == self.size:
            above.whole[tokens] = known
        return known

    def _unlearn(self, page: int) -> None:
        known = self._known.pop(page)
        above = known.above
        assert above is not None and not known.below
        siblings = above.below[known.tokens[0]]
        siblings.remove(known)
        if not siblings:
            del above.below[known.tokens[0]]
        if len(known.tokens) == self.size:
            del above.whole[known.tokens]


def _alike(a: Sequence[Key], b: Sequence[Key]) -> int:
    """How many tokens two texts have in common at their beginnings."""
    for number, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return number
    return min(len(a), len(b))
