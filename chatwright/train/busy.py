"""Processor time that other programs take while a stage trains. A budget in seconds does not count it.

A budget of 300 s means the work of 300 s. Beside a program that keeps one of two processors busy a step takes
longer, and wall-clock time would end the stage with fewer steps and a worse model. So only a share of each
second counts, the share that other programs left for this one:

    left = min(1, (processors - others) / threads)

`processors` are those that this process may run on, `others` how many of them other programs keep busy
(chatwright/machine_load.py, about once a second), and `threads` how many this program would keep busy. With
few threads and processors to spare nothing is lost, and all time counts. All time counts on a GPU too.

The share agrees with the speed (docs/lab/performance.md, "Beside other programs").
"""

from __future__ import annotations

from typing import Any

import torch

from chatwright import runtime
from chatwright.machine_load import LoadMeter
from chatwright.metrics import duration

LEAST = 0.25
"""The least share of a second that counts: on the busiest machine a stage takes four times its budget."""
WORTH_SAYING = 0.1
"""A report mentions other programs when they took at least this share of the time."""


class BusyMeter:
    """The share of the time that other programs leave for this one (`left`), from 0 to 1."""

    def __init__(self, load: LoadMeter | None = None, *, threads: int = 0) -> None:
        """`threads` is the number of threads per process; 0 takes torch's. `load` counts the processors."""
        self.load = load or LoadMeter(alike=runtime.local_world_size())
        self.wanted = min(self.load.count, (threads or torch.get_num_threads()) * self.load.alike)
        self.on_cpu = runtime.device().type == "cpu"
        self.left = 1.0

    def lost(self, seconds: float) -> float:
        """Seconds that other programs took of the last `seconds`."""
        if self.on_cpu:
            self.left = max(0.0, min(1.0, (self.load.count - self.load.look()) / self.wanted))
        return seconds * (1 - self.left)


def remember(extra: dict[str, Any], seconds: float, lost: float) -> None:
    """Add a step to what a checkpoint keeps: the seconds that other programs took (`lost`), and those of them
    that the budget does not count (`excused`)."""
    kept = extra.setdefault("busy", {"lost": 0.0, "excused": 0.0})
    kept["lost"] += lost
    kept["excused"] += min(lost, seconds * (1 - LEAST))


def counted(extra: dict[str, Any], elapsed: float) -> float:
    """Seconds of the budget that `elapsed` seconds have used."""
    return float(elapsed - extra.get("busy", {}).get("excused", 0.0))


def note(extra: dict[str, Any], elapsed: float, steps: int) -> str | None:
    """A line for the report when other programs took a good part of the time; None on a quiet machine."""
    lost = extra.get("busy", {}).get("lost", 0.0)
    if not elapsed or lost < WORTH_SAYING * elapsed:
        return None
    text = (
        f"the machine was busy: other programs took {100 * lost / elapsed:.0f} % of the processor time that "
        f"training could have used; {duration(counted(extra, elapsed))} of the budget took "
        f"{duration(elapsed)}"
    )
    missing = round(steps * (lost - extra["busy"]["excused"]) / max(elapsed - lost, 1e-9))
    if missing > 0:
        text += (
            f", four times as long at most, so that about {missing} steps are missing beside the {steps} "
            "made; the model is worse for it"
        )
    return text
