"""The workspace of a stage (directory, inputs, seed), and the report that it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from chatwright import files
from chatwright.config import UserError
from chatwright.data.records import is_record_file
from chatwright.metrics import Metric, MetricsLog
from chatwright.trackers import Reporting


@dataclass(frozen=True)
class Measure:
    """One held-out measure of a stage, before and after it."""

    name: str
    before: float | None
    after: float | None
    better: str = "lower"
    """`lower`, `higher`, or `context` for a number that others are compared with."""
    note: str = ""
    interval: tuple[float, float] | None = None
    """95 % interval of `after`, where one is known."""


@dataclass(frozen=True)
class Curve:
    """A picture to draw from metrics.jsonl: the keys that share it."""

    title: str
    keys: Sequence[str]
    unit: str = ""


@dataclass(frozen=True)
class Table:
    """A table for the report; cells are strings."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Answered:
    """Answers of two models to the same held-out prompts, drawn with the same seeds."""

    before: str
    """Name of the first model; `after` is that of the second."""
    after: str
    prompts: Sequence[str]
    """The prompts as people read them."""
    pairs: Sequence[Mapping[str, str]]
    """{prompt, before, after} of the first ten."""
    values: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    """Name of a measure -> its values for each prompt, (before, after), for a paired comparison."""
    measures: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Name of a measure -> its value over all answers, (before, after): length and diversity."""
    kl: float | None = None
    """KL of the second model from the first on its own answers, nats per answer."""
    sampling: str = ""
    """How the answers were sampled, for people: temperature and so on, and the longest answer."""


@dataclass
class Report:
    """The result of a stage, from which `result.json` and `report.md` are written."""

    measures: list[Measure] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    model: str | None = None
    """The checkpoint to use, relative to the stage's directory; None when the stage makes no model."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Other numbers worth keeping: counts, settings that were chosen at run time."""
    notes: list[str] = field(default_factory=list)
    """Lines for the report: departures, what was left out."""
    tables: list[Table] = field(default_factory=list)
    answers: Answered | None = None
    """Set by stages that sample answers themselves; for the others the pipeline samples from base and result
    (reports/extras.py)."""
    pictures: list[str] = field(default_factory=list)
    """Files in the stage's directory to show beside the curves."""
    warnings: list[str] = field(default_factory=list)
    """What makes the result doubtful, and what to do. They are printed when the stage is done, and stand at
    the top of the report."""

    def value(self, name: str) -> float | None:
        """The measure's value after the stage; None when there is no measure of this name."""
        return next((measure.after for measure in self.measures if measure.name == name), None)


class Unhealthy(UserError):
    """A stage found that it must not go on. `report` has its measures so far; its checkpoints stay."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


@dataclass
class Workspace:
    """A stage's directory, inputs and seed."""

    directory: Path
    seed: int = 1337
    inputs: Mapping[str, Path] = field(default_factory=dict)
    """Finished stages of this run: name -> directory."""
    reporting: Reporting = field(default_factory=Reporting)
    described: Sequence[Metric] | None = None
    """The metrics that the stage may log, from its STAGE; None where any key may be logged."""

    @property
    def checkpoints(self) -> Path:
        """The directory of the stage's checkpoints."""
        return self.directory / "checkpoints"

    @cached_property
    def metrics(self) -> MetricsLog:
        """The stage's metrics.jsonl."""
        return MetricsLog(self.directory / "metrics.jsonl", self.reporting, self.described)

    def resolve(self, name: str) -> Path:
        """The directory of an input: `name` is a stage of this run, or a path. Raises UserError when there is
        none."""
        if name in self.inputs:
            return self.inputs[name]
        path = Path(name)
        if path.exists() or is_record_file(name):
            return path
        known = ", ".join(self.inputs) or "none"
        raise UserError(f"{name!r} is neither a finished stage of this run ({known}) nor an existing path")

    def result(self, name: str) -> dict[str, Any]:
        """The content of stage `name`'s result.json."""
        return dict(files.read_json(self.resolve(name) / "result.json"))
