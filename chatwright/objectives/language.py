"""Language-model losses, and bits per byte."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from chatwright import runtime
from chatwright.model.ragged import bucket_size

CHUNK_LOGITS = 2**23
"""Logits that exist at once in `chunked_next_token_loss`: 34 MB in float32. A chunk has this number divided
by the vocabulary size of rows: 2,048 at 4,096, 256 at 32,768, enough to keep the matrix library busy."""


def next_token_loss(
    logits: Float[Tensor, "batch time vocab"],
    targets: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"] | None = None,
) -> Float[Tensor, ""]:
    """Sum of -log p(target) over the positions where `mask` is True, in nats (Radford et al. 2018, eq. 1).

    `targets[b, t]` is the token that follows position t. It is a sum, not a mean: with gradient accumulation
    the caller divides by the targets of all micro-batches, so that 8 x 1 equals 1 x 8.
    """
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(
        targets.shape
    )
    return losses.sum() if mask is None else torch.where(mask, losses, 0.0).sum()


def chunked_next_token_loss(
    hidden: Float[Tensor, "batch time width"],
    head: Float[Tensor, "vocab width"],
    targets: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"] | None = None,
    *,
    softcap: float = 0.0,
    chunk: int = 0,
) -> Float[Tensor, ""]:
    """`next_token_loss(hidden @ head.T, targets, mask)` without ever holding all logits. With `softcap` above
    0 the logits are soft-capped first: c tanh(logit / c) (Gemma 2, arXiv:2408.00118, section 2).

    The head dominates a small model's memory: at a vocabulary of 32,768 the float32 logits of 4,096
    positions, their softmax and its gradient take 1.6 GB. Here the forward pass computes the loss *and* its
    gradient (softmax - one-hot) for `chunk` positions at a time (0: by `CHUNK_LOGITS`). It keeps the
    gradients of hidden states (N, D) and head (V, D) instead of the logits. A frozen head, as under an
    adapter, has no gradient, which saves a third of the products. Products are computed in the head's
    precision, or autocast's; sums and softmax in float32.
    """
    if torch.is_autocast_enabled(head.device.type):
        head = head.to(torch.get_autocast_dtype(head.device.type))
    chunk = chunk or max(128, CHUNK_LOGITS // head.shape[0])
    counted = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    loss: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, 1), head, targets.flatten(), counted.flatten(), softcap, chunk, head.requires_grad
    )
    return loss


class _ChunkedLoss(torch.autograd.Function):
    """Rows (N, D), head (V, D), targets (N), counted (N) -> the sum of the losses where `counted` is True."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        head: Tensor,
        targets: Tensor,
        counted: Tensor,
        softcap: float,
        chunk: int,
        learns: bool,
    ) -> Tensor:
        ctx.learns = learns
        loss = torch.zeros((), dtype=torch.float32, device=rows.device)
        row_gradients = []
        head_gradient = torch.zeros(head.shape if learns else (0,), dtype=torch.float32, device=head.device)
        for start in range(0, rows.shape[0], chunk):
            part = rows[start : start + chunk].to(head.dtype)
            target, counts = targets[start : start + chunk, None], counted[start : start + chunk, None]
            logits = (part @ head.mT).float()  # (C, V)
            if softcap:
                capped = logits.div_(softcap).tanh_()
                logits = softcap * capped
            normaliser = logits.logsumexp(-1, keepdim=True)
            loss = loss + torch.where(counts, normaliser - logits.gather(1, target), 0.0).sum()
            slope = logits.sub_(normaliser).exp_()  # in place: one buffer of (C, V), the softmax ...
            slope.add_(
                torch.arange(head.shape[0], device=head.device) == target, alpha=-1
            )  # ... minus one-hot
            if softcap:
                slope.mul_(1 - capped.square_())  # d c tanh(x / c) / dx
            slope = slope.mul_(counts).to(head.dtype)
            row_gradients.append((slope @ head).to(rows.dtype))
            if not learns:
                continue
            if head.dtype == torch.float32:
                torch.addmm(head_gradient, slope.mT, part, out=head_gradient)  # no second buffer of (V, D)
            else:
                head_gradient += slope.mT @ part
        ctx.save_for_backward(torch.cat(row_gradients), head_gradient.to(head.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        row_gradient, head_gradient = ctx.saved_tensors
        (scale,) = gradients
        return (
            row_gradient * scale,
            head_gradient * scale if ctx.learns else None,
            None,
            None,
            None,
            None,
            None,
        )


def projected_log_probs(
    hidden: Float[Tensor, "tokens width"],
    head: Float[Tensor, "vocab width"],
    targets: Int[Tensor, " tokens"],
    *,
    temperature: float = 1.0,
    softcap: float = 0.0,
) -> Float[Tensor, " tokens"]:
    """log p(target) of softmax(hidden @ head.T / temperature), for losses that weight each token (policy
    gradients).

    The same as `log_softmax` and `gather`, with float32 products even under autocast: a bf16 logit of 20 is
    0.06 off, and so would be its token's log-probability. The derivative by each logit (one-hot - softmax) is
    kept for the backward pass, in autocast's precision. Its two products, with the head and with the hidden
    states, are in that precision too, as autocast does for every other matrix. `softcap` is that of
    `chunked_next_token_loss`.
    """
    kind = head.device.type
    slopes = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.dtype
    # Padded to a bucket size: oneDNN caches a kernel for each size that it has seen.
    count, more = len(targets), bucket_size(len(targets)) - len(targets)
    hidden, targets = F.pad(hidden, (0, 0, 0, more)), F.pad(targets, (0, more))
    with torch.autocast(kind, enabled=False):
        found: Tensor = _Projected.apply(hidden.float(), head.float(), targets, temperature, softcap, slopes)  # type: ignore[no-untyped-call]
    return found[:count]


class _Projected(torch.autograd.Function):
    """Rows (N, D), head (V, D), targets (N) -> log-probabilities (N), as many rows at a time as in the
    chunked loss."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        head: Tensor,
        targets: Tensor,
        temperature: float,
        softcap: float,
        dtype: torch.dtype,
    ) -> Tensor:
        found, slopes = [], []
        chunk = max(128, CHUNK_LOGITS // head.shape[0])
        for part, target in zip(torch.split(rows, chunk), torch.split(targets[:, None], chunk), strict=True):
            logits = runtime.product(part, head)  # (C, V)
            if softcap:
                capped = logits.div_(softcap).tanh_()
                logits = softcap * capped
            log_p = (logits if temperature == 1.0 else logits.div_(temperature)).log_softmax(-1)
            found.append(log_p.gather(1, target)[:, 0])
            slope = log_p.exp_().neg_()
            slope.scatter_add_(1, target, torch.ones_like(slope[:, :1]))
            if softcap:
                slope.mul_(1 - capped.square_())  # d c tanh(x / c) / dx
            slopes.append(slope.to(dtype))
        ctx.save_for_backward(torch.cat(slopes), rows, head)
        ctx.temperature = temperature
        return torch.cat(found)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        slopes, rows, head = ctx.saved_tensors
        weights = gradients[0][:, None] / ctx.temperature  # scaling rows costs (N, D), scaling slopes (N, V)
        for_rows = for_head = None
        if ctx.needs_input_grad[0]:
            for_rows = weights * runtime.product(slopes, head.to(slopes.dtype).mT)
        if ctx.needs_input_grad[1]:
            for_head = runtime.product(slopes.mT, (weights * rows).to(slopes.dtype).mT).to(head.dtype)
        return for_rows, for_head, None, None, None, None


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Total negative log-likelihood in nats over the text's UTF-8 bytes, in bits per byte.

    Comparable across tokenizers and with a compressor's output, unlike the loss per token.
    """
    return nats / math.log(2) / text_bytes
