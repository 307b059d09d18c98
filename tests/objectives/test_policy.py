"""PPO's losses, rewards and measures against values worked by hand; after each, mistakes in its code that the
values tell. Advantages and REINFORCE: test_advantages.py."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from chatwright.objectives import policy
from support.mutation import Mutant, mutants


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


# The four corners of the clip, clip = 0.2, and a padding position that must not matter.
#   A = +1: r = 1.5 -> min(1.5, 1.2) = 1.2 (clipped)       r = 0.5 -> min(0.5, 0.8) = 0.5
#   A = -2: r = 1.5 -> min(-3.0, -2.4) = -3.0              r = 0.5 -> min(-1.0, -1.6) = -1.6 (clipped)
# mean (1.2 + 0.5 - 3.0 - 1.6) / 4 = -0.725
RATIO = torch.tensor([[1.5, 0.5, 1.5, 0.5, 4.0]])
SIGNED = torch.tensor([[1.0, 1.0, -2.0, -2.0, 5.0]])
FOUR = torch.tensor([[True, True, True, True, False]])
THREE = torch.tensor([[True, True, True, False, False]])
POLICY_LOSS = torch.tensor(0.725)


def check_policy_loss(module: ModuleType) -> None:
    old = torch.full_like(RATIO, -1.3)
    outcome = module.policy_loss(old + RATIO.log(), old, SIGNED, FOUR, clip=0.2)
    close(outcome.loss, POLICY_LOSS)
    close(outcome.fraction, torch.tensor(0.5))
    # of the first three, one is clipped
    outcome = module.policy_loss(RATIO.log(), torch.zeros_like(RATIO), SIGNED, THREE, clip=0.2)
    close(outcome.fraction, torch.tensor(1 / 3))


def test_policy_loss_clips_both_sides_for_both_signs() -> None:
    check_policy_loss(policy)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.5, 1.0, 1.2),
        (0.5, 1.0, 0.5),
        (1.5, -1.0, -1.5),
        (0.5, -1.0, -0.8),
        (1.1, 1.0, 1.1),
        (0.9, -1.0, -0.9),
    ],
)
def test_corners_of_the_policy_clip(ratio: float, advantage: float, expected: float) -> None:
    log_ratio = torch.tensor([[math.log(ratio)]], requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.bool)
    outcome = policy.policy_loss(log_ratio, torch.zeros(1, 1), torch.tensor([[advantage]]), one, clip=0.2)
    outcome.loss.backward()
    assert float(outcome.loss.detach()) == pytest.approx(-expected, abs=1e-6)
    clipped = expected not in (ratio * advantage,)
    # where clipped the objective is flat; else d(-r A) / d log r = -r A
    assert float(log_ratio.grad) == pytest.approx(0.0 if clipped else -ratio * advantage, abs=1e-6)
    assert float(outcome.fraction) == float(clipped)


def check_huge_ratio(module: ModuleType) -> None:
    """Outside the mask it leaves the gradient finite."""
    log_probs = torch.tensor([[0.0, 1000.0]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    module.policy_loss(log_probs, torch.zeros(1, 2), torch.ones(1, 2), mask).loss.backward()
    close(log_probs.grad, torch.tensor([[-1.0, 0.0]]))


WRONG_POLICY = mutants(
    policy.policy_loss,
    {
        "clipped without the minimum": ("torch.minimum(plain, clipped)", "clipped"),
        "maximum instead of minimum": ("torch.minimum", "torch.maximum"),
        "not clipped": ("torch.minimum(plain, clipped)", "plain"),
        "only from above": ("ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(max=1 + clip)"),
        "only from below": ("ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(min=1 - clip)"),
        "padding counted": (
            "torch.minimum(plain, clipped), mask",
            "torch.minimum(plain, clipped), mask | True",
        ),
        "mask off by one": (
            "torch.minimum(plain, clipped), mask",
            "torch.minimum(plain, clipped), mask.roll(1, 1)",
        ),
        "sign lost": ("-masked_mean(torch.minimum", "masked_mean(torch.minimum"),
        "ratio turned round": ("log_probs - old", "old - log_probs"),
        "logarithm not taken back": (".exp()", ""),
        "share of the other side": ("clipped < plain", "clipped > plain"),
    },
)


@pytest.mark.parametrize("mutant", WRONG_POLICY, ids=str)
def test_wrong_policy_losses_show(mutant: Mutant) -> None:
    mutant.must_fail(check_policy_loss)


def test_a_huge_ratio_outside_the_mask_leaves_the_gradient_finite() -> None:
    check_huge_ratio(policy)
    (unmasked,) = mutants(
        policy.policy_loss,
        {"ratio of all positions": ("torch.where(mask, log_probs - old, 0.0)", "(log_probs - old)")},
    )
    unmasked.must_fail(check_huge_ratio)


# Value clip, the old value 1 everywhere, clip = 0.2, so that the clipped value is 1.2 or 0.8.
#   V = 2, R =  0: max(4, 1.44) = 4           V = 2, R = 3: max(1, 3.24) = 3.24 (clipped)
#   V = 0, R = -1: max(1, 3.24) = 3.24 (cl.)  V = 0, R = 2: max(4, 1.44) = 4
# half the mean: (4 + 3.24 + 3.24 + 4) / 4 / 2 = 1.81
PREDICTED = torch.tensor([[2.0, 2.0, 0.0, 0.0, 50.0]])
RETURNS = torch.tensor([[0.0, 3.0, -1.0, 2.0, 0.0]])
OLD = torch.ones(1, 5)
VALUE_LOSS = torch.tensor(1.81)


def check_value_loss(module: ModuleType) -> None:
    outcome = module.value_loss(PREDICTED, OLD, RETURNS, FOUR, clip=0.2)
    close(outcome.loss, VALUE_LOSS)
    close(outcome.fraction, torch.tensor(0.5))
    # of the first three, two are clipped
    outcome = module.value_loss(PREDICTED, OLD, RETURNS, THREE, clip=0.2)
    close(outcome.fraction, torch.tensor(2 / 3))


def test_value_loss_clips_in_both_directions() -> None:
    check_value_loss(policy)


WRONG_VALUE = mutants(
    policy.value_loss,
    {
        "minimum instead of maximum": (
            "masked_mean(torch.maximum(plain, clipped)",
            "masked_mean(torch.minimum(plain, clipped)",
        ),
        "clipped alone": ("masked_mean(torch.maximum(plain, clipped)", "masked_mean(clipped"),
        "not clipped": ("masked_mean(torch.maximum(plain, clipped)", "masked_mean(plain"),
        "only from above": ("torch.maximum(values, old - clip)", "values"),
        "only from below": (
            "torch.minimum(torch.maximum(values, old - clip), old + clip)",
            "torch.maximum(values, old - clip)",
        ),
        "one half forgotten": ("0.5 * ", ""),
        "padding counted": (
            "torch.maximum(plain, clipped), mask",
            "torch.maximum(plain, clipped), mask | True",
        ),
        "clipped around the return": (
            "clipped = (near - returns)",
            "clipped = (values - returns).clamp(-clip, clip)",
        ),
        "not squared": ("(values - returns).square()", "(values - returns).abs()"),
        "share of the other side": ("clipped > plain", "clipped < plain"),
    },
)


@pytest.mark.parametrize("mutant", WRONG_VALUE, ids=str)
def test_wrong_value_losses_show(mutant: Mutant) -> None:
    mutant.must_fail(check_value_loss)


# KL: pi = 1/2 and pi_ref = 1/4 give k1 = ln 2, and with r = 1/2 k3 = (1/2 - 1) - ln(1/2) = ln 2 - 1/2.
LOG_PI, LOG_REF = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]])
K1, K3 = torch.tensor([[math.log(2)]]), torch.tensor([[math.log(2) - 0.5]])


def check_k1(module: ModuleType) -> None:
    close(module.kl_k1(LOG_PI, LOG_REF), K1)


def check_k3(module: ModuleType) -> None:
    close(module.kl_k3(LOG_PI, LOG_REF), K3)


def test_kl_estimators() -> None:
    check_k1(policy)
    check_k3(policy)


def test_k1_turned_round_shows() -> None:
    (mutant,) = mutants(policy.kl_k1, {"turned round": ("log_probs - reference", "reference - log_probs")})
    mutant.must_fail(check_k1)


WRONG_K3 = mutants(
    policy.kl_k3,
    {
        "wrong sign of the logarithm": ("- 1 - log_ratio", "- 1 + log_ratio"),
        "ratio turned round": ("log_ratio = reference - log_probs", "log_ratio = log_probs - reference"),
        "k2 instead": ("log_ratio.exp() - 1 - log_ratio", "0.5 * log_ratio.square()"),
        "k1 instead": ("log_ratio.exp() - 1 - log_ratio", "-log_ratio"),
        "one forgotten": ("- 1 -", "-"),
    },
)


@pytest.mark.parametrize("mutant", WRONG_K3, ids=str)
def test_wrong_k3_shows(mutant: Mutant) -> None:
    mutant.must_fail(check_k3)


Weights = st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4)


@given(Weights, Weights)
def test_both_estimators_have_the_divergence_as_their_mean(p: list[float], q: list[float]) -> None:
    pi, ref = (torch.tensor([row], dtype=torch.float64) for row in (p, q))
    pi, ref = pi / pi.sum(), ref / ref.sum()
    k1, k3 = policy.kl_k1(pi.log(), ref.log()), policy.kl_k3(pi.log(), ref.log())
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Categorical(pi), torch.distributions.Categorical(ref)
    )
    torch.testing.assert_close((pi * k1).sum(1), divergence, atol=1e-9, rtol=0)
    torch.testing.assert_close((pi * k3).sum(1), divergence, atol=1e-9, rtol=0)
    assert bool((k3 >= -1e-12).all())


@given(st.floats(-20, 0), st.floats(-20, 0))
def test_k3_is_never_negative(log_pi: float, log_ref: float) -> None:
    assert float(policy.kl_k3(torch.tensor([[log_pi]]), torch.tensor([[log_ref]]))) >= -1e-5


def check_entropy(module: ModuleType) -> None:
    # (1/2, 1/4, 1/4): 1/2 ln 2 + 2 * 1/4 ln 4 = 1.5 ln 2; a uniform one has ln 3
    logits = torch.stack((torch.tensor([0.5, 0.25, 0.25]).log() + 3, torch.zeros(3)))[None]
    close(module.entropy(logits), torch.tensor([[1.5 * math.log(2), math.log(3)]]))


def test_entropy() -> None:
    check_entropy(policy)


WRONG_ENTROPY = [
    *mutants(
        policy.entropy_of,
        {
            "sign lost": ("return -", "return "),
            "not weighted": ("log_p.exp() * log_p", "log_p"),
            "averaged": (".sum(-1)", ".mean(-1)"),
        },
    ),
    *mutants(policy.entropy, {"logits not normalised": (".log_softmax(-1)", "")}),
]


@pytest.mark.parametrize("mutant", WRONG_ENTROPY, ids=str)
def test_wrong_entropy_shows(mutant: Mutant) -> None:
    mutant.must_fail(check_entropy)


def check_end_positions(module: ModuleType) -> None:
    mask = torch.tensor(
        [
            [False, True, True, False, False],
            [False, False, False, True, True],
            [True, False, False, False, False],
            [False, False, True, False, False],
            [False, False, False, False, False],
        ]
    )
    assert module.end_positions(mask).nonzero().tolist() == [[0, 2], [1, 4], [2, 0], [3, 2]]


def test_end_positions() -> None:
    check_end_positions(policy)


WRONG_ENDS = mutants(
    policy.end_positions,
    {
        "the first one": ("mask.flip(1).long().cumsum(1).flip(1)", "mask.long().cumsum(1)"),
        "outside the mask": ("mask & (later == 1)", "later == 1"),
        "one early": ("later == 1", "later == 2"),
        "the last column": (
            "mask & (later == 1)",
            "mask & (torch.arange(mask.shape[1]) == mask.shape[1] - 1)",
        ),
    },
)


@pytest.mark.parametrize("mutant", WRONG_ENDS, ids=str)
def test_wrong_ends_show(mutant: Mutant) -> None:
    mutant.must_fail(check_end_positions)


# Rewards per token: beta 0.1, log(pi / pi_ref) = 0.5, -0.25, 1.0 on the answer, score 2:
# -0.05, 0.025, -0.1 + 2 = 1.9; prompt and padding get nothing
RESPONSE = torch.tensor([[False, True, True, True, False]])
LOG_RATIO = torch.tensor([[3.0, 0.5, -0.25, 1.0, 3.0]])
TOKEN_REWARDS = torch.tensor([[0.0, -0.05, 0.025, 1.9, 0.0]])


def check_token_rewards(module: ModuleType) -> None:
    reference = torch.full_like(LOG_RATIO, -2.0)
    found = module.token_rewards(torch.tensor([2.0]), LOG_RATIO + reference, reference, RESPONSE, beta=0.1)
    close(found, TOKEN_REWARDS)


def test_the_score_is_paid_at_the_end_token() -> None:
    check_token_rewards(policy)


WRONG_REWARDS = mutants(
    policy.token_rewards,
    {
        "score in the last column": (
            "end_positions(mask)",
            "torch.arange(mask.shape[1]).expand_as(mask) == mask.shape[1] - 1",
        ),
        "score on every token": ("end_positions(mask)", "mask"),
        "score at the first token": ("end_positions(mask)", "end_positions(mask.flip(1)).flip(1)"),
        "score not paid": ("penalty + torch.where(end_positions(mask), scores[:, None], 0.0)", "penalty"),
        "KL rewarded": ("-beta * ", "beta * "),
        "KL of the padding as well": (
            "torch.where(mask, -beta * kl_k1(log_probs, reference), 0.0)",
            "-beta * kl_k1(log_probs, reference)",
        ),
        "k3 for k1": ("kl_k1", "kl_k3"),
        "no penalty at the end": ("return penalty +", "return penalty * ~end_positions(mask) +"),
    },
)


@pytest.mark.parametrize("mutant", WRONG_REWARDS, ids=str)
def test_wrong_token_rewards_show(mutant: Mutant) -> None:
    mutant.must_fail(check_token_rewards)


def check_next_beta(module: ModuleType) -> None:
    # KL 9 against 6: error 0.5, cut to 0.2: 0.1 * (1 + 0.2 * 64 / 320) = 0.104
    assert module.next_beta(0.1, 9.0, target=6.0, episodes=64, horizon=320) == pytest.approx(0.104)
    # KL 5.7: error -0.05: 0.1 * (1 - 0.05 * 64 / 320) = 0.099
    assert module.next_beta(0.1, 5.7, target=6.0, episodes=64, horizon=320) == pytest.approx(0.099)
    assert module.next_beta(0.1, -4.0, target=6.0, episodes=64, horizon=320) == pytest.approx(0.096)
    assert module.next_beta(0.1, 0.0, target=6.0, episodes=64, horizon=320, floor=0.1) == 0.1


def test_next_beta() -> None:
    check_next_beta(policy)


WRONG_BETA = mutants(
    policy.next_beta,
    {
        "error not cut": ("min(max(kl / target - 1.0, -0.2), 0.2)", "kl / target - 1.0"),
        "cut from above alone": ("max(kl / target - 1.0, -0.2)", "kl / target - 1.0"),
        "cut from below alone": ("min(max(kl / target - 1.0, -0.2), 0.2)", "max(kl / target - 1.0, -0.2)"),
        "no horizon": ("error * episodes / horizon", "error"),
        "wrong sign": ("1.0 + error", "1.0 - error"),
        "horizon turned round": ("episodes / horizon", "horizon / episodes"),
        "no floor": (
            "max(floor, beta * (1.0 + error * episodes / horizon))",
            "beta * (1.0 + error * episodes / horizon)",
        ),
    },
)


@pytest.mark.parametrize("mutant", WRONG_BETA, ids=str)
def test_wrong_betas_show(mutant: Mutant) -> None:
    mutant.must_fail(check_next_beta)


def check_explained_variance(module: ModuleType) -> None:
    mask = torch.tensor([[True, True, True, True, False]])
    returns = torch.tensor([[1.0, 2.0, 3.0, 4.0, 1e6]])

    def of(*values: float) -> float:
        found: float = module.explained_variance(torch.tensor([[*values, -1e6]]), returns, mask)
        return found

    # errors 0, 0, 0, 1 have variance 0.25, the returns 5/3: 1 - 0.15 = 0.85
    assert of(1.0, 2.0, 3.0, 3.0) == pytest.approx(0.85)
    assert of(1.0, 2.0, 3.0, 4.0) == pytest.approx(1.0)
    assert of(3.0, 4.0, 5.0, 6.0) == pytest.approx(1.0)  # a constant error is no variance
    assert of(7.0, 7.0, 7.0, 7.0) == pytest.approx(0.0)
    # turned round, the errors are -3, -1, 1, 3 with variance 20/3: 1 - 4 = -3
    assert of(4.0, 3.0, 2.0, 1.0) == pytest.approx(-3.0)


def test_explained_variance() -> None:
    check_explained_variance(policy)


WRONG_VARIANCE = mutants(
    policy.explained_variance,
    {
        "squares instead of variances": (
            "1 - error.var() / target.var()",
            "1 - error.square().mean() / target.square().mean()",
        ),
        "turned round": ("error.var() / target.var()", "target.var() / error.var()"),
        "not taken from one": ("1 - error.var()", "error.var()"),
        "padding counted": (
            "returns[mask], (returns - values)[mask]",
            "returns.flatten(), (returns - values).flatten()",
        ),
    },
)


@pytest.mark.parametrize("mutant", WRONG_VARIANCE, ids=str)
def test_wrong_explained_variance_shows(mutant: Mutant) -> None:
    mutant.must_fail(check_explained_variance)


def test_explained_variance_of_too_little_is_zero() -> None:
    one = torch.tensor([[True, False]])
    assert policy.explained_variance(torch.zeros(1, 2), torch.ones(1, 2), one) == 0.0
    both = torch.ones(1, 2, dtype=torch.bool)
    assert policy.explained_variance(torch.zeros(1, 2), torch.ones(1, 2), both) == 0.0
