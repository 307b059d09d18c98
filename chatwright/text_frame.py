"""What stands in front of a text and behind it, and which tokens end an answer.

The makers of a model say both in many places: in the post-processor of tokenizer.json, in
tokenizer_config.json (`add_bos_token`, `eos_token`), in generation_config.json and config.json
(`eos_token_id`), in a GGUF file's keys. Here is what they come to. A model that learns to continue texts
behind one token talks nonsense behind another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from chatwright.config import UserError
from chatwright.tokenizer_parts import parts_of

TRAINED_HERE = "documents are divided by it in training"
"""Why a text begins with the end-of-text token for models that are trained here."""
MOST_AROUND = 64
"""Most tokens in front of a text or behind it; more is damage."""


@dataclass(frozen=True)
class TextFrame:
    """Token ids around a text, and the ends of answers."""

    begin: tuple[int, ...] = ()
    """In front of every text, in order."""
    close: tuple[int, ...] = ()
    """Behind every text."""
    ends: tuple[tuple[int, str], ...] = ()
    """Ids that end an answer beside the end-of-text token, each with the place that names it."""
    source: str = ""
    """Who says what stands around a text, for people."""

    def with_ends(self, ids: Iterable[int], source: str) -> TextFrame:
        """The same, with more ends; one that is known keeps its place."""
        known = {number for number, _ in self.ends}
        return replace(self, ends=(*self.ends, *((one, source) for one in ids if one not in known)))

    def to_state(self) -> dict[str, Any]:
        """For a checkpoint's state.json."""
        return {
            "begin": list(self.begin),
            "close": list(self.close),
            "ends": [list(end) for end in self.ends],
            "source": self.source,
        }

    @classmethod
    def of_state(cls, value: Any, where: str) -> TextFrame | None:
        """What a state.json says; None where it says nothing. Raises UserError when it is damaged."""
        if value is None:
            return None
        if isinstance(value, dict):
            begin, close, ends, source = (value.get(key) for key in ("begin", "close", "ends", "source"))
            pairs = isinstance(ends, list) and all(
                isinstance(one, list) and len(one) == 2 and _whole(one[0]) and isinstance(one[1], str)
                for one in ends
            )
            if _ids(begin) and _ids(close) and pairs and isinstance(source, str):
                known = tuple((int(number), str(place)) for number, place in ends)  # type: ignore[union-attr]
                return cls(tuple(begin), tuple(close), known, source)  # type: ignore[arg-type]
        raise UserError(f"{where}: `texts` does not say what stands around a text")


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MOST_AROUND and all(map(_whole, value))


def of_post_processor(content: Mapping[str, Any], where: str) -> TextFrame | None:
    """What the post-processor of a tokenizer.json puts around a text; None where there is none that says (the
    post-processor ByteLevel moves offsets alone).

    Raises UserError for one that does not leave the text whole, once, in the middle.
    """
    processor = content.get("post_processor")
    if processor is None:
        return None
    begin, close = _around(processor, where, 0)
    if all(one.get("type") in ("ByteLevel", "Sequence") for one in parts_of(processor)):
        return None
    if max(len(begin), len(close)) > MOST_AROUND:
        raise UserError(f"{where}: its post_processor puts too many tokens around a text")
    return TextFrame(tuple(begin), tuple(close), source="the post_processor of tokenizer.json")


def _around(processor: Any, where: str, depth: int) -> tuple[list[int], list[int]]:
    """The ids in front of a text and behind it."""
    if not isinstance(processor, dict) or depth > MOST_AROUND:
        raise UserError(f"{where}: its post_processor is damaged")
    kind = processor.get("type")
    if kind == "ByteLevel":  # moves offsets alone
        return [], []
    if kind == "Sequence":
        inner = processor.get("processors")
        parts = [_around(one, where, depth + 1) for one in (inner if isinstance(inner, list) else [])]
        parts = [one for one in parts if one != ([], [])]
        if len(parts) > 1:  # the library takes what the first one has made for a pair of texts
            raise UserError(f"{where}: its post_processor puts tokens around a text twice: not supported")
        return parts[0] if parts else ([], [])
    if kind in ("BertProcessing", "RobertaProcessing"):
        return [_second(processor.get("cls"), where)], [_second(processor.get("sep"), where)]
    if kind == "TemplateProcessing":
        return _of_template(processor, where)
    raise UserError(f"{where}: its post_processor {str(kind)[:80]!r} is not supported")


def _second(pair: Any, where: str) -> int:
    if not isinstance(pair, list) or len(pair) != 2 or not _whole(pair[1]):
        raise UserError(f"{where}: its post_processor is damaged")
    return int(pair[1])


def _of_template(processor: Mapping[str, Any], where: str) -> tuple[list[int], list[int]]:
    """The ids of a template such as `<s> $A </s>`."""
    single, tokens = processor.get("single"), processor.get("special_tokens")
    around: tuple[list[int], list[int]] = ([], [])
    texts = 0
    for piece in single if isinstance(single, list) else []:
        if isinstance(piece, dict) and isinstance(piece.get("Sequence"), dict):
            texts += 1 if piece["Sequence"].get("id") == "A" else 2
            continue
        token = piece.get("SpecialToken") if isinstance(piece, dict) else None
        name = token.get("id") if isinstance(token, dict) else None
        known = tokens.get(name) if isinstance(tokens, dict) and isinstance(name, str) else None
        ids = known.get("ids") if isinstance(known, dict) else None
        if not _ids(ids):
            raise UserError(f"{where}: its post_processor names the token {str(name)[:80]!r} without its id")
        around[bool(texts)].extend(ids)  # type: ignore[arg-type]
    if texts != 1:
        raise UserError(f"{where}: its post_processor does not write a text once: that is not supported")
    return around


def template_processing(frame: TextFrame, names: Mapping[int, str]) -> dict[str, Any] | None:
    """The post-processor of a tokenizer.json that puts this around a text; None where nothing does.

    `names` are the tokens' names.
    """
    if not frame.begin and not frame.close:
        return None

    def special(number: int, side: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": names[number], "type_id": side}}

    def around(side: int, text: str) -> list[dict[str, Any]]:
        middle = {"Sequence": {"id": text, "type_id": side}}
        return [
            *(special(one, side) for one in frame.begin),
            middle,
            *(special(one, side) for one in frame.close),
        ]

    return {
        "type": "TemplateProcessing",
        "single": around(0, "A"),
        "pair": [*around(0, "A"), *around(1, "B")],
        "special_tokens": {
            names[one]: {"id": names[one], "ids": [one], "tokens": [names[one]]}
            for one in sorted({*frame.begin, *frame.close})
        },
    }
