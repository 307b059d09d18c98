"""Which characters of a rendered conversation the model must learn to write.

Where the template marks them with {% generation %}, these. Else by origin: from the first to the last
character of an assistant's message, and on to the end of what ends the turn. A message with thinking or tool
calls begins where the model takes over, behind the generation prompt: it has to write the tags as well.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from chatwright.chat.traced_text import (
    BLEND,
    CONTENT,
    GENERATED,
    TEMPLATE,
    THINKING,
    UNSURE,
    kind_of,
    message_of,
    runs_of,
)

Span = tuple[int, int]


@dataclass(frozen=True)
class Learnt:
    """What is to be learnt of a text."""

    spans: list[Span]
    """Stretches of characters, in order."""
    doubt: str = ""
    """Why this is not certain; empty where it is."""

    def mask(self, tokens: Sequence[Span]) -> list[bool]:
        """For each token, given its characters, whether any of them is to be learnt."""
        mask = [False] * len(tokens)
        starts, stops = [one[0] for one in tokens], [one[1] for one in tokens]
        for start, stop in self.spans:
            first, last = bisect_right(stops, start), bisect_left(starts, stop)
            mask[first:last] = [True] * (last - first)
        return mask


@dataclass(frozen=True)
class _Piece:
    start: int
    stop: int
    origin: int


def learnt_of(
    text: str, learnt: Sequence[bool], ends: Sequence[str], begin: Callable[[int, int, int], int]
) -> Learnt:
    """What is to be learnt of a rendered conversation.

    `learnt`: for each message whether it is. `ends`: the texts that may end a turn. `begin(n, low, high)`:
    where message n begins to be the model's, between two places.
    """
    pieces = []
    at = 0
    for size, origin in runs_of(text):
        pieces.append(_Piece(at, at + size, origin))
        at += size
    if any(piece.origin & GENERATED for piece in pieces):
        return Learnt([_with_end(text, span, ends, pieces) for span in _generated(pieces, learnt)])
    foreign = [piece for piece in pieces if piece.origin != TEMPLATE]
    spans: list[Span] = []
    if any(learnt) and any(piece.origin == UNSURE for piece in foreign):
        return Learnt(spans, "the chat template mixes the texts of several messages")
    for number, wanted in enumerate(learnt):
        own = _own(foreign, number) if wanted else []
        if not own:
            continue
        first, last = own[0], own[-1]
        if any(kind_of(foreign[n].origin) == BLEND for n in own):
            return Learnt(spans, f"the chat template mixes message {number} with text of its own")
        if not _later_is_named(foreign, number, last):
            return Learnt(spans, f"the chat template writes message {number} in several places")
        start, stop = foreign[first].start, foreign[last].stop
        if len(own) > 1 or kind_of(foreign[first].origin) != CONTENT:
            before = [piece.stop for piece in foreign[:first] if message_of(piece.origin) != number]
            start = begin(number, before[-1] if before else 0, start)
        limit = foreign[last + 1].start if last + 1 < len(foreign) else at
        spans.append(_to_end(text, (start, stop), limit, ends))
    return Learnt(sorted(spans))


def _own(foreign: Sequence[_Piece], number: int) -> list[int]:
    """The places of a message's texts, up to those of another message; an empty text counts alone."""
    own: list[int] = []
    for n, piece in enumerate(foreign):
        if message_of(piece.origin) == number:
            own.append(n)
        elif own and piece.stop > piece.start and any(foreign[m].stop > foreign[m].start for m in own):
            break
    return [n for n in own if foreign[n].stop > foreign[n].start] or own[:1]


def _later_is_named(foreign: Sequence[_Piece], number: int, last: int) -> bool:
    """Whether what comes of a message behind its own place is at most a name: templates write that of the
    function above its result."""
    later = (piece for piece in foreign[last + 1 :] if message_of(piece.origin) == number)
    return all(
        kind_of(piece.origin) not in (CONTENT, THINKING) or piece.stop == piece.start for piece in later
    )


def _generated(pieces: Sequence[_Piece], learnt: Sequence[bool]) -> list[Span]:
    """The {% generation %} blocks, but for those of messages that are not learnt."""
    blocks: list[list[_Piece]] = []
    for piece in pieces:
        if piece.origin & GENERATED:
            if not blocks or blocks[-1][-1].stop != piece.start:
                blocks.append([])
            blocks[-1].append(piece)
    kept = []
    for block in blocks:
        owners = {message_of(piece.origin) for piece in block} - {None}
        if not owners or any(learnt[owner] for owner in owners if owner is not None):
            kept.append((block[0].start, block[-1].stop))
    return kept


def _to_end(text: str, span: Span, limit: int, ends: Sequence[str]) -> Span:
    """A stretch, and what ends the turn behind it: the first of `ends` before `limit`."""
    start, stop = span
    places = [(place, len(end)) for end in ends if (place := str.find(text, end, stop, limit)) >= 0]
    if not places:
        return span
    place, size = min(places, key=lambda one: (one[0], -one[1]))
    return start, place + size


def _with_end(text: str, span: Span, ends: Sequence[str], pieces: Sequence[_Piece]) -> Span:
    """A {% generation %} block, and what ends the turn where that stands directly behind it and not in the
    block. An end that the message spells is none."""
    start, stop = span
    inside = (
        piece for piece in pieces if start <= piece.start < stop and piece.origin == TEMPLATE | GENERATED
    )
    if any(str.find(text, end, piece.start, piece.stop) >= 0 for piece in inside for end in ends):
        return span
    behind = str.__getitem__(text, slice(stop, None))
    at = stop + len(behind) - len(behind.lstrip())
    found = [at + len(end) for end in ends if str.startswith(text, end, at)]
    return (start, max(found)) if found else span
