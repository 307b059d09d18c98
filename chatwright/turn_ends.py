"""What ends an assistant's turn: what a template writes behind an answer, whatever it is called.

It is found by rendering. A template may write one thing behind an answer in the middle and another at the
very end (Phi-3 adds `<|endoftext|>`, gpt-oss has `<|end|>` and `<|return|>`), and another behind a tool call.
The end is a control token, or several in a row, or a text such as `[/ASSISTANT]`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chatwright.config import UserError
from chatwright.tokenizer import Tokenizer
from chatwright.traced_text import TEMPLATE, UNSURE, message_of, runs_of

Render = Callable[[Sequence[Mapping[str, Any]]], str]
"""A conversation as a `Traced` text. Raises UserError where the template refuses it."""

_LIKE_A_TOKEN = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")


@dataclass(frozen=True)
class Frames:
    """What a template writes around the messages of user, assistant, user, assistant."""

    between: str
    """Between the first question and its answer."""
    middle: str
    """Between the first answer and the next question; empty where a second question is refused."""
    last: str
    """Behind the last answer."""
    call: str = ""
    """Behind a tool call; empty where the template writes none."""


@dataclass(frozen=True)
class TurnEnds:
    """What ends a turn, with a tokenizer."""

    texts: tuple[str, ...]
    """What the template writes there, in whole; empty where it writes nothing. The loss covers it."""
    tokens: tuple[str, ...]
    """Control tokens among them: an answer is finished at each."""
    last: str
    """The token, or the text, that is written last; empty where there is none."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts at which generation stops: ends without a control token."""
        return tuple(text for text in self.texts if not any(token in text for token in self.tokens))


NOTHING = TurnEnds((), (), "")

_TALK = (
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "Four."},
)
CALL = {
    "id": "callprobe",
    "type": "function",
    "function": {"name": "probe_tool", "arguments": {"key": "one"}},
}


def frames(render: Render) -> Frames | None:
    """The frames of a template; None where it refuses the probes, or does not show where answers are."""
    talk: list[Mapping[str, Any]] = list(_TALK)
    for messages in (talk, [{"role": "system", "content": "Zero."}, *talk], talk[:2]):
        try:
            text = render(messages)
        except UserError:
            continue
        found = _frames(text, len(messages) % 2, len(messages))
        if found is not None:
            return found
    return None


def call_frame(render: Render) -> str:
    """What a template writes behind a tool call; empty where it refuses or does not write it."""
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ]
    try:
        text = render(messages)
    except UserError:
        return ""
    places = _places(text)
    return _behind(text, places[1][1]) if 1 in places else ""


def _places(text: str) -> dict[int, tuple[int, int]]:
    """Where each message stands in a text: its first and its last character. Empty if that is not sure."""
    places: dict[int, tuple[int, int]] = {}
    at = 0
    for size, origin in runs_of(text):
        number = message_of(origin)
        if origin == UNSURE:
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
    return Frames(plain[places[first][1] : places[first + 1][0]], middle, _behind(text, places[answer][1]))


def _behind(text: str, start: int) -> str:
    """The template's text from `start` on."""
    at = 0
    for size, origin in runs_of(text):
        if origin != TEMPLATE and at >= start and size:
            return str.__getitem__(text, slice(start, at))
        at += size
    return str.__getitem__(text, slice(start, None))


def guessed(found: Frames | None) -> str:
    """What ends a turn, without a tokenizer: the first word that looks like a control token, or a text.
    Empty where there is none."""
    return _chosen(found, _LIKE_A_TOKEN).last if found is not None else ""


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
    is_token = end in tokenizer.control_ids or tokenizer.backend.token_to_id(end) is not None
    return TurnEnds((end,), (end,) if is_token else (), end)


def _one_of(names: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def _chosen(found: Frames, token: re.Pattern[str]) -> TurnEnds:
    common = _common(found.middle, found.last) if found.middle else found.last
    texts: list[str] = []
    tokens: list[str] = []
    first = token.search(found.last)
    if first is not None:
        run = [first]
        while following := token.match(common, run[-1].end()):
            run.append(following)
        texts.append(found.last[first.start() : run[-1].end()])
        tokens += [one.group() for one in run]
    last = tokens[-1] if tokens else ""
    for frame in (found.middle, found.call):
        other, between = token.search(frame), token.search(found.between)
        known_here = any(text in frame for text in texts)
        ends_turns = frame is found.call or (
            between is not None and other is not None and between[0] == other[0]
        )
        if other is not None and not known_here and ends_turns and (texts or frame is found.middle):
            texts.append(other[0])
            tokens.append(other[0])
            last = last or other[0]
    if texts:
        return TurnEnds(tuple(dict.fromkeys(texts)), tuple(dict.fromkeys(tokens)), last)
    end = found.last.strip()
    if end and common.strip().startswith(end):
        return TurnEnds((end,), (), end)
    return NOTHING


def _common(first: str, second: str) -> str:
    """What both begin with."""
    size = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        size += 1
    return first[:size]
