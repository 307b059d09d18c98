"""A reward that is known to be right, so that a miniature run of PPO or REINFORCE has something to find in
seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chatwright.interop.loaded import Loaded
from chatwright.model.heads import ScalarModel
from chatwright.optim import OptimConfig
from chatwright.stages import best_of_n, ppo
from chatwright.stages.ppo import Config
from chatwright.train.rl import run as rl_run
from chatwright.train.rl.fixed_prompts import Answers, Evaluator, FixedPrompts


class Planted(ScalarModel):
    """A reward model that likes some words: 1 for an answer with any of them, -1 for one without.

    A third of the miniature's answers have one from the start, and all of them may have one without ceasing
    to be answers as the miniature learnt them: the score has far to rise, and ends at the same height
    whatever the seed.
    """

    liked: Tensor
    begin: int

    def score(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Counts behind the last token that begins an answer."""
        begins = (ids == self.begin).long()
        behind = (begins.flip(1).cumsum(1).flip(1) == 0) & mask
        found = torch.isin(ids, self.liked) & behind
        return 2.0 * found.any(1) - 1.0


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

    for module in (rl_run, best_of_n):
        monkeypatch.setattr(module, "load_reward", planted)


def plant_fixed(
    monkeypatch: pytest.MonkeyPatch, told: Sequence[tuple[float, float, float]]
) -> list[FixedPrompts]:
    """The policy's completions of the prompts that choose have these scores, KLs and distinct-2, one after
    the other; the last ones stay. Returns the sets that are answered, as they are."""
    real, left, seen = Evaluator.measure, list(told), []

    def planted(self: Evaluator, chosen: FixedPrompts) -> Answers:
        seen.append(chosen)
        found = real(self, chosen)
        if chosen.name != "choosing":
            return found
        score, kl, variety = left.pop(0) if len(left) > 1 else left[0]
        many = len(found.score)
        return replace(found, score=[score] * many, kl=[kl] * many, distinct_2=variety)

    monkeypatch.setattr(Evaluator, "measure", planted)
    return seen


def plant_kl(monkeypatch: pytest.MonkeyPatch) -> None:
    """KL is 0 before the first update, and 1 nat after it: in PPO's rounds as on the fixed prompts."""
    real = ppo.score_rollouts
    rounds_seen: list[int] = []

    def planted(*arguments: Any) -> Any:
        rollout, logged = real(*arguments)
        rounds_seen.append(1)
        return rollout, {**logged, "kl": float(len(rounds_seen) > 1)}

    monkeypatch.setattr(ppo, "score_rollouts", planted)
    plant_fixed(monkeypatch, [(0.0, 0.0, 0.8), (1.0, 1.0, 0.8)])


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
    evaluate_every=2,
    evaluate_prompts=32,
    held_out_prompts=64,
    # Adam's first steps are of full size whatever the gradient: without warm-up, or at 1e-3, noise alone
    # moves a miniature by 10 nats.
    optim=OptimConfig(learning_rate=4e-4, eps=1e-5, schedule="linear", warmup=0.3),
)


LEARNING = replace(
    MINI,
    iterations=12,
    kl_budget=1e9,
    min_distinct=0.0,
    optim=OptimConfig(learning_rate=4e-3, eps=1e-2, schedule="linear", warmup=0.3),
)
"""For a run that has to learn what is planted, whatever the seed and the processor's rounding. With Adam's
usual small eps each weight moves by the learning rate in each step, most of them by noise, and the KL to the
reference grows with it until the run is stopped; at 1e-2, which is above most of a miniature's gradients,
weights move as their gradients are. Nothing ends it early."""


def gain(rows: Sequence[Mapping[str, float]]) -> float:
    """The mean score of the last three rounds over that of the first three: from about -0.3 to at most 1. Not
    the best round over the first: of so many rounds one is better by luck alone."""
    scores = [row["score"] for row in rows]
    return sum(scores[-3:]) / 3 - sum(scores[:3]) / 3
