"""Calls of tools, read from an answer's text while it comes.

The form is `<tool_call>` JSON `</tool_call>` (tools.py). Only what a model says is read here: what users
write cannot call a tool.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from chatwright.messages import CLOSE, OPEN

NAME = r"[A-Za-z0-9_-]{1,64}"
WHITE = " \t\r\n"


@dataclass(frozen=True)
class TextDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True)
class CallStarted:
    """A call begins. `index` counts the calls of this answer, from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnded:
    """A call is whole, and its JSON is sound. Missing after an answer that was cut short."""

    index: int


ToolEvent = TextDelta | CallStarted | ArgumentsDelta | CallEnded


@dataclass(frozen=True)
class ToolCall:
    """A whole call."""

    id: str
    name: str
    arguments: str
    """A JSON object, as text."""


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def read_answer(text: str, names: Collection[str]) -> tuple[str, list[ToolCall]]:
    """The text and the calls of a whole answer."""
    parser = ToolCallParser(names)
    events = [*parser.push(text), *parser.flush()]
    arguments = {event.index: event.text for event in events if isinstance(event, ArgumentsDelta)}
    calls = [
        ToolCall(event.id, event.name, arguments[event.index])
        for event in events
        if isinstance(event, CallStarted)
    ]
    return "".join(event.text for event in events if isinstance(event, TextDelta)), calls


class ToolCallParser:
    """Text in pieces -> text and calls, the same however the text was cut into pieces (but for where their
    deltas are cut).

    What might begin a tag, with the white space before it, is held back; white space around calls is not part
    of the text. What is no sound call of one of the tools in `names` is given back as the text that it is,
    tags included.

    constrained: the answer keeps to a grammar of calls (tools.py), so that whatever begins as a call is one.
    Then arguments are
        handed out as they come; otherwise once the whole call has been found sound.
    """

    def __init__(
        self, names: Collection[str], *, constrained: bool = False, make_id: Callable[[], str] = new_call_id
    ) -> None:
        self.names, self.constrained, self.make_id = frozenset(names), constrained, make_id
        self._held = ""  # not given out yet; inside of a call, what follows its opening tag
        self._gap = ""  # the white space before the call that is being read
        self._after = False  # a call has ended, and nothing but white space has come since
        self._count = 0
        self._call: _Call | None = None

    def push(self, text: str) -> list[ToolEvent]:
        """What is known now."""
        self._held += text
        return _joined(self._read(final=False))

    def flush(self) -> list[ToolEvent]:
        """What is left when no more comes: what was held back is text after all."""
        return _joined(self._read(final=True))

    def _read(self, *, final: bool) -> Iterator[ToolEvent]:
        while True:
            if self._call is None:
                if self._after:
                    self._held = self._held.lstrip(WHITE)
                    self._after = not self._held
                at = self._held.find(OPEN)
                if at < 0:
                    shown = (
                        self._held if final else self._held[: len(self._held) - _may_begin_tag(self._held)]
                    )
                    self._held = self._held[len(shown) :]
                    yield TextDelta(shown)
                    return
                shown = self._held[:at].rstrip(WHITE)
                yield TextDelta(shown)
                self._gap, self._held = self._held[len(shown) : at], self._held[at + len(OPEN) :]
                self._call = _Call()
            sound = self._call.scan(self._held, self.names if self.constrained else ())
            if sound:
                yield from self._finish(self._call)
                continue
            yield from self._begun(self._call)
            if sound is None and not final:
                return
            started = self._call.name is not None
            if started and sound is None:  # cut short: what has come of the arguments stays the call's
                self._held = ""
                return
            if started:
                self._held = self._held[self._call.given :]
            else:
                yield TextDelta(self._gap + OPEN)
            self._call = None

    def _begun(self, call: _Call) -> Iterator[ToolEvent]:
        """What can be told of a call before its end."""
        if call.name is None:
            return
        if call.index is None:
            call.index = self._count
            self._count += 1
            yield CallStarted(call.index, self.make_id(), call.name)
        yield ArgumentsDelta(call.index, self._held[call.given : call.until])
        call.given = call.until

    def _finish(self, call: _Call) -> Iterator[ToolEvent]:
        """The closing tag has come."""
        body, rest = self._held[: call.at], self._held[call.at + len(CLOSE) :]
        read = _sound(body, self.names)
        yield from self._begun(call)
        if read is None and call.name is None:
            yield TextDelta(self._gap + OPEN)
        elif read is None:
            self._held = self._held[call.given :]
        else:
            if call.index is None:
                call.name, text = read
                call.index = self._count
                self._count += 1
                yield CallStarted(call.index, self.make_id(), call.name)
                yield ArgumentsDelta(call.index, text)
            yield CallEnded(call.index)
            self._held, self._after = rest, True
        self._call = None


_OUTSIDE = re.compile(r'["{}\[\]<]')
_INSIDE = re.compile(r'["\\\x00-\x1f]')
_HEAD = re.compile(
    rf'[ \t\r\n]*\{{[ \t\r\n]*"name"[ \t\r\n]*:[ \t\r\n]*"({NAME})"[ \t\r\n]*,[ \t\r\n]*'
    r'"arguments"[ \t\r\n]*:[ \t\r\n]*'
)


class _Call:
    """How far the text behind an opening tag has been read. A tag within a JSON string is part of the
    string."""

    def __init__(self) -> None:
        self.at = 0  # read up to here; when it is whole, where the closing tag begins
        self.depth = 0  # objects and lists that are open
        self.string = False
        self.name: str | None = None  # once the arguments may be told
        self.index: int | None = None
        self.given = self.until = 0  # the arguments have been told up to the one, and may be up to the other
        self.whole = False  # the arguments have ended

    def scan(self, text: str, names: Collection[str]) -> bool | None:
        """Go on reading: True at the closing tag, False where this cannot be a call, None when more is
        needed.

        names: tools whose arguments are told while they come.
        """
        found = self._scan(text, names)
        self._told()  # whatever comes of the call: in pieces, so much would have been told already
        return found

    def _scan(self, text: str, names: Collection[str]) -> bool | None:
        while True:
            found = (_INSIDE if self.string else _OUTSIDE).search(text, self.at)
            self.at = found.start() if found else len(text)
            if found is None:
                break
            mark = found.group()
            if mark == "\\":
                if self.at + 2 > len(text):
                    break
                self.at += 2
            elif mark == "<":
                rest = text[self.at : self.at + len(CLOSE)]
                if rest == CLOSE:
                    return True
                if not CLOSE.startswith(rest):
                    return False
                break
            elif mark < " ":
                return False
            else:
                if mark == '"':
                    self.string = not self.string
                elif mark in "{[":
                    self._open(text, names)
                else:
                    self.depth -= 1
                self.at += 1
                if mark == "}" and self.depth == 1 and self.name is not None:
                    self._told()
                    self.whole = True
        return None

    def _open(self, text: str, names: Collection[str]) -> None:
        self.depth += 1
        if names and self.depth == 2 and self.name is None and text[self.at] == "{":
            head = _HEAD.fullmatch(text, 0, self.at)
            if head and head[1] in names:
                self.name, self.given, self.until = head[1], self.at, self.at

    def _told(self) -> None:
        """All that has been read of the arguments may be told."""
        if not self.whole:
            self.until = max(self.until, self.at)


def _sound(body: str, names: Collection[str]) -> tuple[str, str] | None:
    """Name and arguments of a call, or None when it is not one."""
    try:
        value: Any = json.loads(body, parse_constant=_refuse)
        if (
            not isinstance(value, dict)
            or not isinstance(value.get("name"), str)
            or value["name"] not in names
        ):
            return None
        arguments = value.get("arguments", {})
        if not isinstance(arguments, dict):
            return None
        head = _HEAD.match(body)
        if head:
            _, end = json.JSONDecoder().raw_decode(body, head.end())
            if (
                body[end:].strip(WHITE) == "}"
            ):  # nothing but name and arguments: they are said as the model wrote them
                return value["name"], body[head.end() : end]
        return value["name"], json.dumps(arguments, allow_nan=False)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _may_begin_tag(text: str) -> int:
    """How many characters at the end may be the beginning of an opening tag, or white space before one."""
    partial = next(
        (size for size in range(min(len(OPEN) - 1, len(text)), 0, -1) if text.endswith(OPEN[:size])), 0
    )
    before = text[: len(text) - partial]
    return len(text) - len(before.rstrip(WHITE))


def _joined(events: Iterator[ToolEvent]) -> list[ToolEvent]:
    """The same without empty deltas, and with those that follow each other as one."""
    result: list[ToolEvent] = []
    for event in events:
        if isinstance(event, TextDelta | ArgumentsDelta) and not event.text:
            continue
        last = result[-1] if result else None
        if isinstance(event, TextDelta) and isinstance(last, TextDelta):
            result[-1] = TextDelta(last.text + event.text)
        elif (
            isinstance(event, ArgumentsDelta)
            and isinstance(last, ArgumentsDelta)
            and last.index == event.index
        ):
            result[-1] = ArgumentsDelta(event.index, last.text + event.text)
        else:
            result.append(event)
    return result
