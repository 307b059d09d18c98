"""REINFORCE as a stage, and its step: what is learnt from is the return of whole answers against a
baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chatwright.config import UsageError
from chatwright.metrics import read_metrics
from chatwright.model.gpt import GPT
from chatwright.model.heads import ScalarModel
from chatwright.stages import reinforce
from chatwright.stages.reinforce import Config, score_rollouts, step
from chatwright.train.rl.models import RLModels
from chatwright.train.rl.rollout import completion_log_probs, sample_completions
from support.planted import LEARNING, MINI, gain

PROMPTS = [[7, 8, 9], [11], [20, 21, 22, 23, 24, 25, 26, 27, 28], [40, 41]]
SHARED = (
    "iterations",
    "batch_size",
    "max_prompt_tokens",
    "max_new_tokens",
    "beta",
    "beta_floor",
    "kl_budget",
    "min_tokens",
    "max_repeats",
    "save_steps",
)
SMALL = Config(
    **{name: getattr(MINI, name) for name in SHARED},
    minibatch_size=32,
    optim=replace(MINI.optim, learning_rate=1e-3),
)
"""One step a round, where PPO takes four: larger ones."""


def config_of(**changes: Any) -> Config:
    return Config(
        **{
            "batch_size": 16,
            "minibatch_size": 16,
            "max_new_tokens": 10,
            "min_tokens": 0,
            "max_repeats": 1.0,
            **changes,
        }
    )


@pytest.mark.parametrize("baseline", ["mean", "leave-one-out", "none"])
def test_the_loss_is_return_less_baseline_times_log_probability(
    lively_gpt: Callable[..., GPT], lively_scalar: Callable[..., ScalarModel], baseline: Any
) -> None:
    models = RLModels(lively_gpt(1), lively_gpt(2), lively_scalar(3))
    config = config_of(baseline=baseline, samples_per_prompt=4, whiten=False, entropy_coefficient=0.02)
    answers = sample_completions(
        models.policy,
        [prompt for prompt in PROMPTS for _ in range(4)],
        end=5,
        max_new_tokens=10,
        temperature=1.0,
        seed_parts=(1, "reinforce"),
    )
    rollout, logged = score_rollouts(models, answers, 0.3, config)
    mask = answers.response
    with torch.no_grad():
        now, entropies = completion_log_probs(models.policy, answers, temperature=1.0, entropy="known")
        reference, _ = completion_log_probs(models.reference, answers, temperature=1.0)
        scores = torch.where(
            answers.finished, models.reward.score(answers.ids, answers.real), config.unfinished_score
        )
    expected, returns = [], []
    for row in range(16):
        kl = float((now[row] - reference[row])[mask[row]].sum())
        returns.append(float(scores[row]) - 0.3 * kl)
    for row in range(16):
        mine = [returns[n] for n in range(row - row % 4, row - row % 4 + 4) if n != row]
        base = {"mean": sum(returns) / 16, "leave-one-out": sum(mine) / 3, "none": 0.0}[baseline]
        expected.append(returns[row] - base)
    torch.testing.assert_close(rollout.returns, torch.tensor(returns), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(rollout.advantages, torch.tensor(expected), atol=1e-4, rtol=1e-5)

    batch = rollout.rows(torch.arange(16))
    outcome = step(models, batch, config)
    spoken = [float(now[row][mask[row]].sum()) for row in range(16)]
    loss = -sum(a * s for a, s in zip(expected, spoken, strict=True)) / 16 - 0.02 * float(
        entropies[mask].mean()
    )
    assert batch.weight == 16
    assert float(outcome.loss.detach()) / 16 == pytest.approx(loss, rel=1e-4)
    assert float(outcome.logged["ratio_gap"]) / 16 < 1e-5
    assert "explained_variance" not in logged and logged["beta"] == 0.3


def test_whitening_makes_the_score_s_unit_irrelevant(
    lively_gpt: Callable[..., GPT], lively_scalar: Callable[..., ScalarModel]
) -> None:
    models, config = RLModels(lively_gpt(1), lively_gpt(1), lively_scalar(3)), config_of(unfinished_score=0.0)
    answers = sample_completions(
        models.policy, PROMPTS * 4, end=5, max_new_tokens=10, temperature=1.0, seed_parts=(2,)
    )
    answers = replace(answers, finished=torch.ones(16, dtype=torch.bool))
    one, _ = score_rollouts(models, answers, 0.0, config)
    models.reward.scale.mul_(7.0)
    seven, _ = score_rollouts(models, answers, 0.0, config)
    torch.testing.assert_close(seven.advantages, one.advantages, atol=1e-4, rtol=1e-4)
    assert float(one.advantages.std(correction=0)) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.learns
@pytest.mark.parametrize("changes", [{}, {"baseline": "leave-one-out", "samples_per_prompt": 4}])
def test_a_planted_reward_rises(
    planted_bench: Any, tmp_path: Path, learnt: Any, changes: dict[str, Any]
) -> None:
    config = Config(
        **{name: getattr(LEARNING, name) for name in (*SHARED, "min_distinct")}
        | {"batch_size": 64, "minibatch_size": 64, **changes},
        optim=replace(LEARNING.optim, learning_rate=1e-2),
    )
    report = planted_bench.run(reinforce, config, tmp_path / "reinforce")
    rows = read_metrics(tmp_path / "reinforce" / "metrics.jsonl")
    learnt("gain", gain(rows), above=0.6)
    learnt("KL", report.facts["best"]["kl"], above=0.05)
    assert all(row["first_ratio_gap"] < 1e-4 for row in rows[:-1])
    assert not any("value_loss" in row or "explained_variance" in row for row in rows)
    assert (tmp_path / "reinforce" / str(report.model) / "model.safetensors").is_file()
    assert not (tmp_path / "reinforce" / str(report.model) / "critic.safetensors").exists()


def test_answers_to_one_prompt_stand_side_by_side(
    planted_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[list[int]]] = []
    real = reinforce.score_rollouts

    def watched(models: Any, answers: Any, beta: float, config: Any) -> Any:
        starts = answers.response.long().argmax(1)
        seen.append([row[:start].tolist() for row, start in zip(answers.ids, starts, strict=True)])
        return real(models, answers, beta, config)

    monkeypatch.setattr(reinforce, "score_rollouts", watched)
    config = replace(
        SMALL, iterations=1, batch_size=8, minibatch_size=8, samples_per_prompt=4, baseline="leave-one-out"
    )
    planted_bench.run(reinforce, config, tmp_path / "reinforce")
    for prompts in seen:
        assert prompts[0] == prompts[1] == prompts[3] != prompts[4] == prompts[7]
    assert seen[0][0] != seen[1][0] and seen[0][4] != seen[1][0]  # two prompts a round, none twice


@pytest.mark.parametrize(
    "settings",
    [
        {"baseline": "median"},
        {"baseline": "leave-one-out"},
        {"samples_per_prompt": 3},
        {"samples_per_prompt": 0},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Config(**settings)
