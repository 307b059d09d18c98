"""The papers' settings beside those of a run: each alignment stage has a table PAPER of such values.

A table has a value only where a paper gives it for that method; most of our settings have no counterpart
there. The papers trained models of 1.3 to 175 billion parameters: a difference is no mistake, but a reader
should see it. InstructGPT's values were compared with a public transcript of its appendix C on 27 November
2026 (C.2 to C.4 verbatim, C.1 in other words; not with the paper itself).

We have no setting for three things in the paper: SFT's residual dropout of 0.2, and its selection by the
reward model's score; the policies that PPO starts from, trained for two passes over the demonstrations with a
tenth of pre-training text; a separate learning rate of the critic, 9e-6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

INSTRUCT = "Ouyang et al. 2022, appendix C"
DETAILS = "N+ details, arXiv:2403.17031"

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Paper:
    """A paper's value of one setting."""

    setting: str
    """Path of the field in the stage's Config (`optim.learning_rate`), or a name for what `ours` computes."""
    value: Any
    """The paper's value; a pair is a range."""
    source: str
    ours: Callable[[Any, Facts], Any] | None = None
    """Config and the report's facts -> our value, where it is no field; returns None when it is not known."""

    def of(self, config: Any, facts: Facts) -> Any:
        """Our value."""
        if self.ours is not None:
            return self.ours(config, facts)
        return reduce(getattr, self.setting.split("."), config)

    def agrees(self, ours: Any) -> bool:
        """Whether our value is the paper's: numbers within 1 %, which a paper's rounding may take."""
        if isinstance(self.value, tuple):
            return bool(self.value[0] <= ours <= self.value[1])
        if isinstance(ours, bool) or not isinstance(ours, int | float):
            return bool(ours == self.value)
        return bool(abs(ours - self.value) <= 0.01 * abs(self.value))


def beside(papers: Sequence[Paper], config: Any, facts: Facts) -> list[dict[str, Any]]:
    """Rows {setting, ours, paper, source, same} for result.json; settings that are not known are left out."""
    rows = []
    for one in papers:
        ours = one.of(config, facts)
        if ours is not None:
            rows.append(
                {
                    "setting": one.setting,
                    "ours": ours,
                    "paper": shown(one.value),
                    "source": one.source,
                    "same": one.agrees(ours),
                }
            )
    return rows


def shown(value: Any) -> str:
    """A setting for people: '9e-06', '4 to 9', 'cosine'."""
    if isinstance(value, tuple):
        return f"{shown(value[0])} to {shown(value[1])}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
