"""A data source of another package: short conversations that it makes itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from chatwright.chat import Message
from chatwright.data.catalogue import Source

ANIMALS = ("cat", "dog", "hen", "fox", "owl", "cow", "pig", "bee", "ant", "elk")
PLACES = ("house", "river", "field", "wood", "barn", "hill")


def read(cache: Path) -> Iterator[tuple[Message, ...]]:
    """A question and an answer for every animal and place."""
    for animal in ANIMALS:
        for place in PLACES:
            question = Message(role="user", content=f"Where is the {animal} of the {place}?")
            answer = f"The {animal} is in the {place}, and the {place} is old."
            yield question, Message(role="assistant", content=answer)


SOURCE = Source(
    "couplets",
    "Questions about animals and places, made up",
    "CC0 (its authors, who wrote it for a test)",
    "https://example.org/couplets",
    dialogue=read,
)
