"""The trainer: optimiser steps, and the checkpoints from which a run resumes.

`loop.Fit` drives a `Trainer` over batches that are known in advance. PPO makes its own batches and uses it
directly. Both resume bit for bit after a crash: a checkpoint has weights, optimiser state, position in the
data, random streams and the planned number of steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from chatwright import __version__, checkpoint, optim, runtime
from chatwright.checkpoint import Checkpoint
from chatwright.config import UserError
from chatwright.metrics import say
from chatwright.model import lora
from chatwright.optim import OptimConfig
from chatwright.train.parallel.context import SINGLE_PROCESS, ParallelContext
from chatwright.train.workspace import Workspace


class Batch(Protocol):
    """The input of a step. Its loss is a sum over `weight` terms: targets, pairs ..."""

    @property
    def weight(self) -> float:
        """Number of terms in the loss's sum."""


AnyBatch = TypeVar("AnyBatch", bound=Batch)


@dataclass(frozen=True)
class Step:
    """The outcome of a forward pass: the loss as a SUM over the batch's weight, and further sums to log."""

    loss: Tensor
    logged: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Progress:
    """The progress of a run: the part of a checkpoint's state that training changes."""

    step: int = 0
    consumed: int = 0
    elapsed: float = 0.0
    joules: float = 0.0
    planned: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


class Trainer:
    """Trains modules step by step, and writes and restores their checkpoints."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        optim_config: OptimConfig,
        workspace: Workspace,
        *,
        metadata: Mapping[str, Any],
        texts: Mapping[str, str],
        keep: int = 2,
        parallel: ParallelContext = SINGLE_PROCESS,
        frozen: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """`modules["model"]` is what other stages load; further modules (a critic) are saved beside it. A
        module with adapters saves only its trained tensors; `model` is also saved whole, with the adapter
        merged. `metadata` goes into state.json (the model's shape), `texts` are files that make the directory
        self-contained. `parallel` distributes the modules over many processes, and the `frozen` ones too,
        which are not saved."""
        self.modules, self.optim_config, self.workspace = dict(modules), optim_config, workspace
        self.metadata, self.texts, self.keep = dict(metadata), dict(texts), keep
        self.parallel = parallel
        parallel.distribute(self.modules, frozen)
        self.optimisers = parallel.optimisers(self.modules, optim_config)
        self.progress = Progress()
        self.saved_at = time.monotonic()
        self._logged: dict[str, float] = {}
        self._weight = 0.0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters."""
        return [
            p for optimiser in self.optimisers for group in optimiser.param_groups for p in group["params"]
        ]

    def update(
        self,
        batches: Sequence[AnyBatch],
        step: Callable[[AnyBatch], Step],
        share: float,
        accept: Callable[[float], bool] | None = None,
    ) -> float:
        """One optimiser step on the sum of the micro-batches' losses, divided by their total weight; returns
        that loss.

        `share` is the learning-rate multiplier. Nothing is updated when the gradient is not finite (counted
        in `skipped`) or when `accept` refuses the loss. Raises UserError after 20 such gradients in a row,
        and whatever `accept` raises: nothing has then changed.
        """
        parallel = self.parallel
        total = parallel.sum([sum(batch.weight for batch in batches)])[0] or 1.0
        sums = {"": 0.0}  # the loss first, then the logged values
        for number, batch in enumerate(batches, 1):
            with parallel.accumulating(more=number < len(batches)):
                outcome = parallel.forward(step, runtime.on_device(batch))
                # Gradients are averaged over the processes. Dividing by the mean weight per process turns
                # the average into the sum over all, divided by the total weight.
                (outcome.loss / (total / parallel.data_size)).backward()  # type: ignore[no-untyped-call]
            sums[""] += float(outcome.loss.detach()) / total
            for key, value in outcome.logged.items():
                sums[key] = sums.get(key, 0.0) + float(value)
        loss, *others = parallel.sum(list(sums.values()))
        norm = parallel.clip(self.parameters, self.optim_config.clip or float("inf"))
        optim.set_learning_rate(self.optimisers, share)
        if not math.isfinite(norm):
            self._skip()
        elif accept is None or accept(loss):
            for optimiser in self.optimisers:
                optimiser.step()
            self.progress.extra["skipped_in_a_row"] = 0
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        for key, summed in zip(list(sums)[1:], others, strict=True):
            self._logged[key] = self._logged.get(key, 0.0) + summed
        self._weight += total
        self._logged["gradient_norm"] = norm
        return loss

    def _skip(self) -> None:
        extra = self.progress.extra
        extra["skipped"] = extra.get("skipped", 0) + 1
        extra["skipped_in_a_row"] = extra.get("skipped_in_a_row", 0) + 1
        if extra["skipped_in_a_row"] >= 20:
            raise UserError(
                f"the gradient was not finite in 20 steps in a row (step {self.progress.step}); lower the "
                "learning rate, or look for broken samples; the last checkpoint is intact"
            )

    def take_logged(self) -> dict[str, float]:
        """What the steps logged since the last call: each sum divided by the total weight."""
        norm = self._logged.pop("gradient_norm", 0.0)
        result = {key: value / max(self._weight, 1.0) for key, value in self._logged.items()}
        result["gradient_norm"] = norm
        if self.progress.extra.get("skipped"):
            result["skipped"] = float(self.progress.extra["skipped"])
        self._logged, self._weight = {}, 0.0
        return result

    @property
    def unfinished(self) -> Checkpoint:
        """Where the mid-step state of a step that was stopped is saved; it may not exist."""
        return Checkpoint(self.workspace.checkpoints / checkpoint.UNFINISHED)

    def save(
        self,
        *,
        final: bool = False,
        protected: Sequence[int] = (),
        wait: bool = True,
        mid_step: Mapping[str, Tensor] | None = None,
    ) -> Checkpoint:
        """Write a checkpoint of this step; a `final` one has no optimiser state. Older ones are pruned.

        `mid_step` is the state from which a step resumes in its middle, equal in all processes. With it the
        checkpoint is written as `unfinished` beside the others: the checkpoint of the step's beginning stays.

        With a sharded model every process must call this. Each writes its shards in the background; with
        `wait` False writing may continue after the return. Rank zero consolidates a `final` checkpoint.
        """
        self.parallel.flush()
        tensors = self._parts()
        if lora.adapter_names(self.modules["model"]):  # merged: it loads without base and adapter
            tensors["model"] = lora.merged_tensors(self.modules["model"])
        if not final:
            tensors["optimizer"] = (
                self.parallel.optimiser_tensors(self.optimisers) | self.parallel.rng_tensors()
            )
        state = {
            **self.metadata,
            "chatwright": __version__,
            "progress": asdict(self.progress),
            "logged": {"sums": self._logged, "weight": self._weight},  # since the last row of metrics.jsonl
            "final": final,
            "runtime": runtime.describe(),
        }
        target = self.workspace.checkpoints / f"step-{self.progress.step:06}"
        if mid_step is not None:
            target, tensors["mid_step"] = self.unfinished.path, dict(mid_step)

        def prune() -> None:
            checkpoint.prune(self.workspace.checkpoints, self.keep, protected=protected)

        if self.parallel.is_sharded and not final:
            self.parallel.save_parts(target, tensors, state, self.texts, prune)
        else:
            whole = {
                part: self.parallel.full_tensors_on_rank_zero(content) for part, content in tensors.items()
            }

            def write() -> None:
                checkpoint.save_checkpoint(target, tensors=whole, state=state, texts=self.texts)
                prune()

            self.parallel.broadcast_from_rank0(write)
        if wait:
            self.parallel.flush()
        self.saved_at = time.monotonic()
        return Checkpoint(target)

    def _parts(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of the modules that a checkpoint must hold, by file: all of a module, or of an adapted
        one only what it has beyond its base."""
        parts = {}
        for name, module in self.modules.items():
            if lora.adapter_names(module):
                parts["adapter" if name == "model" else f"{name}-adapter"] = lora.trained_tensors(module)
            else:
                parts[name] = checkpoint.model_tensors(module)
        return parts

    def resume(self) -> bool:
        """Resume from the newest valid checkpoint, if there is one. Prints which, and the damaged ones before
        it. Returns whether there was one."""
        self.parallel.broadcast_from_rank0(lambda: checkpoint.recover(self.workspace.checkpoints))
        found, complaints = self.parallel.broadcast_from_rank0(self._newest)
        for complaint in complaints:
            say(f"  {complaint}; trying the one before it")
        if found is None:
            self.workspace.metrics.forget_after(-1)  # rows of a run that died before its first checkpoint
            return False
        self._restore(found)
        say(f"  going on from step {self.progress.step} ({found.path})")
        return True

    def _newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The state to resume from, and complaints about damaged ones: the newest valid checkpoint, or the
        mid-step state of an unfinished step that is not older."""
        found, complaints = checkpoint.newest_valid(self.workspace.checkpoints)
        if self.unfinished.path.is_dir():
            try:
                self.unfinished.verify()
                if found is None or self.unfinished.state()["progress"]["step"] >= found.step:
                    return self.unfinished, complaints
            except UserError as error:
                complaints.append(str(error))
            checkpoint.delete(self.unfinished)
        return found, complaints

    def finish(self) -> None:
        """Delete the mid-step state once its step is finished and saved."""
        if runtime.is_rank_zero() and self.unfinished.path.is_dir():
            checkpoint.delete(self.unfinished)

    def consolidate(self, found: Checkpoint) -> None:
        """Consolidate a sharded checkpoint: a stage's result is an ordinary directory under every plan."""
        self.parallel.flush()
        self.parallel.broadcast_from_rank0(lambda: sharded_to_plain(found))

    def _restore(self, found: Checkpoint) -> None:
        state = found.state()
        # With another adapter only a part of the model would come from the checkpoint.
        if state.get("lora") != self.metadata.get("lora"):
            raise UserError(
                f"{found.path} was trained with another adapter (lora settings), or on another base model"
            )
        self.progress = Progress(**state["progress"])
        self._load(found, final=state["final"])
        if not state["final"]:
            self._logged, self._weight = state["logged"]["sums"], state["logged"]["weight"]
        self.workspace.metrics.forget_after(self.progress.step)

    def roll_back(self, *, every: int, protected: Callable[[], Sequence[int]]) -> None:
        """Return to the newest checkpoint from before the loss jumped, and skip the samples since
        (spikes.py).

        With `every` above 0 only checkpoints at its multiples count. `protected` is called after the rollback
        and gives the protected steps, as in `save`. Raises UserError when there is no such checkpoint. The
        new state is saved in place of that checkpoint before this returns; a run that is killed earlier
        repeats the rollback.
        """
        self.parallel.flush()
        before, directory = self.progress, self.workspace.checkpoints

        def choose() -> Checkpoint:
            for found in reversed(checkpoint.checkpoints(directory)):
                if found.step % max(every, 1) == 0 and _is_before_spikes(found):
                    return found
            raise UserError(
                f"the loss jumped at step {before.step} and there is no checkpoint to return to; set "
                "fit.save_steps or a smaller fit.save_every"
            )

        found = self.parallel.broadcast_from_rank0(choose)
        self._restore(found)
        now = self.progress
        passed_over = now.extra.get("passed_over", 0) + before.consumed - now.consumed
        now.extra |= {
            "passed_over": passed_over,
            "rollbacks": before.extra.get("rollbacks", 0) + 1,
            "spikes": before.extra["spikes"],
            "spikes_in_a_row": 0,
        }
        if "busy" in before.extra:
            now.extra["busy"] = before.extra["busy"]
        now.consumed, now.planned, now.elapsed, now.joules = (
            before.consumed,
            before.planned,
            before.elapsed,
            before.joules,
        )
        self.workspace.metrics.write_once(now.step, {"rolled_back_from": before.step})

        def forget() -> None:  # before the new state is saved: else a resume would choose these as newer
            for later in checkpoint.checkpoints(directory):
                if later.step > now.step:
                    checkpoint.delete(later)

        self.parallel.broadcast_from_rank0(forget)
        self.save(protected=protected())
        say(f"  back from step {before.step} to step {now.step}; the samples in between are passed over")

    def load_weights(self, found: Checkpoint) -> None:
        """Load the weights of a checkpoint into the modules; everything else stays."""
        self._load(found, final=True)

    def _load(self, found: Checkpoint, *, final: bool) -> None:
        if self.parallel.is_sharded and found.is_sharded:
            tensors = self.parallel.load_parts(found, self._parts(), final=final)
        else:
            for name, wanted in self._parts().items():
                self.parallel.fill(wanted, found.tensors(name), where=str(found.path))
            tensors = {} if final else found.tensors("optimizer")
        if final:
            return
        streams = {name: tensors.pop(name) for name in list(tensors) if name.startswith("rng")}
        self.parallel.set_rng_tensors(streams)
        self.parallel.load_optimiser_tensors(self.optimisers, tensors)


def sharded_to_plain(found: Checkpoint) -> None:
    """Consolidate a sharded checkpoint, with everything in it, into the files of an ordinary one."""
    if found.is_sharded:
        from chatwright import sharded  # torch's distributed part takes a while to import

        sharded.consolidate(found.path)


def _is_before_spikes(found: Checkpoint) -> bool:
    """Whether a checkpoint is intact, can be resumed from, and was not written during a loss spike."""
    try:
        found.verify()
    except UserError:
        return False
    state = found.state()
    return not state["final"] and not state["progress"]["extra"].get("spikes_in_a_row")
