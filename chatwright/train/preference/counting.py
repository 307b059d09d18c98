"""Counts the pairs of answers that some scores order as people did, with an interval of their share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from chatwright import runtime
from chatwright.objectives.preference import Ties, pair_accuracy
from chatwright.train.statistics import Interval, wilson_interval

GUESSING = 0.5
"""Share of pairs that guessing orders rightly."""


class ScoredComparisons(NamedTuple):
    """The model's scores and people's labels of some comparisons. Labels are NaN where there is no answer."""

    scores: Float[Tensor, "n k"]
    labels: Float[Tensor, "n k"]


class TieConfig(Protocol):
    """The settings that say which pairs count."""

    @property
    def tie_tolerance(self) -> float: ...
    @property
    def ties(self) -> Ties: ...


@dataclass(frozen=True)
class Counted:
    """Pairs that scores order as people did, for each comparison that has pairs at all."""

    right: Float[Tensor, " comparisons"]
    pairs: Float[Tensor, " comparisons"]

    @property
    def total(self) -> int:
        """Number of pairs."""
        return int(self.pairs.sum())

    @property
    def share(self) -> float:
        """Share that is right; 0 without pairs."""
        return float(self.right.sum() / self.pairs.sum().clamp(min=1))

    def interval(self, seed: int) -> Interval:
        """95 % interval of the share. With one pair a comparison it is Wilson's; else comparisons are drawn
        again, for the pairs of one are not independent."""
        alike = float(self.right.sum()) in (0.0, float(self.total))  # drawing again would show no spread
        if alike or bool((self.pairs <= 1).all()):
            return wilson_interval(self.share * len(self.pairs), len(self.pairs))
        draw = runtime.generator("bootstrap", seed)
        chosen = torch.randint(len(self.pairs), (2_000, len(self.pairs)), generator=draw)
        shares = self.right[chosen].sum(1) / self.pairs[chosen].sum(1)
        low, high = torch.quantile(shares, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return low, high


def counted(scored: ScoredComparisons, config: TieConfig) -> Counted:
    """Count the right pairs of each comparison."""
    each = [
        pair_accuracy(scores[None], labels[None], config.tie_tolerance, config.ties)
        for scores, labels in zip(*scored, strict=True)
    ]
    known = [(right, pairs) for right, pairs in each if pairs]
    right, pairs = (torch.tensor([pair[side] for pair in known], dtype=torch.float64) for side in (0, 1))
    return Counted(right, pairs)
