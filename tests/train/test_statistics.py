"""Intervals by hand and against scipy's, and what counts as shown."""

from __future__ import annotations

import pytest
import torch

from chatwright.train.statistics import (
    FEWEST,
    Difference,
    bootstrap_interval,
    paired_difference,
    standard_error,
    wilson_interval,
)


def test_wilson_is_that_of_the_book() -> None:
    # 5 of 5: n / (n + z^2) is the lower end, 5 / 8.841
    assert wilson_interval(5, 5) == (pytest.approx(0.5655, abs=1e-4), 1.0)
    assert wilson_interval(0, 5) == (0.0, pytest.approx(0.4345, abs=1e-4))
    assert wilson_interval(0, 0) == (0.0, 1.0)
    # Newcombe 1998, table I: 81 of 263
    assert wilson_interval(81, 263) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))


def test_a_difference_is_paired() -> None:
    """Prompts differ by far more than the models do: pairs see the difference all the same."""
    draw = torch.Generator().manual_seed(1)
    before = 10 * torch.randn(40, generator=draw)
    after = before + 0.3 + 0.1 * torch.randn(40, generator=draw)
    found = paired_difference(before.tolist(), after.tolist(), seed=1)
    assert found.better and not found.worse and found.count == 40
    assert 0.25 < found.interval[0] < found.mean < found.interval[1] < 0.35
    assert found.told().startswith("+0.") and "nothing" not in found.told()
    assert paired_difference(after.tolist(), before.tolist(), seed=1).worse


def test_what_says_nothing() -> None:
    draw = torch.Generator().manual_seed(1)
    noise = torch.randn(40, generator=draw)
    found = paired_difference([0.0] * 40, (noise - noise.mean()).tolist(), seed=1)
    assert not found.better and not found.worse
    assert found.told().startswith("nothing was shown, the interval holds 0: ")
    few = paired_difference([0.0] * (FEWEST - 1), [1.0] * (FEWEST - 1), seed=1)
    assert not few.better and few.told().startswith(f"nothing was shown, {FEWEST - 1} prompts are too few: ")
    assert paired_difference([0.0] * FEWEST, [1.0] * FEWEST, seed=1).better
    assert not paired_difference([], [], seed=1).better
    assert Difference(0.5, (0.1, 0.9), 20, "comparisons").told() == (
        "+0.500, 95 % interval +0.100 to +0.900, 20 comparisons"
    )


def test_equal_values_have_no_spread() -> None:
    for value in (0.1, 0.7, 1e3 / 3, -2.3):
        for count in (1, 2, 7, 1000):
            values = torch.full((count,), value)
            assert standard_error(values) == 0.0
            assert bootstrap_interval(values, seed=1) == (float(values[0]), float(values[0]))
            same = paired_difference(values.tolist(), values.tolist(), seed=1)
            assert (same.mean, same.interval) == (0.0, (0.0, 0.0)) and not same.better and not same.worse
    assert standard_error(torch.tensor([1.0, 3.0])) == pytest.approx(1.0)
    assert standard_error(torch.tensor([])) == 0.0 and bootstrap_interval(torch.tensor([]), seed=1) == (
        0.0,
        0.0,
    )
