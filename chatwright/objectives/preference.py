"""Learning from comparisons."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


def preferred_pairs(labels: Float[Tensor, "prompts k"], margin: float = 0.0) -> Bool[Tensor, "prompts k k"]:
    """True at [n, i, j] where candidate i is preferred to j: its label is higher by more than `margin`.

    Ties, and pairs closer than the margin, are left out; NaN labels (padding) take part in no pair.
    """
    return labels[:, :, None] - labels[:, None, :] > margin


def bradley_terry_loss(
    scores: Float[Tensor, "prompts k"],
    labels: Float[Tensor, "prompts k"],
    margin: float = 0.0,
    *,
    lead: Float[Tensor, "prompts k k"] | None = None,
) -> Float[Tensor, ""]:
    """-log sigmoid(r_preferred - r_other), averaged over the pairs of a prompt, summed over prompts.

    Ouyang et al. 2022 (arXiv:2203.02155), eq. 1: all pairs of a prompt are one element with weight 1 / C(K, 2), here
    1 / (number of its pairs that are not ties). A prompt without any such pair adds 0.
    `lead[n, i, j]` is by how much the score of i is to exceed that of j before the loss of the pair is log 2: the margin
    m(r) of Llama 2 (Touvron et al. 2023, arXiv:2307.09288, eq. 2), larger where people were surer.
    """
    pairs = preferred_pairs(labels, margin)
    difference = scores[:, :, None] - scores[:, None, :]
    losses = -F.logsigmoid(difference if lead is None else difference - lead)
    count = pairs.sum(dim=(1, 2)).clamp(min=1)
    return (torch.where(pairs, losses, 0.0).sum(dim=(1, 2)) / count).sum()


def pair_accuracy(
    scores: Float[Tensor, "prompts k"], labels: Float[Tensor, "prompts k"], margin: float = 0.0
) -> tuple[float, int]:
    """Pairs that the scores order as the labels do (equal scores count half), and the number of pairs."""
    pairs = preferred_pairs(labels, margin)
    difference = scores[:, :, None] - scores[:, None, :]
    right = (difference > 0).float() + 0.5 * (difference == 0).float()
    return float(right[pairs].sum()), int(pairs.sum())
