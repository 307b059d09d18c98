"""`MultiProcess`: the `ParallelContext` of several processes, by DDP, FSDP2 and DTensor.

DDP, FSDP2 (`fully_shard`) and DTensor (`parallelize_module`) change modules in place or wrap them. Here is
what they need beyond that: one root module for every forward pass, sums over the right processes, the norm of
a sharded gradient.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from chatwright import checkpoint, optim, runtime, sharded
from chatwright.checkpoint import Checkpoint
from chatwright.config import UsageError
from chatwright.model.gpt import Block
from chatwright.model.lora import adapter_names
from chatwright.optim import OptimConfig
from chatwright.train.parallel.context import MeshShape, ParallelContext

Result = TypeVar("Result")
Model = TypeVar("Model", bound=nn.Module)


class _Root(nn.Module):
    """Root module of all modules of a trainer. Its forward pass is any function of a stage: DDP and FSDP act
    where a forward pass begins and ends, and stages call more than one method of their models.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(dict(modules))

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        outcome = function(*arguments)
        # DDP and FSDP look for tensors in tuples and dicts, not in a stage's own dataclasses.
        return (outcome, outcome.loss, dict(outcome.logged)) if hasattr(outcome, "loss") else outcome


class MultiProcess(ParallelContext):
    """Processes arranged as a mesh of the given shape."""

    together = True

    def __init__(
        self, mesh_shape: MeshShape, *, dtype: torch.dtype = torch.float32, compile_blocks: bool = False
    ) -> None:
        self.mesh_shape, self.dtype, self.compile_blocks = mesh_shape, dtype, compile_blocks
        self.mesh: DeviceMesh = init_device_mesh(
            runtime.device().type,
            (mesh_shape.replicas, mesh_shape.shard, mesh_shape.tensor),
            mesh_dim_names=("replicas", "shard", "tensor"),
        )
        replica, shard, _ = self.mesh.get_coordinate() or (0, 0, 0)
        self.data_rank, self.data_size = (
            replica * mesh_shape.shard + shard,
            mesh_shape.replicas * mesh_shape.shard,
        )
        self.is_sharded = mesh_shape.shard > 1 or mesh_shape.tensor > 1
        self._root: nn.Module | None = None
        self._frozen: nn.Module | None = None
        self._alike = True
        self._saving = sharded.Saving()
        self._partial: list[Tensor] = []
        self._replicated: list[Tensor] = []
        self._places: dict[Tensor, str] = {}

    def distribute(
        self, modules: Mapping[str, nn.Module], frozen: Mapping[str, nn.Module] | None = None
    ) -> None:
        # An EMA of the weights is saved beside the model and never computed with: with a root of its own it
        # stays sharded.
        still = {
            name: one for name, one in modules.items() if not any(p.requires_grad for p in one.parameters())
        }
        root = _Root({name: one for name, one in modules.items() if name not in still})
        # Delaying the all-reduce between replicas needs gradients of the same parameters in each micro-batch.
        # General text has none for a critic.
        self._alike = len(root.parts) == 1
        blocks = [module for module in root.modules() if isinstance(module, Block)]
        if self.mesh_shape.tensor > 1:
            if adapter_names(root):
                raise UsageError("parallel.plan tp does not cut adapters: use ddp or fsdp with lora")
            if any(block.attention.norm_whole for block in blocks):
                raise UsageError(
                    "parallel.plan tp does not cut norms over all heads' features together (qk_norm_whole): "
                    "use ddp or fsdp"
                )
            for block in blocks:
                self._cut_products(block)
        if self.compile_blocks and self.is_sharded:
            for block in blocks:  # one graph for all of them, without FSDP's hooks
                _compile_for_training(block)
        if self.mesh_shape.shard > 1:
            self._cut_parameters(root, blocks)
            self._root = root
            if frozen:
                self._frozen = _Root(frozen)
            others = [self._frozen] if self._frozen is not None else []
            others += [_Root({name: one}) for name, one in still.items()]
            for other in others:
                self._cut_parameters(other, [part for part in other.modules() if isinstance(part, Block)])
        elif self.mesh_shape.replicas > 1:
            devices = [runtime.device()] if runtime.device().type == "cuda" else None
            self._root = DistributedDataParallel(root, device_ids=devices, gradient_as_bucket_view=True)
        else:
            self._root = root
        if self.data_rank:  # other samples, other dropout
            torch.manual_seed(runtime.seed_for(torch.initial_seed(), "rank", self.data_rank))

    def _cut_products(self, block: Block) -> None:
        """Split query, key, value, gate and up by columns, so that each process has its own heads; output and
        down by rows, followed by a sum."""
        columns = [
            "attention.query",
            "attention.key",
            "attention.value",
            "mlp.up",
            *(["mlp.gate"] if block.mlp.gate else []),
        ]
        plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in columns}
        plan |= {name: RowwiseParallel() for name in ("attention.output", "mlp.down")}
        # The input is replicated. Declaring that once, not for each matrix, makes its gradient one all-reduce
        # instead of three.
        same = Replicate()
        plan |= {
            "attention": PrepareModuleInput(input_layouts=(same, None), desired_input_layouts=(same, None)),
            "mlp": PrepareModuleInput(input_layouts=(same,), desired_input_layouts=(same,)),
        }
        parallelize_module(block, self.mesh["tensor"], plan)
        block.attention.heads //= self.mesh_shape.tensor
        block.attention.kv_heads //= self.mesh_shape.tensor

    def _cut_parameters(self, root: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Make each block an FSDP unit; embeddings, norms and the head belong to the root. The residual
        stream and the root stay in float32, as in one process; only the blocks' products are in bf16."""
        mesh = self.mesh["replicas", "shard"] if self.mesh_shape.replicas > 1 else self.mesh["shard"]
        half = None if self.dtype == torch.float32 else self.dtype
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(root, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))

    def optimisers(
        self, modules: Mapping[str, nn.Module], config: OptimConfig
    ) -> list[torch.optim.Optimizer]:
        made = optim.build(nn.ModuleDict(dict(modules)), config)
        for number, optimiser in enumerate(made):
            order = [parameter for group in optimiser.param_groups for parameter in group["params"]]
            self._places |= {parameter: f"{number}.{index}" for index, parameter in enumerate(order)}
            # A fused step needs tensors that are all sharded in the same way, or not at all.
            optimiser.param_groups = [
                {**group, "params": part}
                for group in optimiser.param_groups
                for part in _kinds(group["params"])
            ]
        if self.mesh_shape.tensor > 1:
            cut = [p for p in self._places if isinstance(p, DTensor) and "tensor" in _names(p)]
            normed = [
                norm.weight
                for module in modules.values()
                for block in module.modules()
                if isinstance(block, Block)
                for norm in (block.attention.query_norm, block.attention.key_norm)
                if norm is not None
            ]
            self._partial = [p for p in self._places if any(p is weight for weight in normed)]
            self._replicated = [
                p for p in self._places if not any(p is other for other in (*cut, *self._partial))
            ]
        return made

    def forward(self, function: Callable[..., Result], *arguments: Any) -> Result:
        if self._root is None or (
            not torch.is_grad_enabled() and isinstance(self._root, DistributedDataParallel)
        ):
            return function(*arguments)
        # FSDP casts the blocks' parameters to `dtype`, so that even float32 measures must autocast to it.
        with runtime.autocast(self.dtype if self.mesh_shape.shard > 1 else torch.float32):
            if torch.is_grad_enabled() or self._frozen is None:
                outcome: Any = self._root(function, *arguments)
            else:
                outcome = self._root(self._frozen, function, *arguments)
        if not torch.is_grad_enabled():
            for module in self._units():
                module.reshard()  # without a backward pass the whole parameters would stay in memory
        if isinstance(outcome, tuple) and hasattr(outcome[0], "loss"):
            step, loss, logged = outcome
            return type(step)(loss, logged)  # type: ignore[no-any-return]
        return outcome  # type: ignore[no-any-return]

    def _units(self) -> list[FSDPModule]:
        roots = [root for root in (self._root, self._frozen) if root is not None]
        return [module for root in roots for module in root.modules() if isinstance(module, FSDPModule)]

    def twin(self, model: Model) -> Model:
        return copy.deepcopy(model).requires_grad_(False) if self.is_sharded else model

    def refresh(self, twin: nn.Module, model: nn.Module) -> None:
        if twin is model:
            return
        copies = checkpoint.model_tensors(twin)
        with torch.no_grad():
            for name, tensor in checkpoint.model_tensors(model).items():
                if tensor.requires_grad:  # under an adapter the rest has not changed
                    copies[name].copy_(_whole(tensor.detach()))

    @contextlib.contextmanager
    def accumulating(self, more: bool) -> Iterator[None]:
        if isinstance(self._root, DistributedDataParallel) and more:
            with self._root.no_sync():
                yield
            return
        if isinstance(self._root, FSDPModule):
            self._root.set_is_last_backward(not more)
            if self.mesh_shape.replicas > 1 and self._alike:
                self._root.set_requires_all_reduce(not more)
        yield

    def sum(self, values: Sequence[float]) -> list[float]:
        # Processes of one `tensor` group have equal values, which the sum over all counts repeatedly.
        return [value / self.mesh_shape.tensor for value in _reduced(values, dist.ReduceOp.SUM)]

    def all_gather(self, value: Result) -> list[Result]:
        found: list[Any] = [None] * runtime.world_size()
        dist.all_gather_object(
            found, value, group=runtime.group("agreeing")
        )  # pickled between our own processes
        return found[:: self.mesh_shape.tensor]

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        return _reduced(values, dist.ReduceOp.MAX)

    @property
    def is_tensor_parallel(self) -> bool:
        return self.mesh_shape.tensor > 1

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> float:
        if self.mesh_shape.tensor > 1:
            self._agree_on_gradients()
        parts = _kinds([parameter for parameter in parameters if parameter.grad is not None])
        norms = [
            torch.nn.utils.get_total_norm([p.grad for p in part if p.grad is not None]) for part in parts
        ]
        norm = torch.stack([_whole(one) for one in norms]).norm()
        for part in parts:
            torch.nn.utils.clip_grads_with_norm_(part, limit, norm)
        return float(norm)

    def _agree_on_gradients(self) -> None:
        """All-reduce the gradients of parameters that `tp` does not split, within a group. Those of the query
        and key norms come from that process's heads alone, and are summed. The others are equal up to
        rounding by unordered sums on GPUs, and are averaged, so that the replicas do not drift apart."""
        group = self.mesh["tensor"].get_group()
        for parameters, share in ((self._partial, 1), (self._replicated, self.mesh_shape.tensor)):
            gradients = [_local(p.grad) for p in parameters if p.grad is not None]
            if not gradients:
                continue
            together = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(together, group=group)
            together /= share
            for gradient in gradients:
                gradient.copy_(together[: gradient.numel()].view_as(gradient))
                together = together[gradient.numel() :]

    def full_tensors_on_rank_zero(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = {}
        for name, tensor in tensors.items():  # one by one: only rank zero has room for all of them
            one = _whole(tensor.detach())
            if runtime.is_rank_zero():
                kept[name] = one.cpu()
        return kept

    def save_parts(
        self,
        target: Path,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        texts: Mapping[str, str],
        then: Callable[[], None],
    ) -> None:
        flat = {
            f"{part}/{name}": tensor for part, content in tensors.items() for name, tensor in content.items()
        }
        self._saving.start(target, flat, state, texts, then)

    def load_parts(
        self, found: Checkpoint, parts: Mapping[str, Mapping[str, Tensor]], *, final: bool
    ) -> dict[str, Tensor]:
        wanted = {
            f"{part}/{name}": tensor.detach()
            for part, content in parts.items()
            for name, tensor in content.items()
        }
        state = {
            name: self._room_for(name.removeprefix("optimizer/"), item.size, item.properties.dtype)
            for name, item in sharded.describe(found.path).items()
            if name.startswith("optimizer/") and not final
        }
        sharded.read(found.path, wanted | state)
        return {name.removeprefix("optimizer/"): tensor for name, tensor in state.items()}

    def broadcast_from_rank0(self, make: Callable[[], Result]) -> Result:
        return runtime.broadcast_from_rank0(make)

    def flush(self) -> None:
        self._saving.flush()

    def optimiser_tensors(self, optimisers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
        return {
            f"{self._places[parameter]}.{key}": torch.as_tensor(value)
            for optimiser in optimisers
            for parameter, state in optimiser.state.items()
            for key, value in state.items()
        }

    def load_optimiser_tensors(
        self, optimisers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]
    ) -> None:
        for number, optimiser in enumerate(optimisers):
            places = {f"{self._places[p]}.": p for group in optimiser.param_groups for p in group["params"]}
            for name, tensor in tensors.items():
                owner, index, key = name.split(".", 2)
                if owner == str(number):
                    parameter = places[f"{owner}.{index}."]
                    optimiser.state[parameter][key] = _like(tensor, parameter)

    def fill(self, wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, where: str) -> None:
        ready = {
            name: _like(tensor, wanted[name]) if name in wanted else tensor
            for name, tensor in tensors.items()
        }
        checkpoint.fill(wanted, ready, where=where)

    def _room_for(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """An empty tensor for a saved one of an optimiser, sharded like its parameter; `name` is that of
        `optimiser_tensors`."""
        place = ".".join(name.split(".")[:2])
        for parameter, own in self._places.items():
            if own == place and parameter.shape == shape:
                return torch.zeros_like(parameter, dtype=dtype).detach()
        return torch.zeros(shape, dtype=dtype)

    def rng_tensors(self) -> dict[str, Tensor]:
        own = runtime.rng_state()
        found = [torch.empty_like(own) for _ in range(runtime.world_size())]
        dist.all_gather(found, own, group=runtime.group("agreeing"))
        return {f"rng.{number}": state for number, state in enumerate(found)}


def _compile_for_training(block: nn.Module) -> None:
    """Compile a block's forward pass for use with gradients; held-out texts, of many lengths, use the plain
    one."""
    plain = block.forward
    compiled = torch.compile(plain)  # dynamic=False would make a graph for each block's number

    def forward(*arguments: Any) -> Any:
        return compiled(*arguments) if torch.is_grad_enabled() else plain(*arguments)

    block.forward = forward


def _reduced(values: Sequence[float], how: Any) -> list[float]:
    numbers = torch.tensor(list(values), dtype=torch.float64)
    dist.all_reduce(numbers, op=how, group=runtime.group("agreeing"))
    return [float(number) for number in numbers]


def _kinds(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group parameters by how they are sharded."""
    found: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(
            parameter
        )
    return list(found.values())


def _names(tensor: DTensor) -> tuple[str, ...]:
    return tensor.device_mesh.mesh_dim_names or ()


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(tensor: Tensor, model: Tensor) -> Tensor:
    """The tensor on `model`'s device, and sharded like `model` where the shapes agree."""
    if isinstance(tensor, DTensor) or not isinstance(model, DTensor) or tensor.shape != model.shape:
        return tensor.to(model.device)
    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None)
