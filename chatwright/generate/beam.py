"""Beam search: keep the likeliest few continuations instead of one.

Scores and stopping are those of transformers' `generate(num_beams=..., do_sample=False)`, so the two give the
same sequences: a finished continuation of n tokens (its end token included) scores sum(log p) /
n^length_penalty.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from chatwright.config import UserError
from chatwright.model.cache import KVCache
from chatwright.model.gpt import GPT


@torch.inference_mode()
def beam_search(
    model: GPT,
    prompt: Sequence[int],
    *,
    beams: int,
    max_new_tokens: int,
    end_ids: Collection[int] = (),
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    known: Bool[Tensor, " V"] | None = None,
) -> list[tuple[list[int], float]]:
    """The best finished continuations of `prompt`, at most `beams`, best first: (new ids, score in nats).

    length_penalty: above 1 favours long answers, below 1 short ones (scores are negative; 0 compares plain
    sums). early_stopping: stop at `beams` finished continuations; otherwise go on while the best open one, at
    its present
        length, beats the worst finished one.
    known: True on ids that have a token (sequence.py::tokens_with_text); the others are never taken.
    An answer ends with an id of `end_ids`, or where `max_new_tokens` or the model's context ends.
    Raises UserError for an empty or too long prompt and for numbers that make no sense.
    """
    if beams < 1 or max_new_tokens < 1:
        raise UserError(
            f"beam search: beams ({beams}) and max_new_tokens ({max_new_tokens}) must be at least 1"
        )
    if not math.isfinite(length_penalty):
        raise UserError(f"beam search: length_penalty is {length_penalty}; it must be a finite number")
    config = model.config
    if not 0 < len(prompt) < config.context:
        raise UserError(
            f"beam search: the prompt has {len(prompt)} tokens; 1 to {config.context - 1} fit the context"
        )
    limit = min(max_new_tokens, config.context - len(prompt))
    search = _Search(beams, frozenset(end_ids), length_penalty, early_stopping)
    weight = model.embed.weight
    cache = KVCache(config, 1, len(prompt) + limit, dtype=weight.dtype, device=weight.device)
    inputs = torch.tensor([list(prompt)], dtype=torch.int64, device=weight.device)
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False  # no dropout; put back below
    try:
        for length in range(1, limit + 1):
            hidden = model.hidden(inputs, cache=cache)
            logprobs = model.head(hidden[:, -1]).float().log_softmax(-1)
            if known is not None:
                logprobs = logprobs.masked_fill(~known.to(logprobs.device), -math.inf)
            origins = search.extend(logprobs, length, last=length == limit)
            if search.done:
                break
            cache.select(torch.tensor(origins, device=weight.device))
            inputs = torch.tensor([beam[-1:] for beam in search.open], device=weight.device)
    finally:
        for module in training:
            module.training = True
    return search.finished


class _Search:
    """Open beams with their summed log-probabilities, and the best finished ones with their scores."""

    def __init__(
        self, beams: int, end_ids: frozenset[int], length_penalty: float, early_stopping: bool
    ) -> None:
        self.beams, self.end_ids = beams, end_ids
        self.length_penalty, self.early_stopping = length_penalty, early_stopping
        self.open: list[list[int]] = [[]]
        self.sums: list[float] = [0.0]
        self.finished: list[tuple[list[int], float]] = []
        self.done = False

    def extend(self, logprobs: Tensor, length: int, *, last: bool) -> list[int]:
        """Grow every open beam by a token; `logprobs` is (open beams, V). Returns which old beam each new one
        grew from.

        Only the best `beams` candidates may finish; the rest of the candidates are there so that enough open
        beams remain when many of the best end at once: each end id can take at most one candidate per beam.
        """
        total = logprobs + torch.tensor(self.sums, device=logprobs.device)[:, None]
        wanted = max(2, 1 + len(self.end_ids)) * self.beams
        sums, index = total.flatten().topk(min(wanted, total.numel()))
        vocabulary = logprobs.shape[1]
        candidates: list[tuple[int, list[int], float]] = []
        newly: list[tuple[list[int], float]] = []
        for rank, (value, where) in enumerate(zip(sums.tolist(), index.tolist(), strict=True)):
            origin, token = divmod(where, vocabulary)
            ids = [*self.open[origin], token]
            if not (last or token in self.end_ids):
                candidates.append((origin, ids, value))
            elif rank < self.beams:
                newly.append((ids, value / length**self.length_penalty))
        self.finished = sorted(self.finished + newly, key=lambda item: -item[1])[: self.beams]
        candidates = candidates[: self.beams]
        self.open = [ids for _, ids, _ in candidates]
        self.sums = [value for _, _, value in candidates]
        self.done = not candidates or self._settled(length)
        return [origin for origin, _, _ in candidates]

    def _settled(self, length: int) -> bool:
        """Whether open beams need not be looked at any more. They are sorted, so the first is the best."""
        if len(self.finished) < self.beams:
            return False
        return self.early_stopping or self.sums[0] / length**self.length_penalty <= self.finished[-1][1]
