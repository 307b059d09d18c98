"""The machinery that every stage shares: accumulate, clip, schedule, log, save, resume, stop.

`fit` runs a stage whose batches are known in advance (pre-training, SFT, reward model); PPO, which makes its own, uses
`Trainer` directly. Both continue after a crash bit for bit: weights, optimiser, position in the data, random streams
and the plan (how many steps) are all in the checkpoint.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from chatwright import __version__, checkpoint, optim, runtime
from chatwright.checkpoint import Checkpoint
from chatwright.config import UsageError, UserError
from chatwright.metrics import progress_bar, say
from chatwright.optim import OptimConfig
from chatwright.train.workspace import Workspace


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C or SIGTERM) and has saved; the same command goes on from there."""


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


class Batch(Protocol):
    """What a step is given. `weight` is what its loss is summed over: targets, pairs ..."""

    @property
    def weight(self) -> float:
        """Number of terms in the loss's sum."""


AnyBatch = TypeVar("AnyBatch", bound=Batch)
Made = TypeVar("Made", bound=Batch, covariant=True)


@dataclass(frozen=True)
class Step:
    """The outcome of a forward pass: the loss as a SUM over the batch's weight, and sums to log beside it."""

    loss: Tensor
    logged: Mapping[str, Tensor] = field(default_factory=dict)


class Batches(Protocol[Made]):
    """The training samples, by global index."""

    def take(self, start: int, count: int) -> Made:
        """Samples start ... start + count - 1 of the endless order."""


@dataclass
class Progress:
    """Where a run is: the part of a checkpoint's state that training changes."""

    step: int = 0
    consumed: int = 0
    elapsed: float = 0.0
    planned: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


class Stopper:
    """Turns the first Ctrl-C or SIGTERM into a flag; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        say("  stopping after this step; again to stop at once without saving")

    @contextmanager
    def listening(self) -> Iterator[Stopper]:
        """Handle the signals inside the block (only in the main thread, where Python allows it)."""
        old = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                old[number] = signal.signal(number, self._handle)
        except ValueError:
            pass  # not the main thread: whoever runs us handles signals
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


class Trainer:
    """One optimiser step after another on some modules, with everything that must survive a crash."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        optim_config: OptimConfig,
        workspace: Workspace,
        *,
        card: Mapping[str, Any],
        texts: Mapping[str, str],
        keep: int = 2,
    ) -> None:
        """`modules["model"]` is what others load; further ones (a critic) are saved beside it. `card` goes into
        state.json (the model's shape), `texts` are files that make the directory self-contained."""
        self.modules, self.optim_config, self.workspace = dict(modules), optim_config, workspace
        self.card, self.texts, self.keep = dict(card), dict(texts), keep
        self.optimisers = optim.build(nn.ModuleDict(self.modules), optim_config)
        self.progress = Progress()
        self.saved_at = time.monotonic()
        self._logged: dict[str, float] = {}
        self._weight = 0.0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained."""
        return [p for optimiser in self.optimisers for group in optimiser.param_groups for p in group["params"]]

    def update(self, batches: Sequence[AnyBatch], step: Callable[[AnyBatch], Step], share: float) -> float:
        """One optimiser step on the sum of the micro-batches' losses over their total weight; returns the loss.

        `share` is the learning rate's share of its peak. A gradient that is not finite changes nothing and is counted
        in `skipped`. Raises UserError after 20 such steps in a row.
        """
        total = sum(batch.weight for batch in batches) or 1.0
        loss = 0.0
        for batch in batches:
            outcome = step(runtime.on_device(batch))
            (outcome.loss / total).backward()  # type: ignore[no-untyped-call]
            loss += float(outcome.loss.detach()) / total
            for key, value in outcome.logged.items():
                self._logged[key] = self._logged.get(key, 0.0) + float(value)
        self._weight += total
        limit = self.optim_config.clip or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        optim.set_learning_rate(self.optimisers, share)
        if norm == norm and norm != float("inf"):
            for optimiser in self.optimisers:
                optimiser.step()
            self.progress.extra["skipped_in_a_row"] = 0
        else:
            self._skip()
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        self._logged["gradient_norm"] = norm
        return loss

    def _skip(self) -> None:
        extra = self.progress.extra
        extra["skipped"] = extra.get("skipped", 0) + 1
        extra["skipped_in_a_row"] = extra.get("skipped_in_a_row", 0) + 1
        if extra["skipped_in_a_row"] >= 20:
            raise UserError(
                f"the gradient was not finite in 20 steps in a row (step {self.progress.step}); "
                "lower the learning rate, or look for broken samples; the last checkpoint is intact"
            )

    def take_logged(self) -> dict[str, float]:
        """What the steps logged since the last call, sums divided by their weight."""
        norm = self._logged.pop("gradient_norm", 0.0)
        result = {key: value / max(self._weight, 1.0) for key, value in self._logged.items()}
        result["gradient_norm"] = norm
        if self.progress.extra.get("skipped"):
            result["skipped"] = float(self.progress.extra["skipped"])
        self._logged, self._weight = {}, 0.0
        return result

    def save(self, *, final: bool = False, spare: Sequence[int] = ()) -> Checkpoint:
        """Write a checkpoint of this step; a `final` one has no optimiser state. Older ones are pruned."""
        tensors: dict[str, dict[str, Tensor]] = {
            name: checkpoint.model_tensors(module) for name, module in self.modules.items()
        }
        if not final:
            tensors["optimizer"] = checkpoint.optimiser_tensors(self.optimisers) | {"rng": runtime.rng_state()}
        state = {
            **self.card,
            "chatwright": __version__,
            "progress": asdict(self.progress),
            "logged": {"sums": self._logged, "weight": self._weight},  # since the last row of metrics.jsonl
            "final": final,
            "runtime": runtime.describe(),
        }
        target = self.workspace.checkpoints / f"step-{self.progress.step:06}"
        saved = checkpoint.save_checkpoint(target, tensors=tensors, state=state, texts=self.texts)
        checkpoint.prune(self.workspace.checkpoints, self.keep, spare=spare)
        self.saved_at = time.monotonic()
        return saved

    def resume(self) -> bool:
        """Go on from the newest valid checkpoint, if there is one; says so, and names the damaged ones it passed."""
        found, complaints = checkpoint.newest_valid(self.workspace.checkpoints)
        for complaint in complaints:
            say(f"  {complaint}; trying the one before it")
        if found is None:
            self.workspace.metrics.forget_after(-1)  # of a run that died before its first checkpoint
            return False
        state = found.state()
        for name, module in self.modules.items():
            checkpoint.load_model_tensors(module, found.tensors(name), where=str(found.path))
        self.progress = Progress(**state["progress"])
        if not state["final"]:
            tensors = found.tensors("optimizer")
            runtime.set_rng_state(tensors.pop("rng"))
            checkpoint.load_optimiser_tensors(self.optimisers, tensors)
            self._logged, self._weight = state["logged"]["sums"], state["logged"]["weight"]
        self.workspace.metrics.forget_after(self.progress.step)
        say(f"  going on from step {self.progress.step} ({found.path})")
        return True


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

