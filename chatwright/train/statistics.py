"""Intervals: how sure a measure is, and whether a difference was shown at all.

* Means over prompts: the percentile bootstrap (Efron 1979). Two models that answer the same prompts are
  compared by the difference of each prompt, so that easy and hard prompts cancel out.
* Shares of single pairs: Wilson's interval (Wilson 1927), which is right for few pairs and near 0 or 1 too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chatwright import runtime

FEWEST = 8
"""Prompts below which no difference counts as shown: resampling so few says little."""
FEW_PAIRS = 30
"""Pairs below which a share says little: its interval is then 0.3 wide or more."""

Interval = tuple[float, float]


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of values (N,). 0 for equal values, and for a single one, which shows no
    spread."""
    if len(values) < 2 or bool((values == values[0]).all()):
        return 0.0
    return float(values.std() / math.sqrt(len(values)))


def bootstrap_interval(values: Tensor, *, seed: int, draws: int = 2_000) -> Interval:
    """95 % percentile interval of the mean of values (N,), by resampling (Efron 1979). Equal values have an
    interval without width; without any it is 0 to 0."""
    if not len(values):
        return 0.0, 0.0
    if bool((values == values[0]).all()):
        return float(values[0]), float(values[0])
    generator = runtime.generator("bootstrap", seed)
    chosen = torch.randint(len(values), (draws, len(values)), generator=generator)
    means = values.double()[chosen].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def wilson_interval(right: float, count: int) -> Interval:
    """95 % interval of a share, `right` of `count` (Wilson 1927); 0 to 1 when there is nothing to count."""
    if not count:
        return 0.0, 1.0
    z, share = 1.959964, right / count
    middle, spread = (
        share + z * z / (2 * count),
        z * (share * (1 - share) / count + (z / (2 * count)) ** 2) ** 0.5,
    )
    whole = 1 + z * z / count
    return max(0.0, (middle - spread) / whole), min(1.0, (middle + spread) / whole)


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, after less before, and its 95 % interval."""

    mean: float
    interval: Interval
    count: int
    """Prompts, or pairs, that were compared."""
    unit: str = "prompts"

    @property
    def better(self) -> bool:
        """Whether a rise was shown: the whole interval is above 0, and there are enough prompts."""
        return self.count >= FEWEST and self.interval[0] > 0

    @property
    def worse(self) -> bool:
        """Whether a fall was shown."""
        return self.count >= FEWEST and self.interval[1] < 0

    def told(self) -> str:
        """The difference in words: with its interval, and plainly where nothing was shown."""
        low, high = self.interval
        text = f"{self.mean:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}, {self.count} {self.unit}"
        if self.count < FEWEST:
            return f"nothing was shown, {self.count} {self.unit} are too few: {text}"
        if self.better or self.worse:
            return text
        return f"nothing was shown, the interval holds 0: {text}"


def paired_difference(
    before: Sequence[float], after: Sequence[float], *, seed: int, unit: str = "prompts"
) -> Difference:
    """The difference of two models on the same prompts, one number a prompt and model."""
    change = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    if not len(change):
        return Difference(0.0, (0.0, 0.0), 0, unit)
    return Difference(float(change.mean()), bootstrap_interval(change, seed=seed), len(change), unit)
