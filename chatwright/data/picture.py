"""A conversation with its loss mask for people to see: in colours, or in brackets where there are none.

It shows what the loss sees, the ids turned back into text, not the original conversation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from chatwright.config import harmless

if TYPE_CHECKING:
    from rich.text import Text

    from chatwright.chat import EncodedChat
    from chatwright.data.packing import PackedRow
    from chatwright.tokenizer import Tokenizer

LEARNT = "black on green"


def legend(*, colours: bool) -> Text:
    """An example of how learnt text is shown."""
    from rich.text import Text

    return Text("like this", style=LEARNT) if colours else Text("in [[brackets]]")


def mask_picture(encoded: EncodedChat, tokenizer: Tokenizer, *, end: str, colours: bool) -> Text:
    """A conversation as the model sees it: learnt text on green, or in [[brackets]] without colours.

    Control tokens are shown by their names. A line break follows each `end` of a turn, for readability.
    """
    from rich.text import Text

    picture = Text()
    start = 0
    while start < len(encoded.ids):
        stop = start
        while stop < len(encoded.ids) and encoded.mask[stop] == encoded.mask[start]:
            stop += 1
        text = harmless(spelled(encoded.ids[start:stop], tokenizer))
        if encoded.mask[start]:
            picture.append(text if colours else f"[[{text}]]", style=LEARNT)
        else:
            picture.append(text, style="dim")
        following = tokenizer.token_bytes(encoded.ids[stop]) if stop < len(encoded.ids) else b"\n"
        if encoded.ids[stop - 1] == tokenizer.control_ids.get(end) and not following.startswith(b"\n"):
            picture.append("\n")
        start = stop
    return picture


def pieces_of(row: PackedRow) -> Iterator[EncodedChat]:
    """The conversations that share a packed row, as the loss sees them: nothing predicts the first token of
    each, so that it is never learnt, whatever the template's mask says (`packing.batch_rows`)."""
    from chatwright.chat import EncodedChat

    start = 0
    while start < len(row.ids):
        stop = start
        while stop < len(row.ids) and row.documents[stop] == row.documents[start]:
            stop += 1
        yield EncodedChat(row.ids[start:stop], [False, *row.mask[start + 1 : stop]])
        start = stop


def row_picture(row: PackedRow, tokenizer: Tokenizer, *, end: str, colours: bool) -> Text:
    """A packed row as the model sees it; a line of dashes separates conversations, which cannot see each
    other."""
    from rich.text import Text

    pictures = [mask_picture(piece, tokenizer, end=end, colours=colours) for piece in pieces_of(row)]
    return Text("\n--------\n").join(pictures)


def spelled(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Text of ids with control tokens by name; bytes of neighbouring tokens are joined before they are
    decoded."""
    names = {number: name for name, number in tokenizer.control_ids.items()}
    parts = [names[number].encode() if number in names else tokenizer.token_bytes(number) for number in ids]
    return b"".join(parts).decode("utf-8", errors="replace")
