"""Losses and advantages are TRL's on the same tensors, within 1e-6 in float32.

Always compared with tests/parity/trl_golden.json, which scripts/trl_parity.py wrote in an environment that
has TRL (the file names its version and the command). With CHATWRIGHT_TRL_PYTHON, the Python of such an
environment, TRL itself is asked again.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chatwright.objectives import policy
from chatwright.objectives.preference import bradley_terry_loss

ROOT = Path(__file__).parent.parent.parent
GOLDEN = json.loads((ROOT / "tests" / "parity" / "trl_golden.json").read_text(encoding="utf-8"))
GIVEN = {name: torch.tensor(value) for name, value in GOLDEN["inputs"].items()}
THEIRS = {name: torch.tensor(value) for name, value in GOLDEN["answers"].items()}
SET = GOLDEN["settings"]
MASK = GIVEN["mask"]
FULL = GOLDEN["full"]
"""Rows without padding at their end. With whitened rewards TRL 0.11.4 leaves a reward of mean - mean /
deviation on padding, which the advantages carry into the answers before it; ours is 0 there. So whitened
rewards are compared on these rows."""


def ours(
    discount: float = SET["discount"], lam: float = SET["lam"], clip: float = SET["clip"], sign: float = 1.0
) -> dict[str, Any]:
    """Everything that TRL was asked for, by our functions. TRL divides variances by n - 1."""
    rewards = policy.token_rewards(
        GIVEN["scores"], GIVEN["old_log_probs"], GIVEN["reference"], MASK, beta=SET["beta"]
    )
    result: dict[str, Any] = {"rewards": rewards}
    for name, rows in (("", list(range(5))), ("_whitened_rewards", FULL)):
        mask, values, given = MASK[rows], GIVEN["old_values"][rows], rewards[rows]
        if name:
            given = policy.whiten(given, mask, shift_mean=False, correction=1)
        raw = policy.generalized_advantages(given, values, mask, discount=discount, lam=lam)
        result[f"returns{name}"], result[f"advantages{name}"] = (
            raw + values,
            policy.whiten(raw, mask, correction=1),
        )
    result["whitened"] = policy.whiten(GIVEN["values"], MASK, correction=1)
    result["whitened_mean_kept"] = policy.whiten(GIVEN["values"], MASK, shift_mean=False, correction=1)
    actor = policy.policy_loss(
        GIVEN["log_probs"], GIVEN["old_log_probs"], sign * result["advantages"], MASK, clip=clip
    )
    critic = policy.value_loss(
        GIVEN["values"], GIVEN["old_values"], result["returns"], MASK, clip=SET["value_clip"]
    )
    moved = policy.masked_mean((GIVEN["log_probs"] - GIVEN["old_log_probs"]).square(), MASK)
    pairs = torch.stack((GIVEN["chosen"], GIVEN["rejected"]), 1)
    order = torch.tensor([[1.0, 0.0]]).expand(6, 2)
    lead = torch.zeros(6, 2, 2)
    lead[:, 0, 1] = GIVEN["margin"]
    betas, beta = [], SET["beta"]
    for kl in (9.0, 6.5, 2.0):
        beta = policy.next_beta(beta, kl, target=SET["kl_target"], episodes=64, horizon=SET["kl_horizon"])
        betas.append(beta)
    return result | {
        "policy_loss": actor.loss,
        "clip_fraction": actor.fraction,
        "value_clip_fraction": critic.fraction,
        "value_loss_weighted": SET["value_coefficient"] * critic.loss,
        "approximate_kl": 0.5 * moved,
        "entropy": policy.entropy(GIVEN["logits"]),
        "betas": torch.tensor(betas),
        "reward_loss": bradley_terry_loss(pairs, order) / 6,  # ours is a sum over prompts
        "reward_loss_margin": bradley_terry_loss(pairs, order, margin=lead) / 6,
    }


def difference(name: str, found: Tensor) -> float:
    """The largest difference from TRL's, on answer tokens where the value is one per token: outside of them
    TRL leaves what comes out, we leave 0."""
    gap = (found - THEIRS[name]).abs()
    for mask in (MASK, MASK[FULL]):
        if gap.shape == mask.shape:
            return float(gap[mask].max())
    return float(gap.max())


def test_everything_is_compared() -> None:
    assert set(ours()) == set(THEIRS)
    assert GOLDEN["trl"] and GOLDEN["command"]
    for name in ("clip_fraction", "value_clip_fraction"):
        assert 0.1 < float(THEIRS[name]) < 0.9  # both sides of both clips are met
    ratio = (GIVEN["log_probs"] - GIVEN["old_log_probs"]).exp()[MASK]
    assert bool((ratio > 1.2).any()) and bool((ratio < 0.8).any())


@pytest.mark.parametrize("name", list(THEIRS))
def test_our_numbers_are_trls(name: str) -> None:
    assert difference(name, ours()[name]) <= 1e-6


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("advantages", {"lam": 0.95}),
        ("returns", {"discount": 1.0}),
        ("policy_loss", {"clip": 0.25}),
        ("policy_loss", {"sign": -1.0}),
    ],
)
def test_a_change_of_ours_would_show(name: str, changed: dict[str, float]) -> None:
    assert difference(name, ours(**changed)[name]) > 1e-3


def test_without_bessels_correction_it_would_show() -> None:
    assert difference("whitened", policy.whiten(GIVEN["values"], MASK)) > 1e-3


def test_trl_says_the_same_today() -> None:
    python = os.environ.get("CHATWRIGHT_TRL_PYTHON")
    if not python:
        pytest.skip(
            "TRL itself was not asked: set CHATWRIGHT_TRL_PYTHON to a Python that has it "
            "(scripts/trl_parity.py says how)"
        )
    done = subprocess.run(
        [python, str(ROOT / "scripts" / "trl_parity.py"), "--print"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["trl"] == GOLDEN["trl"]
    for name, value in said["answers"].items():
        assert difference(name, torch.tensor(value)) <= 1e-6, name
