"""SentencePiece's BPE by scores, and BPE by ranks of merges: the same tokens, from either description.

llama.cpp's tokenizer `llama` knows pieces with scores. It joins the two neighbours whose joint piece has the
best score, the leftmost first among equals, whatever the two are. The `tokenizers` library knows a list of
merges (left, right), and joins the neighbours that come first in it.

Both join the same if they agree on each piece alone. For when two neighbours come to be joined to a piece, no
join has crossed its ends, and those inside went as they go in the piece alone. So the last join of a piece
alone is the only one that can ever make it, and its rank is the piece's score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from chatwright.config import UserError

MOST_WORK = 400_000_000
"""Most steps, the squares of the pieces' lengths together. Gemma's 262,144 pieces take 30 million."""

Pair = tuple[str, str]


def joined(piece: str, rank: Callable[[str, str], float | None]) -> tuple[list[str], Pair | None]:
    """What is left of a piece's characters when all is joined that can be, the least rank first, and the last
    two that were joined."""
    symbols, last = list(piece), None
    while len(symbols) > 1:
        best, place = None, 0
        for at in range(len(symbols) - 1):
            found = rank(symbols[at], symbols[at + 1])
            if found is not None and (best is None or found < best):
                best, place = found, at
        if best is None:
            break
        last = (symbols[place], symbols[place + 1])
        symbols[place : place + 2] = ["".join(last)]
    return symbols, last


def check_work(pieces: Iterable[str]) -> None:
    """Raise UserError for pieces that would take too long, as no vocabulary has them."""
    if sum(len(piece) ** 2 for piece in pieces) > MOST_WORK:
        raise UserError("its tokens are too long for a vocabulary")


def merges_of(scores: Mapping[str, float]) -> list[Pair]:
    """The merges, best first, that join as these pieces with their scores do."""
    check_work(scores)

    def rank(left: str, right: str) -> float | None:
        score = scores.get(left + right)
        return None if score is None else -score

    merges: list[tuple[float, int, Pair]] = []
    for number, piece in enumerate(scores):
        symbols, last = joined(piece, rank)
        if symbols == [piece] and last is not None:
            merges.append((-scores[piece], number, last))
    return [pair for _, _, pair in sorted(merges)]


def scores_of(pieces: Sequence[str], merges: Sequence[Pair]) -> dict[str, float]:
    """Scores for pieces that join as these merges do. Raises UserError naming a piece for which there are
    none."""
    check_work(pieces)
    ranks = {pair: number for number, pair in reversed(list(enumerate(merges)))}
    known = set(pieces)
    scores: dict[str, float] = {}
    for piece in pieces:
        symbols, last = joined(piece, lambda left, right: ranks.get((left, right)))
        if symbols == [piece] and last is not None:
            scores[piece] = -float(ranks[last])
        elif len(symbols) == 2:
            raise UserError(
                f"the tokenizer never joins {symbols[0]!r} and {symbols[1]!r} to its token {piece!r}, and "
                "llama.cpp, which knows no merges but tokens alone, would"
            )
        elif len(piece) > 1 and not known.issuperset(piece):
            raise UserError(f"the tokenizer's {piece!r} has a character that is no token: llama.cpp has none")
        else:
            scores[piece] = -float(len(merges))
    return scores
