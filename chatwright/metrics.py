"""What a run tells: `metrics.jsonl` always, a tracker where one is asked for, and a progress bar (plain lines
where there is no terminal)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from chatwright import runtime
from chatwright.config import UserError
from chatwright.trackers import Reporting, Tracker, open_tracker

TIMED = frozenset(
    {"elapsed", "memory_mb", "tokens_per_second", "answers_per_second", "mfu", "energy_kwh", "cost"}
)
"""Keys that are measured by a clock or a meter: all others of a run that is repeated are the same, bit for
bit."""

console = Console(highlight=False, stderr=False)


@dataclass(frozen=True)
class Metric:
    """A number that a stage logs: docs/reference/metrics.md is made of these."""

    name: str
    unit: str
    healthy: str
    """The range, or the course, of a healthy run."""
    meaning: str
    """What it is, and what an unhealthy value says."""


class MetricsLog:
    """`metrics.jsonl`: one object a line, `step` first. What the keys mean stands in docs/metrics.md."""

    def __init__(self, path: Path, reporting: Reporting | None = None) -> None:
        self.path, self.reporting = path, reporting or Reporting()
        self._tracker: Tracker | None = None
        self._next = 0  # the step from which on rows are new to the tracker
        path.parent.mkdir(parents=True, exist_ok=True)

    def forget_after(self, step: int) -> None:
        """Drop the rows of steps that will be done again after a resume."""
        self.close()
        self._next = step + 1
        if self.path.exists() and runtime.is_rank_zero():
            rows = [row for row in read_metrics(self.path) if row["step"] <= step]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            aside = self.path.with_suffix(".partial")
            aside.write_text(text, encoding="utf-8")
            aside.replace(self.path)

    def write(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Append one row, in the first process. NaN and infinity become null: they are not JSON."""
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

    def write_once(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """`write`, unless this very row is there. For rows between two checkpoints of one step: whoever dies
        behind such a row goes on before it."""
        if _row(step, values) not in read_metrics(self.path):
            self.write(step, values)

    def close(self) -> None:
        """Send what a tracker still holds; the next row opens it again."""
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
    """One task's progress. `update` takes the share done and what to show beside it."""

    def __init__(self, title: str, progress: Progress | None) -> None:
        self.title, self._progress = title, progress
        self._task = progress.add_task(title, total=1.0, note="", left="") if progress else None
        self._start = time.monotonic()
        self._first: float | None = None
        self._said = self._start

    def update(self, share: float, note: str = "") -> None:
        """`share` in [0, 1]. Time left counts from the first call: what a resumed task had done, and a first
        step that compiles, say nothing about the steps to come."""
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
    """A progress bar with note, time gone and time left; a line every 15 seconds where there is no
    terminal."""
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
    """Print a line as it is: no markup is read from it."""
    console.print(Text(text), soft_wrap=True)
