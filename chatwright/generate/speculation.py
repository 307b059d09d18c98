"""Prompt lookup: guess that a text goes on as it went on before (Saxena 2023,
github.com/apoorvumang/prompt-lookup-decoding).

Answers repeat what stands in their prompts: names, quotations, code that is edited. When the newest tokens
have occurred before, what followed them then is fed together with the newest token, and one pass of the model
checks all of it (Leviathan et al. 2023, arXiv:2211.17192, with a draft that costs nothing). A greedy row
keeps guesses as long as each is the likeliest token, so its answer is the one it would have given anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 3, 2
"""How many of the newest tokens must have occurred before: first that many are looked up, then fewer."""
PATIENCE = 32
"""Most steps without a guess for a row whose guesses keep failing."""


class Lookup:
    """The guesses of one row.

    A row begins with guesses of `most` tokens. A guess of which nothing is kept halves the next one; once
    guesses of a single token fail, the row rests for 1, 2, 4, ... steps. What is kept doubles the next guess.
    """

    def __init__(self, most: int) -> None:
        self.most = self.size = most
        self._pause = self._rest = 0
        self._followed: dict[
            tuple[int, ...], int
        ] = {}  # some tokens -> the place behind their last occurrence
        self._read = 0

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may come next; `tokens` are those of earlier calls and new ones behind
        them."""
        for end in range(
            max(self._read, SHORTEST), len(tokens)
        ):  # what ends with the newest token is not yet followed
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self._followed[tuple(tokens[end - size : end])] = end
        self._read = len(tokens)
        if self._rest:
            self._rest -= 1
            return []
        for size in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            at = self._followed.get(tuple(tokens[-size:]))
            if at is not None:
                period = len(tokens) - at  # behind the end of the text, a guess goes on with itself
                return [tokens[at + number % period] for number in range(min(most, self.size))]
        return []

    def learn(self, proposed: int, accepted: int) -> None:
        """Take in how many of the proposed tokens were kept."""
        if accepted:
            self._pause = 0
            if accepted == proposed:
                self.size = min(self.most, 2 * self.size)
        elif self.size > 1:
            self.size //= 2
        else:
            self._pause = min(PATIENCE, max(1, 2 * self._pause))
            self._rest = self._pause
