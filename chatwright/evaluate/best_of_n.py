"""Best of n, estimated from samples: the score of the chosen answer, its KL, and the optimal policy's.

ONE set of N answers to each prompt gives an unbiased estimate of the whole curve n = 1, 2, 4 ... N, by the
mean over all subsets of n (Nakano et al. 2021, arXiv:2112.09332; Gao et al. 2022, arXiv:2210.10760). The same
answers, weighted by exp(score / beta), estimate the policy with the highest expected score at its KL (Korbak
et al. 2022, arXiv:2205.11275). Equal scores count as if one were chosen at random, by its expected value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from chatwright.train.statistics import bootstrap_interval

Samples = Float[Tensor, "prompts n"]

BETAS = (3.2, 1.6, 0.8, 0.4, 0.2, 0.1)
"""KL coefficients whose optimum is estimated, as far as the number of answers allows."""
COUNTED = 8.0
"""Least effective number of answers, on average over prompts, for an estimate of an optimum."""


def best_of_n_kl(n: float) -> float:
    """KL of the best of n from the model that is sampled, log n - (n - 1) / n nats (Stiennon et al. 2020,
    appendix G.3).

    An upper bound, near the truth where no single answer is likely (Beirami et al. 2024, arXiv:2401.01879).
    """
    return math.log(n) - (n - 1) / n


def best_of_n(scores: Samples, values: Samples, n: int) -> Float[Tensor, " prompts"]:
    """Expected `values` of the answer with the highest of n `scores`, from N >= n answers to each prompt.

    It is the mean over all subsets of n of the N answers: with answers in rising order, the i-th is the best
    of C(i - 1, n - 1) of the C(N, n) subsets. Answers of equal score each get the mean of their values.
    Raises ValueError when n is not in 1 ... N.
    """
    size = scores.shape[1]
    if not 1 <= n <= size:
        raise ValueError(f"n = {n} of {size} answers")
    weights = torch.tensor([math.comb(i, n - 1) for i in range(size)], dtype=torch.float64) / math.comb(
        size, n
    )
    order = scores.double().argsort(dim=1)
    ranked, told = scores.double().gather(1, order), values.double().gather(1, order)
    same = (ranked[:, :, None] == ranked[:, None, :]).double()  # (prompts, N, N): which answers tie
    shared = (same @ told[:, :, None]).squeeze(-1) / same.sum(-1)
    return shared @ weights


def at_kl(curve: Sequence[tuple[float, float]], kl: float) -> float | None:
    """Value of best-of-n at `kl`, interpolated from points (KL, value) in rising order; None beyond them."""
    for (left, low), (right, high) in pairwise(curve):
        if left <= kl <= right:
            return low + (high - low) * (kl - left) / (right - left)
    return None


def tilted(
    scores: Samples, values: Samples, beta: float
) -> tuple[Float[Tensor, " prompts"], Float[Tensor, " prompts"]]:
    """KL and expected `values` of the optimal policy for the KL coefficient `beta`: the sampled model tilted
    by exp(score / beta). The KL is from the sampled model.

    Estimated from N answers to each prompt by self-normalised importance weights: the effective number of
    answers is N / exp(KL). Few answers include no rare good one, so that both estimates are too low, but
    together: with normal scores and 8 of 64 effective answers, the KL is a third too low, and the score 5 %
    below what a policy of that KL can have.
    """
    log_weights = (scores.double() / beta).log_softmax(1)
    weights = log_weights.exp()
    # xlogy, because 0 x -inf must be 0 where a score is hopeless
    kl = torch.special.xlogy(weights, weights).sum(1) + math.log(scores.shape[1])
    return kl, (weights * values.double()).sum(1)


def sizes(most: int) -> list[int]:
    """1, 2, 4 ... and `most`."""
    return [*(2**k for k in range(most.bit_length()) if 2**k < most), most]


def point(scores: Samples, values: Samples | None, n: int, seed: int) -> dict[str, float]:
    """A point of the curve: KL, score and gold with 95 % intervals over prompts."""
    best = best_of_n(scores, scores, n)
    low, high = bootstrap_interval(best, seed=seed)
    row = {"kl": best_of_n_kl(n), "score": float(best.mean()), "score_low": low, "score_high": high}
    if values is not None:
        chosen = best_of_n(scores, values, n)
        low, high = bootstrap_interval(chosen, seed=seed)
        row |= {"gold": float(chosen.mean()), "gold_low": low, "gold_high": high}
    return row


def optima(scores: Samples, values: Samples | None, seed: int) -> dict[float, dict[str, float]]:
    """KL, score and gold of the optimum at each KL coefficient for which the answers suffice (`COUNTED`),
    with 95 % intervals over prompts."""
    found: dict[float, dict[str, float]] = {}
    for beta in BETAS:
        kl, score = tilted(scores, scores, beta)
        if float(kl.mean()) > math.log(scores.shape[1] / COUNTED):
            break  # a smaller coefficient has a larger KL
        row = {"kl": float(kl.mean())}
        for name, told in (
            ("score", score),
            *([("gold", tilted(scores, values, beta)[1])] if values is not None else []),
        ):
            low, high = bootstrap_interval(told, seed=seed)
            row |= {name: float(told.mean()), f"{name}_low": low, f"{name}_high": high}
        found[beta] = row
    return found
