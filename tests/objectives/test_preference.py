"""Bradley-Terry and pair accuracy against values worked by hand."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatwright.objectives import preference
from chatwright.objectives.preference import (
    bradley_terry_loss,
    pair_accuracy,
    preferred_pairs,
)
from support.mutation import Check, Mutant, mutants

NAN = float("nan")


def loss_of(difference: float) -> float:
    """-log sigmoid(difference) = log(1 + e^-difference)"""
    return math.log1p(math.exp(-difference))


def loss(scores: list[list[float]], labels: list[list[float]]) -> float:
    return float(bradley_terry_loss(torch.tensor(scores), torch.tensor(labels)))


def test_two_answers() -> None:
    # ln(1 + e^-2) = 0.126928
    assert loss([[2.0, 0.0]], [[1.0, 0.0]]) == pytest.approx(0.126928, abs=1e-6)
    assert loss([[2.0, 0.0]], [[0.0, 1.0]]) == pytest.approx(
        2.126928, abs=1e-6
    )  # the other one preferred: + 2


# Three answers, the last two a tie: the pairs are (0, 1) with difference 1 and (0, 2) with difference 2.
SCORES, LABELS = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[2.0, 1.0, 1.0]])
HAND = (0.313262 + 0.126928) / 2  # (ln(1 + e^-1) + ln(1 + e^-2)) / 2 = 0.220095


def check_bradley_terry(module: ModuleType) -> None:
    assert float(module.bradley_terry_loss(SCORES, LABELS)) == pytest.approx(HAND, abs=1e-6)


def test_three_answers_of_which_two_tie() -> None:
    check_bradley_terry(preference)


WRONG = [
    *mutants(
        preference.bradley_terry_loss,
        {
            "divided by all pairs, the tie included": (
                "count = wins.sum(dim=(1, 2))",
                "count = wins.new_tensor(3)",
            ),
            "not divided": (" / count)", ")"),
            "neighbours only": ("wins > 0, wins", "(wins > 0) & (wins.cumsum(2) == 1), wins"),
            "sign lost": (
                "scores[:, :, None] - scores[:, None, :]",
                "scores[:, None, :] - scores[:, :, None]",
            ),
            "loss turned round": ("losses = -F", "losses = F"),
            "difference not in the sigmoid": ("-F.logsigmoid(difference)", "-difference"),
            "sigmoid without its logarithm": ("-F.logsigmoid(difference)", "-F.sigmoid(difference)"),
        },
    ),
    *mutants(
        preference.preferred_pairs,
        {
            "the tie counted as won": ("> tie_tolerance", ">= tie_tolerance"),
            "the worse one preferred": (
                "labels[:, :, None] - labels[:, None, :]",
                "labels[:, None, :] - labels[:, :, None]",
            ),
        },
    ),
    *mutants(preference.pair_wins, {"the tie counted half each way": ('if ties == "half"', "if True")}),
]


@pytest.mark.parametrize("mutant", WRONG, ids=str)
def test_wrong_losses_of_pairs_show(mutant: Mutant) -> None:
    mutant.must_fail(check_bradley_terry)


def check_tolerance(module: ModuleType) -> None:
    def loss(scores: list[float], labels: list[float], tolerance: float = 0.0) -> float:
        return float(
            module.bradley_terry_loss(torch.tensor([scores]), torch.tensor([labels]), tie_tolerance=tolerance)
        )

    # differences of the labels 0.4, 2.0, 1.6: the first is within 0.5
    assert loss([1.0, 0.0, -1.0], [2.0, 1.6, 0.0], 0.5) == pytest.approx((loss_of(2) + loss_of(1)) / 2)
    every = (loss_of(1) + loss_of(2) + loss_of(1)) / 3
    assert loss([1.0, 0.0, -1.0], [2.0, 1.6, 0.0]) == pytest.approx(every)
    assert loss([5.0, 0.0], [1.0, 0.5], 0.5) == 0.0  # exactly the tolerance is a tie


def test_pairs_closer_than_the_tolerance_are_ties() -> None:
    check_tolerance(preference)


WRONG_TOLERANCE = [
    *mutants(
        preference.preferred_pairs,
        {
            "not used": ("> tie_tolerance", "> 0"),
            "exactly the tolerance wins": ("> tie_tolerance", ">= max(tie_tolerance, 1e-9)"),
        },
    ),
    *mutants(preference.pair_wins, {"not passed on": ("(labels, tie_tolerance)", "(labels)")}),
]


@pytest.mark.parametrize("mutant", WRONG_TOLERANCE, ids=str)
def test_wrong_tolerances_show(mutant: Mutant) -> None:
    mutant.must_fail(check_tolerance)


# Llama 2's margin: each pair must lead by half the difference of its labels. Differences of scores 1 and 2,
# of labels 1 and 1: (ln(1 + e^-(1 - 0.5)) + ln(1 + e^-(2 - 0.5))) / 2 = (0.474077 + 0.201413) / 2
LEAD = 0.5 * (LABELS[:, :, None] - LABELS[:, None, :])
LED = (0.474077 + 0.201413) / 2


def check_margin(module: ModuleType) -> None:
    assert float(module.bradley_terry_loss(SCORES, LABELS, margin=LEAD)) == pytest.approx(LED, abs=1e-6)
    none = module.bradley_terry_loss(SCORES, LABELS, margin=torch.zeros_like(LEAD))
    assert float(none) == pytest.approx(HAND, abs=1e-6)


def test_a_pair_must_lead_by_its_margin() -> None:
    check_margin(preference)


_LESS = "difference - torch.where(wins == 1, margin, 0.0)"
WRONG_LEAD = mutants(
    preference.bradley_terry_loss,
    {
        "added instead of subtracted": (_LESS, _LESS.replace("-", "+")),
        "forgotten": (_LESS, "difference"),
        "taken from the loss, not from the difference": (
            "losses = -F.logsigmoid(difference)",
            "losses = -F.logsigmoid(scores[:, :, None] - scores[:, None, :]) - margin",
        ),
        "of the other pair": ("wins == 1, margin, 0.0", "wins == 1, margin.mT, 0.0"),
        "of every pair the same": ("wins == 1, margin, 0.0", "wins == 1, margin.max() + 0.5, 0.0"),
    },
)


@pytest.mark.parametrize("mutant", WRONG_LEAD, ids=str)
def test_wrong_margins_show(mutant: Mutant) -> None:
    mutant.must_fail(check_margin)


def check_padding(module: ModuleType) -> None:
    padded = module.bradley_terry_loss(torch.tensor([[1.0, 0.0, 100.0]]), torch.tensor([[1.0, 0.0, NAN]]))
    assert float(padded) == pytest.approx(loss_of(1))
    scores = torch.tensor([[1.0, 0.0, 100.0], [0.0, 0.0, 0.0]], requires_grad=True)
    loss = module.bradley_terry_loss(scores, torch.tensor([[1.0, 0.0, NAN], [NAN, NAN, NAN]]))
    assert float(loss.detach()) == pytest.approx(loss_of(1))
    loss.backward()
    # d/ds of -log sigmoid(s0 - s1) at difference 1: -(1 - sigmoid(1)) = -0.268941, and the opposite
    expected = torch.tensor([[-0.268941, 0.268941, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(scores.grad, expected, atol=1e-6, rtol=0)


def test_padding_with_nan_takes_part_in_no_pair() -> None:
    check_padding(preference)


def check_weights(module: ModuleType) -> None:
    # one pair of difference 1; three pairs of differences 1, 3, 2
    scores, labels = (
        torch.tensor([[1.0, 0.0, 0.0], [3.0, 2.0, 0.0]]),
        torch.tensor([[1.0, 0.0, NAN], [2.0, 1.0, 0.0]]),
    )
    expected = loss_of(1) + (loss_of(1) + loss_of(3) + loss_of(2)) / 3
    assert float(module.bradley_terry_loss(scores, labels)) == pytest.approx(expected)


def test_every_prompt_weighs_the_same_however_many_pairs_it_has() -> None:
    check_weights(preference)


WRONG_WEIGHTS = [
    (
        check_weights,
        mutants(
            preference.bradley_terry_loss,
            {
                "all pairs in one pot": ("count = wins.sum(dim=(1, 2))", "count = (wins.sum() / len(wins))"),
                "mean over prompts": ("/ count).sum()", "/ count).mean()"),
            },
        ),
    ),
    (
        check_padding,
        mutants(
            preference.bradley_terry_loss,
            {"a prompt without pairs divides by zero": (".clamp(min=1)", "")},
        )
        + mutants(
            preference.preferred_pairs,
            {
                "padding is the worst": (
                    "return labels",
                    "labels = labels.nan_to_num(-1.0)\n    return labels",
                )
            },
        ),
    ),
]


@pytest.mark.parametrize(
    ("check", "mutant"),
    [(check, mutant) for check, wrong in WRONG_WEIGHTS for mutant in wrong],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_wrong_weights_and_padding_show(check: Check, mutant: Mutant) -> None:
    mutant.must_fail(check)


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


def check_accuracy(module: ModuleType) -> None:
    # pairs (0, 1) right, (0, 2) right, (1, 2) equal: 2.5 of 3
    assert module.pair_accuracy(ACCURACY_SCORES, ACCURACY_LABELS) == (2.5, 3)
    assert module.pair_accuracy(-ACCURACY_SCORES, ACCURACY_LABELS) == (0.5, 3)
    assert module.pair_accuracy(ACCURACY_SCORES, ACCURACY_LABELS, tie_tolerance=1.5) == (1.0, 1)


def test_pair_accuracy_counts_equal_scores_half() -> None:
    check_accuracy(preference)


WRONG_ACCURACY = mutants(
    preference.pair_accuracy,
    {
        "equal is wrong": (" + 0.5 * (difference == 0).float()", ""),
        "equal is right": ("0.5 * (difference == 0)", "(difference == 0)"),
        "turned round": ("difference > 0", "difference < 0"),
        "a share instead of a count": (
            "float((wins * right).sum())",
            "float((wins * right).sum() / wins.sum())",
        ),
        "ties of the labels as well": ("(wins * right)", "right"),
        "tolerance not used": ("pair_wins(labels, tie_tolerance, ties)", "pair_wins(labels, 0.0, ties)"),
    },
)


@pytest.mark.parametrize("mutant", WRONG_ACCURACY, ids=str)
def test_wrong_accuracies_show(mutant: Mutant) -> None:
    mutant.must_fail(check_accuracy)


# ---- ties that are won by half -----------------------------------------------------------------------------

# The scores and labels of the beginning, differences 1, 2 and, of the tie, 1. C(3, 2) = 3 pairs:
# (ln(1 + e^-1) + ln(1 + e^-2) + (ln(1 + e^-1) + ln(1 + e^1)) / 2) / 3 = (0.313262 + 0.126928 + 0.813262) / 3
HALF = (0.313262 + 0.126928 + 0.813262) / 3


def check_half(module: ModuleType) -> None:
    half = module.bradley_terry_loss(SCORES, LABELS, ties="half")
    assert float(half) == pytest.approx(HALF, abs=1e-6)
    assert module.pair_wins(LABELS, ties="half").tolist() == [[[0, 1, 1], [0, 0, 0.5], [0, 0.5, 0]]]
    assert module.pair_wins(LABELS).tolist() == [[[0, 1, 1], [0, 0, 0], [0, 0, 0]]]


def test_a_tie_may_be_won_by_half() -> None:
    check_half(preference)
    # alone, a tie is cheapest where the scores are equal, and pulls them together
    scores = torch.tensor([[1.0, 0.0]], requires_grad=True)
    bradley_terry_loss(scores, torch.tensor([[3.0, 3.0]]), ties="half").backward()
    # d/ds of (-log sigmoid(d) - log sigmoid(-d)) / 2 at d = 1: sigmoid(1) - 1/2 = 0.231059
    torch.testing.assert_close(scores.grad, torch.tensor([[0.231059, -0.231059]]), atol=1e-6, rtol=0)
    assert float(bradley_terry_loss(torch.zeros(1, 2), torch.ones(1, 2), ties="half")) == pytest.approx(
        math.log(2)
    )


WRONG_HALF = [
    *mutants(
        preference.pair_wins,
        {
            "left out": ('ties == "half"', 'ties == "no"'),
            "won by one of the two": (
                "0.5 * (tied & ~torch.eye(",
                "(tied & ~torch.tril(torch.ones_like(tied[0])) & ~torch.eye(",
            ),
            "won by both, whole": ("wins + 0.5 * (", "wins + ("),
            "counted twice in the mean": ("wins + 0.5", "wins + 0.25"),
            "an answer ties with itself": (
                " & ~torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device)",
                "",
            ),
        },
    ),
    *mutants(
        preference.bradley_terry_loss,
        {
            "half not weighed in the loss": ("wins * losses, 0.0", "losses, 0.0"),
            "ties not passed on": (
                "pair_wins(labels, tie_tolerance, ties)",
                "pair_wins(labels, tie_tolerance)",
            ),
        },
    ),
]


@pytest.mark.parametrize("mutant", WRONG_HALF, ids=str)
def test_wrong_ties_show(mutant: Mutant) -> None:
    mutant.must_fail(check_half)


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


def check_logistic(module: ModuleType) -> None:
    assert float(module.logistic_loss(TEXT_SCORES, GOOD)) == pytest.approx(LOGISTIC, abs=1e-6)
    scores = TEXT_SCORES.clone().requires_grad_()
    module.logistic_loss(scores, GOOD).backward()
    torch.testing.assert_close(scores.grad, TEXT_SCORES.sigmoid() - GOOD.float(), atol=1e-6, rtol=0)  # p - y


def test_the_loss_of_classes_by_hand() -> None:
    check_logistic(preference)
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(TEXT_SCORES, GOOD.float(), reduction="sum")
    assert float(theirs) == pytest.approx(LOGISTIC, abs=1e-6)


def check_far_scores(module: ModuleType) -> None:
    assert (
        float(module.logistic_loss(torch.tensor([1000.0, -1000.0]), torch.tensor([False, False]))) == 1000.0
    )


def test_far_scores_do_not_overflow() -> None:
    check_far_scores(preference)
    (plain,) = mutants(
        preference.logistic_loss,
        {
            "logarithm of a sigmoid": (
                "F.logsigmoid(torch.where(positive, scores, -scores))",
                "torch.where(positive, scores, -scores).sigmoid().log()",
            )
        },
    )
    plain.must_fail(check_far_scores)


WRONG_LOGISTIC = mutants(
    preference.logistic_loss,
    {
        "sign lost": ("positive, scores, -scores", "positive, -scores, scores"),
        "good texts only": ("torch.where(positive, scores, -scores)", "scores[positive]"),
        "averaged": (".sum()", ".mean()"),
        "squared": (
            "-F.logsigmoid(torch.where(positive, scores, -scores)).sum()",
            "((scores.sigmoid() - positive.float()) ** 2).sum()",
        ),
    },
)


@pytest.mark.parametrize("mutant", WRONG_LOGISTIC, ids=str)
def test_wrong_losses_of_classes_show(mutant: Mutant) -> None:
    mutant.must_fail(check_logistic)
