"""Loss spikes: when a loss is one, and what is done about it.

A step's loss is a spike when it lies above the median of the last `window` accepted losses by more than
`deviations` robust standard deviations and by more than `rise`. A robust standard deviation is 1.4826 x the
median absolute deviation, which is the standard deviation where losses are normally distributed. Until
`window` losses are known nothing is a spike: warm-up, where losses fall, is never touched.

1. The update of a spike is skipped: neither weights nor the optimiser's state see its gradient.
2. `patience` spikes in a row mean that the weights are damaged, not the samples. With `rollback` the run
   returns to its last checkpoint and skips all samples since, as Chowdhery et al. 2022 (arXiv:2204.02311,
   section 5.1) did by hand. With `skip` the new level is accepted and the window begins anew.
3. After `most` rollbacks the run stops.

The state of the rule is a part of `Progress.extra`, hence of each checkpoint: a resumed run decides as an
uninterrupted one. A rollback goes to a checkpoint of `fit.save_steps` where that is set, so that it does not
depend on the clock. `loop.Fit` carries out the decisions and writes them to metrics.jsonl.

Departure from the paper: it skipped 200 to 500 batches around a spike; here those between checkpoint and
spike are skipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from chatwright.config import UsageError

NORMAL = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


@dataclass(frozen=True)
class SpikeConfig:
    """When a loss is a spike, and what is done about it (chatwright/train/spikes.py)."""

    action: Literal["skip", "rollback", "off"] = "skip"
    """`skip`: leave out the update of a spike. `rollback`: also return to the last checkpoint after
    `patience` spikes in a row, and pass over the samples since. `off`: every finite loss is accepted."""
    window: int = 128
    """Accepted losses that the next one is compared with."""
    deviations: float = 10.0
    """Robust standard deviations above the median from which a loss is a spike."""
    rise: float = 1.0
    """A spike lies at least so much above the median, in the loss's own unit (nats)."""
    patience: int = 4
    """Spikes in a row after which the weights, not the samples, are thought to be damaged."""
    most: int = 3
    """Returns to a checkpoint before the run stops."""

    def check(self) -> None:
        """Raise UsageError when a number is out of range."""
        if self.window < 2 or self.patience < 1 or self.most < 0 or self.deviations < 0 or self.rise < 0:
            raise UsageError(
                "fit.spikes: window must be at least 2, patience at least 1, the others at least 0"
            )


def limit(config: SpikeConfig, extra: Mapping[str, Any]) -> float:
    """The loss above which the next one is a spike; infinite while the window is not full, or with `off`."""
    losses = extra.get("losses", [])
    if config.action == "off" or len(losses) < config.window:
        return math.inf
    middle = median(losses)
    deviation = NORMAL * median(abs(loss - middle) for loss in losses)
    return float(middle + max(config.deviations * deviation, config.rise))


def accept(config: SpikeConfig, extra: dict[str, Any], loss: float) -> bool:
    """Whether to make a step's update; records the loss. A loss that is not finite is accepted: the trainer
    handles those.

    `extra` is `Progress.extra`: `losses` is the window, `spikes` their number so far, and `spikes_in_a_row`.
    """
    if config.action == "off" or not math.isfinite(loss):
        return True
    if loss > limit(config, extra):
        extra["spikes"] = extra.get("spikes", 0) + 1
        extra["spikes_in_a_row"] = extra.get("spikes_in_a_row", 0) + 1
        return False
    extra["spikes_in_a_row"] = 0
    extra["losses"] = [*extra.get("losses", []), loss][-config.window :]
    return True


def damaged(config: SpikeConfig, extra: Mapping[str, Any]) -> bool:
    """Whether the last `patience` losses were all spikes."""
    return config.action != "off" and extra.get("spikes_in_a_row", 0) >= config.patience
