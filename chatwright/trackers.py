"""Sends rows of metrics to TensorBoard, trackio or Weights & Biases as well as to `metrics.jsonl`.

These settings change how a run is reported, not what it computes. They are not part of a stage's settings, so
a finished stage stays finished when they change. Each tracker gets a row's finite numbers with the step's
number; texts and other values are only in metrics.jsonl.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from chatwright.config import UsageError


@dataclass(frozen=True)
class Reporting:
    """Where the numbers of a run go beside its metrics.jsonl, and what its energy and hours cost."""

    to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Also send each row there: `tensorboard` (event files in the stage's directory), `trackio` or `wandb`
    (their own settings apply: TRACKIO_DIR, WANDB_MODE, ...)."""
    watts: float = 0.0
    """Power drawn in training by all machines together, in watts; gives `energy_kwh`. 0: the processor's own
    meter where the system shows it, else no figure."""
    price: float = 0.0
    """What all machines together cost an hour, in any currency; gives `cost`. 0: no figure."""

    def check(self) -> None:
        """Raise UsageError when the package is missing or a number is negative, before anything has begun."""
        if self.watts < 0 or self.price < 0:
            raise UsageError("report.watts and report.price must be at least 0")
        if self.to != "none":
            _package(self.to)


class Tracker(Protocol):
    """Receives the metrics of one stage."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the numbers of a step."""

    def close(self) -> None:
        """Send what has not been sent yet, and close."""


def _package(name: str) -> Any:
    """The tracker's package. Raises UsageError with the command that installs it."""
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError:
        message = (
            f"report.to {name} needs a package: pip install {name} (or all three: pip install "
            "'chatwright[metrics]')"
        )
        raise UsageError(message) from None


class _TensorBoard:
    def __init__(self, directory: Path, first_step: int) -> None:
        # Steps from purge_step on are run again: readers drop them from earlier event files.
        self.writer = _package("tensorboard").SummaryWriter(
            str(directory / "tensorboard"), purge_step=first_step
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class _Service:
    """trackio and wandb, which share the three calls used here. A resumed stage continues its own run there;
    repeated rows have the same step and the same numbers."""

    def __init__(self, name: str, directory: Path) -> None:
        place = directory.resolve()
        self.package = _package(name)
        settings: dict[str, Any] = {"project": place.parent.name, "name": place.name, "resume": "allow"}
        if name == "wandb":
            mark = hashlib.sha256(str(place).encode()).hexdigest()[:16]
            settings |= {"id": mark, "dir": str(directory), "project": f"chatwright-{place.parent.name}"}
        self.run = self.package.init(**settings)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.package.log(dict(values), step=step)

    def close(self) -> None:
        self.package.finish()


def open_tracker(reporting: Reporting, directory: Path, first_step: int) -> Tracker | None:
    """The tracker of a stage in `directory`; None for `none`. `first_step`: smallest step of the next row."""
    if reporting.to == "none":
        return None
    if reporting.to == "tensorboard":
        return _TensorBoard(directory, first_step)
    return _Service(reporting.to, directory)
