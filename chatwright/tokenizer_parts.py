"""What a tokenizer.json may hold.

A tokenizer comes with a model, from whoever made the model. The `tokenizers` library computes whatever the
file asks for, also what makes a text any number of times longer or ends the process. So each part must be
one that tokenizers of language models need, within bounds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chatwright.config import UserError

LARGEST_FILE = 64 << 20
"""Most bytes of a tokenizer.json; published ones have up to 35 MB."""
NORMALIZERS = (
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Lowercase",
    "StripAccents",
    "Strip",
    "Prepend",
    "Replace",
    "Sequence",
)
PRE_TOKENIZERS = ("ByteLevel", "Split", "Digits", "Punctuation", "Metaspace", "Sequence")
"""The parts that a tokenizer.json may have. Others of the library can make texts any number of times longer,
or end the process when they are damaged; no language model's tokenizer needs them."""
MODELS = ("BPE",)
"""Kinds of models. A unigram model would make a control token of text that spells one: its tokens are pieces
like any other."""
POST_PROCESSORS = ("ByteLevel", "TemplateProcessing", "BertProcessing", "RobertaProcessing", "Sequence")
MOST_PARTS = 16
LONGEST_PREFIX = 16
"""Most characters that are put in front of a text."""
MOST_GROWTH = 8
"""Most times that replacements may make a text longer."""


@contextmanager
def library(trouble: str, *passing: type[Exception]) -> Iterator[None]:
    """Errors of the tokenizers library, its panics included, become a UserError that says what the trouble
    is."""
    try:
        yield
    except BaseException as error:  # the library raises bare Exception; a panic of its Rust is not even that
        own = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if not own or isinstance(
            error, passing
        ):  # what is not the library's passes: Ctrl-C, a signal that ends a stage
            raise
        raise UserError(f"{trouble} ({error})") from None


def read_content(file: Path) -> dict[str, Any]:
    """What a tokenizer.json says, if all its parts are ones that we know. Raises UserError naming the part
    that is not."""
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise UserError(f"{file} is larger than {LARGEST_FILE >> 20} MB: no tokenizer is")
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not a tokenizer ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a tokenizer")
    check_parts(content, str(file))
    return content


def check_parts(content: Mapping[str, Any], where: str) -> None:
    """Whether a tokenizer.json holds what we know. Raises UserError naming the part that we do not."""
    for place, known in (
        ("normalizer", NORMALIZERS),
        ("pre_tokenizer", PRE_TOKENIZERS),
        ("post_processor", POST_PROCESSORS),
    ):
        kinds = list(_kinds(content.get(place)))
        strange = [kind for kind in kinds if kind not in known]
        if strange:
            raise UserError(
                f"{where}: its {place} {strange[0]!r:.80} is not supported, only {', '.join(known)}"
            )
        if len(kinds) > MOST_PARTS or (place != "post_processor" and kinds.count("ByteLevel") > 1):
            raise UserError(f"{where}: its {place} has too many parts")
    _check_normalizer(content.get("normalizer"), where)
    repeats = sum(
        len(one["single"])
        for one in parts_of(content.get("post_processor"))
        if isinstance(one.get("single"), list)
    )
    if repeats > MOST_PARTS:
        raise UserError(f"{where}: its post_processor has too many parts")


def _check_normalizer(normalizer: Any, where: str) -> None:
    """Raise UserError where a normaliser could make a text much longer."""
    growth, prefix = 1.0, 0
    for one in parts_of(normalizer):
        if one.get("type") == "Prepend":
            prefix += len(one["prepend"]) if isinstance(one.get("prepend"), str) else 0
        elif one.get("type") == "Replace":
            growth *= _growth(one, where)
    if prefix > LONGEST_PREFIX:
        raise UserError(f"{where}: its normalizer puts {prefix:,} characters in front of a text")
    if growth > MOST_GROWTH:
        raise UserError(f"{where}: its normalizer could make a text {growth:,.0f} times as long")


def _growth(replace: Mapping[str, Any], where: str) -> float:
    """How many times longer a replacement can make a text. An expression may match between any two
    characters."""
    pattern, content = replace.get("pattern"), replace.get("content")
    if not isinstance(content, str) or not isinstance(pattern, dict):
        raise UserError(f"{where}: its normalizer Replace is damaged")
    text = pattern.get("String")
    if text == "":
        raise UserError(f"{where}: its normalizer replaces the empty text")
    if isinstance(text, str):
        return max(1.0, len(content) / len(text))
    return 1.0 + len(content)


def parts_of(value: Any) -> Iterator[dict[str, Any]]:
    """The objects that make up a part of a tokenizer.json: itself, and those of a sequence."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            yield one
            for name in ("normalizers", "pretokenizers", "processors"):
                inner = one.get(name)
                left += inner if isinstance(inner, list) else []


def _kinds(value: Any) -> Iterator[str]:
    return (str(one.get("type"))[:80] for one in parts_of(value))


def without_prefix(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The tokenizer.json for a text that goes on: nothing is put in front of it. None where nothing is."""
    found: dict[str, Any] = json.loads(json.dumps(content))
    changed = False
    for one in (*parts_of(found.get("pre_tokenizer")), *parts_of(found.get("normalizer"))):
        if one.get("type") == "Metaspace" and one.get("prepend_scheme", "always") != "never":
            one["prepend_scheme"], changed = "never", True
            one.pop("add_prefix_space", None)
        elif one.get("type") == "ByteLevel" and one.get("add_prefix_space"):
            one["add_prefix_space"], changed = False, True
        elif one.get("type") == "Prepend":
            # The library has no part that does nothing; this one changes no text.
            one.clear()
            one |= {"type": "Replace", "pattern": {"String": "\0"}, "content": "\0"}
            changed = True
    return found if changed else None
