"""The barrier inside of compiled code: nobody passes early, and who waits for long sleeps and is woken."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from numba import njit

from chatwright.generate.kernels import barrier
from chatwright.generate.kernels.barrier import SYNC_SIZE, meet


@njit(nogil=True)
def some_rounds(sync, threads, rounds, seen, me):
    """Write the round's number, meet, look at what the others wrote; how often somebody was behind."""
    early = 0
    for number in range(rounds):
        seen[16 * me] = number
        meet(sync, threads)
        for other in range(threads):
            if seen[16 * other] != number:
                early += 1
        meet(sync, threads)
    return early


@njit(nogil=True)
def one_meeting(sync, threads):
    meet(sync, threads)


def in_threads(count: int, job: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=job, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a thread waits for ever"


@pytest.mark.parametrize(("threads", "rounds"), [(1, 5), (2, 2_000), (5, 300)])
def test_nobody_passes_before_all_have_come(threads: int, rounds: int) -> None:
    """With more threads than processors most of the waiting is asleep."""
    sync, seen = np.zeros(SYNC_SIZE, dtype=np.int64), np.full(16 * threads, -1, dtype=np.int64)
    early = [-1] * threads

    def job(me: int) -> None:
        early[me] = some_rounds(sync, threads, rounds, seen, me)

    in_threads(threads, job)
    assert early == [0] * threads
    assert sync[barrier._ROUND] == (0 if threads == 1 else 2 * rounds)
    assert sync[barrier._ARRIVED] == sync[barrier._SLEEPING] == 0


def test_who_waits_for_long_sleeps_and_is_woken_by_the_last() -> None:
    one_meeting(np.zeros(SYNC_SIZE, dtype=np.int64), 1)  # compiled
    sync = np.zeros(SYNC_SIZE, dtype=np.int64)
    waiting = threading.Thread(target=one_meeting, args=(sync, 2), daemon=True)
    waiting.start()
    deadline = time.monotonic() + 60
    while sync[barrier._SLEEPING] == 0:
        assert time.monotonic() < deadline, "it never went to sleep"
        time.sleep(0.001)
    one_meeting(sync, 2)
    waiting.join(timeout=60)
    assert not waiting.is_alive(), "nobody woke it"
    assert sync[barrier._SLEEPING] == 0 and sync[barrier._ROUND] == 1
