"""How many processors other programs keep busy: what may be asked of a machine that is shared.

Linux counts the time of all programs on each processor (/proc/stat, with what the host of a virtual machine
takes) and that of this process. The difference is what others use. Where the counts are missing (macOS,
Windows) nobody else seems to be there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

QUIET = 0.05
"""Below this share of the processors others are the system's own housekeeping, and count as nothing."""
WINDOW = 1.0
"""Least seconds between two readings, unless told otherwise: the counts move in steps of 0.01 s."""
STAT = Path("/proc/stat")


def threads_beside(others: float, *, threads: int, count: int) -> int:
    """How many of `threads` have a processor each beside programs that keep `others` of `count` busy.

    Half of them at least: programs that make room for each other without end would all end with one thread.
    """
    return max((threads + 1) // 2, min(threads, round(count - others)))


@dataclass(frozen=True)
class Reading:
    """Seconds on the wall, of this process on all processors, and of all programs on the processors that
    it may run on."""

    wall: float
    own: float
    everybody: float


def processors() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read(stat: Path = STAT) -> Reading | None:
    """The counts of now; None where the system has none."""
    try:
        allowed, lines = os.sched_getaffinity(0), stat.read_text(encoding="ascii").splitlines()
        ticks = 0
        for line in lines:
            name, *fields = line.split()
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in allowed:
                user, nice, system, _idle, _waiting, interrupts, soft, stolen = map(int, fields[:8])
                ticks += user + nice + system + interrupts + soft + stolen
        return Reading(time.perf_counter(), time.process_time(), ticks / os.sysconf("SC_CLK_TCK"))
    except (AttributeError, OSError, ValueError):  # no such call, no such file, or another form
        return None


class LoadMeter:
    """Processors that other programs keep busy, on average over the last `window` seconds or so."""

    def __init__(
        self,
        reading: Callable[[], Reading | None] = read,
        *,
        count: int = 0,
        alike: int = 1,
        window: float = WINDOW,
    ) -> None:
        """`count` processors, 0: those that this process may run on. Of the programs `alike` do the same work
        as this process and belong to it: torchrun starts them together. `window`: least seconds between two
        readings."""
        self.reading, self.count, self.alike = reading, count or processors(), alike
        self.window = window
        self.others = 0.0
        self._before = reading()

    def look(self) -> float:
        """`others`, read anew when the last reading is old enough."""
        before = self._before
        if before is None or time.perf_counter() - before.wall < self.window:
            return self.others
        now = self.reading()
        if now is not None and now.wall > before.wall:
            own = (now.own - before.own) * self.alike
            others = max(0.0, now.everybody - before.everybody - own) / (now.wall - before.wall)
            self.others = others if others >= QUIET * self.count else 0.0
        self._before = now
        return self.others
