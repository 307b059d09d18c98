"""What an evaluation has measured so far, what it left out, and what all of it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from chatwright.metrics import say
from chatwright.train.statistics import Difference, bootstrap_interval, paired_difference
from chatwright.train.workspace import Measure, Report


@dataclass
class Findings:
    """Measures of two models, each with the interval of the paired difference."""

    seed: int
    """Of the intervals."""
    report: Report = field(default_factory=Report)
    values: dict[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    """Numbers of single prompts, for comparisons with other runs."""
    shown: dict[str, Difference] = field(default_factory=dict)
    """Differences that decide whether the second model is better."""
    untrusted: set[str] = field(default_factory=set)
    """Measures that count for nothing: those of a reward model that may be guessing."""

    def add(self, name: str, before: Sequence[float], after: Sequence[float], unit: str = "prompts") -> None:
        """A measure with one number per prompt (or pair) and model; higher is better."""
        difference = paired_difference(before, after, seed=self.seed, unit=unit)
        interval = bootstrap_interval(torch.tensor(after), seed=self.seed)
        means = (sum(before) / len(before), sum(after) / len(after))
        self.report.measures.append(Measure(name, *means, "higher", difference.told(), interval))
        self.shown[name] = difference

    def left_out(self, what: str, why: str) -> None:
        """Say that something is not measured."""
        self.tell(f"{what} left out: {why}")

    def tell(self, line: str) -> None:
        """A line on the console and in the report."""
        say(f"  {line}")
        self.report.notes.append(line)

    def conclude(self) -> None:
        """One line on what was shown, printed and at the head of the notes."""
        trusted = {name: one for name, one in self.shown.items() if name not in self.untrusted}
        better = [name for name, one in trusted.items() if one.better]
        worse = [name for name, one in trusted.items() if one.worse]
        parts = [f"better by {', '.join(better)}"] if better else []
        parts += [f"worse by {', '.join(worse)}"] if worse else []
        if not parts and trusted:
            parts = ["nothing was shown: no measure has an interval that leaves out 0"]
        elif not parts:
            parts = [
                "nothing was shown: no reward model that is better than guessing, and no own comparisons"
            ]
        text = f"conclusion: {'; '.join(parts)}"
        self.report.facts["conclusion"] = {"better": better, "worse": worse}
        self.report.notes.insert(0, text)
        say(f"  {text}")
