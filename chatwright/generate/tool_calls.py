"""A streaming parser for tool calls in an answer's text.

The form is `<tool_call>` JSON `</tool_call>` (tools.py). Only a model's text is parsed here: users cannot
call a tool by writing one.
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
    """A call is complete, and its JSON is valid. Missing after an answer that was cut short."""

    index: int


ToolEvent = TextDelta | CallStarted | ArgumentsDelta | CallEnded


@dataclass(frozen=True)
class ToolCall:
    """A complete call."""

    id: str
    name: str
    arguments: str
    """A JSON object, as text."""


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def read_answer(text: str, names: Collection[str]) -> tuple[str, list[ToolCall]]:
    """The text and the calls of a complete answer."""
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
    """Text in pieces -> text and calls. How the text is cut into pieces changes only where deltas are cut.

    A possible beginning of a tag, with the white space before it, is held back. White space around calls is
    not part of the text. Anything but a valid call of one of the tools in `names` is returned as text, tags
    included.

    constrained: the answer follows a grammar of calls (tools.py), so that everything that begins as a call is
        one. Arguments are then returned as they come; otherwise once the complete call is known to be valid.
    """

    def __init__(
        self, names: Collection[str], *, constrained: bool = False, make_id: Callable[[], str] = new_call_id
    ) -> None:
        self.names, self.constrained, self.make_id = frozenset(names), constrained, make_id
        self._held = ""  # not returned yet; inside a call, what follows its opening tag
        self._gap = ""  # the white space before the call that is being read
        self._after = False  # a call has ended, and nothing but white space has come since
        self._count = 0
        self._call: _Call | None = None

    def push(self, text: str) -> list[ToolEvent]:
        """The events that are certain now."""
        self._held += text
        return _joined(self._read(final=False))

    def flush(self) -> list[ToolEvent]:
        """The remaining events when no more text comes: what was held back is text after all."""
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
        """The events of a call that are certain before its end."""
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
    """State of parsing the text after an opening tag. A tag within a JSON string is part of the string."""

    def __init__(self) -> None:
        self.at = 0  # parsed up to here; after a complete call, where the closing tag begins
        self.depth = 0  # objects and lists that are open
        self.string = False
        self.name: str | None = None  # set once the arguments may be returned
        self.index: int | None = None
        self.given = self.until = 0  # arguments are returned up to `given`, and may be up to `until`
        self.whole = False  # the arguments have ended

    def scan(self, text: str, names: Collection[str]) -> bool | None:
        """Parse on: True at the closing tag, False where this cannot be a call, None when more is needed.

        names: tools whose arguments are returned as they come.
        """
        found = self._scan(text, names)
        self._told()  # even before an error: in smaller pieces this much would have been returned already
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
        """Allow returning the arguments up to here."""
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
            # Nothing but name and arguments: return them as the model wrote them.
            if body[end:].strip(WHITE) == "}":
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
    """The events without empty deltas, and with consecutive deltas joined."""
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
