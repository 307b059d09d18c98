"""How models rank people's own comparisons: a reward model by its scores, a policy by its probabilities.

A policy ranks two answers by their mean log-probability per token, given the prompt. The mean, not the sum:
else the shorter answer would win nearly always (Meng et al. 2024, arXiv:2405.14734, use the same measure as
a reward). No sampling is in it, so it shows changes that a few sampled answers cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from chatwright import runtime
from chatwright.chat import ChatTemplate
from chatwright.data.examples import Comparison
from chatwright.data.loader import WIDTH_STEP, pad
from chatwright.model.gpt import GPT
from chatwright.model.heads import ScalarModel
from chatwright.tokenizer import Tokenizer
from chatwright.train.preference.counting import ScoredComparisons
from chatwright.train.preference.rankings import encode_answer
from chatwright.train.rl.rollout import Completions, completion_log_probs

AT_ONCE = 16
"""Answers in one forward pass."""


def ranked_by_policy(
    model: GPT, comparisons: Sequence[Comparison], template: ChatTemplate, tokenizer: Tokenizer
) -> ScoredComparisons:
    """Mean log-probability per token of each answer, nats; the end token counts."""

    def scores(rows: list[list[int]], answers: list[int]) -> Tensor:
        given = _completions(rows, answers)
        log_probs, _ = completion_log_probs(model, given, temperature=1.0)
        return log_probs.sum(1) / given.response.sum(1)

    return _ranked(scores, comparisons, template, tokenizer, model.config.context)


def ranked_by_reward(
    model: ScalarModel, comparisons: Sequence[Comparison], template: ChatTemplate, tokenizer: Tokenizer
) -> ScoredComparisons:
    """The reward model's score of each answer."""

    def scores(rows: list[list[int]], answers: list[int]) -> Tensor:
        given = _completions(rows, answers)
        return model.score(given.ids, given.real)

    return _ranked(scores, comparisons, template, tokenizer, model.config.context)


@torch.no_grad()
def _ranked(
    scores: Callable[[list[list[int]], list[int]], Tensor],
    comparisons: Sequence[Comparison],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    context: int,
) -> ScoredComparisons:
    """Apply `scores` (rows of ids, tokens of each row's answer -> numbers) to all answers."""
    rows, lengths, places = [], [], []
    for n, one in enumerate(comparisons):
        for place, answer in enumerate(one.responses):
            rows.append(encode_answer(one.prompt, answer, template, tokenizer, context))
            lengths.append(min(len(tokenizer.encode(answer)), context - 2) + 1)
            places.append((n, place))
    found: list[float] = []
    for start in range(0, len(rows), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        found += scores(rows[part], lengths[part]).float().cpu().tolist()
    k = max(len(one.responses) for one in comparisons)
    values, labels = torch.zeros(len(comparisons), k), torch.full((len(comparisons), k), float("nan"))
    for (n, place), value in zip(places, found, strict=True):
        values[n, place], labels[n, place] = value, comparisons[n].scores[place]
    return ScoredComparisons(values, labels)


def _completions(rows: list[list[int]], answers: list[int]) -> Completions:
    """Rows whose last tokens are the answers, as if they had been sampled."""
    ids = pad(rows, 0, multiple=WIDTH_STEP)
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    place = torch.arange(ids.shape[1])
    real = place < lengths
    response = real & (place >= lengths - torch.tensor(answers)[:, None])
    finished = torch.ones(len(rows), dtype=torch.bool)
    return runtime.on_device(Completions(ids, real, response, finished, torch.zeros(ids.shape)))
