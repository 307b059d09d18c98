"""Each rule of the watch over PPO: broken by a planted history, and silent on a healthy one."""

from __future__ import annotations

import pytest

from chatwright.train.health import WATCHED, diagnose

HEALTHY = {
    "score": 0.2, "kl": 2.0, "kl_error": 0.3, "entropy": 2.5, "explained_variance": 0.2, "length": 14.0,
    "finished": 0.9, "sampler_gap": 1e-5, "tokens": 900.0, "distinct_2": 0.7,
}  # fmt: skip


def history(rounds: int, **changes: float) -> list[dict[str, float]]:
    """Healthy rounds; the last `rounds` of twenty changed."""
    return [HEALTHY] * (20 - rounds) + [{**HEALTHY, **changes}] * rounds


def test_a_healthy_run_goes_on_from_its_first_round() -> None:
    assert set(WATCHED) == set(HEALTHY)
    for length in range(1, 21):
        assert diagnose([HEALTHY] * length, kl_budget=10.0) is None


BROKEN = [
    # rounds it takes, what is wrong, words of the diagnosis, fatal, the same at the edge of what is allowed
    (1, {"sampler_gap": 0.02}, "sampler and trainer disagree", True, {"sampler_gap": 0.009}),
    (1, {"kl": -2.0, "kl_error": 0.1}, "clearly negative", True, {"kl": -2.0, "kl_error": 0.6}),
    (1, {"kl": -2.0, "kl_error": 0.1}, "clearly negative", True, {"kl": -0.4, "kl_error": 0.01}),
    (1, {"kl": -2.0, "kl_error": 0.1}, "clearly negative", True, {"kl": -2.0, "kl_error": 0.1, "tokens": 400.0}),
    (1, {"kl": 10.1}, "beyond the budget of 10 nats", False, {"kl": 9.9}),
    (3, {"entropy": 0.05}, "collapse", False, {"entropy": 0.11}),
    (3, {"finished": 0.01}, "comes to its end", False, {"finished": 0.03}),
    (5, {"explained_variance": -1.5}, "critic", False, {"explained_variance": -0.9}),
]


@pytest.mark.parametrize(("rounds", "wrong", "words", "fatal", "edge"), BROKEN, ids=lambda value: str(value))
def test_each_rule(rounds: int, wrong: dict[str, float], words: str, fatal: bool, edge: dict[str, float]) -> None:
    found = diagnose(history(rounds, **wrong), kl_budget=10.0)
    assert found is not None and words in found.text and found.fatal is fatal
    if rounds > 1:  # a shorter spell is let pass
        assert diagnose(history(rounds - 1, **wrong), kl_budget=10.0) is None
    assert diagnose(history(rounds, **edge), kl_budget=10.0) is None


def test_a_spell_that_is_over_does_not_count() -> None:
    for rounds, wrong in ((3, {"entropy": 0.05}), (3, {"finished": 0.0}), (5, {"explained_variance": -9.0})):
        assert diagnose([*history(rounds, **wrong), HEALTHY], kl_budget=10.0) is None


def test_a_young_critic_may_be_wrong() -> None:
    assert diagnose([{**HEALTHY, "explained_variance": -9.0}] * 14, kl_budget=10.0) is None
    assert diagnose([{**HEALTHY, "explained_variance": -9.0}] * 15, kl_budget=10.0) is not None


def test_numbers_that_cannot_be_trusted_come_first() -> None:
    found = diagnose([{**HEALTHY, "kl": 99.0, "sampler_gap": 1.0}], kl_budget=10.0)
    assert found is not None and found.fatal
