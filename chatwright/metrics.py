"""Output of a run: `metrics.jsonl`, a tracker where one is asked for, and a progress bar (plain lines without
a terminal)."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from chatwright import runtime
from chatwright.config import UsageError, UserError, harmless
from chatwright.trackers import Reporting, Tracker, open_tracker

TIMED = frozenset(
    {"elapsed", "memory_mb", "tokens_per_second", "answers_per_second", "mfu", "energy_kwh", "cost"}
)
"""Keys that are measured by a clock or a meter. All others are the same, bit for bit, when a run is repeated.
"""

console = Console(highlight=False, stderr=False)


STRICT = "CHATWRIGHT_STRICT_METRICS"
"""Environment variable of the tests. At 1, a key that no Metric of its stage describes is an error."""


@dataclass(frozen=True)
class Metric:
    """A number that a stage logs. docs/reference/metrics.md is generated from these."""

    name: str
    """The key in metrics.jsonl."""
    unit: str
    healthy: str
    """The range, or the course, in a healthy run."""
    meaning: str
    """Its definition."""
    unhealthy: str = ""
    """What other values mean, and what to do about them."""
    when: str = ""
    """The condition under which a run logs it. Empty: every run that reaches its end does."""
    group: str = ""
    """The heading of its table in the documentation. Empty: the name of its stage."""


def in_group(group: str, *metrics: Metric) -> tuple[Metric, ...]:
    """The same metrics under one heading of the documentation."""
    return tuple(replace(metric, group=group) for metric in metrics)


class MetricsLog:
    """`metrics.jsonl`: one object a line, `step` first. docs/reference/metrics.md explains the keys."""

    def __init__(
        self, path: Path, reporting: Reporting | None = None, described: Sequence[Metric] | None = None
    ) -> None:
        """`described` are the metrics of the stage that writes here; with None any key may be written."""
        self.path, self.reporting = path, reporting or Reporting()
        self._described = None if described is None else {metric.name for metric in described}
        self._tracker: Tracker | None = None
        self._next = 0  # rows from this step on are new to the tracker
        path.parent.mkdir(parents=True, exist_ok=True)

    def forget_after(self, step: int) -> None:
        """Drop the rows after `step`: a resumed run repeats these steps."""
        self.close()
        self._next = step + 1
        if self.path.exists() and runtime.is_rank_zero():
            rows = [row for row in read_metrics(self.path) if row["step"] <= step]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            aside = self.path.with_suffix(".partial")
            aside.write_text(text, encoding="utf-8")
            aside.replace(self.path)

    def write(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Append one row, in rank zero. NaN and infinity become null: they are not JSON.

        A key that the stage does not describe is written all the same, with one line on the console: a
        missing description must not end a run. Raises UsageError instead where STRICT is set.
        """
        self._check_described(values)
        if not runtime.is_rank_zero():
            return
        row = _row(step, values)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; the last checkpoint is intact"
            ) from error
        if self._tracker is None:
            self._tracker = open_tracker(self.reporting, self.path.parent, self._next)
        if self._tracker is not None:
            numbers = {
                key: float(value)
                for key, value in row.items()
                if isinstance(value, int | float) and key != "step"
            }
            self._tracker.write(step, numbers)

    def _check_described(self, keys: Iterable[str]) -> None:
        """Report keys that no Metric describes, each once. All processes of a run decide alike."""
        if self._described is None:
            return
        unknown = [key for key in keys if key not in self._described]
        if not unknown:
            return
        text = f"{self.path}: no Metric of the stage describes {', '.join(unknown)}"
        if os.environ.get(STRICT) == "1":
            raise UsageError(f"{text}; add one to `metrics` of its STAGE")
        self._described.update(unknown)
        if runtime.is_rank_zero():
            say(f"  {text}; written all the same")

    def write_once(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """`write`, unless the same row exists. For rows between two checkpoints of one step: a run that dies
        after such a row resumes before it."""
        if _row(step, values) not in read_metrics(self.path):
            self.write(step, values)

    def close(self) -> None:
        """Flush and close the tracker; the next row opens it again."""
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None


def _row(step: int, values: Mapping[str, float | int | str]) -> dict[str, Any]:
    row: dict[str, Any] = {"step": step}
    for key, value in values.items():
        if isinstance(value, float):
            row[key] = round(value, 7) if math.isfinite(value) else None
        else:
            row[key] = value
    return row


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line cut off by a crash is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def duration(seconds: float) -> str:
    """'75' -> '1:15', for people."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


class Bar:
    """One task's progress."""

    def __init__(self, title: str, progress: Progress | None) -> None:
        self.title, self._progress = title, progress
        self._task = progress.add_task(title, total=1.0, note="", left="") if progress else None
        self._start = time.monotonic()
        self._first: float | None = None
        self._said = self._start

    def update(self, share: float, note: str = "") -> None:
        """Show `share`, the part that is done (0 to 1), and a note. Time left is computed from the first call
        on: earlier work of a resumed task, and a first step that compiles, say nothing about later steps."""
        now = time.monotonic()
        if self._first is None:
            self._start, self._first = now, share
        done = share - self._first
        left = f"{duration((now - self._start) / done * (1 - share))} left" if done > 0.01 else ""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=share, note=note, left=left)
        elif now - self._said > 15 or share >= 1:
            self._said = now
            say(f"  {self.title} {100 * share:3.0f} %  {note}  {left}".rstrip())


@contextmanager
def progress_bar(title: str) -> Iterator[Bar]:
    """A progress bar with note, elapsed time and time left; a line every 15 seconds without a terminal."""
    if not console.is_terminal:
        yield Bar(title, None)
        return
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(title, progress)


def say(text: str) -> None:
    """Print a line without interpreting markup. Control characters become visible signs: texts of records,
    models and file names must not command the terminal."""
    console.print(Text(harmless(text)), soft_wrap=True)
