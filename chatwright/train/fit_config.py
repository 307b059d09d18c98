"""`FitConfig`: the settings of the training loop (loop.py)."""

from __future__ import annotations

from dataclasses import dataclass, field

from chatwright.config import UsageError
from chatwright.train.spikes import SpikeConfig


@dataclass(frozen=True)
class FitConfig:
    """how long, in which micro-batches, and how often to look and to save."""

    steps: int = 0
    """Optimiser steps; above 0 it goes before `seconds`. 0: as many as fit into `seconds`."""
    seconds: float = 0.0
    """Training time in seconds, the first two steps, which compile, not counted, nor what other programs take
    of the processors (chatwright/train/busy.py). The number of steps is settled when the learning rate begins
    to fall and then kept in the checkpoint. Needs the trapezoid schedule. Give `steps` for runs that repeat
    exactly."""
    batch_size: int = 8
    """Samples per optimiser step."""
    micro_batch: int = 0
    """Samples per forward pass of a process; 0 means its whole share of the batch. Smaller saves memory and
    changes no result."""
    precision: str = "auto"
    """Products in `bf16`, `fp32`, or `auto`: bf16 where the processor computes it. Weights are float32
    always."""
    recompute: bool = False
    """Keep only what enters each block and compute the rest again in the backward pass: memory of one block's
    activations instead of all, for about a third more time. Changes no result."""
    compile: bool = True
    """Use torch.compile when a C++ compiler is there. Off for short stages, which it would delay more than it
    shortens them."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    evaluate_every: int = 0
    """Steps between held-out measures during training; 0 means only before and after."""
    save_every: float = 120.0
    """Seconds between checkpoints."""
    save_steps: int = 0
    """Also a checkpoint whenever the step is a multiple of this; 0: by the clock alone. Above 0 the rule for
    loss spikes returns to these checkpoints only, and so repeats exactly."""
    keep: int = 2
    """Checkpoints to keep."""
    keep_best: bool = False
    """Also keep the checkpoint whose held-out measure was best (needs `evaluate_every`); the stage's result
    is then that one, and the file checkpoints/best names it. Off: the result is the last step's."""
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    """What is done when the loss jumps."""

    def check(self, schedule: str) -> None:
        """Raise UsageError when the settings contradict each other."""
        if self.steps < 0 or (self.steps == 0 and self.seconds <= 0):
            raise UsageError("give steps or seconds: one of them above 0")
        if not self.steps and schedule not in ("trapezoid", "constant"):
            raise UsageError(
                f"a budget in seconds needs the trapezoid schedule, not {schedule}: steps are not known"
            )
        if (
            self.batch_size < 1
            or self.micro_batch < 0
            or self.batch_size % (self.micro_batch or self.batch_size)
        ):
            raise UsageError(f"batch_size {self.batch_size} must be a positive multiple of micro_batch")
        if self.keep_best and not self.evaluate_every:
            raise UsageError(
                "keep_best chooses by the held-out measures during training: set evaluate_every above 0"
            )
        if self.save_steps < 0:
            raise UsageError("save_steps must be at least 0")
        self.spikes.check()
