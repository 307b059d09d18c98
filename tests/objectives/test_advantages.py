"""Means and whitening over a mask, advantages, and REINFORCE against values worked by hand; after each,
mistakes in its code that the values tell."""

from __future__ import annotations

import itertools
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


# Whitening: the values 1, 3, 5, 7 inside the mask have mean 4 and variance (9 + 1 + 1 + 9) / 4 = 5.
VALUES = torch.tensor([[1.0, 3.0, 100.0], [-50.0, 5.0, 7.0]])
INSIDE = torch.tensor([[True, True, False], [False, True, True]])
A, B = 3 / math.sqrt(5), 1 / math.sqrt(5)
WHITE = torch.tensor([[-A, -B, 0.0], [0.0, B, A]])
WHITE_KEPT = torch.tensor([[4 - A, 4 - B, 0.0], [0.0, 4 + B, 4 + A]])


def check_whiten(module: ModuleType) -> None:
    close(module.whiten(VALUES, INSIDE), WHITE)
    close(module.whiten(VALUES, INSIDE, shift_mean=False), WHITE_KEPT)
    # with Bessel's correction, the variance 5 over four positions becomes 5 x 4 / 3
    corrected = torch.where(INSIDE, (VALUES - 4) / math.sqrt(20 / 3), 0.0)
    close(module.whiten(VALUES, INSIDE, correction=1), corrected)


def test_whitening_over_a_mask() -> None:
    check_whiten(policy)


def check_masked_mean(module: ModuleType) -> None:
    close(module.masked_mean(VALUES, INSIDE), torch.tensor(4.0))
    close(module.masked_mean(VALUES, torch.zeros_like(INSIDE)), torch.tensor(0.0))
    beside_nan = module.masked_mean(torch.tensor([[1.0, math.nan]]), torch.tensor([[True, False]]))
    close(beside_nan, torch.tensor(1.0))


def test_masked_mean() -> None:
    check_masked_mean(policy)


WRONG_MEANS = mutants(
    policy.masked_mean,
    {
        "over all positions": ("mask.sum().clamp(min=1)", "mask.numel()"),
        "mask turned round": ("torch.where(mask,", "torch.where(~mask,"),
        "mask ignored": ("torch.where(mask, values, 0.0)", "values"),
        "NaN times zero": ("torch.where(mask, values, 0.0)", "(values * mask)"),
        "not divided": (" / mask.sum().clamp(min=1)", ""),
        "empty mask divides by zero": (".clamp(min=1)", ""),
    },
)


@pytest.mark.parametrize("mutant", WRONG_MEANS, ids=str)
def test_wrong_means_show(mutant: Mutant) -> None:
    mutant.must_fail(check_masked_mean)


WRONG_WHITE = mutants(
    policy.whiten,
    {
        "mean over all positions": ("mean = masked_mean(values, mask)", "mean = values.mean()"),
        "variance over all positions": (
            "masked_mean((values - mean).square(), mask)",
            "(values - mean).square().mean()",
        ),
        "mean of each row": (
            "mean = masked_mean(values, mask)",
            "mean = (torch.where(mask, values, 0.0).sum(1) / mask.sum(1))[:, None]",
        ),
        "sample variance": ("if correction:", "correction = correction or 1\n    if True:"),
        "variance not rooted": ("torch.rsqrt(variance + 1e-8)", "1 / variance"),
        "mean kept": ("white if shift_mean else white + mean", "white + mean"),
        "mean always lost": ("white if shift_mean else white + mean", "white"),
        "outside not zero": (
            "torch.where(mask, white if shift_mean else white + mean, 0.0)",
            "white if shift_mean else white + mean",
        ),
        "correction turned round": ("(count - correction)", "(count + correction)"),
    },
)


@pytest.mark.parametrize("mutant", WRONG_WHITE, ids=str)
def test_wrong_whitening_shows(mutant: Mutant) -> None:
    mutant.must_fail(check_whiten)


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


def check_advantages(module: ModuleType) -> None:
    close(module.generalized_advantages(REWARDS, CRITIC, ANSWER, discount=0.5, lam=0.5), ADVANTAGES)


def test_generalized_advantages() -> None:
    check_advantages(policy)


_SUM = "torch.where(here, delta + discount * lam * following, 0.0)"
WRONG_GAE = mutants(
    policy.generalized_advantages,
    {
        "value beyond the end used": ("torch.where(here, values[:, t], 0.0)", "values[:, t]"),
        "sum leaks over the mask's end": (
            f"{_SUM}\n        advantages[:, t] = following",
            "delta + discount * lam * following\n"
            "        advantages[:, t] = torch.where(here, following, 0.0)",
        ),
        "outside not zero": (
            "advantages[:, t] = following",
            "advantages[:, t] = torch.where(here, following, delta)",
        ),
        "lambda not used": ("discount * lam * following", "discount * following"),
        "discount not used in the sum": ("discount * lam * following", "lam * following"),
        "discount not used in the difference": ("discount * next_value", "next_value"),
        "only one step": ("delta + discount * lam * following", "delta"),
        "returns instead": ("advantages[:, t] = following", "advantages[:, t] = following + values[:, t]"),
        "value of this token for the next": ("discount * next_value - values[:, t]", "0.0 - values[:, t]"),
        "forwards": ("reversed(range(rewards.shape[1]))", "range(rewards.shape[1])"),
    },
)


@pytest.mark.parametrize("mutant", WRONG_GAE, ids=str)
def test_wrong_advantages_show(mutant: Mutant) -> None:
    mutant.must_fail(check_advantages)


@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=8))
def test_with_lambda_one_the_advantage_is_the_return_less_the_value(steps: list[tuple[float, float]]) -> None:
    rewards, values = (torch.tensor([column], dtype=torch.float64) for column in zip(*steps, strict=True))
    mask = torch.ones_like(rewards, dtype=torch.bool)
    found = policy.generalized_advantages(rewards, values, mask, discount=1.0, lam=1.0)
    torch.testing.assert_close(found, rewards.flip(1).cumsum(1).flip(1) - values)


# ---- REINFORCE ---------------------------------------------------------------------------------------------

# Two prompts with three answers each. Mean of all six: 2. Means of the others: first row (2 + 6) / 2 = 4, (1
# + 6) / 2 = 3.5, (1 + 2) / 2 = 1.5; second row (0 + 0) / 2 = 0, (3 + 0) / 2 = 1.5 twice.
GAINS = torch.tensor([[1.0, 2.0, 6.0], [3.0, 0.0, 0.0]])
ADVANTAGE = {
    "mean": torch.tensor([[-1.0, 0.0, 4.0], [1.0, -2.0, -2.0]]),
    "leave-one-out": torch.tensor([[-3.0, -1.5, 4.5], [3.0, -1.5, -1.5]]),
    "none": GAINS,
}


# Mean of squares less square of the mean: 26 / 6; for leave-one-out 45 / 6 with mean 0; for none 50 / 6 - 4.
DEVIATION = {"mean": math.sqrt(26 / 6), "leave-one-out": math.sqrt(45 / 6), "none": math.sqrt(26 / 6)}


def check_baselines(module: ModuleType) -> None:
    for baseline, advantage in ADVANTAGE.items():
        close(module.reinforce_advantages(GAINS, baseline=baseline), advantage)
        scaled = module.reinforce_advantages(GAINS, baseline=baseline, scaled=True)
        close(scaled, advantage / DEVIATION[baseline])


def test_baselines_of_reinforce() -> None:
    check_baselines(policy)


WRONG_BASELINE = mutants(
    policy.reinforce_advantages,
    {
        "the answer itself among the others": (
            "(returns.sum(1, keepdim=True) - returns) / (k - 1)",
            "returns.mean(1, keepdim=True)",
        ),
        "divided by K": ("/ (k - 1)", "/ k"),
        "over prompts instead of answers": (
            "(returns.sum(1, keepdim=True) - returns) / (k - 1)",
            "(returns.sum(0) - returns) / (len(returns) - 1)",
        ),
        "mean of each prompt": ("returns.mean() if", "returns.mean(1, keepdim=True) if"),
        "a baseline where none is asked for": ('if baseline == "mean" else 0.0', "if True else 0.0"),
        "baseline added": ("returns - (returns.mean() if", "returns + (returns.mean() if"),
        "scaled with Bessel's correction": ("std(correction=0)", "std(correction=1)"),
        "never scaled": (" / (advantages.std(correction=0) + 1e-8) if scaled else advantages", ""),
        "always scaled": ("if scaled else advantages", ""),
    },
)


@pytest.mark.parametrize("mutant", WRONG_BASELINE, ids=str)
def test_wrong_baselines_show(mutant: Mutant) -> None:
    mutant.must_fail(check_baselines)


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


def check_reinforce_loss(module: ModuleType) -> None:
    log_probs = SPOKEN.clone().requires_grad_(True)
    loss = module.reinforce_loss(log_probs, WORTH, SAID)
    loss.backward()
    close(loss.detach(), REINFORCE_LOSS)
    # -A / 2 at every token of the answer
    close(log_probs.grad, torch.tensor([[-1.0, -1.0, 0.0], [2.0, 0.0, 0.0]]))


def test_reinforce_loss_and_its_gradient() -> None:
    check_reinforce_loss(policy)


_OF_ANSWERS = "torch.where(mask, log_probs, 0.0).sum(1)"
WRONG_REINFORCE = mutants(
    policy.reinforce_loss,
    {
        "mean over tokens": (
            f"(advantages * {_OF_ANSWERS}).mean()",
            "(advantages[:, None] * log_probs)[mask].mean()",
        ),
        "mean over an answer's tokens": (_OF_ANSWERS, _OF_ANSWERS + " / mask.sum(1)"),
        "sum over answers": (".mean()", ".sum()"),
        "sign lost": ("return -", "return "),
        "padding counted": (_OF_ANSWERS, "log_probs.sum(1)"),
        "mask off by one": ("torch.where(mask,", "torch.where(mask.roll(1, 1),"),
        "probabilities for log-probabilities": ("mask, log_probs, 0.0", "mask, log_probs.exp(), 0.0"),
        "gradient doubled": ("mask, log_probs, 0.0", "mask, 2 * log_probs - log_probs.detach(), 0.0"),
    },
)


@pytest.mark.parametrize("mutant", WRONG_REINFORCE, ids=str)
def test_wrong_reinforce_losses_show(mutant: Mutant) -> None:
    mutant.must_fail(check_reinforce_loss)


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


# ---- equal returns -----------------------------------------------------------------------------------------

EQUAL = (0.1, 0.3, 0.35, 0.7, 1.1, -2.3, 1e3 / 3, 1e-30, 0.0, 3e7)
SHAPES = ((1, 1), (1, 2), (1, 8), (3, 7), (7, 3), (32, 8), (64, 4), (1000, 3))


def check_equal_returns(module: ModuleType) -> None:
    for value in EQUAL:
        for shape in SHAPES:
            returns = torch.full(shape, value)
            for baseline in ("mean", "leave-one-out") if shape[1] > 1 else ("mean",):
                for scaled in (False, True):
                    found = module.reinforce_advantages(returns, baseline=baseline, scaled=scaled)
                    assert torch.equal(found, torch.zeros(shape)), (value, shape, baseline, scaled)
            assert not module.reinforce_advantages(returns, baseline="none", scaled=True).any()
            mask = torch.ones(shape, dtype=torch.bool)
            for correction in (0, 1):
                assert not module.whiten(returns, mask, correction=correction).any()
                assert torch.equal(
                    module.whiten(returns, mask, shift_mean=False, correction=correction), returns
                )


def test_equal_returns_give_no_advantage() -> None:
    check_equal_returns(policy)


WRONG_EQUAL = [
    *mutants(
        policy.whiten, {"whitening divides a rounding error": ("bool(all_equal(values[mask]))", "False")}
    ),
    *mutants(
        policy.reinforce_advantages,
        {
            "answers of a prompt": ("torch.where(all_equal(returns), 0.0, advantages)", "advantages"),
            "answers of the batch": ("bool(all_equal(returns.flatten()))", "False"),
        },
    ),
    *mutants(policy.all_equal, {"nearly equal is not asked for": (".all(-1,", ".any(-1,")}),
]


@pytest.mark.parametrize("mutant", WRONG_EQUAL[:-1], ids=str)
def test_without_the_exact_comparison_rounding_becomes_an_advantage(mutant: Mutant) -> None:
    mutant.must_fail(check_equal_returns)


def check_small_differences(module: ModuleType) -> None:
    returns = torch.tensor([[0.7, 0.7, 0.7], [0.0, 0.3, 0.9]])
    for scaled in (False, True):
        found = module.reinforce_advantages(returns, baseline="leave-one-out", scaled=scaled)
        assert torch.equal(found[0], torch.zeros(3)) and found[1].abs().max() > 0.1
    # Not equal, however near: the smallest difference that float32 has is kept.
    near = torch.tensor([[1.0, 1.0, torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()]])
    assert module.reinforce_advantages(near, baseline="mean").abs().max() > 0
    assert module.reinforce_advantages(near, baseline="leave-one-out").abs().max() > 0
    assert module.whiten(near, torch.ones(1, 3, dtype=torch.bool)).abs().max() > 0


def test_small_differences_are_kept() -> None:
    check_small_differences(policy)


@pytest.mark.parametrize("mutant", WRONG_EQUAL[-1:], ids=str)
def test_a_bound_that_hides_differences_shows(mutant: Mutant) -> None:
    mutant.must_fail(check_small_differences)


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (0, 3)])
@pytest.mark.parametrize("filled", [0, 1, 10])
def test_single_values_and_empty_answers_give_no_nan(shape: tuple[int, int], filled: int) -> None:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[:filled] = True
    values = torch.rand(shape)
    for correction in (0, 1):
        for shift in (False, True):
            assert policy.whiten(values, mask, shift_mean=shift, correction=correction).isfinite().all()
    rewards = policy.token_rewards(torch.rand(shape[0]), values, values, mask, beta=0.1)
    advantages = policy.generalized_advantages(rewards, values, mask)
    assert advantages.isfinite().all()
    assert policy.policy_loss(values, values, advantages, mask).loss.isfinite()
    assert policy.value_loss(values, values, advantages, mask).loss.isfinite()
    assert math.isfinite(policy.explained_variance(values, advantages, mask))
    for value in EQUAL:
        assert policy.explained_variance(values, torch.full(shape, value), mask) == 0.0
