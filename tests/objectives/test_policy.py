"""Policy-gradient objectives against values worked by hand; after each, wrong variants that must not give the
value."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from chatwright.objectives import policy

Wrong = dict[str, Callable[[], Tensor]]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def differs(wrong: Tensor, expected: Tensor) -> bool:
    return not torch.allclose(wrong, expected, atol=1e-2, rtol=0)


# Whitening: the values 1, 3, 5, 7 inside the mask have mean 4 and variance (9 + 1 + 1 + 9) / 4 = 5.
VALUES = torch.tensor([[1.0, 3.0, 100.0], [-50.0, 5.0, 7.0]])
INSIDE = torch.tensor([[True, True, False], [False, True, True]])
A, B = 3 / math.sqrt(5), 1 / math.sqrt(5)
WHITE = torch.tensor([[-A, -B, 0.0], [0.0, B, A]])
WHITE_KEPT = torch.tensor([[4 - A, 4 - B, 0.0], [0.0, 4 + B, 4 + A]])


def test_whitening_over_a_mask() -> None:
    close(policy.whiten(VALUES, INSIDE), WHITE)
    close(policy.whiten(VALUES, INSIDE, shift_mean=False), WHITE_KEPT)


def test_masked_mean() -> None:
    close(policy.masked_mean(VALUES, INSIDE), torch.tensor(4.0))
    close(policy.masked_mean(VALUES, torch.zeros_like(INSIDE)), torch.tensor(0.0))
    close(
        policy.masked_mean(torch.tensor([[1.0, math.nan]]), torch.tensor([[True, False]])), torch.tensor(1.0)
    )


def _white(mean: Tensor, variance: Tensor, shift: float = 0.0) -> Tensor:
    return torch.where(INSIDE, (VALUES - mean) / variance.sqrt() + shift, 0.0)


WRONG_WHITE: Wrong = {
    "over all positions": lambda: _white(VALUES.mean(), VALUES.var(correction=0)),
    "sample variance": lambda: _white(torch.tensor(4.0), torch.tensor(20 / 3)),
    "variance not rooted": lambda: _white(torch.tensor(4.0), torch.tensor(25.0)),
    "row by row": lambda: torch.tensor([[-1.0, 1.0, 0.0], [0.0, -1.0, 1.0]]),
    "mean kept": lambda: WHITE_KEPT,
    "outside not zero": lambda: (VALUES - 4) / math.sqrt(5),
}


@pytest.mark.parametrize("wrong", WRONG_WHITE)
def test_wrong_whitening_shows(wrong: str) -> None:
    assert differs(WRONG_WHITE[wrong](), WHITE)


@given(st.lists(st.floats(-100, 100), min_size=3, max_size=12).filter(lambda row: max(row) - min(row) > 1))
def test_whitened_values_have_mean_zero_and_variance_one(row: list[float]) -> None:
    values = torch.tensor([[*row, 1e6]], dtype=torch.float64)
    mask = torch.tensor([[True] * len(row) + [False]])
    white = policy.whiten(values, mask)[mask]
    assert float(white.mean()) == pytest.approx(0, abs=1e-6)
    assert float(white.var(correction=0)) == pytest.approx(1, abs=1e-6)


# Advantages, discount 0.5, lambda 0.5. First row: prompt, prompt, three answer tokens, padding. Second row:
# prompt, two answer tokens, padding. Numbers outside the answers (4, 7, 9) must not matter.
REWARDS = torch.tensor([[9.0, 9.0, 1.0, 0.0, 2.0, 9.0], [7.0, 0.0, 1.0, 7.0, 7.0, 7.0]])
CRITIC = torch.tensor([[9.0, 9.0, 0.5, 1.0, 0.25, 4.0], [7.0, 2.0, 3.0, 4.0, 4.0, 4.0]])
ANSWER = torch.tensor([[False, False, True, True, True, False], [False, True, True, False, False, False]])
# first row, from the end: delta = 2 - 0.25 = 1.75                    A = 1.75
#                          delta = 0 + 0.5 * 0.25 - 1 = -0.875       A = -0.875 + 0.25 * 1.75 = -0.4375
#                          delta = 1 + 0.5 * 1 - 0.5 = 1             A = 1 + 0.25 * -0.4375 = 0.890625
# second row:              delta = 1 - 3 = -2                        A = -2
#                          delta = 0 + 0.5 * 3 - 2 = -0.5            A = -0.5 + 0.25 * -2 = -1
ADVANTAGES = torch.tensor([[0.0, 0.0, 0.890625, -0.4375, 1.75, 0.0], [0.0, -1.0, -2.0, 0.0, 0.0, 0.0]])


def test_generalized_advantages() -> None:
    close(policy.generalized_advantages(REWARDS, CRITIC, ANSWER, discount=0.5, lam=0.5), ADVANTAGES)


def _gae(*, bootstrap: bool = False, leak: bool = False, discount: float = 0.5, lam: float = 0.5) -> Tensor:
    """Advantages with a choice of mistakes: the value after the end used, or the sum carried across the
    mask's end."""
    result = torch.zeros_like(REWARDS)
    following = torch.zeros(2)
    for t in reversed(range(6)):
        after = CRITIC[:, t + 1] if t < 5 else torch.zeros(2)
        if not bootstrap and t < 5:
            after = torch.where(ANSWER[:, t + 1], after, 0.0)
        delta = REWARDS[:, t] + discount * after - CRITIC[:, t]
        following = delta + discount * lam * following
        if not leak:
            following = torch.where(ANSWER[:, t], following, 0.0)
        result[:, t] = torch.where(ANSWER[:, t], following, 0.0)
    return result


WRONG_GAE: Wrong = {
    "value beyond the end used": lambda: _gae(bootstrap=True),
    "sum leaks over the mask's end": lambda: _gae(leak=True),
    "lambda not used": lambda: _gae(lam=1.0),
    "discount not used": lambda: _gae(discount=1.0),
    "only one step": lambda: _gae(lam=0.0),
    "returns instead": lambda: ADVANTAGES + torch.where(ANSWER, CRITIC, 0.0),
}


@pytest.mark.parametrize("wrong", WRONG_GAE)
def test_wrong_advantages_show(wrong: str) -> None:
    close(_gae(), ADVANTAGES)  # without its mistakes the variant is right
    assert differs(WRONG_GAE[wrong](), ADVANTAGES)


@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=8))
def test_with_lambda_one_the_advantage_is_the_return_less_the_value(steps: list[tuple[float, float]]) -> None:
    rewards, values = (torch.tensor([column], dtype=torch.float64) for column in zip(*steps, strict=True))
    mask = torch.ones_like(rewards, dtype=torch.bool)
    found = policy.generalized_advantages(rewards, values, mask, discount=1.0, lam=1.0)
    torch.testing.assert_close(found, rewards.flip(1).cumsum(1).flip(1) - values)


# The four corners of the clip, clip = 0.2, and a padding position that must not matter.
#   A = +1: r = 1.5 -> min(1.5, 1.2) = 1.2 (clipped)       r = 0.5 -> min(0.5, 0.8) = 0.5
#   A = -2: r = 1.5 -> min(-3.0, -2.4) = -3.0              r = 0.5 -> min(-1.0, -1.6) = -1.6 (clipped)
# mean (1.2 + 0.5 - 3.0 - 1.6) / 4 = -0.725
RATIO = torch.tensor([[1.5, 0.5, 1.5, 0.5, 4.0]])
SIGNED = torch.tensor([[1.0, 1.0, -2.0, -2.0, 5.0]])
FOUR = torch.tensor([[True, True, True, True, False]])
POLICY_LOSS = torch.tensor(0.725)


def test_policy_loss_clips_both_sides_for_both_signs() -> None:
    old = torch.full_like(RATIO, -1.3)
    outcome = policy.policy_loss(old + RATIO.log(), old, SIGNED, FOUR, clip=0.2)
    close(outcome.loss, POLICY_LOSS)
    close(outcome.fraction, torch.tensor(0.5))


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


_CLAMPED = RATIO.clamp(0.8, 1.2)
WRONG_POLICY: Wrong = {
    "clipped without the minimum": lambda: -(_CLAMPED * SIGNED)[FOUR].mean(),
    "maximum instead of minimum": lambda: -torch.maximum(RATIO * SIGNED, _CLAMPED * SIGNED)[FOUR].mean(),
    "not clipped": lambda: -(RATIO * SIGNED)[FOUR].mean(),
    "only from above": lambda: -torch.minimum(RATIO * SIGNED, RATIO.clamp(max=1.2) * SIGNED)[FOUR].mean(),
    "only from below": lambda: -torch.minimum(RATIO * SIGNED, RATIO.clamp(min=0.8) * SIGNED)[FOUR].mean(),
    "padding counted": lambda: -torch.minimum(RATIO * SIGNED, _CLAMPED * SIGNED).mean(),
    "sign lost": lambda: -POLICY_LOSS,
    "ratio turned round": lambda: (
        -torch.minimum(SIGNED / RATIO, (1 / RATIO).clamp(0.8, 1.2) * SIGNED)[FOUR].mean()
    ),
}


@pytest.mark.parametrize("wrong", WRONG_POLICY)
def test_wrong_policy_losses_show(wrong: str) -> None:
    assert differs(WRONG_POLICY[wrong](), POLICY_LOSS)


def test_a_huge_ratio_outside_the_mask_leaves_the_gradient_finite() -> None:
    log_probs = torch.tensor([[0.0, 1000.0]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    policy.policy_loss(log_probs, torch.zeros(1, 2), torch.ones(1, 2), mask).loss.backward()
    close(log_probs.grad, torch.tensor([[-1.0, 0.0]]))


# Value clip, the old value 1 everywhere, clip = 0.2, so that the clipped value is 1.2 or 0.8.
#   V = 2, R =  0: max(4, 1.44) = 4           V = 2, R = 3: max(1, 3.24) = 3.24 (clipped)
#   V = 0, R = -1: max(1, 3.24) = 3.24 (cl.)  V = 0, R = 2: max(4, 1.44) = 4
# half the mean: (4 + 3.24 + 3.24 + 4) / 4 / 2 = 1.81
PREDICTED = torch.tensor([[2.0, 2.0, 0.0, 0.0, 50.0]])
RETURNS = torch.tensor([[0.0, 3.0, -1.0, 2.0, 0.0]])
OLD = torch.ones(1, 5)
VALUE_LOSS = torch.tensor(1.81)


def test_value_loss_clips_in_both_directions() -> None:
    outcome = policy.value_loss(PREDICTED, OLD, RETURNS, FOUR, clip=0.2)
    close(outcome.loss, VALUE_LOSS)
    close(outcome.fraction, torch.tensor(0.5))


_PLAIN, _NEAR = (PREDICTED - RETURNS).square(), (PREDICTED.clamp(0.8, 1.2) - RETURNS).square()
WRONG_VALUE: Wrong = {
    "minimum instead of maximum": lambda: 0.5 * torch.minimum(_PLAIN, _NEAR)[FOUR].mean(),
    "clipped alone": lambda: 0.5 * _NEAR[FOUR].mean(),
    "not clipped": lambda: 0.5 * _PLAIN[FOUR].mean(),
    "one half forgotten": lambda: torch.maximum(_PLAIN, _NEAR)[FOUR].mean(),
    "padding counted": lambda: 0.5 * torch.maximum(_PLAIN, _NEAR).mean(),
    "clipped around the return": lambda: (
        0.5 * torch.maximum(_PLAIN, (PREDICTED - RETURNS).clamp(-0.2, 0.2).square())[FOUR].mean()
    ),
}


@pytest.mark.parametrize("wrong", WRONG_VALUE)
def test_wrong_value_losses_show(wrong: str) -> None:
    assert differs(WRONG_VALUE[wrong](), VALUE_LOSS)


# KL: pi = 1/2 and pi_ref = 1/4 give k1 = ln 2, and with r = 1/2 k3 = (1/2 - 1) - ln(1/2) = ln 2 - 1/2.
LOG_PI, LOG_REF = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]])
K1, K3 = torch.tensor([[math.log(2)]]), torch.tensor([[math.log(2) - 0.5]])


def test_kl_estimators() -> None:
    close(policy.kl_k1(LOG_PI, LOG_REF), K1)
    close(policy.kl_k3(LOG_PI, LOG_REF), K3)


_LOG_R = LOG_REF - LOG_PI
WRONG_K3: Wrong = {
    "wrong sign of the logarithm": lambda: _LOG_R.exp() - 1 + _LOG_R,
    "ratio turned round": lambda: (-_LOG_R).exp() - 1 + _LOG_R,
    "k2 instead": lambda: 0.5 * _LOG_R.square(),
    "k1 instead": lambda: K1,
    "one forgotten": lambda: _LOG_R.exp() - _LOG_R,
}


@pytest.mark.parametrize("wrong", WRONG_K3)
def test_wrong_k3_shows(wrong: str) -> None:
    assert differs(WRONG_K3[wrong](), K3)


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


def test_entropy() -> None:
    # (1/2, 1/4, 1/4): 1/2 ln 2 + 2 * 1/4 ln 4 = 1.5 ln 2; a uniform one has ln 3
    logits = torch.stack((torch.tensor([0.5, 0.25, 0.25]).log() + 3, torch.zeros(3)))[None]
    close(policy.entropy(logits), torch.tensor([[1.5 * math.log(2), math.log(3)]]))


def test_end_positions() -> None:
    mask = torch.tensor(
        [
            [False, True, True, False, False],
            [False, False, False, True, True],
            [True, False, False, False, False],
            [False, False, False, False, False],
        ]
    )
    assert policy.end_positions(mask).nonzero().tolist() == [[0, 2], [1, 4], [2, 0]]


# Rewards per token: beta 0.1, log(pi / pi_ref) = 0.5, -0.25, 1.0 on the answer, score 2:
# -0.05, 0.025, -0.1 + 2 = 1.9; prompt and padding get nothing
RESPONSE = torch.tensor([[False, True, True, True, False]])
LOG_RATIO = torch.tensor([[3.0, 0.5, -0.25, 1.0, 3.0]])
TOKEN_REWARDS = torch.tensor([[0.0, -0.05, 0.025, 1.9, 0.0]])


def test_the_score_is_paid_at_the_end_token() -> None:
    reference = torch.full_like(LOG_RATIO, -2.0)
    found = policy.token_rewards(torch.tensor([2.0]), LOG_RATIO + reference, reference, RESPONSE, beta=0.1)
    close(found, TOKEN_REWARDS)


_PENALTY = torch.where(RESPONSE, -0.1 * LOG_RATIO, 0.0)
WRONG_REWARDS: Wrong = {
    "score in the last column": lambda: _PENALTY + torch.tensor([[0.0, 0, 0, 0, 2]]),
    "score on every token": lambda: _PENALTY + torch.where(RESPONSE, 2.0, 0.0),
    "score at the first token": lambda: _PENALTY + torch.tensor([[0.0, 2, 0, 0, 0]]),
    "KL rewarded": lambda: -_PENALTY + torch.tensor([[0.0, 0, 0, 2, 0]]),
    "KL of the padding as well": lambda: -0.1 * LOG_RATIO + torch.tensor([[0.0, 0, 0, 2, 0]]),
    "no penalty at the end": lambda: torch.tensor([[0.0, -0.05, 0.025, 2.0, 0.0]]),
}


@pytest.mark.parametrize("wrong", WRONG_REWARDS)
def test_wrong_token_rewards_show(wrong: str) -> None:
    assert differs(WRONG_REWARDS[wrong](), TOKEN_REWARDS)


def test_next_beta() -> None:
    # KL 9 against 6: error 0.5, cut to 0.2: 0.1 * (1 + 0.2 * 64 / 320) = 0.104
    assert policy.next_beta(0.1, 9.0, target=6.0, episodes=64, horizon=320) == pytest.approx(0.104)
    # KL 5.7: error -0.05: 0.1 * (1 - 0.05 * 64 / 320) = 0.099
    assert policy.next_beta(0.1, 5.7, target=6.0, episodes=64, horizon=320) == pytest.approx(0.099)
    assert policy.next_beta(0.1, -4.0, target=6.0, episodes=64, horizon=320) == pytest.approx(0.096)
    assert policy.next_beta(0.1, 0.0, target=6.0, episodes=64, horizon=320, floor=0.1) == 0.1
    for wrong in (
        0.1 * (1 + 0.5 * 64 / 320),
        0.1 * 1.2,
        0.1 * (1 - 0.2 * 64 / 320),
        0.1 * (1 + 0.2 * 320 / 64),
    ):
        assert abs(wrong - 0.104) > 1e-3  # not cut; no horizon; wrong sign; horizon turned round


def test_explained_variance() -> None:
    mask = torch.tensor([[True, True, True, True, False]])
    returns = torch.tensor([[1.0, 2.0, 3.0, 4.0, 1e6]])

    def of(*values: float) -> float:
        return policy.explained_variance(torch.tensor([[*values, -1e6]]), returns, mask)

    # errors 0, 0, 0, 1 have variance 0.25, the returns 5/3: 1 - 0.15 = 0.85
    assert of(1.0, 2.0, 3.0, 3.0) == pytest.approx(0.85)
    assert of(1.0, 2.0, 3.0, 4.0) == pytest.approx(1.0)
    assert of(3.0, 4.0, 5.0, 6.0) == pytest.approx(1.0)  # a constant error is no variance
    assert of(7.0, 7.0, 7.0, 7.0) == pytest.approx(0.0)
    # turned round, the errors are -3, -1, 1, 3 with variance 20/3: 1 - 4 = -3
    assert of(4.0, 3.0, 2.0, 1.0) == pytest.approx(-3.0)
    assert abs((1 - 1 / 30) - 0.85) > 0.05  # "1 - mean squared error over mean square" would give 0.967


def test_explained_variance_of_too_little_is_zero() -> None:
    one = torch.tensor([[True, False]])
    assert policy.explained_variance(torch.zeros(1, 2), torch.ones(1, 2), one) == 0.0
    both = torch.ones(1, 2, dtype=torch.bool)
    assert policy.explained_variance(torch.zeros(1, 2), torch.ones(1, 2), both) == 0.0


# ---- REINFORCE ---------------------------------------------------------------------------------------------

# Two prompts with three answers each. Mean of all six: 2. Means of the others: first row (2 + 6) / 2 = 4, (1
# + 6) / 2 = 3.5, (1 + 2) / 2 = 1.5; second row (0 + 0) / 2 = 0, (3 + 0) / 2 = 1.5 twice.
GAINS = torch.tensor([[1.0, 2.0, 6.0], [3.0, 0.0, 0.0]])
ADVANTAGE = {
    "mean": torch.tensor([[-1.0, 0.0, 4.0], [1.0, -2.0, -2.0]]),
    "leave-one-out": torch.tensor([[-3.0, -1.5, 4.5], [3.0, -1.5, -1.5]]),
    "none": GAINS,
}


@pytest.mark.parametrize("baseline", list(ADVANTAGE))
def test_baselines_of_reinforce(baseline: policy.Baseline) -> None:
    close(policy.reinforce_advantages(GAINS, baseline=baseline), ADVANTAGE[baseline])
    # mean of squares less square of the mean: 26 / 6; for leave-one-out 45 / 6 with mean 0; for none 50 / 6 -
    # 4
    deviation = {"mean": math.sqrt(26 / 6), "leave-one-out": math.sqrt(45 / 6), "none": math.sqrt(26 / 6)}[
        baseline
    ]
    close(policy.reinforce_advantages(GAINS, baseline=baseline, scaled=True), ADVANTAGE[baseline] / deviation)


WRONG_BASELINE: Wrong = {
    "the answer itself among the others": lambda: GAINS - GAINS.mean(1, keepdim=True),
    "divided by K": lambda: GAINS - (GAINS.sum(1, keepdim=True) - GAINS) / 3,
    "over prompts instead of answers": lambda: GAINS - GAINS.flip(0),
}


@pytest.mark.parametrize("wrong", WRONG_BASELINE)
def test_wrong_baselines_show(wrong: str) -> None:
    assert differs(WRONG_BASELINE[wrong](), ADVANTAGE["leave-one-out"])


def test_leave_one_out_needs_others() -> None:
    with pytest.raises(ValueError, match="at least two"):
        policy.reinforce_advantages(torch.ones(4, 1), baseline="leave-one-out")
    close(
        policy.reinforce_advantages(torch.ones(4, 2), scaled=True), torch.zeros(4, 2)
    )  # no deviation, no division by 0


# Two answers, of two and of one token (log-probabilities -1, -2 and -0.5; the rest is padding): -(2 x -3 + -4
# x -0.5) / 2 = 2
SPOKEN = torch.tensor([[-1.0, -2.0, -7.0], [-0.5, -7.0, -7.0]])
SAID = torch.tensor([[True, True, False], [True, False, False]])
WORTH = torch.tensor([2.0, -4.0])
REINFORCE_LOSS = torch.tensor(2.0)


def test_reinforce_loss_and_its_gradient() -> None:
    log_probs = SPOKEN.clone().requires_grad_(True)
    loss = policy.reinforce_loss(log_probs, WORTH, SAID)
    loss.backward()
    close(loss.detach(), REINFORCE_LOSS)
    close(
        log_probs.grad, torch.tensor([[-1.0, -1.0, 0.0], [2.0, 0.0, 0.0]])
    )  # -A / 2 at every token of the answer


WRONG_REINFORCE: Wrong = {
    "mean over tokens": lambda: -((WORTH[:, None] * SPOKEN)[SAID]).mean(),
    "mean over an answer's tokens": lambda: -(WORTH * (SPOKEN * SAID).sum(1) / SAID.sum(1)).mean(),
    "sum over answers": lambda: -(WORTH * (SPOKEN * SAID).sum(1)).sum(),
    "sign lost": lambda: (WORTH * (SPOKEN * SAID).sum(1)).mean(),
    "padding counted": lambda: -(WORTH * SPOKEN.sum(1)).mean(),
    "probabilities for log-probabilities": lambda: -(WORTH * (SPOKEN.exp() * SAID).sum(1)).mean(),
}


@pytest.mark.parametrize("wrong", WRONG_REINFORCE)
def test_wrong_reinforce_losses_show(wrong: str) -> None:
    assert differs(WRONG_REINFORCE[wrong](), REINFORCE_LOSS)


@pytest.mark.parametrize("baseline", ["mean", "leave-one-out", "none"])
def test_the_expected_gradient_is_that_of_the_expected_return(baseline: policy.Baseline) -> None:
    """All 3^4 batches of two prompts with two answers each, weighted by their probability: no sampling error
    is left."""
    logits = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64, requires_grad=True)
    worth = torch.tensor([1.0, 3.0, -2.0], dtype=torch.float64)
    (exact,) = torch.autograd.grad((logits.softmax(0) * worth).sum(), logits)
    total = torch.zeros(3, dtype=torch.float64)
    for chosen in itertools.product(range(3), repeat=4):
        acts = torch.tensor(chosen)
        advantages = policy.reinforce_advantages(worth[acts].view(2, 2), baseline=baseline).flatten()
        log_probs = logits.log_softmax(0)[acts]
        loss = policy.reinforce_loss(log_probs[:, None], advantages, torch.ones(4, 1, dtype=torch.bool))
        (gradient,) = torch.autograd.grad(loss, logits)
        total -= gradient * float(log_probs.detach().sum().exp())
    shortened = 1 - 1 / 4 if baseline == "mean" else 1.0  # the answer's own return is in the mean
    torch.testing.assert_close(total, shortened * exact)


def test_whitening_with_bessels_correction() -> None:
    """The variance 5 of VALUES over four positions becomes 5 x 4 / 3."""
    close(
        policy.whiten(VALUES, INSIDE, correction=1),
        torch.where(INSIDE, (VALUES - 4) / math.sqrt(20 / 3), 0.0),
    )
