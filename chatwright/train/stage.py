"""`Stage`: how a stage describes itself to the rest of the program. A stage's file ends with such a `STAGE`.

The command line, recipes, the planner, the doctor, reports and the documentation read everything about a
stage from it. A new stage is therefore one file in stages/, a recipe, and a test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from chatwright.config import UsageError
from chatwright.metrics import Metric
from chatwright.model.config import GPTConfig
from chatwright.train.paper import Paper
from chatwright.train.planning.program import StagePlan
from chatwright.train.workspace import Answered, Report, Workspace


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Everything that the program needs to know about a stage."""

    config: type[Any]
    """The dataclass of its settings; a field's docstring is its help."""
    run: Callable[[Any, Workspace], Report]
    """Runs the stage in its workspace."""
    plan: StagePlan | None
    """How the planner builds its training step on fake tensors; None for a stage that trains nothing."""
    metrics: Sequence[Metric] = ()
    """All metrics that it can log, for docs/reference/metrics.md. Logging any other key fails in the tests.
    """
    paper: Sequence[Paper] = ()
    """Settings of the paper, which the report shows beside those of the run."""
    preview: Callable[[Any, Workspace, int], None] | None = None
    """Prints the first N samples as training would see them; trains nothing."""
    reads: Callable[[Any], Mapping[str, str]] = field(default=lambda config: {})
    """Settings -> {kind of records that it needs: the input that has them}; kinds: text, dialogues, ratings,
    comparisons."""
    shape: Callable[[Any, int | None], GPTConfig] | None = None
    """The shape of a model that the stage trains from scratch, given the vocabulary size where it is known.
    """
    answers: Callable[[Any, Workspace, Report], Answered] | None = None
    """Answers before and after for the report. By default base and result answer the same held-out prompts.
    """
    kl_budget: Callable[[Any, Workspace, Report], dict[str, Any] | None] | None = None
    """{spent, allowed, ...}: KL of the result from the reference, in nats per answer."""
    actions: Mapping[str, Callable[[Sequence[str]], int]] = field(default_factory=dict)
    """Subcommands, by name: `chatwright data list`."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Former name of a setting -> its present name. Both are read; the former prints a line with the new."""

    def __post_init__(self) -> None:
        if self.plan is None and "optim" in {one.name for one in fields(self.config)}:
            raise UsageError(f"{self.config.__module__}: a stage with an optimiser needs a plan (StagePlan)")
        names = [metric.name for metric in self.metrics]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UsageError(f"{self.config.__module__}: two metrics are called {', '.join(twice)}")


def kl_from_base(config: Any, workspace: Workspace, report: Report) -> dict[str, Any]:
    """`Stage.kl_budget` for a stage without a KL budget: the KL from `config.base` on the answers in the
    report."""
    spent = report.answers.kl if report.answers else None
    return {"spent": spent, "allowed": None, "stopped": f"measured on held-out prompts, from {config.base}"}


def stage_of(module: Any) -> Stage:
    """The STAGE of a module. Raises UsageError when it has none."""
    found = getattr(module, "STAGE", None)
    if not isinstance(found, Stage):
        raise UsageError(f"{module.__name__} has no STAGE = Stage(...): it is not a stage")
    return found
