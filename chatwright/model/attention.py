"""Causal attention, softmax(q k^T / sqrt(K)) v (Vaswani et al. 2017, eq. 1), by two equal methods.

Shapes: q is (B, H, T, K); k and v are (B, G, T, K) with H a multiple of G; the result is (B, H, T, K). `seen` says who may look at
whom where that is less than all earlier tokens and oneself: (B, 1, T, T), nothing of it above the diagonal.
"""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


class CausalAttention(Protocol):
    """One of the methods."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None, /) -> Tensor: ...


def fused_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G T K"],
    v: Float[Tensor, "B G T K"],
    seen: Bool[Tensor, "B 1 T T"] | None = None,
    *,
    dropout: float = 0.0,
) -> Float[Tensor, "B H T K"]:
    """torch's fused kernel: little memory, the right choice on GPUs and for long rows. `dropout` is that of the weights."""
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=seen,
        dropout_p=dropout,
        is_causal=seen is None,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def blocked_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G T K"],
    v: Float[Tensor, "B G T K"],
    seen: Bool[Tensor, "B 1 T T"] | None = None,
    *,
    blocks: int = 4,
) -> Float[Tensor, "B H T K"]:
    """Plain matrix products over blocks of queries; a block leaves out the keys that all of it may not see.

    For torch.compile on CPUs, whose fused attention kernel reaches a third of the speed of matrix products: here
    the products go to the matrix library and the softmax between them is fused by the compiler. Memory grows with the
    square of the length, so this is for contexts up to about a thousand tokens.
    """
    batch, heads, tokens, size = q.shape
    groups = k.shape[1]
    together = (
        heads // groups
    )  # heads that share keys and values: side by side, they are one product, and neither is copied
    q = (q * size**-0.5).view(batch, groups, together, tokens, size)
    places = torch.arange(
        tokens, dtype=torch.int32, device=q.device
    )  # compared number by number: half as wide is twice as fast
    step = -(-tokens // blocks)
    parts = []
    for start in range(0, tokens, step):
        end = min(start + step, tokens)
        scores = (
            q[:, :, :, start:end].flatten(2, 3) @ k[:, :, :end].mT
        ).float()  # (B, G, H / G x (end - start), end)
        here = places[:end] <= places[start:end, None] if seen is None else seen[:, :, None, start:end, :end]
        scores = scores.view(batch, groups, together, end - start, end).masked_fill(~here, float("-inf"))
        weights = scores.softmax(-1).to(v.dtype)
        parts.append((weights.flatten(2, 3) @ v[:, :, :end]).view(batch, groups, together, end - start, size))
    return torch.cat(parts, dim=3).view(batch, heads, tokens, size)


def plain_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G T K"],
    v: Float[Tensor, "B G T K"],
    seen: Bool[Tensor, "B 1 T T"] | None = None,
) -> Float[Tensor, "B H T K"]:
    """`blocked_attention` as one block. Without a compiler and at lengths around 100, its backward pass takes a third of
    the time of the fused CPU kernel's."""
    return blocked_attention(q, k, v, seen, blocks=1)
