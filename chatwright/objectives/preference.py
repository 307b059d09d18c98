"""Losses for people's preferences: which of several answers is better, or whether a text is good."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

Ties = Literal["leave_out", "half"]
"""How a tie counts: as no pair (`leave_out`), or as a pair that each answer wins by half (`half`)."""


def preferred_pairs(
    labels: Float[Tensor, "prompts k"], tie_tolerance: float = 0.0
) -> Bool[Tensor, "prompts k k"]:
    """True at [n, i, j] where candidate i is preferred to j: its label is higher by more than
    `tie_tolerance`.

    Ties, and pairs closer than the tolerance, are left out; NaN labels (padding) take part in no pair.
    """
    return labels[:, :, None] - labels[:, None, :] > tie_tolerance


def pair_wins(
    labels: Float[Tensor, "prompts k"], tie_tolerance: float = 0.0, ties: Ties = "leave_out"
) -> Float[Tensor, "prompts k k"]:
    """At [n, i, j] 1 where candidate i is preferred to j (`preferred_pairs`), else 0.

    With ties `half` two candidates that tie win 1/2 each. Every pair then adds up to 1, and a prompt of K
    answers has exactly C(K, 2) pairs. With `leave_out` only the pairs without ties count.
    """
    wins = preferred_pairs(labels, tie_tolerance).float()
    if ties == "half":
        # NaN compares as False: padding ties with nothing.
        tied = (labels[:, :, None] - labels[:, None, :]).abs() <= tie_tolerance
        wins = wins + 0.5 * (tied & ~torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device))
    return wins


def bradley_terry_loss(
    scores: Float[Tensor, "prompts k"],
    labels: Float[Tensor, "prompts k"],
    tie_tolerance: float = 0.0,
    *,
    margin: Float[Tensor, "prompts k k"] | None = None,
    ties: Ties = "leave_out",
) -> Float[Tensor, ""]:
    """-log sigmoid(r_preferred - r_other), averaged over the pairs of a prompt, summed over prompts.

    Ouyang et al. 2022 (arXiv:2203.02155), eq. 1: all pairs of a prompt are one element with weight
    1 / C(K, 2), here 1 / (number of its pairs that count, see `pair_wins`). A prompt without such pairs adds
    0. A tie that is won by half costs (-log sigmoid(d) - log sigmoid(-d)) / 2, which is least where the
    scores are equal. `margin[n, i, j]` is subtracted from the score difference of i and j: the margin m(r) of
    Llama 2 (Touvron et al. 2023, arXiv:2307.09288, eq. 2), larger where people were surer. Ties have none.
    """
    wins = pair_wins(labels, tie_tolerance, ties)
    difference = scores[:, :, None] - scores[:, None, :]
    if margin is not None:
        difference = difference - torch.where(wins == 1, margin, 0.0)
    losses = -F.logsigmoid(difference)
    count = wins.sum(dim=(1, 2)).clamp(min=1)
    return (torch.where(wins > 0, wins * losses, 0.0).sum(dim=(1, 2)) / count).sum()


def pair_accuracy(
    scores: Float[Tensor, "prompts k"],
    labels: Float[Tensor, "prompts k"],
    tie_tolerance: float = 0.0,
    ties: Ties = "leave_out",
) -> tuple[float, int]:
    """Pairs that the scores order as the labels do (equal scores count half), and the number of pairs.

    With ties `half` a pair that ties in the labels counts too, and is half right whatever its scores, so that
    no model reaches 1.
    """
    wins = pair_wins(labels, tie_tolerance, ties)
    difference = scores[:, :, None] - scores[:, None, :]
    right = (difference > 0).float() + 0.5 * (difference == 0).float()
    return float((wins * right).sum()), round(float(wins.sum()))


def logistic_loss(scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"]) -> Float[Tensor, ""]:
    """-log of the probability of each text's class, summed: sigmoid(score) is the probability of being
    positive.

    Cross entropy of two classes (Bishop 2006, eq. 4.90), in a form that does not overflow.
    """
    return -F.logsigmoid(torch.where(positive, scores, -scores)).sum()
