"""Text -> ids where only trusted characters may become control tokens.

transformers tokenises a rendered conversation as a whole, so that a token may join text of the template and
text of a message, and the flags of added tokens count (`lstrip`, `normalized` ...). So does this. But where
a message, a tool or a document spells a control token, those characters stay text: then the stretches between
the template's own control tokens are encoded apart, with control tokens switched off.
"""

from __future__ import annotations

import json
import re
import secrets
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tokenizers
from tokenizers import AddedToken, processors

from chatwright.config import UserError
from chatwright.tokenizer import Tokenizer, library
from chatwright.traced_text import GENERATED, TEMPLATE, runs_of

Span = tuple[int, int]


@dataclass(frozen=True)
class TracedIds:
    """Ids of a text, and for each the characters [start, stop) that it stands for."""

    ids: list[int]
    spans: list[Span]


def encoder_of(tokenizer: Tokenizer, ends: tuple[str, ...] = ()) -> TrustedEncoder:
    """The encoder of a tokenizer, made once. `ends`: added tokens that end a turn and are no special tokens;
    they count as control tokens."""
    made: dict[tuple[str, ...], TrustedEncoder] = tokenizer.__dict__.setdefault("_trusted_encoders", {})
    if ends not in made:
        made[ends] = TrustedEncoder(tokenizer, ends)
    return made[ends]


class TrustedEncoder:
    """Encodes `Traced` texts (traced_text.py): the template's characters are trusted, all others are not."""

    def __init__(self, tokenizer: Tokenizer, ends: tuple[str, ...]) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.backend.get_added_tokens_decoder()
        self._extra = frozenset(number for number, token in added.items() if token.content in ends)
        names = {number: name for name, number in tokenizer.control_ids.items()}
        self.controls = names | {number: added[number].content for number in self._extra}
        """The control tokens: id -> name."""
        self._flags = {token.content: token for token in added.values()}

    @cached_property
    def _whole(self) -> tokenizers.Tokenizer:
        """The backend with control tokens switched on."""
        return _copy(self.tokenizer.backend, special=True)

    @cached_property
    def _guarded(self) -> tuple[tokenizers.Tokenizer, str]:
        """The backend with control tokens switched off, and a token that stands for all text before."""
        backend = _copy(self.tokenizer.backend, special=False, specials=self._extra)
        before = f"<before {secrets.token_hex(16)}>"  # nobody can spell it
        backend.add_tokens([AddedToken(before, normalized=False)])
        return backend, before

    @cached_property
    def _spelled(self) -> re.Pattern[str]:
        names = sorted(self.controls.values(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or "(?!)")

    def encode(self, text: str) -> TracedIds:
        """Ids of a text. Raises UserError when the tokenizer makes a control token out of plain text."""
        foreign = _foreign(text)
        try:
            with library("the tokenizer fails on this text", TypeError):
                encoding = self._whole.encode(str.__str__(text), add_special_tokens=False)
        except TypeError:  # a lone surrogate, which the library cannot take
            return self._apart(text, foreign)
        ids, spans = encoding.ids, encoding.offsets
        if foreign.stops:
            controls = self.controls
            for place in [place for place, number in enumerate(ids) if number in controls]:
                if foreign.touches(*self._core(text, ids[place], spans[place])):
                    return self._apart(text, foreign)
        return TracedIds(ids, spans)

    def _core(self, text: str, number: int, span: Span) -> Span:
        """The characters of a control token without the white space that it takes with it."""
        start, stop = span
        if stop - start == len(self.controls[number]):
            return span
        inside = str.__getitem__(text, slice(start, stop))
        return start + len(inside) - len(inside.lstrip()), stop - len(inside) + len(inside.rstrip())

    def _apart(self, text: str, foreign: _Foreign) -> TracedIds:
        """The template's control tokens, and between them text without any."""
        result = TracedIds([], [])
        plain, at = str.__str__(text), 0
        numbers = {name: number for number, name in self.controls.items()}
        for start, stop, name in self._own_controls(plain, foreign):
            self._stretch(text, at, start, result)
            result.ids.append(numbers[name])
            result.spans.append((start, stop))
            at = stop
        self._stretch(text, at, len(plain), result)
        return result

    def _own_controls(self, text: str, foreign: _Foreign) -> Iterator[tuple[int, int, str]]:
        """The control tokens that are spelled by trusted characters alone, the longest at each place."""
        at = last = 0
        while found := self._spelled.search(text, at):
            at = found.start() + 1
            for name in self._names_at(text, found.start()):
                start, stop = found.start(), found.start() + len(name)
                flags = self._flags[name]
                if foreign.touches(start, stop) or (flags.single_word and _in_word(text, start, stop)):
                    continue
                if flags.lstrip:
                    start = max(last, len(text[:start].rstrip()))
                if flags.rstrip:
                    stop = len(text) - len(text[stop:].lstrip())
                yield start, stop, name
                at = last = stop
                break

    def _names_at(self, text: str, at: int) -> list[str]:
        names = [name for name in self.controls.values() if text.startswith(name, at)]
        return sorted(names, key=len, reverse=True)

    def _stretch(self, text: str, start: int, stop: int, result: TracedIds) -> None:
        """Encode text between two control tokens as text."""
        if start == stop:
            return
        backend, before = self._guarded
        piece = str.__getitem__(text, slice(start, stop))
        head = before if start else ""
        try:
            with library("the tokenizer fails on this text", TypeError):
                encoding = backend.encode(head + piece, add_special_tokens=False)
            ids, spans = encoding.ids[bool(head) :], encoding.offsets[bool(head) :]
            shift = start - len(head)
            spans = [(low + shift, high + shift) for low, high in spans]
        except TypeError:
            ids, spans = self._bytes(text, start, stop)
        strange = next((number for number in ids if number in self.controls), None)
        if strange is not None:
            raise UserError(
                f"the tokenizer makes its control token {self.controls[strange]} out of plain text: a "
                "message could forge it; leave this text out, or use another tokenizer"
            )
        result.ids.extend(ids)
        result.spans.extend(spans)

    def _bytes(self, text: str, start: int, stop: int) -> tuple[list[int], list[Span]]:
        """Text with lone surrogates, each author's part for itself."""
        ids: list[int] = []
        spans: list[Span] = []
        at = 0
        for size, _ in runs_of(text):
            low, high = max(start, at), min(stop, at + size)
            if low < high:
                new = self.tokenizer.encode(str.__getitem__(text, slice(low, high)))
                ids += new
                spans += [(low, high)] * len(new)
            at += size
        return ids, spans


@dataclass(frozen=True)
class _Foreign:
    """The stretches of a text that are not the template's."""

    starts: list[int]
    stops: list[int]

    def touches(self, start: int, stop: int) -> bool:
        """Whether any of the characters is not the template's."""
        after = bisect_right(self.stops, start)
        return after < len(self.starts) and self.starts[after] < stop


def _foreign(text: str) -> _Foreign:
    found = _Foreign([], [])
    at = 0
    for size, origin in runs_of(text):
        if size and origin & ~GENERATED != TEMPLATE:
            found.starts.append(at)
            found.stops.append(at + size)
        at += size
    return found


def _in_word(text: str, start: int, stop: int) -> bool:
    """Whether a letter, a digit or _ stands directly before or behind."""
    around: Sequence[str] = (text[start - 1 : start], text[stop : stop + 1])
    return any(one == "_" or one.isalnum() for one in around)


def _copy(backend: Any, *, special: bool, specials: frozenset[int] = frozenset()) -> tokenizers.Tokenizer:
    """A backend of our own: control tokens on or off, `specials` among them; a token's place is where its
    characters are (post-processors trim it)."""
    content = backend.to_str()
    if specials:
        values = json.loads(content)
        for token in values["added_tokens"]:
            token["special"] = token["special"] or token["id"] in specials
        content = json.dumps(values)
    made = tokenizers.Tokenizer.from_str(content)
    made.no_padding()
    made.no_truncation()
    made.post_processor = processors.Sequence([])  # type: ignore[assignment]
    made.encode_special_tokens = not special
    return made
