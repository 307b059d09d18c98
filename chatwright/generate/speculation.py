"""Prompt lookup: guess that a text continues as it did before (Saxena 2023,
github.com/apoorvumang/prompt-lookup-decoding).

Answers repeat parts of their prompts: names, quotations, edited code. When the newest tokens have occurred
before, the tokens that followed them then are fed together with the newest token, and one pass of the model
checks all of them (Leviathan et al. 2023, arXiv:2211.17192, with a draft that costs nothing). Guesses are
accepted as long as each is the likeliest token, so that a greedy answer does not change.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 3, 2
"""How many of the newest tokens must have occurred before: LONGEST are looked up first, then fewer."""
PATIENCE = 32
"""Most steps without a guess for a sequence whose guesses keep failing."""


class Lookup:
    """The guesses for one sequence.

    The first guess has `most` tokens. A guess of which nothing is accepted halves the next one. Once guesses
    of a single token fail, there are none for 1, 2, 4, ... steps. A guess that is accepted whole doubles the
    next one.
    """

    def __init__(self, most: int) -> None:
        self.most = self.size = most
        self._pause = self._rest = 0
        # Some tokens -> the index after their last occurrence.
        self._followed: dict[tuple[int, ...], int] = {}
        self._read = 0

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may come next. `tokens` must begin with those of the earlier calls."""
        # Nothing follows the newest token yet, so that it is left out.
        for end in range(max(self._read, SHORTEST), len(tokens)):
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self._followed[tuple(tokens[end - size : end])] = end
        self._read = len(tokens)
        if self._rest:
            self._rest -= 1
            return []
        for size in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            at = self._followed.get(tuple(tokens[-size:]))
            if at is not None:
                period = len(tokens) - at  # a guess that reaches the end of the text repeats itself
                return [tokens[at + number % period] for number in range(min(most, self.size))]
        return []

    def learn(self, proposed: int, accepted: int) -> None:
        """Record how many of the proposed tokens were accepted."""
        if accepted:
            self._pause = 0
            if accepted == proposed:
                self.size = min(self.most, 2 * self.size)
        elif self.size > 1:
            self.size //= 2
        else:
            self._pause = min(PATIENCE, max(1, 2 * self._pause))
            self._rest = self._pause
