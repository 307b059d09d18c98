"""Text that knows who wrote each of its characters.

A chat template puts a conversation together with text of its own. `Traced` is a `str` that carries, as runs,
the origin of its characters through everything that a template does with texts: slices, `strip`, `split`,
`replace`, `join`, formatting. So one rendering gives the text, and says which characters are the template's
own and which are a message's. A plain `str` is the template's own text.

What cannot be followed exactly is never taken for the template's: the whole result belongs to the message
whose texts went in ("blended", where the template's text went in as well), or to `UNSURE` where several did.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from itertools import groupby, islice
from typing import Any, SupportsIndex, cast

from jinja2.utils import Namespace
from markupsafe import escape

Run = tuple[int, int]
"""A number of characters, and their origin. A run of no characters marks where an empty text stands."""
Runs = tuple[Run, ...]
_SINGLE = (str, int, float, type(None))

TEMPLATE, OTHER, UNSURE = 0, 1, 2
"""Origins: the template itself; tools, documents and other variables; several that were mixed up."""
CONTENT, THINKING, CALL, BESIDE, BLEND = range(5)
"""Kinds of a message's text: its content, its thinking, its tool calls, what else stands beside the content,
and what a template made of such a text and its own."""
GENERATED = 1 << 40
"""Added to the origin of what stands in a {% generation %} block."""
MOST_RUNS = 1 << 14
"""A text with more runs is blended: a hostile template must not fill the memory with them."""


def of_message(number: int, kind: int) -> int:
    """The origin of a text of message `number`."""
    return 8 * (number + 1) + kind


def message_of(origin: int) -> int | None:
    """The number of the message that an origin stands for, or None."""
    number = (origin & ~GENERATED) // 8 - 1
    return number if number >= 0 else None


def kind_of(origin: int) -> int:
    """The kind of a message's text."""
    return origin % 8


def runs_of(text: str) -> Runs:
    """The runs of any text; a plain `str` is the template's."""
    if isinstance(text, Traced):
        return text._runs
    return ((len(text), TEMPLATE),) if text else ()


def owned(text: str, origin: int) -> str:
    """A text of one origin."""
    return Traced(text, ((len(text), origin),)) if origin != TEMPLATE else text


def origins_in(*values: Any) -> set[int]:
    """The origins of all texts in values and in what they contain, but for the template's."""
    found: set[int] = set()
    seen: set[int] = set()
    left: list[Any] = list(values)
    while left:
        value = left.pop()
        if isinstance(value, Traced):
            found.update(origin & ~GENERATED for _, origin in value._runs)
            continue
        if isinstance(value, _SINGLE) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            left += (*value.keys(), *value.values())
        elif isinstance(value, _MANY):
            left += cast(Iterable[Any], value)
        elif isinstance(value, Namespace):
            left.append(object.__getattribute__(value, "_Namespace__attrs"))
    return found - {TEMPLATE}


_MANY: tuple[type, ...] = (list, tuple, AbstractSet, type({}.values()))  # views of keys and items are sets


def blended(origins: set[int], *, own: bool) -> int:
    """The origin of a text that was made out of others. `own`: the template's text is among them."""
    if not origins:
        return TEMPLATE
    if len(origins) == 1 and not own:
        return next(iter(origins))
    owners = {message_of(origin) for origin in origins}
    if len(owners) > 1 or UNSURE in origins:
        return UNSURE
    owner = next(iter(owners))
    if owner is None:
        return OTHER
    return of_message(owner, BLEND if own else CALL)


def blend(text: str, *values: Any, own: bool | None = None) -> str:
    """`text`, which was made out of `values` in a way that was not followed. `own` as in `blended`; by
    default whether a plain text is among the values."""
    if own is None:
        own = any(type(value) is str and value for value in values)
    return owned(str.__str__(text), blended(origins_in(*values), own=own))


def text_of(value: Any) -> str:
    """What is written of a value: `str(value)`, with its origin."""
    if isinstance(value, Traced):
        return value
    text = str(value)
    if isinstance(value, _SINGLE):
        return text
    return blend(text, value, own=False)


def joined(pieces: Iterable[str]) -> str:
    """Texts one behind the other: in place of `"".join`."""
    held = list(pieces)
    text = "".join(held)
    if not any(isinstance(piece, Traced) for piece in held):
        return text
    runs: list[Run] = []
    for piece in held:
        runs += runs_of(piece)
    return _made(text, runs)


def generated(text: str) -> str:
    """A text out of a {% generation %} block."""
    return Traced(str.__str__(text), tuple((size, origin | GENERATED) for size, origin in runs_of(text)))


def _made(text: str, runs: Iterable[Run]) -> str:
    """A text with these runs; neighbours of one origin become one. Plain where all is the template's."""
    merged: list[Run] = []
    for size, origin in runs:
        if merged and merged[-1][1] == origin:
            merged[-1] = (merged[-1][0] + size, origin)
        elif size or origin != TEMPLATE:
            merged.append((size, origin))
    if not merged or (len(merged) == 1 and merged[0][1] == TEMPLATE):
        return text
    if len(merged) > MOST_RUNS:
        origins = {origin & ~GENERATED for _, origin in merged}
        return owned(text, blended(origins - {TEMPLATE}, own=TEMPLATE in origins))
    return Traced(text, tuple(merged))


class Traced(str):
    """A text with the origins of its characters. Its methods give what those of `str` give."""

    __slots__ = ("_runs",)
    _runs: Runs

    def __new__(cls, text: str, runs: Runs | None = None) -> Traced:
        self = str.__new__(cls, text)
        self._runs = runs if runs is not None else ((len(text), UNSURE),)
        return self

    def __str__(self) -> str:
        return self

    # ---- parts of it

    def _part(self, start: int, stop: int) -> str:
        if start == 0 and stop == len(self):
            return self
        text = str.__getitem__(self, slice(start, stop))
        runs, at, last = [], 0, TEMPLATE
        for size, origin in self._runs:
            low, high = max(start, at), min(stop, at + size)
            if low < high:
                runs.append((high - low, origin))
            if at <= start:
                last = origin
            at += size
            if at >= stop and runs:
                break
        return _made(text, runs or [(0, last)])

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                return self._part(start, max(start, stop))
            origins = [origin for size, origin in self._runs for _ in range(size)][key]
            text = str.__getitem__(self, key)
            return _made(text, [(len(list(same)), origin) for origin, same in groupby(origins)])
        str.__getitem__(self, key)  # raises what a str raises
        place = key.__index__()
        place += len(self) if place < 0 else 0
        return self._part(place, place + 1)

    def __iter__(self) -> Iterator[str]:
        characters = str.__iter__(self)
        for size, origin in self._runs:
            for character in islice(characters, size):
                yield owned(character, origin)

    def strip(self, chars: str | None = None, /) -> str:
        start = len(self) - len(str.lstrip(self, chars))
        return self._part(start, max(start, len(str.rstrip(self, chars))))

    def lstrip(self, chars: str | None = None, /) -> str:
        return self._part(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> str:
        return self._part(0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix: str, /) -> str:
        return self._part(len(self) - len(str.removeprefix(self, prefix)), len(self))

    def removesuffix(self, suffix: str, /) -> str:
        return self._part(0, len(str.removesuffix(self, suffix)))

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        return self._three(str.partition(self, sep))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        return self._three(str.rpartition(self, sep))

    def _three(self, parts: tuple[str, str, str]) -> tuple[str, str, str]:
        first, second = len(parts[0]), len(parts[0]) + len(parts[1])
        return self._part(0, first), self._part(first, second), self._part(second, len(self))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:  # type: ignore[override]
        at, pieces = 0, []
        for piece in str.split(self, sep, maxsplit):
            start = at if sep is not None else str.find(self, piece, at)
            pieces.append(self._part(start, start + len(piece)))
            at = start + len(piece) + len(sep or "")
        return pieces

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:  # type: ignore[override]
        at, pieces = len(self), []
        for piece in reversed(str.rsplit(self, sep, maxsplit)):
            start = at - len(piece) if sep is not None else str.rfind(self, piece, 0, at)
            pieces.append(self._part(start, start + len(piece)))
            at = start - len(sep or "")
        return pieces[::-1]

    def splitlines(self, keepends: bool = False) -> list[str]:  # type: ignore[override]
        at, pieces = 0, []
        for whole, line in zip(str.splitlines(self, True), str.splitlines(self, keepends), strict=True):
            pieces.append(self._part(at, at + len(line)))
            at += len(whole)
        return pieces

    # ---- put together

    def __add__(self, other: str, /) -> str:
        if not isinstance(other, str):
            return NotImplemented
        if hasattr(other, "__html__"):  # markupsafe's Markup escapes what it is added to
            return safe(joined((escaped(self), other)))
        return joined((self, other))

    def __radd__(self, other: str, /) -> str:
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex, /) -> str:
        text = str.__mul__(self, times)
        if len(self._runs) == 1:
            return owned(text, self._runs[0][1])
        many = min(max(0, times.__index__()), MOST_RUNS + 1)
        runs = self._runs * many
        return _made(text, runs) if len(runs) <= MOST_RUNS else blend(text, self)

    __rmul__ = __mul__

    def join(self, pieces: Iterable[str], /) -> str:
        held = list(pieces)
        str.join(self, held)  # raises what a str raises
        between: list[str] = [self] * (2 * len(held) - 1) if held else []
        between[::2] = held
        return joined(between)

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:  # type: ignore[override]
        text = str.replace(self, old, new, count)
        if not old:
            return blend(text, self, new)
        most, at, pieces = count.__index__(), 0, []
        while most != 0 and (found := str.find(self, old, at)) >= 0:
            pieces += [self._part(at, found), new]
            at, most = found + len(old), most - 1
        return joined([*pieces, self._part(at, len(self))]) if pieces else self

    def _padded(self, text: str, left: int, fill: str) -> str:
        right = len(text) - len(self) - left
        return joined((fill * left, self, fill * right))

    def center(self, width: SupportsIndex, fill: str = " ", /) -> str:
        text = str.center(self, width, fill)
        spare = len(text) - len(self)
        return self._padded(text, spare // 2 + (spare & width.__index__() & 1), fill)

    def ljust(self, width: SupportsIndex, fill: str = " ", /) -> str:
        return self._padded(str.ljust(self, width, fill), 0, fill)

    def rjust(self, width: SupportsIndex, fill: str = " ", /) -> str:
        text = str.rjust(self, width, fill)
        return self._padded(text, len(text) - len(self), fill)

    # ---- changed

    def _changed(self, text: str) -> str:
        """A text with one character for each of ours, or of unknown places."""
        if len(text) == len(self):
            return Traced(text, self._runs)
        if len(self._runs) == 1:
            return owned(text, self._runs[0][1])
        return blend(text, self, own=True)

    def upper(self) -> str:
        return self._changed(str.upper(self))

    def lower(self) -> str:
        return self._changed(str.lower(self))

    def casefold(self) -> str:
        return self._changed(str.casefold(self))

    def capitalize(self) -> str:
        return self._changed(str.capitalize(self))

    def title(self) -> str:
        return self._changed(str.title(self))

    def swapcase(self) -> str:
        return self._changed(str.swapcase(self))

    def zfill(self, width: SupportsIndex, /) -> str:
        return blend(str.zfill(self, width), self, own=True)

    def expandtabs(self, tabsize: SupportsIndex = 8) -> str:  # type: ignore[override]
        return blend(str.expandtabs(self, tabsize), self, own=len(self._runs) > 1)

    def translate(self, table: Any, /) -> str:
        return blend(str.translate(self, table), self, table, own=True)

    # ---- formatted

    def __mod__(self, values: Any, /) -> str:
        return percent(self, values)

    def __rmod__(self, pattern: Any, /) -> str:
        return percent(pattern, self) if isinstance(pattern, str) else NotImplemented


class SafeTraced(Traced):
    """A traced text that passed the filter `safe` or `escape`: like markupsafe's Markup, it escapes what is
    added to it."""

    __slots__ = ()

    def __html__(self) -> SafeTraced:
        return self

    def __add__(self, other: str, /) -> str:
        return safe(joined((self, escaped(other)))) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str, /) -> str:
        return safe(joined((escaped(other), self))) if isinstance(other, str) else NotImplemented


def safe(text: str) -> SafeTraced:
    """A text that needs no escaping."""
    return SafeTraced(str.__str__(text), runs_of(text))


def escaped(text: str) -> str:
    """A text with its characters for HTML escaped, unless it is safe."""
    if hasattr(text, "__html__"):
        return text
    pieces, at = [], 0
    for size, origin in runs_of(text):
        pieces.append(owned(str(escape(str.__getitem__(text, slice(at, at + size)))), origin))
        at += size
    return joined(pieces)


_PERCENT = re.compile(r"%(\([^)]*\))?[#0\- +]*(\*|\d*)(\.(\*|\d*))?[hlL]?(.)", re.DOTALL)


def percent(pattern: str, values: Any) -> str:
    """`pattern % values`, followed where no width comes from a value."""
    text = str.__mod__(pattern, values)
    given = list(values) if isinstance(values, tuple) else [values]
    pieces, at = [], 0
    for found in _PERCENT.finditer(pattern):
        spec = str.__str__(found.group())
        pieces.append(pattern[at : found.start()])
        at = found.end()
        if found[5] == "%":
            pieces.append(owned("%", UNSURE) if isinstance(pattern, Traced) else "%")
        elif "*" in spec or (not found[1] and not given):
            return blend(text, pattern, values)
        else:
            value = values[found[1][1:-1]] if found[1] else given.pop(0)
            plain = re.sub(r"\([^)]*\)", "", spec, count=1) if found[1] else spec
            pieces.append(
                text_of(value) if plain == "%s" else blend(str.__mod__(plain, (value,)), value, own=False)
            )
    whole = joined([*pieces, pattern[at:]])
    return whole if whole == text else blend(text, pattern, values)


def formatted(pattern: str, formatter: string.Formatter, args: Any, kwargs: Any) -> str:
    """`formatter.vformat(pattern, args, kwargs)`, followed where the pattern is the template's."""
    text = formatter.vformat(str.__str__(pattern), args, kwargs)
    if isinstance(pattern, Traced):
        return blend(text, pattern, args, kwargs, own=True)
    if not origins_in(args, kwargs):
        return text
    pieces: list[str] = []
    number = 0
    for literal, name, spec, conversion in formatter.parse(pattern):
        pieces.append(literal)
        if name is None:
            continue
        if spec and "{" in spec:  # a width that is a field itself
            return blend(text, args, kwargs, own=True)
        if not name or name[0] in ".[":
            name, number = f"{number}{name}", number + 1
        value = formatter.get_field(name, args, kwargs)[0]
        if spec or conversion:
            made = formatter.format_field(formatter.convert_field(value, conversion), spec or "")
            pieces.append(blend(made, value, own=False))
        else:
            pieces.append(text_of(value))
    whole = joined(pieces)
    return whole if whole == text else blend(text, args, kwargs, own=True)
