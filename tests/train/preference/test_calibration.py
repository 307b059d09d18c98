"""Predicted against observed: bins, pairs and Platt's scale by hand and against what is known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from chatwright.train.preference.calibration import BINS, draw, log_loss, pair_reliability, platt, reliability

NAN = float("nan")


def test_bins_by_hand() -> None:
    found = reliability(
        torch.tensor([0.05, 0.15, 0.55, 0.6, 1.0]), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]), bins=2
    )
    assert found.count.tolist() == [2, 3]
    assert found.predicted.tolist() == pytest.approx([0.1, (0.55 + 0.6 + 1) / 3])
    assert found.observed.tolist() == pytest.approx([0.5, 2 / 3])
    # (2 |0.1 - 0.5| + 3 |0.716667 - 0.666667|) / 5 = 0.19
    assert found.error == pytest.approx(0.19)
    # with a bin for each there are empty ones, which count for nothing: (0.05 + 0.85 + 0.45 + 0.6 + 0) / 5
    assert reliability(
        torch.tensor([0.05, 0.15, 0.55, 0.6, 1.0]), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]), bins=100
    ).error == pytest.approx(0.39)


def test_pairs_by_hand() -> None:
    scores, labels = torch.tensor([[2.0, 0.0, 1.0, 9.0]]), torch.tensor([[1.0, 0.0, 3.0, NAN]])
    # pairs: (0, 1) by 2, right; (0, 2) by 1, wrong; (2, 1) by 1, right
    one, two = (
        1 / (1 + math.exp(-1)),
        1 / (1 + math.exp(-2)),
    )  # 0.731, 0.881: bins 4 and 7 of ten from 1/2 to 1
    found = pair_reliability(scores, labels)
    assert found.count.tolist() == [0, 0, 0, 0, 2, 0, 0, 1, 0, 0]
    assert found.predicted[4] == pytest.approx(one, abs=1e-6) and found.observed[4] == 0.5
    assert found.predicted[7] == pytest.approx(two, abs=1e-6) and found.observed[7] == 1.0
    assert found.error == pytest.approx((2 * (one - 0.5) + 1 - two) / 3, abs=1e-6)
    # the order in which the answers stand changes nothing
    order = torch.tensor([1, 2, 3, 0])
    assert pair_reliability(scores[:, order], labels[:, order]).error == pytest.approx(found.error)
    # ties: left out, or half right; equal scores are half right
    tied = torch.tensor([[1.0, 1.0, 3.0, NAN]])
    assert pair_reliability(scores, tied).count.sum() == 2
    half = pair_reliability(scores, tied, ties="half")
    assert half.count.sum() == 3 and half.observed[7] == 0.5
    assert pair_reliability(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])).observed[0] == 0.5


def test_a_model_that_is_right_about_itself_has_no_error() -> None:
    draw_from = torch.Generator().manual_seed(1)
    scores = torch.randn(40_000, 2, generator=draw_from) * 2
    first = torch.rand(40_000, generator=draw_from) < (scores[:, 0] - scores[:, 1]).sigmoid()
    labels = torch.stack([first.float(), 1 - first.float()], 1)
    assert pair_reliability(scores, labels).error < 0.01
    assert pair_reliability(3 * scores, labels).error > 0.05  # too sure of itself
    assert pair_reliability(-scores, labels).error > 0.3


def test_platt_finds_the_scale_that_made_the_classes() -> None:
    draw_from = torch.Generator().manual_seed(2)
    scores = torch.randn(20_000, generator=draw_from) * 3 + 1
    positive = torch.rand(20_000, generator=draw_from) < (2 * (scores - 0.5)).sigmoid()
    scale, offset = platt(scores, positive)
    assert scale == pytest.approx(2.0, abs=0.1) and offset == pytest.approx(0.5, abs=0.05)
    best = log_loss(scale * (scores - offset), positive)
    for a, b in ((1.1, 0.0), (0.9, 0.0), (1.0, 0.1), (1.0, -0.1)):
        assert log_loss(scale * a * (scores - offset - b), positive) > best
    assert platt(scale * (scores - offset), positive) == pytest.approx(
        (1.0, 0.0), abs=1e-6
    )  # done twice is done once


def test_platt_is_finite_where_a_threshold_separates_the_classes() -> None:
    scale, offset = platt(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([False, False, True, True]))
    assert 0 < scale < 10 and offset == pytest.approx(2.5, abs=1e-6)
    scale, offset = platt(torch.tensor([1e4, 2e4, -3e4, 1.5e4]), torch.tensor([True, True, False, True]))
    assert math.isfinite(scale) and math.isfinite(offset)


def test_platt_refuses_what_tells_nothing() -> None:
    with pytest.raises(ValueError, match="one class only"):
        platt(torch.tensor([1.0, 2.0]), torch.tensor([True, True]))
    with pytest.raises(ValueError, match="do not rise with the class"):
        platt(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([True, True, False, False]))


def test_the_picture(tmp_path: Path) -> None:
    found = reliability(torch.tensor([0.5, 0.9]), torch.tensor([1.0, 0.0]), low=0.5)
    assert len(found.count) == BINS
    name = draw(tmp_path, found, low=0.5, what="share")
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("value", [0.1, 0.7, 1e3 / 3])
def test_scores_that_are_all_the_same_tell_nothing(value: float) -> None:
    scores, positive = torch.full((7,), value), torch.tensor([True, False, True, False, True, True, False])
    with pytest.raises(ValueError, match="all scores are the same: they tell nothing"):
        platt(scores, positive)
    assert math.isfinite(reliability(scores.sigmoid(), positive.float()).error)
    ties = torch.full((2, 3), value)
    assert pair_reliability(ties, ties).error == 0.0  # no pair counts
    assert pair_reliability(ties, torch.tensor([[1.0, 0.0, 2.0]] * 2)).error == 0.0  # half are right, as said
    assert reliability(torch.tensor([]), torch.tensor([])).error == 0.0
