"""Policy-gradient objectives for language models: pure functions of tensors.

Everywhere (B, T) runs over positions of a sequence; `mask` is True on response tokens, their end token
included, and only those count. `log_probs[b, t]` is log pi(token t | tokens before t).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Values = Float[Tensor, "batch time"]
Mask = Bool[Tensor, "batch time"]

Baseline = Literal["mean", "leave-one-out", "none"]
"""The baseline that REINFORCE subtracts from a completion's return; see `reinforce_advantages`."""


def masked_mean(values: Values, mask: Mask) -> Float[Tensor, ""]:
    """Mean over the True positions; 0 when there are none."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def all_equal(values: Float[Tensor, "*places n"]) -> Bool[Tensor, "*places 1"]:
    """Whether all values along the last dimension are one number; so are a single one, and none at all.

    Exact, and asked before a deviation is divided by: the mean of equal numbers is rounded, so that each
    differs from it by a rounding error, which a division by their tiny deviation makes as large as a real
    difference. A lower bound on the deviation would hide this only where it also hides small differences
    that are true.
    """
    if not values.shape[-1]:
        return torch.ones((*values.shape[:-1], 1), dtype=torch.bool, device=values.device)
    return (values == values[..., :1]).all(-1, keepdim=True)


def whiten(values: Values, mask: Mask, *, shift_mean: bool = True, correction: int = 0) -> Values:
    """Scale to variance 1 over the mask and, with `shift_mean`, to mean 0; 0 outside the mask. Equal values
    become exactly 0; without `shift_mean` they stay as they are.

    `shift_mean=False` keeps the mean, as reward whitening must (Ziegler et al. 2019 code; arXiv:2403.17031,
    4.7). The variance of n values is divided by n - `correction`: 0 as in OpenAI's code, 1 (Bessel) as in
    TRL's.
    """
    if bool(all_equal(values[mask])):
        return torch.where(mask, torch.zeros_like(values) if shift_mean else values, 0.0)
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean).square(), mask)
    if correction:
        count = mask.sum()
        variance = variance * count / (count - correction).clamp(min=1)
    white = (values - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, white if shift_mean else white + mean, 0.0)


def kl_k1(log_probs: Values, reference: Values) -> Values:
    """log(pi / pi_ref) per token: unbiased for KL(pi || pi_ref) when tokens come from pi (Schulman 2020,
    k1)."""
    return log_probs - reference


def kl_k3(log_probs: Values, reference: Values) -> Values:
    """(r - 1) - log r with r = pi_ref / pi: unbiased, never negative, low variance (Schulman 2020, k3)."""
    log_ratio = reference - log_probs
    return log_ratio.exp() - 1 - log_ratio


def entropy(logits: Float[Tensor, "batch time vocab"]) -> Values:
    """Entropy of the next-token distribution at every position, in nats."""
    return entropy_of(logits.float().log_softmax(-1))


def entropy_of(log_p: Float[Tensor, "*places vocab"]) -> Float[Tensor, "*places"]:
    """Entropy of distributions given by their log-probabilities, in nats."""
    return -(log_p.exp() * log_p).sum(-1)


def end_positions(mask: Mask) -> Bool[Tensor, "batch time"]:
    """True on the last True of each row; a row without any stays False."""
    later = mask.flip(1).long().cumsum(1).flip(1)  # True positions from here on
    return mask & (later == 1)


def token_rewards(
    scores: Float[Tensor, " batch"], log_probs: Values, reference: Values, mask: Mask, *, beta: float
) -> Values:
    """-beta x k1 on every response token, plus the model's score on the last one (arXiv:2203.02155, eq.
    2)."""
    penalty = torch.where(mask, -beta * kl_k1(log_probs, reference), 0.0)
    return penalty + torch.where(end_positions(mask), scores[:, None], 0.0)


def generalized_advantages(
    rewards: Values, values: Values, mask: Mask, *, discount: float = 1.0, lam: float = 0.95
) -> Values:
    """Advantage of every response token (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

    `values[b, t]` estimates the return from token t on, before it is chosen. The response of a row is one
    contiguous run of True. The episode ends at its last token: the value beyond it is 0. Positions outside
    get advantage 0.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + discount * next_value - values[:, t]
        following = torch.where(here, delta + discount * lam * following, 0.0)
        advantages[:, t] = following
        next_value = torch.where(here, values[:, t], 0.0)
    return advantages


def reinforce_advantages(
    returns: Float[Tensor, "prompts k"], *, baseline: Baseline = "mean", scaled: bool = False
) -> Float[Tensor, "prompts k"]:
    """A completion's return less a baseline; `returns[n, i]` is that of prompt n's i-th of K completions.

    `mean` subtracts the mean over the batch, the completion's own return included. With M completions this
    scales the expected gradient by 1 - 1/M and does not change its direction. `leave-one-out` subtracts the
    mean of the K - 1 other completions of the same prompt, which is unbiased (RLOO: Ahmadian et al. 2024,
    arXiv:2402.14740; Kool et al. 2019). `none` subtracts nothing (Williams 1992 with b = 0). `scaled` then
    divides by the standard deviation over the batch, so that the step length does not depend on the unit of
    the score. Equal returns have advantage 0, exactly: of a prompt with `leave-one-out`, of the batch with
    `mean`; and of the batch with `none` where it is scaled, for there is no deviation to divide by. Raises
    ValueError for leave-one-out with K = 1.
    """
    k = returns.shape[1]
    if baseline == "leave-one-out":
        if k < 2:
            raise ValueError("leave-one-out needs at least two answers to each prompt")
        advantages = returns - (returns.sum(1, keepdim=True) - returns) / (k - 1)
        advantages = torch.where(all_equal(returns), 0.0, advantages)
    else:
        advantages = returns - (returns.mean() if baseline == "mean" else 0.0)
        if (scaled or baseline == "mean") and bool(all_equal(returns.flatten())):
            return torch.zeros_like(returns)
    return advantages / (advantages.std(correction=0) + 1e-8) if scaled else advantages


def reinforce_loss(log_probs: Values, advantages: Float[Tensor, " batch"], mask: Mask) -> Float[Tensor, ""]:
    """-A log pi(completion), mean over completions (Williams 1992, Machine Learning 8, section 6: episodic
    REINFORCE).

    A completion is one action: log pi(completion) is the sum over its tokens. The gradient estimates that of
    the expected return (negated) where the completions were sampled from pi itself.
    """
    return -(advantages * torch.where(mask, log_probs, 0.0).sum(1)).mean()


@dataclass(frozen=True)
class Clipped:
    """A clipped loss (mean over the mask) and the share of tokens on which the clipped side was taken."""

    loss: Tensor
    fraction: Tensor


def policy_loss(
    log_probs: Values, old: Values, advantages: Values, mask: Mask, *, clip: float = 0.2
) -> Clipped:
    """-min(r A, clip(r, 1 - c, 1 + c) A) with r = pi / pi_old (Schulman et al. 2017, arXiv:1707.06347, eq.
    7)."""
    ratio = torch.where(mask, log_probs - old, 0.0).exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return Clipped(
        -masked_mean(torch.minimum(plain, clipped), mask), masked_mean((clipped < plain).float(), mask)
    )


def value_loss(values: Values, old: Values, returns: Values, mask: Mask, *, clip: float = 0.2) -> Clipped:
    """1/2 max((V - R)^2, (clip(V, old -+ c) - R)^2): a move by more than `clip` from the old value towards R
    gains nothing."""
    plain = (values - returns).square()
    near = torch.minimum(torch.maximum(values, old - clip), old + clip)
    clipped = (near - returns).square()
    return Clipped(
        0.5 * masked_mean(torch.maximum(plain, clipped), mask), masked_mean((clipped > plain).float(), mask)
    )


def explained_variance(values: Values, returns: Values, mask: Mask) -> float:
    """1 - Var(R - V) / Var(R) over the mask: 1 is a perfect critic, 0 a constant one, below 0 a harmful
    one. 0 where all returns are equal: there is nothing to explain."""
    target, error = returns[mask], (returns - values)[mask]
    if bool(all_equal(target)) or float(target.var()) == 0.0:
        return 0.0
    return float(1 - error.var() / target.var())


def next_beta(
    beta: float, kl: float, *, target: float, episodes: int, horizon: float, floor: float = 0.0
) -> float:
    """The KL coefficient after a batch (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

    beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon), never below `floor`. `kl` is in nats per
    response.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return max(floor, beta * (1.0 + error * episodes / horizon))
