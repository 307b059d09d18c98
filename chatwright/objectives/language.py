"""Language-model losses and the measure they are compared by."""

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
"""Logits that exist at once in `chunked_next_token_loss`: 34 MB in float32. Rows of a chunk are this over the
vocabulary: 2,048 at 4,096, 256 at 32,768, still enough to keep the matrix library busy."""


def next_token_loss(
    logits: Float[Tensor, "batch time vocab"],
    targets: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"] | None = None,
) -> Float[Tensor, ""]:
    """Sum of -log p(target) over the positions where `mask` is True, in nats (Radford et al. 2018, eq. 1).

    `targets[b, t]` is the token that follows position t. The sum, not the mean: whoever accumulates several
    micro-batches divides by the number of targets of all of them, so that 8 x 1 equals 1 x 8.
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
    """`next_token_loss(hidden @ head.T, targets, mask)` without ever holding all logits. Above 0, `softcap`
    bends them first: c tanh(logit / c) (Gemma 2, arXiv:2408.00118, section 2).

    The head dominates a small model's memory: at a vocabulary of 32,768 the float32 logits of 4,096
    positions, their softmax and its gradient take 1.6 GB. Here `chunk` positions at a time (0: by
    `CHUNK_LOGITS`) go to the loss *and* to its gradient (softmax - one-hot), which the forward pass therefore
    keeps instead of the logits: (N, D) and (V, D). A head that is frozen, as under an adapter, has no
    gradient, which spares a third of the products. Products are computed in the head's precision, or
    autocast's; sums and softmax in float32.
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
    """Rows (N, D), head (V, D), targets (N), counted (N) -> the sum of the losses that count."""

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
    """log p(target) of softmax(hidden @ head.T / temperature), for a loss that weighs each token in its own
    way (policy gradients).

    The same as `log_softmax` and `gather`, of float32 products even under autocast: a bf16 logit of 20 is
    0.06 off, and so would be its token's log-probability. What is kept for the backward pass is the slope of
    each logit (one-hot - softmax), and that in autocast's precision, in which its two products with the head
    and the hidden states are computed, as autocast does with those of every other matrix. `softcap` as in
    `chunked_next_token_loss`.
    """
    kind = head.device.type
    slopes = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.dtype
    count, more = (
        len(targets),
        bucket_size(len(targets)) - len(targets),
    )  # oneDNN keeps a program for each size that it ever saw
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
        weights = gradients[0][:, None] / ctx.temperature  # of rows, so that they cost (N, D) and not (N, V)
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
