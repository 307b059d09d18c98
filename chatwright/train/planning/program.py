"""How a stage describes itself to the planner: its training step on fake tensors, its samples' size.

A stage file puts one `StagePlan` into its STAGE, so that the planner (plan.py) needs no table of stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chatwright import compiler, runtime
from chatwright.model.config import GPTConfig


@dataclass(frozen=True)
class StepProgram:
    """A training step on fake tensors: `step(samples)` is a forward pass that returns the loss."""

    trained: Sequence[nn.Module]
    step: Callable[[int], Tensor]
    frozen: Sequence[nn.Module] = ()
    vocabulary: int = 0
    measure: Callable[[], object] | None = None
    """One batch of the held-out measure, without gradients."""


ASSUMED = 512
"""Tokens of a row whose length comes from the data (`context` or `max_tokens` 0), before the data is read."""


def tokens_of_data(limit: int, shape: GPTConfig) -> int:
    """Tokens of a row: the setting, or `ASSUMED` while it is 0; at most the model's context."""
    return min(limit or ASSUMED, shape.context)


def tokens_of_context(config: Any, shape: GPTConfig) -> tuple[int, int]:
    """(1, tokens of a row): the setting `context` as in `tokens_of_data`; without such a setting the model's
    whole context."""
    return 1, tokens_of_data(getattr(config, "context", shape.context), shape)


def steps_of_fit(config: Any) -> int:
    """The setting `fit.steps`; 0 where seconds decide."""
    return int(config.fit.steps)


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """How a stage is planned."""

    build: Callable[[PlannedStage, GPTConfig], StepProgram]
    """Builds models and step, inside a dry run. The shape may have fewer layers than the stage's."""
    rows: Callable[[Any, GPTConfig], tuple[int, int]] = tokens_of_context
    """Settings and shape -> rows per sample, tokens per row."""
    steps: Callable[[Any], int] = steps_of_fit
    """Settings -> optimiser steps; 0 where a budget in seconds decides."""
    full_rows: bool = True
    """Whether every row is as long as `rows` says. Else that is the longest, and a step takes less time than
    its plan says."""
    one_graph: bool = False
    """Whether a compiled step is one graph, rather than compiled blocks with eager code between them."""
    holds_records: bool = True
    """Whether the stage holds its records and rows of tokens as Python objects. Token shards are
    memory-mapped."""
    samples: bool = False
    """Whether every process holds the whole policy to sample from."""


@dataclass(frozen=True)
class PlannedStage:
    """A stage with the settings that the planner needs."""

    stage: str
    """Its name, for messages."""
    plan: StagePlan
    shape: GPTConfig
    config: Any
    """The stage's own settings."""
    learnt: float = 1.0
    """Share of the tokens that SFT learns from; known once the data is read."""
    shards: int = 1
    """Processes that shard one replica of weights, gradients and optimiser state."""
    processes: int = 1
    """Processes that see different samples."""

    @property
    def fit(self) -> Any:
        """The settings of the training loop; None for stages that sample what they learn from."""
        return getattr(self.config, "fit", None)

    @property
    def batch(self) -> int:
        """Samples per optimiser step in one process."""
        size = self.fit.batch_size if self.fit is not None else self.config.minibatch_size
        return max(1, int(size) // self.processes)

    @property
    def rows(self) -> tuple[int, int]:
        """Rows per sample, tokens per row."""
        return self.plan.rows(self.config, self.shape)

    @property
    def steps(self) -> int:
        """Optimiser steps; 0 where seconds decide."""
        return self.plan.steps(self.config)

    @property
    def compiled(self) -> bool:
        """Whether its step will be compiled here."""
        wanted = self.config.compile if self.fit is None else self.fit.compile
        return bool(wanted) and compiler.compiler_missing() is None

    @property
    def one_graph(self) -> bool:
        """Whether its step will be compiled here as one graph."""
        return self.plan.one_graph and self.compiled


def program_of(planned: PlannedStage) -> Callable[[int], StepProgram]:
    """A function that builds the stage's program with a given number of layers, inside a dry run."""
    return lambda layers: planned.plan.build(planned, planned.shape.with_layers(layers))


def fake_tokens(rows: int, length: int) -> Tensor:
    """Token ids (rows, length) for a dry run."""
    return torch.zeros(rows, length, dtype=torch.long, device=runtime.device())
