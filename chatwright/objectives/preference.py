"""Learning from what people judged: which of several answers is better, or whether a text is good."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

Ties = Literal["leave_out", "half"]
"""What two answers of equal rank are: no pair at all, or a pair that each of them wins by half."""


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
    """How far candidate i won against j, at [n, i, j]: 1 where it is preferred (`preferred_pairs`), else 0.

    With ties `half` two candidates that tie win 1/2 each, so that every pair of a prompt adds up to 1: a
    prompt of K answers then has exactly C(K, 2) pairs. Without, those that are no ties.
    """
    wins = preferred_pairs(labels, tie_tolerance).float()
    if ties == "half":
        tied = (
            labels[:, :, None] - labels[:, None, :]
        ).abs() <= tie_tolerance  # NaN compares as False: padding ties with nothing
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

    Ouyang et al. 2022 (arXiv:2203.02155), eq. 1: all pairs of a prompt are one element with weight 1 / C(K,
    2), here 1 / (number of its pairs that count, see `pair_wins`). A prompt without any such pair adds 0. A
    tie that is won by half costs (-log sigmoid(d) - log sigmoid(-d)) / 2, which is least where the scores are
    equal. `margin[n, i, j]` is by how much the score of i is to exceed that of j before the loss of the pair
    is log 2: the margin m(r) of Llama 2 (Touvron et al. 2023, arXiv:2307.09288, eq. 2), larger where people
    were surer. Ties have none.
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

    With ties `half`, a pair that ties in the labels counts, and is half right whatever its scores: no model
    reaches 1 then.
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
