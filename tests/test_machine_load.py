"""How many processors other programs keep busy, from made-up counts of the system."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chatwright import machine_load
from chatwright.machine_load import LoadMeter, Reading, threads_beside


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the meter sees; set its only element."""
    now = [100.0]
    monkeypatch.setattr(machine_load.time, "perf_counter", lambda: now[0])
    return now


def meter_of(clock: list[float], own: float, everybody: float, *, alike: int = 1) -> LoadMeter:
    """A meter of 2 processors after two seconds in which the programs have used so many of them."""

    def reading() -> Reading:
        return Reading(clock[0], own * clock[0], everybody * clock[0])

    meter = LoadMeter(reading, count=2, alike=alike)
    clock[0] += 2.0
    return meter


@pytest.mark.parametrize(
    ("own", "everybody", "alike", "others"),
    [
        (1.8, 1.8, 1, 0.0),  # alone
        (1.8, 1.86, 1, 0.0),  # the system's own housekeeping
        (1.3, 2.0, 1, 0.7),  # one busy loop
        (0.9, 1.9, 1, 1.0),
        (0.9, 1.8, 2, 0.0),  # the other one belongs to this one
        (0.7, 2.0, 2, 0.6),
        (1.9, 1.7, 1, 0.0),  # counts are never exact
    ],
)
def test_what_others_use(clock: list[float], own: float, everybody: float, alike: int, others: float) -> None:
    assert meter_of(clock, own, everybody, alike=alike).look() == pytest.approx(others)


def test_between_two_readings_the_last_one_holds(clock: list[float]) -> None:
    meter = meter_of(clock, 1.0, 2.0)
    assert meter.look() == pytest.approx(1.0)
    meter.reading = lambda: Reading(clock[0], 2.0 * clock[0], 2.0 * clock[0])
    clock[0] += 0.5
    assert meter.look() == pytest.approx(1.0)


def test_where_the_system_does_not_tell_nobody_else_is_there(clock: list[float]) -> None:
    meter = LoadMeter(lambda: None, count=2)
    clock[0] += 10.0
    assert meter.look() == 0.0


def test_counts_that_vanish_change_nothing(clock: list[float]) -> None:
    meter = meter_of(clock, 1.0, 2.0)
    assert meter.look() == pytest.approx(1.0)
    meter.reading = lambda: None
    for _ in range(2):
        clock[0] += 10.0
        assert meter.look() == pytest.approx(1.0)


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
    found = machine_load.read(stat)
    assert found is not None and found.everybody == pytest.approx(1 + 2 + 3 + 4 + 5 + 6 + 7)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {12}, raising=False)
    found = machine_load.read(stat)
    assert found is not None and found.everybody == pytest.approx(1_000)


@pytest.mark.parametrize("text", [None, "cpu0 1 2 three\n"])
def test_no_counts_or_strange_ones(tmp_path: Path, text: str | None) -> None:
    stat = tmp_path / "stat"
    if text is not None:
        stat.write_text(text)
    assert machine_load.read(stat) is None


@pytest.mark.parametrize(
    ("others", "threads", "count", "expected"),
    [
        (0.0, 2, 2, 2),
        (0.3, 2, 2, 2),  # more often than not there is room for both
        (1.0, 2, 2, 1),
        (2.0, 2, 2, 1),
        (1.0, 16, 16, 15),
        (12.0, 16, 16, 8),  # half of them stay
        (6.0, 4, 16, 4),  # processors to spare
        (2.0, 3, 3, 2),
        (1.0, 1, 2, 1),
        (1.9, 8, 2, 4),  # more threads than processors were asked for
    ],
)
def test_threads_that_have_a_processor_to_themselves(
    others: float, threads: int, count: int, expected: int
) -> None:
    assert threads_beside(others, threads=threads, count=count) == expected
