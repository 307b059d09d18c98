"""What other programs take of the processors: from made-up counts of the system to what a budget counts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chatwright.train import busy
from chatwright.train.busy import BusyMeter, Reading


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the meter sees; set its only element."""
    now = [100.0]
    monkeypatch.setattr(busy.time, "perf_counter", lambda: now[0])
    return now


def meter_of(
    clock: list[float],
    *,
    own: float,
    everybody: float,
    processors: int = 2,
    threads: int = 2,
    processes: int = 1,
) -> BusyMeter:
    """A meter after two seconds in which the programs have used so many processors on average."""

    def reading() -> Reading:
        return Reading(clock[0], own * clock[0], everybody * clock[0])

    meter = BusyMeter(reading, processors=processors, threads=threads, processes=processes)
    clock[0] += 2.0
    return meter


@pytest.mark.parametrize(
    ("use", "left"),
    [
        ({"own": 1.8, "everybody": 1.8}, 1.0),  # alone
        ({"own": 1.8, "everybody": 1.86}, 1.0),  # the system's own housekeeping
        ({"own": 1.3, "everybody": 2.0}, 0.65),  # one busy loop
        ({"own": 0.7, "everybody": 2.0}, 0.35),
        ({"own": 0.9, "everybody": 1.9, "threads": 1}, 1.0),  # there is room for both
        ({"own": 0.5, "everybody": 2.0, "threads": 1}, 0.5),
        ({"own": 3.5, "everybody": 7.5, "processors": 8, "threads": 4}, 1.0),
        ({"own": 2.0, "everybody": 8.0, "processors": 8, "threads": 4}, 0.5),
        (
            {"own": 1.0, "everybody": 2.0, "threads": 8},
            0.5,
        ),  # more threads than processors want no more than those
        (
            {"own": 1.0, "everybody": 2.0, "threads": 1, "processes": 2},
            1.0,
        ),  # the other one is of the same run
        ({"own": 0.7, "everybody": 2.0, "threads": 1, "processes": 2}, 0.7),
    ],
)
def test_the_share_that_is_left(clock: list[float], use: dict[str, float], left: float) -> None:
    meter = meter_of(clock, **use)  # type: ignore[arg-type]
    assert meter.lost(3.0) == pytest.approx(3.0 * (1 - left))
    assert meter.left == pytest.approx(left)


def test_between_two_readings_the_last_one_holds(clock: list[float]) -> None:
    meter = meter_of(clock, own=1.0, everybody=2.0)
    assert meter.look() == 0.5
    meter.reading = lambda: Reading(clock[0], 2.0 * clock[0], 2.0 * clock[0])
    clock[0] += 0.5
    assert meter.look() == 0.5


def test_where_the_system_does_not_tell_all_time_counts(clock: list[float]) -> None:
    meter = BusyMeter(lambda: None, processors=2, threads=2)
    clock[0] += 10.0
    assert meter.lost(10.0) == 0.0


def test_a_count_that_vanishes_changes_nothing(clock: list[float]) -> None:
    meter = meter_of(clock, own=1.0, everybody=2.0)
    assert meter.look() == 0.5
    meter.reading = lambda: None
    clock[0] += 10.0
    assert meter.lost(1.0) == 0.5
    clock[0] += 10.0
    assert meter.lost(1.0) == 0.5


def test_on_a_gpu_all_time_counts(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATWRIGHT_DEVICE", "cuda:0")
    assert meter_of(clock, own=0.1, everybody=2.0).look() == 1.0


def test_the_counts_are_those_of_the_processors_that_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """User, nice, system, interrupts and what the host takes count; idle, waiting for disks and guests (a
    part of user) do not."""
    tick = os.sysconf("SC_CLK_TCK")
    stat = tmp_path / "stat"
    stat.write_text(
        f"cpu  {90 * tick} 0 0 0 0 0 0 0 0 0\n"
        f"cpu0 {1 * tick} {2 * tick} {3 * tick} {50 * tick} {60 * tick} {4 * tick} {5 * tick} {6 * tick} "
        f"{1 * tick} 0\n"
        f"cpu1 {7 * tick} 0 0 {9 * tick} 0 0 0 0 0 0\n"
        f"cpu12 {1_000 * tick} 0 0 0 0 0 0 0 0 0\n"
        "intr 123 4 5\nctxt 99\n"
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    found = busy.read(stat)
    assert found is not None and found.everybody == pytest.approx(1 + 2 + 3 + 4 + 5 + 6 + 7)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {12}, raising=False)
    found = busy.read(stat)
    assert found is not None and found.everybody == pytest.approx(1_000)


@pytest.mark.parametrize("text", [None, "cpu0 1 2 three\n"])
def test_no_counts_or_strange_ones(tmp_path: Path, text: str | None) -> None:
    stat = tmp_path / "stat"
    if text is not None:
        stat.write_text(text)
    assert busy.read(stat) is None


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
