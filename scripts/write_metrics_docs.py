"""Write docs/reference/metrics.md from `metrics` of the stages; with --check, fail when it is out of date."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from chatwright import discovery
from chatwright.metrics import Metric
from chatwright.train.stage import stage_of

FILE = Path(__file__).parent.parent / "docs" / "reference" / "metrics.md"

TOP = """# What the logged numbers mean

Written by `make docs` from `metrics` of each stage; do not edit.

A stage that trains appends rows to `runs/NAME/STAGE/metrics.jsonl`, one JSON object a line. `step` comes
first: the optimiser steps since the start, or the iteration in an RL stage. A value that is not finite is
written as `null`. After a resume the rows of steps that are done again are dropped first, so a step has the
rows of one attempt only.

* Stages that train in the plain loop write a row every `fit.log_every` steps. Held-out measures come at the
  end, and every `fit.evaluate_every` steps when that is above 0. What was measured before the first step is
  in the stage's report.
* RL stages write one row an iteration.

*Healthy* is what a run that works looks like. Limits that the program enforces name the function that does;
the others are rules of thumb, and depend on model, data and batch size. A key that says "only when" is absent
otherwise.

What the reports hold besides, and how a run goes wrong: [reports.md](reports.md).
"""


def stage_metrics() -> dict[str, Sequence[Metric]]:
    """What each of our own stages logs, by the stage's name."""
    own = {name: verb for name, verb in discovery.stages().items() if not verb.package}
    return {name: stage_of(verb.load()).metrics for name, verb in own.items()}


def tables(stages: Mapping[str, Sequence[Metric]]) -> dict[str, dict[Metric, list[str]]]:
    """Heading -> metric -> the stages that log it. Shared metrics first, then those of single stages."""
    shared: dict[str, dict[Metric, list[str]]] = {}
    own: dict[str, dict[Metric, list[str]]] = {}
    for stage, metrics in stages.items():
        for metric in metrics:
            place = shared.setdefault(metric.group, {}) if metric.group else own.setdefault(stage, {})
            place.setdefault(metric, []).append(stage)
    return shared | own


def line(texts: Iterable[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in texts)} |"


def cells(metric: Metric, stages: Iterable[str]) -> dict[str, str]:
    """Column -> what it says about a metric."""
    return {
        "key": f"`{metric.name}`",
        "stages": ", ".join(stages),
        "what it is": f"{metric.meaning} Only when {metric.when}." if metric.when else metric.meaning,
        "unit": metric.unit,
        "healthy": metric.healthy,
        "otherwise": metric.unhealthy or "-",
    }


def text(stages: Mapping[str, Sequence[Metric]]) -> str:
    """The whole page. The table of a single stage has no column for the stage."""
    parts = [TOP]
    for heading, rows in tables(stages).items():
        told = [cells(metric, logging) for metric, logging in rows.items()]
        columns = [name for name in told[0] if name != "stages" or heading not in stages]
        parts += [f"## {heading}", "", line(columns), f"|{'---|' * len(columns)}"]
        parts += [*(line([one[name] for name in columns]) for one in told), ""]
    return "\n".join(parts)


def main() -> int:
    """Write or check."""
    wanted = text(stage_metrics())
    if "--check" in sys.argv:
        if not FILE.exists() or FILE.read_text(encoding="utf-8") != wanted:
            print("docs/reference/metrics.md is out of date: run `make docs` and commit it", file=sys.stderr)
            return 1
        return 0
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
