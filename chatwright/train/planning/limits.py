"""How long a row may be: what the model's context and memory allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from chatwright import memory, runtime
from chatwright.data.cuts import Room
from chatwright.metrics import say
from chatwright.model.config import GPTConfig
from chatwright.train.planning.plan import parameters_of, predict, worth_planning
from chatwright.train.planning.program import PlannedStage, StagePlan


def room_for(
    stage: str,
    plan: StagePlan,
    shape: GPTConfig,
    wanted: int,
    sized: Callable[[int], Any],
    *,
    step: int = 8,
) -> Room:
    """The most tokens that a row may have, where `wanted` would be right: the model's context, or what fits
    into memory one micro-batch at a time. `sized(tokens)` gives the stage's settings with rows so long.

    Several processes may shard a model: for them only the context counts, and the plan refuses what does not
    fit.
    """
    context = Room(shape.context, "the model's context")
    wanted = min(wanted, shape.context)
    planned = PlannedStage(stage, plan, shape, sized(wanted))
    available = memory.memory_budget_bytes()
    if runtime.world_size() > 1 or available is None or not worth_planning(planned):
        return context
    if _upper_bound(planned) < available:
        return context
    say(f"  looking how long a row of {stage} may be ({wanted:,} tokens are wanted)")

    def fits(tokens: int) -> bool:
        there = PlannedStage(stage, plan, shape, sized(tokens))
        # A stage without a training loop has no micro-batches: its whole minibatch is one.
        found, _ = predict(there, micro=1 if there.fit is not None else 0, available=available)
        return found.fits

    if fits(wanted):
        return context
    low, high = 0, wanted // step  # in steps; memory grows with the length
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    # Where not even the shortest fits, the plan refuses with its arithmetic.
    return Room(max(low, 1) * step, "memory")


def _upper_bound(planned: PlannedStage) -> float:
    """Bytes that a micro-batch of one sample needs at most, roughly. A dry run would take seconds."""
    shape, (rows, length) = planned.shape, planned.rows
    samples = 1 if planned.fit is not None else planned.batch
    each = shape.layers * (400.0 * shape.width + 16.0 * shape.heads * length) + 32.0 * shape.vocab_size
    return 1e9 + 40.0 * parameters_of(shape) + samples * rows * length * each
