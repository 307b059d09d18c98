"""One optimiser step after another, with everything that must survive a crash.

`loop.Fit` drives a `Trainer` over batches that are known in advance; PPO, which makes its own, uses it
directly. Both continue after a crash bit for bit: weights, optimiser, position in the data, random streams
and the plan (how many steps) are all in the checkpoint.
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
    """What a step is given. `weight` is what its loss is summed over: targets, pairs ..."""

    @property
    def weight(self) -> float:
        """Number of terms in the loss's sum."""


AnyBatch = TypeVar("AnyBatch", bound=Batch)


@dataclass(frozen=True)
class Step:
    """The outcome of a forward pass: the loss as a SUM over the batch's weight, and sums to log beside it."""

    loss: Tensor
    logged: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Progress:
    """Where a run is: the part of a checkpoint's state that training changes."""

    step: int = 0
    consumed: int = 0
    elapsed: float = 0.0
    joules: float = 0.0
    planned: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


class Trainer:
    """One optimiser step after another on some modules, with everything that must survive a crash."""

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
        """`modules["model"]` is what others load; further ones (a critic) are saved beside it. Of a module
        with adapters what is trained is saved, of the model beside it the whole with the adapter merged.
        `metadata` goes into state.json (the model's shape), `texts` are files that make the directory
        self-contained. `parallel` puts the modules on many processes, and beside them `frozen` ones, which
        are not saved."""
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
        """Everything that is trained."""
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
        """One optimiser step on the sum of the micro-batches' losses over their total weight; returns the
        loss.

        `share` is the learning rate's share of its peak. A gradient that is not finite changes nothing and is
        counted in `skipped`; nor does a loss that `accept` refuses. Raises UserError after 20 bad gradients
        in a row, and whatever `accept` raises: nothing has then changed.
        """
        parallel = self.parallel
        total = parallel.sum([sum(batch.weight for batch in batches)])[0] or 1.0
        sums = {"": 0.0}  # the loss first, then what is logged beside it
        for number, batch in enumerate(batches, 1):
            with parallel.accumulating(more=number < len(batches)):
                outcome = parallel.forward(step, runtime.on_device(batch))
                # Gradients are averaged over the processes: dividing by the mean weight of one of them makes
                # it a sum.
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

    @property
    def unfinished(self) -> Checkpoint:
        """Where a step is saved that was stopped in its middle, if it was."""
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

        With `mid_step`, which is what the step needs to be gone on with and equal in all processes, it is
        that of an `unfinished` step and stands beside the others: one of the step's beginning stays what it
        is.

        Where processes hold a part of the model each, every one must call this. They write their parts in the
        background (with `wait` False it may still be going on at the return) and a `final` checkpoint is put
        together by the first.
        """
        self.parallel.flush()
        tensors = self._parts()
        if lora.adapter_names(self.modules["model"]):  # whoever loads it needs neither base nor adapter
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
        """What a checkpoint must hold of the modules, by file: all of a module, or what an adapted one has
        beyond its base."""
        parts = {}
        for name, module in self.modules.items():
            if lora.adapter_names(module):
                parts["adapter" if name == "model" else f"{name}-adapter"] = lora.trained_tensors(module)
            else:
                parts[name] = checkpoint.model_tensors(module)
        return parts

    def resume(self) -> bool:
        """Go on from the newest valid checkpoint, if there is one; says so, and names the damaged ones it
        passed."""
        self.parallel.broadcast_from_rank0(lambda: checkpoint.recover(self.workspace.checkpoints))
        found, complaints = self.parallel.broadcast_from_rank0(self._newest)
        for complaint in complaints:
            say(f"  {complaint}; trying the one before it")
        if found is None:
            self.workspace.metrics.forget_after(-1)  # of a run that died before its first checkpoint
            return False
        self._restore(found)
        say(f"  going on from step {self.progress.step} ({found.path})")
        return True

    def _newest(self) -> tuple[Checkpoint | None, list[str]]:
        """What to go on from: the newest valid checkpoint, or the unfinished step that began there or
        later."""
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
        """Forget the unfinished step, which has come to its end and is saved."""
        if runtime.is_rank_zero() and self.unfinished.path.is_dir():
            checkpoint.delete(self.unfinished)

    def put_together(self, found: Checkpoint) -> None:
        """Make an ordinary directory of a checkpoint in parts: a stage's result is one whatever the plan."""
        self.parallel.flush()
        self.parallel.broadcast_from_rank0(lambda: sharded_to_plain(found))

    def _restore(self, found: Checkpoint) -> None:
        state = found.state()
        if state.get("lora") != self.metadata.get(
            "lora"
        ):  # never more than a part of the model would come from it
            raise UserError(
                f"{found.path} was trained with another adapter (lora settings), or on another base model"
            )
        self.progress = Progress(**state["progress"])
        self._load(found, final=state["final"])
        if not state["final"]:
            self._logged, self._weight = state["logged"]["sums"], state["logged"]["weight"]
        self.workspace.metrics.forget_after(self.progress.step)

    def roll_back(self, *, every: int, protected: Callable[[], Sequence[int]]) -> None:
        """Return to the newest checkpoint from before the loss jumped, and pass over the samples since
        (spikes.py).

        Above 0 `every` admits only steps that are its multiples. `protected` is asked afterwards, as in
        `save`. Raises UserError when there is no such checkpoint. What is done here is in the checkpoint's
        place when this returns; whoever is killed before does the same again.
        """
        self.parallel.flush()
        before, directory = self.progress, self.workspace.checkpoints

        def choose() -> Checkpoint:
            for found in reversed(checkpoint.checkpoints(directory)):
                if found.step % max(every, 1) == 0 and _is_before_spikes(found):
                    return found
            raise UserError(
                f"the loss jumped at step {before.step} and there is no checkpoint to return to; "
                "set fit.save_steps or a smaller fit.save_every"
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

        def forget() -> None:  # before the new state is saved: else it could be taken for older than these
            for later in checkpoint.checkpoints(directory):
                if later.step > now.step:
                    checkpoint.delete(later)

        self.parallel.broadcast_from_rank0(forget)
        self.save(protected=protected())
        say(f"  back from step {before.step} to step {now.step}; the samples in between are passed over")

    def load_weights(self, found: Checkpoint) -> None:
        """Give the modules the weights of a checkpoint; all else stays."""
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
    """Give a checkpoint in parts the files of an ordinary one, all that is in it."""
    if found.is_sharded:
        from chatwright import sharded  # torch's distributed part takes a while to import

        sharded.consolidate(found.path)


def _is_before_spikes(found: Checkpoint) -> bool:
    """Whether a checkpoint is whole, can be trained on from, and was not made in the middle of a jump of the
    loss."""
    try:
        found.verify()
    except UserError:
        return False
    state = found.state()
    return not state["final"] and not state["progress"]["extra"].get("spikes_in_a_row")
