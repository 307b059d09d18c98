"""What ends an assistant's turn: what a template writes behind an answer, whatever it is called.

It is found by rendering. A template may write one thing behind an answer in the middle and another at the
very end (Phi-3 adds `<|endoftext|>`, gpt-oss has `<|end|>` and `<|return|>`), and another behind a tool call.
The end is a control token, or several in a row, or a text such as `[/ASSISTANT]`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from chatwright.config import UserError
from chatwright.tokenizer import Tokenizer
from chatwright.traced_text import GENERATED, TEMPLATE, UNSURE, message_of, runs_of

Render = Callable[[Sequence[Mapping[str, Any]]], str]
"""A conversation as a `Traced` text. Raises UserError where the template refuses it."""

_LIKE_A_TOKEN = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")


@dataclass(frozen=True)
class Frames:
    """What a template writes around the messages of user, assistant, user, assistant."""

    head: str
    """In front of the first message."""
    between: str
    """Between the first question and its answer."""
    middle: str
    """Between the first answer and the next question; empty where a second question is refused."""
    last: str
    """Behind the last answer."""
    call: str = ""
    """Behind a tool call; empty where the template writes none."""
    inside: str = ""
    """Between thinking and answer; empty where the template writes no thinking."""


@dataclass(frozen=True)
class TurnEnds:
    """What ends a turn, with a tokenizer."""

    texts: tuple[str, ...]
    """What may end it: control tokens, or one text; empty where the template writes nothing. The loss covers
    what stands behind an answer up to the first of them."""
    tokens: tuple[str, ...]
    """The control tokens at which an answer is finished. (A token that also ends a model's thinking is in
    `texts` alone.)"""
    last: str
    """What ends the last turn; empty where nothing does."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts at which generation stops: an end without a control token."""
        return () if self.tokens else self.texts

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """The ids of the tokens."""
        numbers = (tokenizer.backend.token_to_id(token) for token in self.tokens)
        return [number for number in numbers if number is not None]

    def also(self, other: TurnEnds) -> TurnEnds:
        """These ends, and others."""
        texts = tuple(dict.fromkeys((*self.texts, *other.texts)))
        return TurnEnds(texts, tuple(dict.fromkeys((*self.tokens, *other.tokens))), self.last or other.last)


NOTHING = TurnEnds((), (), "")

_TALK = (
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "Four."},
)
_CALL = {
    "id": "callprobe",
    "type": "function",
    "function": {"name": "probe_tool", "arguments": {"key": "one"}},
}


def frames(render: Render) -> Frames | None:
    """The frames of a template; None where it refuses the probes, or does not show where answers are."""
    talk: list[Mapping[str, Any]] = list(_TALK)
    for messages in (talk, [{"role": "system", "content": "Zero."}, *talk], talk[:2]):
        text = _tried(render, messages)
        found = _frames(text, len(messages) % 2, len(messages))
        if found is not None:
            return replace(found, call=_behind_call(render), inside=_inside(render))
    return None


def _tried(render: Render, messages: Sequence[Mapping[str, Any]]) -> str:
    """A conversation as a text; empty where the template refuses it."""
    try:
        return render(messages)
    except UserError:
        return ""


def _behind_call(render: Render) -> str:
    text = _tried(render, [_TALK[0], {"role": "assistant", "content": "", "tool_calls": [_CALL]}])
    places = _places(text)
    return behind(text, places[1][1]) if 1 in places else ""


def _inside(render: Render) -> str:
    thought = {**_TALK[1], "reasoning_content": "Hmm.", "thinking": "Hmm."}
    text = str.__str__(_tried(render, [_TALK[0], thought]))
    return text.partition("Hmm.")[2].partition("Two.")[0] if "Hmm." in text else ""


def _places(text: str) -> dict[int, tuple[int, int]]:
    """Where each message stands in a text: its first and its last character. Empty if that is not sure."""
    places: dict[int, tuple[int, int]] = {}
    at = 0
    for size, origin in runs_of(text):
        number = message_of(origin)
        if origin & ~GENERATED == UNSURE:
            return {}
        if number is not None and size:
            places[number] = (places[number][0] if number in places else at, at + size)
        at += size
    return places


def _frames(text: str, first: int, count: int) -> Frames | None:
    places = _places(text)
    if any(n not in places for n in range(first, count)):
        return None
    plain = str.__str__(text)
    answer = count - 1
    middle = plain[places[first + 1][1] : places[first + 2][0]] if count - first == 4 else ""
    between = plain[places[first][1] : places[first + 1][0]]
    return Frames(plain[: min(places.values())[0]], between, middle, behind(text, places[answer][1]))


def behind(text: str, start: int) -> str:
    """The template's text from `start` on."""
    at = 0
    for size, origin in runs_of(text):
        if origin & ~GENERATED != TEMPLATE and at >= start and size:
            return str.__getitem__(text, slice(start, at))
        at += size
    return str.__getitem__(text, slice(start, None))


def tail(text: str) -> str:
    """The template's text behind the last message."""
    start = at = 0
    for size, origin in runs_of(text):
        at += size
        if origin & ~GENERATED != TEMPLATE:
            start = at
    return str.__getitem__(text, slice(start, None))


def guessed(found: Frames | None) -> str:
    """What ends a turn, without a tokenizer: the first word that looks like a control token, or a text.
    Empty where there is none."""
    if found is None:
        return ""
    first = _LIKE_A_TOKEN.search(found.last)
    return first[0] if first is not None else _chosen(found, _one_of([])).last


def known(found: Frames | None, tokenizer: Tokenizer) -> TurnEnds:
    """What ends a turn: special tokens first, then other added tokens, then text."""
    if found is None:
        return NOTHING
    added = tokenizer.backend.get_added_tokens_decoder().values()
    others = [token.content for token in added if not token.content.isspace()]
    for names in (list(tokenizer.control_ids), others):
        pattern = _one_of(names)
        chosen = _chosen(found, pattern)
        if chosen.tokens:
            return chosen
    return _chosen(found, _one_of([]))


def of_token(end: str, tokenizer: Tokenizer) -> TurnEnds:
    """A turn that ends with a given token, or a text that is none."""
    if not end:
        return NOTHING
    added = tokenizer.backend.get_added_tokens_decoder().values()
    is_token = end in tokenizer.control_ids or any(token.content == end for token in added)
    return TurnEnds((end,), (end,) if is_token else (), end)


def _one_of(names: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def _chosen(found: Frames, token: re.Pattern[str]) -> TurnEnds:
    opening = _opening(found.head, token)
    common = _common(found.middle, found.last) if found.middle else found.last
    texts: list[str] = []
    # The last token that stands behind every answer: several may, and the turn is over with the last.
    closing = [one[0] for one in token.finditer(common) if one[0] not in opening]
    first = token.search(found.last)
    if closing:
        texts.append(closing[-1])
    elif first is not None and first[0] not in opening:
        texts.append(first[0])
    other, between = token.search(found.middle), token.search(found.between)
    if other is not None and not any(text in found.middle for text in texts):
        # An end, not the beginning of the next turn: a question ends with it as well, or nothing begins so.
        asked = between is not None and between[0] == other[0] and other[0] not in opening
        if asked or other[0] not in found.head:
            texts.append(other[0])
    called = [one[0] for one in token.finditer(found.call) if one[0] not in opening]
    if texts and called and not set(called) & set(texts):
        texts.append(called[-1])
    if texts:
        tokens = [text for text in texts if text not in found.inside] or texts[:1]
        return TurnEnds(tuple(texts), tuple(tokens), texts[0])
    end = found.last.strip()
    if end and common.strip().startswith(end):
        return TurnEnds((end,), (), end)
    return NOTHING


def _opening(head: str, token: re.Pattern[str]) -> set[str]:
    """The control tokens with which a conversation begins, one directly behind the other: no turn ends with
    them."""
    found: set[str] = set()
    at = 0
    while one := token.match(head, at):
        found.add(one[0])
        at = one.end()
    return found


def _common(first: str, second: str) -> str:
    """What both begin with."""
    size = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        size += 1
    return first[:size]
