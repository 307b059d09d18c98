"""Calibration: the probability that a score stands for, compared with the observed frequency.

Reliability diagram and expected calibration error: Guo et al. 2017 (arXiv:1706.04599). Scale and offset:
Platt 1999.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from chatwright import runtime
from chatwright.objectives.policy import all_equal
from chatwright.objectives.preference import Ties, logistic_loss, pair_wins

BINS = 10
PICTURE = "calibration.png"


@dataclass(frozen=True)
class Reliability:
    """Predictions in bins of probability: `count` per bin, mean prediction, and observed frequency."""

    count: Float[Tensor, " bins"]
    predicted: Float[Tensor, " bins"]
    """Mean predicted probability; NaN in an empty bin."""
    observed: Float[Tensor, " bins"]
    """Share that came true; NaN in an empty bin."""

    @property
    def error(self) -> float:
        """Expected calibration error: mean |predicted - observed|, each bin weighted by its count (Guo et
        al., eq. 3)."""
        gaps = (self.predicted - self.observed).abs().nan_to_num(0.0)
        return float((self.count * gaps).sum() / self.count.sum().clamp(min=1))


def reliability(
    predicted: Float[Tensor, " n"], observed: Float[Tensor, " n"], *, low: float = 0.0, bins: int = BINS
) -> Reliability:
    """Predicted probabilities from `low` to 1, and outcomes from 0 to 1, in bins of equal width."""
    predicted, observed = predicted.double(), observed.double()
    place = ((predicted - low) / (1 - low) * bins).long().clamp(0, bins - 1)
    count = torch.zeros(bins, dtype=torch.float64).index_add(0, place, torch.ones_like(predicted))
    sums = [
        torch.zeros(bins, dtype=torch.float64).index_add(0, place, values) for values in (predicted, observed)
    ]
    return Reliability(count, *(total / count for total in sums))


def pair_reliability(
    scores: Float[Tensor, "prompts k"],
    labels: Float[Tensor, "prompts k"],
    tie_tolerance: float = 0.0,
    ties: Ties = "leave_out",
    *,
    bins: int = BINS,
) -> Reliability:
    """Calibration of pairs, for the answer with the higher score: predicted is sigmoid(score difference),
    from 1/2 to 1; observed is whether people prefer it. Equal scores predict 1/2 and are half right. With
    ties `half` a pair that people call a tie is half right too. `scores` must be on the scale of training:
    another scale gives other probabilities.
    """
    wins = pair_wins(labels, tie_tolerance, ties)
    rows, first, second = ((wins + wins.mT) > 0).triu(1).nonzero(as_tuple=True)  # each pair once
    difference = scores[rows, first] - scores[rows, second]
    came_true = wins[rows, first, second]
    observed = torch.where(difference > 0, came_true, 1 - came_true)
    observed = torch.where(difference == 0, 0.5, observed)
    return reliability(difference.abs().sigmoid(), observed, low=0.5, bins=bins)


def platt(scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"]) -> tuple[float, float]:
    """Scale a and offset b for which sigmoid(a (score - b)) is the likeliest probability of being positive
    (Platt 1999).

    The targets are Platt's, slightly inside 0 and 1, so that an optimum exists even where a threshold
    separates the classes. It is found by Newton's method in float64. Raises ValueError when there is only one
    class, or when the scores do not rise with the class.
    """
    scores, count = scores.double(), positive.sum().double()
    others = len(positive) - count
    if not count or not others:
        raise ValueError("texts of one class only: there is nothing to tell apart")
    if bool(all_equal(scores)):
        raise ValueError("all scores are the same: they tell nothing")
    target = torch.where(positive, (count + 1) / (count + 2), 1 / (others + 2))
    middle, parallel = scores.mean(), scores.std().clamp(min=1e-12)
    rows = torch.stack([(scores - middle) / parallel, torch.ones_like(scores)], 1)
    weights = torch.zeros(2, dtype=torch.float64)

    def cost(at: Tensor) -> Tensor:
        z = rows @ at
        return -(
            target * torch.nn.functional.logsigmoid(z) + (1 - target) * torch.nn.functional.logsigmoid(-z)
        ).sum()

    for _ in range(100):
        p = (rows @ weights).sigmoid()
        gradient = rows.T @ (p - target)
        hessian = rows.T @ (rows * (p * (1 - p))[:, None]) + 1e-9 * torch.eye(2, dtype=torch.float64)
        step, size = torch.linalg.solve(hessian, gradient), 1.0
        # A whole step may be too far where p is near 0 or 1.
        while size > 1e-6 and cost(weights - size * step) > cost(weights):
            size /= 2
        weights = weights - size * step
        if step.abs().max() < 1e-10:
            break
    slope, shift = (float(value) for value in weights)
    if slope <= 0:
        raise ValueError("scores do not rise with the class: they tell nothing")
    return slope / float(parallel), float(middle) - shift / slope * float(parallel)


def log_loss(scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"]) -> float:
    """Mean of -log p of the true class, nats per text; guessing costs log 2 = 0.693."""
    return float(logistic_loss(scores.double(), positive)) / max(1, len(scores))


def draw(directory: Path, found: Reliability, *, low: float, what: str) -> str:
    """Write the reliability diagram to `directory`, in rank zero; returns the file's name."""
    if not runtime.is_rank_zero():
        return PICTURE
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    bins = len(found.count)
    edges = [low + (1 - low) * (n + 0.5) / bins for n in range(bins)]
    seen = [n for n in range(bins) if found.count[n]]
    predicted, observed = ([float(values[n]) for n in seen] for values in (found.predicted, found.observed))
    above.plot([low, 1], [low, 1], linestyle="--", color="grey", linewidth=1, label="as predicted")
    above.plot(predicted, observed, marker="o", markersize=4, linewidth=1.4, label="observed")
    above.set_ylabel(what, fontsize=8)
    above.set_title(f"Calibration; expected error {found.error:.3f}", fontsize=10)
    above.legend(fontsize=8)
    below.bar(edges, found.count.tolist(), width=0.9 * (1 - low) / bins)
    below.set_xlabel("predicted probability", fontsize=8)
    below.set_ylabel("count", fontsize=8)
    for axes in (above, below):
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    aside = directory / f".{PICTURE}.partial.png"
    figure.savefig(aside, dpi=110)
    aside.replace(directory / PICTURE)
    return PICTURE
