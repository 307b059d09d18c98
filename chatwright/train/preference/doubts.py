"""What makes a reward model's accuracy doubtful: few held-out pairs, an accuracy that may be chance, length.

Length is the usual shortcut: where people prefer the longer answer nearly always, a model that only counts
tokens has the same accuracy, and a policy that follows it learns to write long (Singhal et al. 2023,
arXiv:2310.03716).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chatwright.data.examples import Comparison
from chatwright.train.preference.counting import GUESSING, Counted, ScoredComparisons, counted
from chatwright.train.preference.rankings import RankingConfig, Split
from chatwright.train.statistics import FEW_PAIRS, paired_difference

NEARLY_ALL = 0.95
"""Share of pairs that length alone decides from which it may be all that was learnt."""


def by_length(comparisons: Sequence[Comparison], *, longer: bool) -> ScoredComparisons:
    """The comparisons, each answer scored by its length in characters alone."""
    k = max(len(one.responses) for one in comparisons)
    sign = 1.0 if longer else -1.0

    def padded(values: Sequence[float], filler: float) -> list[float]:
        return [*values, *[filler] * (k - len(values))]

    return ScoredComparisons(
        torch.tensor([padded([sign * len(text) for text in one.responses], 0.0) for one in comparisons]),
        torch.tensor([padded(list(one.scores), float("nan")) for one in comparisons]),
    )


def doubts(scored: ScoredComparisons, split: Split, config: RankingConfig, seed: int) -> list[str]:
    """Warnings about a trained reward model, from its scores of the held-out comparisons."""
    return [*of_chance(counted(scored, config), seed), *of_length(scored, split, config, seed)]


def of_chance(found: Counted, seed: int) -> list[str]:
    """Whether the held-out pairs are too few to say anything, or the accuracy may be that of guessing."""
    low, high = found.interval(seed)
    span = f"95 % interval {low:.2f} to {high:.2f}"
    if low <= GUESSING:
        return [
            f"nothing was shown: the accuracy on {found.total} held-out pairs is {found.share:.3f}, {span}, "
            "and guessing has 0.5; do not train a policy on this model before it is better (more "
            "comparisons, longer training, a better base), or before more pairs are held out"
        ]
    if found.total < FEW_PAIRS:
        return [
            f"only {found.total} held-out pairs: the accuracy of {found.share:.3f} may be anywhere in its "
            f"{span}; hold out more (a larger `validation` of the data stage) or collect more comparisons"
        ]
    return []


def of_length(scored: ScoredComparisons, split: Split, config: RankingConfig, seed: int) -> list[str]:
    """Whether the model may have learnt nothing but which answer is longer (or shorter)."""
    train = counted(by_length(split.train, longer=True), config)
    longer = train.share >= GUESSING
    word = "longer" if longer else "shorter"
    every = [*split.train, *split.held_out]
    of_all = counted(by_length(every, longer=longer), config)
    if of_all.share >= NEARLY_ALL:
        wins = "always wins" if of_all.share == 1.0 else f"wins {100 * of_all.share:.0f} % of the time"
        return [
            f"the {word} answer {wins} in your {of_all.total} pairs: the reward model may have learnt length "
            f"alone, and a policy that follows it will write {word} answers; add pairs of equal length, and "
            f"pairs in which the {word} answer is the worse one"
        ]
    if of_all.interval(seed)[0] <= GUESSING:
        return []  # length says nothing here
    alone = counted(by_length(split.held_out, longer=longer), config)
    own = counted(scored, config)
    gain = paired_difference(
        (alone.right / alone.pairs).tolist(), (own.right / own.pairs).tolist(), seed=seed, unit="comparisons"
    )
    if gain.better:
        return []
    return [
        f"length alone ({word} wins) orders {alone.share:.3f} of the held-out pairs rightly, the reward "
        f"model {own.share:.3f}; more than length was not shown ({gain.mean:+.3f}, 95 % interval "
        f"{gain.interval[0]:+.3f} to {gain.interval[1]:+.3f}): it may have learnt length; add pairs in which "
        f"the {word} answer is the worse one"
    ]
