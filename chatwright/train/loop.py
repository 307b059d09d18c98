"""The plain loop of every stage whose batches are known in advance: pre-training, SFT, reward model.

How many steps, which learning rate, when to log, to measure and to save; `trainer.Trainer` does the steps themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from chatwright import checkpoint, optim, runtime
from chatwright.checkpoint import Checkpoint
from chatwright.config import UsageError
from chatwright.metrics import progress_bar
from chatwright.train.stopping import Interrupted, Stopper
from chatwright.train.trainer import AnyBatch, Batch, Progress, Step, Trainer


@dataclass(frozen=True)
class FitConfig:
    """How long, in which portions, and how often to look and to save."""

    steps: int = 0
    """Optimiser steps; above 0 it goes before `seconds`. 0: as many as fit into `seconds`."""
    seconds: float = 0.0
    """Training time in seconds, compilation not counted. The number of steps is settled when the learning rate begins to
    fall and then kept in the checkpoint. Needs the trapezoid schedule. Give `steps` for runs that repeat exactly."""
    batch_size: int = 8
    """Samples per optimiser step."""
    micro_batch: int = 0
    """Samples per forward pass; 0 means the whole batch. Smaller saves memory and changes no result."""
    precision: str = "auto"
    """Products in `bf16`, `fp32`, or `auto`: bf16 where the processor computes it. Weights are float32 always."""
    compile: bool = True
    """Use torch.compile when a C++ compiler is there."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    evaluate_every: int = 0
    """Steps between held-out measures during training; 0 means only before and after."""
    save_every: float = 120.0
    """Seconds between checkpoints."""
    keep: int = 2
    """Checkpoints to keep."""

    def check(self, schedule: str) -> None:
        """Raise UsageError when the settings contradict each other."""
        if self.steps < 0 or (self.steps == 0 and self.seconds <= 0):
            raise UsageError("give steps or seconds: one of them above 0")
        if not self.steps and schedule not in ("trapezoid", "constant"):
            raise UsageError(f"a budget in seconds needs the trapezoid schedule, not {schedule}: steps are not known")
        if self.batch_size < 1 or self.micro_batch < 0 or self.batch_size % (self.micro_batch or self.batch_size):
            raise UsageError(f"batch_size {self.batch_size} must be a positive multiple of micro_batch")


Made = TypeVar("Made", bound=Batch, covariant=True)


class Batches(Protocol[Made]):
    """The training samples, by global index."""

    def take(self, start: int, count: int) -> Made:
        """Samples start ... start + count - 1 of the endless order."""


@dataclass(frozen=True)
class Fitted:
    """The end of `fit`."""

    checkpoint: Checkpoint
    before: dict[str, float]
    after: dict[str, float]
    progress: Progress


class Fit(Generic[AnyBatch]):
    """The plain loop over batches that are known in advance."""

    def __init__(
        self,
        trainer: Trainer,
        config: FitConfig,
        batches: Batches[AnyBatch],
        step: Callable[[AnyBatch], Step],
        evaluate: Callable[[], dict[str, float]],
        *,
        title: str,
        throughput: tuple[str, float] = ("samples", 1.0),
    ) -> None:
        """`step` is given a micro-batch; `evaluate` measures on held-out data.

        `throughput` names what is counted per sample, for the speed shown: ("tokens", 256.0).
        """
        config.check(trainer.optim_config.schedule)
        self.trainer, self.config, self.batches, self.step, self.evaluate = trainer, config, batches, step, evaluate
        self.title, self.throughput = title, throughput
        self.modules = list(trainer.modules.values())

    def run(self) -> Fitted:
        """Train to the end, or to where someone stops it. Raises Interrupted after saving."""
        trainer, progress = self.trainer, self.trainer.progress
        if trainer.resume():
            progress = trainer.progress
        else:
            progress.planned = self.config.steps
            progress.extra["before"] = self._measure()
        if progress.planned and progress.step >= progress.planned and "after" in progress.extra:
            newest = checkpoint.checkpoints(trainer.workspace.checkpoints)[-1]
            return Fitted(newest, progress.extra["before"], progress.extra["after"], progress)
        for module in self.modules:
            module.train()
        with progress_bar(self.title) as bar, Stopper().listening() as stopper:
            fresh = 0  # steps of this process: the first two compile and warm up, their time is not counted
            while not progress.planned or progress.step < progress.planned:
                started = time.monotonic()
                loss = self._one_step()
                spent = time.monotonic() - started
                fresh += 1
                progress.elapsed += spent if fresh > 2 else 0.0
                self._plan()
                if progress.step % self.config.log_every == 0 or progress.step == progress.planned:
                    self._log(loss, spent)
                bar.update(self._share(), self._note(loss, spent))
                if stopper.asked:
                    trainer.save()
                    raise Interrupted(f"{self.title}: saved at step {progress.step}; the same command goes on from there")
                if time.monotonic() - trainer.saved_at > self.config.save_every:
                    trainer.save()
        progress.extra["after"] = self._measure()
        trainer.workspace.metrics.write(progress.step, progress.extra["after"])
        saved = trainer.save(final=True)
        return Fitted(saved, progress.extra["before"], progress.extra["after"], progress)

    def _one_step(self) -> float:
        progress, config = self.trainer.progress, self.config
        size = config.micro_batch or config.batch_size
        portions = [self.batches.take(progress.consumed + n, size) for n in range(0, config.batch_size, size)]
        share = self._learning_rate()
        loss = self.trainer.update(portions, self.step, share)
        progress.step += 1
        progress.consumed += config.batch_size
        every = config.evaluate_every
        if every and progress.step % every == 0 and progress.step != progress.planned:
            self.trainer.workspace.metrics.write(progress.step, self._measure())
        return loss

    def _measure(self) -> dict[str, float]:
        with runtime.evaluating(*self.modules):
            return self.evaluate()

    def _learning_rate(self) -> float:
        """Share of the peak for the coming step. With a budget in seconds the number of steps is not known at first:
        there warm-up is a share of the time, and only the fall at the end goes by steps."""
        progress, config = self.trainer.progress, self.trainer.optim_config
        if self.config.steps:
            return optim.learning_rate(progress.step, progress.planned, config)
        if not progress.planned:
            return min(1.0, max(progress.elapsed / self.config.seconds, 0.001) / max(config.warmup, 0.001))
        left = (progress.planned - progress.step) / max(1.0, config.decay * progress.planned)
        return config.final + (1 - config.final) * min(1.0, left)

    def _plan(self) -> None:
        """Settle the number of steps once the constant part of a time budget is used up."""
        progress, config = self.trainer.progress, self.trainer.optim_config
        if not progress.planned and progress.elapsed >= self.config.seconds * (1 - config.decay):
            progress.planned = max(progress.step + 1, round(progress.step / max(1 - config.decay, 0.05)))

    def _share(self) -> float:
        progress = self.trainer.progress
        if progress.planned:
            return progress.step / progress.planned
        return min(1.0, progress.elapsed / self.config.seconds)

    def _note(self, loss: float, spent: float) -> str:
        unit, amount = self.throughput
        return f"{self.config.batch_size * amount / spent:,.0f} {unit}/s  loss {loss:.3f}"

    def _log(self, loss: float, spent: float) -> None:
        unit, amount = self.throughput
        self.trainer.workspace.metrics.write(
            self.trainer.progress.step,
            {
                "loss": loss,
                **self.trainer.take_logged(),
                "learning_rate": self.trainer.optimisers[-1].param_groups[0]["lr"],
                f"{unit}_per_second": self.config.batch_size * amount / spent,
                "elapsed": self.trainer.progress.elapsed,
                "memory_mb": runtime.peak_memory_bytes() / 1e6,
            },
        )

