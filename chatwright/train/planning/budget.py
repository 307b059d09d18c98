"""Whether a budget in seconds holds enough steps, and what to set when it does not."""

from __future__ import annotations

import math
from typing import Any

from chatwright.config import UserError
from chatwright.metrics import duration
from chatwright.train.fit_config import FitConfig

FEWEST = 2
"""Steps that a budget in seconds must hold."""
ENOUGH = 20
"""Steps that are advised at least."""
SURE = 1.5
"""A predicted step must take so many times the budget before a stage is refused by its plan alone. Below
that the first steps decide, which are measured."""


def too_short(
    title: str, settings: Any, budget: float, spent: float, *, least: bool = False
) -> UserError | None:
    """The error for a budget in seconds that holds less than `FEWEST` steps of `spent` seconds; else None.
    With `least` a step takes at least so long."""
    if spent * FEWEST <= budget:
        return None
    enough = math.ceil(ENOUGH * spent)
    held = "not one" if spent > budget else "one"
    ways, so_long = "; ".join(shorter_steps(settings)), f"{'at least ' if least else ''}{seconds(spent)}"
    return UserError(
        f"{title}: a step takes {so_long} here, so that fit.seconds {budget:g} holds {held}, and "
        f"nothing would be learnt. Set fit.seconds to {enough} or more ({ENOUGH} steps, {duration(enough)}), "
        f"or make steps shorter: {ways}"
    )


class FirstSteps:
    """The first steps of a run with a budget in seconds: whether it holds enough steps like them."""

    def __init__(self, title: str, config: FitConfig, settings: Any) -> None:
        """`settings` are those of the stage, for advice."""
        self.title, self.config, self.settings = title, config, settings
        self.spent: list[float] = []

    def check(self, step: int, spent: float) -> None:
        """Raise UserError when steps like step number `step`, of so many seconds, are too long.

        A step that compiles does not count. One other first step decides alone where it takes more than twice
        the budget, for it also makes the optimiser's state; else the shorter one of the first two.
        """
        config = self.config
        if config.steps or step > 2:
            return
        if step > 1 or not config.compile:
            self.spent.append(spent)
        if step == 2 or (self.spent and self.spent[0] > 2 * config.seconds):
            error = too_short(self.title, self.settings, config.seconds, min(self.spent))
            if error is not None:
                raise error


def seconds(spent: float) -> str:
    """'0.42 s', '12 s', '908 s'."""
    return f"{spent:.2g} s" if spent < 10 else f"{spent:,.0f} s"


def shorter_steps(settings: Any) -> list[str]:
    """What makes a step of these settings shorter, with the values that they have."""
    fit, found = getattr(settings, "fit", None), []
    for name in ("context", "max_tokens"):
        if getattr(settings, name, 0):
            found.append(f"{name} below {getattr(settings, name)}")
    if fit is not None and fit.batch_size > 1:
        found.append(f"fit.batch_size below {fit.batch_size}")
    if getattr(settings, "k", 0) > 2:
        found.append(f"k below {settings.k}")
    lora = getattr(settings, "lora", None)
    if lora is not None and not lora.rank:
        found.append("lora.rank 8")
    return found or ["a smaller model"]
