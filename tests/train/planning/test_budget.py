"""A budget in seconds that does not hold two steps is refused, and says what to set."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from chatwright import runtime
from chatwright.config import UserError
from chatwright.model.config import GPTConfig
from chatwright.model.lora import LoRAConfig
from chatwright.stages import pretrain, reward, sft
from chatwright.train.fit_config import FitConfig
from chatwright.train.planning import plan
from chatwright.train.planning.budget import FirstSteps, too_short
from chatwright.train.planning.program import PlannedStage

SETTINGS = SimpleNamespace(
    context=8_192, fit=FitConfig(seconds=75.0, batch_size=8, compile=False), lora=LoRAConfig()
)


def test_the_message_says_how_long_a_step_takes_and_what_to_set() -> None:
    error = too_short("sft", SETTINGS, 75.0, 908.0)
    assert str(error) == (
        "sft: a step takes 908 s here, so that fit.seconds 75 holds not one, and nothing would be learnt. "
        "Set fit.seconds to 18160 or more (20 steps, 5:02:40), or make steps shorter: context below 8192; "
        "fit.batch_size below 8; lora.rank 8"
    )
    one = too_short("sft", SimpleNamespace(fit=FitConfig(batch_size=1), k=16, max_tokens=80), 75.0, 50.0)
    assert "a step takes 50 s here, so that fit.seconds 75 holds one" in str(one)
    assert str(one).endswith("make steps shorter: max_tokens below 80; k below 16")
    assert too_short("sft", SETTINGS, 75.0, 37.5) is None
    assert str(too_short("x", None, 1.0, 3.0)).endswith("steps shorter: a smaller model")


def first_steps(*spent: float, compile: bool = False, steps: int = 0) -> int:
    """How many of these first steps are made before the run is refused."""
    watch = FirstSteps("sft", FitConfig(seconds=10.0, steps=steps, compile=compile), SETTINGS)
    for number, seconds in enumerate(spent, 1):
        try:
            watch.check(number, seconds)
        except UserError:
            return number
    return len(spent) + 1


@pytest.mark.parametrize(
    ("spent", "refused"),
    [
        ((21.0, 1.0), 1),  # clear at once
        ((15.0, 4.0), 3),  # the first one also makes the optimiser's state
        ((15.0, 6.0), 2),
        ((4.0, 15.0), 3),  # an unusually long sample, or another program
        ((4.0, 4.0, 60.0), 4),  # later steps are not looked at
    ],
)
def test_the_first_two_steps_decide(spent: tuple[float, ...], refused: int) -> None:
    assert first_steps(*spent) == refused


def test_a_step_that_compiles_does_not_count_and_a_number_of_steps_is_no_budget() -> None:
    assert first_steps(100.0, 4.0, compile=True) == 3
    assert first_steps(100.0, 6.0, compile=True) == 2
    assert first_steps(100.0, 100.0, steps=3) == 3


def test_a_hopeless_step_is_refused_without_timing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its operations at the machine's peak, three times the budget."""

    def timed(*_: Any, **__: Any) -> float:
        raise AssertionError("timing such a step takes minutes")

    fit = FitConfig(seconds=20.0, batch_size=2, compile=False, precision="fp32")
    planned = PlannedStage("x", sft.PLAN, GPTConfig.preset("modern-nano"), sft.Config(fit=fit))
    flop = plan.choose(planned, timed=False).flop
    monkeypatch.setattr(plan, "seconds_of", timed)
    monkeypatch.setattr(runtime, "matmul_peak", lambda dtype: flop / 61.0)
    with pytest.raises(UserError, match=r"x: a step takes at least 61 s here, so that fit.seconds 20 holds"):
        plan._ahead(planned)
    monkeypatch.setattr(runtime, "matmul_peak", lambda dtype: flop / 59.0)
    with pytest.raises(AssertionError, match="takes minutes"):
        plan._ahead(planned)


@pytest.mark.parametrize(("module", "refused"), [(sft, True), (pretrain, True), (reward, False)])
def test_a_plan_refuses_a_step_that_takes_longer_than_the_budget(
    module: Any, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a reward model are shorter than the plan's: there the first steps decide."""
    monkeypatch.setattr(plan, "seconds_of", lambda *_, **__: predicted)
    fit = FitConfig(seconds=20.0, batch_size=2, compile=False, precision="fp32")
    planned = PlannedStage("x", module.PLAN, GPTConfig.preset("modern-nano"), module.Config(fit=fit))
    predicted = 29.0  # a prediction may be wrong by a half
    plan._ahead(planned)
    predicted = 31.0
    if not refused:
        plan._ahead(planned)
        return
    with pytest.raises(UserError, match=r"x: a step takes 31 s here, so that fit.seconds 20 holds not one"):
        plan._ahead(planned)
