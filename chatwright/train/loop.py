"""The training loop of every stage whose batches are known in advance: pre-training, SFT, reward model.

The loop decides the number of steps, the learning rate, and when to log, measure and save. `trainer.Trainer`
does the steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from chatwright import checkpoint, memory, optim, runtime
from chatwright.checkpoint import Checkpoint
from chatwright.config import UsageError, UserError
from chatwright.metrics import progress_bar, say
from chatwright.train import busy, cost, spikes
from chatwright.train.fit_config import FitConfig
from chatwright.train.planning import budget
from chatwright.train.stopping import Interrupted, Stopper
from chatwright.train.trainer import AnyBatch, Batch, Progress, Step, Trainer
from chatwright.train.workspace import Measure

Made = TypeVar("Made", bound=Batch, covariant=True)


class Batches(Protocol[Made]):
    """The training samples, by global index."""

    def take(self, start: int, count: int) -> Made:
        """Samples start ... start + count - 1 of the endless order."""


@dataclass(frozen=True)
class Fitted:
    """The outcome of `Fit.run`. `checkpoint` is the stage's result: the last step, or with `keep_best` the
    best one. `after` are its measures, and the modules have its weights. `facts` and `notes` are for the
    stage's report.
    """

    checkpoint: Checkpoint
    before: dict[str, float]
    after: dict[str, float]
    progress: Progress
    facts: dict[str, float]
    notes: list[str]

    @property
    def model(self) -> str:
        """The result for `Report.model`: relative to the stage's directory."""
        return f"checkpoints/{self.checkpoint.path.name}"

    def measure(
        self, key: str, name: str, better: Literal["lower", "higher", "context"] = "lower", note: str = ""
    ) -> Measure:
        """One held-out measure for the report, before training and after."""
        return Measure(name, self.before[key], self.after[key], better, note)

    @property
    def samples(self) -> int:
        """Samples that the model was trained on, each pass counted, without those that a rollback skipped."""
        return self.progress.consumed - int(self.progress.extra.get("passed_over", 0))


Best = tuple[str, Literal["lower", "higher"]]
"""A held-out measure's name, and whether lower or higher values are better."""


class Fit(Generic[AnyBatch]):
    """The training loop over batches that are known in advance."""

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
        best: Best | None = None,
        flop_per_sample: float | None = None,
        settings: Any = None,
    ) -> None:
        """`step` computes the loss of a micro-batch; `evaluate` measures on held-out data.

        `throughput` is the unit of the speed shown and its number per sample: ("tokens", 256.0). `keep_best`
        chooses by `best`. `flop_per_sample` is the number of operations to train on a sample, where known.
        `settings` are those of the stage, for advice.
        """
        config.check(trainer.optim_config.schedule)
        if config.keep_best and best is None:
            raise UsageError("keep_best: this stage has no single measure to choose by")
        if config.keep_best and trainer.parallel.is_sharded:
            raise UsageError(
                "keep_best is for models that each process holds whole: parallel.plan ddp, or one process"
            )
        self.best, self.flop_per_sample, self.meter = best, flop_per_sample, cost.EnergyMeter()
        self.busy = busy.BusyMeter()
        self.fresh = 0  # steps of this process; the first two compile and warm up: their time does not count
        self.trainer, self.config, self.batches, self.step, self.evaluate = (
            trainer,
            config,
            batches,
            step,
            evaluate,
        )
        self.title, self.throughput = title, throughput
        self.first_steps = budget.FirstSteps(title, config, settings)
        self.modules = list(trainer.modules.values())

    def run(self) -> Fitted:
        """Train to the end. Raises Interrupted when the run is asked to stop, after saving what is new."""
        trainer = self.trainer
        with Stopper().listening() as stopper:
            resumed = trainer.resume()
            progress = trainer.progress
            if not resumed:
                progress.planned = self.config.steps
                progress.extra["before"] = self._measure(stopper)
            if not (progress.planned and progress.step >= progress.planned and "after" in progress.extra):
                self._train(stopper)
                progress = trainer.progress  # a rollback replaces it
                progress.extra["after"] = self._measure(stopper)
                trainer.workspace.metrics.write_once(progress.step, progress.extra["after"])
                self._keep_if_best(progress.extra["after"])
                trainer.save(final=True, protected=self._protected())
            self._name_best()
            # Earlier best checkpoints go here too: a run may be killed right after its last save.
            if runtime.is_rank_zero():
                checkpoint.prune(trainer.workspace.checkpoints, trainer.keep, protected=self._protected())
        return self._result()

    def _train(self, stopper: Stopper) -> None:
        trainer, config = self.trainer, self.config
        for module in self.modules:
            module.train()
        self.meter.spent()
        with progress_bar(self.title) as bar:
            while not trainer.progress.planned or trainer.progress.step < trainer.progress.planned:
                self._look(stopper)
                started = time.monotonic()
                # The first step compiles, and may be stopped inside: nothing is lost yet.
                with self._may_stop_at_once(stopper, when=self.fresh == 0):
                    loss = self._one_step()
                progress = trainer.progress
                spent, lost, asked, due = self._agreed(time.monotonic() - started, stopper.asked)
                self.fresh += 1
                if self.fresh <= 2:  # the compiler's processes must not count as other programs
                    self.busy = busy.BusyMeter()
                if self.fresh == 1 and config.compile:
                    memory.trim_heap()  # frees what the compiler used
                if self.fresh > 2:
                    progress.elapsed += spent
                    if not config.steps:
                        busy.remember(progress.extra, spent, lost)
                progress.joules += self.meter.spent()
                if progress.step == self.fresh:  # not resumed
                    self.first_steps.check(progress.step, spent - lost)
                self._plan()
                if progress.step % config.log_every == 0 or progress.step == progress.planned:
                    self._log(loss, spent)
                bar.update(self._share(), self._note(loss, spent))
                if asked:
                    raise self._interrupted()
                if spikes.damaged(config.spikes, progress.extra):
                    self._answer_spikes()
                # No checkpoint inside a loss spike: a rollback must not return into it.
                elif due and not progress.extra.get("spikes_in_a_row"):
                    trainer.save(wait=False, protected=self._protected())

    def _interrupted(self) -> Interrupted:
        """Save what this process has done; return the exception that says so."""
        where = f"{self.title}: stopped before the first step of this attempt, nothing had to be saved"
        if self.fresh:
            self.trainer.save(protected=self._protected())
            where = f"{self.title}: saved at step {self.trainer.progress.step}"
        return Interrupted(f"{where}; the same command goes on from there")

    def _may_stop_at_once(self, stopper: Stopper, *, when: bool) -> AbstractContextManager[None]:
        """Context in which a signal stops the run without waiting for the end of the step. Several processes
        must stop together, or they wait forever: for them it does nothing."""
        return (
            stopper.at_once(self._interrupted)
            if when and not self.trainer.parallel.together
            else nullcontext()
        )

    def _look(self, stopper: Stopper) -> None:
        """The held-out measure of `evaluate_every`. It runs at the beginning of the next step, so that a run
        stopped during the measure resumes with it."""
        progress, every = self.trainer.progress, self.config.evaluate_every
        if (
            not every
            or progress.step == 0
            or progress.step % every
            or progress.extra.get("measured") == progress.step
        ):
            return
        values = self._measure(stopper)
        self.trainer.workspace.metrics.write_once(progress.step, values)
        progress.extra["measured"] = progress.step
        if self._keep_if_best(values):
            self.trainer.save(protected=self._protected())
            self._name_best()

    def _agreed(self, spent: float, asked: bool) -> tuple[float, float, bool, bool]:
        """Seconds of the step, seconds that other programs took of it, whether to stop, whether to save: the
        same in every process."""
        every = self.config.save_steps
        due = time.monotonic() - self.trainer.saved_at > self.config.save_every
        due = due or (every > 0 and self.trainer.progress.step % every == 0)
        lost = self.busy.lost(spent)
        spent, lost, *flags = self.trainer.parallel.all_reduce_max([spent, lost, float(asked), float(due)])
        return spent, lost, bool(flags[0]), bool(flags[1])

    def _one_step(self) -> float:
        progress, config, parallel = self.trainer.progress, self.config, self.trainer.parallel
        mine = config.batch_size // parallel.data_size  # samples of this process, a contiguous range
        first = progress.consumed + parallel.data_rank * mine
        size = min(config.micro_batch or mine, mine)
        micro_batches = [self.batches.take(first + n, size) for n in range(0, mine, size)]
        share = self._learning_rate()
        limit, before = spikes.limit(config.spikes, progress.extra), progress.extra.get("spikes", 0)
        loss = self.trainer.update(
            micro_batches,
            self.step,
            share,
            accept=lambda loss: spikes.accept(config.spikes, progress.extra, loss),
        )
        progress.step += 1
        progress.consumed += config.batch_size
        if progress.extra.get("spikes", 0) > before:
            self.trainer.workspace.metrics.write(progress.step, {"spike_loss": loss, "spike_limit": limit})
            say(
                f"  step {progress.step}: the loss jumped to {loss:.3f} (limit {limit:.3f}); its update is "
                "left out"
            )
        return loss

    def _answer_spikes(self) -> None:
        """After `patience` spikes in a row, roll back to the last checkpoint, or accept the new level of the
        loss (action `skip`)."""
        trainer, config = self.trainer, self.config.spikes
        if config.action == "skip":
            trainer.progress.extra |= {"losses": [], "spikes_in_a_row": 0}
            say(
                f"  step {trainer.progress.step}: {config.patience} jumps in a row; this is taken for the "
                "new level"
            )
            return
        if trainer.progress.extra.get("rollbacks", 0) >= config.most:
            raise UserError(
                f"{self.title}: the loss jumped for good at step {trainer.progress.step}, after "
                f"{config.most} returns to a checkpoint; lower the learning rate, or look for broken samples"
            )
        trainer.roll_back(every=self.config.save_steps, protected=self._protected)
        self._name_best()

    def _keep_if_best(self, values: dict[str, float]) -> bool:
        """Note this step as the best one when `keep_best` is on and its measure is the best so far. Returns
        whether it was noted."""
        progress = self.trainer.progress
        if not self.config.keep_best or self.best is None:
            return False
        name, better = self.best
        sign = 1 if better == "higher" else -1
        known = progress.extra.get("best")
        if known is not None and not sign * values[name] > sign * known["measures"][name]:
            return False
        progress.extra["best"] = {"step": progress.step, "measures": values}
        return True

    def _protected(self) -> list[int]:
        """Protected steps, whose checkpoints stay: the best one, the one that the file `best` still names,
        and the one that a rollback would return to."""
        progress, every = self.trainer.progress, self.config.save_steps
        steps = [progress.extra["best"]["step"]] if "best" in progress.extra else []
        with suppress(UserError):
            named = checkpoint.best(self.trainer.workspace.checkpoints)
            steps += [named.step] if named else []
        return [*steps, progress.step - progress.step % every] if every else steps

    def _name_best(self) -> None:
        """Write the name of the best checkpoint into the file `best`."""
        known = self.trainer.progress.extra.get("best")
        if known is not None and runtime.is_rank_zero():
            checkpoint.write_best(self.trainer.workspace.checkpoints, known["step"])

    def _result(self) -> Fitted:
        """The result of the finished run: its last checkpoint, or the best one, whose weights are then loaded
        into the modules."""
        trainer, progress = self.trainer, self.trainer.progress
        chosen, after, notes = (
            checkpoint.checkpoints(trainer.workspace.checkpoints)[-1],
            progress.extra["after"],
            [],
        )
        best = progress.extra.get("best")
        if self.config.keep_best and best is not None and self.best is not None:
            name = self.best[0]
            notes.append(
                f"the model is that of step {best['step']}, whose {name} was the best: "
                f"{best['measures'][name]:.4f}; after the last step ({progress.step}) {after[name]:.4f}. "
                "The same held-out data chose it: the best of several measures is a little too good"
            )
            if best["step"] != progress.step:
                chosen = Checkpoint(trainer.workspace.checkpoints / f"step-{best['step']:06}")
                trainer.load_weights(chosen)
                after = best["measures"]
        for key, line in (
            ("spikes", "{} losses jumped and had no update"),
            ("rollbacks", "{} returns to a checkpoint"),
        ):
            if progress.extra.get(key):
                notes.append(line.format(progress.extra[key]) + " (chatwright/train/spikes.py)")
        others = busy.note(progress.extra, progress.elapsed, progress.step)
        if others is not None:
            say(f"  {self.title}: {others}")
            notes.append(f"{others} (chatwright/train/busy.py)")
        return Fitted(chosen, progress.extra["before"], after, progress, self._account(), notes)

    def _measure(self, stopper: Stopper) -> dict[str, float]:
        with self._may_stop_at_once(stopper, when=True), runtime.evaluating(*self.modules):
            measured = self.trainer.parallel.forward(self.evaluate)
        # All processes get the same numbers, so that they decide alike.
        return self.trainer.parallel.broadcast_from_rank0(lambda: measured)

    def _learning_rate(self) -> float:
        """Learning-rate multiplier (1 at the peak) for the coming step.

        With a budget in seconds the number of steps is not known at first: warm-up then goes by time, and
        only the decay at the end goes by steps."""
        progress, config = self.trainer.progress, self.trainer.optim_config
        if self.config.steps:
            return optim.learning_rate(progress.step, progress.planned, config)
        if not progress.planned:
            return min(1.0, max(self._counted() / self.config.seconds, 0.001) / max(config.warmup, 0.001))
        left = (progress.planned - progress.step) / max(1.0, config.decay * progress.planned)
        return config.final + (1 - config.final) * min(1.0, left)

    def _plan(self) -> None:
        """Fix the number of steps once the constant part of a time budget is used up."""
        progress, config = self.trainer.progress, self.trainer.optim_config
        if not progress.planned and self._counted() >= self.config.seconds * (1 - config.decay):
            progress.planned = max(progress.step + 1, round(progress.step / max(1 - config.decay, 0.05)))

    def _share(self) -> float:
        progress = self.trainer.progress
        if progress.planned:
            return progress.step / progress.planned
        return min(1.0, self._counted() / self.config.seconds)

    def _counted(self) -> float:
        """Seconds of the budget that are used up: elapsed time without what other programs took."""
        return busy.counted(self.trainer.progress.extra, self.trainer.progress.elapsed)

    def _note(self, loss: float, spent: float) -> str:
        unit, amount = self.throughput
        taken = 1 - self.busy.left
        others = f"  (others take {100 * taken:.0f} %)" if taken >= busy.WORTH_SAYING else ""
        return f"{self.config.batch_size * amount / spent:,.0f} {unit}/s  loss {loss:.3f}{others}"

    def _log(self, loss: float, spent: float) -> None:
        unit, amount = self.throughput
        batch, trainer = self.config.batch_size, self.trainer
        rates = {"learning_rate": trainer.optimisers[-1].param_groups[0]["lr"]}
        if len(trainer.optimisers) > 1:
            rates["matrix_learning_rate"] = trainer.optimisers[0].param_groups[0]["lr"]
        trainer.workspace.metrics.write(
            trainer.progress.step,
            {
                "loss": loss,
                **trainer.take_logged(),
                **rates,
                f"{unit}_per_second": batch * amount / spent,
                "elapsed": trainer.progress.elapsed,
                "memory_mb": memory.peak_memory_bytes() / 1e6,
                **self._account(rate=batch / spent),
            },
        )

    def _account(self, rate: float = 0.0) -> dict[str, float]:
        """Operations, energy and money so far; with `rate`, in samples per second, also the share of the
        machine's peak."""
        progress, each = self.trainer.progress, self.flop_per_sample
        samples = progress.consumed - progress.extra.get("passed_over", 0)
        return cost.cost_row(
            self.trainer.workspace.reporting,
            flop=None if each is None else each * samples,
            elapsed=progress.elapsed,
            joules=progress.joules,
            rate=None if each is None or not rate else each * rate,
            peak=cost.peak_of(self.config.precision) if each is not None and rate else 0.0,
        )
