"""The typed records that every stage reads, and the content id that decides their side of the split.

A record's id is a hash of its content, not of its position: the same text has the same id in any file and in
any order, and a conversation has the same id as a `Document` (its transcript) and as a `Dialogue`.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from chatwright.messages import Message, check_message, described
from chatwright.messages import kind_of as _kind

Record = TypeVar("Record")


def content_id(text: str) -> str:
    """32 hex digits: SHA-256 of the text in Unicode NFC with every run of white space made one space.

    Line ends, indentation and joined lines therefore do not change the id; anything that a reader sees does.
    Raises ValueError when the text cannot be written as UTF-8 (an unpaired surrogate, from a broken JSON
    escape).
    """
    plain = " ".join(text.split())
    if not plain.isascii():
        plain = unicodedata.normalize("NFC", plain)
    try:
        encoded = plain.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"an unpaired surrogate {plain[error.start]!r} stands in the text") from None
    return hashlib.sha256(encoded).hexdigest()[:32]


def transcript(messages: Iterable[Message]) -> str:
    """The contents of a conversation as plain text, one turn a line (line breaks inside a turn become
    spaces).

    Every part counts, an image by its name (messages.py), so that different conversations have different ids.
    """
    return "\n".join(" ".join(described(message["content"]).split()) for message in messages)


@dataclass(frozen=True)
class Document:
    """One text to learn the language from."""

    id: str
    """Content id of the text."""
    text: str
    """Not empty; may hold line breaks."""

    def __post_init__(self) -> None:
        _require_text(self.id, "id")
        _require_text(self.text, "text")

    @classmethod
    def of(cls, text: str) -> Document:
        """The document with this text, its id worked out. Raises ValueError: empty, not writable as UTF-8."""
        _require_text(text, "text")
        return cls(content_id(text), text)

    def to_json(self) -> str:
        """One line of JSON."""
        return _dump({"id": self.id, "text": self.text})

    @classmethod
    def from_json(cls, line: str) -> Document:
        """The inverse of `to_json`. Raises ValueError."""
        fields = _load(line, cls, ("id", "text"))
        return cls(fields["id"], fields["text"])


@dataclass(frozen=True)
class Dialogue:
    """One conversation. Roles and contents are checked; that the roles alternate is up to the source."""

    id: str
    """Content id of the transcript: the same conversation as a `Document` has the same id."""
    messages: tuple[Message, ...]
    """At least one."""
    unlearnt: tuple[int, ...] = ()
    """Numbers, from 0 and rising, of the assistant's messages that are not to be learnt: the model reads them
    and does not learn to write them. Not written to files where there are none."""

    def __post_init__(self) -> None:
        _require_text(self.id, "id")
        object.__setattr__(self, "messages", _check_messages(self.messages, "messages"))
        object.__setattr__(self, "unlearnt", _check_unlearnt(self.unlearnt, self.messages))

    @classmethod
    def of(cls, messages: Sequence[Message], unlearnt: Collection[int] = ()) -> Dialogue:
        """The dialogue of these messages, its id worked out. Raises ValueError."""
        checked = _check_messages(messages, "messages")
        return cls(content_id(transcript(checked)), checked, tuple(sorted(unlearnt)))

    @property
    def answers(self) -> list[int]:
        """The numbers of the assistant's messages that are to be learnt."""
        left_out = set(self.unlearnt)
        return [
            number
            for number, message in enumerate(self.messages)
            if message["role"] == "assistant" and number not in left_out
        ]

    def to_json(self) -> str:
        """One line of JSON."""
        marked = {"unlearnt": list(self.unlearnt)} if self.unlearnt else {}
        return _dump({"id": self.id, "messages": list(self.messages), **marked})

    @classmethod
    def from_json(cls, line: str) -> Dialogue:
        """The inverse of `to_json`. Raises ValueError."""
        fields = _load(line, cls, ("id", "messages"), optional=("unlearnt",))
        unlearnt = _sequence(fields.get("unlearnt", ()), "unlearnt")
        return cls(fields["id"], _sequence(fields["messages"], "messages"), unlearnt)


@dataclass(frozen=True)
class LabelledText:
    """A text and a number that people gave it (a mean rating, a class)."""

    id: str
    """Content id of the text."""
    text: str
    label: float
    """Finite; the source says which scale."""

    def __post_init__(self) -> None:
        _require_text(self.id, "id")
        _require_text(self.text, "text")
        object.__setattr__(self, "label", _number(self.label, "label"))

    @classmethod
    def of(cls, text: str, label: float) -> LabelledText:
        """The labelled text, its id worked out. Raises ValueError."""
        _require_text(text, "text")
        return cls(content_id(text), text, label)

    def to_json(self) -> str:
        """One line of JSON."""
        return _dump({"id": self.id, "text": self.text, "label": self.label})

    @classmethod
    def from_json(cls, line: str) -> LabelledText:
        """The inverse of `to_json`. Raises ValueError."""
        fields = _load(line, cls, ("id", "text", "label"))
        return cls(fields["id"], fields["text"], fields["label"])


@dataclass(frozen=True)
class Comparison:
    """K answers to one prompt with a score each: higher is preferred, equal is a tie."""

    id: str
    """Content id of the prompt's transcript: all comparisons of a prompt are on one side of the split."""
    prompt: tuple[Message, ...]
    """The conversation up to the answer; at least one message."""
    responses: tuple[str, ...]
    """At least two."""
    scores: tuple[float, ...]
    """One for each response; finite."""
    annotator: str = ""
    """Who gave the scores; empty when not known, and then not written to files."""

    def __post_init__(self) -> None:
        _require_text(self.id, "id")
        if not isinstance(self.annotator, str):
            raise ValueError(f"annotator must be text, found {_kind(self.annotator)}")
        object.__setattr__(self, "prompt", _check_messages(self.prompt, "prompt"))
        object.__setattr__(self, "responses", tuple(self.responses))
        object.__setattr__(self, "scores", tuple(_number(score, "a score") for score in self.scores))
        if len(self.responses) < 2:
            raise ValueError(f"a comparison needs at least two responses, found {len(self.responses)}")
        if len(self.responses) != len(self.scores):
            raise ValueError(f"{len(self.responses)} responses but {len(self.scores)} scores")
        for response in self.responses:
            if not isinstance(response, str):
                raise ValueError(f"a response must be text, found {_kind(response)}")

    @classmethod
    def of(
        cls, prompt: Sequence[Message], responses: Sequence[str], scores: Sequence[float], annotator: str = ""
    ) -> Comparison:
        """The comparison, its id worked out. Raises ValueError."""
        checked = _check_messages(prompt, "prompt")
        answers, given = _sequence(responses, "responses"), _sequence(scores, "scores")
        return cls(content_id(transcript(checked)), checked, answers, given, annotator)

    def to_json(self) -> str:
        """One line of JSON."""
        fields: dict[str, object] = {
            "prompt": list(self.prompt),
            "responses": list(self.responses),
            "scores": list(self.scores),
        }
        return _dump({"id": self.id, **fields, **({"annotator": self.annotator} if self.annotator else {})})

    @classmethod
    def from_json(cls, line: str) -> Comparison:
        """The inverse of `to_json`. Raises ValueError."""
        fields = _load(line, cls, ("id", "prompt", "responses", "scores"), optional=("annotator",))
        prompt, responses, scores = (_sequence(fields[key], key) for key in ("prompt", "responses", "scores"))
        return cls(fields["id"], prompt, responses, scores, fields.get("annotator", ""))


def _check_messages(messages: object, name: str) -> tuple[Message, ...]:
    checked = tuple(check_message(message) for message in _sequence(messages, name))
    if not checked:
        raise ValueError(f"{name} is empty")
    return checked


def _check_unlearnt(numbers: Sequence[object], messages: Sequence[Message]) -> tuple[int, ...]:
    """The numbers of messages that are not to be learnt, rising. Raises ValueError for others than those of
    the assistant's messages."""
    checked: set[int] = set()
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(messages):
            raise ValueError(f"unlearnt must hold numbers of messages, found {_kind(number)}")
        if messages[number]["role"] != "assistant":
            raise ValueError(f"unlearnt names message {number}, which is not the assistant's")
        checked.add(number)
    return tuple(sorted(checked))


def _sequence(value: object, name: str) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise ValueError(f"{name} must be a list, found {_kind(value)}")
    return tuple(value)


def _require_text(value: object, name: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, found {_kind(value)}")
    if not value.strip():
        raise ValueError(f"{name} is empty")


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, found {_kind(value)}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, found {value}")
    return float(value)


def _dump(fields: Mapping[str, object]) -> str:
    return json.dumps(fields, ensure_ascii=False)


def _load(line: str, cls: type[Record], keys: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    fields = json.loads(line)  # json.JSONDecodeError is a ValueError
    if not isinstance(fields, dict) or set(fields) - set(optional) != set(keys):
        raise ValueError(f"a {cls.__name__} must be an object with exactly {', '.join(keys)}")
    return fields
