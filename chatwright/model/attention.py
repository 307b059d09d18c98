"""Causal attention, softmax(q k^T / sqrt(K)) v (Vaswani et al. 2017, eq. 1): equal results in three ways.

Shapes: q is (B, H, T, K); k and v are (B, G, T, K), where H is a multiple of G; the result is (B, H, T, K).
Without a mask each token attends to itself and to all earlier tokens. A mask is (B, 1, T, T), True where a
query may attend to a key, and never True above the diagonal. Scores may have a soft cap.
"""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


class CausalAttention(Protocol):
    """What the functions of this file have in common."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, /, *, softcap: float = 0.0
    ) -> Tensor: ...


def fused_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S K"],
    mask: Bool[Tensor, "B 1 T S"] | None = None,
    *,
    dropout: float = 0.0,
    softcap: float = 0.0,
) -> Float[Tensor, "B H T K"]:
    """torch's fused kernel. It needs little memory: the right choice on GPUs and for long rows.

    With a key-value cache S, the number of keys, may exceed T; a mask is then needed. `dropout` is the share
    of attention weights that are dropped. torch's kernel has no soft cap on scores: with one they are
    computed in plain operations, whose memory grows with T x S.
    """
    if softcap:
        return _capped_attention(q, k, v, mask, softcap, dropout)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, enable_gqa=grouped
    )


def _capped_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S K"],
    mask: Bool[Tensor, "B 1 T S"] | None,
    softcap: float,
    dropout: float,
) -> Float[Tensor, "B H T K"]:
    """`fused_attention` with a soft cap on scores, c tanh(score / c) (arXiv:2408.00118, section 2)."""
    batch, heads, tokens, size = q.shape
    if mask is None:
        mask = torch.ones(tokens, k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
    q = (q * size**-0.5).view(batch, k.shape[1], -1, tokens, size)  # (B, G, H / G, T, K)
    scores = softcap * torch.tanh((q @ k[:, :, None].mT).float() / softcap)  # (B, G, H / G, T, S)
    weights = scores.masked_fill(~mask[:, :, None], float("-inf")).softmax(-1).to(v.dtype)
    return (F.dropout(weights, dropout) @ v[:, :, None]).view(batch, heads, tokens, size)


def blocked_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G T K"],
    v: Float[Tensor, "B G T K"],
    mask: Bool[Tensor, "B 1 T T"] | None = None,
    *,
    blocks: int = 4,
    softcap: float = 0.0,
) -> Float[Tensor, "B H T K"]:
    """Plain matrix products over blocks of queries; each block skips the keys behind it.

    For torch.compile on CPUs, where the fused kernel reaches a third of the speed of matrix products. Here
    the products go to the matrix library and the compiler fuses the softmax between them. Memory grows with
    the square of the length: for contexts of up to about a thousand tokens.
    """
    batch, heads, tokens, size = q.shape
    groups = k.shape[1]
    shared = heads // groups  # heads that share keys and values become one product, and nothing is copied
    q = (q * size**-0.5).view(batch, groups, shared, tokens, size)
    # 32-bit numbers: the mask is compared element by element, and half the width is twice the speed.
    columns = torch.arange(tokens, dtype=torch.int32, device=q.device)
    step = -(-tokens // blocks)
    parts = []
    for start in range(0, tokens, step):
        end = min(start + step, tokens)
        rows = q[:, :, :, start:end].flatten(2, 3)  # (B, G, H / G x (end - start), K)
        scores = (rows @ k[:, :, :end].mT).float()  # (B, G, H / G x (end - start), end)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is None:
            visible = columns[:end] <= columns[start:end, None]
        else:
            visible = mask[:, :, None, start:end, :end]
        scores = scores.view(batch, groups, shared, end - start, end).masked_fill(~visible, float("-inf"))
        weights = scores.softmax(-1).to(v.dtype)
        parts.append((weights.flatten(2, 3) @ v[:, :, :end]).view(batch, groups, shared, end - start, size))
    return torch.cat(parts, dim=3).view(batch, heads, tokens, size)


def plain_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G T K"],
    v: Float[Tensor, "B G T K"],
    mask: Bool[Tensor, "B 1 T T"] | None = None,
    *,
    softcap: float = 0.0,
) -> Float[Tensor, "B H T K"]:
    """`blocked_attention` with a single block, for training on a CPU without a compiler.

    At lengths around 100 its backward pass takes a third of the time of the fused CPU kernel's.
    """
    return blocked_attention(q, k, v, mask, blocks=1, softcap=softcap)
