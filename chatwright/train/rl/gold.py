"""Gold measure: what is really wanted, by a measure that the policy is not trained on.

The reward model is only a proxy for it and can be exploited. Where a gold measure exists for every completion
(a lexicon, or a better reward model in place of people, as in Gao et al. 2022, arXiv:2210.10760), a run can
stop when the gold measure falls.
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
"""The setting that names the lexicon's measure; any other name is that of a reward model."""


def sentiment(texts: Sequence[str]) -> list[float]:
    """VADER's compound score of each text, from -1 (negative) to 1 (positive)."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyser = SentimentIntensityAnalyzer()
    return [float(analyser.polarity_scores(text)["compound"]) for text in texts]


def gold_of(name: str, resolve: Callable[[str], Path], base: Loaded) -> Gold | None:
    """The measure that the setting `name` asks for: none, the lexicon, or the reward model of a stage. Raises
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
