"""Length and diversity of answers, and answers before and after a stage side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch

from chatwright.model.gpt import GPT
from chatwright.objectives.policy import kl_k1
from chatwright.tokenizer import Tokenizer
from chatwright.train.rl.rollout import Completions, completion_log_probs, distinct, texts_of
from chatwright.train.workspace import Answered

SHOWN = 10
"""Pairs of answers that a report shows: the first ones, unselected."""

LENGTH, ENDED, REPEATS = "tokens per answer", "share that ends", "share of repeated token pairs"


def repeats(tokens: Sequence[int]) -> float:
    """Share of an answer's pairs of neighbouring tokens that occurred in it before, 0 to 1."""
    pairs = list(pairwise(tokens))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def of_each(answers: Completions) -> dict[str, list[float]]:
    """Of each answer: length in tokens (end token included), whether it has its end token, repetition."""
    tokens = [ids[mask].tolist() for ids, mask in zip(answers.ids, answers.response, strict=True)]
    return {
        LENGTH: [float(len(one)) for one in tokens],
        ENDED: answers.finished.float().tolist(),
        REPEATS: [repeats(one) for one in tokens],
    }


def side_by_side(
    names: tuple[str, str],
    prompts: Sequence[str],
    sides: tuple[Completions, Completions],
    tokenizer: Tokenizer,
    *,
    values: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    kl: float | None = None,
    sampling: str = "",
) -> Answered:
    """Completions of `prompts` (as people read them) before and after, and how they were sampled.

    With several answers per prompt, row n belongs to prompt n modulo their number, and a prompt's numbers are
    means over its answers. `values` adds further numbers per prompt.
    """
    each, texts = [of_each(side) for side in sides], [texts_of(side, tokenizer) for side in sides]
    known = {
        name: (per_prompt(each[0][name], len(prompts)), per_prompt(each[1][name], len(prompts)))
        for name in each[0]
    }
    measures = {name: (mean(each[0][name]), mean(each[1][name])) for name in each[0]}
    for n in (1, 2):
        measures[f"distinct-{n}"] = (distinct(texts[0], n), distinct(texts[1], n))
    pairs = [
        {"prompt": prompts[n], "before": texts[0][n], "after": texts[1][n]}
        for n in range(min(SHOWN, len(prompts)))
    ]
    every = {**known, **(values or {})}
    return Answered(names[0], names[1], list(prompts), pairs, every, measures, kl, sampling)


def mean(values: Sequence[float]) -> float:
    """The mean of at least one number."""
    return sum(values) / len(values)


def per_prompt(values: Sequence[float], prompts: int) -> list[float]:
    """Means over the answers to each prompt; answer number n is to prompt n modulo `prompts`."""
    return torch.tensor(values, dtype=torch.float64).view(-1, prompts).mean(0).tolist()  # type: ignore[no-any-return]


@torch.no_grad()
def mean_kl(policy: GPT, reference: GPT, answers: Completions, temperature: float) -> float:
    """KL of the policy from the reference on its own answers, k1, nats per answer."""
    total = 0.0
    for chosen in torch.split(torch.arange(len(answers.ids)), 64):
        part = answers.rows(chosen)
        own, _ = completion_log_probs(policy, part, temperature=temperature)
        base, _ = completion_log_probs(reference, part, temperature=temperature)
        total += float(torch.where(part.response, kl_k1(own, base), 0.0).sum())
    return total / len(answers.ids)
