"""The examples' learnt numbers are the closed form's, and their scripts print both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import bandit
import chain
import pytest
import torch

EXAMPLES = Path(bandit.__file__).parent


def test_the_bandits_closed_form_is_the_best_there_is() -> None:
    """Against 2,000 policies near it and far from it: none earns more, and itself it earns beta log Z."""
    exact = bandit.best()
    assert bandit.value_of(exact.policy) == pytest.approx(exact.earns, abs=1e-6)
    draw = torch.Generator().manual_seed(1)
    for size in (0.05, 1.0):
        for _ in range(1000):
            other = (exact.policy.log() + size * torch.randn(6, generator=draw)).softmax(0)
            assert bandit.value_of(other) < exact.earns


@pytest.mark.parametrize("method", ["reinforce", "ppo"])
def test_bandit(method: str) -> None:
    """Within 0.01, which is sampling noise: some 100,000 pulls at the small rates of the end, with noise in
    what they pay."""
    exact, found = bandit.best(), bandit.learn(method)
    assert float((found.policy - exact.policy).abs().max()) < 0.01
    assert exact.earns - 1e-3 < found.earns <= exact.earns + 1e-6
    assert exact.earns - bandit.value_of(bandit.REFERENCE) > 0.2  # there was something to learn


def test_the_chains_equations() -> None:
    torch.testing.assert_close(chain.values_at_random(), torch.arange(1, 6) / 6)
    values, right = chain.best()
    beyond = torch.cat((torch.zeros(1), values, torch.ones(1)))
    soft = chain.BETA * (0.5 * (beyond[:-2] / chain.BETA).exp() + 0.5 * (beyond[2:] / chain.BETA).exp()).log()
    torch.testing.assert_close(values, soft)
    torch.testing.assert_close(right, 0.5 * ((beyond[2:] - values) / chain.BETA).exp())
    torch.testing.assert_close(1 - right, 0.5 * ((beyond[:-2] - values) / chain.BETA).exp())


@pytest.mark.parametrize("method", ["reinforce", "ppo"])
def test_chain(method: str) -> None:
    """Within 0.01, which is sampling noise; PPO's critic within 0.002: near the best policy every walk's
    return is the same."""
    values, right = chain.best()
    found = chain.learn(method)
    assert float((found.right - right).abs().max()) < 0.01
    if method == "ppo":
        assert float((found.values - values).abs().max()) < 2e-3


def test_the_critic_meets_bellman_on_the_walk_at_random() -> None:
    """Within 0.01: a walk pays 0 or 1, and some 40,000 of them at the small rates of the end leave 0.003."""
    assert float((chain.critic_at_random() - chain.values_at_random()).abs().max()) < 0.01


@pytest.mark.parametrize("name", [pytest.param("bandit", marks=pytest.mark.slow), "chain"])
def test_the_script_prints_both(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert "ppo" in done.stdout and "####" in done.stdout and len(done.stdout.splitlines()) >= 7
