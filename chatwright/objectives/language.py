"""Language-model losses and the measure they are compared by."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F


def next_token_loss(
    logits: Float[Tensor, "batch time vocab"],
    targets: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"] | None = None,
) -> Float[Tensor, ""]:
    """Sum of -log p(target) over the positions where `mask` is True, in nats (Radford et al. 2018, eq. 1).

    `targets[b, t]` is the token that follows position t. The sum, not the mean: whoever accumulates several
    micro-batches divides by the number of targets of all of them, so that 8 x 1 equals 1 x 8.
    """
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(targets.shape)
    return losses.sum() if mask is None else torch.where(mask, losses, 0.0).sum()


def log_probs_of(
    logits: Float[Tensor, "batch time vocab"], targets: Int[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """log p(target) at every position, float32."""
    return -F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(targets.shape)


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Total negative log-likelihood in nats over the text's UTF-8 bytes, in bits per byte.

    Comparable across tokenizers and with a compressor's output, unlike the loss per token.
    """
    return nats / math.log(2) / text_bytes
