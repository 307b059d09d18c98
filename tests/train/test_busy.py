"""What other programs take of the processors, and what a budget in seconds then counts."""

from __future__ import annotations

import pytest

from chatwright.machine_load import LoadMeter
from chatwright.train import busy
from chatwright.train.busy import BusyMeter


class Others(LoadMeter):
    """A machine on which other programs keep so many processors busy."""

    def __init__(self, others: float, count: int, alike: int) -> None:
        super().__init__(lambda: None, count=count, alike=alike)
        self.others = others


@pytest.mark.parametrize(
    ("others", "left", "threads", "processors", "processes"),
    [
        (0.0, 1.0, 2, 2, 1),  # alone
        (0.7, 0.65, 2, 2, 1),  # one busy loop
        (1.3, 0.35, 2, 2, 1),
        (1.0, 1.0, 1, 2, 1),  # there is room for both
        (1.5, 0.5, 1, 2, 1),
        (4.0, 1.0, 4, 8, 1),
        (6.0, 0.5, 4, 8, 1),
        (1.0, 0.5, 8, 2, 1),  # more threads than processors want no more than those
        (0.0, 1.0, 1, 2, 2),  # processes that were started together
        (0.6, 0.7, 1, 2, 2),
        (2.3, 0.0, 2, 2, 1),  # counts are never exact
    ],
)
def test_the_share_that_is_left(
    others: float, left: float, threads: int, processors: int, processes: int
) -> None:
    meter = BusyMeter(Others(others, processors, processes), threads=threads)
    assert meter.lost(3.0) == pytest.approx(3.0 * (1 - left))
    assert meter.left == pytest.approx(left)


def test_on_a_gpu_all_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATWRIGHT_DEVICE", "cuda:0")
    assert BusyMeter(Others(1.9, 2, 1), threads=2).lost(3.0) == 0.0


def test_what_a_budget_counts_and_what_is_said() -> None:
    extra: dict[str, object] = {}
    assert busy.counted(extra, 10.0) == 10.0 and busy.note(extra, 10.0, 5) is None
    for _ in range(10):
        busy.remember(extra, 1.0, 0.05)
    assert busy.counted(extra, 10.0) == pytest.approx(9.5)
    assert busy.note(extra, 10.0, 100) is None  # a twentieth is not worth a line
    busy.remember(extra, 10.0, 4.5)
    text = busy.note(extra, 20.0, 100)
    assert text is not None and "took 25 %" in text and "0:15 of the budget took 0:20" in text
    assert "missing" not in text


def test_more_than_three_quarters_are_not_waited_for() -> None:
    extra: dict[str, object] = {}
    busy.remember(extra, 100.0, 90.0)
    assert busy.counted(extra, 100.0) == pytest.approx(25.0)
    text = busy.note(extra, 100.0, 30)
    assert text is not None and "took 90 %" in text
    # in 25 s of work there would have been 2.5 times the steps that were made in 10 s of it
    assert "about 45 steps are missing beside the 30 made" in text
