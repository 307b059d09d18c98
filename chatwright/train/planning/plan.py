"""The plan of a stage before it starts: its memory, its time, and the micro-batch that fits; or a refusal
with the arithmetic.

Memory is that of a dry run on fake tensors (dry_run.py) plus what the allocator adds. Time is the sum of the
dry run's operations, each timed on this machine (timing.py). docs/lab/plan.md compares both with measured
runs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from chatwright import memory, runtime
from chatwright.config import UserError
from chatwright.metrics import duration, say
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.train.parallel.context import ParallelContext
from chatwright.train.planning.budget import SURE, too_short
from chatwright.train.planning.dry_run import DryRun, Operation, dry_run
from chatwright.train.planning.program import PlannedStage, StagePlan, program_of
from chatwright.train.planning.timing import SECONDS, seconds_of

PROGRAM = 2.5e8
"""Bytes of Python, torch and this program; on a GPU they are not in its memory."""
RECORDS = 2.5e8
"""Bytes of conversations, ratings and rows of tokens, which all stages but pre-training hold as Python
objects; measured with the default data (docs/lab/plan.md). Token shards are memory-mapped."""

EAGER = (1.40, 1e8)
"""What the allocator adds: a factor for the fragmentation of glibc's heap, and bytes for the libraries' own
buffers. Both are fitted to benchmarks/plan.py."""
COMPILED = (0.9, 2.6e8)
"""The same for compiled steps: the share of the dry run's activations that they keep, and bytes, some of
which the compiler leaves."""
GPU = (1.08, 6e8)
"""The same for CUDA's caching allocator; the bytes are those of its context and cuBLAS."""

SMALL = 10.0
"""Seconds; a shorter run gets no plan."""
ROUGH = 2e11
"""Floating-point operations per second, assumed before anything is measured."""
SHARE = 0.02
"""Largest share of a run's length for timing its operations at the start."""


@dataclass(frozen=True)
class Plan:
    """The needs of one stage."""

    stage: str
    batch: int
    """Samples per optimiser step in this process."""
    micro: int
    """Samples per forward pass."""
    length: int
    """Tokens per sample."""
    steps: int
    """Optimiser steps; 0 where a budget in seconds decides."""
    budget_seconds: float
    parameters: float
    memory: Mapping[str, float]
    """Part -> bytes at the peak, those of the allocator and the program included."""
    available: float | None
    """Bytes that may be used; None where not known."""
    flop: float
    """Floating-point operations of a step."""
    seconds: float | None
    """Seconds of an optimiser step; None when it was not timed."""

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return sum(self.memory.values())

    @property
    def above_baseline(self) -> float:
        """Bytes beyond those of the program and its data."""
        return self.total - self.memory.get("program", 0.0) - self.memory.get("records", 0.0)

    @property
    def fits(self) -> bool:
        """Whether it fits into the available memory."""
        return self.available is None or self.total <= self.available

    @property
    def expected_steps(self) -> int:
        """Optimiser steps; predicted for a budget in seconds."""
        if self.steps or not self.seconds:
            return self.steps
        return max(1, round(self.budget_seconds / self.seconds))

    def arithmetic(self) -> str:
        """'31.2 GB = weights 4.2 + gradients 4.2 + ...'."""
        unit, name = (1e9, "GB") if self.total >= 1e9 else (1e6, "MB")
        digits = 1 if self.total / unit < 1000 else 0
        shown = [
            f"{part} {size / unit:,.{digits}f}"
            for part, size in self.memory.items()
            if size / self.total > 0.005
        ]
        return f"{self.total / unit:,.{digits}f} {name} = {' + '.join(shown)}"

    def line(self) -> str:
        """The plan in one line."""
        micro = (
            f", {self.batch // self.micro} micro-batches of {self.micro}" if self.micro != self.batch else ""
        )
        took = ""
        if self.seconds is not None:
            steps = self.expected_steps
            took = f"; {self.seconds:.2f} s a step, {steps:,} steps in {duration(steps * self.seconds)}"
        return f"plan: {self.arithmetic()}{micro}; {self.flop / 1e9:,.0f} GFLOP a step{took}"


def predict(
    planned: PlannedStage, *, micro: int = 0, available: float | None = None
) -> tuple[Plan, Mapping[Operation, float]]:
    """The plan for micro-batches of `micro` samples (0: the stage's setting, or the whole batch), not yet
    timed; and the operations of a step."""
    micro = micro or (planned.fit.micro_batch if planned.fit is not None else 0) or planned.batch
    micro = min(micro, planned.batch)
    micro_batches = planned.batch // micro
    with torch.compiler.set_stance("force_eager"):  # the dry run needs the uncompiled functions
        seen = dry_run(
            program_of(planned),
            planned.shape.layers,
            planned.config.optim,
            micro=micro,
            micro_batches=micro_batches,
        )
    rows, length = planned.rows
    plan = Plan(
        planned.stage,
        planned.batch,
        micro,
        rows * length,
        planned.steps,
        getattr(planned.fit, "seconds", 0.0),
        seen.parameters,
        memory_of(seen, planned),
        available,
        seen.flop,
        None,
    )
    return plan, seen.operations


def memory_of(seen: DryRun, planned: PlannedStage) -> dict[str, float]:
    """The parts of memory at the peak, with what the allocator and the program add."""
    parts = {
        name: size / planned.shards if name in ("weights", "gradients", "optimiser") else size
        for name, size in seen.memory.items()
    }
    if planned.plan.samples and planned.shards > 1:
        with torch.device("meta"):
            # Every process holds the whole policy.
            parts["sampler"] = 4.0 * GPT(planned.shape).parameter_count()
    on_gpu = runtime.device().type == "cuda"
    if planned.one_graph and not on_gpu:
        share, parts["allocator"] = COMPILED
        parts["activations"] *= share
    else:
        factor, constant = GPU if on_gpu else EAGER
        parts["allocator"] = (factor - 1) * sum(parts.values()) + constant
    if not on_gpu:
        parts["program"] = PROGRAM
        if planned.plan.holds_records:
            parts["records"] = RECORDS
    return {name: size for name, size in parts.items() if size > 0}


def choose(
    planned: PlannedStage, *, timed: bool = True, available: float | None = None, budget: float = SECONDS
) -> Plan:
    """The plan with the largest micro-batch that fits, after about `budget` seconds of timing. Raises
    UserError, with the arithmetic, when none fits.

    It must fit into the machine's memory, not only the free part: a resumed run then chooses the same.
    """
    plan, operations = _fitting(planned, available or memory.memory_budget_bytes())
    if not timed:
        return plan
    return replace(plan, seconds=seconds_of(operations, compiled=planned.one_graph, budget=budget))


def _fitting(planned: PlannedStage, available: float | None) -> tuple[Plan, Mapping[Operation, float]]:
    """The plan with the largest micro-batch that fits, not yet timed, and the operations of a step."""
    plan, operations = predict(planned, available=available)
    if not plan.fits:
        if planned.fit is None or planned.fit.micro_batch:
            raise _refusal(planned, plan)
        plan, operations = _smaller(planned, available)
    return plan, operations


def _smaller(planned: PlannedStage, available: float | None) -> tuple[Plan, Mapping[Operation, float]]:
    """The largest micro-batch that fits, by bisection over the divisors of the batch (memory grows)."""
    divisors = [n for n in range(1, planned.batch) if planned.batch % n == 0] or [1]
    best, operations = predict(planned, micro=1, available=available)
    if not best.fits:
        raise _refusal(planned, best)
    low, high = 0, len(divisors)
    while high - low > 1:
        middle = (low + high) // 2
        plan, found = predict(planned, micro=divisors[middle], available=available)
        if plan.fits:
            best, operations, low = plan, found, middle
        else:
            high = middle
    return best, operations


def _refusal(planned: PlannedStage, plan: Plan) -> UserError:
    assert plan.available is not None
    unit, name = (1e9, "GB") if plan.total >= 1e9 else (1e6, "MB")
    fixed = sum(plan.memory.get(part, 0.0) for part in ("weights", "gradients", "optimiser"))
    if planned.fit is None and plan.micro > 1:
        advice = f"a smaller {planned.stage}.minibatch_size"
    elif plan.micro > 1:
        advice = f"{planned.stage}.fit.micro_batch 0 lets the plan choose a smaller one"
    elif fixed > 0.7 * plan.available:
        advice = "a smaller shape, or several processes that share it (docs/guide/many-processes.md)"
    else:
        advice = "a shorter context (model.context), a smaller vocabulary or shape"
    return UserError(
        f"{planned.stage} with micro-batches of {plan.micro} needs {plan.arithmetic()}; this machine has "
        f"{plan.available / unit:,.1f} {name} to give (CHATWRIGHT_MEMORY overrides); smaller: {advice}"
    )


def rough_seconds(planned: PlannedStage) -> float:
    """Seconds of the whole run, from its budget or from 6 N FLOP per token; right within a small factor."""
    if not planned.steps:
        return float(getattr(planned.fit, "seconds", 0.0))
    rows, length = planned.rows
    return 6 * parameters_of(planned.shape) * planned.batch * rows * length * planned.steps / ROUGH


def parameters_of(shape: GPTConfig) -> int:
    """Number of parameters of a language model of this shape; needs no memory."""
    with torch.device("meta"):
        return GPT(shape).parameter_count()


def worth_planning(planned: PlannedStage) -> bool:
    """Whether the run is long enough for a plan; always when CHATWRIGHT_MEMORY is set."""
    return memory.memory_is_limited() or rough_seconds(planned) > SMALL


def ahead(
    stage: str,
    plan: StagePlan,
    config: Any,
    shape: GPTConfig,
    parallel: ParallelContext,
    *,
    learnt: float = 1.0,
) -> Any:
    """Print the plan of a stage that is about to start; returns its settings with the micro-batch that fits.

    Raises UserError, in every process, when none fits, or when a budget in seconds does not hold a step.
    """
    mesh_shape = getattr(parallel, "mesh_shape", None)
    planned = PlannedStage(
        stage,
        plan,
        shape,
        config,
        learnt,
        shards=mesh_shape.shard * mesh_shape.tensor if mesh_shape else 1,
        processes=parallel.data_size,
    )
    if not worth_planning(planned):
        return config
    micro = runtime.broadcast_from_rank0(lambda: _ahead(planned))
    return replace(config, fit=replace(config.fit, micro_batch=micro)) if micro else config


def _ahead(planned: PlannedStage) -> int:
    started = time.monotonic()
    plan, operations = _fitting(planned, memory.memory_budget_bytes())
    _check_budget(planned, plan)
    budget = min(SECONDS, SHARE * rough_seconds(planned))
    plan = replace(plan, seconds=seconds_of(operations, compiled=planned.one_graph, budget=budget))
    besides = "; sampling comes on top" if planned.plan.samples else ""
    if not planned.plan.full_rows:
        besides += f"; for rows of {planned.rows[1]} tokens, shorter ones take less"
    say(f"  {plan.line()}{besides} (planned in {time.monotonic() - started:.0f} s)")
    _check_budget(planned, plan)
    if planned.fit is None or planned.fit.micro_batch or plan.micro == plan.batch:
        return 0
    say(f"  the whole batch of {plan.batch} does not fit; micro-batches of {plan.micro} change no result")
    return plan.micro


def _check_budget(planned: PlannedStage, plan: Plan) -> None:
    """Raise UserError when a step will clearly take longer than the whole budget in seconds.

    A plan that is not yet timed goes by its operations at the machine's peak: no step is faster, and timing
    the operations of so long a step would take minutes.
    """
    budget, fit = plan.budget_seconds, planned.fit
    if planned.steps or not budget or fit is None or not planned.plan.full_rows:
        return
    spent, sure, least = plan.seconds, SURE, False
    if spent is None:
        # The peak is measured while other programs run, too.
        spent = plan.flop / runtime.matmul_peak(runtime.compute_dtype(fit.precision))
        sure, least = 2 * SURE, True
    if spent > sure * budget:
        error = too_short(planned.stage, planned.config, budget, spent, least=least)
        if error is not None:
            raise error
