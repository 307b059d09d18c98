"""A reward that is known to be right, so that a miniature run of PPO or REINFORCE has something to find in
seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from chatwright.interop.loaded import Loaded
from chatwright.model.heads import ScalarModel
from chatwright.optim import OptimConfig
from chatwright.stages import best_of_n
from chatwright.stages.ppo import Config
from chatwright.train.rl import training


class Planted(ScalarModel):
    """A judge that likes some words: -1 for an answer without them, 0.5 with one, 2 with two or more.

    A third of the miniature's answers have one from the start. A share of tokens would be a whisper instead:
    one word is a tenth of an answer, and whether it is found in time would hang on the processor's rounding.
    """

    liked: Tensor
    begin: int

    def score(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Counts behind the last token that begins an answer."""
        begins = (ids == self.begin).long()
        behind = (begins.flip(1).cumsum(1).flip(1) == 0) & mask
        found = torch.isin(ids, self.liked) & behind
        return 1.5 * found.sum(1).clamp(max=2) - 1.0


def plant(monkeypatch: pytest.MonkeyPatch, words: str = "happy lovely great kind sweet bright") -> None:
    """The reward model likes these words."""

    def planted(directory: Path, base: Loaded, min_correlation: float) -> ScalarModel:
        torch.manual_seed(4)
        model = Planted(base.model.config)
        model.start_from(base.model)
        assert base.tokenizer is not None
        own = {base.tokenizer.encode(f"is {word}")[-1] for word in words.split()}
        model.liked = torch.tensor(sorted(own))
        model.begin = base.tokenizer.control_ids["<|assistant|>"]
        return model

    for module in (training, best_of_n):
        monkeypatch.setattr(module, "load_reward", planted)


MINI = Config(
    iterations=20,
    batch_size=32,
    minibatch_size=16,
    epochs=2,
    max_prompt_tokens=40,
    max_new_tokens=18,
    beta=0.02,
    beta_floor=0.02,
    kl_budget=8.0,
    min_tokens=1,
    max_repeats=0.6,
    save_steps=4,
    # Adam's first steps are of full size whatever the gradient: without warm-up, or at 1e-3, noise alone
    # moves a miniature by 10 nats.
    optim=OptimConfig(learning_rate=4e-4, eps=1e-5, schedule="linear", warmup=0.3),
)


def gain(rows: Sequence[Mapping[str, float]]) -> float:
    """The mean score of the last five rounds over that of the first five. Not the best round over the first:
    of so many rounds one is better by that much by luck alone."""
    scores = [row["score"] for row in rows]
    return sum(scores[-5:]) / 5 - sum(scores[:5]) / 5
