"""What other programs take of the processors while a stage trains, so that a budget in seconds counts the
work it could do.

A budget of 300 s means the work of 300 s. Beside a program that keeps one of two processors busy, a step
takes longer, and the clock on the wall alone would end the stage with fewer steps and a worse model. So of
each second that share counts which other programs left for this one:

    left = min(1, (processors - others) / threads)

`processors` are those that this process may run on, `others` how many of them other programs keep busy on
average, and `threads` how many this program would keep busy. Both are read from the system's own counts
(Linux: /proc/stat, with what the host of a virtual machine takes), about once a second. With few threads and
processors to spare nothing is lost, and all time counts.

The share agrees with the speed: pre-training on 2 processors made 3.5 to 4.5 steps in a second that was
counted, alone and beside one to eight other programs, while steps in a second on the wall went from 4.3 to
0.5.

Where these counts are missing (macOS, Windows) and on a GPU, all time counts, as on an idle machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chatwright import runtime
from chatwright.metrics import duration

LEAST = 0.25
"""The least share of a second that counts: however busy the machine, a stage takes at most four times its
budget."""
QUIET = 0.05
"""Below this share of the processors others are the system's own housekeeping, and count as nothing."""
WORTH_SAYING = 0.1
"""Share of the time that others took from which on a report says so."""
WINDOW = 1.0
"""Least seconds between two readings: the counts move in steps of 0.01 s."""
STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Reading:
    """Seconds on the wall, of this process on all processors, and of all programs on the processors it may
    run on."""

    wall: float
    own: float
    everybody: float


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


class BusyMeter:
    """The share of the time that other programs leave for this one (`left`), from 0 to 1."""

    def __init__(
        self,
        reading: Callable[[], Reading | None] = read,
        *,
        processors: int = 0,
        threads: int = 0,
        processes: int = 0,
    ) -> None:
        """0 means: as many as this process may run on; as torch computes with; as were started together on
        this machine."""
        self.reading = reading
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.processors = processors or available
        self.processes = processes or runtime.local_world_size()
        self.wanted = min(self.processors, (threads or torch.get_num_threads()) * self.processes)
        self.on_cpu = runtime.device().type == "cpu"
        self.left = 1.0
        self._before = reading() if self.on_cpu else None

    def look(self) -> float:
        """`left` as of the last second or so."""
        before = self._before
        if before is None or time.perf_counter() - before.wall < WINDOW:
            return self.left
        now = self.reading()
        if now is not None and now.wall > before.wall:
            own = (now.own - before.own) * self.processes  # those started together do the same work
            others = max(0.0, now.everybody - before.everybody - own) / (now.wall - before.wall)
            if others < QUIET * self.processors:
                others = 0.0
            self.left = max(0.0, min(1.0, (self.processors - others) / self.wanted))
        self._before = now
        return self.left

    def lost(self, seconds: float) -> float:
        """What others took of the last `seconds`."""
        return seconds * (1 - self.look())


def remember(extra: dict[str, Any], seconds: float, lost: float) -> None:
    """Add a step's seconds that others took, and those of them that are not counted, to what a checkpoint
    keeps."""
    kept = extra.setdefault("busy", {"lost": 0.0, "excused": 0.0})
    kept["lost"] += lost
    kept["excused"] += min(lost, seconds * (1 - LEAST))


def counted(extra: dict[str, Any], elapsed: float) -> float:
    """Seconds of the budget that `elapsed` seconds have used."""
    return float(elapsed - extra.get("busy", {}).get("excused", 0.0))


def note(extra: dict[str, Any], elapsed: float, steps: int) -> str | None:
    """What a report says when others took a good part of the time; None on a quiet machine."""
    lost = extra.get("busy", {}).get("lost", 0.0)
    if not elapsed or lost < WORTH_SAYING * elapsed:
        return None
    text = (
        f"the machine was busy: other programs took {100 * lost / elapsed:.0f} % of the processor time that "
        "training "
        f"could have used; {duration(counted(extra, elapsed))} of the budget took {duration(elapsed)}"
    )
    missing = round(steps * (lost - extra["busy"]["excused"]) / max(elapsed - lost, 1e-9))
    if missing > 0:
        text += (
            f", four times as long at most, so that about {missing} steps are missing beside the {steps} "
            "made; "
            "the model is worse for it"
        )
    return text
