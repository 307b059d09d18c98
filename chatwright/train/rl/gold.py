"""What is really wanted, where there is a measure of it that the policy is not trained on: the gold beside
the proxy.

A reward model stands in for it and can be exploited; where a gold measure can be had on every answer (a
lexicon, or a better reward model that stands for people, as in Gao et al. 2022, arXiv:2210.10760), a run can
stop when it turns down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from chatwright import runtime
from chatwright.interop.loaded import Loaded
from chatwright.model.attention import plain_attention
from chatwright.train.rl.models import load_reward
from chatwright.train.rl.rollout import Completions, texts_of

Gold = Callable[[Completions], Float[Tensor, " batch"]]

SENTIMENT = "sentiment"
"""The name of the lexicon's measure in the settings; anything else names a reward model."""


def sentiment(texts: Sequence[str]) -> list[float]:
    """VADER's compound score of each text, from -1 (negative) to 1 (positive)."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyser = SentimentIntensityAnalyzer()
    return [float(analyser.polarity_scores(text)["compound"]) for text in texts]


def gold_of(name: str, resolve: Callable[[str], Path], base: Loaded) -> Gold | None:
    """The measure that a setting names: none, the lexicon, or the reward model of a stage. Raises
    UserError."""
    tokenizer = base.tokenizer
    assert tokenizer is not None
    if not name:
        return None
    if name == SENTIMENT:
        return lambda answers: torch.tensor(sentiment(texts_of(answers, tokenizer)))
    judge = (
        load_reward(resolve(name), base, min_correlation=-1.0)
        .to(runtime.device())
        .eval()
        .requires_grad_(False)
    )
    if runtime.device().type == "cpu":
        judge.body.use_attention(plain_attention)

    @torch.no_grad()
    def scores(answers: Completions) -> Float[Tensor, " batch"]:
        return judge.score(answers.ids, answers.real).float().cpu()

    return scores
