"""One optimiser step after another, with everything that must survive a crash.

`loop.Fit` drives a `Trainer` over batches that are known in advance; PPO, which makes its own, uses it directly. Both
continue after a crash bit for bit: weights, optimiser, position in the data, random streams and the plan (how many
steps) are all in the checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from chatwright import __version__, checkpoint, optim, runtime
from chatwright.checkpoint import Checkpoint
from chatwright.config import UserError
from chatwright.metrics import say
from chatwright.optim import OptimConfig
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
