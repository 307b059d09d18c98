"""Dry run of a training step: run the real code on fake tensors to find what it would allocate and compute.

A fake tensor has a shape, a type and a device but no memory (torch's FakeTensorMode), so a step of a model of
any size takes about a second. Every operation is recorded as it is dispatched: which buffers it makes, when
they are freed, which shapes it works on. The model is not described twice: a change there counts here too.

For a model of more than `DIRECT` layers the dry run is done with 3 and with 5 layers. Every block allocates
and computes the same, so that all quantities are linear in the number of layers.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from chatwright import optim
from chatwright.optim import OptimConfig
from chatwright.train.planning.program import StepProgram

DIRECT = 6
"""Most layers for which the dry run uses the model itself."""

PARTS = ("weights", "gradients", "optimiser", "bf16 copies", "activations", "logits")
"""The parts of memory. `activations` are what the backward pass needs, and working buffers."""

Operation = tuple[Any, ...]
"""A function of torch with the shapes, strides and types of its arguments, which determine its time."""


@dataclass(frozen=True)
class DryRun:
    """The needs of an optimiser step. Bytes are those of live tensors at the peak of each phase."""

    parameters: float
    phases: Mapping[str, Mapping[str, float]]
    """Phase (`step`, `update`, `measure`) -> part -> bytes."""
    flop: float
    operations: Mapping[Operation, float] = field(repr=False, default_factory=dict)
    """How often each operation occurs in an optimiser step. Extrapolation from two depths may make a count
    negative."""

    @property
    def memory(self) -> dict[str, float]:
        """The parts of the largest phase."""
        largest = max(self.phases, key=lambda phase: sum(self.phases[phase].values()))
        return dict(self.phases[largest])


def dry_run(
    build: Callable[[int], StepProgram],
    layers: int,
    optim_config: OptimConfig,
    *,
    micro: int,
    micro_batches: int,
) -> DryRun:
    """An optimiser step over `micro_batches` micro-batches of `micro` samples. `build(n)` makes the program
    with n layers."""

    def once(count: int) -> DryRun:
        return _dry_run(lambda: build(count), optim_config, micro, micro_batches)

    if layers <= DIRECT:
        return once(layers)
    few, more = once(3), once(5)
    steps = (layers - 3) / 2

    def line(a: float, b: float) -> float:
        return a + steps * (b - a)

    def lines(a: Mapping[Any, float], b: Mapping[Any, float]) -> dict[Any, float]:
        return {
            key: line(a.get(key, 0.0), b.get(key, 0.0)) for key in (*a, *(key for key in b if key not in a))
        }

    return DryRun(
        line(few.parameters, more.parameters),
        {phase: lines(few.phases[phase], more.phases[phase]) for phase in few.phases},
        line(few.flop, more.flop),
        lines(few.operations, more.operations),
    )


def _dry_run(
    build: Callable[[], StepProgram], optim_config: OptimConfig, micro: int, micro_batches: int
) -> DryRun:
    flops = FlopCounterMode(display=False, custom_mapping=_attention_on_cpus())
    with warnings.catch_warnings(), FakeTensorMode(), _Watch() as watch, flops:
        # copy.deepcopy accesses it.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        program = build()
        modules = nn.ModuleList([*program.trained, *program.frozen])
        watch.name("weights", (*modules.parameters(), *modules.buffers()))
        watch.shapes = {tuple(p.shape) for p in modules.parameters() if p.ndim > 1}
        watch.vocabulary = program.vocabulary
        optimisers = optim.build(nn.ModuleList(program.trained), optim_config)
        # From the second micro-batch on, the gradients take up memory during the forward pass.
        repeated = min(micro_batches, 2)
        phases: dict[str, Mapping[str, float]] = {}
        for _ in range(2):  # the first step makes the optimiser's state
            watch.operations.clear()
            before = flops.get_total_flops()
            with watch.phase(phases, "step"):
                for number in range(repeated):
                    start, seen = flops.get_total_flops(), Counter(watch.operations)
                    (program.step(micro) / micro_batches).backward()  # type: ignore[no-untyped-call]
                    if number:  # counted once more for each micro-batch that is left out here
                        left_out = micro_batches - repeated
                        before -= left_out * (flops.get_total_flops() - start)
                        watch.operations.update(
                            {k: left_out * n for k, n in (watch.operations - seen).items()}
                        )
            with watch.phase(phases, "update"):
                for optimiser in optimisers:
                    optimiser.step()
            watch.name("optimiser", _state(optimisers))
            for optimiser in optimisers:
                optimiser.zero_grad(set_to_none=True)
        flop, operations = flops.get_total_flops() - before, dict(watch.operations)
        if program.measure is not None:
            # The measure ends by reading a number, which fake tensors do not have: by then all is recorded.
            with watch.phase(phases, "measure"), torch.no_grad(), suppress(DataDependentOutputException):
                program.measure()
        parameters = sum(p.numel() for p in modules.parameters() if p.requires_grad)
    return DryRun(parameters, phases, flop, operations)


def _state(optimisers: Iterable[torch.optim.Optimizer]) -> Iterator[Tensor]:
    for optimiser in optimisers:
        for state in optimiser.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operation: what is allocated and freed, and how often each operation and shape occurs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: Counter[Operation] = Counter()
        self.shapes: set[tuple[int, ...]] = set()
        self.vocabulary = 0
        self._live: dict[int, tuple[int, tuple[int, ...], torch.dtype, Any]] = {}
        self._names: dict[int, str] = {}
        self._now = self._peak = 0
        # Since the phase began: (storage, None) freed, (storage, entry) made.
        self._log: list[tuple[int, Any]] = []
        self._peak_at = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._made(value)
        if func.namespace == "aten" and not func.is_view:  # the others take almost no time
            self.operations[_signature(func, args, kwargs or {})] += 1
        return result

    def _made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = storage.nbytes()
        freed = partial(self._freed, key)
        entry = (size, tuple(tensor.shape), tensor.dtype, weakref.ref(storage, freed))
        self._live[key] = entry
        self._log.append((key, entry))
        self._now += size
        if self._now > self._peak:
            self._peak, self._peak_at = self._now, len(self._log)

    def _freed(self, key: int, _storage: Any = None) -> None:
        entry = self._live.pop(key, None)
        self._names.pop(key, None)
        if entry is not None:
            self._now -= entry[0]
            self._log.append((key, None))

    def name(self, part: str, tensors: Iterable[Tensor]) -> None:
        """Name the part of memory that these tensors belong to."""
        for tensor in tensors:
            self._made(tensor.detach())
            self._names.setdefault(tensor.untyped_storage()._cdata, part)

    @contextmanager
    def phase(self, phases: dict[str, Mapping[str, float]], name: str) -> Iterator[None]:
        """Write the parts of memory at the peak inside the block to phases[name]."""
        start, self._log, self._peak, self._peak_at = dict(self._live), [], self._now, 0
        yield
        for key, entry in self._log[: self._peak_at]:
            if entry is None:
                start.pop(key, None)
            else:
                start[key] = entry
        parts = dict.fromkeys(PARTS, 0.0)
        for key, (size, shape, dtype, _) in start.items():
            parts[self._part(key, shape, dtype)] += size
        phases[name] = parts

    def _part(self, key: int, shape: tuple[int, ...], dtype: torch.dtype) -> str:
        if key in self._names:
            return self._names[key]
        if shape in self.shapes or shape[::-1] in self.shapes:
            return "gradients" if dtype == torch.float32 else "bf16 copies"
        return "logits" if self.vocabulary and shape and shape[-1] == self.vocabulary else "activations"


def _signature(func: Any, args: Any, kwargs: Any) -> Operation:
    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return ("tensor", tuple(value.shape), tuple(value.stride()), value.dtype)
        if isinstance(value, (list, tuple)):
            return ("list", *map(plain, value))
        return value

    return (func, tuple(map(plain, args)), tuple((key, plain(value)) for key, value in kwargs.items()))


def _attention_on_cpus() -> dict[Any, Any]:
    """FLOP counts for the CPU's fused attention, which torch does not count. As for GPUs: two products
    forward, five backward."""

    def products(number: int) -> Any:
        def count(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
            q, k = shapes[0] if number == 2 else shapes[1], shapes[1] if number == 2 else shapes[2]
            batch, heads, tokens, size = q
            return 2 * number * int(batch * heads * tokens * k[2] * size)

        return count

    return {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: products(2),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: products(5),
    }
