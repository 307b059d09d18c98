"""Bradley-Terry and pair accuracy against values worked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from chatwright.objectives.preference import (
    bradley_terry_loss,
    logistic_loss,
    pair_accuracy,
    pair_wins,
    preferred_pairs,
)

NAN = float("nan")


def loss_of(difference: float) -> float:
    """-log sigmoid(difference) = log(1 + e^-difference)"""
    return math.log1p(math.exp(-difference))


def loss(scores: list[list[float]], labels: list[list[float]], margin: float = 0.0) -> float:
    return float(bradley_terry_loss(torch.tensor(scores), torch.tensor(labels), margin))


def test_two_answers() -> None:
    # ln(1 + e^-2) = 0.126928
    assert loss([[2.0, 0.0]], [[1.0, 0.0]]) == pytest.approx(0.126928, abs=1e-6)
    assert loss([[2.0, 0.0]], [[0.0, 1.0]]) == pytest.approx(
        2.126928, abs=1e-6
    )  # the other one preferred: + 2


# Three answers, the last two a tie: the pairs are (0, 1) with difference 1 and (0, 2) with difference 2.
SCORES, LABELS = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[2.0, 1.0, 1.0]])
HAND = (0.313262 + 0.126928) / 2  # (ln(1 + e^-1) + ln(1 + e^-2)) / 2 = 0.220095


def test_three_answers_of_which_two_tie() -> None:
    assert float(bradley_terry_loss(SCORES, LABELS)) == pytest.approx(HAND, abs=1e-6)


def _wrong(pairs: list[tuple[int, int]], count: float, sign: float = 1.0) -> float:
    row = SCORES[0].tolist()
    return sum(loss_of(sign * (row[i] - row[j])) for i, j in pairs) / count


WRONG: dict[str, Callable[[], float]] = {
    "divided by all pairs, the tie included": lambda: _wrong([(0, 1), (0, 2)], 3),
    "the tie counted as won": lambda: _wrong([(0, 1), (0, 2), (1, 2)], 3),
    "the tie counted half each way": lambda: _wrong([(0, 1), (0, 2)], 3) + 0.5 * _wrong([(1, 2), (2, 1)], 3),
    "not divided": lambda: _wrong([(0, 1), (0, 2)], 1),
    "neighbours only": lambda: _wrong([(0, 1)], 1),
    "sign lost": lambda: _wrong([(0, 1), (0, 2)], 2, sign=-1.0),
    "difference not in the sigmoid": lambda: -float((SCORES[0, 0] - SCORES[0, 1:]).mean()),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_hand_value_tells_a_wrong_loss_from_the_right_one(wrong: str) -> None:
    assert abs(WRONG[wrong]() - HAND) > 0.01


def test_pairs_closer_than_the_margin_are_ties() -> None:
    # differences of the labels 0.4, 2.0, 1.6: the first is within 0.5
    assert loss([[1.0, 0.0, -1.0]], [[2.0, 1.6, 0.0]], tie_tolerance=0.5) == pytest.approx(
        (loss_of(2) + loss_of(1)) / 2
    )
    assert loss([[1.0, 0.0, -1.0]], [[2.0, 1.6, 0.0]]) == pytest.approx(
        (loss_of(1) + loss_of(2) + loss_of(1)) / 3
    )
    assert loss([[5.0, 0.0]], [[1.0, 0.5]], tie_tolerance=0.5) == 0.0  # exactly the margin is a tie


# Llama 2's margin: each pair must lead by half the difference of its labels. Differences of scores 1 and 2,
# of labels 1 and 1: (ln(1 + e^-(1 - 0.5)) + ln(1 + e^-(2 - 0.5))) / 2 = (0.474077 + 0.201413) / 2
LEAD = 0.5 * (LABELS[:, :, None] - LABELS[:, None, :])
LED = (0.474077 + 0.201413) / 2


def test_a_pair_must_lead_by_its_margin() -> None:
    assert float(bradley_terry_loss(SCORES, LABELS, margin=LEAD)) == pytest.approx(LED, abs=1e-6)
    assert float(bradley_terry_loss(SCORES, LABELS, margin=torch.zeros_like(LEAD))) == pytest.approx(
        HAND, abs=1e-6
    )


WRONG_LEAD: dict[str, Callable[[], float]] = {
    "added instead of subtracted": lambda: (loss_of(1.5) + loss_of(2.5)) / 2,
    "forgotten": lambda: HAND,
    "taken from the loss, not from the difference": lambda: HAND - 0.5,
    "of the other pair": lambda: float(bradley_terry_loss(SCORES, LABELS, margin=LEAD.mT)),
}


@pytest.mark.parametrize("wrong", WRONG_LEAD)
def test_wrong_margins_show(wrong: str) -> None:
    assert abs(WRONG_LEAD[wrong]() - LED) > 0.01


def test_padding_with_nan_takes_part_in_no_pair() -> None:
    assert loss([[1.0, 0.0, 100.0]], [[1.0, 0.0, NAN]]) == pytest.approx(loss_of(1))
    scores = torch.tensor([[1.0, 0.0, 100.0], [0.0, 0.0, 0.0]], requires_grad=True)
    bradley_terry_loss(scores, torch.tensor([[1.0, 0.0, NAN], [NAN, NAN, NAN]])).backward()
    # d/ds of -log sigmoid(s0 - s1) at difference 1: -(1 - sigmoid(1)) = -0.268941, and the opposite
    expected = torch.tensor([[-0.268941, 0.268941, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(scores.grad, expected, atol=1e-6, rtol=0)


def test_every_prompt_weighs_the_same_however_many_pairs_it_has() -> None:
    # one pair of difference 1; three pairs of differences 1, 3, 2
    scores, labels = [[1.0, 0.0, 0.0], [3.0, 2.0, 0.0]], [[1.0, 0.0, NAN], [2.0, 1.0, 0.0]]
    expected = loss_of(1) + (loss_of(1) + loss_of(3) + loss_of(2)) / 3
    assert loss(scores, labels) == pytest.approx(expected)
    pooled = 2 * (loss_of(1) + loss_of(1) + loss_of(3) + loss_of(2)) / 4  # all pairs in one pot
    assert abs(pooled - expected) > 0.01


def test_a_prompt_of_ties_adds_nothing() -> None:
    assert loss([[3.0, -2.0]], [[1.0, 1.0]]) == 0.0


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 3)), min_size=2, max_size=6),
    st.floats(-10, 10),
)
def test_only_differences_of_scores_matter(rows: list[tuple[float, int]], shift: float) -> None:
    scores = torch.tensor([[score for score, _ in rows]], dtype=torch.float64)
    labels = torch.tensor([[float(label) for _, label in rows]], dtype=torch.float64)
    own = bradley_terry_loss(scores, labels)
    torch.testing.assert_close(bradley_terry_loss(scores + shift, labels), own, atol=1e-9, rtol=1e-9)
    order = torch.arange(len(rows)).flip(0)
    torch.testing.assert_close(bradley_terry_loss(scores[:, order], labels[:, order]), own)
    assert float(own) >= 0


def test_preferred_pairs() -> None:
    found = preferred_pairs(torch.tensor([[2.0, 1.0, 1.0, NAN]])).nonzero().tolist()
    assert found == [[0, 0, 1], [0, 0, 2]]


ACCURACY_SCORES, ACCURACY_LABELS = torch.tensor([[3.0, 1.0, 1.0, 9.0]]), torch.tensor([[2.0, 1.0, 0.0, NAN]])


def test_pair_accuracy_counts_equal_scores_half() -> None:
    # pairs (0, 1) right, (0, 2) right, (1, 2) equal: 2.5 of 3
    assert pair_accuracy(ACCURACY_SCORES, ACCURACY_LABELS) == (2.5, 3)
    assert pair_accuracy(-ACCURACY_SCORES, ACCURACY_LABELS) == (0.5, 3)
    assert pair_accuracy(ACCURACY_SCORES, ACCURACY_LABELS, tie_tolerance=1.5) == (1.0, 1)


@pytest.mark.parametrize(
    "compare",
    [
        lambda difference: (difference > 0).float(),  # equal scores are wrong
        lambda difference: (difference >= 0).float(),  # equal scores are right
        lambda difference: (difference < 0).float() + 0.5 * (difference == 0).float(),
    ],
    ids=["equal is wrong", "equal is right", "turned round"],
)
def test_the_hand_value_tells_wrong_accuracies(compare: Callable[[Tensor], Tensor]) -> None:
    difference = ACCURACY_SCORES[:, :, None] - ACCURACY_SCORES[:, None, :]
    assert float(compare(difference)[preferred_pairs(ACCURACY_LABELS)].sum()) != 2.5


# ---- ties that are won by half -----------------------------------------------------------------------------

# The scores and labels of the beginning, differences 1, 2 and, of the tie, 1. C(3, 2) = 3 pairs:
# (ln(1 + e^-1) + ln(1 + e^-2) + (ln(1 + e^-1) + ln(1 + e^1)) / 2) / 3 = (0.313262 + 0.126928 + 0.813262) / 3
HALF = (0.313262 + 0.126928 + 0.813262) / 3


def test_a_tie_may_be_won_by_half() -> None:
    assert float(bradley_terry_loss(SCORES, LABELS, ties="half")) == pytest.approx(HALF, abs=1e-6)
    assert pair_wins(LABELS, ties="half").tolist() == [[[0, 1, 1], [0, 0, 0.5], [0, 0.5, 0]]]
    assert pair_wins(LABELS).tolist() == [[[0, 1, 1], [0, 0, 0], [0, 0, 0]]]
    # alone, a tie is cheapest where the scores are equal, and pulls them together
    scores = torch.tensor([[1.0, 0.0]], requires_grad=True)
    bradley_terry_loss(scores, torch.tensor([[3.0, 3.0]]), ties="half").backward()
    # d/ds of (-log sigmoid(d) - log sigmoid(-d)) / 2 at d = 1: sigmoid(1) - 1/2 = 0.231059
    torch.testing.assert_close(scores.grad, torch.tensor([[0.231059, -0.231059]]), atol=1e-6, rtol=0)
    assert float(bradley_terry_loss(torch.zeros(1, 2), torch.ones(1, 2), ties="half")) == pytest.approx(
        math.log(2)
    )


WRONG_HALF: dict[str, Callable[[], float]] = {
    "left out": lambda: HAND,
    "won by one of the two": lambda: _wrong([(0, 1), (0, 2), (1, 2)], 3),
    "won by both, whole": lambda: _wrong([(0, 1), (0, 2), (1, 2), (2, 1)], 3),
    "counted twice in the mean": lambda: HALF * 3 / 4,
    "an answer ties with itself": lambda: (HALF * 3 + 1.5 * math.log(2)) / 4.5,
}


@pytest.mark.parametrize("wrong", WRONG_HALF)
def test_wrong_ties_show(wrong: str) -> None:
    assert abs(WRONG_HALF[wrong]() - HALF) > 0.01


def test_ties_in_the_accuracy() -> None:
    # pairs right, right, and a tie, which is half right whatever the scores: 2.5 of 3
    labels = torch.tensor([[2.0, 1.0, 1.0, NAN]])
    for scores in (ACCURACY_SCORES, torch.tensor([[3.0, 1.0, 2.0, 9.0]])):
        assert pair_accuracy(scores, labels, ties="half") == (2.5, 3)
        assert pair_accuracy(scores, labels) == (2.0, 2)


def test_padding_ties_with_nothing_and_a_lead_does_not_reach_it() -> None:
    """Not in the gradient either: NaN times 0 is NaN."""
    labels = torch.tensor([[2.0, 1.0, 1.0, NAN]])
    lead = labels[:, :, None] - labels[:, None, :]
    for ties in ("leave_out", "half"):
        scores = torch.tensor([[1.0, 0.0, -1.0, 5.0]], requires_grad=True)
        loss = bradley_terry_loss(scores, labels, margin=lead, ties=ties)  # type: ignore[arg-type]
        loss.backward()
        assert scores.grad is not None and torch.isfinite(scores.grad).all() and scores.grad[0, 3] == 0
        # leads 1 and 1 for the pairs that are won, none for the tie
        expected = loss_of(0) + loss_of(1)
        expected = expected / 2 if ties == "leave_out" else (expected + (loss_of(1) + loss_of(-1)) / 2) / 3
        assert float(loss.detach()) == pytest.approx(expected, abs=1e-6)


# ---- classes -----------------------------------------------------------------------------------------------

# ln(1 + e^-2) + ln(1 + e^-1) + ln(1 + e^0.5) = 0.126928 + 0.313262 + 0.974077
TEXT_SCORES, GOOD = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([True, False, False])
LOGISTIC = 0.126928 + 0.313262 + 0.974077


def test_the_loss_of_classes_by_hand() -> None:
    assert float(logistic_loss(TEXT_SCORES, GOOD)) == pytest.approx(LOGISTIC, abs=1e-6)
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(TEXT_SCORES, GOOD.float(), reduction="sum")
    assert float(theirs) == pytest.approx(LOGISTIC, abs=1e-6)
    scores = TEXT_SCORES.clone().requires_grad_()
    logistic_loss(scores, GOOD).backward()
    torch.testing.assert_close(scores.grad, TEXT_SCORES.sigmoid() - GOOD.float(), atol=1e-6, rtol=0)  # p - y
    assert float(logistic_loss(torch.tensor([1000.0, -1000.0]), torch.tensor([False, False]))) == 1000.0


WRONG_LOGISTIC: dict[str, Callable[[], float]] = {
    "sign lost": lambda: float(logistic_loss(-TEXT_SCORES, GOOD)),
    "good texts only": lambda: loss_of(2),
    "averaged": lambda: LOGISTIC / 3,
    "squared": lambda: float(((TEXT_SCORES.sigmoid() - GOOD.float()) ** 2).sum()),
}


@pytest.mark.parametrize("wrong", WRONG_LOGISTIC)
def test_wrong_losses_of_classes_show(wrong: str) -> None:
    assert abs(WRONG_LOGISTIC[wrong]() - LOGISTIC) > 0.01
