"""Best of n: the estimator against every subset, its KL against an exact distribution."""

from __future__ import annotations

import itertools
import math
from types import ModuleType
from typing import Any

import pytest
import torch

from chatwright.config import UsageError
from chatwright.evaluate import best_of_n as estimator
from chatwright.evaluate.best_of_n import (
    at_kl,
    best_of_n,
    best_of_n_kl,
    optima,
    point,
    sizes,
    tilted,
)
from chatwright.stages.best_of_n import Config, report_of
from support.mutation import Mutant, mutants

SCORES = torch.tensor([[0.3, 2.0, -1.0, 0.7, 0.1], [1.0, 1.0, 0.0, -2.0, 1.0]])
GOLD = torch.tensor([[1.0, -3.0, 0.5, 2.0, 4.0], [1.0, 2.0, 5.0, 7.0, 6.0]])


def by_subsets(scores: list[float], values: list[float], n: int) -> float:
    """The mean over every subset of n; answers that tie for the best share."""
    total = []
    for subset in itertools.combinations(range(len(scores)), n):
        top = max(scores[i] for i in subset)
        best = [values[i] for i in subset if scores[i] == top]
        total.append(sum(best) / len(best))
    return sum(total) / len(total)


def check_estimator(module: ModuleType, n: int = 3) -> None:
    for values in (SCORES, GOLD):
        found = module.best_of_n(SCORES, values, n)
        for row in range(2):
            by_hand = by_subsets(SCORES[row].tolist(), values[row].tolist(), n)
            assert float(found[row]) == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_the_estimator_is_the_mean_over_all_subsets(n: int) -> None:
    check_estimator(estimator, n)


WRONG = mutants(
    estimator.best_of_n,
    {
        "the first n": (
            "return shared @ weights",
            "return values[:, :n].double().gather(1, scores[:, :n].argmax(1, keepdim=True))[:, 0]",
        ),
        "gold's own best": ("order = scores", "order = values"),
        "the worst": ("argsort(dim=1)", "argsort(dim=1, descending=True)"),
        "with replacement": (
            "math.comb(i, n - 1) for",
            "math.comb(size, n) * ((i + 1) ** n - i**n) / size**n for",
        ),
        "ties go to the last": ("return shared @", "return told @"),
        "one answer too many": ("math.comb(i, n - 1) for", "math.comb(i, n) for"),
    },
)


@pytest.mark.parametrize("mutant", WRONG, ids=str)
def test_wrong_estimators_show(mutant: Mutant) -> None:
    mutant.must_fail(check_estimator)


def test_it_is_unbiased_whatever_the_number_of_answers() -> None:
    """Completions with uniform scores: the best of n is n / (n + 1) on average, from 4 answers as from 16."""
    draw = torch.Generator().manual_seed(0)
    for size in (4, 16):
        scores = torch.rand(20_000, size, generator=draw)
        for n in (1, 2, 4):
            assert float(best_of_n(scores, scores, n).mean()) == pytest.approx(
                n / (n + 1), abs=3e-3
            )  # error 0.002


def test_n_must_be_among_the_answers() -> None:
    for n in (0, 6):
        with pytest.raises(ValueError):
            best_of_n(SCORES, SCORES, n)


def test_the_kl_of_many_equally_likely_answers() -> None:
    """Exact KL of the best of n of M ranked answers: p(i) = ((i + 1)^n - i^n) / M^n. Near log n - (n - 1) /
    n, and below."""
    for n in (1, 2, 4, 16):
        exact = sum(
            p * math.log(5000 * p) for i in range(5000) if (p := ((i + 1) / 5000) ** n - (i / 5000) ** n) > 0
        )
        assert best_of_n_kl(n) == pytest.approx(exact, abs=1e-4)
        coarse = sum(p * math.log(5 * p) for i in range(5) if (p := ((i + 1) / 5) ** n - (i / 5) ** n) > 0)
        assert coarse <= best_of_n_kl(n) + 1e-12
    assert best_of_n_kl(4) == pytest.approx(0.636294, abs=1e-6)  # ln 4 - 3 / 4


def test_sizes() -> None:
    assert sizes(16) == [1, 2, 4, 8, 16] and sizes(10) == [1, 2, 4, 8, 10] and sizes(2) == [1, 2]


def test_what_stands_at_a_kl() -> None:
    curve = [(0.0, 1.0), (0.5, 2.0), (1.0, 4.0)]
    assert at_kl(curve, 0.25) == pytest.approx(1.5) and at_kl(curve, 0.75) == pytest.approx(3.0)
    assert at_kl(curve, 1.5) is None


@pytest.mark.parametrize("beta", [2.0, 1.0, 0.5])
def test_the_optimum_for_normal_scores(beta: float) -> None:
    """Scores from N(0, 1), tilted by exp(score / beta), are N(1 / beta, 1), 1 / (2 beta^2) nats away."""
    scores = torch.randn(16, 40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kl, score = tilted(scores, scores, beta)
    assert float(score.mean()) == pytest.approx(1 / beta, rel=0.02)
    assert float(kl.mean()) == pytest.approx(1 / (2 * beta**2), rel=0.04)


def test_the_optimum_of_two_answers_by_hand() -> None:
    """Weights e / (1 + e) and 1 / (1 + e) at scores 1 and 0 and beta 1; a hopeless answer has none."""
    heavy = math.e / (1 + math.e)
    kl, gold = tilted(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, -2.0]]), 1.0)
    assert float(gold) == pytest.approx(2 * heavy - 2 * (1 - heavy), abs=1e-6)
    assert float(kl) == pytest.approx(
        heavy * math.log(2 * heavy) + (1 - heavy) * math.log(2 * (1 - heavy)), abs=1e-6
    )
    kl, gold = tilted(torch.tensor([[0.0, -1e6]]), torch.tensor([[3.0, 9.0]]), 0.1)
    assert float(gold) == 3.0 and float(kl) == pytest.approx(math.log(2))


def test_no_policy_of_the_same_kl_scores_higher_than_the_optimum() -> None:
    """Against random re-weightings of the same answers, scaled to the optimum's KL."""
    draw = torch.Generator().manual_seed(2)
    scores = torch.randn(1, 12, generator=draw, dtype=torch.float64)
    kl, score = tilted(scores, scores, 0.7)
    for _ in range(200):
        other = torch.randn(1, 12, generator=draw, dtype=torch.float64)
        low, high = 1e-3, 1e3
        for _ in range(60):  # bisection for the temperature at which it is as far away
            middle = math.sqrt(low * high)
            low, high = (
                (low, middle) if float(tilted(other, other, middle)[0]) < float(kl) else (middle, high)
            )
        assert float(tilted(other, scores, high)[1]) < float(score)


def test_optima_are_told_as_far_as_enough_answers_count() -> None:
    scores = torch.randn(4_000, 32, generator=torch.Generator().manual_seed(3))
    found = optima(scores, 0.5 * scores, seed=3)
    assert list(found) == [3.2, 1.6, 0.8]  # at 0.4 fewer than 8 of 32 would count
    kls = [row["kl"] for row in found.values()]
    assert kls == sorted(kls) and kls[-1] < math.log(4)
    for row in found.values():
        assert (
            0.9 < row["score"] / math.sqrt(2 * row["kl"]) < 1.1
        )  # of normal scores, a policy that far away can have this
        assert row["score_low"] < row["score"] < row["score_high"] and row["gold"] == pytest.approx(
            0.5 * row["score"], abs=1e-5
        )


def test_the_curve_has_intervals_over_prompts() -> None:
    draw = torch.Generator().manual_seed(1)
    scores = torch.randn(64, 8, generator=draw)
    rows = [point(scores, scores * 0.5, n, seed=3) for n in sizes(8)]
    for row in rows:
        assert row["score_low"] < row["score"] < row["score_high"]
        assert row["gold"] == pytest.approx(0.5 * row["score"], abs=1e-5)
    # the mean of n = 1 has standard error 1 / sqrt(64 x 8): an interval of about 4 of them
    assert 0.1 < rows[0]["score_high"] - rows[0]["score_low"] < 0.25
    assert rows[1] == point(scores, scores * 0.5, 2, seed=3)


def test_the_report_puts_a_rival_beside_the_curve() -> None:
    draw = torch.Generator().manual_seed(1)
    scores = torch.randn(64, 8, generator=draw)
    rows = {n: point(scores, None, n, seed=3) for n in sizes(8)}
    baseline: dict[str, float] = {"kl": rows[4]["kl"], "score": 9.0, "score_low": 8.0, "score_high": 10.0}
    report = report_of(Config(n=8, baseline_policy="ppo"), rows, baseline, {1.6: rows[2]})
    (table,) = report.tables
    assert [row[0] for row in table.rows] == [
        "best of 1",
        "best of 2",
        "best of 4",
        "best of 8",
        "optimum at beta 1.6",
        "ppo",
    ]
    assert report.facts["optima"] == {"1.6": rows[2]}
    assert table.columns == ["", "KL, nats", "score"] and table.rows[-1][2] == "9.000 (8.000 to 10.000)"
    assert f"where best-of-n has {rows[4]['score']:.3f}" in report.notes[0]
    beyond = report_of(Config(n=8, baseline_policy="ppo"), rows, {**baseline, "kl": 7.0})
    assert "beyond the largest n" in beyond.notes[0]


@pytest.mark.parametrize("settings", [{"n": 1}, {"temperature": 0.0}])
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Config(**settings)
