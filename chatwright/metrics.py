"""What a run tells: `metrics.jsonl` always, and a progress bar (plain lines where there is no terminal)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

console = Console(highlight=False, stderr=False)


class MetricsLog:
    """`metrics.jsonl`: one object a line, `step` first. What the keys mean stands in docs/metrics.md."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def forget_after(self, step: int) -> None:
        """Drop the rows of steps that will be done again after a resume."""
        if self.path.exists():
            rows = [row for row in read_metrics(self.path) if row["step"] <= step]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            aside = self.path.with_suffix(".partial")
            aside.write_text(text, encoding="utf-8")
            aside.replace(self.path)

    def write(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Append one row. NaN and infinity become null: they are not JSON."""
        row: dict[str, Any] = {"step": step}
        for key, value in values.items():
            if isinstance(value, float):
                row[key] = round(value, 7) if math.isfinite(value) else None
            else:
                row[key] = value
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


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
        """`share` in [0, 1]; a resumed task starts where it was and its time left counts from there."""
        now = time.monotonic()
        if self._first is None:
            self._first = share
        done = share - self._first
        left = f"{duration((now - self._start) / done * (1 - share))} left" if done > 0.01 else ""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=share, note=note, left=left)
        elif now - self._said > 15 or share >= 1:
            self._said = now
            say(f"  {self.title} {100 * share:3.0f} %  {note}  {left}".rstrip())


@contextmanager
def progress_bar(title: str) -> Iterator[Bar]:
    """A progress bar with note, time gone and time left; a line every 15 seconds where there is no terminal."""
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
