"""Log-probabilities of given texts, many texts in one forward pass.

The model computes in its own precision, without padding (`GPT.hidden` with `lengths`). A short text costs
nearly as much alone as with twenty others, since the weights are read once a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from chatwright import runtime
from chatwright.generate.request import Alternatives
from chatwright.generate.sampling import BatchSampler, Sampling, make_generator
from chatwright.generate.sequence import Choice
from chatwright.model.gpt import GPT

SCORED_AT_ONCE = 256
"""Tokens whose logits are in memory at a time; each has a row of the vocabulary's size."""


@dataclass(frozen=True)
class ToScore:
    """A text to score."""

    ids: Sequence[int]
    """At least one token."""
    top: int = 0
    """How many of the likeliest tokens to report at each position."""
    samplings: Sequence[Sampling] = ()
    """Choose the token behind the text in each of these ways."""


@dataclass
class Scored:
    """A text's scores."""

    tokens: list[tuple[int, float | None, Alternatives]]
    """Per token of the text: the token, its log-probability in nats given the tokens before, and the
    likeliest ones. The first has none: nothing precedes it."""
    choices: list[Choice] = field(default_factory=list)
    """The tokens behind the text, one for each sampling."""


def score_texts(
    model: GPT, texts: Sequence[ToScore], known: Bool[Tensor, " V"] | None = None
) -> list[Scored]:
    """The scores of the texts, from one forward pass. Raises UserError for a text beyond the context.

    known: True on ids that have a token (sequence.py::tokens_with_text); the others are neither drawn nor
    among the likeliest. None: all have.
    """
    if not texts:
        return []
    lengths = [len(text.ids) for text in texts]
    longest, device = max(lengths), next(model.parameters()).device
    rows = [[*text.ids, *[0] * (longest - len(text.ids))] for text in texts]
    ids = torch.tensor(rows, device=device)
    scored = [Scored([(text.ids[0], None, [])]) for text in texts]
    with runtime.evaluating(model):
        ragged = torch.tensor(lengths, device=device) if min(lengths) < longest else None
        hidden = model.hidden(ids, lengths=ragged).flatten(0, 1)
        # (text, column) of every token whose successor is asked for.
        asked = [
            (number, column)
            for number, text in enumerate(texts)
            for column in range(len(text.ids) - (not text.samplings))
        ]
        for start in range(0, len(asked), SCORED_AT_ONCE):
            part = asked[start : start + SCORED_AT_ONCE]
            index = torch.tensor([number * longest + column for number, column in part], device=device)
            _score(model.head(hidden[index]).float(), part, texts, scored, known)
    return scored


def _score(
    logits: Float[Tensor, "N V"],
    asked: Sequence[tuple[int, int]],
    texts: Sequence[ToScore],
    scored: Sequence[Scored],
    known: Bool[Tensor, " V"] | None,
) -> None:
    """Add to `scored` what the logits behind these tokens say."""
    following = [_following(texts[number].ids, column) for number, column in asked]
    chosen = logits.gather(1, torch.tensor(following, device=logits.device)[:, None])
    top = max(texts[number].top for number, _ in asked)
    known = None if known is None else known.to(logits.device)
    listed = logits if known is None else logits.masked_fill(~known, -torch.inf)
    values, tokens = listed.topk(top, dim=-1) if top != 1 else listed.max(-1, keepdim=True)
    total = logits.logsumexp(-1, keepdim=True)
    found = (chosen - total)[:, 0].tolist(), tokens.tolist(), (values - total).tolist()
    for row, (number, column) in enumerate(asked):
        text, likeliest = texts[number], zip(found[1][row], found[2][row], strict=True)
        if column + 1 < len(text.ids):
            pairs = list(likeliest)[: text.top]
            scored[number].tokens.append((following[row], found[0][row], pairs))
        else:
            scored[number].choices += _choose(logits[row], text, known)


def _following(ids: Sequence[int], column: int) -> int:
    """The token behind a column; any one behind the last."""
    return ids[column + 1] if column + 1 < len(ids) else 0


def _choose(logits: Float[Tensor, " V"], text: ToScore, known: Bool[Tensor, " V"] | None) -> list[Choice]:
    """A token for each sampling, as the engine chooses the first one behind a prompt."""
    count = len(text.samplings)
    sampler = BatchSampler(
        text.samplings,
        [make_generator(sampling, logits.device) for sampling in text.samplings],
        [text.ids] * count,
        vocab_size=logits.shape[-1],
        device=logits.device,
    )
    rows = logits.expand(count, -1)
    ids, logprobs = sampler(rows, None if known is None else known[None])
    return list(map(Choice, ids.tolist(), logprobs.tolist(), sampler.alternatives(rows, known)))
