"""How long a row may be: the model's context, or what memory holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from chatwright.model.config import GPTConfig
from chatwright.stages import sft
from chatwright.train.fit_config import FitConfig
from chatwright.train.planning import limits
from chatwright.train.planning.limits import room_for
from chatwright.train.planning.plan import predict
from chatwright.train.planning.program import PlannedStage

SHAPE = GPTConfig.preset("modern-nano", context=2_048)
CONFIG = sft.Config(fit=FitConfig(steps=10, batch_size=8, compile=False, precision="fp32"))


def sized(tokens: int) -> Any:
    return replace(CONFIG, context=tokens)


def test_without_a_memory_limit_a_short_run_asks_for_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHATWRIGHT_MEMORY", raising=False)
    monkeypatch.setattr(limits, "predict", None)
    assert room_for("sft", sft.PLAN, SHAPE, 512, sized) == limits.Room(2_048, "the model's context")


def test_what_memory_holds_is_found_by_the_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The longest multiple of 64 whose micro-batch of one row fits."""

    def needed(tokens: int) -> float:
        planned = PlannedStage("sft", sft.PLAN, SHAPE, sized(tokens))
        return predict(planned, micro=1)[0].total

    monkeypatch.setenv("CHATWRIGHT_MEMORY", str(needed(704) + 1))
    found = room_for("sft", sft.PLAN, SHAPE, 1_536, sized, step=64)
    assert found == limits.Room(704, "memory")
    assert "looking how long a row of sft may be (1,536 tokens are wanted)" in capsys.readouterr().out
    monkeypatch.setenv("CHATWRIGHT_MEMORY", str(needed(1_536) + 1))
    assert room_for("sft", sft.PLAN, SHAPE, 1_536, sized, step=64).why == "the model's context"


def test_enough_memory_asks_for_no_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("a dry run takes seconds")

    monkeypatch.setattr(limits, "predict", refused)
    monkeypatch.setenv("CHATWRIGHT_MEMORY", "64GB")
    assert room_for("sft", sft.PLAN, SHAPE, 512, sized).most == 2_048


def test_the_rough_bound_is_above_the_plan() -> None:
    """Else a row that does not fit would not be looked at."""
    bound: Callable[[PlannedStage], float] = limits._upper_bound
    for tokens in (64, 512, 2_048):
        planned = PlannedStage("sft", sft.PLAN, SHAPE, sized(tokens))
        assert bound(planned) > predict(planned, micro=1)[0].total
