"""One model on many processes, under torchrun. Plans are applied from outside; models know nothing of them.

* `ddp`   every process holds the whole model; gradients are averaged (Li et al. 2020, arXiv:2006.15704).
* `fsdp`  parameters, gradients and optimiser state are sharded over all processes; each block is all-gathered
          when it is needed (ZeRO stage 3: Rajbhandari et al. 2020, arXiv:1910.02054; FSDP: arXiv:2304.11277).
* `hsdp`  the same inside groups of `shard` processes; the groups are replicas of each other.
* `tp`    every matrix product is split over groups of `tensor` processes, by heads in attention and by
          columns, then rows, in the MLP (Shoeybi et al. 2019, arXiv:1909.08053, section 3); the groups are
          combined by `fsdp`.

`ParallelContext` hides from a `Trainer` everything in which many processes differ from one. The class itself
is for a single process, `MultiProcess` for several. docs/guide/many-processes.md says when to use which plan,
and how to launch.

Models that are not trained (`frozen`: reward model, reference) are sharded like the trained ones, but
separately: a training step does not all-gather them.

A stage's forward passes and held-out measures must go through `ParallelContext.forward`, which makes sharded
parameters available. Limits: `tp` does not split embeddings, norms and the output matrix, and every process
first makes the whole model in its own memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from chatwright import checkpoint, optim, runtime
from chatwright.checkpoint import Checkpoint
from chatwright.config import UsageError
from chatwright.model.config import GPTConfig
from chatwright.optim import OptimConfig

PlanName = Literal["auto", "ddp", "fsdp", "hsdp", "tp"]


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes that torchrun starts share the work. It changes no result, so that a run may go on
    with another."""

    plan: PlanName = "auto"
    """`ddp` copies of the model, `fsdp` a part of it in each process, `hsdp` copies of groups that share one,
    `tp` products cut into parts. `auto`: ddp under torchrun, one process alone otherwise."""
    shard: int = 0
    """Processes that share one copy of the model (hsdp); 0: those of one machine."""
    tensor: int = 0
    """Processes that share one matrix product (tp); 0: all."""


@dataclass(frozen=True)
class MeshShape:
    """The processes as a mesh: `replicas` x `shard` x `tensor`. The first two see different samples."""

    replicas: int
    shard: int
    tensor: int


def arrange(config: ParallelConfig, world: int, local: int) -> MeshShape:
    """The mesh of `world` processes, `local` of them on each machine. Raises UsageError if impossible."""
    plan = config.plan
    if plan not in ("auto", "ddp", "fsdp", "hsdp", "tp"):
        raise UsageError(f"parallel.plan {plan!r} is none of auto, ddp, fsdp, hsdp, tp")
    if config.shard and plan != "hsdp":
        raise UsageError(f"parallel.shard is for the plan hsdp, not {plan}")
    if config.tensor and plan != "tp":
        raise UsageError(f"parallel.tensor is for the plan tp, not {plan}")
    if plan == "fsdp":
        return MeshShape(1, world, 1)
    if plan == "hsdp":
        shard = config.shard or local
        if shard < 1 or world % shard or world == shard:
            raise UsageError(
                f"parallel.plan hsdp: {world} processes are not several groups of {shard}; set "
                "parallel.shard to a proper divisor, or use fsdp"
            )
        return MeshShape(world // shard, shard, 1)
    if plan == "tp":
        tensor = config.tensor or world
        if tensor < 2 or world % tensor:
            raise UsageError(
                f"parallel.plan tp: {world} processes are not groups of {tensor}; set parallel.tensor to a "
                "divisor above 1"
            )
        return MeshShape(1, world // tensor, tensor)
    return MeshShape(world, 1, 1)


def check(
    config: ParallelConfig,
    mesh_shape: MeshShape,
    *,
    batch_size: int,
    micro_batch: int = 0,
    shape: GPTConfig | None = None,
    named: str = "batch_size",
) -> None:
    """Raise UsageError when the mesh does not divide the batch, whose setting is called `named`, or the
    model's shape."""
    data = mesh_shape.replicas * mesh_shape.shard
    if batch_size % data:
        raise UsageError(
            f"{named} {batch_size} cannot be divided among {data} processes: make it a multiple of {data}"
        )
    if micro_batch and (batch_size // data) % micro_batch:
        share = f"{batch_size // data}, each process's share of batch_size {batch_size}"
        raise UsageError(f"micro_batch {micro_batch} must divide {share}")
    if shape is None or mesh_shape.tensor == 1:
        return
    for name in ("heads", "kv_heads", "mlp_width"):
        if getattr(shape, name) % mesh_shape.tensor:
            raise UsageError(
                f"the model's {name}, {getattr(shape, name)}, cannot be divided among {mesh_shape.tensor} "
                "processes: choose another parallel.tensor"
            )


Result = TypeVar("Result")
Model = TypeVar("Model", bound=nn.Module)


class ParallelContext:
    """The context of a single process. `MultiProcess` overrides the methods."""

    data_rank = 0
    """Index of this process's share of the samples."""
    data_size = 1
    """Number of such shares."""
    together = False
    """Whether there are other processes."""
    is_sharded = False
    """Whether parameters are sharded, so that all processes write checkpoints together."""

    def distribute(
        self, modules: Mapping[str, nn.Module], frozen: Mapping[str, nn.Module] | None = None
    ) -> None:
        """Apply the plan to the modules; call it before their optimisers are made. `frozen` modules are used
        in forward passes without gradients only."""

    def optimisers(
        self, modules: Mapping[str, nn.Module], config: OptimConfig
    ) -> list[torch.optim.Optimizer]:
        """The optimisers of the modules."""
        return optim.build(nn.ModuleDict(dict(modules)), config)

    def forward(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call `function(*arguments)`, which uses the modules."""
        return function(*arguments)

    def twin(self, model: Model) -> Model:
        """A model that this process can sample from without the others: the model itself where every process
        will hold it whole, else a copy, which `refresh` updates. Call it before `distribute`."""
        return model

    def refresh(self, twin: nn.Module, model: nn.Module) -> None:
        """Copy the model's current weights into its `twin`. Only trained weights are sent."""

    def accumulating(self, more: bool) -> contextlib.AbstractContextManager[Any]:
        """Context for a micro-batch's forward and backward pass; with `more` others of the step follow."""
        return contextlib.nullcontext()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes that see different samples."""
        return list(values)

    def all_gather(self, value: Result) -> list[Result]:
        """The values of all processes that see different samples, in sample order, in every process. Tensors
        must be on the CPU."""
        return [value]

    @property
    def is_tensor_parallel(self) -> bool:
        """Whether a block's matrix products are split over processes (plan `tp`)."""
        return False

    def local_slice(self, count: int) -> slice:
        """This process's contiguous slice of `count` items; slices differ in length by one at most."""
        return slice(count * self.data_rank // self.data_size, count * (self.data_rank + 1) // self.data_size)

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        """The maximum of each value over all processes. Of flags: what one process asks for, all do."""
        return list(values)

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> float:
        """Scale the gradients so that their norm over the whole model is at most `limit`; returns the norm
        before scaling."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not float(norm) + 1e-6 <= limit:  # else torch would multiply all of them by 1
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return float(norm)

    def full_tensors_on_rank_zero(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on rank zero's CPU; an empty dictionary in the other processes, which must call it
        too."""
        return dict(tensors)

    def save_parts(
        self,
        target: Path,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        texts: Mapping[str, str],
        then: Callable[[], None],
    ) -> None:
        """Begin to write a sharded checkpoint, each process its shards. Rank zero calls `then` when it is
        complete."""
        raise NotImplementedError("one process alone has no parts")

    def load_parts(
        self, found: Checkpoint, parts: Mapping[str, Mapping[str, Tensor]], *, final: bool
    ) -> dict[str, Tensor]:
        """Fill the modules' tensors, by file and name, from a sharded checkpoint of any plan; returns the
        optimisers' tensors and the random streams."""
        raise NotImplementedError("one process alone has no parts")

    def broadcast_from_rank0(self, make: Callable[[], Result]) -> Result:
        """Call `make` in rank zero only; returns its result in every process."""
        return make()

    def flush(self) -> None:
        """Wait for a checkpoint that is still being written. Raises UserError when writing failed."""

    def optimiser_tensors(self, optimisers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
        """The optimisers' state by name, the same names under every plan."""
        return checkpoint.optimiser_tensors(optimisers)

    def load_optimiser_tensors(
        self, optimisers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]
    ) -> None:
        """Inverse of `optimiser_tensors`."""
        checkpoint.load_optimiser_tensors(optimisers, tensors)

    def fill(self, wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, where: str) -> None:
        """Copy whole tensors into a module's own, by name."""
        checkpoint.fill(wanted, tensors, where=where)

    def rng_tensors(self) -> dict[str, Tensor]:
        """The random streams of all processes by name."""
        return {"rng": runtime.rng_state()}

    def set_rng_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the saved streams. With another number of processes than saved them, derive new streams
        from theirs."""
        mine = "rng" if not self.together else f"rng.{runtime.rank()}"
        count = sum(name.startswith("rng") for name in tensors)
        if mine in tensors and count == (runtime.world_size() if self.together else 1):
            runtime.set_rng_state(tensors[mine])
            return
        seen = tensors.get("rng", tensors.get("rng.0"))
        assert seen is not None
        torch.manual_seed(runtime.seed_for("rng", bytes(seen.cpu().numpy()).hex(), runtime.rank()))


SINGLE_PROCESS = ParallelContext()
