"""PPO's arithmetic: the first minibatch is exact, looking back and the loss are what the formulas say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from chatwright.model.gpt import GPT
from chatwright.model.heads import ScalarModel
from chatwright.objectives import policy as objective
from chatwright.stages.ppo import Config, Rollout, score_rollouts, step
from chatwright.train.rl.models import RLModels, make_models
from chatwright.train.rl.rollout import (
    completion_log_probs,
    degenerate,
    sample_completions,
    values_before,
)

END = 5
PROMPTS = [[7, 8, 9], [11], [20, 21, 22, 23, 24, 25, 26, 27, 28], [40, 41]] * 4


def models_of(lively_gpt: Callable[..., GPT], lively_scalar: Callable[..., ScalarModel]) -> RLModels:
    """Policy and reference differ, so that there is a KL; the critic is none of the others."""
    return RLModels(lively_gpt(1), lively_gpt(2), lively_scalar(3), lively_scalar(4))


def config_of(**changes: Any) -> Config:
    settings = {
        "batch_size": 16,
        "minibatch_size": 4,
        "max_new_tokens": 10,
        "min_tokens": 0,
        "max_repeats": 1.0,
    }
    return Config(**{**settings, **changes})


def round_of(models: RLModels, config: Config) -> tuple[Rollout, dict[str, float]]:
    answers = sample_completions(
        models.policy,
        PROMPTS,
        end=END,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed_parts=(3, "ppo"),
    )
    return score_rollouts(models, answers, 0.1, config)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_minibatch_has_ratio_one_and_the_loss_of_its_advantages(
    lively_gpt: Callable[..., GPT], lively_scalar: Callable[..., ScalarModel], temperature: float
) -> None:
    models, config = models_of(lively_gpt, lively_scalar), config_of(temperature=temperature)
    rollout, logged = round_of(models, config)
    assert logged["sampler_gap"] < 1e-4
    for chosen in torch.arange(16).split(4):
        batch = rollout.rows(chosen)
        outcome = step(models, batch, config)
        mask = batch.answers.response
        ratio = (
            completion_log_probs(models.policy, batch.answers, temperature=temperature)[0] - batch.log_probs
        )
        assert float((ratio.detach().exp() - 1).abs().max()) < 1e-5
        seen = {key: float(value) / batch.weight for key, value in outcome.logged.items()}
        assert seen["ratio"] == pytest.approx(1.0, abs=1e-5)
        assert seen["clip_fraction"] == 0.0 and seen["moved"] < 1e-8
        assert seen["policy_loss"] == pytest.approx(-float(batch.advantages[mask].mean()), abs=1e-5)
        # values have not moved either: half the mean square of advantages before they were whitened
        error = (batch.values - batch.returns)[mask].square().mean()
        assert seen["value_loss"] == pytest.approx(0.5 * float(error), rel=1e-4)
        total = seen["policy_loss"] + config.value_coefficient * seen["value_loss"]
        assert float(outcome.loss.detach()) / batch.weight == pytest.approx(total, abs=1e-5)
    assert float(rollout.advantages[rollout.answers.response].mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(rollout.advantages[rollout.answers.response].var(correction=0)) == pytest.approx(
        1.0, abs=1e-4
    )


def test_a_trainer_at_another_temperature_would_show_in_the_first_ratio(
    lively_gpt: Callable[..., GPT], lively_scalar: Callable[..., ScalarModel]
) -> None:
    models = models_of(lively_gpt, lively_scalar)
    rollout, _ = round_of(models, config_of(temperature=0.7))
    outcome = step(models, rollout, config_of(temperature=1.0))
    assert abs(float(outcome.logged["ratio"]) / rollout.weight - 1.0) > 0.01


@torch.no_grad()
def test_looking_back_is_what_the_formulas_say(
    lively_gpt: Callable[..., GPT], lively_scalar: Callable[..., ScalarModel]
) -> None:
    models, config = (
        models_of(lively_gpt, lively_scalar),
        config_of(unfinished_score=-7.0, lam=0.9, discount=0.97),
    )
    rollout, logged = round_of(models, config)
    answers, mask = rollout.answers, rollout.answers.response
    assert torch.equal(rollout.scores == -7.0, ~answers.finished)
    judged = models.reward.score(answers.ids, answers.real)
    assert torch.equal(rollout.scores[answers.finished], judged[answers.finished])
    reference, _ = completion_log_probs(models.reference, answers, temperature=1.0)
    torch.testing.assert_close(rollout.reference, reference)
    torch.testing.assert_close(rollout.values, values_before(models.critic, answers))
    # the first row by hand, from the end
    (places,) = mask[0].nonzero(as_tuple=True)
    following = next_value = 0.0
    raw = {}
    for t in reversed(places.tolist()):
        reward = -0.1 * float(rollout.log_probs[0, t] - reference[0, t]) + (
            float(rollout.scores[0]) if not raw else 0.0
        )
        following = reward + 0.97 * next_value - float(rollout.values[0, t]) + 0.97 * 0.9 * following
        next_value, raw[t] = float(rollout.values[0, t]), following
    for t, advantage in raw.items():
        assert float(rollout.returns[0, t] - rollout.values[0, t]) == pytest.approx(advantage, abs=1e-3)
    kl = ((rollout.log_probs - reference) * mask).sum(1)
    assert logged["kl"] == pytest.approx(float(kl.mean()), abs=1e-4)
    assert logged["kl_error"] == pytest.approx(float(kl.std()) / 4.0, abs=1e-4)  # sqrt(16) answers
    assert logged["kl"] > 0.5 and logged["kl_k3"] > 0
    assert logged["tokens"] == rollout.weight and logged["length"] == rollout.weight / 16
    assert logged["finished"] == pytest.approx(float(answers.finished.float().mean()))


@torch.no_grad()
def test_degenerate_answers_get_the_fixed_score(
    lively_gpt: Callable[..., GPT], lively_scalar: Callable[..., ScalarModel]
) -> None:
    models = models_of(lively_gpt, lively_scalar)
    end_rich = replace(config_of(), min_tokens=3, unfinished_score=-7.0)
    with torch.no_grad():
        models.policy.head.weight[END] *= 8  # it ends early now and then
    rollout, logged = round_of(models, end_rich)
    poor = degenerate(rollout.answers, min_tokens=3, max_repeats=1.0) | ~rollout.answers.finished
    short = degenerate(rollout.answers, min_tokens=3, max_repeats=1.0) & rollout.answers.finished
    assert bool(short.any()) and not bool(poor.all())
    assert torch.equal(rollout.scores == -7.0, poor)
    assert logged["degenerate"] == pytest.approx(float(poor.float().mean()))


@torch.no_grad()
def test_whitened_rewards_keep_their_mean(
    lively_gpt: Callable[..., GPT], lively_scalar: Callable[..., ScalarModel]
) -> None:
    models = models_of(lively_gpt, lively_scalar)
    plain, _ = round_of(models, config_of(lam=1.0))
    white, _ = round_of(models, config_of(lam=1.0, whiten_rewards=True))
    mask = plain.answers.response
    rewards = objective.token_rewards(plain.scores, plain.log_probs, plain.reference, mask, beta=0.1)
    expected = torch.where(
        mask, (rewards - rewards[mask].mean()) / rewards[mask].std(correction=0) + rewards[mask].mean(), 0.0
    )
    # with lambda 1 the return of an answer's first token is the sum of its rewards
    first = mask & (mask.long().cumsum(1) == 1)
    torch.testing.assert_close(white.returns[first], expected.sum(1), atol=1e-3, rtol=1e-4)
    assert float((white.returns - plain.returns)[first].abs().max()) > 0.1


def test_the_entropy_bonus_is_subtracted(
    lively_gpt: Callable[..., GPT], lively_scalar: Callable[..., ScalarModel]
) -> None:
    models = models_of(lively_gpt, lively_scalar)
    rollout, logged = round_of(models, config_of())
    with torch.no_grad():
        without = step(models, rollout, config_of()).loss / rollout.weight
        with_bonus = step(models, rollout, config_of(entropy_coefficient=0.5)).loss / rollout.weight
    assert float(without - with_bonus) == pytest.approx(0.5 * logged["entropy"], abs=1e-4)


def test_only_policy_and_critic_are_trained(
    sft_parts: Callable[[], Any], lively_scalar: Callable[..., ScalarModel]
) -> None:
    base = sft_parts()
    reward = lively_scalar(
        5, vocab_size=base.model.config.vocab_size, layers=1
    )  # of another shape than the policy
    models = make_models(base, reward, "separate")
    assert models.policy is base.model
    trained = {True: (models.policy, models.critic), False: (models.reference, models.reward)}
    for flag, group in trained.items():
        for model in group:
            assert all(parameter.requires_grad is flag for parameter in model.parameters())
            assert not model.training  # no dropout, anywhere
    for a, b in zip(models.policy.parameters(), models.reference.parameters(), strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        torch.testing.assert_close(models.critic(ids), reward(ids))
    assert models.critic.scalar.weight.data_ptr() != reward.scalar.weight.data_ptr()
